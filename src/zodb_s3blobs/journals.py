"""What one transaction has in the spool: a journal, and the files that it lists.

::

    {digest} {size} {key}       a blob; these lines are durable before the first file comes
    complete                    all files are durable: the transaction may vote; without this line a
                                file is uploaded only where the bucket has nothing under its key
    aborted                     the files go, for the transaction has not committed
    done {key}                  a file goes, for the blob is in the bucket, or wanted no more

The name of a file has that of its journal in it, so that it is this journal's alone: of two
transactions that bring the same blob none touches what the other one has put there.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence
from contextlib import suppress
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from typing import NamedTuple

from .directories import sync
from .keys import parse_key


COMPLETE = "complete"
ABORTED = "aborted"
DONE = "done "
SUFFIX = ".journal"
UNFINISHED = ".tmp"
CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9]+) (\S+)")

_TIME = re.compile(r"[0-9a-f]{16}")

# From a key, and the path of the journal that lists it, to the path of the file
PathOf = Callable[[str, str], str]


class SpooledBlob(NamedTuple):
    """What a journal says of a blob."""

    key: str
    #: in bytes
    size: int
    #: SHA-256, in hexadecimal
    digest: str
    #: of the file, which is gone when the blob is in the bucket
    path: str

    def is_intact(self) -> bool:
        """Tell whether the file still has the bytes that were put there.

        :raises FileNotFoundError: when it is gone.
        """
        return file_digest(self.path) == (self.digest, self.size)


class SpooledTransaction:
    """The blobs that one transaction has in the spool; it belongs to the transaction's thread.

    :param str directory: where the journal comes.
    :raises OSError: when it cannot be made.
    """

    def __init__(self, directory: str, path_of: PathOf) -> None:
        self._directory = directory
        self._path_of = path_of
        # Paths of files, which may not be there yet
        self._files: list[str] = []
        self._file: int | None
        self._path, self._file = _new_journal(directory)

    def keep(self, files: Sequence[tuple[str, str]]) -> None:
        """Make the bytes of files durable, by key; called once.

        :param files: keys that `keys.blob_key` made, and paths.
        :raises OSError: when that fails; `abort` removes what has come.
        """
        entries = [
            SpooledBlob(key, size, digest, self._path_of(key, self._path))
            for key, path in files
            for digest, size in [file_digest(path)]
        ]
        self._write("".join(f"{each.digest} {each.size} {each.key}\n" for each in entries))
        # A file that is there after a power failure has its journal.
        sync(self._directory)
        self._files = [entry.path for entry in entries]
        for entry, (_key, path) in zip(entries, files, strict=True):
            _put(path, entry.path)
        for directory in set(map(os.path.dirname, self._files)):
            sync(directory)
        self._write(f"{COMPLETE}\n")

    def _write(self, text: str) -> None:
        assert self._file is not None
        data = text.encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def end(self) -> None:
        """Leave the blobs to whoever uploads them; the transaction may have committed."""
        file, self._file = self._file, None
        if file is not None:
            _unlock(file)

    def abort(self) -> None:
        """Remove the blobs; the transaction has not committed."""
        if self._file is None:
            return
        try:
            # On a full disk, say, it is not told, and would only be missed after a kill just now.
            with suppress(OSError):
                self._write(f"{ABORTED}\n")
            _remove_for_good(self._path, self._files)
        finally:
            self.end()


class Journal:
    """What a transaction that has ended has left in the spool."""

    def __init__(
        self,
        path: str,
        file: int,
        entries: list[SpooledBlob],
        is_complete: bool,
        is_aborted: bool = False,
    ) -> None:
        self.path = path
        self.entries = entries
        #: if not, it has not voted, or a damaged disk has lost the line that says so
        self.is_complete = is_complete
        #: if so, nothing of it is needed
        self.is_aborted = is_aborted
        #: keys of those that are in the bucket, or have been there, or are wanted no more
        self.done: set[str] = set()
        #: whether it has lines that nobody can read
        self.is_damaged = False
        self._file = file

    @classmethod
    def open(cls, path: str, path_of: PathOf) -> Journal | None:
        """Return the journal, None while another has it.

        :raises OSError: when it cannot be read.
        :raises ValueError: when it is no text.
        """
        try:
            file = _open_journal(path)
        except FileNotFoundError:
            return None  # all uploaded just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(path)
            text = read_text(file)
            lines = text.split("\n")[:-1]
            if not text.endswith("\n"):
                # Half a line, which would be the beginning of the next one
                with suppress(OSError):
                    os.ftruncate(file, len(text.encode()) - len(text.rpartition("\n")[2].encode()))
            # It was on the disk before its files: of those that it does not name it has lost lines.
            listed = {path_of(match[3], path) for match in map(_LINE.fullmatch, lines) if match}
            has_lost = COMPLETE not in lines and _has_files(path_of("", path), listed)
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return None  # its transaction runs, or another uploads it, or has done so
        except BaseException:
            # Whatever it was, nobody else closes it.
            os.close(file)
            raise
        done = {line.removeprefix(DONE) for line in lines if line.startswith(DONE)}
        blobs = [
            line for line in lines if line not in (COMPLETE, ABORTED) and not line.startswith(DONE)
        ]
        entries = []
        for match in map(_LINE.fullmatch, blobs):
            if match and parse_key(match[3]):
                digest, size, key = match.groups()
                entries.append(SpooledBlob(key, int(size), digest, path_of(key, path)))
        is_aborted = ABORTED in lines
        is_damaged = has_lost or (len(entries) < len(blobs) and not is_aborted)
        # Any line that nobody can read may have been "complete".
        is_complete = COMPLETE in lines or is_damaged
        journal = cls(path, file, entries, is_complete, is_aborted)
        journal.done, journal.is_damaged = done, is_damaged
        return journal

    def note_done(self, entry: SpooledBlob) -> None:
        """Remove the file of a blob that is in the bucket; any thread may call this."""
        # First: what is gone later may have been packed away.
        os.write(self._file, f"{DONE}{entry.key}\n".encode())
        with suppress(FileNotFoundError):  # by hand, or by a process that could not say so
            os.remove(entry.path)

    def remove(self) -> None:
        """Remove it, and what it has there still."""
        _remove_for_good(self.path, [entry.path for entry in self.entries])

    def close(self) -> None:
        """Let others have it."""
        _unlock(self._file)


def _has_files(path: str, listed: set[str]) -> bool:
    """Tell whether there are more files of a journal, whose names end as that of a path."""
    directory, ending = os.path.split(path)
    try:
        names = [name for name in os.listdir(directory) if name.endswith(ending)]
    except FileNotFoundError:
        return False
    return any(os.path.join(directory, name) not in listed for name in names)


def digest_in(path: str, key: str) -> str | None:
    """Return the SHA-256 that a journal tells of a key, None where that cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            for match in map(_LINE.fullmatch, file.read().splitlines()):
                if match and match[3] == key:
                    return match[1]
    except (OSError, ValueError):
        pass  # uploaded just now, or nobody can read it
    return None


def file_digest(path: str) -> tuple[str, int]:
    """Return the SHA-256 of a file, in hexadecimal, and its bytes."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def read_text(file: int) -> str:
    """Return what an open file has, from its start.

    :raises ValueError: when it is no text.
    """
    data = b""
    while piece := os.pread(file, CHUNK, len(data)):
        data += piece
    return data.decode()


def _new_journal(directory: str) -> tuple[str, int]:
    """Return the path and the descriptor of a new journal, which is locked."""
    # A clock that was put back must not let a later transaction come first.
    times = [name[:16] for name in os.listdir(directory) if name.endswith(SUFFIX)]
    newest = max((int(each, 16) for each in times if _TIME.fullmatch(each)), default=0)
    while True:
        now = max(time.time_ns(), newest + 1)
        path = os.path.join(directory, f"{now:016x}-{os.urandom(8).hex()}{SUFFIX}")
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.stat(path), os.fstat(file)):
                return path, file
        except FileNotFoundError:
            pass  # an uploader has seen it first, with nothing in it
        except BaseException:
            # Whatever it was, nobody else knows of the file.
            os.remove(path)
            os.close(file)
            raise
        os.close(file)


def _open_journal(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_APPEND)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, flags | os.O_RDONLY)  # what is there can be uploaded at least


def _unlock(file: int) -> None:
    # A forked child has the descriptor, too, but it is the same lock.
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)


def _put(path: str, target: str) -> None:
    """Make the bytes of a file durable under another path, where nothing is."""
    try:
        # The file goes into the cache, which removes its own name only.
        os.link(path, target, follow_symlinks=False)
    except OSError:
        # Another file system, or one without links
        _copy(path, target)
    sync(target)


def _copy(path: str, target_path: str) -> None:
    temporary = target_path + UNFINISHED
    with open(path, "rb") as source, open(temporary, "xb") as target:
        shutil.copyfileobj(source, target, CHUNK)
        target.flush()
        os.fsync(target.fileno())
    os.chmod(temporary, 0o400)
    os.replace(temporary, target_path)


def _remove_for_good(journal_path: str, paths: Sequence[str]) -> None:
    """Remove files, and then the journal that lists them."""
    for path in paths:
        for name in (path, path + UNFINISHED):
            with suppress(FileNotFoundError):  # mostly
                os.remove(name)
    # If the names of files came back after a power failure, no journal would list them. Where the
    # disk fails, the journal may be all that can be removed.
    with suppress(OSError):
        for directory in set(map(os.path.dirname, paths)):
            sync(directory)
    with suppress(FileNotFoundError):
        os.remove(journal_path)
