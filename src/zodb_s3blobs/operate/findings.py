"""What a check suspects and what it has found, in a file, so that a stopped one goes on."""

from collections.abc import Iterator
import json
import sqlite3
import time
from typing import Any
from typing import NamedTuple

from ..interfaces import ListedObject
from .needs import Need
from .needs import Needs
from .objects import FOREIGN
from .objects import IN_SOURCE
from .objects import IN_SPOOL
from .objects import ORPHANED
from .task import Task


# Kinds of suspects: an object that is needed, one that is not, a file of the cache
NEEDED, OTHER, CACHED = "needed", "other", "cached"

COMPLETE = "Complete: all that is needed is there, and nothing is wrong, as far as this looked."

_SCHEMA = """
CREATE TABLE IF NOT EXISTS suspect (
    kind TEXT NOT NULL, key TEXT NOT NULL, oid BLOB NOT NULL, tid BLOB NOT NULL,
    size INTEGER, modified REAL, listed REAL, PRIMARY KEY (kind, key, oid, tid)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS finding (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, key TEXT NOT NULL, oid BLOB, tid BLOB,
    note TEXT NOT NULL, path TEXT, mended TEXT
);
"""


class Finding(NamedTuple):
    """One discrepancy."""

    id: int
    kind: str
    key: str
    oid: bytes | None
    tid: bytes | None
    note: str
    #: of the containing object
    path: str | None
    #: where the bytes were taken from; "" when nobody has them
    mended: str | None

    def told(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "kind": self.kind,
            "oid": None if self.oid is None else f"0x{int.from_bytes(self.oid, 'big'):x}",
            "tid": None if self.tid is None else f"0x{int.from_bytes(self.tid, 'big'):x}",
            "key": self.key,
            "path": self.path or "?",
            "note": self.note,
            "repaired from": self.mended,
        }

    def __str__(self) -> str:
        told = self.told()
        words = [f"{name}={told[name] or '?'}" for name in ("oid", "tid", "key", "path")]
        if self.note:
            words.append(f"({self.note})")
        if self.mended is not None:
            words.append(f"repaired from {self.mended}" if self.mended else "not repaired")
        return f"{self.kind} {' '.join(words)}"


class Findings:
    """One thread may use it; what is not committed the next run does again.

    :param float expires: seconds after which what an earlier run has left is not gone on with.
    """

    def __init__(self, path: str, expires: float) -> None:
        self._open(path)
        if time.time() - self.needs.recall("begun", 0.0) > expires:
            self.clear()

    def _open(self, path: str) -> None:
        self.needs = Needs(path)
        self._database: sqlite3.Connection = self.needs.database
        self._database.executescript(_SCHEMA)

    def clear(self) -> None:
        """Begin anew."""
        self.needs.remove()
        self._open(self.needs.path)
        self.needs.note("begun", time.time())

    def close(self) -> None:
        """Close the file."""
        self.needs.close()

    def remove(self) -> None:
        """Close and remove the file."""
        self.needs.remove()

    def commit(self) -> None:
        """Keep what was added."""
        self._database.commit()

    def rollback(self) -> None:
        """Drop what was added since the last commit."""
        self._database.rollback()

    # How far it is

    @property
    def counts(self) -> dict[str, int]:
        """What was counted, by name."""
        return dict(self.needs.recall("counts", {}))

    def add(self, **counts: int) -> None:
        """Add to what was counted; an underscore stands for a space."""
        found = self.counts
        for name, count in counts.items():
            name = name.replace("_", " ")
            found[name] = found.get(name, 0) + count
        self.needs.note("counts", found)

    def is_past(self, phase: str) -> bool:
        """Tell whether a phase has ended."""
        return bool(self.needs.recall(f"past {phase}"))

    def end(self, phase: str) -> None:
        """Note that a phase has ended."""
        self.needs.note(f"past {phase}", True)
        self.commit()

    # Suspects

    def suspect(self, kind: str, need: Need) -> None:
        """Note what is to be looked at again."""
        self._put(kind, need, (None, None, None))

    def suspect_other(self, listed: ListedObject) -> None:
        """Note an object that nobody seems to need."""
        self._put(OTHER, Need(listed.key, b"", b""), listed[1:])

    def _put(self, kind: str, need: Need, more: Any) -> None:
        self._database.execute(
            "INSERT OR IGNORE INTO suspect VALUES (?, ?, ?, ?, ?, ?, ?)", (kind, *need, *more)
        )

    def suspects(self, kind: str, count: int) -> list[tuple[Need, ListedObject]]:
        """Return some suspects; for those that are needed the second is meaningless."""
        query = "SELECT key, oid, tid, size, modified, listed FROM suspect WHERE kind = ? LIMIT ?"
        rows = self._database.execute(query, (kind, count)).fetchall()
        return [(Need(*row[:3]), ListedObject(row[0], *row[3:])) for row in rows]

    def count_suspects(self) -> int:
        """Return how many there are."""
        ((count,),) = self._database.execute("SELECT count(*) FROM suspect")
        return int(count)

    def settle(self, kind: str, need: Need) -> None:
        """Forget a suspect."""
        where = "WHERE kind = ? AND key = ? AND oid = ? AND tid = ?"
        self._database.execute(f"DELETE FROM suspect {where}", (kind, *need))

    # Findings

    def find(
        self, kind: str, key: str, oid: bytes | None, tid: bytes | None, note: str = ""
    ) -> None:
        """Note a finding."""
        self._database.execute(
            "INSERT INTO finding (kind, key, oid, tid, note) VALUES (?, ?, ?, ?, ?)",
            (kind, key, oid, tid, note),
        )

    def find_suspects(self, kind: str, found: str) -> None:
        """Make findings of all suspects of a kind."""
        self._database.execute(
            "INSERT INTO finding (kind, key, oid, tid, note)"
            " SELECT ?, key, oid, tid, '' FROM suspect WHERE kind = ?",
            (found, kind),
        )

    def found(self, after: int = 0, count: int = -1, where: str = "1") -> Iterator[Finding]:
        """Yield findings in the order in which they were found.

        :param int after: id behind which to begin.
        """
        query = f"SELECT * FROM finding WHERE id > ? AND {where} ORDER BY id LIMIT ?"
        for row in self._database.execute(query, (after, count)):
            yield Finding(*row)

    def unnamed(self, count: int) -> list[bytes]:
        """Return oids of findings without a path."""
        query = "SELECT DISTINCT oid FROM finding WHERE path IS NULL AND oid NOT NULL LIMIT ?"
        return [oid for (oid,) in self._database.execute(query, (count,))]

    def name(self, oid: bytes, path: str) -> None:
        """Note the path of an object."""
        self._database.execute("UPDATE finding SET path = ? WHERE oid = ?", (path, oid))

    def unmended(self, after: int, count: int) -> list[Finding]:
        """Return findings that nobody has tried to mend, and that concern what is needed."""
        where = f"mended IS NULL AND kind NOT IN ('{ORPHANED}', '{FOREIGN}')"
        return [*self.found(after, count, where)]

    def mend(self, finding: Finding, origin: str, note: str) -> None:
        """Note where right bytes came from, "" for nowhere, and why."""
        notes = "; ".join(filter(None, (finding.note, note)))
        query = "UPDATE finding SET mended = ?, note = ? WHERE id = ?"
        self._database.execute(query, (origin, notes, finding.id))

    def drop(self, finding: Finding) -> None:
        """Forget a finding."""
        self._database.execute("DELETE FROM finding WHERE id = ?", (finding.id,))

    def counts_by_kind(self) -> dict[str, int]:
        """Return the numbers of findings."""
        query = "SELECT kind, count(*) FROM finding GROUP BY kind ORDER BY kind"
        return dict(self._database.execute(query).fetchall())

    def count_left(self) -> int:
        """Return the number of what is wrong still; garbage that waits for a sweep is not."""
        wrong = f"coalesce(mended, '') = '' AND kind != '{ORPHANED}'"
        query = f"SELECT count(*) FROM finding WHERE {wrong}"
        ((count,),) = self._database.execute(query)
        return int(count)


def tell(task: Task, findings: Findings) -> None:
    """Print them, one at a time, for there may be a million, and what was counted."""
    counts = {**findings.counts, **findings.counts_by_kind()}
    if not task.options.json:
        for finding in findings.found():
            print(finding)
        task.tell(counts)
        if not findings.count_left():
            waiting = counts.get(IN_SPOOL, 0) + counts.get(IN_SOURCE, 0)
            print(f"{COMPLETE} Not in the bucket yet: {waiting}." if waiting else COMPLETE)
        return
    print('{"findings": [')
    comma = ""
    for finding in findings.found():
        print(f"{comma}{json.dumps(finding.told())}")
        comma = ","
    print(f'], "counts": {json.dumps(counts)}}}')
