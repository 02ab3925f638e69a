"""Stores held back until the uploads are done."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import suppress
import pickle
import tempfile
from typing import Any
from typing import IO

from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from zope.interface import directlyProvides
from zope.interface import providedBy

from .basecontract import is_read_only


# Bytes of records that a transaction keeps in memory; a store's other parts count as OVERHEAD.
MEMORY = 4 << 20
OVERHEAD = 200

# The name of the storage's method and its arguments, but for the transaction
_Call = tuple[str, tuple[Any, ...]]


class _Calls:
    """What a transaction has asked for, in this order; on disk where it is much."""

    def __init__(self, directory: str | None) -> None:
        self._directory = directory
        self._recent: list[_Call] = []
        self._size = 0
        self._file: IO[bytes] | None = None
        self._chunks = 0
        self._is_whole = True

    def append(self, name: str, *arguments: Any, size: int = 0) -> None:
        self._check()
        self._recent.append((name, arguments))
        self._size += size + OVERHEAD
        if self._size > MEMORY:
            self._is_whole = False  # until all is written
            if self._file is None:
                # Without a name, so that nothing stays of a process that is killed.
                self._file = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115  see close
            pickle.dump(self._recent, self._file, pickle.HIGHEST_PROTOCOL)
            self._chunks += 1
            self._recent, self._size = [], 0
            self._is_whole = True

    def _check(self) -> None:
        if not self._is_whole:
            raise StorageTransactionError("the stores could not be kept: abort the transaction")

    def __iter__(self) -> Iterator[_Call]:
        self._check()
        if self._file is not None:
            self._file.seek(0)
            for _chunk in range(self._chunks):
                yield from pickle.load(self._file)
        yield from self._recent

    def close(self) -> None:
        if self._file is not None:
            # Where the disk is full, what is left in memory is written again, and fails again.
            with suppress(OSError):
                self._file.close()


class _Buffered:
    """What a transaction has asked for, and how much of it the base knows."""

    def __init__(self, calls: _Calls, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        self.calls = calls
        #: of tpc_begin
        self.args = args
        self.kw = kw
        #: the base was told to begin
        self.begun = False
        #: and has done what was asked for; from here on it is asked directly
        self.replayed = False


class BufferedStorage:
    """Passes a storage through whose transactions begin in their vote, as a ZEO client's do.

    So the base's lock is not held while others, here uploads, are waited for. Conflicts, and what
    cannot be undone, are reported by ``tpc_vote``. Only a restore, and a transaction that is told
    its tid, begin at once.

    Its own names are mangled: those of a base stay reachable.

    :param base: no IMVCCStorage, one storage for all threads.
    :param str directory: where large transactions spill to; by default the system's.
    """

    def __init__(self, base: Any, directory: str | None = None) -> None:
        self.base = base
        self.__directory = directory
        directlyProvides(self, providedBy(base))

    # The methods that only some bases have; ours are offered in their place
    __OPTIONAL = {
        "deleteObject": "_BufferedStorage__delete_object",
        "restore": "_BufferedStorage__restore",
        "undo": "_BufferedStorage__undo",
    }

    def __getattr__(self, name: str) -> Any:
        if name == "base":
            raise AttributeError(name)  # not constructed yet
        theirs = getattr(self.base, name)
        own = self.__OPTIONAL.get(name)
        return getattr(self, own) if own else theirs

    @property
    def tryToResolveConflict(self) -> Any:
        """The base's; a ZEO server replaces it."""
        return self.base.tryToResolveConflict

    @tryToResolveConflict.setter
    def tryToResolveConflict(self, resolve: Any) -> None:
        self.base.tryToResolveConflict = resolve

    def __len__(self) -> int:
        return len(self.base)

    def __repr__(self) -> str:
        return repr(self.base)

    def tpc_begin(self, transaction: Any, *args: Any, **kw: Any) -> None:
        """Begin a transaction; the base hears of it later, unless it is told a tid."""
        if is_read_only(self.base):
            raise ReadOnlyError()
        if self.__find(transaction) is not None:
            raise StorageTransactionError("Duplicate tpc_begin calls for same transaction")
        transaction.set_data(self, _Buffered(_Calls(self.__directory), args, kw))
        if (args[0] if args else kw.get("tid")) is not None:
            self.__replay(transaction)

    def __find(self, transaction: Any) -> _Buffered | None:
        try:
            buffered: _Buffered | None = transaction.data(self)
        except (AttributeError, KeyError):
            return None
        return buffered

    def __get(self, transaction: Any) -> _Buffered:
        buffered = self.__find(transaction)
        if buffered is None:
            if is_read_only(self.base):
                raise ReadOnlyError()
            raise StorageTransactionError(self, transaction)
        return buffered

    def __replay(self, transaction: Any) -> None:
        """Begin on the base, unless it has begun, and do there what was asked for until now."""
        buffered = self.__get(transaction)
        if buffered.replayed:
            return
        if buffered.begun:
            raise StorageTransactionError("a part could not be stored: abort the transaction")
        # Before it is true: a base that raises here may keep its lock until it is told to abort.
        buffered.begun = True
        self.base.tpc_begin(transaction, *buffered.args, **buffered.kw)
        for name, arguments in buffered.calls:
            getattr(self.base, name)(*arguments, transaction)
        buffered.calls.close()
        buffered.replayed = True

    def __call(self, transaction: Any, name: str, *arguments: Any, size: int = 0) -> Any:
        buffered = self.__get(transaction)
        if not buffered.begun:
            return buffered.calls.append(name, *arguments, size=size)
        self.__replay(transaction)
        return getattr(self.base, name)(*arguments, transaction)

    def store(self, oid: bytes, serial: Any, data: bytes, version: str, transaction: Any) -> Any:
        """Keep a record for the vote."""
        assert not version, "Versions aren't supported."
        return self.__call(transaction, "store", oid, serial, data, "", size=len(data))

    def checkCurrentSerialInTransaction(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        """Have the vote check that a revision that was read is still the current one."""
        self.__call(transaction, "checkCurrentSerialInTransaction", oid, serial)

    def __delete_object(self, oid: bytes, serial: bytes, transaction: Any) -> None:
        """Have the vote delete an object, as an external garbage collection does."""
        self.__call(transaction, "deleteObject", oid, serial)

    def __restore(
        self, oid: bytes, serial: bytes, data: Any, version: str, prev_txn: Any, transaction: Any
    ) -> Any:
        """Restore a record on the base."""
        self.__replay(transaction)
        return self.base.restore(oid, serial, data, version, prev_txn, transaction)

    def __undo(self, transaction_id: bytes, transaction: Any) -> Any:
        """Have the vote undo a transaction.

        Not at once: in a transaction over several databases each takes its lock in its vote,
        which come in the order of their sort keys.
        """
        return self.__call(transaction, "undo", transaction_id)

    def tpc_vote(self, transaction: Any) -> Any:
        """Begin and store on the base, then vote on it.

        :raises ConflictError: when another transaction was faster.
        """
        self.__replay(transaction)
        return self.base.tpc_vote(transaction)

    def tpc_finish(self, transaction: Any, f: Callable[[bytes], Any] = lambda tid: None) -> Any:
        """Finish the base."""
        if not self.__get(transaction).replayed:
            raise StorageTransactionError("tpc_finish without a vote that has stored all")
        result = self.base.tpc_finish(transaction, f)
        transaction.set_data(self, None)
        return result

    def tpc_abort(self, transaction: Any) -> None:
        """Abort the base, where it has begun."""
        buffered = self.__find(transaction)
        if buffered is None:
            return  # not begun here
        transaction.set_data(self, None)
        buffered.calls.close()
        if buffered.begun:
            self.base.tpc_abort(transaction)
