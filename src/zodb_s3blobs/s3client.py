"""Moves files to and from a bucket; translates every boto error at the edge, once."""

from collections.abc import Iterable
from collections.abc import Mapping
import logging
import os
import time
from typing import Any

from zope.interface import implementer

from . import values
from .breaker import Breaker
from .breaker import LONGEST_PAUSE
from .cancellation import Cancellation
from .cancellation import UploadCancelled
from .interfaces import IS3Client
from .interfaces import MissingObjectError
from .interfaces import PermanentS3Error
from .interfaces import ReadOnlyBucketError
from .interfaces import S3OperationError
from .ownership import MARKER
from .ownership import Ownership
from .s3body import CancellableBody
from .s3body import check_key
from .s3body import check_not_a_page
from .s3body import check_origin
from .s3body import describe_bytes
from .s3body import describe_file
from .s3body import metadata_of
from .s3body import SLOWEST_RATE
from .s3errors import code_of
from .s3errors import INTEGRITY_CODES
from .s3errors import NO_BATCH_DELETE_CODES
from .s3errors import status_of
from .s3reader import NOTHING
from .s3reader import S3Reader
from .s3session import S3Session
from .stats import ClientCounters


__all__ = ["S3Client", "S3OperationError"]

logger = logging.getLogger(__name__)

MiB = 1 << 20
GiB = 1 << 30

# A body up to this size is read into memory, once, and sent without asking the server first.
SMALL_BODY = MiB
LARGEST_SINGLE_REQUEST = 5 * GiB
# A server is silent while it copies, and must be done within the read time-out.
LARGEST_SINGLE_COPY = GiB
# What S3 takes in one DeleteObjects request.
DELETE_BATCH = 1000


@implementer(IS3Client)
class S3Client(S3Reader):
    """Files in one bucket of an S3-compatible server, below a prefix.

    Nothing is sent before the first call of a method. Every wait is bounded by
    the time-outs and by max_attempts.

    :param str bucket_name: 3 to 63 characters.
    :param str prefix: put before each key, separated by a slash.
    :param str endpoint_url: http:// or https://; None is AWS.
    :param str sse_customer_key: 32 bytes, in base64 or as 32 ASCII characters (SSE-C).
    :param float connect_timeout: seconds.
    :param float read_timeout: seconds without a byte.
    :param int max_attempts: how often a request is tried in all.
    :param int multipart_threshold: bytes from which a file is sent in parts.
    :param int multipart_part_size: bytes, at least 5 MiB.
    :param int concurrency: threads that may use the client at the same time.
    :param float max_pause: seconds for which requests fail at once, at most, when S3 did not
        answer; the first pause takes one, and 0 lets all be tried.
    :param str public_endpoint_url: where browsers find the server, for presigned URLs.
    :param bool read_only: whether any request that would change something is refused.
    :param Ownership ownership: asked before anything is written or deleted.
    :raises ValueError: for a value that cannot be right.
    """

    def __init__(
        self,
        bucket_name: str,
        prefix: str = "",
        endpoint_url: str | None = None,
        region_name: str | None = None,
        aws_access_key_id: str | None = None,
        aws_secret_access_key: str | None = None,
        use_ssl: bool = True,
        addressing_style: str = "auto",
        connect_timeout: float = 10,
        read_timeout: float = 60,
        sse_customer_key: str | None = None,
        *,
        max_attempts: int = 5,
        multipart_threshold: int = 64 * MiB,
        multipart_part_size: int = 16 * MiB,
        checksum: str = "when_required",
        ca_bundle: str | None = None,
        profile: str | None = None,
        sse: str | None = None,
        sse_kms_key_id: str | None = None,
        storage_class: str | None = None,
        create_bucket: bool = False,
        concurrency: int = 32,
        public_endpoint_url: str | None = None,
        max_pause: float = LONGEST_PAUSE,
        read_only: bool = False,
        ownership: Ownership | None = None,
    ) -> None:
        bucket_name, prefix = values.bucket_name(bucket_name), values.key_prefix(prefix)
        if ca_bundle is not None and not (isinstance(ca_bundle, str) and ca_bundle):
            raise ValueError(f"ca_bundle is the path of a file, not {ca_bundle!r}")
        for url in (endpoint_url, public_endpoint_url):
            if url is not None:
                values.endpoint_url(url)
        self.is_read_only = read_only
        self._ownership = ownership
        self._multipart_threshold = multipart_threshold
        self._batch_delete = True
        read_args: dict[str, Any] = {}
        self._write_args: dict[str, Any] = {}
        if sse_customer_key:
            if not values.is_confidential(endpoint_url, use_ssl):
                raise ValueError("SSE-C sends its key with each request and needs https")
            read_args = {
                "SSECustomerAlgorithm": "AES256",
                "SSECustomerKey": values.sse_customer_key(sse_customer_key),
            }
            self._write_args.update(read_args)
        if sse:
            self._write_args["ServerSideEncryption"] = sse
        if sse_kms_key_id:
            self._write_args["SSEKMSKeyId"] = sse_kms_key_id
        if storage_class:
            self._write_args["StorageClass"] = storage_class
        counters, breaker = ClientCounters(), Breaker(max_pause)
        session = S3Session(
            {
                "aws_access_key_id": aws_access_key_id,
                "aws_secret_access_key": aws_secret_access_key,
                "region_name": region_name,
                "profile_name": profile,
            },
            {"endpoint_url": endpoint_url, "use_ssl": use_ssl, "verify": ca_bundle},
            {
                "signature_version": "s3v4",
                "s3": {"addressing_style": addressing_style},
                "connect_timeout": connect_timeout,
                "read_timeout": read_timeout,
                "retries": {"mode": "standard", "total_max_attempts": max_attempts},
                # Fewer than threads: boto3 opens and throws away connections. Uploads, prefetching
                # downloads, and the threads of a site.
                "max_pool_connections": 2 * concurrency + 16,
                "tcp_keepalive": True,
                # Otherwise boto3 composes a longer one, twice a request.
                "user_agent": "zodb-s3blobs",
                # By default boto3 sends trailers that many servers refuse.
                "request_checksum_calculation": checksum,
                "response_checksum_validation": checksum,
            },
            multipart_part_size,
            must_be_confidential=bool(sse_customer_key),
            counters=counters,
            breaker=breaker,
            public_endpoint_url=public_endpoint_url,
            # The certificates of AWS cover one label before the host.
            aws_signing_style="path" if "." in bucket_name else "virtual",
            is_read_only=read_only,
        )
        super().__init__(
            bucket_name,
            prefix,
            session,
            counters,
            breaker,
            read_args,
            read_timeout,
            create_bucket and not read_only,
            region_name,
        )
        self.uses_kms = (sse or "").startswith("aws:kms")

    def __repr__(self) -> str:
        return f"<S3Client bucket={self.bucket_name!r} prefix={self.prefix!r}>"

    def close(self) -> None:
        """Release connections; a later call opens them again."""
        self._session.close()

    # Writing

    def _check_writing(self, s3_key: str) -> None:
        """Refuse to change what is only read, or another database's."""
        self._check_access(s3_key)
        if self._ownership is not None:
            self._ownership.check(self)

    def check_owner(self, marks: bool = False) -> None:
        """Ask whether the bucket is this database's still, though it was a while ago.

        :param bool marks: whether one that is nobody's becomes this database's.
        """
        self._check_access(MARKER)
        if self._ownership is not None:
            self._ownership.check(self, anew=True, marks=marks)

    def _check_access(self, s3_key: str) -> None:
        if self.is_read_only:
            error = ReadOnlyBucketError(
                f"{s3_key!r} is not written: access is read-only, here or by ZODB_S3BLOBS_ACCESS."
                " A local-blob-dir takes what is stored"
            )
            error.operation, error.key = "write", s3_key
            raise error

    def read_small(self, s3_key: str) -> bytes | None:
        """Return the bytes of an object that is no blob, whole; None when there is none."""
        try:
            with self.open_range(s3_key) as section:
                return section.readall()
        except MissingObjectError:
            return None
        except PermanentS3Error as error:
            if self._create_bucket and code_of(error.__cause__) == "NoSuchBucket":
                return None
            raise

    def write_small(
        self, s3_key: str, data: bytes, only_new: bool = False, or_replace: bool = True
    ) -> None:
        """Store the bytes of an object that is no blob.

        :param bool only_new: leave one that is there.
        :param bool or_replace: where the server cannot do that, replace it; else it is an error.
        """
        from botocore.exceptions import ClientError

        self._check_access(s3_key)
        metadata = describe_bytes(s3_key, data)
        with self._translated("write", s3_key, "s3:PutObject"):
            try:
                self._put(s3_key, data, metadata, {"IfNoneMatch": "*"} if only_new else {})
            except ClientError as error:
                status = status_of(error)
                if not only_new or status not in (400, 409, 412, 501):
                    raise
                if status in (400, 501):
                    if not or_replace:
                        raise
                    self._put(s3_key, data, metadata)

    def upload_file(
        self, local_path: str, s3_key: str, cancelled: Cancellation | None = None
    ) -> None:
        """Store a file's bytes under a key, with size and SHA-256 as metadata."""
        self._check_writing(s3_key)
        with open(local_path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            with self._translated("upload", s3_key, "s3:PutObject"):
                if size <= SMALL_BODY:
                    data = file.read()
                    self._put(s3_key, data, describe_bytes(s3_key, data))
                else:
                    cancelled = Cancellation() if cancelled is None else cancelled
                    self._put_large(s3_key, file, size, cancelled)
        self.counters.add(uploads=1, uploaded_bytes=size)
        logger.debug("uploaded key=%s bytes=%d", s3_key, size)

    def _put_large(self, s3_key: str, file: Any, size: int, cancelled: Cancellation) -> None:
        metadata = describe_file(s3_key, file)
        in_parts = size >= self._multipart_threshold or size > LARGEST_SINGLE_REQUEST
        if not (in_parts and self._put_parts(s3_key, file.name, size, metadata, cancelled)):
            deadline = time.monotonic() + self._read_timeout + size / SLOWEST_RATE
            self._put(s3_key, CancellableBody(file, cancelled, deadline), metadata)

    def _put(
        self,
        s3_key: str,
        body: Any,
        metadata: Mapping[str, str],
        more: Mapping[str, Any] = NOTHING,
    ) -> None:
        def put() -> None:
            if not isinstance(body, bytes):
                body.seek(0)
            options = {"Body": body, "Metadata": metadata, **self._write_args, **more}
            check_origin(self._request("put_object", s3_key, options))

        try:
            self._try(put, may_create=True)
        except UploadCancelled:
            # What fails here is no fault of S3's, and boto3 would take it for one.
            if failure := getattr(body, "failure", None):
                raise failure from None
            raise

    def _put_parts(
        self,
        s3_key: str,
        local_path: str,
        size: int,
        metadata: Mapping[str, str],
        cancelled: Cancellation,
    ) -> bool:
        """Upload in parts, which s3transfer removes again on failure.

        :returns: False when the server refuses parts of a size that a single request can carry.
        """
        from botocore.exceptions import ClientError
        from s3transfer.exceptions import CancelledError

        def put() -> None:
            future = self._session.transfers().upload(
                local_path,
                self.bucket_name,
                self._full_prefix + s3_key,
                extra_args={"Metadata": metadata, **self._write_args},
            )
            cancelled.add_action(future.cancel)
            future.result()

        try:
            self._try(put, may_create=True)
        except CancelledError:
            raise UploadCancelled from None
        except RuntimeError:
            # The interpreter is shutting down: s3transfer's pools take no new work.
            self._session.has_refused = True
            if size > LARGEST_SINGLE_REQUEST:
                raise
            return False
        except ClientError as error:
            # Seen at Hetzner now and then: UploadPart answers 400.
            if code_of(error) in INTEGRITY_CODES or not (
                status_of(error) == 400 and size <= LARGEST_SINGLE_REQUEST
            ):
                raise
            logger.warning("multipart refused key=%s code=%s", s3_key, code_of(error))
            return False
        return True

    def copy_object(self, source_key: str, target_key: str) -> None:
        """Copy an object inside the bucket, of any size, encrypted with the same key."""
        self._check_writing(target_key)
        head = self._head_of_existing("copy", source_key)
        # The copied metadata would go on naming the source.
        metadata = metadata_of(head)
        if "zodb-key" in metadata:
            with self._translated("copy", source_key, "s3:GetObject"):
                check_key(source_key, metadata)
            metadata["zodb-key"] = target_key
        extra = {"Metadata": metadata, "MetadataDirective": "REPLACE", **self._write_args}
        for name, value in self._read_args.items():
            extra[f"CopySource{name}"] = value
        source = {"Bucket": self.bucket_name, "Key": self._full_prefix + source_key}
        with self._translated("copy", source_key, "s3:GetObject and s3:PutObject"):
            if head["ContentLength"] <= LARGEST_SINGLE_COPY:
                self._try(self._request, "copy_object", target_key, {"CopySource": source, **extra})
            else:
                transfers = self._session.transfers()
                target = self._full_prefix + target_key
                transfers.copy(source, self.bucket_name, target, extra_args=extra).result()

    def delete_object(self, s3_key: str) -> None:
        """Delete an object; deleting an absent one succeeds."""
        self._check_writing(s3_key)
        self._delete_one(s3_key)

    def _delete_one(self, s3_key: str) -> None:
        from botocore.exceptions import ClientError

        with self._translated("delete", s3_key, "s3:DeleteObject"):
            try:
                check_not_a_page(self._try(self._request, "delete_object", s3_key))
            except ClientError as error:
                if code_of(error) != "NoSuchKey":  # as GCS answers
                    raise

    def abort_upload(self, s3_key: str, upload_id: str) -> None:
        """Remove the parts of a multipart upload; one that has ended succeeds."""
        from botocore.exceptions import ClientError

        self.check_owner()
        with self._translated("abort upload", s3_key, "s3:AbortMultipartUpload"):
            try:
                options = {"UploadId": upload_id}
                self._try(self._request, "abort_multipart_upload", s3_key, options)
            except ClientError as error:
                if code_of(error) != "NoSuchUpload":
                    raise

    def delete_objects(self, s3_keys: Iterable[str]) -> dict[str, str]:
        """Delete many objects, in batches where the server can.

        :returns: a dict of key to error code for the keys that were refused.
        """
        keys = list(s3_keys)
        if keys:
            self._check_writing(keys[0])
        refused: dict[str, str] = {}
        while keys and self._batch_delete:
            batch = keys[:DELETE_BATCH]
            answer = self._delete_batch(batch)
            if answer is None:
                logger.info("batch delete refused bucket=%s", self.bucket_name)
                self._batch_delete = False
                break
            refused.update(answer)
            del keys[:DELETE_BATCH]
        for key in keys:
            try:
                self._delete_one(key)
            except PermanentS3Error as error:
                refused[key] = code_of(error.__cause__) or "unknown"
        return refused

    def _delete_batch(self, keys: list[str]) -> dict[str, str] | None:
        from botocore.exceptions import ClientError

        objects = [{"Key": self._full_prefix + key} for key in keys]
        with self._translated("delete", keys[0], "s3:DeleteObject"):
            try:
                answer = self._try(
                    lambda: self._session.client().delete_objects(
                        Bucket=self.bucket_name, Delete={"Objects": objects, "Quiet": True}
                    )
                )
            except ClientError as error:
                if code_of(error) == "AccessDenied":
                    # Ceph wants a permission on the bucket where others want one on the objects.
                    # Raises where it is the deletion that is denied and not the batch.
                    self._request("delete_object", keys[0])
                elif code_of(error) not in NO_BATCH_DELETE_CODES and status_of(error) != 501:
                    raise
                return None
            check_not_a_page(answer)
        # A server may answer 200 and refuse single keys.
        return {
            error.get("Key", "").removeprefix(self._full_prefix): error.get("Code", "unknown")
            for error in answer.get("Errors", ())
            if error.get("Code") != "NoSuchKey"
        }
