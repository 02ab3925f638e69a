"""What happens to the files of a cache while its lock is held: reserve, evict, place, remove."""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import closing
from contextlib import contextmanager
from enum import auto
from enum import Enum
import heapq
import itertools
import logging
import os
import time

from .cachefiles import CacheFiles
from .cachefiles import directory_of
from .cacheindex import CacheIndex
from .cacheindex import IndexRows
from .directorylock import DirectoryBusy
from .stats import CacheCounters


logger = logging.getLogger(__name__)

# Files that are looked at before other processes have their turn; as many when that was in vain.
BATCH, LARGE_BATCH = 64, 1000
# Seconds for which others have the lock after each batch, and after how many of them that freed
# nothing an eviction takes what there is.
PAUSE, IN_VAIN = 0.002, 16
# Seconds for which the lock is left alone when somebody has held it for too long.
REST = 30.0
# To remove more bytes takes so long that the file is renamed now and removed later.
LARGE = 8 << 20


class Patience(Enum):
    """How an eviction has gone so far that takes several batches.

    The rows of files that were used since go behind, and where all are in use exactness would look
    at a million of them before the first may go: after some batches the oldest of one goes.
    """

    FRESH = auto()
    #: earlier batches freed nothing
    TRIED = auto()
    #: nobody waits any longer
    LOST = auto()


class Change:
    """Rows and files that change together, for whoever holds the lock.

    :param int max_size: budget in bytes.
    :param float now: seconds since the epoch.
    :param temporary_file: returns a path that nobody else uses.
    """

    def __init__(
        self,
        files: CacheFiles,
        rows: IndexRows,
        max_size: int,
        now: float,
        temporary_file: Callable[[], str],
    ) -> None:
        self.rows = rows
        #: what was evicted, in bytes, and that part of it of which there were files
        self.freed = self.removed = 0
        #: how many files that were
        self.evicted = 0
        #: how many files could not be removed
        self.refused = 0
        self._files = files
        self._max_size = max_size
        self._now = now
        self._temporary_file = temporary_file
        self._asides: list[str] = []
        # Directories, and whether they were before as they are known
        self._changed: dict[str, bool] = {}

    def reserve(self, *files: tuple[str, int], patience: Patience = Patience.FRESH) -> bool:
        """Put the rows of files that are to come; False when others must first be evicted.

        A call evicts no more than a batch, so that it may take several, with the lock let go of
        in between.

        :param files: names, each once, and sizes in bytes, together not more than the budget; up to
            ``FILES_AT_ONCE``.
        """
        if (excess := self._excess(files)) > 0:
            self.free(excess, patience)
            if self._excess(files) > 0:
                return False
        self.rows.put_all(files, self._now)
        return True

    def _excess(self, files: Sequence[tuple[str, int]]) -> int:
        # In the place of the rows of these names, which eviction may take, too.
        known = self.rows.sizes([name for name, _size in files]).values()
        coming = sum(size for _name, size in files)
        return self.rows.total - sum(known) + coming - self._max_size

    def place(self, source_path: str, name: str) -> str:
        """Move in a file whose row stands, and return its path."""
        (path,) = self.place_all([(source_path, name)])
        return path

    def place_all(self, files: Sequence[tuple[str, str]]) -> list[str]:
        """Move in files whose rows stand, given by source path and name, and return their paths.

        :param files: up to ``FILES_AT_ONCE``.
        """
        names = [name for _source_path, name in files]
        self._touch_all(names)
        paths = [self._files.place(source_path, name) for source_path, name in files]
        self.rows.mark_placed(*names)
        return paths

    def remove(self, name: str) -> None:
        """Remove file and row, and the directory with its last file."""
        self._touch(name)
        self._files.remove(name)
        self.rows.remove(name)
        self._files.remove_directory(directory_of(name))

    def _touch(self, name: str) -> None:
        directory = directory_of(name)
        if directory not in self._changed:
            before = self._files.modified(directory)
            self._changed[directory] = before == self.rows.modified(directory)

    def _touch_all(self, names: Sequence[str]) -> None:
        new = {directory_of(name) for name in names}.difference(self._changed)
        known = self.rows.modified_of(list(new))
        for directory in new:
            before = self._files.modified(directory)
            self._changed[directory] = before == known.get(directory)

    def end(self) -> None:
        """Remember what the directories look like now: one that looks otherwise later is read.

        So is one that looked otherwise before: somebody else has changed it, too.
        """
        known = [directory for directory, was_known in self._changed.items() if was_known]
        self.rows.note({directory: self._files.modified(directory) for directory in known})

    def clean_up(self) -> None:
        """Remove what was set aside, after the lock was given back."""
        while self._asides:
            try:
                os.remove(self._asides.pop())
            except OSError:
                # It goes with this process's temporary files.
                logger.warning("evicted file stays", exc_info=True)

    # Eviction

    def free(self, byte_count: int, patience: Patience = Patience.FRESH) -> bool:
        """Evict a batch, or less when that frees as much; return whether it did."""
        if byte_count <= 0:
            return True
        evicted: list[tuple[str, int]] = []
        refused: list[str] = []
        # A heap of time of last use, name and size
        used_since: list[tuple[float, str, int]] = []
        missing = byte_count
        candidates = self._least_recently_used(used_since, refused, patience)
        with closing(candidates):
            while missing > 0 and (candidate := next(candidates, None)):
                try:
                    self._evict(*candidate)
                except OSError as error:
                    _refuse(refused, candidate[0], error)
                else:
                    evicted.append(candidate)
                    missing -= candidate[1]
        self.rows.remove_known(evicted)
        self.rows.mark([(name, last) for last, name, _size in used_since])
        self.rows.mark([(name, self._now) for name in refused])
        self.freed += byte_count - missing
        self.refused += len(refused)
        if not evicted and not used_since and not refused:
            self.rows.total = self.rows.sum()  # nothing is left, whatever was counted
        return missing <= 0

    def _least_recently_used(
        self, used_since: list[tuple[float, str, int]], refused: list[str], patience: Patience
    ) -> Generator[tuple[str, int], None, None]:
        """Yield name and size of files in the order of their last use.

        The rows are in the order of the last use that is known. A file that was used since joins
        the heap, and its turn comes when all rows that are not older had theirs.
        """
        count, limit = 0, BATCH if patience is Patience.FRESH else LARGE_BATCH
        with closing(self.rows.by_use()) as rows:
            for name, size, used in itertools.islice(rows, limit):
                count += 1
                while used_since and used_since[0][0] <= used:
                    yield heapq.heappop(used_since)[1:]
                try:
                    last = self._files.last_use(name)
                except OSError as error:
                    _refuse(refused, name, error)
                    continue
                if last > used:
                    heapq.heappush(used_since, (last, name, size))
                else:
                    yield name, size
            while used_since and (count < limit or patience is Patience.LOST):
                yield heapq.heappop(used_since)[1:]

    def _evict(self, name: str, size: int) -> None:
        self._touch(name)
        if (size >= LARGE and self._set_aside(name)) or self._files.remove(name):
            self.removed += size
            self.evicted += 1

    def _set_aside(self, name: str) -> bool:
        try:
            aside = self._temporary_file()
            os.rename(self._files.path(name), aside)
        except OSError:
            return False  # then it is removed at once
        self._asides.append(aside)
        return True


def _refuse(refused: list[str], name: str, error: OSError) -> None:
    # Another user's. It goes behind, lest it keep all others from being evicted.
    logger.warning("cached file cannot be removed: %s", error)
    refused.append(name)


class Changes:
    """Takes the lock for a change, or for as many as it needs.

    :param is_known: learns of some files that the index does not know; returns whether it now
        knows all.
    :param new_change: returns a `Change` of rows.
    :param counters: told of what was evicted.
    """

    def __init__(
        self,
        index: CacheIndex,
        is_known: Callable[[IndexRows], bool],
        new_change: Callable[[IndexRows], Change],
        counters: CacheCounters,
    ) -> None:
        self._index = index
        self._counters = counters
        self._is_known = is_known
        self._new_change = new_change
        # Of the monotonic clock
        self._rests_until = 0.0

    def rest(self) -> None:
        """Leave the lock alone for a while: whoever waited for it in vain does so once."""
        self._rests_until = time.monotonic() + REST

    @contextmanager
    def one(self) -> Iterator[Change]:
        """Hold the lock of the directory for a change, which is kept unless an error leaves.

        :raises DirectoryBusy: when others have held it for too long, now or a moment ago.
        :raises OSError: when the index cannot be used, or does not know all files yet.
        """
        if time.monotonic() < self._rests_until:
            raise DirectoryBusy("the index of the blob cache is left alone for a while")
        change = None
        try:
            with self._index.writing() as rows:
                if self._is_known(rows):
                    change = self._new_change(rows)
                    yield change
                    change.end()
        except DirectoryBusy:
            self.rest()
            raise
        finally:
            if change is not None:
                self._counters.add(evictions=change.evicted, evicted_bytes=change.removed)
                change.clean_up()
        if change is None:
            raise OSError("the index of the blob cache is being made anew")

    def until_done(self, step: Callable[[Change, Patience], bool]) -> None:
        """Repeat what takes several batches, with the lock let go of in between.

        :param step: returns whether it is done.
        :raises OSError: as `one`, or when no file can be removed.
        """
        in_vain = 0
        while True:
            patience = Patience.TRIED if in_vain else Patience.FRESH
            if in_vain >= IN_VAIN:
                patience = Patience.LOST
            with self.one() as change:
                if step(change, patience):
                    return
            if patience is Patience.LOST and change.refused and not change.freed:
                raise PermissionError("files of the blob cache cannot be removed")
            in_vain = 0 if change.freed else in_vain + 1
            time.sleep(PAUSE)
