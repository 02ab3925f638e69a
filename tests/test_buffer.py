"""BufferedStorage: what a base hears of a transaction, when, and what is left when it fails."""

from base64 import encodebytes
from contextlib import suppress
from itertools import count
import os
import resource
import signal
import tracemalloc

from BTrees.Length import Length
import pytest
import transaction
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.interfaces import IExternalGC
from ZODB.interfaces import IStorage
from ZODB.interfaces import IStorageUndoable
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadConflictError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import UndoError
from ZODB.utils import p64
from ZODB.utils import z64
from zope.interface import providedBy

from zodb_s3blobs.buffer import BufferedStorage
from zodb_s3blobs.buffer import MEMORY

from .faults import in_child
from .storages import commit_record
from .storages import Failure
from .storages import Gate
from .storages import PLAIN_RECORD
from .storages import start


OID = p64(1)
OTHER = p64(2)
THIRD = p64(3)
UNUSED = count(10**6)

KINDS = ("FileStorage", "MappingStorage")


class Recorder:
    """A base that lists the names of the calls of a transaction, and can do something before one.

    ``before`` maps names of methods to callables that get the call's arguments.
    """

    NAMES = frozenset(
        (
            "tpc_begin",
            "store",
            "checkCurrentSerialInTransaction",
            "deleteObject",
            "restore",
            "undo",
            "tpc_vote",
            "tpc_finish",
            "tpc_abort",
        )
    )

    def __init__(self, base):
        self._base = base
        self.heard = []
        self.before = {}

    @property
    def __provides__(self):
        return providedBy(self._base)

    def __len__(self):
        return len(self._base)

    def __getattr__(self, name):
        method = getattr(self._base, name)
        if name not in self.NAMES:
            return method

        def call(*args, **kw):
            self.heard.append(name)
            if name in self.before:
                self.before[name](*args, **kw)
            return method(*args, **kw)

        return call


@pytest.fixture(params=KINDS)
def inside(request, tmp_path):
    """The storage behind all."""
    inside = (
        FileStorage(f"{tmp_path}/Data.fs") if request.param == "FileStorage" else MappingStorage()
    )
    yield inside
    inside.close()


@pytest.fixture
def base(inside):
    """A `Recorder` around it."""
    return Recorder(inside)


@pytest.fixture
def directory(tmp_path):
    """Where large transactions spill to."""
    directory = tmp_path / "spilled"
    directory.mkdir()
    return directory


@pytest.fixture
def storage(base, directory):
    return BufferedStorage(base, str(directory))


only_mappingstorage = pytest.mark.parametrize("inside", ["MappingStorage"], indirect=True)
only_filestorage = pytest.mark.parametrize("inside", ["FileStorage"], indirect=True)


def begun(storage, **kw):
    txn = TransactionMetaData(**kw)
    storage.tpc_begin(txn)
    return txn


def end(storage, txn):
    """Vote and finish; return the tid."""
    storage.tpc_vote(txn)
    return storage.tpc_finish(txn)


def record(number, size=500):
    """Return a record that no other number has."""
    return b"%016d" % number + bytes(size - 16)


def assert_nothing_is_locked(storage):
    """Others commit at once: through us, and on the base."""
    oid = p64(next(UNUSED))
    first = start(commit_record, storage, oid).result()
    start(commit_record, storage.base, oid, first).result()


class TestBegin:
    def test_base_hears_of_a_transaction_in_its_vote(self, storage, base):
        """First nothing, then all in the order it was asked for."""
        first = commit_record(storage.base, OID)
        base.heard.clear()
        txn = begun(storage)
        assert storage.store(OTHER, z64, PLAIN_RECORD, "", txn) is None
        assert storage.checkCurrentSerialInTransaction(OID, first, txn) is None
        storage.store(THIRD, z64, PLAIN_RECORD, "", txn)
        assert base.heard == []
        storage.tpc_vote(txn)
        assert base.heard == [
            "tpc_begin", "store", "checkCurrentSerialInTransaction", "store", "tpc_vote",
        ]  # fmt: skip
        tid = storage.tpc_finish(txn)
        assert storage.load(OTHER) == storage.load(THIRD) == (PLAIN_RECORD, tid)

    def test_base_takes_the_transaction_as_it_was_given(self, storage, base):
        """Who and why is the base's to keep."""
        txn = TransactionMetaData("someone", "something", {"more": 1})
        storage.tpc_begin(txn)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        end(storage, txn)
        (kept,) = storage.iterator()
        assert (kept.user, kept.description) == (b"someone", b"something")
        assert kept.extension == {"more": 1}

    def test_others_commit_while_one_stores(self, storage):
        """Begin to finish of another transaction, through us and on the base alone."""
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        through_us = start(commit_record, storage, OTHER).result()
        on_the_base = start(commit_record, storage.base, THIRD).result()
        tid = end(storage, txn)
        assert through_us < on_the_base < tid == storage.lastTransaction()

    def test_two_that_have_both_stored_commit_one_after_the_other(self, storage):
        """In whatever order they vote."""
        first, second = begun(storage), begun(storage)
        storage.store(OID, z64, record(1), "", first)
        storage.store(OTHER, z64, record(2), "", second)
        storage.store(THIRD, z64, record(3), "", first)
        late = end(storage, second), end(storage, first)
        assert late == tuple(sorted(late))
        assert [storage.load(oid)[0] for oid in (OID, OTHER, THIRD)] == [
            record(1), record(2), record(3),
        ]  # fmt: skip

    def test_vote_waits_for_a_transaction_that_has_voted(self, storage, base):
        """From there on it is as ever: the base's lock lets one after the other in."""
        first, second = begun(storage), begun(storage)
        for oid, txn in ((OID, first), (OTHER, second)):
            storage.store(oid, z64, PLAIN_RECORD, "", txn)
        storage.tpc_vote(first)
        arrived = base.before["tpc_begin"] = Gate()
        arrived.open()
        waiting = start(end, storage, second)
        arrived.wait()
        waiting.join(0.1)
        assert waiting.is_alive()
        tid = storage.tpc_finish(first)
        assert waiting.result() > tid

    def test_another_commits_between_the_stores_of_a_vote_of_ours_never(self, storage, base):
        """What is checked in the vote is still true when it has finished."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.store(OID, first, record(1), "", txn)
        storage.store(OTHER, z64, record(2), "", txn)
        rivals = []

        def rival(*args):
            base.before.clear()
            rivals.append(start(commit_record, storage.base, OID, first))
            rivals[0].join(0.1)

        base.before["store"] = rival
        tid = end(storage, txn)
        with pytest.raises(ConflictError):
            rivals[0].result()
        assert storage.load(OID) == (record(1), tid)

    def test_second_begin_of_a_transaction_is_refused_and_changes_nothing(self, storage):
        """As the base refuses it; what was stored so far stays."""
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        with pytest.raises(StorageTransactionError):
            storage.tpc_begin(txn)
        tid = end(storage, txn)
        assert storage.load(OID) == (PLAIN_RECORD, tid)

    def test_transaction_object_may_be_used_again(self, storage):
        """After its end, whichever that was."""
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        storage.tpc_abort(txn)
        for oid in (OTHER, THIRD):
            storage.tpc_begin(txn)
            storage.store(oid, z64, PLAIN_RECORD, "", txn)
            end(storage, txn)
        with pytest.raises(POSKeyError):
            storage.load(OID)
        assert storage.load(OTHER)[1] < storage.load(THIRD)[1]

    @only_filestorage
    def test_read_only_base_refuses_at_the_beginning(self, inside, tmp_path):
        """And what is called without a beginning says so, too."""
        commit_record(inside, OID)
        reader = FileStorage(f"{tmp_path}/Data.fs", read_only=True)
        storage, txn = BufferedStorage(reader), TransactionMetaData()
        for step in (
            lambda: storage.tpc_begin(txn),
            lambda: storage.store(OTHER, z64, PLAIN_RECORD, "", txn),
            lambda: storage.tpc_vote(txn),
        ):
            with pytest.raises(ReadOnlyError):
                step()
        storage.tpc_abort(txn)
        storage.close()


class TestConflict:
    def test_record_that_another_has_changed_fails_the_vote(self, storage):
        """The store itself cannot know yet."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.store(OID, first, record(1), "", txn)
        second = commit_record(storage, OID, first, record(2))
        with pytest.raises(ConflictError) as caught:
            storage.tpc_vote(txn)
        assert (caught.value.oid, caught.value.serials) == (OID, (second, first))
        storage.tpc_abort(txn)
        assert storage.load(OID) == (record(2), second)
        assert_nothing_is_locked(storage)

    def test_record_that_was_read_and_has_changed_fails_the_vote(self, storage):
        """Whoever relied on it must read it again."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.checkCurrentSerialInTransaction(OID, first, txn)
        storage.store(OTHER, z64, PLAIN_RECORD, "", txn)
        commit_record(storage, OID, first)
        with pytest.raises(ReadConflictError):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        with pytest.raises(POSKeyError):
            storage.load(OTHER)
        assert_nothing_is_locked(storage)

    def test_record_that_was_read_and_stays_passes(self, storage):
        """The control."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.checkCurrentSerialInTransaction(OID, first, txn)
        storage.store(OTHER, z64, PLAIN_RECORD, "", txn)
        assert end(storage, txn) > first

    def test_failed_vote_cannot_be_repeated(self, storage):
        """A part has arrived at the base: only an abort gives its lock back."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.store(OTHER, z64, PLAIN_RECORD, "", txn)
        storage.store(OID, z64, record(1), "", txn)  # which conflicts
        storage.store(THIRD, z64, PLAIN_RECORD, "", txn)
        with pytest.raises(ConflictError):
            storage.tpc_vote(txn)
        for step in (
            lambda: storage.tpc_vote(txn),
            lambda: storage.store(p64(4), z64, PLAIN_RECORD, "", txn),
            lambda: storage.checkCurrentSerialInTransaction(OID, first, txn),
        ):
            with pytest.raises(StorageTransactionError):
                step()
        storage.tpc_abort(txn)
        assert storage.lastTransaction() == first
        for oid in (OTHER, THIRD, p64(4)):
            with pytest.raises(POSKeyError):
                storage.load(oid)
        assert_nothing_is_locked(storage)

    @only_filestorage
    def test_conflict_that_can_be_resolved_is_and_the_vote_says_so(self, storage):
        """Its result is what a Connection needs to forget its own state of the object."""
        db = DB(storage)
        managers = [transaction.TransactionManager() for _ in range(2)]
        connections = [db.open(manager) for manager in managers]
        connections[0].root()["length"] = Length()
        managers[0].commit()
        managers[1].begin()
        for connection, number in zip(connections, (1, 20), strict=True):
            connection.root()["length"].change(number)
        for manager in managers:
            manager.commit()
        managers[0].begin()
        assert [connection.root()["length"].value for connection in connections] == [21, 21]
        for connection in connections:
            connection.close()
        db.close()

    @only_filestorage
    def test_resolver_that_is_set_reaches_the_base(self, storage, inside):
        """A ZEO server replaces it; it decides, and the vote names the oids."""
        first = commit_record(storage, OID)
        second = commit_record(storage, OID, first, record(2))
        asked = []

        def resolve(*args):
            asked.append(args)
            return record(3)

        # The base's own, past the recorder
        storage = BufferedStorage(inside)
        storage.tryToResolveConflict = resolve
        assert inside.tryToResolveConflict is storage.tryToResolveConflict is resolve
        txn = begun(storage)
        storage.store(OID, first, record(1), "", txn)
        assert asked == []
        assert list(storage.tpc_vote(txn)) == [OID]
        assert asked == [(OID, second, first, record(1))]
        tid = storage.tpc_finish(txn)
        assert storage.load(OID) == (record(3), tid)


class TestStores:
    def test_second_store_of_an_oid_wins(self, storage):
        """As on the base itself."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        for number in (1, 2, 3):
            storage.store(OID, first, record(number), "", txn)
            storage.store(OTHER, z64, record(10 + number), "", txn)
        tid = end(storage, txn)
        assert storage.load(OID) == (record(3), tid)
        assert storage.load(OTHER) == (record(13), tid)

    def test_transaction_without_a_store_is_one_all_the_same(self, storage):
        """A base that keeps such transactions has it."""
        before = storage.lastTransaction()
        assert end(storage, begun(storage)) == storage.lastTransaction() > before

    def test_store_after_the_vote_goes_to_the_base(self, storage, base):
        """Whoever votes again then, as a renewed upload does, commits both."""
        txn = begun(storage)
        storage.store(OID, z64, record(1), "", txn)
        storage.tpc_vote(txn)
        base.heard.clear()
        storage.store(OTHER, z64, record(2), "", txn)
        assert base.heard == ["store"]
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    @only_filestorage
    def test_deletion_waits_for_the_vote(self, storage, base):
        """As an external garbage collection does it; the object is gone with the finish."""
        first = commit_record(storage, OID)
        base.heard.clear()
        txn = begun(storage)
        storage.deleteObject(OID, first, txn)
        assert base.heard == []
        assert storage.load(OID)[1] == first
        end(storage, txn)
        assert base.heard == ["tpc_begin", "deleteObject", "tpc_vote", "tpc_finish"]
        with pytest.raises(POSKeyError):
            storage.load(OID)

    @only_filestorage
    @pytest.mark.parametrize(
        ("oid", "error"), [(OID, ConflictError), (THIRD, POSKeyError)], ids=["changed", "unknown"]
    )
    def test_deletion_that_is_refused_fails_the_vote(self, storage, oid, error):
        """Of an object that has changed, or that there is not."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.deleteObject(oid, first, txn)
        second = commit_record(storage, OID, first)
        with pytest.raises(error):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert storage.load(OID)[1] == second
        assert_nothing_is_locked(storage)


def open_files(directory):
    """Return the numbers of this process's open files that are in a directory, or were."""
    links = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            links[number] = os.readlink(f"/proc/self/fd/{number}")
    return [number for number, path in links.items() if path.startswith(f"{directory}/")]


needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")


class TestSpill:
    COUNT = 25000  # of 500 bytes, some three times what is kept in memory
    NUMBERS = range(1, COUNT + 1)
    BOUND = 16 << 20  # bytes; what is pickled is there twice

    def store_all(self, storage, txn, serials=None):
        for number in self.NUMBERS:
            serial = serials[number] if serials else z64
            storage.store(p64(number), serial, record(number), "", txn)

    def test_all_records_of_a_large_transaction_arrive(self, storage, directory):
        """Those on disk, those in memory, in their order; and nothing is left of the file."""
        txn = begun(storage)
        self.store_all(storage, txn)
        for number in (1, self.COUNT):
            storage.store(p64(number), z64, record(-number), "", txn)
        assert os.listdir(directory) == []
        tid = end(storage, txn)
        expected = {p64(number): record(number) for number in self.NUMBERS}
        expected |= {p64(number): record(-number) for number in (1, self.COUNT)}
        found = {each.oid: (each.tid, each.data) for txn in storage.iterator() for each in txn}
        assert found == {oid: (tid, data) for oid, data in expected.items()}
        assert os.listdir(directory) == []

    def test_record_larger_than_what_is_kept_in_memory_arrives(self, storage):
        """One alone, between small ones, and two in a row."""
        sizes = [MEMORY * 2, 100, MEMORY + 1, MEMORY + 1, 100]
        txn = begun(storage)
        for number, size in enumerate(sizes, 1):
            storage.store(p64(number), z64, record(number, size), "", txn)
        end(storage, txn)
        for number, size in enumerate(sizes, 1):
            assert storage.load(p64(number))[0] == record(number, size)

    @only_filestorage
    def test_memory_is_bounded_while_storing_and_while_voting(self, inside, directory):
        """Whatever a transaction stores: 60 MB here."""
        storage = BufferedStorage(inside, str(directory))
        txn = begun(storage)
        tracemalloc.start()
        try:
            for number in range(1, 601):
                storage.store(p64(number), z64, record(number, 100_000), "", txn)
            storage.tpc_vote(txn)
            _now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        storage.tpc_abort(txn)
        assert peak < self.BOUND

    @only_filestorage
    def test_many_small_calls_are_bounded_too(self, inside, directory):
        """What has no data takes memory all the same."""
        storage = BufferedStorage(inside, str(directory))
        txn = begun(storage)
        tracemalloc.start()
        try:
            for number in range(150_000):
                storage.checkCurrentSerialInTransaction(p64(number), z64, txn)
            _now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        storage.tpc_abort(txn)
        assert peak < self.BOUND

    @needs_proc
    @pytest.mark.parametrize("ending", ["finish", "abort", "abort after vote"])
    def test_file_is_where_it_should_be_and_closed_at_the_end(self, storage, directory, ending):
        """It has no name from the beginning: a process that is killed leaves none."""
        txn = begun(storage)
        assert open_files(directory) == []
        self.store_all(storage, txn)
        assert len(open_files(directory)) == 1
        assert os.listdir(directory) == []
        if ending != "abort":
            storage.tpc_vote(txn)
        if ending == "finish":
            storage.tpc_finish(txn)
        else:
            storage.tpc_abort(txn)
        assert open_files(directory) == []

    @needs_proc
    def test_transactions_at_the_same_time_have_files_of_their_own(self, storage, directory):
        """What one has stored is never another's."""
        transactions = [begun(storage), begun(storage)]
        for number in self.NUMBERS:
            txn = transactions[number % 2]
            storage.store(p64(number), z64, record(number), "", txn)
        assert len(open_files(directory)) == 2
        tids = [end(storage, txn) for txn in transactions]
        for number in self.NUMBERS:
            assert storage.load(p64(number)) == (record(number), tids[number % 2])

    @needs_proc
    def test_small_transaction_makes_no_file(self, storage, directory):
        """Almost all are."""
        txn = begun(storage)
        for number in range(1, 1001):
            storage.store(p64(number), z64, record(number), "", txn)
        assert open_files(directory) == []
        storage.tpc_abort(txn)

    def test_directory_that_is_gone_fails_the_store_and_leaves_nothing_locked(
        self, storage, directory
    ):
        """An error of the disk, as it is."""
        os.rmdir(directory)
        txn = begun(storage)
        with pytest.raises(FileNotFoundError):
            self.store_all(storage, txn)
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    @only_mappingstorage
    def test_full_disk_leaves_the_transaction_abortable_and_nothing_locked(
        self, storage, directory
    ):
        """Wherever the last byte goes that it takes: in a store, or when the vote reads it."""
        in_child(lambda: self.fill_the_disk(storage), seconds=60)

    def fill_the_disk(self, storage):
        """Commit where a file can only grow so far, in all ways close to what is spilled."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that it is an OSError
        size, failed = 100_000, set()
        numbers = range(MEMORY // size + 1)
        # At the first of them all that is spilled is too much, at the last none.
        spilled = len(numbers) * size
        for limit in (0, size // 2, spilled // 2, *range(spilled, spilled + 4000, 100)):
            txn = begun(storage)
            step = "store"
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                for number in numbers:
                    storage.store(p64(number), z64, record(number, size), "", txn)
                step = "vote"
                storage.tpc_vote(txn)
                step = "nothing"
            except OSError:
                pass
            storage.tpc_abort(txn)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert_nothing_is_locked(storage)
            failed.add(step)
        assert failed == {"store", "vote", "nothing"}

    @only_mappingstorage
    def test_store_that_failed_and_was_ignored_never_mixes_up_the_others(self, storage):
        """When there is room again all may arrive, or the vote refuses; nothing else is read."""
        in_child(lambda: self.ignore_the_full_disk(storage), seconds=60)

    def ignore_the_full_disk(self, storage):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for limit in (1000, 70_000, MEMORY // 4):
            txn = begun(storage)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(OSError):
                self.store_all(storage, txn)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            with suppress(StorageTransactionError):
                self.store_all(storage, txn)
                storage.tpc_vote(txn)
            storage.tpc_abort(txn)


class TestFailingBegin:
    @only_filestorage
    @pytest.mark.parametrize("what", ["user", "description", "extension"])
    def test_what_the_base_cannot_keep_fails_the_vote_and_frees_the_lock(self, storage, what):
        """FileStorage has taken its lock by the time it finds out."""
        long = "x" * (1 << 16)
        txn = begun(storage, **{what: {"x": long} if what == "extension" else long})
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        with pytest.raises(FileStorageError, match="too"):
            storage.tpc_vote(txn)
        with pytest.raises(StorageTransactionError):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    @pytest.mark.parametrize("locked", [True, False], ids=["after the lock", "before it"])
    def test_base_that_fails_to_begin_is_aborted(self, storage, base, inside, locked):
        """Whether it has its lock by then or not, and whatever it raises."""

        def begin_and_fail(*args):
            base.before.clear()
            if locked:
                inside.tpc_begin(*args)
            raise KeyboardInterrupt("says the test")

        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        base.before["tpc_begin"] = begin_and_fail
        with pytest.raises(KeyboardInterrupt):
            storage.tpc_vote(txn)
        for step in (storage.tpc_vote, storage.tpc_finish):
            with pytest.raises(StorageTransactionError):
                step(txn)
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    def test_failing_begin_beside_another_that_has_the_lock_leaves_that_alone(self, storage, base):
        """The abort of the one is not that of the other."""
        first = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", first)
        storage.tpc_vote(first)
        second = begun(storage)
        base.before["tpc_begin"] = Failure(OSError("says the test"), times=1)
        with pytest.raises(OSError, match="says the test"):
            storage.tpc_vote(second)
        storage.tpc_abort(second)
        tid = storage.tpc_finish(first)
        assert storage.load(OID) == (PLAIN_RECORD, tid)

    def test_transaction_that_cannot_carry_data_leaves_nothing_begun(self, storage, base):
        """There is no place for what it stores."""

        class Bare:
            user = description = extension_bytes = b""

        with pytest.raises(AttributeError):
            storage.tpc_begin(Bare())
        assert base.heard == []


@only_filestorage
class TestUndo:
    @pytest.fixture
    def changed(self, storage):
        """The tids of two revisions of an object."""
        first = commit_record(storage, OID, z64, record(1))
        return first, commit_record(storage, OID, first, record(2))

    def last(self, storage):
        return storage.undoLog(0, 1)[0]["id"]

    def test_undo_waits_for_the_vote(self, storage, base, changed):
        """What a transaction over several databases locks, it locks in their votes."""
        base.heard.clear()
        txn = begun(storage)
        assert storage.undo(self.last(storage), txn) is None
        assert base.heard == []
        other = start(commit_record, storage, OTHER).result()
        tid = end(storage, txn)
        assert tid > other
        assert storage.load(OID) == (record(1), tid)

    def test_it_is_done_in_the_order_in_which_it_was_asked_for(self, storage, base, changed):
        """Among what is stored before and after it."""
        base.heard.clear()
        txn = begun(storage)
        storage.store(OTHER, z64, record(3), "", txn)
        storage.undo(self.last(storage), txn)
        storage.store(THIRD, z64, record(4), "", txn)
        tid = end(storage, txn)
        assert base.heard == ["tpc_begin", "store", "undo", "store", "tpc_vote", "tpc_finish"]
        for oid, data in ((OID, record(1)), (OTHER, record(3)), (THIRD, record(4))):
            assert storage.load(oid) == (data, tid)

    def test_store_after_the_undo_of_the_same_object_wins(self, storage, changed):
        """As the second of two stores does."""
        txn = begun(storage)
        storage.undo(self.last(storage), txn)
        storage.store(OID, changed[1], record(3), "", txn)
        tid = end(storage, txn)
        assert storage.load(OID) == (record(3), tid)

    def test_undo_of_what_another_has_changed_meanwhile_fails_the_vote(self, storage, changed):
        """And only an abort is possible then."""
        txn = begun(storage)
        storage.undo(self.last(storage), txn)
        third = commit_record(storage, OID, changed[1], record(3))
        with pytest.raises(UndoError):
            storage.tpc_vote(txn)
        for step in (storage.tpc_vote, storage.tpc_finish):
            with pytest.raises(StorageTransactionError):
                step(txn)
        storage.tpc_abort(txn)
        assert storage.load(OID) == (record(3), third)
        assert_nothing_is_locked(storage)

    def test_undo_of_an_unknown_transaction_fails_the_vote(self, storage, changed):
        """The base looks for it then."""
        txn = begun(storage)
        storage.undo(encodebytes(p64(5)).rstrip(), txn)
        with pytest.raises(UndoError):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    def test_vote_tells_what_the_vote_of_the_base_tells(self, storage, inside, changed):
        """Resolved conflicts; a DemoStorage around it takes whatever it is told for them."""
        first = commit_record(storage, OTHER)
        second = commit_record(storage, OTHER, first, record(5))
        storage = BufferedStorage(inside)
        storage.tryToResolveConflict = lambda *args: record(6)
        txn = begun(storage)
        storage.store(OTHER, first, record(7), "", txn)
        ids = [entry["id"] for entry in storage.undoLog(0, 10)]
        storage.undo(ids[2], txn)
        assert second == storage.lastTransaction()
        assert storage.tpc_vote(txn) == [OTHER]
        tid = storage.tpc_finish(txn)
        assert (storage.load(OID), storage.load(OTHER)) == ((record(1), tid), (record(6), tid))

    def test_several_undone_at_once_go_to_one_transaction(self, storage, base, changed):
        """As DB.undoMultiple does it; the base begins once."""
        ids = [entry["id"] for entry in storage.undoLog(0, 2)]
        base.heard.clear()
        txn = begun(storage)
        for transaction_id in ids:
            storage.undo(transaction_id, txn)
        end(storage, txn)
        assert base.heard.count("tpc_begin") == 1
        with pytest.raises(POSKeyError):
            storage.load(OID)


class TestGivenTid:
    TID = p64(1 << 60)

    @pytest.mark.parametrize("positional", [True, False])
    def test_transaction_with_a_given_tid_begins_at_once(self, storage, base, positional):
        """It is that of the base, and others wait."""
        txn = TransactionMetaData()
        if positional:
            storage.tpc_begin(txn, self.TID)
        else:
            storage.tpc_begin(txn, tid=self.TID)
        assert base.heard == ["tpc_begin"]
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        assert base.heard == ["tpc_begin", "store"]
        assert end(storage, txn) == self.TID
        assert storage.load(OID) == (PLAIN_RECORD, self.TID)

    def test_no_tid_that_is_given_as_such_is_none(self, storage, base):
        """Callers pass None on."""
        for begin in (
            lambda txn: storage.tpc_begin(txn, None),
            lambda txn: storage.tpc_begin(txn, tid=None),
        ):
            txn = TransactionMetaData()
            begin(txn)
            assert base.heard == []
            storage.tpc_abort(txn)

    def test_failing_begin_with_a_tid_can_be_aborted(self, storage, base, inside):
        """It has the base's lock, and is not to be used."""

        def begin_and_fail(*args):
            base.before.clear()
            inside.tpc_begin(*args)
            raise OSError("says the test")

        base.before["tpc_begin"] = begin_and_fail
        txn = TransactionMetaData()
        with pytest.raises(OSError, match="says the test"):
            storage.tpc_begin(txn, self.TID)
        with pytest.raises(StorageTransactionError):
            storage.store(OID, z64, PLAIN_RECORD, "", txn)
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    @only_filestorage
    def test_status_is_passed_on(self, storage):
        """A copy keeps which transactions are undoable."""
        txn = TransactionMetaData()
        storage.tpc_begin(txn, self.TID, "p")
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        end(storage, txn)
        (kept,) = storage.iterator()
        assert kept.status == "p"

    @only_filestorage
    @pytest.mark.parametrize("given", [True, False])
    def test_restore_passes_through(self, storage, base, given):
        """A record keeps the tid it had, whatever the transaction's is."""
        txn = TransactionMetaData()
        if given:
            storage.tpc_begin(txn, self.TID, " ")
        else:
            storage.tpc_begin(txn)
            storage.store(OTHER, z64, record(2), "", txn)
        storage.restore(OID, self.TID, record(1), "", None, txn)
        between = [] if given else ["store"]
        assert base.heard == ["tpc_begin", *between, "restore"]
        end(storage, txn)
        assert storage.loadSerial(OID, self.TID) == record(1)

    @only_filestorage
    def test_whole_database_is_copied(self, storage, tmp_path):
        """As copyTransactionsFrom does it, with the tids of the source."""
        source = FileStorage(f"{tmp_path}/Source.fs")
        serial = z64
        for number in range(5):
            serial = commit_record(source, OID, serial, record(number))
        storage.copyTransactionsFrom(source)
        expected = [(each.tid, [(r.oid, r.data) for r in each]) for each in source.iterator()]
        copied = [(each.tid, [(r.oid, r.data) for r in each]) for each in storage.iterator()]
        assert copied == expected
        source.close()


class TestEnd:
    def test_finish_tells_the_tid_while_the_base_holds_its_lock(self, storage, inside):
        """Connections must learn of it before anybody reads it."""
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        storage.tpc_vote(txn)
        others, tids = [], []

        def callback(tid):
            tids.append(tid)
            others.append(start(commit_record, storage, OTHER))
            others[0].join(0.1)
            assert others[0].is_alive()

        tid = storage.tpc_finish(txn, callback)
        assert tids == [tid]
        assert others[0].result() > tid

    def test_finish_without_a_vote_is_refused(self, storage):
        """Nothing has arrived at the base: it must not look committed."""
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        with pytest.raises(StorageTransactionError):
            storage.tpc_finish(txn)
        storage.tpc_abort(txn)
        with pytest.raises(POSKeyError):
            storage.load(OID)
        assert_nothing_is_locked(storage)

    def test_finish_that_fails_can_be_aborted(self, storage):
        """A callback that raises; the base gives its lock back then or with the abort."""
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        storage.tpc_vote(txn)
        with pytest.raises(OSError, match="says the test"):
            storage.tpc_finish(txn, Failure(OSError("says the test")))
        storage.tpc_abort(txn)
        assert_nothing_is_locked(storage)

    def test_abort_before_the_vote_tells_the_base_nothing(self, storage, base):
        """It has heard of nothing, and another may have its lock."""
        other = begun(storage)
        storage.store(OTHER, z64, PLAIN_RECORD, "", other)
        storage.tpc_vote(other)
        base.heard.clear()
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        storage.tpc_abort(txn)
        assert base.heard == []
        storage.tpc_finish(other)
        with pytest.raises(POSKeyError):
            storage.load(OID)

    def test_abort_after_the_vote_takes_all_back(self, storage):
        """And frees the base's lock."""
        first = commit_record(storage, OID)
        txn = begun(storage)
        storage.store(OID, first, record(1), "", txn)
        storage.store(OTHER, z64, record(2), "", txn)
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert storage.load(OID) == (PLAIN_RECORD, first)
        assert storage.lastTransaction() == first
        assert_nothing_is_locked(storage)

    def test_abort_of_a_foreign_transaction_changes_nothing(self, storage):
        """One that has never begun here, has been aborted, or has finished."""
        aborted, finished = begun(storage), begun(storage)
        storage.tpc_abort(aborted)
        end(storage, finished)
        for stored_only in (True, False):
            txn = begun(storage)
            storage.store(OID, z64, PLAIN_RECORD, "", txn)
            if not stored_only:
                storage.tpc_vote(txn)
            for foreign in (TransactionMetaData(), transaction.Transaction(), aborted, finished):
                storage.tpc_abort(foreign)
            if stored_only:
                storage.tpc_abort(txn)
        tid = storage.tpc_finish(txn)
        assert storage.load(OID) == (PLAIN_RECORD, tid)

    @pytest.mark.parametrize("which", ["never begun", "aborted", "finished"])
    def test_foreign_transaction_is_refused(self, storage, base, which):
        """By every step but the abort, while another one runs."""
        foreign = TransactionMetaData()
        if which != "never begun":
            storage.tpc_begin(foreign)
            storage.tpc_vote(foreign)
            storage.tpc_abort(foreign) if which == "aborted" else storage.tpc_finish(foreign)
        txn = begun(storage)
        storage.store(OID, z64, PLAIN_RECORD, "", txn)
        storage.tpc_vote(txn)
        base.heard.clear()
        for step in (
            lambda: storage.store(OTHER, z64, PLAIN_RECORD, "", foreign),
            lambda: storage.checkCurrentSerialInTransaction(OID, z64, foreign),
            lambda: storage.tpc_vote(foreign),
            lambda: storage.tpc_finish(foreign),
        ):
            with pytest.raises(StorageTransactionError):
                step()
        if IStorageUndoable.providedBy(storage):
            for step in (
                lambda: storage.undo(b"", foreign),
                lambda: storage.restore(OID, z64, PLAIN_RECORD, "", None, foreign),
                lambda: storage.deleteObject(OID, z64, foreign),
            ):
                with pytest.raises(StorageTransactionError):
                    step()
        assert base.heard == []
        tid = storage.tpc_finish(txn)
        assert storage.load(OID) == (PLAIN_RECORD, tid)


class TestProxy:
    def test_it_provides_what_the_base_provides(self, storage, inside):
        """And DB takes it for the same."""
        assert list(providedBy(storage)) == list(providedBy(inside))
        assert IStorage.providedBy(storage)

    def test_everything_else_is_the_bases(self, storage, inside):
        """Names, counts, reading."""
        first = commit_record(storage, OID)
        assert (len(storage), repr(storage)) == (len(inside), repr(storage.base))
        assert storage.sortKey() == inside.sortKey()
        assert storage.lastTransaction() == inside.lastTransaction() == first
        assert storage.load(OID) == inside.load(OID)
        assert storage.new_oid() < inside.new_oid()

    @only_mappingstorage
    def test_what_the_base_lacks_is_not_offered(self, storage):
        """ZODB's own tools ask whether there is such a method."""
        for name in ("undo", "restore", "deleteObject", "copyTransactionsFrom"):
            assert not hasattr(storage, name), name

    @only_filestorage
    def test_what_the_base_has_is_offered(self, storage):
        """The control."""
        assert IStorageUndoable.providedBy(storage) and IExternalGC.providedBy(storage)
        for name in ("undo", "restore", "deleteObject", "copyTransactionsFrom"):
            assert hasattr(storage, name), name

    def test_unfinished_object_has_no_attributes(self):
        """Whatever copies or unpickles one asks before it is constructed."""
        with pytest.raises(AttributeError):
            BufferedStorage.__new__(BufferedStorage).tpc_transaction()

    def test_database_on_it_works_as_on_any_storage(self, storage):
        """Commits, conflicts and retries of several threads, counted."""
        db, rounds, threads = DB(storage), 25, 4
        with db.transaction() as conn:
            conn.root()["count"] = 0

        def work():
            manager = transaction.TransactionManager()
            conn, done = db.open(manager), 0
            while done < rounds:
                try:
                    manager.begin()
                    conn.root()["count"] += 1
                    manager.commit()
                    done += 1
                except ConflictError:
                    manager.abort()
            conn.close()

        workers = [start(work) for _number in range(threads)]
        for worker in workers:
            worker.result()
        with db.transaction() as conn:
            assert conn.root()["count"] == rounds * threads
        db.close()
