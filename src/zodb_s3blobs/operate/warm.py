"""Fills the cache with the blobs that were stored last."""

import argparse
from collections.abc import Iterator
from contextlib import closing
import heapq
from itertools import chain
from typing import Any
from typing import NamedTuple

from ZODB.POSException import POSKeyError

from ..keys import parse_key
from ..keys import PREFIX
from .running import FINDINGS
from .running import OK
from .running import STOPPED
from .task import Task


# Blobs that are fetched between two looks at the clock
AT_ONCE = 200


class _Candidate(NamedTuple):
    modified: float
    size: int
    oid: bytes
    name: bytes


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    warm = commands.add_parser(
        "warm", parents=[shared], help="fetch the blobs that were stored last, up to cache-size"
    )
    warm.set_defaults(run=run)


def run(task: Task) -> int:
    """Fetch current revisions, the newest first, as long as they fit."""
    counts = {"fetched": 0, "failed": 0, "bytes": 0}
    with closing(task.database.open_to_read()) as storage:
        services = storage.parts.services
        room = services.cache.max_size
        with task.work.progress("list", unit=" objects") as bar:
            chosen = _newest(services.client, room, bar)
        total = sum(each.size for each in chosen)
        with task.work.progress("fetch", total, "B") as bar:
            for begin in range(0, len(chosen), AT_ONCE):
                if task.work.is_stopped:
                    break
                batch = chosen[begin : begin + AT_ONCE]
                report = storage.prefetch_blobs(_current(storage, batch))
                counts["fetched"] += report.fetched
                counts["failed"] += report.failed
                counts["bytes"] += report.bytes
                bar.update(sum(each.size for each in batch))
    task.tell(counts)
    if task.work.is_stopped:
        return STOPPED
    return FINDINGS if counts["failed"] else OK


def _newest(client: Any, room: int, bar: Any) -> list[_Candidate]:
    """Return the objects that were stored last and fit together, the newest first."""
    kept: list[_Candidate] = []
    total = 0
    # With a directory before the bucket, what is in either
    pages = chain.from_iterable(
        each.list_pages(PREFIX) for each in (client, *getattr(client, "behind", ()))
    )
    for page in pages:
        bar.update(len(page))
        for listed in page:
            parsed = parse_key(listed.key)
            if parsed is None or listed.size > room:
                continue
            heapq.heappush(kept, _Candidate(listed.modified, listed.size, *parsed))
            total += listed.size
            while total > room:
                total -= heapq.heappop(kept).size
    return sorted(kept, reverse=True)


def _current(storage: Any, batch: list[_Candidate]) -> Iterator[tuple[bytes, bytes]]:
    """Yield those that are bytes of a current revision, by oid and serial."""
    for candidate in batch:
        try:
            record, serial = storage.parts.base.storage.load(candidate.oid, "")
        except POSKeyError:
            continue  # garbage
        stamp = storage.parts.read(record).stamp
        if candidate.name in (serial, stamp):
            yield candidate.oid, serial
