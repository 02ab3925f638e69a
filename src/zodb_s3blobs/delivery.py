"""Answers a request for a blob: by a URL of S3 where that is possible, else with the bytes.

The decision who may see a blob is made before; whoever gets the URL can use it for a while.
"""

from collections.abc import Callable
from collections.abc import Iterable
from http import HTTPStatus
import io
import re
from typing import Any
from typing import NamedTuple
from urllib.parse import urlsplit

from ZODB.blob import Blob
from zope.interface import directlyProvides

from . import blobs
from . import values
from .headers import content_disposition
from .headers import media_type
from .interfaces import S3OperationError
from .sections import FileSection


UNKNOWN_TYPE = "application/octet-stream"
CHUNK = 1 << 16
# The headers of an answer without a body
NOTHING = [("Content-Type", "text/plain"), ("Content-Length", "0")]

_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)


class Answer(NamedTuple):
    """What is sent back."""

    status: HTTPStatus
    headers: list[tuple[str, str]]
    #: a file with as many bytes as Content-Length says; None where there is nothing to send
    body: io.BufferedReader | None


class Delivery:
    """How a site delivers its blobs.

    :param int expires_in: seconds for which a URL is valid.
    :param str accel_location: the nginx location that passes requests on to S3, such as
        ``/s3blobs``: with it X-Accel-Redirect is sent to nginx, without it a redirect to the
        browser.
    :param int min_size: what has fewer bytes is sent from here: for a small file a second request
        takes longer than its bytes.
    :raises ValueError: for a value that cannot be right.
    """

    def __init__(
        self, expires_in: int = 60, accel_location: str | None = None, min_size: int = 0
    ) -> None:
        if accel_location is not None and not accel_location.startswith("/"):
            raise ValueError(f"an nginx location begins with a slash, not {accel_location!r}")
        self._expires_in = values.url_seconds(expires_in)
        self._accel_location = accel_location
        self._min_size = min_size

    def zope(
        self,
        blob: Blob,
        request: Any,
        content_type: str | None = None,
        filename: str | None = None,
        disposition: str = "inline",
    ) -> Any:
        """Answer a Zope request; a view returns what this returns.

        :param request: Zope's; its response gets status and headers.
        :param str content_type: as users gave it; what is none counts as unknown.
        :param str filename: as users gave it.
        :param str disposition: "inline" or "attachment". What browsers would run, such as HTML and
            SVG, is better an attachment: inline, it runs as a page of the site, or of the bucket's
            host after a redirect.
        :raises POSKeyError: when the blob is nowhere.
        :raises S3OperationError: when S3 fails.
        """
        answer = self.answer(
            blob,
            request.get("REQUEST_METHOD", "GET"),
            request.get_header("Range"),
            request.get_header("If-Range"),
            content_type,
            filename,
            disposition,
        )
        response = request.response
        response.setStatus(int(answer.status))
        for name, value in answer.headers:
            # Not its redirect(), which may quote a URL once more, and so break the signature.
            response.setHeader(name, value)
        if answer.body is None:
            return b""
        if _is_file(answer.body):
            return answer.body
        from ZPublisher.Iterators import IStreamIterator

        chunks = _Chunks(answer.body, CHUNK, _length(answer))
        directlyProvides(chunks, IStreamIterator)
        return chunks

    def wsgi(
        self,
        blob: Blob,
        environ: dict[str, Any],
        start_response: Callable[..., Any],
        content_type: str | None = None,
        filename: str | None = None,
        disposition: str = "inline",
    ) -> Iterable[bytes]:
        """Answer a WSGI request; an application returns what this returns.

        The arguments and errors are those of `zope`.
        """
        answer = self.answer(
            blob,
            environ["REQUEST_METHOD"],
            environ.get("HTTP_RANGE"),
            environ.get("HTTP_IF_RANGE"),
            content_type,
            filename,
            disposition,
        )
        start_response(f"{int(answer.status)} {answer.status.phrase}", answer.headers)
        if answer.body is None:
            return []
        if _is_file(answer.body) and "wsgi.file_wrapper" in environ:
            wrapped: Iterable[bytes] = environ["wsgi.file_wrapper"](answer.body, CHUNK)
            return wrapped
        return _Chunks(answer.body, CHUNK, _length(answer))

    def answer(
        self,
        blob: Blob,
        method: str = "GET",
        range_header: str | None = None,
        if_range: str | None = None,
        content_type: str | None = None,
        filename: str | None = None,
        disposition: str = "inline",
    ) -> Answer:
        """Return the answer to a request of any framework; `zope` tells of the arguments."""
        try:
            content_type = media_type(content_type or UNKNOWN_TYPE)
        except ValueError:
            content_type = UNKNOWN_TYPE
        headers = [
            ("Content-Type", content_type),
            ("Content-Disposition", content_disposition(disposition, filename)),
            ("X-Content-Type-Options", "nosniff"),
        ]
        # A signature is for GET. Nginx asks by GET whatever it was asked.
        if method == "GET" or self._accel_location:
            try:
                url = None
                if not self._min_size or blobs.size(blob) >= self._min_size:
                    url = blobs.presigned_url(
                        blob, self._expires_in, content_type, filename, disposition
                    )
            except S3OperationError:
                if not blobs.is_cached(blob):
                    raise
                url = None  # it needs no S3
            if url is not None:
                return self._delegate(url, headers)
        # Source: RFC 9110, 14.2: other methods have no ranges.
        has_range = method == "GET" and not if_range
        return _serve(blob, method, range_header if has_range else None, headers)

    def _delegate(self, url: str, headers: list[tuple[str, str]]) -> Answer:
        if self._accel_location is None:
            # No cache may keep the URL longer than it is valid, or give it to somebody else.
            redirect = [("Location", url), ("Cache-Control", "no-store"), *NOTHING]
            return Answer(HTTPStatus.FOUND, redirect, None)
        parts = urlsplit(url)
        target = f"{self._accel_location.rstrip('/')}{parts.path}?{parts.query}"
        accel = [("X-Accel-Redirect", target), ("Content-Length", "0"), *headers]
        return Answer(HTTPStatus.OK, accel, None)


class _Chunks:
    """What is read from S3, piece by piece, by the thread that answers the request.

    Servers read a ``wsgi.file_wrapper``, and what Zope takes for a file, when the client is ready,
    in the thread that serves all of them: S3 must not keep that one waiting.
    """

    def __init__(self, file: io.BufferedReader, size: int, length: int) -> None:
        self._file = file
        self._size = size
        self._length = length
        self.close = file.close

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> "_Chunks":
        return self

    def __next__(self) -> bytes:
        if chunk := self._file.read(self._size):
            return chunk
        raise StopIteration


def _is_file(body: io.BufferedReader) -> bool:
    return isinstance(body.raw, FileSection)


def _length(answer: Answer) -> int:
    return int(dict(answer.headers)["Content-Length"])


def _serve(
    blob: Blob, method: str, range_header: str | None, headers: list[tuple[str, str]]
) -> Answer:
    size = blobs.size(blob)
    status, start, stop = _wanted(range_header, size)
    headers = [*headers, ("Accept-Ranges", "bytes")]
    if status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return Answer(status, [("Content-Range", f"bytes */{size}"), *NOTHING], None)
    if status is HTTPStatus.PARTIAL_CONTENT:
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{size}"))
    headers.append(("Content-Length", str(stop - start)))
    if method == "HEAD":
        return Answer(status, headers, None)
    if status is HTTPStatus.OK:
        blobs.prefetch([blob])  # all of it is wanted: verified, and for the next one, too
    return Answer(status, headers, blobs.open_range(blob, start, stop))


def _wanted(range_header: str | None, size: int) -> tuple[HTTPStatus, int, int]:
    """Return status, start and stop; what is no single range counts as none.

    Source: RFC 9110, 14.1.2 and 14.2.
    """
    match = _RANGE.fullmatch((range_header or "").replace(" ", ""))
    if match is None or match[0] == "bytes=-":
        return HTTPStatus.OK, 0, size
    first, last = (_number(digits) if digits else None for digits in match.groups())
    if first is None:
        start, stop = max(0, size - (last or 0)), size
    elif last is not None and last < first:
        return HTTPStatus.OK, 0, size
    else:
        start, stop = first, size if last is None else min(size, last + 1)
    if start >= stop:
        return HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, 0, 0
    return HTTPStatus.PARTIAL_CONTENT, start, stop


def _number(digits: str) -> int:
    """Return a number, however long it is; no file has as many bytes as 19 digits can tell."""
    digits = digits.lstrip("0")
    return int(digits or "0") if len(digits) < 19 else 10**19
