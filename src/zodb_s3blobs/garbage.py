"""Which keys no revision needs, and their deletion."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from enum import Enum
from itertools import chain
from itertools import islice
import logging
import threading
import time
from typing import Any

from persistent.timestamp import TimeStamp

from .basecontract import Base
from .basecontract import Read
from .basecontract import Snapshot
from .basecontract import Survivors
from .forks import begin_in_children
from .interfaces import ListedObject
from .interfaces import OtherDatabaseError
from .interfaces import PermanentS3Error
from .interfaces import TransientS3Error
from .keys import parse_key
from .keys import PREFIX
from .keys import TID_SIZE
from .openkeys import OpenKeys
from .reports import Report


logger = logging.getLogger(__name__)

# Of 1000 keys each, so that the requests that delete what is garbage among them are full.
PAGES_AT_ONCE = 10
# How often the same keys are listed again because deciding about them took too long.
LISTINGS = 3


class SweepReport(Report):
    """Counts of keys; bytes are those of the garbage.

    listed = kept + in_flight + foreign + garbage, garbage = deleted + failed
    unless not all of it was to be deleted.
    """

    def __init__(self) -> None:
        self.listed = 0
        self.kept = 0
        #: of transactions that may not have ended, and of readers that may not know of their end
        self.in_flight = 0
        #: of another form, or of an oid that is no blob's here
        self.foreign = 0
        self.garbage = 0
        self.deleted = 0
        self.failed = 0
        self.bytes = 0


class Course:
    """What the way of a sweep is: by default, through all, and all garbage goes."""

    #: the key behind which it begins
    after = ""

    def __init__(self) -> None:
        #: what was counted before that
        self.report = SweepReport()

    def choose(self, garbage: Sequence[ListedObject]) -> Collection[str]:
        """Return the keys of what may go now; must be quick, for transactions may wait."""
        return [listed.key for listed in garbage]

    def goes_on(self, last: str) -> bool:
        """Tell whether the sweep goes on behind a key, up to which it has come."""
        return True


class Verdict(Enum):
    """What a sweep says of an object."""

    KEPT = "kept"
    #: of a transaction that may not have ended, or for readers that may not know of its end
    IN_FLIGHT = "in flight"
    GARBAGE = "garbage"
    #: of an oid that was never given out here, or is no blob's any more
    DOUBTFUL = "doubtful"
    #: of an oid that is no blob's, and another database's for sure
    ANOTHERS = "another's"
    #: its key is of another form
    FOREIGN = "foreign"


class _Entry:
    """A listed object whose key is of our form."""

    def __init__(self, listed: ListedObject, oid: bytes, name: bytes) -> None:
        self.listed = listed
        self.oid = oid
        #: the revision's tid, or the stamp that its record carries
        self.name = name

    @property
    def is_by_tid(self) -> bool:
        return len(self.name) == TID_SIZE

    @property
    def time(self) -> bytes:
        """When the object was uploaded, as a tid, by the clock that was behind the other."""
        by_name = self.name[:TID_SIZE]
        try:
            # It was rounded, perhaps.
            moment = time.gmtime(self.listed.modified + 1)
            by_server: bytes = TimeStamp(*moment[:5], float(moment.tm_sec)).raw()
        except (OverflowError, ValueError):
            return by_name
        # Without a usable date it is 0.
        return min(by_name, by_server) if self.listed.modified else by_name


class Sweeper:
    """Deletes what no surviving revision refers to, some pages of the listing at a time.

    :param read: tells what a record, as the base returns it, is.
    :param float grace: seconds; see `_is_young` and `_may_be_read`.
    """

    def __init__(
        self,
        base: Base,
        client: Any,
        cache: Any,
        open_keys: OpenKeys,
        read: Read,
        grace: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base = base
        self._client = client
        self._cache = cache
        self._open_keys = open_keys
        self._read = read
        self._grace = grace
        self._clock = clock
        self.begin()
        begin_in_children(self)

    def begin(self) -> None:
        """Forget a sweep that runs: a child has none of its parent's threads."""
        self._one_at_a_time = threading.Lock()

    def sweep(self, dry_run: bool, course: Course | None = None) -> SweepReport:
        """Delete garbage; any error ends the sweep, for an error never means garbage."""
        course = course or Course()
        report = course.report
        with self._one_at_a_time:
            try:
                # A ZEO client that turns to a server which is behind notices by what it has seen.
                with self._base.snapshot() as snapshot:
                    snapshot.last_transaction()
                last = self._sweep_from(course.after, course, dry_run)
                while last is not None and course.goes_on(last):
                    last = self._sweep_from(last, course, dry_run)
            finally:
                # A sweep that was stopped has counts, too.
                bucket = getattr(self._client, "bucket_name", "?")
                logger.info("sweep bucket=%s %s dry_run=%s", bucket, report, dry_run)
        return report

    def _sweep_from(self, after: str, course: Course, dry_run: bool) -> str | None:
        """Sweep the next pages behind a key and return their last key, None at the end."""
        for _listing in range(LISTINGS):
            begun = self._clock()
            pages = islice(self._client.list_pages(PREFIX, after), PAGES_AT_ONCE)
            batch = [*chain.from_iterable(pages)]
            if not batch:
                return None
            if not dry_run:
                # Here, where no transaction waits for it
                self._client.check_owner()
            if batch[0].key <= after or batch[-1].key < batch[0].key:
                raise PermanentS3Error(
                    f"S3 list begins at {batch[0].key!r} and not behind {after!r}, or is not"
                    " sorted: the server does not know StartAfter, and a sweep would not end"
                )

            def is_late(begun: float = begun) -> bool:
                # What was listed so long ago may have been stored again by a restore.
                return bool(self._grace) and self._clock() - begun > self._grace / 4

            if self._sweep_batch(batch, course, dry_run, is_late):
                return batch[-1].key
            logger.warning("sweep lists again after=%r", after)
        raise TransientS3Error(
            f"S3 sweep stopped behind {after!r}: to decide about {len(batch)} keys took longer than"
            f" a quarter of gc-grace, which is {self._grace:.0f} s"
        )

    def _sweep_batch(
        self,
        batch: list[ListedObject],
        course: Course,
        dry_run: bool,
        is_late: Callable[[], bool],
    ) -> bool:
        """Sweep a part of a listing, unless deciding about it takes too long.

        :returns: False in that case; nothing was deleted or counted.
        """
        counts, report = SweepReport(), course.report
        by_key = {listed.key: listed for listed in batch}
        counts.listed = len(by_key)
        suspects = set(by_key)
        if self._base.hides_undo and not dry_run:
            closed = [by_key[key] for key in self._open_keys.closed(by_key)]
            first_look = self._find_garbage(closed, SweepReport(), report.kept)
            suspects = {entry.listed.key for entry in first_look}
            if suspects:
                # What was being undone then shows when the base is asked again.
                self._base.settle()
        # Transactions enter their keys before they upload, so whatever was listed is either
        # still entered, or its transaction has ended and the base knows how.
        with self._open_keys.deciding(by_key) as free:
            counts.in_flight = len(by_key) - len(free)
            found = self._find_garbage([by_key[key] for key in free], counts, report.kept)
            garbage = [entry for entry in found if entry.listed.key in suspects]
            counts.in_flight += len(found) - len(garbage)
            counts.garbage = len(garbage)
            counts.bytes = sum(entry.listed.size for entry in garbage)
            if is_late():
                return False
            chosen = {*course.choose([entry.listed for entry in garbage])}
            going = [entry for entry in garbage if entry.listed.key in chosen]
            if going and not dry_run:
                self._delete(going, counts)
        report.add(counts)
        return True

    def _delete(self, garbage: list[_Entry], counts: SweepReport) -> None:
        refused = self._client.delete_objects(sorted(entry.listed.key for entry in garbage))
        counts.failed = len(refused)
        counts.deleted = len(garbage) - len(refused)
        for key, code in list(refused.items())[:1]:
            logger.warning("sweep refused count=%d key=%s code=%s", len(refused), key, code)
        for entry in garbage:
            if entry.is_by_tid and entry.listed.key not in refused:
                self._cache.discard(entry.oid, entry.name)

    # Deciding

    def judge(self, objects: Iterable[ListedObject]) -> Iterator[tuple[ListedObject, Verdict]]:
        """Tell of each object what a sweep would say of it now."""
        with self._base.snapshot() as snapshot:
            for listed, verdict, _entry in self._judge(objects, snapshot):
                yield listed, verdict

    def _find_garbage(
        self, objects: Iterable[ListedObject], counts: SweepReport, kept_before: int
    ) -> list[_Entry]:
        found: dict[Verdict, list[Any]] = {verdict: [] for verdict in Verdict}
        with self._base.snapshot() as snapshot:
            for _listed, verdict, entry in self._judge(objects, snapshot):
                if verdict is Verdict.ANOTHERS:
                    raise _other_database(entry)
                found[verdict].append(entry)
        counts.kept += len(found[Verdict.KEPT])
        counts.in_flight += len(found[Verdict.IN_FLIGHT])
        counts.foreign += len(found[Verdict.FOREIGN])
        _keep(found[Verdict.DOUBTFUL], counts, kept_before + counts.kept)
        return found[Verdict.GARBAGE]

    def _judge(
        self, objects: Iterable[ListedObject], snapshot: Snapshot
    ) -> Iterator[tuple[ListedObject, Verdict, Any]]:
        """Yield objects with their entry, None for one whose key is of another form."""
        last = snapshot.last_transaction()
        highest = snapshot.highest_oid()
        by_oid: dict[bytes, dict[bytes, _Entry]] = {}
        for listed in objects:
            parsed = parse_key(listed.key)
            if parsed is None:
                yield listed, Verdict.FOREIGN, None
                continue
            entry = _Entry(listed, *parsed)
            if entry.is_by_tid and entry.name > last:
                # Of another process, or lost with it
                yield listed, Verdict.IN_FLIGHT, entry
            elif entry.oid <= highest:
                by_oid.setdefault(entry.oid, {})[entry.name] = entry
            else:
                is_young = self._is_young(entry)
                yield listed, Verdict.IN_FLIGHT if is_young else Verdict.DOUBTFUL, entry
        for oid, survivors in snapshot.survivors(by_oid, self._read):
            for entry in by_oid[oid].values():
                yield entry.listed, self._judge_entry(entry, survivors), entry

    def _judge_entry(self, entry: _Entry, survivors: Survivors) -> Verdict:
        if entry.name in (survivors.tids if entry.is_by_tid else survivors.stamps):
            return Verdict.KEPT
        if self._is_young(entry) or self._may_be_read(entry, survivors.current):
            return Verdict.IN_FLIGHT
        if survivors.other_since is None:
            return Verdict.GARBAGE
        is_anothers = survivors.other_since <= entry.time
        return Verdict.ANOTHERS if is_anothers else Verdict.DOUBTFUL

    def _is_young(self, entry: _Entry) -> bool:
        """Tell whether a transaction of another process may still want an object.

        Transactions upload again what gets older than a part of the grace period.
        """
        return self._has_grace(entry) and entry.listed.age < self._grace

    def _may_be_read(self, entry: _Entry, current: bytes | None) -> bool:
        """Tell whether a reader on an older view may still see the revision before the current."""
        if current is None or not self._has_grace(entry):
            return False
        age: float = entry.listed.listed - TimeStamp(current).timeTime()
        return max(0.0, age) < self._grace

    def _has_grace(self, entry: _Entry) -> bool:
        # Keys by tid of a base that this process alone writes to were made by this process, or are
        # of a dead one. Those of stamps may be of ZEO clients that wait for their server.
        return self._base.shared or not entry.is_by_tid


def _keep(doubtful: list[_Entry], counts: SweepReport, kept: int) -> None:
    """Keep keys of oids that were never given out here, or now belong to no blob.

    A FileStorage gives out the oids of a crashed transaction again, so they may be its
    orphans. They may also be another database's blobs, or those of a Data.fs in whose place
    a new one was opened: without one key that is surely ours nothing is deleted at all.
    """
    if not doubtful:
        return
    if not kept:
        raise _other_database(doubtful[0])
    if not counts.foreign:
        key = doubtful[0].listed.key
        logger.warning("sweep keeps keys whose oid is no blob here key=%s", key)
    counts.foreign += len(doubtful)


def _other_database(entry: _Entry) -> OtherDatabaseError:
    key = entry.listed.key
    error = OtherDatabaseError(
        f"S3 sweep stopped at {key!r}: this object is no blob here, so the key seems to be another"
        " database's, or this database is not the one that filled the bucket. Nothing was deleted"
        " among these keys. Give each database an s3-prefix or bucket of its own. (If this is the"
        " only blob left, and its object was packed away on a ZEO server, store another one first.)"
    )
    error.operation, error.key, error.oid, error.tid = "sweep", key, entry.oid, entry.time
    return error
