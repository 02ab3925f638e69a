"""The steps of a check: what seems wrong, whether it is, where it belongs, and how it is mended."""

from collections.abc import Iterator
from contextlib import closing
import os
from typing import Any

from ..cachefiles import CacheFiles
from ..garbage import Verdict
from ..interfaces import ListedObject
from ..keys import parse_key
from ..keys import TID_SIZE
from ..ownership import MARKER
from .containers import Containers
from .findings import CACHED
from .findings import Finding
from .findings import Findings
from .findings import NEEDED
from .findings import OTHER
from .needs import Need
from .needs import Part
from .needs import still_needed
from .objects import DAMAGED_IN_CACHE
from .objects import Examiner
from .objects import FOREIGN
from .objects import IN_SOURCE
from .objects import IN_SPOOL
from .objects import ORPHANED
from .repairing import Repairer
from .task import Task


# Objects that a stopped check looks at once more, at worst
OBJECTS_AT_ONCE = 100
# Suspects that the base is asked about at a time
SUSPECTS_AT_ONCE = 500
# Objects whose path is looked for
NAMED = 10_000


class Look:
    """One view of the database, beside the bucket and the cache. One thread may use it."""

    def __init__(self, task: Task, storage: Any, findings: Findings) -> None:
        self._work = task.work
        self._storage = storage
        self._parts = storage.parts
        self._services = storage.parts.services
        self._findings = findings
        self._needs = findings.needs
        self._cache_dir = task.database.config.cache_dir
        self._grace = task.database.config.gc_grace
        self._depth = task.options.depth
        self._repairs = task.options.repair
        self._with_cache = task.options.cache or self._depth == "read"
        self._examiner = Examiner(self._services, self._depth)
        self._bucket = self._services.client
        # What a DemoStorage does not show the database below it may need.
        self._tells_garbage = self._parts.base.tells_garbage
        # What a copy does not need the original may.
        self._is_others = False
        if task.database.is_read_only:
            self._bucket, self._tells_garbage = task.database.client(), False
        elif task.database.ownership(storage).is_others(self._bucket):
            self._is_others, self._tells_garbage = True, False

    # What seems wrong

    def read_all(self) -> bool:
        """Collect what seems wrong; False when that was stopped."""
        if not self._needs.read(self._storage, self._work):
            return False
        if not self._findings.is_past("bucket"):
            if not self._compare_bucket():
                return False
            self._findings.add(revisions=self._needs.count())
            self._findings.end("bucket")
        if self._with_cache and not self._findings.is_past("cache"):
            if not self._compare_cache():
                return False
            self._findings.end("cache")
        return True

    def _compare_bucket(self) -> bool:
        after, compare = self._needs.recall("after", ""), self._compare_objects
        if self._depth == "list":
            compare = self._compare_listing
        with self._work.progress("bucket", self._needs.count(), " objects") as bar:
            return compare(after, bar)

    def _compare_listing(self, after: str, bar: Any) -> bool:
        for part in self._needs.compare(self._bucket, after):
            for need, listed in part.present:
                if not self._examiner.seems_right(need, listed):
                    self._findings.suspect(NEEDED, need)
            self._finish(part, bar)
            if self._work.is_stopped:
                return False
        return True

    def _compare_objects(self, after: str, bar: Any) -> bool:
        for (need, item), future in self._work.each(self._items(after), self._is_right):
            if need is None:
                self._finish(item, bar)
            elif not future.result():
                self._findings.suspect(NEEDED, need)
        # What belongs to a part that was not finished is looked at again.
        self._findings.rollback()
        return not self._work.is_stopped

    def _items(self, after: str) -> Iterator[tuple[Need | None, Any]]:
        """Yield objects that are needed, and after them the part that they are of."""
        for part in self._needs.compare(self._bucket, after, OBJECTS_AT_ONCE):
            yield from part.present
            yield None, part

    def _is_right(self, item: tuple[Need | None, Any]) -> bool:
        need, listed = item
        return need is None or self._examiner.seems_right(need, listed)

    def _finish(self, part: Part, bar: Any) -> None:
        for need in part.missing:
            self._findings.suspect(NEEDED, need)
        for listed, _kind in self._judge(part.others):
            self._findings.suspect_other(listed)
        counts = {"objects": len(part.present) + len(part.others), "not needed": len(part.others)}
        self._findings.add(**counts)
        self._needs.note("after", part.last)
        self._findings.commit()
        bar.update(len(part.present) + len(part.missing))

    def _judge(self, others: list[ListedObject]) -> Iterator[tuple[ListedObject, str]]:
        """Yield what is garbage, and has been for a while, or not this database's."""
        if not others or not self._tells_garbage:
            return
        for listed, verdict in self._parts.sweeper.judge(others):
            if verdict is Verdict.GARBAGE:
                if listed.age >= self._grace:
                    yield listed, ORPHANED
            elif verdict not in (Verdict.KEPT, Verdict.IN_FLIGHT):
                yield listed, FOREIGN

    def _compare_cache(self) -> bool:
        count = 0
        with self._work.progress("cache", unit=" files") as bar:
            files = self._work.each(self._cached(), self._examiner.is_right_in_cache)
            for need, future in files:
                count += 1
                bar.update(1)
                if not future.result():
                    self._findings.suspect(CACHED, need)
        self._findings.add(cached_files=count)
        if self._work.is_stopped:
            self._findings.rollback()
        return not self._work.is_stopped

    def _cached(self) -> Iterator[Need]:
        """Yield what revisions need whose files are in the cache."""
        files = CacheFiles(os.path.abspath(self._cache_dir))
        for directory in sorted(files.directories()):
            for name in files.listing(directory):
                oid, tid = map(bytes.fromhex, name.removeprefix(f"{directory}/").split("."))
                if (key := self._needs.key_of(oid, tid)) is not None:
                    yield Need(key, oid, tid)

    # Whether it is

    def confirm(self) -> bool:
        """Look again at what seems wrong, by now; False when that was stopped."""
        with self._work.progress("look again", self._findings.count_suspects()) as bar:
            for kind, look in (
                (NEEDED, self._confirm_needed),
                (CACHED, self._confirm_cached),
                (OTHER, self._confirm_others),
            ):
                while some := self._findings.suspects(kind, SUSPECTS_AT_ONCE):
                    look(some)
                    if self._work.is_stopped:
                        self._findings.rollback()
                        return False
                    for need, _listed in some:
                        self._findings.settle(kind, need)
                    self._findings.commit()
                    bar.update(len(some))
        return True

    def _confirm_needed(self, some: list[tuple[Need, ListedObject]]) -> None:
        for need, future in self._work.each(self._still_needed(some), self._examiner.examine):
            kind, note = future.result() or ("", "")
            if kind in (IN_SPOOL, IN_SOURCE):
                self._findings.add(**{kind: 1})
            elif kind:
                self._findings.find(kind, *need, note)

    def _confirm_cached(self, some: list[tuple[Need, ListedObject]]) -> None:
        needs = self._still_needed(some)
        for need, future in self._work.each(needs, self._examiner.is_right_in_cache):
            if not future.result():
                self._findings.find(DAMAGED_IN_CACHE, *need)

    def _still_needed(self, some: list[tuple[Need, ListedObject]]) -> list[Need]:
        return still_needed(self._parts, [need for need, _listed in some])

    def _confirm_others(self, some: list[tuple[Need, ListedObject]]) -> None:
        judged = self._judge([listed for _need, listed in some])
        for (listed, kind), future in self._work.each(judged, self._is_there):
            if future.result():
                oid, name = parse_key(listed.key) or (None, b"")
                tid = name if len(name) == TID_SIZE else None
                self._findings.find(kind, listed.key, oid, tid)

    def _is_there(self, judged: tuple[ListedObject, str]) -> bool:
        return self._bucket.head_object(judged[0].key) is not None

    def drop_packed(self) -> bool:
        """Drop findings of revisions that were packed away before their object was looked at.

        Only a base that is asked after the bucket can tell. False when that was stopped.
        """
        after = self._needs.recall("asked", 0)
        while some := self._findings.unmended(after, SUSPECTS_AT_ONCE):
            needs = [self._to_mend(finding)[1] for finding in some]
            needed = {*still_needed(self._parts, needs)}
            for finding, need in zip(some, needs, strict=True):
                if need not in needed:
                    self._findings.drop(finding)
            after = some[-1].id
            self._needs.note("asked", after)
            self._findings.commit()
            if self._work.is_stopped:
                return False
        return True

    # Where it belongs

    def name(self) -> None:
        """Find the paths of the objects, unless there is no time for that."""
        with closing(Containers(self._storage)) as containers:
            oids = [*filter(containers.exists, self._findings.unnamed(NAMED))]
            if oids and containers.read(self._work):
                for oid in oids:
                    self._findings.name(oid, containers.path(oid) or "?")
        self._findings.commit()

    def tell_owner(self) -> None:
        """Make it a finding that the bucket is another database's."""
        if self._is_others:
            note = "it says that the bucket is another database's: see zodb-s3blobs own"
            self._findings.find(FOREIGN, MARKER, None, None, note)
            self._findings.commit()

    # How it is mended

    def mend(self) -> bool:
        """Bring back right bytes, if that is wanted; False when that was stopped."""
        if not self._repairs:
            return True
        repairer, after = Repairer(self._services), 0

        def mend(item: tuple[Finding, Need, list[bytes]]) -> tuple[str, str]:
            finding, need, tids = item
            origin, note = repairer.mend(finding.kind, need, tids)
            if origin and self._examiner.examine(need) is not None:
                return "", f"what came from {origin} did not help"
            return origin, note

        while some := self._findings.unmended(after, SUSPECTS_AT_ONCE):
            items = [self._to_mend(finding) for finding in some]
            for (finding, _need, _tids), future in self._work.each(items, mend):
                origin, note = future.result()
                self._findings.mend(finding, origin, note)
                self._findings.add(repaired=1 if origin else 0)
                self._findings.commit()
            if self._work.is_stopped:
                return False
            after = some[-1].id
        return True

    def _to_mend(self, finding: Finding) -> tuple[Finding, Need, list[bytes]]:
        need = Need(finding.key, finding.oid or b"", finding.tid or b"")
        return finding, need, self._needs.tids_of(finding.key)
