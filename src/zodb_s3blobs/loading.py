"""From (oid, serial) to a complete file: hit, single flight, S3, sources."""

from collections.abc import Callable
from collections.abc import Sequence
from concurrent.futures import Future
import errno
import os
from typing import Any

from ZODB.POSException import POSKeyError

from .interfaces import DISK_FULL
from .interfaces import MissingObjectError
from .interfaces import S3OperationError
from .keys import blob_key


# From (oid, serial) to the stamp in the revision's record, if there is one
FindReference = Callable[[bytes, bytes], bytes | None]


# Errors that are those of the target, whatever file they name
NO_WRITING = (*DISK_FULL, errno.EROFS)


class _SourceFailed(Exception):
    """Takes the error of a source past the cache, for which an OSError is one of its own."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class BlobLoader:
    """Fills the cache on demand; threads share it."""

    def __init__(self, cache: Any, client: Any, sources: Sequence[Any]) -> None:
        self._cache = cache
        self._client = client
        self._sources = sources
        # What threads are fetching now; setdefault decides between them.
        self._flights: dict[tuple[int, bytes, bytes], Future[str | None]] = {}

    def load(self, oid: bytes, serial: bytes, find_reference: FindReference) -> str:
        """Return the path of a complete, verified file with the revision's bytes.

        :param find_reference: called on a miss, in the calling thread.
        :raises POSKeyError: when neither the bucket nor a source has it.
        :raises S3OperationError: when that cannot be told.
        """
        path: str | None = self._cache.get(oid, serial)
        while path is None:
            path = self._load_together(oid, serial, find_reference)
        return path

    def _load_together(
        self, oid: bytes, serial: bytes, find_reference: FindReference
    ) -> str | None:
        """Fetch, or share the outcome of the thread that is fetching; None when that was killed.

        Failures are shared, too: while S3 is down nobody waits for more than one time-out.
        """
        mine: Future[str | None] = Future()
        # A forked child does not wait for its parent's threads.
        name = (os.getpid(), oid, serial)
        flight = self._flights.setdefault(name, mine)
        if flight is not mine:
            return flight.result()
        try:
            mine.set_result(self._fill(oid, serial, find_reference))
        except Exception as error:
            mine.set_exception(error)
        finally:
            del self._flights[name]
            if not mine.done():
                mine.set_result(None)
        return mine.result()

    def _fill(self, oid: bytes, serial: bytes, find_reference: FindReference) -> str:
        # Before the cache has its lock: the base may be slow.
        stamp = find_reference(oid, serial)
        try:
            filled: str = self._cache.fill(
                oid, serial, lambda path: self._fetch(oid, serial, stamp, path)
            )
        except _SourceFailed as failed:
            raise failed.error from None
        return filled

    def _fetch(self, oid: bytes, serial: bytes, stamp: bytes | None, target_path: str) -> None:
        # A database that has moved between bases keeps under the tid what its records refer to.
        keys = [blob_key(oid, name) for name in (stamp, serial) if name]
        try:
            self._download(keys, target_path)
        except S3OperationError as error:
            # A revision has the same bytes wherever they are.
            if self._ask_sources(oid, serial, target_path):
                return
            if isinstance(error, MissingObjectError):
                where = " or ".join(keys)
                raise POSKeyError(f"No blob {where} in the bucket", oid, serial) from error
            error.oid, error.tid = oid, serial
            raise

    def _ask_sources(self, oid: bytes, serial: bytes, target_path: str) -> bool:
        try:
            return any(source.fetch(oid, serial, target_path) for source in self._sources)
        except OSError as error:
            if error.errno in NO_WRITING or error.filename == target_path:
                raise
            raise _SourceFailed(error) from error

    def _download(self, keys: Sequence[str], target_path: str) -> None:
        for key in keys:
            try:
                return self._client.download_file(key, target_path)
            except MissingObjectError:
                if key == keys[-1]:
                    raise
