"""Which bases can be wrapped, and what each says about tids, records and surviving revisions."""

from contextlib import contextmanager

import pytest
from zc.zlibstorage import ZlibStorage
from ZODB.blob import BlobStorage
from ZODB.blob import is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.tests.hexstorage import HexStorage
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zodb_s3blobs.basecontract import Reading
from zodb_s3blobs.basecontract import Survivors
from zodb_s3blobs.bases import base_of
from zodb_s3blobs.demobase import DemoBase
from zodb_s3blobs.historybase import LocalBase
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference
from zodb_s3blobs.relstoragebase import RelStorageBase

from .storages import BLOB_RECORD
from .storages import commit_record
from .storages import Failure
from .storages import Gate
from .storages import open_relstorage
from .storages import PLAIN_RECORD
from .storages import start


OID = p64(1)
OTHER = p64(2)
STAMP = b"1" * 16
LATER_STAMP = b"2" * 16
UNKNOWN = b"?" * 16

TID_KINDS = ("FileStorage", "MappingStorage")
RELSTORAGE_KINDS = ("RelStorage", "RelStorage without history")


class Wrapper(HexStorage):
    """Transforms records; a class of its own, for a RelStorage changes the class around it."""


def opened(kind, directory):
    """Return a storage of a kind; the same directory is the same database."""
    if kind == "FileStorage":
        return FileStorage(f"{directory}/Data.fs")
    if kind == "MappingStorage":
        return MappingStorage()
    return open_relstorage(directory, keep_history=kind == "RelStorage")


@pytest.fixture(params=TID_KINDS + RELSTORAGE_KINDS)
def base(request, tmp_path):
    base = opened(request.param, tmp_path)
    yield base
    base.close()


@pytest.fixture(params=TID_KINDS)
def tid_base(request, tmp_path):
    base = opened(request.param, tmp_path)
    yield base
    base.close()


@pytest.fixture(params=RELSTORAGE_KINDS)
def relstorage(request, tmp_path):
    base = opened(request.param, tmp_path)
    yield base
    base.close()


@pytest.fixture
def with_history(tmp_path):
    """A RelStorage that keeps old revisions."""
    base = open_relstorage(tmp_path)
    yield base
    base.close()


def look(record):
    """What a storage reads from a record."""
    return Reading(is_blob_record(record), read_reference(record))


def ask(base, wanted, read=look):
    """Return what a fresh view says, by oid."""
    with base_of(base).snapshot() as snapshot:
        return dict(snapshot.survivors(wanted, read))


def ask_one(base, *names):
    """Return what a fresh view says about one oid."""
    return ask(base, {OID: set(names)})[OID]


def commit_reference(base, oid, stamp, serial=z64):
    """Commit a revision whose record carries a reference."""
    return commit_record(base, oid, serial, with_reference(BLOB_RECORD, stamp))


def undo_last(base):
    """Undo the last transaction and return the tid of that."""
    txn = TransactionMetaData()
    base.tpc_begin(txn)
    base.undo(base.undoLog(0, 1)[0]["id"], txn)
    base.tpc_vote(txn)
    return base.tpc_finish(txn)


def undo_and_tell(base):
    """Undo the last transaction and return what is told about that."""
    txn = TransactionMetaData()
    base.tpc_begin(txn)
    undone = base_of(base).undo(base.undoLog(0, 1)[0]["id"], txn)
    base.tpc_vote(txn)
    base.tpc_finish(txn)
    return undone


@pytest.fixture
def before_query(monkeypatch):
    """Return a function that lets something happen before each query to SQLite."""
    from relstorage.adapters.sqlite.drivers import Cursor

    execute = Cursor.execute

    def before_query(happen):
        def wrapped(cursor, statement, params=None):
            happen(statement)
            return execute(cursor, statement, params)

        monkeypatch.setattr(Cursor, "execute", wrapped)

    return before_query


class TestWrapping:
    def test_tid_is_known_from_begin_on(self, tid_base):
        """What the base says at tpc_begin is what it commits."""
        wrapped = base_of(tid_base)
        assert (wrapped.tells_tid, type(wrapped)) == (True, LocalBase)
        txn = TransactionMetaData()
        tid_base.tpc_begin(txn)
        tid = wrapped.tid()
        tid_base.store(OID, z64, PLAIN_RECORD, "", txn)
        tid_base.tpc_vote(txn)
        assert tid_base.tpc_finish(txn) == tid

    def test_relstorage_tells_no_tid_and_takes_no_lock_for_it(self, relstorage):
        """Asked before the end it has none: it picks one under its commit lock."""
        wrapped = base_of(relstorage)
        assert (wrapped.tells_tid, type(wrapped)) == (False, RelStorageBase)
        txn = TransactionMetaData()
        relstorage.tpc_begin(txn)
        relstorage.store(OID, z64, PLAIN_RECORD, "", txn)
        assert wrapped.tid() is None
        other = relstorage.new_instance()
        commit_record(other, OTHER)  # nobody holds the lock
        other.release()
        relstorage.tpc_abort(txn)

    def test_wrappers_around_a_base_are_looked_through(self, base):
        """The kind of the innermost storage decides."""
        assert type(base_of(Wrapper(Wrapper(base)))) is type(base_of(base))

    def test_tid_is_known_through_wrappers(self, tid_base):
        """A wrapper of records has no tid of its own."""
        wrapped = base_of(Wrapper(Wrapper(tid_base)))
        txn = TransactionMetaData()
        tid_base.tpc_begin(txn)
        assert len(wrapped.tid()) == 8
        tid_base.tpc_abort(txn)

    def test_subclass_of_relstorage_is_one(self, with_history):
        """As a FileStorage's subclass is a FileStorage."""

        class Special(type(with_history)):
            pass

        with_history.__class__ = Special
        assert type(base_of(with_history)) is RelStorageBase

    @pytest.mark.parametrize("temporary", [True, False])
    def test_demostorage_is_not_taken_for_what_is_inside(self, base, tmp_path, temporary):
        """It is no mere wrapper: what is under its base is not under its changes."""
        changes = None if temporary else FileStorage(f"{tmp_path}/Changes.fs")
        demo = DemoStorage(base=base, changes=changes)
        for storage in (demo, Wrapper(demo)):
            for addressing in ("auto", "record"):
                wrapped = base_of(storage, addressing)
                assert type(wrapped) is DemoBase
                assert (wrapped.tells_tid, wrapped.tells_garbage) == (False, False)
            with pytest.raises(ValueError, match="addressing tid does not fit a DemoStorage"):
                base_of(storage, "tid")
        demo.changes.close()

    def test_demostorage_tells_no_tid_while_a_transaction_runs(self, tid_base):
        """Its changes have one, which it does not show."""
        wrapped = base_of(DemoStorage(base=tid_base, changes=MappingStorage()))
        txn = TransactionMetaData()
        wrapped.storage.tpc_begin(txn)
        wrapped.storage.store(OID, z64, PLAIN_RECORD, "", txn)
        assert (wrapped.tid(), wrapped.running()) == (None, txn)
        wrapped.storage.tpc_abort(txn)
        assert wrapped.running() is None

    @pytest.mark.parametrize("kind", ["FileStorage", "BlobStorage"])
    def test_demostorage_with_blobs_among_its_changes_is_refused_with_advice(self, tmp_path, kind):
        """They would go there, and be read from there, past the bucket."""
        if kind == "FileStorage":
            changes = FileStorage(f"{tmp_path}/Changes.fs", blob_dir=f"{tmp_path}/blobs")
        else:
            changes = BlobStorage(f"{tmp_path}/blobs", MappingStorage())
        demo = DemoStorage(base=MappingStorage(), changes=changes)
        for refused in (demo, Wrapper(demo)):
            with pytest.raises(ValueError, match="put the <s3blobstorage> around the changes"):
                base_of(refused)
        changes.close()

    def test_unknown_storage_is_refused(self):
        """A class that only has the name of one that is known is another."""

        class RelStorage:
            def __repr__(self):
                return "<my storage>"

        for storage in (RelStorage(), object()):
            with pytest.raises(ValueError, match=r"^an? \w+ cannot be wrapped"):
                base_of(storage)

    def test_base_with_blobs_of_its_own_is_refused_with_advice(self, tmp_path):
        """Its undo would look for files that are in the bucket."""
        storage = FileStorage(f"{tmp_path}/Blobs.fs", blob_dir=f"{tmp_path}/blobs")
        with pytest.raises(ValueError, match="<blobdir-source>"):
            base_of(storage)
        storage.close()
        mapping = MappingStorage()
        with pytest.raises(ValueError, match="<blobdir-source>"):
            base_of(BlobStorage(f"{tmp_path}/more", mapping))

    @pytest.mark.parametrize("shared", [True, False])
    def test_relstorage_with_blob_dir_is_refused_with_advice(self, tmp_path, shared):
        """Whether its directory is the place of the blobs or a cache of the database's."""
        storage = open_relstorage(
            tmp_path, blob_dir=f"{tmp_path}/blobs", shared_blob_dir=shared, blob_cache_size=1 << 20
        )
        for refused in (storage, Wrapper(storage)):
            with pytest.raises(ValueError, match=r"without blob-dir.*<blobdir-source>"):
                base_of(refused)
        storage.close()

    def test_relstorage_is_addressed_by_record_alone(self, relstorage):
        """That is what auto means; by tid is refused, and the message says what to write."""
        for addressing in ("auto", "record"):
            assert type(base_of(relstorage, addressing)) is RelStorageBase
        with pytest.raises(ValueError, match=r"tid does not fit a RelStorage.* or say auto"):
            base_of(relstorage, "tid")

    @pytest.mark.parametrize("addressing", ["auto", "tid"])
    def test_local_base_is_addressed_by_tid_unless_told_otherwise(self, tid_base, addressing):
        """And what is passed through is the storage itself."""
        wrapped = base_of(tid_base, addressing)
        assert (wrapped.tells_tid, wrapped.storage) == (True, tid_base)

    @pytest.mark.parametrize("inside", [lambda base: base, Wrapper])
    def test_local_base_by_record_begins_late_and_tells_no_tid(self, tid_base, inside):
        """Another transaction commits while one has begun and stored."""
        wrapped = base_of(inside(tid_base), "record")
        assert (wrapped.tells_tid, type(wrapped)) == (False, LocalBase)
        txn = TransactionMetaData()
        wrapped.storage.tpc_begin(txn)
        wrapped.storage.store(OID, z64, PLAIN_RECORD, "", txn)
        assert (wrapped.tid(), wrapped.running()) == (None, None)
        commit_record(tid_base, OTHER)  # nobody holds the lock
        wrapped.storage.tpc_abort(txn)

    def test_unknown_addressing_is_refused(self, tid_base):
        """Whoever builds a storage in Python may have misspelt it."""
        with pytest.raises(ValueError, match="auto, tid or record, not 'stamp'"):
            base_of(tid_base, "stamp")

    def test_other_processes_commit_to_a_relstorage_alone(self, base):
        """What decides whether the age of an object says anything."""
        assert base_of(base).shared == (type(base_of(base)) is RelStorageBase)
        assert not base_of(DemoStorage(base=base)).shared


class TestDatabase:
    def test_name_is_the_same_whenever_opened(self, tmp_path):
        """Two openings of one database may share a prefix, two databases may not."""
        names = []
        for name in ("one", "one", "two"):
            storage = open_relstorage(tmp_path, name)
            names.append(base_of(storage).database())
            assert base_of(Wrapper(storage)).database() == names[-1]
            instance = storage.new_instance()
            assert base_of(storage).of(instance).database() == names[-1]
            instance.release()
            storage.close()
        assert names[0] == names[1] != names[2]

    def test_filestorages_name_is_its_path(self, tmp_path):
        """As it was with references unknown."""
        storage = FileStorage(f"{tmp_path}/Data.fs")
        assert base_of(storage).database() == f"{tmp_path}/Data.fs"
        storage.close()


@contextmanager
def fresh(base):
    """Context manager: what is known about an instance with a view of its own, if there are any."""
    told = base_of(base)
    with told.writer() as instance:
        yield told if instance is base else told.of(instance)


def assert_no_record(told, oid, serial):
    """A local storage knows that nobody can want its blob; others may have been late."""
    if isinstance(told, LocalBase):
        with pytest.raises(POSKeyError):
            told.record(oid, serial)
    else:
        assert told.record(oid, serial) is None


class TestRecord:
    def test_record_of_each_revision_is_told(self, base):
        """Current or not; none of a serial that the object has no revision with."""
        first = commit_reference(base, OID, STAMP)
        assert read_reference(base_of(base).record(OID, first)) == STAMP
        second = commit_reference(base, OID, LATER_STAMP, first)
        with fresh(base) as told:
            assert read_reference(told.record(OID, second)) == LATER_STAMP
            for oid, serial in ((OID, p64(5)), (OID, p64(u64(second) + 1)), (OTHER, first)):
                assert_no_record(told, oid, serial)

    @pytest.mark.parametrize("kind", ["FileStorage", "RelStorage"])
    def test_older_revision_is_told_after_its_object_is_gone(self, tmp_path, kind):
        """An undone creation hides no revision before it."""
        base = opened(kind, tmp_path)
        first = commit_reference(base, OID, STAMP)
        undone = undo_last(base)
        with fresh(base) as told:
            assert read_reference(told.record(OID, first)) == STAMP
            assert_no_record(told, OID, undone)
        base.close()

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_revision_that_a_pack_removed_has_no_record(self, tid_base, addressing):
        """It is gone for every reader: a POSKeyError, as the base itself would raise."""
        wrapped = base_of(tid_base, addressing)
        root = commit_record(tid_base, z64)
        first = commit_reference(tid_base, z64, STAMP, root)
        second = commit_reference(tid_base, z64, LATER_STAMP, first)
        tid_base.pack(TimeStamp(second).timeTime() + 1, lambda record, oids=None: [])
        with pytest.raises(POSKeyError):
            wrapped.record(z64, first)
        assert read_reference(wrapped.record(z64, second)) == LATER_STAMP

    def test_demostorage_without_the_record_does_not_know(self, tid_base):
        """The database below may have packed it meanwhile: the bucket is asked."""
        told = base_of(DemoStorage(base=tid_base, changes=MappingStorage()))
        below = commit_reference(tid_base, OID, STAMP)
        above = commit_reference(told.storage, OID, LATER_STAMP, below)
        assert read_reference(told.record(OID, below)) == STAMP
        assert read_reference(told.record(OID, above)) == LATER_STAMP
        assert_no_record(told, OTHER, below)
        assert_no_record(told, OID, p64(5))

    def test_error_of_the_base_is_raised(self, base, monkeypatch):
        """No answer is not the answer that the revision is gone."""
        first = commit_reference(base, OID, STAMP)
        for name in ("loadBefore", "loadSerial"):
            monkeypatch.setattr(base, name, Failure(OSError("says the test")))
        with pytest.raises(OSError, match="says the test"):
            base_of(base).record(OID, first)


class TestSurvivors:
    def test_revisions_asked_about_are_told_from_others(self, tid_base):
        """Those that exist survive, tids that no revision has do not."""
        first = commit_record(tid_base, OID, z64, BLOB_RECORD)
        second = commit_record(tid_base, OID, first, BLOB_RECORD)
        assert ask_one(tid_base, first, second, p64(5)).tids == {first, second}
        assert ask_one(tid_base, p64(5)) == Survivors(set(), set())

    @pytest.mark.parametrize("kind", TID_KINDS + RELSTORAGE_KINDS)
    def test_tids_and_stamps_are_told_together(self, tmp_path, kind):
        """A database that moved between bases has keys of both forms, for one oid even."""
        base = opened(kind, tmp_path)
        first = commit_record(base, OID, z64, BLOB_RECORD)
        second = commit_reference(base, OID, STAMP, first)
        answer = ask_one(base, first, second, p64(5), STAMP, UNKNOWN)
        revisions = {second} if kind == "RelStorage without history" else {first, second}
        assert answer == Survivors(revisions, {STAMP}, second, None)
        base.close()

    def test_references_of_all_revisions_survive(self, base):
        """With history the earlier ones too; without it only the current one."""
        first = commit_reference(base, OID, STAMP)
        second = commit_reference(base, OID, LATER_STAMP, first)
        answer = ask_one(base, UNKNOWN)
        keeps = base_of(base).keeps_history
        assert answer.stamps == ({STAMP, LATER_STAMP} if keeps else {LATER_STAMP})
        assert answer.current == second

    def test_unknown_oid_has_no_survivors(self, base):
        """An object that is gone needs no blob."""
        commit_record(base, p64(9))
        assert ask_one(base, p64(5), STAMP) == Survivors(set(), set())

    def test_object_that_is_no_blob_says_since_when(self, base):
        """That its oid is another object's is told apart from that its revision is gone."""
        first = commit_record(base, OID)
        second = commit_record(base, OID, first)
        oldest = first if base_of(base).keeps_history else second
        for name in (p64(5), STAMP):
            answer = ask_one(base, name)
            assert (answer.tids, answer.stamps, answer.other_since) == (set(), set(), oldest)

    def test_errors_other_than_poskeyerror_are_raised(self, base):
        """No answer is not the answer that nothing survives."""
        first = commit_record(base, OID, z64, BLOB_RECORD)
        with pytest.raises(OSError, match="says the test"):
            ask(base, {OID: {first}}, Failure(OSError("says the test")))

    @pytest.mark.parametrize("kind", ["FileStorage", "RelStorage"])
    def test_undone_creation_keeps_the_revisions_before_it(self, tmp_path, kind):
        """A null record neither ends the history nor is it a revision with a blob."""
        base = opened(kind, tmp_path)
        first = commit_record(base, OID, z64, BLOB_RECORD)
        undone = undo_last(base)
        answer = ask_one(base, first, undone)
        assert (answer.tids, answer.other_since) == ({first}, None)
        second = commit_reference(base, OTHER, STAMP)
        undo_last(base)
        assert ask(base, {OTHER: {second, UNKNOWN}})[OTHER].stamps == {STAMP}
        base.close()

    @pytest.mark.parametrize("kind", ["FileStorage", "RelStorage"])
    def test_reference_of_an_undone_change_survives_with_what_undid_it(self, tmp_path, kind):
        """The undo's record points back, or is a copy; it is a revision in any case."""
        base = opened(kind, tmp_path)
        first = commit_reference(base, OID, STAMP)
        commit_reference(base, OID, LATER_STAMP, first)
        undone = undo_last(base)
        answer = ask_one(base, undone, UNKNOWN)
        assert answer == Survivors({undone}, {STAMP, LATER_STAMP}, undone, None)
        base.close()


class TestRelStorage:
    def test_packed_history_tells_the_current_revision_alone(self, relstorage):
        """After a pack the database's history() is empty for objects that live on."""
        root = commit_record(relstorage, z64)
        first = commit_reference(relstorage, z64, STAMP, root)
        second = commit_reference(relstorage, z64, LATER_STAMP, first)
        relstorage.pack(TimeStamp(second).timeTime() + 1, lambda record, oids=None: [])
        answer = ask(relstorage, {z64: {first, second, UNKNOWN}})[z64]
        assert answer == Survivors({second}, {LATER_STAMP}, second, None)

    def test_thousands_of_oids_are_asked_about_at_once(self, relstorage, before_query):
        """A page of the listing costs some queries, not one for each key."""
        txn = TransactionMetaData()
        relstorage.tpc_begin(txn)
        count = 3000
        stamps = {p64(number): b"%016d" % number for number in range(1, count + 1)}
        for oid, stamp in stamps.items():
            relstorage.store(oid, z64, with_reference(BLOB_RECORD, stamp), "", txn)
        relstorage.tpc_vote(txn)
        relstorage.tpc_finish(txn)
        queries = []
        before_query(queries.append)
        answers = ask(relstorage, {oid: {UNKNOWN} for oid in stamps})
        assert {oid: {stamp} for oid, stamp in stamps.items()} == {
            oid: answer.stamps for oid, answer in answers.items()
        }
        assert 1 <= len(queries) <= 20

    def test_snapshot_shows_what_was_committed_before_it(self, relstorage):
        """Also by another process, while the storage itself still looks at an older view."""
        commit_record(relstorage, p64(9))
        relstorage.load(p64(9))  # its view begins here
        with base_of(relstorage).writer() as other:
            tid = commit_reference(other, OID, STAMP)
        for _ in range(2):
            assert ask_one(relstorage, UNKNOWN).stamps == {STAMP}
        with base_of(relstorage).snapshot() as snapshot:
            assert snapshot.last_transaction() >= tid

    def test_view_tells_of_no_revision_above_its_last_transaction(self, relstorage):
        """A by-tid key above the last transaction is in flight: the order of questions counts."""
        with base_of(relstorage).snapshot() as snapshot:
            last = snapshot.last_transaction()
            with base_of(relstorage).writer() as other:
                tid = commit_reference(other, OID, STAMP)
            (answer,) = dict(snapshot.survivors({OID: {tid, UNKNOWN}}, look)).values()
            assert tid > last
            assert answer.current is None or answer.stamps == {STAMP}

    def test_highest_oid_is_above_all_that_were_given_out(self, relstorage):
        """By whatever instance, though nothing was committed under them yet."""
        with base_of(relstorage).writer() as other:
            given = [storage.new_oid() for storage in (relstorage, other) for _ in range(20)]
        with base_of(relstorage).snapshot() as snapshot:
            assert snapshot.highest_oid() >= max(given)

    def test_oid_that_was_never_given_out_is_above_the_highest(self, relstorage):
        """The first oid of a new database is not taken for one that it has forgotten."""
        with base_of(relstorage).snapshot() as snapshot:
            assert snapshot.highest_oid() < OID

    def test_wrapped_records_are_read_through_the_wrapper(self, relstorage):
        """The database has them in the wrapper's form."""
        wrapped = ZlibStorage(relstorage)
        tid = commit_reference(wrapped, OID, STAMP)
        stored = PLAIN_RECORD + bytes(1000)
        other = commit_record(wrapped, OTHER, z64, stored)
        seen = []
        ask(relstorage, {OTHER: {UNKNOWN}}, lambda record: seen.append(record) or look(stored))
        assert seen[0] != stored
        assert ask_one(wrapped, tid, UNKNOWN) == Survivors({tid}, {STAMP}, tid, None)
        assert ask(wrapped, {OTHER: {UNKNOWN}})[OTHER].other_since == other
        assert read_reference(base_of(wrapped).record(OID, tid)) == STAMP

    @pytest.mark.parametrize("question", ["survivors", "record", "last_transaction"])
    def test_database_that_fails_is_not_taken_for_an_empty_one(
        self, relstorage, before_query, question
    ):
        """An error in the middle of a question is raised."""
        tid = commit_reference(relstorage, OID, STAMP)
        base = base_of(relstorage)
        with base.writer() as other, base.snapshot() as snapshot:
            asked = {
                "survivors": lambda: dict(snapshot.survivors({OID: {UNKNOWN}}, look)),
                "record": lambda: base.of(other).record(OTHER, tid),
                "last_transaction": snapshot.last_transaction,
            }
            before_query(Failure(OSError("says the test")))
            with pytest.raises(OSError, match="says the test"):
                asked[question]()
            before_query(lambda statement: None)

    def test_undo_tells_its_tid_before_the_vote(self, with_history):
        """RelStorage returns nothing, and picks the tid all the same."""
        first = commit_reference(with_history, OID, STAMP)
        commit_reference(with_history, OID, LATER_STAMP, first)
        txn = TransactionMetaData()
        with_history.tpc_begin(txn)
        undone = base_of(with_history).undo(with_history.undoLog(0, 1)[0]["id"], txn)
        assert undone.result is None
        with_history.tpc_vote(txn)
        assert with_history.tpc_finish(txn) == undone.tid

    def test_undo_tells_what_it_makes_current_again(self, with_history):
        """One source an oid; no record where the transaction created the object."""
        first = commit_reference(with_history, OID, STAMP)
        txn = TransactionMetaData()
        with_history.tpc_begin(txn)
        for oid, serial in ((OID, first), (OTHER, z64)):
            record = with_reference(BLOB_RECORD, LATER_STAMP)
            with_history.store(oid, serial, record, "", txn)
        with_history.tpc_vote(txn)
        with_history.tpc_finish(txn)
        told = {source.oid: source for source in undo_and_tell(with_history).sources}
        assert set(told) == {OID, OTHER}
        assert told[OTHER].record is None
        assert (told[OID].tid, read_reference(told[OID].record)) == (first, STAMP)

    def test_undo_tells_no_record_where_the_creation_was_undone(self, with_history):
        """A redo of the redo of a creation brings no blob back."""
        commit_reference(with_history, OID, STAMP)
        undo_last(with_history)
        undo_last(with_history)
        (source,) = undo_and_tell(with_history).sources
        assert (source.oid, source.record) == (OID, None)


class TestSettle:
    def test_history_free_bases_need_not_wait(self, tmp_path, tid_base):
        """Where a pack waits for an undo, or there is none, nothing is written."""
        free = open_relstorage(tmp_path, keep_history=False)
        tid = commit_record(free, OID)
        assert not base_of(free).hides_undo
        assert free.lastTransaction() == tid
        free.close()
        tid = commit_record(tid_base, OID)
        assert not base_of(tid_base).hides_undo
        base_of(tid_base).settle()
        assert tid_base.lastTransaction() == tid

    def test_nothing_is_written_with_history(self, with_history):
        """It takes the commit lock and gives it back: the undo log shows nothing of it."""
        tid = commit_record(with_history, OID)
        assert base_of(with_history).hides_undo
        base_of(with_history).settle()
        assert [record.tid for record in with_history.iterator()] == [tid]
        assert commit_record(with_history, OTHER) > tid

    def test_undo_that_has_not_finished_is_waited_for(self, with_history):
        """What it has written shows in the snapshot that is taken then."""
        first = commit_reference(with_history, OID, STAMP)
        undo_last(with_history)
        undone = with_history.undoLog(0, 1)[0]["id"]
        txn = TransactionMetaData()
        with_history.tpc_begin(txn)
        with_history.undo(undone, txn)  # it holds the commit lock from here on
        with_history.tpc_vote(txn)
        reached = Gate()
        reached.open()

        def settle():
            reached()
            base_of(with_history).settle()
            return ask_one(with_history, UNKNOWN).current

        settling = start(settle)
        reached.wait()
        settling.join(0.2)
        assert settling.is_alive()
        redone = with_history.tpc_finish(txn)
        assert settling.result() == redone > first

    def test_failing_settle_leaves_no_transaction_behind(self, with_history, monkeypatch):
        """Its error is raised, and others can commit."""
        with base_of(with_history).writer() as other:
            monkeypatch.setattr(with_history, "new_instance", lambda: other)
            failure = Failure(OSError("says the test"))
            monkeypatch.setattr(other._adapter, "lock_database_and_choose_next_tid", failure)
            with pytest.raises(OSError, match="says the test"):
                base_of(with_history).settle()
        commit_record(with_history, OID)
