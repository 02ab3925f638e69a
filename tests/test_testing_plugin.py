"""The pytest plugin, as the author of an add-on uses it: by its entry point, in its own process."""

import subprocess
import sys

import pytest

from zodb_s3blobs.testing import database  # noqa: F401  # a run inside this process shares it

from .services.process import listens
from .services.process import wait_until
from .services.readme import example


pytest_plugins = ["pytester"]

WRITE = """
import transaction
from ZODB.blob import Blob

def write(database):
    with database.transaction() as connection:
        assert "blob" not in connection.root()
        connection.root()["blob"] = Blob(b"bytes")
"""


@pytest.fixture
def suite(rclone, pytester):
    """Return a function that writes a test module and runs it; needs rclone."""

    def run(source, *arguments, conftest="", inside=False):
        pytester.makeconftest(conftest)
        pytester.makepyfile(WRITE + source)
        runner = pytester.runpytest_inprocess if inside else pytester.runpytest_subprocess
        return runner("-p", "no:cacheprovider", *arguments)

    return run


def test_example_of_the_readme_passes(suite):
    """What we tell people to write works."""
    suite(example("def test_file_is_kept(s3blobs_database")).assert_outcomes(passed=1)


APART = """
import pytest

@pytest.mark.parametrize("number", [1, 2])
def test_database_is_new(number, s3blobs_database, s3blobs_server):
    assert s3blobs_server.keys() == []
    write(s3blobs_database)
    assert len(s3blobs_server.keys()) == 1
"""


@pytest.mark.parametrize("inside", [False, True])
def test_tests_are_apart(suite, inside):
    """Neither records nor objects of one test are there in the next."""
    suite(APART, inside=inside).assert_outcomes(passed=2)


def test_failed_test_does_not_disturb_the_next(suite):
    """A transaction that it left open is aborted, uncommitted blob and all."""
    source = """
def test_that_fails(s3blobs_database):
    s3blobs_database.open().root()["blob"] = Blob(b"uncommitted")
    transaction.savepoint()
    assert False

def test_after_it(s3blobs_database, s3blobs_server):
    assert s3blobs_server.keys() == []
    transaction.commit()
    write(s3blobs_database)
"""
    suite(source).assert_outcomes(failed=1, passed=1)


def test_fixtures_of_one_test_belong_together(suite):
    """The database uses the storage, which is around the base, on the server."""
    source = """
def test_all(s3blobs_database, s3blobs_storage, s3blobs_base, s3blobs_server):
    assert s3blobs_database.storage is s3blobs_storage
    write(s3blobs_database)
    with s3blobs_database.transaction() as connection:
        blob = connection.root()["blob"]
        blob._p_activate()
        assert s3blobs_base.loadSerial(blob._p_oid, blob._p_serial)
    assert len(s3blobs_server.keys()) == 1
    assert type(s3blobs_base).__name__ == "MappingStorage"
"""
    suite(source).assert_outcomes(passed=1)


def test_other_base(suite):
    """The override of the README is used: a FileStorage, in which a change can be undone."""
    source = """
def test_undo(s3blobs_database):
    write(s3blobs_database)
    with s3blobs_database.transaction() as connection:
        connection.root()["blob"].open("w").close()
    s3blobs_database.undo(s3blobs_database.undoLog(0, 1)[0]["id"])
    transaction.commit()
    with s3blobs_database.transaction() as connection:
        assert connection.root()["blob"].open().read() == b"bytes"
"""
    suite(source, conftest=example("def s3blobs_base")).assert_outcomes(passed=1)
    suite(source).assert_outcomes(failed=1)


WITHOUT_RCLONE = """
from importlib import metadata
import pytest
from zodb_s3blobs.testing import server

@pytest.fixture(scope="session", autouse=True)
def without_rclone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "find_program", lambda name: None)
        patch.setattr(metadata, "files", lambda name: None)
        yield
"""


def test_missing_rclone_is_an_error_that_says_what_to_install(suite, tmp_path, monkeypatch):
    """A suite that skipped its tests would pass without having tested anything."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    result = suite(APART, conftest=WITHOUT_RCLONE)
    result.assert_outcomes(errors=2)
    assert list(tmp_path.glob("zodb-s3blobs-*")) == []
    result.stdout.fnmatch_lines("*rclone is missing: pip install 'zodb-s3blobs[[]testing]'")


def test_author_can_choose_to_skip(suite):
    """By an override, as the README says."""
    conftest = """
import pytest

@pytest.fixture(scope="session")
def s3blobs_server():
    pytest.skip("no S3 here")
"""
    suite(APART, conftest=conftest).assert_outcomes(skipped=2)


def test_workers_of_xdist_have_a_server_each(suite, pytester):
    """Each runs all tests, at the same time."""
    source = """
from pathlib import Path

def test_server(s3blobs_server, worker_id):
    Path(worker_id).write_text(s3blobs_server.endpoint_url)
"""
    suite(APART + source, "-n", "2", "--dist", "each").assert_outcomes(passed=6)
    urls = {(pytester.path / worker).read_text() for worker in ("gw0", "gw1")}
    assert len(urls) == 2
    assert not any(listens(url) for url in urls)


def test_server_ends_with_a_killed_pytest(suite, pytester, monkeypatch):
    """Nothing is left to be ended by hand but a directory of temporary files."""
    monkeypatch.setenv("TMPDIR", str(pytester.path))
    source = """
import os
from pathlib import Path

def test_killed(s3blobs_server):
    Path("url").write_text(s3blobs_server.endpoint_url)
    os.kill(os.getpid(), 9)
"""
    assert suite(source).ret == -9
    url = (pytester.path / "url").read_text()
    wait_until(lambda: not listens(url))


def test_suites_that_do_not_use_it_pay_nothing():
    """Pytest imports the plugin wherever the package is installed."""
    code = (
        "import pytest, sys; before = set(sys.modules)\n"
        "import zodb_s3blobs.testing.plugin\n"
        "print(sorted(set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    package = "zodb_s3blobs"
    assert found.stdout == f"{[package, f'{package}.testing', f'{package}.testing.plugin']}\n"


def test_fixtures_explain_themselves(suite):
    """``pytest --fixtures`` lists them with their docstrings."""
    result = suite("", "--fixtures")
    for name, text in (
        ("server", "*server of this process*"),
        ("base", "*storage inside*"),
        ("storage", "*new S3BlobStorage*"),
        ("database", "*new database*"),
    ):
        result.stdout.fnmatch_lines([f"s3blobs_{name}*", text])
