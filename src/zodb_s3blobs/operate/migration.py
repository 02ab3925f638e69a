"""What one place has, on its way into a bucket: uploaded, and compared with what arrived."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from itertools import islice
import time
from typing import Any

from ..interfaces import S3OperationError
from ..keys import parse_key
from ..keys import TID_SIZE
from .origins import compared
from .origins import content_of_object
from .origins import Found
from .origins import Origin
from .origins import version_of
from .running import State
from .tally import NAMED
from .tally import Outcome
from .tally import Tally
from .task import Task


# Blobs that the database is asked about at a time
AT_ONCE = 500
# How often a file is uploaded that has changed meanwhile
ATTEMPTS = 3
# Blobs after which it is noted how far the comparison has come, and seconds for which that holds
NOTED, EXPIRES = 1000, 7 * 86400

#: what is counted, besides the bytes of some
UPLOADING = ("found", "present", "uploaded", "newer", "unneeded", "foreign")
RIGHT, WRONG = ("verified", "removed"), ("missing", "different")
BOTH = ("gone", "failed")


class Migration:
    """What one place has, on its way into the bucket.

    :param storage: an open `S3BlobStorage` of the database.
    """

    def __init__(self, task: Task, storage: Any, origin: Origin) -> None:
        self._work = task.work
        self._base, self._read = storage.parts.base, storage.parts.read
        self._client = storage.parts.services.client
        self._origin = origin
        self._removes: bool = task.options.delete
        place = task.database.place(storage)
        self._state = State("migrate --verify", place, origin.name, self._removes)
        self._tally = Tally(*UPLOADING, *BOTH)
        self._counts, self._note = self._tally.counts, self._tally.note
        self._is_at_end = False

    @property
    def has_problems(self) -> bool:
        """Whether anything was found that somebody should look at."""
        return bool(self._tally.problems)

    def report(self) -> dict[str, Any]:
        """Return what came of it so far."""
        report = {"from": self._origin.name, **self._tally.report()}
        if "verified" in report:
            report["verified"] += report["removed"]
        return report

    # Uploading

    def upload(self) -> bool:
        """Upload what the bucket does not have and the database needs.

        :returns: False when that was stopped.
        """
        with self._progress("upload") as bar:
            for _found in self._tally.of(
                self._work.each_as_done(self._missing(bar), self._upload_one)
            ):
                bar.update(1)
        counts = self._counts
        if self._is_at_end and counts["foreign"] and not counts["present"] + counts["uploaded"]:
            problem = "none of its blobs is one of this database: is it the right place?"
            self._note(self._origin.name, problem)
        return self._is_at_end

    def _progress(self, what: str) -> Any:
        total = None
        if self._work.shows:
            with self._work.progress("count") as bar:
                for _found in self._origin.blobs():
                    bar.update(1)
                total = bar.n
        return self._work.progress(what, total)

    def _missing(self, bar: Any) -> Iterator[Found]:
        self._is_at_end = False
        blobs = compared(self._origin.blobs(), self._client)
        while batch := list(islice(blobs, AT_ONCE)):
            missing = []
            for found, listed in batch:
                if listed is None:
                    missing.append(found)
                elif found.size not in (None, listed.size):
                    self._note(found.key, _difference(found.size, listed.size))
            needed = self._needed(missing, self._counts)
            self._counts["found"] += len(batch)
            self._counts["present"] += len(batch) - len(missing)
            bar.update(len(batch) - len(needed))
            yield from needed
        self._is_at_end = True

    def _needed(self, blobs: list[Found], counts: Counter[str]) -> list[Found]:
        """Return those that a revision of the database needs, and count the others."""
        if not blobs or not self._base.tells_garbage:
            return blobs
        needed = []
        by_oid: dict[bytes, dict[bytes, Found]] = {}
        with self._base.snapshot() as snapshot:
            last = snapshot.last_transaction()
            for found in blobs:
                if len(found.name) == TID_SIZE and found.name > last:
                    # Its transaction has perhaps not ended, nor the writing of its file.
                    counts["newer"] += 1
                else:
                    by_oid.setdefault(found.oid, {})[found.name] = found
            for oid, survivors in snapshot.survivors(by_oid, self._read):
                names = survivors.tids | survivors.stamps
                alive = [found for name, found in by_oid[oid].items() if name in names]
                word = "unneeded" if survivors.other_since is None else "foreign"
                counts[word] += len(by_oid[oid]) - len(alive)
                needed += alive
        return needed

    def _upload_one(self, found: Found) -> Outcome:
        try:
            for _attempt in range(ATTEMPTS):
                with self._origin.file(found) as path:
                    before = version_of(path)
                    try:
                        self._client.upload_file(path, found.key)
                    except S3OperationError:
                        if version_of(path) == before:
                            raise
                        continue  # it was changed under its reader
                    if version_of(path) == before:
                        return Outcome("uploaded", before[0])
        except FileNotFoundError:
            if self._origin.has(found):
                raise
            # Packed. Where that was after the upload the next sweep finds the object.
            return Outcome("gone")
        # Nobody knows what was uploaded, and it was not there before.
        self._client.delete_object(found.key)
        return Outcome("failed", 0, "the file changes all the time")

    # Verifying

    def verify(self) -> bool:
        """Compare each blob with its object, and remove it then if that is wanted.

        Goes on where an earlier run was stopped.

        :returns: False when that was stopped.
        """
        after, again = self._recall()
        with self._progress("verify") as bar:
            blobs = chain(again, self._expected(after))
            for number, found in enumerate(
                self._tally.of(self._work.each(blobs, self._verify_one)), 1
            ):
                bar.update(1)
                after = max(after, found.key)
                if not number % NOTED:
                    self._save(after)
        if self._is_at_end:
            self._state.clear()
        else:
            self._save(after)
        return self._is_at_end

    def _recall(self) -> tuple[str, list[Found]]:
        """Return the key up to which an earlier run has come, and what was wrong until there."""
        self._counts.update(dict.fromkeys(RIGHT + WRONG, 0))
        saved = self._state.load()
        if not saved or not 0 <= time.time() - saved["time"] < EXPIRES:
            return "", []
        self._counts.update(saved["counts"])
        parsed = ((key, parse_key(key)) for key in saved["problems"])
        again = [Found(key, *found) for key, found in parsed if found]
        return saved["after"], self._needed(again, Counter())

    def _save(self, after: str) -> None:
        problems = [*self._tally.problems]
        if len(problems) == NAMED:
            return  # there may be more, which would have to be looked at again
        counts = {name: n for name, n in self._counts.items() if name.startswith(RIGHT)}
        now = time.time()
        self._state.save({"after": after, "time": now, "counts": counts, "problems": problems})

    def _expected(self, after: str) -> Iterator[Found]:
        """Yield what must be in the bucket."""
        self._is_at_end = False
        blobs = compared(self._origin.blobs(after), self._client, after)
        while batch := list(islice(blobs, AT_ONCE)):
            missing = [found for found, listed in batch if listed is None]
            needed = {*self._needed(missing, Counter())}
            yield from (found for found, listed in batch if listed or found in needed)
        self._is_at_end = True

    def _verify_one(self, found: Found) -> Outcome:
        try:
            here = self._origin.content(found)
            # Of what is removed here the object has the only bytes then: they are read.
            there = content_of_object(self._client, found.key, reads=self._removes)
            if there is None:
                return Outcome("missing", 0, "it is not in the bucket")
            if here.size != there.size:
                return Outcome("different", 0, _difference(here.size, there.size))
            if here.digest != there.digest:
                problem = f"SHA-256 {there.digest} in the bucket, {here.digest} in this place"
                return Outcome("different", 0, problem)
            if self._removes:
                self._origin.remove(found, here)
                return Outcome("removed", here.size)
        except FileNotFoundError:
            if self._origin.has(found):
                raise
            return Outcome("gone")  # packed
        return Outcome("verified", here.size)


def _difference(here: int | None, there: int) -> str:
    return f"{there} bytes in the bucket, {here} in this place; neither was changed"
