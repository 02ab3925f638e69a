"""A process on a shared RelStorage is killed: what was committed is there, and only that."""

import pytest

from .relstorages import cluster_of
from .storages import PATIENCE
from .storages import TcpProxy


MiB = 1 << 20


@pytest.fixture
def cluster(request):
    """A `Cluster` on the database that the test names."""
    with cluster_of(request, *request.param) as cluster:
        yield cluster


def each(*kinds, histories=(True, False)):
    """Run tests on databases of these kinds."""
    params = [
        pytest.param((kind, keep_history), id=kind if keep_history else f"{kind} free")
        for kind in kinds
        for keep_history in histories
    ]
    return pytest.mark.parametrize("cluster", params, indirect=True)


def check_afterwards(cluster, **expected):
    """Open with an empty cache, compare all blobs, commit once more, pack: only they remain.

    :param expected: the number of the contents of each blob.
    """
    cluster.database.wait_until_left()
    last = cluster.start("empty", gc_grace="0s")
    assert {name: last.read(name) for name in last.names()} == expected
    last.commit(7, "after", "rewritten")
    last.pack()
    assert cluster.objects() == cluster.references()
    # The same site goes on in the cache directory of the one that was killed
    again = cluster.start("victim")
    expected |= {"after": 7, "rewritten": 7}
    assert {name: again.read(name) for name in again.names()} == expected
    assert len(cluster.objects()) == len(expected)


@each("postgresql", "sqlite3")
@pytest.mark.parametrize(
    ("point", "lost"),
    [
        ("staged", True),
        ("uploaded", True),
        ("voted", True),
        ("in finish", False),
        ("base finished", False),
    ],
)
def test_kill_at_a_step_of_the_commit_leaves_all_or_nothing(cluster, point, lost):
    """What the base has finished is there with its bytes, what it has not leaves no trace.

    RelStorage commits before it calls the function given to tpc_finish.
    """
    victim = cluster.start("victim")
    victim.commit(1, "rewritten", "other")
    victim.hold(point)
    victim.begin("commit", 2, "rewritten", "new")
    victim.wait_for(point)
    victim.kill()
    committed = {} if lost else {"rewritten": 2, "new": 2}
    check_afterwards(cluster, **{"rewritten": 1, "other": 1, **committed})


@each("postgresql")
def test_commit_that_outlives_its_process_has_its_blobs(cluster):
    """The statement was sent, and PostgreSQL executes it after its client has gone."""
    victim, packer = (cluster.start(each) for each in ("victim", "packer"))
    victim.commit(1, "rewritten", "other")
    with cluster.database.commit_lock():
        victim.begin("commit", 2, "rewritten", "new")
        cluster.database.wait_until_blocked()
        victim.kill()
        packer.pack()
    packer.kill()
    check_afterwards(cluster, rewritten=2, other=1, new=2)


def is_put(direction, chunk):
    return chunk[:4] == b"PUT "


def is_answer(direction, chunk):
    return direction == "down"


def is_second_part(direction, chunk):
    return b"partNumber=2" in chunk


def is_completion(direction, chunk):
    return chunk[:5] == b"POST " and b"uploadId=" in chunk


@each("postgresql")
@pytest.mark.parametrize("matches", [is_put, is_answer, is_second_part, is_completion])
def test_kill_in_the_middle_of_an_upload_leaves_nothing(cluster, matches):
    """A request that is cut off makes no object that is ever taken for a blob."""
    options = {"s3_multipart_threshold": "5MB", "s3_multipart_part_size": "5MB"}
    with TcpProxy(cluster.location.endpoint_url) as proxy:
        location = proxy.location(cluster.location)
        victim = cluster.start("victim", location=location, **options)
        victim.commit(1, "rewritten", "other")
        proxy.hold(matches)
        if matches in (is_put, is_answer):
            victim.begin("commit", 2, "rewritten", "new")
        else:
            victim.begin("commit_large", 11 * MiB, "new")
        assert proxy.reached.wait(PATIENCE)
        victim.kill()
        proxy.release()
    check_afterwards(cluster, rewritten=1, other=1)


@each("postgresql", histories=[True])
@pytest.mark.parametrize(
    ("point", "lost"), [("undone", True), ("voted", True), ("in finish", False)]
)
def test_kill_during_an_undo_leaves_all_or_nothing(cluster, point, lost):
    """The commit lock, which it holds from the beginning, is free again."""
    victim = cluster.start("victim")
    victim.commit(1, "rewritten", "other")
    victim.commit(2, "rewritten")
    victim.hold(point)
    victim.begin("undo", victim.last())
    victim.wait_for(point)
    victim.kill()
    check_afterwards(cluster, rewritten=2 if lost else 1, other=1)


@each("postgresql")
@pytest.mark.parametrize("point", ["packing", "packed", "snapshot", "deleting"])
def test_kill_during_a_pack_loses_nothing(cluster, point):
    """The pack lock is free again, and the next pack deletes what is left."""
    victim = cluster.start("victim", gc_grace="0s")
    victim.commit(1, "rewritten", "other", "deleted")
    victim.commit(2, "rewritten")
    victim.delete("deleted")
    victim.hold(point)
    victim.begin("pack")
    victim.wait_for(point)
    victim.kill()
    check_afterwards(cluster, rewritten=2, other=1)
