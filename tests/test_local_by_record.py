"""Blobs by record over a FileStorage or MappingStorage: what differs from blobs by tid."""

from functools import partial
from io import BytesIO
from itertools import count
import sys
import threading
import time

from persistent.mapping import PersistentMapping
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import UndoError
from ZODB.serialize import referencesf
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import p64
from ZODB.utils import z64

from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.records import read_reference

from .services.location import boto3_client
from .services.location import keys
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import Gate
from .storages import leftovers
from .storages import load
from .storages import make_storage
from .storages import open_db
from .storages import PATIENCE
from .storages import PLAIN_RECORD
from .storages import read
from .storages import start
from .storages import store_blob


OID = p64(1)
OTHER = p64(2)
KINDS = ("FileStorage", "MappingStorage")


def make_base(kind, directory):
    return MappingStorage() if kind == "MappingStorage" else FileStorage(f"{directory}/Data.fs")


@pytest.fixture(params=KINDS)
def made(request, s3, tmp_path):
    """(storage, its hooked client)."""
    base = make_base(request.param, tmp_path)
    storage, client = make_storage(s3, tmp_path, base=base, addressing="record", gc_grace=0.0)
    yield storage, client
    storage.close()


def begun(storage):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    return txn


def put(location, *names):
    """Put objects into the bucket that no transaction has made."""
    client = boto3_client(location)
    for name in names:
        client.put_object(Bucket=location.bucket, Key=name, Body=b"12345")
    client.close()


def reference(storage, oid, tid):
    """Return the key that the record of a revision refers to."""
    return blob_key(oid, read_reference(storage.loadSerial(oid, tid)))


def undo(db, *positions):
    """Undo the transactions at these places of the log in one transaction, 0 being the last one."""
    log = db.undoLog(0, 100)
    manager = transaction.TransactionManager()
    manager.begin()
    db.undoMultiple([log[position]["id"] for position in positions], manager.get())
    manager.commit()


def write(db, *versions):
    """Commit one revision of the root's blob after the other."""
    for data in versions:
        with db.transaction() as conn:
            conn.root()["blob"] = blob = conn.root().get("blob") or Blob()
            with blob.open("w") as file:
                file.write(data)


def current(db):
    """Return (oid, tid, bytes) of the root's blob."""
    with db.transaction() as conn:
        blob = conn.root()["blob"]
        data = read(blob)
        return blob._p_oid, blob._p_serial, data


class TestAtTheSameTime:
    def test_uploads_of_two_transactions_run_at_the_same_time(self, made):
        """Neither has the base's lock: each upload ends only when the other has begun."""
        storage, client = made
        together = threading.Barrier(2)
        client.before["upload_file"] = lambda *args: together.wait(PATIENCE)
        threads = [start(commit_blob, storage, oid, b"bytes") for oid in (OID, OTHER)]
        for oid, thread in zip((OID, OTHER), threads, strict=True):
            assert load(storage, oid, thread.result()) == b"bytes"

    def test_small_commits_finish_while_a_big_upload_hangs(self, made):
        """With a blob, without one, and a read in between."""
        storage, client = made
        gate = client.before["upload_file"] = Gate()
        big = start(commit_blob, storage, OID, b"big" * 100000)
        gate.wait()
        del client.before["upload_file"]
        small = start(commit_blob, storage, OTHER, b"small").result()
        plain = start(commit_record, storage, p64(3)).result()
        assert load(storage, OTHER, small) == b"small"
        assert big.is_alive()
        gate.open()
        tid = big.result()
        assert small < plain < tid
        assert load(storage, OID, tid) == b"big" * 100000

    def test_conflict_shows_in_the_vote_and_leaves_nothing(self, made, s3):
        """Whoever votes later has uploaded in vain, and cleans up."""
        storage, _client = made
        first = commit_blob(storage, OID, b"first")
        txn = begun(storage)
        store_blob(storage, txn, OID, b"late", first)
        second = commit_blob(storage, OID, b"second", first)
        with pytest.raises(ConflictError):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert keys(s3) == sorted(reference(storage, OID, tid) for tid in (first, second))
        assert leftovers(storage) == []
        assert load(storage, OID, second) == b"second"

    def test_upload_that_fails_takes_no_lock(self, made, s3):
        """The base never hears of the transaction."""
        storage, client = made
        txn = begun(storage)
        client.before["upload_file"] = Failure()
        store_blob(storage, txn, OID, b"one")
        with pytest.raises(TransientS3Error):
            storage.tpc_vote(txn)
        commit_record(storage, OTHER)  # before the abort
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])

    def test_blob_is_nobodys_until_its_commit(self, made):
        """Several transactions run: none is asked for what another one has staged."""
        storage, _client = made
        txn = begun(storage)
        store_blob(storage, txn, OID, b"staged")
        with pytest.raises(POSKeyError):
            storage.loadBlob(OID, z64)
        storage.tpc_vote(txn)
        with pytest.raises(POSKeyError):
            storage.loadBlob(OID, z64)
        tid = storage.tpc_finish(txn)
        assert load(storage, OID, tid) == b"staged"

    def test_connections_commit_while_another_uploads(self, s3, tmp_path):
        """As a Zope server's threads do."""
        storage, client = make_storage(s3, tmp_path, addressing="record")
        db = DB(storage)
        write(db, b"shared")
        gate = client.before["upload_file"] = Gate()

        def upload():
            with db.transaction() as conn:
                conn.root()["big"] = Blob(b"big")

        def change():
            manager = transaction.TransactionManager()
            conn = db.open(manager)
            with conn.root()["blob"].open("w") as file:
                file.write(b"changed")
            manager.commit()
            conn.close()

        uploading = start(upload)
        gate.wait()
        del client.before["upload_file"]
        start(change).result()
        assert current(db)[2] == b"changed"
        gate.open()
        uploading.result()
        with db.transaction() as conn:
            assert read(conn.root()["big"]) == b"big"
        db.close()


class Site:
    """A database over one Data.fs whose blobs are kept this way or that."""

    def __init__(self, location, directory):
        self._location = location
        self._directory = directory
        self._caches = count()
        self.db = None

    def open(self, addressing="record"):
        """Open it with an empty cache; return (database, its hooked client)."""
        if self.db is not None:
            self.db.close()
        cache = f"cache-{next(self._caches)}"
        storage, client = make_storage(
            self._location, self._directory, cache, addressing=addressing, gc_grace=0.0
        )
        self.db = DB(storage)
        return self.db, client

    def current(self):
        """Return the bytes of the root's blob, which are the same from an empty cache."""
        oid, tid, data = current(self.db)
        base = FileStorage(f"{self._directory}/Data.fs", read_only=True)
        cache = f"cache-{next(self._caches)}"
        storage, _client = make_storage(self._location, self._directory, cache, base=base)
        assert load(storage, oid, tid) == data
        storage.close()
        return data

    def keys(self):
        """Return what the records of the root's blob refer to, oldest first, each once."""
        storage, found = self.db.storage, []
        oid, _tid, _data = current(self.db)
        for entry in reversed(storage.history(oid, size=1000)):
            tid = entry["tid"]
            name = read_reference(storage.loadSerial(oid, tid)) or tid
            found.append(blob_key(oid, name))
        return [*dict.fromkeys(found)]


@pytest.fixture
def site(s3, tmp_path):
    site = Site(s3, tmp_path)
    yield site
    site.db.close()


class TestUndo:
    def test_undo_and_redo_need_no_request(self, site, s3):
        """The reference travels with the record."""
        db, client = site.open()
        write(db, b"0", b"1", b"2")
        before = keys(s3)
        for expected in (b"1", b"2", b"1", b"2"):
            client.calls.clear()
            undo(db, 0)
            assert client.calls == []
            assert site.current() == expected
        assert keys(s3) == before == sorted(site.keys())

    def test_undo_works_while_s3_is_down(self, site):
        """For it does not need it."""
        db, client = site.open()
        write(db, b"0", b"1")
        for name in ("upload_file", "copy_object", "download_file", "delete_objects"):
            client.before[name] = Failure()
        undo(db, 0)
        client.before.clear()
        assert site.current() == b"0"

    def test_undo_step_by_step_and_all_at_once(self, site):
        """Down to the first revision and up again."""
        db, _client = site.open()
        write(db, b"0", b"1", b"2", b"3")
        for step, expected in enumerate((b"2", b"1", b"0")):
            undo(db, 2 * step)
            assert site.current() == expected
        undo(db, 0, 1, 2)
        assert site.current() == b"3"

    def test_creation_that_was_undone_comes_back_by_its_redo(self, site, s3):
        """It was in the bucket all the time."""
        db, client = site.open()
        write(db, b"created")
        client.calls.clear()
        undo(db, 0)
        with db.transaction() as conn:
            assert "blob" not in conn.root()
        undo(db, 0)
        assert [name for name, *_rest in client.calls] == []
        assert site.current() == b"created"

    def test_open_connection_sees_what_was_undone(self, site):
        """It reads the blob again, not what it has had in hand."""
        db, _client = site.open()
        write(db, b"0", b"1")
        conn = db.open(transaction.TransactionManager())
        assert read(conn.root()["blob"]) == b"1"
        undo(db, 0)
        conn.transaction_manager.begin()
        assert read(conn.root()["blob"]) == b"0"
        conn.close()

    def test_commit_of_another_between_undo_and_vote_is_no_hindrance(self, site):
        """Nobody waits for anybody."""
        db, _client = site.open()
        write(db, b"0", b"1")
        txn = begun(db.storage)
        db.storage.undo(db.undoLog(0, 1)[0]["id"], txn)
        start(commit_record, db.storage, p64(1000)).result()
        db.storage.tpc_vote(txn)
        db.storage.tpc_finish(txn)
        db.cacheMinimize()
        oid, _tid, _data = current(db)
        assert load(db.storage, oid, db.storage.getTid(oid)) == b"0"

    def test_undo_of_what_was_changed_since_is_refused_and_leaves_nothing(self, site, s3):
        """Also when that happens between the undo and its vote."""
        db, _client = site.open()
        write(db, b"0", b"1")
        txn = begun(db.storage)
        db.storage.undo(db.undoLog(0, 1)[0]["id"], txn)
        write(db, b"2")
        before = keys(s3)
        with pytest.raises(UndoError):
            db.storage.tpc_vote(txn)
        db.storage.tpc_abort(txn)
        with pytest.raises(UndoError):
            undo(db, 1)
        assert site.current() == b"2"
        assert keys(s3) == before
        assert leftovers(db.storage) == []
        write(db, b"3")
        assert site.current() == b"3"

    def test_undo_of_what_carries_references_asks_for_no_history(self, site):
        """Which a ZEO client may not get, where transactions carry what it does not unpickle."""
        db, _client = site.open()
        write(db, b"0", b"1")
        base = db.storage.base
        history, base.history = base.history, Failure(AssertionError("says the test"))
        manager = transaction.TransactionManager()
        db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
        manager.commit()
        base.history = history
        assert site.current() == b"0"

    def test_several_undone_at_once_survive_a_pack_to_a_moment_before_them(self, site):
        """A later undo refers to what they left, and a pack finds that and nothing else."""
        db, _client = site.open()
        write(db, b"0", b"1", b"2", b"3")
        undo(db, 0, 1)
        oid, _tid, _data = current(db)
        tids = [entry["tid"] for entry in reversed(db.storage.history(oid, size=100))]
        write(db, b"4")
        undo(db, 0)
        assert site.current() == b"1"
        before, after = (TimeStamp(tid).timeTime() for tid in tids[1:3])
        db.pack((before + after) / 2)
        db, _client = site.open()
        assert site.current() == b"1"

    @pytest.mark.parametrize("size", [0, 1 << 20], ids=["small file", "large file"])
    def test_undo_while_another_writes_to_the_file_is_no_hindrance(self, site, monkeypatch, size):
        """Half a transaction is at its end when the one that is to be undone is looked up."""
        db, _client = site.open()
        write(db, b"0", b"1")
        commit_record(db.storage, p64(1000), record=PLAIN_RECORD + bytes(size))
        transaction_id = db.undoLog(0, 10)[1]["id"]
        gate = Gate()

        def copy_slowly(source, target, length):
            target.write(source.read(length // 2))
            target.flush()
            gate()
            target.write(source.read(length - length // 2))

        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[FileStorage.__module__], "cp", copy_slowly)
            voting = start(commit_record, db.storage, p64(1001))
            gate.wait()
        manager = transaction.TransactionManager()
        db.undo(transaction_id, manager.get())
        undoing = start(manager.commit)
        undoing.join(0.1)
        gate.open()
        undoing.result()
        voting.result()
        assert site.current() == b"0"

    def test_undo_in_a_transaction_that_also_stores_blobs(self, site):
        """Both are there afterwards, in whatever order."""
        db, _client = site.open()
        write(db, b"0", b"1")
        transaction_id = db.undoLog(0, 1)[0]["id"]
        storage, txn = db.storage, begun(db.storage)
        store_blob(storage, txn, p64(1000), b"before")
        storage.undo(transaction_id, txn)
        store_blob(storage, txn, p64(1001), b"after")
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        assert load(storage, p64(1000), tid) == b"before"
        assert load(storage, p64(1001), tid) == b"after"
        site.open()
        assert site.current() == b"0"


class TestMixedHistory:
    """First by tid, then by record, and by tid again: two revisions each."""

    @pytest.fixture
    def mixed(self, site):
        for number, addressing in enumerate(("tid", "record", "tid")):
            db, _client = site.open(addressing)
            write(db, b"%d" % (2 * number), b"%d" % (2 * number + 1))
        return site

    def test_keys_have_the_form_of_their_time(self, mixed, s3):
        """And are all there."""
        forms = [len(parse_key(key)[1]) for key in mixed.keys()]  # noqa: SIM118
        assert forms == [8, 8, 16, 16, 8, 8]
        assert keys(s3) == sorted(mixed.keys())

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_every_revision_is_read_either_way(self, mixed, addressing):
        """Reading asks the record, not the configuration."""
        db, client = mixed.open(addressing)
        storage = db.storage
        oid, _tid, _data = current(db)
        history = storage.history(oid, size=100)
        client.calls.clear()
        for number, entry in enumerate(reversed(history)):
            assert load(storage, oid, entry["tid"]) == b"%d" % number
            conn = db.open(at=entry["tid"])
            assert read(conn.root()["blob"]) == b"%d" % number
            conn.close()
        assert client.count("download_file") == len(client.calls) <= 6

    def test_undo_goes_back_step_by_step_by_tid(self, mixed):
        """Through what was stored by record, and up again."""
        db, _client = mixed.open("tid")
        for step, expected in enumerate((b"4", b"3", b"2", b"1", b"0")):
            undo(db, 2 * step)
            assert mixed.current() == expected
        undo(db, *range(5))
        assert mixed.current() == b"5"

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    @pytest.mark.parametrize("back_to", [4, 3, 2, 1, 0])
    def test_several_are_undone_and_redone_at_once(self, mixed, addressing, back_to):
        """Whatever form the revision has that becomes current again."""
        db, _client = mixed.open(addressing)
        undo(db, *range(5 - back_to))
        assert mixed.current() == b"%d" % back_to
        undo(db, 0)
        assert mixed.current() == b"5"

    def test_undo_by_record_of_a_revision_by_tid_gives_it_a_reference(self, mixed, s3):
        """Its bytes are copied in the bucket, for its tid is not known in time."""
        db, client = mixed.open("record")
        before = keys(s3)
        client.calls.clear()
        undo(db, 0)
        assert client.count("copy_object") == len(client.calls) == 1
        (copy,) = set(keys(s3)) - set(before)
        assert len(parse_key(copy)[1]) == 16
        assert mixed.keys()[-1] == copy
        assert mixed.current() == b"4"

    def test_second_step_back_over_revisions_by_tid_is_refused_by_record(self, mixed):
        """The copy's record is not the one that is to be undone; nothing is lost by that."""
        db, _client = mixed.open("record")
        undo(db, 0)
        before = sorted(mixed.keys())
        with pytest.raises(UndoError):
            undo(db, 2)
        assert mixed.current() == b"4"
        assert leftovers(db.storage) == []
        assert sorted(mixed.keys()) == before
        undo(db, 0)
        assert mixed.current() == b"5"

    def test_failing_copy_fails_the_undo_alone(self, mixed, s3):
        """The base is not told, nothing stays, and it can be done later."""
        db, client = mixed.open("record")
        before = keys(s3)
        client.before["copy_object"] = Failure()
        with pytest.raises(TransientS3Error):
            undo(db, 0)
        assert (keys(s3), leftovers(db.storage)) == (before, [])
        commit_record(db.storage, p64(1000))
        client.before.clear()
        undo(db, 1)
        assert mixed.current() == b"4"

    def test_undone_copy_that_conflicts_leaves_nothing(self, mixed, s3):
        """Another changes the blob when its older bytes have been copied."""
        db, client = mixed.open("record")
        copied = client.after["copy_object"] = Gate()
        copied.open()
        txn = begun(db.storage)
        db.storage.undo(db.undoLog(0, 1)[0]["id"], txn)
        copied.wait()
        write(db, b"6")
        before = mixed.keys()
        with pytest.raises(UndoError):
            db.storage.tpc_vote(txn)
        db.storage.tpc_abort(txn)
        assert keys(s3) == sorted(before)
        assert mixed.current() == b"6"

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    @pytest.mark.parametrize("undone", [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]])
    def test_pack_leaves_what_is_current_and_nothing_else(self, mixed, s3, addressing, undone):
        """Whatever form it has."""
        db, _client = mixed.open(addressing)
        if undone:
            undo(db, *undone)
        db.pack(time.time() + 1)
        oid, tid, data = current(db)
        assert data == b"%d" % (5 - len(undone))
        assert mixed.current() == data
        # A revision keeps the object of its tid, though it may refer to another one.
        alive = {blob_key(oid, tid), *mixed.keys()[-1:]}
        assert set(keys(s3)) == alive & set(keys(s3))
        assert mixed.keys()[-1] in keys(s3)

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_pack_keeps_what_its_window_can_undo_to(self, mixed, addressing):
        """To a time in the middle: everything since then can still be undone."""
        db, _client = mixed.open(addressing)
        oid, _tid, _data = current(db)
        tids = [entry["tid"] for entry in reversed(db.storage.history(oid, size=100))]
        db.pack((TimeStamp(tids[2]).timeTime() + TimeStamp(tids[3]).timeTime()) / 2)
        for number, tid in enumerate(tids[2:], 2):
            assert load(db.storage, oid, tid) == b"%d" % number
        undo(db, 0, 1, 2)
        assert mixed.current() == b"2"

    @pytest.mark.parametrize("packed_to", [1, 3, 5])
    def test_undone_changes_survive_packs_to_a_moment_before_them(self, mixed, packed_to):
        """Each undo refers to one before it: a pack finds the one record that is meant."""
        db, _client = mixed.open("record")
        for data in (b"6", b"7"):
            write(db, data)
            undo(db, 0)
        assert mixed.current() == b"5"
        oid, _tid, _data = current(db)
        tids = [entry["tid"] for entry in reversed(db.storage.history(oid, size=100))]
        before, after = (TimeStamp(tid).timeTime() for tid in tids[packed_to:][:2])
        for moment in ((before + after) / 2, time.time() + 1):
            db.pack(moment)
            assert mixed.current() == b"5"
            db, _client = mixed.open("record")
            assert mixed.current() == b"5"
        assert len(db.storage.history(oid, size=100)) == 1

    @pytest.mark.parametrize("changes", [[], [b"6"], [b"6", b"7"]], ids=len)
    @pytest.mark.parametrize("count", range(1, 6))
    def test_several_undone_at_once_are_redone_and_go_on(self, mixed, changes, count):
        """Over revisions of both forms; then changed and undone once more."""
        db, _client = mixed.open("record")
        write(db, *changes)
        expected = [*(b"%d" % number for number in range(6)), *changes]
        # Back over at least one revision by tid: what refers is the base's own to undo.
        count += len(changes)
        undo(db, *range(count))
        assert mixed.current() == expected[-1 - count]
        undo(db, 0)
        assert mixed.current() == expected[-1]
        write(db, b"8")
        undo(db, 0)
        assert mixed.current() == expected[-1]

    def test_undone_deletions_survive_a_pack_to_a_moment_before_the_undo(self, mixed):
        """What was garbage then is kept for what refers to it now, beside a blob by tid."""
        db, _client = mixed.open("tid")
        with db.transaction() as conn:
            conn.root()["plain"] = PersistentMapping(text="precious")
            conn.root()["other"] = Blob(b"other")
        with db.transaction() as conn:
            del conn.root()["plain"], conn.root()["other"]
            with conn.root()["blob"].open("w") as file:
                file.write(b"6")
        deleted = db.lastTransaction()
        db, _client = mixed.open("record")
        undo(db, 0)
        before, after = (TimeStamp(tid).timeTime() for tid in (deleted, db.lastTransaction()))
        db.pack((before + after) / 2)
        db, _client = mixed.open("record")
        assert mixed.current() == b"5"
        with db.transaction() as conn:
            assert conn.root()["plain"]["text"] == "precious"
            assert read(conn.root()["other"]) == b"other"

    def test_undo_of_what_was_packed_is_refused_and_deletes_nothing(self, mixed):
        """A revision whose predecessor was packed away is no creation."""
        db, _client = mixed.open("record")
        last = db.undoLog(0, 1)[0]["id"]
        undo(db, 0)
        again = db.undoLog(0, 1)[0]["id"]
        db.pack(time.time() + 1)
        manager = transaction.TransactionManager()
        db.undoMultiple([again, last], manager.get())
        with pytest.raises(UndoError):
            manager.commit()
        manager.abort()
        assert mixed.current() == b"4"


class TestPack:
    @pytest.mark.parametrize("kind", KINDS)
    def test_by_default_stamps_are_a_day_old_before_they_are_deleted(self, s3, tmp_path, kind):
        """They may be of a ZEO client that waits for its server, which is us; tids cannot be."""
        base = make_base(kind, tmp_path)
        storage, _client = make_storage(s3, tmp_path, base=base, addressing="record")
        tid = commit_blob(storage, z64, b"ours")
        orphans = [blob_key(z64, new_stamp()), blob_key(z64, p64(5))]
        put(s3, *orphans)
        storage.pack(time.time() + 1, lambda record, oids=None: [])
        assert keys(s3) == sorted([orphans[0], reference(storage, z64, tid)])
        storage.close()

    def test_orphans_are_deleted_at_once_without_a_grace_period(self, made, s3):
        """Whoever sets it to 0 says that no other process commits."""
        storage, _client = made
        tid = commit_blob(storage, z64, b"ours")
        orphans = [blob_key(z64, new_stamp()), blob_key(z64, p64(5))]
        put(s3, *orphans)
        storage.pack(time.time() + 1, lambda record, oids=None: [])
        assert keys(s3) == [reference(storage, z64, tid)]

    def test_rewritten_blobs_are_deleted_at_once_without_a_grace_period(self, made, s3):
        """What no revision refers to after the pack, however young it is."""
        storage, _client = made
        db = DB(storage)
        write(db, *(b"%d" % number for number in range(5)))
        assert len(keys(s3)) == 5
        db.pack(time.time() + 1)
        oid, tid, data = current(db)
        assert (data, keys(s3)) == (b"4", [reference(storage, oid, tid)])
        db.close()

    def test_what_is_in_flight_here_stays(self, made, s3):
        """Uploaded, and voted, while others pack and sweep; it is committed afterwards."""
        storage, client = made
        commit_blob(storage, z64, b"root")
        uploaded = client.after["upload_file"] = Gate()
        uploaded.open()
        first, second = begun(storage), begun(storage)
        store_blob(storage, first, OID, b"first")
        uploaded.wait()
        assert start(storage.sweep).result().in_flight == 1
        store_blob(storage, second, OTHER, b"second")
        storage.tpc_vote(second)
        assert start(storage.sweep).result().in_flight == 2
        tid = storage.tpc_finish(second)
        pack = partial(storage.pack, time.time() - 3600, referencesf, gc=False)
        start(pack).result()
        assert load(storage, OTHER, tid) == b"second"
        storage.tpc_vote(first)
        tid = storage.tpc_finish(first)
        client.calls.clear()
        assert storage.sweep().kept == 3
        assert len(keys(s3)) == 3
        assert load(storage, OID, tid) == b"first"

    def test_pack_goes_through_while_a_big_upload_hangs(self, made, s3):
        """It waits for the base's lock, which nobody has."""
        storage, client = made
        commit_blob(storage, z64, b"root")
        gate = client.after["upload_file"] = Gate()
        big = start(commit_blob, storage, OID, b"big")
        gate.wait()
        client.after.clear()
        pack = partial(storage.pack, time.time() - 3600, referencesf, gc=False)
        start(pack).result()
        gate.open()
        assert load(storage, OID, big.result()) == b"big"
        assert len(keys(s3)) == 2

    def undo_last(self, storage):
        txn = begun(storage)
        storage.undo(storage.undoLog(0, 1)[0]["id"], txn)
        storage.tpc_vote(txn)
        return storage.tpc_finish(txn)

    def sweep_late(self, storage, base, name, call):
        """Sweep; before the answer to a question an undo is committed, and the base packed."""
        question, calls = getattr(base, name), count(1)

        def answer_late(*args, **kw):
            # To a history what was there before, as if it had been asked just in time.
            answer = question(*args, **kw) if name == "history" else None
            if next(calls) == call:
                setattr(base, name, question)
                self.undo_last(storage)
                base.pack(time.time() + 1, referencesf, gc=False)
            return answer or question(*args, **kw)

        setattr(base, name, answer_late)
        storage.sweep()
        assert next(calls) > call

    def check_first(self, s3, tmp_path, base, storage, options):
        """The one revision that is left has the bytes of the first, and is the only one."""
        (entry,) = base.history(z64, size=100)
        storage.close()
        storage, client = make_storage(s3, tmp_path, "empty", **options)
        assert load(storage, z64, entry["tid"]) == b"first"
        assert client.count("download_file") == 1
        storage.sweep()
        assert len(keys(s3)) == 1
        storage.close()

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    @pytest.mark.parametrize("call", [1, 2, 3])
    def test_undo_and_pack_in_the_middle_of_a_sweep_lose_nothing(
        self, s3, tmp_path, addressing, call
    ):
        """The revisions it has just heard of are gone, the bytes live on under a new one."""
        base = FileStorage(f"{tmp_path}/Data.fs")
        options = {"addressing": addressing, "gc_grace": 0.0}
        storage, _client = make_storage(s3, tmp_path, base=base, **options)
        first = commit_blob(storage, z64, b"first")
        commit_blob(storage, z64, b"second", first)
        put(s3, blob_key(z64, new_stamp()))  # so that all revisions are looked at
        self.sweep_late(storage, base, "loadBefore", call)
        self.check_first(s3, tmp_path, base, storage, options)

    @pytest.mark.parametrize(
        ("name", "call"), [("history", 1), *(("loadSerial", call) for call in (1, 2, 3, 4))]
    )
    def test_undo_and_pack_while_a_sweep_looks_behind_an_undone_creation_lose_nothing(
        self, s3, tmp_path, name, call
    ):
        """Only the history tells what is there, and then it is gone."""
        base = FileStorage(f"{tmp_path}/Data.fs")
        options = {"addressing": "record", "gc_grace": 0.0}
        storage, _client = make_storage(s3, tmp_path, base=base, **options)
        commit_blob(storage, z64, b"first")
        self.undo_last(storage)
        again = self.undo_last(storage)
        commit_blob(storage, z64, b"second", again)
        put(s3, blob_key(z64, new_stamp()))
        self.sweep_late(storage, base, name, call)
        self.check_first(s3, tmp_path, base, storage, options)

    def test_revision_that_was_undone_and_packed_is_gone_for_the_next_sweep(self, s3, tmp_path):
        """The control: what nobody refers to any more is deleted."""
        storage, _client = make_storage(s3, tmp_path, addressing="record", gc_grace=0.0)
        db = DB(storage)
        write(db, b"0", b"1")
        undo(db, 0)
        assert len(keys(s3)) == 2
        db.pack(time.time() + 1)
        oid, tid, data = current(db)
        assert (data, keys(s3)) == (b"0", [reference(storage, oid, tid)])
        db.close()


class TestConnections:
    @pytest.fixture
    def db(self, made):
        db = DB(made[0])
        yield db
        db.close()

    def test_savepoints_are_rolled_back_and_committed(self, db, s3):
        """Only what is committed is uploaded, and with the bytes of the end."""
        write(db, b"committed")
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        blob = conn.root()["blob"]
        for data in (b"one", b"two"):
            with blob.open("w") as file:
                file.write(data)
            conn.root()[data.decode()] = Blob(data)
            savepoint = manager.savepoint()
            assert read(blob) == data
        with blob.open("w") as file:
            file.write(b"three")
        conn.root()["three"] = Blob(b"three")
        savepoint.rollback()
        assert read(blob) == b"two"
        manager.commit()
        conn.close()
        with db.transaction() as conn:
            root = conn.root()
            assert sorted(root) == ["blob", "one", "two"]
            assert {name: read(root[name]) for name in root} == {
                "blob": b"two", "one": b"one", "two": b"two",
            }  # fmt: skip
        assert len(keys(s3)) == 4
        assert leftovers(db.storage) == []

    def test_savepoints_that_are_aborted_leave_nothing(self, db, s3):
        """As if they had never been."""
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        conn.root()["blob"] = Blob(b"never")
        manager.savepoint()
        assert read(conn.root()["blob"]) == b"never"
        manager.abort()
        conn.close()
        assert (keys(s3), leftovers(db.storage)) == ([], [])

    @pytest.mark.parametrize("target", ["tid", "record"])
    def test_import_of_an_export_has_its_own_blobs(self, db, s3, tmp_path, target):
        """Under new oids and keys; the original can go."""
        with db.transaction() as conn:
            conn.root()["folder"] = folder = type(conn.root())()
            folder["blob"] = Blob(b"exported")
        with db.transaction() as conn:
            exported = conn.exportFile(conn.root()["folder"]._p_oid, BytesIO())
        exported.seek(0)
        base = f"<filestorage>\npath {tmp_path}/Other.fs\n</filestorage>"
        other = open_db(s3, tmp_path, base=base, addressing=target, s3_prefix="other")
        with other.transaction() as conn:
            conn.root()["folder"] = conn.importFile(exported)
        with other.transaction() as conn:
            blob = conn.root()["folder"]["blob"]
            assert read(blob) == b"exported"
            oid, tid = blob._p_oid, blob._p_serial
        stamp = read_reference(other.storage.loadSerial(oid, tid))
        assert (stamp is None) == (target == "tid")
        assert keys(s3, "other/") == ["other/" + blob_key(oid, stamp or tid)]
        other.close()

    def test_import_into_the_same_database_shares_nothing(self, db, s3):
        """The reference in the export is another object's: it is replaced."""
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(b"exported")
        oid, _tid, _data = current(db)
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        exported = conn.exportFile(oid, BytesIO())
        exported.seek(0)
        conn.root()["copy"] = conn.importFile(exported)
        manager.commit()
        with conn.root()["blob"].open("w") as file:
            file.write(b"changed")
        manager.commit()
        assert read(conn.root()["copy"]) == b"exported"
        conn.close()
        db.pack(time.time() + 1)
        assert len(keys(s3)) == 2
        with db.transaction() as conn:
            assert read(conn.root()["copy"]) == b"exported"
            assert read(conn.root()["blob"]) == b"changed"


class TestCopy:
    def test_copied_records_and_their_keys_stay_as_they_are(self, s3, tmp_path):
        """Of a database with a blob directory: by tid; what is stored afterwards by record."""
        source = FileStorage(f"{tmp_path}/Source.fs", blob_dir=f"{tmp_path}/blobs")
        first = commit_blob(source, OID, b"first")
        second = commit_blob(source, OID, b"second", first)
        storage, _client = make_storage(s3, tmp_path, addressing="record")
        storage.copyTransactionsFrom(source)
        assert keys(s3) == sorted(blob_key(OID, tid) for tid in (first, second))
        for tid, data in ((first, b"first"), (second, b"second")):
            assert storage.loadSerial(OID, tid) == source.loadSerial(OID, tid)
            assert load(storage, OID, tid) == data
        third = commit_blob(storage, OID, b"third", second)
        assert reference(storage, OID, third) in keys(s3)
        assert load(storage, OID, third) == b"third"
        assert storage.sweep().kept == 3
        source.close()
        storage.close()


class TestLeaving:
    def test_all_blobs_come_under_their_tids_and_stay_readable_by_tid(self, site, s3):
        """What was stored by record is rewritten, through a storage that goes on by record."""
        db, _client = site.open()
        write(db, b"0", b"1")
        undo(db, 0)
        with db.transaction() as conn:
            conn.root()["other"] = Blob(b"other")
        report = db.storage.rewrite_by_tid()
        assert (report.rewritten, report.missing) == (2, 0)
        again = db.storage.rewrite_by_tid()
        assert (again.copied, again.rewritten) == (0, 0)
        db, _client = site.open("tid")
        assert site.current() == b"0"
        with db.transaction() as conn:
            assert read(conn.root()["other"]) == b"other"
            names = [(b._p_oid, b._p_serial) for b in conn.root().values()]
        for oid, tid in names:
            assert db.storage.loadSerial(oid, tid) == BLOB_RECORD
        db.pack(time.time() + 1)
        assert keys(s3) == sorted(blob_key(*name) for name in names)
        write(db, b"2")
        assert site.current() == b"2"

    def test_others_commit_meanwhile(self, site):
        """Whoever is faster makes it try again; nothing of either is lost."""
        db, client = site.open()
        write(db, b"0")
        with db.transaction() as conn:
            conn.root()["other"] = Blob(b"other")

        def commit_once(*args):
            client.after.clear()
            write(db, b"1")

        client.after["copy_object"] = commit_once
        db.storage.rewrite_by_tid()
        assert site.current() == b"1"
        db, _client = site.open("tid")
        assert site.current() == b"1"
        with db.transaction() as conn:
            assert read(conn.root()["other"]) == b"other"
