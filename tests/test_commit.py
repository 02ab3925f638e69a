"""TransactionBlobs: staged, uploaded, voted, finished or aborted, and what fails on the way."""

from base64 import encodebytes
from functools import partial
import os
import tempfile
import time

import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageTransactionError
from ZODB.utils import p64

from zodb_s3blobs import commit
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.loading import BlobLoader
from zodb_s3blobs.openkeys import OpenKeys
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference
from zodb_s3blobs.uploads import UploadPool

from .services.location import keys
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import Gate
from .storages import HookedClient
from .storages import leftovers
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_relstorage
from .storages import read
from .storages import restore_blob
from .storages import start
from .storages import store_blob
from .storages import write_file


OID = p64(1)


@pytest.fixture
def base(tmp_path):
    return FileStorage(f"{tmp_path}/Data.fs")


@pytest.fixture
def made(s3, tmp_path, base):
    """(storage, its hooked client)."""
    storage, client = make_storage(s3, tmp_path, base=base)
    yield storage, client
    storage.close()


def begun(storage):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    return txn


class TestFailingUpload:
    def test_vote_raises_with_oid_and_tid_and_abort_leaves_nothing(self, made, s3):
        """What the background upload met is raised by the vote, before the base's vote."""
        storage, client = made
        client.before["upload_file"] = Failure(times=1)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"one")
        store_blob(storage, txn, p64(2), b"two")
        tid = txn.data(storage).tid
        with pytest.raises(TransientS3Error) as caught:
            storage.tpc_vote(txn)
        assert caught.value.oid in (OID, p64(2))
        assert caught.value.tid == tid
        assert isinstance(caught.value, TransientError)
        storage.tpc_abort(txn)
        assert keys(s3) == []
        assert leftovers(storage) == []
        # The commit lock is free
        assert load(storage, OID, commit_blob(storage, OID, b"again")) == b"again"

    def test_errors_of_local_files_reach_the_vote_as_they_are(self, made, s3):
        """A staged file that cannot be read fails the vote, not a later read."""
        storage, client = made
        client.before["upload_file"] = Failure(OSError(5, "disk broken, says the test"))
        txn = begun(storage)
        store_blob(storage, txn, OID, b"one")
        with pytest.raises(OSError, match="disk broken"):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])

    def test_retry_through_a_connection_commits_the_same_blob(self, made):
        """A transient failure is retried as Zope retries, and the bytes are complete."""
        storage, client = made
        db = DB(storage)
        client.before["upload_file"] = Failure(times=1)
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        attempts = []
        for attempt in manager.attempts(3):
            with attempt:
                attempts.append(attempt)
                conn.root()["blob"] = Blob(b"at last")
        assert len(attempts) == 2
        assert read(conn.root()["blob"]) == b"at last"
        conn.close()
        db.close()

    def test_first_failure_cancels_uploads_that_wait(self, s3, tmp_path, base):
        """The vote does not send the rest of a transaction that cannot commit."""
        storage, client = make_storage(s3, tmp_path, base=base, pool=UploadPool(1))
        client.before["upload_file"] = Failure(times=1)
        txn = begun(storage)
        for number in range(1, 20):
            store_blob(storage, txn, p64(number), b"bytes")
        with pytest.raises(TransientS3Error):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])
        assert client.count("upload_file") < 19
        storage.close()


class TestFailingBase:
    def test_base_that_refuses_to_vote_leaves_an_abortable_transaction(
        self, made, base, s3, monkeypatch
    ):
        """Uploaded blobs of a transaction whose base says no are removed."""
        storage, _client = made
        with monkeypatch.context() as patch:
            patch.setattr(base, "tpc_vote", Failure(ConflictError("says the test")))
            txn = begun(storage)
            store_blob(storage, txn, OID, b"one")
            with pytest.raises(ConflictError):
                storage.tpc_vote(txn)
            assert keys(s3) == [blob_key(OID, txn.data(storage).tid)]
            storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])
        commit_blob(storage, OID, b"again")

    def test_vote_that_failed_leaves_the_cache_as_it_was(self, s3, tmp_path, base, monkeypatch):
        """Room reserved for an aborted transaction is given back: it is not in use."""
        storage, _client = make_storage(s3, tmp_path, base=base)
        commit_blob(storage, OID, b"kept")
        with monkeypatch.context() as patch:
            patch.setattr(base, "tpc_vote", Failure(ConflictError("says the test")))
            txn = begun(storage)
            store_blob(storage, txn, p64(2), b"x" * 1000)
            with pytest.raises(ConflictError):
                storage.tpc_vote(txn)
            storage.tpc_abort(txn)
        storage.close()
        cache = S3BlobCache(f"{tmp_path}/cache")
        assert cache.current_size() == 4
        assert cache.check() == []
        cache.close()

    @pytest.mark.parametrize("committed", [False, True])
    def test_nothing_is_deleted_after_the_bases_finish_raised(
        self, made, base, s3, monkeypatch, committed
    ):
        """The outcome is unknown: the object stays, and a sweep decides when it is known."""
        storage, _client = made
        finish = base.tpc_finish

        def fail(*args):
            if committed:
                finish(*args)
            raise OSError("says the test")

        txn = begun(storage)
        store_blob(storage, txn, OID, b"one")
        tid = txn.data(storage).tid
        storage.tpc_vote(txn)
        with monkeypatch.context() as patch:
            patch.setattr(base, "tpc_finish", fail)
            with pytest.raises(OSError, match="says the test"):
                storage.tpc_finish(txn)
        storage.tpc_abort(txn)
        assert keys(s3) == [blob_key(OID, tid)]
        assert leftovers(storage) == []
        commit_record(storage, p64(9))
        report = storage.sweep()
        assert (report.kept, report.deleted) == (committed, not committed)
        if committed:
            assert load(storage, OID, tid) == b"one"

    def test_base_that_cannot_begin_leaves_nothing_begun(self, made, base, monkeypatch):
        """tpc_begin that fails on our side gives the commit lock back."""
        storage, _client = made

        class Bare:
            """A transaction that cannot carry data."""

            user = description = b""
            extension_bytes = b""

        with pytest.raises(AttributeError):
            storage.tpc_begin(Bare())
        commit_blob(storage, OID, b"next")


class TestSecondStore:
    def test_second_store_of_an_oid_wins(self, made, s3):
        """One object remains, with the bytes stored last, whatever the first upload does."""
        storage, _client = made
        txn = begun(storage)
        store_blob(storage, txn, OID, b"first" * 1000)
        store_blob(storage, txn, OID, b"second")
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        assert load(storage, OID, tid) == b"second"
        assert keys(s3) == [blob_key(OID, tid)]
        assert leftovers(storage) == []

    def test_first_upload_that_ends_late_does_not_win(self, made, s3, tmp_path):
        """The second store awaits the first one's upload, in the bucket the second remains."""
        storage, client = made
        gate = client.before["upload_file"] = Gate()
        txn = begun(storage)
        store_blob(storage, txn, OID, b"first")
        gate.wait()
        second = start(store_blob, storage, txn, OID, b"second")
        del client.before["upload_file"]
        gate.open()
        second.result()
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        client.client.download_file(blob_key(OID, tid), f"{tmp_path}/downloaded")
        with open(f"{tmp_path}/downloaded", "rb") as file:
            assert file.read() == b"second"

    def test_failure_of_the_first_upload_does_not_fail_the_second(self, made):
        """A store that was replaced cannot fail the transaction any more."""
        storage, client = made
        client.before["upload_file"] = Failure(times=1)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"first")
        store_blob(storage, txn, OID, b"second")
        storage.tpc_vote(txn)
        assert load(storage, OID, storage.tpc_finish(txn)) == b"second"


class TestDoomed:
    def test_undo_that_could_not_copy_a_blob_cannot_be_finished(self, s3, tmp_path):
        """The base has undone the record: without its blob it must not commit, voted or not."""
        base = FileStorage(f"{tmp_path}/Data.fs")
        storage, _client = make_storage(s3, tmp_path, base=base)
        first = commit_blob(storage, p64(1), b"first")
        second = commit_blob(storage, p64(1), b"second", first)
        load_before, base.loadBefore = base.loadBefore, Failure(OSError("says the test"))
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        with pytest.raises(OSError):
            storage.undo(encodebytes(second).rstrip(), transaction)
        for step in (storage.tpc_finish, storage.tpc_vote):
            with pytest.raises(StorageTransactionError):
                step(transaction)
        storage.tpc_abort(transaction)
        base.loadBefore = load_before
        assert storage.lastTransaction() == second
        storage.close()


class TestCache:
    def test_commit_that_fails_evicts_nothing(self, s3, tmp_path):
        """While S3 is down, what is cached cannot be fetched again."""
        storage, client = make_storage(s3, tmp_path, cache_size=1000)
        tid = commit_blob(storage, p64(1), bytes(900))
        client.before["upload_file"] = Failure()
        for _ in range(3):
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            store_blob(storage, transaction, p64(2), bytes(800))
            with pytest.raises(TransientS3Error):
                storage.tpc_vote(transaction)
            storage.tpc_abort(transaction)
        client.before["download_file"] = Failure()
        assert load(storage, p64(1), tid) == bytes(900)
        storage.close()


class TestConflict:
    def test_conflict_leaves_no_staged_file_and_uploads_nothing(self, made, s3):
        """A ConflictError in storeBlob costs no upload."""
        storage, client = made
        first = commit_blob(storage, OID, b"first")
        second = commit_blob(storage, OID, b"second", first)
        before, uploads = keys(s3), client.count("upload_file")
        txn = begun(storage)
        with pytest.raises(ConflictError):
            store_blob(storage, txn, OID, b"late", first)
        assert leftovers(storage) == []
        storage.tpc_abort(txn)
        assert keys(s3) == before
        assert client.count("upload_file") == uploads
        assert load(storage, OID, second) == b"second"

    def test_abort_of_a_conflict_makes_no_request(self, made):
        """Nothing was sent, so that nothing needs to be deleted: conflicts are everyday."""
        storage, client = made
        first = commit_blob(storage, OID, b"first")
        commit_blob(storage, OID, b"second", first)
        client.calls.clear()
        txn = begun(storage)
        with pytest.raises(ConflictError):
            store_blob(storage, txn, OID, b"late", first)
        storage.tpc_abort(txn)
        assert client.calls == []


class TestAbort:
    def test_abort_while_an_upload_hangs_is_bounded(self, made, monkeypatch, s3):
        """abort() gives up waiting; the rest is done when the upload comes back."""
        monkeypatch.setattr(commit, "ABORT_TIMEOUT", 0.2)
        storage, client = made
        gate = client.before["upload_file"] = Gate()
        deleted = client.after["delete_objects"] = Gate()
        deleted.open()
        txn = begun(storage)
        store_blob(storage, txn, OID, b"hanging")
        gate.wait()
        begin = time.monotonic()
        storage.tpc_abort(txn)
        assert time.monotonic() - begin < 5
        del client.before["upload_file"]
        # Others go on while the upload hangs.
        tid = commit_blob(storage, p64(2), b"next")
        gate.open()
        deleted.wait()
        assert keys(s3) == [blob_key(p64(2), tid)]

    def test_sweep_spares_an_upload_that_outlives_its_abort(self, made, monkeypatch):
        """The key stays in flight until the late clean-up is through with it."""
        monkeypatch.setattr(commit, "ABORT_TIMEOUT", 0.2)
        storage, client = made
        gate = client.after["upload_file"] = Gate()
        txn = begun(storage)
        store_blob(storage, txn, OID, b"hanging")
        gate.wait()
        storage.tpc_abort(txn)
        client.after.clear()
        commit_blob(storage, p64(2), b"next")
        report = storage.sweep()
        assert (report.in_flight, report.kept, report.deleted) == (1, 1, 0)
        gate.open()

    def test_abort_whose_deletion_fails_frees_files_and_lock(self, made, s3):
        """Best effort: what stays in the bucket is garbage for a sweep."""
        storage, client = made
        client.before["delete_objects"] = Failure()
        txn = begun(storage)
        store_blob(storage, txn, OID, b"left behind")
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert leftovers(storage) == []
        assert len(keys(s3)) == 1
        client.before.clear()
        tid = commit_blob(storage, OID, b"next")
        assert storage.sweep().deleted == 1
        assert keys(s3) == [blob_key(OID, tid)]

    def test_late_clean_up_spares_a_later_transaction_of_the_same_tid(
        self, s3, tmp_path, monkeypatch
    ):
        """Where the clock went back, a MappingStorage gives an aborted tid out again."""
        monkeypatch.setattr(commit, "ABORT_TIMEOUT", 0.2)
        storage, client = make_storage(s3, tmp_path, base=MappingStorage())
        commit_record(storage, p64(9))
        monkeypatch.setattr(time, "time", lambda: 1e9)
        gate = client.before["upload_file"] = Gate()
        aborted = begun(storage)
        store_blob(storage, aborted, OID, b"aborted")
        gate.wait()
        storage.tpc_abort(aborted)
        del client.before["upload_file"]
        done = client.after["delete_objects"] = Gate()
        done.open()
        later = start(commit_blob, storage, OID, b"committed")
        later.join(0.2)
        gate.open()
        done.wait()
        tid = later.result()
        client.client.download_file(blob_key(OID, tid), f"{tmp_path}/downloaded")
        with open(f"{tmp_path}/downloaded", "rb") as file:
            assert file.read() == b"committed"
        storage.close()

    def test_aborting_twice_changes_nothing(self, made, s3):
        """The second abort finds nothing to do."""
        storage, client = made
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        storage.tpc_abort(txn)
        client.calls.clear()
        storage.tpc_abort(txn)
        assert client.calls == []


class TestStaging:
    @pytest.mark.parametrize("stored_before", [False, True])
    def test_file_that_is_not_there_fails_the_store_alone(self, made, tmp_path, s3, stored_before):
        """Whoever catches the error can commit the rest, with the bytes stored before, if any."""
        storage, _client = made
        txn = begun(storage)
        store_blob(storage, txn, p64(2), b"other")
        if stored_before:
            store_blob(storage, txn, OID, b"before")
        with pytest.raises(OSError):
            storage.storeBlob(OID, p64(0), BLOB_RECORD, f"{tmp_path}/none", "", txn)
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        expected = [blob_key(p64(2), tid)]
        if stored_before:
            expected.insert(0, blob_key(OID, tid))
            assert load(storage, OID, tid) == b"before"
        assert keys(s3) == expected
        assert leftovers(storage) == []

    def test_conflict_of_a_second_store_keeps_the_first(self, made, s3):
        """The base refuses the second record, so that the first one's bytes stay with it."""
        storage, _client = made
        first = commit_blob(storage, OID, b"first")
        second = commit_blob(storage, OID, b"second", first)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"third", second)
        with pytest.raises(ConflictError):
            store_blob(storage, txn, OID, b"late", first)
        storage.tpc_vote(txn)
        third = storage.tpc_finish(txn)
        assert load(storage, OID, third) == b"third"
        assert blob_key(OID, third) in keys(s3)
        assert leftovers(storage) == []

    def test_file_of_another_file_system_is_copied(self, made):
        """Where a rename is refused the bytes are copied, and the file is taken all the same."""
        storage, _client = made
        path = write_file(b"from afar", "/dev/shm" if os.path.isdir("/dev/shm") else None)
        txn = begun(storage)
        storage.storeBlob(OID, p64(0), BLOB_RECORD, path, "", txn)
        assert not os.path.exists(path)
        storage.tpc_vote(txn)
        assert load(storage, OID, storage.tpc_finish(txn)) == b"from afar"

    @pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system")
    def test_staging_on_another_file_system_than_the_cache_works(self, s3, tmp_path, base):
        """temp_dir may lie anywhere, at the cost of a copy."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
            storage, _client = make_storage(s3, tmp_path, base=base, temp_dir=f"{directory}/new")
            assert storage.temporaryDirectory() == f"{directory}/new"
            tid = commit_blob(storage, OID, b"from afar")
            path = storage.loadBlob(OID, tid)
            assert path.startswith(f"{tmp_path}/cache")
            assert os.stat(path).st_mode & 0o222 == 0
            assert load(storage, OID, tid) == b"from afar"
            assert leftovers(storage) == list((tmp_path / "cache").rglob("*.tmp")) == []
            storage.close()

    def test_cache_that_refuses_does_not_fail_the_commit(self, s3, tmp_path, base, monkeypatch):
        """The bytes are in the bucket: a broken cache costs a download, not a transaction."""
        storage, _client = make_storage(s3, tmp_path, base=base)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"committed")
        storage.tpc_vote(txn)
        for path in (tmp_path / "cache").rglob("*.tmp"):
            path.unlink()
        tid = storage.tpc_finish(txn)
        assert load(storage, OID, tid) == b"committed"
        storage.close()

    def test_disk_that_refuses_everything_does_not_fail_the_finish(self, s3, tmp_path, base):
        """After the base's finish the transaction is committed, whatever the disk says."""
        storage, _client = make_storage(s3, tmp_path, base=base)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"committed")
        storage.tpc_vote(txn)
        (directory,) = {path.parent for path in (tmp_path / "cache").rglob("*.tmp")}
        os.chmod(directory, 0o500)
        os.chmod(f"{tmp_path}/cache", 0o500)
        try:
            tid = storage.tpc_finish(txn)
        finally:
            os.chmod(f"{tmp_path}/cache", 0o700)
            os.chmod(directory, 0o700)
        assert load(storage, OID, tid) == b"committed"
        second = commit_blob(storage, OID, b"second", tid)
        assert storage.sweep().kept == 2
        assert load(storage, OID, second) == b"second"
        storage.close()

    def test_disk_that_refuses_everything_does_not_keep_an_aborted_key_open(
        self, s3, tmp_path, base
    ):
        """What an abort could not remove from disk must not count as in flight for ever."""
        storage, client = make_storage(s3, tmp_path, base=base)
        client.before["delete_objects"] = Failure(times=1)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"aborted")
        storage.tpc_vote(txn)
        os.chmod(storage.temporaryDirectory(), 0o500)
        try:
            storage.tpc_abort(txn)
        finally:
            os.chmod(storage.temporaryDirectory(), 0o700)
        commit_record(storage, p64(9))
        assert storage.sweep().deleted == 1
        storage.close()

    def test_blob_larger_than_the_cache_is_committed_and_read(self, s3, tmp_path, base):
        """cache-size bounds the cache, not the blobs."""
        storage, _client = make_storage(s3, tmp_path, base=base, cache_size=100)
        small = commit_blob(storage, OID, b"small")
        large = commit_blob(storage, p64(2), b"x" * 1000)
        assert load(storage, p64(2), large) == b"x" * 1000
        assert load(storage, OID, small) == b"small"
        storage.close()


def test_no_request_is_made_between_vote_and_end_of_finish(made):
    """tpc_finish needs no S3: it cannot fail because of blobs."""
    storage, client = made
    txn = begun(storage)
    store_blob(storage, txn, OID, b"bytes")
    storage.tpc_vote(txn)
    client.calls.clear()
    storage.tpc_finish(txn)
    assert client.calls == []


def test_permanent_error_is_no_transient_error(made):
    """What an operator must mend is not retried."""
    storage, client = made
    client.before["upload_file"] = Failure(PermanentS3Error("denied, says the test"))
    txn = begun(storage)
    store_blob(storage, txn, OID, b"bytes")
    with pytest.raises(PermanentS3Error) as caught:
        storage.tpc_vote(txn)
    assert not isinstance(caught.value, TransientError)
    storage.tpc_abort(txn)


class Clocks:
    """Two clocks that show what was set, in seconds."""

    def __init__(self):
        self.steady, self.set = 1000.0, 1e9

    def __call__(self):
        return self.steady, self.set

    def advance(self, seconds):
        self.steady += seconds
        self.set += seconds


GRACE = 1000.0
RENEWED, REFUSED = GRACE * 0.51, GRACE * 0.75


@pytest.fixture
def clocks(monkeypatch):
    """The clocks of all storages that are made from now on."""
    clocks = Clocks()
    services = partial(commit.BlobServices, clocks=clocks)
    monkeypatch.setattr("zodb_s3blobs.storage.BlobServices", services)
    return clocks


@pytest.fixture(params=[True, False], ids=["history", "no history"])
def late_base(request, tmp_path):
    return open_relstorage(tmp_path, keep_history=request.param)


@pytest.fixture
def late(s3, tmp_path, clocks, late_base):
    """(storage that learns its tids when it finishes, its hooked client)."""
    storage, client = make_storage(s3, tmp_path, base=late_base, gc_grace=GRACE)
    yield storage, client
    storage.close()


def watch_uploads(client):
    """Return a list that gets the key of each upload."""
    sent = []
    client.before["upload_file"] = lambda path, key, *args: sent.append(key)
    return sent


def reference(storage, oid, tid):
    """The key that the record of a revision refers to."""
    return blob_key(oid, read_reference(storage.loadSerial(oid, tid)))


def assert_cache_is_sound(tmp_path, size):
    """The cache has files of this size, and no room is reserved for others."""
    cache = S3BlobCache(f"{tmp_path}/cache")
    assert (cache.check(), cache.current_size()) == ([], size)
    cache.close()


class TestByRecord:
    def test_uploads_end_before_the_base_votes(self, late, s3, monkeypatch):
        """Row locks and the commit lock are taken when nothing slow is left to do."""
        storage, client = late
        gate = client.before["upload_file"] = Gate()
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        gate.wait()
        vote = start(storage.tpc_vote, txn)
        vote.join(0.1)
        other = storage.new_instance()
        commit_record(other, p64(9))  # nobody holds a lock
        other.release()
        gate.open()
        vote.result()
        tid = storage.tpc_finish(txn)
        assert keys(s3) == [reference(storage, OID, tid)]

    def test_finished_blob_is_in_the_cache_under_its_tid(self, late, tmp_path):
        """What was reserved before the tid was known is used, and no more."""
        storage, client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"first")
        store_blob(storage, txn, p64(2), b"other")
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        client.calls.clear()
        assert load(storage, OID, tid) == b"first"
        assert load(storage, p64(2), tid) == b"other"
        assert client.calls == []
        assert leftovers(storage) == []
        assert_cache_is_sound(tmp_path, 10)

    def test_cache_without_room_loses_the_file_and_nothing_else(self, s3, tmp_path, clocks):
        """Others took the room between vote and finish."""
        base = open_relstorage(tmp_path)
        storage, _client = make_storage(s3, tmp_path, base=base, cache_size=1000)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"1" * 600)
        storage.tpc_vote(txn)
        cache = S3BlobCache(f"{tmp_path}/cache", 1000)
        cache.put(p64(2), p64(5), write_file(b"2" * 600, cache.temp_dir))
        cache.close()
        tid = storage.tpc_finish(txn)
        assert leftovers(storage) == []
        assert_cache_is_sound(tmp_path, 600)
        assert load(storage, OID, tid) == b"1" * 600
        storage.close()

    @pytest.mark.parametrize("step", ["store", "vote", "base's vote"])
    def test_aborted_blob_leaves_nothing_anywhere(self, late, s3, tmp_path, step):
        """The key is the transaction's own: nobody else refers to it."""
        storage, client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        if step == "vote":
            client.before["upload_file"] = Failure(times=1)
            store_blob(storage, txn, p64(2), b"bytes")
            with pytest.raises(TransientS3Error) as caught:
                storage.tpc_vote(txn)
            assert (caught.value.oid, caught.value.tid) == (p64(2), None)
        elif step == "base's vote":
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])
        assert_cache_is_sound(tmp_path, 0)
        assert load(storage, OID, commit_blob(storage, OID, b"again")) == b"again"

    def test_conflict_leaves_the_bucket_as_it_was(self, late, s3, tmp_path):
        """A RelStorage sees it in its vote, when the bytes are uploaded."""
        storage, _client = late
        first = commit_blob(storage, OID, b"first")
        commit_blob(storage, OID, b"second", first)
        before = keys(s3)
        txn = begun(storage)
        with pytest.raises(ConflictError):
            store_blob(storage, txn, OID, b"late", first)
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == (before, [])
        assert_cache_is_sound(tmp_path, 11)

    def test_second_store_of_an_oid_wins(self, late, s3, tmp_path):
        """Bytes and reference are those stored last; the first object is the sweep's."""
        storage, client = late
        txn = begun(storage)
        for data in (b"first" * 100, b"second"):
            uploaded = client.after["upload_file"] = Gate()
            uploaded.open()
            store_blob(storage, txn, OID, data)
            uploaded.wait()
        assert leftovers(storage) != []
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        assert load(storage, OID, tid) == b"second"
        key = reference(storage, OID, tid)
        assert (len(keys(s3)), key in keys(s3)) == (2, True)
        client.client.download_file(key, f"{tmp_path}/downloaded")
        assert (tmp_path / "downloaded").read_bytes() == b"second"
        assert leftovers(storage) == []
        assert_cache_is_sound(tmp_path, 6)

    def test_abort_after_a_second_store_deletes_both_objects(self, late, s3):
        """Neither is left to the sweep."""
        storage, client = late
        txn = begun(storage)
        for data in (b"first", b"second"):
            uploaded = client.after["upload_file"] = Gate()
            uploaded.open()
            store_blob(storage, txn, OID, data)
            uploaded.wait()
        storage.tpc_vote(txn)
        assert len(keys(s3)) == 2
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])

    @pytest.mark.parametrize("committed", [False, True])
    def test_nothing_is_deleted_after_the_bases_finish_raised(
        self, late, late_base, s3, tmp_path, monkeypatch, committed
    ):
        """The outcome is unknown: the object stays, its room in the cache does not."""
        storage, _client = late
        finish = late_base.tpc_finish

        def fail(*args):
            if committed:
                finish(*args)
            raise OSError("says the test")

        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        storage.tpc_vote(txn)
        with monkeypatch.context() as patch:
            patch.setattr(late_base, "tpc_finish", fail)
            with pytest.raises(OSError, match="says the test"):
                storage.tpc_finish(txn)
        storage.tpc_abort(txn)
        assert len(keys(s3)) == 1
        assert leftovers(storage) == []
        assert_cache_is_sound(tmp_path, 0)
        if committed:
            record, tid = storage.load(OID)
            assert parse_key(keys(s3)[0]) == (OID, read_reference(record))
            assert load(storage, OID, tid) == b"bytes"

    def test_restored_object_outlives_the_abort_of_its_transaction(self, late, s3):
        """Under whatever key: another database may refer to it."""
        storage, _client = late
        stamp = b"s" * 16
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"1", with_reference(BLOB_RECORD, stamp))
        restore_blob(storage, txn, p64(2), p64(77), b"2")
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert keys(s3) == sorted([blob_key(OID, stamp), blob_key(p64(2), p64(77))])
        assert leftovers(storage) == []


class TestRenewal:
    """A sweep of another process may delete what no record refers to after gc-grace."""

    def test_old_upload_is_sent_again_and_its_record_stored_again(self, late, s3, tmp_path, clocks):
        """Before the base votes; the first object is left to the sweep."""
        storage, client = late
        sent = watch_uploads(client)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        clocks.advance(RENEWED)
        storage.tpc_vote(txn)
        tid = storage.tpc_finish(txn)
        first, second = sent
        assert reference(storage, OID, tid) == second
        assert keys(s3) == sorted([first, second])
        client.client.download_file(second, f"{tmp_path}/downloaded")
        assert (tmp_path / "downloaded").read_bytes() == b"bytes"
        assert load(storage, OID, tid) == b"bytes"
        assert leftovers(storage) == []
        assert_cache_is_sound(tmp_path, 5)

    def test_abort_deletes_all_that_was_sent(self, late, s3, tmp_path, clocks):
        """Under the stamps of before and of now."""
        storage, _client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        clocks.advance(RENEWED)
        storage.tpc_vote(txn)
        assert len(keys(s3)) == 2
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])
        assert_cache_is_sound(tmp_path, 0)

    def test_only_what_is_old_is_sent_again(self, late, clocks):
        """A long transaction's last blobs need not be."""
        storage, client = late
        sent = watch_uploads(client)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"old")
        clocks.advance(RENEWED)
        store_blob(storage, txn, p64(2), b"new")
        storage.tpc_vote(txn)
        assert sorted(parse_key(key)[0] for key in sent) == [OID, OID, p64(2)]
        tid = storage.tpc_finish(txn)
        assert (load(storage, OID, tid), load(storage, p64(2), tid)) == (b"old", b"new")

    @pytest.mark.parametrize("seconds", [0, GRACE * 0.5])
    def test_younger_upload_is_not_sent_again(self, late, clocks, seconds):
        """Half the grace period is left for the votes of all, and for the finish."""
        storage, client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        clocks.advance(seconds)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        assert client.count("upload_file") == 1

    @pytest.mark.parametrize("clock", ["steady", "set"])
    def test_either_clock_tells_that_time_has_passed(self, late, clocks, clock):
        """One stands still while the machine sleeps, the other can be set back."""
        storage, client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        clocks.set -= 50000
        setattr(clocks, clock, getattr(clocks, clock) + 50000 + RENEWED)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        assert client.count("upload_file") == 2

    def test_uploads_that_are_always_too_slow_are_given_up(self, late, s3, clocks):
        """Three times more, and then the operator is told which setting to change."""
        storage, client = late
        client.after["upload_file"] = lambda *args: clocks.advance(RENEWED)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        with pytest.raises(PermanentS3Error, match=r"half of gc-grace, which is 1000 s"):
            storage.tpc_vote(txn)
        assert client.count("upload_file") == 4
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])

    def test_last_renewal_that_is_fast_enough_is_accepted(self, late, clocks):
        """Slow times pass."""
        storage, client = late
        slow = Failure(times=3)

        def advance(*args):
            try:
                slow()
            except TransientS3Error:
                clocks.advance(RENEWED)

        client.after["upload_file"] = advance
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        storage.tpc_vote(txn)
        assert client.count("upload_file") == 4
        tid = storage.tpc_finish(txn)
        assert load(storage, OID, tid) == b"bytes"

    def test_renewal_that_fails_fails_the_vote(self, late, s3, clocks):
        """As any upload; the abort deletes what was sent before."""
        storage, client = late
        txn = begun(storage)
        uploaded = client.after["upload_file"] = Gate()
        uploaded.open()
        store_blob(storage, txn, OID, b"bytes")
        uploaded.wait()
        clocks.advance(RENEWED)
        client.before["upload_file"] = Failure()
        with pytest.raises(TransientS3Error):
            storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])

    def test_without_a_grace_period_nothing_is_sent_again(self, s3, tmp_path, clocks):
        """Whoever sets it to 0 says that no other process sweeps."""
        base = open_relstorage(tmp_path)
        storage, client = make_storage(s3, tmp_path, base=base, gc_grace=0)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        clocks.advance(1e6)
        storage.tpc_vote(txn)
        clocks.advance(1e6)
        storage.tpc_finish(txn)
        assert client.count("upload_file") == 1
        storage.close()

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_blobs_over_a_local_base_are_not_sent_again(self, s3, tmp_path, clocks, addressing):
        """No other process sweeps there, and ours knows what is in flight."""
        storage, client = make_storage(s3, tmp_path, gc_grace=GRACE, addressing=addressing)
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        clocks.advance(1e6)
        storage.tpc_vote(txn)
        clocks.advance(1e6)
        storage.tpc_finish(txn)
        assert client.count("upload_file") == 1
        storage.close()

    def test_restored_blobs_are_sent_again_under_the_same_key(self, late, s3, clocks):
        """It stands in a record that must not change; the object is young again."""
        storage, client = late
        txn = TransactionMetaData()
        storage.tpc_begin(txn, p64(77), " ")
        restore_blob(storage, txn, OID, p64(77), b"1", with_reference(BLOB_RECORD, b"s" * 16))
        clocks.advance(1e6)
        storage.tpc_vote(txn)
        assert storage.tpc_finish(txn) == p64(77)
        assert client.count("upload_file") == 2
        assert keys(s3) == [blob_key(OID, b"s" * 16)]


class TestCopyByRecord:
    """An undo whose tid only its end tells makes a copy, which its own record refers to."""

    SOURCE = p64(5)

    @pytest.fixture
    def services(self, s3, tmp_path, clocks):
        """What a storage of a shared base gives its transactions; one object is in the bucket."""
        client, cache = HookedClient(make_client(s3)), S3BlobCache(f"{tmp_path}/cache")
        client.upload_file(write_file(b"source", cache.temp_dir), blob_key(OID, self.SOURCE))
        client.calls.clear()
        pool = UploadPool(2)
        yield commit.BlobServices(
            client, cache, BlobLoader(cache, client, []), pool, OpenKeys(),
            cache.temporary_file, GRACE, clocks,
        )  # fmt: skip
        for each in (pool, cache, client):
            each.close()

    @pytest.fixture
    def blobs(self, services):
        return commit.TransactionBlobs(services, None, True)

    def copy(self, blobs, store):
        blobs.copy_by_record(OID, self.SOURCE, store)

    def end(self, blobs):
        blobs.vote()
        blobs.begin_finish()
        blobs.finish(p64(1 << 60))

    def assert_nothing_is_in_flight(self, services, s3, *names):
        """These are all the objects there are, and a sweep may decide about any."""
        expected = sorted(blob_key(OID, name) for name in (self.SOURCE, *names))
        assert keys(s3) == expected
        assert services.open_keys.closed(expected) == {*expected}

    def test_record_is_stored_once_when_the_copy_is_there(self, services, blobs, s3, tmp_path):
        """By the vote, and not by another one."""
        stored = []
        self.copy(blobs, lambda stamp: stored.append((stamp, keys(s3))))
        assert stored == []
        blobs.vote()
        ((stamp, there),) = stored
        assert blob_key(OID, stamp) in there
        blobs.vote()
        assert len(stored) == 1
        services.client.download_file(blob_key(OID, stamp), f"{tmp_path}/downloaded")
        assert (tmp_path / "downloaded").read_bytes() == b"source"
        self.end(blobs)
        assert len(stored) == 1
        self.assert_nothing_is_in_flight(services, s3, stamp)
        assert services.client.count("copy_object") == 1

    def test_copy_is_in_flight_until_the_end(self, services, blobs):
        """A sweep that lists it leaves it alone, before and after the vote."""
        stored = []
        copied = services.client.after["copy_object"] = Gate()
        copied.open()
        self.copy(blobs, stored.append)
        copied.wait()
        (_copy, source), *_rest = services.client.calls
        blobs.vote()
        key = blob_key(OID, stored[0])
        assert services.open_keys.closed([key, source]) == {source}

    @pytest.mark.parametrize("error", [ConflictError, OSError])
    def test_store_that_fails_leaves_an_abortable_transaction(self, services, blobs, s3, error):
        """It has not voted, and the abort deletes the copy."""
        self.copy(blobs, Failure(error("says the test")))
        with pytest.raises(error, match="says the test"):
            blobs.vote()
        assert len(keys(s3)) == 2
        with pytest.raises(StorageTransactionError):
            blobs.begin_finish()
        blobs.abort()
        self.assert_nothing_is_in_flight(services, s3)

    def test_copy_that_fails_stores_nothing(self, services, blobs, s3):
        """The vote says so, with the oid."""
        services.client.before["copy_object"] = Failure()
        stored = []
        self.copy(blobs, stored.append)
        with pytest.raises(TransientS3Error) as caught:
            blobs.vote()
        assert (caught.value.oid, stored) == (OID, [])
        blobs.abort()
        self.assert_nothing_is_in_flight(services, s3)

    def test_source_that_is_nowhere_fails_the_vote(self, services, blobs, s3):
        """A record without its blob must not be committed."""
        stored = []
        blobs.copy_by_record(OID, p64(6), stored.append)
        with pytest.raises(POSKeyError):
            blobs.vote()
        assert stored == []
        blobs.abort()
        self.assert_nothing_is_in_flight(services, s3)

    def test_abort_after_the_vote_deletes_the_copy(self, services, blobs, s3):
        """And not what was copied."""
        self.copy(blobs, lambda stamp: None)
        blobs.vote()
        blobs.abort()
        self.assert_nothing_is_in_flight(services, s3)

    def test_second_undo_of_an_object_wins(self, services, blobs, s3, tmp_path):
        """The record of the first is never stored."""
        first, second = [], []
        services.client.upload_file(write_file(b"older"), blob_key(OID, p64(4)))
        self.copy(blobs, first.append)
        blobs.copy_by_record(OID, p64(4), second.append)
        self.end(blobs)
        assert (first, len(second)) == ([], 1)
        services.client.download_file(blob_key(OID, second[0]), f"{tmp_path}/downloaded")
        assert (tmp_path / "downloaded").read_bytes() == b"older"

    def test_undo_to_a_reference_after_one_to_a_tid_stores_nothing(self, services, blobs):
        """What becomes current in the end says where its bytes are."""
        stored = []
        self.copy(blobs, stored.append)
        blobs.drop(OID, None)
        self.end(blobs)
        assert stored == []

    @pytest.mark.parametrize("advance", ["before the vote", "after the vote"])
    def test_copy_that_is_old_is_neither_made_again_nor_refused_too_early(
        self, services, blobs, s3, clocks, advance
    ):
        """Up to three quarters of the grace period it may still be committed."""
        stored = []
        self.copy(blobs, stored.append)
        if advance == "before the vote":
            clocks.advance(REFUSED - 1)
        blobs.vote()
        if advance == "after the vote":
            clocks.advance(REFUSED - 1)
        self.end(blobs)
        assert len(stored) == 1
        assert services.client.count("copy_object") == 1
        self.assert_nothing_is_in_flight(services, s3, *stored)

    @pytest.mark.parametrize("advance", ["before the vote", "after the vote"])
    def test_copy_that_is_too_old_is_refused_by_the_finish(
        self, services, blobs, s3, clocks, advance
    ):
        """A sweep may take it before the base has finished; the undo can be done again."""
        self.copy(blobs, lambda stamp: None)
        if advance == "before the vote":
            clocks.advance(REFUSED)
        blobs.vote()
        if advance == "after the vote":
            clocks.advance(REFUSED)
        with pytest.raises(TransientS3Error, match="gc-grace"):
            blobs.begin_finish()
        blobs.abort()
        self.assert_nothing_is_in_flight(services, s3)

    def test_copy_to_the_key_of_a_tid_may_be_as_old_as_it_likes(self, services, blobs, clocks):
        """Its tid is above all others, which no sweep touches."""
        blobs.copy(OID, p64(1 << 60), self.SOURCE)
        clocks.advance(1e6)
        blobs.vote()
        clocks.advance(1e6)
        blobs.begin_finish()
        blobs.finish(p64(1 << 60))


class TestLateFinish:
    def test_finish_after_the_grace_period_is_refused(self, late, s3, tmp_path, clocks):
        """A sweep may have taken the objects: nothing commits, and the abort cleans up."""
        storage, _client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        storage.tpc_vote(txn)
        clocks.advance(REFUSED)
        with pytest.raises(TransientS3Error, match="gc-grace"):
            storage.tpc_finish(txn)
        storage.tpc_abort(txn)
        assert (keys(s3), leftovers(storage)) == ([], [])
        assert_cache_is_sound(tmp_path, 0)
        tid = commit_blob(storage, OID, b"again")
        assert load(storage, OID, tid) == b"again"

    def test_finish_within_the_grace_period_is_accepted(self, late, clocks):
        """However long the votes of others take."""
        storage, _client = late
        txn = begun(storage)
        store_blob(storage, txn, OID, b"bytes")
        storage.tpc_vote(txn)
        clocks.advance(REFUSED - 1)
        assert load(storage, OID, storage.tpc_finish(txn)) == b"bytes"

    def test_transaction_without_blobs_may_take_as_long_as_it_likes(self, late, clocks):
        """There is nothing that a sweep could take."""
        storage, _client = late
        txn = begun(storage)
        storage.store(OID, p64(0), BLOB_RECORD, "", txn)
        storage.tpc_vote(txn)
        clocks.advance(REFUSED * 100)
        storage.tpc_finish(txn)
