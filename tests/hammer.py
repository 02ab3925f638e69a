"""Readers of two processes on one cache, a tenth as large as what they read.

    python -m tests.hammer [SECONDS]

Each process has its own copy of a database, with the same bucket and the same cache. All modes in
which a blob can be opened are used, at random, by eight threads in each; with every other opening a
blob is evicted. The exit status is 1 when there was any error.
"""

import argparse
from collections import Counter
from contextlib import closing
from dataclasses import asdict
from dataclasses import dataclass
from dataclasses import field
from functools import cache
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback

from persistent.list import PersistentList
import transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import EVICTION_ATTEMPTS
from zodb_s3blobs.testing.server import EmbeddedS3

from .caches import committed
from .caches import committed_size
from .caches import Observer
from .services.location import new_bucket
from .services.location import S3Location
from .storages import make_storage
from .storages import random_bytes
from .storages import read


PROCESSES, THREADS = 2, 8
BLOBS = 100
REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Errors that are kept as they are; the others are counted.
KEPT_ERRORS = 5
# Openings between two moments in which a thread forgets the objects that it has loaded.
FORGET = 20


@dataclass
class Report:
    """What came of it; those of several processes can be added.

    :ivar opened: how often, by mode
    :ivar vanished: how often a path from ``Blob.committed`` was evicted before it was opened
    :ivar errors: texts
    :ivar largest: sum of the sizes of the files in the cache, in bytes
    """

    opened: Counter = field(default_factory=Counter)
    vanished: int = 0
    downloads: int = 0
    evictions: int = 0
    error_count: int = 0
    errors: list = field(default_factory=list)
    largest: int = 0
    budget: int = 0

    def add(self, other):
        self.opened.update(other["opened"])
        self.vanished += other["vanished"]
        self.downloads += other["downloads"]
        self.error_count += other["error_count"]
        self.errors += other["errors"]

    def __str__(self):
        lines = [f"{mode:24}{count:8}" for mode, count in sorted(self.opened.items())]
        return "\n".join(
            [
                *lines,
                f"{'openings':24}{self.opened.total():8}",
                f"{'downloads':24}{self.downloads:8}",
                f"{'evictions':24}{self.evictions:8}",
                f"{'paths that vanished':24}{self.vanished:8}",
                f"{'errors':24}{self.error_count:8}",
                f"largest cache: {self.largest} of {self.budget} bytes",
                *self.errors[:KEPT_ERRORS],
            ]
        )


@cache
def contents(number):
    """Return the bytes of a blob, which tell which one's they are."""
    size = random.Random(number).choice((0, 10, 1000, 5000, 20_000, 60_000))
    return f"{number}\n".encode() + random_bytes(number, size)


class Refused(Exception):
    """The end of a transaction that was never meant to succeed."""


class Refusal:
    """Votes against a transaction after all others have voted for it."""

    def __init__(self, manager):
        self.transaction_manager = manager

    def sortKey(self):
        return "~"

    def tpc_vote(self, txn):
        raise Refused

    def abort(self, txn):
        pass

    commit = tpc_begin = tpc_abort = tpc_finish = abort


class Reader:
    """One thread: opens blobs in all modes and compares their bytes."""

    def __init__(self, db, number, report):
        self._random = random.Random(number)
        self._report = report
        self._storage = db.storage
        self._manager = transaction.TransactionManager()
        self._connection = db.open(self._manager)
        self._modes = [
            *(self.open_r, self.open_c, self.open_committed_file, self.committed) * 6,
            *(self.open_r_plus, self.open_a) * 4,
            *(self.open_w, self.savepoint) * 2,
            self.vote_and_abort,
        ]

    def run(self, end, openings):
        """Go on until a time of the monotonic clock, or so often."""
        count = 0
        while count < openings and time.monotonic() < end:
            count += 1
            number = self._random.randrange(BLOBS)
            mode = self._random.choice(self._modes)
            try:
                blob = self._connection.root()["blobs"][number]
                mode(blob, contents(number))
                self._report.opened[mode.__name__] += 1
            except Exception:
                self._report.error_count += 1
                if len(self._report.errors) < KEPT_ERRORS:
                    self._report.errors.append(f"{mode.__name__} {traceback.format_exc()}")
            self._manager.abort()
            if count % FORGET == 0:
                self._connection.cacheMinimize()

    def close(self):
        self._manager.abort()
        self._connection.close()

    # The modes

    def open_r(self, blob, data):
        with blob.open("r") as file:
            assert file.read() == data

    def open_c(self, blob, data):
        with blob.open("c") as file:
            assert file.read() == data

    def open_committed_file(self, blob, data):
        blob._p_activate()
        with self._storage.openCommittedBlobFile(blob._p_oid, blob._p_serial) as file:
            assert file.read() == data

    def committed(self, blob, data):
        for _attempt in range(EVICTION_ATTEMPTS):
            path = blob.committed()
            try:
                with open(path, "rb") as file:
                    assert file.read() == data
                return
            except FileNotFoundError:  # a path promises nothing
                self._report.vanished += 1
        raise AssertionError("evicted again and again")

    def open_r_plus(self, blob, data):
        with blob.open("r+") as file:
            assert file.read() == data
            file.write(b"more")
        assert read(blob) == data + b"more"

    def open_a(self, blob, data):
        with blob.open("a") as file:
            file.write(b"more")
        assert read(blob) == data + b"more"

    def open_w(self, blob, data):
        with blob.open("w") as file:
            file.write(b"new")
        assert read(blob) == b"new"
        self._manager.abort()
        assert read(blob) == data

    def savepoint(self, blob, data):
        with blob.open("a") as file:
            file.write(b"more")
        self._manager.savepoint()
        assert read(blob) == data + b"more"
        self._manager.abort()
        assert read(blob) == data

    def vote_and_abort(self, blob, data):
        with blob.open("r+") as file:
            file.write(b"new")
        self._manager.get().join(Refusal(self._manager))
        try:
            self._manager.commit()
        except Refused:
            pass
        self._manager.abort()
        assert read(blob) == data


@dataclass
class Site:
    """A database of which each process has a copy, with one bucket and one cache."""

    location: S3Location
    directory: str
    budget: int

    @classmethod
    def make(cls, location, directory):
        """Commit the blobs; the cache is as large as a tenth of them."""
        size = sum(len(contents(number)) for number in range(BLOBS))
        site = cls(location, str(directory), size // 10)
        with closing(site.open(0)[0]) as db, db.transaction() as conn:
            conn.root()["blobs"] = PersistentList()
            for number in range(BLOBS):
                conn.root()["blobs"].append(Blob(contents(number)))
        for number in range(1, PROCESSES + 1):
            shutil.copy(site.path(0), site.path(number))
        return site

    def path(self, number):
        return f"{self.directory}/{number}.fs"

    @property
    def cache_dir(self):
        return f"{self.directory}/cache"

    def open(self, number):
        """Return the database of a process, and its client."""
        storage, client = make_storage(
            self.location,
            self.directory,
            base=FileStorage(self.path(number)),
            cache_size=self.budget,
        )
        return DB(storage, pool_size=THREADS + 1), client

    def read(self, number, seconds, openings):
        """Let all threads of a process read, and return its report."""
        report = Report()
        db, client = self.open(number)
        with closing(db):
            before = db.storage.lastTransaction()
            readers = [Reader(db, f"{number} {thread}", report) for thread in range(THREADS)]
            limits = time.monotonic() + seconds, openings
            threads = [threading.Thread(target=reader.run, args=limits) for reader in readers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for reader in readers:
                reader.close()
            assert db.storage.lastTransaction() == before
            self.check(db)
            report.downloads = client.count("download_file")
        return report

    def check(self, db):
        """No blob was emptied or changed."""
        with db.transaction() as conn:
            for number, blob in enumerate(conn.root()["blobs"]):
                assert read(blob) == contents(number)


def process(text):
    """Be one of the processes; print its report."""
    task = json.loads(text)
    site = Site(S3Location(**task.pop("location")), task["directory"], task["budget"])
    report = site.read(task["number"], task["seconds"], task["openings"])
    sys.stdout.write(json.dumps(vars(report)))


def hammer(location, directory, seconds=math.inf, openings=math.inf):
    """Let the processes read, each thread for so long or so often, and return a `Report`."""
    site = Site.make(location, directory)
    report = Report(budget=site.budget)
    there = len(committed(site.cache_dir))
    with Observer(site.cache_dir) as observer:
        processes = [
            _start({**asdict(site), "number": n, "seconds": seconds, "openings": openings})
            for n in range(1, PROCESSES + 1)
        ]
        for child in processes:
            output, _errors = child.communicate()
            assert child.returncode == 0
            report.add(json.loads(output))
    report.largest = observer.largest
    # What was there or came has gone or is there.
    report.evictions = there + report.downloads - len(committed(site.cache_dir))
    with closing(S3BlobCache(site.cache_dir, site.budget)) as cache:
        assert cache.check() == []
        assert cache.current_size() == committed_size(site.cache_dir) <= site.budget
    return report


def _start(task):
    return subprocess.Popen(
        [sys.executable, "-c", f"from tests.hammer import process; process({json.dumps(task)!r})"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("seconds", nargs="?", type=float, default=60, help="60 by default")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as directory, EmbeddedS3(f"{directory}/s3") as server:
        report = hammer(new_bucket(server), directory, seconds)
    sys.stdout.write(f"{report}\n")
    return 1 if report.error_count else 0


if __name__ == "__main__":
    sys.exit(main())
