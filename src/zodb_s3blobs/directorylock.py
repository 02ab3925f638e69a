"""One thread of one process at a time in a directory."""

from collections.abc import Iterator
from contextlib import contextmanager
import fcntl
import os
import random
import threading
import time

from .directories import make_private


# Seconds until somebody gives up waiting for the others.
BUSY_TIMEOUT = 10.0
# Seconds between looks at a lock that somebody else has: not growing much, lest whoever begins to
# wait later come first.
FIRST_PAUSE, LONGEST_PAUSE = 0.0002, 0.003


class DirectoryBusy(OSError):
    """Another process or thread has held the lock for too long."""


class DirectoryLock:
    """A lock of the directory itself (flock), which goes with the process that has it.

    Attribute ``threads``: the lock among the threads of this process. It is held no longer than
    that of the directory is, so that whoever must have it, as a fork must, does not wait for
    another process.

    :param str path: made when missing, private to the user.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.threads = threading.Lock()

    @contextmanager
    def held(self, patience: float = BUSY_TIMEOUT) -> Iterator[None]:
        """Hold both locks.

        :param float patience: seconds.
        :raises DirectoryBusy: when others have them for too long.
        :raises OSError: when there can be no directory.
        """
        deadline, pause = time.monotonic() + patience, FIRST_PAUSE
        while (directory := self._try()) is None:
            if time.monotonic() > deadline:
                raise DirectoryBusy(f"others hold the lock of {self._path} for too long")
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 1.5, LONGEST_PAUSE)
        try:
            yield
        finally:
            # Not only closed: a process that is just being started may have a copy.
            fcntl.flock(directory, fcntl.LOCK_UN)
            self._give_up(directory)

    def _try(self) -> int | None:
        """Take both locks and return the directory's descriptor, or None."""
        if not self.threads.acquire(timeout=LONGEST_PAUSE):
            return None
        directory = None
        try:
            directory = self._open()
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(self._path), os.fstat(directory)):
                return directory
        except (BlockingIOError, FileNotFoundError):
            pass
        except BaseException:
            # Whatever it was, nobody else gives the lock back.
            self._give_up(directory)
            raise
        self._give_up(directory)
        return None

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(self._path, flags)
        except FileNotFoundError:
            make_private(self._path)
            return os.open(self._path, flags)

    def _give_up(self, directory: int | None) -> None:
        if directory is not None:
            os.close(directory)
        self.threads.release()
