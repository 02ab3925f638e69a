"""Which revisions of blobs a database has, in a file, sorted by their keys."""

from collections.abc import Iterable
from collections.abc import Iterator
from itertools import islice
import json
import os
import sqlite3
from typing import Any
from typing import NamedTuple

from ..interfaces import ListedObject
from ..interfaces import PermanentS3Error
from ..keys import blob_key
from ..keys import parse_key
from ..keys import PREFIX
from ..keys import TID_SIZE
from .configuration import UsageError
from .running import Work


# Records between two looks at the disk
RECORDS_AT_ONCE = 5000
NEEDS_AT_ONCE = 1000

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS revision (
    oid BLOB NOT NULL, tid BLOB NOT NULL, key TEXT NOT NULL, PRIMARY KEY (oid, tid)
) WITHOUT ROWID;
"""


class Need(NamedTuple):
    """A key that a revision needs; of several with the same one the newest."""

    key: str
    oid: bytes
    tid: bytes

    @property
    def stamp(self) -> bytes | None:
        """What the revision's record refers to."""
        parsed = parse_key(self.key)
        return parsed[1] if parsed and len(parsed[1]) != TID_SIZE else None


class Part(NamedTuple):
    """What comes next of the comparison of a database with a bucket."""

    #: the key up to which this is
    last: str
    present: list[tuple[Need, ListedObject]]
    missing: list[Need]
    #: objects that no revision needs
    others: list[ListedObject]


class Needs:
    """Revisions of blobs, 120 to 200 bytes on disk each, and nothing in memory.

    One thread may use it.

    :param str path: of a file that goes on where an earlier run was stopped; "" is one for this
        run alone.
    :raises UsageError: when another process has the file.
    """

    def __init__(self, path: str = "") -> None:
        self.path = path
        try:
            if path:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        except OSError as error:
            raise UsageError(f"set XDG_STATE_HOME to where files can be kept: {error}") from error
        self.database = sqlite3.connect(path, timeout=0)
        # Whoever is killed begins anew at worst.
        for pragma in ("locking_mode=EXCLUSIVE", "synchronous=OFF", "journal_mode=TRUNCATE"):
            self._execute(f"PRAGMA {pragma}")
        self._execute("BEGIN IMMEDIATE")
        self.database.commit()
        self.database.executescript(_SCHEMA)

    def _execute(self, statement: str) -> None:
        try:
            self.database.execute(statement)
        except sqlite3.OperationalError as error:
            raise UsageError(
                f"another process does that already, or {error}: {self.path}"
            ) from error

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    def remove(self) -> None:
        """Close and remove the file: the next run begins anew."""
        self.close()
        for path in (f"{self.path}-journal", self.path) if self.path else ():
            if os.path.lexists(path):
                os.remove(path)

    def recall(self, name: str, default: Any = None) -> Any:
        """Return what was noted under a name."""
        row = self.database.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else default

    def note(self, name: str, value: Any) -> None:
        """Note a value for a later run, with the next commit."""
        self.database.execute("REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    # Filling

    def read(self, storage: Any, work: Work) -> bool:
        """Read the records of a database; False when that was stopped, and goes on next time."""
        if self.recall("is complete"):
            return True
        begin = bytes.fromhex(self.recall("position", ""))
        base, read = storage.parts.base, storage.parts.read
        rows: list[tuple[bytes, bytes, str]] = []
        looked_at = 0
        with work.progress("database", unit=" records") as bar, base.snapshot() as snapshot:
            for position, records in snapshot.records(begin):
                for record in records:
                    reading = read(record.data)
                    if reading.is_blob:
                        key = blob_key(record.oid, reading.stamp or record.tid)
                        rows.append((record.oid, record.tid, key))
                looked_at += max(1, len(records))
                if looked_at >= RECORDS_AT_ONCE or work.is_stopped:
                    bar.update(looked_at)
                    looked_at = 0
                    self._put(rows, position)
                    rows = []
                if work.is_stopped:
                    return False
        self.put(rows)
        self.finish()
        return True

    def _put(self, rows: list[tuple[bytes, bytes, str]], position: bytes) -> None:
        self.put(rows)
        self.note("position", position.hex())
        self.database.commit()

    def put(self, rows: Iterable[tuple[bytes, bytes, str]]) -> None:
        """Take in revisions, by oid, tid and key."""
        self.database.executemany("REPLACE INTO revision VALUES (?, ?, ?)", rows)

    def finish(self) -> None:
        """Note that all were taken in."""
        self.database.execute("CREATE INDEX IF NOT EXISTS by_key ON revision (key)")
        self.note("is complete", True)
        self.database.commit()

    # Asking

    def count(self) -> int:
        """Return the number of revisions."""
        ((count,),) = self.database.execute("SELECT count(*) FROM revision")
        return int(count)

    def key_of(self, oid: bytes, tid: bytes) -> str | None:
        """Return the key that a revision needs, None when it is none of a blob."""
        query = "SELECT key FROM revision WHERE oid = ? AND tid = ?"
        row = self.database.execute(query, (oid, tid)).fetchone()
        return row[0] if row else None

    def tids_of(self, key: str) -> list[bytes]:
        """Return the revisions that need a key, the newest first."""
        query = "SELECT tid FROM revision WHERE key = ? ORDER BY tid DESC"
        return [tid for (tid,) in self.database.execute(query, (key,))]

    def keys(self, after: str = "") -> Iterator[Need]:
        """Yield what is needed, sorted by key, from behind a key on."""
        query = (
            "SELECT key, oid, max(tid) FROM revision WHERE key > ? GROUP BY key ORDER BY key"
            f" LIMIT {NEEDS_AT_ONCE}"
        )
        while rows := self.database.execute(query, (after,)).fetchall():
            for row in rows:
                yield Need(*row)
            after = rows[-1][0]

    def revisions(self) -> Iterator[list[Need]]:
        """Yield all revisions, some at a time, in the order of their oids and tids."""
        query = (
            "SELECT key, oid, tid FROM revision WHERE (oid, tid) > (?, ?) ORDER BY oid, tid"
            f" LIMIT {NEEDS_AT_ONCE}"
        )
        last = b"", b""
        while rows := self.database.execute(query, last).fetchall():
            yield [Need(*row) for row in rows]
            last = rows[-1][1:]

    def compare(self, client: Any, after: str = "", size: int = 0) -> Iterator[Part]:
        """Yield how what is needed and what a bucket lists differ, from behind a key on.

        :param int size: objects in one part; by default as many as the server lists at a time.
        :raises PermanentS3Error: when the listing is not sorted.
        """
        needs = self.keys(after)
        need, last = next(needs, None), after
        for page in client.list_pages(PREFIX, after):
            step = size or len(page)
            for begin in range(0, len(page), step):
                objects = page[begin : begin + step]
                _check_order(objects, after)
                after = objects[-1].key
                part = Part(after, [], [], [])
                for listed in objects:
                    while need is not None and need.key < listed.key:
                        if len(part.missing) == NEEDS_AT_ONCE:
                            yield part._replace(last=last)
                            part = Part(after, [], [], [])
                        part.missing.append(need)
                        last, need = need.key, next(needs, None)
                    last = listed.key
                    if need is not None and need.key == listed.key:
                        part.present.append((need, listed))
                        need = next(needs, None)
                    else:
                        part.others.append(listed)
                yield part
        while need is not None:
            missing = [need, *islice(needs, NEEDS_AT_ONCE - 1)]
            yield Part(missing[-1].key, [], missing, [])
            need = next(needs, None)


def still_needed(parts: Any, needs: list[Need]) -> list[Need]:
    """Return those that the database needs by now; others were packed away."""
    with parts.base.snapshot() as snapshot:
        revisions = dict(snapshot.revisions({need.oid for need in needs}))
    found = []
    for need in needs:
        record = revisions[need.oid].get(need.tid)
        reading = parts.read(record) if record else None
        if reading and reading.is_blob:
            key = blob_key(need.oid, reading.stamp or need.tid)
            found += [need] if key == need.key else []
    return found


def _check_order(objects: list[ListedObject], after: str) -> None:
    for listed in objects:
        if listed.key <= after:
            raise PermanentS3Error(
                f"S3 lists {listed.key!r} behind {after!r}: the listing is not sorted, or the"
                " server does not know StartAfter"
            )
        after = listed.key
