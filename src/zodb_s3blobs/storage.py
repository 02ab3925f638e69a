"""A storage whose records live in a base storage and whose blobs live in S3."""

from base64 import decodebytes
from collections.abc import Callable
from collections.abc import Sequence
import logging
import os
import shutil
from typing import Any

from ZODB.blob import BlobFile
from ZODB.blob import is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IBlobStorageRestoreable
from ZODB.interfaces import IStorageRestoreable
from ZODB.POSException import POSKeyError
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageTransactionError
from ZODB.utils import u64
from ZODB.utils import z64
from zope.interface import directlyProvides
from zope.interface import implementer
from zope.interface import providedBy

from . import blobpatch
from .bases import TidBase
from .commit import BlobServices
from .commit import remove_quietly
from .commit import TransactionBlobs
from .garbage import Sweeper
from .garbage import SweepReport
from .interfaces import EVICTION_ATTEMPTS
from .interfaces import IS3BlobStorage
from .loading import BlobLoader
from .openkeys import OpenKeys
from .uploads import UploadPool


logger = logging.getLogger(__name__)


class FileNames:
    """What ZODB's own tools ask a blob storage's ``fshelper`` for."""

    def __init__(self, cache: Any, temp_dir: str) -> None:
        self.temp_dir = temp_dir
        self.getBlobFilename = cache.path


@implementer(IS3BlobStorage)
class S3BlobStorage:
    """Passes a base storage through and keeps the blobs in a bucket.

    :param base_storage: a FileStorage or MappingStorage without blobs of its own.
    :param IS3Client s3_client: where the blobs are.
    :param IS3BlobCache cache: where they are on this host.
    :param str temp_dir: for uncommitted files; by default the cache's, and best on its file system.
    :param sources: further places to read blobs from, asked after S3 in this order.
    :param UploadPool pool: by default one of 32 threads.
    :raises ValueError: when the base storage cannot be wrapped.
    """

    def __init__(
        self,
        base_storage: Any,
        s3_client: Any,
        cache: Any,
        temp_dir: str | None = None,
        *,
        sources: Sequence[Any] = (),
        pool: UploadPool | None = None,
    ) -> None:
        tid_base = TidBase(base_storage)
        blobpatch.install()
        temp_dir = os.path.abspath(temp_dir or cache.temp_dir)
        os.makedirs(temp_dir, mode=0o700, exist_ok=True)
        self.__base = base_storage
        self.__tid_base = tid_base
        self.__client = s3_client
        self.__cache = cache
        self.__sources = sources
        self.__pool = pool or UploadPool()
        self.__loader = BlobLoader(cache, s3_client, sources)
        open_keys = OpenKeys()
        self.__services = BlobServices(
            s3_client, cache, self.__loader, self.__pool, open_keys, temp_dir
        )
        self.__sweeper = Sweeper(
            base_storage, tid_base, s3_client, cache, open_keys, self.is_blob_record
        )
        self.__untransform: Callable[[bytes], bytes] = bytes
        self.fshelper = FileNames(cache, temp_dir)
        #: until close()
        self.is_open = True
        restoreable = IStorageRestoreable.providedBy(base_storage)
        directlyProvides(
            self,
            IBlobStorageRestoreable if restoreable else IBlobStorage,
            providedBy(base_storage),
        )

    # The methods that only some bases have; ours are offered in their place
    __OPTIONAL = {
        "copyTransactionsFrom": "_S3BlobStorage__copy_transactions_from",
        "restoreBlob": "_S3BlobStorage__restore_blob",
        "undo": "_S3BlobStorage__undo",
    }

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_S3BlobStorage__"):
            raise AttributeError(name)  # not constructed yet
        own = self.__OPTIONAL.get(name)
        if own is None:
            return getattr(self.__base, name)
        getattr(self.__base, "restore" if name == "restoreBlob" else name)
        return getattr(self, own)

    @property
    def tryToResolveConflict(self) -> Any:
        """The base's; a ZEO server replaces it."""
        return self.__base.tryToResolveConflict

    @tryToResolveConflict.setter
    def tryToResolveConflict(self, resolve: Any) -> None:
        self.__base.tryToResolveConflict = resolve

    def __len__(self) -> int:
        return len(self.__base)

    def __repr__(self) -> str:
        return f"<S3BlobStorage {self.__client!r} around {self.__base!r}>"

    def close(self) -> None:
        """Close the base and what was opened for the blobs; closing again changes nothing."""
        self.is_open = False
        try:
            self.__base.close()
        finally:
            self.__pool.close()
            for closeable in (*self.__sources, self.__cache, self.__client):
                closeable.close()

    def registerDB(self, db: Any) -> None:
        """Learn from whoever wraps us how to read records."""
        self.__untransform = db.untransform_record_data
        self.__base.registerDB(db)

    def is_blob_record(self, record: bytes) -> bool:
        """Tell whether a record of the base is a blob's."""
        return bool(record and is_blob_record(self.__untransform(record)))

    # Two-phase commit

    def tpc_begin(self, transaction: Any, *args: Any, **kw: Any) -> None:
        """Begin on the base; the transaction's blobs are kept on the transaction."""
        self.__base.tpc_begin(transaction, *args, **kw)
        try:
            given = args[0] if args else kw.get("tid")
            blobs = TransactionBlobs(self.__services, self.__tid_base.tid(), given is None)
            transaction.set_data(self, blobs)
        except BaseException:
            self.__base.tpc_abort(transaction)
            raise

    def __blobs(self, transaction: Any) -> TransactionBlobs:
        try:
            blobs: TransactionBlobs | None = transaction.data(self)
        except (AttributeError, KeyError):
            blobs = None
        if blobs is None:
            if self.__base.isReadOnly():
                raise ReadOnlyError()
            raise StorageTransactionError(self, transaction)
        return blobs

    def storeBlob(
        self, oid: bytes, oldserial: Any, data: bytes, blobfilename: str, version: str,
        transaction: Any,
    ) -> Any:  # fmt: skip
        """Take over a file, store its record in the base and start the upload."""
        assert not version, "Versions aren't supported."
        blobs = self.__blobs(transaction)
        path = blobs.take_over(blobfilename)
        try:
            result = self.__base.store(oid, oldserial, data, "", transaction)
        except BaseException:
            remove_quietly(path)  # a conflict has no use for it
            raise
        with blobs.following():
            blobs.stage(oid, blobs.tid, path, is_new=oldserial in (None, z64))
        return result

    def __restore_blob(
        self, oid: bytes, serial: bytes, data: bytes, blobfilename: str, prev_txn: Any,
        transaction: Any,
    ) -> Any:  # fmt: skip
        """Restore a record as it is, and its blob under the revision's own tid."""
        blobs = self.__blobs(transaction)
        path = blobs.take_over(blobfilename)
        try:
            result = self.__base.restore(oid, serial, data, "", prev_txn, transaction)
        except BaseException:
            remove_quietly(path)
            raise
        with blobs.following():
            blobs.stage(oid, serial, path, is_restored=True)
        return result

    def __undo(self, transaction_id: bytes, transaction: Any) -> Any:
        """Undo on the base, then give each affected blob the bytes that become current again."""
        blobs = self.__blobs(transaction)
        result = self.__base.undo(transaction_id, transaction)
        undone = decodebytes(transaction_id + b"\n")
        with blobs.following():
            for oid in result[1]:
                self.__undo_blob(blobs, oid, undone)
        return result

    def __undo_blob(self, blobs: TransactionBlobs, oid: bytes, undone: bytes) -> None:
        try:
            before = self.__base.loadBefore(oid, undone)
        except POSKeyError:
            before = None  # the undone transaction brought the object into being again
        if before is not None and self.is_blob_record(before[0]):
            blobs.copy(oid, before[1])
        else:
            blobs.drop(oid, blobs.tid)

    def tpc_vote(self, transaction: Any) -> Any:
        """Wait for all uploads, then vote on the base.

        :raises S3OperationError: when a blob is not in the bucket; the
            transaction can be aborted, and retried if it is a TransientError.
        """
        self.__blobs(transaction).vote()
        return self.__base.tpc_vote(transaction)

    def tpc_finish(self, transaction: Any, f: Callable[[bytes], Any] = lambda tid: None) -> Any:
        """Finish the base, then move the blobs into the cache."""
        blobs = self.__blobs(transaction)
        blobs.begin_finish()
        result = self.__base.tpc_finish(transaction, f)
        transaction.set_data(self, None)
        blobs.finish()
        return result

    def tpc_abort(self, transaction: Any) -> None:
        """Abort the base, then remove what was staged and uploaded."""
        try:
            self.__base.tpc_abort(transaction)
        finally:
            try:
                blobs = self.__blobs(transaction)
            except (ReadOnlyError, StorageTransactionError):
                pass  # not begun here: nothing is ours to remove
            else:
                transaction.set_data(self, None)
                blobs.abort()

    # Blobs

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        """Return the path of a complete, verified file with the revision's bytes.

        :raises POSKeyError: when the blob is nowhere.
        :raises S3OperationError: when that cannot be told.
        """
        path: str | None = self.__cache.get(oid, serial)
        return path or self.__find_staged(oid, serial) or self.__loader.load(oid, serial)

    def __find_staged(self, oid: bytes, serial: bytes) -> str | None:
        # Only the running transaction knows its own tid, and the oids it creates.
        transaction = self.__base.tpc_transaction()
        if transaction is None:
            return None
        try:
            return self.__blobs(transaction).find(oid, serial)
        except (ReadOnlyError, StorageTransactionError):
            return None

    def openCommittedBlobFile(self, oid: bytes, serial: bytes, blob: Any = None) -> Any:
        """Open a committed blob for reading, as a BlobFile where a Blob is given."""
        for attempt in range(1, EVICTION_ATTEMPTS + 1):
            path = self.loadBlob(oid, serial)
            try:
                return open(path, "rb") if blob is None else BlobFile(path, "r", blob)
            except FileNotFoundError:  # eviction was faster
                if attempt == EVICTION_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def temporaryDirectory(self) -> str:
        """Return the directory for uncommitted files; it outlives close()."""
        return self.fshelper.temp_dir

    # Maintenance

    def pack(self, *args: Any, **kw: Any) -> Any:
        """Pack the base, then delete the objects that no surviving revision needs."""
        result = self.__base.pack(*args, **kw)
        self.sweep()
        return result

    def sweep(self, dry_run: bool = False) -> SweepReport:
        """Delete the objects that no surviving revision needs; with dry_run only count them.

        :raises OtherDatabaseError: when the bucket is not this database's alone.
        :raises ReadOnlyError: when the base is read-only, unless dry_run.
        """
        if not dry_run and self.__base.isReadOnly():
            raise ReadOnlyError()
        return self.__sweeper.sweep(dry_run)

    def __copy_transactions_from(self, other: Any) -> None:
        """Copy all transactions of another storage, with their tids and blobs."""
        for record in other.iterator():
            # Not the record itself: those of a MappingStorage cannot carry our data.
            extension = getattr(record, "extension_bytes", None) or record.extension
            transaction = TransactionMetaData(record.user, record.description, extension)
            self.tpc_begin(transaction, record.tid, record.status)
            try:
                for data_record in record:
                    self.__copy_record(other, data_record, transaction)
                self.tpc_vote(transaction)
            except BaseException:
                self.tpc_abort(transaction)
                raise
            self.tpc_finish(transaction)

    def __copy_record(self, other: Any, record: Any, transaction: Any) -> None:
        oid, tid = record.oid, record.tid
        if IBlobStorage.providedBy(other) and self.is_blob_record(record.data):
            copy = os.path.join(self.fshelper.temp_dir, f"copy-{os.urandom(16).hex()}.tmp")
            try:
                with other.openCommittedBlobFile(oid, tid) as source, open(copy, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                self.restoreBlob(oid, tid, record.data, copy, record.data_txn, transaction)
                return
            except POSKeyError:
                logger.warning("copied without its blob oid=0x%x tid=0x%x", u64(oid), u64(tid))
            finally:
                if os.path.exists(copy):
                    os.remove(copy)
        self.restore(oid, tid, record.data, "", record.data_txn, transaction)
