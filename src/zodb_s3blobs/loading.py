"""From (oid, serial) to a complete file: hit, single flight, S3, sources."""

from collections.abc import Sequence
import os
from typing import Any

from ZODB.POSException import POSKeyError

from .interfaces import MissingObjectError
from .keys import blob_key


class BlobLoader:
    """Fills the cache on demand; threads share it."""

    def __init__(self, cache: Any, client: Any, sources: Sequence[Any]) -> None:
        self._cache = cache
        self._client = client
        self._sources = sources

    def load(self, oid: bytes, serial: bytes) -> str:
        """Return the path of a complete, verified file with the revision's bytes.

        :raises POSKeyError: when neither the bucket nor a source has it.
        :raises S3OperationError: when that cannot be told.
        """
        cache = self._cache
        path: str | None = cache.get(oid, serial)
        if path is not None:
            return path
        with cache.filling(oid, serial):
            path = cache.get(oid, serial)
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
        except MissingObjectError as error:
            if not any(source.fetch(oid, serial, target_path) for source in self._sources):
                raise POSKeyError(f"No blob {key} in the bucket", oid, serial) from error
