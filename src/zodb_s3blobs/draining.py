"""Uploads what is in the spool: on demand, and by itself when S3 is back."""

from concurrent.futures import CancelledError
from enum import Enum
from functools import partial
from itertools import islice
import logging
import threading
from typing import Any

from .cancellation import Cancellation
from .cancellation import UploadCancelled
from .forks import begin_in_children
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .journals import Journal
from .journals import SpooledBlob
from .reports import Report
from .s3body import metadata_of
from .spool import Spool
from .stats import SpoolCounters
from .uploads import Upload
from .uploads import UploadPool


logger = logging.getLogger(__name__)

# Seconds until the spool is looked at again, when something is left and when not.
BUSY_PAUSE = 5.0
IDLE_PAUSE = 60.0
# Commits use the same pool.
AT_ONCE = 4
# Transient failures in a row that end a look at the spool; while S3 is known to be down they take
# no time.
PATIENCE = 3
CLOSE_TIMEOUT = 30.0


class _Outcome(Enum):
    UPLOADED = "uploaded"
    #: its file is gone, and it is in the bucket
    THERE = "there"
    #: its file has other bytes than those that were put there
    DAMAGED = "damaged"
    #: it is nowhere
    GONE = "gone"


class DrainReport(Report):
    """Counts of blobs; bytes are those of what was uploaded."""

    def __init__(self) -> None:
        self.uploaded = 0
        self.bytes = 0
        #: they stay in the spool, and are tried again
        self.failed = 0
        #: their bytes are not those that were put there; they stay, and are not uploaded
        self.damaged = 0
        #: neither here nor in the bucket
        self.lost = 0


class SpoolUploader:
    """Uploads blobs from the spool and removes them there, those of the oldest transaction first.

    What was uploaded when a process died is uploaded once more: that changes nothing.

    :param Spool spool: None where there is none, and nothing to do.
    :param UploadPool pool: where uploads run.
    """

    def __init__(self, spool: Spool | None, client: Any, pool: UploadPool) -> None:
        self._spool = spool if spool is not None and spool.is_uploaded else None
        self._client = client
        self._pool = pool
        self.counters = SpoolCounters()
        self.begin()
        begin_in_children(self)

    @property
    def spool_of_commits(self) -> Spool | None:
        """The spool, if commits may go there."""
        spool = self._spool
        return spool if spool is not None and spool.takes_commits else None

    def usage(self) -> dict[str, float | None]:
        """Return what is in the spool, by the names of `stats.MEANINGS`."""
        if self._spool is None:
            return {"spool_blobs": 0, "spool_bytes": 0, "spool_age_seconds": None}
        return self._spool.usage()

    def begin(self) -> None:
        """Begin without a thread."""
        self._one_at_a_time = threading.Lock()
        self._starting = threading.Lock()
        self._wanted = threading.Event()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        self._running: list[Upload] = []
        # Paths of what is in the bucket and could not be removed here
        self._uploaded: set[str] = set()
        # Paths of which the log tells already
        self._told: set[str] = set()

    def wake(self) -> None:
        """Look into the spool soon, in a thread that goes on with that until `close`."""
        self._wanted.set()
        self.ensure_running()

    def ensure_running(self) -> None:
        """Have the thread, which a forked child has not got from its parent."""
        if self._spool is None or self._thread is not None:
            return
        with self._starting:
            if self._thread is None and not self._is_closed:
                name = "zodb-s3blobs-spool"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def forget(self, key: str) -> None:
        """Remove the blob of a transaction that did not commit: its tid was given out again.

        A FileStorage does that when it was killed and its clock is behind, and a MappingStorage.
        """
        if self._spool is None or not self._spool.find(key):
            return
        # Not while it is uploaded, or it would come after what is stored now.
        with self._one_at_a_time:
            for journal in self._spool.journals():
                for entry in journal.entries:
                    if entry.key == key:
                        journal.note_done(entry)
        if self._spool.find(key):
            # It would come after what is stored now.
            raise TransientS3Error(
                f"another process is uploading an earlier blob {key!r} from the spool"
            )

    def _run(self) -> None:
        told: type[BaseException] | None = None
        pause = BUSY_PAUSE
        while not self._is_closed:
            self._wanted.clear()
            try:
                self.drain()
                pause, told = IDLE_PAUSE, None
            except S3OperationError as error:
                # Of an outage once, and not every few seconds.
                if type(error) is not told:
                    logger.warning("spool is kept: %s", error)
                told = type(error)
            except Exception as failure:
                # Whatever it is, such as a disk that fails: what is there stays there.
                if type(failure) is not told:
                    logger.exception("spool cannot be uploaded")
                told = type(failure)
            self._wanted.wait(pause)
            # What waits is read each time.
            pause = BUSY_PAUSE if told is None else min(2 * pause, IDLE_PAUSE)

    def drain(self) -> DrainReport:
        """Upload what is there, but for transactions that run and what another process uploads.

        One that fails does not stop the others, unless several in a row are transient.

        :raises S3OperationError: the first failure; what S3 did not take stays there.
        :raises OSError: the same, of the disk.
        """
        report = DrainReport()
        failures: list[S3OperationError | OSError] = []
        if self._spool is None:
            return report
        with self._one_at_a_time:
            try:
                for journal in self._spool.journals():
                    self._drain(journal, report, failures)
                    if self._is_closed or _is_down(failures):
                        break
            finally:
                if report.uploaded:
                    logger.info("spool uploaded %s", report)
        if failures:
            raise failures[0]
        return report

    def _drain(
        self, journal: Journal, report: DrainReport, failures: list[S3OperationError | OSError]
    ) -> None:
        entries, kept = iter(() if journal.is_aborted else journal.entries), 0
        # The first alone: while S3 is down it tries for all.
        while batch := list(islice(entries, AT_ONCE if report.uploaded else 1)):
            self._running = running = []
            for entry in batch:
                running.append(self._pool.start(partial(self._upload, journal, entry)))
                if self._is_closed:
                    running[-1].cancel()  # `close` has not seen it
            for entry, upload in zip(batch, running, strict=True):
                try:
                    kept += not self._take_note(entry, upload.future.result(), journal, report)
                except (S3OperationError, OSError) as error:
                    report.failed += 1
                    kept += 1
                    failures.append(error)
                except (CancelledError, UploadCancelled):
                    kept += 1
            if self._is_closed or _is_down(failures):
                return
        if not kept:
            self._finish(journal, failures)

    def _finish(self, journal: Journal, failures: list[S3OperationError | OSError]) -> None:
        if journal.is_damaged:
            if journal.path not in self._told:
                self._told.add(journal.path)
                logger.error("spool has a damaged journal path=%s", journal.path)
            return
        try:
            journal.remove()
        except OSError as error:
            failures.append(error)

    def _upload(self, journal: Journal, entry: SpooledBlob, cancelled: Cancellation) -> _Outcome:
        """Upload a blob and remove its file.

        :raises S3OperationError: when S3 does not take it.
        """
        if not journal.is_complete and self._is_unwanted(entry):
            return self._let_go(journal, entry, _Outcome.THERE)
        was_there = entry.key in journal.done or entry.path in self._uploaded
        # Asked again: a pack may have taken it for garbage before it was restored once more.
        if was_there and self._client.head_object(entry.key) is not None:
            return self._let_go(journal, entry, _Outcome.THERE)
        try:
            if not entry.is_intact():
                # Somebody may have brought it again.
                answer = self._client.head_object(entry.key) or {}
                if metadata_of(answer).get("zodb-sha256") == entry.digest:
                    return self._let_go(journal, entry, _Outcome.THERE)
                return _Outcome.DAMAGED
            self._client.upload_file(entry.path, entry.key, cancelled)
        except FileNotFoundError:
            # Uploaded by a process that could not say so any more, or else lost.
            is_there = was_there or self._client.head_object(entry.key) is not None
            return _Outcome.THERE if is_there else _Outcome.GONE
        self.counters.add(spool_uploads=1)
        # Where the disk takes no note of it.
        self._uploaded.add(entry.path)
        return self._let_go(journal, entry, _Outcome.UPLOADED)

    def _is_unwanted(self, entry: SpooledBlob) -> bool:
        """Tell whether what never voted, as it seems, is nothing but that.

        What the bucket does not have does no harm there, and may be all that there is.
        """
        try:
            return self._client.head_object(entry.key) is not None or not entry.is_intact()
        except FileNotFoundError:
            return True

    def _let_go(self, journal: Journal, entry: SpooledBlob, outcome: _Outcome) -> _Outcome:
        journal.note_done(entry)
        self._uploaded.discard(entry.path)
        return outcome

    def _take_note(
        self, entry: SpooledBlob, outcome: _Outcome, journal: Journal, report: DrainReport
    ) -> bool:
        """Count, and return whether the spool has nothing more to do with it."""
        if outcome is _Outcome.UPLOADED:
            report.uploaded += 1
            report.bytes += entry.size
        if outcome in (_Outcome.UPLOADED, _Outcome.THERE):
            return True
        if outcome is _Outcome.DAMAGED:
            report.damaged += 1
            if entry.path not in self._told:
                self._told.add(entry.path)
                logger.error("spooled blob is damaged key=%s path=%s", entry.key, entry.path)
            return False
        report.lost += 1
        logger.error("spooled blob is gone key=%s", entry.key)
        return True

    def close(self) -> None:
        """End the thread; what is not uploaded stays in the spool."""
        self._is_closed = True
        self._wanted.set()
        for upload in list(self._running):
            upload.cancel()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT)
        if self._spool is not None:
            self._spool.close()


def _is_down(failures: list[S3OperationError | OSError]) -> bool:
    last = failures[-PATIENCE:]
    return len(last) == PATIENCE and all(isinstance(each, TransientS3Error) for each in last)
