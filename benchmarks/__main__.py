"""Run the benchmarks and print one table.

    .venv/bin/python -m benchmarks [--json] [NAME ...]

Servers: "rclone" is a real one; "null" drops what it gets (null_s3.py), where rclone would hold
both sides back; "link" is null behind 5 Gbit/s. Delays are the latency proxy's.

Each runs in a process of its own, one after the other. A reference is measured in the same run
as what it is compared with, in turn; of several rounds the shortest counts. The exit status is
1 when a goal was missed.
"""

import argparse
from dataclasses import asdict
import json
import os
import subprocess
import sys

from zodb_s3blobs.testing.process import ServiceMissing

from . import caching
from . import commit
from . import filestorage
from . import memory
from . import objects
from . import opening
from . import packing
from . import postgresql
from . import reading
from . import zeo


BENCHMARKS = {
    "commit-many": commit.many_blobs,
    "commit-small": commit.one_small_blob,
    "commit-large": commit.one_large_blob,
    "finish": commit.finish,
    "read-small": reading.small_blobs,
    "read-threads": reading.threads,
    "read-large": reading.large_blob,
    "read-cached": reading.cached,
    "load-objects": objects.loaded,
    "prefetch": objects.prefetch,
    "part": objects.part,
    "counting": objects.counting,
    "evict": caching.eviction,
    "evict-hits": caching.hits,
    "one-blob": caching.one_blob,
    "pack": packing.pack,
    "beside": postgresql.small_commits,
    "beside-zeo": zeo.small_commits,
    "beside-filestorage": filestorage.small_commits,
    "buffer": filestorage.buffer,
    "sweep": postgresql.sweep,
    "sweep-zeo": zeo.sweep,
    "memory": memory.memory,
    "open": opening.import_and_open,
}
LINE = "{what:<56}{server:<8}{ours:>10}{reference:>11}  {unit:<5}{ratio:>6}  {goal:<20}{verdict}"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.splitlines()[0],
        epilog="Names: " + ", ".join(BENCHMARKS),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them where none is given")
    parser.add_argument("--json", action="store_true", help="a list of objects, no table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"no benchmark is called {', '.join(unknown)}")
    if arguments.here:
        print(json.dumps([asdict(row) for name in arguments.names for row in run(name)]))
        return 0
    if not arguments.json:
        print_line(what="what", server="server", ours="ours", reference="reference", unit="")
    rows = []
    for name in arguments.names or BENCHMARKS:
        rows += (found := in_new_process(name))
        if not arguments.json:
            for row in found:
                print_row(row)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    return 0 if all(row["reached"] for row in rows) else 1


def run(name):
    """Return the rows of a benchmark, none where a server is not installed."""
    try:
        return BENCHMARKS[name]()
    except ServiceMissing as missing:
        print(f"{name}: skipped: {missing}", file=sys.stderr)
        return []


def in_new_process(name):
    """Return the rows of a benchmark, as dictionaries."""
    # No setting of whoever runs it, and no question for an instance's role.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    environment |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    run = [sys.executable, "-m", "benchmarks", "--here", name]
    return json.loads(subprocess.check_output(run, env=environment))


def print_row(row):
    figures = {name: row[name] for name in ("ours", "reference")}
    ratio = f"{row['ours'] / row['reference']:.2f}" if row["reference"] else ""
    texts = {name: "" if value is None else f"{value:.4g}" for name, value in figures.items()}
    verdict = "reached" if row["reached"] else "MISSED"
    print_line(**{**row, **texts}, ratio=ratio, verdict=verdict)


def print_line(ratio="ratio", goal="goal", verdict="", reached=None, **texts):
    print(LINE.format(ratio=ratio, goal=goal, verdict=verdict, **texts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
