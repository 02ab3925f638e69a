"""Storages and databases whose blobs are in an embedded S3, each under a prefix of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextlib import ExitStack
import shutil
import tempfile
from typing import Any

from ZODB.DB import DB
from ZODB.DemoStorage import DemoStorage
from ZODB.MappingStorage import MappingStorage

from ..cache import S3BlobCache
from ..s3client import S3Client
from ..storage import S3BlobStorage
from .server import EmbeddedS3
from .server import shared_server


CACHE_SIZE = 1 << 30


@contextmanager
def open_storage(
    server: EmbeddedS3, base: Any = None, prefix: str | None = None, **options: Any
) -> Iterator[S3BlobStorage]:
    """Open a storage on a server that runs; close it and its base in the end.

    :param base: the storage inside, by default a new MappingStorage.
    :param prefix: by default a new one, whose objects are removed in the end. Those of a given one
        stay, for another storage to read.
    :param options: further arguments of `S3BlobStorage`, such as gc_grace.
    """
    with ExitStack() as closing:
        yield _open(closing, server, base, prefix, options)


def _open(
    closing: ExitStack, server: EmbeddedS3, base: Any, prefix: str | None, options: dict[str, Any]
) -> S3BlobStorage:
    """Open a storage and leave to an ExitStack what must be done in the end."""
    base = MappingStorage() if base is None else base
    with ExitStack() as failed:
        failed.callback(base.close)
        cache_dir = tempfile.mkdtemp(prefix="cache-", dir=server.directory)
        closing.callback(shutil.rmtree, cache_dir, ignore_errors=True)
        if prefix is None:
            prefix = cache_dir.rpartition("cache-")[2]
            closing.callback(server.discard, prefix)
        client = S3Client(
            server.bucket,
            prefix,
            server.endpoint_url,
            "us-east-1",  # whatever the environment says
            server.access_key,
            server.secret_key,
        )
        cache = S3BlobCache(cache_dir, CACHE_SIZE)
        failed.callback(cache.close)
        storage = S3BlobStorage(base, client, cache, **options)
        failed.pop_all()
    closing.callback(storage.close)
    return storage


@contextmanager
def open_database(
    server: EmbeddedS3, base: Any = None, prefix: str | None = None, **options: Any
) -> Iterator[DB]:
    """Open a database over a storage as `open_storage` makes it; close both in the end."""
    with open_storage(server, base, prefix, **options) as storage:
        database = DB(storage)
        try:
            yield database
        finally:
            database.close()


def stack_s3blobs(
    db: DB | None = None, name: str | None = None, server: EmbeddedS3 | None = None
) -> DB:
    """Return a new database over another one, which is read and never changed.

    What is written stays in memory, and its blobs go to S3. The caller closes the database, before
    the one below. Does what ``plone.testing.zodb.stackDemoStorage`` does.

    :param db: the database below; by default there is none.
    :param name: of the storage.
    :param server: by default `shared_server`.
    """
    with ExitStack() as closing:
        changes = _open(closing, server or shared_server(), None, None, {})
        storage = StackedStorage(name, None if db is None else db.storage, changes)
        return StackedDatabase(storage, closing.pop_all())


class StackedDatabase(DB):
    """A database that closes what was opened for it alone."""

    def __init__(self, storage: Any, closing: ExitStack) -> None:
        self._closing = closing
        with closing:
            super().__init__(storage)
            self._closing = closing.pop_all()

    def close(self) -> None:
        super().close()
        self._closing.close()


class StackedStorage(DemoStorage):
    """A DemoStorage whose ``changes`` keep their blobs in S3.

    Closing it leaves ``changes`` and ``base`` open. A DemoStorage that someone else puts on top
    closes this one with itself, and the next test still needs it, as with ZODB's own changes in
    memory, which work after their storage was closed. `StackedDatabase` closes ``changes``.
    """

    def __init__(self, name: str | None, base: Any, changes: Any) -> None:
        super().__init__(name, base, changes, False, False)

    def pack(self, t: float, referencesf: Any, gc: bool | None = None) -> None:
        """Pack the changes; they do not tell what the base refers to, so no object goes.

        DemoStorage's own fails where changes are given: it lacks an attribute then.
        """
        if gc:
            raise TypeError("Garbage collection isn't supported when there is a base storage.")
        self.changes.pack(t, referencesf, gc=False)
