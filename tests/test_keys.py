"""The key of a blob revision is one text, and no other text is taken for one."""

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import pytest

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key


EIGHT_BYTES = st.binary(min_size=8, max_size=8)
ALMOST = st.text("0123456789abcdefABCDEF/.blobs\n ", max_size=50)


@given(EIGHT_BYTES, EIGHT_BYTES)
@example(bytes(8), bytes(8))
@example(b"\xff" * 8, b"\xff" * 8)
def test_key_of_any_revision_parses_back(oid, tid):
    """What a sweep reads from a listing is what the commit meant."""
    assert parse_key(blob_key(oid, tid)) == (oid, tid)


@given(st.text() | ALMOST | st.builds("blobs/{}/{}.blob".format, ALMOST, ALMOST))
def test_text_that_parses_is_the_key_of_its_revision(text):
    """No two texts stand for one revision: a sweep would judge an object that no read asks for."""
    parsed = parse_key(text)
    assert parsed is None or blob_key(*parsed) == text


@pytest.mark.parametrize(
    ("oid", "tid", "key"),
    [
        (0, 0, "blobs/0/0.blob"),
        (0x1A, 0x3E0F00D, "blobs/1a/3e0f00d.blob"),
        (2**64 - 1, 2**63, "blobs/ffffffffffffffff/8000000000000000.blob"),
    ],
)
def test_key_has_lower_case_hex_without_leading_zeros(oid, tid, key):
    """Existing buckets stay readable: the layout is fixed."""
    assert blob_key(oid.to_bytes(8, "big"), tid.to_bytes(8, "big")) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "blobs/1/2",
        "blobs/1/2.blob\n",
        "\nblobs/1/2.blob",
        "blobs/01/2.blob",
        "blobs/1/02.blob",
        "blobs/00/2.blob",
        "blobs/A/2.blob",
        "blobs/1/2.BLOB",
        "blobs/1/2xblob",
        "blobs//2.blob",
        "blobs/1/.blob",
        "blobs/-1/2.blob",
        "blobs/1/2/3.blob",
        "blobs/0x1/2.blob",
        "blobs/1_0/2.blob",
        "blobs/\u0661/2.blob",
        "/blobs/1/2.blob",
        "prefix/blobs/1/2.blob",
        "blobs/10000000000000000/2.blob",
        "blobs/1/10000000000000000.blob",
        "blobs/1/0123456789abcdef0123456789abcdef.blob",
    ],
)
def test_any_other_text_is_no_key(text):
    """A sweep leaves alone what this package did not write."""
    assert parse_key(text) is None
