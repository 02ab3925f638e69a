"""Our section around the <zeoclient> of each client: what one does with a blob, the other sees."""

from contextlib import closing
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import shutil
import threading
import time

import pytest
import transaction
from transaction.interfaces import TransientError
from ZEO.ClientStorage import ClientStorage
from ZEO.Exceptions import ClientDisconnected
from ZEO.Exceptions import ServerException
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.interfaces import IStorageUndoable
from ZODB.POSException import ConflictError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import Unsupported
from ZODB.serialize import referencesf
from zope.interface import providedBy

from zodb_s3blobs import zeobase
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.zeobase import ZeoBase

from .faults import FaultyServer
from .faults import s3_error
from .relstorages import contents
from .relstorages import number_of
from .relstorages import wait_until
from .services.zeo import ZeoServer
from .storages import Gate
from .storages import leftovers
from .storages import make_storage
from .storages import open_db
from .storages import read
from .storages import section
from .storages import start
from .storages import store_blob
from .test_conversion import contents as all_contents
from .test_conversion import fill
from .test_conversion import Place
from .zeoclients import FILE
from .zeoclients import hear_of_all
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


def write(conn, name, number):
    with conn.root()[name].open("w") as file:
        file.write(contents(name, number))


class Hooked:
    """A client whose calls of S3 a test can hold, with a database."""

    def __init__(self, cluster, name):
        base = storageFromString(cluster.database.section)
        self.storage, self.client = make_storage(
            cluster.location, cluster.directory, name, base=base
        )
        self.db = DB(self.storage)
        hear_of_all(self.db)

    def begin_commit(self, name, number):
        """Let a thread commit a blob, and stop before its upload; return the thread and a gate."""
        gate = self.client.before["upload_file"] = Gate()
        thread = start(self.commit, name, number)
        gate.wait()
        del self.client.before["upload_file"]
        return thread, gate

    def commit(self, name, number):
        with self.db.transaction() as conn:
            if name not in conn.root():
                conn.root()[name] = Blob()
            write(conn, name, number)


class Once:
    """Calls a function when it is called first, whoever calls it.

    :param when: or first after this is true.
    """

    def __init__(self, function, when=lambda: True):
        self._function = function
        self._when = when
        self._lock = threading.Lock()
        self.done = False

    def __call__(self, *args):
        with self._lock:
            if not self.done and self._when():
                self.done = True
                self._function()


@pytest.fixture
def hooked(cluster):
    """A `Hooked` client of `cluster`."""
    hooked = Hooked(cluster, "hooked")
    yield hooked
    hooked.db.close()


class TestTwoClients:
    def test_each_reads_and_changes_what_the_other_has_committed(self, cluster):
        """From a cache of its own that has never held it."""
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "a", "b")
        assert two.read("a") == 1
        two.commit(2, "a", "c")
        assert (one.read("a"), one.read("c")) == (2, 2)
        one.commit(3, "c")
        assert (two.read("b"), two.read("c")) == (1, 3)
        cluster.check_packed(a=2, b=1, c=3)

    def test_invalidation_reaches_the_other_client_without_being_asked(self, cluster):
        """As the records are, so the blob is another one in the next transaction."""
        one = cluster.here("one")
        two = open_db(
            cluster.location, cluster.directory, cache="two", base=cluster.database.section
        )
        one.commit(1, "a")

        def number():
            with two.transaction() as conn:
                return number_of("a", read(conn.root()["a"])) if "a" in conn.root() else 0

        wait_until(lambda: number() == 1)
        one.commit(2, "a")
        wait_until(lambda: number() == 2)
        two.close()

    @pytest.mark.parametrize("loaded", [True, False])
    def test_older_view_keeps_its_bytes_until_its_end(self, cluster, loaded):
        """Whether the blob was in the cache before the other changed it or not."""
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "a")
        two.look()
        if loaded:
            assert two.read_there("a") == 1
        one.commit(2, "a")
        assert two.read_there("a") == 1
        two.look_away()
        assert two.read("a") == 2

    def test_second_writer_gets_a_conflict_and_its_retry_is_committed(self, cluster):
        """The vote says so, after its upload; what it has uploaded is deleted."""
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "a")
        manager = transaction.TransactionManager()
        conn = two.db.open(manager)
        write(conn, "a", 3)
        one.commit(2, "a")
        with pytest.raises(ConflictError):
            manager.commit()
        manager.abort()
        assert cluster.objects() == cluster.references()
        assert leftovers(two.db.storage) == []
        assert number_of("a", read(conn.root()["a"])) == 2
        write(conn, "a", 3)
        manager.commit()
        conn.close()
        assert one.read("a") == 3
        cluster.check_packed(a=3)

    def test_undo_and_redo_are_seen_by_the_other_client(self, cluster):
        """The record that comes back has its reference; nothing is copied."""
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "a")
        one.commit(2, "a")
        objects = cluster.objects()
        two.last_undone()
        assert (one.read("a"), two.read("a")) == (1, 1)
        one.last_undone()
        assert (one.read("a"), two.read("a")) == (2, 2)
        assert cluster.objects() == objects
        cluster.check_packed(a=2)

    @pytest.mark.parametrize("times, succeeds", [(2, True), (99, False)])
    def test_undo_meets_the_end_of_a_pack_on_the_server(
        self, cluster, monkeypatch, times, succeeds
    ):
        """There a FileStorage is without its file for a moment, and its iterator not to be had."""
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "a")
        one.commit(2, "a")
        ask, missing = ZeoBase._ask, []

        def ask_without_a_file(self, method, *arguments):
            if method == "iterator_start" and len(missing) < times:
                missing.append(method)
                error = "builtins.FileNotFoundError", (2, "No such file or directory")
                raise ServerException(*error)
            return ask(self, method, *arguments)

        monkeypatch.setattr(zeobase, "PAUSES", (0.01, 0.01, 0.01))
        monkeypatch.setattr(ZeoBase, "_ask", ask_without_a_file)
        if succeeds:
            one.last_undone()
        else:
            with pytest.raises(ServerException):
                one.last_undone()
        assert len(missing) == min(times, 4)
        assert two.read("a") == (1 if succeeds else 2)

    def test_creation_that_the_other_client_undoes_comes_back_with_its_redo(self, cluster):
        """An object without a record, whose blob stays until a pack."""
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "other")
        one.commit(1, "a")
        two.last_undone()
        assert one.names() == ["other"]
        one.last_undone()
        assert two.read("a") == 1
        cluster.check_packed(a=1, other=1)

    def test_historical_connection_reads_what_was_current_then(self, cluster):
        """From an empty cache, also when the other client has changed it since."""
        one, two = cluster.here("one"), cluster.here("two")
        tids = []
        for number, site in enumerate((one, two, one), 1):
            site.commit(number, "a")
            tids.append(site.last())
        for number, tid in enumerate(tids, 1):
            conn = two.db.open(transaction.TransactionManager(), at=tid)
            assert number_of("a", read(conn.root()["a"])) == number
            conn.close()


class TestThreads:
    def test_commit_does_not_wait_for_the_upload_of_another_thread(self, cluster, hooked):
        """Its lock is free until the uploads are done, as the server's is for other clients."""
        other = cluster.here("other")
        hooked.commit("a", 1)
        slow, gate = hooked.begin_commit("a", 2)
        hooked.commit("b", 1)
        other.commit(1, "c")
        with hooked.db.transaction() as conn:
            conn.root()["plain"] = "needs no S3"
        assert slow.is_alive()
        assert other.read("a") == 1
        gate.open()
        slow.result()
        assert other.read("a") == 2

    def test_conflict_of_the_slow_thread_is_told_when_its_upload_is_done(self, cluster, hooked):
        """First come, first served; it leaves nothing behind."""
        other = cluster.here("other")
        hooked.commit("a", 1)
        slow, gate = hooked.begin_commit("a", 2)
        other.commit(3, "a")
        gate.open()
        with pytest.raises(ConflictError):
            slow.result()
        assert cluster.objects() == cluster.references()
        cluster.check_packed(a=3)

    def test_other_client_commits_while_s3_hangs_and_fails(self, cluster, hooked):
        """Nobody holds a lock of the server while an upload is tried."""
        other = cluster.here("other")
        hooked.commit("a", 1)
        slow, gate = hooked.begin_commit("a", 2)

        def fail(*args):
            raise TransientS3Error("S3 is down, says the test")

        hooked.client.after["upload_file"] = fail
        other.commit(1, "b")
        gate.open()
        with pytest.raises(TransientS3Error):
            slow.result()
        del hooked.client.after["upload_file"]
        other.commit(2, "b")
        hooked.commit("a", 3)
        cluster.check_packed(a=3, b=2)


def test_s3_down_in_a_vote_aborts_and_lets_others_go_on(cluster):
    """The commit may be retried; records are committed all the time, and cached blobs are read."""
    with FaultyServer(cluster.location.endpoint_url) as faulty:
        through = replace(cluster.location, endpoint_url=faulty.endpoint_url)
        one = cluster.here("one", through, s3_max_attempts="1")
        two = cluster.here("two")
        one.commit(1, "a")
        faulty.instead = lambda request: s3_error(503, "ServiceUnavailable")
        with pytest.raises(TransientError):
            one.commit(2, "a")
        assert one.read("a") == 1
        with one.db.transaction() as conn:
            conn.root()["plain"] = 1
        two.commit(3, "b")
        with two.db.transaction() as conn:
            del conn.root()["plain"]
        faulty.instead = lambda request: None
        one.commit(2, "a")
        cluster.check_packed(a=2, b=3)


class TestServer:
    def test_restarted_server_serves_what_was_committed_and_clients_go_on(self, own):
        """They connect again by themselves; their caches, and the bucket, are as they were."""
        one, two = own.here("one"), own.here("two")
        one.commit(1, "a", "b")
        two.commit(2, "a")
        own.database.server.stop()
        own.database.server.start()
        assert (one.read("a"), two.read("b")) == (2, 1)
        one.commit(3, "a")
        assert two.read("a") == 3
        two.last_undone()
        assert one.read("a") == 2
        own.check_packed(a=2, b=1)

    def test_without_a_server_cached_blobs_are_read(self, own):
        """As records are, and by transactions that begin then."""
        site = own.here("one")
        site.commit(1, "a")
        assert site.read("a") == 1
        own.database.server.stop()
        wait_until(lambda: not site.db.storage.is_connected())
        # Without asking the server for what is new
        conn = DB.open(site.db, transaction.TransactionManager())
        assert number_of("a", read(conn.root()["a"])) == 1
        conn.close()
        own.database.server.start()

    def test_without_a_server_a_commit_fails_in_a_way_that_is_retried(self, own):
        """It is not refused as if the storage were read-only; nothing of it stays."""
        site = own.here("one")
        site.commit(1, "a")
        storage = site.db.storage
        own.database.server.stop()
        wait_until(lambda: not storage.is_connected())
        oid = storage.new_oid()
        changes = TransactionMetaData()
        try:
            with pytest.raises(TransientError):
                storage.tpc_begin(changes)
                store_blob(storage, changes, oid, b"lost")
                storage.tpc_vote(changes)
        finally:
            own.database.server.start()
        storage.tpc_abort(changes)
        wait_until(storage.is_connected)
        site.commit(2, "a")
        own.check_packed(a=2)

    def test_client_that_does_not_wait_may_be_started_before_the_server(self, own):
        """It opens as soon as the server is there, with undo and all that the server can do."""
        own.here("before").commit(1, "a")
        own.database.server.stop()
        section = own.database.client(wait="false")
        opening = start(lambda: own.here("early", base=section))
        own.database.server.start()
        early = opening.result()
        assert early.read("a") == 1
        early.commit(2, "a")
        early.last_undone()
        own.check_packed(a=1)

    def test_storage_around_a_client_that_is_not_connected_yet_can_undo(self, own):
        """Also where it is built from its parts: it learns what the server can do, then opens."""
        own.here("before").commit(1, "a")
        own.database.server.stop()
        client = ClientStorage(("127.0.0.1", own.database.server.port), "main", wait=False)
        opening = start(lambda: make_storage(own.location, own.directory, "early", base=client)[0])
        own.database.server.start()
        with closing(opening.result()) as storage:
            assert client.is_connected()
            assert set(providedBy(client)) <= set(providedBy(storage))
            assert IStorageUndoable.providedBy(storage)

    def test_client_without_its_server_is_not_taken_for_a_read_only_one(self, own):
        """It says so itself while it has no connection; a retry would not be tried then."""
        own.here("before").commit(1, "a")
        address = "127.0.0.1", own.database.server.port
        client = ClientStorage(address, "main", wait_timeout=1)
        storage, _client = make_storage(own.location, own.directory, "one", base=client)
        with closing(storage):
            own.database.server.stop()
            wait_until(lambda: not client.is_connected())
            with pytest.raises(ClientDisconnected):
                storage.sweep()
            with pytest.raises(ClientDisconnected):
                storage.pack(time.time(), referencesf)
            transaction = TransactionMetaData()
            storage.tpc_begin(transaction)
            with pytest.raises(ClientDisconnected):
                storage.tpc_vote(transaction)
            storage.tpc_abort(transaction)


class TestFanOut:
    """Clients of a server that is itself a client; undo does not work there, with or without us."""

    @contextmanager
    def fan(self, own, name):
        """Context manager: a `ZeoSite` behind a second server."""
        text = own.database.client().replace("<zeoclient>", "<zeoclient main>")
        with ZeoServer(f"{own.directory}/{name}", text) as server:
            # In one process a database has one name.
            own.close()
            base = own.database.client(server.address)
            yield own.here(name, base=base, gc_grace="0s")
            own.close()

    def test_client_behind_two_servers_reads_and_commits(self, own):
        """Its records carry references as all clients' do."""
        own.here("direct").commit(1, "a", "b")
        with self.fan(own, "far") as far:
            assert (far.read("a"), far.read("b")) == (1, 1)
            far.commit(2, "a")
            assert far.read("a") == 2
        own.check_packed(a=2, b=1)

    def test_client_behind_two_servers_packs_and_sweeps(self, own):
        """As exactly as one that is connected to the storage's own server."""
        own.here("direct").commit(1, "a", "b")
        with self.fan(own, "far") as far:
            far.commit(2, "a")
            assert far.sweep()["kept"] == 3
            far.pack()
        own.check_packed(a=2, b=1)


def test_read_only_client_reads_and_neither_writes_nor_sweeps(cluster):
    """It may ask what a sweep would do."""
    site = cluster.here("one", gc_grace="0s")
    site.commit(1, "a")
    site.commit(2, "a")
    cluster.pack_base()
    reader = cluster.here("reader", base=cluster.database.client(read_only="true"), gc_grace="0s")
    assert reader.read("a") == 2
    with pytest.raises(ReadOnlyError):
        reader.commit(3, "a")
    with pytest.raises(ReadOnlyError):
        reader.sweep()
    assert reader.dry_run()["garbage"] == 1
    packed = len(list(reader.db.storage.iterator()))
    site.commit(3, "a")
    with pytest.raises(ReadOnlyError):
        reader.pack()
    assert len(list(reader.db.storage.iterator())) == packed + 1
    assert len(cluster.objects()) == 3
    assert leftovers(reader.db.storage) == []
    cluster.pack_base()
    site.sweep()
    assert reader.read("a") == 3
    assert len(cluster.objects()) == 1


COMPRESSED = "<zlibstorage>\n{}\n</zlibstorage>"
SERVER_COMPRESSED = (
    f"<serverzlibstorage {{name}}>\n{FILE.replace(' {name}>', '>')}\n</serverzlibstorage>"
)


@pytest.mark.parametrize("below", [True, False], ids=["below", "above"])
def test_compressed_records_keep_their_references(request, below):
    """zlibstorage above and below our section, and its counterpart on the server."""
    inside = COMPRESSED if below else "{}"
    server, imports = SERVER_COMPRESSED, ("zc.zlibstorage",)
    with shared_cluster(request, inside, server, imports) as cluster:
        cluster.imports = imports
        options = {} if below else {"around": COMPRESSED}
        one, two = (cluster.here(name, **options) for name in ("one", "two"))
        one.commit(1, "a", "b")
        with one.db.transaction() as conn:
            conn.root()["plain"] = "compressible " * 100
        assert b"compressible" not in cluster.database.path.read_bytes()
        two.commit(2, "a")
        assert (one.read("a"), one.read("b")) == (2, 1)
        one.last_undone()
        assert two.read("a") == 1
        with two.db.transaction() as conn:
            del conn.root()["plain"]
        sweeper = cluster.here("sweeper", gc_grace="0s", **options)
        assert sweeper.sweep()["deleted"] == 0
        assert cluster.objects() == cluster.references()
        sweeper.pack()
        assert len(cluster.objects()) == 2
        assert cluster.objects() == cluster.references()
        cold = cluster.here("cold", **options)
        assert (cold.read("a"), cold.read("b")) == (1, 1)


class TestConversion:
    def place(self, cluster):
        return Place(Path(cluster.directory), cluster.location)

    def ours(self, cluster, place, cache):
        return place.s3("ours", cluster.database.section, cache)

    def test_database_moves_to_a_client_and_back_with_tids_and_bytes(self, cluster):
        """By zodbconvert, from a FileStorage with a blob directory; its undo works over there."""
        place = self.place(cluster)
        source, back = place.file("source", True), place.file("back", True)
        fill(source)
        place.convert(source, self.ours(cluster, place, "in"))
        expected = all_contents(source)
        assert all_contents(self.ours(cluster, place, "cold")) == expected
        place.convert(self.ours(cluster, place, "out"), back)
        assert all_contents(back) == expected

    def test_database_of_clients_moves_to_a_filestorage_and_to_other_clients(
        self, cluster, request
    ):
        """Its references travel with the records, and the blobs go where these say."""
        place = self.place(cluster)
        fill(self.ours(cluster, place, "in"))
        expected = all_contents(self.ours(cluster, place, "cold"))
        assert cluster.database.blobs().keys() >= {
            (oid, tid)
            for tid, (_note, records) in expected.items()
            for oid, (_record, blob) in records.items()
            if blob
        }
        file = place.file("file", True)
        place.convert(self.ours(cluster, place, "out"), file)
        assert all_contents(file) == expected
        with shared_cluster(request) as other:
            text = place.s3("other", other.database.section)
            place.convert(file, text)
            assert all_contents(place.s3("other", other.database.section, "cold")) == expected
            assert place.keys("other") == set(other.database.blobs().values())

    def test_copied_blobs_that_a_client_changes_are_swept_when_they_are_packed(self, cluster):
        """Under their tids until then, whether another client changes or undoes them."""
        place = self.place(cluster)
        source = place.file("source", True)
        db = databaseFromString(f"<zodb>\n{source}\n</zodb>")
        for number in (1, 2):
            with db.transaction() as conn:
                conn.root().setdefault("a", Blob())
                write(conn, "a", number)
        db.close()
        converter = storageFromString(
            "%import zodb_s3blobs\n"
            + section(cluster.location, cluster.directory, "in", cluster.database.section)
        )
        with closing(converter), closing(storageFromString(source)) as storage:
            converter.copyTransactionsFrom(storage)
        assert cluster.objects() == cluster.references()
        one, two = cluster.here("one"), cluster.here("two")
        assert one.read("a") == 2
        two.last_undone()
        assert one.read("a") == 1
        one.commit(3, "a")
        cluster.check_packed(a=3)


class TestRewriting:
    def fill(self, cluster):
        one, two = cluster.here("one"), cluster.here("two")
        one.commit(1, "a", "b", "c")
        two.commit(2, "a", "b")
        one.commit(3, "a")
        return one, two

    def check_left(self, cluster, **expected):
        """All blobs are under their tids, those of older revisions, too."""
        assert all(is_by_tid(cluster.database, oid, tid) for oid, tid in current(cluster))
        revisions = {blob_key(*revision) for revision in cluster.database.blobs()}
        assert revisions <= set(cluster.objects())
        cluster.check(**expected).pack()
        assert cluster.objects() == cluster.references()
        # As an older version would: the file without ZEO
        cluster.close()
        file = shutil.copy(cluster.database.path, f"{cluster.directory}/copy.fs")
        text = f"<filestorage>\npath {file}\n</filestorage>"
        db = open_db(cluster.location, cluster.directory, cache="alone", base=text)
        with closing(db), db.transaction() as conn:
            found = {name: number_of(name, read(blob)) for name, blob in conn.root().items()}
        assert found == expected

    def test_it_is_refused_over_zeo_and_done_where_the_server_has_stopped(self, own):
        """A client cannot take back a tid that it has told the server; a FileStorage can."""
        one, _two = self.fill(own)
        with pytest.raises(Unsupported, match="stop the ZEO server"):
            one.rewrite_by_tid()
        own.close()
        own.database.server.stop()
        text = f"<filestorage>\npath {own.database.path}\n</filestorage>"
        with closing(open_db(own.location, own.directory, cache="direct", base=text)) as db:
            report = db.storage.rewrite_by_tid()
        assert (report.copied, report.rewritten, report.missing) == (6, 3, 0)
        own.database.server.start()
        self.check_left(own, a=3, b=2, c=1)


def current(cluster):
    """Return (oid, tid) of the current revisions of blobs."""
    newest = {}
    for oid, tid in cluster.database.blobs():
        newest[oid] = max(tid, newest.get(oid, tid))
    return newest.items()


def is_by_tid(database, oid, tid):
    return database.blobs()[oid, tid] == blob_key(oid, tid)
