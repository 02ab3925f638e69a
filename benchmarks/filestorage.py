"""A FileStorage by record: small commits beside a large upload, and what holding stores back costs.

Data.fs is in memory: FileStorage's fsync at the end of each commit costs nothing there.
"""

import os
import time

from ZODB.Connection import TransactionMetaData
from ZODB.utils import p64
from ZODB.utils import z64

from tests.services.location import S3Location

from .beside import beside
from .beside import GOALS
from .beside import LONGEST
from .beside import run_on
from .beside import two_roads
from .beside import UPLOAD
from .beside import UPLOADER
from .beside import Uploader
from .beside import writing_thread
from .common import FILESTORAGE
from .common import for_information
from .common import in_memory
from .common import in_new_process
from .common import open_storage
from .common import peak_memory
from .common import random_file
from .common import within
from .common import workspace


ROUNDS = 3
STORES, SIZE = 200_000, 500


def small_commits():
    """Small commits while another thread uploads 200 MB, beside a quiet time.

    The longest waits are for the interpreter's lock: they are compared with those beside a bare
    upload. A storage's lock would show in every round. By tid it does; that is for information.
    """
    run_on(UPLOADER)
    with workspace() as directory, in_memory() as memory, two_roads() as (capped, _location):
        path = random_file(directory / "source", UPLOAD)

        def measure(addressing, **options):
            base = f"<filestorage>\n path {memory}/{addressing}.fs\n</filestorage>"
            keys = {"addressing": addressing, "s3_prefix": addressing}
            storage = open_storage(directory / addressing, capped, base=base, **keys)
            with Uploader(storage, path, capped) as uploader:
                writer = writing_thread(uploader.db)
                return beside(uploader, writer, f"by {addressing}", **options)

        goals = {**GOALS, "median": 1.5}
        rows = measure("record", goals=goals, bare_goals={"longest, best round": 1.5})
        return rows + measure("tid", measures=LONGEST)


def buffer():
    """A transaction of many stores, held back until its vote, beside one by tid, which is not."""
    found = {"record": [], "tid": []}
    for _ in range(ROUNDS):
        for addressing, results in found.items():
            results.append(in_new_process(_store_many, addressing))
    (seconds, memory), (limit, memory_limit) = (
        [min(values) for values in zip(*results, strict=True)] for results in found.values()
    )
    what = f"{STORES:,} stores of {SIZE} bytes"
    return [
        for_information(f"{what} by record", "none", "s", seconds, limit),
        for_information(f"{what}: memory", "none", "MB", memory, memory_limit),
        within(40, f"{what}: more memory", "none", "MB", memory - memory_limit),
    ]


def _store_many(addressing):
    """Return the seconds of a large transaction, and the MiB that it adds to the largest size."""
    location = S3Location("https://s3.example.org", "access", "secret", "bucket")
    with in_memory() as directory:
        storage = open_storage(directory, location, base=FILESTORAGE, addressing=addressing)
        _store(storage, 1, 1)
        before, begun = peak_memory(), time.perf_counter()
        _store(storage, 2, STORES)
        result = time.perf_counter() - begun, peak_memory() - before
        storage.close()
    return result


def _store(storage, first, count):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    body = os.urandom(SIZE - 8)
    for number in range(first, first + count):
        # No two are the same object, which pickle would write once.
        storage.store(p64(number), z64, p64(number) + body, "", txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)
