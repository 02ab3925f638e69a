"""ZODB's suites, with storages made by an opener (``opening.Opener``) in place of ZODB's own.

Each function takes the opener and returns a ``unittest.TestSuite``.
"""

import doctest
from types import SimpleNamespace
from unittest import defaultTestLoader
from unittest import mock
from unittest import TestSuite

import ZODB
from ZODB.tests import Corruption
from ZODB.tests import PackableStorage
from ZODB.tests import StorageTestBase
from ZODB.tests import testblob
from ZODB.tests import testFileStorage
from ZODB.tests import testMappingStorage
from ZODB.tests import util
import zope.testing.setupstack


def load(case_class, **attributes):
    """Return the suite of a test class that is changed by ``attributes``."""
    changed = type(case_class.__name__, (case_class,), attributes)
    return defaultTestLoader.loadTestsFromTestCase(changed)


def filestorage(opener):
    """All that testFileStorage mixes together, from basic to read-only storage and the races."""

    def open_(self, **options):
        options = {key: bool(value) for key, value in options.items()}
        self._storage = opener("FileStorageTests", **options)

    return load(testFileStorage.FileStorageTests, open=open_)


def mappingstorage(opener):
    """All that testMappingStorage mixes together."""

    def set_up(self):
        StorageTestBase.StorageTestBase.setUp(self)
        self._storage = opener()

    return load(testMappingStorage.MappingStorageTests, setUp=set_up)


def recovery(opener):
    """Copies of whole databases by restore."""

    def set_up(self):
        StorageTestBase.StorageTestBase.setUp(self)
        self._storage = opener("Source")
        self._dst = opener("Dest")

    return load(testFileStorage.FileStorageRecoveryTest, setUp=set_up)


def corruption(opener):
    """A damaged index of the file storage is made anew."""

    def file_storage(path, create=False):
        return opener(path.removesuffix(".fs"), create=bool(create))

    # The cases open their storage themselves, by this name.
    ours = SimpleNamespace(FileStorage=SimpleNamespace(FileStorage=file_storage))

    def run(self, result=None):
        with mock.patch.object(Corruption, "ZODB", ours):
            return Corruption.FileStorageCorruptTests.run(self, result)

    return load(Corruption.FileStorageCorruptTests, run=run)


def external_gc(opener):
    """deleteObject, as an external garbage collector calls it."""
    return PackableStorage.IExternalGC_suite(lambda: opener(pack_gc=False))


def blobs(opener):
    """The suite ZODB offers to other packages that store blobs."""
    return testblob.storage_reusable_suite(
        "",
        opener,
        test_blob_storage_recovery=True,
        test_packing=True,
    )


def blobs_without_undo(opener):
    """The same for bases that neither undo nor restore."""
    return testblob.storage_reusable_suite("", opener, test_packing=True, test_undo=False)


def examples(opener):
    """The examples of testFileStorage that concern storages around it, too."""
    names = ["lastInvalidations", "pack_with_open_blob_files"]

    def file_storage(path, create=False, blob_dir=None):
        return opener(path.removesuffix(".fs"), blob_dir, create=create)

    ours = SimpleNamespace(DB=ZODB.DB, FileStorage=SimpleNamespace(FileStorage=file_storage))
    globs = {**vars(testFileStorage), "ZODB": ours}
    find = doctest.DocTestFinder(recurse=False).find
    return TestSuite(
        doctest.DocTestCase(
            test,
            setUp=zope.testing.setupstack.setUpDirectory,
            tearDown=util.tearDown,
            checker=util.checker,
        )
        for name in names
        for test in find(getattr(testFileStorage, name), f"examples.{name}", globs=globs)
    )
