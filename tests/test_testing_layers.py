"""The layers, in this process and as zope.testrunner runs the tests of an add-on."""

from contextlib import closing
from contextlib import contextmanager
from contextlib import ExitStack
import os
import subprocess
import sys
import textwrap

from plone.testing import Layer
from plone.testing import zodb
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.DemoStorage import DemoStorage

from zodb_s3blobs.testing.layers import S3Blobs
from zodb_s3blobs.testing.layers import S3BlobsZODB

from .services.readme import example


pytestmark = pytest.mark.usefixtures("rclone")  # it is installed


@contextmanager
def set_up(*layers):
    """Set layers up in this order, as a test runner does; tear them down in the end."""
    with ExitStack() as stack:
        for layer in layers:
            layer.setUp()
            stack.callback(layer.tearDown)
        yield layers[-1]


@contextmanager
def test_of(*layers):
    """Do what a test runner does around a test, for a layer that comes after its bases."""
    for layer in layers:
        layer.testSetUp()
    try:
        yield layers[-1]
    finally:
        for layer in reversed(layers):
            layer.testTearDown()


test_of.__test__ = False


class Content(Layer):
    """Stands on another layer and stacks a database with a blob, as plone.app.testing does."""

    def setUp(self):
        self["zodbDB"] = zodb.stackDemoStorage(self.get("zodbDB"), name="Content")
        with self["zodbDB"].transaction() as connection:
            connection.root()["content"] = Blob(b"content")

    def tearDown(self):
        self["zodbDB"].close()
        del self["zodbDB"]


class Functional(Layer):
    """Stacks a database for each test, as zope.FunctionalTesting does."""

    def testSetUp(self):
        self["zodbDB"] = zodb.stackDemoStorage(self.get("zodbDB"), name="Functional")

    def testTearDown(self):
        self["zodbDB"].close()
        del self["zodbDB"]


def names_in(database):
    with database.transaction() as connection:
        return sorted(connection.root())


def test_each_test_has_a_database_of_its_own():
    """Neither what it committed nor what it did not is there in the next, or in the layer's."""
    with set_up(S3BlobsZODB()) as layer:
        for _ in range(2):
            with test_of(layer):
                assert names_in(layer["zodbDB"]) == []
                layer["zodbRoot"]["committed"] = Blob(b"")
                transaction.commit()
                assert len(layer["s3blobsServer"].keys()) == 1
                layer["zodbRoot"]["uncommitted"] = Blob(b"")
            assert layer["s3blobsServer"].keys() == []
            assert names_in(layer["zodbDB"]) == []
            assert "zodbConnection" not in layer
            assert "zodbRoot" not in layer
    assert "zodbDB" not in layer
    assert "s3blobsServer" not in layer


def test_what_a_layer_stored_is_below_each_test():
    """A layer may write into the database of the one it stands on."""
    with set_up(S3BlobsZODB()) as layer:
        with layer["zodbDB"].transaction() as connection:
            connection.root()["content"] = Blob(b"content")
        for _ in range(2):
            with test_of(layer):
                assert list(layer["zodbRoot"]) == ["content"]
                with layer["zodbRoot"]["content"].open("w") as file:
                    file.write(b"changed")
                transaction.commit()
        with layer["zodbDB"].transaction() as connection:
            assert connection.root()["content"].open().read() == b"content"


@pytest.mark.parametrize("in_s3", [False, True])
def test_what_a_layer_stacked_is_below_each_test(in_s3):
    """Also where plone.testing's own DemoStorage was stacked, which closes what is below it."""
    base = S3BlobsZODB()
    content = Content(bases=(base,), name="Content")
    functional = Functional(bases=(content,), name="Functional")
    with set_up(*([S3Blobs()] if in_s3 else []), base):
        for _ in range(2):  # another layer may have stood on it before
            with set_up(content):
                for _ in range(2):
                    with test_of(base, content):
                        assert names_in(content["zodbDB"]) == ["content"]
                        assert content["zodbDB"] is base["zodbDB"]
                        content["zodbRoot"]["mine"] = Blob(b"")
                        transaction.commit()
                    with test_of(base, content, functional):
                        assert names_in(functional["zodbDB"]) == ["content"]
                assert names_in(content["zodbDB"]) == ["content"]
        with test_of(base):
            assert list(base["zodbRoot"]) == []


def test_stacked_databases_keep_their_blobs_in_s3():
    """Whoever calls plone.testing's function gets ours while the layer is set up, and not after."""
    original = zodb.stackDemoStorage
    with set_up(S3Blobs()) as layer:
        server = layer["s3blobsServer"]
        with closing(zodb.stackDemoStorage(name="bottom")) as bottom:
            assert bottom.storage.getName() == "bottom"
            with bottom.transaction() as connection:
                connection.root()["blob"] = Blob(b"")
            assert len(server.keys()) == 1
            with closing(zodb.stackDemoStorage(bottom)) as top:
                assert names_in(top) == ["blob"]
    assert zodb.stackDemoStorage is original
    assert "s3blobsServer" not in layer


def test_database_that_outlives_the_layer_can_be_used():
    """PLONE_FIXTURE stays when the next tests need it, and not S3_BLOBS."""
    with set_up(S3Blobs()):
        database = zodb.stackDemoStorage()
    with closing(database):
        with database.transaction() as connection:
            connection.root()["blob"] = Blob(b"bytes")
        with closing(zodb.stackDemoStorage(database)) as top:
            assert type(top.storage) is DemoStorage
            with top.transaction() as connection:
                assert connection.root()["blob"].open().read() == b"bytes"
        assert names_in(database) == ["blob"]


RUNNER = [sys.executable, "-m", "zope.testrunner", "--tests-pattern", "^tests", "-vv"]


def run_tests(tmp_path, *modules, status=0):
    """Run modules as the tests of an add-on in zope.testrunner; return what it printed."""
    package = tmp_path / "addon"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for number, source in enumerate(modules):
        (package / f"tests{number}.py").write_text(textwrap.dedent(source))
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [*RUNNER, "--test-path", tmp_path],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    assert os.listdir(tmp_path / "tmp") == []
    return done.stdout


def test_example_of_the_readme_passes(tmp_path):
    """What we tell people to write works."""
    printed = run_tests(tmp_path, example("layer = S3_BLOBS_ZODB"))
    assert "Ran 1 tests with 0 failures, 0 errors" in printed


def test_failing_test_leaves_nothing_behind(tmp_path):
    """The runner reports it; `run_tests` looks for what remains."""
    source = example("layer = S3_BLOBS_ZODB").replace("keys()), 1)", "keys()), 2)")
    printed = run_tests(tmp_path, source, status=1)
    assert "Ran 1 tests with 1 failures, 0 errors" in printed


STAND_INS = '''\
"""What plone.app.testing 8 does with databases, without Plone."""

from plone.testing import Layer
from plone.testing import zodb
from ZODB.blob import Blob


class Stacking(Layer):
    def setUp(self):
        self["zodbDB"] = zodb.stackDemoStorage(self.get("zodbDB"), name=self.__name__)

    def tearDown(self):
        self["zodbDB"].close()
        del self["zodbDB"]


class Startup(Stacking):
    pass


STARTUP = Startup()


class PloneFixture(Stacking):
    defaultBases = (STARTUP,)

    def setUp(self):
        super().setUp()
        with self["zodbDB"].transaction() as connection:
            connection.root()["plone"] = Blob(b"of the site")


PLONE_FIXTURE = PloneFixture()


class PloneSandboxLayer(Stacking):
    defaultBases = (PLONE_FIXTURE,)


class FunctionalTesting(Layer):
    def testSetUp(self):
        self["zodbDB"] = zodb.stackDemoStorage(self.get("zodbDB"), name="FunctionalTest")
        self["connection"] = self["zodbDB"].open()
        self["app"] = self["connection"].root()

    def testTearDown(self):
        import transaction

        transaction.abort()
        self["connection"].close()
        del self["app"]
        del self["connection"]
        self["zodbDB"].close()
        del self["zodbDB"]
'''

ADDON_TESTS = """
import unittest
import transaction
from ZODB.blob import Blob

class TestAddon(unittest.TestCase):
    layer = ADDON_FUNCTIONAL

    def test_one(self):
        app, server = self.layer["app"], self.layer["s3blobsServer"]
        self.assertEqual(list(app), ["plone"])
        self.assertEqual(app["plone"].open().read(), b"of the site")
        before = server.keys()
        self.assertEqual(len(before), OF_THE_FIXTURE)
        app["mine"] = Blob(b"mine")
        transaction.commit()
        (key,) = set(server.keys()) - set(before)
        self.assertTrue(key.endswith(".blob"), key)
        self.assertEqual(app["mine"].open().read(), b"mine")
        with app["plone"].open("w") as file:
            file.write(b"changed")
        transaction.commit()
        self.layer["zodbDB"].pack()
        self.assertEqual(app["plone"].open().read(), b"changed")

    test_two = test_one
"""

PLAIN_TESTS = """
import unittest
import transaction
from ZODB.blob import Blob
from plone.app.testing import FunctionalTesting, PLONE_FIXTURE

PLAIN = FunctionalTesting(bases=(PLONE_FIXTURE,), name="Plain")

class TestPlain(unittest.TestCase):
    layer = PLAIN

    def test_without_s3(self):
        app = self.layer["app"]
        self.assertNotIn("s3blobsServer", self.layer)
        self.assertEqual(list(app), ["plone"])
        app["mine"] = Blob(b"mine")
        transaction.commit()
        self.assertEqual(app["mine"].open().read(), b"mine")
        self.assertEqual(app["plone"].open().read(), b"of the site")
"""


@pytest.fixture
def plone_app_testing(tmp_path):
    """A package of this name, for zope.testrunner in tmp_path."""
    package = tmp_path / "plone" / "app" / "testing"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_INS)


@pytest.mark.usefixtures("plone_app_testing")
def test_addon_runs_on_s3(tmp_path):
    """Alone, the fixture of the README has its database there too."""
    addon = example("class AddonLayer") + ADDON_TESTS.replace("OF_THE_FIXTURE", "1")
    printed = run_tests(tmp_path, addon)
    assert "Ran 2 tests with 0 failures, 0 errors" in printed


@pytest.mark.usefixtures("plone_app_testing")
def test_addon_runs_on_s3_after_tests_that_do_not(tmp_path):
    """The fixture that they have set up keeps its blobs outside, and they are read."""
    addon = example("class AddonLayer") + ADDON_TESTS.replace("OF_THE_FIXTURE", "0")
    printed = run_tests(tmp_path, PLAIN_TESTS, addon)
    assert printed.index("Running addon.tests0.Plain") < printed.index("Set up zodb_s3blobs")
    assert "Total: 3 tests, 0 failures, 0 errors" in printed
