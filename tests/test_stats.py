"""stats(): each number after what was done, and whose it is."""

from dataclasses import replace
from functools import partial
import os
import sys
import time

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.directorylock import DirectoryLock
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.staged import BlobServices
from zodb_s3blobs.stats import ClientCounters
from zodb_s3blobs.stats import MEANINGS
from zodb_s3blobs.storage import S3BlobStorage

from .faults import FaultyServer
from .faults import in_child
from .faults import refused_endpoint
from .faults import s3_error
from .services.process import wait_until
from .storages import commit_blob
from .storages import commit_record
from .storages import Gate
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_relstorage
from .storages import read
from .storages import start
from .storages import store_blob
from .zeoclients import FILE
from .zeoclients import ZeoDatabase


OID = p64(1)
OTHER = p64(2)
COUNTED = [name for name in MEANINGS if name.endswith("_total")]
SECONDS = ["wait_seconds_total", "lock_seconds_total"]


class Clocks:
    """Two clocks that show what was set, in seconds.

    :ivar after: called when one was read.
    """

    def __init__(self):
        self.time = 1000.0
        self.after = lambda: None

    def __call__(self):
        times = self.time, self.time
        self.after()
        return times


@pytest.fixture
def clocks(monkeypatch):
    """The clocks of all storages that are made from now on."""
    clocks = Clocks()
    services = partial(BlobServices, clocks=clocks)
    monkeypatch.setattr("zodb_s3blobs.storage.BlobServices", services)
    return clocks


@pytest.fixture
def make(s3, tmp_path):
    """Return a function that returns (storage, its hooked client), as `make_storage` does."""
    storages = []

    def make(location=s3, **options):
        storages.append(make_storage(location, tmp_path, **options))
        return storages[-1]

    yield make
    for storage, _client in storages:
        storage.close()


@pytest.fixture
def made(make):
    """(storage, its hooked client)."""
    return make()


def evict(storage, oid, tid):
    """Remove a file, as whoever empties a cache by hand."""
    os.remove(storage.fshelper.getBlobFilename(oid, tid))


def counts(storage):
    """Return what was counted and is not zero, but for times."""
    numbers = storage.stats()
    return {
        name.removesuffix("_total"): numbers[name]
        for name in COUNTED
        if name not in SECONDS and numbers[name]
    }


def times(storage):
    """Return (wait_seconds_total, lock_seconds_total)."""
    numbers = storage.stats()
    return tuple(numbers[name] for name in SECONDS)


class TestNames:
    def test_each_has_a_meaning(self, made):
        """The numbers are those that are explained, and none is missing."""
        storage, _client = made
        assert set(storage.stats()) == set(MEANINGS)

    def test_new_storage_begins_with_zeros(self, made):
        """And has asked nothing."""
        storage, _client = made
        assert {storage.stats()[name] for name in COUNTED} == {0}


class TestReads:
    def test_read_is_a_hit_or_a_miss(self, made):
        """What a commit has cached is a hit, what was evicted a miss, and then a hit again."""
        storage, _client = made
        tid = commit_blob(storage, OID, b"12345")
        load(storage, OID, tid)
        uploaded = {"requests": 1, "uploads": 1, "uploaded_bytes": 5}
        assert counts(storage) == {**uploaded, "hits": 1}
        evict(storage, OID, tid)
        load(storage, OID, tid)
        after = {**uploaded, "requests": 2, "misses": 1, "downloads": 1, "downloaded_bytes": 5}
        assert counts(storage) == {**after, "hits": 1}
        with storage.openCommittedBlobFile(OID, tid):
            assert counts(storage) == {**after, "hits": 2}

    def test_loaded_object_is_neither(self, made):
        """Its bytes are not read yet."""
        storage, _client = made
        db = DB(storage)
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(b"12345")
        before = counts(storage)
        conn = db.open(transaction.TransactionManager())
        blob = conn.root()["blob"]
        for expected in (before, {**before, "hits": 1}):
            blob._p_deactivate()
            blob._p_activate()
            assert counts(storage) == expected
            read(blob)
        assert counts(storage) == {**before, "hits": 2}
        conn.close()

    def test_two_who_want_the_same_are_a_miss_and_a_wait(self, made):
        """One downloads, the other shares it."""
        storage, client = made
        tid = commit_blob(storage, OID, b"12345")
        evict(storage, OID, tid)
        gate = client.before["download_file"] = Gate()
        one = start(load, storage, OID, tid)
        gate.wait()
        two = start(load, storage, OID, tid)
        wait_until(lambda: storage.stats()["waits_total"])
        gate.open()
        assert one.result() == two.result() == b"12345"
        found = counts(storage)
        assert (found["misses"], found["waits"], found["downloads"]) == (1, 1, 1)
        assert "hits" not in found

    def test_missing_object_is_no_failure(self, made):
        """S3 has answered."""
        storage, client = made
        tid = commit_blob(storage, OID, b"12345")
        evict(storage, OID, tid)
        client.delete_objects([blob_key(OID, tid)])
        before = counts(storage)
        with pytest.raises(POSKeyError):
            load(storage, OID, tid)
        assert counts(storage) == {**before, "misses": 1, "requests": before["requests"] + 1}

    def test_range_counts_its_own_bytes(self, made):
        """It is no download, and neither hit nor miss."""
        storage, _client = made
        tid = commit_blob(storage, OID, b"0123456789")
        evict(storage, OID, tid)
        with storage.open_blob_range(OID, tid, 2, 5) as file:
            assert file.read() == b"234"
        found = counts(storage)
        assert (found["range_reads"], found["downloaded_bytes"], found["requests"]) == (1, 3, 2)
        assert not {"downloads", "hits", "misses"} & set(found)

    def test_prefetched_blobs_are_downloads(self, made):
        """Each that was not cached."""
        storage, _client = made
        pairs = [(p64(number), commit_blob(storage, p64(number), b"12345")) for number in (1, 2, 3)]
        for pair in pairs[:2]:
            evict(storage, *pair)
        storage.prefetch_blobs(pairs)
        found = counts(storage)
        assert (found["downloads"], found["downloaded_bytes"]) == (2, 10)


class TestRequests:
    def test_uploads_count_their_bytes(self, made):
        """Of all blobs of all commits; a commit without blobs counts nothing."""
        storage, _client = made
        commit_record(storage, p64(9))
        assert counts(storage) == {}
        commit_blob(storage, OID, b"12345")
        commit_blob(storage, OTHER, b"")
        assert counts(storage) == {"requests": 2, "uploads": 2, "uploaded_bytes": 5}

    def test_aborted_transaction_has_uploaded_and_deleted(self, made):
        """What went over the wire counts, whatever became of it."""
        storage, _client = made
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, OID, b"12345")
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        assert counts(storage) == {"requests": 2, "uploads": 1, "uploaded_bytes": 5}

    def test_request_that_is_tried_again_is_a_retry(self, make, s3):
        """And no failure, if it succeeds in the end."""
        answers = [s3_error(503, "SlowDown")]
        with FaultyServer(s3.endpoint_url) as server:
            storage, _client = make(through(server, s3))
            server.instead = lambda request: answers.pop() if answers else None
            commit_blob(storage, OID, b"12345")
            assert counts(storage) == {
                "requests": 2, "retries": 1, "uploads": 1, "uploaded_bytes": 5,
            }  # fmt: skip

    def test_outage_is_a_failure(self, make, s3):
        """One for each operation, however often it was tried."""
        storage, _client = make(through(None, s3))
        with pytest.raises(TransientS3Error):
            commit_blob(storage, OID, b"12345")
        assert counts(storage)["failures"] == 1
        assert "uploads" not in counts(storage)


def through(server, location):
    """Return a bucket as seen through a server, or where nothing listens."""
    endpoint_url = server.endpoint_url if server else refused_endpoint()
    return replace(location, endpoint_url=endpoint_url)


class TestCache:
    def test_evicted_files_count_with_their_bytes(self, make):
        """Those that made room for others, and not those that others have removed."""
        storage, _client = make(cache_size=1000)
        for number in range(4):
            commit_blob(storage, p64(number + 1), b"x" * 400)
        numbers = storage.stats()
        assert (numbers["evictions_total"], numbers["evicted_bytes_total"]) == (2, 800)
        assert (numbers["cache_bytes"], numbers["cache_max_bytes"]) == (800, 1000)

    def test_age_is_that_of_the_file_that_goes_next(self, s3, tmp_path):
        """None where there is no file."""
        # Always ahead of the times of the files.
        times = [time.time() + 1000]
        cache = S3BlobCache(f"{tmp_path}/cache", 1000, lambda: times[0])
        base = FileStorage(f"{tmp_path}/Data.fs")
        storage = S3BlobStorage(base, make_client(s3), cache)
        assert storage.stats()["cache_age_seconds"] is None
        commit_blob(storage, OID, b"x" * 400)
        times[0] += 50
        commit_blob(storage, OTHER, b"x" * 400)
        times[0] += 10
        assert storage.stats()["cache_age_seconds"] == pytest.approx(60)
        commit_blob(storage, p64(3), b"x" * 400)
        assert storage.stats()["cache_age_seconds"] == pytest.approx(10)
        storage.close()

    def test_numbers_of_a_cache_that_cannot_be_used_are_none(self, made, tmp_path):
        """The others are told all the same."""
        storage, _client = made
        tid = commit_blob(storage, OID, b"12345")
        for path in (tmp_path / "cache").glob("index.sqlite*"):
            path.unlink()
        (tmp_path / "cache/index.sqlite").mkdir()
        load(storage, OID, tid)
        numbers = storage.stats()
        assert (numbers["cache_bytes"], numbers["cache_age_seconds"]) == (None, None)
        assert (numbers["cache_max_bytes"], numbers["hits_total"]) == (1 << 30, 1)

    def test_closed_storage_tells_its_numbers(self, made):
        """As it does while it is open."""
        storage, _client = made
        tid = commit_blob(storage, OID, b"12345")
        load(storage, OID, tid)
        before = storage.stats()
        storage.close()
        after = storage.stats()
        assert set(after) == set(MEANINGS)
        assert {name: after[name] for name in COUNTED} == {name: before[name] for name in COUNTED}


class TestTimes:
    def test_reader_of_a_cold_blob_waits(self, made):
        """And nobody waits for what is cached, or for a commit without blobs."""
        storage, client = made
        commit_record(storage, p64(9))
        tid = commit_blob(storage, OID, b"12345")
        load(storage, OID, tid)
        before, _lock = times(storage)
        load(storage, OID, tid)
        assert times(storage)[0] == before
        evict(storage, OID, tid)
        gate = client.before["download_file"] = Gate()
        reader = start(load, storage, OID, tid)
        gate.wait()
        gate.open()
        reader.result()
        assert times(storage)[0] > before

    def test_vote_waits_until_the_uploads_are_done(self, make, clocks):
        """What passes before the vote is not waited for."""
        storage, client = make()
        gate = Gate()

        def take_time(*args):
            gate()
            clocks.time += 7

        client.before["upload_file"] = take_time
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, OID, b"12345")
        clocks.time += 100
        clocks.after = gate.open  # the vote has looked when it began
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        assert times(storage) == (7, 107)

    def test_commit_without_blobs_counts_no_time(self, make, clocks):
        """Not even that of its own lock."""
        storage, _client = make()
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        clocks.time += 7
        storage.tpc_vote(txn)
        storage.tpc_abort(txn)
        commit_record(storage, p64(9))
        assert times(storage) == (0, 0)

    @pytest.mark.parametrize("step", ["tpc_finish", "tpc_abort"])
    @pytest.mark.parametrize(
        ("kind", "locked"),
        [
            ("FileStorage", 7),
            ("MappingStorage", 7),
            ("DemoStorage", 7),
            ("by record", 0),
            ("RelStorage", 0),
            ("ZEO", 0),
        ],
    )
    def test_lock_is_held_where_others_cannot_commit_meanwhile(
        self, make, request, clocks, tmp_path, kind, locked, step
    ):
        """From the first blob to the end of the vote; the others take their lock after it."""
        options = {"addressing": "record"} if kind == "by record" else {}
        storage, _client = make(base=make_base(kind, request, tmp_path), **options)
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        clocks.time += 100
        store_blob(storage, txn, OID, b"12345")
        clocks.time += 3
        store_blob(storage, txn, OTHER, b"12345")
        clocks.time += 4
        storage.tpc_vote(txn)
        clocks.time += 100
        getattr(storage, step)(txn)
        assert times(storage)[1] == locked

    @pytest.mark.parametrize(("kind", "locked"), [("FileStorage", 7), ("by record", 0)])
    def test_lock_is_held_until_an_abort_without_a_vote(
        self, make, request, clocks, tmp_path, kind, locked
    ):
        """A conflict, or a request that was stopped."""
        options = {"addressing": "record"} if kind == "by record" else {}
        storage, _client = make(base=make_base(kind, request, tmp_path), **options)
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        store_blob(storage, txn, OID, b"12345")
        clocks.time += 7
        storage.tpc_abort(txn)
        assert times(storage) == (0, locked)


def make_base(kind, request, directory):
    if kind == "MappingStorage":
        return MappingStorage()
    if kind == "DemoStorage":
        return DemoStorage(changes=FileStorage(f"{directory}/Data.fs"))
    if kind == "RelStorage":
        return open_relstorage(directory)
    if kind == "ZEO":
        served = request.getfixturevalue("zeo").new(FILE)
        return storageFromString(ZeoDatabase(served.server, served.name).section)
    return FileStorage(f"{directory}/Data.fs")


class TestWhose:
    def test_instances_share_their_numbers(self, make, tmp_path):
        """What one has done, all tell."""
        storage, _client = make(base=open_relstorage(tmp_path))
        one, two = storage.new_instance(), storage.new_instance()
        tid = commit_blob(one, OID, b"12345")
        two.poll_invalidations()
        load(two, OID, tid)
        load(one, OID, tid)
        assert storage.stats()["hits_total"] == 2
        assert counts(one) == counts(two) == counts(storage)
        one.release()
        two.release()

    def test_storages_have_numbers_of_their_own(self, made, s3, tmp_path):
        """Two databases in one process."""
        (tmp_path / "other").mkdir()
        other, _client = make_storage(s3, tmp_path / "other")
        storage, _client = made
        commit_blob(storage, OID, b"12345")
        assert counts(other) == {}
        other.close()

    def test_forked_child_begins_with_zeros(self, made):
        """And its parent's numbers stay as they are."""
        storage, _client = made
        tid = commit_blob(storage, OID, b"12345")
        load(storage, OID, tid)
        before = storage.stats()

        def child():
            assert {storage.stats()[name] for name in COUNTED} == {0}
            load(storage, OID, tid)
            load(storage, OID, tid)
            assert counts(storage) == {"hits": 2}
            evict(storage, OID, tid)
            load(storage, OID, tid)
            assert counts(storage)["downloads"] == 1

        in_child(child)
        assert {name: storage.stats()[name] for name in COUNTED} == {
            name: before[name] for name in COUNTED
        }


class TestHistory:
    def test_historical_instance_tells_the_same(self, make, tmp_path):
        """It reads through the same cache and client."""
        storage, _client = make(base=open_relstorage(tmp_path))
        tid = commit_blob(storage.new_instance(), OID, b"12345")
        load(storage.before_instance(p64(2**62)), OID, tid)
        assert storage.stats()["hits_total"] == 1


class TestCounters:
    def test_adding_from_many_threads_loses_none(self):
        """However often they take turns."""
        counters, rounds = ClientCounters(), 2000

        def add():
            for _ in range(rounds):
                counters.add(requests=1, downloaded_bytes=10)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for thread in [start(add) for _ in range(8)]:
                thread.result()
        finally:
            sys.setswitchinterval(interval)
        assert (counters.requests, counters.downloaded_bytes) == (8 * rounds, 80 * rounds)

    def test_values_are_named_as_they_are_explained(self):
        """Each counts something, and ends in _total."""
        counters = ClientCounters()
        counters.add(uploads=2)
        assert counters.values()["uploads_total"] == 2
        assert set(counters.values()) < set(MEANINGS)


def test_numbers_are_told_while_another_process_has_the_lock_of_the_cache(s3, tmp_path):
    """Soon, without those that need it."""
    storage, _client = make_storage(s3, tmp_path)
    commit_blob(storage, p64(1), b"bytes")
    with DirectoryLock(f"{tmp_path}/cache").held():
        numbers = storage.stats()
    assert numbers["cache_bytes"] is numbers["cache_age_seconds"] is None
    assert numbers["uploads_total"] == 1
    assert storage.stats()["cache_bytes"] == 5
    storage.close()
