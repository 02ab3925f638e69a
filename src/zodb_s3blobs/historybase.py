"""A base whose ``history`` and ``loadSerial`` tell all there is."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64

from .basecontract import Base
from .basecontract import innermost
from .basecontract import LARGEST_BLOB_RECORD
from .basecontract import Read
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


# More revisions than any object has.
ALL = 10**6


class HistoryBase:
    """What such bases have in common. They may be inside wrappers that keep them as ``base``."""

    tells_tid = False
    shared = False
    keeps_history = True
    hides_undo = False  # a pack waits until an undo has ended
    tells_garbage = True
    sources: Sequence[Any] = ()

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self._innermost = innermost(storage)

    def of(self, instance: Any) -> Base:
        raise NotImplementedError("these storages have no instances")

    def database(self) -> str:
        name: str = self.storage.sortKey()
        return name

    def tid(self) -> bytes | None:
        return None

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        try:
            found = self.storage.loadBefore(oid, p64(u64(serial) + 1))
        except POSKeyError:
            return None
        return found[0] if found and found[1] == serial else None

    def undo(self, transaction_id: bytes, transaction: Any) -> Undone:
        # It undoes in its vote, and only its finish tells the tid.
        tid = tid_of(transaction_id)
        records = [record for stored in self.storage.iterator(tid, tid) for record in stored]
        small = [each.oid for each in records if len(each.data or b"") <= LARGEST_BLOB_RECORD]
        sources = list(self._before(small, tid))
        self.storage.undo(transaction_id, transaction)
        return Undone((None, [record.oid for record in records]), None, sources)

    def _before(self, oids: Iterable[bytes], tid: bytes) -> Iterator[Source]:
        for oid in oids:
            try:
                found = self.storage.loadBefore(oid, tid)
            except POSKeyError:
                found = None  # the transaction brought the object into being again
            data, serial = found[:2] if found else (None, b"")
            yield Source(oid, serial, data)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        yield self

    @contextmanager
    def writer(self) -> Iterator[Any]:
        yield self.storage

    def settle(self) -> None:
        pass

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
        raise NotImplementedError

    def survivors(self, wanted: Wanted, read: Read) -> Iterator[tuple[bytes, Survivors]]:
        for oid, names in wanted.items():
            if any(len(name) != TID_SIZE for name in names):
                yield oid, survivors_among(self._revisions(oid), names, read)
            else:
                yield oid, self._survivors_by_tid(oid, set(names), read)

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

    def _history(self, oid: bytes) -> list[dict[str, Any]]:
        try:
            history: list[dict[str, Any]] = self.storage.history(oid, size=ALL)
        except POSKeyError:
            return []
        return history


class LocalBase(HistoryBase):
    """A FileStorage or MappingStorage: this process alone writes to it.

    :param bool by_tid: or by record, with stores held back until the uploads are done.
    :param str directory: where large transactions spill to then.
    """

    def __init__(self, storage: Any, by_tid: bool = True, directory: str | None = None) -> None:
        super().__init__(storage if by_tid else BufferedStorage(storage, directory))
        self._innermost = innermost(storage)
        self.tells_tid = by_tid

    def tid(self) -> bytes | None:
        tid: bytes | None = self._innermost._tid if self.tells_tid else None
        return tid

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        record = super().record(oid, serial)
        if record is None:
            # It would know: whoever asks is a DemoStorage, or too late. S3 need not be asked.
            raise POSKeyError("No such revision", oid, serial)
        return record

    def undo(self, transaction_id: bytes, transaction: Any) -> Undone:
        if not self.tells_tid:
            return super().undo(transaction_id, transaction)
        result = self.storage.undo(transaction_id, transaction)
        sources = self._before(result[1], tid_of(transaction_id))
        return Undone(result, self._innermost._tid, sources)

    def running(self) -> Any:
        # By record several have begun, and none knows its tid.
        return self.storage.tpc_transaction() if self.tells_tid else None

    def highest_oid(self) -> bytes:
        if isinstance(self._innermost, MappingStorage):
            return max([p64(self._innermost._oid), *self._innermost._data])
        highest: bytes = self._innermost._oid
        return highest
