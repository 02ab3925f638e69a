"""The index is brought into line with the files, and only what changed is read for that."""

import os
from pathlib import Path
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest

from zodb_s3blobs import cache as cache_module
from zodb_s3blobs import cachesurvey
from zodb_s3blobs.cache import S3BlobCache

from .storages import Failure
from .test_cache import assert_sound
from .test_cache import Clock
from .test_cache import files
from .test_cache import fill
from .test_cache import held
from .test_cache import index_path
from .test_cache import oid
from .test_cache import open_cache
from .test_cache import remove_index
from .test_cache import TID


__all__ = ["open_cache"]  # a fixture


def add_by_hand(cache, number, size=10):
    """Put a file where the cache would have it."""
    path = Path(cache.path(oid(number), TID))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is missing")
def test_opening_again_reads_only_directories_that_changed(tmp_path):
    """A restart does not list a million files."""
    code = """
import os, sys
from zodb_s3blobs import cache as cache_module
from zodb_s3blobs import cachesurvey
from zodb_s3blobs.cache import S3BlobCache
cachesurvey.TICK = 0
def fill(cache, number):
    path = cache.temporary_file()
    open(path, "wb").close()
    cache.put(number.to_bytes(8, "big"), bytes(8), path)
cache = S3BlobCache(sys.argv[1], 100)
for number in range(200):
    fill(cache, number)
cache.close()
open(f"{sys.argv[1]}/007/{7:016x}.{1:016x}.blob", "wb").close()
os.write(1, b"begin")
S3BlobCache(sys.argv[1], 100)
os.write(1, b"end")
os._exit(0)
"""
    cache, trace = tmp_path / "cache", tmp_path / "trace"
    subprocess.run(
        ["strace", "-f", "-o", trace, sys.executable, "-c", code, cache],
        check=True,
        capture_output=True,
    )
    _before, _begin, rest = trace.read_text().partition('write(1, "begin"')
    opened = [line for line in rest.splitlines() if "openat(" in line and "O_DIRECTORY" in line]
    numbered = [line.split('"')[1] for line in opened if f'"{cache}/0' in line]
    assert numbered == [f"{cache}/007"]
    assert len(list(cache.glob("0*"))) == 200


def test_file_added_by_hand_counts_from_the_next_opening(open_cache):
    """Also in the moment of the cache's own last change: a file system's clock has its ticks."""
    cache = open_cache(100)
    for number in range(5):
        fill(cache, number)
    for number in (0x2001, 0x1001, 0x777):
        add_by_hand(cache, number)
    add_by_hand(cache, 0x2002, size=60).chmod(0o400)
    cache.close()
    cache = open_cache(100)
    assert cache.current_size() == sum(files(cache).values()) <= 100
    assert_sound(cache)


def test_files_and_directories_removed_by_hand_take_no_room(open_cache):
    """Their rows go at the next opening, not only when eviction meets them."""
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    cache.close()
    os.remove(cache.path(oid(1), TID))
    shutil.rmtree(os.path.dirname(cache.path(oid(2), TID)))
    cache = open_cache(100)
    assert cache.current_size() == 80
    assert_sound(cache)


def test_other_entries_of_the_cache_directory_are_left_alone(open_cache):
    """Neither a file with the name of a directory nor a directory with that of a file confuses."""
    cache = open_cache(100)
    Path(cache.cache_dir, "abc").write_text("no directory")
    Path(cache.path(oid(1), TID)).mkdir(parents=True)
    Path(cache.cache_dir, "001", "readme").write_text("x" * 1000)
    fill(cache, 2)
    cache.close()
    cache = open_cache(100)
    assert cache.get(oid(2), TID)
    assert cache.current_size() == 10
    assert cache.check() == []
    assert Path(cache.cache_dir, "abc").read_text() == "no directory"


# An index that does not know all files


def test_nothing_is_added_while_files_are_unknown(open_cache, monkeypatch):
    """A serving process learns of some with each file it would add, and serves it from beside."""
    monkeypatch.setattr(cachesurvey, "FILES", 3)
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    remove_index(cache)
    served = [fill(cache, number, tid=oid(1)) for number in range(5)]
    for path in served:
        assert Path(path).read_bytes() == b"0123456789"
    assert sum(files(cache).values()) == 100
    beside = [path for path in served if not path.endswith(".blob")]
    assert served[0] in beside
    assert served[-1] not in beside
    cache.close()
    cache = open_cache(100)
    assert_sound(cache)


def test_process_that_dies_while_it_learns_is_continued(open_cache, monkeypatch):
    """What it has learnt is not learnt again, and not forgotten."""
    monkeypatch.setattr(cachesurvey, "FILES", 3)
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    remove_index(cache)
    fill(cache, 20)  # learns some
    connection = sqlite3.connect(index_path(cache))
    assert connection.execute("SELECT complete FROM state").fetchone() == (0,)
    assert 0 < connection.execute("SELECT COUNT(*) FROM file").fetchone()[0] < 10
    connection.close()
    again = open_cache(100)
    assert held(again) == list(range(10))
    assert_sound(again)


def test_discard_while_files_are_unknown_does_not_fail(open_cache, monkeypatch):
    """A sweep goes on; the file grows old in the cache."""
    monkeypatch.setattr(cachesurvey, "FILES", 1)
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    remove_index(cache)
    cache.discard(oid(1), TID)
    cache.close()
    assert_sound(open_cache(100))


def test_cache_of_the_older_package_is_taken_over(tmp_path):
    """Its files are {oid}/{tid}.blob, with or without leading zeros; the budget holds for them."""
    directory = tmp_path / "cache"
    for name in ("0000000000000abc/0000000003e0f00d", "1f/3e0f00d", "abc/3e0f00e", "7/1"):
        path = directory / f"{name}.blob"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"0123456789")
    (directory / "7" / "other").write_text("not a blob")
    cache = S3BlobCache(str(directory), 100)
    for number, tid in ((0xABC, TID), (0x1F, TID), (0xABC, oid(0x3E0F00E)), (7, oid(1))):
        assert Path(cache.get(oid(number), tid)).read_bytes() == b"0123456789"
    assert cache.current_size() == 40
    assert_sound(cache)
    assert sorted(path.name for path in directory.iterdir() if len(path.name) > 10) == [
        "index.sqlite",
        "index.sqlite-journal",
    ]
    assert (directory / "7" / "other").exists()
    cache.close()
    smaller = S3BlobCache(str(directory), 15)
    assert len(held(smaller)) == 1
    smaller.close()


def test_wrong_total_is_found_and_mended(open_cache):
    """A total that is too small would let the cache outgrow its budget."""
    cache = open_cache(100)
    for number in range(5):
        fill(cache, number)
    connection = sqlite3.connect(index_path(cache))
    connection.execute("UPDATE state SET bytes = 7")
    connection.commit()
    connection.close()
    assert cache.check() == ["the index counts 7 bytes, its files have 50"]
    cache.check(fix=True)
    assert_sound(cache)


def test_total_of_rows_that_are_not_there_does_not_keep_files_out(open_cache):
    """Eviction that finds nothing to evict counts anew, instead of trying for ever."""
    cache = open_cache(100)
    connection = sqlite3.connect(index_path(cache))
    connection.execute("UPDATE state SET bytes = 95")
    connection.commit()
    connection.close()
    fill(cache, 1)
    assert_sound(cache)


# After a boot


def age_of_machine():
    """Return when it booted, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def another_boot(cache):
    """Make the cache believe that the machine has booted."""
    Path(cache.cache_dir, "boot").write_text("another boot")


def changed(cache, number, when):
    """Set the time of the last change of a file's directory."""
    os.utime(os.path.dirname(cache.path(oid(number), TID)), (when, when))


def test_index_lost_with_the_power_is_made_of_what_had_reached_the_disk(open_cache):
    """Files in directories that changed just before the failure may be short; others are whole."""
    cache = open_cache(1000)
    for number in (1, 2, 3):
        fill(cache, number)
    cache.close()
    remove_index(cache)
    another_boot(cache)
    failure = age_of_machine() - 60
    changed(cache, 1, failure - 3600)
    changed(cache, 2, failure - 300)
    changed(cache, 3, failure)
    again = open_cache(1000)
    assert held(again) == [1]
    assert_sound(again)


def test_file_without_a_row_is_dropped_after_a_power_failure(open_cache):
    """The index had forgotten its last rows; a file's size then proves nothing."""
    cache = open_cache(1000)
    for number in (1, 2):
        fill(cache, number)
    add_by_hand(cache, 0x1001)
    add_by_hand(cache, 0x2001)
    cache.close()
    another_boot(cache)
    again = open_cache(1000)
    assert held(again) == [1, 2]
    assert_sound(again)


def test_marker_that_was_removed_is_no_boot(open_cache):
    """Who removes all files of the cache's own by hand does not lose the blobs with them."""
    cache = open_cache(1000)
    fill(cache, 1)
    cache.close()
    remove_index(cache)
    os.remove(os.path.join(cache.cache_dir, "boot"))
    again = open_cache(1000)
    assert held(again) == [1]
    assert_sound(again)


def test_boot_is_noticed_once(open_cache):
    """The next opening finds the marker of this boot."""
    cache = open_cache(1000)
    fill(cache, 1)
    another_boot(cache)
    open_cache(1000)
    marker = Path(cache.cache_dir, "boot").read_text()
    assert marker == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_file_that_may_be_short_is_not_served_while_nobody_can_look(open_cache, monkeypatch):
    """A power failure that leaves the disk read-only, too; later the files are looked at."""
    cache = open_cache(1000)
    path = fill(cache, 1)
    cache.close()
    another_boot(cache)
    os.chmod(path, 0o600)
    os.truncate(path, 3)
    monkeypatch.setattr(cache_module, "RETRY", 0.0)
    directories = [*Path(cache.cache_dir).glob("*/"), Path(cache.cache_dir)]
    files = [file for file in Path(cache.cache_dir).iterdir() if file.is_file()]
    for entry in (*files, *directories):
        entry.chmod(0o500)
    try:
        again = open_cache(1000)
        assert again.get(oid(1), TID) is None
        served = again.fill(oid(1), TID, lambda path: Path(path).write_bytes(b"0123456789"))
        assert Path(served).read_bytes() == b"0123456789"
        assert served != path
    finally:
        for entry in (*files, *directories):
            entry.chmod(0o700)
    again.close()
    assert again.get(oid(1), TID) is None
    served = again.fill(oid(1), TID, lambda path: Path(path).write_bytes(b"0123456789"))
    assert served == path == again.get(oid(1), TID)
    assert_sound(again)


def test_room_that_is_reserved_is_no_finding_for_an_hour(open_cache):
    """Whoever opens or checks the cache meanwhile leaves it to the transaction that has it."""
    clock = Clock()
    cache = open_cache(100, clock=clock)
    cache.reserve([(oid(1), TID, 40)])
    other = open_cache(100, clock=clock)
    assert other.check(fix=True) == []
    assert other.current_size() == 40
    clock.time += 3700
    assert len(other.check(fix=True)) == 1
    assert other.current_size() == 0


def test_total_that_a_power_failure_has_left_behind_is_counted_anew(open_cache):
    """SQLite finds no damage in a page that is merely old."""
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    cache.close()
    connection = sqlite3.connect(index_path(cache))
    connection.execute("UPDATE state SET bytes = 20")
    connection.commit()
    connection.close()
    another_boot(cache)
    assert open_cache(100).current_size() == 100


def test_cache_emptied_by_hand_knows_of_the_next_boot(open_cache):
    """Also where nothing was opened since."""
    cache = open_cache(100)
    fill(cache, 1)
    for entry in Path(cache.cache_dir).iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    path = fill(cache, 2)
    assert cache.get(oid(2), TID) == path
    cache.close()
    another_boot(cache)
    os.chmod(path, 0o600)
    os.truncate(path, 3)
    assert open_cache(100).get(oid(2), TID) is None


def test_complete_index_without_a_marker_is_not_trusted(open_cache):
    """Nobody knows of which boot it is."""
    cache = open_cache(100)
    path = fill(cache, 1)
    cache.close()
    os.remove(os.path.join(cache.cache_dir, "boot"))
    os.chmod(path, 0o600)
    os.truncate(path, 3)
    assert open_cache(100).get(oid(1), TID) is None


def test_file_that_vanishes_while_a_directory_is_read_hides_no_other(open_cache, monkeypatch):
    """All others get their rows."""
    cache = open_cache(1000)
    for number in range(20):
        fill(cache, number << 12)
    remove_index(cache)
    stat, gone = os.stat, []

    def vanishing(path, *args, **options):
        if str(path).endswith(".blob") and not gone:
            gone.append(path)
            os.remove(path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", vanishing)
    again = open_cache(1000)
    assert len(gone) == 1
    assert len(held(again)) == 19
    assert_sound(again)


def test_directory_that_cannot_be_read_is_reported_and_left(open_cache):
    """Its files are not taken for missing: they would come on top of the budget."""
    cache = open_cache(100)
    for number in range(10):
        fill(cache, number)
    directory = os.path.dirname(cache.path(oid(1), TID))
    os.chmod(directory, 0o000)
    try:
        again = open_cache(100)
        assert again.current_size() == 100
        (finding,) = again.check(fix=True)
        assert "001 cannot be read" in finding
        assert again.current_size() == 100
        fill(again, 20)
        assert held_but(again, 1)
    finally:
        os.chmod(directory, 0o700)


def held_but(cache, number):
    """Return the files that are there, without one that cannot be looked at."""
    return [other for other in held(cache) if other != number]


def test_old_directory_that_cannot_be_read_does_not_keep_others(tmp_path):
    """They are taken over; it is reported in the log."""
    directory = tmp_path / "cache"
    for number in (0xA1, 0xB1, 0xC1):
        path = directory / f"{number:x}" / "3e0f00d.blob"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"0123456789")
    (directory / "b1").chmod(0o000)
    try:
        cache = S3BlobCache(str(directory), 100)
        assert held(cache) == [0xA1, 0xC1]
        cache.close()
    finally:
        (directory / "b1").chmod(0o700)


def test_cache_is_kept_when_the_first_look_after_a_boot_fails(open_cache, monkeypatch):
    """What is whole does not go because nobody could tell; a commit meanwhile deletes nothing."""
    cache = open_cache(1000)
    for number in range(20):
        fill(cache, number)
    cache.close()
    remove_index(cache)
    another_boot(cache)
    for number in range(20):
        changed(cache, number, age_of_machine() - 3600)
    changed(cache, 0, age_of_machine() - 60)
    with monkeypatch.context() as patch:
        patch.setattr(cachesurvey.CacheIndex, "verify", Failure(OSError("says the test")))
        again = open_cache(1000)
        assert again.get(oid(1), TID) is None
    again.reserve([(oid(50), TID, 10)])
    again.close()
    assert held(open_cache(1000)) == list(range(1, 20))


def test_file_is_not_served_before_it_is_known_of_which_boot_it_is(open_cache):
    """A marker that cannot be read; nothing is deleted meanwhile."""
    cache = open_cache(100)
    fill(cache, 1)
    cache.close()
    remove_index(cache)
    marker = Path(cache.cache_dir, "boot")
    marker.chmod(0o000)
    try:
        again = open_cache(100)
        assert again.get(oid(1), TID) is None
        again.discard(oid(2), TID)
        fill(again, 3)
        assert held(again) == [1]
        with pytest.raises(OSError, match="boot"):
            again.current_size()
    finally:
        marker.chmod(0o600)


def test_marker_of_other_bytes_is_another_boot(open_cache):
    """Whatever a power failure has left in it."""
    cache = open_cache(100)
    fill(cache, 1)
    Path(cache.cache_dir, "boot").write_bytes(b"\xff\xfe\x00")
    again = open_cache(100)
    assert held(again) == [1]
    assert_sound(again)
