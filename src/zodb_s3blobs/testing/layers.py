"""Layers for plone.testing and zope.testrunner."""

from typing import Any

from plone.testing import Layer
from plone.testing import zodb
import transaction

from .database import stack_s3blobs
from .server import shared_server


class S3BlobsZODB(Layer):
    """An empty database with blobs in S3, and for each test one of its own on top of it.

    Resources: ``zodbDB``, and during a test ``zodbConnection`` and ``zodbRoot``, as those of
    plone.testing's EMPTY_ZODB; and ``s3blobsServer``. What a layer that stands on this one has
    stored, or has stacked as ``zodbDB``, is below every test's database.
    """

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        # Puts its resources on top of those of the layers that stand on this one: what a layer
        # sets itself stays where it first was, below theirs.
        self._top = Layer(bases=(self,), name=f"{self.__name__} of a test")

    def setUp(self) -> None:
        self["s3blobsServer"] = shared_server()
        self["zodbDB"] = stack_s3blobs(self.get("zodbDB"), name=self.__name__)

    def tearDown(self) -> None:
        self["zodbDB"].close()
        del self["zodbDB"]
        del self["s3blobsServer"]

    def testSetUp(self) -> None:
        self._top["zodbDB"] = stack_s3blobs(self.get("zodbDB"), name=f"{self.__name__} of a test")
        self["zodbConnection"] = self["zodbDB"].open()
        self["zodbRoot"] = self["zodbConnection"].root()
        transaction.begin()

    def testTearDown(self) -> None:
        transaction.abort()
        self["zodbConnection"].close()
        del self["zodbRoot"]
        del self["zodbConnection"]
        self._top["zodbDB"].close()
        del self._top["zodbDB"]


class S3Blobs(Layer):
    """While it is set up, every database that plone.testing stacks keeps its blobs in S3.

    Resource: ``s3blobsServer``. It comes first among the bases of a layer, so that it is set up
    before the others stack theirs.
    """

    def setUp(self) -> None:
        self["s3blobsServer"] = shared_server()
        self._original = zodb.stackDemoStorage
        # Its callers look it up in the module with each call.
        zodb.stackDemoStorage = stack_s3blobs

    def tearDown(self) -> None:
        # Databases that are still open go on: the server ends with the process.
        zodb.stackDemoStorage = self._original
        del self["s3blobsServer"]


S3_BLOBS_ZODB = S3BlobsZODB()
S3_BLOBS = S3Blobs()
