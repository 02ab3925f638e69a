"""An old blob directory is read, whatever its layout, and never written."""

import os

import pytest
from ZODB.blob import FilesystemHelper
from zope.interface.verify import verifyObject

from zodb_s3blobs.interfaces import IBlobSource
from zodb_s3blobs.sources import BlobDirSource


OID = (0x1234).to_bytes(8, "big")
TID = (0x3E0F00D).to_bytes(8, "big")
OTHER = (0x3E0F00E).to_bytes(8, "big")


def blob_directory(path, layout, data=b"old bytes"):
    """Make a blob directory as ZODB does, with one blob."""
    files = FilesystemHelper(str(path), layout)
    files.create()
    files.getPathForOID(OID, create=True)
    with open(files.getBlobFilename(OID, TID), "wb") as file:
        file.write(data)
    return str(path)


def contents(path):
    """Return all names below a directory."""
    found = [os.path.join(top, name) for top, dirs, names in os.walk(path) for name in dirs + names]
    return sorted(found)


@pytest.mark.parametrize("stored", ["bushy", "lawn"])
@pytest.mark.parametrize("explicit", [False, True])
def test_blob_is_copied_and_the_directory_unchanged(tmp_path, stored, explicit):
    """The layout is found by its marker, or named."""
    path = blob_directory(tmp_path / "blobs", stored)
    before = contents(path)
    source = BlobDirSource(path, stored) if explicit else BlobDirSource(path)
    verifyObject(IBlobSource, source)
    target = tmp_path / "target"
    assert source.fetch(OID, TID, str(target)) is True
    assert target.read_bytes() == b"old bytes"
    assert contents(path) == before
    source.close()


def test_absent_blob_is_not_an_error(tmp_path):
    """The next source is asked; nothing is made at the target."""
    source = BlobDirSource(blob_directory(tmp_path / "blobs", "bushy"))
    target = tmp_path / "target"
    assert source.fetch(OID, OTHER, str(target)) is False
    assert source.fetch(TID, TID, str(target)) is False
    assert not target.exists()


def test_unreadable_blob_is_an_error_and_not_absent(tmp_path):
    """A wrong permission must not look like lost data."""
    path = blob_directory(tmp_path / "blobs", "lawn")
    os.chmod(FilesystemHelper(path).getBlobFilename(OID, TID), 0)
    with pytest.raises(PermissionError):
        BlobDirSource(path).fetch(OID, TID, str(tmp_path / "target"))


def test_target_that_cannot_be_written_is_an_error_and_not_an_absent_blob(tmp_path):
    """Returning False would turn a full or vanished cache into a POSKeyError."""
    source = BlobDirSource(blob_directory(tmp_path / "blobs", "lawn"))
    with pytest.raises(OSError):
        source.fetch(OID, TID, str(tmp_path / "nowhere" / "target"))


def test_vanished_directory_is_an_error_and_not_an_absent_blob(tmp_path):
    """An unmounted file system must not look like lost data."""
    path = blob_directory(tmp_path / "blobs", "lawn")
    source = BlobDirSource(path)
    os.rename(path, tmp_path / "elsewhere")
    with pytest.raises(OSError):
        source.fetch(OID, TID, str(tmp_path / "target"))


def test_missing_directory_is_refused(tmp_path):
    """A mistyped path does not silently lose all old blobs."""
    with pytest.raises(ValueError, match="no blob directory"):
        BlobDirSource(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_layout_that_contradicts_the_marker_is_refused(tmp_path):
    """Otherwise no file would be where it is looked for, and each old blob seem lost."""
    path = blob_directory(tmp_path / "blobs", "bushy")
    with pytest.raises(ValueError, match="layout"):
        BlobDirSource(path, "lawn")
