"""The way back: all blobs into a blob directory of ZODB, or to keys that other versions know."""

import argparse
from contextlib import closing
import os
from typing import Any

from ZODB.POSException import ReadOnlyError
from ZODB.POSException import Unsupported

from ..directorylock import DirectoryBusy
from .configuration import UsageError
from .exporting import Export
from .exporting import ExportDirectory
from .needs import Needs
from .needs import still_needed
from .running import FINDINGS
from .running import OK
from .running import State
from .running import STOPPED
from .tally import lines
from .tally import Tally
from .task import Task


DESCRIPTION = """\
Copies the blobs of all revisions that the database has into a blob directory, as a FileStorage,
a ZEO server, or RelStorages that share one use it. The site may run; what it stores meanwhile the
next run copies, as each run copies only what is not there yet. Run it as the user of the site, and
for the last time when that is stopped, before it is started without S3.
"""
BY_TID = """\
instead: give every object in the bucket the key that older versions of this package look for, and
take the references out of the records; changes the database, so a site on a FileStorage must be
stopped, and any other at the end
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    export = commands.add_parser(
        "export",
        parents=[shared],
        help="copy all blobs into a blob directory that plain ZODB opens",
        description=DESCRIPTION,
    )
    where = export.add_mutually_exclusive_group(required=True)
    where.add_argument("path", nargs="?", help="a blob directory, or one that is made")
    where.add_argument("--by-tid", action="store_true", help=BY_TID)
    export.set_defaults(run=run)


def run(task: Task) -> int:
    """Copy what is not there yet."""
    return _rewrite(task) if task.options.by_tid else _export(task)


def _rewrite(task: Task) -> int:
    with closing(task.database.open()) as storage:
        try:
            report = storage.rewrite_by_tid(lambda: task.work.is_stopped)
        except (ReadOnlyError, Unsupported) as error:
            raise UsageError(str(error)) from error
    task.tell(vars(report))
    if task.work.is_stopped:
        return STOPPED
    return FINDINGS if report.missing else OK


def _export(task: Task) -> int:
    path = os.path.abspath(task.options.path)
    _check(task.database.config, path)
    try:
        directory = ExportDirectory(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    tally = Tally("revisions", "copied", "gone", "missing", "failed")
    try:
        with directory.held():
            is_done = _export_to(task, directory, tally)
    except DirectoryBusy as error:
        raise UsageError(f"another process exports into {path} at the moment") from error
    except OSError as error:
        raise UsageError(f"{error}; the next run goes on") from error
    finally:
        report = tally.report()
        task.tell(report, "\n".join(lines(report)))
    if not is_done:
        return STOPPED
    return FINDINGS if tally.problems else OK


def _check(config: Any, path: str) -> None:
    """Refuse a directory that is something else for this database."""
    for name in ("cache_dir", "spool_dir", "local_blob_dir"):
        both = [*map(os.path.realpath, filter(None, (path, getattr(config, name))))]
        if len(both) == 2 and os.path.commonpath(both) in both:
            raise UsageError(f"{path} and {name.replace('_', '-')} are not apart from each other")


def _export_to(task: Task, directory: ExportDirectory, tally: Tally) -> bool:
    with closing(task.database.open_to_read()) as storage:
        place = task.database.place(storage)
    state = f"{State('export', place, directory.path).path}.sqlite"
    # What an earlier run has left is ended, and then comes what is new since.
    for _pass in range(1 + os.path.exists(state)):
        needs = Needs(state)
        missing = []
        with closing(needs), closing(task.database.open_to_read()) as storage:
            export = Export(task.work, storage.parts.services, directory, tally)
            if not (needs.read(storage, task.work) and export.copy(needs)):
                return False
            missing = export.missing
            needs.remove()
        if missing:
            # With what was packed meanwhile.
            with closing(task.database.open_to_read()) as storage:
                _tell_missing(storage, missing, tally)
    return True


def _tell_missing(storage: Any, missing: list[Any], tally: Tally) -> None:
    needed = {*still_needed(storage.parts, missing)}
    for need in missing:
        if need in needed:
            tally.counts["missing"] += 1
            tally.note(need.key, "nowhere; see the command check")
        else:
            tally.counts["gone"] += 1
