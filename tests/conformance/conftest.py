"""Fixtures of the conformance tests."""

import doctest
import functools
import itertools
import shutil
import tempfile

from botocore.loaders import JSONFileLoader
import coverage
import pytest

from ..conftest import fast_directory
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
def parsed_stories():
    """Each case is taken from a suite of its own, which parses all the stories of the suite."""
    parse = functools.cache(doctest.DocTestParser().parse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctest.DocTestParser, "parse", lambda self, *args: list(parse(*args)))
        yield


@pytest.fixture(scope="package", autouse=True)
def no_coverage():
    """What is reached here tells little: what a test of ours does not reach counts as not covered.

    Measured, these cases would take two thirds longer.
    """
    measured = coverage.Coverage.current()
    if measured is not None:
        measured.stop()
    yield
    if measured is not None:
        measured.start()


@pytest.fixture(autouse=True)
def permissions():
    """File permissions bind, whoever runs the tests."""
    with bound_by_permissions():
        yield


@pytest.fixture(scope="session")
def memory():
    """A directory in memory: what these cases are about is not what a disk does."""
    with tempfile.TemporaryDirectory(
        prefix="conformance-", dir=fast_directory(), ignore_cleanup_errors=True
    ) as directory:
        yield directory


@pytest.fixture(autouse=True)
def working_directory(memory, monkeypatch):
    """The test works, and makes its temporary files, in a directory of its own."""
    directory = tempfile.mkdtemp(dir=memory)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(tempfile, "tempdir", directory)
    yield
    monkeypatch.undo()
    shutil.rmtree(directory, ignore_errors=True)


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
