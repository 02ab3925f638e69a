"""What ZODB's own storages pass, storages with blobs in a bucket pass."""

import functools
import zlib

import pytest
import zc.zlibstorage

from . import suites
from .cases import by_name
from .cases import run
from .opening import Kind


FILE = functools.partial(Kind, "filestorage")
MAPPING = functools.partial(Kind, "mappingstorage")
HEX = functools.partial(FILE, wrapper="hexstorage")
ZLIB = functools.partial(FILE, wrapper="zlibstorage")
ZLIB_INSIDE = functools.partial(FILE, inside="zlibstorage")
MAPPING_HEX = functools.partial(MAPPING, wrapper="hexstorage")

WHAT_RUNS_OVER_WHAT = [
    (suites.filestorage, [FILE, HEX]),
    (suites.recovery, [FILE, HEX]),
    (suites.corruption, [FILE]),
    (suites.external_gc, [FILE]),
    (suites.examples, [FILE]),
    (suites.blobs, [FILE, HEX, ZLIB, ZLIB_INSIDE]),
    (suites.mappingstorage, [MAPPING, MAPPING_HEX]),
    (suites.blobs_without_undo, [MAPPING]),
]

WITH_BLOBS = {suites.external_gc, suites.examples, suites.blobs}

# {(kind, case): why it fails}
EXPECTED_FAILURES = {
    ("control-mappingstorage", "blob_packing_txt"): (
        "ZODB's BlobStorage keeps only the current revision over a base that cannot undo"
    ),
}


def kinds_and_controls(kinds):
    """Return the kinds with blobs in S3 and their controls, each once."""
    made = [make(s3=s3) for make in kinds for s3 in (True, False)]
    return {str(kind): kind for kind in made}.values()


def all_cases():
    """Return a pytest parameter for each kind and case."""
    params, unmet = [], set(EXPECTED_FAILURES)
    for suite, kinds in WHAT_RUNS_OVER_WHAT:
        names = list(by_name(suite(None)))
        for kind in kinds_and_controls(kinds):
            for name in names:
                marks = [] if kind.s3 else [pytest.mark.control]
                if (str(kind), name) in EXPECTED_FAILURES:
                    unmet.remove((str(kind), name))
                    reason = EXPECTED_FAILURES[str(kind), name]
                    marks.append(pytest.mark.xfail(reason=reason, strict=True))
                params.append(pytest.param(suite, kind, name, id=f"{kind}-{name}", marks=marks))
    assert not unmet, f"no such case: {unmet}"
    return params


@pytest.fixture
def compress_everything(monkeypatch):
    """zlibstorage transforms each record, also those that grow."""
    monkeypatch.setattr(
        zc.zlibstorage, "compress", lambda data: data and b".z" + zlib.compress(data)
    )


@pytest.mark.parametrize("suite, kind, name", all_cases())
def test_case(suite, kind, name, opener_of, compress_everything):
    """ZODB's case passes, and then all its blobs are in the bucket."""
    opener = opener_of(kind)
    check = opener.check_bucket if kind.s3 and suite in WITH_BLOBS else None
    run(*by_name(suite(opener))[name], check)
