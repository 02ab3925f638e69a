"""A DemoStorage and ours: below it, as its changes, or around it."""

from contextlib import contextmanager
import logging
import os
import tempfile
import time

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageError
from ZODB.POSException import Unsupported
from ZODB.serialize import referencesf
from ZODB.utils import p64

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.storage import S3BlobStorage

from .services.location import boto3_client
from .services.location import keys
from .storages import commit_blob
from .storages import Failure
from .storages import filestorage
from .storages import Gate
from .storages import HookedClient
from .storages import leftovers
from .storages import make_client
from .storages import PLAIN_RECORD
from .storages import read
from .storages import section
from .storages import start
from .storages import store_blob


REQUESTS = ("download_file", "upload_file", "copy_object", "delete_objects", "list_pages")


def around(location, directory, base, prefix, cache, **options):
    """Return (storage, its hooked client) with a prefix of its own in the bucket."""
    client = HookedClient(make_client(location, prefix=prefix))
    cache = S3BlobCache(f"{directory}/{cache}", 1 << 30)
    return S3BlobStorage(base, client, cache, **options), client


class Below:
    """The database that a DemoStorage only reads: two blobs, one of which has two revisions.

    :param str kind: "s3", "s3 by record", or "blob-dir".
    """

    def __init__(self, kind, location, directory):
        self._kind = kind
        self._location = location
        self._directory = directory
        #: of the one that was opened last, where it has one
        self.client = None
        db = DB(self.open(read_only=False))
        for number in (0, 1):
            with db.transaction() as conn:
                conn.root()["a"] = blob = conn.root().get("a") or Blob()
                with blob.open("w") as file:
                    file.write(b"a%d" % number)
                conn.root()["b"] = conn.root().get("b") or Blob(b"b0")
        db.close()

    def open(self, read_only=True, cache="below"):
        """Return the storage."""
        path = f"{self._directory}/Below.fs"
        if self._kind == "blob-dir":
            return FileStorage(path, blob_dir=f"{self._directory}/blobs", read_only=read_only)
        base = FileStorage(path, read_only=read_only)
        addressing = "record" if self._kind.endswith("record") else "tid"
        storage, self.client = around(
            self._location, self._directory, base, "below", cache, addressing=addressing
        )
        return storage

    def state(self):
        """Return what must not change: the file, its directory of blobs, and its objects."""
        client = boto3_client(self._location)
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=self._location.bucket, Prefix="below/"
        )
        found = {
            item["Key"]: (item["ETag"], item["LastModified"])
            for page in pages
            for item in page.get("Contents", ())
        }
        client.close()
        with open(f"{self._directory}/Below.fs", "rb") as file:
            found["Below.fs"] = file.read()
        for place, _names, names in os.walk(f"{self._directory}/blobs"):
            for name in names:
                path = os.path.join(place, name)
                found[path] = os.stat(path).st_mtime_ns
        return found


class Site:
    """A database over a DemoStorage.

    :param str place: where ours is: "below", "changes", "changes by record", or "around".
    :param str changes: "temporary", "FileStorage" or "MappingStorage".
    """

    def __init__(self, below, place, changes, location, directory):
        self.below = below
        self._place = place
        self._changes = changes
        self._location = location
        self._directory = directory
        #: of the changes or of the one around, where that is ours
        self.client = None
        self.storage = self.db = None
        self.open()

    @property
    def persistent(self):
        """Whether the changes are there when it is opened again."""
        return self._changes == "FileStorage"

    def _open_changes(self):
        path = f"{self._directory}/Changes.fs"
        if self._changes == "temporary":
            return None
        if self._changes == "MappingStorage":
            return MappingStorage()
        if self._place == "below":
            return FileStorage(path, blob_dir=f"{self._directory}/changed")
        return FileStorage(path)

    def open(self, cache="cache", below_cache="below"):
        """Open it, again with other caches."""
        if self.db is not None:
            self.db.close()
        changes = self._open_changes()
        options = self._location, self._directory
        if self._place.startswith("changes"):
            addressing = "record" if self._place.endswith("record") else "tid"
            # Stamps may be those of others: without it they would have to be a day old.
            changes, self.client = around(
                *options, changes, "changes", cache, addressing=addressing, gc_grace=0.0
            )
        storage = DemoStorage(base=self.below.open(cache=below_cache), changes=changes)
        if self._place == "around":
            storage, self.client = around(*options, storage, "changes", cache)
        self.storage, self.db = storage, DB(storage)
        return self.db

    @contextmanager
    def connection(self):
        """Context manager: a connection with a transaction manager of its own."""
        manager = transaction.TransactionManager()
        conn = self.db.open(manager)
        try:
            yield conn
        finally:
            manager.abort()
            conn.close()

    def write(self, name, data):
        """Commit new bytes of a blob, which may be new."""
        with self.db.transaction() as conn:
            blob = conn.root().get(name)
            if blob is None:
                blob = conn.root()[name] = Blob()
            with blob.open("w") as file:
                file.write(data)

    def read(self, name):
        with self.db.transaction() as conn:
            return read(conn.root()[name])

    def read_all(self):
        with self.db.transaction() as conn:
            return {name: read(blob) for name, blob in sorted(conn.root().items())}

    def undo(self, *positions):
        log = self.db.undoLog(0, 100)
        manager = transaction.TransactionManager()
        manager.begin()
        self.db.undoMultiple([log[position]["id"] for position in positions], manager.get())
        manager.commit()

    def revisions(self, name):
        """Return (oid, tids) of a blob, the last one first."""
        with self.db.transaction() as conn:
            oid = conn.root()[name]._p_oid
        return oid, [entry["tid"] for entry in self.storage.history(oid, 100)]

    def close(self):
        self.db.close()


PLACES = [
    ("below", "temporary"),
    ("below", "FileStorage"),
    ("changes", "FileStorage"),
    ("changes", "MappingStorage"),
    ("changes by record", "FileStorage"),
    ("changes by record", "MappingStorage"),
    ("around", "temporary"),
    ("around", "FileStorage"),
    ("around", "MappingStorage"),
]
ALL = [
    (below, *place)
    for below in ("s3", "s3 by record", "blob-dir")
    for place in PLACES
    if (below, place[0]) != ("blob-dir", "below")  # where nothing is ours
]
# Each place once, and each database below with ours as changes and around
SOME = [
    ("s3", "below", "temporary"),
    ("s3 by record", "below", "FileStorage"),
    ("s3", "changes", "FileStorage"),
    ("blob-dir", "changes", "MappingStorage"),
    ("s3 by record", "changes by record", "FileStorage"),
    ("s3", "changes by record", "MappingStorage"),
    ("s3", "around", "temporary"),
    ("blob-dir", "around", "FileStorage"),
    ("s3 by record", "around", "MappingStorage"),
]


def sites(chosen=SOME, **only):
    """Return the parameter of `site`.

    :param only: what `place`, `changes` or `below` may be.
    """
    names = "below", "place", "changes"
    return pytest.mark.parametrize(
        "site",
        [
            pytest.param(each, id="-".join(each))
            for each in chosen
            if all(value in only.get(name, value) for name, value in zip(names, each, strict=True))
        ],
        indirect=True,
    )


OURS_ABOVE = ["changes", "changes by record", "around"]


@pytest.fixture
def no_stray_directories(tmp_path, monkeypatch):
    """Return a function that asserts that no DemoStorage has made a directory for blobs."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return lambda: not any(name.endswith(".demoblobs") for name in os.listdir(directory))


@pytest.fixture
def site(request, s3, tmp_path, no_stray_directories):
    below, place, changes = request.param
    site = Site(Below(below, s3, tmp_path), place, changes, s3, tmp_path)
    yield site
    site.close()


class TestReading:
    @sites()
    def test_blobs_of_the_base_are_read(self, site):
        """The current revisions and those before, with each cache empty at first."""
        assert site.read_all() == {"a": b"a1", "b": b"b0"}
        oid, tids = site.revisions("a")
        for tid, expected in zip(tids, (b"a1", b"a0"), strict=True):
            with site.storage.openCommittedBlobFile(oid, tid) as file:
                assert file.read() == expected
            assert site.storage.loadBlob(oid, tid) == site.storage.loadBlob(oid, tid)
        conn = site.db.open(at=tids[-1])
        assert read(conn.root()["a"]) == b"a0"
        conn.close()

    @sites()
    def test_revision_that_nobody_has_is_a_poskeyerror(self, site):
        """Neither the changes nor the base, and with no other error on the way."""
        oid, (tid, *_older) = site.revisions("a")
        for unknown in ((p64(1 << 62), tid), (oid, p64(5))):
            for ask in (site.storage.loadBlob, site.storage.openCommittedBlobFile):
                with pytest.raises(POSKeyError):
                    ask(*unknown)

    @sites(place=["changes", "changes by record"])
    def test_blob_of_the_base_makes_no_request_where_ours_are_the_changes(self, site):
        """They know that it is none of theirs."""
        site.read_all()
        assert site.client.calls == []

    @sites(place=["around"])
    def test_blob_of_the_base_comes_once_into_the_cache_around(self, site):
        """Asked for in our bucket first, where it is not, and read from the cache from then on."""
        site.read("b")
        assert {name for name, _key in site.client.calls} == {"download_file"}
        site.client.calls.clear()
        oid, (tid, *_older) = site.revisions("b")
        assert site.read("b") == b"b0"
        assert site.storage.loadBlob(oid, tid) == site.storage.fshelper.getBlobFilename(oid, tid)
        assert site.client.calls == []


class TestWriting:
    @sites(ALL)
    def test_changes_are_read_and_the_base_stays_as_it_was(self, site):
        """Changed blobs, new ones, and both together; the other ones are the base's."""
        before = site.below.state()
        site.write("a", b"changed")
        site.write("new", b"new")
        expected = {"a": b"changed", "b": b"b0", "new": b"new"}
        assert site.read_all() == expected
        site.write("a", b"changed again")
        site.write("b", b"changed, too")
        expected |= {"a": b"changed again", "b": b"changed, too"}
        assert site.read_all() == expected
        if site.persistent:
            site.open("empty", "empty-below")
            assert site.read_all() == expected
        oid, tids = site.revisions("a")
        data = [b"changed again", b"changed", b"a1", b"a0"]
        for tid, expected in zip(tids, data, strict=True):
            with site.storage.openCommittedBlobFile(oid, tid) as file:
                assert file.read() == expected
        assert site.below.state() == before

    @sites(place=OURS_ABOVE)
    def test_blobs_are_where_ours_put_them_and_nowhere_else(self, site, s3, no_stray_directories):
        """In the bucket, under the prefix of the changes; no temporary directory is used."""
        site.write("a", b"changed")
        site.write("new", b"new")
        assert len(keys(s3, "changes/")) == 2
        assert no_stray_directories()
        assert os.listdir(site.storage.temporaryDirectory()) == []

    @sites(place=["changes by record", "around"])
    def test_record_refers_to_its_object(self, site, s3):
        """Whoever does not tell the tid in time must not be taken for one who does."""
        site.write("a", b"changed")
        oid, (tid, *_older) = site.revisions("a")
        stamp = read_reference(site.storage.loadSerial(oid, tid))
        assert keys(s3, "changes/") == ["changes/" + blob_key(oid, stamp)]

    @sites()
    def test_aborted_change_leaves_nothing(self, site, s3):
        """The base's revision is current again."""
        before = site.below.state(), keys(s3)
        with site.connection() as conn:
            conn.root()["new"] = Blob(b"new")
            with conn.root()["a"].open("w") as file:
                file.write(b"never")
            conn.transaction_manager.savepoint()
            assert read(conn.root()["a"]) == b"never"
        assert site.read_all() == {"a": b"a1", "b": b"b0"}
        assert (site.below.state(), keys(s3)) == before
        assert leftovers(site.storage) == []

    @sites()
    @pytest.mark.parametrize("changed_before", [False, True])
    def test_conflict_is_one_and_its_retry_succeeds(self, site, s3, changed_before):
        """About a blob of the base, and about one that has changed already."""
        if changed_before:
            site.write("a", b"before")
        with site.connection() as first, site.connection() as second:
            for conn in (first, second):
                with conn.root()["a"].open("w") as file:
                    file.write(b"by %d" % (conn is second))
            first.transaction_manager.commit()
            before = keys(s3)
            with pytest.raises(ConflictError):
                second.transaction_manager.commit()
            second.transaction_manager.abort()
            assert keys(s3) == before
            assert read(second.root()["a"]) == b"by 0"
            with second.root()["a"].open("w") as file:
                file.write(b"by 1")
            second.transaction_manager.commit()
        assert site.read("a") == b"by 1"
        if site.client:  # others leave the working copy to its Blob
            assert leftovers(site.storage) == []

    @sites(place=OURS_ABOVE)
    def test_commits_of_two_threads_take_turns(self, site):
        """A DemoStorage has a lock of its own: it must be free again after each of them."""
        gate = site.client.before["upload_file"] = Gate()
        first = start(site.write, "one", b"1")
        gate.wait()
        del site.client.before["upload_file"]
        second = start(site.write, "two", b"2")
        gate.open()
        first.result()
        # Both have changed the root.
        with pytest.raises(ConflictError):
            second.result()
        start(site.write, "two", b"2").result()
        assert site.read_all() == {"a": b"a1", "b": b"b0", "one": b"1", "two": b"2"}


class TestUndo:
    BELOW = {"a": b"a1", "b": b"b0"}

    @sites(ALL, changes=["FileStorage"])
    def test_undo_and_redo_go_down_to_what_is_below(self, site):
        """And up again, step by step and at once; what is below is not changed."""
        before = site.below.state()
        site.write("a", b"first")
        site.write("a", b"second")
        site.undo(0)
        assert site.read("a") == b"first"
        site.undo(0)
        assert site.read("a") == b"second"
        site.undo(0, 1, 2, 3)
        assert site.read_all() == self.BELOW
        site.undo(0)
        site.write("new", b"new")
        expected = {"a": b"second", "b": b"b0", "new": b"new"}
        site.undo(0)
        assert site.read_all() == {"a": b"second", "b": b"b0"}
        site.undo(0)
        assert site.read_all() == expected
        site.open("empty", "empty-below")
        assert site.read_all() == expected
        assert site.below.state() == before

    @sites(ALL, changes=["FileStorage"])
    def test_creations_are_undone_together_with_changes(self, site):
        """In one transaction, down to what is below, and up again."""
        site.write("a", b"first")
        site.write("new", b"new")
        site.undo(0, 1)
        assert site.read_all() == self.BELOW
        site.undo(0)
        assert site.read_all() == {"a": b"first", "b": b"b0", "new": b"new"}

    @sites(changes=["temporary", "MappingStorage"])
    def test_undo_is_not_offered_where_the_changes_have_none(self, site):
        """As without us."""
        assert not hasattr(site.storage, "undo")


class TestOutage:
    def cut(self, *clients):
        """Let no request through; return a function that ends it."""
        for client in clients:
            client.before |= dict.fromkeys(REQUESTS, Failure())

        def mend():
            for client in clients:
                client.before.clear()

        return mend

    @sites(place=OURS_ABOVE)
    def test_base_is_readable_while_the_changes_bucket_is_down(self, site):
        """What is not ours does not depend on it; what is says that it may be tried again."""
        site.write("b", b"changed")
        oid, (tid, *_older) = site.revisions("b")
        if site.persistent:
            site.open("empty", "empty-below")
        mend = self.cut(site.client)
        assert site.read("a") == b"a1"
        if site.persistent:
            for ask in (site.storage.loadBlob, site.storage.openCommittedBlobFile):
                with pytest.raises(TransientS3Error):
                    ask(oid, tid)
        mend()
        assert site.read_all() == {"a": b"a1", "b": b"changed"}

    @sites(below=["s3", "s3 by record"])
    def test_outage_below_is_told_as_one(self, site, no_stray_directories):
        """No other error, nothing remembered, and no place made up for what is elsewhere."""
        oid, (tid, *_older) = site.revisions("a")
        site.open("empty", "empty-below")
        mend = self.cut(site.below.client)
        for ask in (site.storage.loadBlob, site.storage.openCommittedBlobFile):
            with pytest.raises(TransientS3Error):
                ask(oid, tid)
        if site.client:  # temporary changes have one for their own blobs
            assert no_stray_directories()
        mend()
        assert site.read_all() == {"a": b"a1", "b": b"b0"}

    @sites(place=OURS_ABOVE)
    def test_commit_while_the_changes_bucket_is_down_fails_clean(self, site, s3):
        """The lock of the DemoStorage is free for the retry."""
        mend = self.cut(site.client)
        with pytest.raises(TransientS3Error):
            site.write("new", b"new")
        mend()
        start(site.write, "new", b"new").result()
        assert site.read_all() == {"a": b"a1", "b": b"b0", "new": b"new"}
        assert leftovers(site.storage) == []
        assert len(keys(s3, "changes/")) == 1

    @sites(place=OURS_ABOVE, below=["s3", "s3 by record"])
    def test_commit_while_the_base_is_down_succeeds(self, site):
        """New blobs need nothing from below."""
        oid = p64(1 << 60)
        self.cut(site.below.client)
        commit_blob(site.storage, oid, b"new")
        with site.storage.openCommittedBlobFile(oid, site.storage.getTid(oid)) as file:
            assert file.read() == b"new"


class TestPack:
    @sites(place=["around"], changes=["temporary"])
    def test_pack_of_temporary_changes_deletes_no_object(self, site, s3, caplog):
        """The old revisions go, their blobs stay: what is below may have them in the same place."""
        before = site.below.state()
        for number in range(3):
            site.write("a", b"%d" % number)
        objects = keys(s3)
        caplog.set_level(logging.INFO, "zodb_s3blobs")
        site.storage.pack(time.time() + 1, referencesf, gc=False)
        assert len(site.revisions("a")[1]) == 3  # one of its own, two from below
        assert site.read_all() == {"a": b"2", "b": b"b0"}
        assert (keys(s3), site.below.state()) == (objects, before)
        assert "pack without a sweep" in caplog.text

    @sites(changes=["FileStorage"])
    def test_pack_over_given_changes_ends_as_it_does_without_us(self, site, s3):
        """ZODB 6.4 cannot: the same error, and nothing is deleted."""
        plain = DemoStorage(base=MappingStorage(), changes=MappingStorage())
        with pytest.raises(AttributeError) as control:
            plain.pack(time.time(), referencesf)
        site.write("a", b"changed")
        before = site.below.state(), keys(s3)
        with pytest.raises(AttributeError) as caught:
            site.storage.pack(time.time(), referencesf)
        assert str(caught.value) == str(control.value)
        assert (site.below.state(), keys(s3)) == before
        assert site.read("a") == b"changed"

    @sites(place=["changes", "changes by record"])
    def test_changes_that_are_ours_can_be_packed_and_swept_themselves(self, site, s3):
        """Only what belongs to them is deleted, and at once."""
        before = site.below.state()
        for number in range(3):
            site.write("a", b"%d" % number)
        oid, _tids = site.revisions("a")
        client = boto3_client(s3)
        orphan = "changes/" + blob_key(oid, new_stamp())
        client.put_object(Bucket=s3.bucket, Key=orphan, Body=b"orphan")
        client.close()
        site.storage.changes.pack(time.time() + 1, referencesf, gc=False)
        assert len(keys(s3, "changes/")) == 1
        assert site.below.state() == before
        assert site.read_all() == {"a": b"2", "b": b"b0"}

    @sites(place=["around"])
    @pytest.mark.parametrize("dry_run", [True, False])
    def test_sweep_around_is_refused_with_a_reason(self, site, s3, dry_run):
        """It does not know what is garbage, not even to count it."""
        site.write("a", b"changed")
        before = keys(s3)
        site.client.calls.clear()
        with pytest.raises(Unsupported, match="Sweep with a storage around the database itself"):
            site.storage.sweep(dry_run)
        assert (keys(s3), site.client.calls) == (before, [])


class TestRefused:
    def test_addressing_by_tid_around_is_refused_with_advice(self, s3, tmp_path):
        """Nothing is made on disk for it."""
        demo = DemoStorage(base=MappingStorage())
        with pytest.raises(ValueError, match=r"DemoStorage.* or say auto"):
            around(s3, tmp_path, demo, "changes", "cache", addressing="tid")

    def test_changes_with_blobs_of_their_own_are_refused_with_advice(self, s3, tmp_path):
        """Also those that a DemoStorage has made itself, when it was used before."""
        demo = DemoStorage(base=MappingStorage())
        around(s3, tmp_path, demo, "changes", "cache")
        demo.temporaryDirectory()  # which makes it have some
        with pytest.raises(ValueError, match="put the <s3blobstorage> around the changes"):
            around(s3, tmp_path, demo, "changes", "other")
        demo.close()

    @sites(place=["changes by record", "around"])
    def test_record_that_is_no_blobs_is_refused_with_a_reason(self, site, s3):
        """There is no place for a reference in it."""
        txn = TransactionMetaData()
        site.storage.tpc_begin(txn)
        with pytest.raises(StorageError, match=r"is not a ZODB\.blob\.Blob's"):
            store_blob(site.storage, txn, p64(1 << 60), b"bytes", record=PLAIN_RECORD)
        site.storage.tpc_abort(txn)
        assert keys(s3, "changes/") == []
        site.write("a", b"changed")

    @sites([("s3", "around", "FileStorage")])
    def test_base_without_blobs_has_none_to_give(self, site, s3, tmp_path):
        """Its records say that there is one, and it is nowhere."""
        oid, (tid, *_older) = site.revisions("a")
        base = FileStorage(f"{tmp_path}/Below.fs", read_only=True)
        storage, _client = around(s3, tmp_path, DemoStorage(base=base), "none", "none")
        with pytest.raises(POSKeyError):
            storage.loadBlob(oid, tid)
        storage.close()


class TestStacks:
    def pushed(self, storage, changes=None):
        """Return a `DB` over a DemoStorage over another one."""
        return DB(storage.push(changes))

    def check_pushed(self, site, upper):
        """Blobs of all levels are read, and changed above alone."""
        with upper.transaction() as conn:
            names = {name: read(blob) for name, blob in conn.root().items()}
            assert names == {"a": b"changed", "b": b"b0"}
            conn.root()["c"] = Blob(b"above")
            with conn.root()["a"].open("w") as file:
                file.write(b"above")
        with upper.transaction() as conn:
            names = {name: read(blob) for name, blob in conn.root().items()}
            assert names == {"a": b"above", "b": b"b0", "c": b"above"}
        assert site.read_all() == {"a": b"changed", "b": b"b0"}

    @sites(place=["below", "changes", "changes by record"])
    @pytest.mark.parametrize("above", ["temporary", "ours"])
    def test_pushed_storage_reads_all_levels_and_its_pop_gives_back_the_lower(
        self, site, s3, tmp_path, above
    ):
        """As tests stack a database for each layer."""
        site.write("a", b"changed")
        changes = None
        if above == "ours":
            changes, _client = around(s3, tmp_path, MappingStorage(), "above", "above")
        before = site.below.state()
        upper = self.pushed(site.storage, changes)
        self.check_pushed(site, upper)
        assert upper.storage.pop() is site.storage
        assert site.read_all() == {"a": b"changed", "b": b"b0"}
        assert site.below.state() == before
        assert len(keys(s3, "above/")) == (2 if above == "ours" else 0)

    @sites(place=["around"])
    def test_storage_that_is_pushed_around_reads_all_levels(self, site):
        """It is pushed onto ours, and not onto what is inside."""
        site.write("a", b"changed")
        self.check_pushed(site, self.pushed(site.storage))

    @sites(place=["around"])
    def test_demostorage_over_ours_around_another_reads_all_levels(self, site):
        """As plone.testing stacks them."""
        site.write("a", b"changed")
        upper = DemoStorage(base=site.storage, close_base_on_close=False)
        db = DB(upper)
        self.check_pushed(site, db)
        db.close()

    @sites([("s3", "changes", "FileStorage")])
    def test_popped_storage_is_the_base(self, site):
        """Its changes are closed, and it goes on."""
        site.write("a", b"changed")
        below = site.storage.pop()
        assert not site.storage.changes.is_open
        assert below.is_open
        db = DB(below)
        with db.transaction() as conn:
            assert read(conn.root()["a"]) == b"a1"


class TestProxy:
    @sites()
    def test_it_says_that_it_has_blobs(self, site):
        """DB looks for that, and which of the storages says so does not matter."""
        assert IBlobStorage.providedBy(site.storage)

    @sites(place=OURS_ABOVE)
    def test_temporary_directory_is_ours(self, site, no_stray_directories):
        """What is written there can be renamed into the cache."""
        path = site.storage.temporaryDirectory()
        assert os.path.isdir(path)
        assert path.endswith("/cache/tmp")
        assert no_stray_directories()

    @sites([("s3", "changes", "FileStorage"), ("s3", "around", "FileStorage")])
    def test_everything_is_closed_with_it(self, site, tmp_path):
        """What is inside, and what is below, once and for all."""
        ours = site.storage if site.below.client is None else None
        parts = [site.storage.base, site.storage.changes]
        site.close()
        for part in (ours, *parts):
            assert not getattr(part, "is_open", False)
        FileStorage(f"{tmp_path}/Changes.fs").close()  # its lock is free


class TestConfiguration:
    """As a site writes it; the rest of this module takes the parts in its hands."""

    @pytest.fixture
    def parts(self, s3, tmp_path):
        """Return a function that gives the text of one of our sections, named or not."""
        below = Below("s3", s3, tmp_path)

        def parts(name, path, prefix, read_only="false", base=None, **options):
            options = {"s3_prefix": prefix, "cache": f"cache-{name or 'around'}", **options}
            base = base or f"<filestorage>\npath {path}\nread-only {read_only}\n</filestorage>"
            text = section(s3, tmp_path, base=base, **options)
            return text.replace("<s3blobstorage>", f"<s3blobstorage {name}>")

        self.below = below
        return parts

    def open(self, text):
        return databaseFromString(f"%import zodb_s3blobs\n<zodb>\n{text}\n</zodb>")

    def check(self, text, s3):
        before = self.below.state()
        db = self.open(text)
        with db.transaction() as conn:
            assert {name: read(blob) for name, blob in conn.root().items()} == {
                "a": b"a1", "b": b"b0",
            }  # fmt: skip
            with conn.root()["a"].open("w") as file:
                file.write(b"changed")
        with db.transaction() as conn:
            assert read(conn.root()["a"]) == b"changed"
            assert read(conn.root()["b"]) == b"b0"
        assert self.below.state() == before
        db.close()
        return keys(s3, "changes/")

    def test_section_as_base(self, parts, s3, tmp_path):
        """The changes are temporary, and so are their blobs."""
        below = parts("base", f"{tmp_path}/Below.fs", "below", "true")
        assert self.check(f"<demostorage>\n{below}\n</demostorage>", s3) == []

    @pytest.mark.parametrize("addressing", [None, "auto", "record"])
    def test_section_as_changes(self, parts, s3, tmp_path, addressing):
        """Over another section, with a prefix of its own."""
        options = {"addressing": addressing} if addressing else {}
        below = parts("base", f"{tmp_path}/Below.fs", "below", "true")
        changes = parts("changes", f"{tmp_path}/Changes.fs", "changes", **options)
        (key,) = self.check(f"<demostorage>\n{below}\n{changes}\n</demostorage>", s3)
        name = key.rpartition("/")[2].removesuffix(".blob")
        assert (len(name) == 32) == (addressing == "record")

    @pytest.mark.parametrize("changes", ["", "filestorage", "mappingstorage"])
    @pytest.mark.parametrize("below", ["s3", "blob-dir"])
    def test_section_around(self, s3, tmp_path, parts, below, changes):
        """With what a DemoStorage can have inside; a blob-dir of its base is welcome."""
        if below == "s3":
            base = parts("base", f"{tmp_path}/Below.fs", "below", "true")
        else:
            (tmp_path / "other").mkdir()
            self.below = Below("blob-dir", s3, tmp_path / "other")
            base = filestorage(tmp_path / "other", blob_dir=tmp_path / "other/blobs")
            base = base.replace("Data.fs", "Below.fs\nread-only true")
            base = base.replace("<filestorage>", "<filestorage base>")
        if changes:
            path = f"path {tmp_path}/Changes.fs\n" if changes == "filestorage" else ""
            changes = f"<{changes} changes>\n{path}</{changes}>\n"
        inside = f"<demostorage>\n{base}\n{changes}</demostorage>"
        (key,) = self.check(parts("", None, "changes", base=inside), s3)
        assert len(key.rpartition("/")[2].removesuffix(".blob")) == 32

    def test_base_and_changes_in_one_place_are_refused(self, parts, tmp_path):
        """A pack of the changes would take the blobs of the base for garbage."""
        below = parts("base", f"{tmp_path}/Below.fs", "below", "true")
        changes = parts("changes", f"{tmp_path}/Changes.fs", "below")
        inside = f"<demostorage>\n{below}\n</demostorage>"
        for text in (
            f"<demostorage>\n{below}\n{changes}\n</demostorage>",
            parts("", None, "below", base=inside),
        ):
            with pytest.raises(ValueError, match="s3-prefix of its own"):
                self.open(text)
