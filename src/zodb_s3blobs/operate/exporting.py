"""Writes the files of a blob directory as ZODB does: whole or not at all, and durable."""

from collections.abc import Iterator
from contextlib import contextmanager
import os
import stat
from typing import Any

from ZODB.blob import FilesystemHelper
from ZODB.blob import LAYOUT_MARKER

from ..directories import make_private
from ..directories import sync
from ..directorylock import DirectoryLock
from ..interfaces import DISK_FULL
from ..interfaces import IntegrityError
from ..interfaces import MissingObjectError
from ..interfaces import S3OperationError
from ..keys import blob_key
from ..sources import BlobDirSource
from .configuration import UsageError
from .needs import Need
from .needs import Needs
from .running import Work
from .tally import Outcome
from .tally import Tally


UNFINISHED = ".export"
# Read by whom the directory is read by, as ZODB has it
READ = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH
# Revisions of which it is held in memory that they are missing
REMEMBERED = 10_000


class ExportDirectory:
    """A blob directory that is made, or gets more.

    :param str path: absolute.
    :raises ValueError: when something else is there.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        make_private(path)
        BlobDirSource(path)  # knows what is none
        self._files = FilesystemHelper(path)
        self._files.create()
        sync(os.path.join(path, LAYOUT_MARKER))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other exports away, and remove what one that was killed has left.

        :raises DirectoryBusy: when there is another one.
        """
        with DirectoryLock(self._files.temp_dir).held(patience=0):
            for name in os.listdir(self._files.temp_dir):
                if name.endswith(UNFINISHED):
                    os.remove(os.path.join(self._files.temp_dir, name))
            yield

    def has(self, need: Need) -> bool:
        """Tell whether the file of a revision is there."""
        return os.path.exists(self._files.getBlobFilename(need.oid, need.tid))

    @contextmanager
    def writing(self, need: Need) -> Iterator[str]:
        """Give a path where the bytes of a revision are to be written."""
        name = f"{need.oid.hex()}-{need.tid.hex()}{UNFINISHED}"
        temporary = os.path.join(self._files.temp_dir, name)
        try:
            yield temporary
            sync(temporary)
            directory = self._files.getPathForOID(need.oid, create=True)
            mode = os.stat(directory).st_mode & READ | stat.S_IRUSR
            os.chmod(temporary, mode)
            os.replace(temporary, self._files.getBlobFilename(need.oid, need.tid))
        except BaseException:
            # Whatever it was, half a file is of no use.
            if os.path.lexists(temporary):
                os.remove(temporary)
            raise

    def sync(self, needs: list[Need]) -> None:
        """Make the names of files durable, and those of the directories above them."""
        directories = set()
        for need in needs:
            directory = self._files.getPathForOID(need.oid).rstrip(os.sep)
            while len(directory) >= len(self.path) and directory not in directories:
                directories.add(directory)
                directory = os.path.dirname(directory)
        # Of a file that could not be written there is none.
        for directory in filter(os.path.isdir, directories):
            sync(directory)


class Export:
    """Copies what is needed from the bucket, and from wherever else a blob may be read."""

    def __init__(self, work: Work, services: Any, directory: ExportDirectory, tally: Tally) -> None:
        self._work = work
        self._client = services.client
        self._loader = services.loader
        self._directory = directory
        self._tally = tally
        #: revisions whose bytes are nowhere
        self.missing: list[Need] = []

    def copy(self, needs: Needs) -> bool:
        """Copy what is not in the directory yet; False when that was stopped."""
        self._tally.counts["revisions"] = needs.count()
        with self._work.progress("export", needs.count()) as bar:
            for batch in needs.revisions():
                new = [need for need in batch if not self._directory.has(need)]
                bar.update(len(batch) - len(new))
                done = 0
                try:
                    for _need in self._tally.of(self._work.each_as_done(new, self._copy)):
                        done += 1
                        bar.update(1)
                finally:
                    # An error of one comes before others are counted that are there, and that the
                    # next run does not write again.
                    self._directory.sync(new)
                if done < len(new):
                    return False
        return True

    def _copy(self, need: Need) -> Outcome:
        try:
            with self._directory.writing(need) as path:
                self._fetch(need, path)
                size = os.path.getsize(path)
        except MissingObjectError as error:
            if len(self.missing) == REMEMBERED:
                return Outcome("missing", 0, str(error))
            self.missing.append(need)
            return Outcome("")
        except OSError as error:
            if error.errno in DISK_FULL:
                raise UsageError(f"{error}; the next run goes on") from error
            raise
        return Outcome("copied", size)

    def _fetch(self, need: Need, path: str) -> None:
        """Write the bytes of a revision to a file, verified by their digest.

        :raises MissingObjectError: when they are nowhere.
        :raises S3OperationError: when that cannot be told.
        """
        # A database that has moved between bases keeps under the tid what its records refer to.
        for key in dict.fromkeys((need.key, blob_key(need.oid, need.tid))):
            try:
                return self._client.download_file(key, path)
            except S3OperationError as error:
                failure = error
                if not isinstance(error, MissingObjectError):
                    break
        # A revision has the same bytes wherever they are.
        for _word, source in self._loader.elsewhere(need.oid, need.tid, need.stamp):
            try:
                if source.fetch(need.oid, need.tid, path):
                    return
            except IntegrityError as error:
                failure = error  # another one may have them right
        raise failure
