"""The servers that the tests rely on do what the tests take for granted."""

import contextlib
import dataclasses
from itertools import pairwise
import os
import subprocess
import sys
import tempfile
import time

from botocore.exceptions import ClientError
import pytest
from ZODB import DB

from zodb_s3blobs.testing.server import EmbeddedS3

from .conftest import is_required
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.moto_s3 import MotoServer
from .services.postgresql import PostgresqlServer
from .services.process import listens
from .services.process import ServiceMissing
from .services.process import wait_until
from .services.zeo import ZeoServer
from .services.zeo import ZeoStorage
from .services.zeo import ZeoStorages


SERVERS = ["rclone", "moto_server", pytest.param("ceph", marks=pytest.mark.ceph)]


@pytest.fixture
def location(request):
    """A fresh bucket on the server that the test names."""
    return new_bucket(request.getfixturevalue(request.param))


@pytest.fixture
def client(location):
    client = boto3_client(location)
    yield client
    client.close()


def accepts(psycopg2, dsn):
    """Return whether a database can be connected to."""
    try:
        psycopg2.connect(dsn).close()
    except psycopg2.OperationalError:
        return False
    return True


def metadata_of(response):
    """Return an object's metadata; rclone capitalises the names."""
    return {name.lower(): value for name, value in response["Metadata"].items()}


@pytest.mark.parametrize("location", SERVERS, indirect=True)
def test_object_is_stored_read_listed_copied_and_deleted(location, client):
    """What the package asks of every server works with plain boto3."""
    bucket = {"Bucket": location.bucket}
    key = "a prefix/blobs/1/2.blob"
    client.put_object(**bucket, Key=key, Body=b"0123456789", Metadata={"zodb-size": "10"})
    answer = client.get_object(**bucket, Key=key)
    assert answer["Body"].read() == b"0123456789"
    assert metadata_of(answer) == {"zodb-size": "10"}
    assert client.get_object(**bucket, Key=key, Range="bytes=2-4")["Body"].read() == b"234"
    client.copy({**bucket, "Key": key}, location.bucket, "copy")
    assert metadata_of(client.head_object(**bucket, Key="copy"))["zodb-size"] == "10"
    assert keys(location) == [key, "copy"]
    client.delete_object(**bucket, Key=key)
    assert keys(location) == ["copy"]
    with pytest.raises(client.exceptions.NoSuchKey):
        client.get_object(**bucket, Key=key)


@pytest.mark.parametrize("location", SERVERS, indirect=True)
def test_listing_of_many_keys_comes_in_pages_while_they_are_deleted(location, client):
    """The pages of a listing stay complete though each page's keys are deleted at once."""
    expected = {f"blobs/{number:x}/1.blob" for number in range(1100)}
    for key in expected:
        client.put_object(Bucket=location.bucket, Key=key, Body=b"")
    seen = []
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=location.bucket, Prefix="blobs/", PaginationConfig={"PageSize": 500}
    )
    for page in pages:
        found = [item["Key"] for item in page["Contents"]]
        seen += found
        doomed = {"Objects": [{"Key": key} for key in found], "Quiet": True}
        assert "Errors" not in client.delete_objects(Bucket=location.bucket, Delete=doomed)
    assert all(first < second for first, second in pairwise(seen))
    assert set(seen) == expected
    assert keys(location) == []


@pytest.mark.parametrize("location", SERVERS, indirect=True)
def test_multipart_upload_appears_whole_or_not_at_all(location, client):
    """Nothing is seen of parts until they are completed, and nothing after an abort."""
    upload = {"Bucket": location.bucket, "Key": "large"}
    part = b"x" * (5 << 20)
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
    client.upload_part(**upload, PartNumber=1, Body=part)
    client.abort_multipart_upload(**upload)
    del upload["UploadId"]
    upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
    etags = [client.upload_part(**upload, PartNumber=n, Body=part)["ETag"] for n in (1, 2)]
    assert keys(location) == []
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    assert client.head_object(Bucket=location.bucket, Key="large")["ContentLength"] == 10 << 20


@pytest.mark.parametrize("location", SERVERS[:1] + SERVERS[2:], indirect=True)
def test_body_that_differs_from_its_digest_is_refused(location, client):
    """A PUT with another body's Content-MD5 leaves no object; moto would store it."""
    with pytest.raises(ClientError) as caught:
        client.put_object(
            Bucket=location.bucket, Key="key", Body=b"x", ContentMD5="1B2M2Y8AsgTpgAmY7PhCfg=="
        )
    assert caught.value.response["Error"]["Code"] in ("BadDigest", "InvalidDigest")
    assert keys(location) == []


@pytest.mark.ceph
def test_ceph_enforces_customer_keys_over_tls(ceph):
    """SSE-C on https: readable with the key, refused without."""
    location = dataclasses.replace(
        new_bucket(ceph), endpoint_url=ceph.tls_endpoint_url, ca_bundle=ceph.ca_bundle
    )
    client = boto3_client(location)
    key = {"SSECustomerAlgorithm": "AES256", "SSECustomerKey": "k" * 32}
    client.put_object(Bucket=location.bucket, Key="secret", Body=b"text", **key)
    assert client.get_object(Bucket=location.bucket, Key="secret", **key)["Body"].read() == b"text"
    with pytest.raises(ClientError):
        client.get_object(Bucket=location.bucket, Key="secret")


def test_rclone_started_again_serves_the_same_buckets_at_the_same_address(tmp_path):
    """A test can let S3 fail and come back."""
    with EmbeddedS3(tmp_path) as server:
        location = new_bucket(server)
        client = boto3_client(location)
        client.put_object(Bucket=location.bucket, Key="key", Body=b"")
        server.stop()
        assert not listens(location.endpoint_url)
        server.start()
        assert server.endpoint_url == location.endpoint_url
        assert keys(location) == ["key"]
    assert not listens(location.endpoint_url)


def test_moto_stops():
    """Nothing answers at the address of a stopped server."""
    with MotoServer() as server:
        assert listens(server.endpoint_url)
    assert not listens(server.endpoint_url)


@pytest.mark.ceph
@pytest.mark.slow
def test_ceph_ends_with_the_process_that_started_it(ceph):
    """Also a process that was killed leaves no daemons behind."""
    directory = ceph.directory.parent / "killed"
    code = (
        "import os, sys; from tests.services.ceph import CephGateway\n"
        "gateway = CephGateway(sys.argv[1]); gateway.start()\n"
        "print(gateway.endpoint_url, flush=True); os.kill(os.getpid(), 9)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, directory],
        cwd=os.path.dirname(os.path.dirname(__file__)),
        capture_output=True,
        text=True,
    )
    url = child.stdout.strip()
    assert url, child.stderr
    wait_until(lambda: not listens(url))


@pytest.fixture
def psycopg2(postgresql):
    """The module, which is there where the server is."""
    return pytest.importorskip("psycopg2")


def test_postgresql_databases_are_apart(postgresql, psycopg2):
    """A new database is empty, and a dropped one is gone, even while someone is connected."""
    first, second = postgresql.new_database(), postgresql.new_database()
    with psycopg2.connect(first) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE known (id int)")
    with psycopg2.connect(second) as other, other.cursor() as cursor:
        cursor.execute("SELECT to_regclass('known')")
        assert cursor.fetchone() == (None,)
    other.close()
    postgresql.drop_database(first)
    assert not accepts(psycopg2, first)
    assert accepts(psycopg2, second)
    postgresql.drop_database(second)


def test_postgresql_started_again_serves_the_same_databases(postgresql, psycopg2):
    """A test can let the database fail under its clients and come back."""
    dsn = postgresql.new_database()
    client = psycopg2.connect(dsn)
    postgresql.stop()
    assert not accepts(psycopg2, dsn)
    postgresql.start()
    with pytest.raises(psycopg2.OperationalError), client.cursor() as cursor:
        cursor.execute("SELECT 1")
    assert accepts(psycopg2, dsn)
    postgresql.drop_database(dsn)


def test_postgresql_ends_with_the_process_that_started_it(psycopg2):
    """Also a process that was killed leaves no server behind."""
    code = (
        "import os, sys; from tests.services.postgresql import PostgresqlServer\n"
        "server = PostgresqlServer(sys.argv[1]); server.start()\n"
        "print(server.new_database(), flush=True); os.kill(os.getpid(), 9)"
    )
    with tempfile.TemporaryDirectory(prefix="postgresql-", dir="/tmp") as directory:
        child = subprocess.run(
            [sys.executable, "-c", code, directory],
            cwd=os.path.dirname(os.path.dirname(__file__)),
            capture_output=True,
            text=True,
        )
        assert child.stdout, child.stderr
        wait_until(lambda: not accepts(psycopg2, child.stdout.strip()))
        PostgresqlServer(directory).remove()


def test_missing_postgresql_says_so(tmp_path, monkeypatch):
    """Who wants to run the tests learns what to install."""
    pytest.importorskip("psycopg2")
    monkeypatch.setattr("tests.services.postgresql.INSTALLED", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceMissing, match="apt-get install postgresql"):
        PostgresqlServer(tmp_path).start()


def zeo_client(storage, **options):
    """Return a client of a `ZeoStorage`."""
    from ZEO.ClientStorage import ClientStorage

    return ClientStorage(("127.0.0.1", storage.server.port), storage.name, **options)


FILES = "<filestorage {name}>\npath {name}.fs\n</filestorage>"


def test_zeo_storages_are_apart(zeo):
    """Who asks for a storage gets an empty one that nobody else has."""
    first, second = zeo.new(FILES), zeo.new(FILES)
    with contextlib.closing(zeo_client(first)) as client:
        DB(client).close()
    for storage, length in ((first, 1), (second, 0)):
        with contextlib.closing(zeo_client(storage)) as client:
            assert len(client) == length


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_zeo_started_again_serves_the_same_storage_at_the_same_address(zeo, tmp_path, how):
    """A test can let the ZEO server fail under its clients and come back."""
    with ZeoServer(tmp_path, FILES.format(name="one")) as server:
        storage = ZeoStorage(server, "one")
        with contextlib.closing(zeo_client(storage)) as client:
            DB(client).close()
        address = server.address
        getattr(server, how)()
        assert not listens(f"http://{address}")
        server.start()
        assert server.address == address
        with contextlib.closing(zeo_client(storage)) as client:
            assert len(client) == 1
    assert not listens(f"http://{address}")


def test_zeo_with_options_serves_what_they_say(zeo, tmp_path):
    """Options of the section <zeo> reach the server."""
    with ZeoServer(tmp_path, FILES.format(name="one"), read_only="true") as server:
        storage = ZeoStorage(server, "one")
        with contextlib.closing(zeo_client(storage, read_only_fallback=True)) as client:
            assert client.isReadOnly()


def test_missing_zeo_says_so(tmp_path, monkeypatch):
    """Who wants to run the tests learns what to install."""
    monkeypatch.setattr("tests.services.zeo.find_program", lambda name: None)
    with pytest.raises(ServiceMissing, match="pip install ZEO"):
        ZeoStorages(tmp_path).start()


def test_proxy_delays_and_counts_requests(s3, latency_proxy):
    """Requests are counted by kind, and each pays the delay once."""
    proxy = latency_proxy(s3.endpoint_url, request_delay_ms=50)
    client = boto3_client(dataclasses.replace(s3, endpoint_url=proxy.endpoint_url))
    started = time.monotonic()
    client.put_object(Bucket=s3.bucket, Key="key", Body=b"x" * 1000)
    client.get_object(Bucket=s3.bucket, Key="key")["Body"].read()
    assert time.monotonic() - started >= 0.1
    counted = proxy.stats(log=True)
    assert counted["kinds"] == {"put": 1, "get": 1}
    assert counted["requests"] == len(counted["log"]) == 2
    assert counted["bytes_up"] > 1000 and counted["bytes_down"] > 1000
    proxy.reset()
    assert proxy.stats()["requests"] == 0
    proxy.stop()
    assert not listens(proxy.endpoint_url)


@pytest.mark.parametrize(
    ("environ", "required"),
    [
        ({}, False),
        ({"CI": "true"}, True),
        ({"ZODB_S3BLOBS_REQUIRE_SERVICES": "rclone moto"}, False),
        ({"ZODB_S3BLOBS_REQUIRE_SERVICES": "rclone ceph"}, True),
    ],
)
def test_missing_service_is_a_failure_only_where_it_is_required(environ, required):
    """A laptop without Ceph skips; CI does not go green that way."""
    assert is_required("ceph", environ) is required


@pytest.mark.skipif(
    not (is_required("permissions") and sys.platform == "linux" and os.geteuid() == 0),
    reason="only as root under CI",
)
def test_root_cannot_pass_over_file_permissions_under_ci():
    """Permission tests mean something: scripts/test dropped the capabilities for good."""
    dac_override_and_read_search = 1 << 1 | 1 << 2
    with open("/proc/self/status") as status:
        sets = dict(line.split(":\t") for line in status if line.startswith("Cap"))
    for name in ("CapEff", "CapPrm", "CapBnd"):
        assert not int(sets[name], 16) & dac_override_and_read_search, name
