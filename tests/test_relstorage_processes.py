"""Two processes on one RelStorage: each sees what the other commits, and a packer takes nothing."""

from pathlib import Path
import random
import time

from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping
import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError
from ZODB.TimeStamp import TimeStamp

from .relstorages import ChildError
from .relstorages import cluster_of
from .relstorages import contents
from .relstorages import number_of
from .relstorages import Site
from .storages import read
from .storages import start


THREADS = 8
ROUNDS = 50
SHARED = 4
# Short, so that sweeps delete while commits are under way; no commit takes half as long.
GRACE = 5


@pytest.fixture
def cluster(request):
    """A `Cluster` on the database that the test names."""
    with cluster_of(request, *request.param) as cluster:
        yield cluster


def each(*kinds):
    """Run a test on databases of these kinds."""
    params = [
        pytest.param((kind, keep_history), id=kind if keep_history else f"{kind} free")
        for kind in kinds
        for keep_history in (True, False)
    ]
    return pytest.mark.parametrize("cluster", params, indirect=True)


@each("postgresql", "sqlite3")
def test_each_process_reads_what_the_other_has_committed(cluster):
    """After sync, from a cache of its own that has never held it."""
    one, two = cluster.start("one"), cluster.start("two")
    one.commit(1, "a", "b")
    assert two.read("a") == 1
    two.commit(2, "a", "c")
    assert one.read("a") == 2
    assert one.read("c") == 2
    assert two.read("b") == 1
    one.commit(3, "c")
    assert two.read("c") == 3
    assert set(cluster.references()) <= set(cluster.objects())


class Worker:
    """One thread's requests: each makes, changes and deletes blobs, and reads those of others.

    :param int number: of this thread among `threads`.
    :param int rounds: how often at least.
    """

    def __init__(self, db, number, threads, rounds, enough):
        self._db = db
        self._threads = threads
        self._rounds = rounds
        self._number = number
        self._random = random.Random(number)
        self._enough = enough
        self.conflicts = 0
        #: (oid, tid, name, number) of each revision committed
        self.committed = []
        self.deleted = set()

    def __call__(self):
        turn = 0
        while turn < self._rounds or not self._enough.exists():
            self._request(turn)
            turn += 1

    def _request(self, turn):
        manager = transaction.TransactionManager()
        for _attempt in range(500):
            conn = self._db.open(manager)
            try:
                changed, deleted = self._change(conn.root(), turn)
                manager.commit()
                # It changes with each request, by this thread alone.
                tid = conn.root()[f"of {self._number}"]._p_serial
                self.committed += [(blob._p_oid, tid, *rest) for blob, *rest in changed]
                self.deleted.update(deleted)
                return
            except (TransientError, POSKeyError):
                # A pack takes away what was deleted though older transactions still see it.
                self.conflicts += 1
            finally:
                manager.abort()
                conn.close()
        raise AssertionError("too many conflicts")

    def _change(self, root, turn):
        own = root[f"of {self._number}"]
        name = f"t{self._number}-{turn}"
        own[name] = Blob()
        changed = [self._write(own[name], name, 1)]
        if turn >= 2:
            name = f"t{self._number}-{turn - 2}"
            changed.append(self._write(own[name], name, 2))
        deleted = []
        if turn >= 4 and turn % 2:
            deleted = [f"t{self._number}-{turn - 4}"]
            del own[deleted[0]]
        if not turn % 3:
            name = f"s{self._random.randrange(SHARED)}"
            blob = root["shared"][name]
            changed.append(self._write(blob, name, number_of(name, read(blob)) + 1))
        others = root[f"of {self._random.randrange(self._threads)}"]
        for name in self._random.sample(list(others), min(len(others), 2)):
            number_of(name, read(others[name]))
        return changed, deleted

    def _write(self, blob, name, number):
        size = self._random.choice((0, 100, 5000, 70000))
        with blob.open("w") as file:
            file.write(contents(name, number, size))
        return blob, name, number


class BusySite(Site):
    """A process of eight threads, of two."""

    threads = THREADS
    rounds = ROUNDS

    def prepare(self):
        """Commit what all threads need."""
        with self.db.transaction() as conn:
            root = conn.root()
            root["shared"] = OOBTree()
            for number in range(SHARED):
                root["shared"][f"s{number}"] = Blob(contents(f"s{number}", 0))
            for number in range(2 * self.threads):
                root[f"of {number}"] = PersistentMapping()
        return [(blob._p_oid, blob._p_serial, name, 0) for name, blob in root["shared"].items()]

    def work(self, first, enough):
        """Let the threads loose; return what they have committed and deleted.

        :param int first: number of the first thread.
        :param enough: path of a file that exists when enough was swept beside the commits.
        """
        workers = [
            Worker(self.db, first + n, 2 * self.threads, self.rounds, Path(enough))
            for n in range(self.threads)
        ]
        threads = [start(worker) for worker in workers]
        for thread in threads:
            thread.result()
        committed = [entry for worker in workers for entry in worker.committed]
        deleted = set().union(*(worker.deleted for worker in workers))
        return committed, deleted, sum(worker.conflicts for worker in workers)

    def all_numbers(self):
        """Return the numbers of all blobs by their names."""
        with self.db.transaction() as conn:
            return {
                name: number_of(name, read(blob))
                for tree in conn.root().values()
                for name, blob in tree.items()
            }


def pack_meanwhile(packer, workers, enough):
    """Pack and sweep in a loop; return how often, and how many objects were deleted."""
    rounds = deleted = 0
    while any(worker.is_busy() for worker in workers):
        try:
            packer.pack(2)
            deleted += packer.sweep()["deleted"]
        except ChildError as error:
            if "TransientError" not in error.names:
                raise
        rounds += 1
        if deleted:
            enough.touch()
    return rounds, deleted


@pytest.mark.slow
@each("postgresql")
def test_sixteen_threads_in_two_processes_under_a_packer_lose_nothing(cluster, tmp_path):
    """Commits, conflicts and retries beside sweeps that delete; in the end all fits exactly."""
    options = {"cls": BusySite, "gc_grace": f"{GRACE}s"}
    workers = [cluster.start(name, **options) for name in ("one", "two")]
    packer = cluster.start("packer", **options)
    known = packer.prepare()
    enough = tmp_path / "enough"
    for number, worker in enumerate(workers):
        worker.begin("work", number * THREADS, enough)
    rounds, deleted = pack_meanwhile(packer, workers, enough)
    results = [worker.result() for worker in workers]
    assert rounds > 1
    assert deleted > 0
    assert all(conflicts for _committed, _deleted, conflicts in results)
    known += [entry for committed, _deleted, _conflicts in results for entry in committed]
    gone = set().union(*(deleted for _committed, deleted, _conflicts in results))

    check_all(cluster, BusySite, known, gone)


def check_all(cluster, cls, known, gone):
    """Pack, and compare all that is left with what the threads have committed.

    :param cls: the `BusySite`.
    :param known: (oid, tid, name, number) of all revisions.
    :param gone: the names of what was deleted.
    """
    keep_history = cluster.database.keep_history
    last = cluster.start("last", cls=cls, gc_grace="0s")
    if keep_history:
        # The last revisions stay
        tids = sorted({tid for _oid, tid, _name, _number in known})
        last.pack(time.time() - TimeStamp(tids[-20]).timeTime())
    else:
        last.pack()
    survivors = cluster.database.blobs()
    assert cluster.objects() == sorted(set(survivors.values()))
    newest = {name: number for _oid, _tid, name, number in sorted(known, key=lambda e: e[1])}
    assert last.all_numbers() == {
        name: number for name, number in newest.items() if name not in gone
    }
    by_revision = {(oid, tid): (name, number) for oid, tid, name, number in known}
    db = cluster.open("empty")
    for revision in survivors:
        name, number = by_revision[revision]
        with db.storage.openCommittedBlobFile(*revision) as file:
            assert number_of(name, file.read()) == number
    db.close()
    current = len(newest) - len(gone)
    assert len(survivors) > current if keep_history else len(survivors) == current
