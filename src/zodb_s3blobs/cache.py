"""Committed blob files on disk up to a byte budget, across threads and processes.

    cache_dir/{last 3 hex digits of oid}/{oid}.{tid}.blob    committed files
    cache_dir/process/{process}/                             files in the making, and staged ones
    cache_dir/tmp/                                           uncommitted files of ZODB
    cache_dir/index.sqlite, cache_dir/lock, cache_dir/boot

A row of the index stands for a file that is there or is about to come. Room is
reserved by writing the row, and a file comes only while its row stands, so the
sum of the rows bounds the sum of the files at every moment, whoever dies when.
A hit marks the file's own time and touches nothing else; eviction takes the
oldest row and puts it back when its file turns out to have been used since.

Whatever is wrong with directory or index, blobs are served: what cannot be
cached is kept beside the cache for a while, by this process for itself.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import errno
import logging
import os
import threading
import time

from ZODB.blob import rename_or_copy_blob
from zope.interface import implementer

from .cachechange import Change
from .cachechange import Changes
from .cachechange import Patience
from .cachefiles import CacheFiles
from .cachefiles import name_of
from .cacheindex import CacheIndex
from .cacheindex import IndexDamaged
from .cachesurvey import Survey
from .directories import make_private
from .directorylock import DirectoryBusy
from .interfaces import DISK_FULL
from .interfaces import EVICTION_ATTEMPTS
from .interfaces import FILES_AT_ONCE
from .interfaces import IS3BlobCache
from .overflow import Overflow
from .singleflight import SingleFlight
from .stats import CacheCounters
from .tempdirs import remove_old
from .tempdirs import TempFiles


logger = logging.getLogger(__name__)

GiB = 1 << 30

# Seconds between two lines of the log about the same trouble
SILENCE = 30.0
# Seconds for which somebody waits who only wants to know
LOOK_PATIENCE = 0.5
# Seconds after which files are looked at again that after a boot nobody could look at
RETRY = 1.0
# What is evicted at least when the disk is full, in bytes, and how often.
SHED_BYTES, SHED_ATTEMPTS = 64 << 20, 3


@implementer(IS3BlobCache)
class S3BlobCache:
    """A directory of committed blob files that stays within max_size bytes.

    :param str cache_dir: made when missing, private to the user.
    :param int max_size: bytes.
    :param clock: returns the time in seconds since the epoch.
    :raises OSError: when the directory is not there and cannot be made.
    """

    def __init__(
        self, cache_dir: str, max_size: int = GiB, clock: Callable[[], float] = time.time
    ) -> None:
        self.cache_dir = os.path.abspath(cache_dir)
        self.max_size = max_size
        make_private(self.cache_dir)
        if os.stat(self.cache_dir).st_mode & 0o002:
            logger.warning("cache directory is open to others path=%s", self.cache_dir)
        self._temporaries = TempFiles(os.path.join(self.cache_dir, "process"))
        self.temp_dir = os.path.join(self.cache_dir, "tmp")
        try:
            make_private(self.temp_dir)
        except OSError:
            self.temp_dir = os.path.dirname(self._temporaries.elsewhere())
        self._clock = clock
        self.counters = CacheCounters()
        self._files = CacheFiles(self.cache_dir)
        self._index = CacheIndex(os.path.join(self.cache_dir, "index.sqlite"))
        self._survey = Survey(self._files, self._index, clock)
        self._changes = Changes(
            self._index,
            self._survey.some,
            lambda rows: Change(
                self._files, rows, self.max_size, self._clock(), self._temporaries.file
            ),
            self.counters,
        )
        self._single_flight = SingleFlight(os.path.join(self.cache_dir, "lock"))
        self._overflow = Overflow()
        # Times of the monotonic clock
        self._silent_until = self._catches_up_at = 0.0
        self._is_sure = False
        # The thread that does, by process; setdefault decides
        self._catching_up: dict[int, int] = {}
        self._catch_up()

    def _catch_up(self) -> None:
        name, thread = os.getpid(), threading.get_ident()
        if self._catching_up.setdefault(name, thread) != thread:
            return
        try:
            self._catch_up_alone()
        finally:
            del self._catching_up[name]

    def _catch_up_alone(self) -> None:
        self._catches_up_at = time.monotonic() + RETRY
        try:
            self._survey.run()
            self._make_room()
            self._remove_dead()
        except OSError as error:
            # A site whose cache fails is slow; one that does not start is no site.
            self._complain(error)
            if isinstance(error, DirectoryBusy):
                self._changes.rest()
        self._is_sure = self._survey.is_sure

    def close(self) -> None:
        self._index.close()
        self._single_flight.close()
        self._overflow.clear()

    # Reading

    def path(self, oid: bytes, tid: bytes) -> str:
        """Return where the file of this revision is, or would be."""
        return self._files.path(name_of(oid, tid))

    def get(self, oid: bytes, tid: bytes) -> str | None:
        """Return the path of a cached file and mark it as used, else None."""
        name = oid.hex()
        path = f"{self.cache_dir}/{name[-3:]}/{name}.{tid.hex()}.blob"
        if not self._is_sure:
            return self._overflow.get(name_of(oid, tid))
        try:
            os.utime(path)
        except FileNotFoundError:
            return self._overflow.get(name_of(oid, tid))
        except OSError:
            # Another user's file is a hit all the same, and so is one on a read-only disk.
            return path if os.path.exists(path) else self._overflow.get(name_of(oid, tid))
        return path

    def size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the bytes of a cached file, which do not count as used by that, else None."""
        paths = [self.path(oid, tid)] if self._is_sure else []
        for path in (*paths, self._overflow.get(name_of(oid, tid))):
            try:
                if path is not None:
                    return os.path.getsize(path)
            except OSError:
                pass
        return None

    def known_size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the bytes that a file had when it came into the cache, None where nobody knows."""
        try:
            with self._index.writing(LOOK_PATIENCE) as rows:
                return rows.size(name_of(oid, tid))
        except OSError:
            return None

    def fill(self, oid: bytes, tid: bytes, fetch: Callable[[str], None]) -> str:
        """Return the path of a file that is fetched unless another process has just done so.

        :param fetch: writes the file to a path where nothing is.
        :raises OSError: when no file can be written anywhere.
        """
        if not self._is_sure and time.monotonic() > self._catches_up_at:
            self._catch_up()
        with self.filling(oid, tid):
            path = self.get(oid, tid)
            if path is not None:
                return path
            self._overflow.expire()
            for attempt in range(1, EVICTION_ATTEMPTS + 1):
                fetched = self._fetch(fetch)
                try:
                    return self.put(oid, tid, fetched)
                except FileNotFoundError:  # somebody is removing the directory
                    if attempt == EVICTION_ATTEMPTS:
                        raise
            raise AssertionError("unreachable")

    def begin_filling(self, oid: bytes, tid: bytes) -> tuple[str, Callable[[], None]] | None:
        """Begin to fill a file unless another process of this host does so.

        The directory of its path may have gone since the last one: then `fill` can help.

        :returns: None, or where the file is to be written, and what is called in the end.
        :raises OSError: when there can be no file.
        """
        path = self._temporaries.one_more()
        end = self._single_flight.begin(name_of(oid, tid))
        return None if end is None else (path, end)

    @contextmanager
    def filling(self, oid: bytes, tid: bytes) -> Iterator[None]:
        """Let one process of this host at a time fill this file; threads are the caller's care."""
        with self._single_flight.alone(name_of(oid, tid)):
            yield

    def _fetch(self, fetch: Callable[[str], None]) -> str:
        for _attempt in range(SHED_ATTEMPTS):
            begun: list[int] = []
            try:
                return _fetched(fetch, self.temporary_file(), begun)
            except OSError as error:
                self._complain(error)
                if error.errno not in DISK_FULL or not self.shed(2 * sum(begun)):
                    break
        return _fetched(fetch, self._temporaries.elsewhere(), [])

    def shed(self, byte_count: int) -> bool:
        """Evict though the budget allows more, for the disk is full; return whether a file went."""
        byte_count, removed = max(byte_count, SHED_BYTES), 0
        while removed < byte_count:
            change = None
            try:
                with self._changes.one() as change:
                    change.free(byte_count - removed, Patience.LOST)
            except OSError as error:
                # On a full disk the index may refuse, too, though the files are gone by then.
                self._complain(error)
            if change is None or not change.removed:
                break
            removed += change.removed
        return removed > 0

    # Writing

    def temporary_file(self) -> str:
        """Return a path, in the cache's file system if that is possible, that nobody else uses.

        :raises OSError: when there can be none.
        """
        try:
            return self._temporaries.file()
        except OSError as error:
            self._complain(error)
            is_full = error.errno in DISK_FULL
        try:
            if is_full and self.shed(0):
                return self._temporaries.file()
        except OSError as error:
            self._complain(error)
        return self._temporaries.elsewhere()

    def reserve(self, entries: Iterable[tuple[bytes, bytes, int]]) -> None:
        """Make room for (oid, tid, size) files that are about to be put.

        While the tid is not known, any 8 bytes that nobody else uses stand for it. What is larger
        than the whole budget gets no room.
        """
        self._reserve([(name_of(oid, tid), size) for oid, tid, size in entries])

    def _reserve(self, wanted: list[tuple[str, int]]) -> None:
        wanted = [(name, size) for name, size in reversed(wanted) if size <= self.max_size]
        # What does not fit together comes one after the other, and the last ones stay.
        together = sum(size for _name, size in wanted) <= self.max_size
        at_a_time = FILES_AT_ONCE if together else 1

        def reserve(change: Change, patience: Patience) -> bool:
            while wanted and change.reserve(*wanted[-at_a_time:], patience=patience):
                del wanted[-at_a_time:]
            return not wanted

        self._changes.until_done(reserve)

    def release(self, entries: Sequence[tuple[bytes, bytes]]) -> None:
        """Give back the room of files that will not be put, named as it was reserved."""
        self._release([name_of(oid, tid) for oid, tid in entries])

    def _release(self, names: list[str]) -> None:
        with self._changes.one() as change:
            for name in names:
                if not os.path.exists(self._files.path(name)):
                    change.rows.remove(name)

    def put(self, oid: bytes, tid: bytes, source_path: str) -> str:
        """Move a complete file into the cache and return its path there.

        Where that cannot be done, or the file is larger than the budget, it is kept beside the
        cache for a while, and its path is another one.

        :raises FileNotFoundError: when there is no such file.
        """
        return self._put_alone(_Newcomer(name_of(oid, tid), source_path))

    def put_all(self, entries: Sequence[tuple[bytes, bytes, str]]) -> list[str | None]:
        """Move complete files into the cache, and take its lock as often as for one.

        :param entries: (oid, tid, source_path), each revision once, up to ``FILES_AT_ONCE``.
        :returns: their paths; None for a file that was left where it is: try `put`.
        """
        newcomers = [_Newcomer(name_of(oid, tid), path) for oid, tid, path in entries]
        by_name = {newcomer.name: newcomer for newcomer in newcomers}
        try:
            directories = {os.path.dirname(newcomer.source_path) for newcomer in newcomers}
            if any(map(self._is_far, directories)):
                return [None] * len(newcomers)  # to copy takes long
            for newcomer in newcomers:
                os.chmod(newcomer.source_path, 0o400)
            self._reserve([(newcomer.name, newcomer.size) for newcomer in newcomers])
            with self._changes.one() as change:
                # Others may have evicted rows in between.
                there = list(change.rows.sizes(list(by_name)))
                files = [(by_name[name].source_path, name) for name in there]
                for name, path in zip(there, change.place_all(files), strict=True):
                    by_name[name].path = path
        except OSError:
            # It shows again, for the file that it concerns.
            for newcomer in newcomers:
                newcomer.path = newcomer.path or self._moved(newcomer.source_path, newcomer.name)
        return [newcomer.path for newcomer in newcomers]

    def _moved(self, source_path: str, name: str) -> str | None:
        """Return the path of a file that was moved in before an error, else None."""
        path = self._files.path(name)
        return path if not os.path.exists(source_path) and os.path.exists(path) else None

    def _put_alone(self, newcomer: "_Newcomer") -> str:
        name, near, size = newcomer.name, newcomer.source_path, newcomer.size
        try:
            near = self._bring_near(near)
            attempts = EVICTION_ATTEMPTS if size <= self.max_size else 0
            for _attempt in range(attempts):
                # The row is committed before the file comes, lest a crash in between leave a
                # file without a row; in that moment others may evict the row.
                self._reserve([(name, size)])
                with self._changes.one() as change:
                    if name in change.rows:
                        return change.place(near, name)
        except OSError as error:
            self._complain(error)
            if (path := self._moved(near, name)) is not None:
                return path
            self._give_back(name)
        return self._overflow.keep(name, near)

    def _give_back(self, name: str) -> None:
        try:
            self._release([name])
        except OSError:
            pass  # the row takes room until its turn comes

    def put_many(self, entries: Sequence[tuple[bytes, bytes, str, bytes]]) -> None:
        """Move files in whose room is reserved; those that lost it are deleted instead.

        :param entries: (oid, tid, source_path, what stood for the tid in `reserve`).
        """
        near: list[tuple[bytes, bytes, str, bytes]] = []
        try:
            for oid, tid, path, reserved in entries:
                near.append((oid, tid, self._bring_near(path), reserved))
            self._put_near(near)
        except BaseException:
            # Whatever it was, the caller knows of its own files, not of copies.
            for (_oid, _tid, path, _reserved), entry in zip(near, entries, strict=False):
                if path != entry[2]:
                    _removed_size(path)
            raise

    def _put_near(self, near: Sequence[tuple[bytes, bytes, str, bytes]]) -> None:
        lost: set[str] = set()
        if any(reserved != tid for _oid, tid, _path, reserved in near):
            # Committed before the files come, lest a crash leave one without a row.
            with self._changes.one() as change:
                for oid, tid, _path, reserved in near:
                    if name_of(oid, reserved) not in change.rows:
                        lost.add(name_of(oid, tid))
                    elif reserved != tid:
                        change.rows.rename(name_of(oid, reserved), name_of(oid, tid))
        with self._changes.one() as change:
            for oid, tid, path, _reserved in near:
                name = name_of(oid, tid)
                if name in change.rows and name not in lost:
                    change.place(path, name)
                else:
                    os.remove(path)

    def discard(self, oid: bytes, tid: bytes) -> None:
        """Remove a file, and its directory with the last one; if that fails, it grows old here."""
        try:
            if os.path.exists(self.path(oid, tid)):
                with self._changes.one() as change:
                    change.remove(name_of(oid, tid))
        except OSError as error:
            self._complain(error)

    def notify_loaded(self, byte_count: int) -> None:
        """Evict what exceeds the budget, as after the budget was lowered."""
        self._make_room()

    def wait_for_cleanup(self) -> None:
        """Return at once: eviction happens before a file comes, not after."""

    # Looking

    def current_size(self) -> int:
        """Return the sum of the sizes of the files, in bytes."""
        self._survey.complete()
        with self._index.writing() as rows:
            return rows.total

    def usage(self) -> dict[str, float | None]:
        """Return ``cache_bytes``, ``cache_max_bytes``, and ``cache_age_seconds`` of what goes next.

        What cannot be told is None.
        """
        total: int | None = None
        age: float | None = None
        try:
            with self._index.writing(LOOK_PATIENCE) as rows:
                if rows.is_complete:
                    total, used = rows.total, rows.first_use()
                    age = None if used is None else max(0.0, self._clock() - used)
        except OSError:
            pass  # those who need the index complain
        return {
            "cache_bytes": total,
            "cache_max_bytes": self.max_size,
            "cache_age_seconds": age,
        }

    def check(self, fix: bool = False) -> list[str]:
        """Compare the index with the files; return one sentence for each difference.

        Files come and go meanwhile: a range of directories is compared at a time.

        :param bool fix: remove files whose size is not what the index says, drop rows without a
            file, and take files without a row into the index.
        """
        findings = []
        try:
            self._survey.complete()
            findings += self._survey.check(fix, self.max_size)
        except IndexDamaged as error:
            # It is made anew, whether it is to be mended or not.
            self._survey.complete()
            findings = [str(error), *self._survey.check(fix, self.max_size)]
        if fix:
            self._make_room()
            self._remove_dead()
        return findings

    def _make_room(self) -> None:
        self._changes.until_done(
            lambda change, patience: change.free(change.rows.total - self.max_size, patience)
        )

    # Trouble

    def _remove_dead(self) -> None:
        self._temporaries.remove_dead()
        remove_old(self.temp_dir)

    def _complain(self, error: OSError) -> None:
        if time.monotonic() > self._silent_until:
            self._silent_until = time.monotonic() + SILENCE
            logger.warning(
                "cache cannot be used, blobs are served all the same path=%s: %s",
                self.cache_dir,
                f"{error} (owner, mode and space of the directory? It is tried again)",
            )

    def _is_far(self, directory: str) -> bool:
        return os.stat(directory).st_dev != os.stat(self.cache_dir).st_dev

    def _bring_near(self, source_path: str) -> str:
        """Return a path in the cache's file system with the bytes, not writable.

        :raises OSError: when there is none; the source is untouched.
        """
        if self._is_far(os.path.dirname(os.path.abspath(source_path))):
            near = self.temporary_file()
            if self._is_far(os.path.dirname(near)):
                raise OSError(errno.EXDEV, f"{self.cache_dir} takes no files")
            try:
                rename_or_copy_blob(source_path, near, chmod=False)
            except BaseException:
                # Half a file; the caller has the whole one.
                _removed_size(near)
                raise
            source_path = near
        os.chmod(source_path, 0o400)
        return source_path


class _Newcomer:
    """A file that is to be put into the cache.

    :raises FileNotFoundError: when there is none.
    """

    def __init__(self, name: str, source_path: str) -> None:
        self.name = name
        self.source_path = source_path
        self.size = os.path.getsize(source_path)
        #: in the cache, once it is there
        self.path: str | None = None


def _fetched(fetch: Callable[[str], None], path: str, begun: list[int]) -> str:
    """Return the path when the file is there; else nothing remains, and begun has its size."""
    try:
        fetch(path)
    except BaseException as error:
        # Whatever it was, half a file is of no use.
        begun.append(_removed_size(path))
        if isinstance(error, OSError) and error.filename is None:
            error.filename = path
        raise
    return path


def _removed_size(path: str) -> int:
    """Remove a file and return how many bytes it had; 0 when it is missing."""
    try:
        size = os.path.getsize(path)
        os.remove(path)
    except FileNotFoundError:
        return 0
    return size
