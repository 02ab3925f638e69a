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
from contextlib import ExitStack
import errno
import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
import time
from typing import BinaryIO
from typing import NamedTuple

from zope.interface import implementer

from .directories import make_private
from .interfaces import IBlobSource
from .interfaces import IntegrityError
from .keys import parse_key
from .keys import PREFIX


logger = logging.getLogger(__name__)

COMPLETE = "complete"
UPLOADED = "uploaded "
UNFINISHED = ".tmp"
# Of some milliseconds each, when several processes begin at once
MARKER_ATTEMPTS = 200
CHUNK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64}) ([0-9]+) (\S+)")
_JOURNAL = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.journal")


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
        make_private(self._blobs)
        _sync_directory(os.path.dirname(self.directory))
        place = "\n".join(place) + "\n"
        # As long as it is locked, nobody makes it another bucket's.
        self._marker = self._claim(os.path.join(self.directory, "bucket"), place)

    def __repr__(self) -> str:
        return f"<Spool {self.directory}>"

    def _claim(self, path: str, place: str) -> BinaryIO:
        """Return the marker, open and locked.

        :raises ValueError: when it names another bucket, for which something is here or may come.
        """
        with ExitStack() as failed:
            marker = failed.enter_context(_open_marker(path))
            for attempt in range(MARKER_ATTEMPTS):
                fcntl.flock(marker, fcntl.LOCK_SH)
                found = _read(marker.fileno())
                if found == place:
                    failed.pop_all()
                    return marker
                try:
                    fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if found or attempt == MARKER_ATTEMPTS - 1:
                        break
                    # Another process begins, too: one of them must let go.
                    fcntl.flock(marker, fcntl.LOCK_UN)
                    time.sleep(random.uniform(0.001, 0.02))
                    continue
                found = _read(marker.fileno())
                if found not in ("", place) and self._names():
                    state = "holds blobs that are not uploaded yet"
                    raise _other_bucket(self.directory, found, place, state)
                os.ftruncate(marker.fileno(), 0)
                os.pwrite(marker.fileno(), place.encode(), 0)
                os.fsync(marker)
                _sync_directory(self.directory)
            raise _other_bucket(self.directory, found, place, "is in use")

    def close(self) -> None:
        """Let go of the directory; another bucket may have it when it is empty."""
        self._marker.close()

    def _path(self, key: str) -> str:
        return os.path.join(self._blobs, key.removeprefix(PREFIX).replace("/", "-"))

    def _names(self) -> list[str]:
        """Return the names of the journals, the oldest first."""
        return sorted(filter(_JOURNAL.fullmatch, os.listdir(self.directory)))

    def take(self, files: Sequence[tuple[str, str]]) -> SpooledTransaction:
        """Keep copies of files, by key; they are durable when this returns.

        :param files: keys that `keys.blob_key` made, and paths.
        :raises OSError: when they cannot be kept; nothing is left then.
        """
        entries = []
        for key, path in files:
            digest, size = _digest(path)
            entries.append(SpooledBlob(key, size, digest, self._path(key)))
        taken = SpooledTransaction(self.directory, entries)
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
        return SpooledSource(path, self._digest_of(key)) if os.path.exists(path) else None

    def _digest_of(self, key: str) -> str | None:
        """Return what the newest journal says of a blob, None where none does any more."""
        for name in reversed(self._names()):
            if digest := _digests(os.path.join(self.directory, name)).get(key):
                return digest
        return None

    def remove(self, key: str) -> None:
        """Remove a blob that is not wanted any more."""
        try:
            os.remove(self._path(key))
        except FileNotFoundError:
            pass  # uploaded just now

    def journals(self) -> Iterator[Journal]:
        """Yield what transactions have left that have ended, the oldest first.

        Each is this process's alone until the next one is asked for.
        """
        for name in self._names():
            path = os.path.join(self.directory, name)
            try:
                journal = Journal.open(path, self._path)
            except (OSError, ValueError):
                # Another user's, perhaps, or no file. The others need not wait for that.
                logger.exception("spool has a journal that cannot be read path=%s", path)
                continue
            if journal is not None:
                try:
                    yield journal
                finally:
                    journal.close()

    def usage(self) -> dict[str, float | None]:
        """Return a mapping with ``spool_blobs``, ``spool_bytes`` and ``spool_age_seconds``.

        All are None where the directory cannot be read.
        """
        try:
            return self._usage()
        except OSError:
            return dict.fromkeys(("spool_blobs", "spool_bytes", "spool_age_seconds"))

    def _usage(self) -> dict[str, float | None]:
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
            oldest = max(0.0, time.time() - int(names[0][:16], 16) / 1e9)
        return {"spool_blobs": count, "spool_bytes": size, "spool_age_seconds": oldest}


@implementer(IBlobSource)
class SpooledSource:
    """The bytes of one blob, which may be uploaded, and go, at any moment.

    :param str digest: SHA-256, in hexadecimal; None where it is not known.
    """

    def __init__(self, path: str, digest: str | None) -> None:
        self._path = path
        self._digest = digest

    def fetch(self, oid: bytes, tid: bytes, target_path: str) -> bool:
        """Copy the file; return False when it has gone.

        :raises IntegrityError: when it has other bytes than those that were put here.
        """
        # And no second name for it: to rename one name of a file to another does nothing, so that a
        # transaction that puts the same file would leave one behind.
        try:
            shutil.copyfile(self._path, target_path)
        except FileNotFoundError as error:
            if error.filename != self._path:
                raise
            return False
        if self._digest is not None and _digest(target_path)[0] != self._digest:
            os.remove(target_path)
            raise IntegrityError(f"{self._path} in the spool has other bytes than were put there")
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

    :param str directory: where the journal comes.
    :raises OSError: when it cannot be made.
    """

    def __init__(self, directory: str, entries: Sequence[SpooledBlob]) -> None:
        # Those whose files were put here, and not by an earlier transaction.
        self._put: list[str] = []
        # Paths, and where the files are now that were there before.
        self._aside: list[tuple[str, str]] = []
        self._file: int | None
        self._path, self._file = _new_journal(directory)
        try:
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
        if os.path.lexists(entry.path):
            # Restored by an earlier transaction: a key has the same bytes for ever.
            if not os.path.islink(entry.path) and entry.is_intact():
                _sync_file(entry.path)
                return
            # Damaged, or what comes now is: only the end of the transaction tells.
            aside = f"{entry.path}-{os.urandom(8).hex()}{UNFINISHED}"
            os.replace(entry.path, aside)
            self._aside.append((entry.path, aside))
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
        if os.path.lexists(temporary):
            os.remove(temporary)  # of a process that was killed
        with open(path, "rb") as source, open(temporary, "xb") as target:
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
        for _path, aside in self._aside:
            _remove(aside)
        file, self._file = self._file, None
        if file is not None:
            # A forked child has the descriptor, too, but it is the same lock.
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)

    def abort(self) -> None:
        """Remove the blobs; the transaction has not committed."""
        if self._file is None:
            return
        try:
            for path in self._put:
                _remove(path)
            while self._aside:
                path, aside = self._aside.pop()
                os.replace(aside, path)
            self._sync_removal()
            _remove(self._path)
        finally:
            self.end()

    def _sync_removal(self) -> None:
        # Or a power failure would leave files that no journal lists.
        try:
            if self._put:
                _sync_directory(os.path.dirname(self._put[0]))
        except OSError:
            pass  # the disk fails, and nothing was committed


class Journal:
    """What a transaction that has ended has left in the spool."""

    def __init__(
        self, path: str, file: int, entries: list[SpooledBlob], complete: bool, damaged: bool
    ) -> None:
        self.path = path
        self.entries = entries
        #: whether all of them were here when the transaction voted
        self.is_complete = complete
        #: keys of those that are in the bucket, or have been there
        self.uploaded: set[str] = set()
        #: whether it is complete and has lines that nobody can read
        self.is_damaged = damaged
        self._file = file

    @classmethod
    def open(cls, path: str, path_of: Callable[[str], str]) -> Journal | None:
        """Return the journal, None while another has it.

        :param path_of: returns the path of a blob by its key.
        """
        try:
            file = _open_journal(path)
        except FileNotFoundError:
            return None  # all uploaded just now
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.stat(path)
            text = _read(file)
        except (BlockingIOError, FileNotFoundError):
            os.close(file)
            return None  # its transaction runs, or another uploads it, or has done so
        except BaseException:
            # Whatever it was, nobody else closes it.
            os.close(file)
            raise
        lines = text.split("\n")[:-1]  # the last may be half a line
        uploaded = {line.removeprefix(UPLOADED) for line in lines if line.startswith(UPLOADED)}
        complete = COMPLETE in lines
        lines = [line for line in lines if line != COMPLETE and not line.startswith(UPLOADED)]
        entries = []
        for match in map(_LINE.fullmatch, lines):
            if match and parse_key(match[3]):
                digest, size, key = match.groups()
                entries.append(SpooledBlob(key, int(size), digest, path_of(key)))
        journal = cls(path, file, entries, complete, len(entries) < len(lines))
        journal.uploaded = uploaded
        return journal

    def note_uploaded(self, entry: SpooledBlob) -> None:
        """Remove a blob that is in the bucket; any thread may call this."""
        # First: what is gone later may have been packed away.
        os.write(self._file, f"{UPLOADED}{entry.key}\n".encode())
        try:
            os.remove(entry.path)
        except FileNotFoundError:
            pass  # by hand, or by a process that could not say so

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
        # A forked child has the descriptor, too, but it is the same lock.
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)


def _open_marker(path: str) -> BinaryIO:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        file = os.open(path, flags | os.O_RDONLY)  # what is there can be read at least
    return os.fdopen(file, "rb", buffering=0)


def _open_journal(path: str) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_RDWR | os.O_APPEND)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        return os.open(path, flags | os.O_RDONLY)  # what is there can be uploaded at least


def _new_journal(directory: str) -> tuple[str, int]:
    """Return the path and the descriptor of a new journal, which is locked."""
    while True:
        path = os.path.join(directory, f"{time.time_ns():016x}-{os.urandom(8).hex()}.journal")
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


def _read(file: int) -> str:
    data = b""
    while piece := os.pread(file, CHUNK, len(data)):
        data += piece
    return data.decode()


def _other_bucket(directory: str, found: str, place: str, state: str) -> ValueError:
    return ValueError(
        f"the spool {directory} {state} for {' '.join(found.split())}, not for"
        f" {' '.join(place.split())}: give each database a spool-dir of its own. If it is the same"
        " bucket under another name, let a process with the former configuration upload what is"
        f" there first, or remove the file {directory}/bucket while nobody uses it"
    )


def _digest(path: str) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
            size += len(piece)
    return digest.hexdigest(), size


def _digests(path: str) -> dict[str, str]:
    """Return the digests that a journal tells, by key."""
    try:
        with open(path, encoding="utf-8") as file:
            matches = map(_LINE.fullmatch, file.read().splitlines())
            return {match[3]: match[1] for match in matches if match}
    except (OSError, ValueError):
        return {}  # uploaded just now, or nobody can read it


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass  # half done


def _sync_file(path: str) -> None:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _sync_directory(path: str) -> None:
    _sync_file(path)
