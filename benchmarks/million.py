"""Measure a cache of very many files beside one of 20,000.

    .venv/bin/python -m benchmarks.million [--directory D] [COUNT]

COUNT is a million where none is given. The files have 100 bytes, for which no disk has to provide
a block; they are in memory unless --directory says where else. Each cache has a process of its
own. Evictions are those of an opening with a budget for nine files of ten, less what an opening
without any takes.

The exit status is 1 when the eviction of a file takes more than twice the CPU that it takes among
20,000.
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
import time

from zodb_s3blobs.cache import S3BlobCache

from .caching import entries
from .caching import FilledCache
from .caching import make_index
from .caching import new_files
from .caching import put
from .caching import SIZE
from .caching import TID
from .common import in_memory
from .common import in_new_process
from .common import MiB
from .common import peak_memory
from .common import timed


FEW = 20_000
CALLS = 2000
CPU = "CPU of one eviction, us"
LINE = "{:<34}{:>12}{:>12}{:>8}"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.million", description=__doc__.splitlines()[0]
    )
    parser.add_argument("count", nargs="?", type=int, default=1_000_000, metavar="COUNT")
    parser.add_argument("--directory", help="where to make the caches; in memory by default")
    arguments = parser.parse_args()
    few, many = (figures(count, arguments.directory) for count in (FEW, arguments.count))
    print(LINE.format("files", f"{FEW:,}", f"{arguments.count:,}", "ratio"))
    for name, figure in many.items():
        ratio = figure / few[name]
        print(LINE.format(name, f"{few[name]:.4g}", f"{figure:.4g}", f"{ratio:.2f}"))
    return 1 if many[CPU] > 2 * few[CPU] else 0


def figures(count, parent=None):
    """Return the figures of a cache in a directory that is removed at the end, by name."""
    place = in_memory() if parent is None else tempfile.TemporaryDirectory(dir=parent)
    with place as directory:
        cache = os.path.join(directory, "cache")
        in_new_process(fill, cache, count)
        return in_new_process(measure, cache, count)


def fill(directory, count):
    """Write the files."""
    FilledCache(directory, count)


def measure(directory, count):
    """Return the figures of a cache that has no index yet."""
    size, memory = count * SIZE, peak_memory()
    cache, (rebuild, _) = watched(make_index, directory, size)
    cache.close()
    index = os.path.getsize(f"{directory}/index.sqlite")
    openings = []
    for _ in range(2):
        cache, seconds = watched(S3BlobCache, directory, size)
        cache.close()
        openings.append(seconds)
    cache, seconds = watched(S3BlobCache, directory, size * 9 // 10)
    evicted = count - sum(1 for _ in entries(directory))
    once, cpu = (
        (value - min(without)) / evicted
        for value, without in zip(seconds, zip(*openings, strict=True), strict=True)
    )
    files = new_files(cache, CALLS)
    puts = timed(put, cache, itertools.count(1 << 32), files)
    check = timed(find_nothing, cache)
    memory = peak_memory() - memory
    gets = timed(get, cache, random_oids(directory))
    cache.close()
    return {
        "make the index, s": rebuild,
        "open, ms": openings[0][0] * 1e3,
        "open again, ms": openings[1][0] * 1e3,
        CPU: cpu * 1e6,
        "one eviction, us": once * 1e6,
        "put that evicts, us": puts / CALLS * 1e6,
        "get, us": gets / CALLS * 1e6,
        "check, s": check,
        "index, MB": index / MiB,
        "added to memory, MB": memory,
    }


def watched(function, *arguments):
    """Return what a call returns, and its seconds: by the clock, and of the processor."""
    begun, cpu_begun = time.perf_counter(), time.process_time()
    result = function(*arguments)
    return result, (time.perf_counter() - begun, time.process_time() - cpu_begun)


def find_nothing(cache):
    findings = cache.check()
    assert not findings, findings[0]


def random_oids(directory):
    """Return oids of files that are there."""
    names = random.Random(1).sample([entry.name for entry in entries(directory)], CALLS)
    return [bytes.fromhex(name[:16]) for name in names]


def get(cache, oids):
    for oid in oids:
        assert cache.get(oid, TID)


if __name__ == "__main__":
    sys.exit(main())
