"""Gives each blob the bytes that an undo makes current again."""

from functools import partial
from typing import Any

from .basecontract import Base
from .basecontract import LookBack
from .basecontract import Source
from .basecontract import tid_of
from .commit import TransactionBlobs
from .translation import Translator


def undo_at_once(
    base: Base,
    records: Translator,
    blobs: TransactionBlobs,
    transaction_id: bytes,
    transaction: Any,
) -> Any:
    """Undo where the tid is known: a blob that is kept by tid is copied to the key of that.

    :returns: what the base returns.
    """
    undone = base.undo(transaction_id, transaction)
    with blobs.following():
        for source in undone.sources:
            # A reference travels with its record.
            reading = records.read(source.record)
            if reading.is_blob and reading.stamp is None:
                blobs.copy(source.oid, undone.tid, source.tid)
                continue
            blobs.drop(source.oid, undone.tid)
            if reading.stamp is not None and base.tells_tid:
                # A FileStorage's own undo refers to a transaction: see `LateUndo`.
                storage, oid = base.storage, source.oid
                serial = storage.history(oid)[0]["tid"]
                storage.store(oid, serial, source.record, "", transaction)
    return undone.result


class LateUndo:
    """The undos of one transaction whose tid only its end tells; the vote asks them of the base.

    A reference travels with its record. But where a blob that is kept by tid becomes current again,
    its record needs one, to a copy of the bytes: the vote then stores it once more, after the undo.

    That makes two records of one oid in one transaction, and so do two undos. Reading finds the
    last of them, but a FileStorage's pack takes the first where a later undo refers to that
    transaction (``PackCopier._data_find``). So whatever goes back to such a double is stored once
    more, too, and no current record only refers to one.

    :param storage: what undoes and stores.
    """

    def __init__(
        self,
        base: LookBack,
        storage: Any,
        records: Translator,
        blobs: TransactionBlobs,
        transaction: Any,
    ) -> None:
        self._base = base
        self._storage = storage
        self._records = records
        self._blobs = blobs
        self._transaction = transaction
        # Oids of what this transaction has undone already.
        self._undone: set[bytes] = set()
        # By tid, the oids of which a transaction has more than one record.
        self._doubles: dict[bytes, set[bytes]] = {}

    def undo(self, transaction_id: bytes) -> list[bytes]:
        """Undo a transaction in the vote, and return the oids that it has stored."""
        tid, oids = tid_of(transaction_id), []
        for oid, record in self._base.stored_by(tid):
            oids.append(oid)
            # An object that is a blob is one in all its revisions; its end has no record.
            if not record or self._records.read(record).is_blob:
                self._follow(self._base.before(oid, tid))
        undo = self._storage.undo
        self._blobs.call_in_vote(partial(undo, transaction_id, self._transaction))
        return oids

    def _follow(self, source: Source) -> None:
        """Have stored once more what becomes current again, where that is necessary."""
        oid = source.oid
        reading = self._records.read(source.record)
        if reading.is_blob and reading.stamp is None:
            store = partial(self._store, source, self._base.current_tid(oid))
            self._blobs.copy_by_record(oid, source.tid, store)
        elif reading.is_blob and (oid in self._undone or self._is_double(oid, source.tid)):
            store = partial(self._store, source, self._base.current_tid(oid))
            self._blobs.store_in_vote(oid, store)
        else:
            self._blobs.leave(oid)
        self._undone.add(oid)

    def _is_double(self, oid: bytes, tid: bytes) -> bool:
        if tid not in self._doubles:
            seen: set[bytes] = set()
            doubles = self._doubles[tid] = set()
            for each, _record in self._base.stored_by(tid):
                (doubles if each in seen else seen).add(each)
        return oid in self._doubles[tid]

    def _store(self, source: Source, serial: bytes, stamp: bytes | None = None) -> None:
        record = source.record
        assert record is not None
        if stamp is not None:
            record = self._records.with_reference(record, stamp)
        self._storage.store(source.oid, serial, record, "", self._transaction)
