"""Migration of a blob directory through 25 ms: how fast, how large, and exact when it was killed.

    .venv/bin/python -m benchmarks.migration [--files N] [--seed N]

The reference uploads 500 of the files one at a time, through the same proxy, in the same run. The
exit status is 1 when a goal was missed.
"""

import argparse
from dataclasses import asdict
from dataclasses import replace
import hashlib
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

from ZODB.blob import FilesystemHelper
from ZODB.FileStorage import FileStorage
from ZODB.utils import newTid
from ZODB.utils import p64

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.testing.server import EmbeddedS3

from .common import for_information
from .common import in_memory
from .common import KiB
from .common import peak_memory_of
from .common import Row
from .common import storage_text
from .common import store_records


FILES, ALONE, KILLS, SIZE = 20_000, 500, 10, 10 * KiB
DELAY = 25
FASTER = 10
# By how much, in MiB, the last nine tenths may add to what the first takes
GROWTH = 10


def contents(number):
    """Return the bytes of a blob."""
    return hashlib.shake_128(b"%d" % number).digest(SIZE + number % 100)


def make_database(directory, count):
    """Make a FileStorage with a blob directory, as a site leaves it."""
    tid = newTid(None)
    storage = FileStorage(f"{directory}/Data.fs")
    store_records(storage, count, tid)
    storage.close()
    files = FilesystemHelper(f"{directory}/blobs", "bushy")
    files.create()
    for number in range(1, count + 1):
        files.getPathForOID(p64(number), create=True)
        Path(files.getBlobFilename(p64(number), tid)).write_bytes(contents(number))
    return tid


class Site:
    """A database, a bucket behind a proxy, and the command that brings one into the other."""

    def __init__(self, directory, server, proxy, count, tid):
        self.directory = directory
        self.server = server
        self.location = new_bucket(server)
        self.count = count
        self.tid = tid
        through = replace(self.location, endpoint_url=proxy.endpoint_url)
        self.through = through
        source = f"\n<blobdir-source>\npath {directory}/blobs\n</blobdir-source>"
        text = storage_text(
            directory,
            through,
            "<filestorage>\npath {directory}/Data.fs\n</filestorage>" + source,
            s3_addressing_style="path",
        )
        imports, _, section = text.strip().partition("\n")
        self.path = directory / f"{self.location.bucket}.conf"
        self.path.write_text(f"{imports}\n<zodb>\n{section}\n</zodb>\n")

    def start(self, *arguments):
        """Start the command."""
        command = [sys.executable, "-m", "zodb_s3blobs.operate", "-C", self.path, "migrate"]
        return subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)

    def objects(self):
        """Return how many objects there are, by the files that the server keeps."""
        return sum(1 for _path in self._files())

    def _files(self):
        return (self.server.directory / "buckets" / self.location.bucket / "blobs").glob("*/*.blob")

    def check(self):
        """Require that exactly the blobs are there, byte for byte."""
        found = {f"blobs/{path.parent.name}/{path.name}": path for path in self._files()}
        numbers = range(1, self.count + 1)
        expected = {blob_key(p64(number), self.tid): number for number in numbers}
        assert found.keys() == expected.keys(), "other objects than blobs"
        for key, path in found.items():
            assert path.read_bytes() == contents(expected[key]), key


def one_at_a_time(site, count):
    """Return files a second of the plain way to upload."""
    client = boto3_client(site.through)
    files = FilesystemHelper(f"{site.directory}/blobs", "bushy")
    begun = time.perf_counter()
    for number in range(1, count + 1):
        path = files.getBlobFilename(p64(number), site.tid)
        client.upload_file(path, site.location.bucket, blob_key(p64(number), site.tid))
    return count / (time.perf_counter() - begun)


def uninterrupted(site):
    """Migrate; return seconds and the peak of memory after a tenth, and at the end, in MiB."""
    begun = time.perf_counter()
    process = site.start()
    early = late = 0.0
    while process.poll() is None:
        peak = peak_memory_of(process.pid) or late
        if not early and site.objects() >= site.count // 10:
            early = peak
        late = peak
        time.sleep(0.2)
    seconds = time.perf_counter() - begun
    assert process.returncode == 0
    site.check()
    return seconds, early, late


def killed(site, rng, seconds):
    """Kill the migration at random moments, and then let it end; return how far it was each time.

    :param float seconds: what it takes without.
    """
    steps = []
    for _kill in range(KILLS):
        process = site.start()
        time.sleep(rng.uniform(0.5, 0.5 + 1.2 * seconds / KILLS))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it had ended before"
        steps.append(site.objects())
    assert site.start("--verify").wait() == 0
    site.check()
    return steps


def migration(count, seed):
    """Return the rows of the table."""
    alone = min(ALONE, count)
    with in_memory() as directory, EmbeddedS3(directory / "rclone") as server:
        tid = make_database(directory, count)
        with LatencyProxy(server.endpoint_url, request_delay_ms=DELAY) as proxy:
            sites = [Site(directory, server, proxy, count, tid) for _ in range(3)]
            reference = one_at_a_time(sites[0], alone)
            seconds, early, late = uninterrupted(sites[1])
            # A bucket of one database is no other's; this is the same one.
            steps = killed(sites[2], random.Random(seed), seconds)
    print(f"killed with seed {seed} at {steps} objects, then exact", file=sys.stderr)
    rate = count / seconds
    what = f"migrate {count} x {SIZE // KiB} KiB"
    return [
        Row(
            f"{what}, reference one at a time ({alone})",
            "rclone 25",
            "/s",
            rate,
            reference,
            f">= {FASTER} x reference",
            rate >= FASTER * reference,
        ),
        Row(
            f"{what}, memory, reference after a tenth",
            "rclone 25",
            "MiB",
            late,
            early,
            f"<= reference + {GROWTH}",
            late <= early + GROWTH,
        ),
        for_information(f"{what}, killed {KILLS} times: objects", "rclone 25", "", count, None),
    ]


def main():
    """Run it and print the table."""
    from .__main__ import print_line
    from .__main__ import print_row

    parser = argparse.ArgumentParser("python -m benchmarks.migration")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["XDG_STATE_HOME"] = f"/tmp/benchmark-{os.getpid()}"
    print_line(what="what", server="server", ours="ours", reference="reference", unit="")
    rows = [asdict(row) for row in migration(arguments.files, arguments.seed)]
    for row in rows:
        print_row(row)
    return 0 if all(row["reached"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
