"""Fixtures of the conformance tests."""

import functools
import gc
import itertools
import tempfile

from botocore.loaders import JSONFileLoader
import pytest

from ..services.location import new_bucket
from .opening import Opener
from .privileges import bound_by_permissions


numbers = itertools.count()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "control: ZODB's own storage in place of ours, to tell whose failure it is"
    )


@pytest.fixture(scope="package", autouse=True)
def boto_descriptions():
    """Descriptions of services are parsed once, not for each of a thousand storages: 0.2 s."""
    load = functools.cache(JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JSONFileLoader, "load_file", lambda self, path: load(path))
        yield


@pytest.fixture(scope="package", autouse=True)
def frozen_heap():
    """What is loaded already is no garbage; each pack of RelStorage would look through it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def permissions():
    """File permissions bind, whoever runs the tests."""
    with bound_by_permissions():
        yield


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch):
    """The test works, and makes its temporary files, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="session")
def bucket(rclone):
    """The bucket of all conformance tests; making one for each would take longer than most run."""
    return new_bucket(rclone)


@pytest.fixture
def opener_of(request):
    """Return the opener of storages of a kind; no server is asked for unless the kind needs one."""
    prefix = f"test-{next(numbers)}/"
    databases = []

    def new_database():
        databases.append(server().new_database())
        return databases[-1]

    def server():
        return request.getfixturevalue("postgresql")

    def opener_of(kind):
        location = request.getfixturevalue("bucket") if kind.s3 else None
        if "postgresql" in kind.layers:
            server()
        zeo = request.getfixturevalue("zeo") if "zeo" in kind.layers else None
        return Opener(kind, location, prefix, new_database, zeo)

    yield opener_of
    for dsn in databases:
        server().drop_database(dsn)
