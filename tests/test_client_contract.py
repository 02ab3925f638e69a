"""What `IS3Client` promises: by the real client, by those before a directory, and by fakes."""

from contextlib import nullcontext

import pytest
from zope.interface.verify import verifyObject

from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import IS3Client
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.localbucket import LocalBucket
from zodb_s3blobs.localbucket import Overlay
from zodb_s3blobs.s3body import metadata_of
from zodb_s3blobs.sections import Section

from .services.location import new_bucket
from .storages import make_client
from .storages import random_bytes
from .test_commit_machine import Bucket
from .test_commit_machine import MemoryClient
from .test_spool import DirectoryBucket


def real(tmp_path, request):
    return make_client(request.getfixturevalue("s3"))


def local(tmp_path, request):
    return LocalBucket(str(tmp_path / "objects"))


def overlay(tmp_path, request):
    remote = make_client(new_bucket(request.getfixturevalue("rclone")), read_only=True)
    return Overlay(LocalBucket(str(tmp_path / "objects")), remote)


def memory(tmp_path, request):
    return MemoryClient(Bucket(), page=3)


@pytest.fixture(params=[real, local, overlay, memory])
def client(request, tmp_path):
    client = request.param(tmp_path, request)
    yield client
    client.close()


@pytest.fixture
def upload(client, tmp_path):
    """Return a function that stores bytes under a key."""
    return _uploader(client, tmp_path)


def _uploader(client, tmp_path):
    def upload(key, data):
        path = tmp_path / "upload.tmp"
        path.write_bytes(data)
        client.upload_file(str(path), key)

    return upload


def download(client, key, tmp_path):
    path = tmp_path / "download.tmp"
    path.unlink(missing_ok=True)
    client.download_file(key, str(path))
    return path.read_bytes()


def test_client_has_all_that_is_promised(client):
    """Names and arguments are those of the interface."""
    assert verifyObject(IS3Client, client)
    assert client.is_read_only is False
    assert client.is_down is False


@pytest.mark.parametrize("size", [0, 1, 1000, 3_000_000])
def test_bytes_come_back(client, upload, tmp_path, size):
    """Of any size, whole; and the size is told without them."""
    data = random_bytes(size, size)
    upload("blobs/1/2.blob", data)
    assert download(client, "blobs/1/2.blob", tmp_path) == data
    assert client.object_size("blobs/1/2.blob") == size
    assert client.head_object("blobs/1/2.blob")["ContentLength"] == size


def test_second_upload_replaces_the_first(client, upload, tmp_path):
    """The last one counts."""
    upload("blobs/1/2.blob", b"first")
    upload("blobs/1/2.blob", b"second one")
    assert download(client, "blobs/1/2.blob", tmp_path) == b"second one"


def test_missing_object_is_told_from_all_else(client, upload, tmp_path):
    """By the error that says so, with its key; or by None."""
    upload("blobs/1/2.blob", b"another")
    key = "blobs/1/3.blob"
    for call in (
        lambda: download(client, key, tmp_path),
        lambda: client.object_size(key),
        lambda: client.verify_file(key, __file__),
        lambda: client.open_range(key).read(1),
        lambda: client.copy_object(key, "blobs/1/4.blob"),
    ):
        with pytest.raises(MissingObjectError) as caught:
            call()
        assert caught.value.key == key
    assert client.head_object(key) is None
    assert list(client.list_objects("blobs/")) == ["blobs/1/2.blob"]


def test_file_with_other_bytes_is_told(client, upload, tmp_path):
    """Longer, shorter, or as long."""
    upload("blobs/1/2.blob", b"right")
    path = tmp_path / "file"
    path.write_bytes(b"right")
    client.verify_file("blobs/1/2.blob", str(path))
    for wrong in (b"wrong", b"righ", b"right!", b""):
        path.write_bytes(wrong)
        with pytest.raises(IntegrityError):
            client.verify_file("blobs/1/2.blob", str(path))


def test_copy_is_an_object_of_its_own(client, upload, tmp_path):
    """It stays when the other goes."""
    upload("blobs/1/2.blob", b"bytes")
    client.copy_object("blobs/1/2.blob", "blobs/1/3.blob")
    client.delete_object("blobs/1/2.blob")
    assert download(client, "blobs/1/3.blob", tmp_path) == b"bytes"
    assert client.head_object("blobs/1/2.blob") is None


def test_deleting_what_is_not_there_succeeds(client, upload):
    """One or many; what is there goes, and nothing is refused."""
    for number in range(5):
        upload(f"blobs/1/{number}.blob", b"bytes")
    client.delete_object("blobs/2/1.blob")
    keys = [f"blobs/1/{number}.blob" for number in (1, 3, 7)]
    assert client.delete_objects(keys) == {}
    assert client.delete_objects([]) == {}
    assert [*client.list_objects("")] == [f"blobs/1/{number}.blob" for number in (0, 2, 4)]


def test_listing_is_sorted_and_begins_behind_a_key(client, upload):
    """In pages, each with sizes and ages; only what begins with the prefix."""
    keys = [f"blobs/{oid}/{number}.blob" for oid in ("1", "10", "2") for number in range(3)]
    for key in reversed(keys):
        upload(key, key.encode())
    upload("other", b"other")
    pages = [*client.list_pages("blobs/")]
    assert all(pages)
    listed = [each for page in pages for each in page]
    assert [each.key for each in listed] == keys
    assert [each.size for each in listed] == [len(key) for key in keys]
    assert all(0 <= each.age < 3600 for each in listed)
    behind = [each.key for page in client.list_pages("blobs/", keys[4]) for each in page]
    assert behind == keys[5:]
    assert [*client.list_objects("blobs/10/")] == keys[3:6]
    assert [*client.list_pages("nothing")] == []


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (0, 5), (3, 7), (5, None), (8, 100), (10, None), (50, 60)]
)
def test_range_is_a_file_of_these_bytes(client, upload, start, stop):
    """What goes beyond the end is left out; one can move in it."""
    upload("blobs/1/2.blob", b"0123456789")
    with client.open_range("blobs/1/2.blob", start, stop, nullcontext) as section:
        assert isinstance(section, Section)
        expected = b"0123456789"[start:stop]
        assert section.readall() == expected
        section.seek(1)
        assert section.readall() == expected[1:]


def test_range_without_a_byte_is_refused(client, upload):
    """Nobody asks for that."""
    upload("blobs/1/2.blob", b"0123456789")
    for start, stop in [(0, 0), (5, 5), (7, 3)]:
        with pytest.raises(ValueError):
            client.open_range("blobs/1/2.blob", start, stop)


def test_url_is_given_where_it_is_said(client, upload):
    """None where others cannot read the objects."""
    upload("blobs/1/2.blob", b"bytes")
    url = client.presigned_url("blobs/1/2.blob")
    assert url is None or (client.signs_urls and url.startswith("http"))
    assert client.signs_urls or url is None


def test_client_may_be_closed_and_used_again(client, upload, tmp_path):
    """A later call opens what it needs."""
    upload("blobs/1/2.blob", b"bytes")
    client.close()
    assert download(client, "blobs/1/2.blob", tmp_path) == b"bytes"


# Those that know a few methods only


def test_bucket_of_the_spool_s_tests_does_what_it_stands_for(tmp_path, s3):
    """The same calls have the same outcome as with the real one."""
    path = tmp_path / "upload.tmp"
    path.write_bytes(b"bytes")
    heads = []
    for client in (DirectoryBucket(tmp_path / "bucket"), make_client(s3)):
        assert client.head_object("blobs/1/2.blob") is None
        client.upload_file(str(path), "blobs/1/2.blob")
        head = client.head_object("blobs/1/2.blob")
        heads.append((head["ContentLength"], metadata_of(head)["zodb-sha256"]))
        with pytest.raises(FileNotFoundError):
            client.upload_file(str(tmp_path / "missing"), "blobs/1/3.blob")
    assert heads[0] == heads[1]


# A directory before a bucket


@pytest.fixture
def layers(s3, tmp_path):
    """Return (an `Overlay`, a client that writes to the bucket behind it)."""
    remote = make_client(s3, read_only=True)
    return Overlay(LocalBucket(str(tmp_path / "objects")), remote), make_client(s3)


def test_what_is_behind_is_read_and_never_changed(layers, tmp_path):
    """Objects of the bucket are there for all who read, and not for who lists or deletes."""
    client, behind = layers
    _uploader(behind, tmp_path)("blobs/1/2.blob", b"behind")
    assert download(client, "blobs/1/2.blob", tmp_path) == b"behind"
    assert client.object_size("blobs/1/2.blob") == 6
    assert client.presigned_url("blobs/1/2.blob").startswith("http")
    assert [*client.list_objects("")] == []
    client.delete_object("blobs/1/2.blob")
    client.delete_objects(["blobs/1/2.blob"])
    client.copy_object("blobs/1/2.blob", "blobs/1/3.blob")
    _uploader(client, tmp_path)("blobs/1/2.blob", b"in front")
    assert download(client, "blobs/1/3.blob", tmp_path) == b"behind"
    assert download(client, "blobs/1/2.blob", tmp_path) == b"in front"
    assert client.presigned_url("blobs/1/2.blob") is None
    assert [*client.list_objects("")] == ["blobs/1/2.blob", "blobs/1/3.blob"]
    assert [*behind.list_objects("")] == ["blobs/1/2.blob"]
    assert download(behind, "blobs/1/2.blob", tmp_path) == b"behind"


def test_directory_has_no_file_that_is_not_whole(tmp_path, monkeypatch):
    """A copy that fails leaves nothing, and what was there before stays."""
    client = LocalBucket(str(tmp_path / "objects"))
    _uploader(client, tmp_path)("blobs/1/2.blob", b"right")
    missing = str(tmp_path / "missing")
    with pytest.raises(FileNotFoundError):
        client.upload_file(missing, "blobs/1/2.blob")
    assert [path.name for path in (tmp_path / "objects").rglob("*.*")] == ["2.blob"]
    assert download(client, "blobs/1/2.blob", tmp_path) == b"right"


@pytest.mark.parametrize("key", ["../outside", "blobs/../../outside", "/etc/passwd", "a.tmp"])
def test_directory_is_not_left(tmp_path, key):
    """Whatever a key says."""
    client = LocalBucket(str(tmp_path / "objects"))
    with pytest.raises(ValueError, match="is no key"):
        client.upload_file(__file__, key)
