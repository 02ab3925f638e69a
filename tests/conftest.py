"""Fixtures: the servers, each started once a session, and a bucket of one's own for each test."""

from contextlib import ExitStack
import gc
import os
import shutil
import tempfile

import pytest

from zodb_s3blobs.testing.server import EmbeddedS3

from .services.ceph import CephGateway
from .services.location import new_bucket
from .services.moto_s3 import MotoServer
from .services.postgresql import PostgresqlServer
from .services.process import ServiceMissing
from .services.proxy import LatencyProxy
from .services.zeo import ZeoStorages


REQUIRED = "ZODB_S3BLOBS_REQUIRE_SERVICES"


def is_required(service, environ=os.environ):
    """Return whether the lack of a service is a failure: CI is set, or the variable names it."""
    return bool(environ.get("CI")) or service in environ.get(REQUIRED, "").split()


def run_service(service, server):
    """Run a server as a generator fixture does; skip or fail where it is not installed."""
    try:
        server.start()
    except ServiceMissing as missing:
        act = pytest.fail if is_required(service) else pytest.skip
        act(f"{service}: {missing}")
    try:
        yield server
    finally:
        server.stop()


def fast_directory():
    """Return a directory in memory, where there is room for it; its path is short."""
    memory = "/dev/shm"
    roomy = os.path.isdir(memory) and shutil.disk_usage(memory).free > 1 << 30
    return memory if roomy else "/tmp"


@pytest.fixture(scope="session", autouse=True)
def no_settings_from_outside(tmp_path_factory):
    """No test sees the AWS and proxy settings of whoever runs it, or asks for a machine's role."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        # What commands leave for their next run
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "*")
        yield


@pytest.fixture(scope="session", autouse=True)
def frozen_heap():
    """What is loaded already is no garbage; each collection would look through it."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def rclone():
    """An `EmbeddedS3`; its data is removed at the end of the session."""
    with tempfile.TemporaryDirectory(prefix="rclone-", dir=fast_directory()) as directory:
        yield from run_service("rclone", EmbeddedS3(directory))


@pytest.fixture(scope="session")
def ceph():
    """A `CephGateway`."""
    # Its sockets need a short path, shorter than pytest's may be.
    with tempfile.TemporaryDirectory(prefix="ceph-", dir="/tmp") as directory:
        yield from run_service("ceph", CephGateway(f"{directory}/rgw"))


@pytest.fixture(scope="session")
def moto_server():
    """A `MotoServer`."""
    yield from run_service("moto", MotoServer())


@pytest.fixture(scope="session")
def postgresql():
    """A `PostgresqlServer`."""
    # In memory a database is made in a fifth of the time. Its socket needs a short path, too.
    with tempfile.TemporaryDirectory(prefix="postgresql-", dir=fast_directory()) as directory:
        server = PostgresqlServer(directory)
        try:
            yield from run_service("postgresql", server)
        finally:
            server.remove()


@pytest.fixture(scope="session")
def zeo():
    """A `ZeoStorages`; whoever asks for it can also start a `ZeoServer`."""
    with tempfile.TemporaryDirectory(prefix="zeo-", dir=fast_directory()) as directory:
        yield from run_service("zeo", ZeoStorages(directory))


@pytest.fixture
def s3(rclone):
    """An `S3Location`: a fresh bucket on rclone."""
    return new_bucket(rclone)


@pytest.fixture
def latency_proxy():
    """Return a function that starts a `LatencyProxy`, which ends with the test."""
    with ExitStack() as stack:
        yield lambda upstream, **settings: stack.enter_context(LatencyProxy(upstream, **settings))
