"""From (oid, serial) to a complete file: hit, single flight, S3, sources."""

from collections.abc import Sequence
from concurrent.futures import Future
import os
from typing import Any

from ZODB.POSException import POSKeyError

from .interfaces import MissingObjectError
from .interfaces import S3OperationError
from .keys import blob_key


class BlobLoader:
    """Fills the cache on demand; threads share it."""

    def __init__(self, cache: Any, client: Any, sources: Sequence[Any]) -> None:
        self._cache = cache
        self._client = client
        self._sources = sources
        # What threads are fetching now; setdefault decides between them.
        self._flights: dict[tuple[int, bytes, bytes], Future[str | None]] = {}

    def load(self, oid: bytes, serial: bytes) -> str:
        """Return the path of a complete, verified file with the revision's bytes.

        :raises POSKeyError: when neither the bucket nor a source has it.
        :raises S3OperationError: when that cannot be told.
        """
        path: str | None = self._cache.get(oid, serial)
        while path is None:
            path = self._load_together(oid, serial)
        return path

    def _load_together(self, oid: bytes, serial: bytes) -> str | None:
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
            mine.set_result(self._fill(oid, serial))
        except Exception as error:
            mine.set_exception(error)
        finally:
            del self._flights[name]
            if not mine.done():
                mine.set_result(None)
        return mine.result()

    def _fill(self, oid: bytes, serial: bytes) -> str:
        cache = self._cache
        with cache.filling(oid, serial):
            path: str | None = cache.get(oid, serial)
            if path is not None:
                return path
            temporary = cache.temporary_file()
            try:
                self._fetch(oid, serial, temporary)
                filled: str = cache.put(oid, serial, temporary)
                return filled
            finally:
                if os.path.exists(temporary):
                    os.remove(temporary)

    def _fetch(self, oid: bytes, serial: bytes, target_path: str) -> None:
        key = blob_key(oid, serial)
        try:
            self._client.download_file(key, target_path)
        except S3OperationError as error:
            # A revision has the same bytes wherever they are.
            if any(source.fetch(oid, serial, target_path) for source in self._sources):
                return
            if isinstance(error, MissingObjectError):
                raise POSKeyError(f"No blob {key} in the bucket", oid, serial) from error
            error.oid, error.tid = oid, serial
            raise
