"""Sweeper: precise to the revision, safe against everything under way, and silent about nothing."""

from functools import partial
import logging
import os
import shutil
import time

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import p64
from ZODB.utils import u64

from zodb_s3blobs import garbage
from zodb_s3blobs.garbage import Sweeper
from zodb_s3blobs.interfaces import OtherDatabaseError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference
from zodb_s3blobs.staged import BlobServices

from .services.location import boto3_client
from .services.location import keys
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import Gate
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_db
from .storages import open_relstorage
from .storages import open_storage
from .storages import PLAIN_RECORD
from .storages import read
from .storages import restore_blob
from .storages import start
from .storages import store_blob
from .storages import TcpProxy


OID = p64(1)
OTHER = p64(2)
HIGHEST = p64(0xFFFF)


@pytest.fixture
def base(tmp_path):
    return FileStorage(f"{tmp_path}/Data.fs")


@pytest.fixture
def made(s3, tmp_path, base):
    """(storage, its hooked client)."""
    storage, client = make_storage(s3, tmp_path, base=base)
    commit_record(storage, HIGHEST)
    yield storage, client
    storage.close()


def put(location, *names):
    """Put objects into the bucket that no transaction of this database has made."""
    client = boto3_client(location)
    for name in names:
        client.put_object(Bucket=location.bucket, Key=name, Body=b"12345")
    client.close()


def rewrite(db, *versions):
    """Commit one revision of the root's blob after the other; return their tids."""
    tids = []
    for data in versions:
        with db.transaction() as conn:
            conn.root()["blob"] = blob = conn.root().get("blob") or Blob()
            with blob.open("w") as file:
                file.write(data)
        tids.append(db.lastTransaction())
    return tids


class TestPrecision:
    @pytest.mark.parametrize("kind", ["FileStorage", "MappingStorage"])
    def test_five_rewrites_and_a_pack_leave_one_object(self, s3, tmp_path, kind):
        """What no revision refers to is deleted, what one does is kept."""
        base = MappingStorage() if kind == "MappingStorage" else None
        storage, _client = make_storage(s3, tmp_path, base=base)
        db = DB(storage)
        tids = rewrite(db, *(b"%d" % number for number in range(5)))
        with db.transaction() as conn:
            oid = conn.root()["blob"]._p_oid
        assert len(keys(s3)) == 5
        db.pack(time.time() + 1)
        assert keys(s3) == [blob_key(oid, tids[-1])]
        db.pack(time.time() + 1)
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"4"
        db.close()

    def test_revisions_inside_the_pack_window_survive(self, s3, tmp_path):
        """Those since the pack time, and the one that was current then, can be read."""
        db = open_db(s3, tmp_path)
        versions = [b"%d" % number for number in range(5)]
        tids = rewrite(db, *versions)
        with db.transaction() as conn:
            oid = conn.root()["blob"]._p_oid
        times = [TimeStamp(tid).timeTime() for tid in tids]
        db.pack((times[2] + times[3]) / 2)
        db.close()
        assert keys(s3) == sorted(blob_key(oid, tid) for tid in tids[2:])
        db = open_db(s3, tmp_path, cache="empty")
        for tid, data in list(zip(tids, versions, strict=True))[2:]:
            assert load(db.storage, oid, tid) == data
            conn = db.open(at=tid)
            assert read(conn.root()["blob"]) == data
            conn.close()
        for tid in tids[:2]:
            with pytest.raises(POSKeyError):
                db.storage.loadBlob(oid, tid)
        db.close()

    def test_undone_and_redone_revisions_inside_the_window_survive(self, s3, tmp_path):
        """Behind an undone creation lie revisions that can still be undone to."""
        db = open_db(s3, tmp_path)
        rewrite(db, b"0", b"1")
        for count in (2, 1):  # undo both at once, then undo that
            manager = transaction.TransactionManager()
            db.undoMultiple([entry["id"] for entry in db.undoLog(0, count)], manager.get())
            manager.commit()
        # The first undo's copy of 0, which its second one makes needless, may be there or not.
        assert db.storage.sweep().kept == 3
        assert len(keys(s3)) == 3
        db.close()
        db = open_db(s3, tmp_path, cache="empty")
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"1"
        db.close()

    def test_blob_of_an_undone_creation_survives_until_it_is_packed(self, s3, tmp_path):
        """The creation can be redone as long as its revision is there."""
        db = open_db(s3, tmp_path)
        rewrite(db, b"0")
        manager = transaction.TransactionManager()
        db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
        manager.commit()
        assert db.storage.sweep().kept == 1
        db.pack(time.time() + 1)
        assert keys(s3) == []
        db.close()

    def test_unreachable_blob_goes_with_its_object(self, s3, tmp_path):
        """Garbage collection of the base takes the blob along, and its cached file."""
        db = open_db(s3, tmp_path)
        rewrite(db, b"0")
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            blob._p_activate()
            path = db.storage.fshelper.getBlobFilename(blob._p_oid, blob._p_serial)
            del conn.root()["blob"]
        db.pack(time.time() + 1)
        assert keys(s3) == []
        assert not os.path.exists(path)
        db.close()

    def test_several_pages_are_swept(self, made, s3, monkeypatch):
        """More keys than one page of a listing, or one batch of a deletion, holds."""
        monkeypatch.setattr(garbage, "PAGES_AT_ONCE", 1)
        storage, client = made
        commit_record(storage, p64(9))
        tid = commit_blob(storage, OID, b"kept")
        put(s3, *(blob_key(p64(0x1000 + number), p64(5)) for number in range(1005)))
        report = storage.sweep()
        assert (report.listed, report.kept, report.deleted) == (1006, 1, 1005)
        assert keys(s3) == [blob_key(OID, tid)]
        assert client.count("delete_objects") == 2


class TestInFlight:
    def test_blob_between_upload_and_vote_survives_a_sweep(self, made, s3):
        """Uploaded, not voted: no revision refers to it yet."""
        storage, client = made
        first = commit_blob(storage, OID, b"first")
        uploaded = client.after["upload_file"] = Gate()
        uploaded.open()
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, OID, b"second", first)
        uploaded.wait()
        report = storage.sweep()
        assert (report.kept, report.in_flight, report.deleted) == (1, 1, 0)
        storage.tpc_vote(txn)
        second = storage.tpc_finish(txn)
        assert keys(s3) == sorted(blob_key(OID, tid) for tid in (first, second))

    def test_blob_between_vote_and_finish_survives_a_pack_under_way(self, s3, tmp_path):
        """The base is packed, the sweep has begun, and then a transaction votes."""
        storage, client = make_storage(s3, tmp_path)
        db = DB(storage)
        serial = rewrite(db, b"0", b"1")[-1]
        with db.transaction() as conn:
            oid = conn.root()["blob"]._p_oid
        gate = client.before["list_pages"] = Gate()
        pack = start(db.pack, time.time() + 1)
        gate.wait()
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, oid, b"2", serial)
        storage.tpc_vote(txn)
        gate.open()
        pack.result()
        tid = storage.tpc_finish(txn)
        assert keys(s3) == sorted(blob_key(oid, each) for each in (serial, tid))
        db.close()
        storage = open_storage(s3, tmp_path, cache="empty")
        assert load(storage, oid, tid) == b"2"
        storage.close()

    @pytest.mark.parametrize("place", ["before", "after"])
    def test_transaction_that_finishes_while_the_sweep_asks_keeps_its_blob(
        self, made, base, s3, monkeypatch, place
    ):
        """Listed in flight, finished before the base is asked, or just after it."""
        storage, _client = made
        first = commit_blob(storage, OID, b"first")
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, OID, b"second", first)
        storage.tpc_vote(txn)
        last_transaction, history = base.lastTransaction, base.history

        def finish():
            if storage.tpc_transaction() is txn:
                storage.tpc_finish(txn)

        def finish_then_tell():
            finish()
            return last_transaction()

        def tell_then_finish(*args, **kw):
            answer = history(*args, **kw)
            finish()
            return answer

        if place == "before":
            monkeypatch.setattr(base, "lastTransaction", finish_then_tell)
        else:
            monkeypatch.setattr(base, "history", tell_then_finish)
        assert storage.sweep().deleted == 0
        assert len(keys(s3)) == 2

    def test_keys_above_the_last_transaction_are_spared_and_counted(self, made, s3):
        """They may be another process's, or an orphan that a later sweep deletes."""
        storage, _client = made
        last = commit_record(storage, p64(9))
        put(s3, blob_key(OID, p64(u64(last) + 1)), blob_key(OID, p64(u64(last) - 1)))
        report = storage.sweep()
        assert (report.in_flight, report.deleted) == (1, 1)
        commit_record(storage, p64(9), last)
        assert storage.sweep().deleted == 1
        assert keys(s3) == []


class TestOtherKeys:
    def test_keys_of_other_forms_are_left_alone_and_counted(self, made, s3):
        """Only keys that this package writes are judged."""
        storage, _client = made
        last = u64(commit_record(storage, p64(9)))
        foreign = [
            "blobs/readme.txt",
            f"blobs/0001/{last - 1:x}.blob",
            f"blobs/1/{last - 1:X}.BLOB",
            "blobs/1/" + 31 * "a" + ".blob",
            "blobs/1/" + 32 * "A" + ".blob",
            "blobs/xyz/1.blob",
            f"blobs/1/{last - 1:x}.blob.bak",
            f"blobs/a/b/{last - 1:x}.blob",
        ]
        put(s3, "elsewhere/1.blob", *foreign)
        report = storage.sweep()
        assert (report.listed, report.foreign, report.deleted) == (8, 8, 0)
        assert len(keys(s3)) == 9

    def test_another_databases_key_stops_the_sweep_and_its_page_is_kept(self, made, s3):
        """An oid that is no blob here, with a key younger than it: nothing is deleted."""
        storage, _client = made
        tid = commit_record(storage, OTHER)
        commit_blob(storage, OID, b"ours")
        last = commit_record(storage, p64(9))
        assert tid < last
        put(s3, blob_key(p64(3), p64(5)), blob_key(OTHER, p64(u64(tid) + 1)))
        before = keys(s3)
        with pytest.raises(OtherDatabaseError) as caught:
            storage.sweep()
        assert caught.value.key == blob_key(OTHER, p64(u64(tid) + 1))
        assert caught.value.oid == OTHER
        assert keys(s3) == before
        with pytest.raises(OtherDatabaseError):
            storage.sweep(dry_run=True)

    def test_new_database_in_the_place_of_a_lost_one_deletes_nothing(self, s3, tmp_path):
        """A volume that is not mounted, a wrong path: FileStorage makes an empty Data.fs."""
        db = open_db(s3, tmp_path)
        rewrite(db, b"one", b"two")
        db.close()
        before = keys(s3)
        os.remove(tmp_path / "Data.fs")
        os.remove(tmp_path / "Data.fs.index")
        db = open_db(s3, tmp_path)
        with pytest.raises(OtherDatabaseError, match="Nothing was deleted"):
            db.pack(time.time() + 1)
        assert keys(s3) == before
        db.close()

    def test_oid_that_was_never_given_out_is_kept_beside_keys_of_ours(self, made, s3):
        """A copy of the database does not know what the original has added since."""
        storage, _client = made
        tid = commit_blob(storage, OID, b"ours")
        added = blob_key(p64(u64(HIGHEST) + 1), p64(5))
        put(s3, added, blob_key(OTHER, p64(5)))
        report = storage.sweep()
        assert (report.kept, report.foreign, report.deleted) == (1, 1, 1)
        assert keys(s3) == sorted([added, blob_key(OID, tid)])

    def test_foreign_bucket_without_a_key_of_ours_stops_the_sweep(self, made, s3):
        """Older keys of an oid that is no blob here, and not one that is surely ours."""
        storage, _client = made
        commit_record(storage, OTHER)
        put(s3, blob_key(OTHER, p64(5)), blob_key(p64(3), p64(5)))
        before = keys(s3)
        with pytest.raises(OtherDatabaseError):
            storage.sweep()
        assert keys(s3) == before

    def test_orphan_whose_oid_was_given_out_again_is_kept_and_stops_nothing(self, made, s3):
        """A crash's orphan can look like another database's key: it is spared, others are not."""
        storage, _client = made
        first = commit_blob(storage, OID, b"ours")
        commit_record(storage, OTHER)
        put(s3, blob_key(OTHER, p64(5)), blob_key(p64(3), p64(5)))
        report = storage.sweep()
        assert (report.kept, report.foreign, report.deleted) == (1, 1, 1)
        assert keys(s3) == [blob_key(OID, first), blob_key(OTHER, p64(5))]


class TestErrors:
    """An error never means garbage."""

    def garbage(self, storage, location):
        commit_blob(storage, OID, b"ours")
        put(location, blob_key(p64(3), p64(5)), blob_key(OID, p64(5)))
        return keys(location)

    @pytest.mark.parametrize("method", ["history", "loadSerial", "lastTransaction"])
    def test_base_that_fails_to_answer_stops_the_sweep(self, made, base, s3, monkeypatch, method):
        """Anything but "these revisions" or POSKeyError deletes nothing."""
        storage, _client = made
        before = self.garbage(storage, s3)
        monkeypatch.setattr(base, method, Failure(OSError("says the test")))
        with pytest.raises(OSError, match="says the test"):
            storage.sweep()
        assert keys(s3) == before

    def test_listing_that_fails_stops_the_sweep(self, made, s3):
        """The error is raised to whoever packs."""
        storage, client = made
        db = DB(storage)
        rewrite(db, b"0", b"1")
        before = keys(s3)
        client.before["list_pages"] = Failure(PermanentS3Error("says the test"))
        with pytest.raises(PermanentS3Error):
            db.pack(time.time() + 1)
        assert keys(s3) == before
        client.before.clear()
        db.pack(time.time() + 1)
        assert len(keys(s3)) == 1
        db.close()

    def test_listing_that_begins_anew_each_time_stops_the_sweep(self, made, s3):
        """A server that does not know where to go on must not be asked for ever."""
        storage, client = made
        commit_blob(storage, OID, b"ours")
        list_pages, asked = client.client.list_pages, []

        def from_the_beginning(prefix, after):
            asked.append(after)
            assert len(asked) < 5, "it is asked for ever"
            return list_pages(prefix)

        client.list_pages = from_the_beginning
        with pytest.raises(PermanentS3Error):
            storage.sweep()

    def test_base_that_fails_to_pack_is_not_swept_after(self, made, base, s3, monkeypatch):
        """Without a pack there is nothing to say about garbage."""
        storage, client = made
        before = self.garbage(storage, s3)
        monkeypatch.setattr(base, "pack", Failure(OSError("says the test")))
        client.calls.clear()
        with pytest.raises(OSError, match="says the test"):
            storage.pack(time.time(), None)
        assert client.calls == []
        assert keys(s3) == before

    def test_arguments_of_pack_and_its_result_are_the_bases(self, made, base, monkeypatch):
        """Bases differ in what pack takes."""
        storage, _client = made
        monkeypatch.setattr(base, "pack", lambda *args, **kw: (args, kw))
        assert storage.pack(1, 2, gc=False) == ((1, 2), {"gc": False})

    def test_keys_whose_deletion_is_refused_are_counted_as_failed(self, made, s3, caplog):
        """One refused key hinders no other, and the next sweep tries again."""
        storage, client = made
        self.garbage(storage, s3)
        stubborn = blob_key(p64(3), p64(5))
        delete = client.client.delete_objects

        def refuse(names):
            delete([name for name in names if name != stubborn])
            return {stubborn: "AccessDenied"}

        client.delete_objects = refuse
        report = storage.sweep()
        assert (report.garbage, report.deleted, report.failed) == (2, 1, 1)
        assert "AccessDenied" in caplog.text
        del client.delete_objects
        assert storage.sweep().deleted == 1

    def test_deletion_that_fails_leaves_a_database_that_can_be_swept(self, made, s3):
        """A sweep that broke off blocks no commit and no later sweep."""
        storage, client = made
        self.garbage(storage, s3)
        client.before["delete_objects"] = Failure(times=1)
        with pytest.raises(TransientS3Error):
            storage.sweep()
        assert storage.sweep().deleted == 2
        commit_blob(storage, p64(3), b"next")

    def test_sweeps_of_two_threads_take_turns(self, made, s3):
        """The second sweep finds what the first has left."""
        storage, client = made
        self.garbage(storage, s3)
        gate = client.before["delete_objects"] = Gate()
        first = start(storage.sweep)
        gate.wait()
        second = start(storage.sweep)
        gate.open()
        assert first.result().deleted == 2
        assert (second.result().listed, second.result().deleted) == (1, 0)


class TestReport:
    def test_dry_run_counts_what_the_real_one_deletes_and_deletes_nothing(self, made, s3):
        """The same report, but for deleted."""
        storage, _client = made
        commit_blob(storage, OID, b"ours")
        last = commit_record(storage, OTHER)
        put(
            s3, "blobs/readme.txt", blob_key(p64(3), p64(5)), blob_key(OID, p64(5)),
            blob_key(OTHER, p64(5)), blob_key(OID, p64(u64(last) + 1)),
        )  # fmt: skip
        before = keys(s3)
        dry = storage.sweep(dry_run=True)
        assert keys(s3) == before
        real = storage.sweep()
        assert (dry.deleted, real.deleted) == (0, 2)
        dry.deleted = 2
        assert repr(dry) == repr(real)
        assert (real.listed, real.kept, real.in_flight, real.foreign) == (6, 1, 1, 2)
        assert (real.garbage, real.bytes, real.failed) == (2, 10, 0)

    def test_one_log_line_has_the_counts(self, made, s3, caplog):
        """An operator sees what a pack did to the bucket."""
        storage, _client = made
        commit_blob(storage, OID, b"ours")
        put(s3, blob_key(OID, p64(5)))
        with caplog.at_level(logging.INFO, "zodb_s3blobs"):
            storage.sweep()
        (line,) = [record.getMessage() for record in caplog.records]
        for text in (s3.bucket, "listed=2", "kept=1", "garbage=1", "deleted=1", "bytes=5"):
            assert text in line

    def test_empty_bucket_is_swept_without_a_question(self, made, base, monkeypatch):
        """Nothing listed, nothing asked."""
        storage, _client = made
        monkeypatch.setattr(base, "history", Failure())
        assert storage.sweep().listed == 0


class TestFallBack:
    def test_server_without_batch_delete_gets_single_deletes(self, s3, tmp_path):
        """501 to DeleteObjects once, then one request for each key, for good."""
        posts = []

        def refuse(head):
            if head.startswith(b"POST ") and b"delete" in head.split(b"\r\n")[0]:
                posts.append(head)
                return (
                    b"HTTP/1.1 501 Not Implemented\r\nContent-Type: application/xml\r\n"
                    b"Connection: close\r\nContent-Length: 52\r\n\r\n"
                    b"<Error><Code>NotImplemented</Code></Error>          "
                )
            return None

        with TcpProxy(s3.endpoint_url, answer=refuse) as proxy:
            storage, client = make_storage(s3, tmp_path)
            client.client = make_client(proxy.location(s3))
            tid = commit_blob(storage, OID, b"ours")
            commit_record(storage, HIGHEST)
            put(s3, *(blob_key(p64(number), p64(5)) for number in range(10, 15)))
            assert storage.sweep().deleted == 5
            assert keys(s3) == [blob_key(OID, tid)]
            put(s3, blob_key(p64(10), p64(5)))
            assert storage.sweep().deleted == 1
            storage.close()
        assert len(posts) == 1


def test_record_of_no_blob_at_the_end_of_a_blobs_life_is_recognised(made, s3):
    """An oid that was a blob's and became another object's keeps its revisions' blobs."""
    storage, _client = made
    first = commit_blob(storage, OID, b"ours")
    commit_record(storage, OID, first, PLAIN_RECORD)
    before = keys(s3)
    try:
        storage.sweep()
    except OtherDatabaseError:
        pass  # strange enough to stop
    assert keys(s3) == before


GRACE = 1000.0


def later(client, seconds):
    """Let the server's clock show a later time, or an earlier one, in the listings from now on."""
    change_listing(client, lambda listed: listed._replace(listed=listed.listed + seconds))


def change_listing(client, change):
    """Change the entries of all listings from now on."""
    list_pages = client.client.list_pages

    def changed(prefix, after):
        for page in list_pages(prefix, after):
            yield list(map(change, page))

    client.list_pages = changed


def stamp_of(moment):
    """Return a stamp of a transaction that began at a moment, in seconds since the epoch."""
    return TimeStamp(*time.gmtime(moment)[:5], moment % 60).raw() + os.urandom(8)


def reference(storage, oid, tid):
    """The key that the record of a revision refers to."""
    instance = storage.new_instance()
    try:
        return blob_key(oid, read_reference(instance.loadSerial(oid, tid)))
    finally:
        instance.release()


def counts(storage, dry_run=False):
    """Sweep and return what became of the keys."""
    report = storage.sweep(dry_run)
    assert report.listed == report.kept + report.in_flight + report.foreign + report.garbage
    return report.kept, report.in_flight, report.foreign, report.garbage, report.deleted


KEPT, IN_FLIGHT, FOREIGN = (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0)


@pytest.fixture(params=[True, False], ids=["history", "no history"])
def keep_history(request):
    return request.param


@pytest.fixture
def relstorage(s3, tmp_path, keep_history):
    """(storage over a RelStorage, its hooked client)."""
    base = open_relstorage(tmp_path, keep_history=keep_history)
    storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
    commit_record(storage, HIGHEST)
    for _ in range(5):  # as the database would have, to have come to HIGHEST
        other = storage.new_instance()
        other.new_oid()
        other.release()
    yield storage, client
    storage.close()


class TestByRecord:
    def test_object_that_a_record_refers_to_is_kept(self, relstorage, s3):
        """However old it is."""
        storage, client = relstorage
        tid = commit_blob(storage, OID, b"ours")
        assert counts(storage) == KEPT
        later(client, GRACE * 100)
        assert counts(storage) == KEPT
        assert keys(s3) == [reference(storage, OID, tid)]

    @pytest.mark.parametrize("seconds", [0, GRACE - 100])
    def test_object_that_nobody_refers_to_is_spared_while_young(self, relstorage, s3, seconds):
        """It may be of a transaction in another process."""
        storage, client = relstorage
        put(s3, blob_key(OID, new_stamp()))
        later(client, seconds)
        assert counts(storage) == IN_FLIGHT

    def test_object_that_nobody_refers_to_is_deleted_after_the_grace(self, relstorage, s3):
        """By the server's clock: ours has shown nothing of that time."""
        storage, client = relstorage
        tid = commit_blob(storage, OID, b"ours")
        put(s3, blob_key(OTHER, new_stamp()))
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 0, 1, 1)
        assert keys(s3) == [reference(storage, OID, tid)]

    def test_age_is_the_objects_and_not_its_stamps(self, relstorage, s3):
        """The stamp shows when somebody's clock said that the upload began."""
        storage, _client = relstorage
        put(s3, blob_key(OID, stamp_of(1e9)))
        assert counts(storage) == IN_FLIGHT

    @pytest.mark.parametrize("seconds", [-10.0, -1e6])
    def test_object_from_the_future_is_young(self, relstorage, s3, seconds):
        """The two times of a listing may come from two machines."""
        storage, client = relstorage
        put(s3, blob_key(OID, new_stamp()))
        later(client, seconds)
        assert counts(storage) == IN_FLIGHT

    def test_listing_without_dates_lets_all_be_young(self, relstorage, s3):
        """Without ages nobody can tell what is in flight."""
        storage, client = relstorage
        first = commit_blob(storage, OID, b"first")
        commit_blob(storage, OID, b"second", first)
        put(s3, blob_key(OTHER, stamp_of(1e9)), blob_key(OTHER, p64(5)))
        before = keys(s3)
        change_listing(client, lambda listed: listed._replace(modified=0.0, listed=0.0))
        assert counts(storage)[3:] == (0, 0)
        assert keys(s3) == before

    def test_without_a_grace_period_nothing_is_spared(self, s3, tmp_path, keep_history):
        """Whoever sets it to 0 says that no other process writes or reads."""
        base = open_relstorage(tmp_path, keep_history=keep_history)
        storage, _client = make_storage(s3, tmp_path, base=base, gc_grace=0)
        commit_record(storage, HIGHEST)
        tid = commit_blob(storage, p64(1), b"ours")
        put(s3, blob_key(p64(1), new_stamp()))
        assert counts(storage) == (1, 0, 0, 1, 1)
        assert keys(s3) == [reference(storage, OID, tid)]
        storage.close()

    def test_own_transaction_is_spared_without_a_grace_period(self, s3, tmp_path, keep_history):
        """What this process has under way it knows."""
        base = open_relstorage(tmp_path, keep_history=keep_history)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=0)
        instance = storage.new_instance()
        txn = TransactionMetaData()
        instance.tpc_begin(txn)
        store_blob(instance, txn, OID, b"bytes")
        instance.tpc_vote(txn)
        later(client, 1e6)
        assert counts(storage) == IN_FLIGHT
        tid = instance.tpc_finish(txn)
        assert counts(storage) == KEPT
        assert keys(s3) == [reference(instance, OID, tid)]
        instance.release()
        storage.close()

    def test_replaced_blob_of_a_base_without_history_is_spared_for_its_readers(self, s3, tmp_path):
        """Who began to read before the change sees the revision before, until the grace ends."""
        base = open_relstorage(tmp_path, keep_history=False)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
        first = commit_blob(storage, OID, b"first")
        key = reference(storage, OID, first)
        second = commit_blob(storage, OID, b"second", first)
        # The object is old, the change is new.
        change_listing(client, lambda listed: listed._replace(modified=listed.modified - 1e6))
        assert counts(storage) == (1, 1, 0, 0, 0)
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 0, 1, 1)
        assert key not in keys(s3)
        assert keys(s3) == [reference(storage, OID, second)]
        storage.close()

    def test_replaced_blob_is_kept_as_long_as_its_revision(self, s3, tmp_path):
        """With history it can be undone to."""
        base = open_relstorage(tmp_path)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
        first = commit_blob(storage, OID, b"first")
        second = commit_blob(storage, OID, b"second", first)
        later(client, GRACE + 1)
        assert counts(storage) == (2, 0, 0, 0, 0)
        alive = {reference(storage, OID, tid) for tid in (first, second)}
        assert keys(s3) == sorted(alive)
        storage.close()

    def test_superseded_object_of_a_renewal_is_deleted_after_the_grace(
        self, s3, tmp_path, keep_history, monkeypatch
    ):
        """The transaction's own register no longer has it, and no record ever had."""
        now = [0.0]
        services = partial(BlobServices, clocks=lambda: (now[0], now[0]))
        monkeypatch.setattr("zodb_s3blobs.storage.BlobServices", services)
        base = open_relstorage(tmp_path, keep_history=keep_history)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, OID, b"bytes")
        now[0] = GRACE * 0.6
        storage.tpc_vote(txn)
        assert counts(storage, dry_run=True) == (0, 2, 0, 0, 0)
        tid = storage.tpc_finish(txn)
        assert counts(storage) == (1, 1, 0, 0, 0)
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 0, 1, 1)
        assert keys(s3) == [reference(storage, OID, tid)]
        assert load(storage, OID, tid) == b"bytes"
        storage.close()

    def test_key_of_an_oid_that_is_no_blob_stops_the_sweep(self, relstorage, s3):
        """Uploaded after the object came to be: another database's."""
        storage, client = relstorage
        commit_blob(storage, OID, b"ours")
        commit_record(storage, OTHER)
        key = blob_key(OTHER, stamp_of(time.time() + 60))
        put(s3, key, blob_key(p64(3), new_stamp()))
        before = keys(s3)
        later(client, GRACE + 1)
        with pytest.raises(OtherDatabaseError) as caught:
            storage.sweep()
        assert (caught.value.key, caught.value.oid) == (key, OTHER)
        assert keys(s3) == before

    def test_older_key_of_an_oid_that_is_no_blob_is_kept(self, relstorage, s3):
        """An orphan whose oid was given out again: spared, and others are not."""
        storage, client = relstorage
        tid = commit_blob(storage, OID, b"ours")
        older = blob_key(OTHER, new_stamp())
        commit_record(storage, OTHER)
        put(s3, older, blob_key(p64(3), new_stamp()))
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 1, 1, 1)
        assert keys(s3) == sorted([older, reference(storage, OID, tid)])

    def test_oid_that_was_never_given_out_is_kept_beside_keys_of_ours(self, relstorage, s3):
        """A copy of the database does not know what the original has added since."""
        storage, client = relstorage
        commit_blob(storage, OID, b"ours")
        put(s3, blob_key(p64(1 << 40), new_stamp()))
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 1, 0, 0)


class TestRelStorage:
    @pytest.mark.parametrize("number", [1, 20, 200])
    def test_new_database_in_the_place_of_a_lost_one_deletes_nothing(
        self, s3, tmp_path, keep_history, number
    ):
        """A wrong dsn, a database made anew: a bucket full of blobs is not its garbage."""

        def opened(name):
            base = open_relstorage(tmp_path, name, keep_history=keep_history)
            return make_storage(s3, tmp_path, base=base, gc_grace=GRACE)

        storage, _client = opened("lost")
        commit_blob(storage, p64(number), b"bytes")
        storage.close()
        before = keys(s3)
        storage, client = opened("new")
        later(client, GRACE + 1)
        for _ in range(3):
            with pytest.raises(OtherDatabaseError, match="Nothing was deleted"):
                storage.sweep()
            assert keys(s3) == before
        storage.close()
        shutil.rmtree(tmp_path / "lost")

    def test_keys_of_tids_are_spared_while_young(self, relstorage, s3):
        """Another process may be restoring transactions whose tids are below the last one."""
        storage, client = relstorage
        commit_blob(storage, OID, b"ours")
        put(s3, blob_key(OTHER, p64(5)))
        assert counts(storage) == (1, 1, 0, 0, 0)
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 0, 1, 1)

    def test_keys_above_the_last_transaction_are_spared_for_ever(self, relstorage, s3):
        """They are of a transaction that has not ended, or was lost with it."""
        storage, client = relstorage
        last = storage.lastTransaction()
        put(s3, blob_key(OTHER, p64(u64(last) + (1 << 40))))
        later(client, GRACE + 1)
        assert counts(storage) == IN_FLIGHT

    def test_restored_blobs_of_both_forms_are_kept(self, relstorage, s3):
        """A database that moved here has records with references, and others without."""
        storage, client = relstorage
        stamp = new_stamp()
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"1", with_reference(BLOB_RECORD, stamp))
        restore_blob(storage, txn, OTHER, p64(77), b"2")
        storage.tpc_vote(txn)
        assert counts(storage, dry_run=True) == (0, 2, 0, 0, 0)
        storage.tpc_finish(txn)
        later(client, GRACE + 1)
        assert counts(storage) == (2, 0, 0, 0, 0)
        assert keys(s3) == sorted([blob_key(OID, stamp), blob_key(OTHER, p64(77))])

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_only_a_sweep_that_deletes_waits_for_undo(self, s3, tmp_path, monkeypatch, dry_run):
        """A dry run takes no lock, and neither does one that has found nothing; none writes."""
        from relstorage.adapters.sqlite.adapter import Sqlite3Adapter

        lock, locked = Sqlite3Adapter.lock_database_and_choose_next_tid, []
        monkeypatch.setattr(
            Sqlite3Adapter,
            "lock_database_and_choose_next_tid",
            lambda *args: locked.append(1) or lock(*args),
        )
        storage, client = make_storage(s3, tmp_path, base=open_relstorage(tmp_path), gc_grace=GRACE)
        commit_record(storage, HIGHEST)
        commit_blob(storage, OID, b"ours")
        later(client, GRACE + 1)
        del locked[:]
        assert counts(storage, dry_run) == KEPT
        assert locked == []
        put(s3, blob_key(OID, new_stamp()))
        assert counts(storage, dry_run)[3:] == (1, not dry_run)
        assert len(locked) == (0 if dry_run else 1)
        assert len(list(storage.iterator())) == 2
        storage.close()

    def test_blob_that_an_undo_brings_back_while_the_sweep_asks_is_kept(self, s3, tmp_path):
        """The undo took its record before a pack removed the revision, and finishes after it."""
        base = open_relstorage(tmp_path)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
        undo = storage.new_instance()
        commit_record(undo, HIGHEST)
        stamp = new_stamp()
        put(s3, blob_key(OID, stamp))
        later(client, GRACE + 1)
        new_instance, looks = base.new_instance, []

        def finish_and_make():
            # It is the one that waits: what it waited for is there after it.
            looks.append(1)
            commit_record(undo, OID, record=with_reference(BLOB_RECORD, stamp))
            return new_instance()

        base.new_instance = finish_and_make
        assert counts(storage) == KEPT
        assert len(looks) == 1
        undo.release()
        storage.close()

    def test_packed_revisions_lose_their_objects_and_others_keep_them(
        self, s3, tmp_path, keep_history
    ):
        """What can be reached is kept in both histories, what cannot be is deleted."""
        base = open_relstorage(tmp_path, keep_history=keep_history)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
        db = DB(storage)
        rewrite(db, b"0", b"1", b"2")
        with db.transaction() as conn:
            conn.root()["gone"] = Blob(b"gone")
        with db.transaction() as conn:
            del conn.root()["gone"]
        assert len(keys(s3)) == 4
        later(client, GRACE + 1)
        db.pack(time.time() + 1)
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            assert read(blob) == b"2"
            oid, tid = blob._p_oid, blob._p_serial
        assert keys(s3) == [reference(db.storage, oid, tid)]
        db.close()

    @pytest.mark.parametrize("argument", ["prepack_only", "check_refs"])
    def test_pack_that_removes_nothing_is_not_swept_after(self, relstorage, s3, argument):
        """RelStorage's ways to look before it packs."""
        storage, client = relstorage
        later(client, GRACE + 1)
        client.calls.clear()
        storage.pack(time.time(), lambda record, oids=None: [], **{argument: True})
        assert client.calls == []

    def test_sweeps_of_two_instances_take_turns(self, relstorage, s3):
        """All instances of a storage have one register of what is in flight."""
        storage, client = relstorage
        instance = storage.new_instance()
        put(s3, blob_key(OTHER, new_stamp()))
        later(client, GRACE + 1)
        gate = client.before["delete_objects"] = Gate()
        first = start(storage.sweep)
        gate.wait()
        second = start(instance.sweep)
        second.join(0.1)
        assert second.is_alive()
        gate.open()
        assert (first.result().deleted, second.result().deleted) == (1, 0)
        instance.release()


class TestMixed:
    @pytest.mark.parametrize("kind", ["FileStorage", "RelStorage"])
    def test_both_forms_are_judged_each_by_its_rules(self, s3, tmp_path, kind):
        """Where others commit the age of every object counts, and else that of stamps alone."""
        base = open_relstorage(tmp_path) if kind == "RelStorage" else None
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=GRACE)
        stamp = new_stamp()
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"1", with_reference(BLOB_RECORD, stamp))
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        tid = commit_blob(storage, OID, b"2", p64(77))
        commit_record(storage, HIGHEST)
        # The tid is that of a revision, so it is kept, though the revision refers to a stamp.
        alive = sorted([*keys(s3), blob_key(OID, p64(77))])
        orphans = [blob_key(OID, new_stamp()), blob_key(OID, p64(5))]
        put(s3, blob_key(OID, p64(77)), *orphans)
        if kind == "RelStorage":
            assert counts(storage) == (3, 2, 0, 0, 0)
            assert keys(s3) == sorted([*alive, *orphans])
            later(client, GRACE + 1)
            assert counts(storage) == (3, 0, 0, 2, 2)
        else:
            assert counts(storage) == (3, 1, 0, 1, 1)
            assert keys(s3) == sorted([*alive, orphans[0]])
            later(client, GRACE + 1)
            assert counts(storage) == (3, 0, 0, 1, 1)
        assert keys(s3) == alive
        for serial, data in ((p64(77), b"1"), (tid, b"2")):
            assert load(storage, OID, serial) == data
        storage.close()

    def test_deleted_object_of_a_tid_leaves_the_cache(self, s3, tmp_path):
        """And that of a stamp does not take a revision's file along."""
        storage, client = make_storage(s3, tmp_path, gc_grace=GRACE)
        tid = commit_blob(storage, OID, b"ours")
        put(s3, blob_key(OID, tid + b"r" * 8))
        later(client, GRACE + 1)
        assert counts(storage) == (1, 0, 0, 1, 1)
        client.calls.clear()
        assert load(storage, OID, tid) == b"ours"
        assert client.calls == []
        storage.close()


class TestLate:
    """To decide takes time, in which another process may store again what was listed."""

    @pytest.fixture
    def clock(self, monkeypatch):
        """A list with the time in seconds that sweeps see."""
        clock = [0.0]
        monkeypatch.setattr(
            "zodb_s3blobs.storage.Sweeper", partial(Sweeper, clock=lambda: clock[0])
        )
        monkeypatch.setattr(garbage, "PAGES_AT_ONCE", 1)
        return clock

    @pytest.fixture
    def swept(self, s3, tmp_path, clock):
        """(storage whose listings have pages of two keys, list of what they were asked)."""
        storage, client = make_storage(s3, tmp_path, gc_grace=GRACE)
        commit_record(storage, HIGHEST)
        commit_blob(storage, OID, b"ours")
        put(s3, *(blob_key(p64(number), p64(5)) for number in range(2, 6)))
        list_pages, asked = client.client.list_pages, []

        def in_small_pages(prefix, after):
            asked.append(after)
            (page,) = list_pages(prefix, after) or [[]]
            for first in range(0, len(page), 2):
                yield page[first : first + 2]

        client.list_pages = lambda prefix, after: (
            in_small_pages(prefix, after) if any(list_pages(prefix, after)) else iter(())
        )
        yield storage, asked
        storage.close()

    @pytest.fixture
    def base_history(self, monkeypatch):
        """Return a function that lets something happen at each call of a FileStorage's history."""
        history, calls = FileStorage.history, []

        def base_history(happen):
            def wrapped(*args, **kw):
                calls.append(1)
                happen(len(calls))
                return history(*args, **kw)

            monkeypatch.setattr(FileStorage, "history", wrapped)

        return base_history

    @pytest.mark.parametrize("dry_run", [True, False])
    def test_late_batch_is_listed_again_and_counted_once(
        self, s3, swept, clock, base_history, dry_run
    ):
        """From behind the key before it; what was decided too late is not acted upon."""
        storage, asked = swept
        base_history(lambda call: clock.__setitem__(0, clock[0] + (300 if call == 3 else 0)))
        before = keys(s3)
        report = storage.sweep(dry_run)
        assert asked == ["", before[1], before[1], before[3]]
        assert (report.listed, report.kept, report.garbage) == (5, 1, 4)
        assert report.deleted == (0 if dry_run else 4)
        assert len(keys(s3)) == (5 if dry_run else 1)

    def test_three_late_listings_stop_the_sweep(self, s3, swept, clock, base_history):
        """The operator is told what takes too long; what was done before stays done."""
        storage, asked = swept
        base_history(lambda call: clock.__setitem__(0, clock[0] + (300 if call >= 3 else 0)))
        before = keys(s3)
        with pytest.raises(TransientS3Error, match=r"quarter of gc-grace, which is 1000 s"):
            storage.sweep()
        assert asked == ["", before[1], before[1], before[1]]
        assert keys(s3) == sorted({*before} - {before[1]})

    def test_decision_within_a_quarter_of_the_grace_is_acted_upon(
        self, s3, swept, clock, base_history
    ):
        """Each batch has its own time."""
        storage, asked = swept
        base_history(lambda call: clock.__setitem__(0, clock[0] + 120))
        assert storage.sweep().deleted == 4
        assert len(asked) == 3
