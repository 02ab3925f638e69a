"""Brings many blobs into the cache at the same time."""

from collections.abc import Iterable
from concurrent.futures import Future
import logging
import os
from queue import SimpleQueue
import threading
from typing import Any

from ZODB.POSException import POSKeyError

from .interfaces import IntegrityError
from .interfaces import NotUploadedError
from .interfaces import S3OperationError
from .loading import BlobLoader
from .loading import FindReference
from .reports import Report
from .stats import ReadCounters
from .uploads import Upload
from .uploads import UploadPool


logger = logging.getLogger(__name__)

# Oid and serial, with what has the path in the end
_Done = tuple[tuple[bytes, bytes], Future[Any]]

# Blobs that are under way or wait for each thread of the pool, so that none of them has to wait.
WAITING = 4


class PrefetchReport(Report):
    """Counts of blobs, and the bytes of those that were fetched."""

    def __init__(self) -> None:
        #: that were in the cache
        self.cached = 0
        self.fetched = 0
        #: that are nowhere
        self.missing = 0
        self.failed = 0
        #: left out after S3 had failed, or the cache was full of what was fetched
        self.skipped = 0
        self.bytes = 0


class Prefetch:
    """One call.

    The revisions are taken from the iterable as threads become free, and what the threads hold in
    memory does not depend on how many there are.
    """

    def __init__(
        self,
        cache: Any,
        loader: BlobLoader,
        pool: UploadPool,
        find_reference: FindReference,
        counters: ReadCounters,
    ) -> None:
        self._cache = cache
        self._loader = loader
        self._pool = pool
        self._find_reference = find_reference
        self._counters = counters
        self._report = PrefetchReport()
        self._done: SimpleQueue[_Done] = SimpleQueue()
        # What is under way, by oid and serial
        self._running: dict[tuple[bytes, bytes], Upload] = {}
        self._has_failed = False
        self._changed = threading.Condition()
        # Guarded by _changed: whether no more is to be fetched; how many blobs are being fetched,
        # and the bytes of those that were, and of the largest.
        self._is_over = False
        self._fetching = self._bytes = self._largest = 0

    def run(self, revisions: Iterable[tuple[bytes, bytes]]) -> PrefetchReport:
        """Fetch what is not cached; a failure of S3 ends it, and is logged and counted."""
        try:
            for oid, serial in revisions:
                self._add(oid, serial)
                self._collect(WAITING * self._pool.concurrency - 1)
            self._collect(0)
            self._report.bytes = self._bytes
        finally:
            self._stop()
            for work in self._running.values():
                work.cancel()
        return self._report

    def _add(self, oid: bytes, serial: bytes) -> None:
        # What is named a second time will be there.
        if (oid, serial) in self._running or self._cache.get(oid, serial) is not None:
            self._report.cached += 1
        elif self._is_over:
            self._report.skipped += 1
        else:
            try:
                # In this thread, to which the base's instance belongs.
                stamp = self._find_reference(oid, serial)
            except POSKeyError:
                self._report.missing += 1
                return
            # And nothing else: where many threads compute, this one rarely has its turn.
            work = self._pool.start(lambda cancelled: self._fetch(oid, serial, stamp))
            self._running[oid, serial] = work

    def _fetch(self, oid: bytes, serial: bytes, stamp: bytes | None) -> None:
        outcome: Future[str | None] = Future()
        if self._may_begin():
            place = self._cache.path(oid, serial)
            outcome = self._loader.load_soon(oid, serial, stamp)
            outcome.add_done_callback(lambda outcome: self._take_note(outcome, place))
        else:
            outcome.set_result(None)
        outcome.add_done_callback(lambda outcome: self._done.put(((oid, serial), outcome)))

    def _may_begin(self) -> bool:
        """Wait until there is room for one more, which is taken to be as large as the largest.

        :returns: False when the cache is full of what was fetched: then one more would evict some.
        """
        with self._changed:
            while not self._is_over and self._fetching and not self._has_room():
                self._changed.wait()
            self._is_over = self._is_over or self._bytes >= self._cache.max_size
            self._fetching += not self._is_over
            return not self._is_over

    def _has_room(self) -> bool:
        if not self._largest:
            return self._fetching < self._pool.concurrency  # until a first size is known
        return self._bytes + (self._fetching + 1) * self._largest <= self._cache.max_size

    def _take_note(self, outcome: "Future[str | None]", place: str) -> None:
        error, size, is_over = outcome.exception(), 0, False
        if error is None:
            path = outcome.result()
            # What the cache cannot take is kept beside it, but not much of it.
            is_over = path is not None and path != place
            try:
                size = 0 if path is None else os.path.getsize(path)
            except OSError:
                pass  # evicted again
        elif isinstance(error, (S3OperationError, OSError)):
            # An object that is damaged says nothing of the others.
            is_over = not isinstance(error, (IntegrityError, NotUploadedError))
        with self._changed:
            self._fetching -= 1
            self._bytes += size
            self._largest = max(self._largest, size)
            self._is_over = self._is_over or is_over
            self._changed.notify_all()

    def _stop(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _collect(self, limit: int) -> None:
        """Wait until no more than this many blobs are under way, and count the others."""
        while len(self._running) > limit:
            with self._counters.waiting():
                name, outcome = self._done.get()
            del self._running[name]
            try:
                if outcome.result() is None:
                    self._report.skipped += 1
                else:
                    self._report.fetched += 1
            except POSKeyError:
                self._report.missing += 1
            except (IntegrityError, NotUploadedError) as error:
                logger.warning("prefetch leaves out key=%s: %s", error.key, error)
                self._report.failed += 1
            except (S3OperationError, OSError) as error:
                if not self._has_failed:
                    logger.warning("prefetch given up: %s", error)
                self._report.failed += 1
                self._has_failed = True
