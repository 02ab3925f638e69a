"""Processes share a cache, die, lose its index: the bound holds and the next opening is right."""

from contextlib import closing
from contextlib import ExitStack
from functools import partial
import os
from pathlib import Path
import random
import shutil
import signal
import sqlite3
import sys
import traceback
from types import SimpleNamespace

import pytest

from zodb_s3blobs.cache import S3BlobCache

from .caches import committed_size
from .caches import DIRECTORIES
from .caches import filler_processes
from .caches import FillerProcess
from .caches import Observer
from .caches import oid_of
from .caches import PATIENCE
from .caches import put
from .caches import TID
from .hammer import hammer
from .hammer import PROCESSES
from .hammer import THREADS
from .test_cache import assert_sound
from .test_cache import DAMAGES
from .test_cache import remove_index


# Bytes; there is no index yet whose size would matter beside it.
BUDGET = 100_000
# No filler has these numbers.
OURS, BY_HAND = 0, 1000


@pytest.fixture
def directory(tmp_path):
    """Where the cache of this test is, once somebody has opened it."""
    return str(tmp_path / "cache")


def fill(cache, numbers, size=BUDGET // 10):
    """Put files of our own."""
    for number in numbers:
        put(cache, oid_of(OURS, number), size)


def assert_right_after_a_crash(cache):
    """All files are counted, at most something is counted that is no longer there."""
    findings = cache.check()
    assert [text for text in findings if not text.endswith("its file is missing")] == []
    assert committed_size(cache.cache_dir) <= cache.current_size() <= cache.max_size


def assert_alone(cache):
    """No other process has a directory for temporary files: none is alive."""
    names = [path.name for path in Path(cache.cache_dir, "process").glob("*")]
    assert [name for name in names if not name.startswith(f"{os.getpid()}-")] == []


# Processes that come and go

ENDS = ["close", "exit", "vanish"]


def test_forty_processes_that_fill_in_turn_keep_the_bound(directory):
    """However each of them ends: closed, without closing, or at once."""
    with Observer(directory) as observer:
        for number in range(1, 41):
            with FillerProcess(directory, BUDGET, number) as process:
                process.begin("open", f"fill {10 + number % 11}", ENDS[number % len(ENDS)])
                process.end()
    assert BUDGET / 2 < observer.largest <= BUDGET
    cache = S3BlobCache(directory, BUDGET)
    assert_sound(cache)
    assert_alone(cache)
    assert cache.current_size() > BUDGET / 2


def test_eight_processes_that_fill_at_once_keep_the_bound(directory):
    """Each opens a cache that is not there yet, and closes and opens it again and again."""
    with Observer(directory) as observer, filler_processes(directory, BUDGET, 8) as processes:
        for number, process in enumerate(processes):
            process.begin("open", "fill 80 8", ENDS[number % len(ENDS)])
        for process in processes:
            process.end()
    assert BUDGET / 2 < observer.largest <= BUDGET
    cache = S3BlobCache(directory, BUDGET)
    assert_sound(cache)
    assert_alone(cache)
    assert cache.current_size() > BUDGET / 2


# Processes that are killed

KILLS = 30
# Bytes of a file that is renamed under the lock and removed after it
LARGE = 8 << 20


def test_processes_killed_at_any_moment_leave_a_cache_that_heals(directory):
    """Thirty times on one cache: each of them evicts with nearly every file that it puts."""
    chance = random.Random(7)
    with Observer(directory) as observer, ExitStack() as stack:
        # While one works the next one starts.
        coming = [stack.enter_context(FillerProcess(directory, BUDGET, 1))]
        for number in range(2, KILLS + 2):
            coming.append(stack.enter_context(FillerProcess(directory, BUDGET, number)))
            process = coming.pop(0)
            process.begin("open", "fill 100000 7")
            for _line in range(chance.randrange(2, 40)):
                process.line()
            process.kill()
            assert committed_size(directory) <= BUDGET
            cache = S3BlobCache(directory, BUDGET)
            assert_right_after_a_crash(cache)
            assert_alone(cache)
            fill(cache, range(number * 10, number * 10 + number % 10))
            assert committed_size(directory) <= BUDGET
            cache.close()
    assert BUDGET / 2 < observer.largest <= BUDGET
    cache = S3BlobCache(directory, BUDGET)
    fill(cache, range(1000, 1020))
    assert_sound(cache)


def test_processes_killed_beside_living_ones_do_not_hold_them_up(directory):
    """Whatever lock the killed one has, the others go on; the bound holds all the time."""
    chance = random.Random(8)
    with Observer(directory) as observer, filler_processes(directory, BUDGET, 10) as processes:
        living, mortal = processes[:2], processes[2:]
        for process in living:
            process.do("open")
            process.begin("fill_until_told")
        for process in mortal:
            process.begin("open", "fill 100000 7")
            for _line in range(chance.randrange(2, 40)):
                process.line()
            process.kill()
        for process in living:
            process.stop()
        for process in living:
            process.wait()
            process.do("fill 10")
            process.begin("close", "exit")
            process.end()
    assert BUDGET / 2 < observer.largest <= BUDGET
    cache = S3BlobCache(directory, BUDGET)
    assert_right_after_a_crash(cache)
    assert_alone(cache)


class Death:
    """A profile function: kills this process before the n-th call that may change something."""

    CALLS = (
        *(
            "chmod",
            "close",
            "connect",
            "execute",
            "executemany",
            "ftruncate",
            "fsync",
            "mkdir",
            "open",
        ),
        *("remove", "rename", "replace", "rmdir", "truncate", "unlink", "utime", "write"),
    )

    def __init__(self, step):
        self._left = step

    def __call__(self, frame, event, function):
        if event == "c_call" and function.__name__ in self.CALLS:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


def dies(prepare, step):
    """Call what prepare() returns, in a forked child that is killed at a step of that.

    Return whether it came so far.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(PATIENCE)
            function = prepare()
            sys.setprofile(Death(step))
            function()
            sys.setprofile(None)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_at_each_step(directory, arrange, prepare, budget=BUDGET):
    """Kill a process at one step after the other, on one full cache, and look each time."""
    step, comes_so_far = 0, True
    while comes_so_far:
        step += 1
        with closing(S3BlobCache(directory, BUDGET)) as cache:
            assert_right_after_a_crash(cache)
            assert_alone(cache)
            fill(cache, range(3))
            assert committed_size(directory) <= BUDGET
        arrange(cache)
        comes_so_far = dies(prepare, step)
        assert committed_size(directory) <= budget
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, range(1000, 1010))
        assert_sound(cache)
    assert step > 1


# What a process does that has it open


def evict(cache):
    """Put files, of which some take the room of several."""
    fill(cache, [100])
    fill(cache, [101], BUDGET // 3)


def evict_large(cache):
    """Put files for which large ones go."""
    cache.max_size = 2 * LARGE
    for size in (LARGE, LARGE + 1, LARGE - 1):
        put(cache, oid_of(OURS, 200), size, size.to_bytes(8, "big"))


def commit(cache):
    """Reserve room under a name that is not the tid, and use it; give some of it back."""
    reserved, entries = b"reserved", []
    for number in (300, 301):
        path = cache.temporary_file()
        Path(path).write_bytes(b"x" * (BUDGET // 5))
        entries.append((oid_of(OURS, number), TID, path, reserved))
    cache.reserve([(oid, reserved, BUDGET // 5) for oid, _tid, _path, reserved in entries])
    cache.put_many(entries[1:])
    cache.release([(entries[0][0], reserved)])


def discard(cache):
    """Remove files, and directories with them."""
    for number in range(3):
        cache.discard(oid_of(OURS, number), TID)


def close(cache):
    """Close it, as the last one who has it open."""
    cache.close()


@pytest.mark.parametrize("change", [evict, evict_large, commit, discard, close])
def test_process_killed_at_any_step_of_a_change_leaves_a_cache_that_heals(directory, change):
    """At each call of the system or of SQLite."""
    budget = 2 * LARGE if change is evict_large else BUDGET

    def prepare():
        return partial(change, S3BlobCache(directory, BUDGET))

    kill_at_each_step(directory, leave_alone, prepare, budget)


# What it finds when it opens it


def leave_alone(cache):
    """Everything is as it was."""


def remove_all(cache):
    """There is no cache yet."""
    shutil.rmtree(cache.cache_dir)


def change_by_hand(cache):
    """Some files are gone, others have come."""
    for path in list(Path(cache.cache_dir).glob("00*/*.blob"))[:2]:
        path.unlink()
    write_by_hand(cache, 1, BUDGET // 2)
    write_by_hand(cache, 2, BUDGET // 3)


@pytest.mark.parametrize("arrange", [leave_alone, remove_all, remove_index, change_by_hand])
def test_process_killed_at_any_step_of_an_opening_leaves_a_cache_that_heals(directory, arrange):
    """The index is made anew, what came by hand is counted, what exceeds a budget is evicted."""
    budget = 2 * BUDGET if arrange is change_by_hand else BUDGET

    def prepare():
        return partial(S3BlobCache, directory, BUDGET // 2)

    kill_at_each_step(directory, arrange, prepare, budget)


# Processes that lose their index


def scribble(cache):
    """Other bytes in the file that the others have open."""
    with open(f"{cache.cache_dir}/index.sqlite", "r+b") as file:
        file.write(b"\x5a" * os.path.getsize(file.name))


LOSSES = [*DAMAGES, scribble]


@pytest.mark.parametrize("lose", LOSSES)
def test_index_lost_under_idle_processes_is_made_anew_by_their_next_changes(directory, lose):
    """The bound holds all the time: who is not changing anything cannot exceed it."""
    with Observer(directory) as observer, filler_processes(directory, BUDGET, 3) as processes:
        for process in processes:
            process.do("open", "fill 20")
        lose(SimpleNamespace(cache_dir=directory))
        for process in processes:
            process.do("fill 1")
        assert_going_on(processes)
    assert BUDGET / 2 < observer.largest <= BUDGET
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        assert_sound(cache)
        assert cache.current_size() > BUDGET / 2


def test_index_lost_under_idle_processes_that_all_go_on_at_once_is_made_anew_once(directory):
    """All of them find the damage, one of them repairs it; the bound holds all the time."""
    with Observer(directory) as observer, filler_processes(directory, BUDGET, 6) as processes:
        for process in processes:
            process.do("open", "fill 20")
        for lose in LOSSES * 2:
            lose(SimpleNamespace(cache_dir=directory))
            for process in processes:
                process.begin("fill 12 9")
            for process in processes:
                process.wait()
        assert_going_on(processes)
    assert BUDGET / 2 < observer.largest <= BUDGET
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        assert_sound(cache)
        assert cache.current_size() > BUDGET / 2


@pytest.mark.parametrize("suffixes", [("", "-journal"), ("-journal", "")])
def test_index_removed_file_by_file_while_processes_go_on_is_made_anew(directory, suffixes):
    """As rm does it, which others may come between: with each next change the bound holds again."""
    with filler_processes(directory, BUDGET, 3) as processes:
        for process in processes:
            process.do("open", "fill 20")
        for number, suffix in enumerate(suffixes):
            Path(f"{directory}/index.sqlite{suffix}").unlink(missing_ok=True)
            processes[number].do("fill 1")
        for process in processes:
            process.do("fill 1")
        assert committed_size(directory) <= BUDGET
        with Observer(directory) as observer:
            assert_going_on(processes)
        assert BUDGET / 2 < observer.largest <= BUDGET
    assert_right(directory)


def test_index_lost_again_and_again_under_busy_processes_is_made_anew(directory):
    """Nobody ends, and the bound holds at the latest when each process has made its next change."""
    chance = random.Random(9)
    with filler_processes(directory, BUDGET, 4) as processes:
        for process in processes:
            process.do("open", "fill 20")
        for lose in LOSSES * 3:
            for process in processes:
                process.begin("fill 20 15")
            for _line in range(chance.randrange(20)):
                processes[0].line()
            # It may be being made anew just now.
            try:
                lose(SimpleNamespace(cache_dir=directory))
            except (FileNotFoundError, sqlite3.Error):
                pass
            for process in processes:
                process.wait()
            for process in processes:
                process.do("fill 1")
            assert committed_size(directory) <= BUDGET, lose
        with Observer(directory) as observer:
            assert_going_on(processes)
        assert BUDGET / 2 < observer.largest <= BUDGET
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        assert_sound(cache)
        assert cache.current_size() > BUDGET / 2


def assert_going_on(processes):
    """All of them cache again what they put, while they do so at once; then they close it."""
    before = [process.beside for process in processes]
    for process in processes:
        process.begin("fill 40", "close")
    for process in processes:
        process.wait()
    assert [process.beside for process in processes] == before


# Files that come and go by hand


def write_by_hand(cache, number, size):
    """Put a file as an operator's script does, or a backup that is played back."""
    path = cache.path(oid_of(BY_HAND, number), TID)
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)
    return path


def assert_right(directory, size=None):
    """The next opening counts what is there, which has this size, and evicts what is too much."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        assert_sound(cache)
        assert size is None or cache.current_size() == size


@pytest.mark.parametrize("attempt", range(5))
@pytest.mark.parametrize("is_new", [False, True])
def test_file_added_by_hand_right_after_closing_is_counted(directory, is_new, attempt):
    """In a directory that was changed a moment ago, or in one that was not there."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, range(6 if is_new else DIRECTORIES), 10)
    path = write_by_hand(cache, 7, 1000)
    assert len(os.listdir(os.path.dirname(path))) == (1 if is_new else 2)
    assert_right(directory, 1060 if is_new else 1080)


def test_files_added_by_hand_are_evicted_where_they_are_too_many(directory):
    """The bound holds after the opening, whoever has put the files there."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, range(10))
    for number in range(2 * DIRECTORIES):
        write_by_hand(cache, number, BUDGET // 7)
    assert committed_size(directory) > BUDGET
    assert_right(directory)
    assert committed_size(directory) > BUDGET / 2


def test_file_added_by_hand_that_is_larger_than_the_budget_goes(directory):
    """It would leave no room for any other."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, range(3))
    path = write_by_hand(cache, 1, BUDGET + 1)
    assert_right(directory)
    assert not os.path.exists(path)


def test_file_added_by_hand_beside_an_open_cache_is_counted_at_the_next_opening(directory):
    """Also where the cache has changed the same directory since, and others later."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, [1])
        path = write_by_hand(cache, 1, 2 * BUDGET)
        fill(cache, [1 + DIRECTORIES])
        # What was changed just before the last change of all is read anyway: a clock ticks.
        since, later = modified(path), cache.path(oid_of(OURS, 2), TID)
        fill(cache, [2])
        while modified(later) < since + 50_000_000:
            fill(cache, [2])
    assert_right(directory)
    assert not os.path.exists(path)


def modified(path):
    """Return when the directory of a file was changed, in nanoseconds."""
    return os.stat(os.path.dirname(path)).st_mtime_ns


def test_files_removed_by_hand_are_no_longer_counted(directory):
    """Some of a directory, all of one, and none of others."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, range(4 * DIRECTORIES), 100)
    for number in (0, 1, 1 + DIRECTORIES, 1 + 2 * DIRECTORIES, 1 + 3 * DIRECTORIES):
        os.remove(cache.path(oid_of(OURS, number), TID))
    assert_right(directory, 100 * (4 * DIRECTORIES - 5))


@pytest.mark.parametrize("count", [1, 3, DIRECTORIES])
def test_directories_removed_by_hand_are_no_longer_counted(directory, count):
    """One, some, or all of them."""
    with closing(S3BlobCache(directory, BUDGET)) as cache:
        fill(cache, range(2 * DIRECTORIES), 100)
    for number in range(count):
        shutil.rmtree(os.path.dirname(cache.path(oid_of(OURS, number), TID)))
    assert_right(directory, 200 * (DIRECTORIES - count))


def test_whatever_is_done_by_hand_between_two_openings_is_counted(directory):
    """Files added, removed, renamed; directories removed, emptied and filled again: at random."""
    chance = random.Random(10)
    for turn in range(60):
        with closing(S3BlobCache(directory, BUDGET)) as cache:
            assert_sound(cache)
            fill(
                cache, [turn * 100 + n for n in range(chance.randrange(4))], chance.randrange(9000)
            )
        for number in range(chance.randrange(5)):
            there = sorted(Path(directory).glob("00*/*.blob"))
            action = chance.choice(["add", "remove", "remove directory", "rename"])
            if action == "add" or not there:
                write_by_hand(cache, turn * 100 + number, chance.randrange(30_000))
            elif action == "remove":
                chance.choice(there).unlink()
            elif action == "remove directory":
                shutil.rmtree(chance.choice(there).parent)
            else:
                new = write_by_hand(cache, turn * 100 + number, 0)
                os.replace(chance.choice(there), new)
    assert_right(directory)


# Readers


def test_readers_that_evict_each_other_s_blobs_get_the_right_bytes(s3, tmp_path):
    """In every mode of opening, by two processes of eight threads; no blob is emptied by that."""
    report = hammer(s3, tmp_path, openings=200)
    assert report.errors == []
    assert report.opened.total() == PROCESSES * THREADS * 200
    assert len(report.opened) == 9
    assert report.evictions > 1000
    assert report.budget / 2 < report.largest <= report.budget
