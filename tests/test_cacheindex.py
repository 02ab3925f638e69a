"""The index knows what it was told, after errors and for every process."""

import os
import sqlite3
import threading

import pytest

from zodb_s3blobs.cacheindex import CacheIndex

from .faults import in_child


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "index.sqlite")


def nothing():
    """A directory without files."""
    return iter(())


def test_rows_are_kept_and_their_total_known(path):
    """Put, put again with another size, mark, remove: the total follows."""
    index = CacheIndex(path, nothing)
    with index.writing() as rows:
        assert rows.total() == 0
        assert rows.oldest() is None
        rows.put("a", 10, 3.0)
        rows.put("b", 20, 1.0)
        rows.put("c", 30, 2.0)
        rows.put("a", 5, 4.0)
    with index.writing() as rows:
        assert rows.total() == 55
        assert sorted(rows) == [("a", 5), ("b", 20), ("c", 30)]
        assert "a" in rows and "d" not in rows
        assert rows.oldest() == ("b", 20, 1.0)
        rows.mark("b", 9.0)
        assert rows.oldest() == ("c", 30, 2.0)
        rows.remove("c")
        rows.remove("never there")
        assert rows.total() == 25
    index.close()


def test_renamed_row_keeps_its_size_and_its_use(path):
    """It takes the place of a row of that name; where there is none, nothing comes of it."""
    index = CacheIndex(path, nothing)
    with index.writing() as rows:
        rows.put("a", 10, 3.0)
        rows.put("b", 20, 1.0)
        rows.rename("a", "c")
        assert sorted(rows) == [("b", 20), ("c", 10)]
        rows.rename("b", "c")
        assert (list(rows), rows.oldest(), rows.total()) == ([("c", 20)], ("c", 20, 1.0), 20)
        rows.rename("c", "d")
        rows.rename("never there", "e")
        assert (list(rows), rows.total()) == ([("d", 20)], 20)
    index.close()


def test_new_index_begins_with_what_is_there(path):
    """The scan is asked once, and not again at the next opening."""
    scans = []

    def scan():
        scans.append(1)
        yield "a", 10, 1.0
        yield "b", 20, 2.0

    for _ in range(2):
        index = CacheIndex(path, scan)
        with index.writing() as rows:
            assert rows.total() == 30
        index.close()
    assert len(scans) == 1


def test_failed_scan_leaves_no_empty_index(path):
    """An index that seems whole and knows of no file would break the bound."""

    def fail():
        yield "a", 10, 1.0
        raise OSError("the disk")

    index = CacheIndex(path, fail)
    with pytest.raises(OSError, match="the disk"), index.writing():
        pass
    index.close()
    index = CacheIndex(path, lambda: iter([("a", 10, 1.0)]))
    with index.writing() as rows:
        assert rows.total() == 10
    index.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_change_that_ends_in_an_error_is_not_kept(path, error):
    """The error itself comes through; the index goes on."""
    index = CacheIndex(path, nothing)
    with pytest.raises(error), index.writing() as rows:
        rows.put("a", 10, 1.0)
        raise error()
    with index.writing() as rows:
        assert rows.total() == 0
    index.close()


def test_change_is_seen_by_another_index_on_the_same_file(path):
    """As by another process."""
    first, second = CacheIndex(path, nothing), CacheIndex(path, nothing)
    with first.writing() as rows:
        rows.put("a", 10, 1.0)
    with second.writing() as rows:
        assert rows.total() == 10
    in_child(lambda: assert_total(path, 10))
    first.close()
    second.close()


def assert_total(path, total):
    index = CacheIndex(path, nothing)
    with index.writing() as rows:
        assert rows.total() == total
    index.close()


def test_one_writer_at_a_time(path):
    """The lock of the index is the lock of the directory."""
    index, other = CacheIndex(path, nothing), CacheIndex(path, nothing)
    entered = threading.Event()

    def second():
        with other.writing():
            entered.set()

    with index.writing():
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(20)
    assert entered.is_set()
    index.close()
    other.close()


def test_lock_held_for_too_long_is_an_os_error(path, monkeypatch):
    """A stopped process does not stop the others for ever."""
    monkeypatch.setattr("zodb_s3blobs.cacheindex.BUSY_TIMEOUT", 0.2)
    index = CacheIndex(path, nothing)
    with index.writing() as rows:
        rows.put("a", 10, 1.0)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    other = CacheIndex(path, nothing)
    with pytest.raises(OSError, match="index of the blob cache"), other.writing():
        pass
    holder.execute("ROLLBACK")
    holder.close()
    with other.writing() as rows:
        assert rows.total() == 10
    index.close()
    other.close()


def test_path_that_cannot_be_opened_is_an_os_error(tmp_path):
    """The message names the file; SQLite's errors do not leave the index."""
    index = CacheIndex(str(tmp_path / "nowhere" / "index.sqlite"), nothing)
    with pytest.raises(OSError, match="nowhere"), index.writing():
        pass


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_opening_waits_for_a_process_that_is_making_the_index(path, lock):
    """SQLite refuses at once to change the journal of a database that is being written."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute(lock)
    timer = threading.Timer(0.3, other.execute, ["COMMIT"])
    timer.start()
    index = CacheIndex(path, nothing)
    try:
        with index.writing() as rows:
            assert rows.total() == 0
    finally:
        timer.join()
        other.close()
        index.close()


def test_two_threads_that_fork_at_once_leave_the_index_usable(tmp_path):
    """Each fork holds all indexes, and gives back those that it holds."""
    index = CacheIndex(str(tmp_path / "index.sqlite"), lambda: ())

    def fork():
        for _ in range(50):
            if (pid := os.fork()) == 0:
                os._exit(0)
            os.waitpid(pid, 0)

    threads = [threading.Thread(target=fork, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with index.writing() as rows:
            rows.put("a", 1, 1.0)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    index.close()
