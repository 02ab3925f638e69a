"""A client or the server is killed: what was committed is there with its blobs, and only that."""

import pytest

from .relstorages import raises_there
from .relstorages import wait_until
from .storages import PATIENCE
from .storages import TcpProxy
from .test_relstorage_crash import is_answer
from .test_relstorage_crash import is_completion
from .test_relstorage_crash import is_put
from .test_relstorage_crash import is_second_part
from .test_relstorage_crash import MiB
from .zeoclients import own_cluster
from .zeoclients import shared_cluster


@pytest.fixture
def cluster(request):
    """A `ZeoCluster` on a server that goes on."""
    with shared_cluster(request) as cluster:
        yield cluster


@pytest.fixture
def own(request):
    """A `ZeoCluster` on a server of its own."""
    with own_cluster(request) as cluster:
        yield cluster


@pytest.fixture
def proxy(request):
    """A `TcpProxy` in front of the server of `own` or `cluster`."""
    name = "own" if "own" in request.fixturenames else "cluster"
    server = request.getfixturevalue(name).database.server
    with TcpProxy(f"http://{server.address}") as proxy:
        yield proxy


def through(proxy, cluster):
    """Return the section of a client that reaches the server through a proxy."""
    return cluster.database.client(proxy.endpoint_url.rpartition("/")[2])


def is_call(name):
    """Match what a client sends from a call of the server's method on."""
    return lambda direction, chunk: direction == "up" and name in chunk


def is_answer_to(name):
    """Match the first that the server sends after a call of its method."""
    called = False

    def matches(direction, chunk):
        nonlocal called
        if direction == "up":
            called = called or name in chunk
            return False
        return called

    return matches


def check_afterwards(cluster, **expected):
    """Compare all blobs from an empty cache, commit once more, sweep, pack: only they remain.

    :param expected: the number of the contents of each blob.
    """
    last = cluster.check(**expected)
    # Its oid is above those of the killed transaction, which are not known as ours until then.
    last.commit(7, "after", "rewritten")
    last.sweep()
    assert cluster.objects() == cluster.references()
    last.pack()
    expected |= {"after": 7, "rewritten": 7}
    assert cluster.objects() == cluster.references()
    assert len(cluster.objects()) == len(expected)
    # The same site goes on in the cache directory of the one that was killed.
    again = cluster.here("victim")
    assert {name: again.read(name) for name in again.names()} == expected


class TestClient:
    def begin(self, cluster, **options):
        victim = cluster.start("victim", **options)
        victim.commit(1, "rewritten", "other")
        return victim

    @pytest.mark.parametrize(
        ("point", "lost"),
        [
            ("staged", True),
            ("uploaded", True),
            ("beginning", True),
            ("begun", True),
            ("voting", True),
            ("voted", True),
            ("in finish", False),
            ("base finished", False),
        ],
    )
    def test_kill_at_a_step_of_the_commit_leaves_all_or_nothing(self, cluster, point, lost):
        """What the server has finished is there with its bytes, what it has not leaves no trace."""
        victim = self.begin(cluster)
        victim.hold(point)
        victim.begin("commit", 2, "rewritten", "new")
        victim.wait_for(point)
        victim.kill()
        committed = {} if lost else {"rewritten": 2, "new": 2}
        check_afterwards(cluster, **{"rewritten": 1, "other": 1, **committed})

    @pytest.mark.parametrize(
        ("matches", "lost"),
        [
            pytest.param(is_answer_to(b"vote"), True, id="answer to vote"),
            pytest.param(is_answer_to(b"tpc_finish"), False, id="answer to finish"),
        ],
    )
    def test_kill_while_the_server_has_answered_leaves_all_or_nothing(
        self, cluster, proxy, matches, lost
    ):
        """The answer has not come yet; the server's lock is free again."""
        victim = self.begin(cluster, base=through(proxy, cluster))
        proxy.hold(matches)
        victim.begin("commit", 2, "rewritten", "new")
        assert proxy.reached.wait(PATIENCE)
        victim.kill()
        committed = {} if lost else {"rewritten": 2, "new": 2}
        check_afterwards(cluster, **{"rewritten": 1, "other": 1, **committed})

    def test_commit_that_outlives_its_client_has_its_blobs(self, cluster, proxy):
        """The call was sent, and arrives after the client has gone."""
        victim = self.begin(cluster, base=through(proxy, cluster))
        sweeper = cluster.here("sweeper")
        proxy.hold(is_call(b"tpc_finish"))
        victim.begin("commit", 2, "rewritten", "new")
        assert proxy.reached.wait(PATIENCE)
        victim.kill()
        # By default what is young is left alone.
        assert sweeper.sweep()["in_flight"] == 2
        assert sweeper.read("rewritten") == 1
        proxy.release()
        wait_until(lambda: len(cluster.references()) == 4)
        check_afterwards(cluster, rewritten=2, other=1, new=2)

    def test_kill_in_the_queue_for_the_servers_lock_leaves_nothing(self, cluster):
        """While another client has voted; that one commits."""
        victim, other = self.begin(cluster), cluster.start("other")
        other.hold("voted")
        other.begin("commit", 3, "other")
        other.wait_for("voted")
        before = len(cluster.objects())
        victim.hold("voting")
        victim.begin("commit", 2, "rewritten", "new")
        victim.wait_for("voting")
        victim.go_on()
        assert len(cluster.objects()) == before + 2
        victim.kill()
        other.go_on()
        other.result()
        check_afterwards(cluster, rewritten=1, other=3)

    @pytest.mark.parametrize("matches", [is_put, is_answer, is_second_part, is_completion])
    def test_kill_in_the_middle_of_an_upload_leaves_nothing(self, cluster, matches):
        """A request that is cut off makes no object that is ever taken for a blob."""
        options = {"s3_multipart_threshold": "5MB", "s3_multipart_part_size": "5MB"}
        with TcpProxy(cluster.location.endpoint_url) as proxy:
            victim = self.begin(cluster, location=proxy.location(cluster.location), **options)
            proxy.hold(matches)
            if matches in (is_put, is_answer):
                victim.begin("commit", 2, "rewritten", "new")
            else:
                victim.begin("commit_large", 11 * MiB, "new")
            assert proxy.reached.wait(PATIENCE)
            victim.kill()
            proxy.release()
        check_afterwards(cluster, rewritten=1, other=1)

    @pytest.mark.parametrize(("point", "lost"), [("voted", True), ("in finish", False)])
    def test_kill_during_an_undo_leaves_all_or_nothing(self, cluster, point, lost):
        """The server's lock, which it holds then, is free again."""
        victim = self.begin(cluster)
        victim.commit(2, "rewritten")
        victim.hold(point)
        victim.begin("last_undone")
        victim.wait_for(point)
        victim.kill()
        check_afterwards(cluster, rewritten=2 if lost else 1, other=1)

    @pytest.mark.parametrize("point", ["packing", "packed", "asking", "deleting"])
    def test_kill_during_a_pack_loses_nothing(self, cluster, point):
        """The next sweep, or the next pack, deletes what is left."""
        victim = cluster.start("victim", gc_grace="0s")
        victim.commit(1, "rewritten", "other", "deleted")
        victim.commit(2, "rewritten")
        victim.delete("deleted")
        victim.hold(point)
        victim.begin("pack")
        victim.wait_for(point)
        victim.kill()
        check_afterwards(cluster, rewritten=2, other=1)


class TestServer:
    def begin(self, own, **options):
        client = own.start("victim", **options)
        client.commit(1, "rewritten", "other")
        return client

    def restart(self, own):
        own.database.server.kill()
        own.database.server.start()

    @pytest.mark.parametrize("point", ["uploaded", "beginning", "begun", "voting", "voted"])
    def test_kill_before_the_server_is_told_to_finish_aborts(self, own, point):
        """The client may retry; what it has uploaded is deleted, or garbage for a sweep."""
        client = self.begin(own)
        client.hold(point)
        client.begin("commit", 2, "rewritten", "new")
        client.wait_for(point)
        own.database.server.kill()
        client.go_on()
        # Its abort waits for the server.
        own.database.server.start()
        with raises_there("TransientError"):
            client.result()
        assert client.read("rewritten") == 1
        client.commit(3, "rewritten")
        check_afterwards(own, rewritten=3, other=1)

    @pytest.mark.parametrize(
        ("matches", "lost"),
        [
            pytest.param(is_call(b"vote"), True, id="vote"),
            pytest.param(is_answer_to(b"vote"), True, id="answer to vote"),
            pytest.param(is_call(b"tpc_finish"), True, id="finish"),
            pytest.param(is_answer_to(b"tpc_finish"), False, id="answer to finish"),
        ],
    )
    def test_kill_at_a_call_leaves_all_or_nothing(self, own, proxy, matches, lost):
        """Where the client does not know the outcome, it deletes nothing."""
        client = self.begin(own, base=through(proxy, own))
        proxy.hold(matches)
        client.begin("commit", 2, "rewritten", "new")
        assert proxy.reached.wait(PATIENCE)
        own.database.server.kill()
        proxy.cut()
        own.database.server.start()
        with raises_there("TransientError"):
            client.result()
        committed = {} if lost else {"rewritten": 2, "new": 2}
        expected = {"rewritten": 1, "other": 1, **committed}
        assert {name: client.read(name) for name in client.names()} == expected
        check_afterwards(own, **expected)

    def test_commit_whose_upload_outlasts_a_restart_succeeds(self, own):
        """The server hears of a transaction when its uploads are done, and not before."""
        client = self.begin(own)
        client.connect_before_going_on()
        client.hold("staged")
        client.begin("commit", 2, "rewritten", "new")
        client.wait_for("staged")
        self.restart(own)
        # By itself, while it stands still
        wait_until(lambda: "ServerProtocol" in own.database.server.log.read_text())
        other = own.here("other")
        assert other.read("rewritten") == 1
        client.go_on()
        client.result()
        assert other.read("rewritten") == 2
        check_afterwards(own, rewritten=2, other=1, new=2)

    def test_kill_during_an_undo_aborts_it(self, own):
        """It may be tried again.

        When the server goes after the vote, ZODB's TransactionalUndo forgets to abort, and the
        client's lock is not released, with or without us.
        """
        client = self.begin(own)
        client.commit(2, "rewritten")
        client.hold("voting")
        client.begin("last_undone")
        client.wait_for("voting")
        own.database.server.kill()
        client.go_on()
        own.database.server.start()
        with raises_there("TransientError"):
            client.result()
        assert client.read("rewritten") == 2
        client.last_undone()
        check_afterwards(own, rewritten=1, other=1)

    def test_kill_during_a_pack_loses_nothing(self, own):
        """What the server has not packed, no client sweeps."""
        site = own.here("one", gc_grace="0s")
        site.commit(1, "rewritten", "other")
        site.commit(2, "rewritten")
        with TcpProxy(f"http://{own.database.server.address}") as proxy:
            packer = own.start("packer", base=through(proxy, own), gc_grace="0s")
            proxy.hold(is_answer_to(b"pack"))
            packer.begin("pack")
            assert proxy.reached.wait(PATIENCE)
            own.database.server.kill()
            proxy.cut()
            own.database.server.start()
            with raises_there("TransientError"):
                packer.result()
        check_afterwards(own, rewritten=2, other=1)
