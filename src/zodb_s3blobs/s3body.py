"""The bytes of an object: described on their way up, verified on their way down.

Size, SHA-256 and key travel as metadata. Objects of the older package, and those of
servers that forget metadata, have a length only.
"""

from collections.abc import Callable
from collections.abc import Mapping
from contextlib import closing
import hashlib
import time
from typing import Any
from typing import BinaryIO

from .cancellation import Cancellation
from .cancellation import UploadCancelled
from .interfaces import IntegrityError
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .s3errors import BodyError


CHUNK = 1 << 20
# What is read of a file at a time, by as many threads as upload
BUFFER = 256 << 10
# Bytes a second; what comes more slowly over the whole of a body has failed.
SLOWEST_RATE = 16 << 10


class CancellableBody:
    """A file whose reading stops when the upload is cancelled, or takes too long.

    :param float deadline: by `time.monotonic`.
    """

    def __init__(self, file: BinaryIO, cancelled: Cancellation, deadline: float) -> None:
        self._file = file
        self._cancelled = cancelled
        self._deadline = deadline
        #: what ended the reading, besides a cancellation
        self.failure: Exception | None = None
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1) -> bytes:
        if self._cancelled:
            raise UploadCancelled
        if time.monotonic() > self._deadline:
            self.failure = BodyError(TransientS3Error, "the server takes the bytes too slowly")
            raise UploadCancelled
        try:
            return self._file.read(size)
        except OSError as error:
            self.failure = error
            raise UploadCancelled from None


def describe_bytes(key: str, data: bytes) -> dict[str, str]:
    """Return the metadata of an object with these bytes."""
    return _describe(key, len(data), hashlib.sha256(data))


def describe_file(key: str, file: BinaryIO) -> dict[str, str]:
    """Return the metadata of an object with a file's bytes, read from its beginning."""
    return _describe(key, *digest_of(file))


def digest_of(file: BinaryIO) -> tuple[int, Any]:
    """Return the number of bytes that a file has from here on, and their SHA-256."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(BUFFER))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # BinaryIO lacks it
        digest.update(buffer[:count])
        size += count
    return size, digest


def _describe(key: str, size: int, digest: Any) -> dict[str, str]:
    return {"zodb-key": key, "zodb-size": str(size), "zodb-sha256": digest.hexdigest()}


def metadata_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of an object as it was sent; some servers change the case of names."""
    return {name.lower(): value for name, value in answer.get("Metadata", {}).items()}


def check_origin(answer: Mapping[str, Any]) -> None:
    """Require what every S3 server sends: a proxy's error page may come with status 200.

    :raises BodyError: when something else has answered.
    """
    if "ETag" not in answer:
        raise BodyError(TransientS3Error, "something else than S3 has answered (no ETag)")


def check_not_a_page(answer: Mapping[str, Any]) -> None:
    """Require an answer that is no page for people, as a proxy's may be.

    :raises BodyError: when something else has answered.
    """
    told = answer["ResponseMetadata"]
    # An answer 204 has no body, whatever it says of that.
    is_page = told["HTTPHeaders"].get("content-type", "").startswith("text/html")
    if told["HTTPStatusCode"] == 200 and is_page:
        raise BodyError(TransientS3Error, "something else than S3 has answered (a page)")


_DESCRIBED = {"zodb-key", "zodb-size", "zodb-sha256"}


def _kind(found: str, told: str) -> type[S3OperationError]:
    """Return what it means that an answer tells something else: it may end in the middle of it."""
    return TransientS3Error if found.startswith(told) else IntegrityError


def check_key(key: str, metadata: Mapping[str, str]) -> None:
    """Require that an object does not say that it is another.

    :raises BodyError: when somebody has swapped two.
    """
    found = metadata.get("zodb-key", key)
    if found != key:
        raise BodyError(_kind(key, found), f"key is {found!r}, expected {key!r}")


def receive(key: str, answer: Mapping[str, Any], local_path: str, patience: float) -> int:
    """Write the body of an answer to get_object to a file and verify it.

    :param float patience: seconds, to which come those that the slowest useful rate takes.
    :returns: its bytes.
    :raises BodyError: when it ends early, comes too slowly, or differs from what was stored.
    """
    deadline = time.monotonic() + patience
    digest = hashlib.sha256()
    size = 0
    with open(local_path, "wb", buffering=0) as file, closing(answer["Body"]) as body:
        check_origin(answer)
        expected = answer.get("ContentLength")
        if expected is None and not metadata_of(answer).keys() >= _DESCRIBED:
            # Python takes what comes before the end of a connection for a complete head.
            raise BodyError(TransientS3Error, "the answer was cut: it tells no length")
        while piece := read_piece(body, CHUNK):
            digest.update(piece)
            _write_all(file, piece)
            size += len(piece)
            if expected is not None and size > expected:
                raise BodyError(IntegrityError, f"more than {expected} bytes came")
            if time.monotonic() > deadline + size / SLOWEST_RATE:
                raise BodyError(TransientS3Error, f"only {size} bytes came in time")
        check_end(size, size if expected is None else expected)
    verify(key, answer, size, digest.hexdigest())
    return size


def read_piece(body: Any, size: int) -> bytes:
    """Return bytes from the body of an answer, up to size, as they come; none at its end.

    What reads until it has all of them, as `read` does, would wait for ever for a server that sends
    a byte now and then.

    :raises BodyError: when it is cut.
    """
    from botocore.response import StreamingBody

    read = body.read
    if type(body) is StreamingBody:  # and none that compares a checksum while it is read
        raw: Any = vars(body).get("_raw_stream")
        read = getattr(raw, "read1", read)  # which old releases of urllib3 do not have
    piece: bytes = _reading(read, size)
    return piece


def check_end(size: int, expected: int) -> None:
    """Require that a body had as many bytes as the answer said.

    :raises BodyError: when it is cut.
    """
    if size < expected:
        raise BodyError(TransientS3Error, f"the answer was cut: {size} of {expected} bytes came")


def _reading(call: Callable[..., Any], *args: Any) -> Any:
    from botocore.exceptions import BotoCoreError
    from botocore.exceptions import FlexibleChecksumError
    from urllib3.exceptions import HTTPError

    try:
        return call(*args)
    except FlexibleChecksumError as error:
        raise BodyError(IntegrityError, "its checksum differs") from error
    except (BotoCoreError, HTTPError, OSError) as error:
        raise BodyError(TransientS3Error, f"the answer was cut: {type(error).__name__}") from error


def _write_all(file: Any, piece: bytes) -> None:
    data = memoryview(piece)
    while data:
        data = data[file.write(data) :]


def verify(key: str, answer: Mapping[str, Any], size: int, digest: str) -> None:
    """Compare bytes with what an answer says of an object, as far as it does.

    :param str digest: SHA-256, in hexadecimal.
    :raises BodyError: when they differ.
    """
    metadata = metadata_of(answer)
    for what, expected, found in (
        ("length", str(answer.get("ContentLength", size)), str(size)),
        ("stored length", metadata.get("zodb-size", str(size)), str(size)),
        ("SHA-256", metadata.get("zodb-sha256", digest), digest),
    ):
        if expected != found:
            kind = _kind(found, expected)
            raise BodyError(kind, f"{what} is {found!r}, expected {expected!r}")
    check_key(key, metadata)
