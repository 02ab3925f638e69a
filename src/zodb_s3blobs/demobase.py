"""A DemoStorage as base: changes over a database that it only reads."""

from collections.abc import Sequence
import os
import shutil
from typing import Any

from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError

from .basecontract import LookBack
from .basecontract import Source
from .historybase import HistoryBase
from .interfaces import IS3BlobStorage


class DemoBase(HistoryBase):
    """A DemoStorage, perhaps inside wrappers that keep it as ``base``.

    What is garbage cannot be told: the database below goes on without it, and may have its
    blobs in the same place, and oids are chosen at random.

    :raises ValueError: when it has a place for blobs among its changes.
    """

    tells_garbage = False
    locks_at_begin = True  # that of the changes

    def __init__(self, storage: Any) -> None:
        super().__init__(storage)
        if IBlobStorage.providedBy(self._innermost.changes):
            raise ValueError(
                "the changes of this DemoStorage have a place for blobs, which would not be used:"
                " remove its blob-dir, or put the <s3blobstorage> around the changes instead"
            )
        below = self._innermost.base
        self.sources: Sequence[Any] = (
            [StorageSource(below)] if IBlobStorage.providedBy(below) else []
        )

    @property
    def look_back(self) -> LookBack | None:
        return None  # a storage of changes that undoes is a FileStorage, as a rule

    def before(self, oid: bytes, tid: bytes) -> Source:
        # What was not changed before shows the revision below again, with its own tid and blob.
        return self._before(self._innermost.changes, oid, tid)

    def running(self) -> Any:
        return self.storage.tpc_transaction()


class StorageSource:
    """Another storage, whose blobs are read; it is not ours to close."""

    def __init__(self, storage: Any) -> None:
        self._storage = storage

    def fetch(self, oid: bytes, tid: bytes, target_path: str) -> bool:
        """Copy the blob's bytes to target_path, or return False when it has none."""
        try:
            source = self._storage.openCommittedBlobFile(oid, tid)
        except POSKeyError:
            return False
        with source, open(target_path, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return True

    def size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the blob's bytes, or None when it has none."""
        try:
            if IS3BlobStorage.providedBy(self._storage):
                size: int = self._storage.blob_size(oid, tid)
                return size
            with self._storage.openCommittedBlobFile(oid, tid) as file:
                return os.fstat(file.fileno()).st_size
        except POSKeyError:
            return None

    def close(self) -> None:
        """The DemoStorage closes it."""
