"""What ZODB's own storages and RelStorage pass, storages with blobs in a bucket pass."""

from fnmatch import fnmatchcase
import functools
import zlib

import pytest
import zc.zlibstorage

from . import relstorage_suites
from . import suites
from .cases import by_name
from .cases import run
from .opening import Kind
from .opening import Opener


FILE = functools.partial(Kind, "filestorage")
MAPPING = functools.partial(Kind, "mappingstorage")
HEX = functools.partial(FILE, wrapper="hexstorage")
ZLIB = functools.partial(FILE, wrapper="zlibstorage")
ZLIB_INSIDE = functools.partial(FILE, inside="zlibstorage")
MAPPING_HEX = functools.partial(MAPPING, wrapper="hexstorage")
POSTGRESQL = functools.partial(Kind, "postgresql")
POSTGRESQL_FREE = functools.partial(POSTGRESQL, keep_history=False)
SQLITE = functools.partial(Kind, "sqlite3")
SQLITE_FREE = functools.partial(SQLITE, keep_history=False)
# RelStorage gives the class of its wrapper methods of ZlibStorage, which HexStorage cannot take.
POSTGRESQL_ZLIB = functools.partial(POSTGRESQL, wrapper="zlibstorage")
SQLITE_FREE_ZLIB = functools.partial(SQLITE_FREE, wrapper="zlibstorage")
SQLITE_ZLIB_INSIDE = functools.partial(SQLITE, inside="zlibstorage")

# Suites without blobs run over two, which differ in both respects.
TWO = [POSTGRESQL, SQLITE_FREE]
FOUR = [*TWO, POSTGRESQL_FREE, SQLITE]
ZLIBS = [POSTGRESQL_ZLIB, SQLITE_FREE_ZLIB, SQLITE_ZLIB_INSIDE]

WHAT_RUNS_OVER_WHAT = [
    (suites.filestorage, [FILE, HEX]),
    (suites.recovery, [FILE, HEX]),
    (suites.corruption, [FILE]),
    (suites.external_gc, [FILE]),
    (suites.examples, [FILE]),
    (suites.blobs, [FILE, HEX, ZLIB, ZLIB_INSIDE, POSTGRESQL, SQLITE]),
    (suites.mappingstorage, [MAPPING, MAPPING_HEX]),
    (suites.blobs_without_undo, [MAPPING, POSTGRESQL_FREE, SQLITE_FREE]),
    (relstorage_suites.generic, TWO),
    (relstorage_suites.copies, FOUR),
    (relstorage_suites.packs, TWO),
    (relstorage_suites.conversions, [SQLITE_FREE]),
    (relstorage_suites.blobs, FOUR + ZLIBS),
    (relstorage_suites.blob_packs, FOUR + ZLIBS),
    (relstorage_suites.caches, TWO),
]

WITH_BLOBS = {
    suites.external_gc,
    suites.examples,
    suites.blobs,
    suites.blobs_without_undo,
    relstorage_suites.blobs,
    relstorage_suites.blob_packs,
    relstorage_suites.caches,
}

# (kinds, cases, why they fail)
EXPECTED_FAILURES = [
    (
        "control-mappingstorage",
        "blob_packing_txt",
        "ZODB's BlobStorage keeps only the current revision over a base that cannot undo",
    ),
    (
        "*relstorage-*",
        "blob_transaction_txt",
        "it stores a blob whose serial is text; RelStorage, which refuses that, retells the rest",
    ),
    (
        "*control-relstorage-*",
        "testblob.loadblob_tmpstore",
        "a closed RelStorage has no temporary directory",
    ),
    (
        "*relstorage-*",
        "RelStorageTests.checkUndoMultipleConflictResolutionReversed",
        "RelStorage resolves no conflicts of undo",
    ),
]

# (kinds, cases, why they do not run)
NOT_FOR_US = [
    (
        "*relstorage-*",
        "blob_packing_txt",
        "it takes times of this process for the database's, wants former revisions, and looks at"
        " files, which may stay in a cache; RelStorage retells it",
    ),
    (
        "*relstorage-*",
        "RelStorageTests.checkConfigureViaZConfig",
        "it has a configuration of its own, with a blob-dir of RelStorage's",
    ),
    (
        "*relstorage-sqlite3*",
        "RelStorageTests.checkNoConflict*",
        "RelStorage's ZConfig section ignores a persistent cache over SQLite",
    ),
    (
        "*relstorage-*",
        "RelStorageTests.check_race_external_invalidate_vs_disconnect",
        "it is about ZEO's clients, and takes a minute",
    ),
    (
        "*relstorage-*",
        "RelStorageTests.checkTL_manualInterleavedConflictingReadCurrentDeadlock",
        "it is about locks in the database alone, and takes 6 seconds",
    ),
    (
        "s3-relstorage-*",
        "Convert*.test_new_instance_still_zlib",
        "it looks for attributes of a RelStorage right below zlibstorage",
    ),
    (
        "*relstorage-*",
        "Convert*.test_storage_has_data",
        "it is about FileStorage alone",
    ),
]


def kinds_and_controls(kinds):
    """Return the kinds with blobs in S3 and their controls, each once."""
    made = [make(s3=s3) for make in kinds for s3 in (True, False)]
    return {str(kind): kind for kind in made}.values()


def reasons(table, kind, name):
    """Return the entries of a table that concern a case of a kind."""
    return [each for each in table if fnmatchcase(kind, each[0]) and fnmatchcase(name, each[1])]


def all_cases():
    """Return a pytest parameter for each kind and case."""
    params, met = [], []
    for suite, kinds in WHAT_RUNS_OVER_WHAT:
        for kind in kinds_and_controls(kinds):
            for name in by_name(suite(Opener(kind))):
                marks = [] if kind.s3 else [pytest.mark.control]
                left_out = reasons(NOT_FOR_US, str(kind), name)
                failing = reasons(EXPECTED_FAILURES, str(kind), name)
                marks += [pytest.mark.skip(reason=each[2]) for each in left_out]
                marks += [pytest.mark.xfail(reason=each[2], strict=True) for each in failing]
                met += left_out + failing
                params.append(pytest.param(suite, kind, name, id=f"{kind}-{name}", marks=marks))
    unmet = [each for each in NOT_FOR_US + EXPECTED_FAILURES if each not in met]
    assert not unmet, f"no such cases: {unmet}"
    return params


@pytest.fixture
def compress_everything(monkeypatch):
    """zlibstorage transforms each record, also those that grow."""
    monkeypatch.setattr(
        zc.zlibstorage, "compress", lambda data: data and b".z" + zlib.compress(data)
    )


@pytest.mark.parametrize("suite, kind, name", all_cases())
def test_case(suite, kind, name, opener_of, request):
    """ZODB's or RelStorage's case passes, and then all its blobs are in the bucket."""
    if "zlibstorage" in (kind.wrapper, kind.inside):
        request.getfixturevalue("compress_everything")
    opener = opener_of(kind)
    # Only what is on disk can be opened again.
    looks = kind.s3 and kind.base != "mappingstorage" and suite in WITH_BLOBS
    check = opener.check_bucket if looks else None
    run(*by_name(suite(opener))[name], check)
