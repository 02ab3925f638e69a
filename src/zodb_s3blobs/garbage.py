"""Which keys no revision needs, and their deletion."""

from collections.abc import Callable
from itertools import chain
from itertools import islice
import logging
import threading
from typing import Any

from .bases import TidBase
from .interfaces import OtherDatabaseError
from .keys import parse_key
from .keys import PREFIX
from .openkeys import OpenKeys


logger = logging.getLogger(__name__)

# Of 1000 keys each, so that the requests that delete what is garbage among them are full.
PAGES_AT_ONCE = 10

Key = tuple[bytes, bytes]


class SweepReport:
    """Counts of keys; bytes are those of the garbage.

    listed = kept + in_flight + foreign + garbage, garbage = deleted + failed
    unless nothing was to be deleted.
    """

    def __init__(self) -> None:
        self.listed = 0
        self.kept = 0
        self.in_flight = 0
        #: of another form, or of an oid that is no blob's here
        self.foreign = 0
        self.garbage = 0
        self.deleted = 0
        self.failed = 0
        self.bytes = 0

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in vars(self).items())

    def __repr__(self) -> str:
        return f"<SweepReport {self}>"


class Sweeper:
    """Deletes what no surviving revision refers to, some pages of the listing at a time.

    :param storage: answers lastTransaction.
    :param is_blob_record: tells whether a record as the base returns it is a blob's.
    """

    def __init__(
        self,
        storage: Any,
        base: TidBase,
        client: Any,
        cache: Any,
        open_keys: OpenKeys,
        is_blob_record: Callable[[bytes], bool],
    ) -> None:
        self._storage = storage
        self._base = base
        self._client = client
        self._cache = cache
        self._open_keys = open_keys
        self._is_blob_record = is_blob_record
        self._one_at_a_time = threading.Lock()

    def sweep(self, dry_run: bool) -> SweepReport:
        """Delete garbage; any error ends the sweep, for an error never means garbage."""
        report = SweepReport()
        with self._one_at_a_time:
            try:
                pages = iter(self._client.list_pages(PREFIX))
                while batch := [*chain.from_iterable(islice(pages, PAGES_AT_ONCE))]:
                    self._sweep_batch(batch, report, dry_run)
            finally:
                # A sweep that was stopped has counts, too.
                bucket = getattr(self._client, "bucket_name", "?")
                logger.info("sweep bucket=%s %s dry_run=%s", bucket, report, dry_run)
        return report

    def _sweep_batch(
        self, batch: list[tuple[str, int]], report: SweepReport, dry_run: bool
    ) -> None:
        report.listed += len(batch)
        sizes = dict(batch)
        # Transactions enter their keys before they upload, so whatever was listed is either
        # still entered, or its transaction has ended and the base knows how.
        with self._open_keys.deciding(sizes) as free:
            report.in_flight += len(sizes) - len(free)
            garbage = self._find_garbage(free, report)
            report.garbage += len(garbage)
            report.bytes += sum(sizes[key] for key in garbage)
            if dry_run or not garbage:
                return
            refused = self._client.delete_objects(sorted(garbage))
        report.failed += len(refused)
        report.deleted += len(garbage) - len(refused)
        for key, code in list(refused.items())[:1]:
            logger.warning("sweep refused count=%d key=%s code=%s", len(refused), key, code)
        for key, (oid, tid) in garbage.items():
            if key not in refused:
                self._cache.discard(oid, tid)

    def _find_garbage(self, keys: set[str], report: SweepReport) -> dict[str, Key]:
        by_oid: dict[bytes, dict[bytes, str]] = {}
        last = self._storage.lastTransaction()
        highest = self._base.highest_oid()
        doubtful: list[str] = []
        for key in keys:
            parsed = parse_key(key)
            if parsed is None:
                report.foreign += 1
            elif parsed[1] > last:
                report.in_flight += 1  # of another process, or lost with it
            elif parsed[0] > highest:
                doubtful.append(key)
            else:
                by_oid.setdefault(parsed[0], {})[parsed[1]] = key
        garbage: dict[str, Key] = {}
        for oid, keys_by_tid in by_oid.items():
            survivors = self._base.survivors(oid, set(keys_by_tid), self._is_blob_record)
            report.kept += len(survivors.tids)
            for tid, key in keys_by_tid.items():
                if tid in survivors.tids:
                    continue
                if survivors.other_since is None:
                    garbage[key] = oid, tid
                elif survivors.other_since <= tid:
                    raise _other_database(key, oid, tid)
                else:
                    doubtful.append(key)
        self._judge(doubtful, report)
        return garbage

    def _judge(self, doubtful: list[str], report: SweepReport) -> None:
        """Keep keys of oids that were never given out here, or now belong to no blob.

        A FileStorage gives out the oids of a crashed transaction again, so they may be its
        orphans. They may also be another database's blobs, or those of a Data.fs in whose place
        a new one was opened: without one key that is surely ours nothing is deleted at all.
        """
        if not doubtful:
            return
        if not report.kept:
            oid, tid = parse_key(doubtful[0]) or (b"", b"")
            raise _other_database(doubtful[0], oid, tid)
        if not report.foreign:
            logger.warning("sweep keeps keys whose oid is no blob here key=%s", doubtful[0])
        report.foreign += len(doubtful)


def _other_database(key: str, oid: bytes, tid: bytes) -> OtherDatabaseError:
    error = OtherDatabaseError(
        f"S3 sweep stopped at {key!r}: this object is no blob here, so the key seems to be another"
        " database's, or this database is not the one that filled the bucket. Nothing was deleted"
        " among these keys. Give each database an s3-prefix or bucket of its own"
    )
    error.operation, error.key, error.oid, error.tid = "sweep", key, oid, tid
    return error
