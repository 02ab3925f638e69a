"""A cached file is compared with what was stored, and replaced when it differs."""

import os

import pytest
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zodb_s3blobs import blobs
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key

from .services.location import boto3_client
from .services.location import keys
from .storages import commit_blob
from .storages import Failure
from .storages import load
from .storages import make_storage
from .storages import open_db


OID = p64(1)
DATA = b"the bytes that were stored"


@pytest.fixture(params=["tid", "record"])
def stored(request, s3, tmp_path):
    """(storage, client, serial, location) of a blob that is cached."""
    storage, client = make_storage(s3, tmp_path, addressing=request.param)
    serial = commit_blob(storage, OID, DATA)
    client.calls.clear()
    yield storage, client, serial, s3
    storage.close()


def spoil(storage, serial, data):
    """Let a disk change a cached file."""
    path = storage.loadBlob(OID, serial)
    os.chmod(path, 0o600)
    with open(path, "wb") as file:
        file.write(data)


def replace_object(location, data, metadata=None):
    """Change the only object of a bucket behind our back."""
    client = boto3_client(location)
    (key,) = keys(location)
    client.put_object(Bucket=location.bucket, Key=key, Body=data, Metadata=metadata or {})
    client.close()


def test_right_file_costs_one_head(stored):
    """It is neither downloaded nor touched."""
    storage, client, serial, _location = stored
    path = storage.loadBlob(OID, serial)
    before = os.stat(path).st_ino
    assert storage.verify_blob(OID, serial)
    assert client.count("download_file") == 0
    assert os.stat(path).st_ino == before
    assert load(storage, OID, serial) == DATA


@pytest.mark.parametrize("data", [DATA[::-1], DATA[:5], DATA + b"!", b""])
def test_damaged_file_is_replaced(stored, caplog, data):
    """Whatever differs, be it one byte; the log says so, and it is right from then on."""
    storage, _client, serial, _location = stored
    spoil(storage, serial, data)
    assert not storage.verify_blob(OID, serial)
    assert "cached file replaced" in caplog.text
    assert load(storage, OID, serial) == DATA
    assert storage.verify_blob(OID, serial)


def test_file_that_is_open_is_not_changed(stored):
    """Who reads the damaged one goes on reading that, and the next one the right one."""
    storage, _client, serial, _location = stored
    spoil(storage, serial, DATA[::-1])
    with storage.openCommittedBlobFile(OID, serial) as file:
        assert not storage.verify_blob(OID, serial)
        assert file.read() == DATA[::-1]
    assert load(storage, OID, serial) == DATA


def test_what_is_not_cached_is_fetched(stored):
    """The download verifies it."""
    storage, client, serial, _location = stored
    os.remove(storage.loadBlob(OID, serial))
    assert storage.verify_blob(OID, serial)
    assert client.count("download_file") == 1
    assert storage.blob_is_cached(OID, serial)


def test_file_whose_object_is_gone_stays(stored):
    """It may be the last copy, and the error says that the bucket has none."""
    storage, client, serial, location = stored
    spoil(storage, serial, DATA[::-1])
    for key in keys(location):
        client.delete_object(key)
    with pytest.raises(POSKeyError):
        storage.verify_blob(OID, serial)
    assert load(storage, OID, serial) == DATA[::-1]


def test_file_whose_object_is_damaged_stays(stored):
    """An object that was swapped or changed never takes the place of a file."""
    storage, _client, serial, location = stored
    metadata = {"zodb-key": blob_key(p64(2), p64(3)), "zodb-size": "5", "zodb-sha256": "0" * 64}
    replace_object(location, b"other", metadata)
    with pytest.raises(IntegrityError):
        storage.verify_blob(OID, serial)
    assert load(storage, OID, serial) == DATA


def test_object_of_the_older_package_is_compared_by_length(stored):
    """It has no digest."""
    storage, _client, serial, location = stored
    replace_object(location, DATA)
    spoil(storage, serial, DATA[::-1])
    assert storage.verify_blob(OID, serial)
    spoil(storage, serial, DATA[:-1])
    assert not storage.verify_blob(OID, serial)
    assert load(storage, OID, serial) == DATA


def test_while_s3_is_down_nothing_is_told(stored):
    """The file stays, and is served."""
    storage, client, serial, _location = stored
    client.before["verify_file"] = Failure()
    with pytest.raises(TransientS3Error):
        storage.verify_blob(OID, serial)
    assert load(storage, OID, serial) == DATA


def test_file_that_is_evicted_meanwhile_is_no_error(stored):
    """There is nothing to compare any more."""
    storage, client, serial, _location = stored
    path = storage.loadBlob(OID, serial)
    client.before["verify_file"] = lambda *args: os.remove(path)
    assert storage.verify_blob(OID, serial)


def test_blobs_are_verified_in_each_of_their_states(s3, tmp_path):
    """Uncommitted bytes are right; those of another storage are not ours to judge."""
    db = open_db(s3, tmp_path)
    with db.transaction() as connection:
        connection.root()["file"] = blob = Blob(b"uncommitted")
        assert blobs.verify(blob)
    with db.transaction() as connection:
        blob = connection.root()["file"]
        assert blobs.verify(blob)
        path = blob.committed()
        os.chmod(path, 0o600)
        with open(path, "ab") as file:
            file.write(b"!")
        assert not blobs.verify(blob)
        with blob.open() as file:
            assert file.read() == b"uncommitted"
    db.close()
    (tmp_path / "plain").mkdir()
    base = FileStorage(str(tmp_path / "plain.fs"), blob_dir=str(tmp_path / "plain"))
    plain = DB(base)
    with plain.transaction() as connection:
        connection.root()["file"] = Blob(b"elsewhere")
    with plain.transaction() as connection:
        assert blobs.verify(connection.root()["file"])
    plain.close()
