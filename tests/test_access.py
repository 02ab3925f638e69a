"""A staging copy reads production's blobs, writes its own beside them, and changes nothing else."""

from contextlib import closing
from dataclasses import replace
import shutil
import time

from persistent.mapping import PersistentMapping
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.blob import FilesystemHelper
from ZODB.config import databaseFromString
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError

from zodb_s3blobs import blobs
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import ReadOnlyBucketError
from zodb_s3blobs.interfaces import TransientS3Error

from .faults import refused_endpoint
from .relstorages import Database
from .services.location import boto3_client
from .services.location import new_bucket
from .storages import make_client
from .storages import open_db
from .storages import read
from .storages import section


ACCESS = "ZODB_S3BLOBS_ACCESS"

both_addressings = pytest.mark.parametrize("addressing", ["tid", "record"])


def snapshot_of(location):
    """Return all that can be told of a bucket's objects."""
    listed = boto3_client(location).list_objects_v2(Bucket=location.bucket)
    return [
        (item["Key"], item["ETag"], item["Size"], item["LastModified"])
        for item in listed.get("Contents", ())
    ]


class Production:
    """A database with two blobs, one of them in two revisions, and copies of it.

    :ivar location: the bucket, through a proxy that counts requests by method
    """

    def __init__(self, location, proxy, directory, addressing):
        self.location = replace(location, endpoint_url=proxy.endpoint_url)
        self.proxy = proxy
        self.directory = directory / "production"
        self.directory.mkdir()
        self._addressing = addressing
        db = self.open()
        write(db, a=b"first", b=b"other")
        write(db, a=b"second")
        db.close()
        self.before = snapshot_of(location)
        self.original = location
        proxy.reset()

    def open(self, directory=None, **options):
        """Open the database, or a copy of it."""
        options.setdefault("addressing", self._addressing)
        return open_db(self.location, directory or self.directory, **options)

    def copy(self, name="staging", **options):
        """Return a copy, open."""
        directory = self.directory.parent / name
        if not directory.exists():
            ignored = shutil.ignore_patterns("*.lock", "cache")
            shutil.copytree(self.directory, directory, ignore=ignored)
        return self.open(directory, **options)

    def check_untouched(self):
        """Nothing was sent that could change anything, and nothing is changed."""
        assert snapshot_of(self.original) == self.before
        assert set(self.proxy.stats()["methods"]) <= {"GET", "HEAD"}


@pytest.fixture(params=["tid", "record"])
def production(s3, latency_proxy, tmp_path, request):
    return Production(s3, latency_proxy(s3.endpoint_url), tmp_path, request.param)


@pytest.fixture
def local(tmp_path):
    """Return the options of a staging copy."""
    return {"access": "read-only", "local_blob_dir": tmp_path / "local"}


def write(db, **contents):
    with db.transaction() as connection:
        for name, data in contents.items():
            connection.root()[name] = Blob(data)


def append(db, name, data):
    with db.transaction() as connection, connection.root()[name].open("a") as file:
        file.write(data)


def read_all(db):
    with db.transaction() as connection:
        return {name: read(blob) for name, blob in connection.root().items()}


def files(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_copy_reads_at_once_and_writes_beside(production, local):
    """It starts with an empty cache, and without a copy of any blob."""
    db = production.copy(**local)
    assert read_all(db) == {"a": b"second", "b": b"other"}
    write(db, c=b"of staging")
    append(db, "a", b", changed")
    assert read_all(db) == {"a": b"second, changed", "b": b"other", "c": b"of staging"}
    db.close()
    again = production.copy(cache="empty", **local)
    assert read_all(again) == {"a": b"second, changed", "b": b"other", "c": b"of staging"}
    again.close()
    production.check_untouched()


def test_every_operation_that_writes_leaves_the_bucket_alone(production, local):
    """Commit, abort, undo, redo, copies, pack and sweep, in any order, and what fails."""
    db = production.copy(**local)
    write(db, c=b"of staging")
    with pytest.raises(ZeroDivisionError), db.transaction() as connection:
        connection.root()["aborted"] = Blob(b"aborted")
        transaction.savepoint()
        raise ZeroDivisionError
    append(db, "a", b"!")
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert read_all(db)["a"] == b"second"
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert read_all(db)["a"] == b"second!"
    # What production has committed is undone with production's bytes.
    db.undoMultiple([entry["id"] for entry in db.undoLog(0, 5)])
    transaction.commit()
    assert read_all(db)["a"] == b"first"
    with db.transaction() as connection:
        connection.root().pop("b", None)
    db.pack(time.time() + 1)
    db.storage.sweep()
    db.storage.drain_spool()
    client = db.storage.parts.services.client
    client.delete_objects([key for key, *_rest in production.before])
    client.delete_object(production.before[0][0])
    read_all(db)
    db.close()
    production.check_untouched()


def test_pack_of_a_copy_removes_what_it_has_stored_itself(production, local, tmp_path):
    """Its own garbage, and nothing else."""
    db = production.copy(gc_grace="0s", **local)
    write(db, c=b"garbage")
    write(db, c=b"kept")
    assert len(files(tmp_path / "local")) == 2
    db.pack(time.time() + 1)
    assert len(files(tmp_path / "local")) == 1
    assert read_all(db)["c"] == b"kept"
    db.close()
    production.check_untouched()


def test_without_a_directory_blobs_are_refused_and_records_are_not(production):
    """The error says what to do; and a pack leaves the bucket alone."""
    db = production.copy(access="read-only")
    with pytest.raises(ReadOnlyBucketError, match="local-blob-dir") as caught:
        write(db, c=b"refused")
    assert isinstance(caught.value, (ReadOnlyError, PermanentS3Error))
    transaction.abort()
    with db.transaction() as connection:
        connection.root()["plain"] = PersistentMapping()
        del connection.root()["a"]
    db.pack(time.time() + 1)
    with pytest.raises(ReadOnlyError):
        db.storage.sweep()
    with db.transaction() as connection:
        assert read(connection.root()["b"]) == b"other"
    db.close()
    production.check_untouched()


def test_environment_decides_over_the_configuration(production, local, monkeypatch):
    """One file serves all stages; the word is checked where it stands."""
    local = {"local_blob_dir": local["local_blob_dir"]}
    monkeypatch.setenv(ACCESS, "read-only")
    db = production.copy(**local)
    write(db, c=b"of staging")
    db.close()
    production.check_untouched()
    monkeypatch.setenv(ACCESS, "readonly")
    with pytest.raises(ValueError, match=f"{ACCESS}.*read-only"):
        production.copy(**local)
    monkeypatch.setenv(ACCESS, "read-write")
    db = production.open(access="read-only")
    write(db, d=b"of production")
    db.close()
    assert len(snapshot_of(production.location)) == len(production.before) + 1


def test_what_a_copy_has_stored_stays_readable_when_it_may_write_again(production, local, tmp_path):
    """With a bucket of its own, for example: what is in the directory is a source then."""
    db = production.copy(**local)
    write(db, c=b"of staging")
    db.close()
    own = new_bucket(production.original)
    text = "\n".join(
        [
            "%import zodb_s3blobs",
            "<zodb>",
            section(
                own,
                tmp_path / "staging",
                cache="another",
                local_blob_dir=tmp_path / "local",
                addressing=production._addressing,
                base=source_of(production.location) + filestorage_of(tmp_path / "staging"),
            ),
            "</zodb>",
        ]
    )
    with closing(databaseFromString(text)) as db:
        assert read_all(db) == {"a": b"second", "b": b"other", "c": b"of staging"}
        write(db, d=b"in its own bucket")
        append(db, "a", b", changed")
        db.undo(db.undoLog(0, 1)[0]["id"])
        transaction.commit()
        assert read_all(db)["a"] == b"second"
        db.pack(time.time() + 1)
        assert read_all(db)["b"] == b"other"
    assert len(snapshot_of(own)) >= 2
    production.check_untouched()


def source_of(location):
    """Return the text of a <bucket-source>."""
    return "\n".join(
        [
            "<bucket-source>",
            f"bucket-name {location.bucket}",
            f"s3-endpoint-url {location.endpoint_url}",
            f"s3-access-key {location.access_key}",
            f"s3-secret-key {location.secret_key}",
            "s3-addressing-style path",
            "</bucket-source>",
            "",
        ]
    )


def filestorage_of(directory):
    return f"<filestorage>\npath {directory}/Data.fs\n</filestorage>"


def open_with_source(production, own, source, cache="cache2", more=""):
    """Open a copy with a bucket of its own and production's as a source."""
    directory = production.directory.parent / "staging"
    if not directory.exists():
        production.copy(access="read-only").close()
    base = source_of(source) + more + filestorage_of(directory)
    text = section(own, directory, cache=cache, base=base, addressing=production._addressing)
    return databaseFromString(f"%import zodb_s3blobs\n<zodb>\n{text}\n</zodb>")


def test_bucket_source_is_read_lazily(production):
    """Sizes, parts and URLs, too; nothing is copied that nobody reads, and nothing is written."""
    own = new_bucket(production.original)
    db = open_with_source(production, own, production.location)
    with closing(db), db.transaction() as connection:
        blob = connection.root()["a"]
        assert blobs.size(blob) == 6
        with blobs.open_range(blob, 1, 4) as file:
            assert file.read() == b"eco"
        assert read(blob) == b"second"
        assert blobs.presigned_url(blob) is None
    assert snapshot_of(own) == []
    production.check_untouched()


def test_source_that_cannot_be_reached_is_no_missing_blob(production):
    """The error can be retried; what neither has is missing."""
    own = new_bucket(production.original)
    away = replace(production.location, endpoint_url="http://127.0.0.1:9")
    db = open_with_source(production, own, away)
    with closing(db), db.transaction() as connection, pytest.raises(TransientS3Error):
        read(connection.root()["a"])
    empty = new_bucket(production.original)
    db = open_with_source(production, own, empty, cache="cache3")
    with closing(db), db.transaction() as connection, pytest.raises(POSKeyError):
        read(connection.root()["a"])


def test_sources_are_asked_in_their_order(production, tmp_path):
    """Whatever kinds they are."""
    own = new_bucket(production.original)
    FilesystemHelper(str(tmp_path / "old"), "bushy").create()
    more = f"<blobdir-source>\npath {tmp_path}/old\n</blobdir-source>\n"
    db = open_with_source(production, own, production.location, more=more)
    with closing(db):
        assert IBlobStorage.providedBy(db.storage)
        assert read_all(db) == {"a": b"second", "b": b"other"}
    production.check_untouched()


def test_bucket_itself_is_no_source(production):
    """A mistake in the configuration is told while it is read."""
    with pytest.raises(ValueError, match="is the bucket itself"):
        open_with_source(production, production.location, production.location)


def test_relstorage_may_be_a_staging_copy(s3, latency_proxy, tmp_path, local):
    """By record its blobs go to the directory, and references travel with their records."""
    proxy = latency_proxy(s3.endpoint_url)
    location = replace(s3, endpoint_url=proxy.endpoint_url)

    def open_copy(name, **options):
        (tmp_path / name).mkdir(exist_ok=True)
        base = Database("sqlite3", str(tmp_path / name), True).section
        return open_db(
            location, tmp_path, imports=["relstorage"], base=base, cache=f"{name}-cache", **options
        )

    db = open_copy("production")
    write(db, a=b"first")
    db.close()
    shutil.copytree(tmp_path / "production", tmp_path / "staging")
    before = snapshot_of(s3)
    proxy.reset()
    db = open_copy("staging", **local)
    write(db, b=b"of staging")
    append(db, "a", b"!")
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert read_all(db) == {"a": b"first", "b": b"of staging"}
    db.pack(time.time() + 1)
    db.close()
    assert snapshot_of(s3) == before
    assert set(proxy.stats()["methods"]) <= {"GET", "HEAD"}


def test_client_that_only_reads_sends_nothing_else(s3, tmp_path):
    """Neither by its methods nor past them, whoever asks boto3."""
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    make_client(s3).upload_file(str(path), "blobs/1/2.blob")
    client = make_client(s3, read_only=True, create_bucket=True)
    for call in (
        lambda: client.upload_file(str(path), "blobs/1/2.blob"),
        lambda: client.copy_object("blobs/1/2.blob", "blobs/1/3.blob"),
        lambda: client.delete_object("blobs/1/2.blob"),
        lambda: client.delete_objects(["blobs/1/2.blob"]),
        lambda: client.write_small("mark", b"bytes"),
    ):
        with pytest.raises(PermanentS3Error, match="access is read-only"):
            call()
    with closing(make_client(replace(s3, bucket="missing-bucket"), read_only=True)) as missing:
        assert missing.is_read_only
        with pytest.raises(PermanentS3Error):
            list(missing.list_objects(""))
    assert [*client.list_objects("")] == ["blobs/1/2.blob"]


def test_spool_of_this_host_is_read_and_left_alone(s3, tmp_path):
    """What was committed in an outage is no missing blob, and nobody uploads it from here."""
    down = replace(s3, endpoint_url=refused_endpoint())
    options = {"spool_dir": tmp_path / "spool", "s3_max_attempts": 1}
    db = open_db(down, tmp_path, on_upload_failure="spool", **options)
    write(db, a=b"spooled")
    db.close()
    before = files(tmp_path / "spool")
    db = open_db(down, tmp_path, access="read-only", cache="empty", **options)
    assert read_all(db) == {"a": b"spooled"}
    db.storage.drain_spool()
    db.close()
    assert files(tmp_path / "spool") == before
