"""Places for files in the making: a directory for each process, which goes when that does."""

from __future__ import annotations

from collections.abc import Iterator
import fcntl
import itertools
import logging
import os
import shutil
import stat
import tempfile
import time
import weakref

from .directories import close_if
from .directories import is_still
from .directories import make_private
from .interfaces import DISK_FULL


logger = logging.getLogger(__name__)

# Seconds after which a file goes of which nobody tells whose it is, such as an uncommitted one of
# ZODB: no transaction takes a week.
OLD = 7 * 86400
# A thousandth of a second each
LOCK_ATTEMPTS = 1000


class TempFiles:
    """Paths for temporary files: below a parent, else in the system's place for such files."""

    def __init__(self, parent: str) -> None:
        self._here = TempDirectory(parent)
        # What `one_more` knows: a process and its directory; and a number for each file
        self._last: tuple[int, str] | None = None
        self._numbers = itertools.count()
        # By its parent: the system may have no place.
        self._elsewhere: dict[str, TempDirectory] = {}

    def file(self) -> str:
        """Return a path that nobody else uses, below the parent if that is possible now.

        :raises OSError: when there can be none, or the parent's disk is full.
        """
        try:
            return self._here.file()
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            return self.elsewhere()

    def one_more(self) -> str:
        """Return what `file` does, but without a look whether the directory is still there.

        :raises OSError: as `file`, by the first call.
        """
        if self._last is None or self._last[0] != os.getpid():
            self._last = os.getpid(), os.path.dirname(self.file())
        pid, directory = self._last
        return f"{directory}/{pid}-{next(self._numbers)}.tmp"

    def elsewhere(self) -> str:
        """Return a path in the system's place.

        :raises OSError: when there can be none.
        """
        return self._in_the_system_s_place().file()

    def remove_dead(self) -> None:
        """Remove what processes have left that no longer live."""
        self._here.remove_dead()
        try:
            self._in_the_system_s_place().remove_dead()
        except OSError:
            pass  # there is no such place

    def _in_the_system_s_place(self) -> TempDirectory:
        place = os.path.join(tempfile.gettempdir(), f"zodb-s3blobs-{os.getuid()}")
        known = self._elsewhere.get(place)
        # Two threads get one.
        return known or self._elsewhere.setdefault(
            place, TempDirectory(place, is_among_others=True)
        )


class TempDirectory:
    """A directory of this process alone, and of what it forks; it is made when it is needed.

    A locked file beside it, "{path}.lock", says that somebody still uses it. The lock vanishes with
    the last process that has it, and whoever comes next removes both.

    :param str parent: made when missing, private to the user.
    :param bool is_among_others: anybody could have made the parent.
    """

    def __init__(self, parent: str, is_among_others: bool = False) -> None:
        self._parent = parent
        self._is_among_others = is_among_others
        self.path = os.path.join(parent, f"{os.getpid()}-{os.urandom(8).hex()}")
        # Descriptors of the locked file, as a list for the finalizer; mostly one
        self._held: list[tuple[int, os.stat_result]] = []
        weakref.finalize(self, _release, os.getpid(), self.path, self._held)

    def file(self) -> str:
        """Return a path below that nobody else uses; nothing is there yet.

        :raises OSError: when the directory cannot be made or written to.
        """
        if not self._is_there():
            self._make()
        if not os.access(self.path, os.W_OK):
            raise PermissionError(f"{self.path} cannot be written to")
        return os.path.join(self.path, f"{os.getpid()}-{os.urandom(8).hex()}.tmp")

    def _is_there(self) -> bool:
        # Somebody may have removed it, and a forked child made it again, with a lock of its own.
        try:
            lock = os.stat(f"{self.path}.lock")
        except OSError:
            return False
        is_held = any(is_still(file, lock) for file, _status in list(self._held))
        return is_held and os.path.isdir(self.path)

    def _make(self) -> None:
        if self._is_among_others:
            _make_directory(self._parent)
        else:
            make_private(self._parent)
        self._refuse_others()
        # Before the directory is there: without a lock it would be a dead process's.
        file = _locked_file(f"{self.path}.lock")
        try:
            _make_directory(self.path)
        except BaseException:
            # Whatever it was, the lock is of no use.
            os.close(file)
            raise
        self._held.append((file, os.fstat(file)))

    def _refuse_others(self) -> None:
        if self._is_among_others:
            status = os.lstat(self._parent)
            is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o077
            if not (is_ours and stat.S_ISDIR(status.st_mode)):
                raise PermissionError(f"{self._parent} is another user's, or open to others")

    def remove_dead(self) -> None:
        """Remove the directories below the parent that no living process has.

        :raises OSError: when the parent should be this user's and is not.
        """
        self._refuse_others()
        for path in _entries(self._parent):
            if path.endswith(".lock"):
                _remove_if_dead(path)
        remove_old(self._parent)


def _make_directory(path: str) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def _locked_file(path: str) -> int:
    """Return the descriptor of a file that exists under this path and is locked by it.

    A forked child shares the lock of its parent, or takes one of its own beside it.
    """
    for _attempt in range(LOCK_ATTEMPTS):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
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


def _release(pid: int, path: str, held: list[tuple[int, os.stat_result]]) -> None:
    if pid != os.getpid():
        return  # a forked child has the parent's
    try:
        os.rmdir(path)
        os.remove(f"{path}.lock")
    except OSError:
        pass  # files are still used, perhaps; whoever comes next sees
    while held:
        close_if(*held.pop())


def _remove_if_dead(lock: str) -> None:
    try:
        file = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return  # somebody else was faster, or it is another user's
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(lock), os.fstat(file)):
            shutil.rmtree(lock.removesuffix(".lock"), ignore_errors=True)
            os.remove(lock)
    except (BlockingIOError, FileNotFoundError):
        pass  # it lives, or somebody else was faster
    except OSError as error:
        logger.warning("temporary files stay path=%s: %s", lock, error)
    finally:
        os.close(file)


def remove_old(directory: str) -> None:
    """Remove files and directories that are a week old and that no lock belongs to."""
    for path in _entries(directory):
        if path.endswith(".lock") or os.path.exists(f"{path}.lock"):
            continue
        try:
            # The time of the last rename: a file that was consumed may be old itself.
            if time.time() - os.lstat(path).st_ctime < OLD:
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.remove(path)
        except FileNotFoundError:
            pass  # somebody else was faster
        except OSError as error:
            logger.warning("temporary file stays path=%s: %s", path, error)


def _entries(directory: str) -> Iterator[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return  # it is not there, or there is nothing to be done
    for name in names:
        yield os.path.join(directory, name)
