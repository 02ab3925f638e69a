"""The blobs of one transaction on their way into the bucket, or into the spool."""

from collections.abc import Callable
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION
from concurrent.futures import wait
import logging
import os
from typing import Any

from .cancellation import UploadCancelled
from .interfaces import DISK_FULL
from .interfaces import EVICTION_ATTEMPTS
from .interfaces import MissingObjectError
from .interfaces import PermanentS3Error
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .keys import blob_key
from .keys import new_stamp
from .keys import new_waiting_stamp
from .staged import BlobServices
from .staged import remove_quietly
from .staged import StagedBlob


logger = logging.getLogger(__name__)

# Seconds and bytes a second: a vote waits as long as retries may take, and the slowest useful rate.
UPLOAD_PATIENCE = 1800.0
SLOWEST_RATE = 128 << 10
# A part of the grace period
RENEWAL = 0.5
# How often a vote uploads again what grew too old while other blobs were uploaded.
RENEWALS = 3


class BlobUploads:
    """Belongs to one transaction; only `get` may be called by other threads than its own.

    :param release_room: gives back the room in the cache that was reserved by the names of blobs,
        before these change.
    :param may_spool: whether what S3 does not take may go to the spool, if there is one.
    """

    def __init__(
        self, services: BlobServices, release_room: Callable[[], None], may_spool: bool
    ) -> None:
        self._services = services
        self._may_spool = may_spool
        self._release_room = release_room
        # By (oid, tid)
        self._blobs: dict[tuple[bytes, bytes | None], StagedBlob] = {}
        # Keys whose object may exist although the transaction no longer wants it.
        self._dropped: set[str] = set()
        # What it has in the spool
        self._spooled: list[Any] = []

    def __len__(self) -> int:
        return len(self._blobs)

    def __iter__(self) -> Iterator[StagedBlob]:
        return iter(self._blobs.values())

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was begun that must be undone."""
        return not self._blobs and not self._dropped

    def get(self, oid: bytes, tid: bytes | None) -> StagedBlob | None:
        # Other threads ask, too: one look-up, no iteration.
        return self._blobs.get((oid, tid))

    def staged(self) -> Iterator[tuple[StagedBlob, str]]:
        """Yield the blobs that have a file, and its path."""
        for blob in self:
            if blob.path is not None:
                yield blob, blob.path

    # Beginning

    def begin(self, blob: StagedBlob) -> None:
        """Start the upload of a blob, in the place of an earlier one of the same revision."""
        try:
            self.drop(blob.oid, blob.tid)
            # It may refuse: before the key is entered, which nobody would take out again.
            if blob.is_ours and blob.store is None and self._services.uploader:
                self._services.uploader.forget(blob.key)
            if blob.key not in self._dropped:
                self._services.open_keys.add(blob.key)
            self._blobs[blob.oid, blob.tid] = blob
        except BaseException:
            remove_quietly(blob.path)  # nobody else knows of it yet
            raise
        self._start(blob)

    def _start(self, blob: StagedBlob) -> None:
        path, key, client = blob.path, blob.key, self._services.client
        blob.since = self._services.clocks()
        if path is not None:
            work = lambda cancelled: client.upload_file(path, key, cancelled)  # noqa: E731
        else:
            work = lambda cancelled: self._copy(blob, key)  # noqa: E731
        blob.upload = self._services.pool.start(work)

    def _copy(self, blob: StagedBlob, target: str) -> None:
        assert blob.source is not None
        tid, stamp = blob.source
        client = self._services.client
        try:
            client.copy_object(blob_key(blob.oid, stamp or tid), target)
        except (MissingObjectError, PermanentS3Error):
            # Not migrated or uploaded yet: a source or the spool has it, or nobody. Or the server
            # cannot copy what is encrypted (Ceph under SSE-C); what else is wrong shows again.
            for attempt in range(1, EVICTION_ATTEMPTS + 1):
                try:
                    client.upload_file(self._load_source(blob), target)
                    return
                except FileNotFoundError:  # eviction was faster
                    if attempt == EVICTION_ATTEMPTS:
                        raise

    def _load_source(self, blob: StagedBlob) -> str:
        assert blob.source is not None
        tid, stamp = blob.source
        path: str = self._services.loader.load(blob.oid, tid, lambda oid, tid: stamp)
        return path

    def drop(self, oid: bytes, tid: bytes | None) -> None:
        """Forget a blob, as before a second store of its object.

        :raises TransientS3Error: when its upload does not end.
        """
        blob = self._blobs.pop((oid, tid), None)
        if blob is not None:
            if blob.is_spooled:
                self._leave_spool()
            self._give_up_object(blob)
            remove_quietly(blob.path)

    def _give_up_object(self, blob: StagedBlob) -> None:
        if blob.upload is not None:
            blob.upload.cancel()
            if not wait([blob.upload.future], UPLOAD_PATIENCE).done:
                raise TransientS3Error(f"the upload of {blob.key!r} does not end")
        self._give_up_key(blob)

    def _give_up_key(self, blob: StagedBlob) -> None:
        if blob.is_ours and blob.upload is not None and blob.upload.may_have_sent:
            self._dropped.add(blob.key)
        elif blob.key not in self._dropped:
            self._services.open_keys.remove([blob.key])

    # Waiting

    def wait(self) -> None:
        """Wait until all blobs are in the bucket, or else in the spool where there is one.

        Uploads again, under another stamp, what was uploaded so long ago that a sweep might take it
        for garbage before the transaction ends.

        :raises S3OperationError: the first failure, which cancels the other uploads.
        """
        try:
            self._wait_for_bucket()
            self._renew()
        except TransientS3Error as error:
            if self._services.spool is None or not self._may_spool:
                raise
            self._spool(error)

    def _wait_for_bucket(self) -> None:
        uploads = {blob.upload.future: blob for blob in self if blob.upload and not blob.is_spooled}
        size = sum(os.path.getsize(path) for _blob, path in self.staged())
        patience = UPLOAD_PATIENCE + size / SLOWEST_RATE
        done, pending = wait(uploads, patience, return_when=FIRST_EXCEPTION)
        for future in done:
            error = future.exception()
            if error is not None:
                self.cancel()
                if isinstance(error, S3OperationError):
                    error.oid, error.tid = uploads[future].oid, uploads[future].tid
                raise error
        if pending:
            self.cancel()
            raise TransientS3Error(f"{len(pending)} uploads took longer than {patience:.0f} s")

    def _renew(self) -> None:
        """Upload again, under new stamps, what a sweep in another process may soon take."""
        for attempt in range(RENEWALS + 1):
            old = [blob for blob, _path in self.staged() if self.age(blob) > RENEWAL]
            if not old:
                return
            if attempt == RENEWALS:
                break
            logger.info("upload renewed count=%d", len(old))
            self._release_room()  # which an earlier vote has reserved by the old stamps
            for blob in old:
                if blob.store is not None:
                    self._give_up_object(blob)
                    self._rename(blob, new_stamp())
                # What is restored keeps its key: to be uploaded again makes the object young.
                self._start(blob)
            self._wait_for_bucket()
        raise PermanentS3Error(
            f"uploads take longer than half of gc-grace, which is {self._services.grace:.0f} s:"
            " set gc-grace higher, in all processes"
        )

    def _rename(self, blob: StagedBlob, stamp: bytes) -> None:
        blob.name = stamp
        self._services.open_keys.add(blob.key)
        blob.is_to_store = True

    def age(self, blob: StagedBlob) -> float:
        """Return the age of a blob's object as a part of the grace period."""
        is_above_all = blob.path is None and blob.store is None  # a copy to the key of a tid
        if is_above_all or blob.is_spooled or not self._services.grace:
            return 0.0
        now = self._services.clocks()
        age = max(after - before for before, after in zip(blob.since, now, strict=True))
        return age / self._services.grace

    def upload_late(self) -> None:
        """Upload once more what a sweep may have taken for garbage, as the end took so long.

        That is rare: a process that was stopped between its last look at the clock and the end of
        the base's finish. Never raises.
        """
        for blob, path in self.staged():
            if self.age(blob) < 1:
                continue
            try:
                logger.critical("committed after gc-grace, and uploaded again key=%s", blob.key)
                self._services.client.upload_file(path, blob.key)
            except Exception:
                # Whatever it is, the transaction is committed, and the file goes into the cache.
                logger.exception(
                    "committed after gc-grace, and not uploaded again key=%s", blob.key
                )

    # The spool

    def _spool(self, error: TransientS3Error) -> None:
        """Leave to the spool what is not in the bucket.

        :raises S3OperationError: when another failure is more than S3 being down.
        :raises TransientS3Error: the given one, when it cannot be spooled either.
        """
        waiting = [blob for blob in self if not blob.is_spooled and not _is_uploaded(blob)]
        for blob in waiting:
            _raise_other_failure(blob)
        names: dict[StagedBlob, bytes] = {}
        try:
            files = []
            for blob in waiting:
                name = blob.name if blob.store is None else new_waiting_stamp()
                path = blob.path or self._load_source(blob)
                files.append((blob_key(blob.oid, name), path))
                names[blob] = name
            self._take(files)
        except OSError as failure:
            logger.error("nothing can be spooled: %s", failure)
            raise error from failure
        self._release_room()  # which an earlier vote has reserved by the old stamps
        for blob, name in names.items():
            blob.is_spooled = True
            if name != blob.name:
                # An upload that was lost on its way may still arrive under the other key.
                self._give_up_key(blob)
                self._rename(blob, name)
                blob.upload = None
        self._services.uploader.counters.add(spooled=len(waiting))
        logger.warning("spooled count=%d: %s", len(waiting), error)

    def _take(self, files: list[tuple[str, str]]) -> None:
        spool = self._services.spool
        try:
            taken = spool.take(files)
        except OSError as error:
            # What is cached is worth less than what is committed.
            size = sum(os.path.getsize(path) for _key, path in files)
            is_shared = os.stat(files[0][1]).st_dev == os.stat(spool.directory).st_dev
            if error.errno not in DISK_FULL or not is_shared:
                raise
            if not self._services.cache.shed(size):
                raise
            taken = spool.take(files)
        self._spooled.append(taken)

    def _leave_spool(self) -> None:
        """Upload what is spooled after all; the next vote spools it again."""
        self.end_spooled(delete=True)
        for blob in self:
            if blob.is_spooled:
                blob.is_spooled = False
                self._start(blob)

    def end_spooled(self, delete: bool) -> None:
        """Take back what is spooled, or leave it to others; never raises."""
        while self._spooled:
            taken = self._spooled.pop()
            try:
                if delete:
                    taken.abort()
                else:
                    taken.end()
                    self._services.uploader.wake()
            except Exception:
                # Whatever it is: as garbage, what stays does no harm.
                logger.exception("spooled blobs stay until the next start")

    # Ending

    def cancel(self) -> None:
        """Let all uploads end early."""
        for blob in self:
            if blob.upload is not None:
                blob.upload.cancel()

    def finish(self) -> None:
        """Let sweeps decide about the objects, and others upload what is spooled; never raises."""
        self._close_keys()
        self.end_spooled(delete=False)
        if self._services.uploader:
            self._services.uploader.ensure_running()

    def abort(self, delete: bool) -> None:
        """Wait for the uploads and remove what was uploaded, or leave it to sweeps.

        :raises S3OperationError: when S3 cannot delete.
        """
        try:
            wait([blob.upload.future for blob in self if blob.upload])
            if delete:
                self._delete_objects()
        finally:
            self._close_keys()

    def _delete_objects(self) -> None:
        keys = set(self._dropped)
        for blob in self:
            if blob.is_ours and blob.upload is not None and blob.upload.may_have_sent:
                keys.add(blob.key)
        refused = self._services.client.delete_objects(sorted(keys)) if keys else {}
        if refused:
            logger.warning("abort left objects behind refused=%s", refused)

    def _close_keys(self) -> None:
        keys = {blob.key for blob in self}
        self._services.open_keys.remove(keys | self._dropped)


def _is_uploaded(blob: StagedBlob) -> bool:
    future = blob.upload and blob.upload.future
    return bool(future and future.done() and not future.cancelled() and future.exception() is None)


def _raise_other_failure(blob: StagedBlob) -> None:
    future = blob.upload and blob.upload.future
    if future and future.done() and not future.cancelled():
        error = future.exception()
        if error is not None and not isinstance(error, (TransientS3Error, UploadCancelled)):
            raise error
