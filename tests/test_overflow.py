"""What is kept beside the cache stays for a while, and no longer."""

import os
import threading

import pytest

from zodb_s3blobs import overflow
from zodb_s3blobs.overflow import Overflow

from .faults import in_child
from .storages import Gate
from .storages import start


class Clock:
    """Tells the time that was set."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def kept(clock, monkeypatch):
    """An empty overflow that keeps 10 bytes for 60 seconds."""
    monkeypatch.setattr(overflow, "KEPT_BYTES", 10)
    monkeypatch.setattr(overflow, "KEPT_SECONDS", 60.0)
    kept = Overflow(clock)
    yield kept
    kept.clear()


@pytest.fixture
def write(tmp_path):
    """Return a function that makes a file of some bytes and returns its path."""

    def write(name, size=4):
        (tmp_path / name).write_bytes(b"x" * size)
        return str(tmp_path / name)

    return write


def test_kept_file_is_got_under_its_name(kept, write):
    """Where it was: it is not moved."""
    path = write("a")
    assert kept.keep("name", path) == path
    assert kept.get("name") == path
    assert os.path.getsize(path) == 4


def test_unknown_name_is_none(kept, write):
    """As in the cache."""
    kept.keep("name", write("a"))
    assert kept.get("other") is None


def test_newest_is_kept_whatever_its_size(kept, write):
    """Somebody is about to open it, however large it is."""
    path = kept.keep("name", write("a", 1000))
    kept.expire()
    assert kept.get("name") == path


def test_older_ones_make_room_for_one_that_is_larger_than_all(kept, write):
    """What is kept beside the newest is bounded."""
    first, second = kept.keep("a", write("a", 6)), kept.keep("b", write("b", 6))
    newest = kept.keep("c", write("c", 1000))
    assert [os.path.exists(path) for path in (first, second, newest)] == [False, False, True]
    assert [kept.get(name) for name in "abc"] == [None, None, newest]


def test_files_within_the_limit_stay(kept, write):
    """A reader may open its path again."""
    paths = [kept.keep(name, write(name, 4)) for name in "ab"]
    assert [kept.get(name) for name in "ab"] == paths


def test_oldest_goes_when_there_are_too_many_bytes(kept, write):
    """In the order in which they came."""
    paths = [kept.keep(name, write(name, 6)) for name in "abc"]
    assert kept.get("a") is None
    assert not os.path.exists(paths[0])
    assert kept.get("c") == paths[2]


def test_empty_files_count_nothing(kept, write):
    """Their number is bounded by time alone."""
    for number in range(100):
        kept.keep(str(number), write(str(number), 0))
    assert all(kept.get(str(number)) for number in range(100))


@pytest.mark.parametrize("happens", ["expire", "keep"])
def test_file_goes_when_its_time_is_over(kept, write, clock, happens):
    """With the next file, or when somebody asks for it."""
    path = kept.keep("a", write("a", 1))
    clock.time += 60
    kept.expire()
    assert kept.get("a") == path
    clock.time += 1
    if happens == "expire":
        kept.expire()
    else:
        kept.keep("b", write("b", 1))
    assert kept.get("a") is None
    assert not os.path.exists(path)


def test_files_that_are_younger_stay_when_an_older_one_goes(kept, write, clock):
    """Each has its own time."""
    kept.keep("a", write("a", 1))
    clock.time += 40
    path = kept.keep("b", write("b", 1))
    clock.time += 40
    kept.expire()
    assert [kept.get("a"), kept.get("b")] == [None, path]


def test_file_that_somebody_has_removed_is_none(kept, write):
    """An operator may delete anything at any time; what follows does not mind."""
    os.remove(kept.keep("a", write("a")))
    assert kept.get("a") is None
    kept.expire()
    path = kept.keep("a", write("again"))
    assert kept.get("a") == path
    os.remove(path)
    kept.clear()


def test_file_that_cannot_be_removed_does_not_raise(kept, write, clock, tmp_path):
    """A disk that became read-only."""
    (tmp_path / "closed").mkdir()
    path = kept.keep("a", write("closed/a"))
    os.chmod(tmp_path / "closed", 0o500)
    try:
        clock.time += 61
        kept.expire()
        assert kept.get("a") is None
    finally:
        os.chmod(tmp_path / "closed", 0o700)
    assert kept.keep("a", path) == path


def test_clear_removes_all(kept, write):
    """As when the storage is closed; it can be used again after that."""
    paths = [kept.keep(name, write(name)) for name in "ab"]
    kept.clear()
    assert [kept.get(name) for name in "ab"] == [None, None]
    assert not any(map(os.path.exists, paths))
    kept.clear()
    assert kept.keep("a", write("c")) == kept.get("a")


def test_file_kept_under_the_same_name_takes_the_place_of_the_other(kept, write):
    """It counts once, and is the newest."""
    first = kept.keep("a", write("a", 4))
    kept.keep("b", write("b", 4))
    again = kept.keep("a", write("c", 6))
    assert kept.get("a") == again
    assert kept.get("b")
    assert not os.path.exists(first)
    kept.keep("d", write("d", 4))
    assert kept.get("a") == again
    assert kept.get("b") is None


def test_missing_file_is_an_error_and_keeps_what_there_was(kept, write, tmp_path):
    """Nobody loses a file to one that is not there."""
    path = kept.keep("a", write("a"))
    with pytest.raises(FileNotFoundError):
        kept.keep("a", f"{tmp_path}/none")
    assert kept.get("a") == path


def test_threads_share_it(kept, write):
    """Each gets its own file or none, and the limit holds in the end."""
    wrong = []

    def work(number):
        for turn in range(100):
            name = f"{number}-{turn % 5}"
            path = kept.keep(name, write(f"{name}-{turn}", turn % 7))
            if kept.get(name) not in (path, None):
                wrong.append(name)
            kept.expire()

    for thread in [start(work, number) for number in range(4)]:
        thread.result()
    assert wrong == []


def test_child_does_not_see_what_its_parent_has_removed(kept, write):
    """If it knows the names at all, then as of the fork."""
    path = kept.keep("a", write("a"))

    def child():
        assert kept.get("a") in (path, None)
        os.remove(path)  # as the parent does, of which it knows nothing
        assert kept.get("a") is None

    in_child(child)
    assert kept.get("a") is None


def test_child_that_ends_leaves_its_parent_s_files(kept, write, clock):
    """A worker that closes its storage takes nothing from those that go on."""
    path = kept.keep("a", write("a"))

    def child():
        clock.time += 61
        kept.expire()
        kept.clear()

    in_child(child)
    assert kept.get("a") == path


def test_child_forked_while_another_thread_keeps_a_file_goes_on(write):
    """The thread that holds the lock does not exist in the child."""
    gate, is_held = Gate(), threading.Event()

    def clock():
        if is_held.is_set():
            gate()
        return 1000.0

    kept = Overflow(clock)
    is_held.set()
    thread = start(kept.keep, "a", write("a"))
    gate.wait()

    def child():
        is_held.clear()
        path = kept.keep("b", write("b"))
        assert kept.get("b") == path
        kept.clear()

    try:
        in_child(child, seconds=5)
    finally:
        is_held.clear()
        gate.open()
        thread.result()
    assert kept.get("a")
    kept.clear()
