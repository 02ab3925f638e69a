"""Commands that ask a storage one thing: stats, spool, own, presign."""

import argparse
from contextlib import closing
import struct
from typing import Any

from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64

from ..interfaces import OtherDatabaseError
from ..interfaces import ReadOnlyBucketError
from ..ownership import MARKER
from ..ownership import read_mark
from .configuration import UsageError
from .running import FINDINGS
from .running import OK
from .task import Task


SPOOL = ("spool_blobs", "spool_bytes", "spool_age_seconds")


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parsers of these commands."""
    stats = commands.add_parser("stats", parents=[shared], help="show cache and spool in numbers")
    stats.set_defaults(run=show_stats)
    spool = commands.add_parser("spool", parents=[shared], help="show the spool, or upload it")
    spool.add_argument("--drain", action="store_true", help="upload what is there")
    spool.set_defaults(run=show_spool)
    own = commands.add_parser(
        "own", parents=[shared], help="show whose the bucket is, or make it this database's"
    )
    own.add_argument("--take", action="store_true", help="make it this database's")
    own.set_defaults(run=show_owner)
    presign = commands.add_parser("presign", parents=[shared], help="print a URL of a blob")
    presign.add_argument("oid", type=oid_of, help="such as 0x1f")
    presign.add_argument("--expires", type=int, default=3600, metavar="SECONDS")
    presign.set_defaults(run=presign_blob)


def oid_of(text: str) -> bytes:
    """Return an oid, given as 0x and hexadecimal digits."""
    try:
        # Without 0x it might be a decimal number, and the URL one of another blob.
        return p64(int(text if text[:2] == "0x" else "", 16))
    except (ValueError, struct.error):
        raise argparse.ArgumentTypeError(f"expected an oid such as 0x1f, not {text!r}") from None


def show_stats(task: Task) -> int:
    """Print the numbers that need no site: those of the cache and the spool."""
    with closing(task.database.open_to_read()) as storage:
        numbers = storage.stats()
    names = [name for name in numbers if name.startswith(("cache_", "spool_"))]
    task.tell({name: numbers[name] for name in names if not name.endswith("_total")})
    return OK


def show_spool(task: Task) -> int:
    """Print what is in the spool, and upload it first if that is wanted."""
    if not task.database.config.spool_dir:
        raise UsageError(f"the database {task.database.name} has no spool-dir")
    result: dict[str, Any] = {}
    with closing(task.database.open_to_read()) as storage:
        if task.options.drain:
            result.update(vars(storage.drain_spool()))
        numbers = storage.stats()
    result |= {name: numbers[name] for name in SPOOL}
    task.tell(result)
    # What is lost is told this once.
    is_well = numbers["spool_blobs"] == 0 and not result.get("lost")
    return OK if is_well else FINDINGS


def show_owner(task: Task) -> int:
    """Print whose the bucket is, and make it this database's first if that is wanted."""
    if task.options.take and task.database.is_read_only:
        raise UsageError("access is read-only: a copy does not take the bucket from its owner")
    with closing(task.database.open_to_read()) as storage:
        ownership = task.database.ownership(storage)
        client = task.database.client(read_only=not task.options.take)
        if task.options.take:
            try:
                ownership.take(client)
            except ValueError as error:
                raise UsageError(str(error)) from error
        found = client.read_small(MARKER)
        name = read_mark(found)[1] if found else None
        is_ours = True
        try:
            ownership.check(client)
        except OtherDatabaseError:
            is_ours = False
        except ReadOnlyBucketError:
            pass  # nobody's yet
    task.tell({"owner": name, "is this one": is_ours})
    return OK if is_ours else FINDINGS


def presign_blob(task: Task) -> int:
    """Print a URL by which anybody can read a blob for a while."""
    oid = task.options.oid
    with closing(task.database.open_to_read()) as storage:
        try:
            _record, serial = storage.parts.base.storage.load(oid, "")
            url = storage.presigned_url(oid, serial, task.options.expires)
        except POSKeyError as error:
            raise UsageError(f"there is no blob 0x{u64(oid):x}") from error
        except ValueError as error:
            raise UsageError(str(error)) from error
    if url is None:
        raise UsageError(
            f"the bucket cannot deliver blob 0x{u64(oid):x}: it has none (perhaps a source has it,"
            " until migrate has run), or reading takes a key of ours (SSE-C)"
        )
    task.tell({"url": url}, url)
    return OK
