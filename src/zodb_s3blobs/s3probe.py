"""Asks a server what it can do, where an `S3Client` only uses it."""

from collections.abc import Iterable
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from typing import NamedTuple

from .interfaces import MissingObjectError
from .interfaces import S3OperationError
from .s3client import S3Client
from .s3errors import code_of
from .s3errors import status_of
from .s3range import range_header


# A server that is busy is asked once more; what is wrong stays wrong.
ATTEMPTS = 2


class FirstAnswer(NamedTuple):
    """What came when an object was asked for that is not there."""

    error: S3OperationError
    #: as the server says it, "" where it does not
    date: str
    region: str
    status: int


class S3Probe(S3Client):
    """A client that also asks what no site asks; the arguments are those of `S3Client`.

    It creates no bucket, and each request is sent, whatever came before.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        ours = {"max_attempts": ATTEMPTS, "max_pause": 0.0, "create_bucket": False}
        super().__init__(*args, **{**options, **ours})
        #: uploads in parts that were begun and not ended: id by key
        self.unfinished: dict[str, str] = {}

    def address(self) -> str:
        """Return the URL that requests for the bucket go to; sends none.

        :raises PermanentS3Error: when there are no credentials, for example.
        """
        with self._translated("sign", "", "s3:GetObject"):
            events = self._session.client().meta.events
            # Where URLs for browsers lead may be elsewhere.
            events.register_first("before-send.s3", _take_down)
            try:
                self._session.client().list_objects_v2(Bucket=self.bucket_name)
            except _NotSent as noted:
                return str(noted).partition("?")[0]
            finally:
                events.unregister("before-send.s3", _take_down)
        raise AssertionError("unreachable")

    def first_answer(self, s3_key: str) -> FirstAnswer:
        """Ask for an object that is not there, and return what came.

        :raises S3OperationError: when nothing came, or not from S3.
        """
        try:
            with self._translated("download", s3_key, "s3:GetObject"):
                answer = self._request("get_object", s3_key, self._read_args)
                answer["Body"].close()
        except S3OperationError as error:
            response = getattr(error.__cause__, "response", None)
            if not response:
                raise
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            told = response.get("Error", {}).get("Region", "")
            region = headers.get("x-amz-bucket-region", "") or told
            status = status_of(error.__cause__)
            return FirstAnswer(error, headers.get("date", ""), region, status)
        raise MissingObjectError(f"an object {s3_key!r} is there that nobody has stored")

    def read_part(self, s3_key: str, start: int, stop: int) -> tuple[bytes, bool]:
        """Return the bytes from start on that an answer has, and whether only these were sent."""
        with self._translated("read", s3_key, "s3:GetObject"):
            options = {**self._read_args, **range_header(start, stop)}
            answer = self._request("get_object", s3_key, options)
            is_part = "ContentRange" in answer or answer["ContentLength"] == stop - start
            with closing(answer["Body"]) as body:
                data: bytes = body.read(stop - start)
        return data, is_part

    def is_readable_without_key(self, s3_key: str) -> bool:
        """Tell whether an object is given out to who does not send our key (SSE-C)."""
        from botocore.exceptions import ClientError

        with self._translated("read", s3_key, "s3:GetObject"):
            try:
                self._request("head_object", s3_key)
            except ClientError as error:
                if status_of(error) in (400, 403):
                    return False
                raise
        return True

    def is_kept(self, s3_key: str) -> bool:
        """Tell whether an object is not replaced by who asks for that (If-None-Match)."""
        from botocore.exceptions import ClientError

        options = {"Body": b"other", "IfNoneMatch": "*", **self._write_args}
        with self._translated("upload", s3_key, "s3:PutObject"):
            try:
                self._request("put_object", s3_key, options)
            except ClientError as error:
                if status_of(error) not in (400, 409, 412, 501):
                    raise
                return status_of(error) in (409, 412)
        return False

    def batch_deletes(self, s3_keys: list[str]) -> bool | Mapping[str, str]:
        """Delete objects in one request.

        :returns: whether the server does that; error codes by key where it refused some.
        """
        refused = self._delete_batch(s3_keys)
        return refused or refused is not None

    def send_parts(self, s3_key: str, parts: Iterable[bytes], completes: bool) -> None:
        """Upload in parts, and complete or abort that; `unfinished` knows of it until then."""
        client = self._session.client()
        place = {"Bucket": self.bucket_name, "Key": self._full_prefix + s3_key}
        with self._translated("multipart create", s3_key, "s3:PutObject"):
            begun = client.create_multipart_upload(**place, **self._write_args)
            self.unfinished[s3_key] = begun["UploadId"]
        place["UploadId"] = begun["UploadId"]
        done = []
        for number, data in enumerate(parts, 1):
            with self._translated("multipart part", s3_key, "s3:PutObject"):
                answer = client.upload_part(
                    **place, PartNumber=number, Body=data, **self._read_args
                )
                done.append({"PartNumber": number, "ETag": answer["ETag"]})
        if not completes:
            self.abort_parts(s3_key)
            return
        with self._translated("multipart complete", s3_key, "s3:PutObject"):
            client.complete_multipart_upload(
                **place, MultipartUpload={"Parts": done}, **self._read_args
            )
        del self.unfinished[s3_key]

    def abort_parts(self, s3_key: str) -> None:
        """Remove the parts of an upload that is `unfinished`."""
        from botocore.exceptions import ClientError

        with self._translated("multipart abort", s3_key, "s3:AbortMultipartUpload"):
            try:
                self._session.client().abort_multipart_upload(
                    Bucket=self.bucket_name,
                    Key=self._full_prefix + s3_key,
                    UploadId=self.unfinished[s3_key],
                )
            except ClientError as error:
                if code_of(error) != "NoSuchUpload":
                    raise
        del self.unfinished[s3_key]

    def versioning(self) -> str:
        """Return "Enabled", "Suspended", "" for neither, or the code of a refusal."""
        return str(self._ask_bucket("get_bucket_versioning").get("Status", ""))

    def lifecycle(self) -> tuple[list[Mapping[str, Any]], str]:
        """Return the rules of the bucket, and the code of a refusal, "" where there is none."""
        answer = self._ask_bucket("get_bucket_lifecycle_configuration")
        return answer.get("Rules", []), answer.get("Status", "")

    def _ask_bucket(self, method: str) -> Mapping[str, Any]:
        from botocore.exceptions import ClientError

        with self._translated("ask", "", "s3:GetLifecycleConfiguration"):
            try:
                answer: Mapping[str, Any] = getattr(self._session.client(), method)(
                    Bucket=self.bucket_name
                )
            except ClientError as error:
                if code_of(error) == "NoSuchLifecycleConfiguration":
                    return {}
                return {"Status": code_of(error) or str(status_of(error))}
        return answer

    def remove_versions(self, prefix: str) -> None:
        """Remove what deletions leave of objects in a versioned bucket.

        :raises S3OperationError: when that is not allowed, which a site need not be.
        """
        with self._translated("remove versions", prefix, "s3:DeleteObjectVersion"):
            client = self._session.client()
            pages = client.get_paginator("list_object_versions").paginate(
                Bucket=self.bucket_name, Prefix=self._full_prefix + prefix
            )
            found = [
                {"Key": each["Key"], "VersionId": each["VersionId"]}
                for page in pages
                for each in (*page.get("Versions", ()), *page.get("DeleteMarkers", ()))
            ]
            for each in found:
                client.delete_object(Bucket=self.bucket_name, **each)


class _NotSent(Exception):
    """Has the URL of a request that was only made."""


def _take_down(request: Any, **kwargs: Any) -> None:
    raise _NotSent(request.url)


def trusted_certificates(profile: str | None) -> str:
    """Return the path of the certificates that boto3 trusts where none are configured."""
    from botocore.httpsession import get_cert_path
    from botocore.session import Session

    configured = Session(profile=profile).get_config_variable("ca_bundle")
    return str(configured or get_cert_path(True))
