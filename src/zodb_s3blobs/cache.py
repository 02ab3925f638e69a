"""Committed blob files on disk up to a byte budget, across threads and processes.

    cache_dir/{last 3 hex digits of oid}/{oid}.{tid}.blob    committed files
    cache_dir/tmp/                                           files in the making
    cache_dir/index.sqlite, cache_dir/lock, cache_dir/boot

A row of the index stands for a file that is there or is about to come. Room is
reserved by writing the row, and a file comes only while its row stands, so the
sum of the rows bounds the sum of the files at every moment, whoever dies when.
A hit marks the file's own time and touches nothing else; eviction takes the
oldest row and puts it back when its file turns out to have been used since.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import itertools
import logging
import os
import re
import time

from ZODB.blob import rename_or_copy_blob
from zope.interface import implementer

from .cacheindex import CacheIndex
from .cacheindex import IndexRows
from .interfaces import IS3BlobCache
from .singleflight import SingleFlight


logger = logging.getLogger(__name__)

GiB = 1 << 30

_SHARD = re.compile(r"[0-9a-f]{3}")
_FILE = re.compile(r"([0-9a-f]{16}\.[0-9a-f]{16})\.blob")


@implementer(IS3BlobCache)
class S3BlobCache:
    """A directory of committed blob files that stays within max_size bytes.

    :param str cache_dir: made when missing, private to the user.
    :param int max_size: bytes.
    :param clock: returns the time in seconds since the epoch.
    """

    def __init__(
        self, cache_dir: str, max_size: int = GiB, clock: Callable[[], float] = time.time
    ) -> None:
        self.cache_dir = os.path.abspath(cache_dir)
        self.max_size = max_size
        self.temp_dir = os.path.join(self.cache_dir, "tmp")
        # The mode counts for the last directory only.
        for directory in (self.cache_dir, self.temp_dir):
            os.makedirs(directory, mode=0o700, exist_ok=True)
        self._clock = clock
        self._trust_files = True
        self._index = CacheIndex(os.path.join(self.cache_dir, "index.sqlite"), self._rebuild)
        self._single_flight = SingleFlight(os.path.join(self.cache_dir, "lock"))
        self._counter = itertools.count()
        self._check_after_boot()
        self.notify_loaded(0)

    def close(self) -> None:
        self._index.close()
        self._single_flight.close()

    # Reading

    def path(self, oid: bytes, tid: bytes) -> str:
        """Return where the file of this revision is, or would be."""
        name = oid.hex()
        return f"{self.cache_dir}/{name[-3:]}/{name}.{tid.hex()}.blob"

    def get(self, oid: bytes, tid: bytes) -> str | None:
        """Return the path of a cached file and mark it as used, else None."""
        name = oid.hex()
        path = f"{self.cache_dir}/{name[-3:]}/{name}.{tid.hex()}.blob"
        try:
            os.utime(path)
        except PermissionError:
            pass  # another user's file is a hit all the same
        except OSError:
            return path if os.path.exists(path) else None
        return path

    # Writing

    def temporary_file(self) -> str:
        """Return a path in the cache's file system that nobody else uses; nothing is there yet."""
        unique = f"{os.getpid()}-{next(self._counter)}-{os.urandom(8).hex()}"
        return os.path.join(self.temp_dir, f"blob-{unique}.tmp")

    def reserve(self, entries: Iterable[tuple[bytes, bytes, int]]) -> None:
        """Make room for (oid, tid, size) files that are about to be put.

        While the tid is not known, any 8 bytes that nobody else uses stand for it.
        """
        with self._index.writing() as rows:
            for oid, tid, size in entries:
                self._reserve(rows, _name(oid, tid), size)

    def release(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Give back the room of files that will not be put, named as it was reserved."""
        with self._index.writing() as rows:
            for oid, tid in entries:
                if not os.path.exists(self.path(oid, tid)):
                    rows.remove(_name(oid, tid))

    def put(self, oid: bytes, tid: bytes, source_path: str) -> str:
        """Move a complete file into the cache and return its path there."""
        source_path = self._bring_near(source_path)
        size = os.path.getsize(source_path)
        while True:
            # The row is committed before the file comes, lest a crash in between leave a
            # file without a row; in that moment others may evict the row.
            self.reserve([(oid, tid, size)])
            with self._index.writing() as rows:
                if _name(oid, tid) in rows:
                    return self._place(oid, tid, source_path)

    def put_many(self, entries: Sequence[tuple[bytes, bytes, str, bytes]]) -> None:
        """Move files in whose room is reserved; those that lost it are deleted instead.

        :param entries: (oid, tid, source_path, what stood for the tid in `reserve`).
        """
        near = [(oid, tid, self._bring_near(path), name) for oid, tid, path, name in entries]
        lost: set[str] = set()
        if any(name != tid for _oid, tid, _path, name in near):
            # Committed before the files come, lest a crash leave one without a row.
            with self._index.writing() as rows:
                for oid, tid, _path, name in near:
                    if _name(oid, name) not in rows:
                        lost.add(_name(oid, tid))
                    elif name != tid:
                        rows.rename(_name(oid, name), _name(oid, tid))
        with self._index.writing() as rows:
            for oid, tid, path, _reserved in near:
                if _name(oid, tid) in rows and _name(oid, tid) not in lost:
                    self._place(oid, tid, path)
                else:
                    os.remove(path)

    def discard(self, oid: bytes, tid: bytes) -> None:
        """Remove a file, and its directory with the last one."""
        path = self.path(oid, tid)
        if not os.path.exists(path):
            return
        with self._index.writing() as rows:
            _remove(path)
            rows.remove(_name(oid, tid))
            try:
                os.rmdir(os.path.dirname(path))
            except OSError:
                pass  # not empty

    @contextmanager
    def filling(self, oid: bytes, tid: bytes) -> Iterator[None]:
        """Let one process of this host at a time fill this file; threads are the caller's care."""
        with self._single_flight.alone(_name(oid, tid)):
            yield

    def notify_loaded(self, byte_count: int) -> None:
        """Evict what exceeds the budget, as after the budget was lowered."""
        with self._index.writing() as rows:
            self._make_room(rows, 0)

    def wait_for_cleanup(self) -> None:
        """Return at once: eviction happens before a file comes, not after."""

    # Looking

    def current_size(self) -> int:
        """Return the sum of the sizes of the files, in bytes."""
        with self._index.writing() as rows:
            return rows.total()

    def check(self, fix: bool = False) -> list[str]:
        """Compare the index with the files; return one sentence for each difference.

        :param bool fix: remove files whose size is not what the index says, drop rows without a
            file, and take files without a row into the index.
        """
        return self._compare(fix, trust_unknown=True)

    def _compare(self, fix: bool, trust_unknown: bool) -> list[str]:
        findings = []
        with self._index.writing() as rows:
            files = {name: (size, used) for name, size, used in self._scan()}
            known = dict(rows)
            for name in sorted(known.keys() - files.keys()):
                findings.append(f"{name} is in the index, its file is missing")
                if fix:
                    rows.remove(name)
            for name, (size, used) in sorted(files.items()):
                if name not in known:
                    findings.append(f"{name} is not in the index")
                elif known[name] != size:
                    findings.append(f"{name} has {size} bytes, the index says {known[name]}")
                else:
                    continue
                if fix and name not in known and trust_unknown:
                    rows.put(name, size, used)
                elif fix:
                    _remove(self._path_of(name))
                    rows.remove(name)
            if sum(size for size, used in files.values()) > self.max_size and len(files) > 1:
                findings.append(f"the files exceed the budget of {self.max_size} bytes")
            if fix:
                self._make_room(rows, 0)
                self._remove_old_temporaries()
        return findings

    def _check_after_boot(self) -> None:
        """Drop files that a power failure left short: nothing here is written with fsync."""
        try:
            with open("/proc/sys/kernel/random/boot_id") as file:
                boot = file.read().strip()
        except OSError:
            return  # not Linux
        marker = os.path.join(self.cache_dir, "boot")
        try:
            with open(marker) as file:
                last = file.read().strip()
        except FileNotFoundError:
            last = ""
        if last == boot:
            return
        # An index that the failure damaged, too, would be made anew from files that are short.
        self._trust_files = False
        if findings := self._compare(fix=True, trust_unknown=False):
            logger.warning("cache mended after boot findings=%d", len(findings))
        self._trust_files = True
        with open(marker, "w") as file:
            file.write(boot)

    def _remove_old_temporaries(self) -> None:
        """Remove what killed processes left: no upload takes a week."""
        for entry in os.scandir(self.temp_dir):
            # The time of the last rename: a file that was consumed may be old itself.
            if entry.is_file() and self._clock() - entry.stat().st_ctime > 7 * 86400:
                _remove(entry.path)

    # With the write lock of the index

    def _reserve(self, rows: IndexRows, name: str, size: int) -> None:
        rows.remove(name)
        self._make_room(rows, size)
        rows.put(name, size, self._clock())
        try:
            os.mkdir(os.path.dirname(self._path_of(name)), mode=0o700)
        except FileExistsError:
            pass

    def _make_room(self, rows: IndexRows, size: int) -> None:
        begun = self._clock()
        while (total := rows.total()) and total + size > self.max_size:
            oldest = rows.oldest()
            if oldest is None:
                return
            name, largest, used = oldest
            if size == 0 and largest == total:
                return  # one blob larger than the cache stays until others come
            path = self._path_of(name)
            # A file that was used since goes behind, once: used >= begun says we saw it already.
            if used < begun and (last := _last_use(path)) > used:
                rows.mark(name, last)
                continue
            _remove(path)
            rows.remove(name)

    def _place(self, oid: bytes, tid: bytes, source_path: str) -> str:
        path = self.path(oid, tid)
        try:
            os.replace(source_path, path)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            os.replace(source_path, path)
        return path

    # Files

    def _path_of(self, name: str) -> str:
        return f"{self.cache_dir}/{name[13:16]}/{name}.blob"

    def _bring_near(self, source_path: str) -> str:
        """Return a path in the cache's file system with the bytes, not writable."""
        directory = os.path.dirname(os.path.abspath(source_path))
        if os.stat(directory).st_dev != os.stat(self.temp_dir).st_dev:
            near = self.temporary_file()
            rename_or_copy_blob(source_path, near, chmod=False)
            source_path = near
        os.chmod(source_path, 0o400)
        return source_path

    def _rebuild(self) -> Iterable[tuple[str, int, float]]:
        return self._scan() if self._trust_files else ()

    def _scan(self) -> Iterator[tuple[str, int, float]]:
        for shard in os.scandir(self.cache_dir):
            if _SHARD.fullmatch(shard.name):
                for entry in os.scandir(shard.path):
                    if match := _FILE.fullmatch(entry.name):
                        status = entry.stat()
                        yield match.group(1), status.st_size, status.st_mtime


def _name(oid: bytes, tid: bytes) -> str:
    return f"{oid.hex()}.{tid.hex()}"


def _last_use(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass
