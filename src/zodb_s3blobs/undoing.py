"""Undo where only its end tells the tid of a transaction."""

from functools import partial
from typing import Any

from ZODB.POSException import UndoError

from .basecontract import LookBack
from .basecontract import Source
from .basecontract import tid_of
from .commit import TransactionBlobs
from .translation import Translator


class LateUndo:
    """The undos of one transaction.

    A reference travels with its record, so that the base's own undo does. But where a blob that is
    kept by tid becomes current again, its record must get a reference, to a copy of the bytes: then
    the records of the undone transaction are stored anew, each once, in the vote.

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
        self._undone: list[bytes] = []
        self._stores_anew = False
        # By oid, the tid of the revision that is current again, of what is stored anew.
        self._current: dict[bytes, bytes] = {}

    def undo(self, transaction_id: bytes) -> list[bytes]:
        """Undo a transaction and return the oids that it has stored.

        :raises UndoError: when blobs by tid come back, and what was stored has been changed since.
        """
        tid = tid_of(transaction_id)
        oids, blobs = [], []
        for oid, record in self._base.stored_by(tid):
            oids.append(oid)
            # An object that is a blob is one in all its revisions; its end has no record.
            if not record or self._records.read(record).is_blob:
                blobs.append(oid)
        self._undone.append(transaction_id)
        if self._stores_anew:
            self._store_all_anew(transaction_id)
        elif any(self._is_by_tid(self._base.before(oid, tid)) for oid in blobs):
            self._stores_anew = True
            for each in self._undone:
                self._blobs.recall(each)
                self._store_all_anew(each)
        else:
            undo = self._storage.undo
            self._blobs.defer(transaction_id, partial(undo, transaction_id, self._transaction))
        return oids

    def _store_all_anew(self, transaction_id: bytes) -> None:
        tid = tid_of(transaction_id)
        for oid in dict.fromkeys(oid for oid, _record in self._base.stored_by(tid)):
            self._store_anew(self._base.before(oid, tid), tid)

    def _is_by_tid(self, source: Source) -> bool:
        reading = self._records.read(source.record)
        return reading.is_blob and reading.stamp is None

    def _store_anew(self, source: Source, tid: bytes) -> None:
        oid = source.oid
        serial = self._base.current_tid(oid)
        if self._current.get(oid, serial) != tid:
            raise UndoError("blobs that are kept by tid would come back, and this was changed", oid)
        if self._is_by_tid(source):
            self._blobs.copy_by_record(oid, source.tid, partial(self._store_copy, source, serial))
        elif source.record:
            store = self._storage.store
            self._blobs.defer(
                oid, partial(store, oid, serial, source.record, "", self._transaction)
            )
        else:
            delete = getattr(self._storage, "deleteObject", None)
            if delete is None:
                raise UndoError("the storage cannot undo the creation of what comes with it", oid)
            self._blobs.defer(oid, partial(delete, oid, serial, self._transaction))
        self._current[oid] = source.tid

    def _store_copy(self, source: Source, serial: bytes, stamp: bytes) -> None:
        assert source.record is not None
        record = self._records.with_reference(source.record, stamp)
        self._storage.store(source.oid, serial, record, "", self._transaction)
