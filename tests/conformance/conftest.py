"""Fixtures of the conformance tests."""

import itertools
import tempfile

import pytest

from ..services.location import new_bucket
from .opening import Opener
from .privileges import bound_by_permissions


numbers = itertools.count()


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "control: ZODB's own storage in place of ours, to tell whose failure it is"
    )


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

    def opener_of(kind):
        location = request.getfixturevalue("bucket") if kind.s3 else None
        return Opener(kind, location, prefix)

    return opener_of
