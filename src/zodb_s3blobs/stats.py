"""Numbers that are always on: what was counted since the process began, and what they mean."""

from collections.abc import Iterator
from contextlib import contextmanager
import threading
import time

from .forks import begin_in_children


#: What `stats` of a storage tells, by name. Those that end in _total only grow.
MEANINGS = {
    "hits_total": "reads of blobs that were in the cache",
    "misses_total": "reads of blobs that were not in the cache, each of which began a download",
    "waits_total": "reads that shared the download which another thread had begun",
    "prefetches_total": "blobs that a prefetch began to download",
    "wait_seconds_total": "time that threads waited for S3: for reads, and for uploads in votes",
    "lock_seconds_total": "time that other writers could not commit while blobs went to S3",
    "requests_total": "requests to S3, with those that were tried again",
    "retries_total": "requests to S3 that were tried again",
    "failures_total": "operations that S3 failed in the end; a missing object is none",
    "s3_is_down": "1 while S3 is known not to answer, so that requests fail at once, else 0",
    "downloads_total": "objects that were downloaded as a whole",
    "range_reads_total": "requests for a part of an object",
    "downloaded_bytes_total": "bytes of objects, and of parts of them, that arrived from S3",
    "uploads_total": "objects that were uploaded",
    "uploaded_bytes_total": "bytes of the objects that were uploaded",
    "spooled_total": "blobs that were committed into the spool, as S3 did not take them",
    "spool_uploads_total": "blobs that were uploaded from the spool",
    "spool_blobs": "blobs in the spool, not uploaded yet",
    "spool_bytes": "bytes of the blobs in the spool",
    "spool_age_seconds": "time since the oldest transaction went into the spool, if one is there",
    "evictions_total": "files that this process evicted from the cache",
    "evicted_bytes_total": "bytes of the files that this process evicted from the cache",
    "cache_bytes": "size of the committed files in the cache",
    "cache_max_bytes": "size that the committed files in the cache may have at most",
    "cache_age_seconds": "time since the last known use of the file that is evicted next",
}


class Counters:
    """Numbers of one part of a storage, as attributes; any thread may add to them.

    A forked child begins with zeros.
    """

    def __init__(self) -> None:
        self.begin()
        begin_in_children(self)

    def begin(self) -> None:
        """Set all to zero."""
        self._lock = threading.Lock()
        for name in self._names():
            setattr(self, name, 0)

    def _names(self) -> list[str]:
        return list(type(self).__annotations__)

    def add(self, **amounts: float) -> None:
        """Add to several numbers."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def values(self) -> dict[str, float]:
        """Return the numbers by their names in `MEANINGS`."""
        return {f"{name}_total": getattr(self, name) for name in self._names()}


class ReadCounters(Counters):
    """What readers and committers see."""

    #: Counted without the lock, for each read does it: an interpreter with a global lock does not
    #: change threads between the two halves of ``+=``, and without one a few are lost.
    hits: int
    misses: int
    waits: int
    prefetches: int
    wait_seconds: float
    lock_seconds: float

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the caller's thread spends inside as waiting for S3."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.add(wait_seconds=time.monotonic() - begun)


class ClientCounters(Counters):
    """What passes between an S3 client and its server."""

    requests: int
    retries: int
    failures: int
    downloads: int
    range_reads: int
    downloaded_bytes: int
    uploads: int
    uploaded_bytes: int


class SpoolCounters(Counters):
    """What passed through a spool."""

    spooled: int
    spool_uploads: int


class CacheCounters(Counters):
    """What a cache had to give up."""

    evictions: int
    evicted_bytes: int
