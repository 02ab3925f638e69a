"""The client moves files whole or not at all, with few requests, and says what failed."""

import base64
from contextlib import ExitStack
import dataclasses
import hashlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
import traceback

import pytest
from transaction.interfaces import TransientError
from zope.interface.verify import verifyObject

from zodb_s3blobs.cancellation import Cancellation
from zodb_s3blobs.cancellation import UploadCancelled
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import IS3Client
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.s3client import S3OperationError

from .faults import Answer
from .faults import FaultyServer
from .faults import in_child
from .faults import RawServer
from .faults import refused_endpoint
from .faults import s3_error
from .faults import SilentServer
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.location import S3Location


KEY = "blobs/1/2.blob"
OTHER_KEY = "blobs/1/3.blob"
MiB = 1 << 20


@pytest.fixture(params=["moto_server", "rclone"])
def location(request):
    """A fresh bucket on each server."""
    return new_bucket(request.getfixturevalue(request.param))


@pytest.fixture
def moto(moto_server):
    """A fresh bucket on moto."""
    return new_bucket(moto_server)


@pytest.fixture
def connect():
    """Return a function that makes a client, which is closed after the test."""
    with ExitStack() as stack:

        def connect(location, **options):
            arguments = {
                "endpoint_url": location.endpoint_url,
                "region_name": "us-east-1",
                "aws_access_key_id": location.access_key,
                "aws_secret_access_key": location.secret_key,
                "addressing_style": "path",
                **options,
            }
            client = S3Client(arguments.pop("bucket_name", location.bucket), **arguments)
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture
def faulty():
    """Return a function that puts a `FaultyServer` in front of a location: both are returned."""
    with ExitStack() as stack:

        def start(location):
            server = stack.enter_context(FaultyServer(location.endpoint_url))
            return server, dataclasses.replace(location, endpoint_url=server.endpoint_url)

        yield start


@pytest.fixture
def source(tmp_path):
    """Return a function that makes a file of some bytes."""

    def make(data=b"some bytes"):
        path = tmp_path / f"source-{len(data)}"
        path.write_bytes(data)
        return str(path)

    return make


@pytest.fixture
def target(tmp_path):
    """The path of a file to download to."""
    return tmp_path / "target"


def stored(location, key=KEY):
    """Return an object's bytes and metadata, by plain boto3."""
    client = boto3_client(location)
    answer = client.get_object(Bucket=location.bucket, Key=key)
    data = answer["Body"].read()
    client.close()
    return data, {name.lower(): value for name, value in answer["Metadata"].items()}


def store(location, key, data, metadata=None):
    """Store an object by plain boto3."""
    client = boto3_client(location)
    client.put_object(Bucket=location.bucket, Key=key, Body=data, Metadata=metadata or {})
    client.close()


def everything_about(error):
    """Return the texts of an error and of its causes, as a log would have them."""
    return "".join(traceback.format_exception(error)) + repr(error)


# What is sent and what comes back


@pytest.mark.parametrize("size", [0, 1, 64 * 1024, MiB, MiB + 1, 3 * MiB])
def test_file_comes_back_as_it_was_sent(location, connect, source, target, size):
    """From nothing to more than is held in memory at once."""
    client = connect(location)
    data = os.urandom(size)
    client.upload_file(source(data), KEY)
    assert client.head_object(KEY)["ContentLength"] == size
    client.download_file(KEY, str(target))
    assert target.read_bytes() == data


def test_client_provides_its_interface(moto, connect):
    """Fakes and the real thing have one contract."""
    verifyObject(IS3Client, connect(moto))


@pytest.mark.parametrize("size", [10, MiB + 10, 12 * MiB])
def test_object_carries_key_size_and_digest(location, connect, source, size):
    """Whatever way the bytes took, a later read can check them."""
    data = os.urandom(size)
    connect(location, multipart_threshold=8 * MiB, multipart_part_size=5 * MiB).upload_file(
        source(data), KEY
    )
    assert stored(location) == (
        data,
        {
            "zodb-key": KEY,
            "zodb-size": str(size),
            "zodb-sha256": hashlib.sha256(data).hexdigest(),
        },
    )


def test_upload_again_replaces_the_object(location, connect, source, target):
    """A retried transaction may upload under the same key."""
    client = connect(location)
    client.upload_file(source(b"first"), KEY)
    client.upload_file(source(b"second one"), KEY)
    client.download_file(KEY, str(target))
    assert target.read_bytes() == b"second one"


def test_prefix_is_put_before_keys_and_taken_off_again(location, connect, source, target):
    """Callers see logical keys; other prefixes of the bucket are out of sight."""
    client = connect(location, prefix="my/site/")
    connect(location, prefix="my/site2").upload_file(source(), KEY)
    connect(location).upload_file(source(), OTHER_KEY)
    client.upload_file(source(), KEY)
    assert keys(location, "my/site/") == [f"my/site/{KEY}"]
    assert list(client.list_objects("")) == [KEY]
    ((listed,),) = client.list_pages("blobs/")
    assert (listed.key, listed.size) == (KEY, 10)
    client.copy_object(KEY, OTHER_KEY)
    client.download_file(OTHER_KEY, str(target))
    assert client.head_object(OTHER_KEY)["ContentLength"] == 10
    assert client.delete_objects([KEY]) == {}
    client.delete_object(OTHER_KEY)
    assert keys(location) == [OTHER_KEY, f"my/site2/{KEY}"]


def test_local_file_that_is_missing_is_an_os_error(moto, connect, target):
    """The disk is not S3."""
    client = connect(moto)
    with pytest.raises(FileNotFoundError):
        client.upload_file(str(target), KEY)
    client.upload_file(__file__, KEY)
    with pytest.raises(FileNotFoundError):
        client.download_file(KEY, str(target / "nowhere"))


def test_full_disk_is_an_os_error(moto, connect, source):
    """Retrying S3 would not help, nor is an object damaged."""
    client = connect(moto)
    client.upload_file(source(), KEY)
    with pytest.raises(OSError) as caught:
        client.download_file(KEY, "/dev/full")
    assert not isinstance(caught.value, S3OperationError)


def test_threads_share_a_client_from_its_first_use(moto, connect, source, tmp_path):
    """The boto3 client is made once, though all ask for it at the same moment."""
    client = connect(moto)
    path = source()
    barrier = threading.Barrier(8)
    errors = []

    def work(number):
        try:
            barrier.wait(10)
            client.upload_file(path, f"blobs/{number}/1.blob")
            client.download_file(f"blobs/{number}/1.blob", str(tmp_path / str(number)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    assert len(list(client.list_objects("blobs/"))) == 8


def test_closed_client_opens_again(moto, connect, source, target):
    """Closing frees connections and nothing else."""
    client = connect(moto)
    client.upload_file(source(), KEY)
    client.close()
    client.close()
    client.download_file(KEY, str(target))
    assert target.read_bytes() == b"some bytes"


def test_forked_child_uses_a_client_that_the_parent_has_used(location, connect, source, target):
    """A child has connections and threads of its own, for parts as well."""
    client = connect(location, multipart_threshold=6 * MiB, multipart_part_size=5 * MiB)
    small, large = source(), source(os.urandom(7 * MiB))
    client.upload_file(small, KEY)
    client.upload_file(large, OTHER_KEY)

    def child():
        client.download_file(OTHER_KEY, str(target))
        client.upload_file(large, "blobs/5/5.blob")
        client.close()

    in_child(child)
    assert target.stat().st_size == 7 * MiB
    client.download_file("blobs/5/5.blob", str(target))
    assert list(client.list_objects("blobs/")) == [KEY, OTHER_KEY, "blobs/5/5.blob"]


# How many requests


def test_small_blob_takes_one_request_each_way(s3, connect, latency_proxy, source, target):
    """One PUT without Expect, one GET without HEAD; a missing object takes one GET, too."""
    proxy = latency_proxy(s3.endpoint_url)
    client = connect(dataclasses.replace(s3, endpoint_url=proxy.endpoint_url))
    client.upload_file(source(os.urandom(MiB)), KEY)
    counted = proxy.stats()
    assert counted["kinds"] == {"put": 1}
    assert counted["expect_continue"] == 0
    proxy.reset()
    client.download_file(KEY, str(target))
    assert proxy.stats()["methods"] == {"GET": 1}
    proxy.reset()
    with pytest.raises(MissingObjectError):
        client.download_file(OTHER_KEY, str(target))
    assert proxy.stats()["methods"] == {"GET": 1}


def test_file_below_the_threshold_takes_one_put(s3, connect, latency_proxy, source):
    """Up to the default threshold of 64 MiB nothing goes in parts."""
    proxy = latency_proxy(s3.endpoint_url)
    client = connect(dataclasses.replace(s3, endpoint_url=proxy.endpoint_url))
    client.upload_file(source(bytes(20 * MiB)), KEY)
    assert proxy.stats()["kinds"] == {"put": 1}


def test_file_from_the_threshold_on_goes_in_parts(s3, connect, latency_proxy, source, target):
    """As many parts as the part size makes, and one GET back."""
    proxy = latency_proxy(s3.endpoint_url)
    client = connect(
        dataclasses.replace(s3, endpoint_url=proxy.endpoint_url),
        multipart_threshold=11 * MiB,
        multipart_part_size=5 * MiB,
    )
    data = os.urandom(11 * MiB)
    client.upload_file(source(data), KEY)
    assert proxy.stats()["kinds"] == {"mp-create": 1, "mp-part": 3, "mp-complete": 1}
    proxy.reset()
    client.download_file(KEY, str(target))
    assert proxy.stats()["kinds"] == {"get": 1}
    assert target.read_bytes() == data


def test_put_carries_length_and_signed_digest(moto, connect, faulty, source):
    """The server can check the bytes, and no trailers are sent that many servers refuse."""
    server, behind = faulty(moto)
    client = connect(behind, multipart_threshold=8 * MiB, multipart_part_size=5 * MiB)
    for size in (10, 2 * MiB, 9 * MiB):
        client.upload_file(source(os.urandom(size)), KEY)
    puts = [request for request in server.requests if request.method == "PUT"]
    assert len(puts) == 4
    for request in puts:
        assert int(request.headers["Content-Length"]) == len(request.body)
        digest = hashlib.sha256(request.body).hexdigest()
        assert request.headers["x-amz-content-sha256"] == digest
        assert "transfer-encoding" not in request.headers
        assert "aws-chunked" not in request.headers.get("Content-Encoding", "")


MEMORY = """
import os, resource, sys
from zodb_s3blobs.s3client import S3Client
endpoint, access, secret, bucket, source, target = sys.argv[1:]
client = S3Client(bucket, "", endpoint, "us-east-1", access, secret, addressing_style="path",
                  multipart_threshold=int({threshold}))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
client.upload_file(os.__file__, "blobs/1/1.blob")
client.download_file("blobs/1/1.blob", target)
before = peak()
client.upload_file(source, "blobs/1/2.blob")
client.download_file("blobs/1/2.blob", target)
assert os.path.getsize(target) == 160 << 20
print((peak() - before) >> 10)
"""


@pytest.mark.parametrize("threshold", [1 << 30, 1 << 20])
def test_memory_does_not_grow_with_the_blob(s3, tmp_path, threshold):
    """160 MB take less than 64 MB more, in one request and in parts."""
    large = tmp_path / "large"
    with open(large, "wb") as file:
        file.truncate(160 * MiB)
    code = MEMORY.format(threshold=threshold)
    arguments = [s3.endpoint_url, s3.access_key, s3.secret_key, s3.bucket]
    arguments += [str(large), str(tmp_path / "target")]
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 64


# Listing


def test_listing_is_sorted_lazy_and_complete(rclone, s3, connect, faulty):
    """Beyond the 1000 keys of a page; the second page is asked for when it is due."""
    expected = sorted(f"blobs/{number:x}/1.blob" for number in range(1005))
    for key in expected:
        path = rclone.directory / "buckets" / s3.bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    server, behind = faulty(s3)
    client = connect(behind)
    listing = client.list_objects("blobs/")
    assert server.requests == []
    first = next(listing)
    assert len(server.requests) == 1
    assert [first, *listing] == expected
    assert len(server.requests) == 2
    assert [len(page) for page in client.list_pages("blobs/")] == [1000, 5]
    assert list(client.list_objects("blobs/f/")) == ["blobs/f/1.blob"]


def test_listing_of_nothing_is_empty(location, connect):
    """A new bucket has no keys."""
    client = connect(location, prefix="site")
    assert list(client.list_objects("blobs/")) == []
    assert [page for page in client.list_pages("blobs/") if page] == []


def test_listing_keeps_odd_keys_as_they_are(moto, connect):
    """What others put under the prefix is reported letter by letter."""
    odd = ["blobs/a b", "blobs/a%20b", "blobs/a+b", "blobs/<&>", "blobs/\u00fc"]
    for key in odd:
        store(moto, f"site/{key}", b"")
    client = connect(moto, prefix="site")
    assert sorted(client.list_objects("")) == sorted(odd)
    assert client.delete_objects(odd) == {}
    assert keys(moto) == []


def test_listing_goes_on_behind_a_key(location, connect):
    """Whether there is such a key or not; other prefixes stay out of sight."""
    for key in ("blobs/1/a", "blobs/1/b", "blobs/2/a", "elsewhere/1"):
        store(location, f"site/{key}", b"")
    store(location, "site2/blobs/1/c", b"")
    client = connect(location, prefix="site")

    def behind(after):
        return [listed.key for page in client.list_pages("blobs/", after) for listed in page]

    assert behind("") == ["blobs/1/a", "blobs/1/b", "blobs/2/a"]
    assert behind("blobs/1/a") == ["blobs/1/b", "blobs/2/a"]
    assert behind("blobs/1/aa") == ["blobs/1/b", "blobs/2/a"]
    assert behind("blobs/2/a") == []
    assert list(client.list_pages("blobs/", "blobs/2/a")) == []


def test_listing_behind_a_key_goes_on_over_pages(rclone, s3, connect, faulty):
    """The key is named in the first request, the following pages by their token."""
    expected = sorted(f"blobs/{number:x}/1.blob" for number in range(1205))
    for key in expected:
        path = rclone.directory / "buckets" / s3.bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    server, behind = faulty(s3)
    pages = list(connect(behind).list_pages("blobs/", expected[99]))
    assert [listed.key for page in pages for listed in page] == expected[100:]
    assert [len(page) for page in pages] == [1000, 105]
    assert ["start-after" in request.target for request in server.requests] == [True, False]


def test_listed_objects_have_an_age_by_the_servers_clock(location, connect, monkeypatch):
    """Ours may be wrong, or show another zone; the age is that of the listing."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        before = time.time()
        store(location, KEY, b"")
        ((listed,),) = connect(location).list_pages("blobs/")
    finally:
        monkeypatch.undo()
        time.tzset()
    assert before - 2 < listed.modified < time.time() + 2
    assert before - 2 < listed.listed < time.time() + 2
    assert 0 <= listed.age < 10


def test_age_of_a_listed_object_is_never_negative(moto, connect, faulty):
    """The listing's date has whole seconds, and a balancer's clock may differ."""
    store(moto, KEY, b"")
    server, behind = faulty(moto)
    set_date(server, "Sat, 01 Jan 2022 00:00:00 GMT")
    ((listed,),) = connect(behind).list_pages("blobs/")
    assert listed.listed == 1640995200
    assert listed.modified > listed.listed
    assert listed.age == 0


def set_date(server, *values):
    """Let the server's answers have these dates in their heads."""

    def change(request, answer):
        answer.headers = [header for header in answer.headers if header[0].lower() != "date"]
        answer.headers += [("Date", value) for value in values]

    server.change = change


@pytest.mark.parametrize(
    "dates", [[], [""], ["soon"], ["Sat, 01 Foo 2022 00:00:00 GMT"], ["2022-01-01"]]
)
def test_listing_without_a_usable_date_shows_no_age(moto, connect, faulty, caplog, dates):
    """Whoever deletes by age finds all of it new; an operator finds the reason in the log."""
    store(moto, KEY, b"12345")
    server, behind = faulty(moto)
    set_date(server, *dates)
    client = connect(behind)
    ((listed,),) = client.list_pages("blobs/")
    assert (listed.key, listed.size, listed.age) == (KEY, 5, 0)
    assert "without usable dates" in caplog.text
    assert list(client.list_objects("")) == [KEY]


@pytest.mark.parametrize("text", [b"", b"<LastModified>soon</LastModified>"])
def test_listed_object_without_a_usable_date_shows_no_age(moto, connect, faulty, text):
    """Nor is the listing an error for those who do not ask for ages."""
    store(moto, KEY, b"12345")
    server, behind = faulty(moto)

    def change(request, answer):
        answer.body = re.sub(rb"<LastModified>.*?</LastModified>", text, answer.body)
        answer.headers = [item for item in answer.headers if item[0].lower() != "content-length"]

    server.change = change
    client = connect(behind)
    ((listed,),) = client.list_pages("blobs/")
    assert (listed.key, listed.size, listed.age) == (KEY, 5, 0)
    assert list(client.list_objects("")) == [KEY]


def test_truncated_listing_without_a_token_is_an_error(connect, moto, faulty):
    """A listing that cannot be continued is not taken for complete, nor repeated for ever."""
    server, behind = faulty(moto)
    body = (
        b"<ListBucketResult><IsTruncated>true</IsTruncated>"
        b"<Contents><Key>blobs/1/2.blob</Key><Size>1</Size></Contents></ListBucketResult>"
    )
    server.instead = lambda request: Answer(200, [("Content-Type", "application/xml")], body)
    with pytest.raises(S3OperationError):
        for _ in zip(range(10), connect(behind).list_objects(""), strict=False):
            pass


# Copying


def test_copy_has_the_bytes_and_its_own_key(location, connect, source, target):
    """The copy is verified against the key that it is read under."""
    client = connect(location)
    client.upload_file(source(), KEY)
    client.copy_object(KEY, OTHER_KEY)
    data, metadata = stored(location, OTHER_KEY)
    assert data == b"some bytes"
    assert metadata["zodb-key"] == OTHER_KEY
    assert metadata["zodb-size"] == "10"
    assert len(metadata["zodb-sha256"]) == 64
    client.download_file(OTHER_KEY, str(target))
    assert target.read_bytes() == b"some bytes"
    assert stored(location, KEY)[1]["zodb-key"] == KEY


def test_copy_of_an_older_object_adds_no_metadata(moto, connect, target):
    """Nothing is claimed about bytes that were never checked."""
    store(moto, KEY, b"older")
    client = connect(moto)
    client.copy_object(KEY, OTHER_KEY)
    assert stored(moto, OTHER_KEY) == (b"older", {})
    client.download_file(OTHER_KEY, str(target))


@pytest.mark.parametrize("sse_key", [None, "0123456789abcdef0123456789abcdeX"])
def test_large_object_is_copied_in_parts(
    moto, connect, faulty, source, target, monkeypatch, sse_key
):
    """With its own key and the same encryption, and each part within the read time-out."""
    monkeypatch.setattr("zodb_s3blobs.s3client.LARGEST_SINGLE_COPY", 8 * MiB)
    server, behind = faulty(moto)
    client = connect(behind, multipart_part_size=5 * MiB, sse_customer_key=sse_key)
    data = os.urandom(11 * MiB)
    client.upload_file(source(data), KEY)
    del server.requests[:]
    client.copy_object(KEY, OTHER_KEY)
    assert sum("partNumber" in request.target for request in server.requests) == 3
    name = "x-amz-server-side-encryption-customer-key"
    puts = [request for request in server.requests if request.method == "PUT"]
    assert all((name in request.headers) is bool(sse_key) for request in puts)
    client.download_file(OTHER_KEY, str(target))
    assert target.read_bytes() == data
    assert stored(moto, OTHER_KEY)[1]["zodb-key"] == OTHER_KEY


def test_failed_copy_in_parts_leaves_nothing_behind(moto, connect, faulty, source, monkeypatch):
    """Its parts are removed, and the error is of the family."""
    monkeypatch.setattr("zodb_s3blobs.s3client.LARGEST_SINGLE_COPY", 8 * MiB)
    server, behind = faulty(moto)
    client = connect(behind, multipart_part_size=5 * MiB, max_attempts=1)
    client.upload_file(source(bytes(11 * MiB)), KEY)

    def instead(request):
        if "partNumber=2" in request.target:
            return s3_error(500, "InternalError")

    server.instead = instead
    with pytest.raises(TransientS3Error):
        client.copy_object(KEY, OTHER_KEY)
    assert keys(moto) == [KEY]
    assert uploads_under_way(moto) == []


def test_operation_that_the_server_lacks_is_permanent(moto, connect, faulty, source):
    """501 does not go away; Ceph answers so to a copy under SSE-C."""
    server, behind = faulty(moto)
    client = connect(behind, max_attempts=1)
    client.upload_file(source(), KEY)
    server.instead = lambda request: (
        s3_error(501, "NotImplemented") if "x-amz-copy-source" in request.headers else None
    )
    with pytest.raises(PermanentS3Error, match="501 NotImplemented"):
        client.copy_object(KEY, OTHER_KEY)


# Deleting


def test_deleting_an_absent_object_succeeds(location, connect):
    """Two sweeps at the same time do not disturb each other."""
    client = connect(location)
    client.delete_object(KEY)
    assert client.delete_objects([KEY, OTHER_KEY]) == {}
    assert client.delete_objects([]) == {}
    assert client.delete_objects(iter(())) == {}


def test_many_are_deleted_in_batches_with_their_md5(moto, connect, faulty):
    """A thousand to a request, each with the Content-MD5 that older servers want."""
    doomed = [f"blobs/{number:x}/1.blob" for number in range(1001)]
    for key in doomed[::100]:
        store(moto, key, b"")
    server, behind = faulty(moto)
    client = connect(behind)
    assert client.delete_objects(iter(doomed)) == {}
    assert server.kinds() == ["POST delete"] * 2
    for request in server.requests:
        digest = base64.b64encode(hashlib.md5(request.body).digest()).decode()
        assert request.headers["Content-MD5"] == digest
    assert keys(moto) == []


def test_keys_that_a_batch_refuses_are_returned(moto, connect, faulty, source):
    """A server answers 200 and refuses single keys: the caller learns which, and why."""
    server, behind = faulty(moto)
    body = (
        b"<DeleteResult><Error><Key>site/blobs/1/3.blob</Key><Code>AccessDenied</Code>"
        b"<Message>no</Message></Error></DeleteResult>"
    )
    server.instead = lambda request: Answer(200, [("Content-Type", "application/xml")], body)
    client = connect(behind, prefix="site")
    assert client.delete_objects([KEY, OTHER_KEY]) == {OTHER_KEY: "AccessDenied"}


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (501, "NotImplemented"),
        (400, "MissingContentMD5"),
        (400, "InvalidRequest"),
        (400, "MalformedXML"),
        (405, "MethodNotAllowed"),
        (501, "Whatever"),
    ],
)
def test_server_without_batches_gets_single_deletions_and_that_is_remembered(
    moto, connect, faulty, status, code
):
    """The batch is tried once in the life of a client."""
    server, behind = faulty(moto)
    server.instead = lambda request: (
        s3_error(status, code) if request.kind == "POST delete" else None
    )
    for key in (KEY, OTHER_KEY):
        store(moto, key, b"")
    client = connect(behind, max_attempts=1)
    assert client.delete_objects([KEY, OTHER_KEY]) == {}
    assert server.kinds() == ["POST delete", "DELETE", "DELETE"]
    assert keys(moto) == []
    assert client.delete_objects([KEY]) == {}
    assert server.kinds() == ["POST delete", "DELETE", "DELETE", "DELETE"]


def test_single_deletions_report_the_code_of_what_is_refused(moto, connect, faulty):
    """The mapping is the same, whichever way the server deletes; the others are deleted."""
    server, behind = faulty(moto)

    def instead(request):
        if request.kind == "POST delete":
            return s3_error(501, "NotImplemented")
        if request.target.endswith(OTHER_KEY):
            return s3_error(403, "AccessDenied")

    server.instead = instead
    store(moto, KEY, b"")
    refused = connect(behind, max_attempts=1).delete_objects([OTHER_KEY, KEY])
    assert refused == {OTHER_KEY: "AccessDenied"}
    assert keys(moto) == []


def test_batch_that_fails_for_another_reason_is_an_error(moto, connect, faulty):
    """A refused permission or a busy server is no sign that batches are unknown."""
    server, behind = faulty(moto)
    client = connect(behind, max_attempts=1)
    server.instead = lambda request: s3_error(403, "AccessDenied")
    with pytest.raises(PermanentS3Error, match="s3:DeleteObject"):
        client.delete_objects([KEY])
    server.instead = lambda request: s3_error(503, "SlowDown")
    with pytest.raises(TransientS3Error):
        client.delete_objects([KEY])
    server.instead = lambda request: None
    assert client.delete_objects([KEY]) == {}
    # A denied batch is tried with one key: Ceph denies batches to those who may delete.
    assert [kind for kind in server.kinds() if kind == "POST delete"] == ["POST delete"] * 3


# What is missing


def test_missing_object_is_told_apart_from_a_missing_bucket(location, connect, target):
    """The one may mean that a blob is gone, the other only that the configuration is wrong."""
    client = connect(location)
    with pytest.raises(MissingObjectError) as caught:
        client.download_file(KEY, str(target))
    assert (caught.value.operation, caught.value.key) == ("download", KEY)
    assert not isinstance(caught.value, (TransientS3Error, PermanentS3Error))
    assert not target.exists()
    assert client.head_object(KEY) is None
    with pytest.raises(MissingObjectError):
        client.copy_object(KEY, OTHER_KEY)


OPERATIONS = {
    "upload": lambda client, path: client.upload_file(__file__, KEY),
    "download": lambda client, path: client.download_file(KEY, str(path)),
    "copy": lambda client, path: client.copy_object(KEY, OTHER_KEY),
    "list": lambda client, path: list(client.list_objects("")),
    "delete": lambda client, path: client.delete_objects([KEY]),
    "head": lambda client, path: client.head_object(KEY),
}


@pytest.mark.parametrize("operation", ["upload", "download", "copy", "list", "delete"])
def test_missing_bucket_is_permanent_and_says_what_to_do(location, connect, target, operation):
    """It is never taken for a missing object, which a read would report as a lost blob."""
    client = connect(location, bucket_name="no-such-bucket")
    with pytest.raises(PermanentS3Error, match=r"NoSuchBucket.*create the bucket"):
        OPERATIONS[operation](client, target)


@pytest.mark.parametrize("size", [10, 2 * MiB, 9 * MiB])
def test_bucket_is_created_with_the_first_upload_where_configured(
    location, connect, source, target, size
):
    """Small, large and in parts."""
    client = connect(
        location,
        bucket_name=f"new-{location.bucket}",
        create_bucket=True,
        multipart_threshold=8 * MiB,
        multipart_part_size=5 * MiB,
    )
    client.upload_file(source(bytes(size)), KEY)
    client.download_file(KEY, str(target))
    assert target.stat().st_size == size
    client.upload_file(source(bytes(size)), OTHER_KEY)
    assert list(client.list_objects("")) == [KEY, OTHER_KEY]


def test_reading_never_creates_a_bucket(moto, connect, target):
    """A name that is misspelt must not say that the data is gone."""
    client = connect(moto, bucket_name="misspelt", create_bucket=True)
    with pytest.raises(PermanentS3Error):
        client.download_file(KEY, str(target))
    with pytest.raises(PermanentS3Error):
        client.copy_object(KEY, OTHER_KEY)
    assert list(client.list_objects("")) == []
    buckets = boto3_client(moto).list_buckets()["Buckets"]
    assert "misspelt" not in [bucket["Name"] for bucket in buckets]


@pytest.mark.parametrize("operation", ["upload", "download"])
def test_answer_of_something_else_than_s3_is_transient(moto, connect, faulty, target, operation):
    """A maintenance page with status 200 is no stored blob, and no blob's bytes."""
    server, behind = faulty(moto)
    page = Answer(200, [("Content-Type", "text/html")], b"<h1>Back soon</h1>")
    server.instead = lambda request: page
    with pytest.raises(TransientS3Error, match="something else than S3"):
        OPERATIONS[operation](connect(behind), target)


def test_bucket_that_another_process_created_meanwhile_is_used(moto, connect, faulty, source):
    """The race for the first upload has no loser."""
    server, behind = faulty(moto)
    answers = [s3_error(404, "NoSuchBucket"), s3_error(409, "BucketAlreadyOwnedByYou")]
    server.instead = lambda request: answers.pop(0) if answers else None
    connect(behind, create_bucket=True).upload_file(source(), KEY)
    assert keys(moto) == [KEY]


# Faults on the way


@pytest.mark.parametrize("reset", [False, True])
def test_cut_answer_is_asked_for_again(s3, connect, faulty, source, target, reset):
    """A host that goes down in the middle of a body costs a retry and nothing else."""
    server, behind = faulty(s3)
    data = os.urandom(3 * MiB)
    client = connect(behind)
    client.upload_file(source(data), KEY)
    cuts = [0, 2 * MiB]

    def change(request, answer):
        if request.method == "GET" and cuts:
            answer.cut_after, answer.reset = cuts.pop(), reset

    server.change = change
    client.download_file(KEY, str(target))
    assert target.read_bytes() == data
    assert server.kinds() == ["PUT", "GET", "GET", "GET"]


@pytest.mark.parametrize("reset", [False, True])
def test_answer_that_is_always_cut_is_transient(s3, connect, faulty, source, target, reset):
    """After a few attempts the caller decides; the transaction may be tried again."""
    server, behind = faulty(s3)
    client = connect(behind)
    client.upload_file(source(os.urandom(2 * MiB)), KEY)

    def change(request, answer):
        answer.cut_after, answer.reset = MiB, reset

    server.change = change
    with pytest.raises(TransientS3Error) as caught:
        client.download_file(KEY, str(target))
    assert isinstance(caught.value, TransientError)
    assert caught.value.key == KEY
    assert 1 < server.kinds().count("GET") < 10


def test_answer_that_ends_early_is_not_accepted(s3, connect, faulty, source, target):
    """Also where the server says nothing of a length: the stored one is compared."""
    server, behind = faulty(s3)
    data = os.urandom(2 * MiB)
    client = connect(behind)
    client.upload_file(source(data), KEY)

    def change(request, answer):
        answer.headers.append(("Transfer-Encoding", "chunked"))
        half = answer.body[:MiB]
        answer.body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(half), half)

    server.change = change
    with pytest.raises(IntegrityError, match="length"):
        client.download_file(KEY, str(target))


def flip(request, answer):
    """Change one bit of a body."""
    if request.method == "GET":
        body = bytearray(answer.body)
        body[len(body) // 2] ^= 1
        answer.body = bytes(body)


def test_changed_byte_is_an_integrity_error(location, connect, faulty, source, target):
    """One bit differs, the length does not: the digest tells, whatever the server."""
    server, behind = faulty(location)
    client = connect(behind)
    client.upload_file(source(os.urandom(1000)), KEY)
    server.change = flip
    with pytest.raises(IntegrityError, match="SHA-256") as caught:
        client.download_file(KEY, str(target))
    assert (caught.value.operation, caught.value.key) == ("download", KEY)


def test_checksum_of_the_server_is_compared_where_configured(moto, connect, faulty, target):
    """s3-checksum when_supported: also for an object without our metadata."""
    plain = boto3_client(moto)
    plain.put_object(Bucket=moto.bucket, Key=KEY, Body=b"some bytes", ChecksumAlgorithm="SHA256")
    plain.close()
    server, behind = faulty(moto)
    digest = base64.b64encode(hashlib.sha256(b"some bytes").digest()).decode()

    def change(request, answer):
        flip(request, answer)
        answer.headers.append(("x-amz-checksum-sha256", digest))

    server.change = change
    connect(behind).download_file(KEY, str(target))
    with pytest.raises(IntegrityError):
        connect(behind, checksum="when_supported").download_file(KEY, str(target))


def test_byte_changed_on_the_way_once_is_asked_for_again(s3, connect, faulty, source, target):
    """Only what is wrong each time is wrong in the bucket."""
    server, behind = faulty(s3)
    client = connect(behind)
    data = os.urandom(1000)
    client.upload_file(source(data), KEY)

    def change_once(request, answer):
        flip(request, answer)
        server.change = lambda request, answer: None

    server.change = change_once
    client.download_file(KEY, str(target))
    assert target.read_bytes() == data


def test_object_under_another_key_is_an_integrity_error(location, connect, source, target):
    """Somebody copied the object of another revision over it: its bytes are whole, yet wrong."""
    client = connect(location)
    client.upload_file(source(), KEY)
    data, metadata = stored(location)
    store(location, OTHER_KEY, data, metadata)
    with pytest.raises(IntegrityError, match="key"):
        client.download_file(OTHER_KEY, str(target))


@pytest.mark.parametrize("names", [str.lower, str.title, str.upper])
def test_metadata_counts_in_any_case(moto, connect, faulty, source, target, names):
    """HTTP's names have no case, and servers written in Go capitalise them."""
    server, behind = faulty(moto)
    client = connect(behind)
    client.upload_file(source(), KEY)

    def change(request, answer):
        flip(request, answer)
        answer.headers = [(names(name), value) for name, value in answer.headers]

    server.change = change
    with pytest.raises(IntegrityError, match="SHA-256"):
        client.download_file(KEY, str(target))


def test_object_without_our_metadata_is_accepted_by_its_length(location, connect, target):
    """Objects of the older package, and of servers that forget metadata, stay readable."""
    store(location, KEY, b"older bytes")
    connect(location).download_file(KEY, str(target))
    assert target.read_bytes() == b"older bytes"


def test_bytes_that_the_server_refuses_are_an_integrity_error(moto, connect, faulty, source):
    """The digest of what arrived was not the signed one."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(400, "XAmzContentSHA256Mismatch")
    with pytest.raises(IntegrityError):
        connect(behind).upload_file(source(), KEY)


def test_upload_changed_on_its_way_is_found_by_the_next_read(s3, connect, faulty, source, target):
    """rclone does not compare what came with the digest that was signed; Ceph and AWS refuse it."""
    server, behind = faulty(s3)

    def instead(request):
        request.body = request.body[:-1] + bytes([request.body[-1] ^ 1])

    server.instead = instead
    connect(behind).upload_file(source(), KEY)
    with pytest.raises(IntegrityError, match="SHA-256"):
        connect(s3).download_file(KEY, str(target))


def test_busy_server_is_asked_again(moto, connect, faulty, source, target):
    """Some 503 answers cost time and nothing else, in both directions."""
    server, behind = faulty(moto)
    answers = [s3_error(503, "SlowDown"), None, s3_error(500, "InternalError"), None]
    server.instead = lambda request: answers.pop(0) if answers else None
    client = connect(behind, max_attempts=2)
    client.upload_file(source(), KEY)
    client.download_file(KEY, str(target))
    assert server.kinds() == ["PUT", "PUT", "GET", "GET"]


@pytest.mark.parametrize("operation", ["upload", "download", "list", "delete"])
def test_expired_credentials_are_asked_for_anew_once(moto, connect, faulty, target, operation):
    """A role's token that was not refreshed in time costs a second request."""
    server, behind = faulty(moto)
    client = connect(behind, max_attempts=1)
    client.upload_file(__file__, KEY)
    del server.requests[:]
    answers = [s3_error(400, "ExpiredToken")]
    server.instead = lambda request: answers.pop() if answers else None
    OPERATIONS[operation](client, target)
    server.instead = lambda request: s3_error(400, "ExpiredToken")
    with pytest.raises(TransientS3Error):
        OPERATIONS[operation](client, target)
    assert len(server.requests) <= 5


@pytest.mark.parametrize("operation", OPERATIONS)
def test_server_that_stays_busy_is_transient(moto, connect, faulty, target, operation):
    """The number of attempts is the configured one."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(503, "SlowDown")
    with pytest.raises(TransientS3Error, match="503"):
        OPERATIONS[operation](connect(behind, max_attempts=2), target)
    assert len(server.requests) == 2


@pytest.mark.parametrize("operation", OPERATIONS)
def test_refused_connection_is_transient(moto, connect, target, operation):
    """S3 that is down says nothing about what it holds."""
    client = connect(moto, endpoint_url=refused_endpoint(), max_attempts=1)
    with pytest.raises(TransientS3Error) as caught:
        OPERATIONS[operation](client, target)
    assert not isinstance(caught.value, KeyError)
    assert not target.exists()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_server_that_never_answers_is_waited_for_in_bounds(moto, connect, target, operation):
    """The time-out and the number of attempts bound the wait."""
    with SilentServer() as server:
        client = connect(
            moto,
            endpoint_url=server.endpoint_url,
            read_timeout=0.3,
            connect_timeout=0.3,
            max_attempts=2,
        )
        begun = time.monotonic()
        with pytest.raises(TransientS3Error):
            OPERATIONS[operation](client, target)
        assert time.monotonic() - begun < 15
        assert server.connections == 2


@pytest.mark.parametrize("size", [2 * MiB, 9 * MiB])
def test_large_upload_to_a_server_that_never_answers_ends_in_bounds(moto, connect, source, size):
    """Neither "Expect: 100-continue" nor parts wait for ever."""
    with SilentServer() as server:
        client = connect(
            moto,
            endpoint_url=server.endpoint_url,
            read_timeout=0.3,
            connect_timeout=0.3,
            max_attempts=1,
            multipart_threshold=8 * MiB,
            multipart_part_size=5 * MiB,
        )
        begun = time.monotonic()
        with pytest.raises(TransientS3Error):
            client.upload_file(source(bytes(size)), KEY)
        assert time.monotonic() - begun < 15


def test_answer_that_stops_in_its_body_is_waited_for_in_bounds(
    s3, connect, latency_proxy, source, target
):
    """A connection that stays open without a byte is given up."""
    uploader = connect(s3)
    uploader.upload_file(source(bytes(3 * MiB)), KEY)
    proxy = latency_proxy(s3.endpoint_url, down_mbps=0.01)
    client = connect(
        dataclasses.replace(s3, endpoint_url=proxy.endpoint_url), read_timeout=0.3, max_attempts=1
    )
    begun = time.monotonic()
    with pytest.raises(TransientS3Error):
        client.download_file(KEY, str(target))
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("size", [1000, MiB // 2, 5 * MiB])
def test_answer_that_trickles_is_waited_for_in_bounds(connect, target, size):
    """A byte now and then is no progress, also of a small body."""
    head = b'HTTP/1.1 200 OK\r\nETag: "x"\r\nContent-Length: %d\r\n\r\n' % size

    def trickle(connection):
        connection.recv(65536)
        connection.sendall(head)
        while True:
            connection.sendall(b"x")
            time.sleep(0.05)

    with RawServer(trickle) as server:
        location = S3Location(server.endpoint_url, "access", "secret", "bucket")
        client = connect(location, read_timeout=0.3, max_attempts=1)
        with pytest.raises(TransientS3Error, match="bytes came in time"):
            client.download_file(KEY, str(target))


def test_upload_that_the_server_takes_too_slowly_is_given_up(connect, source, monkeypatch):
    """The whole of an upload is bounded by its size, not only each step."""
    monkeypatch.setattr("zodb_s3blobs.s3client.SLOWEST_RATE", 8 * MiB)
    taken = []

    def sip(connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while piece := connection.recv(2048):
            taken.append(len(piece))
            time.sleep(0.01)

    with RawServer(sip) as server:
        location = S3Location(server.endpoint_url, "access", "secret", "bucket")
        client = connect(location, read_timeout=1, connect_timeout=1, max_attempts=1)
        with pytest.raises(TransientS3Error):
            client.upload_file(source(bytes(16 * MiB)), KEY)
    assert 0 < sum(taken) < 16 * MiB


# Uploads in parts


PARTS = {"multipart_threshold": 8 * MiB, "multipart_part_size": 5 * MiB, "max_attempts": 1}


def uploads_under_way(location):
    """Return the unfinished multipart uploads of a bucket."""
    client = boto3_client(location)
    found = client.list_multipart_uploads(Bucket=location.bucket).get("Uploads", [])
    client.close()
    return found


def test_failed_part_leaves_nothing_behind(moto, connect, faulty, source):
    """Unfinished parts are invisible and billed: they are removed."""
    server, behind = faulty(moto)

    def instead(request):
        if "partNumber=2" in request.target:
            return s3_error(500, "InternalError")

    server.instead = instead
    with pytest.raises(TransientS3Error):
        connect(behind, **PARTS).upload_file(source(bytes(11 * MiB)), KEY)
    assert "DELETE uploadId" in server.kinds()
    assert uploads_under_way(moto) == []
    assert keys(moto) == []


def test_parts_that_the_server_refuses_go_in_one_request(moto, connect, faulty, source, target):
    """Seen at a provider: UploadPart answers 400 for no reason."""
    server, behind = faulty(moto)

    def instead(request):
        if "partNumber" in request.target:
            return s3_error(400, "InvalidRequest")

    server.instead = instead
    client = connect(behind, **PARTS)
    data = os.urandom(11 * MiB)
    client.upload_file(source(data), KEY)
    client.download_file(KEY, str(target))
    assert target.read_bytes() == data
    assert uploads_under_way(moto) == []


def test_lost_answer_to_the_completion_is_no_permanent_failure(moto, connect, faulty, source):
    """The retry meets an upload that is no more: the transaction may be tried again."""
    server, behind = faulty(moto)
    lost = []

    def change(request, answer):
        if request.kind == "POST uploadId" and not lost:
            lost.append(request)
            answer.status, answer.body = 500, b""  # after it was done

    server.change = change
    try:
        connect(behind, **{**PARTS, "max_attempts": 3}).upload_file(source(bytes(11 * MiB)), KEY)
    except TransientS3Error:
        pass
    assert lost
    assert uploads_under_way(moto) == []


@pytest.mark.parametrize("threshold", [8 * MiB, 1 << 30])
def test_cancelled_upload_ends_early(s3, connect, latency_proxy, source, threshold):
    """An abort does not wait until a slow wire has taken all bytes; no object appears."""
    size = 40 * MiB  # more than sockets buffer
    proxy = latency_proxy(s3.endpoint_url, up_mbps=4)
    client = connect(
        dataclasses.replace(s3, endpoint_url=proxy.endpoint_url),
        multipart_threshold=threshold,
        multipart_part_size=5 * MiB,
    )
    cancelled = Cancellation()
    ended = []

    def upload():
        try:
            client.upload_file(path, KEY, cancelled)
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    path = source(bytes(size))
    thread = threading.Thread(target=upload, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while proxy.stats()["bytes_up"] < 100_000 and time.monotonic() < deadline:
        time.sleep(0.01)
    cancelled.cancel()
    thread.join(30)
    assert [type(error) for error in ended] == [UploadCancelled]
    assert proxy.stats()["bytes_up"] < size
    proxy.set(up_mbps=0)
    assert keys(s3) == []


@pytest.mark.parametrize("size", [2 * MiB, 9 * MiB])
def test_upload_cancelled_before_it_begins_sends_no_object(moto, connect, source, size):
    """What is no longer wanted does not appear."""
    cancelled = Cancellation()
    cancelled.cancel()
    with pytest.raises(UploadCancelled):
        connect(moto, **PARTS).upload_file(source(bytes(size)), KEY, cancelled)
    assert keys(moto) == []
    assert uploads_under_way(moto) == []


def test_upload_in_parts_at_interpreter_shutdown(moto, tmp_path):
    """A commit in an atexit handler does not depend on the size of its blob."""
    large = tmp_path / "large"
    large.write_bytes(bytes(9 * MiB))
    code = f"""
import atexit, os
from zodb_s3blobs.s3client import S3Client
client = S3Client({moto.bucket!r}, "", {moto.endpoint_url!r}, "us-east-1", {moto.access_key!r},
                  {moto.secret_key!r}, addressing_style="path",
                  multipart_threshold=8 << 20, multipart_part_size=5 << 20)
client.upload_file(os.__file__, "blobs/1/1.blob")
atexit.register(lambda: client.upload_file({str(large)!r}, {KEY!r}))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert KEY in keys(moto), child.stderr


# Refusals, and what they say


@pytest.mark.parametrize(
    ("operation", "permission"),
    [
        ("upload", "s3:PutObject"),
        ("download", "s3:GetObject"),
        ("list", "s3:ListBucket"),
        ("delete", "s3:DeleteObject"),
        ("head", "s3:GetObject"),
        ("copy", "s3:GetObject"),
    ],
)
def test_refused_permission_is_permanent_and_named(
    moto, connect, faulty, target, operation, permission
):
    """Where an object is read it may also be missing: the message says how to tell."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(403, "AccessDenied")
    with pytest.raises(PermanentS3Error, match=permission) as caught:
        OPERATIONS[operation](connect(behind), target)
    reads = operation in ("download", "head", "copy")
    assert ("denied or missing" in str(caught.value)) is reads
    assert ("s3:ListBucket" in str(caught.value)) is (reads or operation == "list")
    # The answer to HEAD does not say why: GET is asked.
    assert len(server.requests) == (2 if operation in ("delete", "head", "copy") else 1)


@pytest.mark.parametrize(
    ("status", "code", "remedy"),
    [
        (403, "InvalidAccessKeyId", "s3-access-key"),
        (403, "SignatureDoesNotMatch", "s3-secret-key"),
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "AuthorizationHeaderMalformed", "s3-region"),
        (418, "Teapot", "418 Teapot"),
    ],
)
def test_refusal_names_the_setting(moto, connect, faulty, target, status, code, remedy):
    """The operator need not look the code up."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(status, code)
    with pytest.raises(PermanentS3Error, match=remedy):
        connect(behind).download_file(KEY, str(target))


def test_wrong_secret_is_permanent_and_not_quoted(s3, connect, source):
    """rclone verifies signatures."""
    client = connect(s3, aws_secret_access_key="hunter2hunter2", max_attempts=1)
    with pytest.raises(PermanentS3Error) as caught:
        client.upload_file(source(), KEY)
    assert "hunter2" not in everything_about(caught.value)
    assert keys(s3) == []


def test_missing_credentials_are_permanent_and_say_what_to_set(moto, connect, source):
    """Without any, boto3 finds none: nothing is sent."""
    client = connect(moto, aws_access_key_id=None, aws_secret_access_key=None)
    with pytest.raises(PermanentS3Error, match="s3-access-key"):
        client.upload_file(source(), KEY)


def test_unknown_profile_is_permanent(moto, connect, source):
    """The error is of the family that the callers know."""
    client = connect(moto, profile="nobody", aws_access_key_id=None, aws_secret_access_key=None)
    with pytest.raises(PermanentS3Error):
        client.upload_file(source(), KEY)


def test_no_secret_in_repr_messages_or_tracebacks(moto, connect, faulty, target):
    """Whatever fails, and whatever the server says: neither the secret nor the SSE-C key."""
    secrets = ["hunter2hunter2hunter2", "0123456789abcdef0123456789abcdeX"]
    server, behind = faulty(moto)
    client = connect(behind, aws_secret_access_key=secrets[0], sse_customer_key=secrets[1])
    texts = [repr(client), str(client)]
    answers = [s3_error(403, "AccessDenied"), s3_error(400, "KeyTooLongError")]
    for answer in answers:
        server.instead = lambda request, answer=answer: answer
        for operation in OPERATIONS.values():
            with pytest.raises(S3OperationError) as caught:
                operation(client, target)
            texts.append(everything_about(caught.value))
    down = connect(
        moto,
        endpoint_url=refused_endpoint(),
        aws_secret_access_key=secrets[0],
        sse_customer_key=secrets[1],
        max_attempts=1,
    )
    with pytest.raises(S3OperationError) as caught:
        down.download_file(KEY, str(target))
    texts.append(everything_about(caught.value))
    assert all(secret not in text for secret in secrets for text in texts)
    signature = server.requests[0].headers["Authorization"].rpartition("=")[2]
    assert all(signature not in text for text in texts)


def test_policy_that_the_server_quotes_is_not_in_the_message(moto, connect, faulty, target):
    """The text of an answer may say more than a log's readers should know."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(403, "AccessDenied", "policy arn:aws:iam::1:secret")
    with pytest.raises(PermanentS3Error) as caught:
        connect(behind).download_file(KEY, str(target))
    assert "arn:aws" not in str(caught.value)


# Encryption and other headers


def test_sse_customer_key_goes_with_each_request_for_an_object(moto, connect, faulty, target):
    """Upload, download, head and both sides of a copy; never a listing or a deletion."""
    server, behind = faulty(moto)
    client = connect(behind, sse_customer_key="0123456789abcdef0123456789abcdeX")
    client.upload_file(__file__, KEY)
    client.download_file(KEY, str(target))
    client.copy_object(KEY, OTHER_KEY)
    list(client.list_objects(""))
    client.delete_objects([KEY])
    name = "x-amz-server-side-encryption-customer-key"
    with_key = [request.method for request in server.requests if name in request.headers]
    assert with_key == ["PUT", "GET", "HEAD", "PUT"]
    copy = server.requests[3]
    source_name = "x-amz-copy-source-server-side-encryption-customer-key"
    assert copy.headers[source_name] == copy.headers[name]


@pytest.mark.parametrize(
    ("options", "headers"),
    [
        ({"sse": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            {"sse": "aws:kms", "sse_kms_key_id": "key-1"},
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "key-1",
            },
        ),
        ({"storage_class": "STANDARD_IA"}, {"x-amz-storage-class": "STANDARD_IA"}),
        ({}, {"x-amz-server-side-encryption": None, "x-amz-storage-class": None}),
    ],
)
def test_headers_of_new_objects_go_with_uploads_parts_and_copies(
    moto, connect, faulty, source, options, headers
):
    """An object is encrypted or stored alike, whichever way it comes into being."""
    server, behind = faulty(moto)
    client = connect(behind, **PARTS, **options)
    client.upload_file(source(), KEY)
    client.upload_file(source(bytes(9 * MiB)), OTHER_KEY)
    client.copy_object(KEY, "blobs/1/4.blob")
    creating = [r for r in server.requests if r.kind in ("PUT", "POST uploads")]
    assert len(creating) == 3
    for request in creating:
        assert {name: request.headers[name] for name in headers} == headers


def test_virtual_addressing_puts_the_bucket_into_the_host(moto, connect, faulty):
    """As AWS wants it; the path has the key only."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(403, "AccessDenied")
    endpoint = behind.endpoint_url.replace("127.0.0.1", "localhost")
    client = connect(behind, endpoint_url=endpoint, addressing_style="virtual", max_attempts=1)
    with pytest.raises(S3OperationError):
        client.head_object(KEY)
    if server.requests:  # where "bucket.localhost" is a name
        assert server.requests[0].target == f"/{KEY}"
        assert server.requests[0].headers["Host"].startswith(f"{moto.bucket}.localhost")


# Construction


@pytest.mark.parametrize(
    "arguments",
    [
        {"bucket_name": "x"},
        {"prefix": "../other"},
        {"endpoint_url": "s3.example.com"},
        {"sse_customer_key": "short", "endpoint_url": "https://s3.example.com"},
        {"sse_customer_key": "k" * 32, "endpoint_url": "http://s3.example.com"},
        {"sse_customer_key": "k" * 32, "use_ssl": False},
    ],
)
def test_value_that_cannot_be_right_is_refused_at_construction(arguments):
    """Code that builds a client without ZConfig gets the same checks."""
    with pytest.raises(ValueError):
        S3Client(**{"bucket_name": "bucket", **arguments})


def test_construction_imports_and_asks_nothing():
    """boto3 comes with the first traffic."""
    code = (
        "import sys; from zodb_s3blobs.s3client import S3Client\n"
        "client = S3Client('bucket', endpoint_url='http://192.0.2.1'); client.close()\n"
        "print([name for name in ('boto3', 'botocore', 's3transfer') if name in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == "[]", child.stderr
