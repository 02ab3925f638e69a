"""A process is killed at every point of a commit: what was committed is there, and only that."""

from functools import partial
import os
import signal
import subprocess
import sys
import time

import pytest
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.storage import S3BlobStorage

from .services.location import keys
from .services.location import S3Location
from .storages import HookedClient
from .storages import make_client
from .storages import open_db
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import take
from .storages import TcpProxy


MiB = 1 << 20
# Commits before the one that is killed
BEFORE = 2
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def contents(name, number, size):
    return f"{name} {number}\n".encode() + random_bytes((name, number), size)


# In the child


def child(point, size, directory, addressing, *location):
    """Commit in a loop; in the last round stand still at the point, and say so."""
    location = S3Location(*location)
    base = FileStorage(f"{directory}/Data.fs")
    options = {"multipart_threshold": 5 * MiB, "multipart_part_size": 5 * MiB}
    client = HookedClient(make_client(location, max_attempts=1, **options))
    cache = S3BlobCache(f"{directory}/cache")
    db = DB(S3BlobStorage(base, client, cache, addressing=addressing))
    with db.transaction() as conn:
        conn.root()["count"] = 0
        conn.root()["rewritten"] = Blob()
    for number in range(1, BEFORE + 2):
        if number > BEFORE:
            arrange(point, client, base)
            say("ready")
            sys.stdin.readline()
        commit(db, number, int(size))
        say(f"committed {number}")
    stand_still()


def commit(db, number, size):
    with db.transaction() as conn:
        root = conn.root()
        root["count"] = number
        root[f"new {number}"] = Blob(contents("new", number, size))
        with root["rewritten"].open("w") as file:
            file.write(contents("rewritten", number, size))


def arrange(point, client, base):
    """Make the next commit stand still at a call of the client or of the base."""
    begin, vote, finish = base.tpc_begin, base.tpc_vote, base.tpc_finish

    def pass_by(name, *args):
        if point == name:
            stand_still()

    def begin_slowly(*args):
        begin(*args)
        pass_by("begun")

    def vote_slowly(txn):
        pass_by("stored")
        return vote(txn)

    def finish_slowly(txn, f=None):
        def callback(tid):
            f(tid)
            pass_by("in finish")

        pass_by("voted")
        tid = finish(txn, callback)
        pass_by("base finished")
        return tid

    base.tpc_begin, base.tpc_vote, base.tpc_finish = begin_slowly, vote_slowly, finish_slowly
    client.before["upload_file"] = partial(pass_by, "staged")
    client.after["upload_file"] = partial(pass_by, "uploaded")


def say(line):
    # Several threads say something at once
    os.write(1, f"{line}\n".encode())


def stand_still(*args):
    say("reached")
    time.sleep(PATIENCE * 2)


# In the parent


class Victim:
    """The child process, which ends by SIGKILL."""

    def __init__(self, point, size, directory, location, addressing="auto"):
        arguments = point, str(size), str(directory), addressing
        arguments += location.endpoint_url, location.access_key, location.secret_key
        arguments += (location.bucket,)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from tests.test_crash import child; child(*{arguments!r})"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.committed = 0

    def wait_for(self, line):
        """Read what the child says until it says this."""
        for found in self._process.stdout:
            word, _, number = found.strip().partition(" ")
            if word == "committed":
                self.committed = int(number)
            if found.strip() == line:
                return
        raise AssertionError(f"the child ended before {line!r}")

    def go_on(self):
        """Let it begin its last commit, for which it is ready."""
        self._process.stdin.write("go on\n")
        self._process.stdin.flush()

    def kill(self):
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


@pytest.fixture
def victim():
    """Return a function that starts the `Victim`."""
    victims = []

    def make(*args):
        victims.append(Victim(*args))
        return victims[0]

    yield make
    for each in victims:
        each.kill()


def check_afterwards(location, directory, count, size, addressing="auto"):
    """Open with an empty cache, compare all blobs, commit once more, pack: only they remain.

    :param int count: the number of the last commit that must be there.
    """
    db = open_db(location, directory, cache="empty", addressing=addressing, gc_grace="0s")
    with db.transaction() as conn:
        root = conn.root()
        assert root["count"] == count
        assert sorted(name for name in root if name.startswith("new")) == [
            f"new {number}" for number in range(1, count + 1)
        ]
        for number in range(1, count + 1):
            assert read(root[f"new {number}"]) == contents("new", number, size)
        assert read(root["rewritten"]) == contents("rewritten", count, size)
        # It gets the oid of the killed transaction's; until then that is not known as ours
        root["after"] = Blob(b"after")
    db.pack(time.time() + 1)
    assert keys(location) == sorted(surviving(db))
    report = db.storage.sweep()
    assert (report.kept, report.listed) == (count + 2, count + 2)
    # The same site goes on in the cache directory of the one that was killed
    db.close()
    db = open_db(location, directory, addressing=addressing, gc_grace="0s")
    with db.transaction() as conn:
        assert read(conn.root()["rewritten"]) == contents("rewritten", count, size)
        conn.root()["rewritten"] = Blob(b"next")
    with db.transaction() as conn:
        assert read(conn.root()["rewritten"]) == b"next"
    db.close()
    cache = S3BlobCache(f"{directory}/cache")
    cache.check(fix=True)
    assert cache.check() == []
    cache.close()


def surviving(db):
    """Yield the keys of the blobs that the root refers to."""
    with db.transaction() as conn:
        for value in conn.root().values():
            if isinstance(value, Blob):
                value._p_activate()
                oid, tid = value._p_oid, value._p_serial
                yield blob_key(oid, read_reference(db.storage.loadSerial(oid, tid)) or tid)


both_addressings = pytest.mark.parametrize("addressing", ["tid", "record"])


@both_addressings
@pytest.mark.parametrize(
    ("point", "lost"),
    [
        ("staged", True),
        ("uploaded", True),
        ("begun", True),
        ("stored", True),
        ("voted", True),
        ("in finish", True),
        ("base finished", False),
        ("finished", False),
    ],
)
def test_kill_at_a_step_of_the_commit_leaves_all_or_nothing(
    s3, tmp_path, victim, point, lost, addressing
):
    """What the base has finished is there with its bytes, what it has not leaves no trace."""
    process = victim(point, 1000, tmp_path, s3, addressing)
    process.wait_for("ready")
    process.go_on()
    process.wait_for("reached")
    process.kill()
    assert process.committed == BEFORE + (point == "finished")
    check_afterwards(s3, tmp_path, BEFORE + (not lost), 1000, addressing)


def is_put_after(count):
    """Match when so many bytes have gone up since the first match of a PUT."""
    seen = 0

    def matches(direction, chunk):
        nonlocal seen
        if direction == "up":
            seen += len(chunk)
        return seen > count

    return matches


@both_addressings
@pytest.mark.parametrize(
    ("size", "matches"),
    [
        pytest.param(1000, lambda way, chunk: b"PUT " in chunk[:4], id="request of a small blob"),
        pytest.param(1000, lambda way, chunk: way == "down", id="answer to a small blob"),
        pytest.param(4 * MiB, is_put_after(MiB), id="in the middle of a single PUT"),
        pytest.param(11 * MiB, lambda way, chunk: b"partNumber=2" in chunk, id="second part"),
        pytest.param(
            11 * MiB,
            lambda way, chunk: way == "up" and chunk[:5] == b"POST " and b"uploadId=" in chunk,
            id="completion of the parts",
        ),
    ],
)
def test_kill_in_the_middle_of_an_upload_leaves_nothing(
    s3, tmp_path, victim, size, matches, addressing
):
    """A request that is cut off makes no object that is ever taken for a blob."""
    with TcpProxy(s3.endpoint_url) as proxy:
        process = victim("finished", size, tmp_path, proxy.location(s3), addressing)
        process.wait_for("ready")
        proxy.hold(matches)
        process.go_on()
        assert proxy.reached.wait(PATIENCE)
        process.kill()
        proxy.release()
    check_afterwards(s3, tmp_path, BEFORE, size, addressing)


@both_addressings
def test_orphan_whose_oid_another_object_got_stays_and_is_counted(s3, tmp_path, victim, addressing):
    """A FileStorage gives the crashed transaction's oid out again: that key alone is kept."""
    process = victim("voted", 10, tmp_path, s3, addressing)
    process.wait_for("ready")
    process.go_on()
    process.wait_for("reached")
    process.kill()
    crashed = set(keys(s3))
    db = open_db(s3, tmp_path, cache="empty", addressing=addressing, gc_grace="0s")
    with db.transaction() as conn:
        surviving_before = set(surviving(db))
        conn.root()["plain"] = type(conn.root())()
    with db.transaction() as conn:
        oid = conn.root()["plain"]._p_oid
    take(db.storage)
    db.pack(time.time() + 1)
    (orphan,) = set(keys(s3)) - surviving_before
    assert orphan in crashed
    assert orphan.startswith(f"blobs/{int.from_bytes(oid, 'big'):x}/")
    report = db.storage.sweep()
    assert (report.kept, report.foreign, report.garbage) == (len(surviving_before), 1, 0)
    db.close()


@both_addressings
def test_orphan_whose_oid_another_blob_got_is_deleted(s3, tmp_path, victim, addressing):
    """The oid is a blob's again: its revisions say that the orphan is none of them."""
    process = victim("voted", 10, tmp_path, s3, addressing)
    process.wait_for("ready")
    process.go_on()
    process.wait_for("reached")
    process.kill()
    db = open_db(s3, tmp_path, addressing=addressing, gc_grace="0s")
    with db.transaction() as conn:
        conn.root()["again"] = Blob(b"again")
    db.pack(time.time() + 1)
    assert keys(s3) == sorted(surviving(db))
    with db.transaction() as conn:
        assert read(conn.root()["again"]) == b"again"
    db.close()
