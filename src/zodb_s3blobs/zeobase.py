"""A ZEO client as base: other clients write, and the server's storage only answers questions."""

import asyncio
from collections.abc import Collection
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
import time
from typing import Any

from ZEO.Exceptions import ServerException
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageError
from ZODB.utils import maxtid
from ZODB.utils import p64

from .basecontract import innermost
from .basecontract import Read
from .basecontract import Survivors
from .basecontract import Wanted
from .buffer import BufferedStorage
from .historybase import ALL
from .historybase import HistoryBase


# Seconds. Answers come from an index, or from a file that is read from its end.
PATIENCE = 300.0
# Seconds between questions that meet the end of a pack
PAUSES = (0.01, 0.1, 0.5, 1.0, 2.0)
# At the same time. The server answers one after the other; more only hide the way there and back.
QUESTIONS = 8
# Objects whose revisions are held in memory at the same time.
OBJECTS = 200


class ZeoBase(HistoryBase):
    """A ClientStorage, perhaps inside wrappers that keep it as ``base``.

    Its threads take turns from tpc_begin on, so that is put off until the uploads are done.

    :param str directory: where large transactions spill to until then.
    :raises ClientDisconnected: when no server can be reached.
    :raises ValueError: when what the server has cannot be the base of ours.
    """

    shared = True

    def __init__(self, storage: Any, directory: str | None = None) -> None:
        self._client = innermost(storage)
        # With ``wait false`` it may not know yet what the server's storage can do.
        self._client._wait()
        super().__init__(BufferedStorage(storage, directory))
        names = {name for _module, name in self._client._info["interfaces"]}
        if "IBlobStorage" in names:
            raise ValueError(
                "the ZEO server has blobs of its own: remove the blob-dir, or the <s3blobstorage>,"
                " in its zeo.conf, and name the directory, where there is one, as a"
                " <blobdir-source> of each client. The section stands around the <zeoclient> of"
                " each client or on the server, not on both"
            )
        if "IMVCCStorage" in names:
            raise ValueError(
                "the ZEO server's storage has instances, as a RelStorage has, and does not tell"
                " which revisions survive its pack: connect to its database without ZEO"
            )
        # FileStorages do. A DemoStorage, which does not, would pass for what is below it.
        self.tells_garbage = self._client._info["supports_record_iternext"]
        # The last transaction that this client has been told of.
        self._seen = bytes(8)
        # The highest oid that had a record before a pack of ours may have removed it.
        self._highest_before = b""

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        # From the client's cache, as a rule; of the last transactions that may not know yet.
        data = super().record(oid, serial)
        if data is None:
            try:
                data = self.storage.loadSerial(oid, serial)
            except POSKeyError:
                pass
        return data

    def about_to_pack(self) -> None:
        self._highest_before = self.highest_oid()

    def last_transaction(self) -> bytes:
        # What this client has heard of, and then what the server says.
        self._seen = max(self._seen, self._client.lastTransaction())
        tid: bytes = self._ask("lastTransaction")
        if tid < self._seen:
            raise StorageError(
                f"the ZEO server's database ends at {tid.hex()}, before what this client has seen:"
                " it seems to be a copy that is behind"
            )
        self._seen = tid
        return tid

    def highest_oid(self) -> bytes:
        # Not new_oid: who asks must not change the answer.
        return max(self._highest_before, self._highest_stored())

    def _highest_stored(self) -> bytes:
        highest = 0
        for bit in reversed(range(64)):
            if self._has_record_from(highest | 1 << bit):
                highest |= 1 << bit
        return p64(highest)

    def _has_record_from(self, oid: int) -> bool:
        try:
            self._ask("record_iternext", p64(oid))
        except POSKeyError:
            pass  # there is one, whose creation was undone
        except ServerException as error:
            name, args = error.args
            while name == "ZEO.Exceptions.ServerException":  # the server is a client itself
                name, args = args
            if name != "builtins.ValueError":
                raise
            return False
        return True

    def survivors(self, wanted: Wanted, read: Read) -> Iterator[tuple[bytes, Survivors]]:
        # The iterator would tell, too, with one question for every record of the database.
        rest = iter(wanted.items())
        with ThreadPoolExecutor(QUESTIONS, "zodb-s3blobs-zeo") as pool:
            while some := list(islice(rest, OBJECTS)):
                answers = [pool.submit(self._survivors, *each, read) for each in some]
                for (oid, _names), answer in zip(some, answers, strict=True):
                    yield oid, answer.result()
        # A client that has lost its server may have turned to another one meanwhile.
        self.last_transaction()

    def _survivors(self, oid: bytes, names: Collection[bytes], read: Read) -> Survivors:
        survivors = super()._survivors(oid, names, read)
        if survivors.other_since is not None:
            # Not that it is another database's: clients keep oids in stock over a restart of the
            # server, which gives them out again.
            survivors = survivors._replace(other_since=maxtid)
        return survivors

    def _load_before(self, oid: bytes, tid: bytes) -> tuple[bytes, bytes] | None:
        # Not by the client's cache, which may not have heard of the last transactions.
        found = self._ask("loadBefore", oid, tid)
        if found is None:
            return None
        data, serial, _end = found
        return self._as_base_has_it(oid, serial, data), serial

    def _as_base_has_it(self, oid: bytes, tid: bytes, data: bytes) -> bytes:
        # What wrappers between us and the client make of it only their own methods tell.
        has_wrappers = self.storage.base is not self._client
        record: bytes = self.storage.loadSerial(oid, tid) if has_wrappers else data
        return record

    def _history(self, oid: bytes, size: int = ALL) -> list[dict[str, Any]]:
        try:
            history: list[dict[str, Any]] = self._ask("history", oid, size)
        except POSKeyError:
            return []
        return history

    def stored_by(self, tid: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        iterator = self._start_iterator(tid)
        while self._ask("iterator_next", iterator) is not None:
            records = self._ask("iterator_record_start", iterator, tid)
            while (record := self._ask("iterator_record_next", records)) is not None:
                oid, _tid, data, _back = record
                yield oid, data and self._as_base_has_it(oid, tid, data)

    def _start_iterator(self, tid: bytes) -> Any:
        for pause in PAUSES:
            try:
                return self._ask("iterator_start", tid, tid)
            except ServerException as error:
                # At the end of a pack a FileStorage is without its file for a moment.
                if "FileNotFoundError" not in str(error):
                    raise
                time.sleep(pause)
        return self._ask("iterator_start", tid, tid)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Ask the server; a client drops answers that it refuses to unpickle, and waits for ever.

        Such as a history whose transactions carry other things than text and numbers.
        """
        answer = self._client._server.call(method, *arguments, wait=False)
        try:
            return answer.result(PATIENCE)
        except asyncio.TimeoutError as error:
            raise StorageError(
                f"ZEO {method}{arguments!r}: no answer within {PATIENCE:.0f} s; a client drops what"
                " it does not unpickle, see its log"
            ) from error
