"""Reads from a bucket, and what all requests have in common: one request, mended and translated."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextlib import contextmanager
from contextlib import nullcontext
import logging
from types import MappingProxyType
from typing import Any

from .breaker import Breaker
from .breaker import NotTried
from .interfaces import IntegrityError
from .interfaces import ListedObject
from .interfaces import MissingObjectError
from .interfaces import PermanentS3Error
from .interfaces import S3OperationError
from .interfaces import TransientS3Error
from .interfaces import UnfinishedUpload
from .s3body import check_origin
from .s3body import digest_of
from .s3body import receive
from .s3body import verify
from .s3errors import BodyError
from .s3errors import code_of
from .s3errors import make_error
from .s3errors import RENEWAL_CODES
from .s3errors import status_of
from .s3errors import translated
from .s3errors import was_silent
from .s3listing import read_page
from .s3listing import read_uploads
from .s3range import nothing_there
from .s3range import open_answer
from .s3range import Opened
from .s3range import range_header
from .s3range import RemoteSection
from .s3session import S3Session
from .sections import Section
from .stats import ClientCounters


logger = logging.getLogger(__name__)

# botocore does not retry once a body has begun to arrive.
DOWNLOAD_ATTEMPTS = 3
NOTHING: Mapping[str, Any] = MappingProxyType({})


class S3Reader:
    """What reads, and what all requests of an `S3Client` have in common.

    :param str bucket_name: 3 to 63 characters.
    :param str prefix: put before each key, with a slash between.
    :param read_args: what each request for an object says besides: a key of ours (SSE-C).
    :param float read_timeout: seconds without a byte.
    :param bool create_bucket: whether a missing bucket is made, and has nothing until then.
    :param str region_name: where it is made.
    """

    def __init__(
        self,
        bucket_name: str,
        prefix: str,
        session: S3Session,
        counters: ClientCounters,
        breaker: Breaker,
        read_args: Mapping[str, Any],
        read_timeout: float,
        create_bucket: bool,
        region_name: str | None,
    ) -> None:
        self.bucket_name = bucket_name
        self.prefix = prefix
        self.counters = counters
        self._full_prefix = f"{prefix}/" if prefix else ""
        self._session = session
        self._breaker = breaker
        self._read_args = read_args
        self._read_timeout = read_timeout
        self._create_bucket = create_bucket
        self._region_name = region_name
        self.uses_kms = False

    def download_file(self, s3_key: str, local_path: str) -> None:
        """Write an object's bytes to a file: one GET, verified by length and digest."""
        with self._watched():
            for attempt in range(1, DOWNLOAD_ATTEMPTS + 1):
                try:
                    with translated("download", s3_key, self._permission("s3:GetObject")):
                        return self._download(s3_key, local_path)
                except (TransientS3Error, IntegrityError) as error:
                    # Requests were retried by botocore; here a body was cut or damaged on its way.
                    if attempt == DOWNLOAD_ATTEMPTS or not isinstance(error.__cause__, BodyError):
                        raise
                    logger.warning("download retried key=%s attempt=%d: %s", s3_key, attempt, error)
                    self.counters.add(retries=1)

    def _download(self, s3_key: str, local_path: str) -> None:
        answer = self._try(self._request, "get_object", s3_key, self._read_args)
        size = receive(s3_key, answer, local_path, self._read_timeout)
        self.counters.add(downloads=1, downloaded_bytes=size)
        logger.debug("downloaded key=%s bytes=%d", s3_key, size)

    def open_range(
        self,
        s3_key: str,
        start: int = 0,
        stop: int | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Section:
        """Open the bytes of an object from start to below stop: one GET, read as they are wanted.

        What goes beyond the end is left out. To move in the file makes another request.

        :param waiting: entered while a reader waits for S3.
        :raises ValueError: when there is no byte between them.
        """

        if stop is not None and stop <= start:
            raise ValueError(f"a range has a byte at least, not {start} to {stop}")

        def ask(start: int, stop: int | None) -> Opened:
            opened: Opened = self._try(self._get_range, s3_key, start, stop)
            return opened

        @contextmanager
        def reading() -> Iterator[None]:
            with waiting(), self._translated("read", s3_key, "s3:GetObject"):
                yield

        with self._translated("read", s3_key, "s3:GetObject"):
            return RemoteSection(ask, reading, self.counters, self._read_timeout, start, stop)

    def _get_range(self, s3_key: str, start: int, stop: int | None) -> Opened:
        from botocore.exceptions import ClientError

        self.counters.add(range_reads=1)
        options = {**self._read_args, **range_header(start, stop)}
        try:
            answer = self._request("get_object", s3_key, options)
        except ClientError as error:
            if status_of(error) == 416:
                return nothing_there(error, start)
            raise
        try:
            return open_answer(s3_key, answer, start)
        except BaseException:
            # Whatever it was, nobody else closes it.
            answer["Body"].close()
            raise

    def object_size(self, s3_key: str) -> int:
        """Return the size of an object in bytes.

        :raises MissingObjectError: when the bucket has no such object.
        """
        head = self._head_of_existing("head", s3_key)
        with self._translated("head", s3_key, "s3:GetObject"):
            size: int = head["ContentLength"]
            if size < 0:
                raise ValueError("a negative length")
        return size

    def verify_file(self, s3_key: str, local_path: str) -> None:
        """Compare a file with what is known of an object: its length and, mostly, its digest.

        :raises MissingObjectError: when the bucket has no such object.
        :raises IntegrityError: when the file has other bytes.
        """
        head = self._head_of_existing("verify", s3_key)
        with open(local_path, "rb") as file:
            size, digest = digest_of(file)
        with self._translated("verify", s3_key, "s3:GetObject"):
            verify(s3_key, head, size, digest.hexdigest())

    def _head_of_existing(self, operation: str, s3_key: str) -> Mapping[str, Any]:
        head = self.head_object(s3_key)
        if head is None:
            # HEAD does not tell a missing object from a missing bucket; GET does.
            with self._translated(operation, s3_key, "s3:GetObject"):
                self._try(self._request, "get_object", s3_key, self._read_args)["Body"].close()
            raise make_error(MissingObjectError, operation, s3_key, "no such object")
        return head

    @property
    def signs_urls(self) -> bool:
        """Whether others can read objects by a URL: not where they need a key of ours (SSE-C)."""
        return not self._read_args

    def presigned_url(
        self,
        s3_key: str,
        expires_in: int = 60,
        content_type: str | None = None,
        content_disposition: str | None = None,
    ) -> str | None:
        """Return a URL by which anybody can GET an object for a while.

        Makes no request, but while S3 is known to be down.

        :param int expires_in: seconds.
        :param str content_type: what the answer shall say of itself, as the other one.
        :returns: None under SSE-C.
        :raises TransientS3Error: while S3 is known to be down.
        """
        if not self.signs_urls:
            return None
        if self.is_down:
            # After a pause somebody must ask whether it answers again.
            self._head_of_existing("sign", s3_key)
        wanted = {
            "ResponseContentType": content_type,
            "ResponseContentDisposition": content_disposition,
        }
        parameters = {"Bucket": self.bucket_name, "Key": self._full_prefix + s3_key}
        parameters |= {name: value for name, value in wanted.items() if value is not None}
        with self._translated("sign", s3_key, "s3:GetObject"):
            url: str = self._session.signer().generate_presigned_url(
                "get_object", parameters, expires_in
            )
        return url

    def head_object(self, s3_key: str) -> Mapping[str, Any] | None:
        """Return a mapping with at least ContentLength, None when absent."""
        with self._translated("head", s3_key, "s3:GetObject"):
            answer = self._head(s3_key)
            if answer is not None:
                check_origin(answer)
            return answer

    def _head(self, s3_key: str) -> Mapping[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            answer: Mapping[str, Any] = self._request("head_object", s3_key, self._read_args)
        except ClientError as error:
            if status_of(error) == 404:
                return None
            if status_of(error) >= 500:
                raise
        else:
            return answer
        # The answer has no body that says why; that to GET has one.
        try:
            answer = self._try(self._request, "get_object", s3_key, self._read_args)
        except ClientError as error:
            if code_of(error) == "NoSuchKey":
                return None
            raise
        answer["Body"].close()
        return answer

    def list_objects(self, prefix: str) -> Iterator[str]:
        """Iterate lazily over the keys that begin with a prefix."""
        for page in self.list_pages(prefix):
            for listed in page:
                yield listed.key

    def list_pages(self, prefix: str, after: str = "") -> Iterator[list[ListedObject]]:
        """Iterate lazily over lists of 1 to 1000 objects, from behind a key on."""
        token = {"StartAfter": self._full_prefix + after} if after else {}
        while True:
            with self._translated("list", prefix, "s3:ListBucket"):
                answer = self._try(self._list, prefix, token)
                page = read_page(answer, len(self._full_prefix))
            if page:
                yield page
            if not answer.get("IsTruncated"):
                return
            if not (following := answer.get("NextContinuationToken")):
                raise make_error(PermanentS3Error, "list", prefix, "it ends without its rest")
            if following == token.get("ContinuationToken"):
                raise make_error(PermanentS3Error, "list", prefix, "it goes in circles")
            token = {"ContinuationToken": following}

    def list_uploads(self, prefix: str) -> Iterator[UnfinishedUpload]:
        """Iterate lazily over the multipart uploads that have neither ended nor been aborted.

        Some servers list none of them unless the prefix is the whole key.
        """
        markers: dict[str, str] = {}
        while True:
            with self._translated("list uploads", prefix, "s3:ListBucketMultipartUploads"):
                answer = self._try(self._list_uploads, prefix, markers)
                uploads = read_uploads(answer, len(self._full_prefix))
                following = {
                    name: str(answer.get(f"Next{name}", ""))
                    for name in ("KeyMarker", "UploadIdMarker")
                }
            yield from uploads
            if not answer.get("IsTruncated") or following == markers:
                return
            markers = following

    def _list_uploads(self, prefix: str, markers: Mapping[str, str]) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self._session.client().list_multipart_uploads(
                Bucket=self.bucket_name, Prefix=self._full_prefix + prefix, **markers
            )
        except ClientError as error:
            if code_of(error) == "NoSuchUpload":
                return {}  # as rclone says that there are none
            raise

    def _list(self, prefix: str, token: Mapping[str, str]) -> Any:
        from botocore.exceptions import ClientError

        try:
            answer = self._session.client().list_objects_v2(
                Bucket=self.bucket_name, Prefix=self._full_prefix + prefix, **token
            )
        except ClientError as error:
            if self._create_bucket and code_of(error) == "NoSuchBucket":
                return {}  # it comes with the first upload
            raise
        if "IsTruncated" not in answer:
            raise BodyError(TransientS3Error, "something else than S3 has answered (no listing)")
        return answer

    # Edges

    def _request(self, method: str, s3_key: str, options: Mapping[str, Any] = NOTHING) -> Any:
        call = getattr(self._session.client(), method)
        return call(Bucket=self.bucket_name, Key=self._full_prefix + s3_key, **options)

    @contextmanager
    def _translated(self, operation: str, key: str, permission: str) -> Iterator[None]:
        with self._watched(), translated(operation, key, self._permission(permission)):
            yield

    def _permission(self, permission: str) -> str:
        if self._read_args:
            permission += " (SSE-C: check the key; AWS refuses SSE-C on new buckets, not s3-sse)"
        if self.uses_kms:
            permission += " (and kms:GenerateDataKey and kms:Decrypt on the key of s3-sse)"
        return permission

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Count failures, and see whether S3 is down."""
        answers = self._breaker.answers
        try:
            yield
        except MissingObjectError:
            raise
        except S3OperationError as error:
            self.counters.add(failures=1)
            if isinstance(error, TransientS3Error) and not isinstance(error.__cause__, NotTried):
                self._breaker.failed(answers, was_silent(error))
            raise

    @property
    def is_down(self) -> bool:
        """Whether S3 is known not to answer, so that every request fails at once."""
        return self._breaker.is_open()

    def _try(self, call: Callable[..., Any], *args: Any, may_create: bool = False) -> Any:
        """Call, and once more after mending what can be mended from here."""
        from botocore.exceptions import ClientError

        try:
            return call(*args)
        except ClientError as error:
            if code_of(error) in RENEWAL_CODES:
                # A role's credentials failed to refresh; a new session asks for new ones.
                self._session.renew()
            elif code_of(error) == "NoSuchBucket" and may_create and self._create_bucket:
                self._make_bucket()
            else:
                raise
        return call(*args)

    def _make_bucket(self) -> None:
        from botocore.exceptions import ClientError

        place: dict[str, Any] = {}
        if self._region_name and self._region_name != "us-east-1":
            place["CreateBucketConfiguration"] = {"LocationConstraint": self._region_name}
        try:
            self._session.client().create_bucket(Bucket=self.bucket_name, **place)
        except ClientError as error:
            # Another process was faster.
            if code_of(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise
        logger.info("bucket created bucket=%s", self.bucket_name)
