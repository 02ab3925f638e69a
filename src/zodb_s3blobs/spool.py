"""Blobs that could not be uploaded yet, durable on a local disk until they are in the bucket.

::

    spool-dir/
        bucket, blobs/bucket                    for which bucket all this is
        {time}-{random}.journal                 the blobs of one transaction
        blobs/{oid}-{name}-{time}-{random}.blob bytes of one of them

A journal is written before its files and completed after them; then the transaction may vote. Its
process has it locked until the transaction has ended, or the process has. From then on anybody
uploads what a complete one lists: for a transaction that has not committed that leaves garbage in
the bucket, which a sweep deletes, and the other way round a blob would be lost.

Of two that bring the same blob the later one is read, and is uploaded last, as with S3.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import ExitStack
import fcntl
import logging
import os
import random
import re
import shutil
import time
from typing import BinaryIO

from zope.interface import implementer

from .directories import make_private
from .directories import private
from .directories import sync
from .interfaces import IBlobSource
from .interfaces import IntegrityError
from .journals import digest_in
from .journals import file_digest
from .journals import Journal
from .journals import read_text
from .journals import SpooledTransaction
from .journals import SUFFIX
from .keys import PREFIX


logger = logging.getLogger(__name__)

# Of some milliseconds each, when several processes begin at once
MARKER_ATTEMPTS = 200
_JOURNAL = re.compile(r"([0-9a-f]{16})-[0-9a-f]{16}\.journal")


class Spool:
    """A directory that the processes of a host may share, as one user.

    :param str directory: on a local disk; made when missing, private to the user.
    :param place: words that name the bucket, such as endpoint, bucket and prefix.
    :param bool takes_commits: whether commits may go here. If not, what is here is still read, and
        uploaded.
    :param bool is_uploaded: whether this process uploads anything; if not, what is here is read.
    :raises ValueError: when it holds blobs for another bucket.
    """

    def __init__(
        self,
        directory: str,
        place: Sequence[str],
        takes_commits: bool = True,
        is_uploaded: bool = True,
    ) -> None:
        self.directory = os.path.abspath(directory)
        self.is_uploaded = is_uploaded
        self.takes_commits = takes_commits
        self._blobs = os.path.join(self.directory, "blobs")
        # Journals of which the log tells already
        self._told: set[str] = set()
        make_private(self._blobs)
        sync(os.path.dirname(self.directory))
        place = "\n".join(place) + "\n"
        # As long as it is locked, nobody makes it another bucket's.
        self._marker = self._claim(os.path.join(self.directory, "bucket"), place)
        self._landmark = os.path.join(self._blobs, "bucket")
        if not (os.path.exists(self._landmark) or self._names()):
            with open(self._landmark, "w", opener=private):
                pass
            sync(self._blobs)

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
                found = read_text(marker.fileno())
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
                found = read_text(marker.fileno())
                if found not in ("", place) and self._names():
                    state = "holds blobs that are not uploaded yet"
                    raise _other_bucket(self.directory, found, place, state)
                os.ftruncate(marker.fileno(), 0)
                os.pwrite(marker.fileno(), place.encode(), 0)
                os.fsync(marker)
                sync(self.directory)
            raise _other_bucket(self.directory, found, place, "is in use")

    def close(self) -> None:
        """Let go of the directory; another bucket may have it when it is empty."""
        self._marker.close()

    def _path(self, key: str, journal: str) -> str:
        name = os.path.basename(journal).removesuffix(SUFFIX)
        return os.path.join(self._blobs, f"{_stem(key)}-{name}.blob")

    def _names(self) -> list[str]:
        """Return the names of the journals, the oldest first."""
        return sorted(filter(_JOURNAL.fullmatch, os.listdir(self.directory)))

    def take(self, files: Sequence[tuple[str, str]]) -> SpooledTransaction:
        """Keep copies of files, by key; they are durable when this returns.

        :param files: keys that `keys.blob_key` made, and paths.
        :raises OSError: when they cannot be kept; nothing is left then.
        """
        self._check_place()
        taken = SpooledTransaction(self.directory, self._path)
        try:
            taken.keep(files)
        except BaseException:
            # Whatever it was, the transaction cannot vote.
            taken.abort()
            raise
        return taken

    def _check_place(self) -> None:
        """Refuse a directory of files that is not the one: an empty one is no loss of all files.

        :raises OSError: when it is missing, or not mounted.
        """
        os.stat(self._landmark)

    def find(self, key: str) -> list[SpooledSource]:
        """Return the bytes of a blob as sources, the newest first; none when it is not here."""
        prefix, found = f"{_stem(key)}-", []
        try:
            names = [name for name in os.listdir(self._blobs) if name.startswith(prefix)]
        except OSError:
            return []  # a disk that is not mounted: what is in the bucket can be read
        for name in sorted(names, reverse=True):
            journal = name.removeprefix(prefix).removesuffix(".blob") + SUFFIX
            if _JOURNAL.fullmatch(journal):
                journal = os.path.join(self.directory, journal)
                found.append(SpooledSource(key, os.path.join(self._blobs, name), journal))
        return found

    def journals(self) -> Iterator[Journal]:
        """Yield what transactions have left that have ended, the oldest first.

        Each is this process's alone until the next one is asked for.

        :raises OSError: when the files that they list are not there, all of them.
        """
        self._check_place()
        for name in self._names():
            path = os.path.join(self.directory, name)
            try:
                journal = Journal.open(path, self._path)
            except (OSError, ValueError):
                # Another user's, perhaps, or no file. The others need not wait for that.
                if path not in self._told:
                    self._told.add(path)
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
                if entry.name.endswith(".blob"):
                    count += 1
                    size += status.st_size
        if names := self._names():
            oldest = max(0.0, time.time() - int(names[0][:16], 16) / 1e9)
        return {"spool_blobs": count, "spool_bytes": size, "spool_age_seconds": oldest}


@implementer(IBlobSource)
class SpooledSource:
    """The bytes of one blob, which may be uploaded, and go, at any moment."""

    def __init__(self, key: str, path: str, journal: str) -> None:
        self._key = key
        self._path = path
        self._journal = journal

    def fetch(self, oid: bytes, tid: bytes, target_path: str) -> bool:
        """Copy the file; return False when it has gone.

        :raises IntegrityError: when it has other bytes than those that were put here.
        """
        # Before the file, which is there as long as its journal is.
        digest = digest_in(self._journal, self._key)
        # And no second name for it: a cached file that is changed by hand would change this one.
        try:
            shutil.copyfile(self._path, target_path)
        except FileNotFoundError as error:
            if error.filename != self._path:
                raise
            return False
        try:
            self._compare(target_path, digest)
        except IntegrityError:
            os.remove(target_path)
            raise
        return True

    def verify(self) -> None:
        """Compare the file with what was put here.

        :raises IntegrityError: when it has other bytes.
        :raises FileNotFoundError: when it has gone.
        """
        self._compare(self._path, digest_in(self._journal, self._key))

    def _compare(self, path: str, digest: str | None) -> None:
        if digest is not None and file_digest(path)[0] != digest:
            raise IntegrityError(f"{self._path} in the spool has other bytes than were put there")

    def size(self, oid: bytes, tid: bytes) -> int | None:
        """Return the bytes of the file, None when it has gone."""
        try:
            return os.path.getsize(self._path)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Nothing is kept open."""


def _open_marker(path: str) -> BinaryIO:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        file = os.open(path, flags | os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        file = os.open(path, flags | os.O_RDONLY)  # what is there can be read at least
    return os.fdopen(file, "rb", buffering=0)


def _other_bucket(directory: str, found: str, place: str, state: str) -> ValueError:
    return ValueError(
        f"the spool {directory} {state} for {' '.join(found.split())}, not for"
        f" {' '.join(place.split())}: give each database a spool-dir of its own. If it is the same"
        " bucket under another name, let a process with the former configuration upload what is"
        f" there first, or remove the file {directory}/bucket while nobody uses it"
    )


def _stem(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".blob").replace("/", "-")
