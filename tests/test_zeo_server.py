"""Our section in the zeo.conf of a real ``runzeo``: its clients are ordinary ones."""

from contextlib import ExitStack
import shutil
import time

import pytest
import transaction
from transaction.interfaces import TransientError
from ZEO.Exceptions import ClientDisconnected
from ZEO.Exceptions import ServerException
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import z64

from zodb_s3blobs.keys import blob_key

from .services.location import keys
from .services.process import wait_until
from .services.zeo import ZeoServer
from .storages import load
from .storages import PATIENCE
from .storages import read
from .storages import section
from .storages import start
from .storages import store_blob
from .storages import TcpProxy


# One attempt: an outage is then as quick as a refused connection.
QUICK = {"s3_max_attempts": "1", "s3_connect_timeout": "2s", "s3_read_timeout": "1s"}


class Site:
    """A ZEO server of one storage, and its clients, which each have a directory for blobs."""

    def __init__(self, directory, location, **options):
        self.directory = directory
        self.location = location
        self.cache = directory / "server" / "cache"
        text = section(location, self.cache.parent, **options)
        self.server = ZeoServer(self.cache.parent, text, ["zodb_s3blobs"])
        self.closing = ExitStack()

    def client(self, name, **options):
        """Return the text of a <zeoclient>; another name is another directory of blobs."""
        options = {"server": self.server.address, "blob_dir": self.directory / name, **options}
        lines = [f"{key.replace('_', '-')} {value}" for key, value in options.items()]
        return "\n".join(["<zeoclient>", *lines, "</zeoclient>"])

    def open_storage(self, name, **options):
        """Open a client's storage, which is closed in the end."""
        storage = storageFromString(self.client(name, **options))
        self.closing.callback(storage.close)
        return storage

    def open(self, name, **options):
        """Open a client's database, which is closed in the end."""
        db = databaseFromString(f"<zodb>\n{self.client(name, **options)}\n</zodb>")
        self.closing.callback(db.close)
        return db

    def keys(self):
        """Return the keys in the bucket."""
        return keys(self.location)

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *exc_info):
        self.closing.close()
        self.server.stop()


@pytest.fixture
def site(zeo, s3, tmp_path):
    """A running `Site` on the bucket of the test."""
    with Site(tmp_path, s3) as site:
        yield site


def commit(db, name, content):
    """Commit a blob's bytes as a new revision and return its oid and tid."""
    db.storage.ping()  # the invalidations that were under way are here
    with db.transaction() as connection:
        blob = connection.root().setdefault(name, Blob())
        with blob.open("w") as file:
            file.write(content)
    with db.transaction() as connection:
        blob = connection.root()[name]
        blob._p_activate()
        return blob._p_oid, blob._p_serial


def contents(db, name):
    """Return the bytes of a blob as a new transaction sees them."""
    db.storage.ping()
    with db.transaction() as connection:
        return read(connection.root()[name])


def is_back(storage):
    """Return whether the server answers; storages reconnect by themselves."""
    try:
        storage.ping()
    except ClientDisconnected:
        return False
    return True


def test_blobs_of_two_clients_are_objects_under_the_keys_of_their_tids(site):
    """Each client reads what the other committed; the bucket has one object for each revision."""
    one, other = site.open("one"), site.open("other")
    assert IBlobStorage.providedBy(one.storage)
    first = commit(one, "blob", b"of one")
    assert contents(other, "blob") == b"of one"
    second = commit(other, "blob", b"of the other")
    assert contents(one, "blob") == b"of the other"
    assert first[0] == second[0] and first[1] < second[1]
    assert site.keys() == sorted([blob_key(*first), blob_key(*second)])


def test_undo_through_a_client_is_another_revision(site):
    """The bytes before the undone transaction are current again, under the key of the undo's."""
    db = site.open("one")
    oid, first = commit(db, "blob", b"first")
    _, second = commit(db, "blob", b"second")
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert contents(site.open("other"), "blob") == b"first"
    tids = first, second, db.lastTransaction()
    assert site.keys() == sorted(blob_key(oid, tid) for tid in tids)


def test_pack_through_a_client_sweeps_the_bucket(site):
    """The server's pack deletes the objects of the revisions that it removes, and no other."""
    db = site.open("one")
    commit(db, "gone", b"gone")
    for number in range(3):
        current = commit(db, "blob", b"%d" % number)
    with db.transaction() as connection:
        del connection.root()["gone"]
    assert len(site.keys()) == 4
    db.pack(time.time() + 1)
    assert site.keys() == [blob_key(*current)]
    assert contents(site.open("other"), "blob") == b"2"


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_restarted_server_with_an_empty_cache_serves_its_blobs(site, how):
    """What was committed is in the bucket, not on the server's disk alone; clients reconnect."""
    db, cold = site.open("one"), site.open("cold")
    commit(db, "blob", b"some")
    cached = list(site.cache.rglob("*.blob"))
    assert len(cached) == 1
    getattr(site.server, how)()
    shutil.rmtree(site.cache)
    site.server.start()
    wait_until(lambda: is_back(cold.storage))
    assert contents(cold, "blob") == b"some"
    assert list(site.cache.rglob("*.blob")) == cached
    wait_until(lambda: is_back(db.storage))
    commit(db, "blob", b"more")
    assert contents(cold, "blob") == b"more"


def test_client_that_leaves_after_its_vote_leaves_nothing(site):
    """The server aborts for it: no object stays, no file, and others can commit."""
    db, leaving = site.open("one"), site.open_storage("leaving")
    meta = TransactionMetaData()
    leaving.tpc_begin(meta)
    store_blob(leaving, meta, leaving.new_oid(), b"lost")
    leaving.tpc_vote(meta)
    assert len(site.keys()) == 1
    leaving.close()
    wait_until(lambda: not site.keys())
    commit(db, "blob", b"some")
    assert list(site.cache.rglob("*.tmp")) == []


def test_missing_blob_is_a_key_error_at_the_client(site):
    """Only what is nowhere is said to be gone."""
    db = site.open("one")
    oid, tid = commit(db, "blob", b"some")
    with pytest.raises(POSKeyError):
        db.storage.loadBlob(oid, z64)
    assert load(db.storage, oid, tid) == b"some"


def test_server_without_s3_answers_with_an_error_and_goes_on(zeo, s3, tmp_path):
    """Votes and reads that S3 does not answer fail at the client, which sees our error's name.

    Everything else works meanwhile, and everything again when S3 is back.
    """
    with TcpProxy(s3.endpoint_url) as proxy, Site(tmp_path, proxy.location(s3), **QUICK) as site:
        one, other = site.open("one"), site.open("other")
        uncached = commit(one, "uncached", b"uncached")
        site.server.stop()
        shutil.rmtree(site.cache)
        site.server.start()
        wait_until(lambda: is_back(one.storage) and is_back(other.storage))

        proxy.hold(lambda way, chunk: True)
        refused = start(commit, one, "refused", b"refused")
        assert proxy.reached.wait(PATIENCE)
        check_error(refused.result)
        check_error(lambda: contents(other, "uncached"))
        for db in (one, other):
            db.storage.ping()
            with db.transaction() as connection:
                assert "refused" not in connection.root()
                connection.root()["plain"] = "records need no S3"

        proxy.release()
        # Nobody asks S3 before a short pause is over.
        assert insist(lambda: contents(other, "uncached")) == b"uncached"
        late = commit(one, "late", b"late")
        assert contents(other, "late") == b"late"
        # What S3 got of the refused one may be there, too, until a pack.
        assert {blob_key(*uncached), blob_key(*late)} <= set(keys(s3))


def insist(call):
    """Return what a call returns when S3 is up again."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except ServerException as error:
            assert "it is asked again in" in str(error)
            assert time.monotonic() < deadline
            time.sleep(0.05)


def check_error(call):
    """Check what ZEO makes of a TransientS3Error: it knows few classes of errors."""
    with pytest.raises(ServerException) as caught:
        call()
    name, attributes = caught.value.args
    assert name == "zodb_s3blobs.interfaces.TransientS3Error"
    assert attributes["operation"] in ("upload", "download", "read")
    assert not isinstance(caught.value, (TransientError, POSKeyError))


def test_server_s_cache_is_no_shared_blob_directory(site):
    """A client that takes it for one gets no blob in or out, and the others do not notice."""
    db = site.open("one")
    expected = commit(db, "blob", b"some")
    sharing = site.open("server/cache", shared_blob_dir="true")
    with pytest.raises(ClientDisconnected):
        commit(sharing, "other", b"other")
    with pytest.raises(POSKeyError):
        contents(sharing, "blob")
    assert site.keys() == [blob_key(*expected)]
    assert contents(site.open("cold"), "blob") == b"some"
    commit(db, "blob", b"more")
    assert contents(db, "blob") == b"more"
