"""size, open_range, prefetch and presigned_url of a Blob, whatever its state and its storage."""

from contextlib import closing
from itertools import chain
import os
from urllib.request import urlopen

import pytest
import transaction
from zc.zlibstorage import ZlibStorage
from ZEO.ClientStorage import ClientStorage
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zodb_s3blobs.blobs import is_cached
from zodb_s3blobs.blobs import open_range
from zodb_s3blobs.blobs import prefetch
from zodb_s3blobs.blobs import presigned_url
from zodb_s3blobs.blobs import size
from zodb_s3blobs.interfaces import TransientS3Error

from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .storages import Failure
from .storages import HookedClient
from .storages import make_storage
from .storages import open_relstorage
from .storages import read
from .storages import start
from .test_demostorage import Below
from .test_demostorage import Site as DemoSite


KINDS = ["FileStorage", "by record", "RelStorage", "RelStorage without history", "zlibstorage"]
PLAIN = "FileStorage with a blob-dir"
HISTORICAL = [*(kind for kind in KINDS if kind != "RelStorage without history"), PLAIN]
OLD, CURRENT = b"old bytes", b"current bytes, more of them"
NOTHING = {"cached": 0, "fetched": 0, "missing": 0, "failed": 0, "skipped": 0, "bytes": 0}


class Site:
    """A database with one committed blob of two revisions, opened with an empty cache."""

    def __init__(self, kind, location, directory):
        self.kind = kind
        self._location = location
        self._directory = directory
        directory.mkdir(exist_ok=True)
        self.db = self._open("first")
        for data in (OLD, CURRENT):
            with self.db.transaction() as conn:
                blob = conn.root().setdefault("blob", Blob())
                with blob.open("w") as file:
                    file.write(data)
        with self.db.transaction() as conn:
            conn.root()["blob"]._p_activate()
            #: the tid of the current revision
            self.tid = conn.root()["blob"]._p_serial
        self.db.close()
        self.db = self._open("cache")
        self.manager = transaction.TransactionManager()
        self.conn = self.db.open(self.manager)
        self.blob = self.conn.root()["blob"]

    def _open(self, cache):
        directory = self._directory
        if self.kind == PLAIN:
            self.client = HookedClient(None)
            return DB(FileStorage(f"{directory}/Data.fs", blob_dir=f"{directory}/blobs"))
        options = {}
        if self.kind.startswith("RelStorage"):
            options["base"] = open_relstorage(directory, keep_history=self.kind == "RelStorage")
        if self.kind == "by record":
            options["addressing"] = "record"
        storage, self.client = make_storage(self._location, directory, cache, **options)
        return DB(ZlibStorage(storage) if self.kind == "zlibstorage" else storage)

    @property
    def is_ours(self):
        """Whether the blobs are in S3."""
        return self.kind != PLAIN

    def close(self):
        self.manager.abort()
        self.conn.close()
        self.db.close()


@pytest.fixture(params=[*KINDS, PLAIN])
def site(request, s3, tmp_path):
    """A `Site` of each kind."""
    site = Site(request.param, s3, tmp_path)
    yield site
    site.close()


def of_kinds(kinds):
    """Let `site` be of these kinds only."""
    return pytest.mark.parametrize("site", kinds, indirect=True)


@pytest.fixture
def on_file(s3, tmp_path):
    """A `Site` on a FileStorage."""
    site = Site("FileStorage", s3, tmp_path)
    yield site
    site.close()


def write(blob, data, mode="w"):
    with blob.open(mode) as file:
        file.seek(0, os.SEEK_END)
        file.write(data)


def part(blob, *positions):
    with open_range(blob, *positions) as file:
        return file.read()


def check(blob, data):
    """Assert that what is told of a blob is true for these bytes."""
    assert size(blob) == len(data)
    for bounds in ((0, None), (2, 5), (3, None), (0, 0), (5, 2), (3, 10**6), (10**6, None)):
        assert part(blob, *bounds) == data[slice(*bounds)], bounds
    with pytest.raises(ValueError, match="positions count from 0"):
        open_range(blob, -1)
    with pytest.raises(ValueError, match="positions count from 0"):
        open_range(blob, 0, -1)


def check_local(site, blob, data):
    """Do as `check`; of bytes that are not in S3, whom nobody asks for them."""
    site.client.calls.clear()
    check(blob, data)
    assert presigned_url(blob) is None
    assert vars(prefetch([blob])) == NOTHING
    assert site.client.calls == []


def check_committed(site, blob, data):
    """Do as `check`; of bytes that are in S3, or in the blob directory of a plain storage."""
    check(blob, data)
    url = presigned_url(blob)
    if site.is_ours:
        with urlopen(url) as answer:
            assert answer.read() == data
    else:
        assert url is None
        assert vars(prefetch([blob])) == NOTHING


class TestStates:
    def test_new_blob_without_bytes_is_empty(self, site):
        """In no connection, or added to one."""
        check_local(site, Blob(), b"")
        blob = Blob()
        site.conn.add(blob)
        check_local(site, blob, b"")

    def test_new_blob_with_bytes_has_them(self, site):
        """In no connection, or added to one."""
        blob = Blob(b"new bytes")
        check_local(site, blob, b"new bytes")
        site.conn.root()["new"] = blob
        site.conn.add(blob)
        check_local(site, blob, b"new bytes")

    def test_changed_blob_has_its_uncommitted_bytes(self, site):
        """All that was written until now."""
        write(site.blob, b"changed")
        check_local(site, site.blob, b"changed")
        write(site.blob, b", and more", "a")
        check_local(site, site.blob, b"changed, and more")

    def test_saved_blob_has_the_bytes_of_the_savepoint(self, site):
        """A new one and a changed one, loaded or ghost."""
        blob = site.conn.root()["new"] = Blob(b"new bytes")
        write(site.blob, b"changed")
        site.manager.savepoint()
        check_local(site, blob, b"new bytes")
        check_local(site, site.blob, b"changed")
        site.conn.cacheMinimize()
        check_local(site, blob, b"new bytes")
        check_local(site, site.blob, b"changed")

    def test_blob_changed_after_a_savepoint_has_its_later_bytes(self, site):
        """And again those of the savepoint when it is rolled back."""
        write(site.blob, b"saved")
        savepoint = site.manager.savepoint()
        write(site.blob, b"changed again")
        check_local(site, site.blob, b"changed again")
        savepoint.rollback()
        check_local(site, site.blob, b"saved")

    def test_rolled_back_blob_has_its_committed_bytes(self, site):
        """Under a savepoint the connection's storage is a temporary one."""
        savepoint = site.manager.savepoint()
        write(site.blob, b"changed")
        site.manager.savepoint()
        savepoint.rollback()
        check_committed(site, site.blob, CURRENT)

    def test_aborted_blob_has_its_committed_bytes(self, site):
        """What was written is gone."""
        write(site.blob, b"changed")
        site.manager.abort()
        check_committed(site, site.blob, CURRENT)

    def test_ghost_is_loaded_and_nothing_is_downloaded(self, site):
        """Whole blobs are not needed for any of it."""
        assert site.blob._p_changed is None
        assert size(site.blob) == len(CURRENT)
        site.blob._p_deactivate()
        assert part(site.blob) == CURRENT
        site.blob._p_deactivate()
        check_committed(site, site.blob, CURRENT)
        assert site.client.count("download_file") == 0

    def test_cached_blob_is_asked_for_nowhere(self, site):
        """Its file tells, and it stays cached."""
        assert read(site.blob) == CURRENT
        site.client.calls.clear()
        check(site.blob, CURRENT)
        assert site.client.calls == []
        check_committed(site, site.blob, CURRENT)

    def test_blob_committed_in_this_connection_has_its_new_bytes(self, site):
        """From the moment that its transaction is over."""
        write(site.blob, b"changed")
        site.conn.root()["new"] = new = Blob(b"new bytes")
        site.manager.commit()
        check_committed(site, site.blob, b"changed")
        check_committed(site, new, b"new bytes")

    def test_untouched_blob_under_a_savepoint_is_as_committed(self, site):
        """Another one was saved."""
        site.conn.root()["new"] = Blob(b"new bytes")
        site.manager.savepoint()
        check_committed(site, site.blob, CURRENT)

    def test_touched_blob_without_new_bytes_is_as_committed(self, site):
        """Before a savepoint, after it, and when that is committed."""
        site.blob._p_changed = True
        check_committed(site, site.blob, CURRENT)
        site.manager.savepoint()
        check_committed(site, site.blob, CURRENT)
        site.conn.cacheMinimize()
        check_committed(site, site.blob, CURRENT)
        site.manager.commit()
        check_committed(site, site.blob, CURRENT)

    @of_kinds(HISTORICAL)
    def test_older_view_keeps_telling_of_its_revision(self, site):
        """Another connection has committed new bytes meanwhile."""
        site.blob._p_activate()
        with site.db.transaction() as conn:
            write(conn.root()["blob"], b"changed")
        check_committed(site, site.blob, CURRENT)
        site.manager.begin()
        check_committed(site, site.blob, b"changed")

    @of_kinds(HISTORICAL)
    @pytest.mark.parametrize("cached", [False, True])
    def test_historical_blob_is_that_of_then(self, site, cached):
        """Its size, bytes and object."""
        with closing(site.db.open(before=site.tid)) as conn:
            blob = conn.root()["blob"]
            if cached:
                assert read(blob) == OLD
            check_committed(site, blob, OLD)

    def test_blob_that_is_nowhere_is_a_poskeyerror(self, site, s3):
        """Of each question; a URL of what is not there is no use."""
        if site.is_ours:
            delete_all(s3)
        else:
            os.remove(site.blob.committed())
        for ask in (size, open_range):
            with pytest.raises(POSKeyError):
                ask(site.blob)
        if site.is_ours:
            with pytest.raises(POSKeyError):
                presigned_url(site.blob)
            assert vars(prefetch([site.blob])) == {**NOTHING, "missing": 1}

    def test_outage_is_a_transient_error(self, on_file):
        """For those who need an answer; a prefetch goes on without."""
        for name in ("object_size", "open_range", "download_file"):
            on_file.client.before[name] = Failure()
        for ask in (size, open_range, presigned_url):
            with pytest.raises(TransientS3Error):
                ask(on_file.blob)
        assert vars(prefetch([on_file.blob])) == {**NOTHING, "failed": 1}


def delete_all(location):
    client = boto3_client(location)
    for key in keys(location):
        client.delete_object(Bucket=location.bucket, Key=key)
    client.close()


class TestRequests:
    def test_size_is_asked_for_once(self, site):
        """By a HEAD request, for all connections."""
        for _ in range(3):
            assert size(site.blob) == len(CURRENT)
            with site.db.transaction() as conn:
                assert size(conn.root()["blob"]) == len(CURRENT)
        assert site.client.count("object_size") == site.is_ours

    def test_range_is_asked_for_once(self, on_file):
        """No more comes than was wanted, and nothing is cached by that."""
        assert part(on_file.blob, 8, 13) == b"bytes"
        assert on_file.client.calls == [("open_range", on_file.client.calls[0][1])]
        assert on_file.db.storage.stats()["downloaded_bytes_total"] == 5
        assert prefetch([on_file.blob]).cached == 0

    def test_range_can_be_moved_in(self, site):
        """Its positions begin with 0 at its own beginning."""
        with open_range(site.blob, 8, 20) as file:
            assert file.read(5) == b"bytes"
            assert file.tell() == 5
            assert file.seek(-2, os.SEEK_END) == 10
            assert file.read() == CURRENT[18:20]
            assert file.seek(0) == 0
            assert file.read() == CURRENT[8:20]

    @pytest.mark.parametrize("cached", [False, True])
    def test_range_outlives_its_connection(self, site, cached):
        """A server sends it when the request has ended."""
        data = os.urandom(1_000_000)
        write(site.blob, data)
        site.manager.commit()
        if not cached and site.is_ours:
            os.remove(site.blob.committed())
        with closing(site.db.open()) as conn:
            file = open_range(conn.root()["blob"], 10)
            assert file.read(10) == data[10:20]
        with file:
            assert file.read() == data[20:]
            file.seek(0)
            assert file.read(10) == data[10:20]


class Blobs:
    """Some committed blobs in a connection, as ghosts, with nothing in the cache."""

    def __init__(self, site, count=5):
        self.data = {f"b{number}": b"blob %d" % number for number in range(count)}
        with site.db.transaction() as conn:
            conn.root().update({name: Blob(data) for name, data in self.data.items()})
        site.manager.begin()
        self.all = [site.conn.root()[name] for name in self.data]
        self.bytes = sum(map(len, self.data.values()))
        if site.is_ours:
            for blob in self.all:
                os.remove(blob.committed())
        site.conn.cacheMinimize()


@pytest.fixture
def blobs(site):
    """`Blobs` of `site`."""
    return Blobs(site)


def fetched(site, **counts):
    """Return the counts that are expected, nothing where the blobs are not ours."""
    return {**NOTHING, **counts} if site.is_ours else NOTHING


class TestPrefetch:
    def test_ghosts_are_fetched_and_then_cached(self, site, blobs):
        """And nothing is downloaded when they are read."""
        report = prefetch(blobs.all)
        assert vars(report) == fetched(site, fetched=5, bytes=blobs.bytes)
        site.client.calls.clear()
        assert [read(blob) for blob in blobs.all] == [*blobs.data.values()]
        assert site.client.calls == []
        assert vars(prefetch(blobs.all)) == fetched(site, cached=5)

    def test_generator_is_run_through(self, site, blobs):
        """Once, and not before it is called."""
        report = prefetch(blob for blob in blobs.all)
        assert vars(report) == fetched(site, fetched=5, bytes=blobs.bytes)

    def test_same_blob_twice_is_fetched_once(self, on_file):
        """Both count as what they were."""
        report = prefetch([on_file.blob] * 3)
        assert report.fetched + report.cached == 3
        assert on_file.client.count("download_file") == 1

    def test_uncommitted_ones_are_left_out(self, site, blobs):
        """New ones, changed ones and saved ones need no fetching."""
        new = site.conn.root()["new"] = Blob(b"new bytes")
        site.conn.root()["saved"] = saved = Blob(b"saved")
        site.manager.savepoint()
        write(blobs.all[0], b"changed")
        some = [Blob(), new, *blobs.all, saved, Blob(b"nowhere")]
        expected = blobs.bytes - len(b"blob 0")
        assert vars(prefetch(some)) == fetched(site, fetched=4, bytes=expected)

    def test_pairs_are_fetched_from_a_storage(self, site, blobs):
        """For those who know oids and serials and have no objects."""
        for blob in blobs.all:
            blob._p_activate()
        pairs = [(blob._p_oid, blob._p_serial) for blob in blobs.all]
        report = prefetch(iter(pairs), storage=site.db.storage)
        assert vars(report) == fetched(site, fetched=5, bytes=blobs.bytes)
        site.client.calls.clear()
        assert [read(blob) for blob in blobs.all] == [*blobs.data.values()]
        assert site.client.calls == []

    @of_kinds(HISTORICAL)
    def test_old_revision_is_fetched_in_a_historical_connection(self, site):
        """It is the revision that the connection sees."""
        with closing(site.db.open(before=site.tid)) as conn:
            report = prefetch([conn.root()["blob"]])
            assert vars(report) == fetched(site, fetched=1, bytes=len(OLD))

    def test_nothing_is_fetched_for_nothing(self, site):
        """Of an empty iterable, with a storage or without."""
        assert vars(prefetch([])) == NOTHING
        assert vars(prefetch(iter(()), storage=site.db.storage)) == NOTHING

    def test_one_that_is_missing_does_not_keep_the_others(self, on_file, s3):
        """It is counted."""
        blobs = Blobs(on_file)
        blobs.all[2]._p_activate()
        client = boto3_client(s3)
        (key,) = (key for key in keys(s3) if f"/{int.from_bytes(blobs.all[2]._p_oid):x}/" in key)
        client.delete_object(Bucket=s3.bucket, Key=key)
        client.close()
        expected = blobs.bytes - len(b"blob 2")
        assert vars(prefetch(blobs.all)) == {
            **NOTHING, "fetched": 4, "missing": 1, "bytes": expected,
        }  # fmt: skip

    def test_outage_ends_it_without_an_error(self, on_file, caplog):
        """What is left out after the first failure is counted, and the log says why."""
        on_file.client.before["download_file"] = Failure()
        blobs = Blobs(on_file, 200)
        report = prefetch(blobs.all)
        assert report.failed >= 1
        assert report.fetched == 0
        assert report.failed + report.skipped == 200
        assert caplog.text.count("prefetch given up: S3 is down, says the test") == 1

    def test_blobs_of_two_databases_are_fetched_in_one_call(self, site, blobs, s3, tmp_path):
        """In whatever order they come."""
        other = Site("by record", new_bucket(s3), tmp_path / "other")
        with closing(other):
            theirs = Blobs(other)
            report = prefetch(chain(*zip(blobs.all, theirs.all, strict=True)))
            assert report.fetched == (10 if site.is_ours else 5)
            assert other.client.count("download_file") == 5
            assert [read(blob) for blob in theirs.all] == [*blobs.data.values()]


def test_zeo_client_with_blobs_of_its_own_works_as_any_storage(zeo, tmp_path):
    """ZEO keeps a name where ZODB's own wrappers keep the storage behind them."""
    served = zeo.new("<filestorage {name}>\npath {name}.fs\nblob-dir {name}.blobs\n</filestorage>")
    address = "127.0.0.1", served.server.port
    client = ClientStorage(address, storage=served.name, blob_dir=f"{tmp_path}/blobs")
    with closing(DB(client)) as db:
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(CURRENT)
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            assert presigned_url(blob) is None
            assert vars(prefetch([blob])) == NOTHING
            check(blob, CURRENT)


class TestDemoStorage:
    CASES = [
        # What is below, where ours is, what the changes are; whose objects are in S3
        ("s3", "below", "temporary", "ab"),
        ("s3 by record", "below", "FileStorage", "ab"),
        ("s3", "changes", "FileStorage", "abc"),
        ("blob-dir", "changes", "MappingStorage", "c"),
        ("s3", "changes by record", "MappingStorage", "abc"),
        ("blob-dir", "around", "FileStorage", "c"),
        ("s3", "around", "temporary", "c"),
    ]

    @pytest.fixture(params=CASES, ids=lambda case: " ".join(case[:3]))
    def demo(self, request, s3, tmp_path):
        """(a `Site` of test_demostorage with a new blob c, the names of the blobs in S3)."""
        below, place, changes, in_s3 = request.param
        site = DemoSite(Below(below, s3, tmp_path), place, changes, s3, tmp_path)
        site.write("c", b"c in the changes")
        site.write("b", b"b in the changes")
        yield site, in_s3
        site.close()

    def test_blobs_of_both_are_told(self, demo):
        """One below, one that was changed, and a new one."""
        site, _in_s3 = demo
        with site.connection() as conn:
            check(conn.root()["a"], b"a1")
            check(conn.root()["b"], b"b in the changes")
            check(conn.root()["c"], b"c in the changes")

    def test_url_leads_to_the_storage_that_has_the_object(self, demo):
        """None where that is not S3."""
        site, in_s3 = demo
        with site.connection() as conn:
            for name, data in (("a", b"a1"), ("c", b"c in the changes")):
                url = presigned_url(conn.root()[name])
                assert (url is not None) == (name in in_s3), name
                if url:
                    with urlopen(url) as answer:
                        assert answer.read() == data

    def test_prefetch_fills_the_caches_of_those_that_have_one(self, demo):
        """Blobs in plain directories are left out."""
        site, _in_s3 = demo
        with site.connection() as conn:
            report = prefetch([conn.root()[name] for name in "abc"])
            assert report.failed == report.missing == 0
            assert [read(conn.root()[name]) for name in "abc"] == [
                b"a1", b"b in the changes", b"c in the changes",
            ]  # fmt: skip


class NamedFile:
    """As plone.namedfile's, it has a blob and is none."""

    _blob = Blob()


@pytest.mark.parametrize("call", [size, open_range, is_cached, presigned_url])
@pytest.mark.parametrize("other", [NamedFile(), None, (p64(1), p64(1))])
def test_what_is_no_blob_is_an_error_that_says_so(call, other):
    """A file of plone.namedfile is the commonest mistake."""
    for mistaken in (lambda: call(other), lambda: prefetch([other])):
        with pytest.raises(TypeError, match=r"a ZODB.blob.Blob is needed, not a .*_blob"):
            mistaken()


@pytest.mark.parametrize("bounds", [(1.5,), (0, 2.5), ("1",)])
def test_positions_are_whole_numbers(bounds):
    """Anything else would be taken for another position, or none."""
    with pytest.raises(TypeError):
        open_range(Blob(b"bytes"), *bounds)


def test_blob_is_cached_as_long_as_its_bytes_are_here(s3, tmp_path):
    """Uncommitted ones are; to ask is no read."""
    storage, client = make_storage(s3, tmp_path)
    db = DB(storage)
    manager = transaction.TransactionManager()
    conn = db.open(manager)
    assert is_cached(Blob())
    blob = conn.root()["blob"] = Blob(b"bytes")
    assert is_cached(blob)
    manager.commit()
    assert is_cached(blob)
    os.remove(blob.committed())
    before = len(client.calls)
    assert not is_cached(blob)
    assert len(client.calls) == before
    assert read(blob) == b"bytes"
    assert is_cached(blob)
    conn.close()
    db.close()


def loaded(blobs):
    """Load Blobs, which know no serial before, and return them."""
    for blob in blobs:
        blob._p_activate()
    return blobs


def test_pairs_of_a_relstorage_are_prefetched_by_several_threads_at_once(s3, tmp_path):
    """The storage of a database is no instance of anybody's: each call has one of its own."""
    storage, client = make_storage(s3, tmp_path, base=open_relstorage(tmp_path))
    db = DB(storage)
    with db.transaction() as conn:
        conn.root()["blobs"] = [Blob(b"%d" % number) for number in range(40)]
    with db.transaction() as conn:
        pairs = [(blob._p_oid, blob._p_serial) for blob in loaded(conn.root()["blobs"])]
        paths = [blob.committed() for blob in conn.root()["blobs"]]
    for path in paths:
        os.remove(path)
    threads = [start(prefetch, pairs[:], db.storage) for _ in range(4)]
    reports = [thread.result() for thread in threads]
    assert all(report.cached + report.fetched == 40 for report in reports)
    assert client.count("download_file") == 40
    db.close()


def test_blobs_of_two_storages_in_turn_are_two_prefetches(s3, tmp_path, monkeypatch):
    """And not one for each blob."""
    dbs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        storage, _client = make_storage(s3, tmp_path / name)
        dbs.append(DB(storage))
    found = []
    for db in dbs:
        with db.transaction() as conn:
            conn.root()["blobs"] = [Blob(b"x") for _ in range(10)]
        found.append(db.open().root()["blobs"])
    calls = []
    for db in dbs:
        original = db.storage.prefetch_blobs
        monkeypatch.setattr(
            db.storage, "prefetch_blobs", lambda pairs, f=original: calls.append(1) or f(pairs)
        )
    report = prefetch(chain.from_iterable(zip(*found, strict=True)))
    assert report.cached == 20
    assert len(calls) == 2
    for db in dbs:
        db.close()
