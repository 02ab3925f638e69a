"""The index knows what it was told, after errors and for every process."""

import os
import sqlite3
import threading

import pytest

from zodb_s3blobs.cacheindex import CacheIndex
from zodb_s3blobs.directorylock import DirectoryBusy

from .faults import in_child


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "index.sqlite")


def content(rows):
    """Return names and sizes."""
    return sorted(rows.between("a", "z").items())


def oldest(rows):
    """Return the row that was not used for longest, if there is any."""
    return next(rows.by_use(), None)


def test_rows_are_kept_and_their_total_known(path):
    """Put, put again with another size, mark, remove: the total follows."""
    index = CacheIndex(path)
    with index.writing() as rows:
        assert rows.total == 0
        assert oldest(rows) is None
        rows.put("a", 10, 3.0)
        rows.put("b", 20, 1.0)
        rows.put("c", 30, 2.0)
        rows.put("a", 5, 4.0)
    with index.writing() as rows:
        assert rows.total == 55
        assert content(rows) == [("a", 5), ("b", 20), ("c", 30)]
        assert "a" in rows and "d" not in rows
        assert oldest(rows) == ("b", 20, 1.0)
        rows.mark([("b", 9.0)])
        assert oldest(rows) == ("c", 30, 2.0)
        rows.remove("c")
        rows.remove("never there")
        assert rows.total == 25
    index.close()


def test_renamed_row_keeps_its_size_and_its_use(path):
    """It takes the place of a row of that name; where there is none, nothing comes of it."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.put("a", 10, 3.0)
        rows.put("b", 20, 1.0)
        rows.rename("a", "c")
        assert content(rows) == [("b", 20), ("c", 10)]
        rows.rename("b", "c")
        assert (content(rows), oldest(rows), rows.total) == ([("c", 20)], ("c", 20, 1.0), 20)
        rows.rename("c", "d")
        rows.rename("never there", "e")
        assert (content(rows), rows.total) == ([("d", 20)], 20)
    index.close()


def test_new_index_is_incomplete_until_somebody_says_otherwise(path):
    """It does not know what files there are; an opened one knows what was said."""
    index = CacheIndex(path)
    with index.writing() as rows:
        assert not rows.is_complete
        rows.add([("a", 10, 1.0), ("b", 20, 2.0)])
    with index.writing() as rows:
        assert not rows.is_complete
        rows.is_complete = True
    index.close()
    index = CacheIndex(path)
    with index.writing() as rows:
        assert rows.is_complete
        assert rows.total == rows.sum() == 30
    index.close()


def test_several_rows_are_removed_at_once(path):
    """As eviction does it, which knows their sizes."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.add([("a", 10, 1.0), ("b", 20, 2.0), ("c", 40, 3.0)])
        rows.remove_known([("a", 10), ("c", 40)])
    with index.writing() as rows:
        assert content(rows) == [("b", 20)]
        assert rows.total == rows.sum() == 20
    index.close()


def test_times_of_directories_are_kept(path):
    """None stands for a directory that is gone."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.note({"001": 5, "002": 6, "fff": None})
    with index.writing() as rows:
        assert rows.directories() == {"001": 5, "002": 6}
        rows.note({"001": None, "002": 7})
    with index.writing() as rows:
        assert rows.directories() == {"002": 7}
    index.close()


def test_range_of_names_ends_before_its_end(path):
    """A directory's rows are those from "abc/" to before "abc0"."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.add([("abb/f", 1, 1.0), ("abc/0", 2, 1.0), ("abc/f", 3, 1.0), ("abd/0", 4, 1.0)])
        assert rows.between("abc/", "abc0") == {"abc/0": 2, "abc/f": 3}
        assert rows.between("abb/", "abd/") == {"abb/f": 1, "abc/0": 2, "abc/f": 3}
    index.close()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_change_that_ends_in_an_error_is_not_kept(path, error):
    """The error itself comes through; the index goes on."""
    index = CacheIndex(path)
    with pytest.raises(error), index.writing() as rows:
        rows.put("a", 10, 1.0)
        raise error()
    with index.writing() as rows:
        assert rows.total == 0
    index.close()


def test_change_is_seen_by_another_index_on_the_same_file(path):
    """As by another process."""
    first, second = CacheIndex(path), CacheIndex(path)
    with first.writing() as rows:
        rows.put("a", 10, 1.0)
    with second.writing() as rows:
        assert rows.total == 10
    in_child(lambda: assert_total(path, 10))
    first.close()
    second.close()


def assert_total(path, total):
    index = CacheIndex(path)
    with index.writing() as rows:
        assert rows.total == total
    index.close()


def test_one_writer_at_a_time(path):
    """The lock of the index is the lock of the directory."""
    index, other = CacheIndex(path), CacheIndex(path)
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


def test_lock_held_for_too_long_is_an_os_error(path):
    """A stopped process does not stop the others for ever."""
    index, other = CacheIndex(path), CacheIndex(path)
    with index.writing() as rows:
        rows.put("a", 10, 1.0)
        with pytest.raises(DirectoryBusy, match="too long"), other.writing(patience=0.2):
            pass
    with other.writing() as rows:
        assert rows.total == 10
    index.close()
    other.close()


def test_thread_that_holds_the_lock_for_too_long_is_an_os_error(path):
    """Nothing waits without a bound, among threads either."""
    index = CacheIndex(path)
    errors = []

    def second():
        try:
            with index.writing(patience=0.2):
                pass
        except DirectoryBusy as error:
            errors.append(error)

    with index.writing() as rows:
        rows.put("a", 10, 1.0)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(20)
    assert len(errors) == 1
    with index.writing() as rows:
        assert rows.total == 10
    index.close()


def test_index_that_was_replaced_meanwhile_is_not_given_up(path, tmp_path):
    """Who finds the old one damaged finds another under its path, and leaves that alone."""
    index, other = CacheIndex(path), CacheIndex(str(tmp_path / "other" / "index.sqlite"))
    with index.writing() as rows:
        rows.put("a", 10, 1.0)
    with other.writing() as rows:
        rows.put("b", 20, 1.0)
    other.close()
    with pytest.raises(OSError), index.writing():
        os.remove(path)
        os.rename(tmp_path / "other" / "index.sqlite", path)
        raise sqlite3.DatabaseError("damaged")
    with index.writing() as rows:
        assert content(rows) == [("b", 20)]
    index.close()


DAMAGES = {
    "no state": "DELETE FROM state",
    "text for a number": "UPDATE state SET bytes = 'many'",
    "a number for a time": "UPDATE file SET used = 'yesterday'",
    "bytes for a name": "UPDATE file SET name = x'ff'",
    "a table less": "DROP TABLE directory",
    "a column less": "ALTER TABLE file DROP COLUMN placed",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_that_sqlite_does_not_see_is_damage(path, damage):
    """The index is made anew; the error is an OSError, which all that call are ready for."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.add([("abc/1", 10, 1.0)])
        rows.is_complete = True
    index.close()
    connection = sqlite3.connect(path)
    connection.execute(DAMAGES[damage])
    connection.commit()
    connection.close()
    with pytest.raises(OSError), index.writing() as rows:
        rows.put("abc/2", 10, 1.0)
        list(rows.by_use())
        rows.directories()
    with index.writing() as rows:
        assert not rows.is_complete
    index.close()


def test_lock_does_not_depend_on_the_index(path):
    """One that is removed by hand, alone or with its journal, does not let two in at once."""
    index, other = CacheIndex(path), CacheIndex(path)
    for suffixes in ([""], ["", "-journal"]):
        with other.writing() as rows:
            rows.put("a", 1, 1.0)
        entered = threading.Event()

        def second(entered=entered):
            with other.writing():
                entered.set()

        with index.writing():
            for suffix in suffixes:
                os.remove(path + suffix)
            thread = threading.Thread(target=second)
            thread.start()
            assert not entered.wait(0.3)
        thread.join(20)
        assert entered.is_set()
    index.close()
    other.close()


def test_fork_waits_for_the_change_of_another_thread(path):
    """The lock of that thread does not exist in the child, nor does half of its change."""
    index = CacheIndex(path)
    inside, may_end = threading.Event(), threading.Event()

    def change():
        with index.writing() as rows:
            rows.put("a", 10, 1.0)
            inside.set()
            assert may_end.wait(30)

    thread = threading.Thread(target=change)
    thread.start()
    assert inside.wait(10)

    def child():
        with index.writing() as rows:
            assert rows.total == 10
        index.close()

    timer = threading.Timer(1, may_end.set)
    timer.start()
    try:
        in_child(child, seconds=6)
    finally:
        may_end.set()
        thread.join(30)
        timer.join()
    index.close()


def test_fork_does_not_wait_for_another_process(path, monkeypatch):
    """A thread that waits for the directory holds nothing that a fork needs."""
    monkeypatch.setattr("zodb_s3blobs.directorylock.BUSY_TIMEOUT", 5.0)
    index, other = CacheIndex(path), CacheIndex(path)
    waits = threading.Event()
    errors = []

    def wait():
        waits.set()
        try:
            with index.writing():
                pass
        except DirectoryBusy as error:
            errors.append(error)

    with other.writing():
        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(10)
        # Not a fork: that would wait for this very thread, which holds the other one.
        index.before_fork()
        index.after_fork()
        assert thread.is_alive()
    thread.join(20)
    assert errors == []
    index.close()
    other.close()


def test_damage_is_found_when_all_is_read(path):
    """And the next use finds a new index."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.add([(f"{number:05}", 1, 1.0) for number in range(5000)])
    index.verify()
    with index.writing() as rows:
        assert rows.total == 5000
    index.close()
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) - 8192)
        file.write(b"\x5a" * 4096)
    index.verify()
    with index.writing() as rows:
        assert (rows.total, rows.is_complete) == (0, False)
    index.close()


def test_index_that_disagrees_with_itself_is_damaged(path):
    """Single pages may be lost with the power: what a look-up does not find is never evicted."""
    index = CacheIndex(path)
    with index.writing() as rows:
        rows.add([(f"{number:05}", 10, float(number)) for number in range(1000)])
    index.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("DELETE FROM sqlite_master WHERE name = 'file_used'")
    connection.commit()
    connection.close()
    connection = sqlite3.connect(path)
    connection.execute("INSERT INTO file VALUES ('x', 5, 1.0, 1)")
    connection.commit()
    connection.close()
    index.verify()
    with index.writing() as rows:
        assert not rows.is_complete
    index.close()


def test_interrupted_verification_leaves_nothing_open(path, monkeypatch):
    """The next change begins as if there had been none, here and elsewhere."""
    index, other = CacheIndex(path), CacheIndex(path)
    with index.writing() as rows:
        rows.is_complete = True

    class Interrupted:
        """A connection whose check is interrupted."""

        def __init__(self, *args, **options):
            self._real = connect(*args, **options)

        def __getattr__(self, name):
            return getattr(self._real, name)

        def execute(self, statement, *args):
            if "check" in statement:
                raise KeyboardInterrupt
            return self._real.execute(statement, *args)

    connect = sqlite3.connect
    index.close()
    monkeypatch.setattr(sqlite3, "connect", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.verify()
    monkeypatch.setattr(sqlite3, "connect", connect)
    for each in (other, index):
        with each.writing() as rows:
            assert rows.is_complete
    index.close()
    other.close()


def test_path_that_cannot_be_opened_is_an_os_error(tmp_path):
    """The message names the file; SQLite's errors do not leave the index."""
    (tmp_path / "nowhere").write_text("a file where a directory should be")
    index = CacheIndex(str(tmp_path / "nowhere" / "index.sqlite"))
    with pytest.raises(OSError, match="nowhere"), index.writing():
        pass


@pytest.mark.parametrize("lock", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def test_opening_waits_for_somebody_who_looks_into_the_index(path, lock):
    """SQLite refuses at once to change the journal of a database that is being written."""
    CacheIndex(path).verify()
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute(lock)
    timer = threading.Timer(0.3, other.execute, ["COMMIT"])
    timer.start()
    index = CacheIndex(path)
    try:
        with index.writing() as rows:
            assert rows.total == 0
    finally:
        timer.join()
        other.close()
        index.close()


def test_two_threads_that_fork_at_once_leave_the_index_usable(tmp_path):
    """Each fork holds all indexes, and gives back those that it holds."""
    index = CacheIndex(str(tmp_path / "index.sqlite"))

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
