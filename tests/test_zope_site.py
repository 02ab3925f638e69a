"""A real Zope, from a zope.conf as the pages show it, asked over HTTP."""

from contextlib import closing
from dataclasses import replace
import os
import shutil
import subprocess
import sys
import threading

import pytest
from ZODB.Connection import TransactionMetaData

from zodb_s3blobs.interfaces import ReadOnlyBucketError
from zodb_s3blobs.operate.configuration import find_database
from zodb_s3blobs.operate.main import main

from .faults import FaultyServer
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.pages import example
from .services.process import wait_until
from .services.zeo import ZeoServer
from .services.zope import DATABASE
from .services.zope import ZopeInstance
from .storages import random_bytes
from .storages import start
from .storages import store_blob


pytestmark = pytest.mark.slow

SMALL = random_bytes("small", 3000)
# In the temporary files of a form, and several pieces of a download
LARGE = random_bytes("large", 3 << 20)


def placed(text, location, directory, **places):
    """Return a configuration of a page with the places of a test.

    :param places: what else stands there, by what it is on the page.
    """
    for shown, here in (
        *places.items(),
        ("my-site-blobs", location.bucket),
        ("https://s3.example.com", location.endpoint_url),
        ("    s3-region eu-central-1\n", ""),
        ("/var/cache/my-site", str(directory)),
        ("/var/lib/my-site", str(directory)),
    ):
        text = text.replace(shown, here)
    return text


def configuration(location, directory, has_source=False):
    """Return the configuration of docs/plone.rst."""
    text = example("plone.rst", "</filestorage>\n    <blobdir-source>")
    if not has_source:
        begin, end = text.index("    <blobdir-source>"), text.index("  </s3blobstorage>")
        text = text[:begin] + text[end:]
    return placed(text, location, directory)


def environ(location):
    """Return the variables that the configuration names."""
    keys = {"S3_ACCESS_KEY": location.access_key, "S3_SECRET_KEY": location.secret_key}
    return {**keys, "DB_PASSWORD": ""}


GRACE = {"    s3-region eu-central-1\n": "    gc-grace 0s\n"}


def over_filestorage(location, directory, request):
    """Return the configuration of the page for a FileStorage."""
    return configuration(location, directory)


def over_zeo(location, directory, request):
    """Return the configuration of the page for a ZEO client, whose server is started as shown."""
    storage = example("plone.rst", "<filestorage 1>").partition("</zeo>\n")[2]
    server = ZeoServer(directory / "zeo", placed(storage, location, directory))
    server.start()
    request.addfinalizer(server.stop)
    address = {"zeo.example.com:8100": server.address}
    return placed(example("plone.rst", "<zeoclient>"), location, directory, **GRACE, **address)


def over_postgresql(location, directory, request):
    """Return the configuration of the page for a RelStorage; with history, to be able to undo."""
    server = request.getfixturevalue("postgresql")
    dsn = server.new_database()
    text = example("plone.rst", "<relstorage>").replace("keep-history false", "keep-history true")
    begin, end = text.index("dsn "), text.index("\n      </postgresql>")
    text = f"{text[:begin]}dsn {dsn}{text[end:]}"
    return placed(text, location, directory, **GRACE)


@pytest.fixture(params=[over_filestorage, over_zeo, over_postgresql])
def instance(request, s3, tmp_path):
    """A running instance."""
    directory = tmp_path / "data"
    os.makedirs(directory)
    text = request.param(s3, directory, request)
    instance = ZopeInstance(tmp_path / "instance", text, environ(s3))
    instance.make_site()
    with instance:
        yield instance


def test_life_of_a_site(s3, instance):
    """Every step of a site's life, every byte right."""
    instance.upload("small", SMALL)
    instance.upload("large", LARGE)
    assert instance.download("small") == SMALL
    assert instance.download("large") == LARGE
    part = instance.request(
        "GET", "site/large/download", headers={"Range": "bytes=1000000-1999999"}
    )
    assert (part.status, part.data) == (206, LARGE[1000000:2000000])

    instance.post("site/large/edit", at="70000", file=("f", b"edited"))
    edited = LARGE[:70000] + b"edited" + LARGE[70006:]
    assert instance.download("large") == edited
    instance.post("site/copy", id="large", new_id="copied")
    assert instance.download("copied") == edited

    instance.delete("small")
    assert instance.request("GET", "site/small/download").status == 404
    instance.undo()
    assert instance.download("small") == SMALL

    instance.upload("small", b"another")
    instance.undo()
    assert instance.download("small") == SMALL

    text = instance.conf.read_text()
    instance.conf.write_text(text.replace("/blobs\n", "/empty-cache\n"))
    instance.restart()
    # A part, before the whole is cached; and by a URL of S3.
    part = instance.request("GET", "site/large/download", headers={"Range": "bytes=69990-70009"})
    assert (part.status, part.data) == (206, edited[69990:70010])
    redirect = instance.request("GET", "site/copied/url")
    assert redirect.status == 302
    assert instance.fetch(redirect.headers["Location"]) == edited
    expected = {"small": SMALL, "large": edited, "copied": edited}
    assert {name: instance.download(name) for name in expected} == expected

    instance.delete("copied")
    instance.pack()
    assert len(keys(s3, "main/blobs/")) == len({"small", "large"})
    del expected["copied"]
    assert {name: instance.download(name) for name in expected} == expected
    assert "Traceback" not in instance.log()


# Moving in


class Visitors:
    """Threads that ask a site for something, again and again, and compare what comes.

    :param visits: what a thread does, over and over, by a name of it.
    """

    def __init__(self, visits):
        self.counts = dict.fromkeys(visits, 0)
        self._ended = threading.Event()
        self._threads = [start(self._go_on, name, visit) for name, visit in visits.items()]

    def _go_on(self, name, visit):
        while not self._ended.is_set():
            visit(self.counts[name])
            self.counts[name] += 1

    def have_come(self, times):
        """Wait until each of them has come so many times more."""
        before = dict(self.counts)
        wait_until(lambda: all(self.counts[name] >= before[name] + times for name in before), 60)

    def end(self):
        """Let them end; the first failure is raised."""
        self._ended.set()
        for thread in self._threads:
            thread.result()


OLD = {f"old{number}": random_bytes(number, 1000 * number) for number in range(1, 81)}
OLD["large"] = LARGE
# Requests of each visitor before the migration goes on
VISITS = 5


def migrate(instance, *arguments):
    """Run the command beside the site, as its user does; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "zodb_s3blobs.operate", "-C", str(instance.conf), *arguments],
        env=instance.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Guests:
    """What visitors do; each of them fails when a request does, or when a byte is wrong."""

    def __init__(self, instance):
        self._instance = instance
        self.edited = {f"edited{number}": b"x" * 5000 for number in range(2)}
        self.new = {}
        self.visits = {
            each.__name__: each for each in (self.store, self.part, self.edit, self.read_all)
        }

    def store(self, count):
        """Upload, copy, delete."""
        content, source = random_bytes(("new", count), 2000), f"old{count % 80 + 1}"
        self._instance.upload(f"new{count}", content)
        self._instance.post("site/copy", id=source, new_id=f"copy{count}")
        stored = {f"new{count}": content, f"copy{count}": OLD[source]}
        assert {name: self._instance.download(name) for name in stored} == stored
        self.new.update(stored)
        if count % 3 == 2:
            self._instance.delete(f"new{count - 1}")
            del self.new[f"new{count - 1}"]

    def part(self, count):
        """Read a part of an old file."""
        path, old = f"site/old{count % 80 + 1}/download", OLD[f"old{count % 80 + 1}"]
        answer = self._instance.request("GET", path, headers={"Range": "bytes=5-99"})
        assert (answer.status, answer.data) == (206, old[5:100])

    def edit(self, count):
        """Change an old file in place."""
        name, text = f"edited{count % 2}", f"{count:05}".encode()
        self._instance.post(f"site/{name}/edit", at="100", file=("f", text))
        self.edited[name] = self.edited[name][:100] + text + self.edited[name][105:]
        assert self._instance.download(name) == self.edited[name]

    def read_all(self, count):
        """Read old files."""
        for name in list(OLD)[count % 7 :: 7]:
            assert self._instance.download(name) == OLD[name]


def test_migration_while_requests_run(s3, tmp_path):
    """From a blob directory into the bucket: not one request fails, and every byte is right."""
    data = tmp_path / "data"
    os.makedirs(data)
    old = placed(example("plone.rst", "blob-dir"), s3, data)
    environment = {**environ(s3), "XDG_STATE_HOME": str(tmp_path / "state")}
    instance = ZopeInstance(tmp_path / "instance", old, environment)
    instance.make_site()
    guests = Guests(instance)
    with instance:
        for name, content in {**OLD, **guests.edited}.items():
            instance.upload(name, content)
    assert keys(s3) == []

    live = configuration(s3, data, has_source=True)
    instance.configure(live)
    with instance, FaultyServer(s3.endpoint_url) as server:
        visitors = Visitors(guests.visits)
        came = []

        def wait_for_visitors(request):
            # In the middle of it, the site goes on.
            came.append(request.method)
            if came.count("PUT") == 20 and request.method == "PUT":
                visitors.have_come(VISITS)

        server.instead = wait_for_visitors
        # The command goes through the server that waits, the site does not.
        behind = instance.conf.with_name("behind.conf")
        behind.write_text(live.replace(s3.endpoint_url, server.endpoint_url))
        migrate(instance, "-C", str(behind), "migrate", "--workers", "4")
        assert came.count("PUT") > len(OLD)
        migrate(instance, "migrate", "--verify")
        visitors.have_come(VISITS)
        visitors.end()
        migrate(instance, "check")
        instance.post("site/old1/edit", at="0", file=("f", b"late"))

    # The directory goes, and the cache: all is in the bucket.
    os.rename(data / "blobstorage", data / "gone")
    shutil.rmtree(data / "blobs")
    instance.configure(configuration(s3, data))
    expected = {**OLD, **guests.edited, **guests.new}
    with instance:
        assert instance.download("old1") == b"late" + OLD["old1"][4:]
        instance.undo()
        assert {name: instance.download(name) for name in expected} == expected
    assert "Traceback" not in instance.log()


# A staging copy


# Whatever they come to: production's bucket is left alone.
COMMANDS = (
    "doctor",
    "own --take",
    "gc --delete",
    "gc --keep-days 0 --delete",
    "check --repair",
    "migrate",
    "migrate --remove-local --delete",
    "export --by-tid",
    "warm",
)


def contents(location):
    """Return all that can be told of the objects of a bucket, with their bytes."""
    client = boto3_client(location)
    with closing(client):
        found = client.list_objects_v2(Bucket=location.bucket)["Contents"]
        for each in found:
            answer = client.get_object(Bucket=location.bucket, Key=each["Key"])
            each["bytes"] = answer["Body"].read()
    return found


@pytest.fixture
def production(ceph, tmp_path):
    """(location, directory of its Data.fs, its files): an instance that was stopped."""
    location, directory = new_bucket(ceph), tmp_path / "production"
    os.makedirs(directory)
    text = placed(example("staging.rst", "local-blob-dir /var"), location, directory)
    instance = ZopeInstance(tmp_path / "production-instance", text, environ(location))
    instance.make_site()
    with instance:
        instance.upload("old", b"an older revision")
        instance.upload("old", SMALL)
        instance.upload("large", LARGE)
        instance.upload("deleted", SMALL)
        instance.delete("deleted")
    return location, directory, {"old": SMALL, "large": LARGE}


@pytest.fixture
def staging(production, tmp_path, monkeypatch):
    """(instance, counting server): a copy with production's configuration, not started."""
    location, directory, _files = production
    copied = tmp_path / "staging"
    os.makedirs(copied)
    shutil.copy(directory / "Data.fs", copied)
    monkeypatch.setenv("ZODB_S3BLOBS_ACCESS", "read-only")
    with FaultyServer(location.endpoint_url) as server:
        through = replace(location, endpoint_url=server.endpoint_url)
        text = placed(example("staging.rst", "local-blob-dir /var"), through, copied)
        instance = ZopeInstance(tmp_path / "staging-instance", text, environ(through))
        yield instance, server
        instance.stop()


@pytest.mark.ceph
def test_staging_copy_cannot_change_production(production, staging, monkeypatch, capsys):
    """Whatever writes works there; production's bucket is as it was, and got GET and HEAD alone."""
    location, _directory, files = production
    instance, server = staging
    before = contents(location)
    with instance:
        assert {name: instance.download(name) for name in files} == files
        instance.upload("new", LARGE)
        instance.upload("old", b"replaced")
        instance.undo()
        assert instance.download("old") == SMALL
        instance.upload("old", b"replaced")
        instance.post("site/large/edit", at="5", file=("f", b"edited"))
        instance.post("site/copy", id="large", new_id="copied")
        instance.delete("old")
        instance.undo()
        edited = LARGE[:5] + b"edited" + LARGE[11:]
        expected = {"new": LARGE, "old": b"replaced", "large": edited}
        assert {name: instance.download(name) for name in expected} == expected
        instance.delete("old")
        instance.pack()
        assert instance.download("large") == edited
    for name, value in environ(location).items():
        monkeypatch.setenv(name, value)
    with closing(find_database(str(instance.conf), None).open()) as storage:
        transaction = TransactionMetaData()
        storage.tpc_begin(transaction)
        store_blob(storage, transaction, storage.new_oid(), b"aborted")
        storage.tpc_vote(transaction)
        storage.tpc_abort(transaction)
        storage.sweep()
        storage.rewrite_by_tid()
    for line in COMMANDS:
        main(["-C", str(instance.conf), *line.split()])
    assert {request.method for request in server.requests} == {"GET", "HEAD"}
    assert contents(location) == before


@pytest.mark.ceph
def test_staging_copy_without_a_directory_refuses_to_store(production, staging):
    """What reads and what stores no blob works; what stores one fails and changes nothing."""
    location, _directory, files = production
    instance, server = staging
    before = contents(location)
    lines = instance.conf.read_text().splitlines(keepends=True)
    instance.conf.write_text("".join(line for line in lines if "local-blob-dir" not in line))
    with instance:
        assert {name: instance.download(name) for name in files} == files
        refused = instance.request("POST", "site/upload", {"id": "new", "file": ("f", b"bytes")})
        assert refused.status == 500
        assert ReadOnlyBucketError.__name__ in instance.log()
        instance.delete("old")
        assert instance.request("GET", "site/old/download").status == 404
        assert instance.download("large") == LARGE
    assert {request.method for request in server.requests} == {"GET", "HEAD"}
    assert contents(location) == before


@pytest.mark.ceph
def test_copy_that_may_write_is_refused_by_the_mark(production, staging, monkeypatch):
    """Without the variable, too, nothing of production's is changed or deleted."""
    location, _directory, files = production
    instance, _server = staging
    before = contents(location)
    instance.environ.pop("ZODB_S3BLOBS_ACCESS")
    with instance:
        assert {name: instance.download(name) for name in files} == files
        refused = instance.request("POST", "site/upload", {"id": "new", "file": ("f", b"bytes")})
        assert refused.status == 500
        instance.delete("old")
        pack = f"{DATABASE}/manage_pack"
        assert instance.request("POST", pack, {"days:float": "0"}).status == 500
        assert instance.log().count("OtherDatabaseError") >= 2
    assert contents(location) == before
