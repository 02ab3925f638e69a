"""What a configured value may be; each function returns it checked or raises ValueError."""

import base64
import binascii
import re
from urllib.parse import urlsplit


# Seconds; signature version 4 allows no more.
LONGEST_URL = 7 * 86400

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)


def bucket_name(text: str) -> str:
    """Return a bucket name, 3 to 63 characters."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]", text):
        raise ValueError(
            f"a bucket name has 3 to 63 letters, digits, dots and hyphens, not {text!r}"
        )
    return text


def key_prefix(text: str) -> str:
    """Return a key prefix without a slash at its end."""
    prefix = text.removesuffix("/")
    if prefix.startswith("/"):
        raise ValueError(f"a prefix does not begin with a slash: {text!r}")
    if not re.fullmatch(r"[A-Za-z0-9!_.*'()/-]*", prefix):
        raise ValueError(f"a prefix has only letters, digits and !_.*'()-/ : {text!r}")
    if prefix and not {"", ".", ".."}.isdisjoint(prefix.split("/")):
        raise ValueError(f"a prefix has no empty, '.' or '..' segment: {text!r}")
    if len(prefix) > 900:
        raise ValueError("a prefix has up to 900 characters: S3 takes keys of 1024")
    return prefix


def endpoint_url(text: str) -> str:
    """Return the URL of a server: a scheme, a host, perhaps a port and a path."""
    parts = urlsplit(text)
    if "@" in text or parts.query or parts.fragment:
        raise ValueError("an endpoint has no user, password, query or fragment")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"an endpoint is a URL such as https://s3.example.com, not {text!r}")
    parts.port  # noqa: B018  raises ValueError itself when it is no port
    # What boto3 takes, too, but says with the first request.
    if not (_HOST.fullmatch(parts.hostname) or ":" in parts.hostname) or len(parts.hostname) > 253:
        raise ValueError(
            f"a host has only letters, digits and hyphens between its dots, not {parts.hostname!r}"
        )
    return text


def url_seconds(number: int) -> int:
    """Return for how long a presigned URL is valid, a whole number of seconds."""
    if type(number) is not int or not 1 <= number <= LONGEST_URL:
        raise ValueError(
            f"a URL is valid for 1 to {LONGEST_URL} seconds, a whole number, not {number!r}"
        )
    return number


def sse_customer_key(text: str) -> bytes:
    """Return the 32 bytes of an SSE-C key given in base64 or as 32 ASCII characters.

    The message of the error does not quote the key.
    """
    if len(text) == 32 and text.isascii():
        return text.encode("ascii")
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != 32:
        raise ValueError(
            "an SSE-C key is 32 bytes, given in base64 (44 characters) or as 32 ASCII characters"
        )
    return key


def is_confidential(endpoint: str | None, use_ssl: bool) -> bool:
    """Tell whether what is sent to the endpoint stays between it and us."""
    parts = urlsplit(endpoint or "")
    host = parts.hostname or ""
    if host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host):
        return True
    return (parts.scheme or ("https" if use_ssl else "http")) == "https"
