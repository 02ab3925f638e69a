"""What each part promises, and the errors that belong to the promises.

oid, tid and serial are bytes of length 8 everywhere but in keys and logs.
Sizes are in bytes, times in seconds.
"""

from contextlib import nullcontext
import errno
from typing import NamedTuple

from transaction.interfaces import TransientError
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import ReadOnlyError
from ZODB.POSException import StorageError
from zope.interface import Attribute
from zope.interface import Interface


# How often eviction may win against whoever opens a path of the cache: it happens between two
# lines of code, so that once is rare already.
EVICTION_ATTEMPTS = 10


# Files that a cache can put at a time. A statement of its index names them all, with four values
# each, and old SQLites take 999.
FILES_AT_ONCE = 200

# What the system says of a full disk
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ListedObject(NamedTuple):
    """One entry of a listing; both times are the server's, in seconds since the epoch."""

    key: str
    size: int
    modified: float
    #: when the server made the listing
    listed: float

    @property
    def age(self) -> float:
        """Seconds; never negative, though one of the times may have been rounded."""
        return max(0.0, self.listed - self.modified)


class UnfinishedUpload(NamedTuple):
    """A multipart upload that has neither ended nor been aborted."""

    key: str
    id: str
    #: seconds since it was begun, by the server's clock
    age: float


class S3OperationError(StorageError):
    """An S3 operation failed; the subclass says what the caller may do.

    Attributes name what was attempted: ``operation`` (str), ``key`` (the key
    without the prefix, or None), ``oid`` and ``tid`` (bytes or None).
    """

    operation: str | None = None
    key: str | None = None
    oid: bytes | None = None
    tid: bytes | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        #: the message; a ZEO server sends its clients an error's attributes, where it has some
        self.text = str(self)


class TransientS3Error(S3OperationError, TransientError):
    """S3 cannot be reached or is busy: retrying the transaction may succeed."""


class NotUploadedError(TransientS3Error):
    """The blob was committed while S3 was down, and is still in the spool of another host."""


class PermanentS3Error(S3OperationError):
    """Configuration or permission: an operator must act before a retry helps."""


class IntegrityError(S3OperationError):
    """The bytes that arrived are not the bytes that were stored."""


class MissingObjectError(S3OperationError):
    """The bucket answered, and it has no object under this key."""


class OtherDatabaseError(PermanentS3Error):
    """The bucket is another database's, or holds objects of one under the same prefix."""


class ReadOnlyBucketError(PermanentS3Error, ReadOnlyError):
    """The configuration says that the bucket is only read."""


class IS3Client(Interface):
    """Moves files to and from one bucket.

    All methods may be called by any thread, and after a fork. Keys are logical:
    without the prefix. None of them is called before the first S3 traffic is
    due, and constructing a client makes no network call. All methods raise an
    ``S3OperationError``; errors of local files stay ``OSError``.
    """

    counters = Attribute("A ``stats.ClientCounters``.")
    is_read_only = Attribute("Whether nothing can be written or deleted.")
    signs_urls = Attribute("Whether ``presigned_url`` returns one.")
    is_down = Attribute("Whether S3 is known not to answer, so that requests fail at once.")

    def upload_file(local_path, s3_key, cancelled=None):
        """Store a file's bytes under a key, with size and SHA-256 as metadata.

        The object appears whole or not at all. Uploading again replaces it.

        :param Cancellation cancelled: ends the upload early when another thread says so.
        """

    def download_file(s3_key, local_path):
        """Write an object's bytes to a new file, verified by length and digest.

        :raises MissingObjectError: when the bucket has no such object.
        :raises IntegrityError: when the bytes differ from those uploaded; the
            file is then not to be used.
        """

    def verify_file(s3_key, local_path):
        """Compare a file with what is known of an object, without a download.

        :raises MissingObjectError: when the bucket has no such object.
        :raises IntegrityError: when the file has other bytes.
        """

    def open_range(s3_key, start=0, stop=None, waiting=nullcontext):
        """Open the bytes of an object from start to below stop, or to its end.

        :param waiting: returns a context manager, entered while a reader waits for S3.
        :returns: a raw file that can be read and moved in; it makes requests when it is read.
        :raises ValueError: when there is no byte between them.
        :raises MissingObjectError: when the bucket has no such object.
        """

    def object_size(s3_key):
        """Return the size of an object in bytes.

        :raises MissingObjectError: when the bucket has no such object.
        """

    def presigned_url(s3_key, expires_in=60, content_type=None, content_disposition=None):
        """Return a URL by which anybody can GET an object for some seconds.

        Makes no request, but while S3 is known to be down.

        :returns: None where objects cannot be read that way.
        :raises TransientS3Error: while S3 is known to be down.
        """

    def check_owner(marks=False):
        """Ask whether garbage may be deleted here.

        :param bool marks: whether a bucket that is nobody's becomes this database's.
        :raises OtherDatabaseError: when the bucket is another database's by now.
        :raises ReadOnlyBucketError: when it is only read.
        """

    def copy_object(source_key, target_key):
        """Copy an object inside the bucket, of any size.

        :raises MissingObjectError: when there is no object to copy.
        """

    def delete_object(s3_key):
        """Delete an object; deleting an absent one succeeds."""

    def delete_objects(s3_keys):
        """Delete many objects with as few requests as the server allows.

        :returns: a dict of key to error code for the keys that were refused.
        """

    def head_object(s3_key):
        """Return a mapping with at least ContentLength, None when absent."""

    def list_objects(prefix):
        """Iterate lazily over the keys that begin with a prefix, sorted."""

    def list_pages(prefix, after=""):
        """Iterate lazily over lists of 1 to 1000 ``ListedObject``, sorted by key.

        :param str after: begin behind this key.
        """

    def close():
        """Release connections; a later call opens them again."""


class IS3BlobCache(Interface):
    """Committed blob files on local disk, up to a byte budget.

    Threads and processes of a host share one directory. The sum of the sizes
    of the files stays at or below ``max_size`` at every moment. Any file may vanish
    at any time (open files stay readable), so whoever opens a path must be ready to
    ask again. What cannot be cached, now or at all, is kept beside for a while: then
    its path is another.
    """

    max_size = Attribute("Byte budget of committed files.")
    temp_dir = Attribute("A directory on the same file system, for uncommitted files.")
    counters = Attribute("A ``stats.CacheCounters``.")

    def path(oid, tid):
        """Return where the file of this revision is, or would be."""

    def get(oid, tid):
        """Return the path of a cached file and mark it as used, else None."""

    def size(oid, tid):
        """Return the bytes of a cached file, which do not count as used by that, else None."""

    def known_size(oid, tid):
        """Return the bytes that a file had when it came into the cache, None if that is unknown."""

    def reserve(entries):
        """Make room for files that are about to be put, evicting others.

        :param entries: a sequence of ``(oid, name, size)``; the name is the
            tid, or any 8 bytes that nobody else uses while the tid is not known.
        """

    def release(entries):
        """Give back the room of files, a sequence of ``(oid, name)``, that will not be put."""

    def put(oid, tid, source_path):
        """Move a complete file into the cache, or keep it beside.

        :returns: the file's new path.
        :raises FileNotFoundError: when there is no such file.
        """

    def put_all(entries):
        """Move complete files into the cache with as little of its lock as one takes.

        :param entries: ``(oid, tid, source_path)``, each revision once, up to ``FILES_AT_ONCE``.
        :returns: their paths; None for a file that was left where it is: try ``put``.
        """

    def begin_filling(oid, tid):
        """Begin to fill a file unless another process of this host does so.

        :returns: None in that case; else a tuple ``(path, end)``: where the file is to be written,
            and what is called after it was put, or in its place, by any thread.
        """

    def fill(oid, tid, fetch):
        """Return the path of a file, fetched if it is not cached; one process at a time does so.

        :param fetch: called with a path where nothing is, writes the file there.
        :raises OSError: when it can be written nowhere.
        """

    def put_many(entries):
        """Move in files whose room is reserved; those that lost it are deleted instead.

        :param entries: a sequence of ``(oid, tid, source_path, name)``.
        """

    def discard(oid, tid):
        """Forget a file whose revision is garbage."""

    def shed(byte_count):
        """Evict although the budget allows more, as the disk is full.

        :returns: whether any file went.
        """

    def temporary_file():
        """Return a path nobody else uses, from which a rename into the cache is atomic."""

    def filling(oid, tid):
        """Context manager: one process of this host at a time fills this file."""

    def notify_loaded(byte_count):
        """Bring the cache back below its budget after files came in by another way."""

    def current_size():
        """Return the sum of the sizes of committed files, in bytes."""

    def usage():
        """Return a mapping with ``cache_bytes``, ``cache_max_bytes`` and ``cache_age_seconds``.

        The age is the time since the last known use of the file that is evicted next. What cannot
        be told is None.
        """

    def wait_for_cleanup():
        """Return when no eviction is pending."""

    def check(fix=False):
        """Compare the index with the files.

        :returns: a list of findings, each one sentence; empty when all is well.
        """

    def close():
        """Close the index; a later call opens it again."""


class IBlobSource(Interface):
    """A further, read-only place that blobs may be read from.

    One that knows blobs by their keys has ``find(key)`` in the place of ``fetch`` and ``size``: it
    returns sources of this one blob, the best first.
    """

    def fetch(oid, tid, target_path):
        """Write the blob's bytes to target_path, or return False when it has none.

        :raises OSError: when the source cannot tell.
        """

    def size(oid, tid):
        """Return the blob's bytes, or None when it has none.

        :raises OSError: when the source cannot tell.
        """

    def close():
        """Release what was opened."""


class IS3BlobStorage(IBlobStorage):
    """A storage whose records live in a base storage and whose blobs live in S3.

    ``loadBlob`` and ``openCommittedBlobFile`` bring a blob into the cache; the other methods that
    read do not. Where a blob is nowhere all raise ``POSKeyError``, and ``S3OperationError`` where
    that cannot be told. A serial is that of a revision which the caller can load. Where this is an
    IMVCCStorage, one instance belongs to one thread.
    """

    def blob_is_cached(oid, serial):
        """Tell whether the bytes of a blob are on this host; does not count as a read."""

    def verify_blob(oid, serial):
        """Compare the cached file of a blob with what was stored, by length and digest.

        What differs is fetched again and replaced; what is not cached is fetched, and so verified.

        :returns: False when a cached file had to be replaced.
        """

    def blob_size(oid, serial):
        """Return the size of a blob in bytes, with a HEAD request if need be, once."""

    def open_blob_range(oid, serial, start=0, stop=None):
        """Open the bytes of a blob from start to below stop, or to its end, for reading.

        :returns: a buffered binary file, whose positions begin with 0 at start.
        :raises ValueError: when start or stop is negative.
        """

    def prefetch_blobs(revisions):
        """Bring blobs into the cache, many at a time, and return when that is done.

        :param revisions: an iterable of ``(oid, serial)``.
        :returns: a ``PrefetchReport``.
        """

    def presigned_url(
        oid, serial, expires_in=60, content_type=None, filename=None, disposition="inline"
    ):
        """Return a URL by which a browser can GET a blob from S3 itself.

        Whoever has it can, without a login, for ``expires_in`` seconds (1 to 604,800); with the
        credentials of a role no longer than those are valid.

        :param str content_type: of the answer, such as ``image/png``.
        :param str filename: the browser's name for the file, any text.
        :param str disposition: "inline" or "attachment".
        :returns: None where S3 cannot deliver it: under SSE-C, while its transaction runs, and
            while only a source has it.
        :raises ValueError: for a value that cannot be right.
        """

    def stats():
        """Return the numbers of this process by name, a dict; ``stats.MEANINGS`` explains them.

        Those of the cache are None where they cannot be told at the moment.
        """

    def drain_spool():
        """Upload what was committed while S3 was down.

        Not what transactions have there that still run, or what another process is uploading.

        :returns: a ``DrainReport``.
        :raises S3OperationError: when S3 does not take it; what is left stays in the spool.
        """

    def sweep(dry_run=False, course=None):
        """Delete the objects that no surviving revision needs.

        :param course: a ``garbage.Course``: where it begins and ends, and what may go.
        :returns: a ``SweepReport``.
        :raises OtherDatabaseError: when the bucket is not this database's alone.
        """

    def rewrite_by_tid(is_stopped=lambda: False):
        """Give every blob the key of its tid and take the references out of the records.

        :param is_stopped: asked now and then whether the rest is left to a later call.
        :returns: a ``RewriteReport``.
        """
