"""Brings the index of a cache into line with the files, where that is needed and nowhere else.

The index knows when each of the 4096 directories was changed last by us. A
directory that tells another time holds what the index does not know: files
that somebody has put there or removed, that a killed process has left, that
were there before the index. Those directories are read, and no others.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
import logging
import os
import time

from .cachefiles import CacheFiles
from .cacheindex import CacheIndex
from .cacheindex import IndexRows
from .directories import private


logger = logging.getLogger(__name__)

# Files, and directories, that are read before other processes have their turn.
FILES = 2000
DIRECTORIES = 16
# Seconds in which others have it: more than they wait between two looks
PAUSE = 0.005
# Directories in a range of names that is compared at once
STRIDE = 32
# Nanoseconds. The clock of a file system ticks: what happens between two ticks happens at one time.
TICK = 10_000_000
# Seconds after which nobody comes with a file for which there was room
RESERVED = 3600
# Nanoseconds after which the kernel has certainly written to disk what it was told to.
WRITTEN_BACK = 600 * 1_000_000_000


class Survey:
    """Compares files and rows, a few directories at a time."""

    def __init__(self, files: CacheFiles, index: CacheIndex, clock: Callable[[], float]) -> None:
        self._files = files
        self._index = index
        self._clock = clock
        # What a directory holds that was changed since, in nanoseconds, may lack bytes.
        self._doubtful_since: int | None = None
        # Until then nobody knows that.
        self._is_begun = False

    @property
    def is_sure(self) -> bool:
        """Whether all files are whole; not if the last run has failed after a boot."""
        return self._is_begun and self._doubtful_since is None

    def run(self) -> None:
        """Make rows and files agree, as at the opening: it costs a look at each directory."""
        boot, last_boot = _boot(), self._last_boot()
        if last_boot != boot and not (last_boot is None and self._is_new()):
            self._doubtful_since = _last_change_before_boot(self._files) - WRITTEN_BACK
        self._is_begun = True
        if self._doubtful_since is not None:
            self._index.verify()
            with self._index.writing() as rows:
                rows.total = rows.sum()
        self.complete()
        if findings := self._compare_changed():
            logger.warning("cache mended findings=%d first=%s", len(findings), findings[0])
        self._doubtful_since = None
        if last_boot != boot:
            self._remember(boot)

    def _is_new(self) -> bool:
        if not self._files.directories():
            return True
        # An index that is complete has written the marker.
        with self._index.writing() as rows:
            return not rows.is_complete

    def complete(self) -> None:
        """Learn of all files, as after the index was lost.

        :raises OSError: when nobody can tell which of them may be short.
        """
        with self._index.writing() as rows:
            is_complete = rows.is_complete
        if not is_complete and not self._is_begun:
            raise OSError(f"{self._marker} cannot be read")
        # Until then nobody adds or evicts.
        if not is_complete and (count := self._files.take_over()):
            logger.info("files of an older package taken over count=%d", count)
        while not is_complete:
            with self._index.writing() as rows:
                is_complete = self.some(rows)
            time.sleep(PAUSE)

    def some(self, rows: IndexRows) -> bool:
        """Learn of some of the files that the index does not know; return whether those are all."""
        if rows.is_complete or not self._is_begun:
            return rows.is_complete
        known, seen = rows.directories(), 0
        unknown = sorted(self._files.directories().keys() - known.keys())
        if unknown and not known:
            logger.warning("cache index is made anew path=%s", self._files.cache_dir)
        for directory in unknown:
            if seen >= FILES:
                return False
            try:
                found = self._files.listing(directory)
            except OSError as error:
                # Not noted, so that the next opening tries again.
                logger.warning("cache directory cannot be read: %s", error)
                continue
            seen += len(found)
            if self._is_doubtful(self._files.modified(directory)):
                for name in found:
                    self._files.remove(name)
                found = {}
            rows.add([(name, size, used) for name, (size, used) in found.items()])
            rows.note({directory: self._files.modified(directory)})
        if self._last_boot() is None:
            self._remember(_boot())  # as long as there are files
        rows.is_complete = True
        return True

    def check(self, fix: bool, max_size: int) -> list[str]:
        """Compare all files and rows; return one sentence for each difference."""
        findings: list[str] = []
        with self._index.writing() as rows:
            size = rows.sum()
            if size != rows.total:
                findings.append(f"the index counts {rows.total} bytes, its files have {size}")
                if fix:
                    rows.total = size
        present = sorted(self._files.directories())
        for start in range(0, 0x1000, STRIDE):
            low, end = f"{start:03x}/", start + STRIDE
            high = f"{end:03x}/" if end < 0x1000 else "g"
            directories = [name for name in present if low <= f"{name}/" < high]
            with self._index.writing() as rows:
                size += self._compare(rows, low, high, directories, findings, fix)
            if directories:
                time.sleep(PAUSE)
        if size > max_size:
            findings.append(f"the files exceed the budget of {max_size} bytes")
        return findings

    def _compare_changed(self) -> list[str]:
        findings: list[str] = []
        present = self._files.directories()
        with self._index.writing() as rows:
            known = rows.directories()
        newest = max(present.values(), default=0)
        changed = [
            name
            for name in sorted(present.keys() | known.keys())
            if present.get(name) != known.get(name)
            or present[name] > newest - TICK
            or self._is_doubtful(present[name])
        ]
        for start in range(0, len(changed), DIRECTORIES):
            with self._index.writing() as rows:
                for name in changed[start : start + DIRECTORIES]:
                    self._compare(rows, f"{name}/", f"{name}0", [name], findings, fix=True)
            time.sleep(PAUSE)
        return findings

    def _compare(
        self,
        rows: IndexRows,
        low: str,
        high: str,
        directories: Iterable[str],
        findings: list[str],
        fix: bool,
    ) -> int:
        """Add a sentence for each difference; return by how many bytes files exceed the rows."""
        known, found = rows.between(low, high), {}
        read: list[str] = []
        doubtful: set[str] = set()
        for directory in directories:
            try:
                listing = self._files.listing(directory)
            except OSError as error:
                findings.append(f"the directory {directory} cannot be read: {error}")
                known = {name: size for name, size in known.items() if name[:3] != directory}
                continue
            read.append(directory)
            found.update(listing)
            if self._is_doubtful(self._files.modified(directory)):
                doubtful.update(listing)
        for name, since in rows.reserved(low, high).items():
            if name not in found and self._clock() - since < RESERVED:
                known.pop(name, None)
        for name, sentence in _differences(known, found):
            findings.append(sentence)
            if fix:
                self._mend(rows, name, found.get(name), name in known or name in doubtful)
        if fix:
            rows.note({name: self._files.modified(name) for name in read})
        return sum(size for size, _used in found.values()) - sum(known.values())

    def _mend(
        self, rows: IndexRows, name: str, file: tuple[int, float] | None, is_wrong: bool
    ) -> None:
        if file is None:
            rows.remove(name)
        elif is_wrong:
            self._files.remove(name)
            rows.remove(name)
        else:
            rows.put(name, *file, is_placed=True)

    # After a boot

    # Nothing else here is written with fsync: a power failure leaves files short, or the index
    # damaged.

    @property
    def _marker(self) -> str:
        return os.path.join(self._files.cache_dir, "boot")

    def _last_boot(self) -> str | None:
        try:
            with open(self._marker, errors="replace") as file:
                return file.read().strip()
        except FileNotFoundError:
            return None

    def _remember(self, boot: str) -> None:
        new = f"{self._marker}.{os.getpid()}"
        with open(new, "w", opener=private) as file:
            file.write(boot)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._marker)

    def _is_doubtful(self, modified: int | None) -> bool:
        since = self._doubtful_since
        return since is not None and modified is not None and modified >= since


def _boot() -> str:
    """Return what differs after a boot; the same always where that cannot be told."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return "not Linux"


def _last_change_before_boot(files: CacheFiles) -> int:
    """Return the time of the last change that a power failure may have made incomplete; 0 where no
    directory tells it.
    """
    booted = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return max((when for when in files.directories().values() if when < booted), default=0)


def _differences(
    known: dict[str, int], found: dict[str, tuple[int, float]]
) -> Iterator[tuple[str, str]]:
    """Yield a name and a sentence for each row without a file, file without a row, wrong size."""
    for name in sorted(known.keys() - found.keys()):
        yield name, f"{name} is in the index, its file is missing"
    for name, (size, _used) in sorted(found.items()):
        if name not in known:
            yield name, f"{name} is not in the index"
        elif known[name] != size:
            yield name, f"{name} has {size} bytes, the index says {known[name]}"
