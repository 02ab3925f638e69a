"""S3BlobStorage: blobs through connections, undo, restore, foreign transactions, wrappers."""

from binascii import unhexlify
from contextlib import contextmanager
import io
import os

import pytest
import transaction
from zc.zlibstorage import ZlibStorage
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import BlobError
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IBlobStorageRestoreable
from ZODB.interfaces import IMVCCStorage
from ZODB.interfaces import IStorageUndoable
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import ReadOnlyHistoryError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.tests.hexstorage import HexStorage
from ZODB.utils import p64
from ZODB.utils import z64

from zodb_s3blobs.interfaces import IS3BlobStorage
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference

from .services.location import keys
from .services.location import new_bucket
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import filestorage
from .storages import leftovers
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_db
from .storages import open_relstorage
from .storages import open_storage
from .storages import PLAIN_RECORD
from .storages import read
from .storages import restore_blob
from .storages import store_blob


OID = p64(1)


@pytest.fixture
def db(s3, tmp_path):
    db = open_db(s3, tmp_path)
    yield db
    db.close()


@pytest.fixture
def conn(db):
    conn = db.open(transaction.TransactionManager())
    yield conn
    conn.transaction_manager.abort()
    conn.close()


@pytest.fixture
def storage(s3, tmp_path):
    storage, _client = make_storage(s3, tmp_path)
    yield storage
    storage.close()


@pytest.fixture
def hooked(s3, tmp_path):
    """(database, hooked client)."""
    storage, client = make_storage(s3, tmp_path)
    db = DB(storage)
    yield db, client
    db.close()


def begun(storage):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    return txn


class TestProxy:
    def test_filestorage_inside_declares_its_interfaces_and_blobs(self, storage):
        """The wrapper offers what its base offers, and blobs."""
        assert IS3BlobStorage.providedBy(storage)
        assert IBlobStorageRestoreable.providedBy(storage)
        assert IStorageUndoable.providedBy(storage)
        assert storage.supportsUndo()

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_mappingstorage_inside_offers_no_undo_and_no_restore(self, s3, tmp_path, addressing):
        """What the base lacks is not offered."""
        base = MappingStorage()
        storage, _client = make_storage(s3, tmp_path, base=base, addressing=addressing)
        assert IBlobStorage.providedBy(storage)
        assert not IBlobStorageRestoreable.providedBy(storage)
        assert not IStorageUndoable.providedBy(storage)
        for name in ("undo", "restoreBlob", "copyTransactionsFrom", "restore"):
            assert not hasattr(storage, name), name
        storage.close()

    def test_conflict_resolver_that_is_set_reaches_the_base(self, s3, tmp_path):
        """A ZEO server replaces tryToResolveConflict: the base is who calls it."""
        base = FileStorage(f"{tmp_path}/Data.fs")
        storage, _client = make_storage(s3, tmp_path, base=base)

        def resolve(*args):
            raise AssertionError("not called")

        storage.tryToResolveConflict = resolve
        assert base.tryToResolveConflict is resolve
        storage.close()

    def test_closing_twice_changes_nothing(self, s3, tmp_path):
        """close() may be called again."""
        storage = open_storage(s3, tmp_path)
        commit_blob(storage, OID, b"bytes")
        storage.close()
        storage.close()

    def test_temporary_directory_is_empty_at_first_and_outlives_close(self, s3, tmp_path):
        """Blobs that nobody committed may need the directory after close()."""
        storage = open_storage(s3, tmp_path)
        assert os.listdir(storage.temporaryDirectory()) == []
        storage.close()
        assert os.path.isdir(storage.temporaryDirectory())


class TestModes:
    def test_all_open_modes_keep_and_show_their_bytes(self, conn):
        """Modes w, r, a, r+ and c see what the one before has committed."""
        commit, blob = conn.transaction_manager.commit, Blob()
        conn.root()["blob"] = blob
        with blob.open("w") as file:
            file.write(b"written")
        commit()
        with blob.open("a") as file:
            file.write(b", more")
        commit()
        assert read(blob) == b"written, more"
        with blob.open("r+") as file:
            file.write(b"W")
        assert read(blob) == b"Written, more"
        with pytest.raises(BlobError):
            blob.open("c")
        commit()
        with blob.open() as file:  # a ghost has no committed file yet
            assert file.read() == b"Written, more"
        with blob.open("c") as file:
            assert file.read() == b"Written, more"
        with blob.open("w") as file:
            file.write(b"anew")
        with pytest.raises(BlobError):
            blob.committed()
        commit()
        assert read(blob) == b"anew"

    def test_committed_returns_a_read_only_file_with_the_bytes(self, conn):
        """committed() is a path to the whole blob, which nobody may write to."""
        blob = conn.root()["blob"] = Blob(b"whole")
        conn.transaction_manager.commit()
        assert read(blob) == b"whole"
        path = blob.committed()
        with open(path, "rb") as file:
            assert file.read() == b"whole"
        assert os.stat(path).st_mode & 0o222 == 0

    def test_consumed_file_becomes_the_blob(self, conn, tmp_path):
        """consumeFile takes a file over, for new blobs and for existing ones."""
        commit, blob = conn.transaction_manager.commit, Blob()
        conn.root()["blob"] = blob
        for data in (b"first", b"second"):
            (tmp_path / "upload").write_bytes(data)
            blob.consumeFile(str(tmp_path / "upload"))
            commit()
            assert read(blob) == data
            assert not (tmp_path / "upload").exists()

    @pytest.mark.parametrize("touch", [False, True])
    def test_empty_blob_stays_empty_and_loads_from_an_empty_cache(self, s3, tmp_path, touch):
        """A blob without bytes is a blob, whether it was ever opened or not."""
        with open_db(s3, tmp_path).transaction() as conn:
            blob = conn.root()["blob"] = Blob()
            if touch:
                blob.open("w").close()
            db = conn.db()
        db.close()
        db = open_db(s3, tmp_path, cache="empty")
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b""
        db.close()

    def test_rollback_to_a_savepoint_brings_its_bytes_back(self, conn):
        """Blobs follow savepoints, before the first commit and after it."""
        manager, blob = conn.transaction_manager, Blob(b"")
        conn.root()["blob"] = blob
        expected = b""
        for number in (b"1", b"2"):
            with blob.open("a") as file:
                file.write(number)
            expected += number
            savepoint = manager.savepoint()
            with blob.open("r+") as file:
                file.write(b"lost")
            savepoint.rollback()
            assert read(blob) == expected
            manager.commit()
            assert read(blob) == expected

    def test_aborted_changes_leave_bytes_bucket_and_disk_as_they_were(self, conn, db, s3):
        """abort() before the commit uploads nothing and leaves no file."""
        blob = conn.root()["blob"] = Blob(b"kept")
        conn.transaction_manager.commit()
        before = keys(s3)
        with blob.open("a") as file:
            file.write(b" lost")
        conn.root()["other"] = Blob(b"lost")
        conn.transaction_manager.savepoint()
        conn.transaction_manager.abort()
        assert read(blob) == b"kept"
        assert keys(s3) == before
        assert [name for name in leftovers(db.storage) if name.endswith(".tmp")] == []


class TestVisibility:
    def test_running_transactions_own_tid_and_zero_serial_show_staged_bytes(self, storage):
        """Whoever runs the transaction reads the blob it has just stored."""
        txn = begun(storage)
        store_blob(storage, txn, OID, b"staged")
        tid = storage.tpc_transaction().data(storage).tid
        assert load(storage, OID, z64) == b"staged"
        assert load(storage, OID, tid) == b"staged"
        storage.tpc_vote(txn)
        assert load(storage, OID, z64) == b"staged"
        assert storage.tpc_finish(txn) == tid
        with pytest.raises(POSKeyError):
            storage.loadBlob(OID, z64)
        assert load(storage, OID, tid) == b"staged"

    @pytest.mark.parametrize("cached", [True, False])
    def test_reader_of_a_committed_revision_never_sees_staged_bytes(self, s3, tmp_path, cached):
        """Between storeBlob and finish a reader gets the old bytes, cached or not."""
        first = commit_blob(old := open_storage(s3, tmp_path), OID, b"old")
        old.close()
        storage = open_storage(s3, tmp_path, cache="cache" if cached else "empty")
        txn = begun(storage)
        store_blob(storage, txn, OID, b"new", first)
        assert load(storage, OID, first) == b"old"
        with pytest.raises(POSKeyError):
            storage.loadBlob(OID, z64)  # the object exists: z64 is nobody's serial
        storage.tpc_vote(txn)
        assert load(storage, OID, first) == b"old"
        second = storage.tpc_finish(txn)
        assert (load(storage, OID, first), load(storage, OID, second)) == (b"old", b"new")
        storage.close()

    def test_aborted_transactions_bytes_are_nowhere(self, storage, s3):
        """After an abort neither tid, nor zero serial, nor the bucket has the blob."""
        txn = begun(storage)
        store_blob(storage, txn, OID, b"aborted")
        tid = txn.data(storage).tid
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        for serial in (z64, tid):
            with pytest.raises(POSKeyError):
                storage.loadBlob(OID, serial)
        assert keys(s3) == []
        assert leftovers(storage) == []

    def test_reader_while_another_thread_stores_blobs_is_not_disturbed(self, storage):
        """A look among the running transaction's blobs survives that it stores one more."""
        txn = begun(storage)
        store_blob(storage, txn, p64(2), b"2")
        store_blob(storage, txn, p64(3), b"3")

        class StoringOid(bytes):
            """Compared with an oid, it stores a further blob: the other thread's turn."""

            done = False
            __hash__ = bytes.__hash__

            def __eq__(self, other):
                if not StoringOid.done:
                    StoringOid.done = True
                    store_blob(storage, txn, p64(4), b"4")
                return bytes.__eq__(self, other)

        with pytest.raises(POSKeyError):
            storage.loadBlob(StoringOid(OID), p64(1))
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        assert load(storage, p64(3), tid) == b"3"


class TestForeignTransaction:
    def test_store_vote_and_finish_refuse_and_abort_ignores_it(self, storage, s3):
        """A transaction that is not running cannot touch the one that is."""
        txn, foreign = begun(storage), TransactionMetaData()
        store_blob(storage, txn, OID, b"ours")
        with pytest.raises(StorageTransactionError):
            store_blob(storage, foreign, p64(2), b"theirs")
        with pytest.raises(StorageTransactionError):
            restore_blob(storage, foreign, p64(2), p64(2), b"theirs")
        with pytest.raises(StorageTransactionError):
            storage.tpc_vote(foreign)
        with pytest.raises(StorageTransactionError):
            storage.tpc_finish(foreign)
        storage.tpc_abort(foreign)
        assert load(storage, OID, z64) == b"ours"
        storage.tpc_vote(txn)
        with pytest.raises(StorageTransactionError):
            storage.tpc_finish(foreign)
        storage.tpc_abort(foreign)
        tid = storage.tpc_finish(txn)
        assert load(storage, OID, tid) == b"ours"
        assert keys(s3) == [blob_key(OID, tid)]

    def test_ended_transactions_are_foreign(self, storage, s3):
        """A transaction that has finished or was aborted is over: nothing more happens in it."""
        finished = begun(storage)
        store_blob(storage, finished, OID, b"first")
        storage.tpc_vote(finished)
        tid = storage.tpc_finish(finished)
        aborted = begun(storage)
        storage.tpc_abort(aborted)
        txn = begun(storage)
        for over in (finished, aborted):
            with pytest.raises(StorageTransactionError):
                store_blob(storage, over, p64(2), b"late")
            with pytest.raises(StorageTransactionError):
                storage.tpc_vote(over)
            with pytest.raises(StorageTransactionError):
                storage.tpc_finish(over)
            storage.tpc_abort(over)
        assert load(storage, OID, tid) == b"first"
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        assert keys(s3) == [blob_key(OID, tid)]

    def test_beginning_a_running_transaction_again_changes_nothing(self, storage):
        """The base refuses a second tpc_begin; the blobs staged so far stay."""
        txn = begun(storage)
        store_blob(storage, txn, OID, b"staged")
        with pytest.raises(StorageTransactionError):
            storage.tpc_begin(txn)
        storage.tpc_vote(txn)
        assert load(storage, OID, storage.tpc_finish(txn)) == b"staged"


def undo(db, *positions):
    """Undo the transactions at these places of the log, 0 being the last one."""
    log = db.undoLog(0, 100)
    manager = transaction.TransactionManager()
    manager.begin()
    db.undoMultiple([log[position]["id"] for position in positions], manager.get())
    manager.commit()


class TestUndo:
    @pytest.fixture
    def blob(self, conn):
        """A blob with the revisions 0, 1 and 2."""
        blob = conn.root()["blob"] = Blob()
        for number in (b"0", b"1", b"2"):
            with blob.open("w") as file:
                file.write(number)
            conn.transaction_manager.commit()
        return blob

    def bytes_now(self, conn, s3, tmp_path):
        """The bytes by the open connection, which must be what an empty cache loads too."""
        conn.transaction_manager.begin()
        blob = conn.root()["blob"]
        data = read(blob)
        base = FileStorage(f"{tmp_path}/Data.fs", read_only=True)
        storage, _client = make_storage(s3, tmp_path, "probe", base=base)
        assert load(storage, blob._p_oid, blob._p_serial) == data
        storage.close()
        return data

    def test_undo_and_redo_move_between_revisions(self, db, conn, blob, s3, tmp_path):
        """Undo shows the bytes before, its undo those after, as often as one likes."""
        for expected in (b"1", b"2", b"1", b"2"):
            undo(db, 0)
            assert self.bytes_now(conn, s3, tmp_path) == expected

    def test_several_undone_at_once_show_the_oldest_state(self, db, conn, blob, s3, tmp_path):
        """undoMultiple ends at the revision before all of them, and can be undone as one."""
        undo(db, 0, 1)
        assert self.bytes_now(conn, s3, tmp_path) == b"0"
        undo(db, 0)
        assert self.bytes_now(conn, s3, tmp_path) == b"2"

    def test_undo_of_an_undone_undo_in_steps(self, db, conn, blob, s3, tmp_path):
        """Undoing an older transaction that is current again by redo gives its predecessor."""
        undo(db, 0)
        undo(db, 0)  # 2 is current again, by a record that points back
        undo(db, 2)  # the transaction that wrote 2 first
        assert self.bytes_now(conn, s3, tmp_path) == b"1"

    def test_undone_creation_comes_back_by_its_redo(self, db, conn, s3, tmp_path):
        """The undo of a creation needs no bytes, its redo brings them back."""
        conn.root()["blob"] = Blob(b"created")
        conn.transaction_manager.commit()
        before = keys(s3)
        undo(db, 0)
        conn.transaction_manager.begin()
        assert "blob" not in conn.root()
        assert keys(s3) == before
        undo(db, 0)
        assert self.bytes_now(conn, s3, tmp_path) == b"created"
        undo(db, 0)
        undo(db, 0)
        assert self.bytes_now(conn, s3, tmp_path) == b"created"

    def test_creation_and_change_undone_at_once_leave_no_object_in_flight(self, db, conn, s3):
        """undoMultiple down to the creation needs no copy, and nothing of it stays."""
        blob = conn.root()["blob"] = Blob(b"0")
        conn.transaction_manager.commit()
        with blob.open("w") as file:
            file.write(b"1")
        conn.transaction_manager.commit()
        before = keys(s3)
        undo(db, 0, 1)
        conn.transaction_manager.begin()
        assert "blob" not in conn.root()
        db.storage.sweep()
        assert keys(s3) == before

    def test_undo_to_bytes_that_only_a_source_has_uploads_them(self, s3, tmp_path):
        """A site that has not migrated can undo: the old directory's file goes to the bucket."""
        old_base = filestorage(tmp_path, blob_dir=tmp_path / "old")
        db = databaseFromString(f"<zodb>\n{old_base}\n</zodb>")
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(b"in the old directory")
        db.close()
        source = f"<blobdir-source>\npath {tmp_path}/old\n</blobdir-source>\n"
        db = open_db(s3, tmp_path, base=source + filestorage(tmp_path))
        with db.transaction() as conn, conn.root()["blob"].open("w") as file:
            file.write(b"in the bucket")
        undo(db, 0)
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"in the old directory"
        db.close()
        db = open_db(s3, tmp_path, cache="empty")  # without the source
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"in the old directory"
        db.close()

    def test_undo_while_s3_is_down_fails_clean_and_works_later(self, hooked, s3):
        """The undo's transaction aborts with a retriable error, and can be done again."""
        db, client = hooked
        with db.transaction() as conn:
            blob = conn.root()["blob"] = Blob(b"0")
        with db.transaction() as conn, conn.root()["blob"].open("w") as file:
            file.write(b"1")
        before = keys(s3)
        client.before["copy_object"] = Failure()
        with pytest.raises(TransientS3Error) as caught:
            undo(db, 0)
        assert (caught.value.oid, len(caught.value.tid)) == (blob._p_oid, 8)
        assert keys(s3) == before
        assert leftovers(db.storage) == []
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"1"
        client.before.clear()
        undo(db, 0)
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"0"


class TestRestore:
    def test_restored_revision_has_its_tid_and_its_bytes(self, storage, s3):
        """restoreBlob keeps the tid it is given."""
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"restored")
        storage.tpc_vote(txn)
        assert storage.tpc_finish(txn) == p64(77)
        assert load(storage, OID, p64(77)) == b"restored"
        assert keys(s3) == [blob_key(OID, p64(77))]

    def test_aborted_restore_deletes_nothing_from_the_bucket(self, storage, s3):
        """The key may be the live object of the database that is being copied."""
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"restored")
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert keys(s3) == [blob_key(OID, p64(77))]
        assert leftovers(storage) == []

    def test_aborted_restore_in_a_transaction_of_its_own_tid_deletes_nothing(self, storage, s3):
        """Whatever tid the transaction has: a restored key is not the transaction's own."""
        tid = commit_blob(storage, OID, b"live")
        txn = begun(storage)
        restore_blob(storage, txn, OID, tid, b"live")
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert keys(s3) == [blob_key(OID, tid)]

    def test_copy_in_both_directions_keeps_tids_and_bytes(self, s3, tmp_path):
        """A blob directory's database moves into the bucket and back, revision by revision."""
        stock = FileStorage(f"{tmp_path}/stock.fs", blob_dir=f"{tmp_path}/stock")
        revisions = []
        serial = z64
        for number in (b"0", b"1", b"2"):
            serial = commit_blob(stock, OID, number, serial)
            revisions.append((serial, number))
        storage, _client = make_storage(s3, tmp_path)
        storage.copyTransactionsFrom(stock)
        back = FileStorage(f"{tmp_path}/back.fs", blob_dir=f"{tmp_path}/back")
        back.copyTransactionsFrom(storage)
        for other in (storage, back):
            assert [load(other, OID, tid) for tid, _data in revisions] == [b"0", b"1", b"2"]
            assert [record.tid for record in other.iterator()] == [tid for tid, _ in revisions]
        assert leftovers(storage) == []
        for other in (stock, storage, back):
            other.close()


class TestSurroundings:
    def test_exported_tree_is_imported_with_its_blobs(self, conn):
        """exportFile and importFile carry blobs."""
        conn.root()["blob"] = Blob(b"travels")
        conn.transaction_manager.commit()
        file = io.BytesIO()
        conn.exportFile(conn.root()["blob"]._p_oid, file)
        file.seek(0)
        conn.root()["again"] = conn.importFile(file)
        conn.transaction_manager.commit()
        assert read(conn.root()["again"]) == b"travels"
        assert conn.root()["again"]._p_oid != conn.root()["blob"]._p_oid

    def test_historical_connection_reads_the_bytes_of_then(self, s3, tmp_path):
        """DB.open(at=) shows a blob as it was, also from an empty cache."""
        db = open_db(s3, tmp_path)
        tids = []
        for number in (b"0", b"1", b"2"):
            with db.transaction() as conn:
                conn.root()["blob"] = blob = conn.root().get("blob") or Blob()
                with blob.open("w") as file:
                    file.write(number)
            tids.append(db.lastTransaction())
        db.close()
        db = open_db(s3, tmp_path, cache="empty")
        for tid, number in zip(tids, (b"0", b"1", b"2"), strict=True):
            conn = db.open(at=tid)
            assert read(conn.root()["blob"]) == number
            conn.close()
        db.close()

    def test_read_only_base_reads_and_refuses_to_write_pack_and_sweep(self, s3, tmp_path):
        """read-only in the inner section holds for blobs, too."""
        db = open_db(s3, tmp_path)
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(b"readable")
        db.close()
        before = keys(s3)
        db = open_db(s3, tmp_path, cache="empty", base=filestorage(tmp_path, read_only="true"))
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"readable"
        with pytest.raises(ReadOnlyError), db.transaction() as conn:
            conn.root()["other"] = Blob(b"refused")
        with pytest.raises(ReadOnlyError):
            db.pack()
        with pytest.raises(ReadOnlyError):
            db.storage.sweep()
        assert db.storage.sweep(dry_run=True).kept == 1
        assert keys(s3) == before
        db.close()

    def test_two_databases_under_two_prefixes_know_nothing_of_each_other(self, s3, tmp_path):
        """Databases of one process share a bucket under prefixes of their own."""
        dbs = []
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            dbs.append(open_db(s3, tmp_path / name, s3_prefix=name))
        for number, db in enumerate(dbs):
            with db.transaction() as conn:
                conn.root()["blob"] = Blob(b"%d" % number)
        with dbs[0].transaction() as conn:
            del conn.root()["blob"]
        dbs[0].pack()
        dbs[0].pack()
        with dbs[1].transaction() as conn:
            assert read(conn.root()["blob"]) == b"1"
        assert [key.split("/")[0] for key in keys(s3)] == ["two"]
        for db in dbs:
            db.close()

    def test_blob_in_one_database_refers_to_another_one(self, s3, tmp_path):
        """One transaction over two databases of a multi-database commits both blobs."""
        databases = {}
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            storage = open_storage(s3, tmp_path / name, s3_prefix=name)
            DB(storage, database_name=name, databases=databases)
        with databases["one"].transaction() as conn:
            other = conn.get_connection("two")
            conn.root()["blob"] = Blob(b"one")
            other.root()["blob"] = Blob(b"two")
            other.add(other.root()["blob"])
            conn.root()["reference"] = other.root()["blob"]
        with databases["one"].transaction() as conn:
            assert read(conn.root()["blob"]) == b"one"
            assert read(conn.root()["reference"]) == b"two"
        for db in databases.values():
            db.close()


@pytest.mark.parametrize("place", ["around", "inside", "around and inside"])
@pytest.mark.parametrize(
    ("name", "component"),
    [("zlibstorage", "zc.zlibstorage"), ("hexstorage", "ZODB.tests")],
)
def test_records_transformed_by_a_wrapper_are_read_through_it(s3, tmp_path, place, name, component):
    """Wrappers that rewrite records, around ours or inside, hinder neither undo nor pack."""
    wrapped = f"<{name}>\n{{}}\n</{name}>"
    db = open_db(
        s3,
        tmp_path,
        imports=[component],
        around=wrapped if "around" in place else "{}",
        base=wrapped.format(filestorage(tmp_path)) if "inside" in place else None,
    )
    for number in range(3):
        with db.transaction() as conn:
            # Long enough to be worth compressing
            conn.root()["text"] = "long " * 1000
            conn.root()["blob"] = blob = conn.root().get("blob") or Blob()
            with blob.open("w") as file:
                file.write(b"%d" % number)
    undo(db, 0)
    with db.transaction() as conn:
        assert read(conn.root()["blob"]) == b"1"
        tid = blob_tid = conn.root()["blob"]._p_serial
        oid = conn.root()["blob"]._p_oid
    db.pack()
    assert keys(s3) == [blob_key(oid, blob_tid)]
    with db.transaction() as conn:
        assert read(conn.root()["blob"]) == b"1"
        assert conn.root()["blob"]._p_serial == tid
    db.close()


def test_store_of_a_plain_record_passes_through(storage):
    """Objects that are no blobs are the base's business."""
    tid = commit_record(storage, OID)
    assert storage.loadSerial(OID, tid)
    with pytest.raises(POSKeyError):
        storage.loadBlob(OID, tid)


STAMP = b"s" * 16


@pytest.fixture(params=[True, False], ids=["history", "no history"])
def keep_history(request):
    return request.param


@pytest.fixture
def relstorage(s3, tmp_path, keep_history):
    """A storage over a RelStorage."""
    base = open_relstorage(tmp_path, keep_history=keep_history)
    storage, _client = make_storage(s3, tmp_path, base=base)
    yield storage
    storage.close()


@pytest.fixture
def with_history(s3, tmp_path):
    """A database over a RelStorage that keeps old revisions."""
    storage, _client = make_storage(s3, tmp_path, base=open_relstorage(tmp_path))
    db = DB(storage)
    yield db
    db.close()


@contextmanager
def instance_of(storage):
    """Context manager: an instance with a view that begins now."""
    instance = storage.new_instance()
    try:
        yield instance
    finally:
        instance.release()


def record_now(storage, oid):
    """Return (current record, its tid), as a view that begins now shows them."""
    with instance_of(storage) as instance:
        return instance.load(oid)


def assert_in_bucket(s3, tmp_path, storage, revisions):
    """The bytes of (oid, tid, bytes) are where the record says, or else under the tid."""
    with instance_of(storage) as instance:
        records = [instance.loadSerial(oid, tid) for oid, tid, _data in revisions]
    client = make_client(s3)
    for record, (oid, tid, data) in zip(records, revisions, strict=True):
        client.download_file(blob_key(oid, read_reference(record) or tid), f"{tmp_path}/probe")
        with open(f"{tmp_path}/probe", "rb") as file:
            assert file.read() == data
    client.close()


class TestInstances:
    def test_relstorage_inside_makes_it_an_mvcc_storage(self, relstorage, keep_history):
        """A DB that took it for another would never see what other processes commit."""
        with instance_of(relstorage) as instance:
            for storage in (relstorage, instance):
                assert IMVCCStorage.providedBy(storage)
                assert IS3BlobStorage.providedBy(storage)
                assert IBlobStorageRestoreable.providedBy(storage)
                assert IStorageUndoable.providedBy(storage) == keep_history
                assert hasattr(storage, "undo") == keep_history
            assert type(instance) is type(relstorage)

    @pytest.mark.parametrize("base", [FileStorage, MappingStorage])
    def test_other_storages_inside_make_it_none(self, s3, tmp_path, base):
        """They have no instances to offer: DB adapts them itself."""
        inside = base(f"{tmp_path}/Data.fs")
        storage, _client = make_storage(s3, tmp_path, base=inside)
        assert not IMVCCStorage.providedBy(storage)
        for name in ("new_instance", "before_instance", "poll_invalidations"):
            assert not hasattr(storage, name), name
        storage.close()

    def test_connection_sees_what_another_one_commits(self, with_history):
        """Each has a view of its own, which moves when its transaction begins."""
        manager = transaction.TransactionManager()
        with with_history.transaction() as conn:
            conn.root()["blob"] = Blob(b"0")
        reader = with_history.open(manager)
        assert read(reader.root()["blob"]) == b"0"
        with with_history.transaction() as conn, conn.root()["blob"].open("w") as file:
            file.write(b"1")
        assert read(reader.root()["blob"]) == b"0"
        manager.begin()
        assert read(reader.root()["blob"]) == b"1"
        reader.close()

    def test_instances_have_transactions_of_their_own(self, relstorage):
        """What one stages the others do not see, nor does its abort concern them."""
        with instance_of(relstorage) as one, instance_of(relstorage) as other:
            txns = {}
            for number, instance in enumerate((one, other)):
                txns[instance] = begun(instance)
                store_blob(instance, txns[instance], p64(number), b"%d" % number)
            assert load(one, p64(0), z64) == b"0"
            for instance, oid in ((one, p64(1)), (other, p64(0)), (relstorage, p64(0))):
                with pytest.raises(POSKeyError):
                    instance.loadBlob(oid, z64)
            with pytest.raises(StorageTransactionError):
                store_blob(one, txns[other], p64(2), b"2")
            one.tpc_abort(txns[one])
            assert load(other, p64(1), z64) == b"1"
            other.tpc_vote(txns[other])
            tid = other.tpc_finish(txns[other])
            assert load(other, p64(1), tid) == b"1"

    def test_released_instance_leaves_the_others_open(self, s3, tmp_path, keep_history):
        """Client, cache and pool belong to the first, which closes them."""
        base = open_relstorage(tmp_path, keep_history=keep_history)
        storage, client = make_storage(s3, tmp_path, base=base)
        for end in ("release", "release", "close"):
            instance = storage.new_instance()
            tid = commit_blob(instance, p64(len(client.calls)), b"bytes")
            getattr(instance, end)()
            assert client.count("close") == 0
            assert storage.is_open
            assert load(storage, parse_key(keys(s3)[-1])[0], tid) == b"bytes"
        storage.close()
        assert client.count("close") == 1
        assert not storage.is_open

    def test_closing_the_first_closes_the_rest(self, relstorage):
        """Closing again changes nothing."""
        instance = relstorage.new_instance()
        tid = commit_blob(instance, OID, b"bytes")
        relstorage.close()
        relstorage.close()
        assert load(instance, OID, tid) == b"bytes"  # what is cached needs nobody

    def test_instances_share_temporary_directory_and_cache(self, relstorage):
        """What one has loaded no other loads again."""
        with instance_of(relstorage) as one, instance_of(relstorage) as other:
            tid = commit_blob(one, OID, b"bytes")
            assert one.temporaryDirectory() == other.temporaryDirectory()
            assert other.loadBlob(OID, tid) == one.loadBlob(OID, tid)

    def test_historical_instance_reads_the_bytes_of_then(self, s3, tmp_path):
        """From an empty cache, by the reference that the record of then has."""
        storage, _client = make_storage(s3, tmp_path, base=open_relstorage(tmp_path))
        tids = [commit_blob(storage, OID, b"0")]
        tids.append(commit_blob(storage, OID, b"1", tids[0]))
        storage.close()
        storage, _client = make_storage(s3, tmp_path, "empty", base=open_relstorage(tmp_path))
        before = storage.before_instance(tids[1])
        _data, serial = before.load(OID)
        assert serial == tids[0]
        assert load(before, OID, serial) == b"0"
        with before.openCommittedBlobFile(OID, serial) as file:
            assert file.read() == b"0"
        assert before.isReadOnly()
        before.release()
        assert load(storage, OID, tids[1]) == b"1"
        storage.close()

    def test_historical_instance_writes_nothing(self, s3, tmp_path):
        """Neither a blob, nor to the bucket."""
        storage, _client = make_storage(s3, tmp_path, base=open_relstorage(tmp_path))
        tid = commit_blob(storage, OID, b"0")
        found = keys(s3)
        before = storage.before_instance(p64(2**62))
        with pytest.raises(ReadOnlyHistoryError):
            commit_blob(before, OID, b"1", tid)
        with pytest.raises(ReadOnlyError):
            before.sweep()
        with pytest.raises(ReadOnlyError):
            before.pack(0, None)
        before.release()
        assert keys(s3) == found
        storage.close()

    def test_historical_connections_show_each_state(self, with_history):
        """DB.open(at=), over a base with instances."""
        tids = []
        for number in (b"0", b"1", b"2"):
            with with_history.transaction() as conn:
                blob = conn.root()["blob"] = conn.root().get("blob") or Blob()
                with blob.open("w") as file:
                    file.write(number)
            tids.append(record_now(with_history.storage, blob._p_oid)[1])
        for number, tid in zip((b"0", b"1", b"2"), tids, strict=True):
            conn = with_history.open(at=tid)
            assert read(conn.root()["blob"]) == number
            conn.close()


class TestByRecord:
    """A base that tells the tid when all is over: records carry the keys."""

    def test_record_refers_to_the_object_in_the_bucket(self, relstorage, s3):
        """Oid and stamp make the key; the rest of the record is as it was."""
        tid = commit_blob(relstorage, OID, b"bytes")
        (key,) = keys(s3)
        record, serial = record_now(relstorage, OID)
        assert serial == tid
        assert parse_key(key) == (OID, read_reference(record))
        assert record == with_reference(BLOB_RECORD, read_reference(record))

    def test_running_transactions_new_blobs_are_read_by_the_zero_serial(self, relstorage):
        """As whoever creates an object does; one that exists has no zero serial."""
        first = commit_blob(relstorage, OID, b"first")
        txn = begun(relstorage)
        store_blob(relstorage, txn, p64(2), b"new")
        store_blob(relstorage, txn, OID, b"second", first)
        assert load(relstorage, p64(2), z64) == b"new"
        assert load(relstorage, OID, first) == b"first"
        with pytest.raises(POSKeyError):
            relstorage.loadBlob(OID, z64)
        relstorage.tpc_vote(txn)
        tid = relstorage.tpc_finish(txn)
        assert load(relstorage, p64(2), tid) == b"new"
        with pytest.raises(POSKeyError):
            relstorage.loadBlob(p64(2), z64)

    def test_record_that_is_no_blobs_is_refused(self, relstorage, s3):
        """It cannot say where its bytes are."""
        txn = begun(relstorage)
        with pytest.raises(StorageError, match=r"0x1 cannot be stored.*not a ZODB\.blob\.Blob's"):
            store_blob(relstorage, txn, OID, b"bytes", record=PLAIN_RECORD)
        relstorage.tpc_abort(txn)
        assert keys(s3) == []

    def test_reference_that_was_brought_along_is_replaced(self, relstorage, s3):
        """The bytes are stored here, so that the record must not refer to elsewhere."""
        txn = begun(relstorage)
        store_blob(relstorage, txn, OID, b"bytes", record=with_reference(BLOB_RECORD, STAMP))
        relstorage.tpc_vote(txn)
        tid = relstorage.tpc_finish(txn)
        stamp = read_reference(record_now(relstorage, OID)[0])
        assert stamp != STAMP
        assert keys(s3) == [blob_key(OID, stamp)]
        assert load(relstorage, OID, tid) == b"bytes"

    def test_undo_and_redo_need_no_copy(self, with_history, s3):
        """The reference travels with the record."""
        for number in (b"0", b"1"):
            with with_history.transaction() as conn:
                blob = conn.root()["blob"] = conn.root().get("blob") or Blob()
                with blob.open("w") as file:
                    file.write(number)
        found = keys(s3)
        for expected in (b"0", b"1", b"0"):
            undo(with_history, 0)
            with with_history.transaction() as conn:
                assert read(conn.root()["blob"]) == expected
        assert keys(s3) == found

    def test_undone_creation_comes_back_by_its_redo(self, with_history):
        """Nothing to copy, neither way."""
        with with_history.transaction() as conn:
            conn.root()["blob"] = Blob(b"created")
        undo(with_history, 0)
        with with_history.transaction() as conn:
            assert "blob" not in conn.root()
        undo(with_history, 0)
        with with_history.transaction() as conn:
            assert read(conn.root()["blob"]) == b"created"

    def test_exported_blob_gets_a_key_of_its_own(self, relstorage, s3):
        """An import into the same database, or into another one over a RelStorage."""
        db = DB(relstorage)
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(b"travels")
        file = io.BytesIO()
        with db.transaction() as conn:
            conn.exportFile(conn.root()["blob"]._p_oid, file)
        file.seek(0)
        with db.transaction() as conn:
            conn.root()["again"] = conn.importFile(file)
        with db.transaction() as conn:
            oids = [conn.root()[name]._p_oid for name in ("blob", "again")]
            assert read(conn.root()["again"]) == b"travels"
        names = [read_reference(record_now(relstorage, oid)[0]) for oid in oids]
        assert keys(s3) == sorted(map(blob_key, oids, names))
        assert names[0] != names[1]


class TestImport:
    def test_reference_is_taken_out_where_the_tid_is_known(self, s3, tmp_path):
        """Else a read would look for the object of another database first, for ever."""
        storage, client = make_storage(s3, tmp_path)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes", record=with_reference(BLOB_RECORD, STAMP))
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        assert storage.load(OID)[0] == BLOB_RECORD
        assert keys(s3) == [blob_key(OID, tid)]
        storage.close()
        storage, client = make_storage(s3, tmp_path, "empty")
        assert load(storage, OID, tid) == b"bytes"
        assert client.calls == [("download_file", blob_key(OID, tid))]
        storage.close()

    def test_tree_of_a_relstorage_is_imported_into_a_filestorage(self, with_history, db, s3):
        """By Zope's export and import; nothing of where it came from is left."""
        with with_history.transaction() as conn:
            conn.root()["blob"] = Blob(b"travels")
        file = io.BytesIO()
        with with_history.transaction() as conn:
            conn.exportFile(conn.root()["blob"]._p_oid, file)
        file.seek(0)
        with db.transaction() as conn:
            conn.root()["blob"] = conn.importFile(file)
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            assert read(blob) == b"travels"
            record, tid = db.storage.load(blob._p_oid)
            assert read_reference(record) is None
            assert blob_key(blob._p_oid, tid) in keys(s3)


class TestRestoredRecords:
    @pytest.mark.parametrize("kind", ["FileStorage", "history", "no history"])
    @pytest.mark.parametrize(
        ("record", "name"),
        [
            (with_reference(BLOB_RECORD, STAMP), STAMP),
            (BLOB_RECORD, p64(77)),
            (BLOB_RECORD + b"after it", p64(77)),
        ],
        ids=["reference", "none", "odd"],
    )
    def test_record_stays_as_it_is_and_tells_where_the_object_goes(
        self, s3, tmp_path, kind, record, name
    ):
        """Byte by byte, over every base: the source of the copy may be in use again."""
        base = None
        if kind != "FileStorage":
            base = open_relstorage(tmp_path, keep_history=kind == "history")
        storage, _client = make_storage(s3, tmp_path, base=base)
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"restored", record)
        storage.tpc_vote(txn)
        assert storage.tpc_finish(txn) == p64(77)
        assert keys(s3) == [blob_key(OID, name)]
        assert storage.loadSerial(OID, p64(77)) == record
        assert load(storage, OID, p64(77)) == b"restored"
        storage.close()
        if kind != "FileStorage":
            base = open_relstorage(tmp_path, keep_history=kind == "history")
        storage, _client = make_storage(s3, tmp_path, "empty", base=base)
        assert load(storage, OID, p64(77)) == b"restored"
        storage.close()

    def test_reader_while_a_transaction_is_restored_is_not_disturbed(self, relstorage):
        """What is there is read, what is not is a POSKeyError, as at any other time."""
        tid = commit_blob(relstorage, p64(2), b"there")
        os.remove(relstorage.loadBlob(p64(2), tid))
        txn = TransactionMetaData()
        relstorage.tpc_begin(txn, p64(77), " ")
        restore_blob(relstorage, txn, OID, p64(77), b"restored")
        assert load(relstorage, p64(2), tid) == b"there"
        with pytest.raises(POSKeyError):
            relstorage.loadBlob(p64(3), tid)
        assert load(relstorage, OID, p64(77)) == b"restored"
        relstorage.tpc_abort(txn)

    @pytest.fixture
    def moved(self, s3, tmp_path, with_history):
        """(database over a RelStorage, its blob) that came from a FileStorage: 0, then 1."""
        old = databaseFromString(
            f"<zodb>\n{filestorage(tmp_path, blob_dir=tmp_path / 'old')}\n</zodb>"
        )
        for number in (b"0", b"1"):
            with old.transaction() as conn:
                blob = conn.root()["blob"] = conn.root().get("blob") or Blob()
                with blob.open("w") as file:
                    file.write(number)
        storage, _client = make_storage(
            s3, tmp_path, "moved", base=open_relstorage(tmp_path, "moved")
        )
        storage.copyTransactionsFrom(old.storage)
        old.close()
        db = DB(storage)
        with db.transaction() as conn:
            blob = conn.root()["blob"]
        yield db, blob._p_oid
        db.close()

    def check(self, db, s3, tmp_path, expected):
        """The blob has these bytes, in an empty cache too."""
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            assert read(blob) == expected
            oid, tid = blob._p_oid, blob._p_serial
        assert_in_bucket(s3, tmp_path, db.storage, [(oid, tid, expected)])
        return record_now(db.storage, oid)[0]

    def test_undo_of_revisions_without_references_copies_them(self, moved, s3, tmp_path):
        """To the key of the undo's tid, which RelStorage knows by then; as often as one likes."""
        db, _oid = moved
        assert [len(parse_key(key)[1]) for key in keys(s3)] == [8, 8]
        for count, expected in enumerate((b"0", b"1", b"0"), 3):
            undo(db, 0)
            assert read_reference(self.check(db, s3, tmp_path, expected)) is None
            assert len(keys(s3)) == count

    def test_undo_of_a_first_change_after_the_move_copies(self, moved, s3, tmp_path):
        """From a record with a reference to one without; its redo copies nothing."""
        db, _oid = moved
        with db.transaction() as conn, conn.root()["blob"].open("w") as file:
            file.write(b"2")
        undo(db, 0)
        assert read_reference(self.check(db, s3, tmp_path, b"1")) is None
        found = keys(s3)
        undo(db, 0)
        assert read_reference(self.check(db, s3, tmp_path, b"2")) is not None
        assert keys(s3) == found

    def test_undo_that_is_aborted_deletes_its_copies(self, moved, s3):
        """And none of what it copied from."""
        db, _oid = moved
        found = keys(s3)
        manager = transaction.TransactionManager()
        manager.begin()
        db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
        manager.get().join(RefusingManager())
        with pytest.raises(OSError, match="says the test"):
            manager.commit()
        manager.abort()
        assert keys(s3) == found

    @pytest.mark.parametrize("around", [None, HexStorage])
    def test_copy_of_a_relstorage_into_another_keeps_blobs_and_records(
        self, s3, tmp_path, keep_history, around
    ):
        """Also where a wrapper is asked, to which RelStorage gives a copyTransactionsFrom."""
        source, _client = make_storage(
            s3, tmp_path, "source", base=open_relstorage(tmp_path, "source")
        )
        first = commit_blob(source, OID, b"0")
        revisions = [(OID, first, b"0"), (OID, commit_blob(source, OID, b"1", first), b"1")]
        location = new_bucket(s3)
        base = open_relstorage(tmp_path, "target", keep_history=keep_history)
        target, _client = make_storage(location, tmp_path, "target", base=base)
        # Of a class of its own: a RelStorage changes the class around it.
        outer = type("Wrapper", (around,), {})(target) if around else target
        outer.copyTransactionsFrom(source)
        if not keep_history:
            del revisions[0]
        for oid, tid, data in revisions:
            assert outer.loadSerial(oid, tid) == source.loadSerial(oid, tid)
            assert load(outer, oid, tid) == data
        target.close()
        base = open_relstorage(tmp_path, "target", keep_history=keep_history)
        target, _client = make_storage(location, tmp_path, "empty", base=base)
        outer = type("Wrapper", (around,), {})(target) if around else target
        for oid, tid, data in revisions:
            assert load(outer, oid, tid) == data
        source.close()
        target.close()


class RefusingManager:
    """Takes part in a transaction after ZODB, and refuses to commit."""

    transaction_manager = None

    def sortKey(self):
        return "~"

    def tpc_vote(self, transaction):
        raise OSError("says the test")

    def _nothing(self, transaction):
        pass

    commit = abort = tpc_begin = tpc_finish = tpc_abort = _nothing


@pytest.mark.parametrize("place", ["around", "inside", "around and inside"])
def test_references_in_transformed_records_are_found(s3, tmp_path, keep_history, place):
    """Wrappers around ours, or inside, over a RelStorage: neither reads nor packs lose a blob."""
    (tmp_path / "database").mkdir()
    wrapped = "<zlibstorage>\n{}\n</zlibstorage>"
    base = (
        f"<relstorage>\nkeep-history {str(keep_history).lower()}\n"
        f"<sqlite3>\ndata-dir {tmp_path}/database\n</sqlite3>\n</relstorage>"
    )
    options = {
        "imports": ["zc.zlibstorage", "relstorage"],
        "around": wrapped if "around" in place else "{}",
        "base": wrapped.format(base) if "inside" in place else base,
        "gc_grace": 0,
    }
    db = open_db(s3, tmp_path, **options)
    for number in range(3):
        with db.transaction() as conn:
            # Long enough to be worth compressing
            conn.root()["text"] = "long " * 1000
            blob = conn.root()["blob"] = conn.root().get("blob") or Blob()
            with blob.open("w") as file:
                file.write(b"%d" % number)
    if keep_history:
        undo(db, 0)
    expected = b"1" if keep_history else b"2"
    db.pack()
    assert len(keys(s3)) == 1
    db.close()
    db = open_db(s3, tmp_path, cache="empty", **options)
    with db.transaction() as conn:
        assert read(conn.root()["blob"]) == expected
    db.close()


def test_two_different_wrappers_around_and_inside_are_undone_in_their_order(s3, tmp_path):
    """Sweep, undo and rewriting read records once through each of them."""

    class Outer(HexStorage):
        def new_instance(self):
            return Outer(self.base.new_instance())

        def load(self, oid, version=""):
            data, serial = self.base.load(oid)
            return unhexlify(data[2:]), serial

    # Of a class of its own: a RelStorage changes the class around it.
    inner = type("Inner", (ZlibStorage,), {})(open_relstorage(tmp_path))
    storage, client = make_storage(s3, tmp_path, base=inner, gc_grace=0)
    db = DB(Outer(storage))
    for data in (b"1", b"2"):
        with db.transaction() as conn:
            conn.root()["blob"] = conn.root().get("blob") or Blob()
            with conn.root()["blob"].open("w") as file:
                file.write(data)
    client.upload_file(__file__, blob_key(p64(1), b"orphan of 16 b.."))
    report = storage.sweep()
    assert (report.kept, report.deleted) == (2, 1)
    undo(db, 0)
    with db.transaction() as conn:
        assert read(conn.root()["blob"]) == b"1"
    assert storage.rewrite_by_tid().rewritten == 1
    with db.transaction() as conn:
        assert read(conn.root()["blob"]) == b"1"
    db.close()


def test_instance_released_in_the_middle_of_a_transaction_leaves_nothing(relstorage, s3):
    """Neither an object that no sweep may take nor a staged file."""
    instance = relstorage.new_instance()
    txn = TransactionMetaData()
    instance.tpc_begin(txn)
    store_blob(instance, txn, OID, b"bytes")
    instance.release()
    assert (keys(s3), leftovers(relstorage)) == ([], [])
    assert relstorage.sweep().in_flight == 0


def test_copy_from_an_instance_with_an_older_view_has_all_blobs(s3, tmp_path):
    """The iterator shows what another process has stored since; so do its blobs."""
    source, _client = make_storage(s3, tmp_path, "one", base=open_relstorage(tmp_path))
    other, _client = make_storage(s3, tmp_path, "two", base=open_relstorage(tmp_path))
    commit_blob(other, p64(1), b"first")
    source.load(p64(1))  # from here on the source's own view stands still
    tid = commit_blob(other, p64(2), b"second")
    location = new_bucket(s3)
    target, _client = make_storage(location, tmp_path, "target")
    target.copyTransactionsFrom(source)
    assert load(target, p64(2), tid) == b"second"
    for storage in (source, other, target):
        storage.close()
