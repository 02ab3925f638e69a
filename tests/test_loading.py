"""BlobLoader: from (oid, serial) to a complete file, and which error says what."""

import os

import pytest
from ZODB.blob import BlobFile
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference
from zodb_s3blobs.sources import BlobDirSource

from .services.location import boto3_client
from .services.location import new_bucket
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import Gate
from .storages import leftovers
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_relstorage
from .storages import open_storage
from .storages import start
from .storages import write_file


OID = p64(1)


@pytest.fixture
def cold(s3, tmp_path):
    """(storage with an empty cache, its client, tid of a blob with the bytes b"bytes")."""
    storage, _client = make_storage(s3, tmp_path)
    tid = commit_blob(storage, OID, b"bytes")
    storage.close()
    storage, client = make_storage(s3, tmp_path, "empty")
    yield storage, client, tid
    storage.close()


def test_cold_read_makes_one_request_and_later_ones_none(cold):
    """A miss costs one GET and no HEAD, a hit costs nothing."""
    storage, client, tid = cold
    for _ in range(3):
        assert load(storage, OID, tid) == b"bytes"
    assert client.calls == [("download_file", blob_key(OID, tid))]


def test_same_path_is_returned_every_time_and_is_not_writable(cold):
    """Blob.committed() relies on it."""
    storage, _client, tid = cold
    path = storage.loadBlob(OID, tid)
    assert storage.loadBlob(OID, tid) == path == storage.fshelper.getBlobFilename(OID, tid)
    assert os.stat(path).st_mode & 0o222 == 0
    os.remove(path)
    assert storage.loadBlob(OID, tid) == path


def test_threads_that_want_the_same_blob_wait_for_one_download(cold):
    """Single flight: the first downloads, the others get its file."""
    storage, client, tid = cold
    gate = client.before["download_file"] = Gate()
    threads = [start(load, storage, OID, tid) for _ in range(8)]
    gate.wait()
    gate.open()
    assert [thread.result() for thread in threads] == [b"bytes"] * 8
    assert client.count("download_file") == 1


def test_blob_that_hangs_does_not_hold_up_others(cold, tmp_path):
    """While one blob's download hangs, a second blob is committed, evicted and read."""
    storage, client, tid = cold
    other = commit_blob(storage, p64(2), b"other")
    os.remove(storage.loadBlob(p64(2), other))
    gate = client.before["download_file"] = Gate()
    hanging = start(load, storage, OID, tid)
    gate.wait()
    del client.before["download_file"]
    assert load(storage, p64(2), other) == b"other"
    gate.open()
    assert hanging.result() == b"bytes"


def test_threads_that_wait_for_a_download_share_its_failure(cold):
    """While S3 does not answer nobody waits for one time-out after the other."""
    storage, client, tid = cold
    gate = Gate()

    def fail_slowly(*args):
        gate()
        raise TransientS3Error("S3 is down, says the test")

    client.before["download_file"] = fail_slowly
    first = start(storage.loadBlob, OID, tid)
    gate.wait()
    others = [start(storage.loadBlob, OID, tid) for _ in range(7)]
    for other in others:
        other.join(0.05)
    gate.open()
    for thread in [first, *others]:
        with pytest.raises(TransientS3Error) as caught:
            thread.result()
        assert (caught.value.oid, caught.value.tid) == (OID, tid)
    assert client.count("download_file") < 8
    del client.before["download_file"]
    assert load(storage, OID, tid) == b"bytes"


def test_failed_download_is_tried_again_by_the_next_who_asks(cold):
    """A failure is nobody's but the one's who met it, and leaves no file."""
    storage, client, tid = cold
    client.before["download_file"] = Failure(times=1)
    with pytest.raises(TransientS3Error):
        storage.loadBlob(OID, tid)
    assert leftovers(storage) == []
    assert not os.path.exists(storage.fshelper.getBlobFilename(OID, tid))
    assert load(storage, OID, tid) == b"bytes"


def test_absent_object_is_a_poskeyerror_with_its_key(cold):
    """The bucket answered and has no such blob: it is gone."""
    storage, client, tid = cold
    lost = [(OID, tid), (p64(2), commit_record(storage, p64(2), record=BLOB_RECORD))]
    client.client.delete_object(blob_key(OID, tid))
    for oid, serial in lost:
        with pytest.raises(POSKeyError, match=blob_key(oid, serial)):
            storage.loadBlob(oid, serial)
    assert client.count("download_file") == 2
    assert leftovers(storage) == []


@pytest.mark.parametrize("addressing", ["auto", "record"])
@pytest.mark.parametrize("kind", ["FileStorage", "MappingStorage"])
def test_revision_that_a_local_base_does_not_have_is_a_poskeyerror_at_once(
    s3, tmp_path, kind, addressing
):
    """It knows: S3 is not asked, which may be down."""
    base = MappingStorage() if kind == "MappingStorage" else None
    storage, client = make_storage(s3, tmp_path, base=base, addressing=addressing)
    tid = commit_blob(storage, OID, b"bytes")
    client.before["download_file"] = Failure()
    client.calls.clear()
    for oid, serial in ((p64(2), tid), (OID, p64(5)), (OID, p64(u64(tid) + 1)), (OID, z64)):
        with pytest.raises(POSKeyError):
            storage.loadBlob(oid, serial)
        with pytest.raises(POSKeyError):
            storage.openCommittedBlobFile(oid, serial)
    assert client.calls == []
    assert leftovers(storage) == []
    storage.close()


def test_bucket_that_is_missing_or_denied_is_never_a_poskeyerror(s3, rclone, tmp_path):
    """A mistake in the configuration must not look like lost data."""
    base = FileStorage(f"{tmp_path}/Data.fs")
    tid = commit_record(base, OID, record=BLOB_RECORD)
    base.close()
    other = new_bucket(rclone)
    boto3_client(other).delete_bucket(Bucket=other.bucket)
    storage = open_storage(other, tmp_path)
    with pytest.raises(PermanentS3Error, match="NoSuchBucket"):
        storage.loadBlob(OID, tid)
    storage.close()
    denied = type(s3)(s3.endpoint_url, s3.access_key, "wrong", s3.bucket)
    storage = open_storage(denied, tmp_path)
    with pytest.raises(PermanentS3Error, match="s3-secret-key"):
        storage.loadBlob(OID, tid)
    storage.close()


def test_damaged_object_is_an_integrity_error_and_is_not_cached(cold, s3):
    """Other bytes under the key are refused, by the metadata stored with them."""
    storage, _client, tid = cold
    client = boto3_client(s3)
    key = {"Bucket": s3.bucket, "Key": blob_key(OID, tid)}
    metadata = client.head_object(**key)["Metadata"]
    client.put_object(**key, Body=b"bytez", Metadata=metadata)
    with pytest.raises(IntegrityError):
        storage.loadBlob(OID, tid)
    assert leftovers(storage) == []
    client.put_object(**key, Body=b"bytes", Metadata=metadata)
    assert load(storage, OID, tid) == b"bytes"


class TestSources:
    @pytest.fixture
    def old(self, tmp_path):
        """(blob directory, tid) of a database that has not migrated."""
        # Under the name that `make_storage` opens
        stock = FileStorage(f"{tmp_path}/Data.fs", blob_dir=f"{tmp_path}/old")
        tid = commit_blob(stock, OID, b"old")
        stock.close()
        return f"{tmp_path}/old", tid

    def test_source_is_asked_when_the_bucket_has_no_such_object(self, s3, tmp_path, old):
        """Blobs of the old directory are served, through the cache."""
        directory, tid = old
        storage, client = make_storage(s3, tmp_path, sources=[BlobDirSource(directory)])
        assert load(storage, OID, tid) == b"old"
        assert storage.loadBlob(OID, tid) == storage.fshelper.getBlobFilename(OID, tid)
        assert client.count("download_file") == 1
        lost = commit_record(storage, p64(2), record=BLOB_RECORD)
        with pytest.raises(POSKeyError, match=blob_key(p64(2), lost)):
            storage.loadBlob(p64(2), lost)
        assert client.count("download_file") == 3
        storage.close()

    def test_blob_that_moves_meanwhile_is_found(self, s3, tmp_path, old):
        """From a source to the bucket, after that was asked and before the source is."""
        directory, tid = old
        source = BlobDirSource(directory)
        storage, client = make_storage(s3, tmp_path, sources=[source])
        fetch = source.fetch

        def migrate(oid, serial, target_path):
            assert fetch(oid, serial, target_path)
            client.client.upload_file(target_path, blob_key(oid, serial))
            os.remove(target_path)
            return False

        source.fetch = migrate
        assert load(storage, OID, tid) == b"old"
        storage.close()

    def test_source_that_fails_is_not_taken_for_one_that_has_nothing(self, s3, tmp_path, old):
        """An unreadable old directory must not look like lost data."""
        directory, tid = old
        source = BlobDirSource(directory)
        source.fetch = Failure(PermissionError(13, "says the test"))
        storage, _client = make_storage(s3, tmp_path, sources=[source])
        with pytest.raises(PermissionError):
            storage.loadBlob(OID, tid)
        assert leftovers(storage) == []
        storage.close()

    def test_source_is_asked_when_s3_fails(self, s3, tmp_path, old):
        """A revision has the same bytes wherever they are; what no source has stays unknown."""
        directory, tid = old
        storage, client = make_storage(s3, tmp_path, sources=[BlobDirSource(directory)])
        client.before["download_file"] = Failure()
        assert load(storage, OID, tid) == b"old"
        other = commit_record(storage, p64(2), record=BLOB_RECORD)
        with pytest.raises(TransientS3Error):
            storage.loadBlob(p64(2), other)
        storage.close()

    def test_file_of_the_old_directory_is_neither_moved_nor_changed(self, s3, tmp_path, old):
        """Sources are read-only: the old site can be switched back."""
        directory, tid = old
        before = {
            os.path.join(place, name): os.stat(os.path.join(place, name)).st_mtime_ns
            for place, _names, names in os.walk(directory)
            for name in names
        }
        storage, _client = make_storage(s3, tmp_path, sources=[BlobDirSource(directory)])
        assert load(storage, OID, tid) == b"old"
        storage.close()
        for path, changed in before.items():
            assert os.stat(path).st_mtime_ns == changed


class TestOpening:
    def test_eviction_between_load_and_open_is_met_by_another_load(self, cold, monkeypatch):
        """openCommittedBlobFile asks again when the path it was given is gone."""
        storage, client, tid = cold
        evictions = 3

        def evict(*args):
            nonlocal evictions
            if evictions:
                evictions -= 1
                os.remove(storage.fshelper.getBlobFilename(OID, tid))

        load_blob = storage.loadBlob

        def load_and_evict(oid, serial):
            path = load_blob(oid, serial)
            evict()
            return path

        monkeypatch.setattr(storage, "loadBlob", load_and_evict)
        with storage.openCommittedBlobFile(OID, tid) as file:
            assert file.read() == b"bytes"
        assert client.count("download_file") == 4

    def test_blobs_own_file_class_is_used_for_blobs(self, cold):
        """With a Blob given, the file is a BlobFile."""
        storage, _client, tid = cold

        class Owner:
            def closed(self, file):
                self.file = file

        owner = Owner()
        with storage.openCommittedBlobFile(OID, tid, owner) as file:
            assert isinstance(file, BlobFile)
            assert file.read() == b"bytes"
        assert owner.file is file

    def test_open_file_stays_readable_after_its_eviction(self, s3, tmp_path):
        """A cache of one blob's size serves two readers at once."""
        storage, _client = make_storage(s3, tmp_path, cache_size=1000)
        first = commit_blob(storage, OID, b"1" * 1000)
        with storage.openCommittedBlobFile(OID, first) as file:
            second = commit_blob(storage, p64(2), b"2" * 1000)
            assert not os.path.exists(storage.fshelper.getBlobFilename(OID, first))
            assert load(storage, p64(2), second) == b"2" * 1000
            assert file.read() == b"1" * 1000
        assert load(storage, OID, first) == b"1" * 1000
        storage.close()


STAMP = b"s" * 16


class Source:
    """Has the blobs it was given, and lists what it was asked for."""

    def __init__(self, **blobs):
        self.blobs = blobs
        self.asked = []

    def fetch(self, oid, tid, target_path):
        self.asked.append((oid, tid))
        data = self.blobs.get(f"oid{int.from_bytes(oid, 'big')}")
        if data is None:
            return False
        with open(target_path, "wb") as file:
            file.write(data)
        return True

    def close(self):
        pass


class TestReference:
    """Where the bytes are: under the record's reference, else under the tid, else in a source."""

    @pytest.fixture(params=["FileStorage", "history", "no history"])
    def opened(self, request, s3, tmp_path):
        """Return a function that opens the same storage with an empty cache, and its client."""
        storages = []

        def opened(**options):
            base = None
            if request.param != "FileStorage":
                base = open_relstorage(tmp_path, keep_history=request.param == "history")
            for storage in storages:
                storage.close()
            storage, client = make_storage(
                s3, tmp_path, f"cache{len(storages)}", base=base, **options
            )
            storages.append(storage)
            return storage, client

        yield opened
        storages[-1].close()

    def put(self, location, *names):
        """Put objects whose bytes tell their keys."""
        client = make_client(location)
        for name in names:
            client.upload_file(write_file(name.encode()), name)
        client.close()

    def break_bases(self, patch):
        """Let no base answer."""
        failure = Failure(OSError("says the test"))
        patch.setattr(FileStorage, "loadBefore", failure)
        patch.setattr("relstorage.adapters.sqlite.drivers.Cursor.execute", failure)

    def asked(self, client):
        """The keys that were asked for."""
        return [key for name, key in client.calls if name == "download_file"]

    def test_reference_is_asked_first(self, opened, s3):
        """One request, though there is an object under the tid as well."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        self.put(s3, blob_key(OID, STAMP), blob_key(OID, tid))
        storage, client = opened()
        assert load(storage, OID, tid) == blob_key(OID, STAMP).encode()
        assert client.calls == [("download_file", blob_key(OID, STAMP))]

    def test_tid_is_asked_where_the_reference_is_missing(self, opened, s3):
        """A copy that kept the records, and wrote blobs as older versions do."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        self.put(s3, blob_key(OID, tid))
        source = Source(oid1=b"source")
        storage, client = opened(sources=[source])
        assert load(storage, OID, tid) == blob_key(OID, tid).encode()
        assert self.asked(client) == [blob_key(OID, STAMP), blob_key(OID, tid)]
        assert source.asked == []

    def test_record_without_a_reference_is_found_under_its_tid(self, opened, s3):
        """One request, as ever."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=BLOB_RECORD)
        self.put(s3, blob_key(OID, tid))
        storage, client = opened()
        assert load(storage, OID, tid) == blob_key(OID, tid).encode()
        assert client.calls == [("download_file", blob_key(OID, tid))]

    def test_source_is_asked_last(self, opened):
        """When the bucket has it neither way; by the tid, for sources know no references."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        nothing, source = Source(), Source(oid1=b"source")
        storage, client = opened(sources=[nothing, source])
        assert load(storage, OID, tid) == b"source"
        assert self.asked(client) == [blob_key(OID, STAMP), blob_key(OID, tid)]
        assert nothing.asked == source.asked == [(OID, tid)]

    def test_blob_that_is_nowhere_is_a_poskeyerror_with_both_keys(self, opened):
        """An operator can look for either."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        storage, _client = opened(sources=[Source()])
        with pytest.raises(POSKeyError) as caught:
            storage.loadBlob(OID, tid)
        assert f"{blob_key(OID, STAMP)} or {blob_key(OID, tid)}" in str(caught.value)
        assert leftovers(storage) == []

    @pytest.mark.parametrize("error", [TransientS3Error, PermanentS3Error, IntegrityError])
    def test_other_error_at_the_reference_is_raised_and_not_asked_past(self, opened, s3, error):
        """What S3 could not tell is not missing: another object may have other bytes."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        self.put(s3, blob_key(OID, tid))
        storage, client = opened(sources=[Source()])
        client.before["download_file"] = Failure(error("says the test"))
        with pytest.raises(error, match="says the test") as caught:
            storage.loadBlob(OID, tid)
        assert (caught.value.oid, caught.value.tid) == (OID, tid)
        assert self.asked(client) == [blob_key(OID, STAMP)]
        assert leftovers(storage) == []

    def test_other_error_at_the_tid_is_raised(self, opened):
        """The reference is missing; whether the tid is, S3 could not tell."""
        storage, _client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        storage, client = opened(sources=[Source()])

        def fail(key, path):
            if key == blob_key(OID, tid):
                raise TransientS3Error("says the test")

        client.before["download_file"] = fail
        with pytest.raises(TransientS3Error, match="says the test"):
            storage.loadBlob(OID, tid)

    @pytest.mark.parametrize("opened", ["history", "no history"], indirect=True)
    def test_revision_whose_record_is_gone_is_looked_for_under_its_tid(self, opened, s3):
        """Packed meanwhile, or never there: a shared base leaves the answer to the bucket."""
        storage, _client = opened()
        commit_record(storage, p64(9))
        self.put(s3, blob_key(OID, p64(5)))
        storage, client = opened()
        assert load(storage, OID, p64(5)) == blob_key(OID, p64(5)).encode()
        with pytest.raises(POSKeyError):
            storage.loadBlob(p64(2), p64(5))
        assert self.asked(client) == [blob_key(OID, p64(5)), blob_key(p64(2), p64(5))]

    def test_base_that_fails_to_answer_is_no_poskeyerror(self, opened, s3, monkeypatch):
        """Without the record nobody knows where the bytes are."""
        storage, client = opened()
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        self.put(s3, blob_key(OID, tid))
        storage, client = opened()
        with monkeypatch.context() as patch:
            self.break_bases(patch)
            with pytest.raises(OSError, match="says the test"):
                storage.loadBlob(OID, tid)
        assert client.calls == []

    def test_mixed_bucket_is_read_revision_by_revision(self, opened, s3):
        """Some records have references, others do not; each has its own bytes."""
        storage, _client = opened()
        serial, revisions = z64, []
        for number in range(4):
            stamp = b"%016d" % number
            record = with_reference(BLOB_RECORD, stamp) if number % 2 else BLOB_RECORD
            serial = commit_record(storage, p64(number), z64, record)
            revisions.append((p64(number), serial, blob_key(p64(number), stamp)))
            if not number % 2:
                revisions[-1] = (p64(number), serial, blob_key(p64(number), serial))
        self.put(s3, *(key for _oid, _serial, key in revisions))
        storage, client = opened()
        for oid, serial, key in revisions:
            assert load(storage, oid, serial) == key.encode()
        assert client.count("download_file") == 4

    def test_hit_asks_neither_the_base_nor_s3(self, opened, monkeypatch):
        """What is cached is found by its tid alone."""
        storage, client = opened()
        tid = commit_blob(storage, OID, b"bytes")
        client.calls.clear()
        with monkeypatch.context() as patch:
            self.break_bases(patch)
            assert load(storage, OID, tid) == b"bytes"
        assert client.calls == []

    def test_committed_blob_is_read_by_others_from_its_reference(self, opened):
        """One request, whichever base tells where it is."""
        storage, _client = opened()
        tid = commit_blob(storage, OID, b"bytes")
        name = read_reference(storage.loadSerial(OID, tid)) or tid
        storage, client = opened()
        assert load(storage, OID, tid) == b"bytes"
        assert client.calls == [("download_file", blob_key(OID, name))]
