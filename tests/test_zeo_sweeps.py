"""Packs and sweeps of ZEO clients: what they delete, what they leave alone, and what stops them."""

from contextlib import closing
from datetime import datetime
from functools import partial
import shutil
import time

from persistent.mapping import PersistentMapping
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import StorageError
from ZODB.POSException import Unsupported

from zodb_s3blobs import zeobase
from zodb_s3blobs.interfaces import OtherDatabaseError

from .relstorages import contents
from .relstorages import wait_until
from .services.location import boto3_client
from .services.zeo import ZeoServer
from .storages import make_storage
from .storages import open_db
from .storages import section
from .storages import start
from .storages import store_blob
from .storages import take
from .zeoclients import FILE
from .zeoclients import own_cluster
from .zeoclients import shared_cluster
from .zeoclients import ZeoCluster
from .zeoclients import ZeoDatabase


HOUR = 3600
MAPPING = "<mappingstorage {name}>\n</mappingstorage>"


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


def counts(**expected):
    """Return all counts of a sweep; those that are not given are 0."""
    names = ["listed", "kept", "in_flight", "foreign", "garbage", "deleted", "failed"]
    return {name: expected.get(name, 0) for name in names}


def counted(report):
    return {name: count for name, count in report.items() if name != "bytes"}


def make_object(site, name):
    """Commit an object that is no blob."""
    with site.db.transaction() as conn:
        conn.root()[name] = PersistentMapping()


class TestPack:
    def test_clients_pack_deletes_what_it_removes_and_counts_it(self, cluster):
        """Older revisions and unreachable objects; nothing before that is garbage."""
        one, two = (cluster.here(name, gc_grace="0s") for name in ("one", "two"))
        one.commit(1, "a", "b", "c")
        two.commit(2, "a", "b")
        one.delete("b")
        assert counted(two.sweep()) == counts(listed=5, kept=5)
        two.pack()
        assert len(cluster.objects()) == 2
        assert counted(one.sweep()) == counts(listed=2, kept=2)
        cluster.check_packed(a=2, c=1)

    def test_pack_to_an_earlier_time_keeps_what_is_newer(self, cluster):
        """Exactly the revisions that the server still has."""
        site = cluster.here("one", gc_grace="0s")
        for number in (1, 2):
            site.commit(number, "a")
        moment = time.time()
        for number in (3, 4):
            site.commit(number, "a")
        site.pack_to(moment)
        assert len(cluster.objects()) == 3
        cluster.check_packed(a=4)

    def test_blob_of_the_highest_object_is_deleted_by_the_pack_that_removes_it(self, cluster):
        """Its oid was given out, though nothing in the database shows it any more."""
        site = cluster.here("one", gc_grace="0s")
        site.commit(1, "a")
        site.commit(1, "highest")
        site.delete("highest")
        site.pack()
        assert len(cluster.objects()) == 1
        cluster.check_packed(a=1)

    def test_pack_on_the_server_is_made_up_for_by_a_sweep(self, cluster):
        """zeopack knows nothing of the bucket; any client sweeps it later."""
        site = cluster.here("one", gc_grace="0s")
        site.commit(1, "a", "b")
        site.commit(2, "a")
        site.delete("b")
        make_object(site, "plain")
        cluster.pack_base()
        assert len(cluster.objects()) == 3
        assert len(cluster.references()) == 1
        assert counted(site.sweep()) == counts(listed=3, kept=1, garbage=2, deleted=2)
        with site.db.transaction() as conn:
            del conn.root()["plain"]
        cluster.check_packed(a=2)

    def test_highest_object_that_the_server_packs_away_is_kept_until_it_is_known(self, cluster):
        """No oid tells that it was given out here; the next new object does."""
        site = cluster.here("one", gc_grace="0s")
        site.commit(1, "a")
        site.commit(1, "highest")
        site.delete("highest")
        cluster.pack_base()
        assert counted(site.sweep()) == counts(listed=2, kept=1, foreign=1)
        make_object(site, "next")
        assert counted(site.sweep()) == counts(listed=2, kept=1, garbage=1, deleted=1)
        assert cluster.objects() == cluster.references()

    def test_more_objects_than_are_asked_about_together_are_all_swept(self, cluster, monkeypatch):
        """In parts that leave out nothing and nobody."""
        monkeypatch.setattr(zeobase, "OBJECTS", 3)
        names = "abcdefgh"
        site = cluster.here("one", gc_grace="0s")
        site.commit(1, *names)
        site.commit(2, *names)
        site.delete("b", "c", "g")
        cluster.pack_base()
        report = counted(site.sweep())
        assert report == counts(listed=16, kept=5, garbage=11, deleted=11)
        cluster.check_packed(**dict.fromkeys("adefh", 2))


class TestOrphans:
    def kill_after_upload(self, cluster, *names):
        """Kill a client whose blobs are uploaded; return their keys."""
        before = set(cluster.objects())
        victim = cluster.start("victim")
        victim.hold("beginning")
        victim.begin("commit", 7, *names)
        victim.wait_for("beginning")
        victim.kill()
        return set(cluster.objects()) - before

    def test_orphan_of_a_killed_client_is_deleted_after_the_grace_period(self, cluster):
        """Not before, by the clock of S3; a changed blob's, and a new one's."""
        site = cluster.here("one", gc_grace="1h")
        site.commit(1, "a")
        orphans = self.kill_after_upload(cluster, "a", "new")
        assert len(orphans) == 2
        # With an oid above those that the victim was given
        make_object(cluster.here("other"), "later")
        assert counted(site.sweep()) == counts(listed=3, kept=1, in_flight=2)
        cluster.backdate(1.1 * HOUR, *orphans)
        # The other's object has changed lately: a reader might still want its older revisions.
        report = counted(site.sweep())
        assert report == counts(listed=3, kept=1, in_flight=1, garbage=1, deleted=1)
        impatient = cluster.here("impatient", gc_grace="0s")
        assert counted(impatient.sweep()) == counts(listed=2, kept=1, garbage=1, deleted=1)
        assert cluster.objects() == cluster.references()

    def test_orphan_above_all_objects_is_kept_until_its_oid_is_known(self, cluster):
        """It may be another database's; when an object with a higher oid is there, it is ours."""
        site = cluster.here("one", gc_grace="0s")
        site.commit(1, "a")
        assert len(self.kill_after_upload(cluster, "new")) == 1
        assert counted(site.sweep()) == counts(listed=2, kept=1, foreign=1)
        cluster.here("other").commit(1, "later")
        assert counted(site.sweep()) == counts(listed=3, kept=2, garbage=1, deleted=1)
        cluster.check_packed(a=1, later=1)

    def test_orphan_whose_oid_a_restarted_server_has_given_out_again_stops_nothing(self, own):
        """Clients get a hundred oids at a time, and keep them over a restart of the server."""
        one = own.here("one", gc_grace="0s")
        one.commit(1, "a")
        own.database.server.stop()
        own.database.server.start()
        two = own.here("two", gc_grace="0s")
        make_object(two, "plain")
        wait_until(one.db.storage.is_connected)
        two.commit(1, "b")
        # What the first client uploads is lost with it
        oid = one.db.storage.new_oid()
        with two.db.transaction() as conn:
            assert oid == conn.root()["plain"]._p_oid
        changes = TransactionMetaData()
        one.db.storage.tpc_begin(changes)
        store_blob(one.db.storage, changes, oid, b"lost")
        wait_until(lambda: len(own.objects()) == 3)
        report = counted(two.sweep())
        one.db.storage.tpc_abort(changes)
        assert report in (
            counts(listed=3, kept=2, foreign=1),
            counts(listed=3, kept=2, garbage=1, deleted=1),
        )


class TestOtherDatabase:
    def lose(self, own, count=3):
        """Put an empty Data.fs in the place of one with blobs; return the objects of that."""
        for number in range(count):
            own.here("before").commit(number, f"b{number}")
        own.close()
        objects = own.objects()
        own.database.server.stop()
        own.database.remove()
        own.database.server.start()
        assert len(objects) == count
        return objects

    def check_stopped(self, own, site):
        with pytest.raises(OtherDatabaseError):
            site.dry_run()
        with pytest.raises(OtherDatabaseError):
            site.sweep()
        with pytest.raises(OtherDatabaseError):
            site.pack()

    def test_new_database_in_the_place_of_a_lost_one_deletes_nothing(self, own):
        """However often it is asked, and however many oids were given out meanwhile."""
        objects = self.lose(own)
        site = own.here("new", gc_grace="0s")
        self.check_stopped(own, site)
        for _time in range(20):
            with pytest.raises(OtherDatabaseError):
                site.dry_run()
        site.give_out_oids(500)
        self.check_stopped(own, site)
        assert own.objects() == objects

    def test_new_database_with_objects_of_its_own_deletes_nothing(self, own):
        """They have the oids of the lost one's blobs, and are no blobs."""
        objects = self.lose(own)
        site = own.here("new", gc_grace="0s")
        for number in range(5):
            make_object(site, f"plain {number}")
        self.check_stopped(own, site)
        assert own.objects() == objects

    def test_objects_of_another_place_are_foreign_and_stay(self, cluster):
        """Keys that nobody here can have written, beside others that we have."""
        site = cluster.here("one", gc_grace="0s")
        site.commit(1, "a")
        client = boto3_client(cluster.location)
        names = ["blobs/ffff/1234.blob", "blobs/1/README", "other/1/1.blob"]
        for name in names:
            client.put_object(Bucket=cluster.location.bucket, Key=name, Body=b"foreign")
        client.close()
        report = counted(site.sweep())
        assert report == counts(listed=3, kept=1, foreign=2)
        assert len(cluster.objects()) == 4


class TestServerDown:
    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_pack_of_the_servers_file_keeps_what_a_waiting_client_has_uploaded(
        self, own, addressing
    ):
        """It commits when the server is back, with objects that no other process knew of."""
        own.here("one").commit(1, "a", "b")
        own.close()
        client = own.start("zope")
        client.connect_before_going_on()
        client.hold("beginning")
        client.begin("commit", 2, "a", "new")
        client.wait_for("beginning")
        uploaded = own.objects()
        assert len(uploaded) == 4
        own.database.server.stop()
        base = f"<filestorage>\npath {own.database.path}\n</filestorage>"
        with closing(own.open("direct", base=base, addressing=addressing)) as db:
            take(db.storage)
            db.pack(time.time() + 1)
            assert db.storage.sweep().deleted == 0
        assert own.objects() == uploaded
        own.database.server.start()
        client.go_on()
        client.result()
        own.check_packed(a=2, b=1, new=2)

    @pytest.mark.parametrize("moment", ["listed", "asked"])
    def test_fall_back_to_an_older_copy_in_a_sweep_deletes_nothing(self, own, monkeypatch, moment):
        """Its server knows nothing of what was committed since; the error says that."""
        site = own.here("one", gc_grace="0s")
        site.commit(1, "a", "b")
        other = own.database.server.directory.parent / "copy"
        other.mkdir()
        shutil.copy(own.database.path, other / "main.fs")
        site.commit(2, "a", "b")
        own.close()
        with ZeoServer(other, FILE.format(name="main"), read_only="true") as copy:
            address = f"{own.database.server.address}\nserver {copy.address}"
            base = storageFromString(own.database.client(address, read_only_fallback="true"))
            storage, client = make_storage(
                own.location, own.directory, "two", base=base, gc_grace=0.0
            )
            assert not storage.isReadOnly()

            def fall_back(*args):
                client.after.clear()
                own.database.server.stop()
                wait_until(lambda: storage.is_connected() and storage.isReadOnly())

            if moment == "listed":
                client.after["list_pages"] = fall_back
            else:
                survivors = zeobase.ZeoBase.survivors

                def fall_back_and_ask(*args):
                    fall_back()
                    return survivors(*args)

                monkeypatch.setattr(zeobase.ZeoBase, "survivors", fall_back_and_ask)
            with closing(storage), pytest.raises(StorageError, match="a copy that is behind"):
                storage.sweep()
        assert len(own.objects()) == 4
        assert own.objects() == own.references()


class TestRefusedAnswers:
    """A client drops a history with other things than text and numbers, and waits for ever."""

    def fill(self, location, directory, path, *, undone=False):
        """Commit as a process that has the file open may do."""
        base = f"<filestorage>\npath {path}\n</filestorage>"
        db = open_db(location, directory, cache="former", base=base, addressing="record")
        with closing(db):
            for number, name in ((1, "a"), (2, "a"), (1, "b")):
                with db.transaction() as conn:
                    blob = conn.root().setdefault(name, Blob())
                    with blob.open("w") as file:
                        file.write(contents(name, number))
                    conn.transaction_manager.get().setExtendedInfo("when", datetime(2020, 1, 2))
            if undone:
                db.undo(db.undoLog(0, 1)[0]["id"])
                transaction.commit()

    def test_sweep_does_without_where_there_are_records(self, request):
        """Of revisions that stay, and of such as the server has packed away."""
        with own_cluster(request, self.fill) as cluster:
            site = cluster.here("one", gc_grace="0s")
            assert counted(start(site.sweep).result()) == counts(listed=3, kept=3)
            site.commit(3, "a")
            cluster.pack_base()
            report = counted(start(site.sweep).result())
            assert report == counts(listed=4, kept=2, garbage=2, deleted=2)
            cluster.check_packed(a=3, b=1)

    def test_sweep_that_cannot_do_without_ends_with_an_error(self, request, monkeypatch):
        """Behind an undone creation only the history goes on; nothing is deleted."""
        monkeypatch.setattr(zeobase, "PATIENCE", 1.0)
        with own_cluster(request, partial(self.fill, undone=True)) as cluster:
            site = cluster.here("one", gc_grace="0s")
            with pytest.raises(StorageError, match=r"ZEO history.*no answer within 1 s"):
                start(site.sweep).result()
            assert len(cluster.objects()) == 3


class TestServers:
    def open(self, s3, directory, server):
        base = ZeoDatabase(server, "main").section
        return open_db(s3, directory, base=base, gc_grace="0s")

    def test_server_with_a_blob_directory_is_refused(self, zeo, s3, tmp_path):
        """The error says what to remove, and where."""
        text = "<filestorage main>\npath main.fs\nblob-dir blobs\n</filestorage>"
        with (
            ZeoServer(tmp_path / "zeo", text) as server,
            pytest.raises(ValueError, match="ZEO server has blobs of its own: remove the blob-dir"),
        ):
            self.open(s3, tmp_path, server)

    def test_server_with_our_section_is_refused(self, zeo, s3, tmp_path):
        """It stands in the clients or on the server."""
        text = section(s3, tmp_path / "zeo").replace("<s3blobstorage>", "<s3blobstorage main>")
        with (
            ZeoServer(tmp_path / "zeo", text, ["zodb_s3blobs"]) as server,
            pytest.raises(ValueError, match="or on the server, not on both"),
        ):
            self.open(s3, tmp_path, server)

    def test_server_with_a_relstorage_is_refused(self, zeo, s3, tmp_path):
        """It does not tell through ZEO which revisions survive."""
        (tmp_path / "zeo" / "sqlite3").mkdir(parents=True)
        inner = "<sqlite3>\ndata-dir sqlite3\n</sqlite3>"
        text = f"<relstorage main>\n{inner}\n</relstorage>"
        with (
            ZeoServer(tmp_path / "zeo", text, ["relstorage"]) as server,
            pytest.raises(ValueError, match="connect to its database without ZEO"),
        ):
            self.open(s3, tmp_path, server)

    def test_mappingstorage_of_a_server_is_packed_and_not_swept(self, zeo, s3, tmp_path):
        """Over ZEO it cannot be told from a DemoStorage, which does not know all blobs."""
        with shared_mapping(zeo, s3, tmp_path) as cluster:
            one, two = (cluster.here(name, gc_grace="0s") for name in ("one", "two"))
            one.commit(1, "a", "b")
            two.commit(2, "a")
            one.delete("b")
            two.pack()
            assert len(cluster.objects()) == 3
            with pytest.raises(Unsupported, match="around the database itself"):
                two.sweep()
            assert cluster.here("cold").read("a") == 2

    def test_demostorage_of_a_server_takes_nothing_from_the_database_below(self, own):
        """That one goes on, and has its blobs in the same place."""
        production = own.here("production", gc_grace="0s")
        production.commit(1, "a")
        text = "\n".join(
            [
                "<demostorage main>",
                f"<filestorage>\npath {own.database.path}\nread-only true\n</filestorage>",
                "<mappingstorage changes>\n</mappingstorage>",
                "</demostorage>",
            ]
        )
        directory = f"{own.directory}/staging"
        with ZeoServer(directory, text) as server:
            production.commit(2, "a")
            base = ZeoDatabase(server, "main").section
            with closing(storageFromString(base)) as base:
                storage, _client = make_storage(own.location, directory, base=base, gc_grace=0.0)
                with pytest.raises(Unsupported):
                    storage.sweep()
        assert own.objects() == own.references()


def shared_mapping(zeo, s3, directory):
    """Return a context manager of a `ZeoCluster` over a MappingStorage."""
    served = zeo.new(MAPPING)
    return closing(ZeoCluster(ZeoDatabase(served.server, served.name), s3, directory))


def test_restart_of_the_server_in_a_sweep_changes_no_decision(own):
    """Its questions wait for the server and go on."""
    site = own.here("filler", gc_grace="0s")
    site.commit(1, "a", "b")
    site.commit(2, "a")
    site.delete("b")
    make_object(site, "plain")
    own.pack_base()
    base = storageFromString(own.database.section)
    storage, client = make_storage(own.location, own.directory, "one", base=base, gc_grace=0.0)

    def restart(*args):
        del client.after["list_pages"]
        own.database.server.kill()
        own.database.server.start()

    client.after["list_pages"] = restart
    with closing(storage):
        assert counted(vars(storage.sweep())) == counts(listed=3, kept=1, garbage=2, deleted=2)
    assert own.objects() == own.references()
