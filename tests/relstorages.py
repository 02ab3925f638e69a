"""One RelStorage and one bucket that several processes share, and those processes."""

from base64 import encodebytes
from contextlib import closing
from contextlib import contextmanager
from dataclasses import dataclass
import functools
import multiprocessing
import re
import sqlite3
import time
import traceback

from relstorage.adapters.postgresql.locker import PostgreSQLLocker
from relstorage.adapters.txncontrol import GenericTransactionControl
from relstorage.storage import RelStorage
from relstorage.storage.tpc.begin import HistoryPreserving
import transaction
from ZODB.blob import Blob
from ZODB.blob import is_blob_record
from ZODB.config import storageFromString
from ZODB.serialize import referencesf
from ZODB.utils import p64

from zodb_s3blobs.s3client import S3Client

from .services.location import boto3_client
from .services.location import keys
from .services.location import S3Location
from .storages import open_db
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import section


SIZE = 1000


def contents(name, number, size=SIZE):
    """Return bytes that tell which blob's they are, and which of its revisions."""
    return f"{name} {number}\n".encode() + random_bytes((name, number), size)


def number_of(name, data):
    """Return the number of whole and proper bytes of this blob."""
    head, _, rest = data.partition(b"\n")
    found, number = head.decode().split()
    assert found == name
    assert data == contents(name, int(number), len(rest))
    return int(number)


# The database, as it is without any code of ours


@dataclass(frozen=True)
class Database:
    """A database of RelStorage.

    :param str kind: the ZConfig section inside <relstorage>: postgresql or sqlite3.
    :param str place: the dsn, or the directory.
    """

    kind: str
    place: str
    keep_history: bool

    @property
    def section(self):
        """The text of the section <relstorage>."""
        options = {"postgresql": "driver psycopg2\ndsn", "sqlite3": "data-dir"}
        return "\n".join(
            [
                "<relstorage>",
                f"keep-history {str(self.keep_history).lower()}",
                f"<{self.kind}>",
                f"{options[self.kind]} {self.place}",
                f"</{self.kind}>",
                "</relstorage>",
            ]
        )

    @contextmanager
    def rows(self, statement):
        """Context manager: the rows of an SQL statement; its transaction ends with it."""
        if self.kind == "sqlite3":
            connection = sqlite3.connect(f"{self.place}/main.sqlite3")
        else:
            import psycopg2

            connection = psycopg2.connect(self.place)
        with closing(connection), closing(connection.cursor()) as cursor:
            cursor.execute(statement)
            yield cursor.fetchall()

    def commit_lock(self):
        """Context manager: nobody can commit; for PostgreSQL."""
        return self.rows("SELECT pg_advisory_xact_lock(-1)")

    def blobs(self):
        """Return all revisions of blobs, a mapping from (oid, tid) to the key they refer to."""
        found = {}
        with self.rows("SELECT zoid, tid, state FROM object_state") as rows:
            for oid, tid, state in rows:
                if state is not None and is_blob_record(bytes(state)):
                    (stamp,) = re.findall(b"zodb-s3blobs:(.{16})", bytes(state), re.DOTALL)
                    found[p64(oid), p64(tid)] = f"blobs/{oid:x}/{stamp.hex()}.blob"
        return found

    def _activity(self, condition):
        with self.rows(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            f" AND pid <> pg_backend_pid() AND {condition}"
        ) as rows:
            return rows[0][0]

    def wait_until_blocked(self):
        """Wait until a client of PostgreSQL waits for a lock that another one holds."""
        wait_until(lambda: self._activity("wait_event_type = 'Lock'"))

    def wait_until_left(self):
        """Wait until PostgreSQL knows that its clients have gone, and has released their locks."""
        if self.kind == "postgresql":
            wait_until(lambda: not self._activity("backend_type = 'client backend'"))


def wait_until(condition):
    """Wait for what another process brings about."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


# In a child


# Calls of the client and of the base
POINTS = {
    "staged": (S3Client, "upload_file", "before"),
    "uploaded": (S3Client, "upload_file", "after"),
    "voted": (RelStorage, "tpc_finish", "before"),
    "in finish": (RelStorage, "tpc_finish", "inside"),
    "base finished": (RelStorage, "tpc_finish", "after"),
    "undone": (HistoryPreserving, "undo", "after"),
    "snapshot": (GenericTransactionControl, "get_tid", "before"),
    "settling": (RelStorage, "new_instance", "before"),
    "packing": (PostgreSQLLocker, "release_pack_lock", "before"),
    "packed": (RelStorage, "pack", "after"),
    "deleting": (S3Client, "delete_objects", "before"),
}


class Site:
    """The database and the bucket as one process has them open.

    :param stand_still: called with the name of a point of ``points``; returns when told.
    """

    points = POINTS

    def __init__(self, stand_still, *args, **options):
        self._stand_still = stand_still
        self._reader = None
        self.db = open_db(*args, **options)

    def commit(self, number, *names):
        """Commit blobs with the contents of this number."""
        with self.db.transaction() as conn:
            self._change(conn, number, names)

    def _change(self, conn, number, names):
        root = conn.root()
        for name in names:
            if name not in root:
                root[name] = Blob()
            with root[name].open("w") as file:
                file.write(contents(name, number))

    def commit_slowly(self, step, seconds, number, *names):
        """Do as `commit`, with another data manager that stands still after ours.

        :param str step: "commit", when blobs were stored, or "tpc_vote", when they were voted on.
        :param float seconds: by so many the clock of this process is set forward then.
        """

        def take_time(transaction):
            self._stand_still(step)
            now = time.time
            time.time = lambda: now() + seconds

        manager = transaction.TransactionManager()
        conn = self.db.open(manager)
        manager.get().join(SlowDataManager(step, take_time))
        try:
            self._change(conn, number, names)
            manager.commit()
        finally:
            manager.abort()
            conn.close()

    def commit_large(self, size, name):
        """Commit a blob of a size."""
        with self.db.transaction() as conn:
            conn.root()[name] = Blob(contents(name, 1, size))

    def delete(self, *names):
        """Commit that the root no longer refers to these."""
        with self.db.transaction() as conn:
            for name in names:
                del conn.root()[name]

    def read(self, name):
        """Return the number of a blob's contents, as a transaction that begins now sees it."""
        with self.db.transaction() as conn:
            return number_of(name, read(conn.root()[name]))

    def names(self):
        """Return the names of all blobs."""
        with self.db.transaction() as conn:
            return sorted(conn.root())

    def look(self):
        """Begin a transaction that goes on, and load no blob."""
        self._reader = self.db.open(transaction.TransactionManager())
        self._reader.root()._p_activate()

    def read_there(self, name):
        """Return the number of a blob's contents, as the transaction of `look` sees it."""
        return number_of(name, read(self._reader.root()[name]))

    def look_away(self):
        """End the transaction of `look`."""
        self._reader.close()

    def last(self):
        """Return the tid of the last transaction."""
        with self.db.transaction() as conn:
            conn.root()._p_activate()
        return self.db.lastTransaction()

    def undo(self, *tids):
        """Undo transactions in a new one."""
        manager = transaction.TransactionManager()
        self.db.undoMultiple([encodebytes(tid)[:-1] for tid in tids], manager.get())
        manager.commit()

    def pack(self, seconds=0):
        """Pack to some seconds ago; by default nothing is too new."""
        self.db.pack(time.time() - seconds if seconds else time.time() + 1)

    def sweep(self):
        """Sweep and return the counts."""
        return vars(self.db.storage.sweep())

    # Standing still

    def hold(self, point, after=0):
        """Stand still at a point of ``points``, once, after it was passed some times."""
        cls, method, when = self.points[point]
        original = cls.__dict__[method]
        passed = 0

        @functools.wraps(original)
        def call(*args, **kw):
            nonlocal passed
            passed += 1
            if passed != after + 1:
                return original(*args, **kw)
            if when == "before":
                self._stand_still(point)
            if when == "inside":
                args = self._inside(point, *args)
            result = original(*args, **kw)
            if when == "after":
                self._stand_still(point)
            return result

        setattr(cls, method, call)

    def _inside(self, point, base, transaction, function=None):
        def callback(tid):
            if function is not None:
                function(tid)
            self._stand_still(point)

        return base, transaction, callback


class SlowDataManager:
    """Takes each step of a transaction after ZODB, and calls a function in one of them."""

    transaction_manager = None

    def __init__(self, step, function):
        setattr(self, step, function)

    def sortKey(self):
        return "~"

    def _nothing(self, transaction):
        pass

    abort = tpc_begin = commit = tpc_vote = tpc_finish = tpc_abort = _nothing


def serve(pipe, cls, args, options):
    """Open a site and do what the pipe says, until it ends."""

    def stand_still(point):
        pipe.send(("reached", point))
        assert pipe.recv() == "go on"

    try:
        site = cls(stand_still, *args, **options)
        pipe.send(("result", None))
        while True:
            name, args = pipe.recv()
            try:
                pipe.send(("result", getattr(site, name)(*args)))
            except Exception as error:
                mro = [each.__name__ for each in type(error).__mro__]
                pipe.send(("error", (mro, traceback.format_exc())))
    except (EOFError, BrokenPipeError):
        pass  # whoever started us has gone


# In the parent


class ChildError(Exception):
    """What a call in a child raised.

    :ivar names: of its class and the classes above it.
    """

    def __init__(self, names, text):
        super().__init__(text)
        self.names = names


@contextmanager
def raises_there(name):
    """Expect that a call in a child raises an error of a class of this name."""
    try:
        yield
    except ChildError as error:
        if name not in error.names:
            raise
    else:
        raise AssertionError(f"no {name}")


class Process:
    """A `Site` in a process of its own, which SIGKILL ends.

    ``process.anything(...)`` calls that method there; ``process.begin("anything", ...)`` does not
    wait for the result.
    """

    # A server that has imported everything forks them off.
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload([__name__])

    def __init__(self, cls, args, options):
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(
            target=serve, args=(other, cls, args, options), daemon=True
        )
        self._process.start()
        other.close()

    def __getattr__(self, name):
        def call(*args):
            self.begin(name, *args)
            return self.result()

        return call

    def begin(self, name, *args):
        """Call a method there."""
        self._pipe.send((name, args))

    def _receive(self, expected):
        assert self._pipe.poll(PATIENCE * 2), f"the child never sent {expected!r}"
        kind, value = self._pipe.recv()
        if kind == "error":
            raise ChildError(*value)
        assert kind == expected, f"the child has {kind} {value!r}"
        return value

    def result(self):
        """Wait for what the method returns, or raise a `ChildError`."""
        return self._receive("result")

    def wait_for(self, point):
        """Wait until it stands still at a point."""
        assert self._receive("reached") == point

    def is_busy(self):
        """Tell whether it still has to answer."""
        return not self._pipe.poll(0)

    def go_on(self):
        """Let it go on from where it stands still."""
        self._pipe.send("go on")

    def kill(self):
        """End it by SIGKILL."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


class Cluster:
    """A database, a bucket, and the processes that share them.

    :param directory: where each process has a cache of its own.
    """

    site = Site
    imports = ("relstorage",)

    def __init__(self, database, location, directory):
        self.database = database
        self.location = location
        self.directory = str(directory)
        self._processes = []

    def _arguments(self, name, options):
        return {
            "cache": name,
            "imports": self.imports,
            "base": self.database.section,
            **options,
        }

    def start(self, name, cls=None, location=None, **options):
        """Start a process.

        :param str name: the same is the same cache.
        :param cls: its `Site`.
        :param location: the same bucket, as seen through something.
        :param options: keys of <s3blobstorage>.
        :returns: its `Process`, ready.
        """
        args = location or self.location, self.directory
        process = Process(cls or self.site, args, self._arguments(name, options))
        self._processes.append(process)
        process.result()
        return process

    def open(self, name, **options):
        """Open the database in this process."""
        return open_db(self.location, self.directory, **self._arguments(name, options))

    def objects(self):
        """Return the keys of the bucket, sorted."""
        return keys(self.location)

    def references(self):
        """Return the keys that the revisions in the database refer to, sorted."""
        return sorted(set(self.database.blobs().values()))

    def pack_base(self):
        """Pack as RelStorage's own zodbpack does, which knows nothing of buckets."""
        with closing(self.open_base()) as base:
            base.pack(time.time() + 1, referencesf)

    def convert(self, base):
        """Copy all transactions of another storage into the database, which is empty, and close it.

        It is no `Site` that does so, because a DB would make a root object.
        """
        text = section(self.location, self.directory, "converter", self.database.section)
        storage = storageFromString(f"%import relstorage\n%import zodb_s3blobs\n{text}")
        with closing(storage), closing(base):
            storage.copyTransactionsFrom(base)

    def open_base(self):
        """Open the RelStorage without ours."""
        return storageFromString(f"%import relstorage\n{self.database.section}")

    def backdate(self, seconds, *names):
        """Let objects of rclone have been uploaded some seconds before they were."""
        client = boto3_client(self.location)
        for name in names:
            place = {"Bucket": self.location.bucket, "Key": name}
            found = client.get_object(**place)
            modified = found["LastModified"].timestamp() - seconds
            metadata = {**found["Metadata"], "mtime": str(modified)}
            client.put_object(**place, Body=found["Body"].read(), Metadata=metadata)
        client.close()

    def stop(self):
        """Kill the processes that are left."""
        for process in self._processes:
            process.kill()


@contextmanager
def cluster_of(request, kind, keep_history):
    """Context manager: a `Cluster` for one test.

    :param request: pytest's.
    :param str kind: of the `Database`.
    """
    directory = request.getfixturevalue("tmp_path")
    location: S3Location = request.getfixturevalue("s3")
    if kind == "sqlite3":
        place = directory / "sqlite3"
        place.mkdir()
    else:
        server = request.getfixturevalue("postgresql")
        place = server.new_database()
    cluster = Cluster(Database(kind, str(place), keep_history), location, directory)
    try:
        yield cluster
    finally:
        cluster.stop()
        if kind == "postgresql":
            server.drop_database(place)
