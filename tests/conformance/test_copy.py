"""Blobs move whole between our storages and ZODB's own, and several databases keep apart."""

from contextlib import closing
from contextlib import contextmanager
from hashlib import sha256

from persistent.mapping import PersistentMapping
import pytest
import transaction
from ZODB import DB
from ZODB.blob import Blob
from ZODB.blob import is_blob_record
from ZODB.config import databaseFromString
from ZODB.interfaces import IStorageUndoable
from ZODB.POSException import ConflictError

from .opening import Kind


WRAPPED = Kind("s3 filestorage")
WRAPPED_HEX = Kind("hexstorage s3 filestorage")
WRAPPED_MAPPING = Kind("s3 mappingstorage")
WRAPPED_SQLITE = Kind("s3 relstorage sqlite3")
WRAPPED_RECORD = Kind("s3 filestorage", by_record=True)
WRAPPED_ZEO = Kind("s3 zeo filestorage")
WRAPPED_IN_ZEO = Kind("zeo s3 filestorage")
PLAIN = Kind("control filestorage")

# Not from MappingStorage to plain FileStorage: ZODB's own copy wants extension_bytes, which the
# former's transactions lack. Nothing to a ZEO client, which restores records only, but to ours
# around it.
DIRECTIONS = [
    (PLAIN, WRAPPED),
    (WRAPPED, PLAIN),
    (WRAPPED, WRAPPED),
    (WRAPPED, WRAPPED_HEX),
    (WRAPPED_HEX, WRAPPED),
    (WRAPPED_MAPPING, WRAPPED),
    (PLAIN, WRAPPED_SQLITE),
    (WRAPPED_SQLITE, PLAIN),
    (WRAPPED, WRAPPED_SQLITE),
    (WRAPPED_SQLITE, WRAPPED),
    (WRAPPED_HEX, WRAPPED_SQLITE),
    (PLAIN, WRAPPED_RECORD),
    (WRAPPED_RECORD, PLAIN),
    (WRAPPED_RECORD, WRAPPED),
    (WRAPPED, WRAPPED_RECORD),
    (PLAIN, WRAPPED_ZEO),
    (WRAPPED_ZEO, PLAIN),
    (WRAPPED_ZEO, WRAPPED),
    (WRAPPED_SQLITE, WRAPPED_ZEO),
    (WRAPPED_IN_ZEO, WRAPPED_ZEO),
]
BIG = b"0123456789abcdef" * 2**16


def text_of(blob):
    """Return the bytes of a blob."""
    with blob.open() as file:
        return file.read()


def rewrite(blob, content):
    """Give a blob new bytes."""
    with blob.open("w") as file:
        file.write(content)


@contextmanager
def connected(storage):
    """Open a connection to a storage for a while; the storage stays open."""
    manager = transaction.TransactionManager()
    connection = DB(storage).open(manager)
    yield connection
    manager.abort()
    connection.close()


@contextmanager
def opened(storage):
    """Open a connection to a storage, and close both."""
    with closing(storage), connected(storage) as connection:
        yield connection


def make_history(storage):
    """Commit what a site does with blobs over the time."""
    with connected(storage) as connection:
        commit = connection.transaction_manager.commit
        root = connection.root()
        root["small"] = Blob(b"first")
        root["empty"] = Blob()
        root["tree"] = PersistentMapping(big=Blob(BIG))
        commit()
        rewrite(root["small"], b"second")
        root["tree"]["twin"] = Blob(b"first")
        commit()
        root["plain"] = PersistentMapping(no="blob")
        commit()
        with root["small"].open("a") as file:
            file.write(b" and more")
        commit()
        if IStorageUndoable.providedBy(storage):
            db = connection.db()
            for note in ("undo", "redo"):
                db.undo(db.undoLog(0, 1)[0]["id"], connection.transaction_manager.get())
                connection.transaction_manager.get().note(note)
                commit()
        del root["tree"]["twin"]
        commit()


def contents(storage):
    """Return what the transactions of a storage hold, blobs as size and digest.

    Records come in the order of their oids, because RelStorage knows no other.
    """
    return [
        (
            each.tid,
            each.description,
            [
                (record.oid, record.data, blob_of(storage, record.oid, record.tid, record.data))
                for record in sorted(each, key=lambda record: record.oid)
            ],
        )
        for each in storage.iterator()
    ]


def blob_of(storage, oid, serial, data):
    """Return size and digest of a revision's blob, or None where there is none."""
    if not is_blob_record(data):
        return None
    with open(storage.loadBlob(oid, serial), "rb") as file:
        content = file.read()
    return len(content), sha256(content).hexdigest()


@pytest.mark.parametrize("source_kind, target_kind", DIRECTIONS, ids=str)
def test_copied_transactions_keep_tids_and_blobs(source_kind, target_kind, opener_of):
    """copyTransactionsFrom copies every revision under its tid, and its blob byte for byte."""
    open_target = opener_of(target_kind)
    with closing(opener_of(source_kind)("source")) as source:
        make_history(source)
        expected = contents(source)
        with closing(open_target("target")) as target:
            target.copyTransactionsFrom(source)
            assert contents(target) == expected
    with closing(open_target("target", "cold" if target_kind.s3 else None)) as target:
        assert contents(target) == expected


@pytest.mark.parametrize("kind", [WRAPPED, WRAPPED_HEX], ids=str)
def test_source_of_a_copy_is_read_from_an_empty_cache(kind, opener_of):
    """A copy of a database whose blobs are only in the bucket is complete."""
    with closing(opener_of(kind)("source")) as source:
        make_history(source)
        expected = contents(source)
    with (
        closing(opener_of(kind)("source", "cold")) as source,
        closing(opener_of(PLAIN)("target")) as target,
    ):
        target.copyTransactionsFrom(source)
        assert contents(target) == expected


def test_copy_there_and_back_is_the_original(opener_of):
    """Nothing is lost or added by moving to a bucket and out of it again."""
    with (
        closing(opener_of(PLAIN)("one")) as one,
        closing(opener_of(WRAPPED)("two")) as two,
        closing(opener_of(PLAIN)("three")) as three,
    ):
        make_history(one)
        two.copyTransactionsFrom(one)
        three.copyTransactionsFrom(two)
        assert contents(three) == contents(one)


def test_copy_takes_part_in_everything_afterwards(opener_of):
    """Blobs that were copied can be undone, packed and rewritten as if they were born there."""
    open_target = opener_of(WRAPPED)
    with closing(opener_of(PLAIN)("source")) as source:
        make_history(source)
        with closing(open_target("target")) as target:
            target.copyTransactionsFrom(source)
    with opened(open_target("target", "cold")) as connection:
        db = connection.db()
        root = connection.root()
        assert text_of(root["small"]) == b"second and more"
        db.undo(db.undoLog(0, 1)[0]["id"], connection.transaction_manager.get())
        connection.transaction_manager.commit()
        assert text_of(root["tree"]["twin"]) == b"first"
        rewrite(root["small"], b"third")
        connection.transaction_manager.commit()
        db.pack()
    with opened(open_target("target", "colder")) as connection:
        root = connection.root()
        assert text_of(root["small"]) == b"third"
        assert text_of(root["empty"]) == b""
        assert text_of(root["tree"]["twin"]) == b"first"
        assert text_of(root["tree"]["big"]) == BIG


@pytest.mark.parametrize(
    "source_kind, target_kind",
    [
        (PLAIN, WRAPPED),
        (WRAPPED, PLAIN),
        (WRAPPED, WRAPPED),
        (WRAPPED_MAPPING, WRAPPED),
        (WRAPPED, WRAPPED_MAPPING),
    ],
    ids=str,
)
def test_exported_blobs_are_imported_elsewhere(source_kind, target_kind, opener_of, tmp_path):
    """exportFile and importFile carry blobs between our storages and ZODB's own."""
    export = str(tmp_path / "export.zexp")
    with opened(opener_of(source_kind)("source")) as connection:
        root = connection.root()
        root["tree"] = PersistentMapping(big=Blob(BIG), small=Blob(b"some"), empty=Blob())
        connection.transaction_manager.commit()
        connection.exportFile(root["tree"]._p_oid, export).close()
    open_target = opener_of(target_kind)
    with opened(open_target("target")) as connection:
        # Other oids than in the source.
        connection.root()["first"] = Blob(b"here before")
        connection.transaction_manager.commit()
        connection.root()["tree"] = connection.importFile(export)
        connection.transaction_manager.commit()
        check_import(connection.root())
    if target_kind is WRAPPED_MAPPING:
        return
    with opened(open_target("target", "cold" if target_kind.s3 else None)) as connection:
        check_import(connection.root())


def check_import(root):
    """Assert what the import should have brought along."""
    assert text_of(root["first"]) == b"here before"
    found = {name: text_of(blob) for name, blob in root["tree"].items()}
    assert found == {"big": BIG, "small": b"some", "empty": b""}


def test_aborted_import_leaves_nothing_behind(opener_of, tmp_path):
    """Blobs of an import that is given up are neither in the database nor found by a sweep."""
    export = str(tmp_path / "export.zexp")
    with opened(opener_of(PLAIN)("source")) as connection:
        connection.root()["blob"] = blob = Blob(b"some")
        connection.transaction_manager.commit()
        connection.exportFile(blob._p_oid, export).close()
    storage = opener_of(WRAPPED)("target")
    with opened(storage) as connection:
        connection.root()["blob"] = connection.importFile(export)
        connection.transaction_manager.abort()
        assert "blob" not in connection.root()
        assert storage.sweep(dry_run=True).listed == 0


def test_historical_connection_reads_the_blobs_of_its_time(opener_of):
    """DB.open(at=…) and DB.open(before=…) read each revision, also from an empty cache."""
    open_storage = opener_of(WRAPPED)
    tids = []
    with opened(open_storage()) as connection:
        connection.root()["blob"] = blob = Blob()
        for number in range(3):
            rewrite(blob, b"revision %d" % number)
            connection.transaction_manager.commit()
            tids.append(connection.db().lastTransaction())
        check_times(connection.db(), tids)
    with closing(DB(open_storage(blob_dir="cold"))) as db:
        check_times(db, tids)


def check_times(db, tids):
    """Assert that connections at each tid, and before it, read what was current then."""
    for number, tid in enumerate(tids):
        for content, moment in [(number, {"at": tid}), (number - 1, {"before": tid})]:
            if content < 0:
                continue
            manager = transaction.TransactionManager()
            with closing(db.open(manager, **moment)) as connection:
                blob = connection.root()["blob"]
                assert text_of(blob) == b"revision %d" % content
                with open(blob.committed(), "rb") as file:
                    assert file.read() == b"revision %d" % content
                manager.abort()


@pytest.fixture
def two_databases(opener_of):
    """Return the first of two databases in one configuration, each with its own prefix."""
    opener = opener_of(WRAPPED)
    opened = []

    def two_databases(main="main.blobs", other="other.blobs"):
        db = databaseFromString(
            "%import zodb_s3blobs\n"
            f"<zodb main>\n{opener.body('main', main)}\n</zodb>\n"
            f"<zodb other>\n{opener.body('other', other)}\n</zodb>\n"
        )
        opened.extend(db.databases.values())
        return db

    yield two_databases
    for db in opened:
        db.close()


def close_both(db):
    """Close all databases of a configuration."""
    for each in list(db.databases.values()):
        each.close()


def test_one_transaction_over_two_databases_stores_blobs_in_both(two_databases):
    """Blobs of two databases with the same oids are committed together and stay apart."""
    db = two_databases()
    manager = transaction.TransactionManager()
    main = db.open(manager)
    other = main.get_connection("other")
    main.root()["blob"] = Blob(b"in main")
    other.root()["blob"] = Blob(b"in other")
    manager.commit()
    assert main.root()["blob"]._p_oid == other.root()["blob"]._p_oid
    rewrite(main.root()["blob"], b"again in main")
    rewrite(other.root()["blob"], b"again in other")
    manager.commit()
    close_both(db)

    db = two_databases("cold", "cold too")
    main = db.open(manager)
    assert text_of(main.root()["blob"]) == b"again in main"
    assert text_of(main.get_connection("other").root()["blob"]) == b"again in other"


def test_conflict_in_one_of_two_databases_leaves_no_blob_in_either(two_databases):
    """When one database refuses, the blob that the other has uploaded already is gone again."""
    db = two_databases()
    manager = transaction.TransactionManager()
    main = db.open(manager)
    main.root()["blob"] = Blob(b"in main")
    main.get_connection("other").root()["blob"] = Blob(b"in other")
    manager.commit()
    storages = [each.storage for each in db.databases.values()]
    before = [contents(storage) for storage in storages]

    for name in ("main", "other"):
        winner = transaction.TransactionManager()
        blob = db.open(winner).get_connection(name).root()["blob"]
        rewrite(main.root()["blob"], b"lost in main")
        rewrite(main.get_connection("other").root()["blob"], b"lost in other")
        rewrite(blob, b"won")
        winner.commit()
        with pytest.raises(ConflictError):
            manager.commit()
        manager.abort()
        assert text_of(main.get_connection(name).root()["blob"]) == b"won"

    for storage, known in zip(storages, before, strict=True):
        now = contents(storage)
        assert now[: len(known)] == known
        assert len(now) == len(known) + 1
        report = storage.sweep(dry_run=True)
        assert (report.listed, report.kept, report.garbage) == (2, 2, 0)


def test_pack_of_one_database_leaves_the_other_alone(two_databases):
    """A sweep deletes its own prefix's garbage only."""
    db = two_databases()
    manager = transaction.TransactionManager()
    main = db.open(manager)
    other = main.get_connection("other")
    for number in range(3):
        main.root()["blob"] = Blob(b"main %d" % number)
        other.root()["blob"] = Blob(b"other %d" % number)
        manager.commit()
    old = [record for each in contents(other.db().storage) for record in each[2] if record[2]]
    db.pack()
    assert main.db().storage.sweep(dry_run=True).listed == 1
    assert other.db().storage.sweep(dry_run=True).listed == 3
    close_both(db)

    db = two_databases("cold", "cold too")
    main = db.open(manager)
    assert text_of(main.root()["blob"]) == b"main 2"
    storage = main.get_connection("other").db().storage
    assert [record for each in contents(storage) for record in each[2] if record[2]] == old


def test_read_only_base_reads_blobs(opener_of):
    """A read-only database serves its blobs from an empty cache."""
    open_storage = opener_of(WRAPPED)
    with opened(open_storage()) as connection:
        connection.root()["blob"] = Blob(b"some")
        connection.transaction_manager.commit()
    with opened(open_storage(blob_dir="cold", read_only=True)) as connection:
        blob = connection.root()["blob"]
        assert connection.isReadOnly()
        assert text_of(blob) == b"some"
