"""A base whose ``history`` and ``loadSerial`` tell all there is."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
import os
import time
from typing import Any
from typing import TypeVar

from persistent.timestamp import TimeStamp
from ZODB.FileStorage.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import maxtid
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
from .basecontract import Snapshot
from .basecontract import Source
from .basecontract import Survivors
from .basecontract import survivors_among
from .basecontract import tid_of
from .basecontract import Undone
from .basecontract import Wanted
from .buffer import BufferedStorage
from .keys import TID_SIZE
from .ownership import identity_of_file


T = TypeVar("T")

# More revisions than any object has.
ALL = 10**6
# How often, and in seconds, an undo looks again while another thread's vote writes.
VOTE_ATTEMPTS = 300
VOTE_PAUSE = 0.1


class HistoryBase:
    """What such bases have in common. They may be inside wrappers that keep them as ``base``."""

    tells_tid = False
    locks_at_begin = False
    takes_tid = False
    shared = False
    keeps_history = True
    hides_undo = False  # a pack waits until an undo has ended
    tells_garbage = True
    sources: Sequence[Any] = ()

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self._innermost = innermost(storage)

    def of(self, instance: Any) -> Base:
        # Only an IMVCCStorage, as a RelStorage is, has instances.
        raise NotImplementedError("these storages have no instances")

    def database(self) -> str:
        name: str = self.storage.sortKey()
        return name

    def identity(self) -> Identity | None:
        return None

    def tid(self) -> bytes | None:
        return None

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        try:
            found = self.storage.loadBefore(oid, p64(u64(serial) + 1))
        except POSKeyError:
            return None
        return found[0] if found and found[1] == serial else None

    @property
    def look_back(self) -> LookBack | None:
        return None if self.tells_tid else self

    def undo(self, transaction_id: bytes, transaction: Any) -> Undone:
        # What these bases return.
        tid, oids = result = self.storage.undo(transaction_id, transaction)
        sources = (self.before(oid, tid_of(transaction_id)) for oid in oids)
        return Undone(result, tid, sources)

    def stored_by(self, tid: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        for transaction in self.storage.iterator(tid, tid):
            for record in transaction:
                yield record.oid, record.data

    def before(self, oid: bytes, tid: bytes) -> Source:
        return self._before(self.storage, oid, tid)

    @staticmethod
    def _before(storage: Any, oid: bytes, tid: bytes) -> Source:
        try:
            found = storage.loadBefore(oid, tid)
        except POSKeyError:
            found = None  # the transaction brought the object into being again
        data, serial = found[:2] if found else (None, b"")
        return Source(oid, serial, data)

    def current_tid(self, oid: bytes) -> bytes:
        # Not getTid, which knows no object whose creation was undone.
        tid: bytes = history[0]["tid"] if (history := self._history(oid, 1)) else b""
        return tid

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        yield self

    @contextmanager
    def writer(self) -> Iterator[Any]:
        yield self.storage

    def settle(self) -> None:
        pass

    def give_up(self, instance: Any, transaction: Any) -> None:
        instance.tpc_abort(transaction)

    def hold_commits(self, instance: Any) -> None:
        pass  # a transaction that has voted does

    def running(self) -> Any:
        return None

    def about_to_pack(self) -> None:
        pass

    def copied(self) -> None:
        pass

    # The snapshot: every question sees what is committed by then.

    def last_transaction(self) -> bytes:
        tid: bytes = self.storage.lastTransaction()
        return tid

    def highest_oid(self) -> bytes:
        # Only a sweep asks.
        raise NotImplementedError("a DemoStorage, which is never swept, chooses oids at random")

    def survivors(self, wanted: Wanted, read: Read) -> Iterator[tuple[bytes, Survivors]]:
        for oid, names in wanted.items():
            if self.tells_tid and all(len(name) == TID_SIZE for name in names):
                yield oid, self._survivors_by_tid(oid, set(names), read)
            else:
                yield oid, self._survivors(oid, names, read)

    def _survivors(self, oid: bytes, names: Collection[bytes], read: Read) -> Survivors:
        """Go back from the current revision until all names are found: with one load, mostly."""
        found = Survivors(set(), set())
        last_seen = b""
        try:
            while (newest := self._load_before(oid, maxtid)) and newest[1] > last_seen:
                loaded: tuple[bytes, bytes] | None = newest
                while loaded is not None and loaded[1] > last_seen:
                    data, tid = loaded
                    reading = read(data)
                    if not reading.is_blob:
                        return survivors_among(self._revisions(oid), names, read)
                    if tid in names:
                        found.tids.add(tid)
                    if reading.stamp:
                        found.stamps.add(reading.stamp)
                    if found.tids.union(found.stamps).issuperset(names):
                        return found._replace(current=newest[1])
                    loaded = self._load_before(oid, tid)
                # What is missing a pack may have removed just now, after an undo brought its data
                # back under a tid that was not there when we began.
                last_seen = newest[1]
        except POSKeyError:
            # There is none, or an undone creation, behind which only the history goes on.
            return survivors_among(self._revisions(oid), names, read)
        return found._replace(current=last_seen or None)

    def _load_before(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes] | None:
        found = self.storage.loadBefore(oid, tid)
        return found[:2] if found else None

    def _survivors_by_tid(self, oid: bytes, tids: set[bytes], read: Read) -> Survivors:
        """Tell with as few loads as possible: one, where nothing was undone."""
        history = self._history(oid)
        alive: set[bytes] = set()
        seen_data = False
        # Those asked about first; the others only show what kind of object this is.
        for entry in sorted(history, key=lambda entry: entry["tid"] in tids, reverse=True):
            tid = entry["tid"]
            if seen_data and tid not in tids:
                break
            # loadSerial walks back from the current revision: once, and for records without data
            # of their own, which undo an earlier change or a creation.
            if not seen_data or not entry["size"]:
                try:
                    data = self.storage.loadSerial(oid, tid)
                except POSKeyError:
                    continue  # an undone creation
                if not read(data).is_blob:
                    oldest = min(entry["tid"] for entry in history)
                    return Survivors(alive, set(), other_since=oldest)
                seen_data = True
            if tid in tids:
                alive.add(tid)
        return Survivors(alive, set())

    def revisions(self, oids: Iterable[bytes]) -> Iterator[tuple[bytes, Revisions]]:
        for oid in oids:
            yield oid, self._revisions(oid)

    def records(self, after: bytes = b"") -> Iterator[tuple[bytes, list[Record]]]:
        # What comes later a FileStorage may be writing just now.
        last = self.last_transaction()
        if after >= last:
            return
        for transaction in self._iterator(p64(u64(after) + 1) if after else None):
            yield (
                transaction.tid,
                [
                    Record(record.oid, record.tid, record.data)
                    for record in transaction
                    if record.data and len(record.data) <= LARGEST_BLOB_RECORD
                ],
            )
            if transaction.tid >= last:
                return

    def _iterator(self, start: bytes | None) -> Iterator[Any]:
        transactions: Iterator[Any] = iter(self.storage.iterator(start))
        return transactions

    def _revisions(self, oid: bytes) -> Revisions:
        history = self._history(oid)
        while True:
            found: Revisions = {}
            for entry in history:
                try:
                    found[entry["tid"]] = self.storage.loadSerial(oid, entry["tid"])
                except POSKeyError:
                    found[entry["tid"]] = None
            # An undone creation, or a pack has just removed it. Then an undo may have brought its
            # data back under a tid that the history did not have yet.
            before = history
            if None not in found.values() or before == (history := self._history(oid)):
                return found

    def _history(self, oid: bytes, size: int = ALL) -> list[dict[str, Any]]:
        try:
            history: list[dict[str, Any]] = self.storage.history(oid, size=size)
        except POSKeyError:
            return []
        return history


class LocalBase(HistoryBase):
    """A FileStorage or MappingStorage: this process alone writes to it.

    :param bool by_tid: or by record, with stores held back until the uploads are done.
    :param str directory: where large transactions spill to then.
    """

    takes_tid = True

    def __init__(self, storage: Any, by_tid: bool = True, directory: str | None = None) -> None:
        super().__init__(storage if by_tid else BufferedStorage(storage, directory))
        self._innermost = innermost(storage)
        self.tells_tid = self.locks_at_begin = by_tid
        # Now: a process may go to another directory. A MappingStorage ends with its process.
        is_file = isinstance(self._innermost, FileStorage)
        self._path = os.path.realpath(self._innermost.getName()) if is_file else None

    def identity(self) -> Identity | None:
        return self._path and identity_of_file(self._path)

    def tid(self) -> bytes | None:
        tid: bytes | None = self._innermost._tid if self.tells_tid else None
        return tid

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        record = super().record(oid, serial)
        if record is None:
            # It would know: whoever asks is a DemoStorage, or too late. S3 need not be asked.
            raise POSKeyError("No such revision", oid, serial)
        return record

    def stored_by(self, tid: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        yield from _between_votes(lambda: list(super(LocalBase, self).stored_by(tid)))

    def _iterator(self, start: bytes | None) -> Iterator[Any]:
        # It looks at the end of the file when it is told where to begin.
        return _between_votes(lambda: super(LocalBase, self)._iterator(start))

    def give_up(self, instance: Any, transaction: Any) -> None:
        base = self._innermost
        # Only while we have its lock.
        if isinstance(base, FileStorage) and base.tpc_transaction() is transaction:
            # It would go on from the tid that was given. Others may have come further meanwhile,
            # and the next tid would be lower than the last.
            base._ts = max(base._ts, TimeStamp(base.lastTransaction()))
        super().give_up(instance, transaction)

    def running(self) -> Any:
        # By record several have begun, and none knows its tid.
        return self.storage.tpc_transaction() if self.tells_tid else None

    def highest_oid(self) -> bytes:
        if isinstance(self._innermost, MappingStorage):
            return max([p64(self._innermost._oid), *self._innermost._data])
        highest: bytes = self._innermost._oid
        return highest


def _between_votes(ask: Callable[[], T]) -> T:
    """Ask a FileStorage, again while a vote is writing to the end of its file."""
    for attempt in range(1, VOTE_ATTEMPTS + 1):
        try:
            return ask()
        except (AttributeError, ValueError):
            if attempt == VOTE_ATTEMPTS:
                raise
            time.sleep(VOTE_PAUSE)
    raise AssertionError("unreachable")
