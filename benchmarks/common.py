"""Timing, the table's rows, servers and storages: what all benchmarks share."""

from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
import gc
import multiprocessing
import os
from pathlib import Path
import tempfile
import time

import ZODB.config
from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64
from ZODB.utils import z64

from tests.services.location import new_bucket
from zodb_s3blobs.testing.server import EmbeddedS3


KiB = 1 << 10
MiB = 1 << 20
BIG = 256 * MiB
# MB/s: what EC2 allows one connection, 5 Gbit/s. Unlimited, loopback is faster than SHA-256.
LINK = 625

BLOB_RECORD = b"\x80\x03cZODB.blob\nBlob\nq\x01.\x80\x03N."

FILESTORAGE = "<filestorage>\n path {directory}/Data.fs\n</filestorage>"
MAPPINGSTORAGE = "<mappingstorage>\n</mappingstorage>"


@dataclass
class Row:
    """One line of the table: a figure, what it was compared with, and whether that was reached."""

    what: str
    server: str
    unit: str
    ours: float
    reference: float | None
    goal: str
    reached: bool


def at_most(factor, what, server, unit, ours, reference):
    """Return the row of a figure that may exceed its reference by this factor."""
    goal = f"<= {factor:g} x reference"
    return Row(what, server, unit, ours, reference, goal, ours <= factor * reference)


def at_least(factor, what, server, unit, ours, reference):
    """Return the row of a rate that must reach this part of its reference."""
    goal = f">= {factor:g} x reference"
    return Row(what, server, unit, ours, reference, goal, ours >= factor * reference)


def within(limit, what, server, unit, ours, reference=None):
    """Return the row of a figure with a limit of its own."""
    return Row(what, server, unit, ours, reference, f"<= {limit:g} {unit}", ours <= limit)


def for_information(what, server, unit, ours, reference):
    """Return the row of a figure without a goal."""
    return Row(what, server, unit, ours, reference, "", True)


def alternate(rounds, *works):
    """Run functions in turn, so that what else the machine does meets all of them.

    :param works: each returns the seconds of what it measures; their first round does not count
    :returns: the shortest time of each: the others are the same work with a disturbance
    """
    times = [[] for _ in works]
    for turn in range(rounds + 1):
        # A different one begins each time.
        for index in sorted(range(len(works)), key=lambda index: (index + turn) % len(works)):
            gc.collect()
            seconds = works[index]()
            if turn:
                times[index].append(seconds)
    return [min(seconds) for seconds in times]


def timed(function, *arguments):
    """Return the seconds that a call takes."""
    begun = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begun


def in_new_process(function, *arguments):
    """Call a function of a module in a process of its own and return its result."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory():
    """Return the largest resident size this process has had, in MiB.

    VmHWM, since ru_maxrss begins with the size of the process that started this one.
    """
    peak = peak_memory_of("self")
    if peak is None:
        raise LookupError("VmHWM")
    return peak


def peak_memory_of(pid):
    """Return the largest resident size a process has had, in MiB; None when it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return None


def bytes_written():
    """Return the bytes this process has caused to be written to file systems on disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("write_bytes"):
            return int(line.split()[1])
    raise LookupError("write_bytes")


@contextmanager
def workspace():
    """Yield a directory that is removed at the end, a `Path`."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as directory:
        yield Path(directory)


@contextmanager
def in_memory():
    """Yield a directory that no file written or removed on a disk holds up; its path is short."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else "/tmp"
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=place) as directory:
        yield Path(directory)


@contextmanager
def rclone(directory):
    """Yield the location of a bucket on a fresh rclone."""
    with EmbeddedS3(directory / "rclone") as server:
        yield new_bucket(server)


def storage_text(directory, location, base=FILESTORAGE, cache="cache", **keys):
    """Return the section of a storage; arguments without a default stand for further keys."""
    lines = [f"{name.replace('_', '-')} {value}" for name, value in keys.items()]
    return f"""
        %import zodb_s3blobs
        <s3blobstorage>
          bucket-name {location.bucket}
          s3-endpoint-url {location.endpoint_url}
          s3-access-key {location.access_key}
          s3-secret-key {location.secret_key}
          cache-dir {directory}/{cache}
          cache-size 4GB
          {chr(10).join(lines)}
          {base.format(directory=directory)}
        </s3blobstorage>
        """


def open_storage(directory, location, **options):
    """Open a storage as a site does, from the text of its configuration."""
    return ZODB.config.storageFromString(storage_text(directory, location, **options))


def store_records(storage, count, tid):
    """Store the records of the blobs with oids up to this; without a record there is no blob."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn, tid)
    for number in range(1, count + 1):
        storage.store(p64(number), z64, BLOB_RECORD, "", txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)


def random_file(path, size):
    """Write a file of random bytes and return its path."""
    with open("/dev/urandom", "rb") as source, open(path, "wb") as target:
        while size:
            target.write(source.read(min(size, MiB)))
            size -= min(size, MiB)
    return path


def revision(blob):
    """Return oid and serial of a committed Blob."""
    blob._p_activate()  # a commit leaves a ghost, which knows no serial
    return blob._p_oid, blob._p_serial
