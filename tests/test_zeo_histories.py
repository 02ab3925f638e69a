"""Blobs by tid that ZEO clients go on with: what they undo gets references, and the right bytes."""

from base64 import encodebytes
from contextlib import closing
from functools import partial
import shutil

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import UndoError
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import z64

from zodb_s3blobs import commit
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key

from .relstorages import contents
from .relstorages import number_of
from .storages import Failure
from .storages import Gate
from .storages import make_storage
from .storages import open_db
from .storages import read
from .storages import start
from .storages import store_blob
from .storages import stored_twice
from .test_commit import Clocks
from .test_commit import GRACE
from .test_commit import RENEWED
from .zeoclients import own_cluster


class Former:
    """The database while it was a FileStorage, which one process had open.

    :param revisions: (name, number) of each transaction, None for an undo of the last one.
    """

    def __init__(self, *revisions):
        self._revisions = revisions
        #: their tids
        self.tids = []

    def fill(self, location, directory, path):
        """Commit the transactions."""
        base = f"<filestorage>\npath {path}\n</filestorage>"
        self._run(open_db(location, directory, cache="former", base=base))

    def _run(self, db):
        with closing(db):
            for revision in self._revisions:
                if revision is None:
                    db.undo(db.undoLog(0, 1)[0]["id"])
                    transaction.commit()
                else:
                    name, number = revision
                    with db.transaction() as conn:
                        if name not in conn.root():
                            conn.root()[name] = Blob()
                        with conn.root()[name].open("w") as file:
                            file.write(contents(name, number))
                self.tids.append(db.lastTransaction())


class FormerBlobDir(Former):
    """The same without S3; its blobs were in a directory."""

    def fill(self, location, directory, path):
        base = f"<filestorage>\npath {path}\nblob-dir {directory}/blobs\n</filestorage>"
        self._run(DB(storageFromString(base)))


@pytest.fixture
def went_on(request):
    """Return a function that fills a FileStorage and has a ZEO server serve it; a `ZeoCluster`."""
    clusters = []

    def go_on(former):
        context = own_cluster(request, former.fill)
        clusters.append(context)
        return context.__enter__()

    yield go_on
    for context in clusters:
        context.__exit__(None, None, None)


def by_tid(cluster):
    """Return the (oid, tid) of all revisions that have no reference."""
    return {name for name, key in cluster.database.blobs().items() if key == blob_key(*name)}


def undo_id(tid):
    return encodebytes(tid)[:-1]


def undone(site, *tids):
    """Undo transactions in one, and return its tid."""
    site.undo(*tids)
    return site.last()


def referring(cluster, tid):
    """Return the keys that the revisions of a transaction refer to; none of them is a tid's."""
    blobs = cluster.database.blobs()
    found = {name: key for name, key in blobs.items() if name[1] == tid}
    assert not set(found) & by_tid(cluster)
    return set(found.values())


def check_records(cluster):
    """No transaction has two records of one object."""
    with closing(FileStorage(str(cluster.database.path), read_only=True)) as storage:
        assert stored_twice(storage) == []


class TestOldBlobs:
    def test_each_client_reads_them_and_changes_get_references(self, went_on):
        """Both forms in one history, read as of any time."""
        former = Former(("a", 1), ("b", 1), ("a", 2))
        cluster = went_on(former)
        one, two = cluster.here("one"), cluster.here("two")
        assert (one.read("a"), two.read("a"), two.read("b")) == (2, 2, 1)
        one.commit(3, "a")
        assert two.read("a") == 3
        assert len(by_tid(cluster)) == 3
        for number, tid in ((1, former.tids[1]), (2, former.tids[2]), (3, one.last())):
            conn = two.db.open(transaction.TransactionManager(), at=tid)
            assert number_of("a", read(conn.root()["a"])) == number
            conn.close()
        cluster.check_packed(a=3, b=1)

    def test_sweep_keeps_them_while_they_are_revisions(self, went_on):
        """A client's pack takes the older ones, by tid as by reference."""
        cluster = went_on(Former(("a", 1), ("a", 2), ("b", 1)))
        site = cluster.here("one", gc_grace="0s")
        assert site.sweep()["kept"] == 3
        site.commit(3, "a")
        assert site.sweep()["kept"] == 4
        site.pack()
        assert len(by_tid(cluster)) == 1
        cluster.check_packed(a=3, b=1)

    def test_those_of_another_directory_are_read_and_undone_from_there(self, went_on):
        """They need not be in the bucket yet: an undo brings them there."""
        former = FormerBlobDir(("a", 1), ("a", 2))
        cluster = went_on(former)
        source = f"<blobdir-source>\npath {cluster.directory}/blobs\n</blobdir-source>"
        options = {"base": f"{source}\n{cluster.database.section}"}
        site = cluster.here("one", **options)
        assert site.read("a") == 2
        undone(site, former.tids[1])
        shutil.rmtree(f"{cluster.directory}/blobs")
        assert len(cluster.objects()) == 1
        cluster.check(a=1).pack()
        cluster.check_packed(a=1)


class TestUndo:
    def test_undone_change_gets_a_reference_and_the_bytes_before_it(self, went_on):
        """Copied inside the bucket, under a key that the record tells."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        tid = undone(cluster.here("one"), former.tids[1])
        assert len(referring(cluster, tid)) == 1
        cluster.check_packed(a=1)

    def test_redo_of_an_undone_change_brings_its_bytes_again(self, went_on):
        """Those of a revision by tid; and again, and from the other client."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        one, two = cluster.here("one"), cluster.here("two")
        first = undone(one, former.tids[1])
        second = undone(two, first)
        assert (one.read("a"), two.read("a")) == (2, 2)
        assert len(referring(cluster, second)) == 1
        third = undone(one, second)
        assert (one.read("a"), two.read("a")) == (1, 1)
        # What it brings back has a reference already.
        assert referring(cluster, third) == referring(cluster, first)
        cluster.check_packed(a=1)

    def test_several_changes_undone_in_one_transaction_bring_what_was_before_all(self, went_on):
        """The blob that only the first of them has changed goes no further back.

        What was copied first and is not wanted in the end is garbage, and not in flight.
        """
        former = Former(("x", 1), ("y", 1), ("x", 2), ("y", 2), ("x", 3))
        cluster = went_on(former)
        one = cluster.here("one", gc_grace="0s")
        tid = undone(one, former.tids[4], former.tids[2], former.tids[3])
        assert len(referring(cluster, tid)) == 2
        report = one.sweep()
        assert (report["kept"], report["in_flight"]) == (7, 0)
        assert cluster.objects() == cluster.references()
        cluster.check_packed(x=1, y=1)

    def test_changes_of_both_forms_undone_in_one_transaction(self, went_on):
        """Back over a reference to a revision by tid: its bytes, and no others."""
        former = Former(("x", 1), ("y", 1), ("x", 2))
        cluster = went_on(former)
        one = cluster.here("one")
        one.commit(3, "x", "y")
        three = one.last()
        one.commit(4, "x")
        undone(one, one.last(), three, former.tids[2])
        cluster.check_exact(x=1, y=1)
        # And all the way forward again
        last = one.last()
        undone(cluster.here("two"), last)
        cluster.check_packed(x=4, y=3)

    def test_change_of_a_reference_back_to_a_tid_and_forth(self, went_on):
        """Undo of the first change over ZEO, its redo, and the undo of that."""
        former = Former(("a", 1))
        cluster = went_on(former)
        one = cluster.here("one")
        one.commit(2, "a")
        change = referring(cluster, one.last())
        back = undone(one, one.last())
        cluster.check(a=1)
        forth = undone(one, back)
        assert referring(cluster, forth) == change
        cluster.check(a=2)
        undone(one, forth)
        cluster.check_packed(a=1)

    def test_undone_creation_and_its_redo(self, went_on):
        """The object has no blob in between; then it has one with a reference."""
        former = Former(("other", 1), ("a", 1))
        cluster = went_on(former)
        one, two = cluster.here("one"), cluster.here("two")
        tid = undone(one, former.tids[1])
        assert two.names() == ["other"]
        cluster.check_exact(other=1)
        redone = undone(two, tid)
        assert one.read("a") == 1
        assert len(referring(cluster, redone)) == 1
        cluster.check_packed(a=1, other=1)

    def test_creation_that_was_undone_before_is_redone_by_a_client(self, went_on):
        """The FileStorage has undone it, and the blob is under the tid of the creation."""
        former = Former(("other", 1), ("a", 1), None)
        cluster = went_on(former)
        undone(cluster.here("one"), former.tids[2])
        cluster.check_packed(a=1, other=1)

    def test_change_that_was_undone_before_is_redone_by_a_client(self, went_on):
        """The undoing revision, too, has a blob under its tid."""
        former = Former(("a", 1), ("a", 2), None)
        cluster = went_on(former)
        one = cluster.here("one")
        assert one.read("a") == 1
        undone(one, former.tids[2])
        cluster.check_packed(a=2)

    @pytest.mark.parametrize("undo_first", [True, False])
    def test_transaction_that_stores_other_blobs_too(self, went_on, undo_first):
        """In one transaction of the storage, in either order."""
        former = Former(("a", 1), ("b", 1), ("a", 2))
        cluster = went_on(former)
        one = cluster.here("one")
        oid, tid = next(name for name in by_tid(cluster) if name[1] == former.tids[1])
        changes = TransactionMetaData()
        storage = one.db.storage
        storage.tpc_begin(changes)
        steps = [
            lambda: storage.undo(undo_id(former.tids[2]), changes),
            lambda: store_blob(storage, changes, oid, contents("b", 2), tid),
        ]
        for step in steps if undo_first else reversed(steps):
            step()
        storage.tpc_vote(changes)
        last = storage.tpc_finish(changes)
        assert len(referring(cluster, last)) == 2
        cluster.check_packed(a=1, b=2)

    def test_blob_stored_after_its_undo_in_one_transaction_is_the_stored_one(self, went_on):
        """A second store of an object wins, as on any storage; its copy is given up."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        one = cluster.here("one")
        ((oid, _tid), _) = by_tid(cluster)
        changes = TransactionMetaData()
        storage = one.db.storage
        storage.tpc_begin(changes)
        storage.undo(undo_id(former.tids[1]), changes)
        store_blob(storage, changes, oid, contents("a", 3), former.tids[1])
        storage.tpc_vote(changes)
        storage.tpc_finish(changes)
        cluster.check_packed(a=3)


class TestRecords:
    """A FileStorage's pack takes the first of several that a transaction has of an object."""

    def test_undone_changes_survive_a_pack_to_a_moment_before_them(self, went_on):
        """Each undo refers to one before it: a pack finds the one record that is meant."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        one = cluster.here("one", gc_grace="0s")
        one.commit(3, "a")
        first = one.last()
        undone(one, first)
        one.commit(4, "a")
        undone(one, one.last())
        cluster.check(a=2)
        before, after = (TimeStamp(tid).timeTime() for tid in (former.tids[1], first))
        one.pack_to((before + after) / 2)
        cluster.check(a=2)
        one.pack()
        cluster.check_packed(a=2)

    def test_several_changes_undone_at_once_are_redone_and_undone_again(self, went_on):
        """Of both forms, and all the way forward again, and back."""
        former = Former(("x", 1), ("y", 1), ("x", 2))
        cluster = went_on(former)
        one = cluster.here("one")
        one.commit(3, "x", "y")
        three = one.last()
        one.commit(4, "x")
        tid = undone(one, one.last(), three, former.tids[2])
        tid = undone(one, tid)
        cluster.check(x=4, y=3)
        undone(one, tid)
        cluster.check(x=1, y=1)
        cluster.check_packed(x=1, y=1)

    def test_blob_that_is_uploaded_again_has_one_record(self, went_on, monkeypatch):
        """With the stamp of the last upload."""
        clocks = Clocks()
        services = partial(commit.BlobServices, clocks=clocks)
        monkeypatch.setattr("zodb_s3blobs.storage.BlobServices", services)
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        base = storageFromString(cluster.database.section)
        storage, client = make_storage(
            cluster.location, cluster.directory, "one", base=base, gc_grace=GRACE
        )
        oid, tid = max(by_tid(cluster))
        changes = TransactionMetaData()
        with closing(storage):
            storage.tpc_begin(changes)
            store_blob(storage, changes, oid, contents("a", 3), tid)
            store_blob(storage, changes, storage.new_oid(), b"new", z64)
            clocks.advance(RENEWED)
            storage.tpc_vote(changes)
            tid = storage.tpc_finish(changes)
            assert client.count("upload_file") == 4
        assert len(referring(cluster, tid)) == 2
        check_records(cluster)
        cluster.check(a=3)


class TestFailures:
    def open(self, cluster, name):
        base = storageFromString(cluster.database.section)
        return make_storage(cluster.location, cluster.directory, name, base=base)

    def test_copy_that_fails_aborts_the_undo(self, went_on):
        """Nothing has changed, and the undo may be tried again."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        storage, client = self.open(cluster, "one")
        client.before["copy_object"] = Failure(times=1)
        objects = cluster.objects()
        db = DB(storage)
        db.undo(undo_id(former.tids[1]))
        with pytest.raises(TransientS3Error):
            transaction.commit()
        transaction.abort()
        assert cluster.objects() == objects == cluster.references()
        cluster.check(a=2)
        db.undo(undo_id(former.tids[1]))
        transaction.commit()
        db.close()
        cluster.check_packed(a=1)

    def test_change_of_another_client_during_the_copy_wins(self, went_on):
        """The server refuses to undo what is no longer current; the copy is deleted."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        storage, client = self.open(cluster, "one")
        other = cluster.here("other")
        gate = client.after["copy_object"] = Gate()
        db = DB(storage)

        def undo():
            manager = transaction.TransactionManager()
            db.undo(undo_id(former.tids[1]), manager.get())
            manager.commit()

        thread = start(undo)
        gate.wait()
        other.commit(3, "a")
        gate.open()
        with pytest.raises((ConflictError, UndoError)):
            thread.result()
        db.close()
        assert cluster.objects() == cluster.references()
        cluster.check_packed(a=3)

    def test_pack_of_another_client_during_the_copy_ends_the_undo(self, went_on):
        """What it would bring back has gone; nothing has changed."""
        former = Former(("a", 1), ("a", 2))
        cluster = went_on(former)
        storage, client = self.open(cluster, "one")
        gate = client.before["copy_object"] = Gate()
        db = DB(storage)

        def undo():
            manager = transaction.TransactionManager()
            db.undo(undo_id(former.tids[1]), manager.get())
            manager.commit()

        thread = start(undo)
        gate.wait()
        cluster.here("other", gc_grace="0s").pack()
        gate.open()
        with pytest.raises((POSKeyError, UndoError)):
            thread.result()
        db.close()
        assert cluster.objects() == cluster.references()
        cluster.check_packed(a=2)
