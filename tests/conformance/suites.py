"""ZODB's suites, with storages made by an opener (``opening.Opener``) in place of ZODB's own.

Each function takes the opener and returns a ``unittest.TestSuite``.
"""

from contextlib import closing
import doctest
import functools
from pathlib import Path
import tempfile
import time
from types import SimpleNamespace
from unittest import defaultTestLoader
from unittest import mock
from unittest import TestSuite

from persistent.TimeStamp import TimeStamp
import ZODB
import ZODB.blob
from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf
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
    kind = opener.kind

    def create_storage():
        storage = opener(blob_dir="blobs", pack_gc=False)
        if kind.by_record or "zeo" in kind.layers:
            # What is cached by then may stay; ZEO's own suite empties its cache, too.
            storage.pack = functools.partial(pack_and_forget, storage, storage.pack)
        return storage

    def pack_and_forget(storage, pack, *args):
        pack(*args)
        if "zeo" in kind.layers:
            storage._cache.clear()
        for file in Path("blobs").rglob("*.blob"):
            file.unlink()

    return PackableStorage.IExternalGC_suite(create_storage)


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


class BlobPackTests(util.TestCase):
    """What blob_packing.txt tells of files, told of what can be read without a cache.

    Files may stay in a cache for a while, and a server's tids are not from this process's clock.
    """

    opener = None

    def test_pack_removes_one_revision_after_the_other(self):
        storage = self.opener()
        db = ZODB.DB(storage)
        with closing(db.open()) as connection:
            oid, serials = self.commit_revisions(connection)
        for number, serial in enumerate(serials):
            # To just before the revision; any commit takes longer.
            storage.pack(TimeStamp(serial).timeTime() - 1e-5, referencesf)
            self.check_left(oid, serials, serials[max(0, number - 1) :])
        storage.pack(time.time(), referencesf)
        self.check_left(oid, serials, serials[-1:])
        with db.transaction() as connection:
            del connection.root()["blob"]
        storage.pack(time.time(), referencesf)
        self.check_left(oid, serials, [])
        db.close()

    def commit_revisions(self, connection):
        """Return the oid of a blob and the tids of its five revisions."""
        blob = connection.root()["blob"] = ZODB.blob.Blob()
        serials = []
        for number in range(5):
            with blob.open("w") as file:
                file.write(b"%d" % number)
            connection.transaction_manager.commit()
            blob._p_activate()
            serials.append(blob._p_serial)
        return blob._p_oid, serials

    def check_left(self, oid, serials, expected):
        """Check that exactly these revisions have a blob, and nothing else is in the bucket."""
        with closing(self.opener.open_cold(blob_dir=tempfile.mkdtemp(dir="."))) as cold:
            for number, serial in enumerate(serials):
                if serial in expected:
                    content = Path(cold.loadBlob(oid, serial)).read_bytes()
                    self.assertEqual(content, b"%d" % number)
                else:
                    self.assertRaises(POSKeyError, cold.loadBlob, oid, serial)
        if self.opener.kind.s3:
            self.assertEqual(len(self.opener.keys()), len(expected))


def blob_packs(opener):
    """Packs of blobs where files on disk tell nothing, or not all."""
    return load(BlobPackTests, opener=opener)


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
