"""The committed files of a cache directory, as the file system tells of them.

    cache_dir/{last 3 hex digits of oid}/{oid}.{tid}.blob

A name is a path below cache_dir without its suffix; it begins with its
directory, of which there are 4096.
"""

from collections.abc import Iterator
import logging
import os
import re

from .directories import make_private


logger = logging.getLogger(__name__)

DIRECTORY = re.compile(r"[0-9a-f]{3}")
_FILE = re.compile(r"([0-9a-f]{16}\.[0-9a-f]{16})\.blob")
# Of the package before this one: {oid}/{tid}.blob
_OLD_DIRECTORY = re.compile(r"[0-9a-f]{1,16}")
_OLD_FILE = re.compile(r"([0-9a-f]{1,16})\.blob")


def name_of(oid: bytes, tid: bytes) -> str:
    """Return the name of a revision's file."""
    oid_hex = oid.hex()
    return f"{oid_hex[-3:]}/{oid_hex}.{tid.hex()}"


def directory_of(name: str) -> str:
    """Return the directory that a name begins with."""
    return name[:3]


class CacheFiles:
    """Finds, places and removes files; who may do so when is the caller's care.

    :param str cache_dir: absolute.
    """

    def __init__(self, cache_dir: str) -> None:
        self.cache_dir = cache_dir

    def path(self, name: str) -> str:
        return f"{self.cache_dir}/{name}.blob"

    # Looking

    def directories(self) -> dict[str, int]:
        """Return the directories there are, and when each was last changed, in nanoseconds."""
        with os.scandir(self.cache_dir) as entries:
            names = [e.name for e in entries if DIRECTORY.fullmatch(e.name) and e.is_dir()]
        found = ((name, self.modified(name)) for name in names)
        return {name: modified for name, modified in found if modified is not None}

    def modified(self, directory: str) -> int | None:
        """Return when a directory was last changed, in nanoseconds, or None when it is missing."""
        try:
            return os.stat(f"{self.cache_dir}/{directory}").st_mtime_ns
        except FileNotFoundError:
            return None

    def listing(self, directory: str) -> dict[str, tuple[int, float]]:
        """Return names, sizes in bytes and times of last use of a directory's files.

        :raises OSError: when it cannot be read.
        """
        found = {}
        try:
            with os.scandir(f"{self.cache_dir}/{directory}") as entries:
                names = [e.name for e in entries if e.is_file(follow_symlinks=False)]
        except FileNotFoundError:
            return {}
        for file_name in names:
            if match := _FILE.fullmatch(file_name):
                try:
                    status = os.stat(f"{self.cache_dir}/{directory}/{file_name}")
                except FileNotFoundError:
                    continue  # somebody removes files by hand
                found[f"{directory}/{match.group(1)}"] = status.st_size, status.st_mtime
        return found

    def last_use(self, name: str) -> float:
        """Return when a file was last used, in seconds since the epoch; 0 when it is missing."""
        try:
            return os.stat(f"{self.cache_dir}/{name}.blob").st_mtime
        except FileNotFoundError:
            return 0.0

    # Changing

    def place(self, source_path: str, name: str) -> str:
        """Rename a file to its place, whose directory is made when missing; return its path."""
        path = self.path(name)
        try:
            os.replace(source_path, path)
        except FileNotFoundError:
            make_private(os.path.dirname(path))
            os.replace(source_path, path)
        return path

    def remove(self, name: str) -> bool:
        """Remove a file; False when there was none."""
        try:
            os.remove(f"{self.cache_dir}/{name}.blob")
        except FileNotFoundError:
            return False
        return True

    def remove_directory(self, directory: str) -> None:
        """Remove a directory if it is empty."""
        try:
            os.rmdir(f"{self.cache_dir}/{directory}")
        except OSError:
            pass  # not empty, or somebody was faster

    def take_over(self) -> int:
        """Give the files of the package before this one their new names; return their number."""
        count = 0
        for directory in list(self._old_directories()):
            try:
                count += self._take_over(directory)
            except OSError as error:
                logger.warning("files of an older package stay path=%s: %s", directory, error)
        return count

    def _take_over(self, directory: str) -> int:
        count, oid = 0, os.path.basename(directory).zfill(16)
        for file_name in os.listdir(directory):
            if match := _OLD_FILE.fullmatch(file_name):
                name = f"{oid[-3:]}/{oid}.{match.group(1).zfill(16)}"
                try:
                    self.place(f"{directory}/{file_name}", name)
                except FileNotFoundError:
                    continue  # another process was faster
                count += 1
        if not DIRECTORY.fullmatch(os.path.basename(directory)):
            self.remove_directory(os.path.basename(directory))
        return count

    def _old_directories(self) -> Iterator[str]:
        with os.scandir(self.cache_dir) as entries:
            for entry in entries:
                if _OLD_DIRECTORY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                    yield entry.path
