"""The size and parts of a blob are told wherever it is, and without a download of the rest."""

import dataclasses
import io
import os
import shutil
import time

import pytest
from ZODB.blob import FilesystemHelper
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.sources import BlobDirSource
from zodb_s3blobs.storage import S3BlobStorage

from .caches import put
from .faults import refused_endpoint
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import HookedClient
from .storages import leftovers
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_relstorage
from .storages import store_blob
from .storages import write_file


OID, OTHER = p64(1), p64(2)
DATA = b"0123456789"
BASES = ["FileStorage", "MappingStorage", "history", "no history"]


@pytest.fixture
def opened(s3, tmp_path):
    """Return a function that opens a storage with an empty cache, and its `HookedClient`."""
    storages = []

    def opened(kind="FileStorage", location=s3, cache=None, **options):
        for storage in storages:
            storage.close()
        base = None
        if kind == "MappingStorage":
            base = MappingStorage()
        elif kind != "FileStorage":
            base = open_relstorage(tmp_path, keep_history=kind == "history")
        cache = cache or f"cache{len(storages)}"
        storage, client = make_storage(location, tmp_path, cache, base=base, **options)
        storages.append(storage)
        return storage, client

    yield opened
    storages[-1].close()


def path_of(storage, tid, oid=OID):
    """Return where the cache has a blob, or would have it."""
    return storage.fshelper.getBlobFilename(oid, tid)


def forget(storage, client, tid, oid=OID):
    """Let a blob be no longer cached, and the client's calls be forgotten."""
    os.remove(path_of(storage, tid, oid))
    client.calls.clear()


def read(storage, tid, *bounds, oid=OID):
    """Return the bytes of a part of a blob."""
    with storage.open_blob_range(oid, tid, *bounds) as file:
        return file.read()


def part(*bounds):
    """Return what a part of DATA has."""
    return DATA[slice(*bounds)] if len(bounds) == 2 else DATA[bounds[0] :] if bounds else DATA


BOUNDS = [(), (0,), (3,), (0, 4), (3, 7), (3, 100), (10,), (50, 60), (5, 5), (0, 0), (7, 3)]


# Where it is


@pytest.mark.parametrize("kind", BASES)
def test_cached_blob_asks_nobody(opened, kind):
    """Its file tells everything, though S3 is down."""
    storage, client = opened(kind)
    tid = commit_blob(storage, OID, DATA)
    client.calls.clear()
    assert storage.blob_size(OID, tid) == 10
    for bounds in BOUNDS:
        assert read(storage, tid, *bounds) == part(*bounds)
    assert client.calls == []


@pytest.mark.parametrize("kind", BASES)
def test_size_of_what_is_not_cached_takes_one_head(opened, kind):
    """Once; it is remembered, and nothing comes into the cache."""
    storage, client = opened(kind)
    tid = commit_blob(storage, OID, DATA)
    forget(storage, client, tid)
    key = blob_key(OID, read_reference(storage.loadSerial(OID, tid)) or tid)
    for _ in range(3):
        assert storage.blob_size(OID, tid) == 10
    assert client.calls == [("object_size", key)]
    assert not os.path.exists(path_of(storage, tid))


@pytest.mark.parametrize("kind", BASES)
def test_part_of_what_is_not_cached_takes_one_get(opened, kind):
    """Each time, for the cache has whole files only."""
    storage, client = opened(kind)
    tid = commit_blob(storage, OID, DATA)
    forget(storage, client, tid)
    key = blob_key(OID, read_reference(storage.loadSerial(OID, tid)) or tid)
    before = storage.stats()
    assert read(storage, tid, 3, 7) == b"3456"
    assert read(storage, tid, 8) == b"89"
    assert client.calls == [("open_range", key)] * 2
    assert not os.path.exists(path_of(storage, tid))
    assert leftovers(storage) == []
    after = storage.stats()
    assert after["requests_total"] - before["requests_total"] == 2
    assert after["downloaded_bytes_total"] - before["downloaded_bytes_total"] == 6
    assert load(storage, OID, tid) == DATA
    assert client.count("download_file") == 1


@pytest.mark.parametrize("bounds", BOUNDS)
def test_parts_are_the_same_whether_cached_or_not(opened, bounds):
    """A file whose positions begin with 0, in which one can move."""
    storage, client = opened()
    tid = commit_blob(storage, OID, DATA)
    cached = storage.open_blob_range(OID, tid, *bounds)
    forget(storage, client, tid)
    for file in (cached, storage.open_blob_range(OID, tid, *bounds)):
        with file:
            assert isinstance(file, io.BufferedReader)
            assert file.tell() == 0
            assert file.read() == part(*bounds)
            assert file.seek(0, io.SEEK_END) == len(part(*bounds))
            file.seek(0)
            assert file.read(2) == part(*bounds)[:2]
        assert file.closed


@pytest.mark.parametrize("cached", [True, False])
def test_empty_blob_has_no_bytes(opened, cached):
    """It is not taken for one that is missing."""
    storage, client = opened()
    tid = commit_blob(storage, OID, b"")
    if not cached:
        forget(storage, client, tid)
    assert storage.blob_size(OID, tid) == 0
    for bounds in ((), (0, 5), (3,), (0, 0)):
        assert read(storage, tid, *bounds) == b""


def test_large_blob_comes_in_pieces(opened):
    """Some lines, and the rest at once."""
    storage, client = opened()
    data = b"".join(b"%d\n" % number for number in range(100_000))
    tid = commit_blob(storage, OID, data)
    forget(storage, client, tid)
    with storage.open_blob_range(OID, tid, 2, 500_000) as file:
        assert [file.readline() for _ in range(3)] == [b"1\n", b"2\n", b"3\n"]
        assert file.read() == data[8:500_000]
    assert client.calls == [("open_range", blob_key(OID, tid))]


@pytest.mark.parametrize("kind", ["FileStorage", "MappingStorage"])
def test_blob_of_the_running_transaction_is_read_from_its_file(opened, kind):
    """Only there it is; a new object is known without a serial."""
    storage, client = opened(kind)
    tid = commit_blob(storage, OID, b"old")
    running, later = TransactionMetaData(), p64(u64(tid) + 1)
    storage.tpc_begin(running, later)
    store_blob(storage, running, OID, DATA, tid)
    store_blob(storage, running, OTHER, DATA)
    storage.tpc_vote(running)
    client.calls.clear()
    for oid, serial in ((OID, later), (OTHER, z64)):
        assert storage.blob_size(oid, serial) == 10
        for bounds in BOUNDS:
            assert read(storage, serial, *bounds, oid=oid) == part(*bounds)
    assert storage.blob_size(OID, tid) == 3
    with storage.open_blob_range(OID, later, 2) as file:
        storage.tpc_finish(running)
        assert file.read() == DATA[2:]
    assert client.calls == []
    assert storage.blob_size(OTHER, later) == 10


@pytest.mark.parametrize("kind", ["history", "no history"])
def test_object_that_is_only_under_its_tid_is_found_there(opened, kind):
    """As by a download: records were kept, blobs were copied as older versions have them."""
    storage, client = opened(kind)
    tid = commit_blob(storage, OID, DATA)
    key = blob_key(OID, read_reference(storage.loadSerial(OID, tid)))
    client.client.copy_object(key, blob_key(OID, tid))
    client.client.delete_object(key)
    forget(storage, client, tid)
    assert storage.blob_size(OID, tid) == 10
    assert client.calls == [("object_size", key), ("object_size", blob_key(OID, tid))]
    assert read(storage, tid, 3, 7) == b"3456"
    assert client.count("open_range") == 2


def test_instances_of_a_relstorage_remember_together(opened):
    """Each connection has one, and what S3 has said holds for all."""
    storage, client = opened("history")
    tid = commit_blob(storage, OID, DATA)
    forget(storage, client, tid)
    for _ in range(3):
        instance = storage.new_instance()
        assert instance.blob_size(OID, tid) == 10
        instance.release()
    assert client.count("object_size") == 1


def test_sizes_that_are_remembered_are_bounded(opened, monkeypatch):
    """What was found first is asked for again; the answer is right either way."""
    monkeypatch.setattr("zodb_s3blobs.loading.REMEMBERED", 2)
    storage, client = opened()
    tids = {number: commit_blob(storage, p64(number), b"1" * number) for number in (1, 2, 3)}
    for number, tid in tids.items():
        forget(storage, client, tid, p64(number))
    for number in (1, 2, 3, 3, 2, 1, 2):
        assert storage.blob_size(p64(number), tids[number]) == number
    asked = [blob_key(p64(number), tids[number]) for number in (1, 2, 3, 1, 2)]
    assert client.calls == [("object_size", key) for key in asked]


# Sources


@pytest.fixture(params=["lawn", "bushy"])
def old(request, tmp_path):
    """(blob directory, tid) of a database that has not migrated."""
    directory = f"{tmp_path}/old"
    # A new one would empty the directory.
    FileStorage(f"{tmp_path}/Data.fs").close()
    FilesystemHelper(directory, request.param).create()
    stock = FileStorage(f"{tmp_path}/Data.fs", blob_dir=directory)
    tid = commit_blob(stock, OID, DATA)
    stock.close()
    assert stock.fshelper.layout_name == request.param
    return directory, tid


@pytest.mark.parametrize("s3_is", ["empty", "down"])
def test_blob_of_the_old_directory_is_told_and_read(opened, old, s3_is):
    """Its size without a copy; its parts by way of the cache, as other reads."""
    directory, tid = old
    storage, client = opened(sources=[BlobDirSource(directory)])
    if s3_is == "down":
        for name in ("object_size", "open_range", "download_file"):
            client.before[name] = Failure()
    assert storage.blob_size(OID, tid) == 10
    assert not os.path.exists(path_of(storage, tid))
    for bounds in BOUNDS:
        assert read(storage, tid, *bounds) == part(*bounds)
    assert os.path.exists(path_of(storage, tid))


def test_size_from_a_source_is_not_remembered(opened, old):
    """A migration may bring the blob into the bucket at any moment."""
    directory, tid = old
    storage, client = opened(sources=[BlobDirSource(directory)])
    for _ in range(2):
        assert storage.blob_size(OID, tid) == 10
    assert client.count("object_size") == 2


def test_source_that_lacks_the_blob_is_not_the_last(opened, old, tmp_path):
    """The next one is asked, and then it is missing."""
    directory, tid = old
    other = f"{tmp_path}/other"
    FilesystemHelper(other).create()
    storage, _client = opened(sources=[BlobDirSource(other), BlobDirSource(directory)])
    lost = commit_record(storage, OTHER, record=BLOB_RECORD)
    assert storage.blob_size(OID, tid) == 10
    assert read(storage, tid, 3, 7) == b"3456"
    with pytest.raises(POSKeyError):
        storage.blob_size(OTHER, lost)
    with pytest.raises(POSKeyError):
        storage.open_blob_range(OTHER, lost)


def test_size_of_a_source_is_that_of_its_file(old):
    """None where it has none; a directory that is gone has said nothing."""
    directory, tid = old
    source = BlobDirSource(directory)
    assert source.size(OID, tid) == 10
    assert source.size(OID, OTHER) is None
    assert source.size(OTHER, tid) is None
    os.rename(directory, f"{directory}-away")
    with pytest.raises(OSError):
        source.size(OID, tid)


def test_source_that_fails_is_not_taken_for_one_that_has_nothing(opened, old):
    """An unmounted directory must not look like lost data."""
    directory, tid = old
    storage, _client = opened(sources=[BlobDirSource(directory)])
    os.rename(directory, f"{directory}-away")
    with pytest.raises(OSError):
        storage.blob_size(OID, tid)
    with pytest.raises(OSError):
        storage.open_blob_range(OID, tid, 3, 7)


@pytest.mark.parametrize("below", ["s3", "blob-dir"])
def test_blob_below_a_demostorage_is_told_and_read(s3, tmp_path, below):
    """From the database that is below, cached there or not; its own ones from its own place."""
    if below == "s3":
        base, client = make_storage(s3, tmp_path, "below")
        tid = commit_blob(base, OID, DATA)
        forget(base, client, tid)
    else:
        base = FileStorage(f"{tmp_path}/Data.fs", blob_dir=f"{tmp_path}/blobs")
        tid = commit_blob(base, OID, DATA)
    changes = HookedClient(make_client(s3, prefix="changes"))
    cache = S3BlobCache(f"{tmp_path}/changes")
    storage = S3BlobStorage(DemoStorage(base=base), changes, cache)
    assert storage.blob_size(OID, tid) == 10
    assert not os.path.exists(path_of(storage, tid))
    for bounds in BOUNDS:
        assert read(storage, tid, *bounds) == part(*bounds)
    assert storage.presigned_url(OID, tid) is None
    new = commit_blob(storage, OID, DATA[:7], tid)
    forget(storage, changes, new)
    assert storage.blob_size(OID, new) == 7
    assert read(storage, new, 3) == DATA[3:7]
    with pytest.raises(POSKeyError):
        storage.blob_size(OTHER, tid)
    storage.close()


# What is missing, down or wrong


@pytest.mark.parametrize("kind", BASES)
def test_missing_blob_is_a_poskeyerror(opened, kind):
    """Whatever is asked of it, and nothing at all, too."""
    storage, _client = opened(kind)
    tid = commit_record(storage, OID, record=BLOB_RECORD)
    for oid, serial in ((OID, tid), (OTHER, tid)):
        with pytest.raises(POSKeyError):
            storage.blob_size(oid, serial)
        for bounds in ((), (3, 7), (5, 5), (0, 0), (7, 3)):
            with pytest.raises(POSKeyError):
                storage.open_blob_range(oid, serial, *bounds)


def test_failure_is_not_remembered(opened):
    """The blob is found when it is there, be it by a later copy or when S3 is back."""
    storage, client = opened()
    tid = commit_record(storage, OID, record=BLOB_RECORD)
    with pytest.raises(POSKeyError):
        storage.blob_size(OID, tid)
    client.client.upload_file(write_file(DATA), blob_key(OID, tid))
    assert storage.blob_size(OID, tid) == 10


def test_s3_that_is_down_is_a_transient_error(opened, s3):
    """With the blob's name; what is cached is served."""
    storage, _client = opened()
    tid = commit_blob(storage, OID, DATA)
    down = dataclasses.replace(s3, endpoint_url=refused_endpoint())
    storage, _client = opened(location=down)
    for call in (storage.blob_size, storage.open_blob_range, storage.presigned_url):
        with pytest.raises(TransientS3Error) as caught:
            call(OID, tid)
        assert (caught.value.oid, caught.value.tid) == (OID, tid)
    storage, _client = opened(location=down, cache="cache0")
    assert storage.blob_size(OID, tid) == 10
    assert read(storage, tid, 3, 7) == b"3456"


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("bounds", [(-1,), (-3, 5), (0, -1), (5, -1), (-2, -1)])
def test_negative_position_is_refused(opened, cached, bounds):
    """Counting from the end would be a guess."""
    storage, client = opened()
    tid = commit_blob(storage, OID, DATA)
    if not cached:
        forget(storage, client, tid)
    with pytest.raises(ValueError):
        storage.open_blob_range(OID, tid, *bounds)


# Eviction


class EvictingCache(S3BlobCache):
    """Loses a file after it has handed out its path, a few times.

    :ivar evictions: how many times yet.
    """

    evictions = 0

    def get(self, oid, tid):
        return self._evict(super().get(oid, tid))

    def fill(self, oid, tid, fetch):
        return self._evict(super().fill(oid, tid, fetch))

    def _evict(self, path):
        if path is not None and self.evictions:
            self.evictions -= 1
            os.remove(path)
        return path


@pytest.fixture
def evicting(s3, tmp_path):
    """Return a function that opens a storage with an `EvictingCache`: it, client, and cache."""
    storages = []

    def evicting(**options):
        client = HookedClient(make_client(s3))
        cache = EvictingCache(f"{tmp_path}/cache")
        base = FileStorage(f"{tmp_path}/Data.fs")
        storages.append(S3BlobStorage(base, client, cache, **options))
        return storages[-1], client, cache

    yield evicting
    for storage in storages:
        storage.close()


def test_eviction_between_look_and_open_is_met_by_s3(evicting):
    """The reader does not notice."""
    storage, client, cache = evicting()
    tid = commit_blob(storage, OID, DATA)
    cache.evictions = 1
    client.calls.clear()
    assert read(storage, tid, 3, 7) == b"3456"
    assert client.calls == [("open_range", blob_key(OID, tid))]
    assert cache.evictions == 0


def test_eviction_of_what_came_from_a_source_is_met_by_another_copy(evicting, old):
    """As often as it happens in practice."""
    directory, tid = old
    storage, _client, cache = evicting(sources=[BlobDirSource(directory)])
    cache.evictions = 3
    assert read(storage, tid, 3, 7) == b"3456"
    assert cache.evictions == 0


def test_file_that_is_open_is_read_to_its_end(opened):
    """Whoever evicts it meanwhile."""
    storage, client = opened()
    tid = commit_blob(storage, OID, DATA)
    with storage.open_blob_range(OID, tid, 2, 8) as file:
        forget(storage, client, tid)
        assert file.read() == b"234567"
    assert client.calls == []


# What the cache tells


def test_asking_for_the_size_does_not_count_as_use(opened, tmp_path):
    """A listing of many blobs does not keep them in the cache; reading a part does."""
    storage, _client = opened()
    tid = commit_blob(storage, OID, DATA)
    path = path_of(storage, tid)
    os.utime(path, (1000, 1000))
    assert storage.blob_size(OID, tid) == 10
    assert os.stat(path).st_mtime == 1000
    assert read(storage, tid, 3, 7) == b"3456"
    assert os.stat(path).st_mtime > 1000


def test_cache_tells_the_size_of_what_it_has(tmp_path):
    """None of other files, of those beside the cache as well."""
    cache = S3BlobCache(f"{tmp_path}/cache", 1000)
    put(cache, OID, 300)
    beside = put(cache, OTHER, 5000)
    tid = p64(1)
    assert beside != cache.path(OTHER, tid)
    assert (cache.size(OID, tid), cache.size(OTHER, tid)) == (300, 5000)
    assert cache.size(OID, p64(2)) is cache.size(p64(3), tid) is None
    os.remove(cache.path(OID, tid))
    assert cache.size(OID, tid) is None
    cache.close()


def test_usage_tells_bytes_budget_and_age(tmp_path):
    """The age is that of what is evicted next, by the cache's clock."""
    # Files have the system's time, which is no later use.
    now = [time.time() + 1000]
    cache = S3BlobCache(f"{tmp_path}/cache", 1000, clock=lambda: now[0])

    def usage():
        found = cache.usage()
        assert found.keys() == {"cache_bytes", "cache_max_bytes", "cache_age_seconds"}
        assert found["cache_max_bytes"] == 1000
        return found["cache_bytes"], found["cache_age_seconds"]

    assert usage() == (0, None)
    put(cache, p64(1), 300)
    now[0] += 60
    put(cache, p64(2), 400)
    now[0] += 5
    assert usage() == (700, 65)
    put(cache, p64(3), 500)
    assert usage() == (900, 5)
    now[0] -= 1000
    assert usage() == (900, 0)
    cache.close()


def test_usage_of_an_index_that_cannot_be_had_is_none(tmp_path, caplog):
    """It does not raise, tells what is configured, and is back when the index is."""
    cache = S3BlobCache(f"{tmp_path}/cache", 1000)
    put(cache, OID, 300)
    cache.close()
    index = tmp_path / "cache" / "index.sqlite"
    index.rename(tmp_path / "away")
    for rest in tmp_path.glob("cache/index.sqlite-*"):
        rest.unlink()
    index.mkdir()
    (index / "in-the-way").touch()
    cache = S3BlobCache(f"{tmp_path}/cache", 1000)
    nothing = {"cache_bytes": None, "cache_max_bytes": 1000, "cache_age_seconds": None}
    assert cache.usage() == nothing
    assert caplog.text
    shutil.rmtree(index)
    (tmp_path / "away").rename(index)
    assert cache.usage()["cache_bytes"] == 300
    cache.close()


def test_storage_tells_its_numbers_without_an_index(opened, tmp_path):
    """Those of the cache are None, and the others are there."""
    storage, _client = opened()
    tid = commit_blob(storage, OID, DATA)
    index = tmp_path / "cache1" / "index.sqlite"
    index.mkdir(parents=True)
    (index / "in-the-way").touch()
    storage, _client = opened()
    assert load(storage, OID, tid) == DATA
    found = storage.stats()
    assert found["cache_bytes"] is found["cache_age_seconds"] is None
    assert found["requests_total"] == 1
