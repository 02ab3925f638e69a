"""Against the server that enforces what others only accept: SSE-C, digests, TLS, credentials."""

import base64
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import re
import time

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError

from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.s3client import S3OperationError

from .faults import FaultyServer
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .storages import open_db


pytestmark = pytest.mark.ceph

KEY = "blobs/1/2.blob"
OTHER_KEY = "blobs/1/3.blob"
SSE_KEY = "0123456789abcdef0123456789abcdeX"
MiB = 1 << 20


@pytest.fixture
def http(ceph):
    """A fresh bucket, without TLS."""
    return new_bucket(ceph)


@pytest.fixture
def https(ceph, http):
    """The same, with TLS."""
    return dataclasses.replace(http, endpoint_url=ceph.tls_endpoint_url, ca_bundle=ceph.ca_bundle)


@pytest.fixture
def connect():
    """Return a function that makes a client."""
    clients = []

    def connect(location, **options):
        arguments = {
            "prefix": "my/site",
            "endpoint_url": location.endpoint_url,
            "region_name": "us-east-1",
            "aws_access_key_id": location.access_key,
            "aws_secret_access_key": location.secret_key,
            "addressing_style": "path",
            "ca_bundle": location.ca_bundle,
            "multipart_threshold": 8 * MiB,
            "multipart_part_size": 5 * MiB,
            "max_attempts": 2,
            **options,
        }
        clients.append(S3Client(arguments.pop("bucket_name", location.bucket), **arguments))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def source(tmp_path):
    def make(data=b"some bytes"):
        path = tmp_path / f"source-{len(data)}"
        path.write_bytes(data)
        return str(path)

    return make


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


@pytest.mark.parametrize("size", [0, 1000, 2 * MiB, 11 * MiB])
def test_file_comes_back_as_it_was_sent(http, connect, source, target, size):
    """In one request and in parts, with our metadata."""
    client = connect(http)
    data = os.urandom(size)
    client.upload_file(source(data), KEY)
    client.download_file(KEY, str(target))
    assert target.read_bytes() == data
    client.copy_object(KEY, OTHER_KEY)
    client.download_file(OTHER_KEY, str(target))
    assert target.read_bytes() == data
    metadata = client.head_object(OTHER_KEY)["Metadata"]
    assert metadata["zodb-key"] == OTHER_KEY
    assert metadata["zodb-sha256"] == hashlib.sha256(data).hexdigest()
    assert list(client.list_objects("blobs/")) == [KEY, OTHER_KEY]


@pytest.mark.parametrize("size", [1000, 2 * MiB, 11 * MiB])
def test_customer_key_round_trip_over_tls(https, connect, source, target, size):
    """Upload, head, download and copy, in one request and in parts."""
    client = connect(https, sse_customer_key=SSE_KEY)
    data = os.urandom(size)
    client.upload_file(source(data), KEY)
    assert client.head_object(KEY)["ContentLength"] == size
    client.download_file(KEY, str(target))
    assert target.read_bytes() == data
    plain = boto3_client(https)
    with pytest.raises(plain.exceptions.ClientError):
        plain.get_object(Bucket=https.bucket, Key=f"my/site/{KEY}")
    plain.close()


def test_undo_under_a_customer_key_is_readable_with_it_and_not_without(https, connect, tmp_path):
    """Ceph cannot copy what it encrypts: the bytes come here and go back, encrypted again."""
    key = base64.b64encode(SSE_KEY.encode()).decode()
    options = {"s3_sse_customer_key": key, "s3_ca_bundle": https.ca_bundle}
    db = open_db(https, tmp_path, **options)
    for data in (b"one", b"two"):
        with db.transaction() as conn:
            conn.root()["blob"] = blob = conn.root().get("blob", Blob())
            with blob.open("w") as file:
                file.write(data)
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    db.close()
    again = open_db(https, tmp_path, cache="cold", **options)
    with again.transaction() as conn:
        assert conn.root()["blob"].open().read() == b"one"
    again.close()
    assert len(keys(https)) == 3
    plain = boto3_client(https)
    for name in keys(https):
        with pytest.raises(plain.exceptions.ClientError):
            plain.get_object(Bucket=https.bucket, Key=name)
    plain.close()


@pytest.mark.parametrize("key", [None, "X" * 32])
def test_object_is_refused_without_its_customer_key(https, connect, source, target, key):
    """Permanent, never "missing": the blob is there, the configuration is wrong."""
    connect(https, sse_customer_key=SSE_KEY).upload_file(source(), KEY)
    client = connect(https, sse_customer_key=key)
    with pytest.raises(PermanentS3Error) as caught:
        client.download_file(KEY, str(target))
    assert SSE_KEY not in str(caught.value) and "X" * 32 not in str(caught.value)
    with pytest.raises(PermanentS3Error):
        client.head_object(KEY)


def test_put_over_tls_carries_a_signed_digest(https, connect, source):
    """botocore may leave bodies unsigned on https; the server could then check nothing."""
    client = connect(https)
    client.upload_file(source(), KEY)  # makes the boto3 client
    plain = boto3_client(https)
    seen = []
    plain.meta.events.register("before-send.s3", lambda request, **kwargs: seen.append(request))
    plain.put_object(Bucket=https.bucket, Key=KEY, Body=b"some bytes")
    plain.close()
    digest = hashlib.sha256(b"some bytes").hexdigest()
    assert seen[0].headers["X-Amz-Content-SHA256"].decode() == digest


@pytest.mark.parametrize("size", [1000, 2 * MiB])
def test_body_that_differs_from_the_signed_digest_is_refused(http, connect, source, size):
    """A byte that changed on its way up: an integrity error, and no object."""
    with FaultyServer(http.endpoint_url) as server:

        def change(request):
            if request.body:
                request.body = request.body[:-1] + bytes([request.body[-1] ^ 1])

        server.instead = change
        behind = dataclasses.replace(http, endpoint_url=server.endpoint_url)
        with pytest.raises(IntegrityError):
            connect(behind).upload_file(source(os.urandom(size)), KEY)
    assert keys(http) == []


def test_part_that_differs_from_the_signed_digest_is_refused(http, connect, source):
    """No object and no parts stay behind."""
    with FaultyServer(http.endpoint_url) as server:

        def change(request):
            if "partNumber=2" in request.target:
                request.body = request.body[:-1] + bytes([request.body[-1] ^ 1])

        server.instead = change
        behind = dataclasses.replace(http, endpoint_url=server.endpoint_url)
        with pytest.raises(IntegrityError):
            connect(behind).upload_file(source(os.urandom(11 * MiB)), KEY)
    assert keys(http) == []
    plain = boto3_client(http)
    assert "Uploads" not in plain.list_multipart_uploads(Bucket=http.bucket)
    plain.close()


def test_listing_goes_on_behind_a_key_and_tells_ages(http, connect, source):
    """What a sweep decides by."""
    client = connect(http)
    before = time.time()
    for key in (KEY, OTHER_KEY):
        client.upload_file(source(), key)
    ((listed,),) = client.list_pages("blobs/", KEY)
    assert (listed.key, listed.size) == (OTHER_KEY, 10)
    assert before - 2 < listed.modified < time.time() + 2
    assert 0 <= listed.age < 10


def test_many_are_deleted_in_one_batch(http, connect, source):
    """Also keys that are not there."""
    client = connect(http)
    for number in range(5):
        client.upload_file(source(), f"blobs/{number}/1.blob")
    doomed = [f"blobs/{number}/1.blob" for number in range(8)]
    assert client.delete_objects(doomed) == {}
    assert list(client.list_objects("")) == []


def test_missing_object_and_missing_bucket(http, connect, target):
    """Told apart by GET's error code."""
    with pytest.raises(MissingObjectError):
        connect(http).download_file(KEY, str(target))
    assert connect(http).head_object(KEY) is None
    client = connect(http, bucket_name="no-such-bucket")
    with pytest.raises(PermanentS3Error, match="NoSuchBucket"):
        client.download_file(KEY, str(target))
    with pytest.raises(PermanentS3Error, match="NoSuchBucket"):
        client.upload_file(__file__, KEY)


def test_missing_bucket_is_created_where_configured(http, connect, target):
    """With the first upload."""
    client = connect(http, bucket_name=f"new-{http.bucket}", create_bucket=True)
    client.upload_file(__file__, KEY)
    client.download_file(KEY, str(target))


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"aws_access_key_id": "nobody"}, "s3-access-key"),
        ({"aws_secret_access_key": "hunter2hunter2"}, "s3-secret-key"),
    ],
)
def test_wrong_credentials_are_permanent_and_name_the_setting(
    http, connect, source, target, options, setting
):
    """Nothing that a retry mends, and nothing that is missing."""
    client = connect(http, **options)
    for call in (
        lambda: client.upload_file(source(), KEY),
        lambda: client.download_file(KEY, str(target)),
        lambda: list(client.list_objects("")),
        lambda: client.delete_objects([KEY]),
    ):
        with pytest.raises(PermanentS3Error, match=setting) as caught:
            call()
        assert "hunter2" not in str(caught.value)
    with pytest.raises(PermanentS3Error):
        client.head_object(KEY)


def test_unknown_certificate_is_permanent_and_names_the_setting(https, connect, source, target):
    """Retrying does not mend it, and switching TLS off is not suggested."""
    client = connect(https, ca_bundle=None)
    for call in (
        lambda: client.upload_file(source(), KEY),
        lambda: client.download_file(KEY, str(target)),
    ):
        with pytest.raises(PermanentS3Error, match="s3-ca-bundle"):
            call()
    assert keys(https) == []


def test_plain_http_to_a_tls_port_is_an_error_of_the_family(https, connect, source):
    """A wrong scheme in the endpoint."""
    endpoint = https.endpoint_url.replace("https://", "http://")
    client = connect(https, endpoint_url=endpoint, ca_bundle=None, max_attempts=1)
    with pytest.raises(S3OperationError):
        client.upload_file(source(), KEY)


# The policy of README.rst


def policy_of_the_readme(bucket, user):
    """Return the policy that README.rst shows, as a policy of this bucket for this user."""
    text = (Path(__file__).parent.parent / "README.rst").read_text()
    block = re.search(r"minimal IAM policy::\n\n((?:    .*\n)+)", text).group(1)
    policy = json.loads(block.replace("my-site-blobs", bucket))
    for statement in policy["Statement"]:
        statement["Principal"] = {"AWS": [f"arn:aws:iam:::user/{user}"]}
    return json.dumps(policy)


@pytest.fixture
def restricted(ceph, http):
    """The bucket as a user sees it whom the policy of README.rst is all that allows anything."""
    user = f"site-{os.urandom(4).hex()}"
    ceph.create_user(user)
    owner = boto3_client(http)
    owner.put_bucket_policy(Bucket=http.bucket, Policy=policy_of_the_readme(http.bucket, user))
    owner.close()
    return dataclasses.replace(http, access_key=user, secret_key=user)


def test_policy_of_the_readme_suffices_for_the_life_of_a_site(restricted, tmp_path):
    """Commit, in one request and in parts, read, undo, abort, miss and pack."""
    options = {
        "s3_prefix": "main",
        "s3_multipart_threshold": "6MB",
        "s3_multipart_part_size": "5MB",
    }
    db = open_db(restricted, tmp_path, **options)
    for data in (b"small", os.urandom(7 * MiB)):
        with db.transaction() as conn:
            conn.root()["blob"] = blob = conn.root().get("blob", Blob())
            with blob.open("w") as file:
                file.write(data)
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    with pytest.raises(ZeroDivisionError), db.transaction() as conn:
        conn.root()["other"] = Blob(b"never")
        conn.transaction_manager.get().join(RaisesInVote())
    with pytest.raises(POSKeyError):
        db.storage.loadBlob(bytes(8), bytes(8))
    db.pack(time.time() + 1)
    db.close()
    again = open_db(restricted, tmp_path, cache="cold", **options)
    with again.transaction() as conn:
        assert conn.root()["blob"].open().read() == b"small"
    again.close()


class RaisesInVote:
    """A data manager that fails a transaction when all others have voted."""

    def sortKey(self):
        return "~~~"

    def tpc_vote(self, txn):
        return 1 / 0

    def nothing(self, txn):
        """Take part in the other steps."""

    tpc_begin = commit = tpc_finish = tpc_abort = abort = nothing


@pytest.mark.parametrize("method", ["upload_file", "download_file", "delete_object"])
def test_policy_of_the_readme_allows_nothing_beside_the_prefix(
    restricted, connect, source, target, method
):
    """Another database in the same bucket is safe; the message names the permission."""
    connect(dataclasses.replace(restricted, access_key="test", secret_key="testtest")).upload_file(
        source(), KEY
    )
    client = connect(restricted, prefix="my/site")
    arguments = {
        "upload_file": (source(), KEY),
        "download_file": (KEY, str(target)),
        "delete_object": (KEY,),
    }
    with pytest.raises(PermanentS3Error, match=r"s3:(Put|Get|Delete)Object"):
        getattr(client, method)(*arguments[method])
