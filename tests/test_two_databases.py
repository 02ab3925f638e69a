"""One transaction over several databases, whose storages hold their stores back."""

from persistent.mapping import PersistentMapping
import pytest
from transaction import TransactionManager
from transaction.interfaces import IDataManager
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from zope.interface import implementer

from .services.location import new_bucket
from .storages import Gate
from .storages import make_storage
from .storages import read
from .storages import start


@implementer(IDataManager)
class LastToCommit:
    """Stops its transaction after all others in it have committed, and before they vote."""

    def __init__(self, manager, gate):
        self.transaction_manager = manager
        self._gate = gate

    def commit(self, transaction):
        self._gate()

    def sortKey(self):
        return "~~~ after all others"

    def ignore(self, transaction):
        pass

    abort = tpc_begin = tpc_vote = tpc_finish = tpc_abort = ignore


@pytest.fixture
def databases(rclone, tmp_path):
    """Two databases by record, by their sort keys, each with a blob of two revisions."""
    opened = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        base = FileStorage(f"{directory}/Data.fs")
        storage, _client = make_storage(
            new_bucket(rclone), directory, base=base, addressing="record"
        )
        db = DB(storage)
        with db.transaction() as connection:
            connection.root()["blob"] = Blob(b"first")
            connection.root()["plain"] = PersistentMapping()
        with db.transaction() as connection, connection.root()["blob"].open("w") as file:
            file.write(b"second")
        opened.append(db)
    yield opened
    for db in opened:
        db.close()


def test_undo_in_one_of_two_databases_holds_no_lock_before_the_votes(databases):
    """Locks are taken in the order of the votes, so that two such transactions cannot deadlock."""
    gate = Gate()

    def undo_in_the_second():
        manager = TransactionManager()
        connection = databases[0].open(manager)
        connection.root()["plain"]["undoing"] = True
        databases[1].undo(databases[1].undoInfo(0, 1)[0]["id"], manager.get())
        manager.get().join(LastToCommit(manager, gate))
        manager.commit()
        connection.close()

    def change_both():
        manager = TransactionManager()
        connections = [db.open(manager) for db in databases]
        for connection in connections:
            connection.root()[connection.db().storage.getName()] = Blob(b"other")
        manager.commit()
        for connection in connections:
            connection.close()

    undoing = start(undo_in_the_second)
    gate.wait()
    start(change_both).result()
    gate.open()
    undoing.result()
    with databases[0].transaction() as first, databases[1].transaction() as second:
        assert first.root()["plain"]["undoing"]
        assert read(first.root()["blob"]) == b"second"
        assert read(second.root()["blob"]) == b"first"
        for connection in (first, second):
            assert read(connection.root()[connection.db().storage.getName()]) == b"other"
