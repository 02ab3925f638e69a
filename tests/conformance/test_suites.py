"""What ZODB's own storages, RelStorage and ZEO pass, storages with blobs in a bucket pass."""

from fnmatch import fnmatchcase
from types import SimpleNamespace
import zlib

import pytest
import zc.zlibstorage
import ZODB.DemoStorage

from . import relstorage_suites
from . import suites
from . import zeo_suites
from .cases import by_name
from .cases import run
from .opening import Kind
from .opening import Opener


FILE = Kind("s3 filestorage")
HEX = Kind("hexstorage s3 filestorage")
ZLIB = Kind("zlibstorage s3 filestorage")
ZLIB_INSIDE = Kind("s3 zlibstorage filestorage")
MAPPING = Kind("s3 mappingstorage")
MAPPING_HEX = Kind("hexstorage s3 mappingstorage")
POSTGRESQL = Kind("s3 relstorage postgresql")
POSTGRESQL_FREE = Kind("s3 relstorage postgresql", keep_history=False)
SQLITE = Kind("s3 relstorage sqlite3")
SQLITE_FREE = Kind("s3 relstorage sqlite3", keep_history=False)
# RelStorage gives the class of its wrapper methods of ZlibStorage, which HexStorage cannot take.
POSTGRESQL_ZLIB = Kind("zlibstorage s3 relstorage postgresql")
SQLITE_FREE_ZLIB = Kind("zlibstorage s3 relstorage sqlite3", keep_history=False)
SQLITE_ZLIB_INSIDE = Kind("s3 zlibstorage relstorage sqlite3")

FILE_RECORD = Kind("s3 filestorage", by_record=True)
HEX_RECORD = Kind("hexstorage s3 filestorage", by_record=True)
ZLIB_RECORD = Kind("zlibstorage s3 filestorage", by_record=True)
ZLIB_INSIDE_RECORD = Kind("s3 zlibstorage filestorage", by_record=True)
MAPPING_RECORD = Kind("s3 mappingstorage", by_record=True)
ZEO_CLIENT = Kind("s3 zeo filestorage")
ZEO_CLIENT_ZLIB = Kind("zlibstorage s3 zeo serverzlibstorage filestorage")
ZEO_CLIENT_ZLIB_INSIDE = Kind("s3 zlibstorage zeo serverzlibstorage filestorage")
ZEO_SERVER = Kind("zeo s3 filestorage")
ZEO_SERVER_ZLIB = Kind("zlibstorage zeo serverzlibstorage s3 filestorage")
DEMO_CHANGES = Kind("demostorage s3 filestorage")
DEMO_CHANGES_MAPPING = Kind("demostorage s3 mappingstorage")
DEMO_INSIDE = Kind("s3 demostorage filestorage")

# Suites without blobs run over two, which differ in both respects.
TWO = [POSTGRESQL, SQLITE_FREE]
FOUR = [*TWO, POSTGRESQL_FREE, SQLITE]
ZLIBS = [POSTGRESQL_ZLIB, SQLITE_FREE_ZLIB, SQLITE_ZLIB_INSIDE]

FILES = [FILE, HEX, FILE_RECORD, HEX_RECORD]
BY_TID = [FILE, HEX, ZLIB, ZLIB_INSIDE]
RECORDS = [FILE_RECORD, HEX_RECORD, ZLIB_RECORD, ZLIB_INSIDE_RECORD]
ZEOS = [ZEO_CLIENT, ZEO_SERVER]
ZEOS_ZLIB = [ZEO_CLIENT_ZLIB, ZEO_CLIENT_ZLIB_INSIDE, ZEO_SERVER_ZLIB]
MAPPINGS = [MAPPING, MAPPING_RECORD, DEMO_CHANGES_MAPPING]
DEMOS = [DEMO_CHANGES, DEMO_INSIDE]

WHAT_RUNS_OVER_WHAT = [
    (suites.filestorage, FILES),
    (suites.recovery, FILES),
    (suites.corruption, [FILE, FILE_RECORD]),
    (suites.external_gc, [FILE, FILE_RECORD, *ZEOS]),
    (suites.examples, [FILE, FILE_RECORD]),
    (suites.blobs, [*BY_TID, *RECORDS, *ZEOS, *ZEOS_ZLIB, *DEMOS, POSTGRESQL, SQLITE]),
    (suites.blob_packs, [FILE, *RECORDS, *ZEOS, *ZEOS_ZLIB]),
    (suites.mappingstorage, [MAPPING, MAPPING_HEX, MAPPING_RECORD]),
    (suites.blobs_without_undo, [*MAPPINGS, POSTGRESQL_FREE, SQLITE_FREE]),
    (relstorage_suites.generic, TWO),
    (relstorage_suites.copies, FOUR),
    (relstorage_suites.packs, TWO),
    (relstorage_suites.conversions, [SQLITE_FREE]),
    (relstorage_suites.blobs, FOUR + ZLIBS),
    (relstorage_suites.blob_packs, FOUR + ZLIBS),
    (relstorage_suites.caches, TWO),
    (zeo_suites.generic, ZEOS),
    (zeo_suites.conflicts, ZEOS),
    (zeo_suites.recovery, ZEOS),
    (zeo_suites.blobs, [*ZEOS, *ZEOS_ZLIB]),
    (zeo_suites.blob_cache, [ZEO_SERVER]),
]

WITH_BLOBS = {
    suites.external_gc,
    suites.examples,
    suites.blobs,
    suites.blob_packs,
    suites.blobs_without_undo,
    relstorage_suites.blobs,
    relstorage_suites.blob_packs,
    relstorage_suites.caches,
    zeo_suites.blobs,
    zeo_suites.blob_cache,
}

# (kinds, cases, why they fail)
EXPECTED_FAILURES = [
    (
        "*zeo-*",
        "blob_packing_txt",
        "it looks at files, which stay in a client's cache, and takes times of this process for the"
        " server's; BlobPackTests retells it",
    ),
    (
        "*s3-*-record",
        "blob_packing_txt",
        "it looks at files, which may stay in a cache; BlobPackTests retells it of FileStorages",
    ),
    (
        "*demostorage-*",
        "blob_packing_txt",
        "a DemoStorage whose changes are given cannot be packed: an AttributeError in ZODB 6.4",
    ),
    (
        "*demostorage-*",
        "testblob.packing_with_uncommitted_data_*",
        "a DemoStorage whose changes are given cannot be packed: an AttributeError in ZODB 6.4",
    ),
    (
        "*demostorage-*",
        "RecoveryBlobStorage.testSimpleBlobRecovery",
        "a DemoStorage restores nothing",
    ),
    (
        "*control-zeo-*",
        "RecoveryBlobStorage.testSimpleBlobRecovery",
        "ZEO's clients restore no blobs",
    ),
    (
        "*zeo-*s3-*",
        "RecoveryBlobStorage.testSimpleBlobRecovery",
        "ZEO's clients restore no blobs",
    ),
    (
        "*zlibstorage-*zeo-*",
        "BlobTests.checkTransactionBufferCleanup",
        "the record that it stores is text",
    ),
    (
        "s3-zeo-*",
        "BlobTests.checkTransactionBufferCleanup",
        "the record that it stores is text",
    ),
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

# (kinds, cases, why they are left to ``-m long``)
LONG = [
    (
        "*",
        "*_race_external_invalidate_vs_disconnect",
        "64 threads open connections all the time, at switches each 5 us: a minute over ZEO",
    ),
]

# (kinds, cases, why they do not run)
NOT_FOR_US = [
    (
        "s3-zeo-*",
        "FullGenericTests.checkCommitLockVote*",
        "it calls the server's vote past our storage, whose own begins the transaction there",
    ),
    (
        "s3-zeo-*",
        "FullGenericTests.checkSecondBeginFails",
        "it expects that a transaction waits for another one's end before its vote",
    ),
    (
        "s3-zeo-*",
        "FullGenericTests.checkIteratorGCStorageTPCAborting",
        "it expects that ZEO's client hears of a transaction that ends before its vote",
    ),
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
    return dict.fromkeys(each for kind in kinds for each in (kind, kind.control()))


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
                marks += [pytest.mark.long for each in reasons(LONG, str(kind), name)]
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


@pytest.fixture
def ascending_oids(monkeypatch):
    """A DemoStorage begins with the oid that the suites look for, and not anywhere."""
    first = SimpleNamespace(randint=lambda low, high: low)
    monkeypatch.setattr(ZODB.DemoStorage, "random", first)


@pytest.mark.parametrize("suite, kind, name", all_cases())
def test_case(suite, kind, name, opener_of, request):
    """A case of ZODB, RelStorage or ZEO passes, and then all its blobs are in the bucket."""
    if "zlibstorage" in kind.layers:
        request.getfixturevalue("compress_everything")
    if "demostorage" in kind.layers:
        request.getfixturevalue("ascending_oids")
    opener = opener_of(kind)
    # Only what is on disk can be opened again.
    looks = kind.s3 and "mappingstorage" not in kind.layers and suite in WITH_BLOBS
    check = opener.check_bucket if looks else None
    run(*by_name(suite(opener))[name], check)
