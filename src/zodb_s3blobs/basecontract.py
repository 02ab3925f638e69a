"""What the jobs ask of a base storage, whatever kind it is."""

from base64 import decodebytes
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from typing import NamedTuple
from typing import Protocol

from ZODB.interfaces import IStorageWrapper


class Identity(NamedTuple):
    """What tells a database from its copies."""

    id: str
    #: what people call it
    name: str


class Reading(NamedTuple):
    """What a record says."""

    is_blob: bool
    #: its reference
    stamp: bytes | None


# Bytes; a blob's record has some sixty, and a few more where wrappers change it.
LARGEST_BLOB_RECORD = 4096

Read = Callable[[bytes], Reading]
#: names of keys by oid, see `keys.blob_key`
Wanted = Mapping[bytes, Collection[bytes]]
#: records of all revisions of an object by tid, None for an undone creation
Revisions = dict[bytes, bytes | None]


class Source(NamedTuple):
    """What an undo makes current again; it may leave out what cannot be a blob."""

    oid: bytes
    #: the revision before the undone transaction
    tid: bytes
    #: its record; None where there was no object
    record: bytes | None


class Undone(NamedTuple):
    """What an undo has done."""

    #: what the base returns
    result: Any
    #: tid of the revisions it has written
    tid: bytes
    sources: Iterable[Source]


class Record(NamedTuple):
    """A revision and its record."""

    oid: bytes
    tid: bytes
    data: bytes


class Survivors(NamedTuple):
    """What a base says about one oid."""

    #: those of the tids asked about that are revisions of a blob
    tids: set[bytes]
    #: what the records of its revisions refer to, where stamps were asked about
    stamps: set[bytes]
    #: tid of the current revision, where stamps were asked about
    current: bytes | None = None
    #: the oldest revision, where the oid belongs to an object that is no blob
    other_since: bytes | None = None


class Snapshot(Protocol):
    """One view of a base, no older than the moment it was taken."""

    def last_transaction(self) -> bytes:
        """Return a tid that all transactions of this view are at or below."""

    def highest_oid(self) -> bytes:
        """Return an oid at least as high as any that was given out before the view was taken."""

    def survivors(self, wanted: Wanted, read: Read) -> Iterator[tuple[bytes, Survivors]]:
        """Tell for each oid which revisions still need their blobs."""

    def revisions(self, oids: Iterable[bytes]) -> Iterator[tuple[bytes, Revisions]]:
        """Yield each oid with its revisions."""

    def records(self, after: bytes = b"") -> Iterator[tuple[bytes, list[Record]]]:
        """Yield the records of all revisions that may be blobs', some at a time.

        Of a revision that comes twice the second record counts. It may be one that no question
        after it finds: `revisions` tells.

        :param bytes after: the position that came with an earlier batch, to go on behind it.
        :returns: batches, each with the position behind it.
        """


class LookBack(Protocol):
    """What an undo asks of a base whose transactions learn their tid in the end."""

    def stored_by(self, tid: bytes) -> Iterator[tuple[bytes, bytes | None]]:
        """Yield oid and record of what a transaction has stored."""

    def before(self, oid: bytes, tid: bytes) -> Source:
        """Tell what was current before a transaction."""

    def current_tid(self, oid: bytes) -> bytes:
        """Return the tid of the current revision, which may be the end of the object.

        :returns: nothing, when the object is gone without a trace.
        """


class Base(Protocol):
    """A base storage, or one instance of it."""

    #: what the proxy passes through
    storage: Any

    #: whether a transaction knows its tid as soon as it has begun
    tells_tid: bool

    #: whether others cannot commit from the moment a transaction has begun
    locks_at_begin: bool

    #: whether revisions stay that are no longer current, until a pack
    keeps_history: bool

    #: whether a transaction can be told its tid while others commit
    takes_tid: bool

    #: whether other processes commit, too
    shared: bool

    #: whether it knows all that needs the blobs in its place
    tells_garbage: bool

    #: where the blobs are of revisions that others have stored
    sources: Sequence[Any]

    #: whether an undo that has not ended may bring back what a snapshot no longer shows
    hides_undo: bool

    def of(self, instance: Any) -> "Base":
        """Return the same for another instance of the storage."""

    def database(self) -> str:
        """Return a name of the database, the same whenever it is opened in this process."""

    def identity(self) -> Identity | None:
        """Return what tells the database from its copies, None where that is not known."""

    def tid(self) -> bytes | None:
        """Return the tid of the transaction that has begun; None where only the end tells."""

    def record(self, oid: bytes, serial: bytes) -> bytes | None:
        """Return the record of a revision, None when it is gone.

        :raises POSKeyError: when nobody can want its blob any more.
        """

    @property
    def look_back(self) -> LookBack | None:
        """Given where only its end tells the tid of a transaction that undoes something."""

    def undo(self, transaction_id: bytes, transaction: Any) -> Undone:
        """Undo a transaction, where the tid is known then."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Take a view of the base."""

    def writer(self) -> AbstractContextManager[Any]:
        """Give an instance of the storage, for a transaction of our own."""

    def settle(self) -> None:
        """Wait until what is being undone shows in a new snapshot."""

    def give_up(self, instance: Any, transaction: Any) -> None:
        """Abort a transaction of a writer that was told its tid."""

    def hold_commits(self, instance: Any) -> None:
        """Keep others from committing until the transaction of a writer, which has voted, ends."""

    def running(self) -> Any:
        """Return the transaction that has begun, or None."""

    def about_to_pack(self) -> None:
        """Take note that the storage is packed next."""

    def copied(self) -> None:
        """Take note that all transactions of another storage have been stored."""


def tid_of(transaction_id: bytes) -> bytes:
    """Return the tid that an undo id stands for."""
    return decodebytes(transaction_id + b"\n")


def is_read_only(storage: Any) -> bool:
    """Tell whether a storage refuses writers."""
    # A ZEO client also says so while it has no connection, which it may have again at any moment.
    is_connected = getattr(storage, "is_connected", None)
    return bool(storage.isReadOnly() and (is_connected is None or is_connected()))


def innermost(storage: Any) -> Any:
    # A DemoStorage has a base, too; only a wrapper of records passes transactions through.
    while IStorageWrapper.providedBy(storage) and hasattr(storage, "base"):
        storage = storage.base
    return storage


def survivors_among(revisions: Revisions, names: Collection[bytes], read: Read) -> Survivors:
    alive: set[bytes] = set()
    stamps: set[bytes] = set()
    other_since = None
    for tid, data in revisions.items():
        if not data:
            continue
        reading = read(data)
        if not reading.is_blob:
            other_since = min(revisions)
            break
        if tid in names:
            alive.add(tid)
        if reading.stamp:
            stamps.add(reading.stamp)
    return Survivors(alive, stamps, max(revisions, default=None), other_since)
