"""The key of a blob is one text, and no other text is taken for one."""

import time

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import pytest
from ZODB.TimeStamp import TimeStamp
from ZODB.utils import p64

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.keys import PREFIX


EIGHT_BYTES = st.binary(min_size=8, max_size=8)
STAMPS = st.binary(min_size=16, max_size=16)
ALMOST = st.text("0123456789abcdefABCDEF/.blobs\n ", max_size=50)


@given(EIGHT_BYTES, EIGHT_BYTES | STAMPS)
@example(bytes(8), bytes(8))
@example(b"\xff" * 8, b"\xff" * 8)
@example(bytes(8), bytes(16))
@example(b"\xff" * 8, b"\xff" * 16)
@example(bytes(8), bytes(8) + b"\xff" * 8)
def test_key_of_any_blob_parses_back(oid, name):
    """What a sweep reads from a listing is what the commit meant, a tid or a stamp."""
    assert blob_key(oid, name).startswith(PREFIX)
    assert parse_key(blob_key(oid, name)) == (oid, name)


@given(EIGHT_BYTES, EIGHT_BYTES | STAMPS, EIGHT_BYTES, EIGHT_BYTES | STAMPS)
@example(bytes(8), bytes(8), bytes(8), bytes(16))
@example(bytes(8), b"\1" * 8, bytes(8), bytes(8) + b"\1" * 8)
def test_two_blobs_have_two_keys(oid, name, other_oid, other_name):
    """Nor is the key of a stamp that of a tid with as many zeros before it."""
    same = (oid, name) == (other_oid, other_name)
    assert (blob_key(oid, name) == blob_key(other_oid, other_name)) == same


@given(st.text() | ALMOST | st.builds("blobs/{}/{}.blob".format, ALMOST, ALMOST))
def test_text_that_parses_is_the_key_of_its_blob(text):
    """No two texts stand for one blob: a sweep would judge an object that no read asks for."""
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


def test_key_of_a_stamp_has_all_its_digits():
    """Their number tells it from a tid, which never has as many."""
    assert blob_key(p64(0x1A), bytes(16)) == "blobs/1a/" + 32 * "0" + ".blob"
    stamp = bytes.fromhex("03e0f00d00000000abcdef0123456789")
    assert blob_key(p64(1), stamp) == "blobs/1/03e0f00d00000000abcdef0123456789.blob"


def test_stamp_tells_when_it_was_made():
    """Its first half is a tid of that moment, for operators and for the sweep."""
    before = time.time()
    stamp = new_stamp()
    assert len(stamp) == 16
    assert before - 1 < TimeStamp(stamp[:8]).timeTime() < time.time() + 1


def test_stamps_of_one_moment_differ(monkeypatch):
    """Two processes may upload at the same time, by clocks that stand still."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    stamps = {new_stamp() for _ in range(1000)}
    assert len(stamps) == 1000
    assert len({stamp[:8] for stamp in stamps}) == 1


def test_random_half_of_a_stamp_comes_from_outside():
    """What a test gives it is what it has."""
    assert new_stamp(lambda size: b"r" * size)[8:] == b"r" * 8


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
        "blobs/1/0123456789abcdef0.blob",
        "blobs/1/0123456789abcdef0123456789abcde.blob",
        "blobs/1/0123456789abcdef0123456789abcdef0.blob",
        "blobs/1/0123456789abcdef0123456789abcdeF.blob",
        "blobs/1/0123456789abcdef-0123456789abcdef.blob",
    ],
)
def test_any_other_text_is_no_key(text):
    """A sweep leaves alone what this package did not write."""
    assert parse_key(text) is None
