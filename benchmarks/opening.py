"""Import and open, as a site does it at its start: from the text of a configuration."""

import json
import os
import subprocess
import sys

from ZODB.DB import DB
from ZODB.FileStorage import FileStorage

from tests.services.location import S3Location

from .common import at_most
from .common import FILESTORAGE
from .common import storage_text
from .common import workspace


ROUNDS = 10
PROGRAM = """
import sys, time
from pathlib import Path
def size():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
text = sys.stdin.read()
before, begun = size(), time.perf_counter()
import ZODB.config
storage = ZODB.config.storageFromString(text)
print([time.perf_counter() - begun, size() - before])
"""


def import_and_open():
    """Import and open beside FileStorage alone: time and memory."""
    location = S3Location("https://s3.example.org", "access", "secret", "bucket")
    with workspace() as directory:
        DB(FileStorage(str(directory / "Data.fs"))).close()
        texts = [FILESTORAGE.format(directory=directory), storage_text(directory, location)]
        # As an installed package: its compiled modules are kept, from the first round on.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(directory / "pycache")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        results = [[], []]
        for _ in range(ROUNDS):
            for text, result in zip(texts, results, strict=True):
                result.append(_run(text, environment))
    (limit, base_memory), (seconds, memory) = (
        [min(values) for values in zip(*result, strict=True)] for result in results
    )
    return [
        at_most(1.3, "import and open", "none", "ms", seconds * 1e3, limit * 1e3),
        at_most(1.3, "import and open: memory", "none", "MB", memory, base_memory),
    ]


def _run(text, environment):
    """Return seconds and MiB in a process of its own."""
    run = [sys.executable, "-c", PROGRAM]
    return json.loads(subprocess.check_output(run, input=text, env=environment, text=True))
