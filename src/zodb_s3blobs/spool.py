"""Blobs that could not be uploaded yet, durable on a local disk until they are in the bucket.

::

    spool-dir/
        bucket                      for which bucket all this is
        {time}-{random}.journal     the blobs of one transaction: SHA-256, size and key of each
        blobs/{oid}-{name}.blob     their bytes

A journal is written before its blobs and completed after them; then the transaction may vote. Its
process has it locked until the transaction has ended, or the process has. From then on anybody
uploads what it lists: for a transaction that has not committed that leaves garbage in the bucket,
which a sweep deletes, and the other way round a blob would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import fcntl
import hashlib
import os
import re
import shutil
import time
from typing import NamedTuple

from zope.interface import implementer

from .interfaces import IBlobSource
from .keys import parse_key
from .keys import PREFIX


JOURNAL = ".journal"
COMPLETE = "complete"
UNFINISHED = ".tmp"
CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9]+) (\S+)")


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
        return _digest(self.path) == (self.digest, self.size)


class Spool:
    """A directory that the processes of a host may share, as one user.

    :param str directory: on a local disk; made when missing, private to the user.
    :param place: words that name the bucket, such as endpoint, bucket and prefix.
    :param bool takes_commits: whether commits may go here. If not, what is here is still read, and
        uploaded.
    :raises ValueError: when it holds blobs for another bucket.
    """

    def __init__(self, directory: str, place: Sequence[str], takes_commits: bool = True) -> None:
        self.directory = os.path.abspath(directory)
        self.takes_commits = takes_commits
        self._blobs = os.path.join(self.directory, "blobs")
        # One by one: the mode is that of the last directory alone.
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        os.makedirs(self._blobs, mode=0o700, exist_ok=True)
        _sync_directory(os.path.dirname(self.directory))
        self._claim("\n".join(place) + "\n")

    def __repr__(self) -> str:
        return f"<Spool {self.directory}>"

    def _claim(self, place: str) -> None:
        marker = os.path.join(self.directory, "bucket")
        try:
            with open(marker, encoding="utf-8") as file:
                found = file.read()
        except FileNotFoundError:
            found = ""
        if found == place:
            return
        if found and self._names():
            raise ValueError(
                f"the spool {self.directory} holds blobs that are not uploaded yet, for"
                f" {' '.join(found.split())}, not {' '.join(place.split())}: let a process with the"
                f" former configuration upload them, or, if it is the same bucket, remove {marker}"
            )
        temporary = f"{marker}-{os.urandom(8).hex()}"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(place)
            os.fsync(file.fileno())
        os.replace(temporary, marker)
        _sync_directory(self.directory)

    def _path(self, key: str) -> str:
        return os.path.join(self._blobs, key.removeprefix(PREFIX).replace("/", "-"))

    def _names(self) -> list[str]:
        """Return the names of the journals, the oldest first."""
        return sorted(name for name in os.listdir(self.directory) if name.endswith(JOURNAL))

    def take(self, files: Sequence[tuple[str, str]]) -> SpooledTransaction:
        """Keep copies of files, by key; they are durable when this returns.

        :param files: keys that `keys.blob_key` made, and paths.
        :raises OSError: when they cannot be kept; nothing is left then.
        """
        entries = []
        for key, path in files:
            digest, size = _digest(path)
            entries.append(SpooledBlob(key, size, digest, self._path(key)))
        name = f"{time.time_ns():016x}-{os.urandom(8).hex()}{JOURNAL}"
        taken = SpooledTransaction(os.path.join(self.directory, name), entries)
        try:
            for entry, (_key, path) in zip(entries, files, strict=True):
                taken.put(entry, path)
            _sync_directory(self._blobs)
            taken.complete()
            _sync_directory(self.directory)
        except BaseException:
            # Whatever it was, the transaction cannot vote.
            taken.abort()
            raise
        return taken

    def find(self, key: str) -> SpooledSource | None:
        """Return the bytes of a blob as a source, None when they are not here."""
        path = self._path(key)
        return SpooledSource(path) if os.path.exists(path) else None

    def journals(self) -> Iterator[Journal]:
        """Yield what transactions have left that have ended, the oldest first.

        Each is this process's alone until the next one is asked for.
        """
        for name in self._names():
            journal = Journal.open(os.path.join(self.directory, name), self._path)
            if journal is not None:
                try:
                    yield journal
                finally:
                    journal.close()

    def usage(self) -> dict[str, float | None]:
        """Return a mapping with ``spool_blobs``, ``spool_bytes`` and ``spool_age_seconds``.

        :raises OSError: when the directory cannot be read.
        """
        count = size = 0
        oldest = None
        with os.scandir(self._blobs) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # uploaded just now
                if not entry.name.endswith(UNFINISHED):
                    count += 1
                    size += status.st_size
        if names := self._names():
            oldest = max(0.0, time.time() - int(names[0].partition("-")[0], 16) / 1e9)
        return {"spool_blobs": count, "spool_bytes": size, "spool_age_seconds": oldest}


@implementer(IBlobSource)
class SpooledSource:
    """The bytes of one blob, which may be uploaded, and go, at any moment."""

    def __init__(self, path: str) -> None:
        self._path = path

    def fetch(self, oid: bytes, tid: bytes, target_path: str) -> bool:
        """Give the file a second name, or copy it; return False when it has gone."""
        try:
            os.link(self._path, target_path, follow_symlinks=False)
        except OSError:
            # On another file system, perhaps.
            try:
                shutil.copyfile(self._path, target_path)
            except FileNotFoundError as error:
                if error.filename != self._path:
                    raise
                return False
        return True

    def size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the bytes of the file, None when it has gone."""
        try:
            return os.path.getsize(self._path)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Nothing is kept open."""


class SpooledTransaction:
    """The blobs that one transaction has in the spool; it belongs to the transaction's thread.

    :param str path: of the journal, where nothing is yet.
    :raises OSError: when it cannot be made.
    """

    def __init__(self, path: str, entries: Sequence[SpooledBlob]) -> None:
        self._path = path
        self._entries = entries
        # Those whose files were put here, and not by an earlier transaction.
        self._put: list[str] = []
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file: int | None = os.open(path, flags, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._write("".join(f"{each.digest} {each.size} {each.key}\n" for each in entries))
        except BaseException:
            # Whatever it was, nobody else knows of the file.
            self.abort()
            raise

    def _write(self, text: str) -> None:
        assert self._file is not None
        data = text.encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def put(self, entry: SpooledBlob, path: str) -> None:
        """Make the bytes of a file durable under an entry's path."""
        if os.path.exists(entry.path):
            # Restored by an earlier transaction: a key has the same bytes for ever.
            if entry.is_intact():
                return
            os.remove(entry.path)
        try:
            # The file goes into the cache, which removes its own name only.
            os.link(path, entry.path, follow_symlinks=False)
            self._put.append(entry.path)
        except OSError:
            self._copy(entry, path)
        _sync_file(entry.path)

    def _copy(self, entry: SpooledBlob, path: str) -> None:
        """Copy to another file system, or to one without links."""
        temporary = entry.path + UNFINISHED
        self._put.append(temporary)
        with open(path, "rb") as source, open(temporary, "wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())
        os.chmod(temporary, 0o400)
        os.replace(temporary, entry.path)
        self._put[-1] = entry.path

    def complete(self) -> None:
        """Say that all blobs are here, so that one that is missing later was lost."""
        self._write(f"{COMPLETE}\n")

    def end(self) -> None:
        """Leave the blobs to whoever uploads them; the transaction may have committed."""
        file, self._file = self._file, None
        if file is not None:
            # A forked child has the descriptor, too, but it is the same lock.
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def abort(self) -> None:
        """Remove the blobs; the transaction has not committed."""
        if self._file is None:
            return
        for path in (*self._put, self._path):
            try:
                os.remove(path)
            except FileNotFoundError:
                pass  # half done
        self.end()


class Journal:
    """What a transaction that has ended has left in the spool."""

    def __init__(self, path: str, file: int, entries: list[SpooledBlob], complete: bool) -> None:
        self.path = path
        self.entries = entries
        #: whether all of them were here when it voted
        self.is_complete = complete
        self._file = file

    @classmethod
    def open(cls, path: str, path_of: Callable[[str], str]) -> Journal | None:
        """Return the journal, None while another has it.

        :param path_of: returns the path of a blob by its key.
        """
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None  # all uploaded just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(path)
            with open(file, encoding="utf-8", closefd=False) as lines:
                text = lines.read()
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return None  # its transaction runs, or another uploads it, or has done so
        except BaseException:
            # Whatever it was, nobody else closes it.
            os.close(file)
            raise
        entries = []
        for line in text.splitlines():
            match = _LINE.fullmatch(line)
            # Half a line, perhaps, of a process that was killed.
            if match is not None and parse_key(match[3]):
                digest, size, key = match.groups()
                entries.append(SpooledBlob(key, int(size), digest, path_of(key)))
        return cls(path, file, entries, text.endswith(f"\n{COMPLETE}\n"))

    def remove(self) -> None:
        """Forget it, when nothing of it is here any more."""
        for entry in self.entries:
            try:
                os.remove(entry.path + UNFINISHED)
            except FileNotFoundError:
                pass  # mostly
        # If the names of blobs came back after a power failure, no journal would list them.
        _sync_directory(os.path.join(os.path.dirname(self.path), "blobs"))
        os.remove(self.path)

    def close(self) -> None:
        """Let others have it."""
        os.close(self._file)


def _digest(path: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def _sync_file(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_directory(path: str) -> None:
    _sync_file(path)
