"""Committed blob files on disk up to a byte budget, across threads and processes.

    cache_dir/{last 3 hex digits of oid}/{oid}.{tid}.blob    committed files
    cache_dir/tmp/                                           files in the making
    cache_dir/index.sqlite, cache_dir/lock

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
import fcntl
import itertools
import os
import re
import threading
import time
import weakref
import zlib

from ZODB.blob import rename_or_copy_blob
from zope.interface import implementer

from .cacheindex import CacheIndex
from .cacheindex import IndexRows
from .interfaces import IS3BlobCache


GiB = 1 << 30

_SHARD = re.compile(r"[0-9a-f]{3}")
_FILE = re.compile(r"([0-9a-f]{16}\.[0-9a-f]{16})\.blob")
# Seconds after which a filler no longer waits for one in another process.
FILLING_TIMEOUT = 120.0


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
        self._index = CacheIndex(os.path.join(self.cache_dir, "index.sqlite"), self._scan)
        self._flights = _Flights(os.path.join(self.cache_dir, "lock"))
        self._counter = itertools.count()
        self.notify_loaded(0)

    def close(self) -> None:
        self._index.close()
        self._flights.close()

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
        """Make room for (oid, tid, size) files that are about to be put."""
        with self._index.writing() as rows:
            for oid, tid, size in entries:
                self._reserve(rows, _name(oid, tid), size)

    def release(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Give back the room of (oid, tid) files that will not be put."""
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

    def put_many(self, entries: Sequence[tuple[bytes, bytes, str]]) -> None:
        """Move files in whose room is reserved; those that lost it are deleted instead."""
        near = [(oid, tid, self._bring_near(path)) for oid, tid, path in entries]
        with self._index.writing() as rows:
            for oid, tid, path in near:
                if _name(oid, tid) in rows:
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
        """Let one thread of one process of this host at a time fill this file."""
        with self._flights.alone(_name(oid, tid)):
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
        """Compare the index with the files; return one sentence for each difference."""
        findings = []
        with self._index.writing() as rows:
            files = {name: (size, used) for name, size, used in self._scan()}
            known = dict(rows)
            for name in sorted(files.keys() - known.keys()):
                findings.append(f"{name} is not in the index")
            for name in sorted(known.keys() - files.keys()):
                findings.append(f"{name} is in the index, its file is missing")
                if fix:
                    rows.remove(name)
            for name, (size, used) in files.items():
                if name in known and known[name] != size:
                    findings.append(f"{name} has {size} bytes, the index says {known[name]}")
                if fix and known.get(name) != size:
                    rows.put(name, size, used)
            if sum(size for size, used in files.values()) > self.max_size and len(files) > 1:
                findings.append(f"the files exceed the budget of {self.max_size} bytes")
            if fix:
                self._make_room(rows, 0)
                self._remove_old_temporaries()
        return findings

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

    def _scan(self) -> Iterator[tuple[str, int, float]]:
        for shard in os.scandir(self.cache_dir):
            if _SHARD.fullmatch(shard.name):
                for entry in os.scandir(shard.path):
                    if match := _FILE.fullmatch(entry.name):
                        status = entry.stat()
                        yield match.group(1), status.st_size, status.st_mtime


_all_flights: "weakref.WeakSet[_Flights]" = weakref.WeakSet()


class _Flights:
    """One filler of a name at a time: a lock among threads, then a byte of a file among processes.

    Record locks belong to the process and vanish with it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._guard = threading.Lock()
        # Guarded by _guard: all three.
        self._names: dict[str, tuple[threading.Lock, int]] = {}
        self._file: int | None = None
        self._pid = 0
        _all_flights.add(self)

    def forget(self) -> None:
        """In a forked child: the parent's threads and their locks do not exist here."""
        self._guard = threading.Lock()
        self._names = {}

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        with self._guard:
            lock, users = self._names.get(name) or (threading.Lock(), 0)
            self._names[name] = (lock, users + 1)
        try:
            with lock, self._alone_among_processes(zlib.crc32(name.encode())):
                yield
        finally:
            with self._guard:
                lock, users = self._names[name]
                if users == 1:
                    del self._names[name]
                else:
                    self._names[name] = (lock, users - 1)

    @contextmanager
    def _alone_among_processes(self, place: int) -> Iterator[None]:
        file = self._open()
        deadline = time.monotonic() + FILLING_TIMEOUT
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                break
            except BlockingIOError:
                # A stopped process must not stop the others: filling twice is only slower.
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        try:
            yield
        finally:
            fcntl.lockf(file, fcntl.LOCK_UN, 1, place)

    def _open(self) -> int:
        with self._guard:
            if self._file is None or self._pid != os.getpid():
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._pid = os.getpid()
            return self._file

    def close(self) -> None:
        with self._guard:
            if self._file is not None:
                os.close(self._file)
            self._file = None


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


def _forget_flights() -> None:
    for flights in list(_all_flights):
        flights.forget()


os.register_at_fork(after_in_child=_forget_flights)
