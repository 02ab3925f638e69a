"""A wrong value is refused with a message that says what a right one is."""

import base64

import pytest

from zodb_s3blobs import values


KEY = b"\x00\xffK" * 10 + b"\x80\x81"
ASCII_KEY = "0123456789abcdef0123456789abcde!"


@pytest.mark.parametrize(
    "name", ["abc", "my-bucket", "a.b.c", "0ab", "x" * 63, "Old_Style", "a--b"]
)
def test_bucket_name_that_servers_accept_is_returned(name):
    """Also the upper case and underscores that old buckets have."""
    assert values.bucket_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "ab", "x" * 64, "-ab", "ab-", ".ab", "a/b", "a b c", "abc\n", "b\u00fccket", "s3://abc"],
)
def test_bucket_name_that_no_server_accepts_is_refused(name):
    """Servers answer such names with errors that do not name the cause."""
    with pytest.raises(ValueError, match="3 to 63 letters"):
        values.bucket_name(name)


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("", ""),
        ("site", "site"),
        ("site/", "site"),
        ("my/site-1/blobs_of.it", "my/site-1/blobs_of.it"),
        ("!_.*'()-", "!_.*'()-"),
        ("...", "..."),
    ],
)
def test_prefix_is_returned_without_slash_at_its_end(text, prefix):
    """The slash between prefix and key is ours."""
    assert values.key_prefix(text) == prefix


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("/site", "begin with a slash"),
        ("//", "begin with a slash"),
        ("..", "segment"),
        ("../other", "segment"),
        ("site/../other", "segment"),
        ("site/.", "segment"),
        ("a//b", "segment"),
        ("a//", "segment"),
        ("a b", "letters"),
        ("a\\b", "letters"),
        ("a\n", "letters"),
        ("caf\u00e9", "letters"),
        ("a?b", "letters"),
        ("a%2fb", "letters"),
        ("a#b", "letters"),
        ("a{b}", "letters"),
    ],
)
def test_prefix_that_leads_elsewhere_is_refused(text, reason):
    """Servers and proxies would fold such a path, and another site's blobs would lie there."""
    with pytest.raises(ValueError, match=reason):
        values.key_prefix(text)


@pytest.mark.parametrize(
    "url",
    [
        "https://s3.example.com",
        "http://127.0.0.1:9000",
        "https://[::1]:9000/",
        "HTTPS://S3.EXAMPLE.COM",
        "https://gateway.example.com/s3",
    ],
)
def test_endpoint_that_is_a_url_is_returned(url):
    """The text is not changed: boto3 reads it itself."""
    assert values.endpoint_url(url) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "s3.example.com",
        "s3.example.com:9000",
        "//s3.example.com",
        "ftp://s3.example.com",
        "https://",
        "https:s3.example.com",
        "https://:9000",
    ],
)
def test_endpoint_that_is_no_url_is_refused(text):
    """The message shows what one looks like."""
    with pytest.raises(ValueError, match=r"such as https://s3\.example\.com"):
        values.endpoint_url(text)


@pytest.mark.parametrize(
    "host", ["minio_s3:9000", "x y", "-s3.example.com", "s3-.example.com", "s3..example.com"]
)
def test_endpoint_with_a_host_that_boto3_refuses_is_refused(host):
    """It would do so with the first commit."""
    with pytest.raises(ValueError, match="letters, digits and hyphens"):
        values.endpoint_url(f"http://{host}")


@pytest.mark.parametrize(
    "url", ["https://s3.example.com:port", "https://s3.example.com:99999", "https://[::1"]
)
def test_endpoint_with_a_port_or_host_that_cannot_be_is_refused(url):
    """Python's own words are clear enough."""
    with pytest.raises(ValueError):
        values.endpoint_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hunter2@s3.example.com",
        "https://user@s3.example.com",
        "https://s3.example.com?token=hunter2",
        "https://s3.example.com#hunter2",
        "ftp://user:hunter2@s3.example.com",
        "https://user:hunter2@",
        "user:hunter2@s3.example.com",
        "https://user:hunter2@s3.example.com:port",
    ],
)
def test_endpoint_with_credentials_is_refused_without_quoting_them(url):
    """A start-up log is read by many."""
    with pytest.raises(ValueError) as caught:
        values.endpoint_url(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (base64.b64encode(KEY).decode(), KEY),
        (ASCII_KEY, ASCII_KEY.encode()),
        # Base64 of 24 bytes, and 32 characters: the latter decides.
        ("A" * 32, b"A" * 32),
    ],
)
def test_sse_customer_key_is_taken_in_both_forms(text, key):
    """32 bytes come out, whichever way they were written."""
    assert values.sse_customer_key(text) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2",
        ASCII_KEY[:31],
        ASCII_KEY + "f",
        "\u00fc" * 32,
        base64.b64encode(KEY).decode().rstrip("="),
        base64.b64encode(KEY[:31]).decode(),
        base64.b64encode(KEY + b"x").decode(),
        base64.b64encode(KEY).decode() + "\n",
        KEY.hex(),
    ],
)
def test_sse_customer_key_of_another_length_is_refused_without_quoting_it(text):
    """Half a secret key in a log is a secret lost."""
    with pytest.raises(ValueError, match="32 bytes, given in base64") as caught:
        values.sse_customer_key(text)
    error = caught.value
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert not text or text not in str(error)


@pytest.mark.parametrize(
    ("endpoint", "use_ssl", "confidential"),
    [
        (None, True, True),
        (None, False, False),
        ("https://s3.example.com", True, True),
        ("https://s3.example.com", False, True),
        ("http://s3.example.com", True, False),
        ("http://localhost:9000", False, True),
        ("http://127.0.0.1", False, True),
        ("http://127.1.2.3:80", False, True),
        ("http://[::1]:9000", False, True),
        ("http://127.0.0.1.example.com", False, False),
        ("http://127.example.com", False, False),
        ("http://localhost.example.com", False, False),
        ("http://10.0.0.1", False, False),
    ],
)
def test_only_https_and_loopback_are_confidential(endpoint, use_ssl, confidential):
    """A key for SSE-C goes over no wire that others can read."""
    assert values.is_confidential(endpoint, use_ssl) is confidential
