"""A presigned URL gives one blob to whoever has it, for a while, and tells no secret."""

from contextlib import ExitStack
import dataclasses
import datetime
import logging
from types import SimpleNamespace
import urllib.error
from urllib.parse import parse_qs
from urllib.parse import urlsplit
import urllib.request

import pytest
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64
from ZODB.utils import z64

from zodb_s3blobs.headers import content_disposition
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.sources import BlobDirSource

from .faults import FaultyServer
from .services.location import boto3_client
from .services.location import new_bucket
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import Failure
from .storages import make_client
from .storages import make_storage
from .storages import open_relstorage
from .storages import open_storage
from .storages import store_blob
from .storages import TcpProxy
from .storages import write_file


KEY = "blobs/1/2.blob"
OID = p64(1)
SERVERS = ["rclone", pytest.param("ceph", marks=pytest.mark.ceph)]


@pytest.fixture(params=SERVERS)
def location(request):
    """A fresh bucket on each server that checks signatures."""
    return new_bucket(request.getfixturevalue(request.param))


@pytest.fixture
def on_ceph(ceph):
    """A fresh bucket."""
    return new_bucket(ceph)


@pytest.fixture
def connect():
    """Return a function that makes a client, which is closed after the test."""
    with ExitStack() as stack:

        def connect(location, **options):
            client = make_client(location, **options)
            stack.callback(client.close)
            return client

        yield connect


def put(client, data=b"some bytes", key=KEY):
    """Store an object as a commit does."""
    client.upload_file(write_file(data), key)


def get(url):
    """Return the answer to a GET, and its bytes, as a browser gets them."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return answer, answer.read()


def status_of(url):
    """Return the status of the answer to a GET."""
    try:
        return get(url)[0].status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def query(url):
    """Return the parameters of a URL, a dict."""
    return {name: value for name, (value,) in parse_qs(urlsplit(url).query).items()}


# By a client


def test_url_gives_the_bytes_to_anybody(location, connect):
    """With no more than the URL."""
    client = connect(location, prefix="my/site")
    put(client)
    answer, data = get(client.presigned_url(KEY))
    assert (answer.status, data) == (200, b"some bytes")
    assert status_of(client.presigned_url("blobs/1/3.blob")) == 404


def test_browser_may_ask_for_a_part(location, connect):
    """As it does for films, though ranges are not signed."""
    client = connect(location)
    put(client)
    request = urllib.request.Request(client.presigned_url(KEY), headers={"Range": "bytes=5-6"})
    answer, data = get(request)
    assert (answer.headers["Content-Range"], data) == ("bytes 5-6/10", b"by")


def test_signing_asks_nobody(s3, connect):
    """Not even whether there is such an object; nor is a request counted."""
    with FaultyServer(s3.endpoint_url) as server:
        client = connect(dataclasses.replace(s3, endpoint_url=server.endpoint_url))
        assert client.presigned_url(KEY)
        assert server.requests == []
    assert not any(client.counters.values().values())


def test_url_of_one_object_opens_no_other(location, connect):
    """The signature covers the key, and what the URL promises."""
    client = connect(location)
    put(client)
    put(client, key="blobs/1/3.blob")
    url = client.presigned_url(KEY, 60, "text/plain")
    assert status_of(url) == 200
    assert status_of(url.replace(KEY, "blobs/1/3.blob")) == 403
    assert status_of(url.replace("X-Amz-Expires=60", "X-Amz-Expires=6000")) == 403
    assert status_of(url.replace("text%2Fplain", "text%2Fhtml")) == 403
    assert status_of(url.partition("?")[0]) in (400, 401, 403)
    request = urllib.request.Request(url, b"other bytes", method="PUT")
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(request)
    caught.value.close()
    assert caught.value.code == 403


@pytest.mark.parametrize("region", [None, "eu-central-1"])
def test_signature_has_version_4(s3, connect, region):
    """Older ones are refused by most servers; a region is not needed for it."""
    parameters = query(connect(s3, region_name=region).presigned_url(KEY, 300))
    assert parameters["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert parameters["X-Amz-Expires"] == "300"
    scope = parameters["X-Amz-Credential"].split("/")
    assert scope[0] == s3.access_key and scope[2:] == [region or "us-east-1", "s3", "aws4_request"]
    assert parameters.keys().isdisjoint({"Signature", "AWSAccessKeyId", "Expires"})


def url_at_aws(**options):
    """Return a URL for AWS itself, which nobody asks for."""
    client = S3Client(
        "my-bucket", aws_access_key_id="access", aws_secret_access_key="secret", **options
    )
    url = client.presigned_url(KEY)
    client.close()
    return url


@pytest.mark.parametrize("region", [None, "us-east-1", "eu-central-1"])
def test_url_for_aws_names_the_bucket_in_its_host_and_has_version_4(region):
    """Without an endpoint."""
    url = urlsplit(url_at_aws(region_name=region))
    assert (url.scheme, url.path) == ("https", f"/{KEY}")
    assert url.netloc.startswith("my-bucket.s3.") and url.netloc.endswith(".amazonaws.com")
    parameters = query(url.geturl())
    assert parameters["X-Amz-Algorithm"] == "AWS4-HMAC-SHA256"
    assert parameters["X-Amz-Credential"].split("/")[2] == region or region is None


@pytest.mark.parametrize("addressing_style", ["auto", "path", "virtual"])
def test_url_for_aws_names_its_region(addressing_style):
    """Elsewhere AWS redirects to a host for which the signature is not valid, or answers 400.

    Source: "Virtual hosting of buckets", legacy global endpoint: regions launched after March 20,
    2019 answer 400 there, others redirect while a bucket is new.
    """
    url = url_at_aws(region_name="eu-south-1", addressing_style=addressing_style)
    assert ".s3.eu-south-1.amazonaws.com" in f".{urlsplit(url).netloc}"


def test_url_lasts_a_minute_by_default(s3, connect):
    """Long enough for a redirect, too short to be passed around."""
    assert query(connect(s3).presigned_url(KEY))["X-Amz-Expires"] == "60"


def test_session_token_travels_with_the_url(s3, monkeypatch):
    """Credentials of a role are valid with their token only."""
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("SESSION_TOKEN", "t")):
        monkeypatch.setenv(f"AWS_{name}", value)
    client = S3Client("my-bucket", endpoint_url=s3.endpoint_url)
    assert query(client.presigned_url(KEY))["X-Amz-Security-Token"] == "t"
    client.close()


@pytest.mark.ceph
def test_expired_url_is_refused(on_ceph, connect, monkeypatch):
    """A minute after it was made, and not before."""
    client = connect(on_ceph)
    put(client)
    now = datetime.datetime.now(datetime.timezone.utc)
    answers = []
    for age in (30, 90):
        with monkeypatch.context() as patch:
            made = now - datetime.timedelta(seconds=age)
            patch.setattr("botocore.auth.get_current_datetime", lambda *args, made=made: made)
            url = client.presigned_url(KEY, 60)
        assert query(url)["X-Amz-Date"] == made.strftime("%Y%m%dT%H%M%SZ")
        answers.append(status_of(url))
    assert answers == [200, 403]


NAMES = [
    "report.pdf",
    "a report (1) + more & less = 100%.pdf",
    "\u00fcbersicht \u20ac.pdf",
    "\u65e5\u672c\u8a9e.pdf",
    'say "hello"; filename=other.exe',
    "back\\slash and %41 and %0d%0a.txt",
    "line\r\nSet-Cookie: a=b\r\n\r\n<script>.html",
    "../../etc/passwd",
    "\u202egpj.exe",
    "\ud800half.txt",
    "x" * 300 + ".pdf",
    "\U0001f600" * 100 + ".pdf",
]


@pytest.mark.ceph
@pytest.mark.parametrize("disposition", ["inline", "attachment"])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_answer_has_the_type_and_disposition_that_were_signed(on_ceph, connect, disposition, name):
    """Letter by letter, and no header that the name was trying for."""
    client = connect(on_ceph)
    put(client)
    header = content_disposition(disposition, name)
    answer, data = get(client.presigned_url(KEY, 60, "text/plain; charset=utf-8", header))
    assert data == b"some bytes"
    assert answer.headers.get_all("Content-Disposition") == [header]
    assert answer.headers.get_all("Content-Type") == ["text/plain; charset=utf-8"]
    assert "Set-Cookie" not in answer.headers


@pytest.mark.ceph
def test_answer_without_them_has_none_of_ours(on_ceph, connect):
    """Nothing is promised that was not asked for."""
    client = connect(on_ceph)
    put(client)
    url = client.presigned_url(KEY)
    assert not [name for name in query(url) if name.startswith("response-")]
    assert "Content-Disposition" not in get(url)[0].headers


@pytest.mark.ceph
def test_url_names_the_public_endpoint_and_is_valid_there(on_ceph, connect):
    """Browsers reach the server by another name and port; what is signed is that one."""
    with TcpProxy(on_ceph.endpoint_url) as proxy:
        public = proxy.endpoint_url.replace("127.0.0.1", "localhost")
        client = connect(on_ceph, public_endpoint_url=public)
        put(client)
        url = client.presigned_url(KEY)
        assert url.startswith(f"{public}/{on_ceph.bucket}/{KEY}?")
        assert get(url)[1] == b"some bytes"
        assert status_of(url.replace("localhost", "127.0.0.1")) == 403
        # What the site reads and writes itself goes the other way.
        proxy.close()
        assert client.object_size(KEY) == 10


def test_public_endpoint_that_is_no_url_is_refused(s3):
    """At once, and not when the first browser comes."""
    for url in ("files.example.com", "ftp://files.example.com", ""):
        with pytest.raises(ValueError):
            make_client(s3, public_endpoint_url=url)


def test_object_under_a_customers_key_has_no_url(connect):
    """A browser does not have the key; and it is nowhere in a URL."""
    client = S3Client(
        "my-bucket",
        endpoint_url="https://localhost",
        sse_customer_key="0123456789abcdef0123456789abcdeX",
    )
    assert not client.signs_urls
    assert client.presigned_url(KEY) is None
    client.close()


def test_other_encryption_does_not_keep_from_signing(s3, connect):
    """The server has those keys itself."""
    client = connect(s3, sse="AES256")
    assert client.signs_urls and client.presigned_url(KEY)


def test_secret_is_told_nowhere(s3, connect, caplog):
    """Not in the URL, in logs of any level, nor by the client itself."""
    caplog.set_level(logging.DEBUG, "zodb_s3blobs")
    secret = "hunter2/hunter2+hunter2"
    client = connect(dataclasses.replace(s3, secret_key=secret))
    url = client.presigned_url(KEY)
    for text in (url, urllib.request.unquote(url), repr(client), str(client), caplog.text):
        assert "hunter2" not in text
    # A URL in a log would be as good as the bytes.
    assert query(url)["X-Amz-Signature"] not in caplog.text


def test_lack_of_credentials_is_permanent_and_says_what_to_set(s3):
    """Nothing that a retry mends."""
    client = S3Client("my-bucket", endpoint_url=s3.endpoint_url)
    with pytest.raises(PermanentS3Error, match="s3-access-key") as caught:
        client.presigned_url(KEY)
    assert (caught.value.operation, caught.value.key) == ("sign", KEY)
    client.close()


# By a storage


@pytest.fixture
def opened(s3, tmp_path):
    """Return a function that opens a storage with an empty cache, and its `HookedClient`."""
    storages = []

    def opened(location=s3, **options):
        for storage in storages:
            storage.close()
        storage, client = make_storage(location, tmp_path, f"cache{len(storages)}", **options)
        storages.append(storage)
        return storage, client

    yield opened
    storages[-1].close()


def test_committed_blob_has_a_url(opened):
    """In the cache or not; a HEAD tells once whether it is there."""
    storage, _client = opened()
    tid = commit_blob(storage, OID, b"some bytes")
    assert get(storage.presigned_url(OID, tid))[1] == b"some bytes"
    storage, client = opened()
    url = storage.presigned_url(OID, tid, 300)
    assert get(url)[1] == b"some bytes"
    assert urlsplit(url).path.endswith(blob_key(OID, tid))
    assert query(url)["X-Amz-Expires"] == "300"
    assert client.count("object_size") == 1
    assert storage.presigned_url(OID, tid)
    assert storage.blob_size(OID, tid) == 10
    assert client.count("object_size") == 1
    assert client.count("download_file") == 0


@pytest.mark.ceph
def test_url_of_a_blob_has_its_type_and_name(opened, on_ceph):
    """As the site tells them."""
    storage, _client = opened(on_ceph)
    tid = commit_blob(storage, OID, b"some bytes")
    url = storage.presigned_url(OID, tid, 60, "image/png", "p\u00e4nda.png", "attachment")
    answer, data = get(url)
    assert data == b"some bytes"
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["Content-Disposition"] == content_disposition(
        "attachment", "p\u00e4nda.png"
    )
    answer, _data = get(storage.presigned_url(OID, tid))
    assert answer.headers["Content-Disposition"] == "inline"


def test_blob_of_a_running_transaction_has_no_url(opened):
    """Nobody else shall see it; the committed revision before it has one."""
    storage, _client = opened()
    tid = commit_blob(storage, OID, b"one")
    running, later = TransactionMetaData(), p64(u64(tid) + 1)
    storage.tpc_begin(running, later)
    store_blob(storage, running, OID, b"two", tid)
    store_blob(storage, running, p64(2), b"new")
    storage.tpc_vote(running)
    assert storage.presigned_url(OID, later) is None
    assert storage.presigned_url(p64(2), z64) is None
    assert get(storage.presigned_url(OID, tid))[1] == b"one"
    storage.tpc_finish(running)
    assert get(storage.presigned_url(OID, later))[1] == b"two"
    assert get(storage.presigned_url(p64(2), later))[1] == b"new"


def test_blob_that_only_a_source_has_has_no_url(opened, tmp_path):
    """S3 cannot deliver it, until a migration brings it there."""
    stock = FileStorage(f"{tmp_path}/Data.fs", blob_dir=f"{tmp_path}/old")
    tid = commit_blob(stock, OID, b"old")
    stock.close()
    storage, client = opened(sources=[BlobDirSource(f"{tmp_path}/old")])
    assert storage.presigned_url(OID, tid) is None
    assert storage.presigned_url(OID, tid) is None
    client.client.upload_file(write_file(b"old"), blob_key(OID, tid))
    assert get(storage.presigned_url(OID, tid))[1] == b"old"


def test_missing_blob_is_a_poskeyerror(opened):
    """A URL that answers 404 helps nobody."""
    storage, _client = opened()
    tid = commit_record(storage, OID, record=BLOB_RECORD)
    for oid, serial in ((OID, tid), (OID, p64(5)), (p64(2), tid)):
        with pytest.raises(POSKeyError):
            storage.presigned_url(oid, serial)


def test_s3_that_is_down_is_a_transient_error_with_the_blobs_name(opened):
    """Until S3 has said once that the blob is there; then the signature needs nobody."""
    storage, client = opened()
    tid = commit_blob(storage, OID, b"some bytes")
    client.before["object_size"] = Failure()
    with pytest.raises(TransientS3Error) as caught:
        storage.presigned_url(OID, tid)
    assert (caught.value.oid, caught.value.tid) == (OID, tid)
    del client.before["object_size"]
    assert storage.presigned_url(OID, tid)
    client.before["object_size"] = Failure()
    assert storage.presigned_url(OID, tid)


@pytest.mark.parametrize(
    "options",
    [
        {"expires_in": 0},
        {"expires_in": -1},
        {"expires_in": 604_801},
        {"expires_in": True},
        {"expires_in": 60.0},
        {"disposition": "form-data"},
        {"disposition": "attachment; filename=x"},
        {"disposition": ""},
        {"content_type": "image"},
        {"content_type": ""},
        {"content_type": "text/plain\r\nSet-Cookie: a=b"},
        {"content_type": "text/plain\n"},
        {"content_type": "text/\u00fc"},
    ],
)
def test_value_that_cannot_be_right_is_refused(opened, options):
    """Before anybody is asked, and where there could be no URL either."""
    storage, client = opened()
    tid = commit_blob(storage, OID, b"some bytes")
    client.calls.clear()
    with pytest.raises(ValueError):
        storage.presigned_url(OID, tid, **options)
    assert client.calls == []


@pytest.mark.parametrize("seconds", [1, 604_800])
def test_url_lasts_from_a_second_to_a_week(opened, seconds):
    """As signature version 4 allows."""
    storage, _client = opened()
    tid = commit_blob(storage, OID, b"some bytes")
    assert query(storage.presigned_url(OID, tid, seconds))["X-Amz-Expires"] == str(seconds)


def test_no_url_where_the_client_signs_none(opened, monkeypatch):
    """Under SSE-C; the bucket is not even asked."""
    storage, client = opened()
    tid = commit_blob(storage, OID, b"some bytes")
    client.calls.clear()
    monkeypatch.setattr(S3Client, "signs_urls", False)
    assert storage.presigned_url(OID, tid) is None
    assert client.calls == []


@pytest.mark.parametrize("keep_history", [True, False])
def test_url_over_a_relstorage_is_that_of_the_reference(opened, s3, tmp_path, keep_history):
    """And of the tid's key where the object is only there."""
    storage, client = opened(base=open_relstorage(tmp_path, keep_history=keep_history))
    tid = commit_blob(storage, OID, b"some bytes")
    key = blob_key(OID, read_reference(storage.loadSerial(OID, tid)))
    url = storage.presigned_url(OID, tid)
    assert urlsplit(url).path.endswith(key)
    assert get(url)[1] == b"some bytes"
    client.client.copy_object(key, blob_key(OID, tid))
    boto3 = boto3_client(s3)
    boto3.delete_object(Bucket=s3.bucket, Key=key)
    boto3.close()
    storage, _client = opened(base=open_relstorage(tmp_path, keep_history=keep_history))
    url = storage.presigned_url(OID, tid)
    assert urlsplit(url).path.endswith(blob_key(OID, tid))
    assert get(url)[1] == b"some bytes"


def test_public_endpoint_is_configured(s3, tmp_path):
    """The key of zope.conf is what URLs begin with; the storage itself does not use it."""
    storage = open_storage(s3, tmp_path, s3_public_endpoint_url="https://files.example.com")
    serial = commit_blob(storage, p64(1), b"bytes")
    url = storage.presigned_url(p64(1), serial)
    assert url.startswith(f"https://files.example.com/{s3.bucket}/blobs/1/")
    storage.close()


def test_url_for_aws_names_the_region_that_the_bucket_was_found_in():
    """Boto3 finds it there though none is configured; a browser would be sent to the wrong one."""
    client = S3Client("my-bucket", aws_access_key_id="a", aws_secret_access_key="secret")
    assert client.presigned_url(KEY).startswith("https://my-bucket.s3.amazonaws.com/")
    answer = {"ResponseMetadata": {"HTTPHeaders": {"x-amz-bucket-region": "eu-central-1"}}}
    tell(client, answer)
    url = client.presigned_url(KEY)
    assert url.startswith("https://my-bucket.s3.eu-central-1.amazonaws.com/")
    assert "%2Feu-central-1%2Fs3%2Faws4_request" in url


def tell(client, answer):
    """Have boto3's client receive an answer, as from a server of AWS, which is not to be had."""
    boto3_client = client._session.client()
    boto3_client.meta.events.emit(
        "needs-retry.s3.HeadObject",
        response=(SimpleNamespace(status_code=200), answer),
        endpoint=None,
        operation=boto3_client.meta.service_model.operation_model("HeadObject"),
        attempts=1,
        caught_exception=None,
        request_dict={"context": {"client_config": boto3_client.meta.config}},
    )


def test_url_for_a_vpc_endpoint_has_the_bucket_in_its_path():
    """The certificate of such a host covers no name before it."""
    url = "https://bucket.vpce-1a2b.s3.eu-central-1.vpce.amazonaws.com"
    client = S3Client("my-bucket", "", url, "eu-central-1", "a", "secret")
    assert client.presigned_url(KEY).startswith(f"{url}/my-bucket/{KEY}?")
