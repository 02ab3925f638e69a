"""Eight threads over one FileStorage, as a Zope server has them: nothing lost, nothing mixed up."""

from base64 import encodebytes
import random
import threading
import time

from BTrees.OOBTree import OOBTree
import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.FileStorage.fspack import PackError
from ZODB.POSException import POSKeyError
from ZODB.POSException import UndoError

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference

from .services.location import keys
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

    rounds = ROUNDS

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
        for turn in range(self.rounds):
            if self._failures.is_set():
                return
            try:
                self._request(turn)
            except BaseException:
                self._failures.set()
                raise

    def _request(self, turn):
        shared = self._commit(lambda root: self._change(root, turn))
        self.committed[f"t{self._number}-{turn}"] = turn
        self.raised[shared] += 1

    def _commit(self, change):
        """Commit what change(root) does, and return its result; again after a conflict."""
        manager = transaction.TransactionManager()
        for _attempt in range(200):
            conn = self._db.open(manager)
            try:
                manager.begin()
                result = change(conn.root())
                manager.commit()
            except self._retried:
                self.conflicts += 1
                manager.abort()
                continue
            finally:
                manager.abort()
                conn.close()
            return result
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


class UndoingWorker(Worker):
    """One that also has a blob which it writes, takes back, and brings back again."""

    rounds = 50

    def __init__(self, *args):
        super().__init__(*args)
        self.undone = self.refused = 0
        self._oid = None
        # The last transaction that wrote our blob, and the version before it.
        self._undoable = None

    def _request(self, turn):
        what = turn % 5
        if what in (0, 2):
            super()._request(turn)
        elif what == 1 or self._undoable is None:
            self._write(100 * self._number + turn)
        else:
            self._undo()

    def _write(self, version):
        def change(root):
            blobs = root[f"of {self._number}"]
            if "own" not in blobs:
                blobs["own"] = Blob()
            with blobs["own"].open("w") as file:
                file.write(Contents.make("own", version))
            return blobs["own"]

        before = self.committed.get("own")
        self._oid = self._commit(change)._p_oid
        self._now_is(version, before)

    def _undo(self):
        tid, before = self._undoable
        manager = transaction.TransactionManager()
        manager.begin()
        try:
            self._db.undo(encodebytes(tid).rstrip(), manager.get())
            manager.commit()
        except UndoError:  # packed
            manager.abort()
            self.refused += 1
            self._undoable = None
        else:
            self.undone += 1
            self._now_is(before, self.committed["own"])

    def _now_is(self, version, before):
        self.committed["own"] = version
        # Nobody else writes it. What created it is not taken back.
        tid = self._db.storage.getTid(self._oid)
        self._undoable = (tid, before) if before is not None else None


def run(db, while_running=None, kind=Worker):
    """Let all workers loose; return them when they are done.

    :param kind: their class.
    """
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
    workers = [kind(db, number, failures, retried) for number in range(THREADS)]
    threads = [start(worker) for worker in workers]
    while while_running and any(thread.is_alive() for thread in threads):
        while_running()
    for thread in threads:
        thread.result()
    return workers


def verify(location, directory, workers, **options):
    """Look at everything through a database of its own with an empty cache."""
    db = open_db(location, directory, cache="empty", **options)
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
        pytest.param({"addressing": "record"}, id="by record"),
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


def references(db):
    """Return the keys that the surviving revisions of all blobs refer to; each is read."""
    storage, found = db.storage, set()
    with db.transaction() as conn:
        root = conn.root()
        folders = [root["shared"], *(root[f"of {number}"] for number in range(THREADS))]
        names = {b._p_oid: name for folder in folders for name, b in folder.items()}
    for oid, name in names.items():
        for entry in storage.history(oid, size=10**6):
            tid = entry["tid"]
            with open(storage.loadBlob(oid, tid), "rb") as file:
                Contents.check(f"s{name}" if isinstance(name, int) else name, file.read())
            found.add(blob_key(oid, read_reference(storage.loadSerial(oid, tid))))
    return found


def test_eight_threads_that_undo_under_a_packer_are_exact_at_the_end(s3, tmp_path):
    """By record: each surviving revision has its bytes, and no other object or file is there."""
    options = {"addressing": "record", "gc_grace": "0"}
    db = open_db(s3, tmp_path, **options)
    packs = []

    def pack():
        try:
            # To various times, so that there is something left to be undone.
            db.pack(time.time() - len(packs) % 3 / 2)
        except PackError:
            db.storage.sweep()  # a FileStorage cannot pack while there is an undo
        else:
            packs.append(db.lastTransaction())

    workers = run(db, pack, UndoingWorker)
    assert len(packs) > 3
    for count in ("conflicts", "undone"):
        assert sum(getattr(worker, count) for worker in workers) > THREADS, count
    assert leftovers(db.storage) == []
    db.close()
    verify(s3, tmp_path, workers, **options)
    db = open_db(s3, tmp_path, cache="another", **options)
    expected = references(db)
    assert expected <= set(keys(s3))
    db.storage.sweep()
    assert set(keys(s3)) == expected
    db.pack(time.time() + 1)
    assert sorted(references(db)) == keys(s3)
    assert len(keys(s3)) == SHARED + sum(len(worker.committed) for worker in workers)
    db.close()
    verify(s3, tmp_path, workers)  # read by whatever addressing
