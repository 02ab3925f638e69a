"""Eight threads over one FileStorage, as a Zope server has them: nothing lost, nothing mixed up."""

import random
import threading
import time

from BTrees.OOBTree import OOBTree
import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError

from .storages import leftovers
from .storages import open_db
from .storages import random_bytes
from .storages import read
from .storages import start


THREADS = 8
ROUNDS = 12
SHARED = 4


class Contents:
    """What a blob's bytes say about who wrote them: they begin with name and version."""

    @staticmethod
    def make(name, version):
        size = random.Random(f"{name} {version}").choice((0, 100, 5000, 70000))
        head = f"{name} {version}\n".encode()
        return head + random_bytes((name, version), size)

    @classmethod
    def check(cls, name, data):
        """Return the version of whole and proper bytes of this blob."""
        head, _, _rest = data.partition(b"\n")
        found, version = head.decode().split()
        assert found == name
        assert data == cls.make(name, int(version))
        return int(version)


class Worker:
    """One thread's requests: each changes blobs and reads those of others, with retries.

    :param retried: the errors that a request is tried again for.
    """

    def __init__(self, db, number, failures, retried):
        self._db = db
        self._number = number
        self._random = random.Random(number)
        self._failures = failures
        self._retried = retried
        self.conflicts = 0
        #: versions of our own blobs, and how often we have raised each of the shared ones
        self.committed = {}
        self.raised = dict.fromkeys(range(SHARED), 0)

    def __call__(self):
        for turn in range(ROUNDS):
            if self._failures.is_set():
                return
            try:
                self._request(turn)
            except BaseException:
                self._failures.set()
                raise

    def _request(self, turn):
        manager = transaction.TransactionManager()
        for _attempt in range(200):
            conn = self._db.open(manager)
            try:
                manager.begin()
                shared = self._change(conn.root(), turn)
                manager.commit()
            except self._retried:
                self.conflicts += 1
                manager.abort()
                continue
            finally:
                manager.abort()
                conn.close()
            self.committed[f"t{self._number}-{turn}"] = turn
            self.raised[shared] += 1
            return
        raise AssertionError("too many conflicts")

    def _change(self, root, turn):
        # A blob of our own, anew each time
        name = f"t{self._number}-{turn}"
        root[f"of {self._number}"][name] = Blob(Contents.make(name, turn))
        # A blob that all threads rewrite
        shared = self._random.randrange(SHARED)
        blob = root["shared"][shared]
        version = Contents.check(f"s{shared}", read(blob))
        # In the mode "r+" the old bytes are copied first, which the cache may have evicted.
        with blob.open(self._random.choice(("w", "r+"))) as file:
            file.write(Contents.make(f"s{shared}", version + 1))
            file.truncate()
        # Blobs of others
        for other in self._random.sample(range(THREADS), 3):
            for name, blob in list(root[f"of {other}"].items()):
                Contents.check(name, read(blob))
        return shared


def run(db, while_running=None):
    """Let all workers loose; return them when they are done."""
    retried = (TransientError,)
    if while_running:
        # A pack takes revisions away that older transactions still want, in stock ZODB, too.
        retried += (POSKeyError,)
    with db.transaction() as conn:
        root = conn.root()
        root["shared"] = OOBTree()
        for number in range(SHARED):
            root["shared"][number] = Blob(Contents.make(f"s{number}", 0))
        for number in range(THREADS):
            root[f"of {number}"] = OOBTree()
    failures = threading.Event()
    workers = [Worker(db, number, failures, retried) for number in range(THREADS)]
    threads = [start(worker) for worker in workers]
    while while_running and any(thread.is_alive() for thread in threads):
        while_running()
    for thread in threads:
        thread.result()
    return workers


def verify(location, directory, workers):
    """Look at everything through a database of its own with an empty cache."""
    db = open_db(location, directory, cache="empty")
    with db.transaction() as conn:
        root = conn.root()
        for number, worker in enumerate(workers):
            found = {
                name: Contents.check(name, read(blob))
                for name, blob in root[f"of {number}"].items()
            }
            assert found == worker.committed
        for number in range(SHARED):
            expected = sum(worker.raised[number] for worker in workers)
            assert Contents.check(f"s{number}", read(root["shared"][number])) == expected
    report = db.storage.sweep(dry_run=True)
    assert report.foreign == report.in_flight == 0
    db.close()
    return report


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"cache_size": "300KB", "upload_concurrency": "1"}, id="tight"),
    ],
)
def test_eight_threads_lose_and_mix_up_nothing(s3, tmp_path, options):
    """Commits, conflicts, retries and reads of each other's blobs, also where room is scarce."""
    db = open_db(s3, tmp_path, **options)
    workers = run(db)
    assert sum(worker.conflicts for worker in workers) > 0
    assert leftovers(db.storage) == []
    db.close()
    report = verify(s3, tmp_path, workers)
    # Nothing was packed: each committed revision still needs its object, and no other is there.
    rewritten = sum(sum(worker.raised.values()) for worker in workers)
    assert report.kept == THREADS * ROUNDS + rewritten + SHARED
    assert report.garbage == 0


def test_eight_threads_under_a_packer_lose_nothing(s3, tmp_path):
    """A pack in a loop deletes old revisions beside the commits, and no other."""
    db = open_db(s3, tmp_path)
    packs = []

    def pack():
        db.pack(time.time())
        packs.append(db.storage.sweep(dry_run=True))

    workers = run(db, pack)
    assert len(packs) > 1
    db.pack(time.time() + 1)
    db.close()
    report = verify(s3, tmp_path, workers)
    assert (report.kept, report.garbage) == (THREADS * ROUNDS + SHARED, 0)
