"""Where the blobs of a database are before they are in its bucket: directory, tables, bucket.

An origin yields what it has in the order of the keys, which is that of a bucket's listing, so that
both are compared one beside the other and neither is held in memory.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextlib import contextmanager
import errno
import hashlib
import heapq
import os
import re
from typing import Any
from typing import NamedTuple
from typing import Protocol

from ZODB.blob import auto_layout_select
from ZODB.blob import BLOB_SUFFIX
from ZODB.blob import FilesystemHelper
from ZODB.blob import LAYOUT_MARKER
from ZODB.utils import oid_repr
from ZODB.utils import p64
from ZODB.utils import tid_repr
from ZODB.utils import u64

from ..interfaces import MissingObjectError
from ..interfaces import PermanentS3Error
from ..keys import blob_key
from ..keys import parse_key
from ..keys import PREFIX
from ..s3body import digest_of
from ..s3body import metadata_of
from ..sources import BlobDirSource
from ..staged import remove_quietly


# Hexadecimal digits of an oid, and bytes
DIGITS, BYTES = 16, 8
_BYTE = re.compile(r"0x[0-9a-f]{2}")
_NUMBER = re.compile(r"0x[0-9a-f]{1,16}")


class Found(NamedTuple):
    """A blob that an origin has."""

    key: str
    oid: bytes
    #: the revision's tid, or the stamp that its record carries
    name: bytes
    #: in bytes; None where to know it would take as long as to read it
    size: int | None = None


class Content(NamedTuple):
    """What tells bytes from others."""

    size: int
    #: SHA-256, in hexadecimal
    digest: str
    #: of a file: changes with its bytes
    version: tuple[int, int, int] | None = None


class Origin(Protocol):
    """A place with blobs. All its methods but ``blobs`` may be called by any thread.

    They may raise ``FileNotFoundError`` where a blob is not there any more; ``has`` tells.
    """

    #: what people call it
    name: str

    #: whether blobs can be removed from there
    can_remove: bool

    def blobs(self, after: str = "") -> Iterator[Found]:
        """Yield what is there, in the order of the keys, from behind a key on."""

    def has(self, found: Found) -> bool:
        """Tell whether a blob is there."""

    def file(self, found: Found) -> AbstractContextManager[str]:
        """Give the path of a file with a blob's bytes."""

    def content(self, found: Found) -> Content:
        """Tell what a blob's bytes are."""

    def remove(self, found: Found, content: Content) -> None:
        """Remove a blob, whose bytes are still those.

        :raises OSError: when they are others by now.
        """

    def close(self) -> None:
        """Release what was opened."""


def content_of_file(path: str) -> Content:
    """Return what tells the bytes of a file from others."""
    with open(path, "rb") as file:
        version = version_of(file.fileno())
        size, digest = digest_of(file)
    return Content(size, digest.hexdigest(), version)


def version_of(file: str | int) -> tuple[int, int, int]:
    """Return what changes with the bytes of a file, given by its path or descriptor."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns, status.st_ino


def content_of_object(client: Any, key: str, reads: bool = False) -> Content | None:
    """Return what tells the bytes of an object from others, None where there is none.

    Objects say it themselves, but for those of the older package and of servers that forget it:
    these are read.

    :param bool reads: read all, and believe none.
    """
    head = client.head_object(key)
    if head is None:
        return None
    metadata = metadata_of(head)
    size, digest = head["ContentLength"], metadata.get("zodb-sha256")
    if metadata.get("zodb-key", key) != key:
        digest = f"of another object, {metadata['zodb-key']}"
    elif not size and (digest is None or reads):
        digest = hashlib.sha256().hexdigest()
    elif digest is None or reads:
        try:
            with client.open_range(key) as section:
                size, found = digest_of(section)
        except MissingObjectError:
            return None
        if digest not in (None, found.hexdigest()):
            return Content(size, f"{found.hexdigest()}, and it says {digest},")
        digest = found.hexdigest()
    return Content(size, digest)


def in_key_order(
    objects: Callable[[int, int], Iterator[tuple[int, Iterable[Found]]]], after: str
) -> Iterator[Found]:
    """Yield the blobs of objects in the order of their keys.

    The oids in keys have no leading zeros: those of as many digits come in the order of numbers,
    and the sixteen kinds are merged.

    :param objects: yields those from an oid to below another one, in their order, and what each
        has, in any order.
    :param str after: a key, or nothing.
    """
    parsed = parse_key(after)
    begin = f"{u64(parsed[0]):x}" if parsed else ""

    def of_length(digits: int) -> Iterator[tuple[int, Iterable[Found]]]:
        lowest = 0 if digits == 1 else 16 ** (digits - 1)
        if begin:
            lowest = max(lowest, int(begin[:digits].ljust(digits, "0"), 16))
        return objects(lowest, 16**digits)

    kinds = map(of_length, range(1, DIGITS + 1))
    for _oid, blobs in heapq.merge(*kinds, key=lambda found: f"{found[0]:x}"):
        yield from sorted(found for found in blobs if found.key > after)


class BlobDirectory:
    """A blob directory of ZODB: of a FileStorage, a ZEO server, or RelStorages that share it.

    :raises ValueError: when there is none.
    """

    can_remove = True

    def __init__(self, path: str, layout: str = "automatic") -> None:
        BlobDirSource(path, layout)  # knows what is none
        self.name = os.path.abspath(path)
        if layout == "automatic":
            layout = auto_layout_select(path)
        self._files = FilesystemHelper(path, layout)
        marker = os.path.join(self.name, LAYOUT_MARKER)
        self.has_marker = os.path.exists(marker)
        self._landmark = marker if self.has_marker else self.name
        self._oids = self._bushy if layout == "bushy" else self._lawn

    def _objects(self, low: int, high: int) -> Iterator[tuple[int, Iterable[Found]]]:
        return ((oid, self._names(p64(oid))) for oid in self._oids(low, high))

    def blobs(self, after: str = "") -> Iterator[Found]:
        yield from in_key_order(self._objects, after)
        # An unmounted directory has no blobs; that does not mean there are none.
        os.stat(self._landmark)

    def _lawn(self, low: int, high: int) -> Iterator[int]:
        found = ((int(name, 16), name) for name in filter(_NUMBER.fullmatch, os.listdir(self.name)))
        return iter(
            sorted(oid for oid, name in found if low <= oid < high and name == oid_repr(p64(oid)))
        )

    def _bushy(self, low: int, high: int) -> Iterator[int]:
        return self._below(self.name, 0, BYTES, low, high)

    def _below(self, path: str, above: int, levels: int, low: int, high: int) -> Iterator[int]:
        """Yield the oids of a directory, one level for each byte."""
        size = 1 << 8 * (levels - 1)
        for name in sorted(filter(_BYTE.fullmatch, _listdir(path))):
            number = above << 8 | int(name, 16)
            if number * size >= high or (number + 1) * size <= low:
                continue
            if levels == 1:
                yield number
            else:
                yield from self._below(os.path.join(path, name), number, levels - 1, low, high)

    def _names(self, oid: bytes) -> Iterator[Found]:
        for name in _listdir(self._files.getPathForOID(oid)):
            tid = _tid(name)
            if tid is None:
                continue
            found = Found(blob_key(oid, tid), oid, tid)
            try:
                yield found._replace(size=os.path.getsize(self.path(found)))
            except FileNotFoundError:
                # Packed meanwhile, or a link to nowhere, which somebody should look at.
                if self.has(found):
                    yield found

    def path(self, found: Found) -> str:
        """Return the path of a blob."""
        path: str = self._files.getBlobFilename(found.oid, found.name)
        return path

    def has(self, found: Found) -> bool:
        return os.path.lexists(self.path(found))

    @contextmanager
    def file(self, found: Found) -> Iterator[str]:
        yield self.path(found)

    def content(self, found: Found) -> Content:
        return content_of_file(self.path(found))

    def remove(self, found: Found, content: Content) -> None:
        path = self.path(found)
        if version_of(path) != content.version:
            raise OSError(errno.ESTALE, "it has changed since it was compared", path)
        # Directories stay: what looks like none would not be opened as a source any more.
        os.remove(path)

    def close(self) -> None:
        """Nothing is kept open."""


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []  # packed meanwhile, or no directory of a blob


def _tid(name: str) -> bytes | None:
    """Return the tid of a file of a blob directory, None of another one."""
    text = name.removesuffix(BLOB_SUFFIX)
    if not _NUMBER.fullmatch(text):
        return None
    tid = p64(int(text, 16))
    return tid if f"{tid_repr(tid)}{BLOB_SUFFIX}" == name else None


class Bucket:
    """Another bucket, or what was stored in a directory while that was only read.

    :param client: an `IS3Client`.
    :param str name: what people call it.
    :param temporary_file: returns a new path.
    """

    def __init__(
        self, client: Any, name: str, temporary_file: Callable[[], str], can_remove: bool = False
    ) -> None:
        self._client = client
        self.name = name
        self._temporary_file = temporary_file
        self.can_remove = can_remove

    def blobs(self, after: str = "") -> Iterator[Found]:
        for listed in listing(self._client, after):
            parsed = parse_key(listed.key)
            if parsed is not None:
                yield Found(listed.key, *parsed, listed.size)

    def has(self, found: Found) -> bool:
        return self._client.head_object(found.key) is not None

    @contextmanager
    def file(self, found: Found) -> Iterator[str]:
        path = self._temporary_file()
        try:
            try:
                self._client.download_file(found.key, path)
            except MissingObjectError as error:
                raise FileNotFoundError(str(error)) from error
            yield path
        finally:
            remove_quietly(path)

    def content(self, found: Found) -> Content:
        content = content_of_object(self._client, found.key)
        if content is None:
            raise FileNotFoundError(found.key)
        return content

    def remove(self, found: Found, content: Content) -> None:
        self._client.delete_object(found.key)

    def close(self) -> None:
        self._client.close()


def listing(client: Any, after: str = "") -> Iterator[Any]:
    """Yield what a bucket has, from behind a key on.

    :raises PermanentS3Error: when it is not sorted, so that nothing can be compared with it.
    """
    last = after
    for page in client.list_pages(PREFIX, after):
        for listed in page:
            if listed.key <= last:
                raise PermanentS3Error(
                    f"S3 lists {listed.key!r} behind {last!r}: the server does not sort its keys,"
                    " or does not know StartAfter"
                )
            last = listed.key
            yield listed


def compared(found: Iterable[Found], client: Any, after: str = "") -> Iterator[tuple[Found, Any]]:
    """Yield blobs, in the order of their keys, with what a bucket lists of them, or None."""
    objects = listing(client, after)
    listed = next(objects, None)
    for each in found:
        while listed is not None and listed.key < each.key:
            listed = next(objects, None)
        yield each, listed if listed is not None and listed.key == each.key else None
