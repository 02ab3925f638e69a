"""One process of a host at a time: bytes of a file, locked by name."""

from collections.abc import Callable
from collections.abc import Iterator
from contextlib import contextmanager
import fcntl
from functools import partial
import os
import time
import zlib

from .directories import close_if


# Seconds after which nobody waits any longer: doing the work twice is only slower.
TIMEOUT = 120.0


class SingleFlight:
    """Record locks, which belong to the process and vanish with it.

    The threads of a process do not exclude each other here.

    :param str path: a file that the processes share; made when missing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        # By pid, the descriptor; a forked child opens its own.
        self._files: dict[int, tuple[int, os.stat_result]] = {}

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Wait until no other process is in here with this name."""
        deadline = time.monotonic() + TIMEOUT
        while (end := self.begin(name)) is None:
            # A stopped process must not stop the others.
            if time.monotonic() > deadline:
                end = _nothing
                break
            time.sleep(0.005)
        try:
            yield
        finally:
            end()

    def begin(self, name: str) -> Callable[[], None] | None:
        """Return what any thread calls in the end, or None while another process is in here."""
        try:
            file = self._open()
        except OSError:
            # Whoever cannot lock does work that another may be doing; that is only slower.
            return _nothing
        place = zlib.crc32(name.encode())
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except BlockingIOError:
            return None
        return partial(self._end, file, place)

    def _end(self, file: int, place: int) -> None:
        open_now = self._files.get(os.getpid())
        if open_now and open_now[0] == file:  # it was not closed meanwhile
            fcntl.lockf(file, fcntl.LOCK_UN, 1, place)

    def _open(self) -> int:
        found = self._files.get(os.getpid())
        if found is None:
            mine = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # Two threads may come here at once; the lock that the other one may have by now is
            # lost, and the work perhaps done twice.
            found = self._files.setdefault(os.getpid(), (mine, os.fstat(mine)))
            if found[0] != mine:
                os.close(mine)
        return found[0]

    def close(self) -> None:
        """Close the file; a later call opens it again."""
        found = self._files.pop(os.getpid(), None)
        if found is not None:
            close_if(*found)


def _nothing() -> None:
    pass
