"""What a database needs of its bucket: written to a file, or compared, and nothing downloaded."""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from contextlib import closing
from contextlib import contextmanager
import json
import os
from typing import Any
from typing import NamedTuple
from typing import TextIO

from ZODB.utils import p64
from ZODB.utils import u64

from ..interfaces import ListedObject
from ..keys import blob_key
from ..keys import parse_key
from .configuration import UsageError
from .findings import Findings
from .findings import NEEDED
from .findings import tell
from .needs import Need
from .needs import still_needed
from .objects import difference
from .objects import MISSING
from .objects import Told
from .objects import WRONG_DIGEST
from .objects import WRONG_SIZE
from .running import FINDINGS
from .running import OK
from .running import STOPPED
from .task import Task


NEEDS_AT_ONCE = 500
# Suspects that the bucket does not have
GONE = "gone"

_SCHEMA = """
CREATE TABLE expected (key TEXT PRIMARY KEY, size INTEGER, sha256 TEXT) WITHOUT ROWID
"""


class Expected(NamedTuple):
    """What is known of an object; None where it is not."""

    size: int | None = None
    sha256: str | None = None


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    manifest = commands.add_parser(
        "manifest",
        parents=[shared],
        help="write what a database needs of its bucket, or prove that all of it is there",
    )
    manifest.add_argument("file", nargs="?", metavar="FILE", help="a line of JSON for each blob")
    manifest.add_argument(
        "--compare",
        action="store_true",
        help="compare the bucket with the FILE, or with the database where none is given",
    )
    manifest.add_argument(
        "--head",
        action="store_true",
        help="ask for each object, for its SHA-256 and the size that it was stored with",
    )
    manifest.set_defaults(run=run)


def run(task: Task) -> int:
    """Write a manifest, or compare."""
    options = task.options
    if not options.file and not options.compare:
        raise UsageError("say into which FILE the manifest goes, or --compare")
    with closing(Findings("", 0.0)) as findings:
        findings.needs.database.execute(_SCHEMA)
        manifest = _Manifest(task, findings)
        if options.file and options.compare:
            manifest.read(options.file)
            is_done = manifest.compare(None)
        elif options.compare:
            is_done = manifest.read_database() and manifest.compare(None)
            is_done = is_done and manifest.look_again(None)
        else:
            with _published(options.file) as (file, publish):
                is_done = manifest.read_database() and manifest.compare(file)
                is_done = is_done and manifest.look_again(file)
                if is_done:
                    publish()
        if not is_done:
            task.tell({"stopped": True}, "stopped: nothing was written, and nothing is proved")
            return STOPPED
        tell(task, findings)
        return FINDINGS if findings.count_left() else OK


class _Manifest:
    """What one run knows. One thread may use it."""

    def __init__(self, task: Task, findings: Findings) -> None:
        self._task = task
        self._findings = findings
        self._needs = findings.needs
        self._client = task.database.client()
        self._lines = 0

    # What is needed

    def read_database(self) -> bool:
        """Read what the database needs; False when that was stopped."""
        with closing(self._task.database.open_to_read()) as storage:
            return self._needs.read(storage, self._task.work)

    def read(self, path: str) -> None:
        """Read a manifest.

        :raises UsageError: when it is none, or was cut.
        """
        count, told = 0, None
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    count += 1
                    if told is not None:
                        raise ValueError("it goes on behind its last line")
                    told = self._read_line(json.loads(line))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no manifest, see line {count}: {error}") from error
        if told is None or told != count - 1:
            raise UsageError(f"{path} was cut: its last line does not count the others")
        self._needs.finish()

    def _read_line(self, line: Any) -> int | None:
        """Take in a line; return the number of the others if it is the last one."""
        if "revisions" in line:
            return int(line["revisions"])
        oid, tid = (p64(int(line[name], 16)) for name in ("oid", "tid"))
        key, size, sha256 = line["key"], line["size"], line.get("sha256")
        if (parse_key(key) or (None,))[0] != oid or not isinstance(size, (int, type(None))):
            raise ValueError(f"{key!r} is not the key of {line['oid']}, or has no size")
        if not isinstance(sha256, (str, type(None))):
            raise ValueError(f"{sha256!r} is no SHA-256")
        self._needs.put([(oid, tid, key)])
        insert = "REPLACE INTO expected VALUES (?, ?, ?)"
        self._needs.database.execute(insert, (key, size, sha256))
        return None

    # What is there

    def compare(self, file: TextIO | None) -> bool:
        """Compare all that is needed with what is listed; False when that was stopped.

        :param file: gets a line for what is there.
        """
        work, total, count = self._task.work, self._needs.count(), 0
        with work.progress("bucket", total, " objects") as bar:
            for need, listed, told in self._told():
                bar.update(1)
                if listed is None:
                    self._findings.suspect(NEEDED, need)
                    continue
                count += 1
                self._compare(need, listed, told)
                known = Expected(listed.size, told.digest if told else None)
                self._write(file, need.key, need, known)
        self._findings.add(objects=count, revisions=total)
        if self._task.options.file and self._task.options.compare:
            # Nobody but the file can be asked again.
            self._findings.find_suspects(NEEDED, MISSING)
        return not work.is_stopped

    def _told(self) -> Iterator[tuple[Need, ListedObject | None, Told | None]]:
        """Yield what is needed, what is listed, and what the object says of itself."""
        if self._task.options.head:
            for (need, listed), future in self._task.work.each(self._items(), self._head):
                yield need, listed, future.result()
            return
        for need, listed in self._items():
            if self._task.work.is_stopped:
                return
            yield need, listed, None

    def _items(self) -> Iterator[tuple[Need, ListedObject | None]]:
        for part in self._needs.compare(self._client):
            yield from part.present
            for need in part.missing:
                yield need, None

    def _head(self, item: tuple[Need, ListedObject | None]) -> Told | None:
        need, listed = item
        if listed is None:
            return None
        head = self._client.head_object(need.key)
        return head and Told.by(head)

    def _compare(self, need: Need, listed: ListedObject, told: Told | None) -> None:
        query = "SELECT size, sha256 FROM expected WHERE key = ?"
        row = self._needs.database.execute(query, (need.key,)).fetchone()
        expected = Expected(*row) if row else Expected()
        if told is not None and (found := difference(need, told)):
            self._findings.find(found[0], *need, found[1])
        elif expected.size not in (None, listed.size):
            note = f"{listed.size} bytes, {expected.size} in the manifest"
            self._findings.find(WRONG_SIZE, *need, note)
        elif told and expected.sha256 and told.digest not in (None, expected.sha256):
            self._findings.find(WRONG_DIGEST, *need, "another SHA-256 than in the manifest")

    def look_again(self, file: TextIO | None) -> bool:
        """See whether what is missing has another key, or was packed meanwhile."""
        if not self._ask_bucket(file) or not self._ask_database(file):
            return False
        if file is not None:
            file.write(json.dumps({"revisions": self._lines}) + "\n")
        return True

    def _ask_bucket(self, file: TextIO | None) -> bool:
        work, findings = self._task.work, self._findings
        while some := findings.suspects(NEEDED, NEEDS_AT_ONCE):
            for need, future in work.each([need for need, _listed in some], self._find):
                key, size = future.result()
                findings.settle(NEEDED, need)
                if size is None:
                    findings.suspect(GONE, need)
                else:
                    self._write(file, key, need, Expected(size))
            if work.is_stopped:
                return False
        return True

    def _ask_database(self, file: TextIO | None) -> bool:
        findings = self._findings
        if not findings.count_suspects():
            return True
        # Opened after the bucket was asked: what it needs now it has needed all the time.
        with closing(self._task.database.open_to_read()) as storage:
            while some := findings.suspects(GONE, NEEDS_AT_ONCE):
                needs = [need for need, _listed in some]
                for need in still_needed(storage.parts, needs):
                    findings.find(MISSING, *need)
                    self._write(file, need.key, need, Expected())
                for need in needs:
                    findings.settle(GONE, need)
                if self._task.work.is_stopped:
                    return False
        return True

    def _find(self, need: Need) -> tuple[str, int | None]:
        """Return the key and the size of what is there by now."""
        # A database that has moved between bases has by tid what its records refer to.
        for key in (need.key, blob_key(need.oid, need.tid)):
            head = self._client.head_object(key)
            if head is not None:
                return key, int(head["ContentLength"])
        return need.key, None

    # What is written

    def _write(self, file: TextIO | None, key: str, need: Need, known: Expected) -> None:
        if file is None:
            return
        for tid in self._needs.tids_of(need.key):
            line: dict[str, Any] = {
                "oid": f"0x{u64(need.oid):x}",
                "tid": f"0x{u64(tid):x}",
                "key": key,
            }
            line |= {"size": known.size}
            if known.sha256:
                line |= {"sha256": known.sha256}
            file.write(json.dumps(line) + "\n")
            self._lines += 1


@contextmanager
def _published(path: str) -> Iterator[tuple[TextIO, Callable[[], None]]]:
    """Give a file, and what gives it its name when it is complete."""
    temporary = f"{path}-{os.getpid()}.tmp"
    try:
        file = open(temporary, "w", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error

    def publish() -> None:
        file.flush()
        os.fsync(file.fileno())
        os.replace(temporary, path)

    try:
        with file:
            yield file, publish
    finally:
        if os.path.lexists(temporary):
            os.remove(temporary)
