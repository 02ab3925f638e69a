"""The pytest plugin: a storage and a database for each test, over an embedded S3.

pytest imports it in every environment that has the package, so it imports nothing else.
"""

from collections.abc import Iterator
from typing import Any
from typing import TYPE_CHECKING

import pytest


if TYPE_CHECKING:
    from .server import EmbeddedS3


@pytest.fixture(scope="session")
def s3blobs_server() -> "EmbeddedS3":
    """The S3 server of this process, an `EmbeddedS3`.

    Without rclone every test that needs it is an error: a suite that skips them passes without
    having tested anything. Who prefers that overrides this fixture and calls `pytest.skip`.
    """
    from .process import ServiceMissing
    from .server import shared_server

    try:
        return shared_server()
    except ServiceMissing as missing:
        pytest.fail(str(missing), pytrace=False)


@pytest.fixture
def s3blobs_base() -> Any:
    """The storage inside: a new MappingStorage. Override it to use another one."""
    from ZODB.MappingStorage import MappingStorage

    return MappingStorage()


@pytest.fixture
def s3blobs_storage(s3blobs_server: "EmbeddedS3", s3blobs_base: Any) -> Iterator[Any]:
    """A new S3BlobStorage around `s3blobs_base`; it is closed, and its objects are removed."""
    from .database import open_storage

    with open_storage(s3blobs_server, s3blobs_base) as storage:
        yield storage


@pytest.fixture
def s3blobs_database(s3blobs_storage: Any) -> Iterator[Any]:
    """A new database over `s3blobs_storage`; in the end its transactions are aborted."""
    from ZODB.DB import DB

    database = DB(s3blobs_storage)
    try:
        yield database
    finally:
        database.close()
