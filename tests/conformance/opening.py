"""Storages from a ZConfig text: ours, and ZODB's own blob directory as the control."""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from ZODB.blob import is_blob_record
from ZODB.config import storageFromString


S3 = """\
<s3blobstorage>
  bucket-name {location.bucket}
  s3-prefix {prefix}
  s3-endpoint-url {location.endpoint_url}
  s3-access-key {location.access_key}
  s3-secret-key {location.secret_key}
  s3-addressing-style path
  cache-dir {blob_dir}
{base}
</s3blobstorage>
"""
MODULES = {
    "s3blobstorage": "zodb_s3blobs",
    "hexstorage": "ZODB.tests",
    "zlibstorage": "zc.zlibstorage",
}


@dataclass(frozen=True)
class Kind:
    """What a suite runs over.

    :param str base: the ZConfig section of the innermost storage
    :param bool s3: blobs in a bucket; otherwise in a directory, the control
    :param str wrapper: the ZConfig section put around it, or ""
    :param str inside: the same, but between the base and our section
    """

    base: str
    s3: bool
    wrapper: str = ""
    inside: str = ""

    def __str__(self):
        parts = (self.wrapper, "s3" if self.s3 else "control", self.inside, self.base)
        return "-".join(filter(None, parts))


def section(name, **options):
    """Return the text of a ZConfig section; Python's names and values are translated."""
    values = {
        key.replace("_", "-"): str(value).lower() if isinstance(value, bool) else value
        for key, value in options.items()
        if value is not None
    }
    lines = [f"  {key} {value}" for key, value in values.items()]
    return "\n".join([f"<{name}>", *lines, f"</{name}>"])


class Opener:
    """Open the storages of one test by their names.

    The same name is the same storage: the same file, the same prefix in the bucket. Blobs of a
    bucket are cached in ``blob_dir``: a new one there means an empty cache.

    :param S3Location location: where the bucket is, for a kind with S3
    :param str prefix: the test's, before the names of its storages
    """

    def __init__(self, kind, location=None, prefix=""):
        self.kind = kind
        self._location = location
        self._prefix = prefix
        self._opened = []

    def __call__(self, name="data", blob_dir=None, **options):
        """Open a storage.

        :param options: keys of the base's section, such as ``read_only``
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
        if kind.base == "filestorage":
            own = None if kind.s3 else blob_dir
            text = section("filestorage", path=f"{name}.fs", blob_dir=own, **options)
        else:
            text = section(kind.base, **options)
            if directory and not kind.s3:
                text = f"<blobstorage>\n  blob-dir {directory}\n{text}\n</blobstorage>"
        if kind.inside:
            text = f"<{kind.inside}>\n{text}\n</{kind.inside}>"
        if kind.s3:
            text = S3.format(
                location=self._location,
                prefix=f"{self._prefix}{name}",
                blob_dir=blob_dir,
                base=text,
            )
        if kind.wrapper:
            text = f"<{kind.wrapper}>\n{text}\n</{kind.wrapper}>"
        return text

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
