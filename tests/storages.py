"""Databases as a site opens them, and clients that wait or fail where a test wants it."""

from collections import Counter
import contextlib
from dataclasses import replace
import hashlib
import os
from pathlib import Path
import socket
import tempfile
import threading
import time

from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.serialize import ObjectWriter
from ZODB.utils import z64

from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.ownership import Ownership
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.storage import S3BlobStorage


# Seconds after which a test that waits for another thread or process gives up.
PATIENCE = 30

BLOB_RECORD = ObjectWriter().serialize(Blob())
PLAIN_RECORD = ObjectWriter().serialize(PersistentMapping())


# From a ZConfig text


def filestorage(directory, **options):
    """Return the text of a <filestorage> section; `options` are its keys."""
    lines = [f"{name.replace('_', '-')} {value}" for name, value in options.items()]
    return "\n".join(["<filestorage>", f"path {directory}/Data.fs", *lines, "</filestorage>"])


def section(location, directory, cache="cache", base=None, **options):
    """Return the text of an <s3blobstorage> section.

    :param S3Location location: the bucket.
    :param directory: where Data.fs and the cache are.
    :param str cache: name of the cache's directory; a new one is an empty cache.
    :param base: the sections inside; by default a <filestorage>.
    :param options: further keys, with "_" for "-".
    """
    lines = [f"{name.replace('_', '-')} {value}" for name, value in options.items()]
    return "\n".join(
        [
            "<s3blobstorage>",
            f"bucket-name {location.bucket}",
            f"s3-endpoint-url {location.endpoint_url}",
            f"s3-access-key {location.access_key}",
            f"s3-secret-key {location.secret_key}",
            "s3-addressing-style path",
            f"cache-dir {directory}/{cache}",
            *lines,
            base or filestorage(directory),
            "</s3blobstorage>",
        ]
    )


def open_storage(location, directory, **options):
    """Open a storage as zope.conf does; the arguments are those of `section`."""
    text = section(location, directory, **options)
    return storageFromString(f"%import zodb_s3blobs\n{text}")


def open_db(location, directory, imports=(), around="{}", **options):
    """Open a database as zope.conf does.

    :param imports: further ZConfig components.
    :param str around: a ZConfig text with "{}" in the place of our section.
    :param options: the arguments of `section`.
    """
    lines = [f"%import {name}" for name in ("zodb_s3blobs", *imports)]
    text = around.format(section(location, directory, **options))
    return databaseFromString("\n".join([*lines, "<zodb>", text, "</zodb>"]))


def take(storage):
    """Make the bucket that of a storage's database, as ``zodb-s3blobs own --take`` does."""
    base, services, *_rest = storage.parts
    Ownership(base.identity).take(services.client)


# From the parts, where a test puts something in between


class HookedClient:
    """Passes a client through, and does something before or after a named call.

    ``before`` and ``after`` map names of methods to callables that get the call's arguments;
    ``calls`` lists the names and first arguments of all calls.
    """

    def __init__(self, client):
        self.client = client
        self.before = {}
        self.after = {}
        self.calls = []

    def __getattr__(self, name):
        method = getattr(self.client, name)
        if not callable(method):
            return method

        def call(*args, **kw):
            self.calls.append((name, *args[:1]))
            self.before.get(name, _nothing)(*args)
            result = method(*args, **kw)
            self.after.get(name, _nothing)(*args)
            return result

        return call

    def count(self, name):
        """Return how often a method was called."""
        return [call[0] for call in self.calls].count(name)


def _nothing(*args):
    pass


class Gate:
    """Stops whoever calls it until it is opened; `reached` is set by the first who comes."""

    def __init__(self):
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, *args, **kw):
        self.reached.set()
        assert self._opened.wait(PATIENCE), "the gate was never opened"

    def wait(self):
        """Wait until somebody stands at the gate."""
        assert self.reached.wait(PATIENCE), "nobody came to the gate"

    def open(self):
        self._opened.set()


class Failure:
    """Raises an error for the first `times` calls, for ever by default."""

    def __init__(self, error=None, times=None):
        self.error = error or TransientS3Error("S3 is down, says the test")
        self.times = times

    def __call__(self, *args, **kw):
        if self.times is not None:
            if not self.times:
                return
            self.times -= 1
        raise self.error


def make_client(location, **options):
    """Return an S3Client that does not wait between attempts."""
    return S3Client(
        location.bucket,
        endpoint_url=location.endpoint_url,
        aws_access_key_id=location.access_key,
        aws_secret_access_key=location.secret_key,
        addressing_style="path",
        **{"max_attempts": 2, **options},
    )


def open_relstorage(directory, name="database", keep_history=True, **options):
    """Return a RelStorage over SQLite; the same name is the same database.

    :param options: of RelStorage.
    """
    # It is slow to import, and most tests do without.
    from relstorage.adapters.sqlite.adapter import Sqlite3Adapter
    from relstorage.options import Options
    from relstorage.storage import RelStorage

    os.makedirs(f"{directory}/{name}", exist_ok=True)
    options = Options(keep_history=keep_history, **options)
    adapter = Sqlite3Adapter(f"{directory}/{name}", pragmas={}, options=options)
    return RelStorage(adapter, options=options)


def make_storage(location, directory, cache="cache", base=None, cache_size=1 << 30, **options):
    """Return (storage, its HookedClient) over a FileStorage.

    :param options: of S3BlobStorage.
    """
    client = HookedClient(make_client(location))
    if base is None:
        base = FileStorage(f"{directory}/Data.fs")
    cache = S3BlobCache(f"{directory}/{cache}", cache_size)
    return S3BlobStorage(base, client, cache, **options), client


# Steps of a transaction at the storage, in the order a test wants


def write_file(data, directory=None):
    """Return the path of a new file, as a Blob's working copy is one."""
    handle, path = tempfile.mkstemp(".test", dir=directory)
    with open(handle, "wb") as file:
        file.write(data)
    return path


def store_blob(storage, transaction, oid, data, serial=z64, record=BLOB_RECORD):
    """Store a blob's revision in a transaction that has begun."""
    path = write_file(data, storage.temporaryDirectory())
    return storage.storeBlob(oid, serial, record, path, "", transaction)


def restore_blob(storage, transaction, oid, tid, data, record=BLOB_RECORD):
    """Restore a blob's revision in a transaction that has begun."""
    path = write_file(data, storage.temporaryDirectory())
    return storage.restoreBlob(oid, tid, record, path, None, transaction)


def commit_blob(storage, oid, data, serial=z64):
    """Commit one revision of one blob and return its tid."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    store_blob(storage, transaction, oid, data, serial)
    storage.tpc_vote(transaction)
    return storage.tpc_finish(transaction)


def commit_record(storage, oid, serial=z64, record=PLAIN_RECORD):
    """Commit one revision of an object and return its tid."""
    transaction = TransactionMetaData()
    storage.tpc_begin(transaction)
    storage.store(oid, serial, record, "", transaction)
    storage.tpc_vote(transaction)
    return storage.tpc_finish(transaction)


# Looking


def read(blob):
    """Return the bytes of a Blob."""
    with blob.open() as file:
        return file.read()


def load(storage, oid, serial):
    """Return the bytes of a revision."""
    with open(storage.loadBlob(oid, serial), "rb") as file:
        return file.read()


def until_s3_is_back(storage):
    """Wait until requests are sent again, and answered."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return storage.sweep(dry_run=True)
        except TransientS3Error:
            assert time.monotonic() < deadline, "S3 does not come back"
            time.sleep(0.05)


def stored_twice(storage):
    """Return (tid, oid) of each object that one transaction has several records of."""
    return [
        (transaction.tid, oid)
        for transaction in storage.iterator()
        for oid, count in Counter(record.oid for record in transaction).items()
        if count > 1
    ]


def random_bytes(seed, size):
    """Return bytes that depend on the seed alone."""
    return hashlib.shake_128(repr(seed).encode()).digest(size)


def leftovers(storage):
    """Return the names of the temporary files of a storage."""
    directory = Path(storage.temporaryDirectory())
    ours = directory.parent.glob("process/*/*.tmp")
    return [path.name for path in (*directory.iterdir(), *ours)]


class Thread(threading.Thread):
    """A thread whose result, or error, is asked for in the end."""

    def __init__(self, target, *args):
        super().__init__(daemon=True)
        self._call = target, args
        self._result = self._error = None

    def run(self):
        target, args = self._call
        try:
            self._result = target(*args)
        except BaseException as error:
            self._error = error

    def result(self):
        """Wait for the end; return what the target returned, or raise what it raised."""
        self.join(PATIENCE * 2)
        assert not self.is_alive(), "the thread does not end"
        if self._error is not None:
            raise self._error
        return self._result


def start(target, *args):
    """Start target(*args) in a thread and return the `Thread`."""
    thread = Thread(target, *args)
    thread.start()
    return thread


class TcpProxy:
    """Stands between a client and a server, and holds or answers what passes, byte by byte.

    :param str upstream: URL of the server.
    :param answer: called with each head of a request; what it returns is sent back instead of
        the server's answer, unless it is None.
    """

    def __init__(self, upstream, answer=None):
        host, _, port = upstream.rpartition("/")[2].partition(":")
        self._upstream = host, int(port)
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._hold = None
        self._is_cut = False
        self.reached = threading.Event()
        self._released = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint_url(self):
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def location(self, location):
        """Return the same bucket as seen through the proxy."""
        return replace(location, endpoint_url=self.endpoint_url)

    def hold(self, matches):
        """Hold everything from the first chunk on of which matches(direction, chunk) is true.

        `direction` is "up" or "down". ``reached`` is set then; that chunk is not passed on.
        """
        self._hold = matches

    def cut(self):
        """Close the connections, as far as something is held, and drop that."""
        self._is_cut = True
        self.release()

    def release(self):
        """Let what is held go, as far as both ends are still there."""
        self._hold = None
        self._released.set()

    def _accept(self):
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._upstream)
            except OSError:  # it is down
                client.close()
                continue
            for source, target, direction in ((client, server, "up"), (server, client, "down")):
                args = source, target, direction
                threading.Thread(target=self._pass_on, args=args, daemon=True).start()

    def _pass_on(self, source, target, direction):
        try:
            while chunk := source.recv(1 << 16):
                if self._hold is not None and (
                    self.reached.is_set() or self._hold(direction, chunk)
                ):
                    self.reached.set()
                    self._released.wait(PATIENCE)
                    if self._is_cut:
                        return
                answer = self._answer(chunk) if self._answer and direction == "up" else None
                if answer is not None:
                    source.sendall(answer)
                    return
                target.sendall(chunk)
        except OSError:
            pass  # one end is gone: so is the other now
        finally:
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self):
        self.release()
        self._listener.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()
