"""ZEO: small commits beside a large upload, and the sweep of a client beside its iterator."""

from contextlib import ExitStack
import itertools

import ZODB.config
from ZODB.FileStorage import FileStorage

from tests.services.zeo import ZeoServer

from .beside import beside
from .beside import DATABASE
from .beside import GOALS
from .beside import run_on
from .beside import two_roads
from .beside import UPLOAD
from .beside import UPLOADER
from .beside import Uploader
from .beside import writing_process
from .beside import writing_thread
from .common import alternate
from .common import at_most
from .common import for_information
from .common import in_memory
from .common import open_storage
from .common import random_file
from .common import storage_text
from .common import timed
from .common import workspace
from .sweeping import Keys
from .sweeping import SweepBench


SERVED = "<filestorage 1>\n path Data.fs\n</filestorage>"
# Records of the database for each that is a blob's
SHAPES = {"blobs only": 1, "1 of 20 a blob": 20}


def zeoclient(server):
    """Return the section of a client."""
    return f"<zeoclient>\n server {server.address}\n</zeoclient>"


def small_commits():
    """The longest small commit while another client uploads 200 MB, beside a quiet time.

    For information also in another thread of the same client, where both share the interpreter.
    """
    run_on(DATABASE)
    with ExitStack() as stack:
        directory = stack.enter_context(workspace())
        server = stack.enter_context(ZeoServer(stack.enter_context(in_memory()), SERVED))
        run_on(UPLOADER)
        capped, location = stack.enter_context(two_roads())
        path = random_file(directory / "source", UPLOAD)
        base = zeoclient(server)
        ours = open_storage(directory / "uploader", capped, base=base)
        text = storage_text(directory / "writer", location, base)
        with Uploader(ours, path, capped) as uploader:
            rows = beside(uploader, writing_process(text), "ZEO clients", goals=GOALS)
        # The thread of the client itself serves both; it runs beside the server.
        run_on(DATABASE)
        ours = open_storage(directory / "uploader", capped, base=base)
        run_on(UPLOADER)
        with Uploader(ours, path, capped) as uploader:
            rows += beside(uploader, writing_thread(uploader.db), "ZEO threads")
    return rows


def sweep():
    """Sweep through a client, beside one pass of its iterator over the whole database.

    The iterator would tell which blobs survive, too. Its database is one transaction here: each
    further one would cost it three calls. The requests are compared with bare ones.
    """
    rows = []
    for count in (3_000, 21_000):
        keys = Keys(count)
        for shape, records in SHAPES.items():
            rows += _sweep(keys, f"sweep {count:,} keys, ZEO, {shape}", records)
    return rows


def _sweep(keys, what, records):
    asking, iterating = Calls(), Calls()
    bare = SweepBench(keys, None)
    bare.reference()
    with in_memory() as directory:
        keys.store(FileStorage(str(directory / "Data.fs")), others=records - 1)
        with ZeoServer(directory, SERVED) as server:
            base = zeoclient(server)
            ours = SweepBench(keys, base, lambda storage: asking.count(storage.base))
            # Few rounds: the longest pass takes half a minute.
            seconds, limit = alternate(2, ours.ours, lambda: _iterate(base, iterating))
    oids = len(keys.stamps)
    each, each_limit = (value / oids * 1e3 for value in (seconds, limit))
    return [
        for_information(f"{what}; iterator", "null", "s", seconds, limit),
        for_information(f"{what}: per oid", "null", "ms", each, each_limit),
        for_information(f"{what}: calls", "any", "", asking.number, iterating.number),
        at_most(1.2, f"{what}: requests", "any", "", ours.requests, bare.requests),
    ]


def _iterate(base, calls):
    """Pass over all records of a server's storage; return the seconds."""
    client = ZODB.config.storageFromString(base)
    calls.count(client)
    seconds = timed(lambda: sum(1 for transaction in client.iterator() for _ in transaction))
    client.close()
    return seconds


class Calls:
    """Counts what a client asks its server and waits for, now or later."""

    def __init__(self):
        self.number = 0

    def count(self, client):
        """Begin to count, with 0."""
        numbers, call = itertools.count(1), client._server.call
        self.number = 0

        def counting(*arguments, **options):
            self.number = next(numbers)
            return call(*arguments, **options)

        client._call = client._server.call = counting
