"""Processes that are killed, forked or stopped, whose clocks are wrong, or that end too early."""

import atexit
from collections import Counter
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import astuple
from dataclasses import replace
from datetime import timedelta
from email.utils import format_datetime
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import count
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading
import time

import botocore.auth
from persistent.mapping import PersistentMapping
import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.blob import is_blob_record
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage

from zodb_s3blobs import blobs
from zodb_s3blobs import s3client
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.uploads import UploadPool

from . import test_crash
from .faults import FaultyServer
from .faults import in_child
from .faults import s3_error
from .relstorages import ChildError
from .relstorages import cluster_of
from .relstorages import contents
from .relstorages import number_of
from .relstorages import Process
from .relstorages import raises_there
from .relstorages import Site
from .relstorages import SIZE
from .relstorages import SlowDataManager
from .relstorages import wait_until
from .services.location import keys
from .services.location import S3Location
from .storages import commit_blob
from .storages import Gate
from .storages import leftovers
from .storages import make_client
from .storages import make_storage
from .storages import open_db
from .storages import open_relstorage
from .storages import PATIENCE
from .storages import read
from .storages import start
from .storages import store_blob
from .storages import take
from .storages import TcpProxy
from .storages import write_file
from .test_relstorage_processes import BusySite
from .test_relstorage_processes import check_all
from .test_relstorage_processes import GRACE


MiB = 1 << 20
HOUR = 3600
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Seconds in which a process ends though its S3 server never answers: it waits for two or three
# answers, a second each.
SOON = 20


def skewed(hours, now=time.time):
    """Return a clock that is so far ahead, or behind."""
    return lambda: now() + hours * HOUR


both_addressings = pytest.mark.parametrize("addressing", ["tid", "record"])


# Points where a process stands still


class AtCall:
    """A call at which a `Process` stands still, by its name in ``points``."""

    def __init__(self, point, site, server):
        self._point = point
        self._site = site
        site.hold(point)

    def wait(self):
        """Wait until it does."""
        self._site.wait_for(self._point)

    def leave(self):
        """Forget about it."""


class AtRequest:
    """A request at which a process stands still.

    :param str kind: of the request.
    :param server: the `FaultyServer` that it comes to.
    :param int number: which one of this kind.
    :param bool done: whether the server behind has done what it asks for by then; otherwise that
        one never hears of it.
    """

    def __init__(self, kind, server, site=None, number=1, done=False):
        self._kind = kind
        self._number = number
        # Requests come in several threads.
        self._numbers = count(1)
        self._gate = Gate()
        if done:
            server.change = lambda request, answer: self._stand_still(request)
        else:
            server.instead = self._instead

    def _stand_still(self, request):
        if request.kind != self._kind or next(self._numbers) != self._number:
            return False
        self._gate()
        return True

    def _instead(self, request):
        return s3_error(503, "SlowDown") if self._stand_still(request) else None

    def wait(self):
        """Wait until it does."""
        self._gate.wait()

    def leave(self):
        """Send the answer, whoever hears it."""
        self._gate.open()


@contextmanager
def seen_through(location):
    """Context manager: a `FaultyServer`, and the bucket as seen through it."""
    with FaultyServer(location.endpoint_url) as server:
        yield server, replace(location, endpoint_url=server.endpoint_url)


# Killed in a pack


class SkewedSite(Site):
    """A process whose clock may be wrong; its signatures go by another one."""

    def skew(self, hours):
        """Let it be so far ahead."""
        time.time = skewed(hours)


class LocalSite(SkewedSite):
    """A FileStorage as one process has it open."""

    points = {
        "packing": (FileStorage, "pack", "before"),
        "uploaded": (s3client.S3Client, "upload_file", "after"),
    }

    def pack_to(self, moment):
        """Pack to a time."""
        self.db.pack(moment)

    def delete_few_at_a_time(self):
        """Let a request delete two objects at most."""
        s3client.DELETE_BATCH = 2


def references(db):
    """Return the keys of the blobs of all revisions, by oid and tid."""
    return {
        (record.oid, record.tid): blob_key(record.oid, read_reference(record.data) or record.tid)
        for transaction in db.storage.iterator()
        for record in transaction
        if record.data and is_blob_record(record.data)
    }


@both_addressings
@pytest.mark.parametrize(
    "point",
    [
        pytest.param(partial(AtCall, "packing"), id="the base's pack"),
        pytest.param(partial(AtRequest, "GET list-type"), id="listing"),
        pytest.param(partial(AtRequest, "POST delete"), id="first deletion"),
        pytest.param(partial(AtRequest, "POST delete", number=2), id="second deletion"),
        pytest.param(partial(AtRequest, "POST delete", done=True), id="answer to a deletion"),
    ],
)
def test_kill_in_a_pack_loses_nothing_and_the_next_one_makes_up_for_it(
    s3, tmp_path, point, addressing
):
    """What a revision refers to is there before the next pack, and nothing else after it."""
    options = {"addressing": addressing, "gc_grace": "0s"}
    with seen_through(s3) as (server, location):
        site = Process(LocalSite, (location, str(tmp_path)), options)
        try:
            site.result()
            garbage = "deleted", "deleted, too", "the third"
            site.commit(1, "rewritten", "other", *garbage)
            site.commit(2, "rewritten")
            site.delete(*garbage)
            # A FileStorage forgets that it has given out higher oids than it has.
            site.commit(1, "newest")
            moment = time.time()
            site.commit(3, "rewritten")
            site.delete_few_at_a_time()
            halt = point(site=site, server=server)
            site.begin("pack_to", moment)
            halt.wait()
        finally:
            site.kill()
        halt.leave()
    db = open_db(s3, tmp_path, cache="empty", **options)
    with db.transaction() as conn:
        found = {name: number_of(name, read(blob)) for name, blob in conn.root().items()}
    assert found == {"rewritten": 3, "other": 1, "newest": 1}
    before = references(db)
    assert set(before.values()) <= set(keys(s3))
    for revision in before:
        with db.storage.openCommittedBlobFile(*revision) as file:
            assert file.read()
    db.pack(moment)
    assert keys(s3) == sorted(references(db).values())
    assert len(keys(s3)) == 4
    # What is inside the pack's window can still be undone.
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    with db.transaction() as conn:
        assert number_of("rewritten", read(conn.root()["rewritten"])) == 2
    db.close()


# Forked


class Program:
    """A function of this module as the main program of a Python of its own.

    :param function: called with the `S3Location` and what else there is; what it says and hears
        are lines.
    :param str before: statements that come before any import.
    """

    def __init__(self, function, location, *args, before=""):
        task = json.dumps([astuple(location), *map(str, args)])
        code = f"{before}\nfrom tests.test_processes import begin; begin({function.__name__!r})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, task],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, line):
        """Wait until it says this."""
        for found in self._process.stdout:
            if found.strip() == line:
                return
        raise AssertionError(f"it ended with {self._process.wait()} before {line!r}")

    def tell(self, line=""):
        """Say something to it."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def send_signal(self, number):
        self._process.send_signal(number)

    def end(self, seconds=PATIENCE):
        """Wait for its end and return its exit status."""
        return self._process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._process.kill()
        self._process.communicate()


def begin(name):
    """Be a `Program`."""
    # Whatever hangs here must not outlive the test.
    signal.alarm(2 * PATIENCE)
    location, *args = json.loads(sys.argv[1])
    globals()[name](S3Location(*location), *args)


def say(line):
    os.write(1, f"{line}\n".encode())


def hear():
    assert sys.stdin.readline(), "nobody is there any more"


def commit(db, change):
    """Commit what change(root) does."""
    manager = transaction.TransactionManager()
    conn = db.open(manager)
    try:
        change(conn.root())
        manager.commit()
    finally:
        manager.abort()
        conn.close()


def insist(db, change):
    """Commit what change(root) does, again after a conflict."""
    for _attempt in range(200):
        try:
            return commit(db, change)
        except TransientError:
            pass
    raise AssertionError("too many conflicts")


class ForkedChild:
    """One worker of a pre-forking server, in the server.

    :param open_: returns its database.
    :param str name: that its blobs have.
    :param siblings: the workers before it.
    """

    def __init__(self, open_, name, siblings):
        self._name = name
        commands, self._tell = os.pipe()
        self._hear, answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            signal.alarm(2 * PATIENCE)
            for each in (*siblings, self):
                os.close(each._tell)
                os.close(each._hear)
            self._work(open_(), commands, answers)
            # As the program that it is a part of
            sys.exit()
        os.close(commands)
        os.close(answers)

    def _work(self, db, commands, answers):
        number = 0
        while os.read(commands, 1):
            for _turn in range(2):
                number += 1
                self._commit_and_read(db, number)
            os.write(answers, b"d")
        db.close()

    def _commit_and_read(self, db, number):
        names = self._name, f"{self._name}-{number}"

        def change(root):
            for name in names:
                root[name] = Blob(contents(name, number))
            root.pop(f"{self._name}-{number - 2}", None)

        insist(db, change)
        found = read_all(db)
        assert [found[name] for name in names] == [number, number]

    def begin(self):
        """Let it commit and read."""
        os.write(self._tell, b"w")

    def wait(self):
        """Wait until it has done so."""
        assert os.read(self._hear, 1), f"{self._name} has ended"

    def end(self):
        """Let it end and return its exit status."""
        os.close(self._tell)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def read_all(db):
    """Return the numbers of the contents of all blobs by their names."""
    with db.transaction() as conn:
        return {name: number_of(name, read(blob)) for name, blob in conn.root().items()}


def all_work(children):
    for child in children:
        child.begin()
    for child in children:
        child.wait()


def prefork(location, directory, base):
    """Be a server that opens the database and forks its workers off.

    :param str base: the ZConfig section inside.
    """
    # A few blobs fit into the cache; the others are read from S3.
    shared = make_client(location), S3BlobCache(f"{directory}/cache", 10 * SIZE)
    options = {"pool": UploadPool(), "gc_grace": 0}

    def open_():
        inside = storageFromString(f"%import relstorage\n{base}")
        return DB(S3BlobStorage(inside, *shared, **options))

    db = open_()
    # A RelStorage belongs to one process.
    open_there = open_ if "relstorage" in base else lambda: db
    children = []

    def fork():
        children.append(ForkedChild(open_there, f"child{len(children) + 1}", children))

    def commit_and_read(name):
        insist(db, lambda root: root.update({name: Blob(contents(name, 1))}))
        assert read_all(db)[name] == 1

    fork()
    commit_and_read("parent")
    fork()
    fork()
    say("forked")
    hear()
    all_work(children)
    say("worked")
    hear()
    assert children.pop(0).end() == 0
    commit_and_read("parent-later")
    all_work(children)
    db.close()
    all_work(children)
    assert [child.end() for child in children] == [0, 0]
    say("ended")


@pytest.fixture
def cluster(request):
    """A `Cluster` on the database that the test names."""
    with cluster_of(request, *request.param) as cluster:
        yield cluster


def postgresql(keep_history):
    """Run a test on PostgreSQL."""
    param = pytest.param(("postgresql", keep_history), id="postgresql")
    return pytest.mark.parametrize("cluster", [param], indirect=True)


class Senders:
    """Who has sent something over which connection to a `FaultyServer`, as told by what it stores.

    Such a server has one thread for each connection.
    """

    def __init__(self, server):
        self.by_connection = defaultdict(set)
        server.instead = self._note

    def _note(self, request):
        senders = self.by_connection[threading.current_thread()]
        if request.method == "PUT":
            senders.add(request.body.partition(b" ")[0].partition(b"-")[0].decode())


class TestPreForkingServer:
    """The first worker is forked off before the server has made a request, the others after it."""

    def serve(self, location, directory, base):
        """Let one serve, and compare who has used which connection."""
        with seen_through(location) as (server, location):
            parent = Senders(server)
            with Program(prefork, location, directory, base) as program:
                program.wait_for("forked")
                assert parent.by_connection
                children = Senders(server)
                program.tell()
                program.wait_for("worked")
                assert not set(children.by_connection) & set(parent.by_connection)
                assert all(len(who) <= 1 for who in children.by_connection.values())
                names = {"child1", "child2", "child3"}
                assert set().union(*children.by_connection.values()) == names
                program.tell()
                program.wait_for("ended")
                assert program.end() == 0

    @postgresql(keep_history=False)
    def test_workers_on_one_database_commit_and_read_at_once(self, cluster):
        """Each has connections of its own, and goes on when the parent or a sibling has ended."""
        self.serve(cluster.location, cluster.directory, cluster.database.section)
        last = cluster.start("last", gc_grace="0s")
        expected = {"parent": 1, "parent-later": 1}
        for number, turns in enumerate([2, 6, 6], 1):
            # Each removes what it has made two turns before.
            names = f"child{number}", f"child{number}-{turns}", f"child{number}-{turns - 1}"
            expected |= dict(zip(names, (turns, turns, turns - 1), strict=True))
        assert {name: last.read(name) for name in last.names()} == expected
        with closing(cluster.open("owner")) as db:
            take(db.storage)
        last.pack()
        assert cluster.objects() == cluster.references()
        assert len(cluster.objects()) == len(expected)

    def test_workers_with_a_copy_of_the_memory_each_commit_and_read_at_once(self, s3, tmp_path):
        """They use the very storage that the parent has opened, and has used."""
        self.serve(s3, tmp_path, "<mappingstorage>\n</mappingstorage>")


def test_child_forked_in_a_sweep_can_sweep(s3, tmp_path):
    """It does not wait for a thread that it has not got."""
    with seen_through(s3) as (server, location):
        storage, _client = make_storage(location, tmp_path, base=MappingStorage())
        DB(storage)
        halt = AtRequest("GET list-type", server, done=True)
        sweep = start(storage.sweep)
        halt.wait()
        try:
            in_child(lambda: storage.sweep(dry_run=True))
        finally:
            halt.leave()
        assert sweep.result().listed == 0
        storage.close()


def fork_in_a_commit(location, directory):
    """Fork a child while another thread commits; the child ends as a program does."""
    db = open_db(location, directory, s3_multipart_threshold="6MB", s3_multipart_part_size="5MB")
    large = contents("large", 1, 11 * MiB)
    thread = start(
        insist, db, lambda root: root.update(large=Blob(large), small=Blob(b"small 1\n"))
    )
    hear()
    if os.fork() == 0:
        signal.alarm(PATIENCE)
        sys.exit(5)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 5
    say("child ended")
    thread.result()
    with db.transaction() as conn:
        # The staged files were still there.
        assert all(blobs.is_cached(blob) for blob in conn.root().values())
    db.close()


def test_child_forked_in_a_commit_ends_and_takes_nothing_away(s3, tmp_path):
    """The parent's uploads, staged files and transaction stay as they are."""
    with seen_through(s3) as (server, location):
        halt = AtRequest("PUT uploadId", server, done=True)
        with Program(fork_in_a_commit, location, tmp_path) as program:
            halt.wait()
            program.tell()
            program.wait_for("child ended")
            halt.leave()
            assert program.end() == 0
    db = open_db(s3, tmp_path, cache="empty")
    with db.transaction() as conn:
        assert read(conn.root()["large"]) == contents("large", 1, 11 * MiB)
    db.close()


# Stopped


class StoppableSite(Site):
    """A process that says which one it is, and whose clock others set."""

    def pid(self):
        return os.getpid()

    def follow(self, path):
        """Set the clock forward by the seconds that a file says, at any moment."""
        now = time.time

        def ahead():
            with open(path) as file:
                return now() + float(file.read())

        time.time = ahead


class Stopped:
    """A process of a cluster that is stopped while its clock goes on.

    A suspended process notices nothing, but for the time.
    """

    def __init__(self, cluster, path, **options):
        self.site = cluster.start("stopped", cls=StoppableSite, gc_grace="1h", **options)
        self._clock = Path(path) / "clock"
        self._clock.write_text("0")
        self._pid = self.site.pid()
        self.site.follow(str(self._clock))

    def stop(self):
        os.kill(self._pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self._pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")

    def go_on(self, seconds):
        """Let it go on after so many seconds."""
        self._clock.write_text(str(seconds))
        os.kill(self._pid, signal.SIGCONT)


def check_end(cluster, **expected):
    """Read all blobs from an empty cache, pack without a grace period: only they remain."""
    last = cluster.start("the last one", gc_grace="0s")
    assert {name: last.read(name) for name in last.names()} == expected
    last.pack()
    assert cluster.objects() == cluster.references()
    assert len(cluster.objects()) == len(expected)


@postgresql(keep_history=True)
class TestStopped:
    """For a minute, or for longer than gc-grace, while another process packs and commits."""

    def uncommitted(self, cluster):
        return set(cluster.objects()) - set(cluster.references())

    def sweep_what_is_uncommitted(self, cluster, other):
        """Let the grace period of objects end, and another process sweep them."""
        objects = self.uncommitted(cluster)
        assert objects
        cluster.backdate(1.1 * HOUR, *objects)
        other.sweep()
        assert not objects & set(cluster.objects())

    @pytest.mark.parametrize("is_cut", [True, False])
    def test_in_an_upload_for_a_minute_it_commits(self, cluster, tmp_path, is_cut):
        """Also where the server has lost patience and has closed the connection."""
        with TcpProxy(cluster.location.endpoint_url) as proxy:
            one = Stopped(cluster, tmp_path, location=proxy.location(cluster.location))
            two = cluster.start("two", gc_grace="1h")
            one.site.commit(1, "a", "b")
            proxy.hold(lambda direction, chunk: chunk[:4] == b"PUT ")
            one.site.begin("commit", 2, "a", "c")
            assert proxy.reached.wait(PATIENCE)
            one.stop()
            two.commit(3, "b")
            two.pack()
            if is_cut:
                proxy.cut()
            else:
                proxy.release()
            one.go_on(60)
            one.site.result()
        check_end(cluster, a=2, b=3, c=2)

    def test_in_an_upload_for_longer_than_the_grace_period_it_uploads_again(
        self, cluster, tmp_path
    ):
        """What had arrived by then has been swept meanwhile."""
        with seen_through(cluster.location) as (server, location):
            one = Stopped(cluster, tmp_path, location=location)
            two = cluster.start("two", gc_grace="1h")
            one.site.commit(1, "a")
            halt = AtRequest("PUT", server, number=2, done=True)
            one.site.begin("commit", 2, "b", "c")
            halt.wait()
            one.stop()
            self.sweep_what_is_uncommitted(cluster, two)
            two.commit(3, "a")
            two.pack()
            halt.leave()
            one.go_on(1.1 * HOUR)
            one.site.result()
        check_end(cluster, a=3, b=2, c=2)

    def test_between_vote_and_finish_for_longer_than_the_grace_period_it_is_refused(
        self, cluster, tmp_path
    ):
        """Its objects have been swept, so nothing of it may be committed; a retry succeeds."""
        one, two = Stopped(cluster, tmp_path), cluster.start("two", gc_grace="1h")
        one.site.commit(1, "a")
        one.site.begin("commit_slowly", "tpc_vote", 0, 2, "b", "c")
        one.site.wait_for("tpc_vote")
        one.stop()
        self.sweep_what_is_uncommitted(cluster, two)
        two.commit(3, "a")
        two.pack()
        one.site.go_on()
        one.go_on(1.1 * HOUR)
        with raises_there("TransientError"):
            one.site.result()
        assert two.names() == ["a"]
        one.site.commit(4, "b", "c")
        check_end(cluster, a=3, b=4, c=4)

    def test_in_finish_for_longer_than_the_grace_period_it_loses_nothing(self, cluster, tmp_path):
        """After our last look at the clock, before the base commits: the staged files are there."""
        one, two = Stopped(cluster, tmp_path), cluster.start("two", gc_grace="1h")
        one.site.commit(1, "a")
        one.site.hold("voted")
        one.site.begin("commit", 2, "b")
        one.site.wait_for("voted")
        one.stop()
        self.sweep_what_is_uncommitted(cluster, two)
        one.site.go_on()
        one.go_on(1.1 * HOUR)
        one.site.result()
        check_end(cluster, a=1, b=2)

    def test_in_a_sweep_it_deletes_what_is_garbage_still(self, cluster, tmp_path):
        """Stopped when it has decided; others commit, undo, pack and sweep meanwhile."""
        one, two = Stopped(cluster, tmp_path), cluster.start("two", gc_grace="1h")
        two.commit(1, "a", "b", "c")
        two.commit(2, "a")
        two.delete("c")
        cluster.pack_base()
        cluster.backdate(1.1 * HOUR, *self.uncommitted(cluster))
        one.site.hold("deleting")
        one.site.begin("sweep")
        one.site.wait_for("deleting")
        one.stop()
        two.commit(3, "a", "d")
        two.undo(two.last())
        # Who has an older view may still read what "a" was before.
        assert two.sweep()["deleted"] == 1
        two.commit(4, "e")
        one.site.go_on()
        one.go_on(60)
        one.site.result()
        check_end(cluster, a=2, b=1, e=4)


# Wrong clocks


both_ways = pytest.mark.parametrize("hours", [5, -5])
# RelStorage asks PostgreSQL for the time.
on_sqlite = pytest.mark.parametrize(
    "cluster", [pytest.param(("sqlite3", False), id="sqlite3 free")], indirect=True
)


@on_sqlite
class TestSkewedHost:
    @both_ways
    def test_sweep_takes_nothing_in_flight(self, cluster, hours):
        """Ages are told by the S3 server alone, so the grace period may be shorter than that."""
        writer, sweeper = (
            cluster.start(name, cls=SkewedSite, gc_grace="1h") for name in ("writer", "sweeper")
        )
        writer.skew(hours)
        sweeper.skew(-hours)
        writer.commit(1, "a")
        writer.hold("voted")
        writer.begin("commit", 2, "a", "b")
        writer.wait_for("voted")
        report = sweeper.sweep()
        assert (report["in_flight"], report["deleted"]) == (2, 0)
        writer.go_on()
        writer.result()
        report = sweeper.sweep()
        assert (report["kept"], report["in_flight"], report["deleted"]) == (2, 1, 0)
        check_end(cluster, a=2, b=2)

    @both_ways
    def test_older_reader_keeps_what_was_replaced(self, cluster, hours):
        """As long as the clock is wrong by less than the grace period."""
        writer, reader = (cluster.start(name, cls=SkewedSite) for name in ("writer", "reader"))
        writer.skew(hours)
        writer.commit(1, "a")
        (old,) = cluster.objects()
        reader.look()
        writer.commit(2, "a")
        cluster.backdate(25 * HOUR, old)
        writer.pack()
        reader.pack()
        assert reader.read_there("a") == 1
        reader.look_away()
        check_end(cluster, a=2)


@pytest.mark.parametrize("hours", [23, -23])
def test_date_of_a_proxy_that_is_wrong_by_less_than_the_grace_period_deletes_nothing(
    s3, tmp_path, hours
):
    """The server says when an object came, but a proxy such as nginx says what time it is."""

    def change(request, answer):
        answer.headers = [
            (name, format_datetime(parsedate_to_datetime(value) + timedelta(hours=hours)))
            if name.lower() == "date"
            else (name, value)
            for name, value in answer.headers
        ]

    with seen_through(s3) as (server, location):
        storage, client = make_storage(location, tmp_path, base=open_relstorage(tmp_path))
        server.change = change
        commit_blob(storage, storage.new_oid(), b"committed")
        key = blob_key(storage.new_oid(), new_stamp())
        client.upload_file(write_file(b"of another process"), key)
        report = storage.sweep()
        assert (report.kept, report.in_flight, report.deleted) == (1, 1, 0)
        storage.close()


def set_clock(patch, hours):
    """Let this process's clock be wrong, by which it signs requests, too."""
    signed = botocore.auth.get_current_datetime

    def now(*args, **kw):
        return signed(*args, **kw) + timedelta(hours=hours)

    patch.setattr(time, "time", skewed(hours))
    patch.setattr(botocore.auth, "get_current_datetime", now)


@both_ways
def test_signature_that_is_refused_for_its_time_names_the_clock(s3, tmp_path, monkeypatch, hours):
    """With the server's time; nothing is half committed, and a clock that is set is enough.

    rclone calls it AccessDenied where the clock is behind.
    """
    db = open_db(s3, tmp_path)
    with monkeypatch.context() as patch:
        set_clock(patch, hours)
        with pytest.raises(PermanentS3Error, match=r"clock.*server's"), db.transaction() as conn:
            conn.root()["new"] = Blob(b"new")
    assert leftovers(db.storage) == keys(s3) == []
    with db.transaction() as conn:
        assert not conn.root()
        conn.root()["new"] = Blob(b"new")
    db.close()


@both_ways
def test_question_that_is_refused_for_its_time_names_the_clock(s3, monkeypatch, hours):
    """The answer to HEAD has no body with a code, but it has a date."""
    client = make_client(s3)
    set_clock(monkeypatch, hours)
    with pytest.raises(PermanentS3Error, match=r"clock.*server's"):
        client.head_object("blobs/1/1.blob")


@both_addressings
def test_clock_that_is_set_back_between_two_processes_loses_nothing(
    s3, tmp_path, monkeypatch, addressing
):
    """Revisions follow each other all the same, and packs delete what they remove."""
    options = {"addressing": addressing, "gc_grace": "0s"}
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", skewed(5))
        db = open_db(s3, tmp_path, **options)
        insist(db, lambda root: root.update(a=Blob(contents("a", 1)), b=Blob(contents("b", 1))))
        db.close()
    db = open_db(s3, tmp_path, **options)
    insist(db, lambda root: root.update(a=Blob(contents("a", 2))))
    insist(db, lambda root: root.pop("b"))
    assert read_all(db) == {"a": 2}
    # What comes from the future is not packed.
    db.pack(time.time())
    assert len(keys(s3)) == 3
    assert keys(s3) == sorted(references(db).values())
    db.pack(time.time() + 6 * HOUR)
    assert len(keys(s3)) == 1
    assert keys(s3) == sorted(references(db).values())
    db.close()


@both_addressings
def test_orphan_of_a_process_whose_clock_was_ahead_stops_no_sweep(
    s3, tmp_path, monkeypatch, addressing
):
    """Another object, which is no blob, gets its oid when the clock is right again: it is kept."""
    options = {"addressing": addressing, "gc_grace": "0s"}
    site = Process(LocalSite, (s3, str(tmp_path)), options)
    try:
        site.result()
        site.commit(1, "a")
        site.skew(5)
        site.hold("uploaded")
        site.begin("commit", 2, "b")
        site.wait_for("uploaded")
    finally:
        site.kill()
    assert len(keys(s3)) == 2
    db = open_db(s3, tmp_path, **options)
    # A server tells whole seconds.
    monkeypatch.setattr(time, "time", skewed(5 / HOUR))
    insist(db, lambda root: root.update(plain=PersistentMapping()))
    # By tid it is taken for one in flight until then.
    monkeypatch.setattr(time, "time", skewed(6))
    insist(db, lambda root: root.update(plain=PersistentMapping()))
    report = db.storage.sweep()
    assert (report.kept, report.foreign, report.deleted) == (1, 1, 0)
    db.close()


# Greenlets

GREENLETS = 6
# Apart from what the other tests run with: RelStorage prefers it where it is.
GEVENT = os.path.join(sys.prefix, "gevent")
PATCHED = f"import sys; sys.path.append({GEVENT!r}); from gevent import monkey; monkey.patch_all()"


def greenlets(location, directory, base, addressing):
    """Do in greenlets what threads do; with some of it another greenlet waits for S3."""
    import gevent

    options = {"s3_multipart_threshold": "6MB", "s3_multipart_part_size": "5MB"}
    options |= {"addressing": addressing, "gc_grace": "0s", "cache_size": "100KB"}
    db = open_db(location, directory, imports=["relstorage"], base=base or None, **options)

    def change(name, number, size=20_000):
        insist(db, lambda root: root[name].update(blob=Blob(contents(name, number, size))))

    names = [f"g{number}" for number in range(GREENLETS)]
    insist(db, lambda root: root.update({name: PersistentMapping() for name in (*names, "large")}))
    change("g0", 0)

    # The server holds this one's request.
    waiting = gevent.spawn(change, "g1", 0)
    gevent.get_hub().threadpool.apply(hear)
    with db.transaction() as conn:
        assert number_of("g0", read(conn.root()["g0"]["blob"])) == 0
    assert not waiting.ready()
    say("others go on")
    waiting.get(timeout=PATIENCE)

    def work(name):
        for number in range(1, 4):
            change(name, number)
            with db.transaction() as conn:
                for other in names:
                    if "blob" in conn.root()[other]:
                        number_of(other, read(conn.root()[other]["blob"]))

    workers = [gevent.spawn(work, name) for name in names]
    workers.append(gevent.spawn(change, "large", 1, 11 * MiB))
    gevent.joinall(workers, timeout=PATIENCE, raise_error=True)
    db.pack(time.time() + 1)
    with db.transaction() as conn:
        report = blobs.prefetch(conn.root()[name]["blob"] for name in names)
        assert report.failed == report.missing == 0
    with pytest.raises(ZeroDivisionError), db.transaction() as conn:
        conn.root()["refused"] = Blob(b"refused")
        refuse = SlowDataManager("tpc_vote", lambda transaction: 1 / 0)
        conn.transaction_manager.get().join(refuse)
    assert leftovers(db.storage) == []
    db.close()


@pytest.mark.skipif(not os.path.isdir(GEVENT), reason=f"gevent is not installed in {GEVENT}")
class TestGevent:
    """The program begins with gevent's monkey-patching, as gunicorn's workers do."""

    def work(self, location, directory, base, addressing):
        with seen_through(location) as (server, location):
            halt = AtRequest("PUT", server, number=2, done=True)
            args = location, directory, base, addressing
            with Program(greenlets, *args, before=PATCHED) as program:
                halt.wait()
                program.tell()
                program.wait_for("others go on")
                halt.leave()
                assert program.end() == 0

    @both_addressings
    def test_greenlets_over_a_filestorage_commit_read_and_end(self, s3, tmp_path, addressing):
        """All is there for a program without gevent, and nothing else."""
        self.work(s3, tmp_path, "", addressing)
        db = open_db(s3, tmp_path, cache="empty", addressing=addressing)
        with db.transaction() as conn:
            found = {
                name: number_of(name, read(folder["blob"])) for name, folder in conn.root().items()
            }
        assert found == {"large": 1} | {f"g{number}": 3 for number in range(GREENLETS)}
        assert keys(s3) == sorted(references(db).values())
        assert len(keys(s3)) == len(found)
        db.close()

    @postgresql(keep_history=True)
    def test_greenlets_over_a_relstorage_commit_read_and_end(self, cluster):
        """With the driver that RelStorage chooses then."""
        base = cluster.database.section.replace("driver psycopg2", "driver gevent psycopg2")
        self.work(cluster.location, cluster.directory, base, "auto")
        assert cluster.objects() == cluster.references()
        assert len(cluster.objects()) == GREENLETS + 1


# The end of the interpreter


def ends_in_a_commit(location, directory, addressing, is_daemon, size, options):
    """Let the main thread end while another one commits."""
    db = open_db(location, directory, addressing=addressing, **json.loads(options))
    commit(db, lambda root: root.update(a=Blob(contents("a", 1))))

    def go_on():
        for number in range(2, 4):
            data = {name: contents(name, number, int(size)) for name in ("a", "b", "c")}
            commit(db, lambda root, data=data: root.update((n, Blob(data[n])) for n in data))
        say("committed")

    def watch():
        with ThreadPoolExecutor() as pool, suppress(RuntimeError):
            while True:
                pool.submit(int)
                time.sleep(0.01)
        # The interpreter takes no new work.
        say("main has ended")

    say("ready")
    hear()
    threading.Thread(target=go_on, daemon=is_daemon == "True").start()
    threading.Thread(target=watch).start()
    # Until a request stands still
    hear()


def exit_(number, frame):
    say("exiting")
    sys.exit(3)


def exits_in_a_commit(location, directory, point, addressing):
    """Commit as those do that are killed, and exit when told by a signal."""
    signal.signal(signal.SIGTERM, exit_)
    test_crash.child(point, 1000, directory, addressing, *astuple(location)[:4])


def exits_in_a_vote(location, directory):
    """Wait for uploads, and exit when told by a signal."""
    signal.signal(signal.SIGTERM, exit_)
    storage, _client = make_storage(location, directory)
    commit_blob(storage, storage.new_oid(), b"before")
    say("ready")
    hear()
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    try:
        for number in range(3):
            store_blob(storage, txn, storage.new_oid(), b"%d" % number)
        say("stored")
        storage.tpc_vote(txn)
    finally:
        storage.tpc_abort(txn)
        assert leftovers(storage) == []


def commits_at_exit(location, directory, addressing):
    """Commit, read, undo and pack when the interpreter is about to end."""
    options = {"addressing": addressing, "gc_grace": "0s"}
    db = open_db(location, directory, cache="first", **options)
    commit(db, lambda root: root.update((n, Blob(contents(n, 1))) for n in ("a", "b", "c")))
    db.close()
    db = open_db(location, directory, **options)

    @atexit.register
    def at_exit():
        for number in (2, 3):
            commit(db, lambda root, number=number: root.update(a=Blob(contents("a", number))))
        db.undo(db.undoLog(0, 1)[0]["id"])
        transaction.commit()
        with db.transaction() as conn:
            assert blobs.prefetch([conn.root()["b"]]).fetched == 1
        assert read_all(db) == {"a": 2, "b": 1, "c": 1}
        commit(db, lambda root: root.pop("c"))
        db.pack(time.time() + 1)
        db.close()
        say("done")


def commits_in_parts_at_exit(location, directory):
    """Commit a large blob, and close the database, when the interpreter is about to end."""
    db = open_db(location, directory, **TestShutdown.PARTS)
    commit(db, lambda root: root.update(a=Blob(contents("a", 1))))

    @atexit.register
    def at_exit():
        commit(db, lambda root: root.update(a=Blob(contents("a", 2, 11 * MiB))))
        say("committed")
        db.close()
        say("closed")


class TestShutdown:
    """The interpreter ends, by itself or by a signal, while something is committed."""

    PARTS = {"s3_multipart_threshold": "6MB", "s3_multipart_part_size": "5MB"}
    HANGS = {"s3_read_timeout": "1s", "s3_max_attempts": "1"}

    def check(self, location, directory, addressing):
        """Return the numbers of all blobs: all there, and nothing else after a sweep."""
        db = open_db(location, directory, cache="empty", addressing=addressing, gc_grace="0s")
        found = read_all(db)
        # What was not committed has oids that are not known as ours until then.
        insist(db, lambda root: root.update((f"new {n}", Blob(b"new")) for n in range(3)))
        db.storage.sweep()
        assert keys(location) == sorted(references(db).values())
        db.close()
        return found

    @pytest.mark.parametrize(
        ("size", "word", "addressing"),
        [
            pytest.param(1000, b"PUT ", "tid", id="small"),
            pytest.param(11 * MiB, b"partNumber=2", "record", id="in parts"),
        ],
    )
    def test_thread_that_commits_when_the_main_thread_ends_goes_on(
        self, s3, tmp_path, size, word, addressing
    ):
        """The uploads that run then, and those that begin afterwards, are done."""
        args = addressing, False, size, json.dumps(self.PARTS)
        with (
            TcpProxy(s3.endpoint_url) as proxy,
            Program(ends_in_a_commit, proxy.location(s3), tmp_path, *args) as program,
        ):
            program.wait_for("ready")
            proxy.hold(lambda direction, chunk: word in chunk)
            program.tell()
            assert proxy.reached.wait(PATIENCE)
            program.tell()
            program.wait_for("main has ended")
            proxy.release()
            assert program.end() == 0
        assert self.check(s3, tmp_path, addressing) == {"a": 3, "b": 3, "c": 3}

    @pytest.mark.parametrize(("is_daemon", "addressing"), [(True, "tid"), (False, "record")])
    def test_process_whose_uploads_hang_ends(self, s3, tmp_path, addressing, is_daemon):
        """In the time of its time-outs, whatever kind of thread commits; nothing is committed."""
        args = addressing, is_daemon, 1000, json.dumps(self.HANGS)
        with (
            TcpProxy(s3.endpoint_url) as proxy,
            Program(ends_in_a_commit, proxy.location(s3), tmp_path, *args) as program,
        ):
            program.wait_for("ready")
            proxy.hold(lambda direction, chunk: True)
            program.tell()
            assert proxy.reached.wait(PATIENCE)
            program.tell()
            program.end(SOON)
        assert self.check(s3, tmp_path, addressing) == {"a": 1}

    @pytest.mark.parametrize(
        ("point", "addressing", "is_lost"),
        [("begun", "tid", True), ("voted", "record", True), ("base finished", "tid", False)],
    )
    def test_exit_at_a_step_of_the_commit_leaves_all_or_nothing(
        self, s3, tmp_path, point, addressing, is_lost
    ):
        """The exception of sys.exit comes out of any line, as a handler of SIGTERM raises it."""
        with Program(exits_in_a_commit, s3, tmp_path, point, addressing) as program:
            program.wait_for("ready")
            program.tell()
            program.wait_for("reached")
            program.send_signal(signal.SIGTERM)
            program.wait_for("exiting")
            assert program.end(SOON) == 3
        committed = test_crash.BEFORE + (not is_lost)
        test_crash.check_afterwards(s3, tmp_path, committed, 1000, addressing)

    def test_exit_in_a_vote_waits_for_the_uploads_and_deletes_them(self, s3, tmp_path):
        """As any abort does."""
        with (
            TcpProxy(s3.endpoint_url) as proxy,
            Program(exits_in_a_vote, proxy.location(s3), tmp_path) as program,
        ):
            program.wait_for("ready")
            before = keys(s3)
            proxy.hold(lambda direction, chunk: chunk[:4] == b"PUT ")
            program.tell()
            program.wait_for("stored")
            assert proxy.reached.wait(PATIENCE)
            program.send_signal(signal.SIGTERM)
            program.wait_for("exiting")
            proxy.release()
            assert program.end(SOON) == 3
        assert keys(s3) == before
        assert len(before) == 1

    @both_addressings
    def test_commits_reads_undo_and_pack_at_exit_are_as_ever(self, s3, tmp_path, addressing):
        """No pool takes new work then."""
        with Program(commits_at_exit, s3, tmp_path, addressing) as program:
            program.wait_for("done")
            assert program.end(SOON) == 0
        assert len(keys(s3)) == 2
        assert self.check(s3, tmp_path, addressing) == {"a": 2, "b": 1}

    def test_storage_that_has_uploaded_in_parts_at_exit_is_closed(self, s3, tmp_path):
        """The process ends."""
        with Program(commits_in_parts_at_exit, s3, tmp_path) as program:
            program.wait_for("committed")
            assert program.end(5) == 0
            program.wait_for("closed")


# Two packers at once


class EightWriters(BusySite):
    """A process of eight threads."""

    rounds = 3


@postgresql(keep_history=True)
def test_two_processes_that_pack_at_once_beside_eight_writers_lose_nothing(cluster, tmp_path):
    """One pack is refused while the other runs; sweeps run at the same time."""
    options = {"cls": EightWriters, "gc_grace": f"{GRACE}s"}
    writers, *packers = (cluster.start(name, **options) for name in ("writers", "one", "two"))
    names = [f"garbage {number}" for number in range(20)]
    packers[0].commit(1, *names)
    packers[0].delete(*names)
    cluster.pack_base()
    garbage = set(cluster.objects())
    cluster.backdate(HOUR, *garbage)
    known = packers[0].prepare()
    enough = tmp_path / "enough"
    writers.begin("work", 0, enough)
    counts = Counter()
    while writers.is_busy():
        for call in (("pack", 2), ("sweep",)):
            for packer in packers:
                packer.begin(*call)
            for packer in packers:
                try:
                    packer.result()
                    counts[call[0]] += 1
                except ChildError as error:
                    # Busy as all are, to decide may take too long.
                    assert {"UnableToAcquirePackUndoLockError", "TransientError"} & {*error.names}
        if counts["pack"] > 1 and counts["sweep"] > 1 and not garbage & set(cluster.objects()):
            enough.touch()
    committed, deleted, conflicts = writers.result()
    assert conflicts
    assert not garbage & set(cluster.objects())
    check_all(cluster, EightWriters, [*known, *committed], deleted)
