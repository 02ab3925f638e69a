"""A part of an object as a file: one request for bytes that are read in order."""

from collections.abc import Callable
from collections.abc import Mapping
from contextlib import AbstractContextManager
import re
import time
from typing import Any
from typing import NamedTuple

from .interfaces import IntegrityError
from .interfaces import TransientS3Error
from .s3body import check_key
from .s3body import check_origin
from .s3body import metadata_of
from .s3body import read_piece
from .s3body import SLOWEST_RATE
from .s3errors import BodyError
from .sections import Section
from .stats import ClientCounters


# How often in a row a body may end early before anything of it has come.
ATTEMPTS = 3
# What is read of a body to get behind what was not asked for
SKIP = 1 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")
_UNSATISFIED = re.compile(r"bytes \*/(\d+)")


class Opened(NamedTuple):
    """An answer whose body is yet to be read."""

    #: None when the object has no byte there
    body: Any
    #: size of the whole object in bytes
    size: int


def range_header(start: int, stop: int | None) -> dict[str, str]:
    """Return the option of get_object that asks for these bytes, none for all of them.

    An object without bytes has no range.
    """
    if not start and stop is None:
        return {}
    return {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"}


def open_answer(key: str, answer: Mapping[str, Any], start: int) -> Opened:
    """Check what an answer to get_object says of itself.

    A server that does not know ranges sends all; its body is read up to the start.

    :raises BodyError: when it is not what was asked for.
    """
    check_origin(answer)
    body, size = answer["Body"], answer["ContentLength"]
    if "ContentRange" in answer:
        match = _CONTENT_RANGE.fullmatch(answer["ContentRange"])
        if match is None or int(match[1]) != start:
            found = answer["ContentRange"]
            raise BodyError(IntegrityError, f"the answer has {found}, expected bytes from {start}")
        size = int(match[2])
    metadata = metadata_of(answer)
    stored = metadata.get("zodb-size", str(size))
    if stored != str(size):
        raise BodyError(IntegrityError, f"stored length is {stored!r}, expected '{size}'")
    check_key(key, metadata)
    if "ContentRange" not in answer:
        _skip(body, min(start, size))
    return Opened(body, size)


def nothing_there(error: Any, start: int) -> Opened:
    """Return what an answer says that refuses a range behind the end."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    match = _UNSATISFIED.fullmatch(headers.get("content-range", ""))
    return Opened(None, int(match[1]) if match else start)


def _skip(body: Any, count: int) -> None:
    while count:
        piece = read_piece(body, min(count, SKIP))
        if not piece:
            raise BodyError(TransientS3Error, "the answer ended early")
        count -= len(piece)


class RemoteSection(Section):
    """Bytes of an object; where a connection is cut another request goes on from there.

    Bytes of a part cannot be verified by their digest: length, key and position are.

    :param ask: called with start and stop, returns what was `Opened`.
    :param reading: entered while a reader waits; makes this package's errors of what is raised.
    :param ClientCounters counters: told what arrives.
    :param float patience: seconds, to which come those that the slowest useful rate takes.
    """

    def __init__(
        self,
        ask: Callable[[int, int | None], Opened],
        reading: Callable[[], AbstractContextManager[None]],
        counters: ClientCounters,
        patience: float,
        start: int,
        stop: int | None,
    ) -> None:
        # Where the body goes on, and where it ends
        self._body: Any = None
        self._next = start
        self._ask = ask
        self._reading = reading
        self._counters = counters
        self._patience = patience
        opened = self._open(start, stop)
        stop = opened.size if stop is None else min(stop, opened.size)
        super().__init__(start, max(start, stop))
        self._body = opened.body

    def _open(self, start: int, stop: int | None) -> Opened:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._ask(start, stop)
            except BodyError as error:
                self._check_retry(error, attempt)
        raise AssertionError("unreachable")

    def _check_retry(self, error: BodyError, attempt: int) -> None:
        if attempt == ATTEMPTS or error.kind is not TransientS3Error or self._patience < 0:
            raise error
        self._counters.add(retries=1)

    def _read_at(self, position: int, view: memoryview) -> int:
        with self._reading():
            for attempt in range(1, ATTEMPTS + 1):
                if self._body is None or position != self._next:
                    self._close_body()
                    self._body = self._open(position, self._start + self._size).body
                    self._next = position
                try:
                    count = self._read_body(view)
                except BodyError as error:
                    self._close_body()
                    self._check_retry(error, attempt)
                else:
                    self._next += count
                    self._counters.add(downloaded_bytes=count)
                    return count
        raise AssertionError("unreachable")

    def _read_body(self, view: memoryview) -> int:
        begun = time.monotonic()
        piece = read_piece(self._body, len(view)) if self._body is not None else b""
        count = len(piece)
        view[:count] = piece
        if not count:
            raise BodyError(TransientS3Error, "the answer ended early")
        # Only what is spent here counts: a reader may take its time.
        self._patience += count / SLOWEST_RATE - (time.monotonic() - begun)
        if self._patience < 0:
            raise BodyError(TransientS3Error, "the bytes come too slowly")
        return count

    def _close_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def close(self) -> None:
        if not self.closed:
            self._close_body()
        super().close()
