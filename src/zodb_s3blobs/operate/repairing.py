"""Brings back bytes that are missing or damaged, from where there still are right ones."""

from collections.abc import Iterator
from contextlib import contextmanager
import os
from typing import Any

from ZODB.POSException import POSKeyError

from ..interfaces import OtherDatabaseError
from ..interfaces import S3OperationError
from .needs import Need
from .objects import DAMAGED_IN_CACHE
from .objects import Told


class Repairer:
    """Any thread may ask it; deletes nothing but damaged files of the cache."""

    def __init__(self, services: Any) -> None:
        self._client = services.client
        self._cache = services.cache
        self._loader = services.loader

    def mend(self, kind: str, need: Need, tids: list[bytes]) -> tuple[str, str]:
        """Put right bytes in the place of what is wrong.

        :param str kind: of the finding.
        :param tids: of all revisions that need the same bytes.
        :returns: where they come from, and "", or "" and why there are none.
        :raises OtherDatabaseError: when the bucket is another database's.
        """
        try:
            return self._mend(kind, need, tids)
        except OtherDatabaseError:
            raise
        except (OSError, POSKeyError, S3OperationError) as error:
            if self._client.is_down:
                raise
            return "", str(error)

    def _mend(self, kind: str, need: Need, tids: list[bytes]) -> tuple[str, str]:
        if kind == DAMAGED_IN_CACHE:
            self._loader.verify(need.oid, need.tid, lambda oid, tid: need.stamp)
            return "the bucket", ""
        expected = self._expected(need)
        for word, path in self._copies(need, tids, expected is not None):
            if expected is None or expected.is_of(path):
                self._client.upload_file(path, need.key)
                return f"the {word}", ""
        return "", "nobody has right bytes"

    def _expected(self, need: Need) -> Told | None:
        """Return what the object says of itself, None where there is none, or it is another."""
        try:
            head = self._client.head_object(need.key)
        except S3OperationError:
            if self._client.is_down:
                raise
            return None
        told = head and Told.by(head)
        return told if told and told.key in (None, need.key) else None

    def _copies(self, need: Need, tids: list[bytes], is_checked: bool) -> Iterator[tuple[str, str]]:
        """Yield files with the bytes, and words for where they come from."""
        for word, source in self._loader.elsewhere(need.oid, need.tid, need.stamp):
            with self._temporary() as path:
                try:
                    if source.fetch(need.oid, need.tid, path):
                        yield word, path
                except (OSError, S3OperationError):
                    continue  # the next one may have it
        for tid in tids:
            size = self._cache.size(need.oid, tid)
            # Where nothing is known of the object, its size when it came into the cache is.
            if size is not None and (is_checked or size == self._cache.known_size(need.oid, tid)):
                with self._temporary() as path:
                    try:
                        os.link(self._cache.path(need.oid, tid), path)
                    except OSError:
                        continue  # evicted
                    yield "cache", path

    @contextmanager
    def _temporary(self) -> Iterator[str]:
        path = self._cache.temporary_file()
        try:
            yield path
        finally:
            if os.path.lexists(path):
                os.remove(path)
