"""Compares database, bucket and cache, names what is wrong, and mends what can be mended."""

import argparse
from collections.abc import Callable
from contextlib import closing
import os
import sqlite3
import sys
from typing import Any

from ZODB.POSException import StorageError
from ZODB.utils import z64

from .configuration import UsageError
from .findings import Findings
from .findings import tell
from .looking import Look
from .objects import DEPTHS
from .running import FINDINGS
from .running import OK
from .running import State
from .running import STOPPED
from .task import Task


# Of the files that stopped checks leave
VERSION = 2
# Seconds after which a stopped check is not gone on with
EXPIRES = 7 * 86400

ANEW = "zodb-s3blobs: the database was restored or packed since a check was stopped: it begins anew"
NOTHING = "zodb-s3blobs: there is no blob at all in this place: check bucket-name and s3-prefix"


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    check = commands.add_parser(
        "check", parents=[shared], help="compare database, bucket and cache, and repair"
    )
    check.add_argument(
        "--depth",
        choices=DEPTHS,
        default="list",
        help="list: what is there (default); head: also sizes and names; read: also all bytes",
    )
    check.add_argument("--cache", action="store_true", help="compare the files of the cache, too")
    check.add_argument(
        "--repair",
        action="store_true",
        help="upload what is missing or damaged again, from wherever its bytes still are",
    )
    check.set_defaults(run=run)


def run(task: Task) -> int:
    """Go through all, look again at what seems wrong, then mend and tell it."""
    if task.options.repair and task.database.is_read_only:
        raise UsageError("access is read-only: nothing in this bucket can be repaired")
    path = _path(task)
    try:
        with closing(Findings(path, EXPIRES)) as findings:
            _begin(task, findings)
            # Each with all that has been committed and packed meanwhile
            if not all(_run(task, findings, step) for step in (Look.read_all, Look.confirm, _end)):
                task.tell({"stopped": True}, "stopped; run it again, and it goes on there")
                return STOPPED
            tell(task, findings)
            left = findings.count_left()
            if not findings.counts.get("objects") and findings.counts.get("revisions"):
                print(NOTHING, file=sys.stderr)
            findings.remove()
    except sqlite3.OperationalError as error:
        raise UsageError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        os.remove(path)
        raise UsageError(f"{path} was damaged, and is removed: run it again") from error
    return FINDINGS if left else OK


def _begin(task: Task, findings: Findings) -> None:
    """Forget what an earlier run has found where the database has not merely gone on since."""
    with closing(task.database.open_to_read()) as storage:
        if not goes_on(storage, bytes.fromhex(findings.needs.recall("last", z64.hex()))):
            print(ANEW, file=sys.stderr)
            findings.clear()
        findings.needs.note("last", storage.lastTransaction().hex())
        findings.commit()


def goes_on(storage: Any, tid: bytes) -> bool:
    """Tell whether a database has a transaction still: one that was restored may have not."""
    if tid in (z64, last := storage.lastTransaction()):
        return True
    base = storage.parts.base
    if tid > last:
        return False
    if not getattr(base.storage, "supportsUndo", bool)():
        return True  # without history it need not be there
    try:
        if hasattr(base, "stored_by"):
            return next(iter(base.stored_by(tid)), None) is not None
        return any(transaction.tid == tid for transaction in base.storage.iterator(tid, tid))
    except StorageError:
        return False  # nobody can tell, as of a ZEO server that does not answer this


def _run(task: Task, findings: Findings, step: Callable[[Look], bool]) -> bool:
    with closing(task.database.open_to_read()) as storage:
        return step(Look(task, storage, findings))


def _end(look: Look) -> bool:
    if not look.drop_packed() or not look.mend():
        return False
    look.name()
    look.tell_owner()
    return True


def _path(task: Task) -> str:
    """Return where this check keeps how far it is."""
    options = task.options
    with closing(task.database.open_to_read()) as storage:
        place = [*task.database.place(storage), task.database.config.cache_dir]
    state = State("check", VERSION, place, options.depth, options.cache)
    return f"{state.path}.sqlite"
