"""Blobs without their bytes: objects, parts, many at a time, and what it costs to count."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
import inspect
import os
import textwrap

import transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.utils import p64

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy
from zodb_s3blobs import storage as storage_module
from zodb_s3blobs.storage import S3BlobStorage

from .common import alternate
from .common import at_most
from .common import in_memory
from .common import KiB
from .common import MiB
from .common import open_storage
from .common import peak_memory
from .common import random_file
from .common import rclone
from .common import timed
from .common import within
from .common import workspace
from .null_s3 import NullS3
from .reading import Bucket
from .reading import Reader


OBJECTS = 500
PREFETCHED, SMALL, THREADS = 200, 64 * KiB, 32
LARGE, PART, START = 500 * MiB, MiB, 300 * MiB
COUNTED = 500


def loaded():
    """Load Blob objects that no cache knows, and count the requests."""
    with workspace() as directory, rclone(directory) as location:
        db = DB(open_storage(directory, location))
        with db.transaction() as connection:
            connection.root()["blobs"] = [Blob(b"x") for _ in range(OBJECTS)]
        db.close()
        with LatencyProxy(location.endpoint_url) as proxy:
            place = replace(location, endpoint_url=proxy.endpoint_url)
            db = DB(open_storage(directory, place, cache="cold"))
            with db.transaction() as connection:
                seconds = timed(lambda: [blob._p_activate() for blob in connection.root()["blobs"]])
            requests = proxy.stats()["requests"]
            db.close()
    what = f"load {OBJECTS} objects with uncached blobs"
    return [
        within(0, f"{what}: requests", "rclone", "", requests),
        within(100, what, "rclone", "ms", seconds * 1e3),
    ]


class ManyBlobs(Bucket):
    """Blobs that no cache knows yet, many of them at a time; a cache in use has its directories."""

    def __init__(self, directory, *args, **kw):
        super().__init__(directory, *args, **kw)
        for number in range(0x1000):
            os.makedirs(f"{directory}/cache/{number:03x}", mode=0o700, exist_ok=True)

    def take(self):
        return [next(self._numbers) for _ in range(PREFETCHED)]

    def bare(self, pool):
        keys = [f"blobs/{number:x}/1.blob" for number in self.take()]
        return timed(lambda: list(pool.map(self.reference, keys)))

    def prefetched(self):
        pairs = [(p64(number), p64(1)) for number in self.take()]
        seconds = timed(self._storage.prefetch_blobs, pairs)
        assert all(self._storage.blob_size(*pair) == SMALL for pair in pairs)
        return seconds


def prefetch():
    """Prefetch blobs of 64 KiB, 25 ms a request, beside bare boto3 in 32 threads.

    In memory: a disk is busy with files that stay, and not with those that the reference removes.
    """
    with in_memory() as directory:
        body = random_file(directory / "body", SMALL)
        with (
            NullS3(body) as server,
            LatencyProxy(server.endpoint_url, request_delay_ms=25) as proxy,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            location = replace(new_bucket(server), endpoint_url=proxy.endpoint_url)
            bucket = ManyBlobs(directory, location, pool=THREADS)
            limit, seconds = alternate(13, lambda: bucket.bare(pool), bucket.prefetched)
            before = peak_memory()
            for _ in range(5):
                bucket.prefetched()
            grown = peak_memory() - before
            bucket.close()
    what = f"prefetch {PREFETCHED} x 64 KiB, 25 ms"
    return [
        at_most(1.2, what, "null", "ms", seconds * 1e3, limit * 1e3),
        within(10, f"{what}: memory added by 1000 more", "null", "MB", grown),
    ]


def part():
    """Read 1 MB of 500 MB, 25 ms a request, beside get_object with a range."""
    with workspace() as directory, rclone(directory) as location:
        key = "blobs/1/1.blob"
        client = boto3_client(location)
        client.upload_file(str(random_file(directory / "body", LARGE)), location.bucket, key)
        client.close()
        with LatencyProxy(location.endpoint_url, request_delay_ms=25) as proxy:
            place = replace(location, endpoint_url=proxy.endpoint_url)
            bucket = Bucket(directory, place)
            ours = bucket._storage
            bare = boto3_client(place)

            def first_byte():
                with ours.open_blob_range(p64(1), p64(1), START, START + PART) as file:
                    return file.read(1)

            def first_byte_bare():
                wanted = f"bytes={START}-{START + PART - 1}"
                answer = bare.get_object(Bucket=place.bucket, Key=key, Range=wanted)
                with answer["Body"] as body:
                    return body.read(1)

            limit, seconds = alternate(
                20, lambda: timed(first_byte_bare), lambda: timed(first_byte)
            )
            proxy.reset()
            with ours.open_blob_range(p64(1), p64(1), START, START + PART) as file:
                assert len(file.read()) == PART
            stats = proxy.stats()
            bucket.close()
    what = "1 MB of 500 MB, 25 ms"
    return [
        at_most(1.2, f"{what}: first byte", "rclone", "ms", seconds * 1e3, limit * 1e3),
        within(1.1, f"{what}: transferred", "rclone", "MB", stats["bytes_down"] / MiB),
        within(1, f"{what}: requests", "rclone", "", stats["requests"]),
    ]


def counting():
    """Read cached blobs, beside the same method without the line that counts."""
    with workspace() as directory, NullS3() as server:
        db = DB(open_storage(directory, new_bucket(server)))
        reader = Reader(db, COUNTED)
        counted, uncounted = S3BlobStorage.loadBlob, _without_counting()

        def run(load):
            S3BlobStorage.loadBlob = load
            return reader.work("loadBlob")()

        try:
            limit, seconds = alternate(60, lambda: run(uncounted), lambda: run(counted))
        finally:
            S3BlobStorage.loadBlob = counted
        transaction.abort()
        db.close()
    figures = (value / COUNTED * 1e6 for value in (seconds, limit))
    return [at_most(1.02, "cached loadBlob: counting", "none", "us", *figures)]


def _without_counting():
    """Return loadBlob as it would be if nothing was counted."""
    source = textwrap.dedent(inspect.getsource(S3BlobStorage.loadBlob))
    line = "    self.__counters.hits += 1\n"
    assert source.count(line) == 1
    text = textwrap.indent(source.replace("    " + line, ""), "    ")
    names = dict(vars(storage_module))
    exec(f"class S3BlobStorage:\n{text}", names)
    return names["S3BlobStorage"].loadBlob
