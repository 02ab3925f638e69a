"""The keys of transactions whose end is not known, and of deletions under way."""

from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
import threading

from .forks import begin_in_children
from .interfaces import TransientS3Error


# Seconds; a deletion is one request with its retries.
ADD_TIMEOUT = 600.0


class OpenKeys:
    """Keeps the transactions and the sweeps of a storage apart, key by key.

    A sweep decides about a key while no transaction can take it up, and a
    transaction takes up a key while no sweep is about to delete it.
    """

    def __init__(self) -> None:
        self.begin()
        begin_in_children(self)

    def begin(self) -> None:
        """Forget all; a child has none of its parent's transactions and sweeps."""
        self._changed = threading.Condition()
        # Guarded by _changed: both sets.
        self._open: set[str] = set()
        self._deleting: set[str] = set()

    def add(self, key: str) -> None:
        """Enter a key before its upload starts.

        Waits while a sweep decides about it, and while the clean-up of an aborted transaction
        that had the same tid may still delete it: a MappingStorage gives it out again.

        :raises TransientS3Error: when that takes longer than any clean-up.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_free(key), ADD_TIMEOUT):
                raise TransientS3Error(f"{key!r} is still being deleted")
            self._open.add(key)

    def _is_free(self, key: str) -> bool:
        return key not in self._deleting and key not in self._open

    def remove(self, keys: Iterable[str]) -> None:
        """Drop keys after the base knows the outcome."""
        with self._changed:
            self._open.difference_update(keys)
            self._changed.notify_all()

    def closed(self, keys: Iterable[str]) -> set[str]:
        """Return those of the keys that no transaction has taken up, at this moment."""
        with self._changed:
            return set(keys) - self._open

    @contextmanager
    def deciding(self, keys: Iterable[str]) -> Iterator[set[str]]:
        """Keep transactions away from those of the keys that none has taken up, and yield these."""
        with self._changed:
            free = set(keys) - self._open
            self._deleting |= free
        try:
            yield free
        finally:
            with self._changed:
                self._deleting -= free
                self._changed.notify_all()
