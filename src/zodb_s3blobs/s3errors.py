"""Translates what boto3 raises into this package's errors; nothing else looks at boto's.

The text of a server's answer may quote a signature or a policy, so messages
are made from its code and status alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .breaker import NotTried
from .interfaces import IntegrityError
from .interfaces import MissingObjectError
from .interfaces import PermanentS3Error
from .interfaces import S3OperationError
from .interfaces import TransientS3Error


INTEGRITY_CODES = frozenset({
    "BadDigest", "InvalidDigest", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch",
})  # fmt: skip
NO_BATCH_DELETE_CODES = frozenset({
    "InvalidArgument", "InvalidRequest", "MalformedXML", "MethodNotAllowed", "MissingContentMD5",
    "NotImplemented",
})  # fmt: skip
_TRANSIENT_CODES = frozenset({
    "BandwidthLimitExceeded", "ConditionalRequestConflict", "ExpiredToken", "IncompleteBody",
    "InternalError", "OperationAborted", "RequestThrottled", "RequestTimeout",
    "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "TooManyRequests",
})  # fmt: skip
_REGION = "set s3-region to the bucket's region"
_REMEDIES = {
    "NoSuchBucket": "check bucket-name and s3-endpoint-url; create the bucket, or set"
    " s3-create-bucket",
    "InvalidBucketName": "check bucket-name",
    "InvalidStorageClass": "check s3-storage-class",
    "AccessDenied": "the object is denied or missing: grant {permission}, and s3:ListBucket so"
    " that a missing object is told apart from a denied one",
    "InvalidAccessKeyId": "check s3-access-key",
    "SignatureDoesNotMatch": "check s3-secret-key",
    "RequestTimeTooSkewed": "set this host's clock",
    "InvalidObjectState": "the object is archived: restore it, and set s3-storage-class",
    "QuotaExceeded": "the bucket's or user's quota is used up",
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "IllegalLocationConstraintException": _REGION,
}


class BodyError(Exception):
    """The body of an answer ended early or differs from what was stored."""

    def __init__(self, kind: type[S3OperationError], message: str) -> None:
        super().__init__(message)
        self.kind = kind


def code_of(error: Any) -> str:
    """Return the server's error code, or "" where there is none."""
    return str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))


def status_of(error: Any) -> int:
    """Return the HTTP status of a server's answer, 0 where there is none."""
    response = getattr(error, "response", None) or {}  # a time-out has None
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def make_error(
    kind: type[S3OperationError], operation: str, key: str | None, reason: str
) -> S3OperationError:
    """Return an error that names what was attempted."""
    error = kind(f"S3 {operation} of {key!r} failed: {reason}")
    error.operation, error.key = operation, key
    return error


@contextmanager
def translated(operation: str, key: str, permission: str) -> Iterator[None]:
    """Turn errors of boto3 and below into an S3OperationError; others pass.

    :param str permission: what the credentials need for the operation.
    """
    from botocore.exceptions import BotoCoreError
    from botocore.exceptions import ClientError

    try:
        yield
    except BodyError as error:
        raise make_error(error.kind, operation, key, str(error)) from error
    except NotTried as error:
        raise make_error(TransientS3Error, operation, key, str(error)) from error
    except ClientError as error:
        raise _from_answer(error, operation, key, permission) from error
    except BotoCoreError as error:
        raise _from_botocore(error, operation, key) from error


def was_silent(error: S3OperationError) -> bool:
    """Tell whether no answer came at all."""
    from botocore import exceptions

    silence = exceptions.ConnectionError, exceptions.HTTPClientError
    return isinstance(error, TransientS3Error) and isinstance(error.__cause__, silence)


def _from_answer(error: Any, operation: str, key: str, permission: str) -> S3OperationError:
    code, status = code_of(error), status_of(error)
    if code in ("NoSuchKey", "NotFound"):
        return make_error(MissingObjectError, operation, key, "no such object")
    if code in INTEGRITY_CODES:
        return make_error(IntegrityError, operation, key, f"other bytes arrived ({code})")
    if code in _TRANSIENT_CODES or (status >= 500 and status != 501) or status in (408, 429):
        return make_error(TransientS3Error, operation, key, f"the server answered {status} {code}")
    if code in ("403", "Forbidden"):
        code = "AccessDenied"  # HEAD answers without a body: its code is the number
    remedy = _REMEDIES.get(code, "see the server's documentation").format(permission=permission)
    if region := error.response.get("Error", {}).get("Region"):
        remedy += f" ({region})"
    if code == "RequestTimeTooSkewed":
        date = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        remedy += f" (the server's is {date})"
    return make_error(PermanentS3Error, operation, key, f"{status} {code}; {remedy}")


def _from_botocore(error: Any, operation: str, key: str) -> S3OperationError:
    from botocore import exceptions

    name = type(error).__name__
    if isinstance(error, exceptions.SSLError):
        reason = f"TLS failed ({name}); check the certificate, or set s3-ca-bundle"
        return make_error(PermanentS3Error, operation, key, reason)
    if isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError)):
        return make_error(TransientS3Error, operation, key, f"S3 cannot be reached ({name})")
    if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
        reason = f"{name}; set s3-access-key and s3-secret-key, a profile or a role"
        return make_error(PermanentS3Error, operation, key, reason)
    if isinstance(error, (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError)):
        return make_error(TransientS3Error, operation, key, f"no credentials just now ({name})")
    remedy = {
        "InvalidRegionError": "check s3-region",
        "ParamValidationError": "check bucket-name",
        "ProfileNotFound": "check s3-profile",
    }.get(name, "see the boto3 documentation")
    return make_error(PermanentS3Error, operation, key, f"boto3 refused it ({name}); {remedy}")
