"""The cache never exceeds its budget, forgets the least recently used first, and heals itself."""

from contextlib import ExitStack
import os
from pathlib import Path
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time

import pytest
from zope.interface.verify import verifyObject

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import IS3BlobCache

from .faults import in_child


TID = (0x3E0F00D).to_bytes(8, "big")
COMMITTED = re.compile(r"[0-9a-f]{3}/[0-9a-f]{16}\.[0-9a-f]{16}\.blob")


def oid(number):
    """Return an oid."""
    return number.to_bytes(8, "big")


class Clock:
    """Tells the time that was set."""

    def __init__(self, time=1000.0):
        self.time = time

    def __call__(self):
        return self.time


@pytest.fixture
def open_cache(tmp_path):
    """Return a function that opens the cache of this test, again with each call."""
    with ExitStack() as stack:

        def open_cache(max_size=100, directory="cache", **options):
            cache = S3BlobCache(str(tmp_path / directory), max_size, **options)
            stack.callback(cache.close)
            return cache

        yield open_cache


def fill(cache, number, data=b"0123456789", tid=TID):
    """Put a blob."""
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.write(data)
    return cache.put(oid(number), tid, path)


def files(cache):
    """Return the committed files, a dict of path below the cache's directory to size."""
    found = {}
    for top, _dirs, names in os.walk(cache.cache_dir):
        for name in names:
            path = os.path.join(top, name)
            below = os.path.relpath(path, cache.cache_dir)
            if COMMITTED.fullmatch(below):
                try:
                    found[below] = os.stat(path).st_size
                except FileNotFoundError:
                    pass
    return found


def held(cache):
    """Return the numbers of the oids that have a file."""
    return sorted({int(name[4:20], 16) for name in files(cache)})


def temporaries(cache):
    """Return the names of the temporary files."""
    return [path.name for path in Path(cache.cache_dir).rglob("*.tmp")]


def assert_sound(cache):
    """Index and files agree, within the budget."""
    assert cache.check() == []
    assert cache.current_size() == sum(files(cache).values())
    assert cache.current_size() <= cache.max_size


# The contract


def test_cache_provides_its_interface(open_cache):
    """Fakes and the real thing have one contract."""
    verifyObject(IS3BlobCache, open_cache())


def test_default_budget_is_one_gigabyte(tmp_path):
    """As users of the older package know it."""
    cache = S3BlobCache(str(tmp_path / "cache"))
    assert cache.max_size == 1 << 30
    fill(cache, 1)
    assert_sound(cache)
    cache.close()


def test_put_file_is_got_at_its_path(open_cache):
    """The path is known before the file is there, and does not change."""
    cache = open_cache()
    assert cache.get(oid(0xABC123), TID) is None
    path = fill(cache, 0xABC123)
    assert path == cache.path(oid(0xABC123), TID) == cache.get(oid(0xABC123), TID)
    assert path == f"{cache.cache_dir}/123/0000000000abc123.0000000003e0f00d.blob"
    with open(path, "rb") as file:
        assert file.read() == b"0123456789"
    assert temporaries(cache) == []
    assert_sound(cache)


def test_other_revision_is_another_file(open_cache):
    """A reader of an old revision never sees a newer one."""
    cache = open_cache()
    fill(cache, 1, b"old")
    assert cache.get(oid(1), oid(9)) is None
    fill(cache, 1, b"newer", oid(9))
    assert sorted(files(cache).values()) == [3, 5]


def test_put_again_replaces_and_counts_once(open_cache):
    """Two fillers of one blob do no harm."""
    cache = open_cache()
    fill(cache, 1)
    fill(cache, 1)
    assert cache.current_size() == 10
    assert_sound(cache)


def test_empty_file_is_a_file(open_cache):
    """A blob without bytes is cached like any other."""
    cache = open_cache()
    path = fill(cache, 1, b"")
    assert cache.get(oid(1), TID) == path
    assert_sound(cache)


def test_put_takes_the_source_away_and_many_are_put_at_once(open_cache):
    """As a commit does it: reserve, then put all."""
    cache = open_cache()
    entries = []
    for number in range(3):
        path = cache.temporary_file()
        with open(path, "wb") as file:
            file.write(b"x" * 20)
        entries.append((oid(number), TID, path, TID))
    cache.reserve((entry[0], entry[1], 20) for entry in entries)
    assert held(cache) == []
    cache.put_many(entries)
    assert held(cache) == [0, 1, 2]
    assert temporaries(cache) == []
    assert_sound(cache)


def test_file_whose_room_was_lost_is_not_put(open_cache):
    """Others filled the cache between vote and finish: the bound holds, no staged file stays."""
    cache = open_cache()
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.write(b"x" * 50)
    cache.reserve([(oid(1), TID, 50)])
    for number in range(10, 20):
        fill(cache, number)
    cache.put_many([(oid(1), TID, path, TID)])
    assert held(cache) == list(range(10, 20))
    assert temporaries(cache) == []
    assert_sound(cache)


def staged(cache, number, name=TID, size=40):
    """Return what put_many wants for a file whose tid stood under a name until now."""
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.write(b"x" * size)
    return oid(number), TID, path, name


NAME = b"anything"


def test_room_reserved_under_another_name_is_used_under_the_tid(open_cache):
    """Some transactions learn their tid when they finish: what they reserved is theirs."""
    cache = open_cache()
    entries = [staged(cache, number, NAME) for number in (1, 2)]
    cache.reserve([(entry[0], NAME, 40) for entry in entries])
    assert cache.get(oid(1), NAME) is None
    cache.put_many(entries)
    assert cache.get(oid(1), NAME) is None
    assert cache.get(oid(1), TID) is not None
    assert cache.current_size() == 80
    assert temporaries(cache) == []
    assert_sound(cache)


def test_file_that_a_reader_was_faster_to_fetch_counts_once(open_cache):
    """The row under the tid is there when the one under the other name becomes it."""
    cache = open_cache()
    entry = staged(cache, 1, NAME)
    cache.reserve([(oid(1), NAME, 40)])
    fill(cache, 1, b"x" * 40)
    cache.put_many([entry])
    assert cache.current_size() == 40
    assert_sound(cache)


def test_room_under_another_name_that_was_lost_is_not_used(open_cache):
    """The file is deleted, and none that came under the tid meanwhile suffers."""
    cache = open_cache()
    entry = staged(cache, 1, NAME)
    cache.reserve([(oid(1), NAME, 40)])
    fill(cache, 1)
    for number in range(10, 19):
        fill(cache, number)
    cache.put_many([entry])
    assert held(cache) == [1, *range(10, 19)]
    assert temporaries(cache) == []
    assert_sound(cache)


def test_room_under_another_name_is_given_back(open_cache):
    """As after an abort; giving it back again does nothing."""
    cache = open_cache()
    cache.reserve([(oid(1), NAME, 40), (oid(2), NAME, 40)])
    assert cache.current_size() == 80
    for _ in range(2):
        cache.release([(oid(1), NAME), (oid(2), NAME)])
        assert cache.current_size() == 0
        assert_sound(cache)


@pytest.mark.parametrize("name", [TID, NAME])
def test_file_is_in_the_index_though_the_next_one_could_not_be_put(open_cache, name):
    """A file without a row would be beyond the budget."""
    cache = open_cache()
    entries = [staged(cache, number, name) for number in (1, 2)]
    cache.reserve([(entry[0], name, 40) for entry in entries])
    os.mkdir(os.path.dirname(cache.path(oid(2), TID)), 0o500)
    try:
        with pytest.raises(OSError):
            cache.put_many(entries)
    finally:
        os.chmod(os.path.dirname(cache.path(oid(2), TID)), 0o700)
    cache.release([(entry[0], TID) for entry in entries])
    assert cache.check() == []
    assert cache.current_size() == sum(files(cache).values())


def test_commit_larger_than_the_budget_keeps_what_fits(open_cache):
    """Its own later files take the room of its earlier ones."""
    cache = open_cache()
    entries = [staged(cache, number) for number in range(5)]
    cache.reserve([(entry[0], entry[1], 40) for entry in entries])
    cache.put_many(entries)
    assert held(cache) == [3, 4]
    assert temporaries(cache) == []
    assert_sound(cache)


def test_discarded_file_is_gone_with_its_directory(open_cache):
    """What is garbage takes no room; discarding again does nothing."""
    cache = open_cache()
    path = fill(cache, 1)
    other = fill(cache, 0x1001)
    cache.discard(oid(1), TID)
    assert cache.get(oid(1), TID) is None
    assert os.path.exists(other)
    cache.discard(oid(1), TID)
    cache.discard(oid(0x1001), TID)
    assert not os.path.exists(os.path.dirname(path))
    assert cache.current_size() == 0
    fill(cache, 1)
    assert_sound(cache)


def test_missing_source_is_an_error_and_leaves_no_trace(open_cache):
    """What cannot be put is not counted for long."""
    cache = open_cache()
    with pytest.raises(FileNotFoundError):
        cache.put(oid(1), TID, cache.temporary_file())
    assert_sound(cache)


def test_source_elsewhere_is_copied_when_it_must_be(open_cache, tmp_path):
    """A temporary directory on another file system works, too."""
    cache = open_cache()
    shared = "/dev/shm"
    if not os.path.isdir(shared) or os.stat(shared).st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system")
    path = os.path.join(shared, f"zodb-s3blobs-test-{os.getpid()}")
    with open(path, "wb") as file:
        file.write(b"elsewhere")
    try:
        cache.put(oid(1), TID, path)
        assert not os.path.exists(path)
    finally:
        if os.path.exists(path):
            os.remove(path)
    with open(cache.get(oid(1), TID), "rb") as file:
        assert file.read() == b"elsewhere"
    assert temporaries(cache) == []
    assert_sound(cache)


def test_temporary_names_differ(open_cache):
    """No two threads or processes write to one file."""
    cache, other = open_cache(), open_cache()
    names = [c.temporary_file() for c in (cache, other) for _ in range(100)]
    assert len(set(names)) == 200
    assert all(os.path.isdir(os.path.dirname(name)) for name in names)
    assert os.path.isdir(cache.temp_dir)


def test_closed_cache_opens_again(open_cache):
    """Closing frees files and nothing else."""
    cache = open_cache()
    fill(cache, 1)
    cache.close()
    cache.close()
    assert cache.get(oid(1), TID)
    fill(cache, 2)
    with cache.filling(oid(3), TID):
        pass
    assert_sound(cache)


def test_wait_for_cleanup_finds_the_cache_within_its_budget(open_cache):
    """There is no eviction that comes later."""
    cache = open_cache(30)
    for number in range(10):
        fill(cache, number)
    cache.notify_loaded(10)
    cache.wait_for_cleanup()
    assert_sound(cache)


# Files and directories


def test_files_are_the_user_s_alone(tmp_path):
    """Blobs may be confidential: directories are 0700 and files 0400, whatever the umask."""
    before = os.umask(0o022)
    try:
        cache = S3BlobCache(str(tmp_path / "var" / "cache"), 100)
        path = fill(cache, 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(cache.temp_dir).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(cache.cache_dir).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o377 == 0
    cache.close()


def test_directory_that_exists_keeps_its_permissions(tmp_path):
    """An operator's group permissions are not taken away."""
    (tmp_path / "cache").mkdir(mode=0o750)
    os.chmod(tmp_path / "cache", 0o750)
    S3BlobCache(str(tmp_path / "cache"), 100).close()
    assert stat.S_IMODE(os.stat(tmp_path / "cache").st_mode) == 0o750


def test_other_files_in_the_directory_are_left_alone(open_cache):
    """Neither counted nor removed."""
    cache = open_cache(20)
    for name in ("abc/readme", "README", "lost+found"):
        path = os.path.join(cache.cache_dir, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w") as file:
            file.write("x" * 1000)
    for number in range(5):
        fill(cache, number)
    assert_sound(cache)
    assert os.path.exists(os.path.join(cache.cache_dir, "abc/readme"))
    assert cache.check(fix=True) == []


def test_file_of_another_user_is_a_hit(open_cache, monkeypatch):
    """Its time cannot be set; it can be read."""
    cache = open_cache()
    path = fill(cache, 1)

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", path)

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get(oid(1), TID) == path


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
def test_hit_is_one_system_call(tmp_path):
    """A hit asks neither SQLite nor the directory; a miss asks the file once more at most."""
    code = f"""
import os
from zodb_s3blobs.cache import S3BlobCache
cache = S3BlobCache({str(tmp_path / "cache")!r}, 100)
path = cache.temporary_file()
open(path, "wb").close()
oid = tid = bytes(8)
cache.put(oid, tid, path)
os.write(1, b"begin")
for _ in range(50):
    cache.get(oid, tid)
os.write(1, b"end")
os._exit(0)
"""
    trace = tmp_path / "trace"
    subprocess.run(
        ["strace", "-o", trace, sys.executable, "-c", code], check=True, capture_output=True
    )
    lines = trace.read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if 'write(1, "begin"' in line)
    end = next(n for n, line in enumerate(lines) if 'write(1, "end"' in line)
    calls = [line.partition("(")[0] for line in lines[begin + 1 : end]]
    assert calls == ["utimensat"] * 50


# The bound


class Watch:
    """Looks from outside at the sum of the committed files, as often as it can."""

    def __init__(self, cache):
        self.largest = 0
        self.looks = 0
        self._cache = cache
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._ended.set()
        self._thread.join()

    def _look(self):
        ended = False
        while not ended:
            ended = self._ended.is_set()  # the last look is at what remains
            # While the directory is read one file may go and another come: two equal looks count.
            seen = files(self._cache)
            if seen == files(self._cache):
                self.largest = max(self.largest, sum(seen.values()))
                self.looks += 1


def test_bound_holds_at_every_moment_while_threads_fill(open_cache):
    """Room is made before a file comes, not after."""
    cache = open_cache(200)

    def work(start):
        for number in range(start, start + 60):
            fill(cache, number, b"x" * (number % 50))

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 100, 200, 300)]
    with Watch(cache) as watch:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert watch.looks
    assert 100 < watch.largest <= 200
    assert_sound(cache)


FILLER = """
import os, sys
from zodb_s3blobs.cache import S3BlobCache
directory, start, count, max_size = sys.argv[1], *map(int, sys.argv[2:])
sys.stdin.readline()
cache = None
for number in range(start, start + count):
    if cache is None or number % 10 == 0:
        if cache is not None:
            cache.close()
        cache = S3BlobCache(directory, max_size)
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.write(b"x" * (number % 50))
    cache.put(number.to_bytes(8, "big"), bytes(8), path)
cache.close()
"""


def fillers(directory, count, number, max_size):
    """Start processes that fill a cache, all at the same moment."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FILLER, directory, str(n * 1000), str(number), str(max_size)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(count)
    ]
    time.sleep(0.5)  # let them import; a late one does no harm
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def finish(processes):
    """Wait for processes; fail with what they wrote."""
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), errors


def test_bound_holds_at_every_moment_while_processes_fill(open_cache):
    """Also while they open and close the index all the time."""
    cache = open_cache(200)
    with Watch(cache) as watch:
        finish(fillers(cache.cache_dir, 4, 60, 200))
    assert watch.looks
    assert watch.largest <= 200
    assert_sound(cache)


@pytest.mark.parametrize("attempt", range(3))
def test_processes_that_open_a_new_cache_at_the_same_moment(tmp_path, attempt):
    """All instances of a site start at once, on a directory that is not there yet."""
    directory = str(tmp_path / "cache")
    finish(fillers(directory, 6, 3, 200))
    cache = S3BlobCache(directory, 200)
    assert_sound(cache)
    cache.close()


def test_blob_larger_than_the_budget_is_served_beside_the_cache(open_cache):
    """It takes no other file's place, and is there for the next reader of this process."""
    cache, other = open_cache(), open_cache()
    for number in range(3):
        fill(cache, number)
    path = fill(cache, 9, b"x" * 1000)
    with open(path, "rb") as file:
        assert file.read() == b"x" * 1000
    assert held(cache) == [0, 1, 2]
    assert cache.get(oid(9), TID) == path
    assert other.get(oid(9), TID) is None
    assert_sound(cache)
    cache.close()
    assert not os.path.exists(path)


def test_room_for_more_than_the_budget_is_refused_in_silence(open_cache):
    """A commit does not depend on the cache: the staged file goes, nothing else does."""
    cache = open_cache()
    fill(cache, 1)
    entries = [staged(cache, 2, size=1000), staged(cache, 3, size=10)]
    cache.reserve([(entry[0], TID, os.path.getsize(entry[2])) for entry in entries])
    cache.put_many(entries)
    assert held(cache) == [1, 3]
    assert temporaries(cache) == []
    assert_sound(cache)


def test_smaller_budget_holds_from_the_next_opening(open_cache):
    """An operator who lowers cache-size need not delete anything."""
    cache = open_cache()
    for number in range(10):
        fill(cache, number)
    cache.close()
    smaller = open_cache(35)
    assert held(smaller) == [7, 8, 9]
    assert_sound(smaller)


def test_open_file_survives_its_eviction(open_cache):
    """A reader goes on reading."""
    cache = open_cache(10)
    with open(fill(cache, 1), "rb") as file:
        fill(cache, 2)
        assert cache.get(oid(1), TID) is None
        assert file.read() == b"0123456789"


# Which file goes


def test_least_recently_used_goes_first(open_cache):
    """In the order in which they came, where none was used again."""
    clock = Clock()
    cache = open_cache(30, clock=clock)
    for number in range(6):
        clock.time += 1
        fill(cache, number)
        os.utime(cache.path(oid(number), TID), (clock.time, clock.time))
    assert held(cache) == [3, 4, 5]


def test_file_that_was_used_stays(open_cache):
    """The file's own time tells; also in another process, and after opening again."""
    clock = Clock()
    cache = open_cache(30, clock=clock)
    paths = {}
    for number in range(3):
        clock.time += 1
        paths[number] = fill(cache, number)
        os.utime(paths[number], (clock.time, clock.time))
    clock.time += 1
    os.utime(paths[0], (clock.time, clock.time))
    clock.time += 1
    fill(cache, 3)
    assert held(cache) == [0, 2, 3]
    cache.close()
    clock.time += 1
    os.utime(paths[2], (clock.time, clock.time))
    clock.time += 1
    cache = open_cache(30, clock=clock)
    fill(cache, 4)
    assert held(cache) == [2, 3, 4]


def test_order_is_that_of_the_last_uses_whatever_their_number(open_cache):
    """Exact, not approximate: simulated with random uses against a list."""
    import random

    chance = random.Random(7)
    clock = Clock()
    cache = open_cache(100, clock=clock)
    model = []
    for _ in range(400):
        clock.time += 1
        number = chance.randrange(25)
        path = cache.path(oid(number), TID)
        if number in model:
            model.remove(number)
            os.utime(path, (clock.time, clock.time))
        else:
            fill(cache, number)
            os.utime(path, (clock.time, clock.time))
        model.append(number)
        model = model[-10:]
        assert held(cache) == sorted(model)


def test_all_files_used_just_now_does_not_keep_the_cache_from_evicting(open_cache):
    """Also when their times lie in the future, as after a clock was set back."""
    clock = Clock()
    cache = open_cache(30, clock=clock)
    for number in range(3):
        os.utime(fill(cache, number), (5000, 5000))
    for number in range(3, 9):
        os.utime(fill(cache, number), (9000, 9000))
    assert len(held(cache)) == 3
    assert_sound(cache)


def test_get_counts_as_use(open_cache):
    """With the real clock: the hit one is not the one that goes."""
    cache = open_cache(30)
    for number in range(3):
        path = fill(cache, number)
        # As if an hour had passed.
        os.utime(path, (time.time() - 3600,) * 2)
    cache.close()
    cache = open_cache(30)
    time.sleep(0.02)  # the kernel's clock is coarse
    assert cache.get(oid(0), TID)
    fill(cache, 3)
    assert 0 in held(cache)


# Damage


def index_path(cache):
    return os.path.join(cache.cache_dir, "index.sqlite")


def remove_index(cache):
    """As an operator may: all files of the index."""
    for suffix in ("", "-journal"):
        if os.path.exists(index_path(cache) + suffix):
            os.remove(index_path(cache) + suffix)


def remove_main_file(cache):
    """The index without its journal."""
    os.remove(index_path(cache))


def overwrite(cache):
    """Another file's bytes."""
    remove_index(cache)
    with open(index_path(cache), "wb") as file:
        file.write(b"This is no database. " * 5000)


def empty(cache):
    """A file system that was full."""
    remove_index(cache)
    with open(index_path(cache), "wb"):
        pass


def cut_in_half(cache):
    """A file system that lost the end."""
    os.truncate(index_path(cache), os.path.getsize(index_path(cache)) // 2)


def cut_to_one_page(cache):
    """The header is whole, what it leads to is not there."""
    os.truncate(index_path(cache), 4096)


def damage_pages(cache):
    """All pages but the first."""
    size = os.path.getsize(index_path(cache))
    with open(index_path(cache), "r+b") as file:
        file.seek(4096)
        file.write(b"\x5a" * (size - 4096))


def zero_pages(cache):
    """What a power failure leaves."""
    size = os.path.getsize(index_path(cache))
    with open(index_path(cache), "r+b") as file:
        file.seek(4096)
        file.write(bytes(size - 4096))


def other_version(cache):
    """The index of another release of this package."""
    connection = sqlite3.connect(index_path(cache))
    connection.execute("PRAGMA user_version = 99")
    connection.close()


DAMAGES = [
    remove_index,
    remove_main_file,
    overwrite,
    empty,
    cut_in_half,
    cut_to_one_page,
    damage_pages,
    zero_pages,
    other_version,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_index_is_made_anew_from_the_files(open_cache, damage):
    """What is cached stays cached, counts, and the bound holds at once."""
    cache = open_cache(10_000)
    for number in range(1000):
        fill(cache, number)
    cache.close()
    before = held(cache)
    assert before == list(range(1000))
    damage(cache)
    cache = open_cache(10_000)
    assert cache.current_size() == 10_000
    assert held(cache) == before
    fill(cache, 5000)
    assert_sound(cache)
    assert cache.current_size() == 10_000


@pytest.mark.parametrize("damage", DAMAGES)
def test_index_damaged_while_it_is_open_is_made_anew(open_cache, damage):
    """The first use may notice with an error, which a cache may give; then the site goes on."""
    cache = open_cache(10_000)
    for number in range(500):
        fill(cache, number)
    damage(cache)
    try:
        fill(cache, 500)
    except OSError:
        pass
    for number in range(500, 1100):
        fill(cache, number)
        assert cache.get(oid(number), TID)
    cache.current_size()
    assert sum(files(cache).values()) <= 10_000
    cache.close()
    cache = open_cache(10_000)
    cache.check(fix=True)
    assert_sound(cache)


def test_index_that_another_process_made_anew_is_used(open_cache):
    """The old file is deleted under us: writing to it would count for nobody."""
    cache, other = open_cache(50), open_cache(50)
    for number in range(5):
        fill(cache, number)
    remove_index(cache)
    for number in range(5, 10):
        fill(other, number)
    for number in range(10, 15):
        fill(cache, number)
    assert sum(files(cache).values()) <= 50
    assert_sound(cache)
    assert_sound(other)


def test_files_removed_by_hand_are_forgotten(open_cache):
    """An operator who needs room deletes files: misses follow, no errors."""
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    for number in range(5):
        os.remove(cache.path(oid(number), TID))
    assert cache.get(oid(1), TID) is None
    findings = cache.check()
    assert len(findings) == 5
    assert all("missing" in finding for finding in findings)
    for number in range(10, 20):
        fill(cache, number)
    assert sum(files(cache).values()) <= 100
    cache.check(fix=True)
    assert_sound(cache)


def test_directories_removed_by_hand_are_made_again(open_cache):
    """Down to the directory of temporary files."""
    cache = open_cache(100)
    fill(cache, 1)
    for name in os.listdir(cache.cache_dir):
        if os.path.isdir(os.path.join(cache.cache_dir, name)) and name != "tmp":
            shutil.rmtree(os.path.join(cache.cache_dir, name))
    assert cache.get(oid(1), TID) is None
    fill(cache, 1)
    assert cache.get(oid(1), TID)
    assert cache.check(fix=True) == []


def test_check_finds_each_difference_and_mends_it(open_cache):
    """A file without a row, a row without a file, a wrong size, too many bytes."""
    cache = open_cache(100)
    for number in range(4):
        fill(cache, number)
    assert cache.check() == []
    os.remove(cache.path(oid(0), TID))
    os.chmod(cache.path(oid(1), TID), 0o600)
    with open(cache.path(oid(1), TID), "ab") as file:
        file.write(b"x" * 5)
    os.makedirs(os.path.dirname(cache.path(oid(7), TID)), exist_ok=True)
    with open(cache.path(oid(7), TID), "wb") as file:
        file.write(b"x" * 90)
    findings = cache.check()
    assert [
        word
        for word in ("not in the index", "missing", "15 bytes", "exceed")
        if not any(word in finding for finding in findings)
    ] == []
    assert len(findings) == 4
    assert cache.check() == findings
    assert cache.check(fix=True) == findings
    assert_sound(cache)
    assert cache.check(fix=True) == []


def test_error_within_a_change_keeps_the_cache_usable(open_cache):
    """Half of a change is not kept."""
    cache = open_cache(100)
    fill(cache, 1)

    def entries():
        yield oid(2), TID, 50
        raise RuntimeError("the caller's")

    with pytest.raises(RuntimeError, match="the caller's"):
        cache.reserve(entries())
    fill(cache, 3)
    assert_sound(cache)


def test_directory_that_cannot_be_written_serves_from_beside(open_cache):
    """What is cached is a hit, what is not is kept beside; and caching resumes."""
    cache = open_cache(100)
    fill(cache, 1)
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.write(b"x")
    cache.close()
    os.chmod(cache.cache_dir, 0o500)
    os.chmod(index_path(cache), 0o400)
    try:
        kept = cache.put(oid(2), TID, path)
        with open(kept, "rb") as file:
            assert file.read() == b"x"
        assert cache.get(oid(1), TID)
        assert cache.get(oid(2), TID) == kept
        assert held(cache) == [1]
    finally:
        os.chmod(cache.cache_dir, 0o700)
        os.chmod(index_path(cache), 0o600)
    cache.close()
    fill(cache, 2)
    assert held(cache) == [1, 2]


# Processes that die


KILLED = """
import os, sys
from zodb_s3blobs.cache import S3BlobCache
cache = S3BlobCache(sys.argv[1], 100)
for number in range(8):
    path = cache.temporary_file()
    with open(path, "wb") as file:
        file.write(b"0123456789")
    cache.put(number.to_bytes(8, "big"), bytes(8), path)
path = cache.temporary_file()
with open(path, "wb") as file:
    file.write(b"x" * 60)
oid = bytes(7) + b"\\xff"
"""
STAGES = {
    "reserved": "cache.reserve([(oid, bytes(8), 60)])",
    "in a change": """
def entries():
    yield oid, bytes(8), 60
    print("ready", flush=True)
    sys.stdin.read()
cache.reserve(entries())
""",
    "filling": "filling = cache.filling(oid, bytes(8)); filling.__enter__()",
    "put": "cache.put(oid, bytes(8), path)",
    "putting under the tid": """
replace = os.replace
def replace_and_wait(source, target):
    replace(source, target)
    print("ready", flush=True)
    sys.stdin.read()
os.replace = replace_and_wait
cache.reserve([(oid, b"anything", 60)])
cache.put_many([(oid, bytes(7) + b"\\1", path, b"anything")])
""",
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_process_leaves_a_cache_that_heals(open_cache, stage):
    """SIGKILL between reserve and put, in the middle of a change, while filling or putting."""
    cache = open_cache(100)
    code = f"{KILLED}\n{STAGES[stage]}\nprint('ready', flush=True)\nsys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, cache.cache_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert sum(files(cache).values()) <= 100
    begun = time.monotonic()
    with cache.filling(oid(0xFF), bytes(8)):
        fill(cache, 0xFF, b"y" * 60, bytes(8))
    assert time.monotonic() - begun < 5
    assert sum(files(cache).values()) <= 100
    for number in range(100, 120):
        fill(cache, number)
    assert held(cache) == list(range(110, 120))
    assert_sound(cache)


def test_temporary_files_of_dead_processes_go_at_the_next_opening(open_cache):
    """Each crash during a large download would otherwise take its room until someone looks."""
    cache = open_cache(100)
    mine = cache.temporary_file()
    Path(mine).touch()
    code = f"{KILLED}\nos.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, cache.cache_dir], check=False)
    assert len(temporaries(cache)) == 2
    open_cache(100)
    assert temporaries(cache) == [os.path.basename(mine)]


def test_file_left_short_by_a_power_failure_is_dropped_after_the_boot(open_cache):
    """Nothing is written with fsync: under a final name there may be fewer bytes."""
    cache = open_cache(1000)
    for number in (1, 2, 3):
        fill(cache, number)
    cut = cache.path(oid(2), TID)
    whole = cache.path(oid(1), TID)
    cache.close()
    os.chmod(cut, 0o600)
    os.truncate(cut, 3)
    Path(cache.cache_dir, "boot").write_text("another boot")
    again = open_cache(1000)
    assert not os.path.exists(cut)
    assert os.path.exists(whole)
    assert_sound(again)


def test_files_without_an_index_are_dropped_after_a_boot(open_cache):
    """The failure may have damaged the index, too, and with it all knowledge of sizes."""
    cache = open_cache(1000)
    fill(cache, 1)
    path = cache.path(oid(1), TID)
    cache.close()
    os.remove(os.path.join(cache.cache_dir, "index.sqlite"))
    Path(cache.cache_dir, "boot").write_text("")
    again = open_cache(1000)
    assert not os.path.exists(path)
    assert_sound(again)


# Forks


def test_forked_child_and_parent_share_the_cache(open_cache):
    """Each has a connection of its own; both count for one budget."""
    cache = open_cache(100)
    for number in range(5):
        fill(cache, number)

    def child():
        for number in range(5, 15):
            fill(cache, number)
        with cache.filling(oid(1), TID):
            pass
        assert cache.check() == []
        cache.close()

    in_child(child)
    assert sum(files(cache).values()) == 100
    for number in range(15, 20):
        fill(cache, number)
    assert_sound(cache)


def test_child_forked_while_another_thread_fills_can_fill(open_cache):
    """What a thread of the parent holds is let go of by the parent; the child waits no longer."""
    cache = open_cache(100)
    inside, may_end = threading.Event(), threading.Event()

    def hold():
        with cache.filling(oid(1), TID):
            inside.set()
            assert may_end.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    timer = threading.Timer(1, may_end.set)
    timer.start()

    def child():
        with cache.filling(oid(1), TID):
            fill(cache, 1)

    try:
        in_child(child, seconds=6)
    finally:
        may_end.set()
        thread.join(30)
        timer.join()
    assert held(cache) == [1]


def test_child_goes_on_after_its_parent_closed(open_cache, tmp_path):
    """A parent that opens, forks its workers and ends must not take the index away from them."""
    cache = open_cache(100)
    fill(cache, 1)
    parent_closed, child_put = os.pipe(), os.pipe()

    def child():
        for number in range(10, 15):
            fill(cache, number)
        os.write(child_put[1], b"x")
        assert os.read(parent_closed[0], 1) == b"x"
        for number in range(20, 25):
            fill(cache, number)
        os.write(child_put[1], b"x")
        assert os.read(parent_closed[0], 1) == b"x"
        for number in range(40, 50):
            fill(cache, number)

    def parent():
        assert os.read(child_put[0], 1) == b"x"
        cache.close()
        os.write(parent_closed[1], b"x")
        assert os.read(child_put[0], 1) == b"x"
        # A process that begins now, as an operator's command does.
        finish(fillers(cache.cache_dir, 1, 20, 100))
        os.write(parent_closed[1], b"x")

    thread = threading.Thread(target=parent, daemon=True)
    thread.start()
    in_child(child, seconds=20)
    thread.join(30)
    again = open_cache(100)
    assert sum(files(again).values()) <= 100
    assert_sound(again)


# One filler at a time


def test_fillers_of_different_blobs_do_not_wait_for_each_other(open_cache):
    """Two cold blobs are fetched side by side."""
    cache = open_cache(100)
    with cache.filling(oid(1), TID):
        done = threading.Event()

        def other():
            with cache.filling(oid(2), TID):
                done.set()

        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(10)
        thread.join()


def test_one_filler_among_processes(open_cache):
    """The other process waits for the file instead of fetching it, too."""
    cache = open_cache(100)
    code = f"""
from zodb_s3blobs.cache import S3BlobCache
cache = S3BlobCache({cache.cache_dir!r}, 100)
print("begins", flush=True)
with cache.filling({oid(1)!r}, {TID!r}):
    print("found" if cache.get({oid(1)!r}, {TID!r}) else "missed", flush=True)
"""
    with cache.filling(oid(1), TID):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "begins\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        fill(cache, 1)
    assert child.communicate(timeout=20)[0] == "found\n"


def test_error_of_a_filler_lets_the_next_one_try(open_cache):
    """A failed download does not block the blob."""
    cache = open_cache(100)
    with pytest.raises(RuntimeError), cache.filling(oid(1), TID):
        raise RuntimeError("S3 is down")
    with cache.filling(oid(1), TID):
        fill(cache, 1)
    assert held(cache) == [1]
