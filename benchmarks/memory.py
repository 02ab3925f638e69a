"""Memory: what a process takes beyond its start while many blobs or a large one come and go."""

import os
from pathlib import Path

import transaction
from ZODB.blob import Blob

from zodb_s3blobs.blobs import prefetch

from .commit import link_to_blob
from .commit import root_of
from .common import FILESTORAGE
from .common import in_new_process
from .common import KiB
from .common import MiB
from .common import peak_memory
from .common import random_file
from .common import rclone
from .common import within
from .common import workspace


MANY, EACH, LARGE = 500, 4 * MiB, 2048 * MiB
# What this program itself holds of a blob
PIECE = 64 * KiB
# MB. Asked for are 150, which 32 bodies of 4 MB, held whole, would just not exceed.
LIMIT = 100
RELSTORAGE = """
%import relstorage
<relstorage>
 <sqlite3>
  data-dir {directory}/sqlite
 </sqlite3>
</relstorage>
"""


def memory():
    """Commit and read 500 x 4 MB and 2 GB, each in a process that has done so with a small blob."""
    many, large = f"{MANY} x {EACH // MiB} MB", f"{LARGE >> 30} GB"
    commits = {
        f"commit {many}": _commit_many,
        f"commit {large} in parts": _commit_large,
    }
    reads = {
        f"cold read {many}": _read_many,
        f"prefetch and read {many}": _prefetch_many,
        f"cold read {large}": _read_large,
    }
    by_record = {f"{what}, RelStorage": work for what, work in commits.items()}
    with workspace() as directory:
        source = random_file(directory / "source", LARGE)
        return [
            *_rows(FILESTORAGE, {**commits, **reads}, source),
            *_rows(RELSTORAGE, by_record, source),
        ]


def _rows(base, works, source):
    """Return a row for each work; all have the database in common, and a cache of their own."""
    with workspace() as directory, rclone(directory) as location:
        section = base.format(directory=directory)
        return [
            within(
                LIMIT,
                f"memory: {what}",
                "rclone",
                "MB",
                in_new_process(_grown, work, location, section, source),
            )
            for what, work in works.items()
        ]


def _grown(work, location, base, source):
    """Return by how much the resident size of this process exceeds its start at most, in MiB."""
    with workspace() as directory, root_of(directory, location, base=base) as root:
        _warm_up(root)
        # Makes the present size the largest so far.
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
        work(root, source)
        return peak_memory() - before


def _warm_up(root):
    """Commit a small blob and fetch it from S3 again."""
    root["first"] = Blob(b"first")
    transaction.commit()
    os.remove(root["first"].committed())
    _read(root["first"])


def _commit_many(root, _source):
    root["many"] = [_new_blob() for _ in range(MANY)]
    transaction.commit()


def _new_blob():
    blob = Blob()
    with blob.open("w") as file:
        for _ in range(EACH // PIECE):
            file.write(os.urandom(PIECE))
    return blob


def _commit_large(root, source):
    link_to_blob(root, source)
    transaction.commit()


def _read_many(root, _source):
    assert sum(map(_read, root["many"])) == MANY * EACH


def _prefetch_many(root, source):
    assert prefetch(root["many"]).fetched == MANY
    _read_many(root, source)


def _read_large(root, _source):
    assert _read(root["blob"]) == LARGE


def _read(blob):
    """Return the number of a blob's bytes, after reading them."""
    size = 0
    with blob.open() as file:
        while piece := file.read(PIECE):
            size += len(piece)
    return size
