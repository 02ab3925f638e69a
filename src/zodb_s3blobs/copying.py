"""Copies the transactions of another storage, with their tids and blobs."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from itertools import islice
import logging
import os
import shutil
from typing import Any

from ZODB.blob import is_blob_record
from ZODB.blob import NoBlobsFileSystemHelper
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import u64

from .directories import private


logger = logging.getLogger(__name__)

# Records of a transaction whose blobs are fetched at a time
RECORDS_AHEAD = 100


def copy_transactions(source: Any, target: Any, transform: Callable[[bytes], bytes]) -> None:
    """Copy all transactions; a blob that the source has lost is left out and logged.

    :param source: a storage, or whatever iterates as one.
    :param target: has restore and restoreBlob.
    :param transform: makes of a record what the target stores.
    """
    blobs = source if _has_blobs(source) else None
    count = without = 0
    iterator = source.iterator()
    try:
        for record in iterator:
            # Not the record itself: those of a MappingStorage cannot carry our data.
            extension = getattr(record, "extension_bytes", None) or record.extension
            transaction = TransactionMetaData(record.user, record.description, extension)
            target.tpc_begin(transaction, record.tid, record.status)
            try:
                for data_record in _prefetched(blobs, record):
                    without += not _copy_record(blobs, target, data_record, transaction, transform)
                target.tpc_vote(transaction)
            except BaseException:
                # Whatever it was, the target must not keep its lock.
                target.tpc_abort(transaction)
                raise
            target.tpc_finish(transaction)
            count += 1
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
    logger.info("copied transactions=%d", count)
    if without:
        reason = "missing" if blobs is not None else "the source has no place for blobs"
        logger.warning("copied without their blobs count=%d: %s", without, reason)


def _prefetched(blobs: Any, records: Iterable[Any]) -> Iterator[Any]:
    """Yield the records of a transaction; a source of our kind fetches their blobs ahead."""
    prefetch = getattr(blobs, "prefetch_blobs", None)
    rest = iter(records)
    while batch := list(islice(rest, RECORDS_AHEAD)):
        if prefetch is not None:
            prefetch((each.oid, each.tid) for each in batch if is_blob_record(each.data))
        yield from batch


def _has_blobs(storage: Any) -> bool:
    # ``zodbconvert --incremental`` passes a proxy that hides what it provides. A FileStorage has
    # the methods in any case.
    return IBlobStorage.providedBy(storage) or (
        hasattr(storage, "openCommittedBlobFile")
        and not isinstance(getattr(storage, "fshelper", None), NoBlobsFileSystemHelper)
    )


def _copy_record(
    blobs: Any, target: Any, record: Any, transaction: Any, transform: Callable[[bytes], bytes]
) -> bool:
    """Copy a record, with its blob where there is one; False when that is missing."""
    oid, tid, previous = record.oid, record.tid, record.data_txn
    data = transform(record.data) if record.data else record.data
    if not (record.data and is_blob_record(record.data)):
        target.restore(oid, tid, data, "", previous, transaction)
        return True
    copy = os.path.join(target.temporaryDirectory(), f"copy-{os.urandom(16).hex()}.tmp")
    try:
        if blobs is not None and _copy_file(blobs, oid, tid, copy):
            target.restoreBlob(oid, tid, data, copy, previous, transaction)
            return True
    finally:
        if os.path.exists(copy):
            os.remove(copy)
    target.restore(oid, tid, data, "", previous, transaction)
    return False


def _copy_file(blobs: Any, oid: bytes, tid: bytes, path: str) -> bool:
    try:
        with (
            blobs.openCommittedBlobFile(oid, tid) as source,
            open(path, "wb", opener=private) as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    except POSKeyError:
        logger.warning("copied without its blob oid=0x%x tid=0x%x", u64(oid), u64(tid))
        return False
    return True
