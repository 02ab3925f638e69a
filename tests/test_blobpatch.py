"""The patch: no blob is emptied by an open that failed, nor cut by a disk that was nearly full."""

import io
import os
import subprocess
import sys

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.blob import BlobFile
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import BlobError

from zodb_s3blobs import blobpatch
from zodb_s3blobs.interfaces import TransientS3Error

from .storages import Failure
from .storages import make_storage
from .storages import read


STOCK = """
import os, sys, tempfile, transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

directory, mode = sys.argv[1:]
db = DB(FileStorage(directory + "/Data.fs", blob_dir=directory + "/blobs"))
conn = db.open()
blob = conn.root()["blob"] = Blob(b"precious")
transaction.commit()
with blob.open() as file:
    assert file.read() == b"precious"
path = blob.committed()
os.rename(path, path + ".away")
try:
    blob.open(mode)
except FileNotFoundError:
    pass
transaction.abort()
os.rename(path + ".away", path)
# What any page does that renders the blob, and then something that touches it
blob._p_changed = True
transaction.commit()
with blob.open() as file:
    print(file.read())
assert not any(name.startswith("zodb_s3blobs") for name in sys.modules)
"""


class Site:
    """A committed blob that is loaded, so that it remembers the path of its file."""

    def __init__(self, location, directory):
        self.storage, self.client = make_storage(location, directory)
        self.manager = transaction.TransactionManager()
        self.conn = DB(self.storage).open(self.manager)
        self.blob = self.conn.root()["blob"] = Blob(b"precious")
        self.conn.root()["other"] = Blob(b"other")
        self.manager.commit()
        self.blob._p_activate()

    def evict(self):
        """Remove the file, as the cache or its user may do at any time."""
        os.remove(self.storage.fshelper.getBlobFilename(self.blob._p_oid, self.blob._p_serial))

    def bytes_of_others(self):
        """The blob's bytes as another connection sees them."""
        with self.conn.db().transaction() as conn:
            return read(conn.root()["blob"])

    def close(self):
        self.manager.abort()
        self.conn.close()
        self.conn.db().close()


@pytest.fixture
def site(s3, tmp_path):
    site = Site(s3, tmp_path)
    yield site
    site.close()


@pytest.mark.parametrize("mode", ["r+", "a"])
def test_stock_zodb_empties_a_blob_whose_file_was_missing(tmp_path, mode):
    """Why the patch is there. When this fails, ZODB has mended it and the patch can go."""
    found = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path), mode],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert found.stdout == "b''\n"


@pytest.mark.parametrize("mode", ["r+", "a"])
class TestMissingFile:
    def test_evicted_file_is_fetched_again(self, site, mode):
        """Writing to a blob whose file is gone begins with its committed bytes."""
        site.evict()
        with site.blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b", changed")
        site.manager.commit()
        assert site.bytes_of_others() == b"precious, changed"

    def test_failed_open_and_abort_leave_the_blob_as_it_was(self, site, mode):
        """S3 is down, the file is gone: the error is all that happens."""
        site.evict()
        site.client.before["download_file"] = Failure()
        with pytest.raises(TransientS3Error):
            site.blob.open(mode)
        site.manager.abort()
        site.client.before.clear()
        site.manager.begin()
        assert read(site.blob) == b"precious"
        site.manager.commit()
        assert site.bytes_of_others() == b"precious"

    def test_failed_open_and_a_commit_of_something_else_leave_it_too(self, site, mode):
        """The error is caught, and the request goes on to change other things."""
        site.evict()
        site.client.before["download_file"] = Failure()
        with pytest.raises(TransientS3Error):
            site.blob.open(mode)
        with site.conn.root()["other"].open("w") as file:
            file.write(b"changed")
        site.manager.commit()
        site.client.before.clear()
        site.manager.begin()
        assert read(site.blob) == b"precious"
        site.blob._p_changed = True
        site.manager.commit()
        assert read(site.blob) == b"precious"
        assert site.bytes_of_others() == b"precious"

    def test_second_attempt_in_the_same_transaction_works(self, site, mode):
        """The failure leaves nothing behind that the next open could take for a working copy."""
        site.evict()
        site.client.before["download_file"] = Failure(times=1)
        with pytest.raises(TransientS3Error):
            site.blob.open(mode)
        with site.blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        site.manager.commit()
        assert site.bytes_of_others() == b"precious!"

    def test_eviction_just_before_the_copy_is_met_by_another_attempt(self, site, mode, monkeypatch):
        """The file that was just fetched may go again before it is opened."""
        load_blob, evictions = site.conn._storage.loadBlob, []

        def load_and_evict(oid, serial):
            path = load_blob(oid, serial)
            if len(evictions) < 3:
                evictions.append(os.remove(path))
            return path

        monkeypatch.setattr(site.conn._storage, "loadBlob", load_and_evict)
        with site.blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        monkeypatch.undo()
        site.manager.commit()
        assert len(evictions) == 3
        assert site.bytes_of_others() == b"precious!"

    def test_file_that_never_stays_ends_in_an_error_without_a_working_copy(
        self, site, mode, monkeypatch
    ):
        """Attempts are bounded, and the last failure empties nothing either."""
        load_blob = site.conn._storage.loadBlob

        def load_and_evict(oid, serial):
            path = load_blob(oid, serial)
            os.remove(path)
            return path

        with monkeypatch.context() as patch:
            patch.setattr(site.conn._storage, "loadBlob", load_and_evict)
            with pytest.raises(FileNotFoundError):
                site.blob.open(mode)
        site.blob._p_changed = True
        site.manager.commit()
        assert site.bytes_of_others() == b"precious"
        assert [
            name for name in os.listdir(site.storage.temporaryDirectory()) if "BUC" in name
        ] == []

    def test_ghost_is_loaded_first(self, site, mode):
        """A blob nobody has touched yet knows no path: it is asked for before the open."""
        site.blob._p_deactivate()
        site.evict()
        site.client.before["download_file"] = Failure(times=1)
        with pytest.raises(TransientS3Error):
            site.blob.open(mode)
        with site.blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        site.manager.commit()
        assert site.bytes_of_others() == b"precious!"

    def test_savepoint_between_failure_and_commit_empties_nothing(self, site, mode):
        """A savepoint takes up what is changed: the failed open is not."""
        site.evict()
        site.client.before["download_file"] = Failure(times=1)
        with pytest.raises(TransientS3Error):
            site.blob.open(mode)
        site.blob._p_changed = True
        site.manager.savepoint()
        site.manager.commit()
        assert site.bytes_of_others() == b"precious"

    def test_blob_changed_in_a_savepoint_goes_on_from_there(self, site, mode):
        """The savepoint's bytes, not the committed ones, are the base of the next change."""
        with site.blob.open("w") as file:
            file.write(b"saved")
        site.manager.savepoint()
        site.client.before["download_file"] = Failure()
        with site.blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        site.manager.commit()
        site.client.before.clear()
        assert site.bytes_of_others() == b"saved!"

    def test_untouched_blob_after_a_savepoint_of_another_is_fetched(self, site, mode):
        """Under a savepoint the connection's storage is a temporary one, which asks ours."""
        with site.conn.root()["other"].open("w") as file:
            file.write(b"saved")
        site.manager.savepoint()
        site.evict()
        with site.blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        site.manager.commit()
        assert site.bytes_of_others() == b"precious!"

    def test_blob_of_an_ordinary_filestorage_works_as_before(self, tmp_path, mode):
        """The patch is in force for the whole process, and harms no other storage."""
        blobpatch.install()
        db = DB(FileStorage(f"{tmp_path}/Plain.fs", blob_dir=f"{tmp_path}/plain"))
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        fresh = Blob()
        with fresh.open(mode) as file:  # of no database
            file.write(b"plain")
        conn.root()["blob"] = blob = fresh
        manager.commit()
        with blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        manager.savepoint()
        with blob.open(mode) as file:
            file.seek(0, os.SEEK_END)
            file.write(b"!")
        with pytest.raises(BlobError), blob.open():
            blob.open(mode)
        manager.commit()
        assert read(blob) == b"plain!!"
        os.remove(blob.committed())
        with pytest.raises(KeyError):
            blob.open(mode)
        manager.abort()
        conn.close()
        db.close()


class TestOtherModes:
    @pytest.mark.parametrize("ghost", [True, False])
    def test_failing_open_to_read_empties_nothing(self, site, ghost):
        """While S3 is down it fails, and later commits keep the bytes."""
        site.evict()
        site.client.before["download_file"] = Failure(times=1)
        if ghost:
            site.blob._p_deactivate()
        with pytest.raises(TransientS3Error):
            site.blob.open()
        site.blob._p_changed = True
        site.manager.commit()
        site.client.before.clear()
        assert site.bytes_of_others() == b"precious"

    def test_failing_consume_empties_nothing(self, site, tmp_path):
        """consumeFile of a file that is not there leaves the blob as it was."""
        site.evict()
        with pytest.raises(OSError):
            site.blob.consumeFile(f"{tmp_path}/none")
        site.blob._p_changed = True
        site.manager.commit()
        assert site.bytes_of_others() == b"precious"

    def test_invalid_mode_is_refused_as_before(self, site):
        """Other modes are stock ZODB's business."""
        with pytest.raises(ValueError, match="invalid mode"):
            site.blob.open("x")


SHORT = """
import resource, sys
from ZODB.blob import BlobFile
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
if sys.argv[2] == "ours":
    from zodb_s3blobs.blobpatch import install
    install()
file = BlobFile(sys.argv[1], "w", None)
try:
    print(file.write(b"x" * 3000))
except OSError as error:
    print(type(error).__name__, error.errno)
"""


@pytest.mark.parametrize(("whose", "answer"), [("stock", "1000"), ("ours", "OSError 27")])
def test_write_that_does_not_fit_is_an_error(tmp_path, whose, answer):
    """Stock ZODB writes a part and returns its size; here a limit stands for a full disk."""
    # It writes no bytecode, which would be cut off, too, and be everyone's.
    run = [sys.executable, "-B", "-c", SHORT, tmp_path / "file", whose]
    assert subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip() == answer


@pytest.mark.parametrize(
    ("data", "size"), [(b"", 0), (b"bytes", 5), (bytearray(b"array"), 5), (memoryview(b"view"), 4)]
)
def test_write_returns_what_it_has_written(tmp_path, data, size):
    """Of whatever has bytes."""
    blobpatch.install()
    with BlobFile(str(tmp_path / "file"), "w", Blob()) as file:
        assert file.write(data) == size
        file.writelines([b"line\n", b"line\n"])
    assert (tmp_path / "file").read_bytes() == bytes(data) + b"line\nline\n"


def test_write_to_a_closed_file_or_one_for_reading_is_refused_as_before(tmp_path):
    """Also of nothing."""
    blobpatch.install()
    (tmp_path / "file").write_bytes(b"bytes")
    file = BlobFile(str(tmp_path / "file"), "r", Blob())
    with pytest.raises(io.UnsupportedOperation):
        file.write(b"")
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.write(b"")


def test_text_is_refused_as_before(tmp_path):
    """With a TypeError."""
    blobpatch.install()
    with BlobFile(str(tmp_path / "file"), "w", Blob()) as file, pytest.raises(TypeError):
        file.write("text")


def test_committed_of_a_new_blob_is_refused_as_before():
    """There is no committed file yet, and then there are changes."""
    blobpatch.install()
    with pytest.raises(BlobError, match="Uncommitted changes"):
        Blob(b"new").committed()


def test_installing_again_changes_nothing():
    """One wrapper, however many storages are opened."""
    blobpatch.install()
    once = Blob.open
    blobpatch.install()
    assert Blob.open is once
