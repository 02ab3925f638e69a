"""A directory in the place of a bucket, alone or before a bucket that is only read."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import nullcontext
import os
import shutil
import time
from typing import Any

from zope.interface import implementer

from .cancellation import Cancellation
from .directories import make_private
from .directories import sync
from .interfaces import IntegrityError
from .interfaces import IS3Client
from .interfaces import ListedObject
from .interfaces import MissingObjectError
from .sections import FileSection
from .stats import ClientCounters


UNFINISHED = ".tmp"
PAGE = 1000
CHUNK = 1 << 20


@implementer(IS3Client)
class LocalBucket:
    """Objects as files: ``{directory}/{key}``.

    :param str directory: made with the first write, private to the user.
    """

    is_read_only = False
    signs_urls = False
    is_down = False

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)
        self.counters = ClientCounters()

    def __repr__(self) -> str:
        return f"<LocalBucket {self.directory}>"

    def _path(self, key: str) -> str:
        path = os.path.normpath(os.path.join(self.directory, key))
        if not path.startswith(self.directory + os.sep) or key.endswith(UNFINISHED):
            raise ValueError(f"{key!r} is no key")
        return path

    def upload_file(
        self, local_path: str, s3_key: str, cancelled: Cancellation | None = None
    ) -> None:
        """Store a file's bytes under a key; they are durable when this returns."""
        path = self._path(s3_key)
        directory = os.path.dirname(path)
        make_private(directory)
        temporary = f"{path}-{os.urandom(8).hex()}{UNFINISHED}"
        try:
            shutil.copyfile(local_path, temporary)
            os.chmod(temporary, 0o400)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            # Whatever it was, nobody else knows of the file.
            if os.path.lexists(temporary):
                os.remove(temporary)
            raise
        while len(directory) >= len(self.directory):
            sync(directory)
            directory = os.path.dirname(directory)

    def download_file(self, s3_key: str, local_path: str) -> None:
        """Copy an object's bytes to a file."""
        with self._open("download", s3_key) as source, open(local_path, "wb") as target:
            shutil.copyfileobj(source, target, CHUNK)

    def _open(self, operation: str, s3_key: str) -> Any:
        try:
            return open(self._path(s3_key), "rb", buffering=0)
        except FileNotFoundError:
            error = MissingObjectError(f"{operation} of {s3_key!r}: {self.directory} has it not")
            error.operation, error.key = operation, s3_key
            raise error from None

    def verify_file(self, s3_key: str, local_path: str) -> None:
        """Compare a file with an object, byte for byte."""
        with self._open("verify", s3_key) as one, open(local_path, "rb", buffering=0) as other:
            piece = b"begin"
            while piece:
                piece = one.read(CHUNK)
                if piece != other.read(CHUNK):
                    raise IntegrityError(f"{local_path} has other bytes than {s3_key!r}")

    def open_range(
        self,
        s3_key: str,
        start: int = 0,
        stop: int | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> FileSection:
        """Open the bytes of an object from start to below stop."""
        if stop is not None and stop <= start:
            raise ValueError(f"a range has a byte at least, not {start} to {stop}")
        return FileSection(self._open("read", s3_key), start, stop)

    def object_size(self, s3_key: str) -> int:
        """Return the size of an object in bytes."""
        with self._open("head", s3_key) as file:
            return os.fstat(file.fileno()).st_size

    def head_object(self, s3_key: str) -> Mapping[str, Any] | None:
        """Return a mapping with ContentLength, None when absent."""
        try:
            return {"ContentLength": self.object_size(s3_key)}
        except MissingObjectError:
            return None

    def presigned_url(self, s3_key: str, *args: Any, **kw: Any) -> str | None:
        """Return None: nobody else can read it."""
        return None

    def check_owner(self, marks: bool = False) -> None:
        """Nobody else has the directory."""

    def copy_object(self, source_key: str, target_key: str) -> None:
        """Copy an object."""
        with self._open("copy", source_key) as source:
            self.upload_file(source.name, target_key)

    def delete_object(self, s3_key: str) -> None:
        """Delete an object; deleting an absent one succeeds."""
        try:
            os.remove(self._path(s3_key))
        except FileNotFoundError:
            pass

    def delete_objects(self, s3_keys: Iterable[str]) -> dict[str, str]:
        """Delete objects."""
        for key in s3_keys:
            self.delete_object(key)
        return {}

    def list_objects(self, prefix: str) -> Iterator[str]:
        """Iterate over the keys that begin with a prefix, sorted."""
        for page in self.list_pages(prefix):
            for listed in page:
                yield listed.key

    def list_pages(self, prefix: str, after: str = "") -> Iterator[list[ListedObject]]:
        """Iterate over lists of 1 to 1000 objects, sorted by key, from behind a key on."""
        paths = (
            os.path.join(directory, name)
            for directory, _directories, names in os.walk(self.directory)
            for name in names
            if not name.endswith(UNFINISHED)
        )
        keys = (os.path.relpath(path, self.directory).replace(os.sep, "/") for path in paths)
        found = sorted(key for key in keys if key.startswith(prefix) and key > after)
        for begin in range(0, len(found), PAGE):
            page = [*filter(None, map(self._listed, found[begin : begin + PAGE]))]
            if page:
                yield page

    def _listed(self, key: str) -> ListedObject | None:
        try:
            status = os.stat(self._path(key))
        except FileNotFoundError:
            return None  # deleted meanwhile
        return ListedObject(key, status.st_size, status.st_mtime, time.time())

    def close(self) -> None:
        """Nothing is kept open."""


@implementer(IS3Client)
class Overlay:
    """Reads a bucket, and has all that is written in a directory of its own.

    What is listed, and so what a sweep deletes, is what was written here.

    :param LocalBucket local: asked first.
    :param remote: an `IS3Client` that is only read.
    """

    is_read_only = False

    def __init__(self, local: LocalBucket, remote: Any) -> None:
        self._local = local
        self._remote = remote
        #: what is read, and not listed here
        self.behind = (remote,)
        self.counters = remote.counters
        self.upload_file = local.upload_file
        self.delete_object = local.delete_object
        self.delete_objects = local.delete_objects
        self.list_objects = local.list_objects
        self.list_pages = local.list_pages
        self.check_owner = local.check_owner

    def __repr__(self) -> str:
        return f"<Overlay {self._local!r} before {self._remote!r}>"

    @property
    def signs_urls(self) -> bool:
        """Whether the bucket's objects have URLs."""
        return bool(self._remote.signs_urls)

    @property
    def is_down(self) -> bool:
        """Whether the bucket's server does not answer."""
        return bool(self._remote.is_down)

    def _has(self, s3_key: str) -> Any:
        """Return which of the two has an object; the bucket when none has."""
        return self._remote if self._local.head_object(s3_key) is None else self._local

    def download_file(self, s3_key: str, local_path: str) -> None:
        """Write an object's bytes to a file."""
        self._has(s3_key).download_file(s3_key, local_path)

    def verify_file(self, s3_key: str, local_path: str) -> None:
        """Compare a file with an object."""
        self._has(s3_key).verify_file(s3_key, local_path)

    def open_range(self, s3_key: str, *args: Any, **kw: Any) -> Any:
        """Open a part of an object."""
        return self._has(s3_key).open_range(s3_key, *args, **kw)

    def object_size(self, s3_key: str) -> int:
        """Return the size of an object in bytes."""
        size: int = self._has(s3_key).object_size(s3_key)
        return size

    def head_object(self, s3_key: str) -> Mapping[str, Any] | None:
        """Return a mapping with ContentLength, None when absent."""
        head: Mapping[str, Any] | None = self._has(s3_key).head_object(s3_key)
        return head

    def presigned_url(self, s3_key: str, *args: Any, **kw: Any) -> str | None:
        """Return a URL of an object that is in the bucket, None for the others."""
        url: str | None = self._has(s3_key).presigned_url(s3_key, *args, **kw)
        return url

    def copy_object(self, source_key: str, target_key: str) -> None:
        """Copy an object into the directory."""
        if self._has(source_key) is self._local:
            self._local.copy_object(source_key, target_key)
            return
        # Where the target is: there is room for it, then.
        make_private(self._local.directory)
        path = os.path.join(self._local.directory, f"{os.urandom(8).hex()}{UNFINISHED}")
        try:
            self._remote.download_file(source_key, path)
            self._local.upload_file(path, target_key)
        finally:
            if os.path.lexists(path):
                os.remove(path)

    def close(self) -> None:
        """Release connections."""
        self._remote.close()
