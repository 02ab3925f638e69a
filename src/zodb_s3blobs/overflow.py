"""Complete files that the cache could not take: kept beside it, for this process, for a while."""

from collections.abc import Callable
import os
import threading
import time

from .forks import begin_in_children


# What is kept, with the newest file: bytes in all, and seconds.
KEPT_BYTES = 256 << 20
KEPT_SECONDS = 600.0


class Overflow:
    """A few files by name; threads share it.

    A reader is given a path and opens it a moment later, and may then open it again: so a file
    cannot be removed at once. The newest is kept whatever its size.

    :param clock: returns a time in seconds that only grows.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin()
        begin_in_children(self)

    def begin(self) -> None:
        """Forget all files: a child's are its parent's, and so is whoever has the lock."""
        self._lock = threading.Lock()
        # Guarded by _lock; name to path, size in bytes and time, the newest last
        self._files: dict[str, tuple[str, int, float]] = {}

    def get(self, name: str) -> str | None:
        """Return the path of a file that is kept, else None."""
        kept = self._files.get(name)
        # Somebody may have removed it.
        return kept[0] if kept is not None and os.path.exists(kept[0]) else None

    def keep(self, name: str, path: str) -> str:
        """Take over a file and return its path."""
        size = os.path.getsize(path)
        with self._lock:
            self._forget(name)
            self._files[name] = path, size, self._clock()
        self.expire()
        return path

    def expire(self) -> None:
        """Remove what was kept for long enough."""
        with self._lock:
            self._drop_old()

    def clear(self) -> None:
        """Remove all."""
        with self._lock:
            for name in list(self._files):
                self._forget(name)

    def _drop_old(self) -> None:
        now, size = self._clock(), 0
        newest = True
        for name, (_path, its_size, since) in reversed(list(self._files.items())):
            size += its_size
            if now - since > KEPT_SECONDS or (size > KEPT_BYTES and not newest):
                self._forget(name)
            newest = False

    def _forget(self, name: str) -> None:
        if (kept := self._files.pop(name, None)) is not None:
            try:
                os.remove(kept[0])
            except OSError:
                pass  # gone already, or the disk fails: then it cannot be helped
