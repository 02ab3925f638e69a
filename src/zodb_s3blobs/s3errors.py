"""Translates what boto3 raises into this package's errors; nothing else looks at boto's.

The text of a server's answer may quote a signature or a policy, so messages
are made from its code and status alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
import re
import time
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
    "InvalidArgument", "InvalidRequest", "MalformedXML", "MethodNotAllowed", "MissingContentLength",
    "MissingContentMD5", "NotImplemented",
})  # fmt: skip
# The credentials were valid once: a new session may have better ones.
RENEWAL_CODES = frozenset(
    {"ExpiredToken", "InvalidToken", "InvalidTokenId", "TokenRefreshRequired"}
)
_TRANSIENT_CODES = frozenset({
    "BandwidthLimitExceeded", "ClientDisconnect", "ClientDisconnected",
    "ConditionalRequestConflict", "ExpiredToken", "IDPCommunicationError", "IncompleteBody",
    "InternalError", "KMS.ThrottlingException", "OperationAborted", "RequestThrottled",
    "RequestThrottledException", "RequestTimeout", "RequestTimeoutException", "ServiceUnavailable",
    "SlowDown", "ThrottledException", "Throttling", "ThrottlingException", "TokenRefreshRequired",
    "TooManyRequests", "TooManyRequestsException",
    # The parts are gone: the next try uploads them anew.
    "InvalidPart", "NoSuchUpload",
    # Cut behind its head, or a page.
    "404",
    # While the name of a new bucket spreads
    "Redirect", "TemporaryRedirect",
})  # fmt: skip
# Errors of a server that do not go away by themselves: not implemented, disks full.
_LASTING_STATUSES = (501, 505, 507)
_ACCOUNT = "see to the account at the provider"
_CREDENTIALS = "check the credentials: s3-access-key and s3-secret-key, the profile or the role"
_CLOCK = "set this host's clock"
_ELSEWHERE = "something sends on to another address: check s3-endpoint-url, http or https"
_FULL = "the server's disks are full"
_KMS = "check s3-sse-kms-key-id, and that the key exists and is enabled"
_QUOTA = "the bucket's or user's quota is used up"
_REGION = "set s3-region to the bucket's region, and s3-endpoint-url to that region's"
_SIZE = "the server takes no request of that size: set s3-multipart-threshold lower"
_SSE = "check s3-sse, s3-sse-kms-key-id, s3-sse-customer-key and s3-storage-class"
_REMEDIES = {
    "301": _ELSEWHERE,
    "302": _ELSEWHERE,
    "307": _ELSEWHERE,
    "308": _ELSEWHERE,
    "401": _CREDENTIALS,
    "405": "no S3 server has answered: check s3-endpoint-url",
    "413": _SIZE,
    "AccessDenied": "grant {permission}",
    "AccountProblem": _ACCOUNT,
    "AllAccessDisabled": _ACCOUNT,
    "AuthorizationHeaderMalformed": _REGION,
    "EntityTooLarge": _SIZE,
    "EntityTooSmall": "the server wants larger parts: set s3-multipart-part-size higher",
    "IllegalLocationConstraintException": _REGION,
    "InsufficientQuota": _QUOTA,
    "InsufficientStorage": _FULL,
    "InvalidAccessKeyId": "check s3-access-key",
    "InvalidArgument": _SSE,
    "InvalidBucketName": "check bucket-name",
    "InvalidEncryptionAlgorithmError": _SSE,
    "InvalidLocationConstraint": _REGION,
    "InvalidObjectState": "the object is archived: restore it, and set s3-storage-class",
    "InvalidPayer": _ACCOUNT,
    "InvalidRequest": _SSE,
    "InvalidSecurity": _CREDENTIALS,
    "InvalidStorageClass": "check s3-storage-class",
    "InvalidToken": _CREDENTIALS,
    "InvalidTokenId": _CREDENTIALS,
    "InvalidURI": "check s3-prefix",
    "KMS.DisabledException": _KMS,
    "KMS.InvalidKeyUsageException": _KMS,
    "KMS.KMSInvalidStateException": _KMS,
    "KMS.NotFoundException": _KMS,
    "KeyTooLong": "set a shorter s3-prefix",
    "KeyTooLongError": "set a shorter s3-prefix",
    "MethodNotAllowed": "no S3 server has answered: check s3-endpoint-url",
    "MissingContentLength": "set s3-checksum to when_required",
    "NoSuchBucket": "check bucket-name and s3-endpoint-url; create the bucket, or set"
    " s3-create-bucket",
    "NotEntitled": _ACCOUNT,
    "NotImplemented": "the server lacks something that is asked of it: set s3-checksum to"
    " when_required, and check s3-sse and s3-storage-class",
    "NotSignedUp": _ACCOUNT,
    "PermanentRedirect": _REGION,
    "QuotaExceeded": _QUOTA,
    "RequestExpired": _CLOCK,
    "RequestTimeTooSkewed": _CLOCK,
    "SignatureDoesNotMatch": "check s3-secret-key",
    "Unauthorized": _CREDENTIALS,
    "UserSuspended": "the user is suspended: " + _ACCOUNT,
    "XMinioAdminBucketQuotaExceeded": _QUOTA,
    "XMinioStorageFull": _FULL,
}
_HINTS = {"404": " and no reason: check s3-endpoint-url if it goes on"}
# Seconds; S3 refuses a signature that is older.
LARGEST_SKEW = 900
_READING = ("copy", "download", "head", "read", "verify")
# What a server may say in a message of ours: it stands in logs and on pages.
_CODE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,40}")


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
    from urllib3.exceptions import HTTPError

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
    except HTTPError as error:
        # Boto3 reads what is no object where it does not expect that.
        reason = f"the answer was cut ({type(error).__name__})"
        raise make_error(TransientS3Error, operation, key, reason) from error
    except (KeyError, OverflowError, ValueError) as error:
        # Boto3 takes the form of numbers for granted, and so do we.
        reason = f"the answer cannot be read ({type(error).__name__})"
        raise make_error(TransientS3Error, operation, key, reason) from error


def was_silent(error: S3OperationError) -> bool:
    """Tell whether no answer came at all."""
    from botocore import exceptions

    silence = exceptions.ConnectionError, exceptions.HTTPClientError
    return isinstance(error, TransientS3Error) and isinstance(error.__cause__, silence)


def _from_answer(error: Any, operation: str, key: str, permission: str) -> S3OperationError:
    status = status_of(error)
    code = _quote(_CODE, code_of(error) or str(status))
    if code == "NoSuchKey":
        return make_error(MissingObjectError, operation, key, "no such object")
    if code in INTEGRITY_CODES:
        return make_error(IntegrityError, operation, key, f"other bytes arrived ({code})")
    if code in _TRANSIENT_CODES or _is_transient(status):
        reason = f"the server answered {status} {code}{_HINTS.get(code, '')}"
        return make_error(TransientS3Error, operation, key, reason)
    if error.operation_name.startswith("AssumeRole"):
        reason = f"the role was refused ({status} {code}); check it, and who may assume it"
        return make_error(PermanentS3Error, operation, key, reason)
    if code in ("403", "Forbidden"):
        code = "AccessDenied"
    remedy = _REMEDIES.get(code, "see the server's documentation").format(permission=permission)
    if code == "AccessDenied" and operation in _READING:
        remedy = (
            f"the object is denied or missing: {remedy}, and s3:ListBucket so that a missing object"
            " is told apart from a denied one"
        )
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if _REMEDIES.get(code) == _REGION:
        region = error.response["Error"].get("Region") or headers.get("x-amz-bucket-region", "")
        remedy += f" ({_quote(_CODE, region)})"
    if code == "AccessDenied" and _is_wrong(headers.get("date", "")):
        remedy = f"{_CLOCK}, or else {remedy}"
    if _CLOCK in remedy:
        remedy += f" (the server's is {_quote(_DATE, headers.get('date', ''))})"
    return make_error(PermanentS3Error, operation, key, f"{status} {code}; {remedy}")


def _quote(form: "re.Pattern[str]", text: str) -> str:
    return text if form.fullmatch(text) else "unknown"


def _is_wrong(date: str) -> bool:
    """Tell whether a date is so far from this host's clock that servers refuse signatures."""
    try:
        there = parsedate_to_datetime(date).timestamp()
    except (OverflowError, TypeError, ValueError):
        return False
    return abs(there - time.time()) > LARGEST_SKEW


def _is_transient(status: int) -> bool:
    return (status >= 500 and status not in _LASTING_STATUSES) or status in (408, 429)


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
