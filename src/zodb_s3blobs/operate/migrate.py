"""Brings the blobs of a database into its bucket, from where they were before."""

import argparse
from collections.abc import Iterator
from contextlib import closing
from contextlib import ExitStack
from typing import Any

from ..localbucket import LocalBucket
from .configuration import UsageError
from .migration import Migration
from .origins import BlobDirectory
from .origins import Bucket
from .origins import Origin
from .running import FINDINGS
from .running import OK
from .running import STOPPED
from .tables import Tables
from .tally import lines
from .task import Task


DESCRIPTION = """\
Uploads the blobs that the bucket does not have yet, and then, if that is wanted, compares each
with its object. It is for a site that runs, with the new configuration or still with the old one:
nothing is written but the bucket, and a run that was stopped or killed is continued by the next
one. What the database does not need (any more) is left where it is, and so is what was stored
after this run has begun.
"""


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    migrate = commands.add_parser(
        "migrate",
        parents=[shared],
        help="upload the blobs of a blob directory, a RelStorage or another bucket",
        description=DESCRIPTION,
        epilog="Without --from-… the blobs come from the <blobdir-source> and <bucket-source>"
        " sections and the local-blob-dir of the configuration.",
    )
    places = migrate.add_mutually_exclusive_group()
    places.add_argument(
        "--from-blob-dir",
        metavar="PATH",
        help="a blob directory: of a FileStorage, of a ZEO server, or of RelStorages that share it",
    )
    places.add_argument(
        "--from-relstorage",
        action="store_true",
        help="the tables of the <relstorage> in the configuration",
    )
    migrate.add_argument(
        "--verify",
        action="store_true",
        help="when all are uploaded, compare each with its object by size and SHA-256",
    )
    migrate.add_argument(
        "--remove-local",
        action="store_true",
        help="show how many files were verified in this run, and could be removed",
    )
    migrate.add_argument(
        "--delete",
        action="store_true",
        help="with --remove-local: remove each whose object was read and is the same",
    )
    migrate.set_defaults(run=run)


def run(task: Task) -> int:
    """Upload, and then verify, what each place has."""
    options = task.options
    if options.delete and not options.remove_local:
        raise UsageError("--delete goes with --remove-local")
    if task.database.is_read_only:
        raise UsageError("access to the bucket is read-only: nothing can be brought there")
    try:
        return _migrate(task)
    except OSError as error:
        raise UsageError(f"{error}; the next run goes on") from error


def _migrate(task: Task) -> int:
    options = task.options
    with ExitStack() as opened:
        storage = opened.enter_context(closing(task.database.open_to_read()))
        # Now, as also who only removes files relies on a bucket that is this database's.
        storage.parts.services.client.check_owner(marks=True)
        origins = [opened.enter_context(closing(each)) for each in _origins(task, storage)]
        for origin in origins:
            if options.remove_local and not origin.can_remove:
                raise UsageError(f"--remove-local: nothing is removed from {origin.name}")
        migrations = [Migration(task, storage, origin) for origin in origins]
        try:
            is_complete = all(map(Migration.upload, migrations))
            if is_complete and (options.verify or options.remove_local):
                is_complete = all(map(Migration.verify, migrations))
        finally:
            _tell(task, migrations)
    if not is_complete:
        return STOPPED
    return FINDINGS if any(migration.has_problems for migration in migrations) else OK


def _origins(task: Task, storage: Any) -> Iterator[Origin]:
    config, options = task.database.config, task.options
    temporary_file = storage.parts.services.temporary_file
    if options.from_blob_dir:
        yield _directory(options.from_blob_dir)
        return
    if options.from_relstorage:
        yield Tables(storage.parts.base.storage, temporary_file)
        return
    local = config.local_blob_dir
    if not config.sources and not local:
        raise UsageError(
            "say where the blobs are, --from-blob-dir PATH or --from-relstorage, or name the place"
            " as a <blobdir-source> or <bucket-source> in the configuration"
        )
    if local:
        yield Bucket(LocalBucket(local), local, temporary_file, can_remove=True)
    for source in config.sources:
        if hasattr(source, "path"):
            yield _directory(source.path, source.layout)
        else:
            endpoint, bucket, prefix = source.place
            name = "/".join(filter(None, (endpoint, bucket, prefix)))
            yield Bucket(source.open().client, name, temporary_file)


def _directory(path: str, layout: str = "automatic") -> BlobDirectory:
    try:
        directory = BlobDirectory(path, layout)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if not directory.has_marker and next(directory.blobs(), None) is None:
        raise UsageError(f"there is no blob in {path}: is it mounted?")
    return directory


def _tell(task: Task, migrations: list[Migration]) -> None:
    reports = [migration.report() for migration in migrations]
    text = [line for report in reports for line in lines(report)]
    if task.options.remove_local and not task.options.delete:
        text.append("What was verified can be removed: say --remove-local --delete.")
    if task.options.delete:
        text.append("Each file that was removed was the same, byte for byte, as its object.")
    task.tell({"places": reports}, "\n".join(text))
