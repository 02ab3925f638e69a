"""What differs between base storages: when a tid is known, which revisions survive."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

from ZODB.FileStorage.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IStorageWrapper
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64


# More revisions than any object has.
_ALL = 10**6


class Survivors(NamedTuple):
    """What a base says about one oid."""

    #: those of the tids asked about that are revisions of a blob
    tids: set[bytes]
    #: the oldest revision, where the oid belongs to an object that is no blob
    other_since: bytes | None


class TidBase:
    """A base that reveals the tid of a transaction as soon as it has begun.

    :param base: a FileStorage or MappingStorage, perhaps inside wrappers that
        keep what they wrap as ``base``, as zc.zlibstorage does.
    :raises ValueError: for any other storage, or one with blobs of its own.
    """

    def __init__(self, base: Any) -> None:
        if IBlobStorage.providedBy(base):
            raise ValueError(
                f"{base!r} has a blob directory of its own, where undo would look for files that"
                " are in S3. Use a FileStorage or a MappingStorage without blob-dir, and name the"
                " directory, where there is one, as a <blobdir-source>"
            )
        self._base = base
        innermost = base
        # A DemoStorage has a base, too; only a wrapper of records passes transactions through.
        while IStorageWrapper.providedBy(innermost) and hasattr(innermost, "base"):
            innermost = innermost.base
        if not isinstance(innermost, (FileStorage, MappingStorage)):
            raise ValueError(
                f"{base!r} cannot be wrapped: its transactions do not tell their tid in time."
                " Use a FileStorage or a MappingStorage"
            )
        self._innermost = innermost

    def tid(self) -> bytes:
        """Return the tid of the transaction that has begun."""
        tid: bytes = self._innermost._tid
        return tid

    def highest_oid(self) -> bytes:
        """Return an oid that is at least as high as any this base has stored."""
        if isinstance(self._innermost, MappingStorage):
            return max([p64(self._innermost._oid), *self._innermost._data])
        highest: bytes = self._innermost._oid
        return highest

    def survivors(
        self, oid: bytes, tids: set[bytes], is_blob_record: Callable[[bytes], bool]
    ) -> Survivors:
        """Ask the base which revisions of an object still need their blobs."""
        try:
            history = self._base.history(oid, size=_ALL)
        except POSKeyError:
            return Survivors(set(), None)
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
                if not is_blob_record(data):
                    return Survivors(alive, min(entry["tid"] for entry in history))
                seen_data = True
            if tid in tids:
                alive.add(tid)
        return Survivors(alive, None)
