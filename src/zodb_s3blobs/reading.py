"""What can be told of a blob, and read of it, without having all of its bytes here."""

from collections.abc import Callable
import io
import os
from typing import Any

from . import values
from .headers import content_disposition
from .headers import media_type
from .interfaces import EVICTION_ATTEMPTS
from .loading import BlobLoader
from .loading import FindReference
from .loading import Located
from .sections import checked_range
from .sections import FileSection
from .stats import ReadCounters


class BlobReader:
    """Belongs to one instance of a storage.

    :param find_staged: returns the path of a staged file of the running transaction, or None.
    :param ReadCounters counters: told how long S3 was waited for.
    """

    def __init__(
        self,
        cache: Any,
        client: Any,
        loader: BlobLoader,
        find_reference: FindReference,
        find_staged: Callable[[bytes, bytes], str | None],
        counters: ReadCounters,
    ) -> None:
        self._cache = cache
        self._client = client
        self._loader = loader
        self._find_reference = find_reference
        self._find_staged = find_staged
        self._counters = counters

    def is_cached(self, oid: bytes, serial: bytes) -> bool:
        """Tell whether the bytes of a blob are on this host."""
        cached = self._cache.size(oid, serial) is not None
        return cached or self._find_staged(oid, serial) is not None

    def size(self, oid: bytes, serial: bytes) -> int:
        """Return the size of a blob in bytes."""
        size: int | None = self._cache.size(oid, serial)
        if size is not None:
            return size
        if path := self._find_staged(oid, serial):
            return os.path.getsize(path)
        return self._locate(oid, serial).size

    def open_range(
        self, oid: bytes, serial: bytes, start: int, stop: int | None
    ) -> io.BufferedReader:
        """Open the bytes from start to below stop, or to the end."""
        start, stop = checked_range(start, stop)
        if stop is not None and stop <= start:
            self.size(oid, serial)  # what is nowhere is an error here, too
            return FileSection(open(os.devnull, "rb", buffering=0)).buffered()
        for attempt in range(1, EVICTION_ATTEMPTS + 1):
            path = self._cache.get(oid, serial) or self._find_staged(oid, serial)
            if path is None:
                waiting, find = self._counters.waiting, self._find_reference
                with waiting():
                    section = self._loader.open_range(oid, serial, start, stop, find, waiting)
                    if section is not None:
                        return section.buffered()
                    path = self._loader.load(oid, serial, find)
            try:
                return FileSection(open(path, "rb", buffering=0), start, stop).buffered()
            except FileNotFoundError:  # eviction was faster
                if attempt == EVICTION_ATTEMPTS:
                    raise
        raise AssertionError("unreachable")

    def _locate(self, oid: bytes, serial: bytes) -> Located:
        with self._counters.waiting():
            return self._loader.locate(oid, serial, self._find_reference)

    def presigned_url(
        self,
        oid: bytes,
        serial: bytes,
        expires_in: int,
        content_type: str | None,
        filename: str | None,
        disposition: str,
    ) -> str | None:
        """Return a URL that a browser can GET, None where S3 cannot deliver the blob."""
        values.url_seconds(expires_in)
        if content_type is not None:
            content_type = media_type(content_type)
        header = content_disposition(disposition, filename)
        if not self._client.signs_urls or self._find_staged(oid, serial):
            return None
        key = self._locate(oid, serial).key
        if key is None:
            return None
        url: str = self._client.presigned_url(key, expires_in, content_type, header)
        return url
