"""OpenKeys: a transaction and a sweep never act on the same key at the same time."""

from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.openkeys import OpenKeys

from .services.location import keys
from .storages import commit_blob
from .storages import commit_record
from .storages import Gate
from .storages import load
from .storages import make_storage
from .storages import restore_blob
from .storages import start


OID = p64(1)
LOW = p64(77)


class TestOpenKeys:
    def test_open_keys_are_not_free_to_decide_about(self):
        """A sweep gets the keys that no transaction has entered."""
        open_keys = OpenKeys()
        open_keys.add("a")
        with open_keys.deciding(["a", "b"]) as free:
            assert free == {"b"}
        open_keys.remove(["a", "never entered"])
        with open_keys.deciding(["a", "b"]) as free:
            assert free == {"a", "b"}

    def test_entering_a_key_waits_until_its_deletion_is_through(self):
        """A transaction takes up a key only when no sweep is about to delete it."""
        open_keys = OpenKeys()
        order = []

        def enter():
            open_keys.add("a")
            order.append("entered")

        with open_keys.deciding(["a"]):
            thread = start(enter)
            open_keys.add("b")  # others do not wait
            thread.join(0.05)
            order.append("decided")
        thread.result()
        assert order == ["decided", "entered"]

    def test_failing_sweep_lets_go_of_its_keys(self):
        """An error between decision and deletion blocks no transaction for ever."""
        open_keys = OpenKeys()
        try:
            with open_keys.deciding(["a"]):
                raise OSError("says the test")
        except OSError:
            pass
        start(open_keys.add, "a").result()
        with open_keys.deciding(["a"]) as free:
            assert free == set()


class TestRestoreAndSweep:
    """A restore's tid may lie below the last transaction, so that only its entry protects it."""

    def restoring(self, storage, oid=OID):
        txn = TransactionMetaData()
        storage.tpc_begin(txn, LOW, " ")
        restore_blob(storage, txn, oid, LOW, b"restored")
        return txn

    def test_restore_that_began_before_the_sweep_keeps_its_blob(self, s3, tmp_path):
        """The upload is listed, its record is not there yet: it is in flight, not garbage."""
        storage, client = make_storage(s3, tmp_path)
        commit_record(storage, p64(9))
        uploaded = client.after["upload_file"] = Gate()
        uploaded.open()
        txn = self.restoring(storage)
        uploaded.wait()
        report = storage.sweep()
        assert (report.in_flight, report.deleted) == (1, 0)
        storage.tpc_vote(txn)
        assert storage.sweep().in_flight == 1
        storage.tpc_finish(txn)
        assert keys(s3) == [blob_key(OID, LOW)]
        storage.close()
        storage, _client = make_storage(s3, tmp_path, "empty")
        assert load(storage, OID, LOW) == b"restored"
        storage.close()

    def test_restore_that_meets_a_deletion_under_way_uploads_after_it(self, s3, tmp_path):
        """The sweep is about to delete an orphan of this key: the restore's upload comes later."""
        storage, client = make_storage(s3, tmp_path)
        commit_record(storage, p64(9))
        (tmp_path / "orphan").write_bytes(b"orphan")
        client.client.upload_file(str(tmp_path / "orphan"), blob_key(OID, LOW))
        gate = client.before["delete_objects"] = Gate()
        sweep = start(storage.sweep)
        gate.wait()
        restore = start(self.restoring, storage)
        restore.join(0.1)
        assert client.count("upload_file") == 0
        gate.open()
        assert sweep.result().deleted == 1
        txn = restore.result()
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        assert keys(s3) == [blob_key(OID, LOW)]
        storage.close()
        storage, _client = make_storage(s3, tmp_path, "empty")
        assert load(storage, OID, LOW) == b"restored"
        storage.close()

    def test_restore_that_ends_between_listing_and_decision_keeps_its_blob(self, s3, tmp_path):
        """Listed while open, decided when finished: the base is asked after the register."""
        storage, client = make_storage(s3, tmp_path)
        commit_record(storage, p64(9))
        txn = self.restoring(storage)
        storage.tpc_vote(txn)
        pages = list(client.list_pages("blobs/"))
        storage.tpc_finish(txn)

        client.list_pages = lambda prefix, after: iter([] if after else pages)
        assert storage.sweep().deleted == 0
        assert len(keys(s3)) == 1
        storage.close()

    def test_commits_of_other_keys_do_not_wait_for_a_sweep(self, s3, tmp_path):
        """While a sweep hangs in its deletion, commits go on."""
        storage, client = make_storage(s3, tmp_path)
        first = commit_blob(storage, OID, b"first")
        commit_record(storage, p64(6))
        (tmp_path / "orphan").write_bytes(b"orphan")
        client.client.upload_file(str(tmp_path / "orphan"), blob_key(p64(5), LOW))
        gate = client.before["delete_objects"] = Gate()
        sweep = start(storage.sweep)
        gate.wait()
        second = commit_blob(storage, OID, b"second", first)
        assert load(storage, OID, second) == b"second"
        gate.open()
        assert sweep.result().deleted == 1
        storage.close()
