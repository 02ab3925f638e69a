"""The program ``zodb-s3blobs``: reads the configuration, runs a command, tells what came of it."""

import argparse
from collections.abc import Sequence
import importlib
import logging
import os
import sys
from typing import NoReturn

from ..interfaces import S3OperationError
from .configuration import find_database
from .configuration import UsageError
from .running import FINDINGS
from .running import STOPPED
from .running import USAGE
from .running import Work
from .task import Task


# Modules beside this one; each has add_to(commands), which adds its parsers.
COMMANDS = ("doctor", "migrate", "export", "check", "gc", "manifest", "simple", "warm")


def seconds(text: str) -> float:
    """Return a time, given as 90, 90s, 30m or 2h."""
    factor = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        time = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        time = 0.0
    if not 0 < time < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time such as 90s, 30m or 2h, not {text!r}")
    return time


def positive(text: str) -> int:
    """Return a whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, not {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "zodb-s3blobs",
        description="Operates the S3 bucket with the blobs of a ZODB database.",
        epilog="Exit status: 0 all well; 1 something was found, or failed; 2 the command line or"
        " the configuration is wrong; 3 stopped by --time-limit or Ctrl-C, run it again.",
    )
    parser.add_argument(
        "-C",
        "--config",
        metavar="FILE",
        help="zope.conf, zeo.conf or the like; by default etc/zope.conf, else etc/zeo.conf",
    )
    parser.add_argument("--database", metavar="NAME", help="where there are several")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what is logged")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print the result as JSON")
    shared.add_argument("--workers", type=positive, default=32, metavar="N", help="threads (32)")
    shared.add_argument(
        "--time-limit",
        type=seconds,
        metavar="TIME",
        help="stop after this time, such as 2h; the next run goes on there",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __package__)
        module.add_to(commands, shared)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.ERROR,
        format="%(levelname)s %(name)s %(message)s",
    )
    work = Work(options.workers, options.time_limit, sys.stderr.isatty() and not options.json)
    try:
        database = find_database(options.config, options.database)
        with work.interruptible():
            status: int = options.run(Task(database, options, work))
    except UsageError as error:
        print(f"zodb-s3blobs: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        raise
    except (S3OperationError, OSError) as error:
        print(f"zodb-s3blobs: {error}", file=sys.stderr)
        return FINDINGS
    return status


def program() -> NoReturn:
    """Run the command of this process's command line, and end."""
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        # Who reads has had enough; what Python still has for it would make another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FINDINGS)
    except KeyboardInterrupt:
        print("zodb-s3blobs: ended at once; the next run goes on", file=sys.stderr)
        # What its threads do is not waited for.
        os._exit(STOPPED)
