"""The blobs of one transaction, from staged to finished or aborted."""

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from enum import Enum
import logging
import os
from typing import Any

from ZODB.POSException import StorageTransactionError
from ZODB.utils import z64

from .interfaces import OtherDatabaseError
from .interfaces import ReadOnlyBucketError
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .keys import new_stamp
from .staged import BlobServices
from .staged import remove_quietly
from .staged import StagedBlob
from .staged import StoreRecord
from .uploading import BlobUploads


logger = logging.getLogger(__name__)

# Seconds that tpc_abort waits for S3; what is not done by then goes on in the background.
ABORT_TIMEOUT = 10.0
# A part of the grace period: the base waits for its own locks after that.
LATEST_FINISH = 0.75


class Phase(Enum):
    OPEN = "open"
    #: the base changed, its blob could not follow: only an abort is possible
    DOOMED = "doomed"
    VOTED = "voted"
    #: the base was told to finish: from here on only it knows the outcome
    FINISHING = "finishing"
    ENDED = "ended"


class TransactionBlobs:
    """Belongs to one transaction; only `find` may be called by other threads than its own.

    :param bytes tid: the transaction's own, None where only its end tells.
    :param bool owns_keys: whether an abort may delete what was uploaded. False
        where the tid was given from outside: the object may be another's.
    :param bool holds_lock: whether others cannot commit while the transaction's uploads run.
    :param bool may_spool: whether blobs may go to the spool while S3 is down.
    """

    def __init__(
        self,
        services: BlobServices,
        tid: bytes | None,
        owns_keys: bool,
        holds_lock: bool = False,
        may_spool: bool = True,
    ) -> None:
        self.tid = tid
        self._holds_lock = holds_lock
        self.phase = Phase.OPEN
        self._services = services
        self._owns_keys = owns_keys
        self._blobs = BlobUploads(services, self._release_room, may_spool)
        # What the vote still asks of the base, before it stores records: undos.
        self._calls: list[Callable[[], Any]] = []
        # By oid, what it stores then, besides the records of blobs that are staged.
        self._stores: dict[bytes, Callable[[], Any]] = {}
        #: where only the end tells the tid: what is being undone
        self.undo: Any = None

    def __str__(self) -> str:
        return f"tid={self.tid.hex() if self.tid else 'unknown'} blobs={len(self._blobs)}"

    # Staging

    @contextmanager
    def following(self) -> Iterator[None]:
        """Guard what must succeed after the base changed, or the transaction cannot commit."""
        if self.phase is Phase.VOTED:
            self.phase = Phase.OPEN
        try:
            yield
        except BaseException:
            # Whatever it was, an interruption included.
            self.phase = Phase.DOOMED
            raise

    def stage(
        self,
        oid: bytes,
        path: str,
        is_new: bool,
        stamp: bytes | None = None,
        store: StoreRecord | None = None,
    ) -> None:
        """Make a file that was taken over the blob of the transaction's own revision.

        :param bool is_new: the transaction creates the object.
        :param bytes stamp: what the record refers to; None where the base told the tid.
        :param store: called by the vote, when the record is to be stored with its stamp.
        """
        name = stamp or self.tid
        assert name is not None
        blob = StagedBlob(oid, self.tid, name, path, self._owns_keys or stamp is not None)
        blob.is_new = is_new
        if stamp is not None:
            blob.store = store
            blob.is_to_store = True
        self._stage(blob)

    def stage_restored(self, oid: bytes, tid: bytes, path: str, stamp: bytes | None) -> None:
        """Make a file that was taken over the blob of a revision that may be elsewhere, too."""
        self._stage(StagedBlob(oid, tid, stamp or tid, path, is_ours=False))

    def _stage(self, blob: StagedBlob) -> None:
        self._stores.pop(blob.oid, None)
        self._blobs.begin(blob)

    def copy(
        self, oid: bytes, tid: bytes, source_tid: bytes, source_stamp: bytes | None = None
    ) -> None:
        """Give a revision of a blob the bytes of another one, under the key of its tid.

        :param source_stamp: what the other one's record refers to.
        """
        self._copy_to(StagedBlob(oid, tid, tid, None, self._owns_keys), source_tid, source_stamp)

    def copy_by_record(self, oid: bytes, source_tid: bytes, store: StoreRecord) -> None:
        """Give the transaction's own revision of a blob the bytes of another one.

        :param store: called by the vote, when the record is to be stored with a stamp.
        """
        blob = StagedBlob(oid, self.tid, new_stamp(), None, is_ours=True)
        blob.store = store
        blob.is_to_store = True
        self._copy_to(blob, source_tid, None)

    def call_in_vote(self, call: Callable[[], Any]) -> None:
        """Let the vote ask something of the base, before it stores records."""
        self._calls.append(call)

    def store_in_vote(self, oid: bytes, store: Callable[[], Any]) -> None:
        """Let the vote store a record, in the place of what it was to store for this object."""
        self.leave(oid)
        self._stores[oid] = store

    def leave(self, oid: bytes) -> None:
        """Let the vote store nothing for an object."""
        self.drop(oid, self.tid)
        self._stores.pop(oid, None)

    def _copy_to(self, blob: StagedBlob, source_tid: bytes, source_stamp: bytes | None) -> None:
        blob.source = source_tid, source_stamp
        self._stage(blob)

    def drop(self, oid: bytes, tid: bytes | None) -> None:
        """Forget a blob of this transaction."""
        self._blobs.drop(oid, tid)

    def find(self, oid: bytes, serial: bytes) -> str | None:
        """Return the staged file of the transaction's own tid, or of an object it creates."""
        blob = self._blobs.get(oid, self.tid if serial == z64 else serial)
        if blob is None or (serial == z64 and not blob.is_new):
            return None
        return blob.path

    # Ending

    def vote(self) -> None:
        """Wait until all bytes are in the bucket or the spool, store the records that refer to
        them, and reserve their room in the cache.

        :raises S3OperationError: the first failure, which cancels the other uploads.
        :raises StorageTransactionError: when a blob could not be staged.
        """
        if self.phase is Phase.DOOMED:
            raise StorageTransactionError("a blob could not be staged: abort the transaction")
        if self._blobs:
            self._wait_for_bucket()
        self._store_records()
        # Only now: what is evicted for it could not be fetched again while S3 is down.
        staged = list(self._blobs.staged())
        try:
            if staged:
                self._services.cache.reserve(
                    [(blob.oid, blob.reservation, os.path.getsize(path)) for blob, path in staged]
                )
        except OSError as error:
            # The commit does not depend on the cache.
            logger.warning("cache takes no blobs of a commit %s: %s", self, error)
        self.phase = Phase.VOTED

    def _wait_for_bucket(self) -> None:
        begun = self._now()
        try:
            self._blobs.wait()
        finally:
            self._services.counters.add(wait_seconds=self._now() - begun)
            self._count_lock()

    def _count_lock(self) -> None:
        """Count the time from the first upload until now, once."""
        begun = [blob.since[0] for blob in self._blobs if blob.upload is not None]
        if self._holds_lock and begun:
            self._holds_lock = False
            self._services.counters.add(lock_seconds=self._now() - min(begun))

    def _now(self) -> float:
        return self._services.clocks()[0]

    def _store_records(self) -> None:
        while self._calls:
            self._calls.pop(0)()
        for blob in self._blobs:
            if blob.store is not None and blob.is_to_store:
                blob.store(blob.name)
                blob.is_to_store = False
        while self._stores:
            self._stores.popitem()[1]()

    def begin_finish(self) -> None:
        """Mark the point after which only the base knows the outcome.

        :raises StorageTransactionError: when blobs were staged that no vote has waited for.
        :raises TransientS3Error: when the vote is so long ago that a sweep may take them before the
            base has finished.
        """
        waits = self._blobs or self._calls or self._stores
        if self.phase is Phase.DOOMED or (waits and self.phase is not Phase.VOTED):
            raise StorageTransactionError("tpc_finish without a vote that waited for the blobs")
        if any(self._blobs.age(blob) >= LATEST_FINISH for blob in self._blobs):
            raise TransientS3Error(
                "the transaction has voted so long ago that its blobs are near the end of gc-grace,"
                f" which is {self._services.grace:.0f} s: abort and retry it"
            )
        self.phase = Phase.FINISHING

    def finish(self, tid: bytes) -> None:
        """Move the staged files into the cache, after the base has finished; never raises."""
        self.phase = Phase.ENDED
        self._blobs.upload_late()
        staged = [
            (blob.oid, blob.tid or tid, path, blob.reservation)
            for blob, path in self._blobs.staged()
        ]
        for blob in self._blobs:
            blob.tid = blob.tid or tid  # which is now also what its room is reserved for
        try:
            if staged:
                self._services.cache.put_many(staged)
        except OSError as error:
            logger.warning("committed, but not cached tid=%s: %s", tid.hex(), error)
            self._give_up_caching()
        except Exception:
            # Whatever it is, the transaction is committed and its bytes are in the bucket: a read
            # fetches them.
            logger.exception("committed, but not cached tid=%s", tid.hex())
            self._give_up_caching()
        finally:
            self._blobs.finish()

    def _give_up_caching(self) -> None:
        self._remove_files()
        self._release_room()

    def abort(self) -> None:
        """Undo what was staged and uploaded, after the base has aborted; never raises.

        Nothing is deleted from the bucket once the base was told to finish: its
        answer may have been lost. A sweep decides later.
        """
        delete = self.phase is not Phase.FINISHING
        self.phase = Phase.ENDED
        if self._blobs.is_untouched:
            return
        self._count_lock()
        self._blobs.cancel()
        self._blobs.end_spooled(delete)
        cleanup = self._services.pool.start(lambda cancelled: self._clean_up(delete))
        try:
            cleanup.future.result(ABORT_TIMEOUT)
        except (OtherDatabaseError, ReadOnlyBucketError):
            pass  # so nothing came there
        except S3OperationError as error:
            # The transaction is aborted; what remains in the bucket is garbage for a sweep.
            logger.warning("abort may have left objects behind %s: %s", self, error)
        except FutureTimeout:
            logger.warning("abort goes on in the background %s", self)
        except Exception:
            # Whatever it is, the base has aborted, and the caller has nothing left to undo.
            logger.exception("abort may have left objects behind %s", self)

    def _clean_up(self, delete: bool) -> None:
        try:
            self._blobs.abort(delete)
        finally:
            self._remove_files()
            self._release_room()

    def _release_room(self) -> None:
        try:
            if staged := [(blob.oid, blob.reservation) for blob, _path in self._blobs.staged()]:
                self._services.cache.release(staged)
        except Exception:
            # Whatever it is, the transaction has ended. The room comes back when eviction meets
            # the rows without files.
            logger.info("cache refused to give room back %s", self)

    def _remove_files(self) -> None:
        for _blob, path in self._blobs.staged():
            remove_quietly(path)
