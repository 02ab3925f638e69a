"""A cache that two processes use, and somebody damages: the bound holds, no file is a wrong one.

A state machine does at random what processes do with one directory, and knows which files must be
there: so it also knows the order in which they go. For a long run see test_commit_machine.py; two
instances in one process are to each other what instances in two are.
"""

from contextlib import contextmanager
from contextlib import suppress
import gc
import os
from pathlib import Path
import shutil
import sqlite3
import sys
import tempfile
from unittest import mock

from hypothesis import strategies as st
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import RuleBasedStateMachine
import pytest

from zodb_s3blobs import cache as cache_module
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import TransientS3Error

from .caches import committed
from .caches import committed_size
from .caches import oid_of
from .caches import TID
from .conftest import fast_directory
from .test_cache import Clock
from .test_cache import DAMAGES
from .test_cache import remove_index
from .test_commit_machine import case_of
from .test_commit_machine import close_files_below


# Of all files there are, by their numbers; in bytes. The last is larger than any budget.
SIZES = [0, 1, 7, 10, 15, 20, 30, 30, 45, 60, 90, 120]
BUDGETS = st.sampled_from([100, 60, 40])
NUMBERS = st.integers(0, len(SIZES) - 1)
SEVERAL = st.lists(NUMBERS, min_size=1, max_size=4, unique=True)
# Which of the instances
ONE = st.integers(0, 1)
# Names under which room is reserved before the tid is known
STAMPS = 1000
HOUR = 3600


def contents(number):
    return bytes([number]) * SIZES[number]


class Row:
    """A file that is there, or about to come.

    :ivar used: when it was, for the last time
    """

    def __init__(self, size, used, is_there):
        self.size = size
        self.used = used
        self.is_there = is_there


class CacheMachine(RuleBasedStateMachine):
    """Two instances of one directory.

    Names are numbers: those of the files, and from `STAMPS` on what stands for a file's name before
    that is known. While `is_unsure` the index and the directory may differ, or the index may be
    damaged: then it is not known what goes next, and the cache may take nothing.
    """

    def __init__(self):
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="machine-", dir=fast_directory())
        self.clock = Clock()
        self.patches = [
            mock.patch("os.replace", self.replace),
            # Otherwise a full disk costs more than there ever is.
            mock.patch.object(cache_module, "SHED_BYTES", 1),
        ]
        self.os_replace = os.replace
        for patch in self.patches:
            patch.start()
        self.caches = [None, None]
        self.rows = {}
        self.is_unsure = False
        #: (number, name under which room is reserved) of each instance
        self.pending = [[], []]
        #: paths by number of what an instance keeps beside the cache
        self.beside = [{}, {}]
        #: what instances that were killed have left
        self.left = set()
        self.stamps = STAMPS

    @property
    def path(self):
        return f"{self.directory}/cache"

    @initialize(budgets=st.tuples(BUDGETS, BUDGETS))
    def open_both(self, budgets):
        for which, budget in enumerate(budgets):
            self.open(which, budget)

    def open(self, which, budget):
        self.now()
        self.caches[which] = S3BlobCache(self.path, budget, clock=self.clock)
        self.evict(self.total() - budget)
        self.left.clear()

    def teardown(self):
        try:
            if sys.exc_info()[0] is None and all(self.caches):
                self.end_well()
        finally:
            for patch in self.patches:
                patch.stop()
            for cache in filter(None, self.caches):
                cache.close()
            self.caches.clear()
            gc.collect()
            close_files_below(self.directory)
            shutil.rmtree(self.directory)

    def end_well(self):
        """What was damaged mends; nothing is left over, and everything can be cached again."""
        self.mend(0)
        for number, size in enumerate(SIZES):
            if size <= self.caches[0].max_size:
                self.put(0, number)
        self.agree()

    # The model

    def now(self):
        """Return a time that is later than all before."""
        self.clock.time += 1
        return self.clock.time

    def total(self):
        return sum(row.size for row in self.rows.values())

    def next_to_go(self):
        rows = self.rows.items()
        return min(rows, key=lambda item: (item[1].used, item[1].size, name_of(item[0])))[0]

    def evict(self, byte_count):
        """Evict files until so many bytes are free; return how many of them were of files."""
        removed = 0
        while byte_count > 0 and self.rows:
            row = self.rows.pop(self.next_to_go())
            byte_count -= row.size
            removed += row.size if row.is_there else 0
        return removed

    def make_room(self, budget, files):
        """Reserve room for (name, size) in their order, or for one after the other."""
        files = [(name, size) for name, size in files if size <= budget]
        is_too_much = sum(size for _name, size in files) > budget
        groups = [[file] for file in files] if is_too_much else [files]
        for group in filter(None, groups):
            coming = sum(size for _name, size in group)
            names = [name for name, _size in group]
            while self.total_without(names) + coming > budget:
                del self.rows[self.next_to_go()]
            for name, size in group:
                is_there = name in self.rows and self.rows[name].is_there
                self.rows[name] = Row(size, self.clock.time, is_there)

    def total_without(self, names):
        return sum(row.size for name, row in self.rows.items() if name not in names)

    def place(self, name, used):
        row = self.rows[name]
        self.rows[name] = Row(row.size, max(used, row.used), True)

    # Files

    def replace(self, source, target, **kw):
        """Stand for ``os.replace``, by which files come: the bound holds at that very moment."""
        self.os_replace(source, target, **kw)
        assert committed_size(self.path) <= self.bound()

    def bound(self):
        return max([cache.max_size for cache in self.caches if cache], default=0)

    def source(self, which, number, used):
        """Return a new temporary file with the bytes of a number."""
        path = self.caches[which].temporary_file()
        self.write(path, number, used)
        return path

    def write(self, path, number, used):
        with open(path, "wb") as file:
            file.write(contents(number))
        os.utime(path, (used, used))

    def check_path(self, which, number, path):
        """A path that was given out has the right bytes; note whether it is beside the cache."""
        assert Path(path).read_bytes() == contents(number)
        if path != self.caches[which].path(*revision(number)):
            self.beside[which][number] = path

    @contextmanager
    def trouble_is_known(self):
        """Errors are those of a cache that is damaged."""
        try:
            yield
        except OSError:
            assert self.is_unsure

    # What always holds

    @invariant()
    def all_is_well(self):
        found = committed(self.path)
        assert sum(size for size, *_rest in found.values()) <= self.bound()
        for name in found:
            number = int.from_bytes(bytes.fromhex(name[:16]), "big") >> 12 & 0xFFFFFF
            path = f"{self.path}/{name[13:16]}/{name}"
            assert Path(path).read_bytes() == contents(number)
        kept = {path for paths in self.beside for path in paths.values()}
        temporary = {str(path) for path in Path(self.path).rglob("*.tmp")}
        assert kept <= temporary <= kept | self.left
        if not self.is_unsure:
            there = {name_of(name) for name, row in self.rows.items() if row.is_there}
            assert {name.removesuffix(".blob") for name in found} == there
            for cache in self.caches:
                assert cache.current_size() == self.total()

    # Rules: writing

    @rule(which=ONE, number=NUMBERS)
    def put(self, which, number):
        cache, used = self.caches[which], self.now()
        path = cache.put(*revision(number), self.source(which, number, used))
        self.check_path(which, number, path)
        fits = SIZES[number] <= cache.max_size
        self.note_put(which, number, path, used, fits)

    def note_put(self, which, number, path, used, fits):
        is_cached = path == self.caches[which].path(*revision(number))
        assert is_cached == fits or (self.is_unsure and not is_cached)
        if fits and not self.is_unsure:
            self.make_room(self.caches[which].max_size, [(number, SIZES[number])])
            self.place(number, used)

    @rule(which=ONE, numbers=SEVERAL)
    def put_all(self, which, numbers):
        cache, begun = self.caches[which], self.now()
        entries, times = [], {}
        for count, number in enumerate(numbers):
            times[number] = begun + count / 10
            entries.append((*revision(number), self.source(which, number, times[number])))
        paths = cache.put_all(entries)
        self.make_room(cache.max_size, [(number, SIZES[number]) for number in numbers])
        for number, path, (_oid, _tid, source) in zip(numbers, paths, entries, strict=True):
            assert self.is_unsure or (path is not None) == (number in self.rows)
            if path is None:
                os.remove(source)
                continue
            assert path == cache.path(*revision(number))
            self.check_path(which, number, path)
            if number in self.rows:
                self.place(number, times[number])

    @rule(which=ONE, numbers=SEVERAL, knows_tids=st.booleans())
    def reserve(self, which, numbers, knows_tids):
        """As the vote of a transaction."""
        cache, files = self.caches[which], []
        self.now()
        for number in numbers:
            self.stamps += 1
            files.append((number, number if knows_tids else self.stamps))
        if knows_tids and any(name in self.names_pending() for _number, name in files):
            return  # a tid is one transaction's
        entries = [(*revision(number, name), SIZES[number]) for number, name in files]
        with self.trouble_is_known():
            cache.reserve(entries)
        self.make_room(cache.max_size, [(name, SIZES[number]) for number, name in files])
        self.pending[which] += files

    def names_pending(self):
        return {name for pending in self.pending for _number, name in pending}

    @precondition(lambda self: any(self.pending))
    @rule(which=ONE)
    def put_many(self, which):
        """As the finish of a transaction."""
        which = which if self.pending[which] else 1 - which
        pending, self.pending[which] = self.pending[which], []
        numbers = [number for number, _name in pending]
        if len(set(numbers)) < len(numbers):
            return self.give_back(which, pending)
        used, entries = self.now(), []
        for number, name in pending:
            source = self.source(which, number, used)
            entries.append((*revision(number), source, revision(number, name)[1]))
        with self.trouble_is_known():
            self.caches[which].put_many(entries)
        for _oid, _tid, source, _name in entries:
            with suppress(FileNotFoundError):
                os.remove(source)
                assert self.is_unsure
        lost = set()
        for number, name in pending:
            if name not in self.rows:
                lost.add(number)
            elif name != number:
                self.rows[number] = self.rows.pop(name)
        for number, _name in pending:
            if number in self.rows and number not in lost:
                self.place(number, used)

    @precondition(lambda self: any(self.pending))
    @rule(which=ONE)
    def release(self, which):
        """As the abort of a transaction."""
        which = which if self.pending[which] else 1 - which
        pending, self.pending[which] = self.pending[which], []
        self.give_back(which, pending)

    def give_back(self, which, pending):
        with self.trouble_is_known():
            self.caches[which].release([revision(number, name) for number, name in pending])
        for _number, name in pending:
            if name in self.rows and not self.rows[name].is_there:
                del self.rows[name]

    @rule(which=ONE, number=NUMBERS, outcome=st.sampled_from(["fetched", "failed", "by hand"]))
    def fill(self, which, number, outcome):
        """As a read."""
        cache, used, asked = self.caches[which], self.now(), []
        was_there = cache.get(*revision(number)) is not None

        def fetch(path):
            asked.append(path)
            self.write(path, number, used)
            if outcome == "failed":
                raise TransientS3Error("says the test")

        if outcome == "by hand":
            if was_there:
                return self.touch(which, number)
            path, end = cache.begin_filling(*revision(number))
            fetch(path)
            path = cache.put(*revision(number), path)
            end()
        elif outcome == "failed" and not was_there:
            with pytest.raises(TransientS3Error):
                cache.fill(*revision(number), fetch)
            return None
        else:
            path = cache.fill(*revision(number), fetch)
            assert bool(asked) == (not was_there)
        self.check_path(which, number, path)
        if was_there:
            return self.touch(which, number)
        return self.note_put(which, number, path, used, SIZES[number] <= cache.max_size)

    def touch(self, which, number):
        """Set the time of a file that was used just now to that of the model."""
        path = self.caches[which].path(*revision(number))
        if os.path.exists(path):
            os.utime(path, (self.clock.time, self.clock.time))
            if number in self.rows:
                self.rows[number].used = self.clock.time

    # Rules: reading

    @rule(which=ONE, number=NUMBERS)
    def get(self, which, number):
        self.now()
        path = self.caches[which].get(*revision(number))
        is_there = number in self.rows and self.rows[number].is_there
        if not self.is_unsure:
            assert (path is not None) == (is_there or number in self.beside[which])
        if path is None:
            assert self.caches[which].size(*revision(number)) is None
        else:
            self.check_path(which, number, path)
            assert self.caches[which].size(*revision(number)) == SIZES[number]
            self.touch(which, number)

    # Rules: removing

    @rule(which=ONE, number=NUMBERS)
    def discard(self, which, number):
        """As a sweep."""
        self.caches[which].discard(*revision(number))
        if number in self.rows and self.rows[number].is_there:
            del self.rows[number]

    @rule(which=ONE, byte_count=st.sampled_from([1, 20, 50, 1000]))
    def shed(self, which, byte_count):
        """As when the disk is full: files go, in the same order."""
        has_removed = self.caches[which].shed(byte_count)
        removed = 0
        while removed < byte_count and (more := self.evict(byte_count - removed)):
            removed += more
        assert self.is_unsure or has_removed == (removed > 0)

    @rule(which=ONE)
    def notify_loaded(self, which):
        """As after the budget was lowered."""
        with self.trouble_is_known():
            self.caches[which].notify_loaded(0)
        self.evict(self.total() - self.caches[which].max_size)

    # Rules: opening, and trouble

    @rule(which=ONE, budget=BUDGETS, is_killed=st.booleans())
    def reopen(self, which, budget, is_killed):
        """Where nothing is damaged, both agree from then on."""
        if is_killed:
            # Others believe that the files come, until their turn to go.
            self.left |= set(self.beside[which].values())
        else:
            self.caches[which].close()
            self.release_all(which)
        self.pending[which].clear()
        self.beside[which].clear()
        self.caches[which] = None
        gc.collect()
        self.open(which, budget)

    def release_all(self, which):
        if self.pending[which]:
            self.release(which)

    @rule(which=ONE)
    def check(self, which):
        """It finds that there are too many files for this instance, or nothing."""
        findings = self.caches[which].check()
        if not self.is_unsure:
            assert len(findings) == (self.total() > self.caches[which].max_size)

    @rule(which=ONE)
    def mend(self, which):
        """After that there is nothing to be found.

        Whoever has what was damaged in memory does not see it: all must be asked.
        """
        self.now()
        cache = self.caches[which]
        for each in [cache, *self.caches] if self.is_unsure else [cache]:
            each.check(fix=True)
        if self.is_unsure:
            for other in (0, 1):
                self.release_all(other)
            self.rows = {
                number: Row(SIZES[number], os.stat(path).st_mtime, True)
                for number in range(len(SIZES))
                if os.path.exists(path := cache.path(*revision(number)))
            }
            self.is_unsure = False
        self.evict(self.total() - cache.max_size)
        self.agree()

    def agree(self):
        for cache in self.caches:
            assert len(cache.check()) == (self.total() > cache.max_size)

    @rule(which=ONE)
    def wait_an_hour(self, which):
        """Nobody comes any more for whom there was room."""
        self.clock.time += HOUR
        self.mend(which)
        self.rows = {name: row for name, row in self.rows.items() if row.is_there}

    @rule()
    def lose_index(self):
        """Everybody goes on; only room for what was to come is lost."""
        remove_index(self.caches[0])
        self.rows = {name: row for name, row in self.rows.items() if row.is_there}

    @rule(damage=st.sampled_from(DAMAGES))
    def damage_index(self, damage):
        # It may be damaged already.
        with suppress(FileNotFoundError, sqlite3.Error):
            damage(self.caches[0])
        self.is_unsure = True

    @rule(number=NUMBERS)
    def remove_by_hand(self, number):
        path = self.caches[0].path(*revision(number))
        if os.path.exists(path):
            os.remove(path)
            self.is_unsure = True


def revision(number, name=None):
    """Return (oid, tid) of a number, or (oid, what stands for the tid)."""
    is_stamp = name is not None and name >= STAMPS
    return oid_of(1, number), name.to_bytes(8, "big") if is_stamp else TID


def name_of(name):
    """Return the name of a file as it is on disk, without its suffix."""
    return f"{oid_of(1, name).hex()}.{TID.hex()}"


TestCacheMachine = case_of(CacheMachine, 6, 40)
