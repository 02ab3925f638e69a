"""Storages over an embedded S3 are apart from each other, and leave nothing behind."""

from contextlib import closing
import os

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.blob import BlobStorage
from ZODB.DB import DB
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError

from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.testing.database import open_database
from zodb_s3blobs.testing.database import open_storage
from zodb_s3blobs.testing.database import stack_s3blobs
from zodb_s3blobs.testing.server import EmbeddedS3


@pytest.fixture
def server(rclone):
    """The `EmbeddedS3`, which has neither objects nor files of caches after the test."""
    before = rclone.keys(), files_of(rclone)
    yield rclone
    assert (rclone.keys(), files_of(rclone)) == before


def files_of(server):
    return sorted(os.listdir(server.directory))


@pytest.fixture
def below(tmp_path):
    """A database without S3, with a blob."""
    with closing(DB(BlobStorage(str(tmp_path / "below"), MappingStorage()))) as database:
        write(database, below=b"of the database below")
        yield database


def write(database, **blobs):
    """Commit blobs, or new bytes of those that are there, under their names."""
    with database.transaction() as connection:
        for name, data in blobs.items():
            with connection.root().setdefault(name, Blob()).open("w") as file:
                file.write(data)


def read(database):
    """Return the bytes of all blobs by name."""
    found = {}
    with database.transaction() as connection:
        for name, blob in connection.root().items():
            with blob.open() as file:
                found[name] = file.read()
    return found


def test_blobs_are_objects_until_the_database_is_closed(server):
    """By default it is a MappingStorage inside."""
    with open_database(server) as database:
        assert isinstance(database.storage, S3BlobStorage)
        write(database, one=b"1", two=b"2")
        assert read(database) == {"one": b"1", "two": b"2"}
        assert len(server.keys()) == 2
    assert server.keys() == []


def test_databases_are_apart(server):
    """A pack of one leaves the blobs of the other, though they are in one bucket."""
    with open_database(server) as first, open_database(server) as second:
        write(first, blob=b"first")
        write(second, blob=b"second")
        write(second, blob=b"second again")
        second.pack()
        assert len(server.keys()) == 2
        assert read(first) == {"blob": b"first"}
        assert read(second) == {"blob": b"second again"}


def test_objects_under_a_given_prefix_stay(server, tmp_path):
    """A database can be closed and opened again, with an empty cache."""
    path = str(tmp_path / "Data.fs")
    with open_database(server, FileStorage(path), "main") as database:
        write(database, blob=b"bytes")
    assert len(server.keys("main/blobs/")) == 1
    with open_database(server, FileStorage(path), "main") as database:
        assert read(database) == {"blob": b"bytes"}
    server.discard("main")


def test_storage_is_closed_when_a_test_fails(server):
    """The error is passed on."""
    with pytest.raises(ZeroDivisionError), open_database(server) as database:
        storage = database.storage
        write(database, blob=b"")
        raise ZeroDivisionError
    assert not storage.is_open


def test_base_that_cannot_be_wrapped_is_closed(server, tmp_path):
    """The caller has handed it over."""
    base = BlobStorage(str(tmp_path / "blobs"), FileStorage(str(tmp_path / "Data.fs")))
    with pytest.raises(ValueError, match="blob directory of its own"), open_storage(server, base):
        pass
    FileStorage(str(tmp_path / "Data.fs")).close()  # its lock is free


def test_options_are_the_storage_s(server, tmp_path):
    """Whatever S3BlobStorage takes can be given."""
    with open_storage(server, temp_dir=tmp_path / "uncommitted") as storage:
        assert storage.temporaryDirectory() == str(tmp_path / "uncommitted")


def test_stacked_database_reads_what_is_below_and_does_not_change_it(server, below):
    """Its own blobs are objects, uncommitted ones too when the time comes."""
    with closing(stack_s3blobs(below, "top", server)) as database:
        assert database.storage.getName() == "top"
        write(database, above=b"above")
        assert read(database) == {"below": b"of the database below", "above": b"above"}
        assert len(server.keys()) == 1
        with database.transaction() as connection:
            with connection.root()["below"].open("a") as file:
                file.write(b", changed")
            transaction.savepoint()
            assert connection.root()["below"].open().read() == b"of the database below, changed"
        assert read(database)["below"] == b"of the database below, changed"
    assert server.keys() == []
    assert read(below) == {"below": b"of the database below"}


def test_stack_of_stacks(server):
    """Each level sees its own and what is below, in any order of stacking and closing."""
    with closing(stack_s3blobs(server=server)) as bottom:
        write(bottom, bottom=b"bottom")
        with closing(stack_s3blobs(bottom, server=server)) as middle:
            write(middle, middle=b"middle")
            for number in (b"1", b"2"):
                with closing(stack_s3blobs(middle, server=server)) as top:
                    assert read(top) == {"bottom": b"bottom", "middle": b"middle"}
                    write(top, top=number, bottom=number)
                    assert read(top) == {"bottom": number, "middle": b"middle", "top": number}
            assert read(middle) == {"bottom": b"bottom", "middle": b"middle"}
        assert read(bottom) == {"bottom": b"bottom"}


def test_blobs_below_cost_no_request(server, below, tmp_path):
    """They are read while no S3 is there."""
    stopped = EmbeddedS3(tmp_path / "stopped")
    with stopped:
        pass
    with closing(stack_s3blobs(below, server=stopped)) as database:
        assert read(database) == {"below": b"of the database below"}


def test_blob_that_is_nowhere_is_missing(server, below):
    """The database below need not have blobs at all."""
    for database in (below, DB(MappingStorage())):
        with closing(stack_s3blobs(database, server=server)) as stacked:
            for method in (stacked.storage.loadBlob, stacked.storage.openCommittedBlobFile):
                with pytest.raises(POSKeyError):
                    method(b"\0" * 7 + b"\7", b"\0" * 7 + b"\7")


def test_demo_storage_on_top_does_not_close_it(server):
    """plone.testing's own closes the storage below with each test, and goes on using it."""
    with closing(stack_s3blobs(server=server)) as database:
        write(database, one=b"1")
        DB(DemoStorage(base=database.storage)).close()
        write(database, two=b"2")
        assert read(database) == {"one": b"1", "two": b"2"}


def test_closing_again_changes_nothing(server, below):
    """As of any database."""
    database = stack_s3blobs(below, server=server)
    database.close()
    database.close()
    assert read(below)


@pytest.mark.parametrize("stacked", [True, False])
def test_pack_removes_earlier_revisions_only(server, below, stacked):
    """What only the database below refers to stays."""
    with closing(stack_s3blobs(below if stacked else None, server=server)) as database:
        write(database, below=b"changed")
        write(database, below=b"changed again")
        assert len(server.keys()) == 2
        with pytest.raises(TypeError, match="Garbage collection"):
            database.storage.pack(0, database.references, gc=True)
        database.pack()
        assert read(database) == {"below": b"changed again"}
        assert len(server.keys()) == 1


def test_failure_to_stack_leaves_nothing(server):
    """The fixture looks at the server's directory."""
    closed = DB(MappingStorage())
    closed.close()
    with pytest.raises(AttributeError):
        stack_s3blobs(closed, server=server)
