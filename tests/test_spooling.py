"""A site with ``on-upload-failure spool``: what it commits while S3 is down is there, for ever."""

from concurrent.futures import wait
from contextlib import closing
from contextlib import suppress
from functools import cached_property
from itertools import count
import logging
import os
from pathlib import Path
import shutil
import signal
import threading
import time
import traceback
import warnings

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.utils import z64

from zodb_s3blobs import blobs
from zodb_s3blobs import draining
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.delivery import Delivery
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import NotUploadedError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.spool import Spool
from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.testing.server import EmbeddedS3
from zodb_s3blobs.uploads import UploadPool

from . import relstorages
from .disks import fill_up
from .disks import MEGABYTE
from .disks import on_disks
from .faults import FaultyServer
from .faults import refused_endpoint
from .faults import s3_error
from .relstorages import cluster_of
from .relstorages import contents
from .relstorages import raises_there
from .services.location import keys
from .services.location import new_bucket
from .services.process import ServiceMissing
from .storages import Gate
from .storages import HookedClient
from .storages import leftovers
from .storages import make_client
from .storages import open_db
from .storages import open_relstorage
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import store_blob
from .zeoclients import FILE


KINDS = ["tid", "record", "mapping", "relstorage", "free", "zeo"]
LARGE = 300_000


class S3:
    """A bucket as seen through a server in front of it, which a test lets go down."""

    def __init__(self, location, server):
        self.behind = location
        self._server = server
        self._released = threading.Event()

    @property
    def location(self):
        """The bucket as the sites see it."""
        return type(self.behind)(
            self._server.endpoint_url,
            self.behind.access_key,
            self.behind.secret_key,
            self.behind.bucket,
        )

    def down(self, how="refuses", which=lambda request: True):
        """Let S3 be down: it closes connections, or answers 503, or never.

        :param which: tells of a request whether it is concerned.
        """
        acts = {"refuses": self._refuse, "is busy": self._be_busy, "hangs": self._hang}
        self._server.instead = lambda request: acts[how]() if which(request) else None

    def deny(self, code, status):
        """Let S3 answer uploads with an error that an operator must mend."""
        self._server.instead = lambda request: (
            s3_error(status, code) if request.method == "PUT" else None
        )

    def up(self):
        """Let it answer again; what hangs goes on to the bucket, late."""
        self._server.instead = lambda request: None
        self._released.set()

    def _refuse(self):
        raise ConnectionError("S3 is down, says the test")

    def _be_busy(self):
        return s3_error(503, "SlowDown")

    def _hang(self):
        self._released.wait(PATIENCE)

    def requests(self, method):
        """Return how many requests came with a method."""
        return [request.method for request in self._server.requests].count(method)

    def found(self):
        """Return the keys of all objects."""
        return keys(self.behind)


class World:
    """A database, a bucket, and the hosts that share them.

    :param str kind: the base, and how its blobs are addressed.
    """

    def __init__(self, kind, s3, directory, request):
        self.kind = kind
        self.s3 = s3
        self.directory = directory
        self._mapping = MappingStorage()
        self._mapping.close = lambda: None
        self._opened = []
        if kind == "zeo":
            self._zeo = request.getfixturevalue("zeo").new(FILE)

    def base(self, read_only=False):
        """Open the storage inside once more."""
        if self.kind in ("tid", "record"):
            return FileStorage(f"{self.directory}/Data.fs", read_only=read_only)
        if self.kind == "mapping":
            return self._mapping
        if self.kind == "zeo":
            from ZEO.ClientStorage import ClientStorage

            address = "127.0.0.1", self._zeo.server.port
            return ClientStorage(address, storage=self._zeo.name, wait_timeout=PATIENCE)
        return open_relstorage(self.directory, keep_history=self.kind == "relstorage")

    def open(self, host="host", cache="cache", read_only=False, **options):
        """Open a `Site`: the same host has the same spool, another cache is an empty one."""
        site = Site(self, f"{self.directory}/{host}", cache, read_only, **options)
        self._opened.append(site)
        return site

    def another(self, *args):
        """Open a `Site` that reads what another one has open, where the base allows for that."""
        return self.open(*args, read_only=self.kind in ("tid", "record"))

    @property
    def is_shared(self):
        """Whether several hosts write."""
        return self.kind in ("relstorage", "free", "zeo")

    def close(self):
        self.s3.up()
        for site in self._opened:
            site.close()


def fail_from_the_spool(path, *args):
    if "/spool/" in path:
        raise TransientS3Error("the spool is not uploaded yet, says the test")


class Site:
    """One process of a host.

    :param bool spools: whether commits may go to the spool.
    :param bool keeps_spool: nothing is uploaded from there, until `upload_spool`.
    """

    def __init__(
        self,
        world,
        directory,
        cache,
        read_only,
        spools=True,
        keeps_spool=False,
        cache_size=1 << 30,
        timeout=10,
        pool=None,
    ):
        self.spool_dir = Path(directory) / "spool"
        place = world.s3.behind.endpoint_url, world.s3.behind.bucket
        options = {"max_attempts": 1, "max_pause": 0, "read_timeout": timeout}
        self.client = HookedClient(make_client(world.s3.location, **options))
        if keeps_spool:
            self.client.before["upload_file"] = fail_from_the_spool
        self.spool = Spool(str(self.spool_dir), place, spools)
        self.base = world.base(read_only)
        self.storage = S3BlobStorage(
            self.base,
            self.client,
            S3BlobCache(f"{directory}/{cache}", cache_size),
            addressing="record" if world.kind == "record" else "auto",
            gc_grace=0.0,
            spool=self.spool,
            pool=pool,
        )
        self.is_open = True

    @cached_property
    def db(self):
        """It makes a root object where there is none."""
        return DB(self.storage)

    def close(self):
        if self.is_open:
            self.is_open = False
            vars(self).get("db", self.storage).close()

    def upload_spool(self):
        """Upload what is in the spool, and see that it is empty."""
        self.client.before.clear()
        drain(self.storage)
        assert self.files() == []

    # What a site does

    def write(self, **contents):
        """Commit blobs by name, in one transaction."""
        with self.db.transaction() as conn:
            for name, data in contents.items():
                if name not in conn.root():
                    conn.root()[name] = Blob()
                with conn.root()[name].open("w") as file:
                    file.write(data)

    def read(self, *names):
        """Return the bytes of blobs, by default of all."""
        with self.db.transaction() as conn:
            names = names or sorted(name for name in conn.root() if name != "plain")
            return {name: read(conn.root()[name]) for name in names}

    def forget(self, *names):
        """Commit that the root no longer refers to blobs."""
        with self.db.transaction() as conn:
            for name in names:
                del conn.root()[name]

    def undo(self, which=0):
        """Undo a transaction: the last one, or the last but so many."""
        manager = transaction.TransactionManager()
        self.db.undo(self.db.undoLog(which, which + 1)[0]["id"], manager.get())
        manager.commit()

    def blob(self, name):
        """Context manager: a Blob of a connection of its own."""
        return _OpenBlob(self.db, name)

    # Looking

    def references(self):
        """Return the keys that the current revisions of the blobs refer to."""
        found = []
        with self.db.transaction() as conn:
            for name in conn.root():
                value = conn.root()[name]
                if isinstance(value, Blob):
                    value._p_activate()
                    found.append((value._p_oid, value._p_serial))
        has_instances = hasattr(self.storage, "new_instance")
        instance = self.storage.new_instance() if has_instances else self.storage
        try:
            records = {name: instance.load(name[0])[0] for name in found}
        finally:
            if has_instances:
                instance.release()
        return sorted(blob_key(o, read_reference(data) or t) for (o, t), data in records.items())

    def spooled(self):
        """Return how many blobs are in the spool."""
        return self.storage.stats()["spool_blobs"]

    def files(self):
        """Return the names of all files of the spool, but for its marker."""
        found = (path for path in self.spool_dir.rglob("*") if path.is_file())
        return sorted(path.name for path in found if path.name != "bucket")

    def check_drained(self, world, count):
        """Drain: the spool is empty, and this many objects are in the bucket."""
        self.upload_spool()
        assert len(world.s3.found()) == count

    def check_packed(self, world):
        """Pack: what current revisions refer to is in the bucket, and nothing else."""
        self.db.pack(time.time() + 1)
        assert world.s3.found() == self.references()


class _OpenBlob:
    def __init__(self, db, name):
        self._context = db.transaction()
        self._name = name

    def __enter__(self):
        return self._context.__enter__().root()[self._name]

    def __exit__(self, *exc_info):
        return self._context.__exit__(*exc_info)


@pytest.fixture
def store(s3):
    """An `S3`."""
    with FaultyServer(s3.endpoint_url) as server:
        yield S3(s3, server)


@pytest.fixture
def make_world(store, tmp_path, request):
    """Return a function that makes a `World` of a kind."""
    worlds = []

    def make(kind):
        worlds.append(World(kind, store, tmp_path, request))
        return worlds[0]

    yield make
    for world in worlds:
        world.close()


@pytest.fixture
def world(make_world, request):
    """A `World`; parametrize it by its kind."""
    return make_world(request.param)


def kinds(*names):
    return pytest.mark.parametrize("world", names, indirect=True)


DATA = {"first": b"first", "large": random_bytes("large", LARGE), "empty": b""}


# Commits


@kinds(*KINDS)
def test_commit_in_an_outage_is_read_on_the_host_and_arrives_afterwards(world):
    """By this process, by others of the host, after a restart without the cache; then from S3."""
    site = world.open()
    site.write(before=b"before", changed=b"old")
    world.s3.down()
    site.write(**DATA)
    site.write(changed=b"new")
    expected = {**DATA, "before": b"before", "changed": b"new"}
    assert site.read() == expected
    spooled = expected.keys() - {"before"}
    assert world.another("host", "of another process").read(*spooled) == {
        name: expected[name] for name in spooled
    }
    site.close()
    site = world.open(cache="after a restart")
    assert site.read(*spooled) == {name: expected[name] for name in spooled}
    assert len(world.s3.found()) == 2
    world.s3.up()
    site.check_drained(world, 2 + 4)
    assert world.another("another host", "cache").read() == expected
    site.check_packed(world)
    assert site.read() == expected


@pytest.mark.parametrize("how", ["is busy", "hangs"])
@kinds("tid", "record")
def test_any_kind_of_outage_leads_to_the_spool(world, how):
    """Errors of the server, and answers that do not come, are as good as no server."""
    site = world.open(timeout=0.3)
    world.s3.down(how)
    site.write(**DATA)
    assert site.spooled() == 3
    site.close()
    site = world.open(cache="empty", timeout=0.3)
    assert site.read() == DATA
    world.s3.up()
    site.storage.drain_spool()
    site.check_packed(world)
    assert world.another("another host", "cache").read() == DATA


@pytest.fixture
def server(rclone, tmp_path):
    """A server of this test's own, which it may stop; `rclone` skips where there is none."""
    (tmp_path / "server").mkdir()
    try:
        with EmbeddedS3(tmp_path / "server") as server:
            yield server
    except ServiceMissing as missing:
        pytest.skip(str(missing))


SPOOLS = {"on_upload_failure": "spool", "s3_max_attempts": "1"}


def drain(storage):
    """Drain a spool as soon as S3 is asked again."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return storage.drain_spool()
        except TransientS3Error:
            assert time.monotonic() < deadline, "S3 does not come back"
            time.sleep(0.02)


def test_site_of_a_configuration_survives_a_server_that_is_stopped(server, tmp_path):
    """With the keys of zope.conf, before and after a restart: nothing is missing in the end."""
    location = new_bucket(server)
    options = {**SPOOLS, "spool_dir": f"{tmp_path}/spool"}
    db = open_db(location, tmp_path, **options)
    with db.transaction() as conn:
        conn.root()["before"] = Blob(b"before")
    server.stop()
    with db.transaction() as conn:
        conn.root()["in the outage"] = Blob(b"in the outage")
    assert db.storage.stats()["s3_is_down"] == 1
    db.close()
    db = open_db(location, tmp_path, cache="empty", **options)
    with db.transaction() as conn:
        assert read(conn.root()["in the outage"]) == b"in the outage"
        conn.root()["after the restart"] = Blob(b"after the restart")
    server.start()
    drain(db.storage)
    assert db.storage.stats()["spool_blobs"] == 0
    db.close()
    db = open_db(location, tmp_path, cache="empty again", **options)
    with db.transaction() as conn:
        for name in ("before", "in the outage", "after the restart"):
            assert read(conn.root()[name]) == name.encode()
    assert len(keys(location)) == 3
    db.close()


@kinds("tid", "record")
def test_blobs_that_were_up_before_the_outage_are_not_spooled(world):
    """Of a mixed transaction each blob is in one place, and arrives once."""
    site = world.open()
    site.write(one=b"")
    uploaded = threading.Event()

    def go_down_behind_the_first(path, key, *args):
        # Not when it comes from the spool, perhaps just now.
        if "/spool/" not in path and Path(path).read_bytes() == b"second":
            assert uploaded.wait(PATIENCE)
            world.s3.down()

    site.client.before["upload_file"] = go_down_behind_the_first
    site.client.after["upload_file"] = lambda *args: uploaded.set()
    contents = {"one": b"first", "two": b"second"}
    site.write(**contents)
    assert site.spooled() == 1
    assert len(world.s3.found()) == 2
    site.client.before.clear()
    world.s3.up()
    site.check_drained(world, 3)
    assert world.another("another host").read() == contents
    site.check_packed(world)


@kinds("tid", "record")
def test_transaction_without_trouble_has_nothing_to_do_with_the_spool(world):
    """While S3 answers nothing is written there, nothing waits, and no name says that it did."""
    site = world.open()
    site.write(**DATA)
    assert site.files() == []
    assert not any(key.endswith(f"{b'wait'.hex()}.blob") for key in world.s3.found())
    numbers = site.storage.stats()
    assert (numbers["spooled_total"], numbers["spool_uploads_total"]) == (0, 0)


@kinds("tid", "record", "relstorage")
def test_conflict_in_an_outage_leaves_the_winner_s_blob_alone(world):
    """The loser is told as ever, and what it had spooled goes."""
    site = world.open()
    site.write(a=b"old")
    world.s3.down()
    manager = transaction.TransactionManager()
    conn = site.db.open(manager)
    with conn.root()["a"].open("w") as file:
        file.write(b"loser")
    site.write(a=b"winner")
    with pytest.raises(ConflictError):
        manager.commit()
    manager.abort()
    conn.close()
    assert site.spooled() == 1
    assert site.read() == {"a": b"winner"}
    assert leftovers(site.storage) == []
    world.s3.up()
    site.check_drained(world, 2)


@kinds("tid", "record")
def test_savepoints_in_an_outage_are_as_ever(world):
    """What was rolled back is not spooled, what was committed is."""
    site = world.open()
    world.s3.down()
    manager = transaction.TransactionManager()
    conn = site.db.open(manager)
    conn.root()["a"] = Blob(b"one")
    manager.savepoint()
    with conn.root()["a"].open("w") as file:
        file.write(b"two")
    savepoint = manager.savepoint()
    conn.root()["b"] = Blob(b"rolled back")
    manager.savepoint()
    savepoint.rollback()
    conn.root()["c"] = Blob(b"three")
    manager.commit()
    conn.close()
    assert site.spooled() == 2
    world.s3.up()
    site.check_drained(world, 2)
    assert world.another("another host").read() == {"a": b"two", "c": b"three"}


@kinds("tid")
def test_blob_that_is_larger_than_the_cache_is_read_from_the_spool(world):
    """What the cache cannot keep is here all the same."""
    site = world.open(cache_size=1000)
    world.s3.down()
    site.write(**DATA)
    assert site.read() == DATA
    site.close()
    site = world.open(cache_size=1000)
    assert site.read() == DATA
    world.s3.up()
    site.check_drained(world, 3)
    assert site.read() == DATA


# Step by step


class Steps:
    """A transaction at a storage, of blobs without an object around them."""

    def __init__(self, site):
        self._storage = instance_of(site)
        self._meta = TransactionMetaData()
        self._storage.tpc_begin(self._meta)

    def store(self, data, oid=None):
        """Store a new blob, or once more, and return its oid."""
        oid = oid or self._storage.new_oid()
        store_blob(self._storage, self._meta, oid, data, z64)
        return oid

    def vote(self):
        self._storage.tpc_vote(self._meta)

    def finish(self):
        return self._storage.tpc_finish(self._meta)

    def abort(self):
        self._storage.tpc_abort(self._meta)


def instance_of(site):
    storage = site.storage
    return storage.new_instance() if hasattr(storage, "new_instance") else storage


def load(site, oid, tid):
    """Return the bytes of a revision, as a transaction that begins now reads them."""
    with open(instance_of(site).loadBlob(oid, tid), "rb") as file:
        return file.read()


@kinds("tid", "record")
def test_second_store_after_a_vote_that_spooled_takes_the_place_of_the_first(world):
    """Only the last bytes of an object are kept, read and uploaded."""
    site = world.open()
    world.s3.down()
    steps = Steps(site)
    oid, other = steps.store(b"first"), steps.store(b"other")
    steps.vote()
    assert site.spooled() == 2
    steps.store(b"second", oid)
    steps.vote()
    assert site.spooled() == 2
    tid = steps.finish()
    site.close()
    site = world.open(cache="empty")
    assert (load(site, oid, tid), load(site, other, tid)) == (b"second", b"other")
    world.s3.up()
    site.check_drained(world, 2)
    site.close()
    site = world.open(cache="empty again")
    assert (load(site, oid, tid), load(site, other, tid)) == (b"second", b"other")


@kinds("tid", "record")
def test_s3_that_is_back_between_two_votes_gets_all(world):
    """What a first vote had spooled, a second store lets go up with the rest."""
    site = world.open()
    world.s3.down()
    steps = Steps(site)
    oid, other = steps.store(b"first"), steps.store(b"other")
    steps.vote()
    world.s3.up()
    steps.store(b"second", oid)
    steps.vote()
    tid = steps.finish()
    assert site.files() == []
    site.close()
    site = world.open(cache="empty")
    assert (load(site, oid, tid), load(site, other, tid)) == (b"second", b"other")


@kinds("tid", "record", "relstorage")
def test_abort_after_a_vote_that_spooled_removes_everything(world):
    """Nothing is left to be uploaded, now or later, and nothing beside it."""
    site = world.open()
    world.s3.down()
    steps = Steps(site)
    steps.store(b"first")
    steps.store(b"second")
    steps.vote()
    assert site.spooled() == 2
    steps.abort()
    assert site.files() == []
    assert leftovers(site.storage) == []
    world.s3.up()
    site.check_drained(world, 0)


@kinds("tid", "record")
def test_late_upload_does_not_bring_an_aborted_blob_back(world):
    """A request that was given up arrives after the abort: a pack removes what it has made."""
    site = world.open(timeout=0.3)
    site.write(kept=b"kept")
    world.s3.down("hangs", lambda request: request.method == "PUT")
    steps = Steps(site)
    steps.store(b"late")
    steps.vote()
    assert site.spooled() == 1
    steps.abort()
    world.s3.up()
    wait_until(lambda: len(world.s3.found()) == 2)
    assert site.storage.drain_spool().uploaded == 0
    assert site.files() == []
    site.write(next=b"next")
    site.check_packed(world)
    assert world.another("another host").read() == {"kept": b"kept", "next": b"next"}


@kinds("tid", "record")
def test_late_upload_of_a_committed_blob_changes_nothing(world):
    """It has the same bytes, or a key of its own that a pack removes."""
    site = world.open(timeout=0.3)
    world.s3.down("hangs", lambda request: request.method == "PUT")
    site.write(late=b"late")
    assert site.spooled() == 1
    world.s3.up()
    site.storage.drain_spool()
    wait_until(lambda: len(world.s3.found()) == (1 if world.kind == "tid" else 2))
    site.check_packed(world)
    assert world.another("another host").read() == {"late": b"late"}


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class LostAnswer(Exception):
    """The base finishes a transaction, or does not, and says neither."""


def lose_answer(base, has_finished, monkeypatch):
    finish = type(base).tpc_finish

    def raise_instead(self, meta, f=lambda tid: None):
        if has_finished:
            told.append(finish(self, meta, f))
        raise LostAnswer

    told = []
    monkeypatch.setattr(type(base), "tpc_finish", raise_instead)
    return told


@kinds("tid", "record", "relstorage", "zeo")
def test_outcome_that_is_not_known_keeps_the_spooled_blob(world, monkeypatch):
    """A base that raises in its finish may have committed: its blob stays, and is uploaded."""
    site = world.open()
    world.s3.down()
    steps = Steps(site)
    oid = steps.store(b"data")
    steps.vote()
    with monkeypatch.context() as patch:
        (told,) = [lose_answer(site.base, True, patch)]
        with pytest.raises(LostAnswer):
            steps.finish()
        steps.abort()
    assert site.spooled() == 1
    site.close()
    site = world.open(cache="empty")
    assert load(site, oid, told[0]) == b"data"
    world.s3.up()
    site.check_drained(world, 1)
    site.close()
    assert load(world.open(cache="empty again"), oid, told[0]) == b"data"


@kinds("tid", "record")
def test_outcome_that_is_not_known_and_was_none_leaves_garbage_for_a_pack(world, monkeypatch):
    """What is uploaded for nothing goes with the next pack."""
    site = world.open()
    site.write(kept=b"kept")
    world.s3.down()
    steps = Steps(site)
    steps.store(b"data")
    steps.vote()
    with monkeypatch.context() as patch:
        lose_answer(site.base, False, patch)
        with pytest.raises(LostAnswer):
            steps.finish()
        steps.abort()
    world.s3.up()
    site.check_drained(world, 2)
    site.write(next=b"next")
    site.check_packed(world)
    assert site.read() == {"kept": b"kept", "next": b"next"}


@kinds("tid", "record", "relstorage")
def test_vote_that_could_not_spool_does_not_succeed_the_second_time(world):
    """As long as the bytes are nowhere, no vote says that they are somewhere."""
    site = world.open()
    world.s3.down()
    steps = Steps(site)
    steps.store(b"data")
    aside = world.directory / "aside"
    site.spool_dir.rename(aside)
    for _number in range(2):
        with pytest.raises(TransientS3Error):
            steps.vote()
    aside.rename(site.spool_dir)
    steps.abort()
    assert site.files() == []


# Undo


@kinds("tid", "record", "relstorage", "zeo")
def test_undo_and_redo_in_an_outage(world):
    """An undo brings cached bytes back, a redo those of the spool; all of them arrive."""
    site = world.open()
    site.write(a=b"one", b=b"unchanged")
    site.write(a=b"two")
    world.s3.down()
    for expected in (b"one", b"two", b"one"):
        site.undo()
        if world.kind == "tid":  # by record the cache does not know that it has the bytes
            assert site.read() == {"a": expected, "b": b"unchanged"}
    world.s3.up()
    site.upload_spool()
    cold = world.another("another host")
    assert cold.read() == {"a": b"one", "b": b"unchanged"}
    site.check_packed(world)
    assert site.read() == {"a": b"one", "b": b"unchanged"}


@kinds("tid", "record", "relstorage")
def test_undo_of_what_was_committed_in_the_outage(world):
    """Bytes that only the spool has are brought back from there, with an empty cache too."""
    site = world.open()
    world.s3.down()
    site.write(a=b"one")
    site.write(a=b"two")
    site.close()
    site = world.open(cache="empty")
    site.undo()
    assert site.read() == {"a": b"one"}
    world.s3.up()
    site.upload_spool()
    assert world.another("another host").read() == {"a": b"one"}
    site.check_packed(world)


@kinds("tid", "record")
def test_undo_when_s3_is_back_and_the_spool_is_full(world):
    """What the bucket does not have yet is no missing blob."""
    site = world.open()
    world.s3.down()
    site.write(a=b"one")
    site.write(a=b"two")
    site.close()
    site = world.open(cache="empty", keeps_spool=True)
    world.s3.up()
    site.undo()
    assert site.read() == {"a": b"one"}
    site.upload_spool()
    assert world.another("another host").read() == {"a": b"one"}


@kinds("tid")
def test_undo_that_needs_bytes_of_the_bucket_is_refused_as_ever(world):
    """By tid an undo copies: what is neither cached nor spooled cannot be copied in an outage."""
    site = world.open()
    site.write(a=b"one")
    site.write(a=b"two")
    site.close()
    site = world.open(cache="empty")
    world.s3.down()
    with pytest.raises(TransientS3Error):
        site.undo()
    transaction.abort()
    assert site.files() == []
    world.s3.up()
    site.undo()
    assert site.read() == {"a": b"one"}


@kinds("tid", "record", "zeo")
def test_undo_of_a_creation_in_an_outage(world):
    """It needs no bytes, and its redo those of the creation."""
    site = world.open()
    site.write(kept=b"kept")
    world.s3.down()
    site.write(a=b"one")
    site.undo()
    assert site.read() == {"kept": b"kept"}
    site.undo()
    assert site.read() == {"a": b"one", "kept": b"kept"}
    site.undo()
    world.s3.up()
    site.upload_spool()
    site.check_packed(world)
    assert len(world.s3.found()) == 1
    assert world.another("another host").read() == {"kept": b"kept"}


# Pack


@kinds("tid", "record", "relstorage", "zeo")
def test_pack_and_sweep_leave_the_spool_alone(world):
    """In the outage, and when S3 is back and has not got everything yet."""
    site = world.open(keeps_spool=True)
    site.write(before=b"before", garbage=b"garbage")
    world.s3.down()
    site.write(**DATA)
    site.forget("garbage")
    with pytest.raises(TransientS3Error):
        site.db.pack(time.time() + 1)
    with pytest.raises(TransientS3Error):
        site.storage.sweep()
    assert site.spooled() == 3
    world.s3.up()
    site.db.pack(time.time() + 1)
    site.storage.sweep()
    assert site.spooled() == 3
    assert len(world.s3.found()) == 1
    site.check_drained(world, 4)
    site.check_packed(world)
    assert world.another("another host").read() == {**DATA, "before": b"before"}


@kinds("tid", "record", "free")
def test_pack_in_the_middle_of_an_upload_from_the_spool(world):
    """What has just arrived is referred to, and so is what comes behind it."""
    site = world.open()
    site.write(garbage=b"garbage")
    site.forget("garbage")
    world.s3.down()
    site.write(**DATA)
    packed = []

    def pack_once(*args):
        if not packed:
            packed.append(True)
            site.db.pack(time.time() + 1)

    site.client.after["upload_file"] = pack_once
    world.s3.up()
    site.check_drained(world, 3)
    assert packed
    site.check_packed(world)
    assert world.another("another host").read() == DATA


@kinds("tid", "record", "free")
def test_revision_that_was_packed_away_in_the_spool_is_garbage(world):
    """It is uploaded all the same, and goes with the next pack."""
    site = world.open(keeps_spool=True)
    site.write(kept=b"kept")
    world.s3.down()
    site.write(a=b"one")
    site.write(a=b"two", gone=b"gone")
    site.forget("gone")
    world.s3.up()
    site.db.pack(time.time() + 1)
    assert site.spooled() == 3
    site.check_drained(world, 4)
    site.check_packed(world)
    assert site.read() == {"a": b"two", "kept": b"kept"}


# What is no outage


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (404, "NoSuchBucket")])
@kinds("tid", "record")
def test_error_that_an_operator_must_mend_refuses_the_commit(world, status, code):
    """Nothing is spooled that S3 would never take."""
    site = world.open()
    site.write(before=b"before")
    world.s3.deny(code, status)
    with pytest.raises(PermanentS3Error):
        site.write(**DATA)
    assert site.files() == []
    assert leftovers(site.storage) == []
    world.s3.up()
    assert site.read() == {"before": b"before"}


@kinds("tid", "record")
def test_one_refused_blob_refuses_a_transaction_whose_others_are_in_an_outage(world):
    """The worse error decides: nothing of that transaction is spooled."""
    site = world.open()

    def fail(path, _key, cancelled):
        if Path(path).read_bytes() == b"denied":
            raise PermanentS3Error("403")
        wait_until(lambda: cancelled)
        raise TransientS3Error("down")

    site.client.before["upload_file"] = fail
    for written in ({"a": b"denied", "b": b"b"}, {"a": b"a", "b": b"denied"}):
        with pytest.raises(PermanentS3Error):
            site.write(**written)
        assert site.files() == []


class RememberingPool(UploadPool):
    """Remembers what it has started."""

    def __init__(self):
        super().__init__()
        self._started = []

    def start(self, work):
        self._started.append(super().start(work))
        return self._started[-1]

    def wait(self):
        """Return when all of it is done."""
        wait([upload.future for upload in self._started], PATIENCE)


@kinds("tid", "record")
def test_refused_blob_is_found_among_many_that_s3_did_not_take(world):
    """Whichever error comes first: when the vote decides, it looks at all of them."""
    pool = RememberingPool()
    site = world.open(pool=pool)

    def fail(path, *args):
        is_denied = Path(path).read_bytes() == b"denied"
        raise PermanentS3Error("403") if is_denied else TransientS3Error("down")

    site.client.before["upload_file"] = fail
    steps = Steps(site)
    for number in range(20):
        steps.store(b"denied" if number == 10 else b"other")
    pool.wait()
    with pytest.raises(PermanentS3Error):
        steps.vote()
    steps.abort()
    assert site.files() == []


@kinds("tid", "record")
def test_site_that_spools_no_more_uploads_what_it_has(world):
    """With `abort` again: no commit without S3, but what waits is read and goes up."""
    site = world.open()
    world.s3.down()
    site.write(**DATA)
    site.close()
    site = world.open(cache="empty", spools=False)
    assert site.read() == DATA
    with pytest.raises(TransientS3Error):
        site.write(refused=b"refused")
    assert site.spooled() == 3
    world.s3.up()
    site.check_drained(world, 3)
    assert world.another("another host").read() == DATA


# Copies of databases


@kinds("tid", "record", "relstorage")
def test_database_is_converted_in_an_outage(world):
    """All revisions come with their tids and bytes, and arrive under the keys of these."""
    with closing(source_database(world.directory)) as source:
        site = world.open()
        world.s3.down()
        site.storage.copyTransactionsFrom(source.storage)
        assert site.read() == {"a": b"two", "b": b"unchanged"}
        site.close()
        site = world.open(cache="empty")
        assert site.read() == {"a": b"two", "b": b"unchanged"}
        world.s3.up()
        site.storage.drain_spool()
        assert site.files() == []
        site.check_packed(world)
        assert world.another("another host").read() == {"a": b"two", "b": b"unchanged"}


def source_database(directory):
    db = DB(FileStorage(f"{directory}/source.fs", blob_dir=f"{directory}/source-blobs"))
    with db.transaction() as conn:
        conn.root()["a"], conn.root()["b"] = Blob(b"one"), Blob(b"unchanged")
    with db.transaction() as conn, conn.root()["a"].open("w") as file:
        file.write(b"two")
    return db


# The way back to keys by tid


@kinds("relstorage")
def test_copies_of_a_rewriting_are_in_the_bucket_or_it_says_that_they_are_not(world):
    """An outage in the middle stops it; the next run goes on from there."""
    site = world.open()
    site.write(a=b"one")
    site.write(a=b"two")
    site.client.before["copy_object"] = lambda *args: world.s3.down()
    copied = 0
    with suppress(TransientS3Error):
        copied = site.storage.rewrite_by_tid().copied
    site.client.before.clear()
    world.s3.up()
    site.storage.drain_spool()
    by_tid = [key for key in world.s3.found() if len(key.rpartition("/")[2]) < 32]
    assert len(by_tid) >= copied
    site.storage.rewrite_by_tid()
    assert site.storage.rewrite_by_tid().rewritten == 0
    site.check_packed(world)


@kinds("relstorage", "record")
def test_rewriting_does_not_leave_out_what_is_spooled(world):
    """It uploads that first, or says that it cannot: who leaves must not forget it."""
    site = world.open(keeps_spool=True)
    world.s3.down()
    site.write(a=b"one")
    world.s3.up()
    try:
        assert site.storage.rewrite_by_tid().rewritten == 1
    except TransientS3Error:
        site.client.before.clear()
        assert site.storage.rewrite_by_tid().rewritten == 1


@kinds("free")
def test_rewriting_in_an_outage_does_not_let_other_hosts_believe_that_a_blob_is_gone(world):
    """A key by tid does not say that it waits: so what is rewritten does not go to the spool."""
    site = world.open()
    site.write(a=b"one")
    site.client.before["copy_object"] = lambda *args: world.s3.down()
    with suppress(TransientS3Error):
        site.storage.rewrite_by_tid()
    site.client.before["upload_file"] = fail_from_the_spool
    world.s3.up()
    with suppress(TransientS3Error):
        assert world.open("another host").read() == {"a": b"one"}


# Without the file


@kinds("tid", "record")
def test_damaged_file_of_the_spool_is_no_blob(world):
    """As of the bucket: bytes that differ from what was stored are an error, and not cached."""
    site = world.open()
    world.s3.down()
    site.write(a=b"right")
    site.close()
    (path,) = (site.spool_dir / "blobs").glob("*.blob")
    path.unlink()
    path.write_bytes(b"wrong")
    site = world.open(cache="empty")
    world.s3.up()
    for _number in range(2):
        with pytest.raises(IntegrityError) as caught:
            site.read()
        assert path.name in str(caught.value)
        assert caught.value.oid and caught.value.tid and caught.value.key
    path.unlink()
    path.write_bytes(b"right")  # from the backup
    assert site.read() == {"a": b"right"}


@kinds("tid", "record")
def test_damaged_file_of_the_spool_does_not_hide_what_is_in_the_bucket(world):
    """A process was killed just when it had uploaded it, and then the disk was damaged."""
    site = world.open()
    world.s3.down()
    site.write(a=b"right")
    saved = {path: path.read_bytes() for path in site.spool_dir.rglob("*.*")}
    world.s3.up()
    site.upload_spool()
    site.close()
    for path, data in saved.items():
        path.write_bytes(data[::-1] if path.suffix == ".blob" else data)
    site = world.open(cache="another")
    assert site.read() == {"a": b"right"}


@kinds("tid", "record")
def test_questions_about_a_spooled_blob_are_answered_without_s3(world):
    """Its size, parts of it and whether it is cached; no URL of S3 can be made for it."""
    site = world.open()
    world.s3.down()
    site.write(**DATA)
    site.close()
    site = world.open(cache="empty")
    with site.blob("large") as blob:
        assert blobs.size(blob) == LARGE
        assert not blobs.is_cached(blob)
        assert blobs.presigned_url(blob) is None
        with blobs.open_range(blob, 100, 200) as file:
            assert file.read() == DATA["large"][100:200]
        with blobs.open_range(blob, LARGE - 5) as file:
            assert file.read() == DATA["large"][-5:]
    with site.db.transaction() as conn:
        report = blobs.prefetch(conn.root().values())
    assert (report.cached, report.fetched, report.failed) == (1, 2, 0)
    assert site.read() == DATA


@kinds("tid")
def test_spooled_blob_is_delivered_from_here_until_it_is_up(world):
    """A browser is not sent to a bucket that does not have it, though S3 answers."""
    site = world.open()
    world.s3.down()
    site.write(**DATA)
    site.close()
    site = world.open(cache="empty", keeps_spool=True)
    for is_up in (False, True):
        with site.blob("large") as blob:
            answer = Delivery().answer(blob)
            assert answer.status == 200
            with answer.body as body:
                assert body.read() == DATA["large"]
            assert Delivery().answer(blob, "HEAD").status == 200
            assert Delivery().answer(blob, "GET", "bytes=0-9").status == 206
        if not is_up:
            world.s3.up()
    site.upload_spool()
    with site.blob("large") as blob:
        assert Delivery().answer(blob).status == 302


# Other hosts


@kinds("relstorage", "zeo")
def test_other_host_is_told_to_come_again_and_not_that_the_blob_is_gone(world):
    """By record it knows that the blob waits elsewhere; when that has uploaded it, it is there."""
    site = world.open(keeps_spool=True)
    site.write(before=b"before")
    world.s3.down()
    site.write(a=b"a")
    world.s3.up()
    other = world.open("another host", pool=UploadPool(1))
    calls = [
        lambda blob: read(blob),
        blobs.size,
        blobs.presigned_url,
        lambda blob: blobs.open_range(blob, 0, 1),
        lambda blob: blob.open("a"),
        lambda blob: blob.committed(),
        Delivery().answer,
    ]
    for call in calls:
        with other.blob("a") as blob, pytest.raises(TransientS3Error) as caught:
            call(blob)
        assert caught.type is NotUploadedError
        assert not isinstance(caught.value, (POSKeyError, KeyError))
        assert caught.value.key and caught.value.oid and caught.value.tid
    with other.db.transaction() as conn:
        report = blobs.prefetch([conn.root()["a"], conn.root()["before"]])
    assert (report.fetched, report.failed, report.skipped) == (1, 1, 0)
    other.write(b=b"b")
    other.db.pack(time.time() + 1)
    with pytest.raises(NotUploadedError):
        other.read("a")
    site.check_drained(world, 3)
    assert other.read() == {"a": b"a", "b": b"b", "before": b"before"}
    other.check_packed(world)


@kinds("relstorage")
def test_other_host_that_undoes_needs_no_bytes(world):
    """References travel with their records: a blob that waits elsewhere can be brought back."""
    site = world.open()
    world.s3.down()
    site.write(a=b"one")
    site.write(a=b"two")
    other = world.open("another host")
    other.undo()
    with pytest.raises(TransientS3Error):
        other.read("a")
    assert site.read() == {"a": b"one"}
    world.s3.up()
    site.storage.drain_spool()
    assert other.read() == {"a": b"one"}


# Killed


class Child:
    """A child of this process that commits in an outage and stands still until it is killed."""

    def __init__(self, work):
        answer = self._start(work)
        if not answer:
            # Not by its work, which tells. Perhaps by a lock that a thread had at the fork.
            _pid, status = os.waitpid(self._pid, 0)
            warnings.warn(f"a child ended with {status:#x} and is started again", stacklevel=2)
            answer = self._start(work)
        assert answer == b"reached", answer.decode() or "the child ended"

    def _start(self, work):
        reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            signal.alarm(2 * PATIENCE)

            def stand_still(*args):
                os.write(writing, b"reached")
                time.sleep(2 * PATIENCE)

            try:
                work(stand_still)
            except BaseException:
                os.write(writing, traceback.format_exc().encode()[-4000:])
            finally:
                os._exit(1)
        os.close(writing)
        answer = os.read(reading, 4000)
        os.close(reading)
        return answer

    def kill(self):
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


def hold(cls, name, when, stand_still):
    """Stand still before or after the next call of a method, or in its callback."""
    method = getattr(cls, name)

    def call(self, *args, **kw):
        if when == "before":
            stand_still()
        if when == "inside":
            args = args[0], lambda tid: stand_still()
        result = method(self, *args, **kw)
        stand_still()
        return result

    setattr(cls, name, call)


POINTS = {
    "before it is spooled": ("spool", "take", "before", False),
    "spooled": ("spool", "take", "after", False),
    "voted": ("base", "tpc_finish", "before", False),
    "in finish": ("base", "tpc_finish", "inside", False),
    "base finished": ("base", "tpc_finish", "after", True),
}


@pytest.mark.parametrize("point", POINTS)
@kinds("tid", "record")
def test_kill_at_a_step_of_a_commit_in_an_outage_leaves_all_or_nothing(world, point):
    """What the base has finished is there with its bytes; the rest is garbage that a pack finds."""
    owner, name, when, is_committed = POINTS[point]
    site = world.open()
    site.write(before=b"before", changed=b"old")
    site.close()

    def work(stand_still):
        site = world.open(cache="of the child")
        world.s3.down()
        hold(type(getattr(site, owner)), name, when, stand_still)
        site.write(new=b"new", changed=b"new")

    world.s3.down()
    Child(work).kill()
    site = world.open(cache="empty")
    expected = {"changed": b"new", "new": b"new"} if is_committed else {}
    if is_committed:
        assert site.read(*expected) == expected
    world.s3.up()
    site.upload_spool()
    expected = {"before": b"before", "changed": b"old", **expected}
    assert site.read() == expected
    site.write(next=b"next")
    site.check_packed(world)
    assert world.another("another host").read() == {**expected, "next": b"next"}


@pytest.mark.parametrize("when", ["before", "after"])
@kinds("tid", "record")
def test_kill_in_the_middle_of_draining_loses_nothing(world, when):
    """Before an upload or behind it: the next process of the host goes on."""
    site = world.open()
    world.s3.down()
    site.write(**DATA)
    site.write(changed=b"one")
    site.write(changed=b"two")
    site.close()
    world.s3.up()

    def work(stand_still):
        method, calls = S3Client.upload_file, count(1)

        def upload_file(*args):
            second = next(calls) == 2
            if second and when == "before":
                stand_still()
            method(*args)
            if second:
                stand_still()

        # Before the storage is opened: it drains by itself at once.
        S3Client.upload_file = upload_file
        drain(world.open(cache="of the child").storage)

    Child(work).kill()
    site = world.open(cache="empty")
    assert site.read() == {**DATA, "changed": b"two"}
    site.check_drained(world, 5)
    site.check_packed(world)
    assert world.another("another host").read() == {**DATA, "changed": b"two"}


class SpoolingSite(relstorages.Site):
    """A site in a process of its own, over a RelStorage."""

    points = {**relstorages.Site.points, "spooled": (Spool, "take", "after")}


@pytest.mark.parametrize(
    ("point", "is_committed"), [("spooled", False), ("voted", False), ("in finish", True)]
)
def test_kill_of_a_process_of_several_leaves_all_or_nothing(request, store, point, is_committed):
    """Over a RelStorage, too, and the others of the host go on at once."""
    with cluster_of(request, "sqlite3", True) as cluster:
        options = {**SPOOLS, "spool_dir": f"{cluster.directory}/spool", "gc_grace": "0s"}
        victim = cluster.start("cache", SpoolingSite, store.location, **options)
        victim.commit(1, "a")
        store.down()
        victim.hold(point)
        victim.begin("commit", 2, "a", "b")
        victim.wait_for(point)
        with closing(open_here(cluster, store, options)) as db:
            assert db.storage.stats()["spool_blobs"] == 2
            victim.kill()
            store.up()
            drain(db.storage)
            assert db.storage.stats()["spool_blobs"] == 0
            found = {}
            with db.transaction() as conn:
                for name, blob in conn.root().items():
                    found[name] = read(blob)
            expected = {"a": 2, "b": 2} if is_committed else {"a": 1}
            assert found == {name: contents(name, number) for name, number in expected.items()}
            db.pack(time.time() + 1)
            assert cluster.objects() == cluster.references()


def test_process_of_a_host_uploads_what_a_killed_one_has_left(request, store):
    """Sites of one host over one database: one commits in an outage, and is killed."""
    with cluster_of(request, "sqlite3", True) as cluster:
        options = {**SPOOLS, "spool_dir": f"{cluster.directory}/spool", "gc_grace": "0s"}
        first = cluster.start("cache", location=store.location, **options)
        second = cluster.start("cache", location=store.location, **options)
        first.commit(1, "a", "b")
        store.down()
        first.commit(2, "a", "c")
        assert [second.read(name) for name in "abc"] == [2, 1, 2]
        first.commit(3, "c")
        first.kill()
        assert second.read("c") == 3
        store.up()
        with closing(open_here(cluster, store, options)) as db:
            drain(db.storage)
        other = cluster.start("another host", gc_grace="0s")
        assert [other.read(name) for name in "abc"] == [2, 1, 3]
        other.pack()
        assert cluster.objects() == cluster.references()


def test_process_of_another_host_is_told_to_come_again(request, store):
    """Through the configuration and in processes of their own: an error, then the blob."""
    with cluster_of(request, "sqlite3", False) as cluster:
        options = {**SPOOLS, "spool_dir": f"{cluster.directory}/spool"}
        store.down()
        with closing(open_here(cluster, store, options)) as db:
            with db.transaction() as conn:
                conn.root()["a"] = Blob(contents("a", 1))
            other = cluster.start("another host")
            for name in ("NotUploadedError", "TransientError"):
                with raises_there(name):
                    other.read("a")
            store.up()
            drain(db.storage)
            assert other.read("a") == 1


def open_here(cluster, store, options):
    arguments = {"imports": cluster.imports, "base": cluster.database.section, "cache": "here"}
    return open_db(store.location, cluster.directory, **arguments, **options)


# By itself


@kinds("tid")
def test_spool_is_uploaded_when_s3_is_back_without_being_asked(world, monkeypatch):
    """No restart, and no call: a thread finds out, also that of the next process."""
    monkeypatch.setattr(draining, "BUSY_PAUSE", 0.05)
    site = world.open()
    world.s3.down()
    site.write(a=b"a")
    requests = world.s3.requests("PUT")
    wait_until(lambda: world.s3.requests("PUT") > requests + 2)
    assert site.spooled() == 1
    world.s3.up()
    wait_until(lambda: site.files() == [])
    world.s3.down()
    site.write(b=b"b")
    site.close()
    world.s3.up()
    site = world.open()
    wait_until(lambda: site.files() == [])
    assert len(world.s3.found()) == 2
    assert site.read() == {"a": b"a", "b": b"b"}


@kinds("tid")
def test_close_while_s3_hangs_keeps_the_spool_and_no_thread(world):
    """What was on its way stays, and what the site has started ends with it."""
    site = world.open(timeout=0.5)
    world.s3.down()
    site.write(**DATA)
    gate = Gate()
    site.client.before["upload_file"] = lambda *args: gate.reached.set()
    world.s3.down("hangs")
    site.storage.close()  # which has no thread left to begin an upload
    site.is_open = False
    assert not [each for each in threading.enumerate() if each.name == "zodb-s3blobs-spool"]
    world.s3.up()
    site = world.open(cache="empty")
    assert site.read() == DATA
    site.check_drained(world, 3)


def test_site_without_a_spool_has_no_thread_for_it(s3, tmp_path):
    """Who does not use it pays nothing for it."""
    with closing(open_db(s3, tmp_path)) as db:
        with db.transaction() as conn:
            conn.root()["a"] = Blob(b"a")
        assert not [each for each in threading.enumerate() if each.name == "zodb-s3blobs-spool"]
        assert db.storage.drain_spool().uploaded == 0


# Numbers and log


@kinds("tid", "record")
def test_numbers_and_log_tell_what_waits(world, caplog):
    """How much is in the spool and since when, what came and went, and that S3 is down."""
    caplog.set_level(logging.INFO, "zodb_s3blobs")
    site = world.open()
    world.s3.down()
    site.write(**DATA)
    found = site.storage.stats()
    size = sum(map(len, DATA.values()))
    assert (found["spool_blobs"], found["spool_bytes"]) == (3, size)
    assert 0 <= found["spool_age_seconds"] < PATIENCE
    assert (found["spooled_total"], found["spool_uploads_total"]) == (3, 0)
    assert "spooled count=3" in caplog.text
    world.s3.up()
    site.storage.drain_spool()
    found = site.storage.stats()
    assert (found["spool_blobs"], found["spool_bytes"]) == (0, 0)
    assert found["spool_age_seconds"] is None
    assert (found["spooled_total"], found["spool_uploads_total"]) == (3, 3)
    assert "spool uploaded uploaded=" in caplog.text


# Disks


@kinds("tid", "record")
def test_spool_that_cannot_be_written_refuses_the_commit_as_an_outage(world, caplog):
    """The error is that of S3, which a retry may mend, and names the spool's as its cause."""
    site = world.open()
    site.write(before=b"before")
    world.s3.down()
    aside = world.directory / "aside"
    site.spool_dir.rename(aside)
    with pytest.raises(TransientS3Error) as caught:
        site.write(a=b"a")
    assert isinstance(caught.value.__cause__, OSError)
    assert "nothing can be spooled" in caplog.text
    aside.rename(site.spool_dir)
    assert site.files() == []
    assert leftovers(site.storage) == []
    site.write(a=b"again")
    world.s3.up()
    site.check_drained(world, 2)
    assert site.read() == {"a": b"again", "before": b"before"}


def refused(location):
    return type(location)(
        refused_endpoint(), location.access_key, location.secret_key, location.bucket
    )


@pytest.mark.parametrize("addressing", ["tid", "record"])
def test_full_disk_of_the_spool_refuses_and_leaves_nothing(s3, tmp_path, addressing):
    """No room for what is committed: the commit is refused, and with room it goes through."""
    disk, away = tmp_path / "disk", refused(s3)

    def child():
        options = {**SPOOLS, "spool_dir": f"{disk}/spool", "addressing": addressing}
        db = open_db(away, tmp_path, **options)
        fill_up(disk / "filler")
        before = db.lastTransaction()
        with pytest.raises(TransientS3Error), db.transaction() as conn:
            conn.root()["a"], conn.root()["b"] = Blob(b"a"), Blob(bytes(MEGABYTE))
        assert db.lastTransaction() == before
        assert db.storage.stats()["spool_blobs"] == 0
        assert leftovers(db.storage) == []
        (disk / "filler").unlink()
        with db.transaction() as conn:
            conn.root()["a"] = Blob(b"a")
        db.close()
        shutil.rmtree(tmp_path / "cache")
        db = open_db(away, tmp_path, **options)
        with db.transaction() as conn:
            assert read(conn.root()["a"]) == b"a"
        db.close()

    on_disks(child, disk)


def test_full_disk_of_cache_and_spool_gives_up_what_is_cached(s3, tmp_path):
    """What S3 has goes for what it does not have, when the disk gets full behind the store."""
    disk, away = tmp_path / "disk", refused(s3)

    def child():
        options = {**SPOOLS, "spool_dir": f"{disk}/spool", "cache": "disk/cache"}
        with closing(open_db(s3, tmp_path, **options)) as db, db.transaction() as conn:
            conn.root()["cached"] = Blob(bytes(MEGABYTE))
        db = open_db(away, tmp_path, **options)
        manager = transaction.TransactionManager()
        conn = db.open(manager)
        conn.root()["new"] = Blob(b"new")
        fill = relstorages.SlowDataManager("commit", lambda _transaction: fill_up(disk / "filler"))
        manager.get().join(fill)
        manager.commit()
        conn.close()
        with db.transaction() as conn, pytest.raises(TransientS3Error):
            read(conn.root()["cached"])
        db.close()
        with closing(open_db(away, tmp_path, **options)) as db, db.transaction() as conn:
            assert read(conn.root()["new"]) == b"new"

    on_disks(child, disk)


def test_full_disk_of_the_spool_alone_does_not_empty_the_cache(s3, tmp_path):
    """In an outage what is cached cannot be fetched again, and would make no room there."""
    disk, away = tmp_path / "disk", refused(s3)

    def child():
        options = {**SPOOLS, "spool_dir": f"{disk}/spool"}
        db = open_db(s3, tmp_path, **options)
        with db.transaction() as conn:
            conn.root()["cached"] = Blob(b"cached")
        db.close()
        db = open_db(away, tmp_path, **options)
        fill_up(disk / "filler")
        with pytest.raises(TransientS3Error), db.transaction() as conn:
            conn.root()["refused"] = Blob(b"refused")
        with db.transaction() as conn:
            assert read(conn.root()["cached"]) == b"cached"
        db.close()

    on_disks(child, disk)


# Configuration


def test_spool_of_another_bucket_stops_the_start_and_frees_the_database(s3, tmp_path):
    """The error says whose blobs wait; with the former configuration the site starts again."""
    away, options = refused(s3), {**SPOOLS, "spool_dir": f"{tmp_path}/spool"}
    with closing(open_db(away, tmp_path, **options)) as db, db.transaction() as conn:
        conn.root()["a"] = Blob(b"a")
    with pytest.raises(ValueError, match="not uploaded yet") as caught:
        open_db(away, tmp_path, **options, s3_prefix="other")
    assert s3.bucket in str(caught.value)
    db = open_db(away, tmp_path, cache="empty", **options)
    with closing(db), db.transaction() as conn:
        assert read(conn.root()["a"]) == b"a"


@pytest.mark.parametrize(
    ("spool", "cache"),
    [("cache/spool", "cache"), ("cache", "cache"), ("spool", "spool/cache"), ("link", "cache")],
)
def test_spool_and_cache_are_apart(s3, tmp_path, spool, cache):
    """Who empties a cache must not empty the spool: refused while the text is parsed."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    with pytest.raises(Exception, match="cache-dir and spool-dir are not apart"):
        open_db(s3, tmp_path, cache=cache, **SPOOLS, spool_dir=f"{tmp_path}/{spool}")
    assert not (tmp_path / "Data.fs").exists()


@pytest.mark.parametrize(("spool", "source"), [("old/spool", "old"), ("old", "old"), ("a", "a/b")])
def test_spool_and_old_blobs_are_apart(s3, tmp_path, spool, source):
    """An old blob directory is never written to."""
    (tmp_path / source).mkdir(parents=True)
    base = "\n".join(
        [
            f"<filestorage>\npath {tmp_path}/Data.fs\n</filestorage>",
            f"<blobdir-source>\npath {tmp_path}/{source}\n</blobdir-source>",
        ]
    )
    with pytest.raises(Exception, match="not apart"):
        open_db(s3, tmp_path, base=base, **SPOOLS, spool_dir=f"{tmp_path}/{spool}")


def test_spool_without_a_directory_is_refused(s3, tmp_path):
    """Where the only copy of a blob is, an operator decides."""
    with pytest.raises(Exception, match="needs a spool-dir"):
        open_db(s3, tmp_path, **SPOOLS)


def test_unknown_word_is_refused(s3, tmp_path):
    """Neither abort nor spool."""
    with pytest.raises(Exception, match="expected one of abort, spool"):
        open_db(s3, tmp_path, on_upload_failure="ignore")


def test_default_refuses_a_commit_in_an_outage(s3, tmp_path):
    """Without the key nothing has changed, also where a spool-dir is named."""
    options = {"s3_max_attempts": "1", "spool_dir": f"{tmp_path}/spool"}
    with closing(open_db(refused(s3), tmp_path, **options)) as db:
        with pytest.raises(TransientS3Error), db.transaction() as conn:
            conn.root()["a"] = Blob(b"a")
        assert db.storage.stats()["spool_blobs"] == 0
