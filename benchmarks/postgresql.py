"""RelStorage over PostgreSQL: small commits beside a large upload, and the sweep."""

from contextlib import contextmanager
from contextlib import ExitStack

import ZODB.config

from tests.services.postgresql import PostgresqlServer

from .beside import beside
from .beside import DATABASE
from .beside import GOALS
from .beside import run_on
from .beside import two_roads
from .beside import UPLOAD
from .beside import UPLOADER
from .beside import Uploader
from .beside import writing_process
from .common import alternate
from .common import at_most
from .common import FILESTORAGE
from .common import for_information
from .common import in_memory
from .common import KiB
from .common import open_storage
from .common import random_file
from .common import storage_text
from .common import workspace
from .sweeping import Keys
from .sweeping import SweepBench


SMALL_BLOB = 10 * KiB


@contextmanager
def postgresql():
    """Yield a fresh `PostgresqlServer`."""
    with in_memory() as directory, PostgresqlServer(directory) as server:
        yield server


def relstorage(dsn, *lines):
    """Return the section of a RelStorage; further lines are its keys."""
    database = ["<postgresql>", "driver psycopg2", f"dsn {dsn}", "</postgresql>"]
    return "\n".join(["%import relstorage", "<relstorage>", *lines, *database, "</relstorage>"])


def small_commits():
    """The longest small commit while another process uploads 200 MB, beside a quiet time.

    For information also with small blobs, and at last blobs that RelStorage keeps in the database.
    """
    run_on(DATABASE)
    with workspace() as directory, postgresql() as server, ExitStack() as stack:
        run_on(UPLOADER)
        capped, location = stack.enter_context(two_roads())
        path = random_file(directory / "source", UPLOAD)
        base = relstorage(server.new_database())
        ours = open_storage(directory / "uploader", capped, base=base)
        # The small blobs of the other process take another road than the large one.
        text = storage_text(directory / "writer", location, base)
        rows = []
        with Uploader(ours, path, capped) as uploader:
            rows += beside(uploader, writing_process(text), "small commit", goals=GOALS)
            rows += beside(uploader, writing_process(text, SMALL_BLOB), "10 KiB commit")
        lines = f"blob-dir {directory}/own", "shared-blob-dir false", "blob-cache-size 1GB"
        own = relstorage(server.new_database(), *lines)
        with Uploader(ZODB.config.storageFromString(own), path, capped) as uploader:
            rows += beside(uploader, writing_process(own), "stock commit")
    return rows


def sweep():
    """Sweep over PostgreSQL and a FileStorage, beside bare requests; 10 of 21 keys are garbage."""
    rows = []
    with postgresql() as server:
        for count in (3_000, 21_000):
            rows += _sweep(server, count)
    return rows


def _sweep(server, count):
    keys = Keys(count)
    bases = {
        "FileStorage": FILESTORAGE,
        "history": relstorage(server.new_database()),
        "no history": relstorage(server.new_database(), "keep-history false"),
    }
    with workspace() as directory:
        benches = {}
        for name, base in bases.items():
            (directory / name).mkdir()
            text = base.format(directory=directory / name)
            keys.store(ZODB.config.storageFromString(text))
            benches[name] = SweepBench(keys, text)
        bare = SweepBench(keys, None)
        limit, *seconds = alternate(3, bare.reference, *(each.ours for each in benches.values()))
    rows = []
    what = f"sweep {count:,} keys"
    for (name, bench), each in zip(benches.items(), seconds, strict=True):
        rows.append(for_information(f"{what}, {name}", "null", "s", each, limit))
        requests = f"{what}, {name}: requests"
        rows.append(at_most(1.2, requests, "any", "", bench.requests, bare.requests))
    return rows
