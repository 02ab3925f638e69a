"""Commits: many small blobs, one small blob, one large one."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
import itertools
import os

import transaction
from ZODB.blob import Blob
from ZODB.blob import BlobStorage
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.MappingStorage import MappingStorage
from ZODB.utils import z64

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy

from .common import alternate
from .common import at_least
from .common import at_most
from .common import BIG
from .common import BLOB_RECORD
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
from .common import timed
from .common import within
from .common import workspace
from .null_s3 import NullS3


THREADS = 32


@contextmanager
def delayed(**settings):
    """Yield the location of a bucket on the null server, and the proxy before it."""
    with NullS3() as server, LatencyProxy(server.endpoint_url, **settings) as proxy:
        yield replace(new_bucket(server), endpoint_url=proxy.endpoint_url), proxy


@contextmanager
def root_of(directory, location, **options):
    """Yield the root object of a new database."""
    db = DB(open_storage(directory, location, **options))
    connection = db.open()
    yield connection.root()
    transaction.abort()
    connection.close()
    db.close()


def many_blobs():
    """Commit 100 x 64 KiB, 25 ms a request, beside put_object in 32 threads."""
    bodies = [os.urandom(64 * KiB) for _ in range(100)]
    numbers = itertools.count()
    with workspace() as directory, delayed(request_delay_ms=25) as (location, _proxy):
        client = boto3_client(location, max_pool_connections=THREADS)

        def put(body):
            key = f"reference/{next(numbers)}"
            client.put_object(Bucket=location.bucket, Key=key, Body=body)

        with (
            ThreadPoolExecutor(THREADS) as pool,
            root_of(directory, location, upload_concurrency=THREADS) as root,
        ):

            def reference():
                return timed(lambda: list(pool.map(put, bodies)))

            def ours():
                root["blobs"] = [Blob(body) for body in bodies]
                return timed(transaction.commit)

            limit, seconds = alternate(7, reference, ours)
    return [at_most(1.15, "commit 100 x 64 KiB, 25 ms", "null", "ms", seconds * 1e3, limit * 1e3)]


def one_small_blob():
    """Commit one blob of 10 KiB over a wire of 25 ms; it may take one round trip."""
    body = os.urandom(10 * KiB)
    with workspace() as directory, delayed(delay_ms=25) as (location, proxy):
        client = boto3_client(location)
        with root_of(directory, location) as root:

            def reference():
                put = {"Bucket": location.bucket, "Key": "reference", "Body": body}
                return timed(lambda: client.put_object(**put))

            def ours():
                root["blob"] = Blob(body)
                return timed(transaction.commit)

            limit, seconds = alternate(20, reference, ours)
            proxy.reset()
            ours()
            requests = proxy.stats()["requests"]
    what = "commit 10 KiB, 25 ms on the wire"
    return [
        within(32, what, "null", "ms", seconds * 1e3, limit * 1e3),
        within(1, f"{what}: requests", "null", "", requests),
    ]


def one_large_blob():
    """Commit 256 MB beside the fastest of boto3's ways to send a file."""
    rows = []
    with workspace() as directory, delayed(up_mbps=LINK) as (location, _proxy):
        rows += _large("link", directory, location)
    with workspace() as directory, rclone(directory) as location:
        rows += _large("rclone", directory, location)
        memory = in_new_process(_commit_large, location, peak_memory)
        written = in_new_process(_commit_large, location, bytes_written) / BIG
    rows.append(within(40, "commit 256 MB in parts: memory", "rclone", "MB", memory))
    rows.append(within(0.01, "commit 256 MB: x written", "rclone", "", written))
    return rows


def _large(server, directory, location):
    path = random_file(directory / "source", BIG)
    client = boto3_client(location)

    def upload_file():
        return timed(client.upload_file, str(path), location.bucket, "reference")

    def put_object():
        with open(path, "rb") as file:
            put = {"Bucket": location.bucket, "Key": "reference", "Body": file}
            return timed(lambda: client.put_object(**put))

    def commit(root):
        link_to_blob(root, path)
        return timed(transaction.commit)

    (directory / "one").mkdir()
    with (
        root_of(directory, location) as in_parts,
        root_of(
            directory / "one", location, s3_prefix="one", s3_multipart_threshold="1GB"
        ) as in_one,
    ):
        *references, parts, one = alternate(
            4, upload_file, put_object, lambda: commit(in_parts), lambda: commit(in_one)
        )
    limit, parts, one = (BIG / MiB / seconds for seconds in (min(references), parts, one))
    return [
        at_least(0.95, "commit 256 MB in parts", server, "MB/s", parts, limit),
        at_least(0.95, "commit 256 MB in one PUT", server, "MB/s", one, limit),
    ]


def link_to_blob(root, path):
    """Put a blob with the bytes of a file into the root without copying them."""
    link = f"{path}-{os.urandom(4).hex()}"
    os.link(path, link)
    root["blob"] = Blob()
    root["blob"].consumeFile(link)


def _commit_large(location, measure):
    """Return what the commit of a large blob adds to a measure, after a first small commit."""
    with workspace() as directory, root_of(directory, location) as root:
        path = random_file(directory / "source", BIG)
        root["blob"] = Blob(b"first")
        transaction.commit()
        link_to_blob(root, path)
        before = measure()
        transaction.commit()
        return measure() - before


def finish():
    """tpc_finish with 256 MB, beside ZODB's BlobStorage; both over a MappingStorage."""
    with workspace() as directory, NullS3() as server:
        path = random_file(directory / "source", BIG)
        location = new_bucket(server)
        stock = BlobStorage(str(directory / "blobs"), MappingStorage())
        ours = open_storage(directory, location, base=MAPPINGSTORAGE)
        limit, seconds = alternate(
            5, lambda: _timed_finish(stock, path), lambda: _timed_finish(ours, path)
        )
        ours.close()
    return [within(1, "tpc_finish 256 MB", "null", "ms", seconds * 1e3, limit * 1e3)]


def _timed_finish(storage, path):
    link = os.path.join(storage.temporaryDirectory(), os.urandom(4).hex())
    os.link(path, link)
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.storeBlob(storage.new_oid(), z64, BLOB_RECORD, link, "", txn)
    storage.tpc_vote(txn)
    return timed(storage.tpc_finish, txn)
