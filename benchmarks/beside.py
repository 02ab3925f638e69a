"""Small commits while a large blob is uploaded, beside a quiet time: locks are what is measured.

The uploader and what stands for S3 have one processor, the writer and the database another, as if
they were on hosts of their own, and the database is in memory. So neither the scheduler nor a disk
makes a commit wait. Threads of one process have the two processors in the same way; each waits now
and then for the interpreter's lock, also beside an upload by plain boto3.
"""

from contextlib import contextmanager
from dataclasses import replace
import gc
import multiprocessing
import os
import statistics
from threading import Thread
import time

from persistent.mapping import PersistentMapping
import transaction
from ZODB.blob import Blob
import ZODB.config
from ZODB.DB import DB

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy

from .commit import link_to_blob
from .common import at_most
from .common import for_information
from .common import MiB
from .common import timed
from .null_s3 import NullS3


UPLOAD = 200 * MiB
RATE = 50  # MB/s
ROUNDS = 6
# Processors
DATABASE, UPLOADER = 0, 1


def run_on(number):
    """Run this thread, and all that it starts from now on, on one processor; Linux lets us."""
    if hasattr(os, "sched_setaffinity") and os.cpu_count() > 1:
        os.sched_setaffinity(0, {number})


@contextmanager
def two_roads():
    """Yield the locations of a bucket: one behind a wire of 50 MB/s, and the server's own."""
    with NullS3() as server, LatencyProxy(server.endpoint_url, up_mbps=RATE) as proxy:
        location = new_bucket(server)
        yield replace(location, endpoint_url=proxy.endpoint_url), location


def _late(times):
    return statistics.quantiles(times, n=100)[-1] if len(times) > 1 else times[0]


LONGEST = {"longest": lambda rounds: max(map(max, rounds))}
MEASURES = {
    **LONGEST,
    "longest, best round": lambda rounds: min(map(max, rounds)),
    "99 %": lambda rounds: min(map(_late, rounds)),
    "median": lambda rounds: min(map(statistics.median, rounds)),
}
GOALS = {"longest": 1.5}


def beside(uploader, writer, what, measures=MEASURES, goals=None, bare_goals=None):
    """Return the rows of an uploader and a writer.

    Each measure is compared with a quiet time, and ("bare") with the same upload that is no
    transaction: what that costs is the machine's and the interpreter's, and no lock's of a storage.

    :param goals: by what factor a measure may exceed that of a quiet time, by name.
    :param bare_goals: the same for the bare upload.
    """
    goals, bare_goals = goals or {}, bare_goals or {}
    works = [lambda: time.sleep(uploader.seconds), uploader.upload_bare, uploader.upload]
    periods = [[] for _ in works]
    with writer:
        for turn in range((ROUNDS if goals else ROUNDS // 2) + 1):
            # A different one begins each time, and the first round does not count.
            for index in sorted(range(len(works)), key=lambda index: (index + turn) % len(works)):
                gc.collect()
                writer.start()
                works[index]()
                times = writer.stop()
                if turn:
                    periods[index].append(times)
    rows = []
    for name, measure in measures.items():
        quiet, bare, ours = (measure(rounds) * 1e3 for rounds in periods)
        text = f"beside 200 MB: {what}, {name}"
        rows.append(_row(goals.get(name), text, ours, quiet))
        rows.append(_row(bare_goals.get(name), f"{text}; bare", ours, bare))
    return rows


def _row(goal, text, ours, reference):
    if goal is None:
        return for_information(text, "null", "ms", ours, reference)
    return at_most(goal, text, "null", "ms", ours, reference)


class Uploader:
    """Commits a large blob; other objects than those of the writer.

    Attributes: ``db``, for a `writing_thread`.
    """

    def __init__(self, storage, path, location):
        self._path = path
        self._location = location
        self._client = boto3_client(location)
        self.db = DB(storage)
        self._connection = self.db.open()
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
        self.db.close()


def writing_process(text, size=0):
    """Return a `Writer` in a process of its own.

    :param str text: configuration of its storage.
    :param int size: of the blob in each transaction, 0 for a plain object.
    """
    return Writer(multiprocessing.get_context("spawn").Process, _write, text, size)


def writing_thread(db):
    """Return a `Writer` in a thread of this process, with the uploader's database."""
    return Writer(Thread, _write_to, db, 0)


class Writer:
    """Commits small transactions beside the caller, one after the other."""

    def __init__(self, kind, function, *arguments):
        self._pipe, pipe = multiprocessing.Pipe()
        self._worker = kind(target=function, args=(*arguments, pipe), daemon=True)

    def start(self):
        self._pipe.send("start")
        assert self._pipe.recv() == "started"

    def stop(self):
        """Return the seconds of each commit since `start`."""
        self._pipe.send("stop")
        return self._pipe.recv()

    def __enter__(self):
        self._worker.start()
        return self

    def __exit__(self, *exc_info):
        self._pipe.close()
        self._worker.join()


def _write(text, size, pipe):
    run_on(DATABASE)
    db = DB(ZODB.config.storageFromString(text))
    _write_to(db, size, pipe)
    db.close()


def _write_to(db, size, pipe):
    run_on(DATABASE)
    connection = db.open()
    root = connection.root()["writer"]
    body = os.urandom(size)
    try:
        while pipe.recv():
            times = []
            # A collection of all objects takes longer than several commits.
            gc.collect()
            gc.disable()
            _write_once(root, size, body)
            pipe.send("started")
            while not pipe.poll():
                times.append(_write_once(root, size, body))
            gc.enable()
            pipe.recv()
            pipe.send(times)
    except EOFError:
        pass  # nobody wants more
    connection.close()


def _write_once(root, size, body):
    root["value"] = Blob(body) if size else time.time()
    return timed(transaction.commit)
