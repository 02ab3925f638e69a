"""Several ZEO clients commit, undo, pack and sweep at once: no sweep takes what anyone needs."""

import pytest

from .relstorages import ChildError
from .relstorages import raises_there
from .relstorages import wait_until
from .storages import PATIENCE
from .storages import TcpProxy
from .test_relstorage_processes import BusySite
from .test_relstorage_processes import check_all
from .zeoclients import shared_cluster
from .zeoclients import ZeoSite


HOUR = 3600
# Short, so that sweeps delete while commits are under way; no commit takes half as long.
GRACE = 8
# Objects that the first sweep deletes.
GARBAGE = 20


@pytest.fixture
def cluster(request):
    """A `ZeoCluster` on a server that goes on."""
    with shared_cluster(request) as cluster:
        yield cluster


class TestCommitBesideSweep:
    @pytest.mark.parametrize("name", ["new", "rewritten"])
    def test_committed_after_the_listing_stays(self, cluster, name):
        """Listed while no record refers to it, committed before the server is asked."""
        with TcpProxy(cluster.location.endpoint_url) as proxy:
            one = cluster.start("one", gc_grace="0s")
            two = cluster.start("two", gc_grace="0s", location=proxy.location(cluster.location))
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
        assert (report["listed"], report["kept"], report["deleted"]) == (2, 2, 0)
        cluster.check_packed(**{"rewritten": 1, name: 2})

    @pytest.mark.parametrize("name", ["new", "rewritten"])
    def test_committed_after_the_sweep_stays(self, cluster, name):
        """Uploaded and listed, and younger than the grace period."""
        one, two = cluster.start("one"), cluster.here("two")
        one.commit(1, "rewritten")
        one.hold("beginning")
        one.begin("commit", 2, name)
        one.wait_for("beginning")
        report = two.sweep()
        assert (report["kept"], report["in_flight"], report["deleted"]) == (1, 1, 0)
        one.go_on()
        one.result()
        cluster.check_packed(**{"rewritten": 1, name: 2})

    def test_long_transaction_commits_objects_that_a_sweep_leaves_alone(self, cluster):
        """It uploads again before its vote; what it uploaded first gets too old and is deleted."""
        one, two = (cluster.start(name, gc_grace="1h") for name in ("one", "two"))
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
        report = two.sweep()
        # Their oids are above all that are known; what is young is not asked about.
        assert (report["in_flight"], report["foreign"], report["deleted"]) == (2, 2, 0)
        one.go_on()
        one.result()
        assert two.sweep()["in_flight"] == 2
        cluster.check_exact(other=1, a=2, b=2)


class TestUndoPackAndSweep:
    def test_sweep_beside_an_undo_that_waits_and_a_pack_takes_nothing_from_it(self, cluster):
        """One has voted to undo, another packs on the server, a third sweeps: then all go on.

        A FileStorage, with or without us, ends a pack with an error when an undo has brought back
        meanwhile what it has left out.
        """
        one, two, three = (cluster.start(name, gc_grace="0s") for name in ("one", "two", "three"))
        one.commit(1, "a", "b")
        (first, other) = cluster.objects()
        one.commit(2, "a")
        one.hold("voted")
        one.begin("last_undone")
        one.wait_for("voted")
        two.begin("pack")
        # In the end it needs the lock that the undo has got.
        wait_until(cluster.database.path.with_suffix(".fs.pack").exists)
        report = three.sweep()
        assert (report["kept"], report["deleted"]) == (3, 0)
        one.go_on()
        one.result()
        with raises_there("Exception"):
            two.result()
        three.sweep()
        assert {first, other} <= set(cluster.objects())
        cluster.check_packed(a=1, b=1)

    def test_revision_that_an_undo_brings_back_while_the_server_is_asked_is_kept(self, cluster):
        """A third packs, too: its history is no longer what the sweep was told."""
        one, two, three = (cluster.start(name, gc_grace="0s") for name in ("one", "two", "three"))
        one.commit(1, "a")
        one.commit(2, "a")
        three.hold("told")
        three.begin("sweep")
        three.wait_for("told")
        one.last_undone()
        two.pack()
        three.go_on()
        # The pack has deleted the other one, which three saw before.
        report = three.result()
        assert (report["kept"], report["garbage"]) == (2, 0)
        cluster.check_packed(a=1)

    def test_pack_goes_on_beside_a_pack_and_commits_that_it_has_not_seen(self, cluster):
        """Between the server's pack and the sweep anything may happen."""
        one, two = (cluster.start(name, gc_grace="0s") for name in ("one", "two"))
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
        two.last_undone()
        one.go_on()
        one.result()
        cluster.check_packed(a=3, c=3)

    def test_two_sweeps_delete_the_same_once(self, cluster):
        """What the other has deleted already is no error, and what is new stays."""
        one, two = (cluster.start(name, gc_grace="0s") for name in ("one", "two"))
        one.commit(1, "a", "b")
        one.commit(2, "a")
        one.delete("b")
        one.hold("deleting")
        one.begin("pack")
        one.wait_for("deleting")
        two.commit(3, "a", "c")
        assert two.sweep()["deleted"] == 2
        one.go_on()
        one.result()
        cluster.check_packed(a=3, c=3)


def leave_garbage(cluster, site):
    """Leave objects that nobody can want any more, which the first sweep deletes; return them."""
    names = [f"g{number}" for number in range(GARBAGE)]
    site.commit(1, *names)
    site.delete(*names)
    cluster.pack_base()
    garbage = set(cluster.objects())
    cluster.backdate(HOUR, *garbage)
    return garbage


class Loop(ZeoSite):
    """A client that commits in a loop."""

    def commit_until(self, enough):
        """Change two blobs with each number; a third is new, and the one before is removed.

        :param enough: path of a file that exists when the last one may come.
        :returns: that number.
        """
        number = 1
        self.commit(number, "a", "b", "c1")
        while number < 20 or not enough.exists():
            number += 1
            self.commit(number, "a", "b", f"c{number}")
            self.delete(f"c{number - 1}")
        return number


def test_commits_in_a_loop_beside_packs_in_a_loop_are_all_there(cluster, tmp_path):
    """The grace period is longer than a commit; the packer reads each as it comes."""
    writer = cluster.start("writer", cls=Loop, gc_grace=f"{GRACE}s")
    packer = cluster.start("packer", gc_grace=f"{GRACE}s")
    garbage = leave_garbage(cluster, packer)
    writer.commit(0, "a", "b")
    writer.begin("commit_until", tmp_path / "enough")
    rounds = last = 0
    while writer.is_busy():
        packer.pack()
        report = packer.sweep()
        assert report["foreign"] == report["failed"] == 0
        last, before = packer.read("a"), last
        assert last >= before
        rounds += 1
        if rounds == 3:
            (tmp_path / "enough").touch()
    number = writer.result()
    assert rounds >= 3
    assert len(garbage) == GARBAGE
    assert not garbage & set(cluster.objects())
    cluster.check_packed(**{"a": number, "b": number, f"c{number}": number})


class BusyClient(BusySite, ZeoSite):
    """A client of four threads, of two."""

    threads = 4
    rounds = 25


@pytest.mark.slow
def test_eight_threads_of_two_clients_under_a_packer_lose_nothing(cluster, tmp_path):
    """Commits, conflicts and retries beside sweeps that delete; in the end all fits exactly."""
    options = {"cls": BusyClient, "gc_grace": f"{GRACE}s"}
    workers = [cluster.start(name, **options) for name in ("one", "two")]
    packer = cluster.start("packer", **options)
    garbage = leave_garbage(cluster, packer)
    known = packer.prepare()
    enough = tmp_path / "enough"
    for number, worker in enumerate(workers):
        worker.begin("work", number * BusyClient.threads, enough)
    rounds = 0
    while any(worker.is_busy() for worker in workers):
        try:
            packer.pack(2)
        except ChildError as error:
            # To decide takes too long, perhaps.
            if "TransientError" not in error.names:
                raise
        rounds += 1
        if rounds > 2 and not garbage & set(cluster.objects()):
            enough.touch()
    results = [worker.result() for worker in workers]
    assert rounds > 2
    assert not garbage & set(cluster.objects())
    assert all(conflicts for _committed, _deleted, conflicts in results)
    known += [entry for committed, _deleted, _conflicts in results for entry in committed]
    gone = set().union(*(deleted for _committed, deleted, _conflicts in results))
    check_all(cluster, BusyClient, known, gone)
