"""Temporary files are there for as long as a process that may want them, and no longer."""

import fcntl
import gc
import os
from pathlib import Path
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time

import pytest

from zodb_s3blobs import tempdirs
from zodb_s3blobs.singleflight import SingleFlight
from zodb_s3blobs.tempdirs import remove_old
from zodb_s3blobs.tempdirs import TempDirectory
from zodb_s3blobs.tempdirs import TempFiles

from .faults import in_child
from .storages import Gate
from .storages import start
from .storages import Thread


@pytest.fixture
def parent(tmp_path):
    """The directory that the processes' own are in."""
    (tmp_path / "process").mkdir()
    return str(tmp_path / "process")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """The system's place for temporary files, of this test alone."""
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    return tmp_path / "system"


@pytest.fixture
def place(system):
    """What is ours of the system's place; not made yet."""
    return system / f"zodb-s3blobs-{os.getuid()}"


@pytest.fixture
def ended(parent):
    """Return a function that makes the directory of a process that was killed since."""

    def ended():
        child = Child(f"write(TempDirectory({parent!r}))")
        child.kill()
        return child.paths[0]

    return ended


class Child:
    """A process that has done something, said which paths it made, and waits.

    :param str code: `write(directory)` makes a file and says its path.
    """

    BEGIN = """
import os, sys
from zodb_s3blobs.tempdirs import TempDirectory, TempFiles
def say(text):
    os.write(1, f"{text}\\n".encode())
def write(directory):
    path = directory.file()
    open(path, "xb").close()
    say(path)
"""

    def __init__(self, code, system=None):
        environment = os.environ | ({"TMPDIR": str(system)} if system else {})
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{self.BEGIN}\n{code}\nsay('ready')\nsys.stdin.readline()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.paths = []
        self.wait()

    def wait(self):
        """Wait until it is ready; what it said before are paths."""
        while (line := self.process.stdout.readline().strip()) != "ready":
            assert line, "the child died"
            self.paths.append(line)

    def go_on(self):
        """Let the statement after the next "sys.stdin.readline()" begin."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self):
        """Let it end as a process does that has nothing more to do."""
        self.process.stdin.close()
        assert self.process.wait(30) == 0
        self.process.stdout.close()

    def kill(self):
        """Kill it, but not what it has forked."""
        self.process.kill()
        self.process.wait(30)
        self.process.stdin.close()
        self.process.stdout.close()


def made(parent):
    """Return a directory that is there already."""
    directory = TempDirectory(parent)
    directory.file()
    return directory


def write(directory):
    """Return the path of a new file."""
    path = directory.file()
    open(path, "xb").close()
    return path


def remove_dead(parent):
    """Clean up as a process does that has nothing there itself."""
    TempDirectory(parent).remove_dead()


def content(directory):
    """Return the names in a directory."""
    return sorted(os.listdir(directory))


# One process


def test_directory_is_the_user_s_alone_and_has_a_lock_beside_it(parent):
    """Whatever the umask: blobs may be confidential."""
    before = os.umask(0o022)
    try:
        directory = made(parent)
    finally:
        os.umask(before)
    name = os.path.basename(directory.path)
    assert content(parent) == [name, f"{name}.lock"]
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(f"{directory.path}.lock").st_mode) == 0o600


def test_directory_is_made_when_it_is_needed_with_its_parents(tmp_path):
    """Not before: many a process never has a temporary file."""
    directory = TempDirectory(f"{tmp_path}/cache/process")
    directory.remove_dead()
    assert content(tmp_path) == []
    path = directory.file()
    assert os.path.dirname(path) == directory.path
    assert os.path.dirname(directory.path) == f"{tmp_path}/cache/process"
    assert stat.S_IMODE(os.stat(f"{tmp_path}/cache/process").st_mode) == 0o700
    assert os.path.isdir(directory.path)


def test_names_differ_and_nothing_is_there_yet(parent):
    """Also those of two directories of one process."""
    directories = [TempDirectory(parent) for _ in range(2)]
    paths = [directory.file() for directory in directories for _ in range(100)]
    assert len(set(paths)) == 200
    assert not any(map(os.path.exists, paths))
    assert {os.path.dirname(path) for path in paths} == {each.path for each in directories}


def test_directory_of_this_process_stays(parent):
    """Whoever opens the cache again in the same process removes nothing."""
    directory = TempDirectory(parent)
    path = write(directory)
    remove_dead(parent)
    assert os.path.exists(path)


def test_nothing_is_left_of_an_empty_directory_that_nobody_has(parent):
    """As of a cache that was closed and forgotten."""
    directory = TempDirectory(parent)
    directory.file()
    del directory
    gc.collect()
    assert content(parent) == []


def test_files_in_use_outlive_the_object_until_somebody_cleans_up(parent):
    """A blob that was not committed yet may still be written."""
    path = write(TempDirectory(parent))
    gc.collect()
    assert os.path.exists(path)
    remove_dead(parent)
    assert content(parent) == []


def remove_directory(path):
    os.rmdir(path)


def remove_lock(path):
    os.remove(f"{path}.lock")


def remove_both(path):
    remove_lock(path)
    remove_directory(path)


def remove_parent(path):
    remove_both(path)
    os.rmdir(os.path.dirname(path))


def remove_cache(path):
    remove_parent(path)
    os.rmdir(os.path.dirname(os.path.dirname(path)))


REMOVALS = [remove_directory, remove_lock, remove_both, remove_parent, remove_cache]


@pytest.mark.parametrize("remove", REMOVALS)
def test_directory_and_lock_are_made_again(tmp_path, remove):
    """An operator may delete anything; what is made anew is kept from those who clean up."""
    directory = made(f"{tmp_path}/cache/process")
    remove(directory.path)
    for _ in range(2):
        path = write(directory)
        in_child(lambda: remove_dead(os.path.dirname(directory.path)))
        assert os.path.exists(path)
    assert stat.S_IMODE(os.stat(directory.path).st_mode) == 0o700


@pytest.mark.parametrize("remove", REMOVALS)
def test_directory_made_again_goes_with_its_process(tmp_path, remove):
    """It is like the first one, whoever cleans up."""
    parent = f"{tmp_path}/cache/process"
    child = Child(
        f"directory = TempDirectory({parent!r}); directory.file()\n"
        "say(directory.path); say('ready')\n"
        "sys.stdin.readline(); write(directory)"
    )
    remove(child.paths[0])
    child.go_on()
    child.wait()
    child.kill()
    assert os.path.exists(child.paths[1])
    remove_dead(parent)
    assert content(parent) == []


def test_threads_that_find_it_missing_make_it_once(parent):
    """All of them can write, and the lock is held."""
    directory = made(parent)
    remove_both(directory.path)
    threads = [start(write, directory) for _ in range(8)]
    paths = [thread.result() for thread in threads]
    in_child(lambda: remove_dead(parent))
    assert all(map(os.path.exists, paths))


def test_child_forked_while_another_thread_makes_the_directory_again_goes_on(parent, monkeypatch):
    """The thread that holds the lock does not exist in the child."""
    directory = made(parent)
    remove_both(directory.path)
    gate, make = Gate(), tempdirs.make_private

    def slow(*args, **kw):
        gate()
        return make(*args, **kw)

    monkeypatch.setattr(tempdirs, "make_private", slow)
    thread = start(write, directory)
    gate.wait()
    monkeypatch.undo()
    try:
        in_child(lambda: write(directory), seconds=5)
    finally:
        gate.open()
        thread.result()


# Other processes


@pytest.mark.parametrize("stopped", [False, True])
def test_directory_of_a_living_process_stays(parent, stopped):
    """It may be in the middle of a download; and one that was stopped may go on."""
    child = Child(f"directory = TempDirectory({parent!r}); write(directory)")
    try:
        if stopped:
            child.process.send_signal(signal.SIGSTOP)
            os.waitpid(child.process.pid, os.WUNTRACED)
        remove_dead(parent)
        assert os.path.exists(child.paths[0])
    finally:
        child.kill()


def test_directory_of_a_killed_process_goes(parent, ended):
    """With all that is in it; that of this process stays."""
    mine = made(parent)
    ended()
    assert len(content(parent)) == 4
    remove_dead(parent)
    name = os.path.basename(mine.path)
    assert content(parent) == [name, f"{name}.lock"]


def test_files_of_a_process_that_ended_normally_go(parent):
    """What it still had is of no use to anybody."""
    child = Child(f"directory = TempDirectory({parent!r}); write(directory)")
    child.end()
    remove_dead(parent)
    assert content(parent) == []


def test_process_that_ends_normally_leaves_nothing_where_it_had_no_files(parent):
    """Nobody needs to come by."""
    child = Child(f"directory = TempDirectory({parent!r}); directory.file()")
    child.end()
    assert content(parent) == []


FORK = """
directory = TempDirectory({parent!r})
write(directory)
if os.fork():
    {ending}
write(directory)
"""
ENDINGS = {
    "normally": "sys.exit()",
    "at once": "os._exit(0)",
    "by a signal": "os.kill(os.getpid(), 9)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_child_s_files_stay_after_its_parent_has_ended(parent, ending):
    """As when a server makes itself a daemon; those of both go with the child."""
    child = Child(FORK.format(parent=parent, ending=ENDINGS[ending]))
    child.process.wait(30)
    remove_dead(parent)
    assert all(map(os.path.exists, child.paths))
    os.kill(int(os.path.basename(child.paths[1]).partition("-")[0]), signal.SIGKILL)
    # It holds the other end of its output until it is dead.
    assert child.process.stdout.read() == ""
    child.kill()
    remove_dead(parent)
    assert content(parent) == []


def test_child_of_a_parent_that_left_nothing_goes_on(parent):
    """The parent's end takes an empty directory away; the child makes it again, and keeps it."""
    code = f"""
directory = TempDirectory({parent!r})
directory.file()
if os.fork():
    sys.exit()
say("ready")
sys.stdin.readline()
write(directory)
"""
    child = Child(code)
    child.process.wait(30)
    assert content(parent) == []
    child.go_on()
    child.wait()
    remove_dead(parent)
    assert os.path.exists(child.paths[0])
    child.process.stdin.close()
    assert child.process.stdout.read() == ""
    child.process.stdout.close()
    remove_dead(parent)
    assert content(parent) == []


def test_parent_s_files_stay_when_its_child_ends(parent):
    """Normally, too: what the child has is the parent's."""
    directory = TempDirectory(parent)
    path = write(directory)
    in_child(lambda: write(directory))
    remove_dead(parent)
    assert os.path.exists(path)
    child = Child(
        f"directory = TempDirectory({parent!r}); write(directory)\n"
        "if not os.fork(): sys.exit()\n"
        "os.wait()"
    )
    try:
        remove_dead(parent)
        assert os.path.exists(child.paths[0])
        assert os.path.exists(path)
    finally:
        child.kill()


def test_parent_s_files_stay_when_a_child_that_made_the_directory_again_ends(parent):
    """After an operator has removed it; the parent has found it there and written to it."""
    directory = made(parent)
    remove_both(directory.path)
    in_child(lambda: write(directory))
    path = write(directory)
    in_child(lambda: remove_dead(parent))
    assert os.path.exists(path)


def test_directory_of_a_process_in_another_container_stays(parent):
    """Its number says nothing: it may be anybody's, or nobody's, here."""
    child = Child(f"os.getpid = lambda: 1\ndirectory = TempDirectory({parent!r}); write(directory)")
    try:
        assert os.path.basename(child.paths[0]).startswith("1-")
        remove_dead(parent)
        assert os.path.exists(child.paths[0])
    finally:
        child.kill()


# Cleaning up


def test_processes_that_clean_up_at_once_do_not_mind_each_other(parent, ended):
    """All instances of a site start together after a crash."""
    living = TempDirectory(parent)
    path = write(living)
    dead = Path(ended()).parent
    for number in range(300):
        (dead.parent / f"{number}-dead").mkdir()
        (dead.parent / f"{number}-dead" / "file").touch()
        (dead.parent / f"{number}-dead.lock").touch()
    for thread in [start(in_child, lambda: remove_dead(parent)) for _ in range(3)]:
        thread.result()
    name = os.path.basename(living.path)
    assert content(parent) == [name, f"{name}.lock"]
    assert os.path.exists(path)


def test_processes_that_begin_while_others_clean_up_keep_their_files(parent):
    """Between the making of a lock and its taking somebody may come by."""

    def begin():
        for _ in range(300):
            directory = TempDirectory(parent)
            path = write(directory)
            assert os.path.exists(path)
            os.remove(path)

    def clean_up():
        for _ in range(1000):
            remove_dead(parent)

    work = [begin, begin, clean_up, clean_up]
    for thread in [start(in_child, function, 40) for function in work]:
        thread.result()


def test_cleaner_that_was_slow_takes_nothing_from_a_process_that_has_begun(parent, monkeypatch):
    """It has opened a lock that nobody had yet, and another cleaner has removed that since."""
    flock, gate, threads = fcntl.flock, Gate(), []

    def slow(file, operation):
        if operation & fcntl.LOCK_EX and threading.current_thread() in threads:
            gate()
        if operation & fcntl.LOCK_SH and not threads:
            threads.append(Thread(remove_dead, parent))
            threads[0].start()
            gate.wait()
            remove_dead(parent)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", slow)
    directory = TempDirectory(parent)
    path = write(directory)
    gate.open()
    threads[0].result()
    assert os.path.exists(path)


@pytest.mark.parametrize("what", ["directory", "lock", "parent"])
def test_what_cannot_be_removed_does_not_raise(parent, ended, what):
    """It is another user's, or on a read-only disk: others are removed all the same."""
    refused = Path(ended()).parent
    if what == "directory":
        closed, mode = refused, 0o500
    elif what == "lock":
        closed, mode = Path(f"{refused}.lock"), 0o000
    else:
        closed, mode = Path(parent), 0o500
    os.chmod(closed, mode)
    try:
        other = Path(ended()).parent if what != "parent" else None
        remove_dead(parent)
        assert other is None or not other.exists()
        assert refused.exists()
    finally:
        os.chmod(closed, 0o700)


def later(monkeypatch, seconds):
    """Let the time be some seconds later for those who clean up."""
    now = time.time
    monkeypatch.setattr(tempdirs.time, "time", lambda: now() + seconds)


def test_foreign_files_go_after_a_week(parent, monkeypatch):
    """Such as uncommitted ones of a process that was killed: nobody can tell whose they are."""
    Path(parent, "BUC123").touch()
    Path(parent, "savepoints").mkdir()
    Path(parent, "savepoints", "file").touch()
    directory = TempDirectory(parent)
    path = write(directory)
    with monkeypatch.context() as patch:
        later(patch, 7 * 86400 - 3600)
        remove_dead(parent)
    assert len(content(parent)) == 4
    with monkeypatch.context() as patch:
        later(patch, 7 * 86400 + 3600)
        remove_dead(parent)
    name = os.path.basename(directory.path)
    assert content(parent) == [name, f"{name}.lock"]
    assert os.path.exists(path)


def test_remove_old_spares_what_is_young_or_has_a_lock(parent, ended, monkeypatch):
    """Also the lock of a dead process: it goes with its directory, by whoever looks at locks."""
    living = made(parent)
    ended()
    before = content(parent)
    Path(parent, "old").touch()
    os.symlink(living.path, f"{parent}/link")
    for seconds, left in [(7 * 86400 - 3600, ["link", "old"]), (7 * 86400 + 3600, [])]:
        with monkeypatch.context() as patch:
            later(patch, seconds)
            remove_old(parent)
        assert content(parent) == sorted(before + left)
    remove_old(f"{parent}/missing")


def test_old_file_that_was_just_moved_here_stays(parent, tmp_path):
    """As consumeFile moves one: its own time may be that of last year."""
    (tmp_path / "consumed").touch()
    os.utime(tmp_path / "consumed", (1e9, 1e9))
    os.rename(tmp_path / "consumed", f"{parent}/BUC123")
    remove_dead(parent)
    assert content(parent) == ["BUC123"]


def test_foreign_file_that_cannot_be_removed_does_not_raise(parent, monkeypatch):
    """The next one goes all the same."""
    Path(parent, "closed").mkdir()
    Path(parent, "closed", "file").touch()
    Path(parent, "other").touch()
    os.chmod(f"{parent}/closed", 0o500)
    try:
        later(monkeypatch, 8 * 86400)
        remove_dead(parent)
        assert content(parent) == ["closed"]
    finally:
        os.chmod(f"{parent}/closed", 0o700)


# In the system's place


@pytest.fixture(params=["a file", "not writable", "below a file"])
def impossible(request, tmp_path):
    """A parent where nothing can be made."""
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(0o500)
    yield str(
        tmp_path
        / {"a file": "file", "not writable": "closed", "below a file": "file/process"}[
            request.param
        ]
    )
    os.chmod(tmp_path / "closed", 0o700)


def test_files_are_below_the_parent_where_they_can_be(parent, place):
    """And elsewhere only where that is asked for."""
    files = TempFiles(parent)
    assert Path(write(files)).parent.parent == Path(parent)
    assert not place.exists()
    assert Path(write(files)).parent == Path(write(files)).parent
    assert Path(write_elsewhere(files)).parent.parent == place
    assert Path(write(files)).parent.parent == Path(parent)


def write_elsewhere(files):
    path = files.elsewhere()
    open(path, "xb").close()
    return path


def test_files_go_to_the_system_s_place_where_they_must(impossible, place):
    """There they are the user's alone, too, and have a lock; an empty directory goes with us."""
    files = TempFiles(impossible)
    path = Path(write(files))
    assert path.parent.parent == place
    assert Path(write(files)).parent == path.parent
    assert content(place) == [path.parent.name, f"{path.parent.name}.lock"]
    assert {stat.S_IMODE(each.stat().st_mode) for each in (place, path.parent)} == {0o700}
    for each in path.parent.iterdir():
        each.unlink()
    del files
    gc.collect()
    assert content(place) == []


def test_parent_is_tried_again(parent, place):
    """When an operator has put right what was wrong with it."""
    files = TempFiles(parent)
    for _ in range(2):
        os.chmod(parent, 0o500)
        assert Path(write(files)).parent.parent == place
        os.chmod(parent, 0o700)
        path = Path(write(files))
        assert path.parent.parent == Path(parent)
        path.unlink()
        remove_both(str(path.parent))


def test_directory_that_cannot_be_written_to_is_noticed(parent, place):
    """Whoever asks for a path is told, not whoever opens it; when it is well again, it is used."""
    files = TempFiles(parent)
    directory = os.path.dirname(files.file())
    os.chmod(directory, 0o500)
    assert Path(write(files)).parent.parent == place
    os.chmod(directory, 0o700)
    assert os.path.dirname(write(files)) == directory
    alone = made(parent)
    os.chmod(alone.path, 0o500)
    with pytest.raises(PermissionError):
        alone.file()


@pytest.mark.parametrize("remove", REMOVALS[:-1])
def test_directory_in_the_system_s_place_is_made_again(impossible, place, remove):
    """Systems clean up there, too."""
    files = TempFiles(impossible)
    directory = os.path.dirname(files.file())
    remove(directory)
    path = write(files)
    in_child(TempFiles(impossible).remove_dead)
    assert os.path.exists(path)
    assert {stat.S_IMODE(os.stat(each).st_mode) for each in (place, directory)} == {0o700}


def test_system_s_place_that_cannot_be_used_is_an_os_error(impossible, system):
    """Then nothing can be written anywhere; when it is well again, so are we."""
    files = TempFiles(impossible)
    os.chmod(system, 0o500)
    for call in [files.file, files.elsewhere, TempFiles(impossible).file]:
        with pytest.raises(OSError):
            call()
    files.remove_dead()
    os.chmod(system, 0o700)
    write(files)
    write(TempFiles(impossible))


def test_no_place_of_the_system_is_an_os_error(parent, monkeypatch):
    """Python has looked for one, and nothing was writable."""

    def missing():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", missing)
    files = TempFiles(parent)
    with pytest.raises(OSError):
        files.elsewhere()
    files.remove_dead()
    write(files)


@pytest.mark.parametrize("what", ["another user's", "readable", "searchable", "a link", "a file"])
def test_what_others_could_have_made_in_the_system_s_place_is_refused(
    impossible, system, monkeypatch, what
):
    """They could read confidential blobs, or have us remove something."""
    uid = os.getuid() + (what == "another user's")
    monkeypatch.setattr(os, "getuid", lambda: uid)
    place, target = system / f"zodb-s3blobs-{uid}", system / "target"
    target.mkdir(0o700)
    if what == "a file":
        place.touch(0o600)
    elif what == "a link":
        place.symlink_to(target)
    else:
        place.mkdir()
        place.chmod({"readable": 0o740, "searchable": 0o701}.get(what, 0o700))
        target = place
    (target / "1-dead").mkdir()
    (target / "1-dead.lock").touch()
    files = TempFiles(impossible)
    for call in [files.file, files.elsewhere, TempDirectory(str(place), True).remove_dead]:
        with pytest.raises(OSError):
            call()
    files.remove_dead()
    assert content(target) == ["1-dead", "1-dead.lock"]


def test_lock_of_a_directory_that_could_not_be_made_is_nobody_s(parent, place, monkeypatch):
    """The disk failed between the two: the next who cleans up takes it away."""
    mkdir = os.mkdir

    def refuse(path, *args, **kw):
        if os.path.dirname(path) == parent:
            raise OSError(5, "Input/output error", path)
        return mkdir(path, *args, **kw)

    files = TempFiles(parent)
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        assert Path(write(files)).parent.parent == place
    remove_dead(parent)
    assert content(parent) == []


def descriptors():
    """Return how many are open."""
    return len(os.listdir("/proc/self/fd"))


def test_directory_that_cannot_be_made_again_keeps_no_descriptors(parent, place):
    """Each file goes elsewhere, and a server runs for months."""
    files = TempFiles(parent)
    os.rmdir(os.path.dirname(files.file()))
    write_elsewhere(files)
    os.chmod(parent, 0o500)
    try:
        before = descriptors()
        for _ in range(20):
            assert Path(files.file()).parent.parent == place
        assert descriptors() == before
    finally:
        os.chmod(parent, 0o700)


def test_descriptor_that_a_daemon_has_closed_is_had_again_once(parent):
    """It closes all that it does not know when it begins."""
    files = TempFiles(parent)
    lock_file = f"{os.path.dirname(write(files))}.lock"
    (lock,) = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if os.path.realpath(f"/proc/self/fd/{name}") == lock_file
    ]
    os.close(lock)
    count = descriptors()
    paths = [write(files) for _ in range(5)]
    assert descriptors() <= count + 1
    remove_dead(parent)
    assert all(os.path.exists(path) for path in paths)


def test_number_that_a_daemon_has_given_to_another_file_stays_that_file_s(parent):
    """A database's lock, perhaps: whoever ends closes only what is still its own."""
    files = TempFiles(parent)
    lock_file = f"{os.path.dirname(write(files))}.lock"
    flight = SingleFlight(os.path.join(parent, "flight"))
    flight.begin("name")
    with open(os.devnull, "rb") as other:
        taken = [
            int(name)
            for name in os.listdir("/proc/self/fd")
            if os.path.realpath(f"/proc/self/fd/{name}") in (lock_file, f"{parent}/flight")
        ]
        for number in taken:
            os.dup2(other.fileno(), number)
    assert len(taken) == 2
    flight.close()
    del files
    gc.collect()
    for number in taken:
        os.close(number)  # or it would be an error


@pytest.mark.parametrize("ending", ["by a signal", "normally"])
def test_next_process_removes_what_one_has_left_in_either_place(parent, place, ending):
    """But nothing while that lives; our own stays."""
    child = Child(
        f"files = TempFiles({parent!r}); write(files)\n"
        f"elsewhere = TempFiles({__file__!r}); write(elsewhere)",
        place.parent,
    )
    files = TempFiles(parent)
    mine = [write(files), write_elsewhere(files)]
    assert [Path(path).parent.parent for path in child.paths] == [Path(parent), place]
    files.remove_dead()
    assert all(map(os.path.exists, child.paths + mine))
    child.kill() if ending == "by a signal" else child.end()
    assert all(map(os.path.exists, child.paths))
    files.remove_dead()
    assert not any(map(os.path.exists, child.paths))
    assert all(map(os.path.exists, mine))
    assert len(content(parent)) == len(content(place)) == 2


def test_normal_end_leaves_nothing_in_the_system_s_place_where_it_had_no_files(place):
    """Nobody needs to come by."""
    Child("files = TempFiles('/dev/null'); files.file()", place.parent).end()
    assert content(place) == []


def test_files_in_the_system_s_place_stay_while_parent_or_child_lives(place):
    """The child may end first, or go on after its parent's end."""
    first = "files = TempFiles('/dev/null'); write(files)\n"
    child = Child(f"{first}if not os.fork(): sys.exit()\nos.wait()", place.parent)
    daemon = Child(f"{first}if os.fork(): sys.exit()\nwrite(files)", place.parent)
    daemon.process.wait(30)
    files = TempFiles("/dev/null")
    files.remove_dead()
    assert all(map(os.path.exists, child.paths + daemon.paths))
    child.end()
    daemon.process.stdin.close()
    assert daemon.process.stdout.read() == ""
    daemon.process.stdout.close()
    files.remove_dead()
    assert content(place) == []
