"""The way back from references: every blob under the key of its tid, as older versions keep it."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from itertools import groupby
from itertools import islice
import logging
from operator import itemgetter
import random
import time
from typing import Any

from persistent.timestamp import TimeStamp
from transaction.interfaces import TransientError
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import POSKeyError
from ZODB.utils import newTid
from ZODB.utils import p64
from ZODB.utils import u64

from .basecontract import Base
from .basecontract import Read
from .basecontract import Revisions
from .commit import TransactionBlobs
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .keys import parse_key
from .keys import PREFIX
from .keys import TID_SIZE
from .reports import Report
from .staged import BlobServices


logger = logging.getLogger(__name__)

# Names of keys by oid
Names = dict[bytes, set[bytes]]

# Records rewritten by one transaction, and how often others may be faster without a pause.
BATCH = 100
ATTEMPTS = 12
# Some milliseconds, in units of a tid
TID_ROOM = 1 << 20
# Seconds by which a tid may be ahead of the clock.
LONGEST_LEAD = 60.0


class RewriteReport(Report):
    """Counts of one run; when there is nothing to do copied and rewritten are 0."""

    def __init__(self) -> None:
        #: revisions that have got a copy under their tid
        self.copied = 0
        #: objects that have got a new revision whose record has no reference
        self.rewritten = 0
        #: objects left as they are, because one of their blobs is nowhere
        self.missing = 0


class _Current:
    """The current revision of an object whose record carries a reference."""

    def __init__(self, oid: bytes, tid: bytes, record: bytes, stamp: bytes) -> None:
        self.oid = oid
        self.tid = tid
        self.record = record
        self.stamp = stamp


class TidRewriter:
    """Copies objects inside the bucket to keys of tids, and takes references out of records.

    A revision cannot be changed, so that each object gets a new one, with a tid
    that is chosen before its blob is copied. Revisions that stay, as history,
    get copies of their own. What is done is not done again: a run that was
    stopped is continued by the next.

    :param read: tells what a record, as the base returns it, is.
    :param strip: returns such a record without its reference.
    :param invalidate: tells connections of this process, with tid and oids, what has changed.
    """

    def __init__(
        self,
        base: Base,
        services: BlobServices,
        read: Read,
        strip: Callable[[bytes], bytes],
        invalidate: Callable[[bytes, Sequence[bytes]], None],
    ) -> None:
        self._base = base
        self._services = services
        self._read = read
        self._strip = strip
        self._invalidate = invalidate
        self._report = RewriteReport()
        # Oids whose blob is nowhere: their records keep what they say.
        self._missing: set[bytes] = set()

    def run(self, is_stopped: Callable[[], bool] = lambda: False) -> RewriteReport:
        """Rewrite all there is, or some, until it is told to stop.

        :raises TransientError: when others commit all the time.
        :raises S3OperationError: when S3 fails; the next run goes on from there.
        """
        report = self._report
        try:
            objects = self._objects_with_stamps()
            while not is_stopped() and (batch := dict(islice(objects, BATCH))):
                if self._base.keeps_history:
                    self._until_found(self._copy_all, batch)
                self._until_found(self._rewrite_current, batch)
        finally:
            report.missing = len(self._missing)
            logger.info("rewriting by tid %s", report)
        return report

    def _objects_with_stamps(self) -> Iterator[tuple[bytes, set[bytes]]]:
        """Yield each oid with the names of its keys, where one of them is a stamp."""
        pages = self._services.client.list_pages(PREFIX)
        keys = (parse_key(listed.key) for page in pages for listed in page)
        for oid, group in groupby(filter(None, keys), itemgetter(0)):
            names = {name for _oid, name in group}
            if any(len(name) != TID_SIZE for name in names):
                yield oid, names

    def _until_found(self, step: Callable[[Names], None], names: Names) -> None:
        while True:
            try:
                return step(names)
            except POSKeyError as error:
                # Another's than the loader's, or one that leaving the object out does not mend.
                if len(error.args) != 3 or error.args[1] in self._missing:
                    raise
                _message, oid, _tid = error.args
                logger.warning("rewriting leaves out what is missing oid=0x%x", u64(oid))
                self._missing.add(oid)

    def _look(self, oids: Iterable[bytes]) -> list[tuple[bytes, Revisions]]:
        with self._base.snapshot() as snapshot:
            return list(snapshot.revisions(oid for oid in oids if oid not in self._missing))

    def _stamps(self, revisions: Revisions) -> Iterator[tuple[bytes, bytes]]:
        """Yield (tid, stamp) of the revisions that carry a reference."""
        for tid, record in revisions.items():
            reading = self._read(record) if record else None
            if reading and reading.stamp:
                yield tid, reading.stamp

    def _copy_all(self, names: Names) -> None:
        """Copy to the keys of their tids what stays as history."""
        copies = TransactionBlobs(self._services, None, owns_keys=False, may_spool=False)
        count = 0
        try:
            for oid, revisions in self._look(names):
                for tid, stamp in self._stamps(revisions):
                    if tid not in names[oid]:
                        copies.copy(oid, tid, tid, stamp)
                        count += 1
            copies.vote()
            self._report.copied += count
        finally:
            copies.abort()  # which deletes nothing: these keys are no transaction's

    def _rewrite_current(self, oids: Iterable[bytes]) -> None:
        """Give objects a revision without a reference, fewer at a time while others commit."""
        parts, failures, lead = [list(oids)], 0, 0.0
        while parts:
            part = parts.pop()
            begun = time.monotonic()
            current = self._find_current(part)
            try:
                if not current or self._commit(current, lead):
                    self._report.rewritten += len(current)
                    failures = 0
                    continue
            except TransientError as error:  # as a conflict is
                if isinstance(error, S3OperationError) or failures == ATTEMPTS:
                    raise
            if failures == ATTEMPTS:
                break
            failures += 1
            # Next time with a tid that the others have not come to by then.
            lead = min(lead + 2 * (time.monotonic() - begun), LONGEST_LEAD)
            half = (len(part) + 1) // 2
            parts += filter(None, (part[half:], part[:half]))
        else:
            return
        raise TransientS3Error("others commit faster than blobs can be copied; run it again later")

    def _find_current(self, oids: Iterable[bytes]) -> list[_Current]:
        current = []
        for oid, revisions in self._look(oids):
            last = max(revisions, default=b"")
            stamps = dict(self._stamps(revisions))
            if last in stamps:
                current.append(_Current(oid, last, revisions[last] or b"", stamps[last]))
        return current

    def _commit(self, current: list[_Current], lead: float) -> bool:
        """Give objects a revision without a reference; False when others were faster."""
        tid = self._choose_tid(lead)
        blobs = TransactionBlobs(self._services, tid, owns_keys=True, may_spool=False)
        transaction = TransactionMetaData(description="blobs by tid")
        try:
            for revision in current:
                blobs.copy(revision.oid, tid, revision.tid, revision.stamp)
            blobs.vote()
            with self._base.writer() as storage:
                if not self._store(storage, transaction, current, tid):
                    blobs.abort()
                    return False
                blobs.begin_finish()
                oids = [revision.oid for revision in current]
                storage.tpc_finish(transaction, lambda tid: self._invalidate(tid, oids))
        except BaseException:
            # Whatever it was, nobody else removes the copies.
            blobs.abort()
            raise
        blobs.finish(tid)
        return True

    def _store(
        self, storage: Any, transaction: TransactionMetaData, current: list[_Current], tid: bytes
    ) -> bool:
        """Store the records and vote on them, unless the tid is no longer above all others."""
        try:
            storage.tpc_begin(transaction, tid)
        except Exception:
            # The base may refuse a tid that is there. It may also keep its lock.
            self._base.give_up(storage, transaction)
            if self._last_transaction() < tid:
                raise
            return False
        try:
            for revision in current:
                record = self._strip(revision.record)
                storage.store(revision.oid, revision.tid, record, "", transaction)
            storage.tpc_vote(transaction)
            self._base.hold_commits(storage)
            # SQLite shows our own.
            if self._last_transaction() > tid:
                self._base.give_up(storage, transaction)
                return False
        except BaseException:
            # Whatever it was, the base must not keep its lock.
            self._base.give_up(storage, transaction)
            raise
        return True

    def _last_transaction(self) -> bytes:
        with self._base.snapshot() as snapshot:
            return snapshot.last_transaction()

    def _choose_tid(self, lead: float) -> bytes:
        last = self._last_transaction()
        if lead:
            now = time.time() + lead
            ahead = TimeStamp(*time.gmtime(now)[:5], now % 60).raw()
            last = max(last, ahead)
        # Not the next one: others may choose that.
        return p64(u64(newTid(last)) + random.randrange(1, TID_ROOM))
