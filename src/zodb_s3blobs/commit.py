"""The blobs of one transaction, from staged to finished or aborted."""

from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait
from contextlib import contextmanager
from enum import Enum
import logging
import os
from typing import Any

from ZODB.blob import rename_or_copy_blob
from ZODB.POSException import StorageTransactionError
from ZODB.utils import z64

from .interfaces import EVICTION_ATTEMPTS
from .interfaces import MissingObjectError
from .interfaces import PermanentS3Error
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .keys import blob_key
from .openkeys import OpenKeys
from .uploads import Upload
from .uploads import UploadPool
from .uploads import Work


logger = logging.getLogger(__name__)

# Seconds that tpc_abort waits for S3; what is not done by then goes on in the background.
ABORT_TIMEOUT = 10.0
# Seconds and bytes a second: a vote waits as long as retries may take, and the slowest useful rate.
UPLOAD_PATIENCE = 1800.0
SLOWEST_RATE = 128 << 10


class Phase(Enum):
    OPEN = "open"
    #: the base changed, its blob could not follow: only an abort is possible
    DOOMED = "doomed"
    VOTED = "voted"
    #: the base was told to finish: from here on only it knows the outcome
    FINISHING = "finishing"
    ENDED = "ended"


class _Blob:
    """One blob of a transaction; path is None where S3 copies it."""

    def __init__(
        self, oid: bytes, tid: bytes, path: str | None, is_new: bool, is_ours: bool
    ) -> None:
        self.oid = oid
        self.tid = tid
        self.path = path
        self.is_new = is_new
        #: whether the object may be deleted on abort
        self.is_ours = is_ours
        self.upload: Upload | None = None


class BlobServices:
    """What transactions share: where staged files go, how they are uploaded, who may delete."""

    def __init__(
        self,
        client: Any,
        cache: Any,
        loader: Any,
        pool: UploadPool,
        open_keys: OpenKeys,
        temp_dir: str,
    ) -> None:
        self.client = client
        self.cache = cache
        self.loader = loader
        self.pool = pool
        self.open_keys = open_keys
        self.temp_dir = temp_dir


class TransactionBlobs:
    """Belongs to one transaction; only `find` may be called by other threads than its own.

    :param bytes tid: the transaction's own.
    :param bool owns_keys: whether an abort may delete what was uploaded. False
        where the tid was given from outside: the object may be another's.
    """

    def __init__(self, services: BlobServices, tid: bytes, owns_keys: bool) -> None:
        self.tid = tid
        self.phase = Phase.OPEN
        self._services = services
        self._owns_keys = owns_keys
        self._blobs: dict[str, _Blob] = {}
        # Keys whose object may exist although the transaction no longer wants it.
        self._dropped: set[str] = set()

    # Staging

    @contextmanager
    def following(self) -> Iterator[None]:
        """Guard what must succeed after the base changed, or the transaction cannot commit."""
        if self.phase is Phase.VOTED:
            self.phase = Phase.OPEN
        try:
            yield
        except BaseException:
            self.phase = Phase.DOOMED
            raise

    def take_over(self, blobfilename: str) -> str:
        """Move a file to a name that no other transaction shares, and return that.

        :raises OSError: when it can be neither renamed nor copied.
        """
        path = os.path.join(self._services.temp_dir, f"staged-{os.urandom(16).hex()}.tmp")
        try:
            rename_or_copy_blob(blobfilename, path, chmod=False)
        except BaseException:
            remove_quietly(path)
            raise
        return path

    def stage(
        self, oid: bytes, tid: bytes, path: str, is_new: bool = False, is_restored: bool = False
    ) -> None:
        """Make a file that was taken over the blob of a revision and start its upload.

        :param bool is_new: the transaction creates the object.
        :param bool is_restored: the revision may exist already, here or elsewhere.
        """
        key = blob_key(oid, tid)
        client = self._services.client
        try:
            self._enter(oid, tid, path, is_new, self._owns_keys and not is_restored)
        except BaseException:
            remove_quietly(path)
            raise
        self._start(key, lambda cancelled: client.upload_file(path, key, cancelled))

    def copy(self, oid: bytes, source_tid: bytes) -> None:
        """Give the transaction's revision of a blob the bytes of an earlier one."""
        key = blob_key(oid, self.tid)
        self._enter(oid, self.tid, None, False, self._owns_keys)
        self._start(key, lambda cancelled: self._copy(oid, source_tid, key))

    def _copy(self, oid: bytes, source_tid: bytes, key: str) -> None:
        client = self._services.client
        try:
            client.copy_object(blob_key(oid, source_tid), key)
        except (MissingObjectError, PermanentS3Error):
            # Not migrated yet: a source has it, or nobody. Or the server cannot copy what is
            # encrypted (Ceph under SSE-C); what else is wrong shows again.
            for attempt in range(1, EVICTION_ATTEMPTS + 1):
                try:
                    client.upload_file(self._services.loader.load(oid, source_tid), key)
                    return
                except FileNotFoundError:  # eviction was faster
                    if attempt == EVICTION_ATTEMPTS:
                        raise

    def _enter(
        self, oid: bytes, tid: bytes, path: str | None, is_new: bool, is_ours: bool
    ) -> _Blob:
        self.drop(oid, tid)
        key = blob_key(oid, tid)
        if key not in self._dropped:
            self._services.open_keys.add(key)
        blob = self._blobs[key] = _Blob(oid, tid, path, is_new, is_ours)
        return blob

    def _start(self, key: str, work: Work) -> None:
        self._blobs[key].upload = self._services.pool.start(work)

    def drop(self, oid: bytes, tid: bytes) -> None:
        """Forget a blob of this transaction, as before a second store of its object."""
        key = blob_key(oid, tid)
        blob = self._blobs.pop(key, None)
        if blob is None:
            return
        if blob.upload is not None:
            blob.upload.cancel()
            wait([blob.upload.future])
        if blob.is_ours and blob.upload is not None and blob.upload.may_have_sent:
            self._dropped.add(key)
        elif key not in self._dropped:
            self._services.open_keys.remove([key])
        remove_quietly(blob.path)

    def find(self, oid: bytes, serial: bytes) -> str | None:
        """Return the staged file of the transaction's own tid, or of an object it creates."""
        # Other threads ask, too: one look-up, no iteration.
        blob = self._blobs.get(blob_key(oid, self.tid if serial == z64 else serial))
        if blob is None or (serial == z64 and not blob.is_new):
            return None
        return blob.path

    # Ending

    def vote(self) -> None:
        """Wait until all bytes are in the bucket and reserve their room in the cache.

        :raises S3OperationError: the first failure, which cancels the other uploads.
        :raises StorageTransactionError: when a blob could not be staged.
        """
        if self.phase is Phase.DOOMED:
            raise StorageTransactionError("a blob could not be staged: abort the transaction")
        uploads = {blob.upload.future: blob for blob in self._blobs.values() if blob.upload}
        size = sum(os.path.getsize(path) for _blob, path in self._staged())
        patience = UPLOAD_PATIENCE + size / SLOWEST_RATE
        done, pending = wait(uploads, patience, return_when=FIRST_EXCEPTION)
        for future in done:
            error = future.exception()
            if error is not None:
                self._cancel()
                if isinstance(error, S3OperationError):
                    error.oid, error.tid = uploads[future].oid, uploads[future].tid
                raise error
        if pending:
            self._cancel()
            raise TransientS3Error(f"{len(pending)} uploads took longer than {patience:.0f} s")
        # Only now: what is evicted for it could not be fetched again while S3 is down.
        staged = list(self._staged())
        try:
            if staged:
                self._services.cache.reserve(
                    [(blob.oid, blob.tid, os.path.getsize(path)) for blob, path in staged]
                )
        except OSError:
            # The commit does not depend on the cache.
            logger.exception("cache refused to reserve room tid=%s", self.tid.hex())
        self.phase = Phase.VOTED

    def begin_finish(self) -> None:
        """Mark the point after which only the base knows the outcome.

        :raises StorageTransactionError: when blobs were staged that no vote has waited for.
        """
        if self.phase is Phase.DOOMED or (self._blobs and self.phase is not Phase.VOTED):
            raise StorageTransactionError("tpc_finish without a vote that waited for the blobs")
        self.phase = Phase.FINISHING

    def finish(self) -> None:
        """Move the staged files into the cache, after the base has finished; never raises."""
        self.phase = Phase.ENDED
        staged = [(blob.oid, blob.tid, path) for blob, path in self._staged()]
        try:
            if staged:
                self._services.cache.put_many(staged)
        except Exception:
            # The transaction is committed and its bytes are in the bucket: a read fetches them.
            logger.exception("cache refused blobs tid=%s", self.tid.hex())
            self._remove_files()
            self._release_room()
        finally:
            self._close_keys()

    def abort(self) -> None:
        """Undo what was staged and uploaded, after the base has aborted; never raises.

        Nothing is deleted from the bucket once the base was told to finish: its
        answer may have been lost. A sweep decides later.
        """
        delete = self.phase is not Phase.FINISHING
        self.phase = Phase.ENDED
        if not self._blobs and not self._dropped:
            return
        self._cancel()
        cleanup = self._services.pool.start(lambda cancelled: self._clean_up(delete))
        try:
            cleanup.future.result(ABORT_TIMEOUT)
        except S3OperationError as error:
            # The transaction is aborted; what remains in the bucket is garbage for a sweep.
            logger.warning("abort left objects behind tid=%s: %s", self.tid.hex(), error)
        except FutureTimeout:
            logger.warning("abort goes on in the background tid=%s", self.tid.hex())
        except Exception:
            # Whatever it is, the base has aborted, and the caller has nothing left to undo.
            logger.exception("abort left objects behind tid=%s", self.tid.hex())

    def _clean_up(self, delete: bool) -> None:
        try:
            uploads = [blob.upload.future for blob in self._blobs.values() if blob.upload]
            wait(uploads)
            if delete:
                self._delete_objects()
        finally:
            self._close_keys()
            self._remove_files()
            self._release_room()

    def _delete_objects(self) -> None:
        keys = set(self._dropped)
        for key, blob in self._blobs.items():
            if blob.is_ours and blob.upload is not None and blob.upload.may_have_sent:
                keys.add(key)
        refused = self._services.client.delete_objects(sorted(keys)) if keys else {}
        if refused:
            logger.warning("abort left objects behind refused=%s", refused)

    def _release_room(self) -> None:
        try:
            if staged := [(blob.oid, blob.tid) for blob, _path in self._staged()]:
                self._services.cache.release(staged)
        except OSError:
            # It comes back when eviction meets the rows without files.
            logger.warning("cache refused to give room back tid=%s", self.tid.hex())

    def _close_keys(self) -> None:
        self._services.open_keys.remove([*self._blobs, *self._dropped])

    def _cancel(self) -> None:
        for blob in self._blobs.values():
            if blob.upload is not None:
                blob.upload.cancel()

    def _staged(self) -> Iterator[tuple[_Blob, str]]:
        for blob in self._blobs.values():
            if blob.path is not None:
                yield blob, blob.path

    def _remove_files(self) -> None:
        for blob in self._blobs.values():
            remove_quietly(blob.path)


def remove_quietly(path: str | None) -> None:
    """Remove a file on which the outcome of its transaction does not depend; never raises."""
    try:
        if path is not None:
            os.remove(path)
    except FileNotFoundError:
        pass
    except OSError:
        logger.exception("staged file stays path=%s", path)
