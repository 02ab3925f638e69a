"""Commits in any order, with faults anywhere: no byte is lost, and nothing stays that nobody needs.

A state machine drives a storage over a bucket in memory and a cache that is too small, and knows
what every revision must hold. A short run, always the same, is part of the suite. For a long one,
another with each seed::

    ZODB_S3BLOBS_EXAMPLES=5000 pytest tests/test_commit_machine.py -k runTest --hypothesis-seed=1
"""

from base64 import encodebytes
from contextlib import contextmanager
from contextlib import nullcontext
from contextlib import suppress
from functools import partial
import gc
import os
import shutil
import sys
import tempfile
import threading
import time
from typing import NamedTuple
from unittest import mock

from hypothesis import HealthCheck
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize
from hypothesis.stateful import invariant
from hypothesis.stateful import precondition
from hypothesis.stateful import rule
from hypothesis.stateful import RuleBasedStateMachine
from persistent.TimeStamp import TimeStamp
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.FileStorage.fspack import PackError
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.POSException import StorageError
from ZODB.POSException import StorageTransactionError
from ZODB.POSException import UndoError
from ZODB.serialize import referencesf
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64
from zope.interface import implementer

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.cancellation import Cancellation
from zodb_s3blobs.cancellation import UploadCancelled
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import IS3Client
from zodb_s3blobs.interfaces import ListedObject
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import S3OperationError
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.keys import TID_SIZE
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.sections import Section
from zodb_s3blobs.spool import Spool
from zodb_s3blobs.stats import ClientCounters
from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.uploads import UploadPool

from .caches import committed_size
from .conftest import fast_directory
from .services.location import new_bucket
from .storages import BLOB_RECORD
from .storages import leftovers
from .storages import load
from .storages import make_client
from .storages import PATIENCE
from .storages import read
from .storages import start
from .storages import write_file
from .test_s3client import source  # noqa: F401
from .test_s3client import target  # noqa: F401
from .test_s3client import test_client_provides_its_interface  # noqa: F401
from .test_s3client import test_closed_client_opens_again  # noqa: F401
from .test_s3client import test_deleting_an_absent_object_succeeds  # noqa: F401
from .test_s3client import test_file_comes_back_as_it_was_sent  # noqa: F401
from .test_s3client import test_full_disk_is_an_os_error  # noqa: F401
from .test_s3client import test_listing_of_nothing_is_empty  # noqa: F401
from .test_s3client import test_local_file_that_is_missing_is_an_os_error  # noqa: F401
from .test_s3client import test_missing_object_is_told_apart_from_a_missing_bucket  # noqa: F401
from .test_s3client import test_upload_again_replaces_the_object  # noqa: F401
from .test_s3range import test_missing_object_is_told_at_the_opening  # noqa: F401
from .test_s3range import test_object_that_vanishes_during_a_read_is_missing  # noqa: F401
from .test_s3range import test_parts_of_an_empty_object_are_empty  # noqa: F401
from .test_s3range import test_reader_waits_where_it_is_told  # noqa: F401


EXAMPLES = os.environ.get("ZODB_S3BLOBS_EXAMPLES")


# A bucket in memory


class Bucket:
    """What a server keeps: (bytes, time of the upload) by key; the clients of a bucket share it.

    :ivar known: all keys that there ever were
    """

    def __init__(self):
        self.objects = {}
        self.known = set()

    def put(self, key, data):
        self.objects[key] = data, time.time()
        self.known.add(key)

    def contents(self):
        """Return the bytes of all objects by key."""
        return {key: data for key, (data, _time) in self.objects.items()}


class Told(NamedTuple):
    """How a call is to fail."""

    #: "transient" or "permanent": before anything has happened; "lost": after all has;
    #: "half": after a part has; "refused": by the server, which says so in its answer
    how: str
    #: how many calls go well before
    after: int


@implementer(IS3Client)
class MemoryClient:
    """A client of a `Bucket`, whose operations fail as they are told.

    :param int page: how many objects a page of a listing has.
    :ivar calls: (operation, key) of all calls
    :ivar fired: the operations that have failed as they were told
    :ivar outage: so many calls fail from now on
    :ivar holds: uploads wait until they are let go of, or cancelled
    :ivar heeds: a cancelled upload that waits is given up; otherwise it is done all the same
    """

    bucket_name = "memory"
    is_read_only = False
    signs_urls = False

    def __init__(self, bucket, page=1000):
        self.counters = ClientCounters()
        self.bucket = bucket
        self.calls = []
        self.fired = []
        self.outage = 0
        self.holds = False
        self.heeds = True
        #: how many uploads wait
        self.held = 0
        self.changed = threading.Condition()
        self._page = page
        self._told = {}

    @property
    def is_down(self):
        return self.outage > 0

    def fail(self, operation, how, after=0):
        """Let one call of an operation fail."""
        self._told[operation] = Told(how, after)

    def behave(self):
        """Forget all faults."""
        self.outage = 0
        self._told.clear()
        self.release()

    def release(self):
        """Let go of what waits."""
        with self.changed:
            self.holds = False
            self.changed.notify_all()

    def notify(self):
        with self.changed:
            self.changed.notify_all()

    def _trouble(self, operation, key):
        """Return how this call is to fail, or None."""
        with self.changed:
            self.calls.append((operation, key))
            how = None
            if self.outage:
                self.outage -= 1
                how = "transient"
            elif operation in self._told:
                told = self._told.pop(operation)
                if told.after:
                    self._told[operation] = told._replace(after=told.after - 1)
                else:
                    how = told.how
            if how:
                self.fired.append(operation)
            return how

    def _do(self, operation, key, action, half=lambda: None):
        how = self._trouble(operation, key)
        if how in ("transient", "permanent"):
            raise failure(operation, key, how)
        if how == "half":
            half()
            raise failure(operation, key, "transient")
        result = action()
        if how == "lost":
            raise failure(operation, key, "transient")
        return result

    def check_owner(self, marks=False):
        pass  # nobody else has it

    def _get(self, operation, key):
        if key not in self.bucket.objects:
            raise failure(operation, key, "missing")
        return self.bucket.objects[key][0]

    def upload_file(self, local_path, s3_key, cancelled=None):
        with open(local_path, "rb") as file:
            data = file.read()
        if cancelled is not None:
            self._wait(cancelled)
        self._do("upload", s3_key, lambda: self.bucket.put(s3_key, data))

    def _wait(self, cancelled):
        cancelled.add_action(self.notify)
        with self.changed:
            self.held += 1
            self.changed.notify_all()
            let_go = self.changed.wait_for(lambda: not self.holds or cancelled, PATIENCE)
            self.held -= 1
        assert let_go, "nobody lets go of an upload"
        if cancelled and self.heeds:
            raise UploadCancelled

    def download_file(self, s3_key, local_path):
        def write(change=bytes):
            data = change(self._get("download", s3_key))
            with open(local_path, "wb") as file:
                file.write(data)

        def spoil():
            write(lambda data: data[: len(data) // 2] + b"?")
            raise failure("download", s3_key, "damaged")

        self._do("download", s3_key, write, spoil)

    def verify_file(self, s3_key, local_path):
        def verify():
            with open(local_path, "rb") as file:
                if file.read() != self._get("verify", s3_key):
                    raise failure("verify", s3_key, "damaged")

        self._do("head", s3_key, verify)

    def open_range(self, s3_key, start=0, stop=None, waiting=nullcontext):
        if stop is not None and stop <= start:
            raise ValueError(f"a range has a byte at least, not {start} to {stop}")
        self._do("range", s3_key, lambda: self._get("read", s3_key))
        return MemorySection(self.bucket, s3_key, start, stop, waiting)

    def object_size(self, s3_key):
        return self._do("head", s3_key, lambda: len(self._get("head", s3_key)))

    def presigned_url(self, s3_key, expires_in=60, content_type=None, content_disposition=None):
        return None

    def copy_object(self, source_key, target_key):
        def copy():
            self.bucket.put(target_key, self._get("copy", source_key))

        self._do("copy", source_key, copy)

    def delete_object(self, s3_key):
        self._do("delete", s3_key, lambda: self._delete([s3_key]))

    def _delete(self, keys):
        for key in keys:
            self.bucket.objects.pop(key, None)
        return {}

    def delete_objects(self, s3_keys):
        keys = list(s3_keys)
        if not keys:
            return {}
        if self._told.get("delete") == Told("refused", 0) and not self.outage:
            self._trouble("delete", keys[0])
            self._delete(keys[1:])
            return {keys[0]: "AccessDenied"}
        half = keys[: len(keys) // 2]
        return self._do("delete", keys[0], lambda: self._delete(keys), lambda: self._delete(half))

    def head_object(self, s3_key):
        def head():
            found = self.bucket.objects.get(s3_key)
            return found and {"ContentLength": len(found[0])}

        return self._do("head", s3_key, head)

    def list_objects(self, prefix):
        for page in self.list_pages(prefix):
            for listed in page:
                yield listed.key

    def list_pages(self, prefix, after=""):
        while page := self._do("list", prefix, partial(self._list, prefix, after)):
            yield page
            after = page[-1].key

    def _list(self, prefix, after):
        keys = [key for key in self.bucket.objects if key.startswith(prefix) and key > after]
        found = [(key, *self.bucket.objects[key]) for key in sorted(keys)[: self._page]]
        return [ListedObject(key, len(data), when, time.time()) for key, data, when in found]

    def close(self):
        pass


class MemorySection(Section):
    """A part of an object."""

    def __init__(self, bucket, key, start, stop, waiting):
        start, stop, _step = slice(start, stop).indices(len(bucket.objects[key][0]))
        super().__init__(start, max(start, stop))
        self._bucket, self._key, self._waiting = bucket, key, waiting

    def _read_at(self, position, view):
        with self._waiting():
            if self._key not in self._bucket.objects:
                raise failure("read", self._key, "missing")
            data, _time = self._bucket.objects[self._key]
        part = data[position : position + len(view)]
        view[: len(part)] = part
        return len(part)


def failure(operation, key, how):
    """Return the error of an operation that has failed."""
    kinds = {
        "transient": TransientS3Error,
        "permanent": PermanentS3Error,
        "damaged": IntegrityError,
        "missing": MissingObjectError,
    }
    error = kinds[how](f"S3 {operation} failed for {key!r}: {how}, says the test")
    error.operation, error.key = operation, key
    return error


# The bucket in memory keeps the contract of a real one


@pytest.fixture
def moto():
    """In the place of a bucket on a server, for the tests of S3Client that need no more."""
    return Bucket()


location = s3 = moto


@pytest.fixture
def connect():
    """Return what makes a client; the options of a real one make no difference here."""
    return lambda bucket, **options: MemoryClient(bucket)


@pytest.fixture(params=["memory", "rclone"])
def client(request):
    if request.param == "memory":
        yield MemoryClient(Bucket())
    else:
        client = make_client(new_bucket(request.getfixturevalue("rclone")))
        yield client
        client.close()


KEYS = ["blobs/1/1.blob", "blobs/1/a.blob", "blobs/10/1.blob", "blobs/2/1.blob"]


def put(client, *keys, data=b"0123456789"):
    path = write_file(data)
    for key in keys:
        client.upload_file(path, key)
    os.remove(path)


def test_listing_is_sorted_and_goes_on_behind_a_key(client):
    """Whether there is such a key or not; it tells sizes, and ages by the server's clock."""
    put(client, *reversed(KEYS), "elsewhere/1")
    assert list(client.list_objects("blobs/")) == KEYS
    pages = list(client.list_pages("blobs/"))
    assert [listed.key for page in pages for listed in page] == KEYS
    assert {listed.size for page in pages for listed in page} == {10}
    assert all(0 <= listed.age < 60 for page in pages for listed in page)
    for after, expected in ((KEYS[1], KEYS[2:]), ("blobs/1/11", KEYS[1:]), (KEYS[3], [])):
        found = [listed.key for page in client.list_pages("blobs/", after) for listed in page]
        assert found == expected


def test_pages_have_as_many_objects_as_they_are_told(moto):
    """So that a sweep has something to turn over."""
    client = MemoryClient(moto, page=3)
    put(client, *KEYS)
    assert [len(page) for page in client.list_pages("")] == [3, 1]


def test_copy_has_the_bytes_of_its_source(client, tmp_path):
    """Under its own key, and the source stays."""
    put(client, KEYS[0])
    client.copy_object(KEYS[0], KEYS[1])
    for number in (0, 1):
        client.download_file(KEYS[number], f"{tmp_path}/{number}")
        assert (tmp_path / f"{number}").read_bytes() == b"0123456789"
    assert client.object_size(KEYS[1]) == 10


def test_deleted_objects_are_gone_and_others_stay(client):
    """One by one, and many at a time."""
    put(client, *KEYS)
    client.delete_object(KEYS[0])
    assert client.delete_objects([KEYS[1], KEYS[3], "blobs/none"]) == {}
    assert list(client.list_objects("")) == [KEYS[2]]
    assert client.head_object(KEYS[0]) is None
    assert client.head_object(KEYS[2])["ContentLength"] == 10


def test_file_is_compared_with_its_object(client, tmp_path):
    """Also where only a byte differs."""
    put(client, KEYS[0])
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    client.verify_file(KEYS[0], str(path))
    path.write_bytes(b"0123456780")
    with pytest.raises(IntegrityError):
        client.verify_file(KEYS[0], str(path))
    with pytest.raises(MissingObjectError):
        client.verify_file(KEYS[1], str(path))


def test_part_has_the_bytes_from_start_to_below_stop(client):
    """As a slice has them."""
    put(client, KEYS[0])
    for bounds in ((0, None), (3, 7), (3, 100), (10, None), (50, 60)):
        with client.open_range(KEYS[0], *bounds) as section:
            assert section.seek(0, os.SEEK_END) == len(b"0123456789"[slice(*bounds)])
            section.seek(0)
            assert section.read() == b"0123456789"[slice(*bounds)]
    with pytest.raises(ValueError, match="a byte at least"):
        client.open_range(KEYS[0], 5, 5)


@pytest.mark.parametrize("heeds", [True, False])
def test_upload_that_waits_ends_when_it_is_cancelled(moto, heeds):
    """Real ones of large files are given up then, and those of small ones are done."""
    client, cancelled = MemoryClient(moto), Cancellation()
    client.holds, client.heeds = True, heeds
    path = write_file(b"bytes")
    thread = start(client.upload_file, path, KEYS[0], cancelled)
    with client.changed:
        assert client.changed.wait_for(lambda: client.held, PATIENCE)
    assert moto.contents() == {}
    cancelled.cancel()
    if heeds:
        with pytest.raises(UploadCancelled):
            thread.result()
    else:
        thread.result()
    assert len(moto.contents()) == (not heeds)
    os.remove(path)


FAILED_UPLOADS = [
    ("transient", TransientS3Error, False),
    ("permanent", PermanentS3Error, False),
    ("lost", TransientS3Error, True),
]


@pytest.mark.parametrize(("how", "error", "arrives"), FAILED_UPLOADS)
def test_operation_fails_once_as_it_was_told(moto, how, error, arrives):
    """At the call that was named, before or after it has had an effect."""
    client = MemoryClient(moto)
    client.fail("upload", how, after=1)
    put(client, KEYS[0])
    with pytest.raises(error):
        put(client, KEYS[1])
    assert (KEYS[1] in moto.contents()) == arrives
    put(client, KEYS[2])
    assert client.fired == ["upload"]


# What the machine drives


class PackRefused(Exception):
    """Without a collection of garbage ZODB 6.4 loses what undone transactions refer back to."""


class Watched:
    """A base that fails as it is told, and shows what was safe when it was told to finish.

    :ivar trouble: "vote", "finish", or "answer", which is lost after the finish; told once
    :ivar safe: returns the bytes by key that are safe now
    :ivar finished: (tid, what was safe then) of each transaction
    """

    trouble = None

    def _fail(self, what):
        if self.trouble == what:
            self.trouble = None
            raise StorageError(f"the {what} failed, says the test")

    def _refuse_to_wait(self):
        """Fail where the machine's own thread would wait for ever."""
        if threading.current_thread() is threading.main_thread():
            assert self.tpc_transaction() is None, "somebody has kept the base's lock"

    def pack(self, *args, gc):
        self._refuse_to_wait()
        try:
            super().pack(*args, gc=gc)
        except (PackError, AssertionError) as error:
            if gc:
                raise
            raise PackRefused from error

    def tpc_begin(self, transaction, *args):
        self._refuse_to_wait()
        super().tpc_begin(transaction, *args)

    def tpc_vote(self, transaction):
        self._fail("vote")
        return super().tpc_vote(transaction)

    def tpc_finish(self, transaction, f=lambda tid: None):
        if self.trouble == "finish":
            super().tpc_abort(transaction)  # a FileStorage gives its lock back then, too
        self._fail("finish")
        safe = self.safe()
        tid = super().tpc_finish(transaction, f)
        self.finished.append((tid, safe))
        self._fail("answer")
        return tid


class WatchedFileStorage(Watched, FileStorage):
    pass


class WatchedMappingStorage(Watched, MappingStorage):
    def close(self):
        """Keep what is in memory, as a file would."""


class WatchedPool(UploadPool):
    """One thread for uploads; tells what it was given, and when nothing moves any more."""

    def __init__(self, client):
        super().__init__(1)
        self.futures = []
        self._client = client

    def start(self, work):
        upload = super().start(work)
        self.futures.append(upload.future)
        upload.future.add_done_callback(lambda _future: self._client.notify())
        return upload

    def settle(self):
        """Wait until everything is done, or waits at the client."""
        with self._client.changed:
            assert self._client.changed.wait_for(self._is_at_rest, PATIENCE), "uploads do not end"

    def _is_at_rest(self):
        is_done = all(future.done() for future in self.futures)
        return is_done or (self._client.holds and self._client.held == 1)


class WatchedSpool(Spool):
    """Shows nobody what transactions have left unless that is wanted; a thread looks all the time.

    :ivar is_drained: whether that is wanted
    """

    is_drained = False

    def journals(self):
        return super().journals() if self.is_drained else iter(())


class Clock:
    """Tells a time in seconds that goes on only when it is told to."""

    def __init__(self):
        self.now = 1_750_000_000.0

    def __call__(self):
        return self.now


class Revision(NamedTuple):
    tid: bytes
    #: the blob's bytes; of the root (name, oid) of all blobs in it; None for an undone creation
    data: object
    #: under which it is in the bucket
    key: str | None = None


class Work:
    """A transaction that the machine drives by hand.

    :ivar state: "waiting" in `tpc_begin`, "open", "voted", or "failed", which only an abort ends
    """

    def __init__(self):
        self.meta = TransactionMetaData()
        self.state = "open"
        self.thread = None
        #: bytes, serial and upload by oid
        self.stores = {}
        #: tids of what it undoes; by oid what becomes current by that, and what was before
        self.undoes = []
        self.undone = {}
        self.seen = {}
        self.copies = []
        #: of what it has uploaded, as far as that is known
        self.keys = set()
        #: whether the base has a reason to refuse an undo
        self.is_doubtful = False
        #: whether what it has sent may stay there though it commits without that
        self.leaves_garbage = False

    @property
    def oids(self):
        return {*self.stores, *self.undone}

    @property
    def changes(self):
        """Bytes by oid."""
        undone = {oid: before and before.data for oid, before in self.undone.items()}
        return {**{oid: data for oid, (data, *_rest) in self.stores.items()}, **undone}


class Session:
    """A connection whose blobs are changed, and what they must hold.

    :param view: bytes by name.
    :param serials: what is current when it begins, by oid.
    :ivar touched: (blob, bytes) by identity of what was changed
    """

    def __init__(self, db, view, serials):
        self.manager = transaction.TransactionManager()
        self.manager.begin()
        db.cacheMinimize()  # what is committed by hand tells no connection
        self.connection = db.open(self.manager)
        self.view = view
        self.serials = serials
        self.touched = {}
        self.changes_root = False
        #: whether a pack may have taken what it looks at
        self.is_old = False
        #: names of blobs that ZODB 6.4, with any storage, shows as they were before a roll-back
        self.spoilt = set()
        self._savepoints = []

    @property
    def _root(self):
        return self.connection.root()

    def replace(self, name, data):
        self._root[name] = Blob(data)
        self.changes_root = True
        self._note(name, data)

    def write(self, name, data):
        with self._root[name].open("w") as file:
            file.write(data)
        self._note(name, data)

    def append(self, name, data):
        with self._root[name].open("a") as file:
            file.write(data)
        self._note(name, self.view[name] + data)

    def patch(self, name, data):
        with self._root[name].open("r+") as file:
            file.write(data)
        self._note(name, data + self.view[name][len(data) :])

    def _note(self, name, data):
        blob = self._root[name]
        self.view[name] = data
        self.touched[id(blob)] = blob, data
        self.spoilt.discard(name)

    def delete(self, name):
        del self._root[name]
        del self.view[name]
        self.changes_root = True

    def savepoint(self):
        point = self.manager.savepoint()
        state = dict(self.view), dict(self.touched), self.changes_root
        self._savepoints.append((point, state))

    def roll_back(self, which):
        del self._savepoints[which % len(self._savepoints) + 1 :]
        point, (view, touched, self.changes_root) = self._savepoints[-1]
        point.rollback()
        self.spoilt |= {name for name, data in view.items() if self.view.get(name) != data}
        self.view, self.touched = dict(view), dict(touched)

    @property
    def has_savepoints(self):
        return bool(self._savepoints)

    def read(self, name):
        return read(self._root[name])

    def changed(self):
        """Return bytes by oid of what was changed and has an oid."""
        return {blob._p_oid: data for blob, data in self.touched.values() if blob._p_oid}

    def names(self):
        """Return (name, oid) of all there is, after the commit."""
        return tuple(sorted((name, self._root[name]._p_oid) for name in self.view))

    def close(self):
        self.manager.abort()
        self.connection.close()


GRACE = 60.0
NAMES = st.sampled_from(["a", "b", "c"])
# Some do not fit into the cache, and most only a few at a time.
SIZES = st.sampled_from([0, 1, 40, 150, 300, 700])
CACHE_SIZE = 500
WHICH = st.integers(0, 9)
WAYS = st.sampled_from(["replace", "write", "append", "patch"])
FAULTS = [
    *((operation, how) for operation in ("upload", "copy") for how in ("transient", "lost")),
    *((operation, "permanent") for operation in ("upload", "copy", "download", "list", "delete")),
    *((operation, "transient") for operation in ("download", "list", "range", "head", "delete")),
    ("download", "half"),
    *(("delete", how) for how in ("half", "lost", "refused")),
]
TROUBLES = st.one_of(
    st.none(),
    st.builds(lambda fault, after: (*fault, after), st.sampled_from(FAULTS), st.integers(0, 2)),
    st.tuples(st.just("base"), st.sampled_from(["vote", "finish", "answer"])),
    st.tuples(st.just("outage"), st.integers(1, 9)),
    st.tuples(st.just("hold"), st.booleans()),
)
# What happens between two steps of a transaction
INTERLUDES = st.sampled_from(["", "", "sweep", "evict", "abort", "crash"])


def has(*states):
    """Return a precondition: whether a transaction is in one of these states."""
    return lambda self: any(work.state in states for work in self.works)


def tid_of(moment):
    """Return the tid of a time, as the bases make it."""
    return TimeStamp(*time.gmtime(moment)[:5], moment % 60).raw()


def close_files_below(directory):
    """Close what nobody has closed, as the system does for a process that is killed.

    The numbers stay taken: who closes them once more must not close another's file.
    """
    with open(os.devnull, "r+b") as nothing:
        for file in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                if os.readlink(f"/proc/self/fd/{file}").startswith(directory):
                    os.dup2(nothing.fileno(), int(file), inheritable=False)


class CommitMachine(RuleBasedStateMachine):
    """What is the same over each base.

    The model knows what was committed. The base is asked for two things only: for the reference in
    a record, and whether a revision that it may forget is still there.
    """

    #: what the storage may be opened with
    addressings = ()
    undoes = True
    #: whether a pack that collects garbage keeps what was stored since, though nothing refers to it
    keeps_unlinked = True

    # Opening and closing

    def __init__(self):
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="machine-", dir=fast_directory())
        self.clock = Clock()
        self.patch = mock.patch("time.time", self.clock)
        self.patch.start()
        self.bucket = Bucket()
        #: revisions by oid, the oldest first; the root is among them
        self.history = {}
        #: (tid, oids) of all transactions
        self.log = []
        self.last_stop = z64
        #: what has begun, or waits for that
        self.works = []
        #: whoever has the lock of the base
        self.holder = None
        self.storage = self.session = None
        #: keys that may be there though nobody needs them
        self.garbage = set()
        #: whether this step may leave some behind
        self.is_excused = False
        self.fired = self.steps = self.count = 0
        #: whether room in the cache is taken by somebody who was killed
        self.room_is_lost = False
        self.was_rewritten = False
        #: names of files that are kept beside the cache
        self.beside = set()

    @initialize(
        addressing=WHICH,
        grace=st.sampled_from([0.0, GRACE]),
        page=st.integers(1, 4),
        spools=st.booleans(),
    )
    def begin_all(self, addressing, grace, page, spools):
        self.grace, self.page, self.spools = grace, page, spools
        self.base = self.new_base()
        self.open(addressing)
        self.history[z64] = [Revision(self.storage.lastTransaction(), ())]
        # One that stays: a sweep refuses a bucket in which no key is surely ours.
        self.write_by_connection("anchor", "replace", 10)
        self.anchor = dict(self.current(z64).data)["anchor"]
        self.log.clear()

    def new_base(self):
        return WatchedFileStorage(f"{self.directory}/Data.fs")

    def open(self, addressing):
        self.addressing = self.addressings[addressing % len(self.addressings)]
        self.clock.now += 1
        self.client = MemoryClient(self.bucket, self.page)
        self.fired = 0
        self.pool = WatchedPool(self.client)
        self.cache = S3BlobCache(f"{self.directory}/cache", CACHE_SIZE)
        self.spool = WatchedSpool(f"{self.directory}/spool", ["memory"]) if self.spools else None
        self.base.safe, self.base.finished, self.base.trouble = self.safe, [], None
        self.storage = S3BlobStorage(
            self.base,
            self.client,
            self.cache,
            pool=self.pool,
            addressing=self.addressing,
            gc_grace=self.grace,
            spool=self.spool,
        )
        self.db = DB(self.storage)
        self.highest = max([*self.history, z64])

    def safe(self):
        """Return all bytes, by key, that are in the bucket or the spool."""
        found = self.bucket.contents()
        for key, path in sorted(self.spooled()):  # the last one counts
            with open(path, "rb") as file:
                found[key] = file.read()
        return found

    def spooled(self):
        """Return the keys of what is in the spool, and the paths of the files."""
        if self.spool is None:
            return set()
        directory = f"{self.directory}/spool/blobs"
        files = [name for name in os.listdir(directory) if name.endswith(".blob")]
        names = [name.split("-", 2) for name in files]
        return {
            (f"blobs/{oid}/{name}.blob", f"{directory}/{oid}-{name}-{rest}")
            for oid, name, rest in names
        }

    @property
    def by_tid(self):
        return self.addressing == "tid"

    def is_idle(self):
        return not self.works and self.session is None

    def lock_is_free(self):
        return self.holder is None

    def nobody_waits(self):
        return not has("waiting")(self)

    @precondition(is_idle)
    @rule(addressing=WHICH, loses_cache=st.booleans())
    def reopen(self, addressing, loses_cache):
        """Close, and open again: with another addressing perhaps, or an empty cache."""
        self.db.close()
        self.forget()
        if loses_cache:
            shutil.rmtree(f"{self.directory}/cache")
            self.room_is_lost = False
        self.base = self.reopened_base()
        self.open(addressing)

    @precondition(nobody_waits)
    @rule(addressing=WHICH, arrives=st.booleans())
    def crash(self, addressing, arrives):
        """Close without a word to what is open, much as a process does that is killed.

        :param bool arrives: what was being sent does.
        """
        self.client.outage = 0 if arrives else 1000
        self.client.release()
        self.pool.close()
        self.abandon_base()
        self.db.close()
        self.works.clear()
        self.forget()
        close_files_below(self.directory)
        self.room_is_lost = self.is_excused = True
        self.base = self.reopened_base()
        self.open(addressing)

    def abandon_base(self):
        """Let nobody keep the lock of a base that lives on."""

    def forget(self):
        """Give up all objects, with which the locks on temporary files go."""
        self.holder = self.session = self.storage = self.db = self.cache = self.pool = None
        self.base = self.kept_base()
        self.beside.clear()
        gc.collect()

    def kept_base(self):
        return None

    def reopened_base(self):
        return self.new_base()

    def teardown(self):
        try:
            if sys.exc_info()[0] is None:
                self.end_well()
        finally:
            if self.storage is not None:
                self.client.release()
                self.storage.close()
            self.patch.stop()
            shutil.rmtree(self.directory)
            self.works.clear()
            self.db = self.storage = self.cache = self.base = self.pool = self.session = None
            gc.collect()

    def end_well(self):
        """All that is committed can be read, and all that is not needed goes."""
        self.client.behave()
        self.base.trouble = None
        if self.session is not None:
            self.abort_session()
        while self.works:
            self.abort(0, False)
        self.check_everything()
        if self.spool is not None:
            self.drain()
            assert self.spooled() == set()
        # A key that is still taken to be in flight would be spared, and so is one from the future.
        self.write_by_connection("a", "replace", 10)
        self.pack(len(self.log), True)
        for key in self.bucket.known - self.allowed():
            if parse_key(key)[0] <= self.highest:
                self.bucket.put(key, b"planted")
        self.pass_time(GRACE + 1)
        self.sweep(False)
        self.check_everything()
        assert self.cache.check() == [] or self.room_is_lost

    # The model

    def current(self, oid):
        return self.history[oid][-1] if self.history.get(oid) else None

    def serial(self, oid):
        current = self.current(oid)
        return current and current.tid

    def is_live(self, oid):
        current = self.current(oid)
        return current is not None and current.data is not None

    def before(self, oid, tid):
        """Return the last revision before a tid, None if there is none."""
        found = [revision for revision in self.history.get(oid, ()) if revision.tid < tid]
        return found[-1] if found else None

    def revisions(self):
        """Return (oid, revision) of all blobs that must be readable."""
        return [
            (oid, revision)
            for oid, revisions in self.history.items()
            for revision in revisions
            if oid != z64 and revision.data is not None
        ]

    def needed(self):
        """Return what must be safe, bytes by key."""
        return {revision.key: revision.data for _oid, revision in self.revisions()}

    def allowed(self):
        """Return the keys that may be in the bucket for ever."""
        copies = set()
        if self.was_rewritten:
            copies = {blob_key(oid, revision.tid) for oid, revision in self.revisions()}
        return copies | set(self.needed())

    def unneeded(self):
        return set(self.bucket.objects) - self.allowed()

    def in_flight(self, key):
        return any(parse_key(key)[0] in work.oids for work in self.works)

    def may_stay(self, key):
        """Return whether a sweep may leave garbage alone."""
        # Uploads that were held are not known by their keys; connections ask for more oids.
        is_doubtful = self.in_flight(key) or parse_key(key)[0] > self.highest
        return is_doubtful or self.is_spared(key)

    def is_spared(self, key):
        """Return whether a sweep leaves garbage alone."""
        oid, name = parse_key(key)
        if any(key in work.keys for work in self.works):
            return True
        if len(name) == TID_SIZE:
            return name > self.storage.lastTransaction()
        _data, uploaded = self.bucket.objects[key]
        times = [uploaded]
        if self.history.get(oid):
            times.append(TimeStamp(self.serial(oid)).timeTime())
        return any(self.clock() - when < self.grace for when in times)

    def key_of(self, oid, tid):
        """Return the key that the record of a revision refers to."""
        stamp = read_reference(self.base.loadSerial(oid, tid))
        return blob_key(oid, stamp or tid)

    def stored_by(self, tid):
        """Return the oids that a transaction has stored."""
        return {record.oid for each in self.storage.iterator(tid, tid) for record in each}

    def fresh(self, size):
        """Return bytes that are nowhere else, where there are enough of them."""
        self.count += 1
        return (b"%d " % self.count * size)[:size]

    def committed(self, tid, changes, safe):
        """Take note of a transaction, whose bytes must have been safe before it."""
        for oid, data in changes.items():
            key = None
            if oid != z64 and data is not None:
                key = self.key_of(oid, tid)
                assert safe.get(key) == data, f"{key} was not safe when the base finished"
            self.history.setdefault(oid, []).append(Revision(tid, data, key))
            self.highest = max(self.highest, oid)
        self.log.append((tid, frozenset(changes)))

    # What always holds

    @invariant()
    def all_is_well(self):
        self.steps += 1
        safe = self.safe()
        for key, data in self.needed().items():
            assert safe.get(key) == data, f"{key} is lost"
        self.check_garbage()
        revisions = self.revisions()
        for number in range(len(revisions) if EXAMPLES else 2):
            self.check_read(*revisions[(self.steps + number) % len(revisions)])
        assert committed_size(self.cache.cache_dir) <= CACHE_SIZE
        for oid, revision in self.revisions():
            if len(revision.data) > CACHE_SIZE and (path := self.cache.get(oid, revision.tid)):
                self.beside.add(os.path.basename(path))
        if self.is_idle():
            self.check_idle()

    def check_garbage(self):
        """Nothing is there that nobody needs, but for what could not be removed."""
        fired = self.client.fired[self.fired :]
        self.fired = len(self.client.fired)
        unneeded = self.unneeded()
        found = {key for key in unneeded if not self.in_flight(key)}
        if not self.is_excused and "delete" not in fired:
            assert found <= self.garbage, "objects that nobody needs"
        # What was there before is still garbage when its object is stored again.
        self.garbage = found | (self.garbage & unneeded)
        self.is_excused = False

    def check_idle(self):
        """After a transaction nothing of it is left on this host but what is cached."""
        if not {*leftovers(self.storage)} <= self.beside:
            gc.collect()  # a Blob that was given up goes with its file
        assert {*leftovers(self.storage)} <= self.beside
        if not self.room_is_lost:
            assert self.cache.current_size() == committed_size(self.cache.cache_dir)

    def check_read(self, oid, revision):
        """A committed revision is read as it was written, unless S3 fails."""
        with self.s3_may_fail():
            assert load(self.storage, oid, revision.tid) == revision.data

    def let_uploads_go(self):
        self.client.release()
        self.pool.settle()

    @contextmanager
    def s3_may_fail(self):
        """Errors of S3 are those that it was told to have."""
        count = len(self.client.fired)
        try:
            yield
        except S3OperationError:
            assert len(self.client.fired) > count, "S3 has not failed"

    def check_everything(self):
        """Read all revisions from where they are safe; what was undone is not there."""
        self.cache.shed(1 << 30)
        for oid, revisions in self.history.items():
            for revision in revisions:
                if oid != z64 and revision.data is not None:
                    assert self.key_of(oid, revision.tid) == revision.key
                    self.check_read(oid, revision)
                elif oid != z64:
                    with pytest.raises(POSKeyError):
                        self.storage.loadBlob(oid, revision.tid)
        self.look()

    # Whole transactions

    @precondition(lambda self: self.lock_is_free() and not self.works)
    @rule(
        places=st.lists(WHICH, min_size=1, max_size=3),
        size=SIZES,
        trouble=TROUBLES,
        interludes=st.tuples(INTERLUDES, INTERLUDES),
    )
    def commit(self, places, size, trouble, interludes):
        """New blobs and new revisions, of one perhaps twice."""
        self.meet(trouble)
        self.begin()
        for place in places:
            self.store(0, place, size, False)
        self.end_one(*interludes)

    @precondition(lambda self: self.lock_is_free() and not self.works and self.undoes and self.log)
    @rule(
        places=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        trouble=TROUBLES,
        interludes=st.tuples(INTERLUDES, INTERLUDES),
    )
    def commit_undo(self, places, trouble, interludes):
        """Undoes of undoes among them, and of creations; several in one transaction."""
        self.meet(trouble)
        self.begin()
        for place in places:
            if has("open")(self):
                self.undo(0, place)
        self.end_one(*interludes)

    def end_one(self, *interludes):
        """End the one transaction there is, with something between its steps."""
        for interlude, step in zip(interludes, (lambda: self.vote(0), self.finish), strict=True):
            if interlude == "sweep":
                self.sweep(False)
            elif interlude == "evict":
                self.cache.shed(1 << 30)
            elif interlude == "crash":
                return self.crash(0, True)
            if interlude == "abort" or has("failed")(self):
                return self.abort(0, False)
            step()
        return None if not self.works else self.abort(0, False)

    @precondition(lambda self: self.lock_is_free() and self.session is None)
    @rule(name=NAMES, how=WAYS, size=SIZES, trouble=TROUBLES)
    def write_by_connection(self, name, how, size, trouble=None):
        self.change(name, how, size)
        self.meet(trouble)
        self.commit_session()

    # Transactions step by step

    def pick(self, which, *states):
        works = [work for work in self.works if work.state in states]
        return works[which % len(works)]

    @precondition(lambda self: len(self.works) < 3 and (self.lock_is_free() or not self.by_tid))
    @rule()
    def begin(self):
        work = Work()
        self.storage.tpc_begin(work.meta)
        self.works.append(work)
        if self.by_tid:
            self.holder = work

    @precondition(lambda self: self.by_tid and self.holder and len(self.works) == 1)
    @rule()
    def begin_behind(self):
        """Another thread waits for the base's lock; it goes on as soon as that is free."""
        work = Work()
        work.state = "waiting"
        work.thread = start(self.storage.tpc_begin, work.meta)
        self.works.append(work)

    def end(self, work):
        self.works.remove(work)
        if self.holder is work:
            self.holder = None
        for waiting in self.works:
            if waiting.state == "waiting" and self.holder is None:
                waiting.thread.result()
                waiting.state = "open"
                self.holder = waiting

    @contextmanager
    def uploading(self, work):
        """Take note of what is uploaded, unless that is held."""
        known = set(self.bucket.known)
        yield
        self.pool.settle()
        work.keys |= self.bucket.known - known

    def choose(self, work, place):
        """Return (oid, serial) of an object that a transaction may store; a new one perhaps."""
        known = {oid for oid in self.history if self.is_live(oid)} | set(work.stores)
        oids = [*sorted(known - {z64, self.anchor} - set(work.undone)), None]
        oid = oids[place % len(oids)]
        if oid in work.stores:
            return oid, work.stores[oid][1]
        if oid is not None:
            return oid, self.serial(oid)
        oid = self.storage.new_oid()
        self.highest = max(self.highest, oid)
        return oid, z64

    @precondition(has("open"))
    @rule(which=WHICH, place=WHICH, size=SIZES, is_stale=st.booleans())
    def store(self, which, place, size, is_stale):
        """Store a blob, again perhaps, or over a revision that is no longer current."""
        work = self.pick(which, "open")
        oid, serial = self.choose(work, place)
        if is_stale and len(self.history.get(oid, ())) > 1:
            serial = self.history[oid][0].tid
        if oid in work.stores and not work.stores[oid][2].running():
            self.let_uploads_go()  # what waits in the pool is waited for
        data = self.fresh(size)
        path = write_file(data, self.storage.temporaryDirectory())
        store = partial(self.storage.storeBlob, oid, serial, BLOB_RECORD, path, "", work.meta)
        if self.by_tid and self.serial(oid) not in (None, serial):
            with pytest.raises(ConflictError):
                store()
        else:
            with self.uploading(work):
                store()
            work.leaves_garbage |= oid in work.stores and not self.by_tid
            work.stores[oid] = data, serial, self.pool.futures[-1]
        assert not os.path.exists(path)

    @precondition(lambda self: self.undoes and self.log and has("open")(self))
    @rule(which=WHICH, place=WHICH)
    def undo(self, which, place):
        """Undo a transaction; the base may refuse what others have changed since."""
        work = self.pick(which, "open")
        tid, oids = self.log[-1 - place % len(self.log)]
        if tid <= self.last_stop or oids & {*work.stores, self.anchor}:
            return
        is_last = all(self.serial_within(work, oid) == tid for oid in oids)
        if oids & set(work.undone):
            self.let_uploads_go()
        begun = len(self.pool.futures)
        try:
            with self.uploading(work):
                self.storage.undo(encodebytes(tid)[:-1], work.meta)
        except UndoError:
            assert not is_last
            work.state = "failed"
            return
        work.copies += self.pool.futures[begun:]
        work.is_doubtful |= not is_last
        work.undoes.append(tid)
        for oid in oids:
            work.leaves_garbage |= oid in work.undone
            work.undone[oid] = self.before(oid, tid)
            work.seen[oid] = self.serial(oid)

    def serial_within(self, work, oid):
        """Return the tid of the revision whose bytes are current for a transaction."""
        if oid in work.undone:
            return work.undone[oid] and work.undone[oid].tid
        return self.serial(oid)

    @precondition(has("open"))
    @rule(which=WHICH)
    def vote(self, which):
        """It waits for the uploads, and fails where one of them has, or another was faster."""
        work = self.pick(which, "open")
        if self.holder not in (None, work):
            return
        self.let_uploads_go()
        self.holder = work
        must_fail, may_fail = self.reasons(work)
        trouble = self.base.trouble
        try:
            self.storage.tpc_vote(work.meta)
        except (StorageError, ConflictError, UndoError) as error:
            was_told = trouble == "vote" and self.base.trouble is None
            assert must_fail or may_fail or was_told, f"no reason to fail: {error!r}"
            if must_fail and not may_fail and not was_told:
                assert isinstance(error, must_fail)
            work.state = "failed"
        else:
            assert not must_fail
            work.state = "voted"

    def reasons(self, work):
        """Return errors of which a vote must raise one, and whether it may fail at all."""
        uploads = [upload for _data, _serial, upload in work.stores.values()]
        failed = [upload.exception() for upload in uploads if upload.exception()]
        copies = [copy.exception() for copy in work.copies if not copy.cancelled()]
        if self.spools:
            failed = [error for error in failed if not isinstance(error, TransientS3Error)]
        may_fail = work.is_doubtful or any(copies)
        # Others may have changed or packed what it undoes.
        may_fail |= any(self.serial(oid) != tid for oid, tid in work.seen.items())
        may_fail |= any(tid <= self.last_stop for tid in work.undoes)
        must_fail = [S3OperationError] if failed else []
        if any(copies) and len(work.undoes) == 1 and not self.spools:
            must_fail.append(S3OperationError)
        if any(
            self.serial(oid) not in (None, serial)
            for oid, (_data, serial, _upload) in work.stores.items()
        ):
            must_fail.append(ConflictError)
        return tuple(must_fail), may_fail

    @precondition(has("voted"))
    @rule()
    def finish(self):
        """No request is made, and from here on the bytes are there."""
        work = self.pick(0, "voted")
        calls, trouble, count = len(self.client.calls), self.base.trouble, len(self.base.finished)
        told = []
        try:
            self.storage.tpc_finish(work.meta, told.append)
        except StorageError:
            assert trouble in ("finish", "answer")
            # Only the base knows the outcome, so nothing is deleted.
            work.leaves_garbage = True
            self.storage.tpc_abort(work.meta)
        assert len(self.client.calls) == calls
        if len(self.base.finished) > count:
            tid, safe = self.base.finished[-1]
            assert told == [tid] == [self.storage.lastTransaction()]
            self.committed(tid, work.changes, safe)
        self.is_excused = work.leaves_garbage or self.spools
        self.end(work)

    @precondition(has("open", "failed", "voted"))
    @rule(which=WHICH, again=st.booleans())
    def abort(self, which, again):
        """In any phase, with uploads under way or not."""
        work = self.pick(which, "open", "failed", "voted")
        if len(self.works) > 1:
            self.let_uploads_go()
        self.storage.tpc_abort(work.meta)
        self.end(work)
        if again:
            self.storage.tpc_abort(work.meta)

    @rule(size=SIZES)
    def misuse(self, size):
        """A transaction that has not begun, or not voted, changes nothing, and keeps its file."""
        for work in self.works:
            if work.state == "open" and (work.stores or work.copies):
                with pytest.raises(StorageTransactionError):
                    self.storage.tpc_finish(work.meta)
        stranger = TransactionMetaData()
        path = write_file(self.fresh(size), self.storage.temporaryDirectory())
        with pytest.raises(StorageTransactionError):
            self.storage.storeBlob(self.anchor, z64, BLOB_RECORD, path, "", stranger)
        os.remove(path)
        for step in (self.storage.tpc_vote, self.storage.tpc_finish):
            with pytest.raises(StorageTransactionError):
                step(stranger)
        self.storage.tpc_abort(stranger)

    # Connections

    def open_session(self):
        view = {name: self.current(oid).data for name, oid in self.current(z64).data}
        serials = {oid: self.serial(oid) for oid in self.history}
        self.session = Session(self.db, view, serials)

    @rule(name=NAMES, how=WAYS, size=SIZES)
    def change(self, name, how, size):
        """A blob is written in one of ZODB's ways; one that cannot be read stays as it is."""
        if self.session is None:
            self.open_session()
        if name not in self.session.view:
            how = "replace"
        elif name in self.session.spoilt:
            how = "write"
        with self.s3_may_fail(), self.old_view_may_fail():
            getattr(self.session, how)(name, self.fresh(size))

    @contextmanager
    def old_view_may_fail(self):
        """What a pack has taken cannot be read by a connection that began before it."""
        try:
            yield
        except POSKeyError:
            assert self.session.is_old

    @precondition(lambda self: self.session is not None)
    @rule(name=NAMES, saves=st.booleans())
    def delete(self, name, saves):
        if name in self.session.view:
            self.session.delete(name)
        if saves:
            self.session.savepoint()

    @precondition(lambda self: self.session is not None)
    @rule(which=WHICH)
    def save_or_roll_back(self, which):
        """It sees its own changes then, and else what was there when it began."""
        if self.session.has_savepoints and which > 4:
            self.session.roll_back(which)
        else:
            self.session.savepoint()
        for name, data in self.session.view.items():
            with self.s3_may_fail(), self.old_view_may_fail():
                assert self.session.read(name) == data or name in self.session.spoilt

    @precondition(lambda self: self.session is not None and self.lock_is_free())
    @rule()
    def commit_session(self):
        session, fired, count = self.session, len(self.client.fired), len(self.base.finished)
        if self.base.trouble == "answer":
            self.base.trouble = None  # the connection would forget the oids
        trouble = self.base.trouble
        self.client.release()
        try:
            session.manager.commit()
        except (StorageError, ConflictError):
            has_failed = len(self.client.fired) > fired or trouble != self.base.trouble
            assert has_failed or self.is_behind(session)
            self.is_excused = trouble != self.base.trouble
        if len(self.base.finished) > count:
            tid, safe = self.base.finished[-1]
            oids, changed = self.stored_by(tid), session.changed()
            if z64 in oids:
                changed[z64] = session.names()
            assert oids <= set(changed)
            self.committed(tid, {oid: changed[oid] for oid in oids}, safe)
            for name, oid in self.current(z64).data:
                if not self.is_behind(session) and name in session.view:
                    assert self.current(oid).data == session.view[name]
            self.is_excused = self.spools
        session.close()
        self.session = None

    def is_behind(self, session):
        """Return whether others have changed what a session changes, or may have."""
        changed = {*session.changed(), *([z64] if session.changes_root else [])}
        return session.is_old or any(
            oid in session.serials and self.serial(oid) != session.serials[oid] for oid in changed
        )

    @precondition(lambda self: self.session is not None)
    @rule()
    def abort_session(self):
        self.session.close()
        self.session = None

    @rule(evicts=st.booleans())
    def look(self, evicts=False):
        """A new connection sees the current bytes of all that the root refers to."""
        if evicts:
            self.cache.shed(1 << 30)
            assert committed_size(self.cache.cache_dir) == 0
            self.room_is_lost &= has("voted")(self)
        session = Session(self.db, {}, {})
        for name, oid in self.current(z64).data:
            with self.s3_may_fail():
                assert session.read(name) == self.current(oid).data
        session.close()

    # Reading

    @rule(which=WHICH, bounds=st.sampled_from([(0, None), (0, 10), (20, 60), (30, None)]))
    def read_otherwise(self, which, bounds):
        """Size and parts without a download; what is cached is compared with the bucket."""
        revisions = self.revisions()
        oid, revision = revisions[-1 - which % len(revisions)]
        name = oid, revision.tid
        with self.s3_may_fail():
            assert self.storage.blob_size(*name) == len(revision.data)
            with self.storage.open_blob_range(*name, *bounds) as file:
                assert file.read() == revision.data[slice(*bounds)]
            assert self.storage.verify_blob(*name)

    @rule()
    def prefetch(self):
        """Whatever comes, the budget holds and the bytes are right."""
        revisions, fired = self.revisions(), len(self.client.fired)
        report = self.storage.prefetch_blobs((oid, rev.tid) for oid, rev in revisions)
        assert report.missing == 0
        assert report.failed == 0 or len(self.client.fired) > fired
        for oid, revision in revisions:
            if self.storage.blob_is_cached(oid, revision.tid):
                self.check_read(oid, revision)

    # Trouble

    @rule(trouble=TROUBLES)
    def meet(self, trouble):
        """Soon an operation of S3 or of the base fails, S3 is down, or uploads take long."""
        where, *how = trouble or ("nowhere",)
        if where == "base":
            (self.base.trouble,) = how
        elif where == "outage":
            (self.client.outage,) = how
        elif where == "hold":
            self.client.holds, (self.client.heeds,) = True, how
        elif how:
            self.client.fail(where, *how)

    @rule()
    def behave(self):
        self.client.behave()
        self.base.trouble = None
        self.pool.settle()

    @rule(seconds=st.sampled_from([1, GRACE + 1]))
    def pass_time(self, seconds):
        self.clock.now += seconds

    # Maintenance

    @precondition(lambda self: self.spool is not None)
    @rule()
    def drain(self):
        """What was committed without S3 goes there; what is left stays."""
        self.let_uploads_go()
        self.spool.is_drained = True
        try:
            with self.s3_may_fail():
                report = self.storage.drain_spool()
                assert (report.damaged, report.lost) == (0, 0)
        finally:
            self.spool.is_drained = False
        self.is_excused = True  # a transaction that was killed leaves garbage

    @rule(dry_run=st.booleans(), trouble=TROUBLES)
    def sweep(self, dry_run, trouble=None):
        """It deletes all that nobody needs and nothing else, and tells so."""
        self.meet(trouble)
        before, fired = set(self.bucket.objects), len(self.client.fired)
        spared = {key for key in before if key in self.allowed() or self.is_spared(key)}
        with self.s3_may_fail():
            report = self.storage.sweep(dry_run)
            deleted = before - set(self.bucket.objects)
            assert not deleted & spared
            assert report.listed == len(before)
            assert report.kept + report.in_flight + report.foreign + report.garbage == len(before)
            if dry_run:
                assert not deleted
            elif len(self.client.fired) > fired:
                assert report.failed == 1  # as the server says
            else:
                assert report.deleted == len(deleted)
                self.check_swept()

    def check_swept(self):
        assert {key for key in self.unneeded() if not self.may_stay(key)} == set()

    @precondition(lock_is_free)
    @rule(back=WHICH, collects=st.booleans(), trouble=TROUBLES)
    def pack(self, back, collects, trouble=None):
        """Revisions before its time go with their objects, and no others."""
        self.meet(trouble)
        self.clock.now += 1
        moment = self.clock()
        if back < len(self.log):
            moment = TimeStamp(self.log[-1 - back][0]).timeTime()
        if tid_of(moment) < self.last_stop:
            moment = self.clock()
        fired = len(self.client.fired)
        try:
            with self.s3_may_fail():
                self.storage.pack(moment, referencesf, gc=collects)
        except PackRefused:
            assert self.undoes
            return
        self.packed(tid_of(moment), collects)
        if len(self.client.fired) == fired:
            self.check_swept()
        self.is_excused = True
        if self.session is not None:
            self.session.is_old = True

    def packed(self, stop, collects):
        self.last_stop = stop
        first = p64(u64(stop) + 1)
        roots = [self.before(z64, first), *(root for root in self.history[z64] if root.tid > stop)]
        linked = {z64, *(oid for root in roots for _name, oid in root.data)}
        for oid, revisions in [*self.history.items()]:
            last = self.before(oid, first)
            kept = [revision for revision in revisions if revision.tid > stop]
            if collects and oid not in linked and not self.keeps_unlinked:
                must_stay = []
            elif (collects and oid not in linked) or last is None or last.data is None:
                must_stay = [revision for revision in kept if revision.data is not None]
            else:
                must_stay = [last, *(revision for revision in kept if revision.data is not None)]
            there = [
                revision
                for revision in revisions
                if (revision in kept if revision.data is None else self.is_there(oid, revision.tid))
            ]
            assert {rev.tid for rev in must_stay} <= {rev.tid for rev in there}, "lost by the base"
            self.history[oid] = there
            if not there:
                del self.history[oid]

    def is_there(self, oid, tid):
        try:
            self.base.loadSerial(oid, tid)
        except POSKeyError:
            return False
        return True


class ByTid(CommitMachine):
    addressings = ("tid",)


class ByRecord(CommitMachine):
    addressings = ("record",)


class Changing(CommitMachine):
    """A FileStorage that is opened with another addressing now and then, and brought back."""

    addressings = ("record", "tid")

    @precondition(CommitMachine.lock_is_free)
    @rule()
    def rewrite_by_tid(self):
        """All blobs get keys by tid, and the same bytes."""
        count, trouble = len(self.base.finished), self.base.trouble
        self.let_uploads_go()
        self.was_rewritten = self.is_excused = True
        try:
            with self.s3_may_fail():
                self.storage.rewrite_by_tid()
        except StorageError:
            assert self.base.trouble != trouble
        for tid, safe in self.base.finished[count:]:
            changes = {oid: self.current(oid).data for oid in self.stored_by(tid)}
            self.committed(tid, changes, safe)


class OverMappingStorage(CommitMachine):
    """It keeps nothing on disk, so what is closed is not the base; and it does not undo."""

    addressings = ("tid", "record")
    undoes = keeps_unlinked = False

    def new_base(self):
        return WatchedMappingStorage()

    def kept_base(self):
        return self.base

    def reopened_base(self):
        return self.base

    def abandon_base(self):
        if (running := self.base.tpc_transaction()) is not None:
            self.base.tpc_abort(running)


@pytest.fixture(scope="module", autouse=True)
def quick_collection():
    """What was there before need not be looked at whenever a crash collects garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def case_of(machine, examples, steps):
    """Return the test of a machine: always the same run, unless a long one is asked for."""
    case = machine.TestCase
    case.settings = settings(
        max_examples=int(EXAMPLES or examples),
        stateful_step_count=steps,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestByTid = case_of(ByTid, 12, 40)
TestByRecord = case_of(ByRecord, 12, 40)
TestChanging = case_of(Changing, 12, 40)
TestOverMappingStorage = case_of(OverMappingStorage, 12, 40)
