"""What differs between base storages: when a tid is known, which revisions survive."""

from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ZODB.FileStorage.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64

from .basecontract import Base
from .basecontract import innermost
from .basecontract import Read
from .basecontract import Revisions
from .basecontract import Snapshot
from .basecontract import Source
from .basecontract import Survivors
from .basecontract import survivors_among
from .basecontract import tid_of
from .basecontract import Undone
from .basecontract import Wanted
from .keys import TID_SIZE
from .relstoragebase import RelStorageBase


# More revisions than any object has.
_ALL = 10**6


def base_of(storage: Any, addressing: str = "auto") -> Base:
    """Return what is known about a storage.

    :param str addressing: "auto", or "tid" or "record" where it must be of that kind.
    :raises ValueError: when it cannot be the base of ours.
    """
    if IBlobStorage.providedBy(storage):
        raise ValueError(
            f"this {type(storage).__name__} has a blob directory of its own, where undo would look"
            " for files that are in S3. Use a FileStorage, a MappingStorage or a RelStorage without"
            " blob-dir, and name the directory, where there is one, as a <blobdir-source>"
        )
    inside = innermost(storage)
    base: Base | None = None
    if isinstance(inside, (FileStorage, MappingStorage)):
        base = TidBase(storage)
    elif _is_relstorage(inside):
        base = RelStorageBase(storage)
    if base is not None:
        mode = "tid" if base.tells_tid else "record"
        if addressing not in ("auto", mode):
            raise ValueError(
                f"addressing {addressing} does not fit a {type(inside).__name__}, which needs"
                f" addressing {mode}: leave the key out, or say auto"
            )
        return base
    raise ValueError(
        f"a {type(inside).__name__} cannot be wrapped: it does not tell the tid of a transaction in"
        " time, and which revisions survive its pack is not known. Use a FileStorage, a"
        " MappingStorage or a RelStorage"
    )


def _is_relstorage(storage: Any) -> bool:
    # By name: it need not be installed.
    names = [f"{cls.__module__}.{cls.__name__}" for cls in type(storage).__mro__]
    return "relstorage.storage.RelStorage" in names


class TidBase:
    """A FileStorage or MappingStorage, perhaps inside wrappers that keep it as ``base``."""

    tells_tid = True
    keeps_history = True
    hides_undo = False  # a pack waits until an undo has ended

    def __init__(self, base: Any) -> None:
        self._base = base
        self._innermost = innermost(base)

    def of(self, instance: Any) -> Base:
        return TidBase(instance)

    def database(self) -> str:
        name: str = self._base.sortKey()
        return name

    def tid(self) -> bytes | None:
        tid: bytes = self._innermost._tid
        return tid

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        try:
            found = self._base.loadBefore(oid, p64(u64(serial) + 1))
        except POSKeyError:
            return None
        return found[0] if found and found[1] == serial else None

    def undo(self, transaction_id: bytes, transaction: Any) -> Undone:
        result = self._base.undo(transaction_id, transaction)
        sources = self._before(result[1], tid_of(transaction_id))
        return Undone(result, self._innermost._tid, sources)

    def _before(self, oids: Iterable[bytes], tid: bytes) -> Iterator[Source]:
        for oid in oids:
            try:
                found = self._base.loadBefore(oid, tid)
            except POSKeyError:
                found = None  # the transaction brought the object into being again
            data, serial = found[:2] if found else (None, b"")
            yield Source(oid, serial, data)

    @contextmanager
    def snapshot(self) -> Iterator[Snapshot]:
        yield self

    @contextmanager
    def writer(self) -> Iterator[Any]:
        yield self._base

    def settle(self) -> None:
        pass

    def hold_commits(self, instance: Any) -> None:
        pass  # a transaction that has begun does

    def running(self) -> Any:
        return self._base.tpc_transaction()

    def copied(self) -> None:
        pass

    def last_transaction(self) -> bytes:
        tid: bytes = self._base.lastTransaction()
        return tid

    def highest_oid(self) -> bytes:
        if isinstance(self._innermost, MappingStorage):
            return max([p64(self._innermost._oid), *self._innermost._data])
        highest: bytes = self._innermost._oid
        return highest

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
                    data = self._base.loadSerial(oid, tid)
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
        found: Revisions = {}
        for entry in self._history(oid):
            try:
                found[entry["tid"]] = self._base.loadSerial(oid, entry["tid"])
            except POSKeyError:
                found[entry["tid"]] = None
        return found

    def _history(self, oid: bytes) -> list[dict[str, Any]]:
        try:
            history: list[dict[str, Any]] = self._base.history(oid, size=_ALL)
        except POSKeyError:
            return []
        return history
