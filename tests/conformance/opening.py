"""Storages from a ZConfig text: ours, and the base's own blob directory as the control."""

from contextlib import closing
from dataclasses import dataclass
import os
from pathlib import Path

from ZODB.blob import is_blob_record
from ZODB.config import storageFromString

from ..services.location import keys


S3 = """\
<s3blobstorage>
  bucket-name {location.bucket}
  s3-prefix {prefix}
  s3-endpoint-url {location.endpoint_url}
  s3-access-key {location.access_key}
  s3-secret-key {location.secret_key}
  s3-addressing-style path
  cache-dir {blob_dir}
{options}
{base}
</s3blobstorage>
"""
MODULES = {
    "s3blobstorage": "zodb_s3blobs",
    "relstorage": "relstorage",
    "hexstorage": "ZODB.tests",
    "zlibstorage": "zc.zlibstorage",
}
# What ZConfig knows with underscores.
UNDERSCORED = {"revert_when_stale"}


@dataclass(frozen=True)
class Kind:
    """What a suite runs over.

    :param str base: the ZConfig section of the innermost storage, or of RelStorage's database
    :param bool s3: blobs in a bucket; otherwise in a directory, the control
    :param str wrapper: the ZConfig section put around it, or ""
    :param str inside: the same, but between the base and our section
    :param bool keep_history: of RelStorage; the others keep it always
    """

    base: str
    s3: bool
    wrapper: str = ""
    inside: str = ""
    keep_history: bool = True

    def __str__(self):
        parts = [self.wrapper, "s3" if self.s3 else "control", self.inside]
        parts += ["relstorage" if self.is_relstorage else "", self.base]
        parts += ["" if self.keep_history else "free"]
        return "-".join(filter(None, parts))

    @property
    def is_relstorage(self):
        """Whether the base is RelStorage over one of its databases."""
        return self.base in ("postgresql", "sqlite3")


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


def section(name, inner="", **options):
    """Return the text of a ZConfig section.

    :param str inner: the text of a section inside
    :param options: its keys
    """
    return "\n".join(filter(None, [f"<{name}>", lines_of(options), inner, f"</{name}>"]))


class Opener:
    """Open the storages of one test by their names.

    The same name is the same storage: the same file or database, the same prefix in the bucket.
    Blobs of a bucket are cached in ``blob_dir``: a new one there means an empty cache.

    :param S3Location location: where the bucket is, for a kind with S3
    :param str prefix: the test's, before the names of its storages
    :param new_database: returns the dsn of a new database, for a kind over PostgreSQL
    """

    def __init__(self, kind, location=None, prefix="", new_database=None):
        self.kind = kind
        self._location = location
        self._prefix = prefix
        self._new_database = new_database
        self._databases = {}
        self._opened = []

    def __call__(self, name="data", blob_dir=None, **options):
        """Open a storage.

        :param options: keys of the base's section, such as ``read_only``; ``cache_size`` is that
            of the blobs' cache
        :returns: what ZODB.config makes of the text
        """
        storage = storageFromString(self.text(name, blob_dir, **options))
        self._opened.append((name, storage))
        return storage

    def text(self, name="data", blob_dir=None, **options):
        """Return the configuration of a storage, from its %import lines on."""
        body = self.body(name, blob_dir, **options)
        imports = [f"%import {module}" for used, module in MODULES.items() if f"<{used}>" in body]
        return "\n".join([*imports, body])

    def body(self, name="data", blob_dir=None, **options):
        """Return the sections of a storage alone, to stand in others.

        The control over a mapping storage stores blobs only where a directory is asked for, because
        ZODB's BlobStorage around it takes less arguments than the mapping storage itself.
        """
        kind = self.kind
        directory, blob_dir = blob_dir, blob_dir or f"{name}.blobs"
        ours = {"cache_size": options.pop("cache_size", None)} if kind.s3 else {}
        if kind.is_relstorage:
            text = self._relstorage(name, blob_dir, options)
            # Other bases need no grace.
            ours["gc_grace"] = "0s"
        elif kind.base == "filestorage":
            files = None if kind.s3 else blob_dir
            text = section("filestorage", path=f"{name}.fs", blob_dir=files, **options)
        else:
            text = section(kind.base, **options)
            if directory and not kind.s3:
                text = section("blobstorage", text, blob_dir=directory)
        if kind.inside:
            text = section(kind.inside, text)
        if kind.s3:
            text = S3.format(
                location=self._location,
                prefix=f"{self._prefix}{name}",
                blob_dir=blob_dir,
                options=lines_of(ours),
                base=text,
            )
        if kind.wrapper:
            text = section(kind.wrapper, text)
        return text

    def _relstorage(self, name, blob_dir, options):
        """Return the section of a RelStorage.

        As the control it has a shared blob directory, which is as FileStorage's; where a cache's
        size is asked for it has the other kind, whose blobs are in the database.
        """
        if not self.kind.s3:
            cache_size = options.pop("cache_size", None)
            options |= {
                "blob_dir": os.path.abspath(blob_dir),
                "shared_blob_dir": cache_size is None,
                "blob_cache_size": cache_size,
            }
        return section(
            "relstorage", self._database(name), keep_history=self.kind.keep_history, **options
        )

    def _database(self, name):
        """Return the section of a database, made when it is asked for first."""
        if name not in self._databases:
            if self.kind.base == "postgresql":
                options = {"driver": "psycopg2", "dsn": self._new_database()}
            else:
                options = {"driver": "sqlite3", "data_dir": os.path.abspath(f"{name}.sqlite3")}
                os.mkdir(options["data_dir"])
            self._databases[name] = section(self.kind.base, **options)
        return self._databases[name]

    def keys(self, name="data"):
        """Return the keys that a storage has in the bucket."""
        return keys(self._location, f"{self._prefix}{name}/")

    def check_bucket(self):
        """Assert that all blobs of the file storages opened so far can be read from an empty cache.

        Files that the storages have still got in their caches must have the same bytes.
        """
        for number, (name, storage) in enumerate(list(self._opened)):
            with closing(self(name, f"check-{number}", read_only=True)) as cold:
                for oid, tid in blob_revisions(cold):
                    content = Path(cold.loadBlob(oid, tid)).read_bytes()
                    cached = Path(storage.fshelper.getBlobFilename(oid, tid))
                    assert not cached.exists() or cached.read_bytes() == content


def blob_revisions(storage):
    """Yield (oid, tid) for each revision of a blob."""
    for transaction in storage.iterator():
        for record in transaction:
            if is_blob_record(record.data):
                yield record.oid, record.tid
