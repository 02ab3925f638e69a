"""Sweeps of a bucket with 10 garbage keys in 21: what the modules of the bases share."""

from contextlib import contextmanager
from dataclasses import replace
import os
import time

from persistent.timestamp import TimeStamp
from ZODB.Connection import TransactionMetaData
from ZODB.utils import newTid
from ZODB.utils import p64

from tests.services.location import boto3_client
from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.records import with_reference

from .common import BLOB_RECORD
from .common import open_storage
from .common import timed
from .common import workspace
from .null_s3 import NullS3
from .packing import delete_garbage


DAY = 86400
RECORD = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x01." + os.urandom(450)


class Keys:
    """A database of blobs that were stored two days ago, and a bucket with garbage beside them."""

    def __init__(self, count):
        self.stamps = [(p64(number), new_stamp()) for number in range(1, count * 11 // 21 + 1)]
        self.live = [blob_key(oid, stamp) for oid, stamp in self.stamps]
        oids = [oid for oid, _stamp in self.stamps[: count - len(self.live)]]
        self.garbage = [blob_key(oid, new_stamp()) for oid in oids]

    def store(self, storage, others=0):
        """Make a storage have the records, all in one transaction, and close it.

        :param int others: records for each blob that are no blob's.
        """
        then = TimeStamp(newTid(None)).timeTime() - 2 * DAY
        tid = TimeStamp(*time.gmtime(then)[:6]).raw()
        txn = TransactionMetaData()
        storage.tpc_begin(txn, tid)
        for oid, stamp in self.stamps:
            storage.restore(oid, tid, with_reference(BLOB_RECORD, stamp), "", None, txn)
        blobs = len(self.stamps)
        for number in range(blobs + 1, blobs * (1 + others) + 1):
            storage.restore(p64(number), tid, RECORD, "", None, txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        storage.close()


class SweepBench:
    """The same sweep, each time of a fresh bucket.

    :param base: the section of the storage inside.
    :param opened: called with each storage before it sweeps.
    """

    def __init__(self, keys, base, opened=lambda storage: None):
        self._keys = keys
        self._base = base
        self._opened = opened
        self.requests = None

    @contextmanager
    def _arranged(self):
        keys = self._keys.live + self._keys.garbage
        with NullS3(keys=keys) as server, LatencyProxy(server.endpoint_url) as proxy:
            location = replace(new_bucket(server), endpoint_url=proxy.endpoint_url)
            proxy.reset()
            yield location
            self.requests = proxy.stats()["requests"]

    def reference(self):
        """A listing and batch deletes; return the seconds."""
        with self._arranged() as location:
            client = boto3_client(location)
            return timed(delete_garbage, client, location.bucket, self._keys.garbage)

    def ours(self):
        """Sweep through the storage; return the seconds."""
        with workspace() as directory, self._arranged() as location:
            storage = open_storage(directory, location, base=self._base)
            self._opened(storage)
            begun = time.perf_counter()
            report = storage.sweep()
            seconds = time.perf_counter() - begun
            storage.close()
            assert report.deleted == len(self._keys.garbage), report
        return seconds
