"""Pack of a database whose bucket has 21,000 keys, 10,000 of them garbage."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import shutil
import time

import transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.serialize import referencesf

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.testing.server import EmbeddedS3

from .common import alternate
from .common import at_most
from .common import open_storage
from .common import revision
from .common import timed
from .common import workspace
from .null_s3 import NullS3


LIVE = 11_000
GARBAGE = 10_000
BATCH = 1000


def pack():
    """Pack, beside FileStorage's own pack, a bare listing and bare batch deletes."""
    rows = []
    with workspace() as directory:
        live, garbage = _make_database(directory)
        for name, server in (("null", _null), ("rclone", _rclone)):
            bench = Bench(directory, server, live, garbage)
            limit, seconds = alternate(2, bench.reference, bench.ours)
            what = "pack 21,000 keys, 10,000 garbage"
            rows.append(at_most(1.2, what, name, "s", seconds, limit))
            limit, requests = bench.requests["reference"], bench.requests["ours"]
        rows.append(at_most(1.2, f"{what}: requests", "any", "", requests, limit))
    return rows


def _make_database(directory):
    """Make a database of blobs, most of them rewritten once, in ``directory``/made.fs.

    :returns: the keys of the current revisions, and those of the others
    """
    blobs = directory / "blobs"
    db = DB(FileStorage(str(directory / "made.fs"), blob_dir=str(blobs)))
    connection = db.open()
    connection.root()["blobs"] = items = [Blob(b"x") for _ in range(LIVE)]
    transaction.commit()
    garbage = [blob_key(*revision(blob)) for blob in items[:GARBAGE]]
    for blob in items[:GARBAGE]:
        with blob.open("w") as file:
            file.write(b"y")
    transaction.commit()
    live = [blob_key(*revision(blob)) for blob in items]
    connection.close()
    db.close()
    shutil.rmtree(blobs)
    return live, garbage


@contextmanager
def _null(directory, keys):
    with NullS3(keys=keys) as server:
        yield new_bucket(server)


@contextmanager
def _rclone(directory, keys):
    with EmbeddedS3(directory / "rclone") as server:
        location = new_bucket(server)
        # Written beside the server, since 21,000 PUT requests would take longer than all the rest.
        bucket = Path(server.directory, "buckets", location.bucket)
        for key in keys:
            path = bucket / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        yield location


class Bench:
    """The same pack in two ways, each time on a fresh copy of the database and the bucket."""

    def __init__(self, directory, server, live, garbage):
        self._directory = directory
        self._server = server
        self._live = live
        self._garbage = garbage
        self.requests = {}

    @contextmanager
    def _arranged(self, who):
        with (
            workspace() as directory,
            self._server(directory, self._live + self._garbage) as location,
            LatencyProxy(location.endpoint_url) as proxy,
        ):
            shutil.copyfile(self._directory / "made.fs", directory / "Data.fs")
            yield directory, replace(location, endpoint_url=proxy.endpoint_url)
            self.requests[who] = proxy.stats()["requests"]
            left = sorted(_listing(boto3_client(location), location.bucket))
            assert left == sorted(self._live), f"{who}: {len(left)} keys are left"

    def reference(self):
        """FileStorage's pack, a listing and batch deletes; return the seconds."""
        with self._arranged("reference") as (directory, location):
            base = FileStorage(str(directory / "Data.fs"))
            seconds = timed(self._bare, base, boto3_client(location), location.bucket)
            base.close()
        return seconds

    def _bare(self, base, client, bucket):
        base.pack(time.time(), referencesf)
        delete_garbage(client, bucket, self._garbage)

    def ours(self):
        """Pack through the storage; return the seconds."""
        with self._arranged("ours") as (directory, location):
            db = DB(open_storage(directory, location))
            seconds = timed(db.storage.pack, time.time(), referencesf)
            db.close()
        return seconds


def delete_garbage(client, bucket, garbage):
    """List a bucket and delete the garbage in it, with plain boto3."""
    listed = set(_listing(client, bucket))
    garbage = [key for key in garbage if key in listed]
    for start in range(0, len(garbage), BATCH):
        objects = [{"Key": key} for key in garbage[start : start + BATCH]]
        client.delete_objects(Bucket=bucket, Delete={"Objects": objects, "Quiet": True})


def _listing(client, bucket):
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        yield from (item["Key"] for item in page.get("Contents", ()))
