"""The way back from references: afterwards every blob is where older versions look for it."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import ReadOnlyError
from ZODB.utils import p64
from ZODB.utils import u64

from zodb_s3blobs import rewriting
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.relstoragebase import RelStorageBase

from .services.location import keys
from .storages import BLOB_RECORD
from .storages import Failure
from .storages import make_storage
from .storages import PLAIN_RECORD
from .storages import random_bytes
from .storages import read
from .storages import section
from .storages import start
from .storages import write_file


COUNT = 5


class Site:
    """A database over RelStorage; some of its blobs have two revisions."""

    def __init__(self, location, directory, keep_history):
        self.location = location
        self.directory = directory
        self.keep_history = keep_history
        self.open()
        with self.db.transaction() as conn:
            for number in range(COUNT):
                conn.root()[number] = Blob(contents(number, "first"))
        for number in (1, 2, 3):
            self.write(number, "second")

    def open(self, cache="cache", **options):
        base = relstorage(self.directory, self.keep_history, **options)
        self.storage, self.client = make_storage(
            self.location, self.directory, cache, base=base, gc_grace=0.0
        )
        self.db = DB(self.storage)

    def reopen(self, cache, **options):
        self.db.close()
        self.open(cache, **options)

    def write(self, number, revision):
        with self.db.transaction() as conn, conn.root()[number].open("w") as file:
            file.write(contents(number, revision))

    def names(self):
        """Return (oid, serial) of the current revisions of the blobs, by number."""
        with self.db.transaction() as conn:
            for blob in conn.root().values():
                blob._p_activate()
            return {number: (b._p_oid, b._p_serial) for number, b in conn.root().items()}

    def stamp(self, number):
        oid, _serial = self.names()[number]
        return read_reference(self.record(oid))

    def record(self, oid):
        instance = self.storage.new_instance()
        try:
            return instance.load(oid)[0]
        finally:
            instance.release()

    def check_contents(self, without=()):
        with self.db.transaction() as conn:
            for number, blob in conn.root().items():
                if number not in without:
                    revision = "second" if number in (1, 2, 3) else "first"
                    assert read(blob) == contents(number, revision)

    def check_left(self):
        """All blobs are under their tids with their bytes, and after a pack nothing else is."""
        names = self.names()
        for number, name in names.items():
            assert blob_key(*name) in keys(self.location)
            assert self.stamp(number) is None
        self.db.pack(time.time() + 1)
        assert keys(self.location) == sorted(blob_key(*name) for name in names.values())
        self.reopen("cold")
        assert self.names() == names
        self.check_contents()


def relstorage(directory, keep_history, **options):
    lines = [f"{name.replace('_', '-')} {value}" for name, value in options.items()]
    history = f"keep-history {str(keep_history).lower()}"
    inner = "\n".join([history, *lines, f"<sqlite3>\ndata-dir {directory}/sqlite\n</sqlite3>"])
    return storageFromString(f"%import relstorage\n<relstorage>\n{inner}\n</relstorage>")


def contents(number, revision):
    return random_bytes((number, revision), 1000)


@pytest.fixture(params=[True, False], ids=["history", "history-free"])
def site(request, s3, tmp_path):
    site = Site(s3, tmp_path, request.param)
    yield site
    site.db.close()


def test_all_blobs_come_under_their_tids(site):
    """After one run no current record has a reference, and a second run has nothing to do."""
    report = site.storage.rewrite_by_tid()
    assert (report.rewritten, report.missing) == (COUNT, 0)
    again = site.storage.rewrite_by_tid()
    assert (again.copied, again.rewritten, again.missing) == (0, 0, 0)
    site.check_left()


def test_revisions_that_stay_get_copies(s3, tmp_path):
    """With history, each revision that has a reference is under its own tid, too."""
    site = Site(s3, tmp_path, keep_history=True)
    before = set(site.names().values())
    site.write(1, "third")
    report = site.storage.rewrite_by_tid()
    assert (report.copied, report.rewritten) == (COUNT + 4, COUNT)
    assert {blob_key(*name) for name in before | set(site.names().values())} <= set(keys(s3))
    site.db.close()


def test_records_are_as_plain_zodb_writes_them(site):
    """What remains in the base is byte for byte what a Blob's record is without this package."""
    site.storage.rewrite_by_tid()
    for oid, _serial in site.names().values():
        assert site.record(oid) == BLOB_RECORD


def test_run_that_s3_stopped_is_continued(site, monkeypatch):
    """A failing copy stops the run with an error; all stays readable, the next run ends it."""
    monkeypatch.setattr(rewriting, "BATCH", 2)
    copies_before = 2 * COUNT if site.keep_history else 3
    fail = Failure()
    site.client.before["copy_object"] = lambda *args: (
        fail() if site.client.count("copy_object") > copies_before else None
    )
    with pytest.raises(TransientS3Error):
        site.storage.rewrite_by_tid()
    assert 0 < [site.stamp(number) for number in range(COUNT)].count(None) < COUNT
    site.check_contents()
    site.client.before.clear()
    assert 0 < site.storage.rewrite_by_tid().rewritten < COUNT
    site.check_left()


def test_aborted_batch_leaves_no_copies(s3, tmp_path):
    """What a failing batch had copied for its own transaction is deleted again."""
    site = Site(s3, tmp_path, keep_history=False)
    before = keys(s3)
    fail, calls = Failure(), itertools.count(1)
    site.client.after["copy_object"] = lambda *args: fail() if next(calls) == 3 else None
    with pytest.raises(TransientS3Error):
        site.storage.rewrite_by_tid()
    assert keys(s3) == before
    site.db.close()


def test_change_by_others_meanwhile_is_kept(site):
    """What another connection commits between the copy and the record is what remains."""

    def change_once(*args):
        del site.client.after["copy_object"]
        site.write(2, "third")

    site.client.after["copy_object"] = change_once
    site.storage.rewrite_by_tid()
    site.reopen("cold")
    with site.db.transaction() as conn:
        assert read(conn.root()[2]) == contents(2, "third")
        assert read(conn.root()[1]) == contents(1, "second")
    assert site.stamp(2) is None


def test_tid_is_never_below_one_that_others_committed(site):
    """Whoever commits with a later tid meanwhile makes the run choose another one, or give up."""

    def commit_an_hour_ahead(*args):
        with site.lock:
            instance = site.storage.new_instance()
            tid = p64(u64(instance.lastTransaction()) + 60 * (1 << 32))
            txn = TransactionMetaData()
            instance.tpc_begin(txn, tid)
            instance.restore(p64(9999), tid, PLAIN_RECORD, "", None, txn)
            instance.tpc_vote(txn)
            instance.tpc_finish(txn)
            instance.release()

    site.lock = threading.Lock()
    before = site.names()
    site.client.after["copy_object"] = commit_an_hour_ahead
    with pytest.raises(TransientS3Error):
        site.storage.rewrite_by_tid()
    del site.client.after["copy_object"]
    site.reopen("cold")
    assert site.names() == before
    site.check_contents()
    assert site.storage.rewrite_by_tid().rewritten == COUNT


def test_blob_that_is_nowhere_is_left_as_it_is(site):
    """One missing blob does not keep the others from being rewritten, and is counted."""
    oid, _serial = site.names()[4]
    stamp = site.stamp(4)
    site.client.delete_object(blob_key(oid, stamp))
    # Of a transaction that was lost; without a key its oid would not be met at all.
    path = write_file(b"lost", site.directory)
    site.client.upload_file(path, blob_key(oid, b"\1" * 16))
    site.reopen("cold")
    report = site.storage.rewrite_by_tid()
    assert (report.rewritten, report.missing) == (COUNT - 1, 1)
    assert read_reference(site.record(oid)) == stamp
    site.check_contents(without=[4])


def test_read_only_storage_refuses(site):
    """Nothing is asked of S3 for a base that cannot be written."""
    site.db.close()
    base = relstorage(site.directory, site.keep_history, read_only="true")
    storage, client = make_storage(site.location, site.directory, "read-only", base=base)
    with pytest.raises(ReadOnlyError):
        storage.rewrite_by_tid()
    assert client.calls == []
    storage.close()


def test_filestorage_that_took_over_references_is_rewritten(site, s3, tmp_path):
    """A copy of the database in a FileStorage carries them, too, until it is rewritten."""
    copy, _client = make_storage(s3, tmp_path, "copy", gc_grace=0.0)
    copy.copyTransactionsFrom(site.storage)
    report = copy.rewrite_by_tid()
    assert (report.rewritten, report.missing) == (COUNT, 0)
    db = DB(copy)
    with db.transaction() as conn:
        for number, blob in conn.root().items():
            revision = "second" if number in (1, 2, 3) else "first"
            assert read(blob) == contents(number, revision)
            assert blob_key(blob._p_oid, blob._p_serial) in keys(s3)
    db.close()


def test_connections_over_a_filestorage_see_the_new_revisions(site, s3, tmp_path):
    """An object that a pooled connection has loaded is read again after a pack and an eviction."""
    storage, _client = make_storage(s3, tmp_path, "copy", cache_size=1)
    storage.copyTransactionsFrom(site.storage)
    db = DB(storage)
    conn = db.open()
    assert read(conn.root()[1]) == contents(1, "second")
    conn.close()
    storage.rewrite_by_tid()
    db.pack(time.time() + 1)
    conn = db.open()
    assert read(conn.root()[2]) == contents(2, "second")  # which takes the place in the cache
    assert read(conn.root()[1]) == contents(1, "second")
    conn.close()
    db.close()


@pytest.mark.parametrize("keep_history", [True, False])
def test_nobody_commits_between_the_check_of_the_tid_and_the_end(
    s3, tmp_path, postgresql, monkeypatch, keep_history
):
    """On PostgreSQL, too: others would never learn of a revision below what they have seen."""
    section = (
        f"<relstorage>\nkeep-history {str(keep_history).lower()}\n<postgresql>\n"
        f"dsn {postgresql.new_database()}\n</postgresql>\n</relstorage>"
    )

    def opened(cache):
        base = storageFromString(f"%import relstorage\n{section}")
        return make_storage(s3, tmp_path, cache, base=base)[0]

    db, other = DB(opened("one")), opened("two")
    with db.transaction() as conn:
        conn.root()["blob"] = Blob(b"first")
    conn = db.open(transaction.TransactionManager())
    hold, committing = RelStorageBase.hold_commits, []

    def hold_then_commit_elsewhere(self, instance):
        hold(self, instance)
        conn.root()["number"] = 1
        committing.append(start(conn.transaction_manager.commit))
        committing[0].join(0.3)
        assert committing[0].is_alive()

    monkeypatch.setattr(RelStorageBase, "hold_commits", hold_then_commit_elsewhere)
    assert other.rewrite_by_tid().rewritten == 1
    committing[0].result()
    conn.transaction_manager.begin()
    with conn.root()["blob"].open("w") as file:
        file.write(b"second")
    conn.transaction_manager.commit()
    assert read(conn.root()["blob"]) == b"second"
    conn.close()
    db.close()
    other.close()


@pytest.mark.parametrize("keep_history", [True, False])
def test_rewriting_beside_writers_that_never_pause(s3, tmp_path, postgresql, keep_history):
    """Nobody meets another error than a conflict, and what was committed last is what is there."""
    section = (
        f"<relstorage>\nkeep-history {str(keep_history).lower()}\n<postgresql>\n"
        f"dsn {postgresql.new_database()}\n</postgresql>\n</relstorage>"
    )

    def opened(cache):
        base = storageFromString(f"%import relstorage\n{section}")
        return make_storage(s3, tmp_path, cache, base=base)[0]

    db, other, count = DB(opened("one")), opened("two"), 40
    with db.transaction() as conn:
        for number in range(count):
            conn.root()[number] = Blob(b"0")
    stop, last = threading.Event(), {}

    def write(first):
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        # Each blob has one writer, so that what it has committed last is known.
        for turn in itertools.count(1):
            number = first + 2 * (turn % (count // 2))
            manager.begin()
            try:
                with conn.root()[number].open("w") as file:
                    file.write(b"%d" % turn)
                manager.commit()
                last[number] = b"%d" % turn
            except ConflictError:
                manager.abort()
            if stop.is_set():
                return conn.close()

    writers = [start(write, first) for first in (0, 1)]
    other.rewrite_by_tid()
    stop.set()
    for writer in writers:
        writer.result()
    other.rewrite_by_tid()
    assert other.rewrite_by_tid().rewritten == 0
    db.close()
    other.close()
    db = DB(opened("cold"))
    with db.transaction() as conn:
        for number, blob in conn.root().items():
            assert read(blob) == last.get(number, b"0")
            assert blob_key(blob._p_oid, blob._p_serial) in keys(s3)
    db.close()


class LosingRuns:
    """Runs over a FileStorage whose blob is by record, and what others commit beside them.

    :ivar others: called in turn, each with the tid of an attempt that has copied its blob.
    """

    def __init__(self, location, directory, monkeypatch):
        self._seconds = 0.0
        # What others take their time for makes the next attempt choose a tid ahead of the clock.
        clocks = SimpleNamespace(
            monotonic=lambda: self._seconds, time=time.time, gmtime=time.gmtime
        )
        monkeypatch.setattr(rewriting, "time", clocks)
        self.storage, client = make_storage(location, directory, addressing="record", gc_grace=0.0)
        self.db = DB(self.storage)
        self.change(b"first")
        self.others = []
        client.after["copy_object"] = self._copied

    def _copied(self, source, target):
        tid = parse_key(target)[1]
        if tid > self.db.lastTransaction():  # no copy of a revision that stays as history
            self.others.pop(0)(tid)

    def run(self, *others):
        assert self.others == []
        self.others += others
        return self.storage.rewrite_by_tid()

    def change(self, data):
        """Change the blob."""
        with self.db.transaction() as conn:
            blob = conn.root().setdefault("blob", Blob())
            with blob.open("w") as file:
                file.write(data)

    def conflict(self, tid):
        self.change(b"second")

    def commit(self, tid):
        with self.db.transaction() as conn:
            conn.root()["number"] = conn.root().get("number", 0) + 1

    def overtake(self, tid):
        self._seconds += 10
        while self.db.lastTransaction() <= tid:
            self.commit(tid)


def test_tids_of_a_filestorage_never_go_backwards(s3, tmp_path, monkeypatch):
    """Whatever tids the attempts had that were too late, conflicted or failed; a pack works."""
    runs = LosingRuns(s3, tmp_path, monkeypatch)
    with pytest.raises(TransientS3Error, match="says the test"):
        runs.run(runs.overtake, runs.conflict, Failure())
    # An attempt that conflicted had a tid ahead of the clock: from there on the others go on.
    assert runs.run(runs.overtake, runs.commit).rewritten == 1
    assert runs.others == []
    runs.commit(None)
    tids = [each.tid for each in runs.storage.iterator()]
    assert tids == sorted(set(tids))
    runs.db.pack(time.time() + 2 * rewriting.LONGEST_LEAD)
    with runs.db.transaction() as conn:
        blob = conn.root()["blob"]
        assert read(blob) == b"second"
        assert keys(s3) == [blob_key(blob._p_oid, blob._p_serial)]
    runs.db.close()


def test_begin_that_fails_leaves_no_lock(site, s3, tmp_path):
    """A FileStorage has taken its lock by then: others can still commit."""
    base = FileStorage(f"{tmp_path}/Copy.fs")
    storage, _client = make_storage(s3, tmp_path, "copy", base=base)
    storage.copyTransactionsFrom(site.storage)
    begin, fail = base.tpc_begin, Failure(OSError("says the test"), times=1)

    def begin_and_fail(*args):
        begin(*args)
        fail()

    base.tpc_begin = begin_and_fail
    with pytest.raises(OSError, match="says the test"):
        storage.rewrite_by_tid()
    assert storage.rewrite_by_tid().rewritten == COUNT
    storage.close()


def test_storage_inside_a_wrapper_without_a_database_is_rewritten(s3, tmp_path):
    """As an operator opens it from a configuration; there is no connection to tell."""
    text = section(s3, tmp_path, addressing="record")
    text = f"%import zodb_s3blobs\n%import zc.zlibstorage\n<zlibstorage>\n{text}\n</zlibstorage>"
    db = DB(storageFromString(text))
    with db.transaction() as connection:
        connection.root()["blob"] = Blob(b"bytes")
    db.close()
    storage = storageFromString(text)
    assert storage.rewrite_by_tid().rewritten == 1
    storage.close()
    db = DB(storageFromString(text.replace("/cache", "/empty")))
    with db.transaction() as connection:
        blob = connection.root()["blob"]
        assert read(blob) == b"bytes"
        assert blob_key(blob._p_oid, blob._p_serial) in keys(s3)
    db.close()
