"""The times of a listing, as servers write them."""

import time

import pytest

from zodb_s3blobs.s3listing import read_page


@pytest.mark.parametrize("modified", ["2026-11-20T10:00:00.000Z", "2026-11-20T10:00:00"])
@pytest.mark.parametrize("zone", ["GMT", "-0000"])
def test_times_without_a_zone_are_utc(monkeypatch, modified, zone):
    """An age does not depend on where this process runs: it decides what is deleted."""
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    answer = {
        "ResponseMetadata": {"HTTPHeaders": {"date": f"Fri, 20 Nov 2026 12:00:00 {zone}"}},
        "Contents": [{"Key": "site/blobs/1/2.blob", "Size": 3, "LastModified": modified}],
    }
    (listed,) = read_page(answer, len("site/"))
    monkeypatch.undo()
    time.tzset()
    assert (listed.key, listed.size, listed.age) == ("blobs/1/2.blob", 3, 7200)
