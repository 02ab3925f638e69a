"""Storages from a ZConfig text: ours, and the base's own blob directory as the control."""

from contextlib import closing
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import os
from pathlib import Path
import re

from ZODB.blob import is_blob_record
from ZODB.config import storageFromString
from ZODB.DemoStorage import DemoStorage

from ..services.location import keys


BASES = ("zeo", "relstorage", "filestorage", "mappingstorage")
MODULES = {
    "s3blobstorage": "zodb_s3blobs",
    "relstorage": "relstorage",
    "hexstorage": "ZODB.tests",
    "zlibstorage": "zc.zlibstorage",
    "serverzlibstorage": "zc.zlibstorage",
}
# What ZConfig knows with underscores.
UNDERSCORED = {"revert_when_stale"}


@dataclass(frozen=True)
class Kind:
    """What a suite runs over: storages inside each other.

    :param str stack: the ZConfig sections from the outermost to the innermost. "s3" is ours, and
        "control" says that blobs are in a directory; a "demostorage" has its changes inside, a
        "relstorage" its database, a "zeo" what the server serves
    :param bool keep_history: of RelStorage; the others keep it always
    :param bool by_record: ours says so, where the base does not ask for it
    """

    stack: str
    keep_history: bool = True
    by_record: bool = False

    def __str__(self):
        parts = [*self.layers, "" if self.keep_history else "free"]
        parts += ["record" if self.by_record else ""]
        return "-".join(filter(None, parts))

    @property
    def layers(self):
        """The names of the stack."""
        return self.stack.split()

    @property
    def s3(self):
        """Whether blobs are in a bucket."""
        return "s3" in self.layers

    def control(self):
        """Return the same without S3, to tell whose failure it is."""
        layers = [layer for layer in self.layers if layer != "s3"]
        base = min(layers.index(layer) for layer in BASES if layer in layers)
        stack = [*layers[:base], "control", *layers[base:]]
        return replace(self, stack=" ".join(stack), by_record=False)


def lines_of(options):
    """Return lines of a ZConfig section; Python's names and values are translated."""
    values = {
        key if key in UNDERSCORED else key.replace("_", "-"): (
            str(value).lower() if isinstance(value, bool) else value
        )
        for key, value in options.items()
        if value is not None
    }
    return "\n".join(f"  {key} {value}" for key, value in values.items())


def section(name, inner="", title="", **options):
    """Return the text of a ZConfig section.

    :param str inner: the text of a section inside
    :param str title: the name that this one has among others of its kind
    :param options: its keys
    """
    head = f"<{name} {title}>" if title else f"<{name}>"
    return "\n".join(filter(None, [head, lines_of(options), inner, f"</{name}>"]))


def modules_of(text):
    """Return the ZConfig components that a text needs."""
    names = re.findall(r"^<(\w+)", text, re.MULTILINE)
    return sorted({MODULES[name] for name in names if name in MODULES})


@dataclass(frozen=True)
class Place:
    """Where a storage keeps what it has.

    :param str path: of its file, without the extension
    :param str prefix: in the bucket
    :param blob_dir: of its blobs, cached or not, where a caller names one
    :param dict options: keys of the section that a caller wants to set
    :param bool keeps_blobs: the base does so, in the directory
    """

    path: str
    prefix: str
    blob_dir: str | None = None
    options: dict = field(default_factory=dict)
    keeps_blobs: bool = False

    @property
    def directory(self):
        """The directory of blobs, with the default."""
        return self.blob_dir or f"{self.path}.blobs"


class Opener:
    """Open the storages of one test by their names.

    The same name is the same storage: the same file or database, the same prefix in the bucket.
    Blobs of a bucket are cached in ``blob_dir``: a new one there means an empty cache.

    :param S3Location location: where the bucket is, for a kind with S3
    :param str prefix: the test's, before the names of its storages
    :param new_database: returns the dsn of a new database, for a kind over PostgreSQL
    :param ZeoStorages zeo: for a kind over ZEO
    """

    def __init__(self, kind, location=None, prefix="", new_database=None, zeo=None):
        self.kind = kind
        self._location = location
        self._prefix = prefix
        self._new_database = new_database
        self._databases = {}
        self._zeo = zeo
        self._served = {}
        self._opened = []

    def __call__(self, name="data", blob_dir=None, **options):
        """Open a storage.

        :param options: keys of the base's section, such as ``read_only``; ``cache_size`` is that
            of the blobs' cache, ``zeo`` the options of a ZEO server
        :returns: what ZODB.config makes of the text
        """
        storage = storageFromString(self.text(name, blob_dir, **options))
        self._opened.append((name, storage))
        return storage

    def text(self, name="data", blob_dir=None, **options):
        """Return the configuration of a storage, from its %import lines on."""
        return with_imports(self.body(name, blob_dir, **options))

    def body(self, name="data", blob_dir=None, **options):
        """Return the sections of a storage alone, to stand in others."""
        place = Place(name, self._prefix + name, blob_dir, options)
        return self._section(self.kind.layers, place)

    # Each makes the text of a layer with all that is inside it.

    def _section(self, layers, place, title=""):
        layer, *inside = layers
        make = getattr(self, f"_make_{layer}", None)
        if make is None:  # it has no keys
            return section(layer, self._section(inside, place), title)
        return make(inside, place, title)

    def _make_s3(self, inside, place, title):
        options = dict(place.options)
        cache_size = options.pop("cache_size", None)
        return section(
            "s3blobstorage",
            self._section(inside, replace(place, options=options)),
            title,
            bucket_name=self._location.bucket,
            s3_prefix=place.prefix,
            s3_endpoint_url=self._location.endpoint_url,
            s3_access_key=self._location.access_key,
            s3_secret_key=self._location.secret_key,
            s3_addressing_style="path",
            cache_dir=place.directory,
            cache_size=cache_size,
            addressing="record" if self.kind.by_record else None,
            # Nobody else writes what these tests pack.
            gc_grace="0s",
        )

    def _make_control(self, inside, place, title):
        return self._section(inside, replace(place, keeps_blobs=True), title)

    def _make_demostorage(self, inside, place, title):
        return section("demostorage", self._section(inside, place, "changes"), title)

    def _make_filestorage(self, inside, place, title):
        blob_dir = place.directory if place.keeps_blobs else None
        return section(
            "filestorage", "", title, path=f"{place.path}.fs", blob_dir=blob_dir, **place.options
        )

    def _make_mappingstorage(self, inside, place, title):
        """Return the section of a mapping storage.

        As the control it has blobs only where a directory is asked for, because ZODB's BlobStorage
        around it takes less arguments than the mapping storage itself.
        """
        if place.keeps_blobs and place.blob_dir:
            inner = section("mappingstorage", **place.options)
            return section("blobstorage", inner, title, blob_dir=place.blob_dir)
        return section("mappingstorage", "", title, **place.options)

    def _make_relstorage(self, inside, place, title):
        """Return the section of a RelStorage.

        As the control it has a shared blob directory, which is as FileStorage's; where a cache's
        size is asked for it has the other kind, whose blobs are in the database.
        """
        options = dict(place.options)
        if place.keeps_blobs:
            cache_size = options.pop("cache_size", None)
            options |= {
                "blob_dir": os.path.abspath(place.directory),
                "shared_blob_dir": cache_size is None,
                "blob_cache_size": cache_size,
            }
        database = self._database(inside[0], place.path)
        return section(
            "relstorage", database, title, keep_history=self.kind.keep_history, **options
        )

    def _database(self, engine, name):
        """Return the section of a database, made when it is asked for first."""
        if name not in self._databases:
            if engine == "postgresql":
                options = {"driver": "psycopg2", "dsn": self._new_database()}
            else:
                options = {"driver": "sqlite3", "data_dir": os.path.abspath(f"{name}.sqlite3")}
                os.mkdir(options["data_dir"])
            self._databases[name] = section(engine, **options)
        return self._databases[name]

    def _make_zeo(self, inside, place, title):
        """Return the section of a ZEO client, with a blob directory where the server has blobs."""
        options = dict(place.options)
        read_only = options.pop("read_only", None)
        served = self._serve(inside, place.path, options, place.keeps_blobs)
        has_blobs = place.keeps_blobs or "s3" in inside
        return section(
            "zeoclient",
            "",
            title,
            server=served.server.address,
            storage=served.name,
            read_only=read_only,
            blob_dir=place.directory if has_blobs else None,
        )

    def _serve(self, layers, name, options, keeps_blobs):
        """Return the `ZeoStorage` of a name, which gets one when it is asked for first."""
        if name not in self._served:
            server = options.pop("zeo", {})
            place = Place("{name}", "zeo/{name}", None, options, keeps_blobs)
            text = self._section(layers, place, "{name}")
            self._served[name] = self._zeo.new(text, modules_of(text), **server)
        return self._served[name]

    # Looking

    def served(self, name="data"):
        """Return the `ZeoStorage` that a storage is a client of."""
        return self._served[name]

    @property
    def _is_in_server(self):
        """Whether our section is on the far side of ZEO."""
        layers = self.kind.layers
        return "zeo" in layers[: layers.index("s3")]

    def keys(self, name="data"):
        """Return the keys that a storage has in the bucket."""
        prefix = f"zeo/{self._served[name].name}" if self._is_in_server else self._prefix + name
        return keys(self._location, f"{prefix}/")

    def open_cold(self, name="data", blob_dir="cold"):
        """Open a storage once more, read-only and with an empty cache.

        What a ZEO server has in our section is opened here, for the server has a cache, too.
        """
        if not self.kind.s3 and "zeo" not in self.kind.layers:
            blob_dir = None  # a directory is all there is
        if not self.kind.s3 or not self._is_in_server:
            return storageFromString(self.text(name, blob_dir, read_only=True))
        served = self._served[name]
        path = f"{served.server.directory}/{served.name}"
        place = Place(path, f"zeo/{served.name}", blob_dir, {"read_only": True})
        # Those whose names begin with "server" leave records as they are.
        skipped = [each for each in self.kind.layers if each.startswith("server")]
        layers = [each for each in self.kind.layers if each not in ("zeo", *skipped)]
        return storageFromString(with_imports(self._section(layers, place)))

    def check_bucket(self):
        """Assert that all blobs of the file storages opened so far can be read from an empty cache.

        Files that the storages have still got in their caches must have the same bytes.
        """
        for number, (name, storage) in enumerate(list(self._opened)):
            changes = storage.changes if isinstance(storage, DemoStorage) else storage
            fshelper = changes.fshelper
            with closing(self.open_cold(name, f"check-{number}")) as cold:
                for oid, tid in blob_revisions(cold):
                    content = Path(cold.loadBlob(oid, tid)).read_bytes()
                    cached = Path(fshelper.getBlobFilename(oid, tid))
                    assert not cached.exists() or cached.read_bytes() == content


def with_imports(text):
    """Return a text with the %import lines that it needs."""
    return "\n".join([*(f"%import {module}" for module in modules_of(text)), text])


def blob_revisions(storage):
    """Yield (oid, tid) for each revision of a blob."""
    for transaction in storage.iterator():
        for record in transaction:
            if is_blob_record(record.data):
                yield record.oid, record.tid
