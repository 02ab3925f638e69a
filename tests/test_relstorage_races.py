"""Races between processes on one RelStorage: no sweep takes what anyone still needs."""

import pytest
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from .relstorages import ChildError
from .relstorages import cluster_of
from .relstorages import contents
from .relstorages import raises_there
from .relstorages import wait_until
from .storages import PATIENCE
from .storages import TcpProxy


HOUR = 3600

both_histories = pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(("postgresql", True), id="postgresql"),
        pytest.param(("postgresql", False), id="postgresql free"),
    ],
    indirect=True,
)
with_history = pytest.mark.parametrize(
    "cluster", [pytest.param(("postgresql", True), id="postgresql")], indirect=True
)
without_history = pytest.mark.parametrize(
    "cluster",
    [
        pytest.param(("postgresql", False), id="postgresql free"),
        pytest.param(("sqlite3", False), id="sqlite3 free"),
    ],
    indirect=True,
)


@pytest.fixture
def cluster(request):
    """A `Cluster` on the database that the test names."""
    with cluster_of(request, *request.param) as cluster:
        yield cluster


def check_end(cluster, **expected):
    """Read all blobs from an empty cache, sweep without a grace period: only they remain.

    :param expected: the number of the contents of each blob.
    """
    last = cluster.start("the last one", gc_grace="0s")
    assert {name: last.read(name) for name in last.names()} == expected
    last.sweep()
    assert cluster.objects() == cluster.references()


@both_histories
class TestCommitBesideSweep:
    @pytest.mark.parametrize("name", ["new", "rewritten"])
    def test_committed_after_the_listing_stays(self, cluster, name):
        """Listed while no record refers to it, committed before the base is asked."""
        with TcpProxy(cluster.location.endpoint_url) as proxy:
            location = proxy.location(cluster.location)
            one = cluster.start("one", gc_grace="0s")
            two = cluster.start("two", gc_grace="0s", location=location)
            one.commit(1, "rewritten")
            one.hold("voted")
            one.begin("commit", 2, name)
            one.wait_for("voted")
            # The answer was made, and has not come yet
            proxy.hold(lambda direction, chunk: direction == "down")
            two.begin("sweep")
            assert proxy.reached.wait(PATIENCE)
            one.go_on()
            one.result()
            proxy.release()
            report = two.result()
        replaced = name == "rewritten" and not cluster.database.keep_history
        assert (report["listed"], report["kept"], report["deleted"]) == (2, 2 - replaced, replaced)
        check_end(cluster, **{"rewritten": 1, name: 2})

    @pytest.mark.parametrize("name", ["new", "rewritten"])
    def test_committed_after_the_sweep_stays(self, cluster, name):
        """Uploaded and listed, and younger than the grace period."""
        one, two = (cluster.start(each) for each in ("one", "two"))
        one.commit(1, "rewritten")
        one.hold("voted")
        one.begin("commit", 2, name)
        one.wait_for("voted")
        report = two.sweep()
        assert (report["kept"], report["in_flight"], report["deleted"]) == (1, 1, 0)
        one.go_on()
        one.result()
        check_end(cluster, **{"rewritten": 1, name: 2})

    def test_long_transaction_commits_objects_that_a_sweep_leaves_alone(self, cluster):
        """It uploads again before its vote; what it uploaded first gets too old and is deleted."""
        one, two = (cluster.start(each, gc_grace="1h") for each in ("one", "two"))
        one.commit(1, "other")
        before = set(cluster.objects())
        one.hold("voted")
        one.begin("commit_slowly", "commit", 0.6 * HOUR, 2, "a", "b")
        one.wait_for("commit")
        wait_until(lambda: len(cluster.objects()) == 3)
        first = set(cluster.objects()) - before
        one.go_on()
        one.wait_for("voted")
        second = set(cluster.objects()) - before - first
        assert len(second) == 2
        # Another half an hour later
        cluster.backdate(1.1 * HOUR, *first)
        cluster.backdate(0.5 * HOUR, *second)
        assert two.sweep()["deleted"] == 2
        assert set(cluster.objects()) == before | second
        one.go_on()
        one.result()
        check_end(cluster, other=1, a=2, b=2)

    @pytest.mark.parametrize("part", [0.9, 1.1])
    def test_finish_too_long_after_the_vote_is_refused_and_may_be_retried(self, cluster, part):
        """A sweep would delete the object while the base waits for its commit lock."""
        one = cluster.start("one", gc_grace="1h")
        one.commit(1, "a")
        one.begin("commit_slowly", "tpc_vote", part * HOUR, 2, "a")
        one.wait_for("tpc_vote")
        one.go_on()
        with raises_there("TransientError"):
            one.result()
        one.commit(3, "a")
        check_end(cluster, a=3)


@with_history
class TestUndoBesideSweep:
    def begin_undo(self, cluster, one):
        """Let it undo the second of two revisions; return the key of the first."""
        one.commit(1, "a")
        (first,) = cluster.references()
        one.commit(2, "a")
        one.hold("voted")
        one.begin("undo", one.last())
        one.wait_for("voted")
        return first

    def end_undo(self, cluster, one, first):
        """Let it finish while a sweep is waiting for it."""
        cluster.database.wait_until_blocked()
        assert first not in cluster.references()
        assert first in cluster.objects()
        one.go_on()
        one.result()

    def test_pack_of_another_process_waits_for_the_undo(self, cluster):
        """The revision that it goes back to has gone, and its own is not committed."""
        one, two = (cluster.start(each, gc_grace="0s") for each in ("one", "two"))
        first = self.begin_undo(cluster, one)
        two.begin("pack")
        self.end_undo(cluster, one, first)
        two.result()
        assert first in cluster.references()
        check_end(cluster, a=1)

    def test_sweep_after_a_pack_of_a_third_waits_for_the_undo(self, cluster):
        """It does not matter who has packed."""
        one, two = (cluster.start(each, gc_grace="0s") for each in ("one", "two"))
        first = self.begin_undo(cluster, one)
        cluster.pack_base()
        two.begin("sweep")
        self.end_undo(cluster, one, first)
        assert two.result()["deleted"] == 0
        check_end(cluster, a=1)

    def test_pack_of_a_third_during_a_sweep_takes_nothing_from_the_undo(self, cluster):
        """What the first look has seen is kept, though it goes before the decision."""
        one, two = (cluster.start(each, gc_grace="0s") for each in ("one", "two"))
        one.commit(1, "garbage")
        one.delete("garbage")
        cluster.pack_base()
        (garbage,) = cluster.objects()
        first = self.begin_undo(cluster, one)
        two.hold("settling")
        two.begin("sweep")
        two.wait_for("settling")
        cluster.pack_base()
        two.go_on()
        self.end_undo(cluster, one, first)
        assert two.result()["deleted"] == 1
        assert garbage not in cluster.objects()
        check_end(cluster, a=1)


@with_history
class TestUndoOfBlobsByTid:
    """The database was a FileStorage: its records carry no reference."""

    def convert(self, cluster, directory, *revisions):
        """Start a process on a copy of a FileStorage; return it with the tids.

        :param revisions: (name, number) of each transaction.
        """
        files = f"{directory}/Data.fs", f"{directory}/blobs"
        db = DB(FileStorage(files[0], blob_dir=files[1]))
        tids = []
        for name, number in revisions:
            with db.transaction() as conn:
                blob = conn.root().setdefault(name, Blob())
                with blob.open("w") as file:
                    file.write(contents(name, number))
            tids.append(db.lastTransaction())
        db.close()
        cluster.convert(FileStorage(files[0], blob_dir=files[1]))
        return cluster.start("one", gc_grace="0s"), tids

    def test_two_transactions_undone_in_one_restore_what_each_has_changed(self, cluster, tmp_path):
        """What only the first of them has changed is not taken back any further by the second."""
        revisions = [("x", 1), ("y", 1), ("y", 2), ("x", 2), ("x", 3)]
        one, tids = self.convert(cluster, tmp_path, *revisions)
        one.undo(tids[4], tids[2])
        two = cluster.start("two")
        assert (two.read("x"), two.read("y")) == (2, 1)

    def test_revision_packed_away_during_the_undo_is_not_lost_silently(self, cluster, tmp_path):
        """Another process packs when the base has undone, and its bytes have not been copied."""
        one, tids = self.convert(cluster, tmp_path, ("x", 1), ("x", 2))
        one.hold("undone")
        one.begin("undo", tids[1])
        one.wait_for("undone")
        cluster.pack_base()
        one.go_on()
        try:
            one.result()
        except ChildError:
            expected = 2
        else:
            expected = 1
        assert cluster.start("two").read("x") == expected


@both_histories
class TestTwoAtOnce:
    def test_second_pack_is_refused_and_deletes_nothing(self, cluster):
        """RelStorage has one pack at a time; the other's sweep does not begin."""
        one, two = (cluster.start(each, gc_grace="0s") for each in ("one", "two"))
        one.commit(1, "a", "b")
        one.commit(2, "a")
        one.delete("b")
        one.hold("packing")
        one.begin("pack")
        one.wait_for("packing")
        before = cluster.objects()
        with raises_there("UnableToAcquirePackUndoLockError"):
            two.pack()
        assert cluster.objects() == before
        two.commit(1, "c")
        one.go_on()
        one.result()
        assert len(cluster.objects()) == 2
        two.pack()
        check_end(cluster, a=2, c=1)

    def test_two_sweeps_delete_the_same_once(self, cluster):
        """What the other has deleted already is no error, and what is new stays."""
        one, two = (cluster.start(each, gc_grace="0s") for each in ("one", "two"))
        one.commit(1, "a", "b")
        one.commit(2, "a")
        one.delete("b")
        one.hold("deleting")
        one.begin("pack")
        one.wait_for("deleting")
        assert two.sweep()["deleted"] == 2
        two.commit(3, "a", "c")
        two.pack()
        one.go_on()
        one.result()
        check_end(cluster, a=3, c=3)

    def test_pack_goes_on_beside_a_pack_and_a_commit_that_it_has_not_seen(self, cluster):
        """Between the base's pack and the sweep anything may happen."""
        one, two = (cluster.start(each, gc_grace="0s") for each in ("one", "two"))
        one.commit(1, "a", "b")
        one.commit(2, "a")
        one.hold("packed")
        one.begin("pack")
        one.wait_for("packed")
        two.commit(3, "a")
        two.delete("b")
        two.commit(3, "c")
        two.pack()
        two.commit(4, "a")
        one.go_on()
        one.result()
        check_end(cluster, a=4, c=3)


@without_history
class TestOlderReader:
    def test_reads_what_was_replaced_within_the_grace_period(self, cluster):
        """From an empty cache, after the change was committed, packed and swept by default."""
        writer, reader = cluster.start("writer"), cluster.start("reader")
        writer.commit(1, "a")
        (old,) = cluster.objects()
        reader.look()
        writer.commit(2, "a")
        # The object is old, the change is not
        cluster.backdate(25 * HOUR, old)
        writer.pack()
        assert reader.read_there("a") == 1
        reader.look_away()
        assert reader.read("a") == 2
        check_end(cluster, a=2)

    def test_without_a_grace_period_it_learns_that_it_is_gone(self, cluster):
        """No error but the one that says so, and never other bytes."""
        writer, reader = (cluster.start(each, gc_grace="0s") for each in ("writer", "reader"))
        writer.commit(1, "a")
        reader.look()
        writer.commit(2, "a")
        writer.pack()
        with raises_there("POSKeyError"):
            reader.read_there("a")
        reader.look_away()
        assert reader.read("a") == 2
        check_end(cluster, a=2)
