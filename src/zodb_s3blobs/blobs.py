"""What code that has a ``ZODB.blob.Blob`` can ask of it without having its bytes downloaded.

All of it works with every storage: where that is not ours, the file is there or comes with the
first question, and `presigned_url` returns None.

Source: the states of a Blob are those that ``ZODB.blob.Blob.open`` tells apart.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
import io
from itertools import chain
from itertools import groupby
from itertools import islice
import os
from typing import Any
from typing import TypeVar

from ZODB.blob import Blob
from ZODB.blob import SAVEPOINT_SUFFIX
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IMVCCStorage
from ZODB.interfaces import IStorageWrapper
from ZODB.POSException import POSKeyError

from .interfaces import IS3BlobStorage
from .prefetching import PrefetchReport
from .sections import checked_range
from .sections import FileSection


__all__ = ["is_cached", "open_range", "prefetch", "presigned_url", "size", "verify"]

T = TypeVar("T")

# Blobs whose records are loaded together
RECORDS = 1000


def size(blob: Blob) -> int:
    """Return the size of a blob in bytes, of its uncommitted bytes where it has some.

    :raises POSKeyError: when the blob is nowhere.
    :raises S3OperationError: when that cannot be told.
    """
    if _is_local(blob):
        path = _local_path(blob)
        return 0 if path is None else os.path.getsize(path)
    storage, oid, serial = _whereabouts(blob)
    if IS3BlobStorage.providedBy(storage):
        byte_count: int = storage.blob_size(oid, serial)
        return byte_count
    with storage.openCommittedBlobFile(oid, serial) as file:
        return os.fstat(file.fileno()).st_size


def is_cached(blob: Blob) -> bool:
    """Tell whether the bytes are on this host, so that S3 is not asked for them."""
    if _is_local(blob):
        return True
    storage, oid, serial = _whereabouts(blob)
    return not IS3BlobStorage.providedBy(storage) or storage.blob_is_cached(oid, serial)


def open_range(blob: Blob, start: int = 0, stop: int | None = None) -> io.BufferedReader:
    """Open the bytes from start to below stop, or to the end, for reading.

    Only these are transferred, as they are read; they do not go through the cache, and are
    verified by their number and not by their digest. The file is for one thread, and can be used
    after the connection of the blob was closed.

    :param int start: in bytes, from 0; what is behind the end is left out.
    :returns: a buffered binary file, whose positions begin with 0 at start.
    :raises ValueError: when start or stop is negative.
    :raises POSKeyError: when the blob is nowhere.
    :raises S3OperationError: when that cannot be told, and when it is read and S3 fails.
    """
    start, stop = checked_range(start, stop)
    if _is_local(blob):
        path = _local_path(blob) or os.devnull
        return FileSection(open(path, "rb", buffering=0), start, stop).buffered()
    storage, oid, serial = _whereabouts(blob)
    if IS3BlobStorage.providedBy(storage):
        file: io.BufferedReader = storage.open_blob_range(oid, serial, start, stop)
        return file
    return FileSection(storage.openCommittedBlobFile(oid, serial), start, stop).buffered()


def prefetch(blobs: Iterable[Any], storage: Any = None) -> PrefetchReport:
    """Bring blobs into the cache, many at a time, and return when that is done.

    It is help for what comes next, and raises nothing when S3 fails: who opens a blob then learns
    why. It ends when as many bytes came as the cache may hold.

    :param blobs: any iterable of Blobs; with a storage of pairs of oid and serial, 8 bytes each.
    :param storage: such as the ``storage`` of a ``ZODB.DB``.
    :returns: a `PrefetchReport` with counts; what is not committed, or in another kind of storage,
        is not counted.
    :raises TypeError: for what is no Blob.
    """
    total = PrefetchReport()
    with _own_view(storage) as view:
        kept = _committed(blobs) if view is None else _each_in(view, blobs)
        for keeper, group in groupby(chain.from_iterable(kept), key=lambda item: item[0]):
            if IS3BlobStorage.providedBy(keeper):
                total.add(keeper.prefetch_blobs(pair for _keeper, pair in group))
    return total


def presigned_url(
    blob: Blob,
    expires_in: int = 60,
    content_type: str | None = None,
    filename: str | None = None,
    disposition: str = "inline",
) -> str | None:
    """Return a URL by which a browser can GET a blob from S3 itself.

    :returns: None where S3 cannot deliver it, such as a blob that is not committed.

    More about it stands in ``IS3BlobStorage.presigned_url``.
    """
    if _is_local(blob):
        return None
    storage, oid, serial = _whereabouts(blob)
    if not IS3BlobStorage.providedBy(storage):
        return None
    url: str | None = storage.presigned_url(
        oid, serial, expires_in, content_type, filename, disposition
    )
    return url


def verify(blob: Blob) -> bool:
    """Compare the bytes on this host with what was stored, and replace them when they differ.

    :returns: False when a cached file had to be replaced.
    :raises POSKeyError: when the blob is nowhere.
    :raises S3OperationError: when S3 cannot tell, or has other bytes itself.
    """
    if _is_local(blob):
        return True
    storage, oid, serial = _whereabouts(blob)
    return not IS3BlobStorage.providedBy(storage) or storage.verify_blob(oid, serial)


def _is_local(blob: Blob) -> bool:
    """Tell whether the bytes are a file of the transaction, or there are none yet."""
    _require_blob(blob)
    blob._p_activate()  # the _p_blob_ attributes do not load a ghost
    committed = blob._p_blob_committed
    return bool(blob._p_blob_uncommitted or not committed or committed.endswith(SAVEPOINT_SUFFIX))


def _require_blob(blob: Any) -> None:
    if not isinstance(blob, Blob):
        raise TypeError(
            f"a ZODB.blob.Blob is needed, not a {type(blob).__name__} (plone.namedfile's files have"
            " one as their _blob; pairs of oid and serial need a storage)"
        )


def _local_path(blob: Blob) -> str | None:
    path: str | None = blob._p_blob_uncommitted or blob._p_blob_committed
    return path


def _whereabouts(blob: Blob) -> tuple[Any, bytes, bytes]:
    oid, serial = blob._p_oid, blob._p_serial
    return _keeper(blob._p_jar._storage, oid, serial), oid, serial


def _keeper(storage: Any, oid: bytes, serial: bytes) -> Any:
    """Return the storage that has a revision: one of ours, if it can be reached from here."""
    while not IS3BlobStorage.providedBy(storage):
        if isinstance(storage, DemoStorage):
            try:
                storage.changes.loadSerial(oid, serial)
            except POSKeyError:
                storage = storage.base
            else:
                storage = storage.changes
        elif IStorageWrapper.providedBy(storage) and hasattr(storage, "base"):
            storage = storage.base
        elif hasattr(behind := getattr(storage, "_storage", None), "loadBlob"):
            storage = behind  # ZODB's own, between a storage and a Connection
        else:
            break
    return storage


@contextmanager
def _own_view(storage: Any) -> Iterator[Any]:
    """Give a storage; of an IMVCCStorage an instance, as one belongs to one thread."""
    if not IMVCCStorage.providedBy(storage):
        yield storage
        return
    instance = storage.new_instance()
    try:
        instance.poll_invalidations()
        yield instance
    finally:
        instance.release()


# A storage, and oid and serial of a revision that it has
_Kept = tuple[Any, tuple[bytes, bytes]]


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, RECORDS)):
        yield batch


def _each_in(storage: Any, pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[list[_Kept]]:
    for batch in _batches(pairs):
        yield _by_storage([(_keeper(storage, *pair), pair) for pair in batch])


def _committed(blobs: Iterable[Blob]) -> Iterator[list[_Kept]]:
    """Yield the storages and revisions of those of the blobs that are committed."""
    for batch in _batches(blobs):
        for blob in batch:
            _require_blob(blob)
        # The jar of a new one is None.
        for jar, group in groupby(batch, key=lambda blob: blob._p_jar):
            # After a savepoint its storage has no prefetch, and ZODB would never try again.
            if jar is not None and hasattr(jar._storage, "prefetch"):
                jar.prefetch([blob for blob in group if blob._p_changed is None])
        found = (_whereabouts(blob) for blob in batch if not _is_local(blob))
        yield _by_storage([(storage, (oid, serial)) for storage, oid, serial in found])


def _by_storage(kept: list[_Kept]) -> list[_Kept]:
    """Bring those of one storage together, in the order in which they came."""
    return sorted(kept, key=lambda item: id(item[0]))
