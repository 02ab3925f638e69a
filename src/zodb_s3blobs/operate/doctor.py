"""Probes the configured server in a scratch prefix, and tells what works and what to set."""

import argparse
from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterator
from contextlib import closing
from functools import partial
import json
import os
import textwrap
from typing import Any

from ..interfaces import OtherDatabaseError
from ..interfaces import S3OperationError
from ..ownership import MARKER
from ..s3probe import S3Probe
from .configuration import UsageError
from .handling import Handling
from .policy import minimal_policy
from .probing import FAILED
from .probing import Finding
from .probing import LACKS
from .probing import of_error
from .probing import OK as WORKS
from .probing import Probe
from .probing import SKIPPED
from .probing import Subject
from .reaching import Reaching
from .running import FINDINGS
from .running import OK
from .running import STOPPED
from .task import Task


INDENT = " " * 31
# Probes without which those that follow cannot succeed
GATES = {"name", "connection", "TLS", "answer", "clock", "credentials", "region", "bucket", "put"}


def add_to(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the parser of this command."""
    doctor = commands.add_parser(
        "doctor", parents=[shared], help="probe the server, and tell what to set in zope.conf"
    )
    doctor.set_defaults(run=run)


def run(task: Task) -> int:
    """Probe one thing after the other, remove what that has made, and print the policy."""
    config = task.database.config
    is_read_only = task.database.is_read_only
    client = task.database.client(is_read_only, S3Probe)
    subject = Subject(client, config, f"doctor-{os.urandom(8).hex()}/")
    found: dict[str, Finding] = {}
    try:
        with closing(_examine(task, subject)) as examination:
            for name, finding in examination:
                found[name] = finding
                if not task.options.json:
                    print(_lines(name, finding), flush=True)
    finally:
        client.close()
    policy = minimal_policy(
        config.bucket_name,
        config.s3_prefix,
        is_read_only=is_read_only,
        creates_bucket=config.s3_create_bucket,
        kms_key=(config.s3_sse_kms_key_id or "") if config.s3_sse == "aws:kms" else None,
        region=config.s3_region,
    )
    result = {
        "bucket": config.bucket_name,
        "prefix": config.s3_prefix,
        "endpoint": config.s3_endpoint_url or "AWS",
        "access": "read-only" if is_read_only else "read-write",
        "probes": {name: finding._asdict() for name, finding in found.items()},
        "policy": policy,
    }
    task.tell(result, f"\nThe minimal IAM policy:\n\n{json.dumps(policy, indent=2)}")
    if task.work.is_stopped:
        return STOPPED
    return FINDINGS if any(each.state == FAILED for each in found.values()) else OK


def _examine(task: Task, subject: Subject) -> Generator[tuple[str, Finding], None, None]:
    """Yield the findings; in the end, however it comes, what was made is removed."""
    reason = ""
    try:
        for name, probe in _probes(task, subject):
            if task.work.is_stopped:
                reason = "stopped"
            finding = Finding(SKIPPED, reason) if reason else _ask(probe)
            yield name, finding
            if not reason and finding.state == FAILED and name in GATES:
                reason = f"{name} must work first"
    finally:
        # Also when Ctrl-C was pressed twice.
        left = _clean(subject)
    if left is not None:
        yield "clean", left


def _probes(task: Task, subject: Subject) -> Iterator[Probe]:
    """Yield the probes; which of them come later depends on what was found before."""
    try:
        yield from Reaching(subject).probes()
    except S3OperationError as error:
        about = "region" if "s3-region" in str(error) else "credentials"
        yield about, partial(of_error, error)
    yield "owner", partial(_find_owner, task, subject)
    yield from Handling(subject).probes()


def _find_owner(task: Task, subject: Subject) -> Finding:
    """See whose the bucket is, and write nothing where it is another database's."""
    if subject.client.read_small(MARKER) is None:
        return Finding(WORKS, "the bucket is nobody's so far: the first write marks it")
    if not subject.may_write:
        return Finding(WORKS, "the bucket is marked, and access is read-only")
    subject.may_write = False
    try:
        with closing(task.database.open_to_read()) as storage:
            task.database.ownership(storage).check(subject.client)
    except OtherDatabaseError as error:
        return Finding(FAILED, str(error))
    except UsageError as error:
        meaning = f"the bucket is marked, and not known to be this database's: {error}"
        return Finding(LACKS, meaning, "try again when the database can be opened")
    subject.may_write = True
    return Finding(WORKS, "the bucket is marked as this database's")


def _ask(probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except (S3OperationError, OSError) as error:
        return of_error(error)


def _clean(subject: Subject) -> Finding | None:
    """Remove what was made; return None where that was nothing."""
    client = subject.client
    if not subject.keys and not client.unfinished:
        return None
    left: list[str] = []
    removals = [partial(client.abort_parts, key) for key in client.unfinished]
    removals += [partial(client.delete_object, key) for key in subject.keys]
    for remove in removals:
        try:
            remove()
        except S3OperationError as error:
            left.append(str(error))
    if left:
        prefix = f"{client.prefix}/{subject.scratch}".removeprefix("/")
        meaning = f"{len(left)} of what was made below {prefix} stays: {left[0]}"
        return Finding(FAILED, meaning, "remove what is there yourself")
    if subject.keeps_versions:
        try:
            client.remove_versions(subject.scratch)
        except S3OperationError:
            return Finding(WORKS, "what was made is deleted, and stays as noncurrent versions")
    return Finding(WORKS, "what was made is removed")


def _lines(name: str, finding: Finding) -> str:
    """Return a finding as people read it."""
    head = f"{finding.state:<15}{name:<16}"
    text = textwrap.fill(finding.meaning, 100, initial_indent=head, subsequent_indent=INDENT)
    if finding.remedy:
        advice = textwrap.fill(
            finding.remedy, 100, initial_indent=f"{INDENT}-> ", subsequent_indent=f"{INDENT}   "
        )
        text = f"{text}\n{advice}"
    return text
