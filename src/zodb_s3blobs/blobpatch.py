"""The one patch of this package: an open blob must not lose bytes, nor Blob.committed fail.

In stock ZODB (6.4) ``Blob.open("r+")`` and ``("a")`` create an empty working
copy and only then open the remembered path of the committed file. When that
file is missing, because it was evicted or S3 is down, the exception leaves the
empty copy behind; the blob counts as changed with the next write to it, and a
commit replaces the committed bytes by nothing.

Here the storage is asked for the file first, and a working copy that a failing
open has just made is dropped. Where eviction wins the race between the two, both
happen again, for "r" as well: after a savepoint ZODB opens the path itself.
``Blob.committed`` asserts that a storage always gives the same path, while ours gives
another one where the cache cannot take the file: here the path that is remembered
follows.

A ``BlobFile`` is a raw file: where the disk is nearly full it writes a part, and says
so in a result that neither ``Blob(data)`` nor ``Blob.open("r+")`` reads, nor hardly
anybody; half a blob is committed. A cache makes disks nearly full. Here all is
written, or an OSError raised.

tests/test_blobpatch.py shows what stock ZODB does and fails when the patch is no
longer needed.
"""

import functools
from io import FileIO
import os
from typing import Any

from ZODB.blob import Blob
from ZODB.blob import BlobFile
from ZODB.blob import SAVEPOINT_SUFFIX

from .interfaces import EVICTION_ATTEMPTS


def install() -> None:
    """Wrap the methods; calling it again changes nothing."""
    if not hasattr(Blob.open, "_zodb_s3blobs"):
        Blob.open = _wrap_open(Blob.open)
        Blob.committed = _wrap_committed(Blob.committed)
        BlobFile.write = _write_all


def _wrap_open(stock_open: Any) -> Any:
    @functools.wraps(stock_open)
    def open(self: Blob, mode: str = "r") -> Any:
        if mode not in ("r", "r+", "a"):
            return stock_open(self, mode)
        self._p_activate()  # the _p_blob_ attributes do not load a ghost
        if not _is_as_committed(self):
            return stock_open(self, mode)
        for attempt in range(1, EVICTION_ATTEMPTS + 1):
            if mode != "r":
                _fetch(self)
            try:
                return stock_open(self, mode)
            except BaseException as error:
                _drop_working_copy(self)
                if not isinstance(error, FileNotFoundError) or attempt == EVICTION_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    open._zodb_s3blobs = True  # type: ignore[attr-defined]  # marks the wrapped method
    return open


def _wrap_committed(stock_committed: Any) -> Any:
    @functools.wraps(stock_committed)
    def committed(self: Blob) -> Any:
        if not _is_as_committed(self):
            return stock_committed(self)
        return _fetch(self)

    return committed


def _write_all(self: BlobFile, data: Any) -> int:
    """Write all bytes.

    :raises OSError: when they cannot all be written; some may have been.
    """
    written: int = FileIO.write(self, data)
    size = memoryview(data).nbytes
    while written < size:
        written += FileIO.write(self, memoryview(data).cast("B")[written:])
    return written


def _is_as_committed(blob: Blob) -> bool:
    committed = blob._p_blob_committed
    return bool(
        blob._p_blob_uncommitted is None and committed and not committed.endswith(SAVEPOINT_SUFFIX)
    )


def _fetch(blob: Blob) -> str:
    path: str = blob._p_jar._storage.loadBlob(blob._p_oid, blob._p_serial)
    blob._p_blob_committed = path
    return path


def _drop_working_copy(blob: Blob) -> None:
    """Undo Blob._create_uncommitted_file; the file is removed with its reference."""
    if blob._p_blob_uncommitted is not None:
        filename = blob._uncommitted()
        if os.path.exists(filename):
            os.remove(filename)
