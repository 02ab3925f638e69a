"""Reports what no revision needs, and deletes it: at once, or when no backup needs it any more."""

import argparse
from collections.abc import Collection
from collections.abc import Sequence
from contextlib import closing
from contextlib import ExitStack
import time
from typing import Any

from ..garbage import Course
from ..interfaces import ListedObject
from ..interfaces import S3OperationError
from ..keys import PREFIX
from .configuration import UsageError
from .ledger import Ledger
from .running import FINDINGS
from .running import OK
from .running import State
from .running import STOPPED
from .running import Work
from .task import Task


DAY = 86400
# An upload that nobody goes on with for so long is given up, unless --keep-days says otherwise.
UPLOAD_DAYS = 7

EPILOG = (
    "It counts objects. kept: a revision needs them; in_flight: too young, or of a transaction that"
    " may still run; foreign: no blob of this database; garbage: no revision needs them; held:"
    " garbage that stays, for --keep-days. uploads: in parts, and not finished; old ones are those"
    " that nobody has gone on with for a week, or for --keep-days."
)


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    gc = commands.add_parser(
        "gc", parents=[shared], help="report garbage in the bucket, delete it", epilog=EPILOG
    )
    gc.add_argument("--delete", action="store_true", help="delete it; without this only report")
    gc.add_argument(
        "--keep-days",
        type=days,
        metavar="N",
        help="only what was seen as garbage N days ago, by a run with this option, may go: a"
        " backup of the database that is younger finds its blobs",
    )
    gc.set_defaults(run=run)


def days(text: str) -> int:
    """Return a number of days, from 0 on."""
    if not text.isdecimal() or int(text) > 36500:
        raise argparse.ArgumentTypeError(f"expected a number of days, not {text!r}")
    return int(text)


def run(task: Task) -> int:
    """Sweep, then look for uploads that were given up."""
    options, database = task.options, task.database
    local = database.config.local_blob_dir if database.is_read_only else None
    if database.is_read_only and (options.keep_days is not None or (options.delete and not local)):
        raise UsageError("access is read-only: let the database that owns the bucket do this")
    with ExitStack() as opened:
        storage = opened.enter_context(
            closing(database.open() if options.delete else database.open_to_read())
        )
        if not storage.parts.base.tells_garbage:
            raise UsageError(
                "this storage does not tell what is garbage, as a DemoStorage does not"
            )
        place = database.place(storage)
        state = State("gc", place, options.delete, options.keep_days)
        ledger = None
        if options.keep_days is not None:
            database.ownership(storage).check(storage.parts.services.client, anew=True)
            ledger = opened.enter_context(closing(Ledger(storage.parts.services.client)))
            ledger.read()
        course = _Course(task.work, state, ledger, options.keep_days)
        with task.work.progress("sweep", unit=" objects") as bar:
            course.bar = bar
            try:
                storage.sweep(dry_run=not options.delete, course=course)
                course.end()
            finally:
                # What was seen counts, whatever came next.
                if ledger is not None:
                    ledger.write()
                    course.save()
        result = {"in": local} if local else {}
        result |= course.result()
        if not course.is_stopped:
            result |= _abort_uploads(task, storage.parts.services.client)
    task.tell(result, _text(result, options.delete))
    if course.is_stopped:
        return STOPPED
    return FINDINGS if course.report.failed or result.get("uploads failed") else OK


class _Course(Course):
    """Goes on where the last run was stopped, and keeps what is not garbage for long enough."""

    def __init__(
        self, work: Work, state: State, ledger: Ledger | None, keep_days: int | None
    ) -> None:
        super().__init__()
        self._work = work
        self._state = state
        self._ledger = ledger
        self._keep = (keep_days or 0) * DAY
        self.is_stopped = self._is_done = False
        self.bar: Any = None
        #: objects that stay for now, and their bytes
        self.held = self.held_bytes = 0
        #: when the oldest garbage was uploaded, in seconds since the epoch
        self.oldest: float | None = None
        if isinstance(stopped := state.load(), dict):
            self.after = stopped["after"]
            vars(self.report).update(stopped["report"])
            self.held, self.held_bytes, self.oldest = stopped["held"]
        self._last = self.after

    def choose(self, garbage: Sequence[ListedObject]) -> Collection[str]:
        """Return the keys of what was seen as garbage long ago."""
        for listed in garbage:
            if listed.modified:
                self.oldest = min(self.oldest or listed.modified, listed.modified)
        if self._ledger is None:
            return [listed.key for listed in garbage]
        # Without usable dates nothing has an age.
        ages = self._ledger.see([listed for listed in garbage if listed.listed])
        going = {key for key, age in ages.items() if age >= self._keep}
        staying = [listed for listed in garbage if listed.key not in going]
        self.held += len(staying)
        self.held_bytes += sum(listed.size for listed in staying)
        return going

    def goes_on(self, last: str) -> bool:
        """Save how far it is."""
        self.bar.update(self.report.listed - self.bar.n)
        if self._ledger is not None:
            self._ledger.forget(self._last, last)
        self._last = last
        self.is_stopped = self._work.is_stopped
        if self._ledger is None:
            self.save()
        return not self.is_stopped

    def save(self) -> None:
        """Note how far it is; with a ledger, what was seen until there is written before."""
        if self._is_done:
            self._state.clear()
            return
        held = self.held, self.held_bytes, self.oldest
        self._state.save({"after": self._last, "report": vars(self.report), "held": held})

    def end(self) -> None:
        """Note that all was swept, if it was."""
        if self.is_stopped:
            return
        self._is_done = True
        if self._ledger is not None:
            self._ledger.forget(self._last, None)
        else:
            self.save()

    def result(self) -> dict[str, Any]:
        """Return what came of it."""
        oldest = self.oldest and time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.oldest))
        return {
            **vars(self.report),
            "held": self.held,
            "held bytes": self.held_bytes,
            "oldest": oldest,
            "stopped": self.is_stopped,
        }


def _abort_uploads(task: Task, client: Any) -> dict[str, Any]:
    """Count uploads in parts that nobody goes on with, and remove their parts."""
    if not hasattr(client, "list_uploads"):
        return {}  # of a directory
    options = task.options
    keep = UPLOAD_DAYS if options.keep_days is None else options.keep_days
    # A day at least: a commit that runs has them, too.
    age = max(task.database.config.gc_grace, keep * DAY, DAY)
    counts = {"uploads": 0, "old uploads": 0, "uploads aborted": 0, "uploads failed": 0}
    try:
        for upload in client.list_uploads(PREFIX):
            if task.work.is_stopped:
                break
            counts["uploads"] += 1
            if upload.age >= age:
                counts["old uploads"] += 1
                if options.delete:
                    _abort(client, upload, counts)
    except S3OperationError as error:
        if client.is_down:
            raise
        # Not every server knows this, or allows it.
        return {**counts, "uploads not told": str(error)}
    return counts


def _abort(client: Any, upload: Any, counts: dict[str, int]) -> None:
    try:
        client.abort_upload(upload.key, upload.id)
        counts["uploads aborted"] += 1
    except S3OperationError:
        if client.is_down:
            raise
        counts["uploads failed"] += 1


def _text(result: dict[str, Any], deletes: bool) -> str:
    lines = [f"{name}: {value}" for name, value in result.items()]
    if result["garbage"] - result["held"] and not deletes:
        lines.append("nothing was deleted; say --delete for that")
    if result["held"] and deletes:
        lines.append("what is held was seen as garbage less than --keep-days ago")
    if result["stopped"]:
        lines.append("stopped; run it again, and it goes on there")
    return "\n".join(lines)
