"""RelStorage over PostgreSQL: small commits beside a large upload, and the sweep."""

from contextlib import contextmanager
from contextlib import ExitStack
from dataclasses import replace
import gc
import multiprocessing
import os
import statistics
import tempfile
import time

from persistent.mapping import PersistentMapping
from persistent.timestamp import TimeStamp
import transaction
from ZODB.blob import Blob
import ZODB.config
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.utils import newTid
from ZODB.utils import p64

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.postgresql import PostgresqlServer
from tests.services.proxy import LatencyProxy
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.records import with_reference

from .commit import BLOB_RECORD
from .commit import link_to_blob
from .common import alternate
from .common import at_most
from .common import FILESTORAGE
from .common import for_information
from .common import KiB
from .common import MiB
from .common import open_storage
from .common import random_file
from .common import storage_text
from .common import timed
from .common import workspace
from .null_s3 import NullS3
from .packing import delete_garbage


UPLOAD = 200 * MiB
RATE = 50  # MB/s
ROUNDS = 6
SMALL_BLOB = 10 * KiB
DAY = 86400
# Processors
DATABASE, UPLOADER = 0, 1


@contextmanager
def postgresql():
    """Yield a fresh `PostgresqlServer`."""
    # Its socket needs a short path. In memory no file of ours, written or removed, holds it up.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    with (
        tempfile.TemporaryDirectory(prefix="postgresql-", dir=place) as directory,
        PostgresqlServer(directory) as server,
    ):
        yield server


def relstorage(dsn, *lines):
    """Return the section of a RelStorage; further lines are its keys."""
    database = ["<postgresql>", "driver psycopg2", f"dsn {dsn}", "</postgresql>"]
    return "\n".join(["%import relstorage", "<relstorage>", *lines, *database, "</relstorage>"])


# Small commits beside a large upload


def small_commits():
    """The longest small commit while another process uploads 200 MB, beside a quiet time.

    For information also with small blobs, and while the same upload is no transaction: what that
    costs is the machine's and no lock's. At last blobs that RelStorage keeps in the database.

    The uploader and what stands for S3 have one processor, the writer and the database another, as
    if they were on hosts of their own: locks are what is measured.
    """
    _run_on(DATABASE)
    with workspace() as directory, postgresql() as server, ExitStack() as stack:
        _run_on(UPLOADER)
        s3 = stack.enter_context(NullS3())
        proxy = stack.enter_context(LatencyProxy(s3.endpoint_url, up_mbps=RATE))
        path = random_file(directory / "source", UPLOAD)
        location = new_bucket(s3)
        capped = replace(location, endpoint_url=proxy.endpoint_url)
        base = relstorage(server.new_database())
        ours = open_storage(directory / "uploader", capped, base=base)
        # The small blobs of the other process take another road than the large one.
        text = storage_text(directory / "writer", location, base)
        rows = []
        with Uploader(ours, path, capped) as uploader:
            rows += _beside(uploader, Writer(text, 0), "small commit", goal=1.5)
            rows += _beside(uploader, Writer(text, SMALL_BLOB), "10 KiB commit")
        lines = f"blob-dir {directory}/own", "shared-blob-dir false", "blob-cache-size 1GB"
        own = relstorage(server.new_database(), *lines)
        with Uploader(ZODB.config.storageFromString(own), path, capped) as uploader:
            rows += _beside(uploader, Writer(own, 0), "stock commit")
    return rows


def _beside(uploader, writer, what, goal=None):
    """Return the rows of one pair of processes."""
    works = [lambda: time.sleep(uploader.seconds), uploader.upload_bare, uploader.upload]
    periods = [[] for _ in works]
    with writer:
        for turn in range((ROUNDS if goal else ROUNDS // 2) + 1):
            # A different one begins each time, and the first round does not count.
            for index in sorted(range(len(works)), key=lambda index: (index + turn) % len(works)):
                gc.collect()
                writer.start()
                works[index]()
                times = writer.stop()
                if turn:
                    periods[index].append(times)
    rows = []
    measures = [
        ("longest", lambda rounds: max(map(max, rounds))),
        ("longest, best round", lambda rounds: min(map(max, rounds))),
        ("99 %", lambda rounds: min(map(_late, rounds))),
        ("median", lambda rounds: min(map(statistics.median, rounds))),
    ]
    for name, measure in measures:
        quiet, bare, ours = (measure(rounds) * 1e3 for rounds in periods)
        text = f"beside 200 MB: {what}, {name}"
        if goal and name == "longest":
            rows.append(at_most(goal, text, "null", "ms", ours, quiet))
        else:
            rows.append(for_information(text, "null", "ms", ours, quiet))
        rows.append(for_information(f"{text}, bare", "null", "ms", bare, quiet))
    return rows


def _late(times):
    return statistics.quantiles(times, n=100)[-1]


class Uploader:
    """Commits a large blob; other objects than those of the `Writer`."""

    def __init__(self, storage, path, location):
        self._path = path
        self._location = location
        self._client = boto3_client(location)
        self._db = DB(storage)
        self._connection = self._db.open()
        root = self._connection.root()
        root["writer"] = PersistentMapping()
        root["uploader"] = self._root = PersistentMapping()
        transaction.commit()
        #: how long the last commit took
        self.seconds = UPLOAD / RATE / 1e6

    def upload(self):
        """Commit a large blob."""
        link_to_blob(self._root, self._path)
        self.seconds = timed(transaction.commit)

    def upload_bare(self):
        """Send the same bytes the same way without any transaction."""
        self._client.upload_file(str(self._path), self._location.bucket, "reference")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        transaction.abort()
        self._connection.close()
        self._db.close()


class Writer:
    """Commits small transactions in a process of its own, one after the other.

    :param str text: configuration of its storage.
    :param int size: of the blob in each transaction, 0 for a plain object.
    """

    def __init__(self, text, size):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, pipe = spawn.Pipe()
        self._process = spawn.Process(target=_write, args=(text, size, pipe), daemon=True)

    def start(self):
        self._pipe.send("start")
        assert self._pipe.recv() == "started"

    def stop(self):
        """Return the seconds of each commit since `start`."""
        self._pipe.send("stop")
        return self._pipe.recv()

    def __enter__(self):
        self._process.start()
        return self

    def __exit__(self, *exc_info):
        self._pipe.close()
        self._process.join()


def _run_on(number):
    """Run this process, and those it starts from now on, on one processor; Linux lets us."""
    if hasattr(os, "sched_setaffinity") and os.cpu_count() > 1:
        os.sched_setaffinity(0, {number})


def _write(text, size, pipe):
    _run_on(DATABASE)
    db = DB(ZODB.config.storageFromString(text))
    root = db.open().root()["writer"]
    body = os.urandom(size)
    try:
        while pipe.recv():
            times = []
            # A collection of all objects takes longer than several commits.
            gc.enable()
            gc.collect()
            gc.disable()
            _write_once(root, size, body)
            pipe.send("started")
            while not pipe.poll():
                times.append(_write_once(root, size, body))
            pipe.recv()
            pipe.send(times)
    except EOFError:
        pass  # nobody wants more
    db.close()


def _write_once(root, size, body):
    root["value"] = Blob(body) if size else time.time()
    return timed(transaction.commit)


# The sweep


def sweep():
    """Sweep over PostgreSQL and a FileStorage, beside bare requests; 10 of 21 keys are garbage."""
    rows = []
    with postgresql() as server:
        for count in (3_000, 21_000):
            rows += _sweep(server, count)
    return rows


def _sweep(server, count):
    keys = Keys(count)
    bases = {
        "FileStorage": FILESTORAGE,
        "history": relstorage(server.new_database()),
        "no history": relstorage(server.new_database(), "keep-history false"),
    }
    with workspace() as directory:
        benches = {}
        for name, base in bases.items():
            (directory / name).mkdir()
            text = base.format(directory=directory / name)
            keys.store(ZODB.config.storageFromString(text))
            benches[name] = SweepBench(keys, text)
        bare = SweepBench(keys, None)
        limit, *seconds = alternate(3, bare.reference, *(each.ours for each in benches.values()))
    rows = []
    what = f"sweep {count:,} keys"
    for (name, bench), each in zip(benches.items(), seconds, strict=True):
        rows.append(for_information(f"{what}, {name}", "null", "s", each, limit))
        requests = f"{what}, {name}: requests"
        rows.append(at_most(1.2, requests, "any", "", bench.requests, bare.requests))
    return rows


class Keys:
    """A database of blobs that were stored two days ago, and a bucket with garbage beside them."""

    def __init__(self, count):
        self.stamps = [(p64(number), new_stamp()) for number in range(1, count * 11 // 21 + 1)]
        self.live = [blob_key(oid, stamp) for oid, stamp in self.stamps]
        oids = [oid for oid, _stamp in self.stamps[: count - len(self.live)]]
        self.garbage = [blob_key(oid, new_stamp()) for oid in oids]

    def store(self, storage):
        """Make a storage have the records, and close it."""
        then = TimeStamp(newTid(None)).timeTime() - 2 * DAY
        tid = TimeStamp(*time.gmtime(then)[:6]).raw()
        txn = TransactionMetaData()
        storage.tpc_begin(txn, tid)
        for oid, stamp in self.stamps:
            storage.restore(oid, tid, with_reference(BLOB_RECORD, stamp), "", None, txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        storage.close()


class SweepBench:
    """The same sweep, each time of a fresh bucket."""

    def __init__(self, keys, base):
        self._keys = keys
        self._base = base
        self.requests = None

    @contextmanager
    def _arranged(self):
        keys = self._keys.live + self._keys.garbage
        with NullS3(keys=keys) as server, LatencyProxy(server.endpoint_url) as proxy:
            location = replace(new_bucket(server), endpoint_url=proxy.endpoint_url)
            proxy.reset()
            yield location
            self.requests = proxy.stats()["requests"]

    def reference(self):
        """A listing and batch deletes; return the seconds."""
        with self._arranged() as location:
            client = boto3_client(location)
            return timed(delete_garbage, client, location.bucket, self._keys.garbage)

    def ours(self):
        """Sweep through the storage; return the seconds."""
        with workspace() as directory, self._arranged() as location:
            storage = open_storage(directory, location, base=self._base)
            begun = time.perf_counter()
            report = storage.sweep()
            seconds = time.perf_counter() - begun
            storage.close()
            assert report.deleted == len(self._keys.garbage), report
        return seconds
