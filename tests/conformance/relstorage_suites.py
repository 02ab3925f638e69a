"""RelStorage's own suites, with storages made by an opener (``opening.Opener``).

Each function takes the opener and returns a ``unittest.TestSuite``.
"""

from contextlib import closing
import functools
import itertools
import os
import tempfile
from types import SimpleNamespace
from unittest import TestLoader
from unittest import TestSuite

from relstorage.blobhelper.interfaces import IAuthoritativeBlobHelper
from relstorage.tests import hftestbase
from relstorage.tests import hptestbase
from relstorage.tests import packundo
from relstorage.tests import reltestbase
from relstorage.tests.blob import testblob
from relstorage.tests.persistentcache import PersistentCacheStorageTests
from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf
from zope.interface import directlyProvides

from .suites import load


HISTORIES = ("HistoryPreserving", "HistoryFree")


def by_history(opener, preserving, free):
    """Return what goes with the kind's history."""
    return preserving if opener.kind.keep_history else free


def load_opened(opener, *case_classes, prefix="test"):
    """Return the suite of classes that make their RelStorages with the opener."""

    def make_storage(self, zap=True, **options):
        options.setdefault("cache_prefix", f"{type(self).__name__}{self._testMethodName}")
        if hasattr(PersistentCacheStorageTests, self._testMethodName):
            options.setdefault("cache_local_dir", os.path.abspath("."))
        options.setdefault("commit_lock_timeout", self.DEFAULT_COMMIT_LOCK_TIMEOUT)
        storage = opener(**options)
        if zap:
            storage.zap_all()
        return storage

    loader = TestLoader()
    loader.testMethodPrefix = prefix
    suite = TestSuite()
    for case_class in case_classes:
        attributes = dict.fromkeys(case_class.__abstractmethods__)
        attributes["make_storage"] = make_storage
        # Another client of the same database, as another process is.
        attributes["_new_storage_client"] = lambda self: opener()
        attributes["keep_history"] = opener.kind.keep_history
        name = functools.reduce(str.removeprefix, HISTORIES, case_class.__name__)
        suite.addTest(loader.loadTestsFromTestCase(type(name, (case_class,), attributes)))
    return suite


def load_checks(opener, *case_classes):
    """Return the suite of classes in which RelStorage overrides ZODB's tests.

    It does so by the names that they had before ZODB 6, which began with "check".
    """
    for base in itertools.chain.from_iterable(each.__mro__ for each in case_classes):
        if base.__module__.startswith("ZODB.tests."):
            for name in [name for name in vars(base) if name.startswith("test")]:
                setattr(base, f"check{name.removeprefix('test')}", vars(base)[name])
    return load_opened(opener, *case_classes, prefix="check")


def generic(opener):
    """All that RelStorage mixes together, from basic storage to the locks of its commit."""
    return load_checks(
        opener,
        by_history(
            opener,
            hptestbase.HistoryPreservingRelStorageTests,
            hftestbase.HistoryFreeRelStorageTests,
        ),
    )


def copies(opener):
    """Copies of whole databases from and to a FileStorage."""
    preserving = (
        hptestbase.HistoryPreservingFromFileStorage,
        hptestbase.HistoryPreservingToFileStorage,
    )
    free = (hftestbase.HistoryFreeFromFileStorage, hftestbase.HistoryFreeToFileStorage)
    return load_checks(opener, *by_history(opener, preserving, free))


def packs(opener):
    """Packs while objects change."""
    return load_opened(
        opener,
        by_history(opener, packundo.HistoryPreservingTestPack, packundo.HistoryFreeTestPack),
    )


def conversions(opener):
    """What the command zodbconvert does, from and to a FileStorage, both below zlibstorage."""

    def header(self):
        return "%import zodb_s3blobs\n%import relstorage\n%import zc.zlibstorage\n"

    def configuration(self, name, path, blob_dir):
        cache = {"cache_prefix": name, "cache_local_dir": os.path.abspath(".")}
        return f"\n{opener.body(name, blob_dir, **cache)}\n"

    source = reltestbase.AbstractRSSrcZodbConvertTests
    target = by_history(
        opener,
        reltestbase.AbstractRSDestHPZodbConvertTests,
        reltestbase.AbstractRSDestHFZodbConvertTests,
    )
    shared = {"_cfg_header": header, "_cfg_relstorage": configuration}
    shared["keep_history"] = opener.kind.keep_history
    suite = TestSuite()
    for name, case_class in [("ConvertFrom", source), ("ConvertTo", target)]:
        attributes = dict.fromkeys(case_class.__abstractmethods__) | shared
        suite.addTest(load(type(name, (case_class,), attributes)))
    return suite


class FilesInCache:
    """What RelStorage's stories of blobs ask a storage's ``blobhelper``, for blobs in a bucket."""

    def __init__(self, storage, blob_dir):
        self.fshelper = storage.fshelper
        self.blob_dir = os.path.abspath(blob_dir)
        self.cache_checker = SimpleNamespace(wait_for_checker=lambda: None)
        # Blobs of former revisions stay until a pack, as in a shared blob directory.
        directlyProvides(self, IAuthoritativeBlobHelper)


def creator(opener):
    """Return a function that opens a storage for RelStorage's stories of blobs."""

    def create(name="data", blob_dir="blobs", blob_cache_size=None, blob_cache_size_check=None):
        storage = opener(name, blob_dir, cache_size=blob_cache_size)
        if opener.kind.s3:
            storage.blobhelper = FilesInCache(storage, blob_dir)
        return storage

    return create


def blobs(opener):
    """RelStorage's stories of blobs, which it took over from ZODB and continued."""
    return testblob.storage_reusable_suite(
        "Rel",
        creator(opener),
        test_blob_storage_recovery=True,
        test_undo=opener.kind.keep_history,
    )


def blob_packs(opener):
    """A blob's revisions go with the packs that take away their records."""
    case_class = by_history(opener, testblob.TestBlobPackingHP, testblob.TestBlobPackingHF)
    attributes = {"create_storage": staticmethod(creator(opener))}
    if opener.kind.s3:
        attributes["testPack"] = lambda self: pack_in_bucket(opener, self)
    return load(case_class, **attributes)


def pack_in_bucket(opener, case):
    """Pack more and more away, and look each time which revisions the bucket still has.

    RelStorage looks for files. Ours are a cache's, and stay there until their room is needed.
    """
    for number, time in enumerate([*case.times, -1]):
        case.blob_storage.pack(time, referencesf)
        check_revisions(opener, case, gone=max(0, number - 1))
    with case.database.transaction() as connection:
        del connection.root()["blob"]
    case.blob_storage.pack(-1, referencesf)
    check_revisions(opener, case, gone=len(case.tids))


def check_revisions(opener, case, gone):
    """Assert that the first revisions are gone from the bucket, and the others are there."""
    if not opener.kind.keep_history:
        gone = max(gone, len(case.tids) - 1)
    with closing(opener(blob_dir=tempfile.mkdtemp(dir="."), read_only=True)) as cold:
        for number, tid in enumerate(case.tids):
            if number < gone:
                case.assertRaises(POSKeyError, cold.loadBlob, case.oid, tid)
            else:
                with open(cold.loadBlob(case.oid, tid), "rb") as file:
                    case.assertEqual(file.read(), b"this is blob data %d" % number)
    case.assertLength(opener.keys(), len(case.tids) - gone)


def caches(opener):
    """Stories of blobs that are not in the cache any more.

    Our cache is as small as RelStorage's own in the control, whose blobs are in the database.
    """
    create = creator(opener)
    small = load(
        testblob.TestBlobCache,
        create_storage=staticmethod(create),
        CLIENT_COUNT=2,
        # The threads of our pool live as long as the storage.
        _wait_for_all_spawned_threads_to_finish=lambda self: None,
    )
    emptied = load(
        testblob.LargeBlobTest,
        create_storage=staticmethod(functools.partial(create, blob_cache_size=1 << 30)),
        testsize=20 << 20,
    )
    return TestSuite([small, emptied])
