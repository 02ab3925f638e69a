"""Compares database, bucket and cache, names what is wrong, and mends what can be mended."""

import argparse
from collections.abc import Callable
from contextlib import closing
import os
import sqlite3
from typing import Any

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
VERSION = 1
# Seconds after which a stopped check is not gone on with
EXPIRES = 7 * 86400


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
            # Each with all that has been committed and packed meanwhile
            if not all(_run(task, findings, step) for step in (Look.read_all, Look.confirm, _end)):
                task.tell({"stopped": True}, "stopped; run it again, and it goes on there")
                return STOPPED
            tell(task, findings)
            left = findings.count_left()
            findings.remove()
    except sqlite3.OperationalError as error:
        raise UsageError(f"{path}: {error}") from error
    except sqlite3.DatabaseError as error:
        os.remove(path)
        raise UsageError(f"{path} was damaged, and is removed: run it again") from error
    return FINDINGS if left else OK


def _run(task: Task, findings: Findings, step: Callable[[Look], bool]) -> bool:
    with closing(task.database.open_to_read()) as storage:
        return step(Look(task, storage, findings))


def _end(look: Look) -> bool:
    if not look.drop_packed() or not look.mend():
        return False
    look.name()
    return True


def _path(task: Task) -> str:
    """Return where this check keeps how far it is."""
    config, options = task.database.config, task.options
    place = config.s3_endpoint_url, config.bucket_name, config.s3_prefix, config.cache_dir
    state = State("check", VERSION, task.database.name, place, options.depth, options.cache)
    return f"{state.path}.sqlite"
