"""Sites for the command line: a configuration, a database, and blobs in it."""

from contextlib import closing
from contextlib import contextmanager
from dataclasses import dataclass
import json
import os
from pathlib import Path

from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.config import databaseFromString

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.operate.main import main
from zodb_s3blobs.records import read_reference

from .relstorages import Database
from .services.location import boto3_client
from .storages import filestorage
from .storages import section
from .zeoclients import FILE
from .zeoclients import ZeoDatabase


@dataclass
class Site:
    """A configuration file, and the bucket and the directory that it names.

    :param base: text of the section inside; by default a FileStorage.
    :param options: keys of the <s3blobstorage>.
    """

    location: object
    directory: Path
    base: str | None = None
    imports: tuple = ()
    cache: str = "cache"
    options: dict | None = None
    #: a ZConfig text with "{}" in the place of our section
    around: str = "{}"

    @property
    def path(self):
        return f"{self.directory}/zope.conf"

    def text(self, **more):
        options = {"s3_max_attempts": 2, **(self.options or {}), **more}
        base = self.base or filestorage(self.directory)
        text = section(self.location, self.directory, self.cache, base, **options)
        return self.around.format(text)

    @property
    def head(self):
        return "".join(f"%import {name}\n" for name in ("zodb_s3blobs", *self.imports))

    def write(self, **more):
        """Write the configuration file, with further keys."""
        text = f"{self.head}<zodb_db main>\n{self.text(**more)}\n</zodb_db>\n"
        Path(self.path).write_text(text)

    @contextmanager
    def open(self, **more):
        """Open the database as Zope does."""
        text = f"{self.head}<zodb>\n{self.text(**more)}\n</zodb>\n"
        with closing(databaseFromString(text)) as db:
            yield db

    def run(self, capsys, *arguments, status=0):
        """Run a command with --json and return what it prints; its exit status must be this."""
        capsys.readouterr()
        found = main(["-C", self.path, *arguments, "--json"])
        output = capsys.readouterr()
        assert found == status, (output.out, output.err)
        return json.loads(output.out) if output.out else output.err

    def bucket(self):
        """Return a plain client, to be closed."""
        return closing(boto3_client(self.location))


def filestorage_site(location, directory, **options):
    return Site(location, directory, options=options)


def relstorage_site(location, directory, keep_history=True, **options):
    base = Database("sqlite3", f"{directory}/database", keep_history).section
    return Site(location, directory, base, ("relstorage",), options={"gc_grace": 0, **options})


def zeo_site(location, directory, zeo, **options):
    storage = zeo.new(FILE)
    base = ZeoDatabase(storage.server, storage.name).section
    named = {"owner": "site", "gc_grace": 0, **options}
    return Site(location, directory, base, ("ZEO",), options=named)


def add_folder(conn, *path):
    """Return a mapping below the root, made when it is missing."""
    folder = conn.root()
    for name in path:
        if name not in folder:
            folder[name] = PersistentMapping()
        folder = folder[name]
    return folder


def put_blobs(db, contents, *path):
    """Store blobs below a path, a mapping of names to bytes; return their needs by name.

    :returns: (oid, tid, key) by name.
    """
    with db.transaction() as conn:
        folder = add_folder(conn, *path)
        for name, data in contents.items():
            blob = folder.get(name) or Blob()
            folder[name] = blob
            with blob.open("w") as file:
                file.write(data)
    with db.transaction() as conn:
        folder = add_folder(conn, *path)
        oids = {name: folder[name]._p_oid for name in contents}
    with db.storage.parts.base.snapshot() as snapshot:
        found = dict(snapshot.revisions(oids.values()))
    needs = {}
    for name, oid in oids.items():
        tid = max(found[oid])
        needs[name] = oid, tid, blob_key(oid, read_reference(found[oid][tid]) or tid)
    return needs


def hexadecimal(number):
    return f"0x{int.from_bytes(number, 'big'):x}"


def cached_path(site, oid, tid):
    """Return where the cache of a site has a file."""
    name = oid.hex()
    return os.path.join(site.directory, site.cache, name[-3:], f"{name}.{tid.hex()}.blob")


def overwrite(path, data):
    """Change a read-only file."""
    os.chmod(path, 0o600)
    Path(path).write_bytes(data)
    os.chmod(path, 0o400)


class Stop:
    """Says that a run is stopped after a number of questions."""

    def __init__(self, patience):
        self._patience = self._left = patience
        self.count = 0

    def __call__(self, work):
        self._left -= 1
        return self._left < 0

    def again(self, more=1):
        """Begin to count anew, with more patience."""
        self.count += 1
        self._patience += more
        self._left = self._patience
