"""What is known about one blob of a transaction, and what all of them share."""

from collections.abc import Callable
import logging
import os
import time
from typing import Any

from ZODB.blob import rename_or_copy_blob

from .interfaces import DISK_FULL
from .keys import blob_key
from .keys import TID_SIZE
from .openkeys import OpenKeys
from .stats import ReadCounters
from .uploads import Upload
from .uploads import UploadPool


logger = logging.getLogger(__name__)

# Stores a blob's record with this stamp in the base
StoreRecord = Callable[[bytes], Any]


def clocks() -> tuple[float, float]:
    """Return two times in seconds.

    The first stands still while the machine sleeps, the second jumps when it is set.
    """
    return time.monotonic(), time.time()


class StagedBlob:
    """One blob of a transaction.

    :param bytes tid: None where only the end of the transaction tells it.
    :param bytes name: of its key: the tid or a stamp.
    :param str path: None where S3 copies it.
    """

    def __init__(
        self, oid: bytes, tid: bytes | None, name: bytes, path: str | None, is_ours: bool
    ) -> None:
        self.oid = oid
        self.tid = tid
        self.name = name
        self.path = path
        self.is_new = False
        #: whether the object may be deleted on abort
        self.is_ours = is_ours
        #: where the record carries the stamp
        self.store: StoreRecord | None = None
        #: whether the vote has still to do that
        self.is_to_store = False
        #: of what S3 copies: the tid, and what that revision's record refers to
        self.source: tuple[bytes, bytes | None] | None = None
        self.since = (0.0, 0.0)
        self.upload: Upload | None = None
        #: whether it is in the spool, and no upload is wanted in this transaction
        self.is_spooled = False

    @property
    def key(self) -> str:
        return blob_key(self.oid, self.name)

    @property
    def reservation(self) -> bytes:
        """What stands for the tid in the cache until that is known."""
        return self.tid or self.name[TID_SIZE:]


class BlobServices:
    """What transactions share: how files are staged, how they are uploaded, who may delete.

    :param temporary_file: returns a path for a staged file, which nobody else uses.
    :param float grace: seconds that an object without a reference is left alone by sweeps.
    :param ReadCounters counters: told how long S3 was waited for.
    :param uploader: the `SpoolUploader` of the spool, if there is one.
    """

    def __init__(
        self,
        client: Any,
        cache: Any,
        loader: Any,
        pool: UploadPool,
        open_keys: OpenKeys,
        temporary_file: Callable[[], str],
        grace: float,
        clocks: Callable[[], tuple[float, float]] = clocks,
        counters: ReadCounters | None = None,
        uploader: Any = None,
    ) -> None:
        self.client = client
        self.cache = cache
        self.loader = loader
        self.pool = pool
        self.open_keys = open_keys
        self.temporary_file = temporary_file
        self.grace = grace
        self.counters = counters or ReadCounters()
        self.clocks = clocks
        self.uploader = uploader

    @property
    def spool(self) -> Any:
        """A `Spool` that takes what S3 does not; None where commits fail then."""
        return self.uploader and self.uploader.spool_of_commits

    def take_over(self, blobfilename: str) -> str:
        """Move a file to a name that no other transaction shares, and return that.

        :raises OSError: when it can be neither renamed nor copied.
        """
        path = self.temporary_file()
        try:
            self._move(blobfilename, path)
        except BaseException:
            remove_quietly(path)  # half of a copy, of which nobody else knows
            raise
        return path

    def _move(self, source: str, path: str) -> None:
        try:
            rename_or_copy_blob(source, path, chmod=False)
        except OSError as error:
            # A copy does not fit: what is cached is worth less than what is committed.
            size = os.path.getsize(source)
            if error.errno not in DISK_FULL or not self.cache.shed(size):
                raise
            remove_quietly(path)
            rename_or_copy_blob(source, path, chmod=False)


def new_path(directory: str) -> str:
    """Return a path in a directory that no other transaction shares."""
    return os.path.join(directory, f"staged-{os.urandom(16).hex()}.tmp")


def remove_quietly(path: str | None) -> None:
    """Remove a file on which the outcome of its transaction does not depend; never raises."""
    try:
        if path is not None:
            os.remove(path)
    except FileNotFoundError:
        pass
    except OSError:
        logger.exception("staged file stays path=%s", path)
