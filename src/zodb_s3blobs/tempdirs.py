"""Directories for files in the making: one for each process, and it goes when the process does."""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref


logger = logging.getLogger(__name__)

# Seconds after which a file goes of which nobody tells whose it is, such as an uncommitted one of
# ZODB: no transaction takes a week.
FOREIGN = 7 * 86400
# A thousandth of a second each
LOCK_ATTEMPTS = 1000


class TempDirectory:
    """A directory of this process alone, and of what it forks.

    A locked file beside it, "{path}.lock", says that somebody still uses it. The lock vanishes with
    the last process that has it, and whoever comes next removes both.

    Attribute ``path``: it outlives this object while files are in it.

    :param str parent: where to make it; None, or a directory where that is impossible, stands for
        the system's place for temporary files.
    """

    def __init__(self, parent: str | None = None) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock: the descriptor of the locked file, in a list for the finalizer; in the
        # system's place there is none.
        self._held: list[int] = []
        if parent is not None:
            try:
                self.path = os.path.join(parent, f"{os.getpid()}-{os.urandom(8).hex()}")
                self._make_locked()
            except OSError as error:
                logger.warning("temporary files go elsewhere, %s cannot be used: %s", parent, error)
                parent = None
        if parent is None:
            self.path = tempfile.mkdtemp(prefix="zodb-s3blobs-")
        weakref.finalize(self, _release, os.getpid(), self.path, self._held)

    def file(self) -> str:
        """Return a path below that nobody else uses; the directory is made again when missing."""
        self.ensure()
        return os.path.join(self.path, f"{os.getpid()}-{os.urandom(8).hex()}.tmp")

    def ensure(self) -> None:
        """Make directory and lock again if somebody has removed them.

        :raises OSError: when that is impossible.
        """
        if not self._is_there():
            with self._lock:
                if not self._is_there():
                    self._make_locked() if self._held else os.mkdir(self.path, 0o700)

    def _is_there(self) -> bool:
        return os.path.isdir(self.path) and (not self._held or os.path.exists(f"{self.path}.lock"))

    def _make_locked(self) -> None:
        os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
        # Before the directory is there: without a lock it would be a dead process's.
        file = _locked_file(f"{self.path}.lock")
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except BaseException:
            # Whatever it was, the lock is of no use.
            os.close(file)
            raise
        while self._held:
            os.close(self._held.pop())
        self._held.append(file)


def _locked_file(path: str) -> int:
    """Return the descriptor of a file that exists under this path and is locked by it.

    A forked child shares the lock of its parent, or takes one of its own beside it.
    """
    for _attempt in range(LOCK_ATTEMPTS):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return file
        except (BlockingIOError, FileNotFoundError):
            pass  # somebody takes it for a dead process's, and removes it
        except BaseException:
            # Whatever it was, nobody else closes it.
            os.close(file)
            raise
        os.close(file)
        time.sleep(0.001)
    raise OSError(f"{path} is locked by whoever removes old temporary files")


def _release(pid: int, path: str, held: list[int]) -> None:
    if pid != os.getpid():
        return  # a forked child has the parent's
    if not held:
        shutil.rmtree(path, ignore_errors=True)  # in the system's place nobody comes next
        return
    try:
        os.rmdir(path)
        os.remove(f"{path}.lock")
    except OSError:
        pass  # files are still used, perhaps; or a child has removed it
    while held:
        os.close(held.pop())


def remove_dead(parent: str) -> None:
    """Remove the directories that no living process has, and files that are older than a week."""
    with os.scandir(parent) as entries:
        for entry in entries:
            if entry.name.endswith(".lock"):
                _remove_if_dead(entry.path)
            elif not os.path.exists(f"{entry.path}.lock"):
                _remove_if_foreign(entry.path)


def _remove_if_dead(lock: str) -> None:
    try:
        file = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # somebody else was faster, or it is another user's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(lock.removesuffix(".lock"), ignore_errors=True)
        os.remove(lock)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
            logger.warning("temporary files stay path=%s: %s", lock, error)
    finally:
        os.close(file)


def _remove_if_foreign(path: str) -> None:
    try:
        # The time of the last rename: a file that was consumed may be old itself.
        if time.time() - os.stat(path).st_ctime < FOREIGN:
            return
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
    except OSError as error:
        logger.warning("temporary file stays path=%s: %s", path, error)
