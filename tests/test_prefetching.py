"""Many blobs come into the cache together, and nothing else is held up or left behind by it."""

import contextlib
import errno
import glob
import logging
import os
import shutil
import threading

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.prefetching import PrefetchReport
from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.tempdirs import TempFiles
from zodb_s3blobs.uploads import UploadPool

from .faults import in_child
from .services.process import wait_until
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
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import start
from .storages import store_blob


# Threads of a pool in these tests, and what may be under way then
CONCURRENCY = 3
AHEAD = 4 * CONCURRENCY
SIZE = 1000
NAME = "zodb-s3blobs-download"


class Site:
    """A storage with blobs in its bucket and none in its cache.

    :ivar revisions: (oid, serial) of each
    """

    def __init__(self, location, directory):
        self.location = location
        self.options = location, directory
        self._caches = 0
        self.storage = self.client = None
        self.revisions = []

    def open(self, count=0, base=None, **options):
        """Open it anew with an empty cache, after so many blobs were committed."""
        if count:
            storage, _client = make_storage(*self.options, "seed", base=base and base())
            self.revisions += commit_blobs(storage, count)
            storage.close()
        self.close()
        self._caches += 1
        options = {"pool": UploadPool(CONCURRENCY), **options}
        cache = f"cache{self._caches}"
        base = base and base()
        self.storage, self.client = make_storage(*self.options, cache, base=base, **options)
        return self.storage

    def is_cached(self, number):
        """Tell whether the cache has a blob."""
        oid, serial = self.revisions[number]
        return os.path.exists(self.storage.fshelper.getBlobFilename(oid, serial))

    def check_cached(self):
        """Require that all blobs are read without S3."""
        before = len(self.client.calls)
        for oid, serial in self.revisions:
            assert load(self.storage, oid, serial) == random_bytes(oid, SIZE)
        assert len(self.client.calls) == before

    def close(self):
        if self.storage is not None:
            self.storage.close()


def commit_blobs(storage, count):
    """Commit blobs in one transaction and return (oid, serial) of each."""
    running = TransactionMetaData()
    storage.tpc_begin(running)
    oids = [p64(number) for number in range(1, count + 1)]
    for oid in oids:
        store_blob(storage, running, oid, random_bytes(oid, SIZE))
    storage.tpc_vote(running)
    tid = storage.tpc_finish(running)
    return [(oid, tid) for oid in oids]


@pytest.fixture
def site(s3, tmp_path):
    """A `Site` that is yet to be opened."""
    site = Site(s3, tmp_path)
    yield site
    site.close()


def counts(report):
    """Return the counts of blobs that are not 0."""
    return {name: count for name, count in vars(report).items() if count and name != "bytes"}


class Taken:
    """Iterates over revisions and tells how many were taken.

    :ivar most: how many more at most were taken than had been fetched
    """

    def __init__(self, revisions, client):
        self._revisions = revisions
        self._fetched = []
        client.after["download_file"] = lambda *args: self._fetched.append(args)
        self.count = self.most = 0

    def __iter__(self):
        for revision in self._revisions:
            self.count += 1
            self.most = max(self.most, self.count - len(self._fetched))
            yield revision


class Crowd:
    """Lets nobody pass before so many have come, and counts those who are there at once.

    :ivar largest: how many that were
    """

    def __init__(self, client, size):
        self._lock = threading.Lock()
        self._barrier = threading.Barrier(size)
        self._present = self.largest = 0
        client.before["download_file"] = self._enter
        client.after["download_file"] = self._leave

    def _enter(self, *args):
        with self._lock:
            self._present += 1
            self.largest = max(self.largest, self._present)
        self._barrier.wait(PATIENCE)

    def _leave(self, *args):
        with self._lock:
            self._present -= 1


# What comes


def test_all_are_fetched_with_one_request_each(site):
    """And are read without S3 from then on."""
    storage = site.open(20)
    report = storage.prefetch_blobs(site.revisions)
    assert isinstance(report, PrefetchReport)
    assert counts(report) == {"fetched": 20}
    assert report.bytes == 20 * SIZE
    fetched = sorted(site.client.calls)
    assert fetched == sorted(("download_file", blob_key(*each)) for each in site.revisions)
    site.check_cached()
    assert leftovers(storage) == []


def test_report_is_readable(site):
    """In a log, with every count."""
    report = site.open(2).prefetch_blobs(site.revisions)
    text = "cached=0 fetched=2 missing=0 failed=0 skipped=0 bytes=2000"
    assert str(report) == text
    assert repr(report) == f"<PrefetchReport {text}>"


def test_what_is_cached_asks_nobody_and_counts_as_used(site):
    """Not even the base; no thread is started for it."""
    storage = site.open(6)
    for oid, serial in site.revisions[:2]:
        storage.loadBlob(oid, serial)
        os.utime(storage.fshelper.getBlobFilename(oid, serial), (1000, 1000))
    site.client.calls.clear()
    before = storage.stats()
    assert counts(storage.prefetch_blobs(site.revisions[:2])) == {"cached": 2}
    for oid, serial in site.revisions[:2]:
        assert os.stat(storage.fshelper.getBlobFilename(oid, serial)).st_mtime > 1000
    assert site.client.calls == []
    assert not threads()
    assert counts(storage.prefetch_blobs(site.revisions)) == {"cached": 2, "fetched": 4}
    assert storage.stats()["downloads_total"] - before["downloads_total"] == 4


def test_nothing_to_fetch_is_no_error(site):
    """An empty page has no blobs."""
    report = site.open(1).prefetch_blobs(iter(()))
    assert counts(report) == {} and report.bytes == 0


def test_missing_blobs_are_counted_and_the_others_come(site):
    """Be it that the bucket lacks them or that the base has no such revision."""
    storage = site.open(6)
    for oid, serial in site.revisions[:2]:
        site.client.client.delete_object(blob_key(oid, serial))
    lost = commit_record(storage, p64(50), record=BLOB_RECORD)
    wanted = [(p64(50), lost), (p64(60), lost), (p64(1), p64(5)), *site.revisions]
    assert counts(storage.prefetch_blobs(wanted)) == {"missing": 5, "fetched": 4}


def test_blob_that_is_named_twice_is_downloaded_once(site):
    """Each mention is counted, none is an error."""
    storage = site.open(4)
    report = storage.prefetch_blobs(site.revisions * 3)
    assert report.cached + report.fetched == 12
    assert site.client.count("download_file") == 4


@pytest.mark.parametrize("keep_history", [True, False])
def test_blobs_of_a_relstorage_come_by_their_references(site, tmp_path, keep_history):
    """By any instance, which is asked for them in the caller's thread."""
    storage = site.open(10, lambda: open_relstorage(tmp_path, keep_history=keep_history))
    instance = storage.new_instance()
    instance.poll_invalidations()
    assert counts(instance.prefetch_blobs(site.revisions)) == {"fetched": 10}
    assert site.client.count("download_file") == 10
    instance.release()
    site.check_cached()


# At the same time


def test_downloads_run_at_the_same_time_up_to_the_bound(site):
    """As many as the pool of uploads has threads, and no more."""
    storage = site.open(4 * CONCURRENCY)
    crowd = Crowd(site.client, CONCURRENCY)
    report = storage.prefetch_blobs(site.revisions)
    assert counts(report) == {"fetched": 4 * CONCURRENCY}
    assert crowd.largest == CONCURRENCY


def test_revisions_are_taken_as_threads_become_free(site):
    """A generator of a million does not run ahead of the downloads."""
    storage = site.open(10 * CONCURRENCY)
    taken = Taken(site.revisions, site.client)
    gate = site.client.before["download_file"] = Gate()
    running = start(storage.prefetch_blobs, taken)
    gate.wait()
    running.join(0.2)
    assert running.is_alive()
    assert CONCURRENCY <= taken.count <= AHEAD
    gate.open()
    assert counts(running.result()) == {"fetched": 10 * CONCURRENCY}
    assert taken.most <= AHEAD
    assert taken.count == 10 * CONCURRENCY


def test_several_calls_share_the_threads(site):
    """Two pages that are prefetched at once do not make twice as many requests at a time."""
    storage = site.open(4 * CONCURRENCY)
    crowd = Crowd(site.client, CONCURRENCY)
    half = len(site.revisions) // 2
    calls = [
        start(storage.prefetch_blobs, revisions)
        for revisions in (site.revisions[:half], site.revisions[half:])
    ]
    for call in calls:
        assert counts(call.result()) == {"fetched": half}
    assert crowd.largest == CONCURRENCY


def test_blob_that_a_reader_is_loading_is_downloaded_once(site):
    """Both wait for the same request."""
    storage = site.open(1)
    gate = site.client.before["download_file"] = Gate()
    reader = start(load, storage, *site.revisions[0])
    gate.wait()
    prefetch = start(storage.prefetch_blobs, site.revisions)
    prefetch.join(0.1)
    gate.open()
    assert reader.result() == random_bytes(p64(1), SIZE)
    assert counts(prefetch.result()) in ({"fetched": 1}, {"cached": 1})
    assert site.client.count("download_file") == 1


def test_reader_of_a_blob_that_is_being_prefetched_waits_for_it(site):
    """It makes no request of its own."""
    storage = site.open(1)
    gate = site.client.before["download_file"] = Gate()
    prefetch = start(storage.prefetch_blobs, site.revisions)
    gate.wait()
    reader = start(load, storage, *site.revisions[0])
    reader.join(0.1)
    gate.open()
    assert reader.result() == random_bytes(p64(1), SIZE)
    assert counts(prefetch.result()) == {"fetched": 1}
    assert site.client.count("download_file") == 1


def test_commits_do_not_wait_for_a_prefetch(site):
    """Uploads have threads of their own, though all downloads hang."""
    storage = site.open(4 * CONCURRENCY)
    gate = site.client.before["download_file"] = Gate()
    prefetch = start(storage.prefetch_blobs, site.revisions)
    gate.wait()
    writer = start(commit_blobs_again, storage, site.revisions[: 2 * CONCURRENCY])
    tid = writer.result()
    assert load(storage, p64(1), tid) == b"again"
    assert prefetch.is_alive()
    gate.open()
    assert counts(prefetch.result()) == {"fetched": 4 * CONCURRENCY}
    site.check_cached()


def commit_blobs_again(storage, revisions):
    """Commit the next revision of blobs in one transaction and return its tid."""
    running = TransactionMetaData()
    storage.tpc_begin(running)
    for oid, serial in revisions:
        store_blob(storage, running, oid, b"again", serial)
    storage.tpc_vote(running)
    return storage.tpc_finish(running)


def test_prefetch_does_not_wait_for_commits(site):
    """While all uploads hang."""
    storage = site.open(2 * CONCURRENCY)
    gate = site.client.before["upload_file"] = Gate()
    writer = start(commit_blobs_again, storage, site.revisions)
    gate.wait()
    assert counts(storage.prefetch_blobs(site.revisions)) == {"fetched": 2 * CONCURRENCY}
    assert writer.is_alive()
    gate.open()
    assert load(storage, p64(1), writer.result()) == b"again"


def test_transaction_of_another_thread_is_not_disturbed(site):
    """Begun before, committed after; its blobs are as it wrote them."""
    storage = site.open(6)
    db = DB(storage)
    manager = transaction.TransactionManager()
    conn = db.open(manager)
    conn.root()["blob"] = Blob(b"uncommitted")
    manager.savepoint()
    assert counts(start(storage.prefetch_blobs, site.revisions).result())["fetched"] == 6
    assert read(conn.root()["blob"]) == b"uncommitted"
    manager.commit()
    conn.close()
    with db.transaction() as conn:
        assert read(conn.root()["blob"]) == b"uncommitted"


# The end of it


def test_s3_that_is_down_ends_it_and_is_asked_a_few_times(site, caplog):
    """Nothing raises: a prefetch only saves time. The log tells it, once."""
    storage = site.open(100)
    site.client.before["download_file"] = Failure()
    caplog.set_level(logging.WARNING, "zodb_s3blobs.prefetching")
    report = storage.prefetch_blobs(site.revisions)
    assert counts(report).keys() == {"failed", "skipped"}
    assert report.failed + report.skipped == 100
    assert report.failed == site.client.count("download_file") <= AHEAD
    assert caplog.text.count("prefetch given up") == 1
    del site.client.before["download_file"]
    assert counts(storage.prefetch_blobs(site.revisions)) == {"fetched": 100}


def test_s3_that_fails_in_between_ends_it(site):
    """What came before stays; what is cached is still told apart."""
    storage = site.open(100)
    for revision in site.revisions[-5:]:
        storage.loadBlob(*revision)
    site.client.calls.clear()
    bucket = site.client.client

    def fail(key, path):
        if key == blob_key(*site.revisions[40]):
            raise TransientS3Error("S3 is down, says the test")

    site.client.before["download_file"] = fail
    report = storage.prefetch_blobs(site.revisions)
    assert (report.failed, report.cached) == (1, 5)
    assert 40 - AHEAD <= report.fetched <= 40 + AHEAD
    assert report.fetched + report.skipped == 94
    assert bucket.counters.downloads == report.fetched + 5
    assert site.client.count("download_file") == report.fetched + 1


def test_source_that_cannot_be_read_ends_it_without_an_error(site):
    """An old directory that is not mounted is as S3 that is down."""

    class Broken:
        fetch = size = Failure(PermissionError(13, "says the test"))

        def close(self):
            """Nothing is open."""

    storage = site.open(20, sources=[Broken()])
    for revision in site.revisions:
        site.client.client.delete_object(blob_key(*revision))
    report = storage.prefetch_blobs(site.revisions)
    assert 1 <= report.failed <= AHEAD
    assert report.failed + report.skipped == 20


def test_no_more_than_the_cache_holds_is_fetched(site):
    """What comes then would evict what has come first."""
    storage = site.open(60, cache_size=10 * SIZE)
    report = storage.prefetch_blobs(site.revisions)
    assert counts(report) == {"fetched": 10, "skipped": 50}
    assert report.bytes == 10 * SIZE == storage.stats()["cache_bytes"]
    assert site.client.count("download_file") == 10
    assert all(site.is_cached(number) for number in range(10))
    assert storage.stats()["evictions_total"] == 0


class Stopped(BaseException):
    """As KeyboardInterrupt, which would end the tests if it got away."""


@pytest.mark.parametrize("error", [ZeroDivisionError, Stopped, GeneratorExit])
def test_error_of_the_iterable_is_raised_and_nothing_more_begins(site, error):
    """What waits is dropped; what is running ends whole, and is in the cache then."""
    storage = site.open(4 * CONCURRENCY)
    gate = site.client.before["download_file"] = Gate()

    def revisions():
        yield from site.revisions[: CONCURRENCY + 2]
        gate.wait()
        raise error

    with pytest.raises(error):
        storage.prefetch_blobs(revisions())
    gate.open()
    storage.close()
    assert 1 <= site.client.count("download_file") <= CONCURRENCY
    assert not threads()
    assert leftovers(storage) == []
    cached = [number for number in range(len(site.revisions)) if site.is_cached(number)]
    assert len(cached) == site.client.count("download_file")


def test_base_that_fails_is_raised(site, monkeypatch):
    """Where the blobs are is not known then, and nobody asks S3 at a guess."""
    storage = site.open(4)
    with monkeypatch.context() as patch:
        patch.setattr("ZODB.FileStorage.FileStorage.loadBefore", Failure(OSError("says the test")))
        with pytest.raises(OSError, match="says the test"):
            storage.prefetch_blobs(site.revisions)
    assert site.client.calls == []
    assert counts(storage.prefetch_blobs(site.revisions)) == {"fetched": 4}


def threads():
    """Return the names of the threads that download."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def test_no_thread_is_left_when_the_storage_is_closed(site):
    """They wait for the next prefetch until then."""
    storage = site.open(10)
    before = set(threading.enumerate())
    storage.prefetch_blobs(site.revisions)
    assert 1 <= len(threads()) <= CONCURRENCY
    storage.close()
    assert threads() == []
    assert set(threading.enumerate()) <= before


def test_instance_that_is_closed_leaves_the_threads_to_the_others(site, tmp_path):
    """They are the storage's."""
    storage = site.open(10, lambda: open_relstorage(tmp_path))
    instance = storage.new_instance()
    assert counts(storage.prefetch_blobs(site.revisions[:5])) == {"fetched": 5}
    instance.close()
    assert counts(storage.prefetch_blobs(site.revisions)) == {"cached": 5, "fetched": 5}
    storage.close()
    assert threads() == []


def test_default_fetches_as_many_at_once_as_it_uploads(site):
    """32; that many meet."""
    storage = site.open(32, pool=None)
    crowd = Crowd(site.client, 32)
    assert counts(storage.prefetch_blobs(site.revisions)) == {"fetched": 32}
    assert crowd.largest == 32


def test_blob_that_is_committed_after_a_prefetch_is_fetched_by_the_next(site):
    """A missing blob is not remembered as missing."""
    storage = site.open(1)
    lost = commit_record(storage, p64(50), record=BLOB_RECORD)
    assert counts(storage.prefetch_blobs([(p64(50), lost)])) == {"missing": 1}
    tid = commit_blob(storage, p64(50), b"found", lost)
    os.remove(storage.fshelper.getBlobFilename(p64(50), tid))
    assert counts(storage.prefetch_blobs([(p64(50), tid)])) == {"fetched": 1}


# Other processes, and trouble on disk


def test_blob_that_another_process_fetches_is_not_fetched_again(site):
    """It is waited for, and found in the cache."""
    storage = site.open(4)
    oid, serial = site.revisions[0]
    path = storage.fshelper.getBlobFilename(oid, serial)
    directory = os.path.dirname(os.path.dirname(path))
    fetching, ended = os.pipe(), os.pipe()

    def other_process():
        cache = S3BlobCache(directory)
        path, end = cache.begin_filling(oid, serial)
        assert cache.begin_filling(oid, p64(1)) is not None  # another one
        os.write(fetching[1], b"x")
        os.read(ended[0], 1)
        with open(path, "wb") as file:
            file.write(random_bytes(oid, SIZE))
        cache.put(oid, serial, path)
        end()

    child = start(in_child, other_process)
    os.read(fetching[0], 1)
    running = start(storage.prefetch_blobs, site.revisions)
    wait_until(lambda: site.client.count("download_file") == 3)
    assert running.is_alive()
    os.write(ended[1], b"x")
    child.result()
    assert counts(running.result()) == {"fetched": 4}
    assert site.client.count("download_file") == 3
    site.check_cached()


def test_blob_that_has_come_meanwhile_is_not_fetched_again(site):
    """Between its turn and the moment that it was looked for another thread may have loaded it."""
    storage = site.open(CONCURRENCY + 1)
    gate = site.client.before["download_file"] = Gate()
    running = start(storage.prefetch_blobs, site.revisions)
    wait_until(lambda: site.client.count("download_file") == CONCURRENCY)
    site.client.before.clear()
    load(storage, *site.revisions[-1])
    gate.open()
    assert counts(running.result()) == {"fetched": CONCURRENCY + 1}
    assert site.client.count("download_file") == CONCURRENCY + 1


def test_directory_of_temporary_files_that_is_gone_is_made_anew(site):
    """As for every other blob; nothing fails."""
    storage = site.open(20)
    storage.prefetch_blobs(site.revisions[:10])
    shutil.rmtree(os.path.dirname(storage.temporaryDirectory()) + "/process")
    assert counts(storage.prefetch_blobs(site.revisions)) == {"cached": 10, "fetched": 10}
    site.check_cached()


def test_thread_that_waits_for_a_prefetched_file_gets_it_though_it_cannot_be_put(site):
    """It loads the blob by itself."""
    storage = site.open(1)
    gate = site.client.before["download_file"] = Gate()
    running = start(storage.prefetch_blobs, site.revisions)
    gate.wait()
    waiting = start(load, storage, *site.revisions[0])
    wait_until(lambda: storage.stats()["waits_total"] == 1)
    site.client.before.clear()
    lose = [os.remove]  # once
    site.client.after["download_file"] = lambda key, path: lose and lose.pop()(path)
    gate.open()
    assert waiting.result() == random_bytes(site.revisions[0][0], SIZE)
    running.result()
    assert leftovers(storage) == []


@contextlib.contextmanager
def new_target(site, tmp_path):
    """Yield an empty storage over another file, with a prefix of its own."""
    base = FileStorage(f"{tmp_path}/Target.fs")
    client = make_client(site.location, prefix="target")
    storage = S3BlobStorage(base, client, S3BlobCache(f"{tmp_path}/target"))
    yield storage
    storage.close()


def test_copy_from_a_storage_of_ours_fetches_the_blobs_of_a_transaction_together(site, tmp_path):
    """Where a batch is known, we prefetch ourselves."""
    source = site.open(4 * CONCURRENCY)
    crowd = Crowd(site.client, CONCURRENCY)
    with new_target(site, tmp_path) as target:
        target.copyTransactionsFrom(source)
        for oid, serial in site.revisions:
            assert load(target, oid, serial) == random_bytes(oid, SIZE)
    assert crowd.largest == CONCURRENCY
    assert site.client.count("download_file") == 4 * CONCURRENCY


def test_one_large_blob_among_small_ones_ends_nothing(site):
    """While it is under way fewer come at a time; there is room for all of them."""
    storage, _client = make_storage(*site.options, "seed")
    running = TransactionMetaData()
    storage.tpc_begin(running)
    sizes = {p64(number): SIZE for number in range(1, 61)} | {p64(5): 40 * SIZE}
    for oid, size in sizes.items():
        store_blob(storage, running, oid, random_bytes(oid, size))
    storage.tpc_vote(running)
    tid = storage.tpc_finish(running)
    storage.close()
    storage = site.open(cache_size=100 * SIZE)
    report = storage.prefetch_blobs((oid, tid) for oid in sizes)
    assert counts(report) == {"fetched": 60}
    assert report.bytes == 99 * SIZE
    assert storage.stats()["evictions_total"] == 0


def test_cache_that_takes_nothing_ends_it(site):
    """What is kept beside it is little, and for a short time."""
    storage = site.open(100)
    cache = os.path.dirname(storage.temporaryDirectory())
    for path in glob.glob(f"{cache}/index.sqlite*"):
        os.remove(path)
    os.mkdir(f"{cache}/index.sqlite")
    report = storage.prefetch_blobs(site.revisions)
    assert counts(report).keys() == {"fetched", "skipped"}
    assert report.fetched <= AHEAD


def test_full_disk_keeps_no_other_process_from_a_blob(site, monkeypatch):
    """A lock that was taken for a file that cannot be made is not kept."""
    storage = site.open(1)
    oid, serial = site.revisions[0]
    cache = os.path.dirname(storage.temporaryDirectory())

    def full(self):
        raise OSError(errno.ENOSPC, "says the test")

    with monkeypatch.context() as patch:
        patch.setattr(TempFiles, "one_more", full)
        assert counts(storage.prefetch_blobs(site.revisions)) == {"fetched": 1}
    in_child(lambda: S3BlobCache(cache).begin_filling(oid, serial)[1]())
