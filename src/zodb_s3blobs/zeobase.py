"""A ZEO client as base: other clients write, and the server's storage only answers questions."""

from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from ZEO.Exceptions import ServerException
from ZODB.POSException import POSKeyError
from ZODB.utils import maxtid
from ZODB.utils import p64

from .basecontract import innermost
from .basecontract import Read
from .basecontract import Revisions
from .basecontract import Survivors
from .basecontract import survivors_among
from .basecontract import Wanted
from .buffer import BufferedStorage
from .historybase import HistoryBase


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
                " in its zeo.conf. The section stands around the <zeoclient> of each client or on"
                " the server, not on both"
            )
        if "IMVCCStorage" in names:
            raise ValueError(
                "the ZEO server's storage has instances, as a RelStorage has, and does not tell"
                " which revisions survive its pack: connect to its database without ZEO"
            )
        # FileStorages do. A DemoStorage, which does not, would pass for what is below it.
        self.tells_garbage = self._client._info["supports_record_iternext"]
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
        # Not the client's method, which tells what it has heard of.
        tid: bytes = self._client._call("lastTransaction")
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
            self._client.record_iternext(p64(oid))
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
        for oid, revisions in self.revisions(wanted):
            survivors = survivors_among(revisions, wanted[oid], read)
            if survivors.other_since is not None:
                # Not that it is another database's: clients keep oids in stock over a restart of
                # the server, which gives them out again.
                survivors = survivors._replace(other_since=maxtid)
            yield oid, survivors

    def revisions(self, oids: Iterable[bytes]) -> Iterator[tuple[bytes, Revisions]]:
        # The iterator would tell, too, with one question for every record of the database.
        rest = iter(oids)
        with ThreadPoolExecutor(QUESTIONS, "zodb-s3blobs-zeo") as pool:
            while some := list(islice(rest, OBJECTS)):
                yield from zip(some, pool.map(self._revisions, some), strict=True)
