"""ZEO's own suites, with clients and servers made by an opener (``opening.Opener``).

Each function takes the opener and returns a ``unittest.TestSuite``.
"""

from contextlib import closing
from contextlib import ExitStack
import doctest
import functools
import os
from unittest import mock
from unittest import TestSuite

import ZEO
from ZEO.tests import testZEO
import ZODB.blob
from ZODB.serialize import ObjectWriter
from ZODB.tests import StorageTestBase
from ZODB.tests import util
import zope.testing.setupstack


def load(case_class, **attributes):
    """Return the suite of a test class that is changed by ``attributes``.

    ZEO's methods still have the names that ZODB's had before ZODB 6; ZODB's have them, too, where
    RelStorage's suites were loaded.
    """
    changed = type(case_class.__name__, (case_class,), attributes)
    return TestSuite(changed(name) for name in dir(changed) if is_test(changed, name))


def is_test(case_class, name):
    """Return whether a method is a test by the habits of the package that it is from."""
    if name.startswith("check"):
        owner = next(each for each in case_class.__mro__ if name in vars(each))
        return not owner.__module__.startswith("ZODB.")
    return name.startswith("test")


def load_opened(opener, case_class, server=None, **attributes):
    """Return the suite of a class whose clients are made by the opener.

    :param dict server: options of the server
    """

    def connect(**options):
        blob_dir = os.path.abspath("blob_cache")
        storage = opener(blob_dir=blob_dir, zeo=server or {}, **options)
        storage.registerDB(testZEO.DummyDB())
        return storage

    def set_up(self):
        StorageTestBase.StorageTestBase.setUp(self)
        self._servers = []
        self._storage = connect()
        self.blob_cache_dir = os.path.abspath("blob_cache")

    def open_(self, read_only=0):
        self._storage.close()
        self._storage = connect(read_only=bool(read_only))

    return load(
        case_class,
        setUp=set_up,
        open=open_,
        _new_storage_client=lambda self: connect(),
        **attributes,
    )


def generic(opener):
    """All that ZEO mixes together over a FileStorage, from basic storage to its commit lock."""
    return load_opened(opener, testZEO.FullGenericTests)


def conflicts(opener):
    """Conflicts that the server leaves to its clients."""
    server = {"client_conflict_resolution": "true"}
    return load_opened(opener, testZEO.ClientConflictResolutionTests, server)


def recovery(opener):
    """Copies of whole databases by restore."""

    def new_storage(self):
        storage = opener(f"storage{len(self._servers)}")
        storage.registerDB(testZEO.DummyDB())
        self._servers.append(lambda: None)
        return storage

    return load(testZEO.FileStorageRecoveryTests, _new_storage=new_storage)


class BlobTests(testZEO.CommonBlobTests, testZEO.GenericTestBase):
    """ZEO's cases with blobs, without all the others that ZEO mixes in."""

    checkStoreAndLoadBlob = testZEO.BlobAdaptedFileStorageTests.checkStoreAndLoadBlob


class BucketLayout:
    """Stands in for the layout of the server's blob directory: blobs come from the bucket."""

    def __init__(self, opener):
        self._opener = opener

    def getBlobFilePath(self, oid, tid):
        with closing(self._opener.open_cold()) as cold:
            return cold.loadBlob(oid, tid)


def blobs(opener):
    """ZEO's cases with blobs; what they expect on the server's disk is expected in the bucket.

    Their records become such as a Connection writes, which alone are taken for a blob's.
    """

    def blob_dir_of_server(self):
        served = opener.served()
        return "" if opener.kind.s3 else f"{served.server.directory}/{served.name}.blobs"

    def run(self, result=None):
        with ExitStack() as patches:
            pickle = ObjectWriter().serialize
            patches.enter_context(mock.patch.object(StorageTestBase, "zodb_pickle", pickle))
            if opener.kind.s3:
                layout = functools.partial(BucketLayout, opener)
                patches.enter_context(mock.patch.object(ZODB.blob, "BushyLayout", layout))
            return BlobTests.run(self, result)

    return load_opened(opener, BlobTests, blobdir=property(blob_dir_of_server), run=run)


def blob_cache(opener):
    """A story of the cache that clients have of the server's blobs."""

    def set_up(test):
        util.setUp(test)
        opener().close()
        served = opener.served()
        client = functools.partial(ZEO.client, storage=served.name)
        patch = mock.patch.object(ZEO, "client", client)
        patch.start()
        zope.testing.setupstack.register(test, patch.stop)
        address = "127.0.0.1", served.server.port
        test.globs["start_server"] = lambda blob_dir: (address, None)

    return doctest.DocFileSuite(
        "zeo_blob_cache.test",
        package=ZEO.tests,
        setUp=set_up,
        tearDown=zope.testing.setupstack.tearDown,
    )
