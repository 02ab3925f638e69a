"""A RelStorage as base: other processes write, and only its table knows all revisions."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import os
from typing import Any

from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IStorageWrapper
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64

from .basecontract import Base
from .basecontract import Identity
from .basecontract import innermost
from .basecontract import LARGEST_BLOB_RECORD
from .basecontract import LookBack
from .basecontract import Read
from .basecontract import Record
from .basecontract import Revisions
from .basecontract import Source
from .basecontract import Survivors
from .basecontract import survivors_among
from .basecontract import tid_of
from .basecontract import Undone
from .basecontract import Wanted
from .ownership import identity_of_file


# RelStorage gives out oids in blocks of these.
OIDS_AT_ONCE = 16
# Rows of a query that goes through all of them
ROWS_AT_ONCE = 5000


# By adapter; both columns are text, and for other adapters the key owner stands in. A dump that is
# read into another database, or another server, makes another one.
_IDENTITY = {
    "PostgreSQLAdapter": (
        "SELECT concat_ws('/', (SELECT system_identifier FROM pg_control_system()), oid,"
        " current_schema()), concat_ws('.', datname, current_schema())"
        " FROM pg_database WHERE datname = current_database()"
    ),
}


class RelStorageBase:
    """A RelStorage 4, perhaps inside wrappers that keep it as ``base``, or an instance of it.

    :param root: what it is an instance of.
    """

    tells_tid = False
    locks_at_begin = False
    takes_tid = True
    shared = True
    tells_garbage = True
    sources: Sequence[Any] = ()
    look_back: LookBack | None = None

    def __init__(self, base: Any, root: Any = None) -> None:
        self.storage = base
        self._root = base if root is None else root  # an empty RelStorage is false
        self._relstorage = innermost(self._root)
        self.keeps_history: bool = self._relstorage.keep_history
        path = getattr(self._relstorage._adapter.connmanager, "path", None)  # of SQLite
        # Now: a process may go to another directory.
        self._path = os.path.realpath(path) if path else None
        self.hides_undo = self.keeps_history

    def of(self, instance: Any) -> Base:
        return RelStorageBase(instance, self._root)

    def database(self) -> str:
        # The sort key differs from opening to opening, and may show a password.
        if self._path:
            return self._path
        return f"database {self._relstorage._options.cache_prefix}"

    def identity(self) -> Identity | None:
        adapter = self._relstorage._adapter
        if self._path:
            return identity_of_file(self._path)
        query = _IDENTITY.get(type(adapter).__name__)
        if query is None:
            return None
        connection, cursor = adapter.connmanager.open()
        try:
            cursor.execute(query)
            id_, name = cursor.fetchone()
        finally:
            adapter.connmanager.rollback_and_close(connection, cursor)
        return Identity(str(id_), str(name))

    def tid(self) -> bytes | None:
        # It picks one in tpc_finish, under its commit lock.
        return None

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        # Not loadBefore, which makes three queries and never asks the cache.
        try:
            data: bytes | None = self.storage.loadSerial(oid, serial)
        except POSKeyError:
            # The view of this instance may be older than the revision.
            with self.snapshot() as snapshot:
                ((_oid, revisions),) = snapshot.revisions([oid])
            data = revisions.get(serial)
        return data

    def undo(self, transaction_id: bytes, transaction: Any) -> Undone:
        # What is there before an undo that succeeds was not packed until then. Afterwards
        # RelStorage lets others pack, though this transaction has not ended.
        with self.snapshot() as snapshot:
            sources = list(snapshot.before(tid_of(transaction_id)))
        result = self.storage.undo(transaction_id, transaction)
        tid = innermost(self.storage)._tpc_phase.committing_tid_lock.tid
        return Undone(result, tid, sources)

    @contextmanager
    def snapshot(self) -> Iterator["_RelStorageSnapshot"]:
        # Not a connection for loading: that may be to a replica, which may lag behind.
        connmanager = self._relstorage._adapter.connmanager
        connection, cursor = connmanager.open()
        try:
            yield _RelStorageSnapshot(self, self._relstorage._adapter, cursor)
        finally:
            connmanager.rollback_and_close(connection, cursor)

    @contextmanager
    def writer(self) -> Iterator[Any]:
        instance = self._root.new_instance()
        try:
            yield instance
        finally:
            instance.release()

    @contextmanager
    def untransforming(self) -> Iterator[Callable[[bytes], bytes]]:
        """Give what undoes the work of wrappers between RelStorage and us."""
        if IStorageWrapper.providedBy(self._root):
            # One of its own: ours passes on what it has made of a record to those around us.
            with self.writer() as wrapper:
                yield wrapper.untransform_record_data
        else:
            yield bytes

    def give_up(self, instance: Any, transaction: Any) -> None:
        instance.tpc_abort(transaction)

    def hold_commits(self, instance: Any) -> None:
        relstorage = innermost(instance)
        if type(relstorage._adapter).__name__ == "PostgreSQLAdapter":
            # A transaction that begins with a tid has a lock of rows there. Commits take this one,
            # after those of objects; it is free again with the end of the transaction.
            cursor = relstorage._tpc_phase.shared_state.store_connection.cursor
            cursor.execute("SELECT pg_advisory_xact_lock(-1)")

    def running(self) -> Any:
        # Not tpc_transaction, which fails while RelStorage restores.
        phase = getattr(innermost(self.storage), "_tpc_phase", None)
        state = getattr(phase, "shared_state", None)
        return state.transaction if state else None

    def settle(self) -> None:
        # An undo, in whatever process, holds the commit lock until its end. We take it as a commit
        # does, and give it back: a transaction without objects would be seen in the undo log.
        with self.writer() as instance:
            transaction = TransactionMetaData()
            instance.tpc_begin(transaction)
            try:
                relstorage = innermost(instance)
                cursor = relstorage._tpc_phase.shared_state.store_connection.cursor
                relstorage._adapter.lock_database_and_choose_next_tid(cursor, b"", b"", b"")
            finally:
                instance.tpc_abort(transaction)

    def about_to_pack(self) -> None:
        pass

    def copied(self) -> None:
        # As RelStorage does after a copy of its own: its tables have changed as a whole.
        self._relstorage._adapter.stats.large_database_change()


class _RelStorageSnapshot:
    """A connection of its own, on which every question sees what is committed by then."""

    def __init__(self, base: RelStorageBase, adapter: Any, cursor: Any) -> None:
        self._base = base
        self._adapter = adapter
        self._cursor = cursor

    def last_transaction(self) -> bytes:
        tid: bytes = p64(self._adapter.txncontrol.get_tid(self._cursor))
        return tid

    def highest_oid(self) -> bytes:
        # Not new_oid: who asks must not change the answer. Neither does any method tell.
        self._cursor.execute("SELECT MAX(zoid) FROM object_state")
        ((stored,),) = self._cursor.fetchall()
        return p64(max(stored or 0, self._count_blocks() * OIDS_AT_ONCE))

    def _count_blocks(self) -> int:
        kind, count = type(self._adapter).__name__, 0
        if kind == "PostgreSQLAdapter":
            self._cursor.execute("SELECT last_value FROM zoid_seq WHERE is_called")
            count = sum(row[0] for row in self._cursor.fetchall())
        elif kind == "Sqlite3Adapter":
            allocator = self._adapter.oidallocator
            with allocator.lock:
                ((count,),) = allocator._connect().execute("SELECT zoid FROM new_oid").fetchall()
        return count

    def survivors(self, wanted: Wanted, read: Read) -> Iterator[tuple[bytes, Survivors]]:
        for oid, revisions in self.revisions(wanted):
            yield oid, survivors_among(revisions, wanted[oid], read)

    def revisions(self, oids: Iterable[bytes]) -> Iterator[tuple[bytes, Revisions]]:
        # The storage's methods do not tell: load and loadBefore end at an undone creation, and
        # history is empty after a pack.
        found: dict[bytes, Revisions] = {oid: {} for oid in oids}
        with self._base.untransforming() as untransform:
            for oid, tid, state in self._select("zoid, tid, state", zoid=map(u64, found)):
                data = self._adapter.driver.binary_column_as_state_type(state)
                found[p64(oid)][p64(tid)] = untransform(data) if data else None
        yield from found.items()

    def records(self, after: bytes = b"") -> Iterator[tuple[bytes, list[Record]]]:
        as_state = self._adapter.driver.binary_column_as_state_type
        with self._base.untransforming() as untransform:
            while True:
                # Whole numbers: placeholders differ from driver to driver.
                behind = u64(after[:8]) if after else -1, u64(after[8:]) if after else 0
                self._cursor.execute(
                    "SELECT zoid, tid, state FROM object_state"
                    f" WHERE (zoid, tid) > ({behind[0]:d}, {behind[1]:d})"
                    f" AND state_size BETWEEN 1 AND {LARGEST_BLOB_RECORD:d}"
                    f" ORDER BY zoid, tid LIMIT {ROWS_AT_ONCE:d}"
                )
                rows = self._cursor.fetchall()
                if not rows:
                    return
                after = p64(rows[-1][0]) + p64(rows[-1][1])
                yield (
                    after,
                    [
                        Record(p64(oid), p64(tid), untransform(as_state(state)))
                        for oid, tid, state in rows
                        if state
                    ],
                )

    def before(self, tid: bytes) -> Iterator[Source]:
        """Yield what was current before a transaction, of what it has stored."""
        oids = [oid for (oid,) in self._select("zoid", tid=[u64(tid)])]
        last = dict.fromkeys(oids, 0)
        for oid, found in self._select("zoid, tid", zoid=oids):
            if last[oid] < found < u64(tid):
                last[oid] = found
        with self._base.untransforming() as untransform:
            for oid, found in last.items():
                state = self._adapter.mover.load_revision(self._cursor, oid, found)
                # What is larger is no blob's, and a transaction may have stored much of it.
                data = state if state and len(state) <= LARGEST_BLOB_RECORD else None
                yield Source(p64(oid), p64(found), untransform(data) if data else None)

    def _select(self, columns: str, **where: Iterable[int]) -> Iterator[Any]:
        batcher = self._adapter.mover.make_batcher(self._cursor)
        rows: Iterator[Any] = batcher.select_from(columns.split(", "), "object_state", **where)
        return rows
