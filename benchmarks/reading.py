"""Reads: of what is only in the bucket, and of what is in the cache."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
import itertools
import os
import shutil

import transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.utils import p64

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy

from .common import alternate
from .common import at_least
from .common import at_most
from .common import BIG
from .common import bytes_written
from .common import in_new_process
from .common import KiB
from .common import LINK
from .common import MAPPINGSTORAGE
from .common import MiB
from .common import open_storage
from .common import peak_memory
from .common import random_file
from .common import rclone
from .common import revision
from .common import store_records
from .common import timed
from .common import within
from .common import workspace
from .null_s3 import NullS3


SMALL = 64 * KiB
THREADS = 8
EACH = 20
# More than are read in all rounds
RECORDS = 10_000


class Bucket:
    """Blobs that no cache knows yet: each call of the methods reads another one."""

    def __init__(self, directory, location, pool=10):
        self.directory = directory
        self.location = location
        self._client = boto3_client(location, max_pool_connections=pool)
        self._numbers = itertools.count(1)
        self._storage = open_storage(directory, location, base=MAPPINGSTORAGE)
        store_records(self._storage, RECORDS, p64(1))

    def reference(self, key=None):
        """Stream an object to a file as plain boto3 does; return the seconds."""
        path = self.directory / f"reference-{next(self._numbers)}"
        key = key or f"blobs/{next(self._numbers):x}/1.blob"
        seconds = timed(self._get, key, path)
        path.unlink()
        return seconds

    def _get(self, key, path):
        answer = self._client.get_object(Bucket=self.location.bucket, Key=key)
        with open(path, "wb", buffering=0) as file, answer["Body"] as body:
            shutil.copyfileobj(body, file, MiB)

    def ours(self, number=None):
        """Load a blob; return the seconds."""
        oid, serial = p64(number or next(self._numbers)), p64(1)
        seconds = timed(self._storage.loadBlob, oid, serial)
        os.remove(self._storage.loadBlob(oid, serial))
        return seconds

    def close(self):
        self._storage.close()


@contextmanager
def delayed():
    """Yield a bucket on the null server, 25 ms a request, and the proxy before it."""
    with workspace() as directory:
        body = random_file(directory / "body", SMALL)
        with (
            NullS3(body) as server,
            LatencyProxy(server.endpoint_url, request_delay_ms=25) as proxy,
        ):
            location = replace(new_bucket(server), endpoint_url=proxy.endpoint_url)
            bucket = Bucket(directory, location, pool=THREADS)
            yield bucket, proxy
            bucket.close()


def small_blobs():
    """Read cold blobs of 64 KiB one after the other, 25 ms a request."""
    with delayed() as (bucket, proxy):
        limit, seconds = alternate(
            5,
            lambda: sum(bucket.reference() for _ in range(EACH)),
            lambda: sum(bucket.ours() for _ in range(EACH)),
        )
        proxy.reset()
        bucket.ours()
        requests = proxy.stats()["requests"]
    what = "cold read 64 KiB, 25 ms"
    ours, reference = seconds / EACH * 1e3, limit / EACH * 1e3
    return [
        at_most(1.1, what, "null", "ms", ours, reference),
        within(1, f"{what}: requests", "null", "", requests),
    ]


def threads():
    """Read distinct cold blobs of 64 KiB in eight threads, 25 ms a request."""
    count = THREADS * EACH
    with delayed() as (bucket, _proxy), ThreadPoolExecutor(THREADS) as pool:

        def run(read):
            return timed(lambda: list(pool.map(lambda _: read(), range(count))))

        limit, seconds = alternate(5, lambda: run(bucket.reference), lambda: run(bucket.ours))
    what = "8 threads, cold 64 KiB, 25 ms"
    return [at_least(0.95, what, "null", "1/s", count / seconds, count / limit)]


def large_blob():
    """Read a cold blob of 256 MB beside get_object that streams into a file."""
    rows = []
    with workspace() as directory:
        body = random_file(directory / "body", BIG)
        with (
            NullS3(body) as server,
            LatencyProxy(server.endpoint_url, down_mbps=LINK) as proxy,
        ):
            location = replace(new_bucket(server), endpoint_url=proxy.endpoint_url)
            rows += _large("link", directory, location)
            memory, written = (
                in_new_process(_read_large, location, measure)
                for measure in (peak_memory, bytes_written)
            )
        with rclone(directory) as location:
            boto3_client(location).upload_file(str(body), location.bucket, "blobs/1/1.blob")
            rows += _large("rclone", directory, location)
    rows.append(within(40, "cold read 256 MB: memory", "link", "MB", memory))
    rows.append(within(1.01, "cold read 256 MB: x written", "link", "", written / BIG))
    return rows


def _large(server, directory, location):
    bucket = Bucket(directory, location)
    limit, seconds = alternate(
        5, lambda: bucket.reference("blobs/1/1.blob"), lambda: bucket.ours(1)
    )
    bucket.close()
    rate, reference = BIG / MiB / seconds, BIG / MiB / limit
    return [at_least(0.9, "cold read 256 MB", server, "MB/s", rate, reference)]


def _read_large(location, measure):
    """Return what the read of a large blob adds to a measure."""
    with workspace() as directory:
        storage = open_storage(directory, location, base=MAPPINGSTORAGE)
        storage.sweep(dry_run=True)  # the first traffic loads boto3
        store_records(storage, 1, p64(1))
        before = measure()
        storage.loadBlob(p64(1), p64(1))
        return measure() - before


def cached():
    """Read blobs that are in the cache, beside ZODB's own blob directory."""
    count = 500
    with workspace() as directory, NullS3() as server:
        location = new_bucket(server)
        (directory / "stock").mkdir()
        stock = FileStorage(str(directory / "stock/Data.fs"), blob_dir=str(directory / "blobs"))
        dbs = [DB(stock), DB(open_storage(directory, location))]
        readers = [Reader(db, count) for db in dbs]
        rows = []
        for what in ("loadBlob", "openCommittedBlobFile", "Blob.open and read"):
            limit, seconds = alternate(15, *(reader.work(what) for reader in readers))
            ours, reference = (value / count * 1e6 for value in (seconds, limit))
            rows.append(at_most(1.0, f"cached: {what}", "none", "us", ours, reference))
        for db in dbs:
            db.close()
    return rows


class Reader:
    """Reads each of a number of blobs once in a round."""

    def __init__(self, db, count):
        self._storage = db.storage
        self._root = db.open().root()
        self._root["blobs"] = self._blobs = [Blob(b"x" * 100) for _ in range(count)]
        transaction.commit()
        self._names = [revision(blob) for blob in self._blobs]

    def work(self, what):
        """Return the function that measures one round."""
        function = {
            "loadBlob": self._load,
            "openCommittedBlobFile": self._open,
            "Blob.open and read": self._read,
        }[what]
        return lambda: timed(function)

    def _load(self):
        load = self._storage.loadBlob
        for oid, serial in self._names:
            load(oid, serial)

    def _open(self):
        open_file = self._storage.openCommittedBlobFile
        for oid, serial in self._names:
            open_file(oid, serial).close()

    def _read(self):
        for blob in self._blobs:
            with blob.open() as file:
                file.read()
