"""Blobs in the tables of a RelStorage, whatever its database keeps them in."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from queue import LifoQueue
import threading
from typing import Any

from ZODB.utils import p64
from ZODB.utils import u64

from ..basecontract import innermost
from ..keys import blob_key
from ..staged import remove_quietly
from .configuration import UsageError
from .origins import Content
from .origins import content_of_file
from .origins import Found
from .origins import in_key_order


# Objects that one statement asks for
AT_ONCE = 1000
# To the database, which has not many for all its clients
CONNECTIONS = 8
# Larger than any oid of RelStorage
ALL_OIDS = 1 << 63


class Tables:
    """The table ``blob_chunk`` of a RelStorage that is open.

    :param storage: a RelStorage, perhaps inside wrappers.
    :param temporary_file: returns a new path.
    :raises UsageError: when it is none.
    """

    name = "RelStorage's tables"
    can_remove = False

    def __init__(self, storage: Any, temporary_file: Callable[[], str]) -> None:
        self._adapter: Any = getattr(innermost(storage), "_adapter", None)
        if self._adapter is None:
            kind = type(innermost(storage)).__name__
            raise UsageError(f"--from-relstorage: the database is a {kind} and no RelStorage")
        self._temporary_file = temporary_file
        # What no thread uses at the moment.
        self._connections: LifoQueue[tuple[Any, Any]] = LifoQueue()
        self._may_connect = threading.BoundedSemaphore(CONNECTIONS)

    def blobs(self, after: str = "") -> Iterator[Found]:
        yield from in_key_order(self._objects, after)

    def _objects(self, low: int, high: int) -> Iterator[tuple[int, list[Found]]]:
        low, high = min(low, ALL_OIDS), min(high, ALL_OIDS)
        while page := self._select(
            f"SELECT DISTINCT zoid FROM blob_chunk WHERE zoid >= {low} AND zoid < {high}"
            f" ORDER BY zoid LIMIT {AT_ONCE}"
        ):
            last = page[-1][0]
            revisions: dict[int, set[int]] = {}
            for oid, tid in self._select(
                f"SELECT zoid, tid FROM blob_chunk WHERE zoid >= {low} AND zoid <= {last}"
            ):
                revisions.setdefault(oid, set()).add(tid)
            for oid in sorted(revisions):
                yield oid, [_found(p64(oid), p64(tid)) for tid in revisions[oid]]
            low = last + 1

    def _select(self, statement: str) -> list[Any]:
        with self._cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall())

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        """Give a cursor whose view begins with its first statement."""
        manager = self._adapter.connmanager
        with self._may_connect:
            try:
                connection, cursor = self._connections.get_nowait()
            except Empty:
                connection, cursor = manager.open()
            try:
                yield cursor
            finally:
                # Not a transaction that lasts as long as the uploads do.
                if manager.rollback_quietly(connection, cursor):
                    self._connections.put((connection, cursor))

    @contextmanager
    def file(self, found: Found) -> Iterator[str]:
        oid, tid = u64(found.oid), u64(found.name)
        path = self._temporary_file()
        try:
            try:
                with self._cursor() as cursor:
                    self._adapter.mover.download_blob(cursor, oid, tid, path)
            except Exception as error:
                # Each database says in another way that there is no such row.
                if self.has(found):
                    raise
                raise FileNotFoundError(found.key) from error
            yield path
        finally:
            remove_quietly(path)

    def has(self, found: Found) -> bool:
        where = f"WHERE zoid = {u64(found.oid)} AND tid = {u64(found.name)}"
        return bool(self._select(f"SELECT tid FROM blob_chunk {where} LIMIT 1"))

    def content(self, found: Found) -> Content:
        with self.file(found) as path:
            return content_of_file(path)

    def remove(self, found: Found, content: Content) -> None:
        raise NotImplementedError("nobody removes single blobs from tables")

    def close(self) -> None:
        while True:
            try:
                self._adapter.connmanager.close(*self._connections.get_nowait())
            except Empty:
                return


def _found(oid: bytes, tid: bytes) -> Found:
    return Found(blob_key(oid, tid), oid, tid)
