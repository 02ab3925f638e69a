"""Further places a blob may be read from, asked after S3, never written."""

import os
import re
import shutil
from typing import Any

from ZODB.blob import auto_layout_select
from ZODB.blob import FilesystemHelper
from ZODB.blob import LAYOUT_MARKER
from zope.interface import implementer

from .interfaces import IBlobSource
from .interfaces import MissingObjectError


LAYOUTS = ("bushy", "lawn")
# Of a lawn, or of the first level of a bush
_OID = re.compile(r"0x[0-9a-f]{1,16}")


class BucketSource:
    """Another bucket, such as production's for a copy of it, which is never written.

    :param client: an `IS3Client`.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def find(self, key: str) -> "list[_ObjectSource]":
        """Return the bytes of a blob as a source, which may not be there."""
        return [_ObjectSource(self.client, key)]

    def close(self) -> None:
        """Release connections."""
        self.client.close()


@implementer(IBlobSource)
class _ObjectSource:
    def __init__(self, client: Any, key: str) -> None:
        self._client = client
        self._key = key

    def fetch(self, oid: bytes, tid: bytes, target_path: str) -> bool:
        """Download the object, or return False when there is none."""
        try:
            self._client.download_file(self._key, target_path)
        except MissingObjectError:
            return False
        return True

    def size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the bytes of the object, or None when there is none."""
        try:
            size: int = self._client.object_size(self._key)
        except MissingObjectError:
            return None
        return size

    def close(self) -> None:
        """The connections are the bucket's."""


@implementer(IBlobSource)
class BlobDirSource:
    """A blob directory of ZODB, as a FileStorage or a blobstorage section leaves it.

    :param str path: an existing directory.
    :param str layout: "bushy", "lawn" or "automatic".
    :raises ValueError: when there is no such directory.
    """

    def __init__(self, path: str, layout: str = "automatic") -> None:
        if not os.path.isdir(path):
            raise ValueError(f"there is no blob directory {path}")
        marker = os.path.join(path, LAYOUT_MARKER)
        names = os.listdir(path)
        if names and not os.path.exists(marker) and not any(map(_OID.fullmatch, names)):
            raise ValueError(f"{path} is no blob directory: nothing in it is named like an oid")
        marked = auto_layout_select(path)
        if marked not in LAYOUTS:
            raise ValueError(
                f"{path} has the layout {marked}: a cache of blobs that are elsewhere, such as in a"
                " RelStorage's database or on a ZEO server, is no source of them"
            )
        self._files = FilesystemHelper(path, layout)
        if os.path.exists(marker) and marked != self._files.layout_name:
            raise ValueError(f"{path} has the layout {marked}, not {layout}")
        self._landmark = os.path.abspath(marker if os.path.exists(marker) else path)

    def fetch(self, oid: bytes, tid: bytes, target_path: str) -> bool:
        """Copy the blob's bytes to target_path, or return False when it has none.

        :raises OSError: when the directory is gone or cannot be read.
        """
        path = self._find(oid, tid)
        if path is None:
            return False
        shutil.copyfile(path, target_path)
        return True

    def size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the blob's bytes, or None when it has none.

        :raises OSError: when the directory is gone or cannot be read.
        """
        path = self._find(oid, tid)
        return None if path is None else os.path.getsize(path)

    def _find(self, oid: bytes, tid: bytes) -> str | None:
        path: str = self._files.getBlobFilename(oid, tid)
        if os.path.exists(path):
            return path
        # An unmounted directory has no blobs; that does not mean there are none.
        os.stat(self._landmark)
        return None

    def close(self) -> None:
        """Nothing is kept open."""
