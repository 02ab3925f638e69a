"""A storage whose records live in a base storage and whose blobs live in S3."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from copy import copy
from functools import partial
from io import BufferedReader
import logging
import os
import sys
from typing import Any
from typing import NamedTuple

from ZODB.blob import BlobFile
from ZODB.DemoStorage import DemoStorage
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IBlobStorageRestoreable
from ZODB.interfaces import IMVCCStorage
from ZODB.interfaces import IStorageRestoreable
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import Unsupported
from ZODB.utils import u64
from ZODB.utils import z64
from zope.interface import directlyProvides
from zope.interface import implementer
from zope.interface import providedBy

from . import blobpatch
from .basecontract import Base
from .basecontract import innermost
from .basecontract import is_read_only
from .basecontract import Read
from .bases import base_of
from .callers import loads_object
from .commit import TransactionBlobs
from .copying import copy_transactions
from .directories import make_private
from .draining import DrainReport
from .draining import SpoolUploader
from .garbage import Course
from .garbage import Sweeper
from .garbage import SweepReport
from .interfaces import EVICTION_ATTEMPTS
from .interfaces import IS3BlobStorage
from .keys import new_stamp
from .loading import BlobLoader
from .openkeys import OpenKeys
from .prefetching import Prefetch
from .prefetching import PrefetchReport
from .reading import BlobReader
from .rewriting import RewriteReport
from .rewriting import TidRewriter
from .staged import BlobServices
from .staged import new_path
from .staged import remove_quietly
from .stats import ReadCounters
from .translation import Translator
from .undoing import LateUndo
from .undoing import undo_at_once
from .uploads import UploadPool


logger = logging.getLogger(__name__)


class Parts(NamedTuple):
    """What a storage is made of."""

    base: Base
    services: BlobServices
    #: tells what a record, as the base returns it, is
    read: Read
    #: makes of a record, as the base returns it, the one that ZODB has made
    untransform: Callable[[bytes], bytes]
    sweeper: Sweeper


class FileNames:
    """What ZODB's own tools ask a blob storage's ``fshelper`` for."""

    def __init__(self, cache: Any, temp_dir: str) -> None:
        self.temp_dir = temp_dir
        self.getBlobFilename = cache.path

    def getPathForOID(self, oid: bytes, create: bool = False) -> str:
        """Refuse: a ZEO server asks for it where a client takes our cache for a blob directory."""
        raise Unsupported(
            "the cache is no blob directory: a <zeoclient> needs shared-blob-dir false"
        )


@implementer(IS3BlobStorage)
class S3BlobStorage:
    """Passes a base storage through and keeps the blobs in a bucket.

    Where the base is an IMVCCStorage, so is this, and each of its instances
    passes one instance of the base through.

    :param base_storage: a FileStorage, MappingStorage, RelStorage, DemoStorage or ZEO client
        without blobs of its own.
    :param IS3Client s3_client: where the blobs are.
    :param IS3BlobCache cache: where they are on this host.
    :param str temp_dir: for uncommitted files; by default the cache's, and best on its file system.
    :param sources: further places to read blobs from, asked after S3 in this order.
    :param UploadPool pool: by default one of 32 threads.
    :param str addressing: "auto", "tid" or "record". By record a FileStorage or MappingStorage
        hears of a transaction when its uploads are done; the others know no other way.
    :param float gc_grace: age in seconds below which an object that no record refers to may belong
        to a transaction of another process. The same in all processes.
    :param Spool spool: takes what S3 does not, if it takes commits, until S3 does.
    :param bool sweep_after_pack: whether a pack deletes what it has made garbage.
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
        addressing: str = "auto",
        gc_grace: float = 86400.0,
        spool: Any = None,
        sweep_after_pack: bool = True,
    ) -> None:
        if temp_dir is None:
            temp_dir, temporary_file = cache.temp_dir, cache.temporary_file
        else:
            temp_dir = os.path.abspath(temp_dir)
            temporary_file = partial(new_path, temp_dir)
        base = base_of(base_storage, addressing, temp_dir)
        blobpatch.install()
        make_private(temp_dir)
        counters = ReadCounters()
        loader = BlobLoader(cache, s3_client, [*sources, *base.sources], counters, spool)
        open_keys = OpenKeys()
        pool = pool or UploadPool()
        uploader = SpoolUploader(spool, s3_client, pool)
        # Only the sweep of another process does not know what is in flight here.
        grace = gc_grace if base.shared else 0.0
        services = BlobServices(
            s3_client,
            cache,
            loader,
            pool,
            open_keys,
            temporary_file,
            grace,
            counters=counters,
            uploader=uploader,
        )
        self.fshelper = FileNames(cache, temp_dir)
        # Apart from the uploads, which commits wait for.
        self.__downloads = UploadPool(pool.concurrency, "zodb-s3blobs-download")
        closeables = uploader, pool, self.__downloads, *sources, cache, s3_client
        self.__pass_through(base, services, closeables)
        self.__sweeper = Sweeper(base, s3_client, cache, open_keys, self.__records.read, gc_grace)
        self.__sweeps_after_pack = sweep_after_pack
        if not is_read_only(base_storage):
            uploader.wake()

    def __pass_through(
        self, base: Base, services: BlobServices, closeables: Sequence[Any] = ()
    ) -> None:
        base_storage = base.storage
        self.__base = base_storage
        self.__kind = base
        self.__services = services
        self.__cache = services.cache
        self.__loader = services.loader
        self.__counters = services.counters
        self.__reader = BlobReader(
            services.cache,
            services.client,
            services.loader,
            self.__find_reference,
            self.__find_staged,
            services.counters,
        )
        # All instances share them, and the first closes them.
        self.__closeables = closeables
        self.__db: Any = None
        self.__records = Translator()
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
        "before_instance": "_S3BlobStorage__before_instance",
        "copyTransactionsFrom": "_S3BlobStorage__copy_transactions_from",
        "new_instance": "_S3BlobStorage__new_instance",
        "push": "_S3BlobStorage__push",
        "release": "_S3BlobStorage__release",
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

    # Instances

    def __new_instance(self) -> S3BlobStorage:
        """Return an instance with a view of its own, as a Connection wants one."""
        return self.__around(self.__base.new_instance())

    def __before_instance(self, before: bytes) -> S3BlobStorage:
        """Return a read-only instance that sees what was current before a tid."""
        return self.__around(self.__base.before_instance(before))

    def __release(self) -> None:
        """Give up this instance; what a transaction has staged is given up with it."""
        transaction = self.__kind.running()
        try:
            self.__base.release()
        finally:
            if transaction is not None:
                self.__abort_blobs(transaction)

    def __around(self, instance: Any) -> S3BlobStorage:
        other = type(self).__new__(type(self))
        other.__pass_through(self.__kind.of(instance), self.__services)
        other.fshelper = self.fshelper
        other.__downloads = self.__downloads
        other.__sweeper = self.__sweeper
        other.__sweeps_after_pack = self.__sweeps_after_pack
        other.__records = copy(self.__records)
        return other

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
        return f"<S3BlobStorage {self.__services.client!r} around {self.__base!r}>"

    def close(self) -> None:
        """Close the base and what was opened for the blobs; closing again changes nothing."""
        self.is_open = False
        try:
            self.__base.close()
        finally:
            for closeable in self.__closeables:
                closeable.close()

    def registerDB(self, db: Any) -> None:
        """Learn from whoever wraps us how to read and write records."""
        self.__db = db
        self.__records.learn(db)
        self.__base.registerDB(db)
        if "copyTransactionsFrom" in vars(db):
            # A RelStorage gives the wrapper its own, which knows nothing of our blobs.
            db.copyTransactionsFrom = self.copyTransactionsFrom

    def __find_reference(self, oid: bytes, serial: bytes) -> bytes | None:
        return self.__records.read(self.__kind.record(oid, serial)).stamp

    def __push(self, changes: Any = None) -> Any:
        """Put a DemoStorage around this, as a DemoStorage inside would around itself."""
        return DemoStorage(base=self, changes=changes, close_base_on_close=False)

    @property
    def parts(self) -> Parts:
        """What it is made of, for `zodb_s3blobs.operate`."""
        records = self.__records
        return Parts(
            self.__kind, self.__services, records.read, records.untransform, self.__sweeper
        )

    # Two-phase commit

    def tpc_begin(self, transaction: Any, *args: Any, **kw: Any) -> None:
        """Begin on the base; the transaction's blobs are kept on the transaction."""
        self.__base.tpc_begin(transaction, *args, **kw)
        try:
            given = args[0] if args else kw.get("tid")
            tid = self.__kind.tid() if given is None else given
            locks = self.__kind.locks_at_begin or given is not None
            blobs = TransactionBlobs(self.__services, tid, given is None, locks)
            transaction.set_data(self, blobs)
        except BaseException:
            # Whatever it was, the base must not keep its lock.
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
        """Take over a file, start the upload, and store its record in the base: by record, in the
        vote.

        :raises StorageError: when the record must carry a reference and is not a Blob's.
        """
        assert not version, "Versions aren't supported."
        blobs = self.__blobs(transaction)
        is_new = oldserial in (None, z64)
        if self.__kind.tells_tid:
            # A record with a reference was imported from another database.
            record = self.__records.without_reference(data)
            path = self.__services.take_over(blobfilename)
            try:
                result = self.__base.store(oid, oldserial, record, "", transaction)
            except BaseException:
                remove_quietly(path)  # a conflict has no use for it
                raise
            with blobs.following():
                blobs.stage(oid, path, is_new)
            return result

        def store(stamp: bytes) -> None:
            record = self.__records.with_reference(data, stamp)
            self.__base.store(oid, oldserial, record, "", transaction)

        stamp = new_stamp()
        try:
            self.__records.with_reference(data, stamp)
        except ValueError as error:
            raise StorageError(
                f"the blob 0x{u64(oid):x} cannot be stored: its record is not a ZODB.blob.Blob's,"
                f" and where a {type(innermost(self.__base)).__name__} keeps it only a reference"
                " in its record can tell"
            ) from error
        path = self.__services.take_over(blobfilename)
        with blobs.following():
            blobs.stage(oid, path, is_new, stamp, store)
        return None

    def __restore_blob(
        self, oid: bytes, serial: bytes, data: bytes, blobfilename: str, prev_txn: Any,
        transaction: Any,
    ) -> Any:  # fmt: skip
        """Restore a record as it is, and its blob under its reference or the revision's tid."""
        blobs = self.__blobs(transaction)
        path = self.__services.take_over(blobfilename)
        try:
            result = self.__base.restore(oid, serial, data, "", prev_txn, transaction)
        except BaseException:
            remove_quietly(path)  # nobody else will
            raise
        with blobs.following():
            blobs.stage_restored(oid, serial, path, self.__records.read(data).stamp)
        return result

    def __undo(self, transaction_id: bytes, transaction: Any) -> Any:
        """Undo on the base, and give each affected blob the bytes that become current again."""
        blobs, look_back = self.__blobs(transaction), self.__kind.look_back
        if look_back is None:
            return undo_at_once(self.__kind, self.__records, blobs, transaction_id, transaction)
        with blobs.following():
            if blobs.undo is None:
                blobs.undo = LateUndo(look_back, self.__base, self.__records, blobs, transaction)
            return None, blobs.undo.undo(transaction_id)

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
        blobs.finish(result)
        return result

    def tpc_abort(self, transaction: Any) -> None:
        """Abort the base, then remove what was staged and uploaded."""
        try:
            self.__base.tpc_abort(transaction)
        finally:
            self.__abort_blobs(transaction)

    def __abort_blobs(self, transaction: Any) -> None:
        try:
            blobs = self.__blobs(transaction)
        except (ReadOnlyError, StorageTransactionError):
            return  # not begun here: nothing is ours to remove
        transaction.set_data(self, None)
        blobs.abort()

    # Blobs

    def loadBlob(self, oid: bytes, serial: bytes) -> str:
        """Return the path of a complete, verified file with the revision's bytes.

        ``Connection.setstate``, which loads the object and not its bytes, gets the path that the
        file will have, or has.

        :raises POSKeyError: when the blob is nowhere.
        :raises S3OperationError: when that cannot be told.
        """
        path: str | None
        if loads_object(sys._getframe(1)):
            path = self.__cache.path(oid, serial)
            return path
        path = self.__cache.get(oid, serial)
        if path is not None:
            self.__counters.hits += 1
            return path
        path = self.__find_staged(oid, serial)
        if path is None:
            with self.__counters.waiting():
                path = self.__loader.load(oid, serial, self.__find_reference)
        return path

    def __find_staged(self, oid: bytes, serial: bytes) -> str | None:
        # Only the running transaction knows its own tid, and the oids it creates.
        transaction = self.__kind.running()
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

    def blob_is_cached(self, oid: bytes, serial: bytes) -> bool:
        """Tell whether the bytes of a blob are on this host."""
        return self.__reader.is_cached(oid, serial)

    def verify_blob(self, oid: bytes, serial: bytes) -> bool:
        """Compare the cached file of a blob with what was stored; False when it was replaced."""
        with self.__counters.waiting():
            return self.__loader.verify(oid, serial, self.__find_reference)

    def blob_size(self, oid: bytes, serial: bytes) -> int:
        """Return the size of a blob in bytes, without a download."""
        return self.__reader.size(oid, serial)

    def open_blob_range(
        self, oid: bytes, serial: bytes, start: int = 0, stop: int | None = None
    ) -> BufferedReader:
        """Open the bytes of a blob from start to below stop, without a download of the others."""
        return self.__reader.open_range(oid, serial, start, stop)

    def prefetch_blobs(self, revisions: Iterable[tuple[bytes, bytes]]) -> PrefetchReport:
        """Bring blobs, given by oid and serial, into the cache, many at a time."""
        return Prefetch(
            self.__cache,
            self.__loader,
            self.__downloads,
            self.__find_reference,
            self.__counters,
        ).run(revisions)

    def presigned_url(
        self,
        oid: bytes,
        serial: bytes,
        expires_in: int = 60,
        content_type: str | None = None,
        filename: str | None = None,
        disposition: str = "inline",
    ) -> str | None:
        """Return a URL by which a browser can GET a blob from S3 itself, None where it cannot."""
        return self.__reader.presigned_url(
            oid, serial, expires_in, content_type, filename, disposition
        )

    def stats(self) -> dict[str, float | None]:
        """Return the numbers of this process by name; `stats.MEANINGS` explains them."""
        client, cache = self.__services.client, self.__cache
        uploader = self.__services.uploader
        counters = self.__counters, client.counters, cache.counters, uploader.counters
        numbers = {name: value for each in counters for name, value in each.values().items()}
        is_down = {"s3_is_down": int(client.is_down)}
        return {**numbers, **is_down, **uploader.usage(), **cache.usage()}

    def temporaryDirectory(self) -> str:
        """Return the directory for uncommitted files; it outlives close()."""
        temp_dir: str = self.fshelper.temp_dir
        # Who empties a cache by hand takes it away, too.
        make_private(temp_dir)
        return temp_dir

    # Maintenance

    def pack(self, *args: Any, **kw: Any) -> Any:
        """Pack the base, then delete the objects that no surviving revision needs.

        Nothing is deleted where the base, such as a DemoStorage, does not tell what is garbage, or
        where that is left to ``sweep``.
        Further arguments are the base's. What RelStorage calls ``prepack_only`` and ``check_refs``
        removes nothing, and nothing is swept after it.
        """
        sweeps = self.__sweeps_after_pack
        if kw.get("prepack_only") or kw.get("check_refs"):
            sweeps = False
        if self.__services.client.is_read_only:
            sweeps = False  # the bucket's own database does that
        if not self.__kind.tells_garbage:
            sweeps = False
            logger.info("pack without a sweep base=%r", self.__base)
        if sweeps:
            self.__refuse_read_only()
            self.__kind.about_to_pack()
        result = self.__base.pack(*args, **kw)
        if sweeps:
            self.sweep()
        return result

    def __refuse_read_only(self) -> None:
        if is_read_only(self.__base):
            raise ReadOnlyError("the storage inside is open for reading only")
        if self.__services.client.is_read_only:
            raise ReadOnlyError("access to the bucket is read-only")

    def sweep(self, dry_run: bool = False, course: Course | None = None) -> SweepReport:
        """Delete the objects that no surviving revision needs; with dry_run only count them.

        :param Course course: where it begins and ends, and what may go.
        :raises OtherDatabaseError: when the bucket is not this database's alone.
        :raises ReadOnlyError: when the base is read-only, unless dry_run.
        :raises Unsupported: when the base, such as a DemoStorage, does not tell what is garbage.
        """
        if not self.__kind.tells_garbage:
            raise Unsupported(
                f"{self.__base!r} does not tell what is garbage: a DemoStorage does not know what"
                " the database below it needs, nor does a ZEO server tell that of a storage without"
                " record_iternext. Sweep with a storage around the database itself"
            )
        if not dry_run:
            self.__refuse_read_only()
        return self.__sweeper.sweep(dry_run, course)

    def drain_spool(self) -> DrainReport:
        """Upload what was committed while S3 was down, and return when that is done.

        A thread does that by itself every few seconds.

        :raises S3OperationError: when S3 does not take it; what is left stays in the spool.
        """
        report: DrainReport = self.__services.uploader.drain()
        return report

    def rewrite_by_tid(self, is_stopped: Callable[[], bool] = lambda: False) -> RewriteReport:
        """Give every blob the key of its tid and take the references out of the records.

        So that a site can leave: older versions of this package, and others that know nothing of
        references, find the blobs then. Each object that has a reference gets a new revision.
        A call goes on where an earlier one was stopped; what is stored meanwhile by other
        processes gets references again, so the last call comes after they have ended. The objects
        that records no longer refer to are garbage, which the next pack deletes.

        :param is_stopped: asked now and then whether the rest is left to a later call.
        :raises ReadOnlyError: when the base is read-only.
        :raises Unsupported: over a ZEO client or a DemoStorage.
        """
        self.__refuse_read_only()
        if not self.__kind.takes_tid:
            raise Unsupported(
                "blobs cannot be brought to keys by tid from here: stop the ZEO server, and call"
                " this on an <s3blobstorage> with the same bucket and s3-prefix around its storage"
            )

        def invalidate(tid: bytes, oids: Sequence[bytes]) -> None:
            if self.__db is None or IMVCCStorage.providedBy(self):
                return
            try:
                self.__db.invalidate(tid, oids)
            except Exception:
                # The base is in the middle of its finish. A wrapper may have no database around it
                # yet, and then there is nobody to tell.
                logger.warning("rewriting could not tell connections", exc_info=True)

        self.drain_spool()  # what is not in the bucket yet is not found there
        records = self.__records
        return TidRewriter(
            self.__kind, self.__services, records.read, records.without_reference, invalidate
        ).run(is_stopped)

    def __copy_transactions_from(self, other: Any) -> None:
        """Copy all transactions of another storage, with their tids and blobs."""
        copy_transactions(other, self, self.__records.transform)
        self.__kind.copied()
