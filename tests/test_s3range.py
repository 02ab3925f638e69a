"""A part of an object: one request, the right bytes, and an error rather than others."""

from contextlib import contextmanager
from contextlib import ExitStack
import dataclasses
import io
import os
import re

import pytest

from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error

from .faults import Answer
from .faults import FaultyServer
from .faults import refused_endpoint
from .faults import s3_error
from .services.location import boto3_client
from .services.location import new_bucket
from .services.process import wait_until
from .storages import make_client
from .storages import random_bytes
from .storages import write_file


KEY = "blobs/1/2.blob"
OTHER_KEY = "blobs/1/3.blob"
DATA = b"0123456789"
MiB = 1 << 20


@pytest.fixture(params=["rclone", "moto_server", pytest.param("ceph", marks=pytest.mark.ceph)])
def location(request):
    """A fresh bucket on each server."""
    return new_bucket(request.getfixturevalue(request.param))


@pytest.fixture
def connect():
    """Return a function that makes a client, which is closed after the test."""
    with ExitStack() as stack:

        def connect(location, **options):
            client = make_client(location, **options)
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
def behind(s3, connect, faulty):
    """(server, client): an object with DATA is behind a server that may misbehave."""
    put(connect(s3), DATA)
    server, location = faulty(s3)
    return server, connect(location, max_pause=0)


def put(client, data, key=KEY):
    """Store an object as a commit does."""
    path = write_file(data)
    client.upload_file(path, key)
    os.remove(path)


def read(client, *bounds, key=KEY):
    """Return the bytes of a part of an object."""
    with client.open_range(key, *bounds) as section:
        return section.read()


def ranges(server):
    """Return the ranges that were asked for, None for all."""
    return [request.headers["Range"] for request in server.requests]


def set_header(answer, name, *values):
    """Let an answer have these values of a header, whatever it had."""
    answer.headers = [item for item in answer.headers if item[0].lower() != name.lower()]
    answer.headers += [(name, value) for value in values]


# Which bytes


BOUNDS = [
    (),
    (0, None),
    (3, None),
    (9, None),
    (0, 1),
    (0, 4),
    (3, 7),
    (0, 10),
    (9, 10),
    (3, 100),
    (0, 1 << 40),
    # Nothing is there.
    (10, None),
    (10, 12),
    (50, None),
    (50, 60),
]


@pytest.mark.parametrize("bounds", BOUNDS)
def test_part_has_the_bytes_from_start_to_below_stop(location, connect, faulty, bounds):
    """With one request and no other, as a slice has it; the size is known before it is read."""
    put(connect(location), DATA)
    server, place = faulty(location)
    expected = DATA[slice(*bounds)] if len(bounds) == 2 else DATA
    with connect(place).open_range(KEY, *bounds) as section:
        assert section.seek(0, io.SEEK_END) == len(expected)
        section.seek(0)
        assert section.read() == expected
        assert section.read() == section.read(1) == b""
    assert server.kinds() == ["GET"]


@pytest.mark.parametrize("bounds", [(0, 0), (5, 5), (10, 10), (7, 3)])
def test_empty_part_is_not_asked_for(behind, bounds):
    """A server ignores "bytes=5-4", and would send the whole object (RFC 9110, 14.1.1)."""
    server, client = behind
    with pytest.raises(ValueError, match="a byte at least"):
        client.open_range(KEY, *bounds)
    assert server.requests == []


@pytest.mark.parametrize("bounds", [(), (0, None), (0, 5), (3, None), (3, 5)])
def test_parts_of_an_empty_object_are_empty(location, connect, bounds):
    """Servers refuse such a range, or ignore it."""
    client = connect(location)
    put(client, b"")
    assert read(client, *bounds) == b""


def test_large_part_comes_in_pieces(location, connect):
    """By small reads and by large ones, in order, with one request."""
    client = connect(location, prefix="my/site")
    data = random_bytes("large", 3 * MiB)
    put(client, data)
    before = client.counters.requests
    with client.open_range(KEY, 1000, 2 * MiB).buffered() as reader:
        pieces = iter(lambda: reader.read(70_001), b"")
        assert b"".join(pieces) == data[1000 : 2 * MiB]
    assert client.counters.requests == before + 1


def test_moving_asks_again_and_reads_the_right_bytes(location, connect, faulty):
    """Backwards, forwards, and behind the end, where nothing is asked for."""
    put(connect(location), DATA)
    server, place = faulty(location)
    with connect(place).open_range(KEY, 1, 9) as section:
        assert section.read(2) == b"12"
        section.seek(6)
        assert section.read(1) == b"7"
        section.seek(-8, io.SEEK_END)
        assert section.read(3) == b"123"
        assert len(server.requests) == 3
        section.seek(3)
        assert section.read(1) == b"4"
        section.seek(8)
        assert section.read() == b""
        assert len(server.requests) == 3


def test_object_of_another_origin_is_read(location, connect):
    """The older package stored no metadata: position and length are what can be checked."""
    boto3 = boto3_client(location)
    boto3.put_object(Bucket=location.bucket, Key=KEY, Body=DATA)
    boto3.close()
    assert read(connect(location), 3, 7) == b"3456"


def test_only_the_part_is_transferred(s3, connect, latency_proxy):
    """A thousand bytes of four million, with what HTTP adds."""
    put(connect(s3), bytes(4 * MiB))
    proxy = latency_proxy(s3.endpoint_url)
    client = connect(dataclasses.replace(s3, endpoint_url=proxy.endpoint_url))
    assert read(client, 3 * MiB, 3 * MiB + 1000) == bytes(1000)
    counted = proxy.stats()
    assert counted["kinds"] == {"get": 1}
    assert 1000 < counted["bytes_down"] < 4000


def test_nothing_is_transferred_from_behind_the_end(location, connect, latency_proxy):
    """The answer is as small as the part."""
    put(connect(location), bytes(4 * MiB))
    proxy = latency_proxy(location.endpoint_url)
    client = connect(dataclasses.replace(location, endpoint_url=proxy.endpoint_url))
    assert read(client, 4 * MiB) == b""
    assert proxy.stats()["bytes_down"] < 4000


def test_reader_waits_where_it_is_told(s3, connect):
    """Whoever counts the time is told of reads, and not of what happens between them."""
    events = []

    @contextmanager
    def waiting():
        events.append("in")
        yield
        events.append("out")

    client = connect(s3)
    put(client, DATA)
    with client.open_range(KEY, 0, 4, waiting) as section:
        events.clear()
        assert section.read(2) == b"01"
        assert events == ["in", "out"]
        assert section.read(9) == b"23"
        assert events == ["in", "out"] * 2


# What is missing or down


def test_missing_object_is_told_at_the_opening(location, connect):
    """Whatever part of it, and not by the first read."""
    client = connect(location)
    for bounds in ((), (0, 5), (5, None), (5, 7)):
        with pytest.raises(MissingObjectError) as caught:
            client.open_range(KEY, *bounds)
        assert (caught.value.operation, caught.value.key) == ("read", KEY)
    with pytest.raises(MissingObjectError):
        client.object_size(KEY)


def test_missing_bucket_is_permanent(location, connect):
    """It is never taken for a missing object."""
    client = connect(dataclasses.replace(location, bucket="no-such-bucket"))
    for call in (client.open_range, client.object_size):
        with pytest.raises(PermanentS3Error, match="NoSuchBucket"):
            call(KEY)


def test_size_is_told_by_one_request(location, connect, faulty):
    """HEAD, which transfers no bytes."""
    client = connect(location)
    put(client, DATA)
    put(client, b"", OTHER_KEY)
    server, place = faulty(location)
    client = connect(place)
    assert (client.object_size(KEY), client.object_size(OTHER_KEY)) == (10, 0)
    assert server.kinds() == ["HEAD", "HEAD"]


def test_server_that_cannot_be_reached_is_transient(s3, connect):
    """Whether there is such an object is not known."""
    client = connect(dataclasses.replace(s3, endpoint_url=refused_endpoint()))
    for call in (client.open_range, client.object_size):
        with pytest.raises(TransientS3Error):
            call(KEY)


def test_server_that_fails_during_a_read_may_come_back(behind):
    """The reader gets an error, and may read on from where it was."""
    server, client = behind
    with client.open_range(KEY, 2, 8) as section:
        assert section.read(2) == b"23"
        section.seek(3)
        server.instead = lambda request: s3_error(503, "SlowDown")
        with pytest.raises(TransientS3Error) as caught:
            section.read(1)
        assert (caught.value.operation, caught.value.key) == ("read", KEY)
        server.instead = lambda request: None
        assert section.tell() == 3
        assert section.read() == b"567"


def test_object_that_vanishes_during_a_read_is_missing(s3, connect):
    """A sweep may delete what a reader of an old view has open."""
    client = connect(s3)
    put(client, DATA)
    with client.open_range(KEY, 2) as section:
        assert section.read(2) == b"23"
        client.delete_object(KEY)
        section.seek(0)
        with pytest.raises(MissingObjectError):
            section.read(1)


# Cut on the way


@pytest.mark.parametrize("reset", [False, True])
def test_cut_body_is_continued_from_where_it_was_cut(s3, connect, faulty, reset):
    """A second request asks for the rest alone."""
    data = random_bytes("cut", MiB)
    put(connect(s3), data)
    server, place = faulty(s3)
    cuts = [300_000]

    def change(request, answer):
        if cuts:
            answer.cut_after, answer.reset = cuts.pop(), reset

    server.change = change
    assert read(connect(place), 1000, 900_000) == data[1000:900_000]
    first, second = ranges(server)
    assert first == "bytes=1000-899999"
    begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", second).groups())
    assert 1000 <= begin <= 301_000 and end == 899_999
    assert reset or begin == 301_000


def test_cut_body_of_a_whole_object_is_continued(s3, connect, faulty):
    """Where no range was asked for at first."""
    data = random_bytes("cut", MiB)
    put(connect(s3), data)
    server, place = faulty(s3)
    cuts = [300_000]
    server.change = lambda request, answer: setattr(
        answer, "cut_after", cuts.pop() if cuts else None
    )
    assert read(connect(place)) == data
    assert ranges(server) == [None, f"bytes=300000-{MiB - 1}"]


def test_body_that_is_cut_many_times_comes_as_long_as_it_goes_on(s3, connect, faulty):
    """Attempts are counted from the last byte that came."""
    data = random_bytes("cut", MiB)
    put(connect(s3), data)
    server, place = faulty(s3)
    server.change = lambda request, answer: setattr(answer, "cut_after", 100_000)
    assert read(connect(place)) == data
    assert len(server.requests) == 11


@pytest.mark.parametrize("reset", [False, True])
def test_body_that_does_not_go_on_is_transient(s3, connect, faulty, reset):
    """After a bounded number of requests; what came before was right."""
    data = random_bytes("cut", MiB)
    put(connect(s3), data)
    server, place = faulty(s3)

    def change(request, answer):
        answer.cut_after = 0 if len(server.requests) > 1 else 300_000
        answer.reset = reset and not answer.cut_after

    server.change = change
    with connect(place).open_range(KEY, 10).buffered() as section:
        assert section.read(200_000) == data[10:200_010]
        with pytest.raises(TransientS3Error, match=r"cut|ended early"):
            section.read()
    assert 2 <= len(server.requests) <= 6


# Servers that answer something else


def ignore_ranges(request, answer):
    """Answer with everything, as a server that does not know ranges."""
    answer.status, answer.body = 200, DATA
    set_header(answer, "Content-Range")
    set_header(answer, "ETag", '"any"')  # an error has none


@pytest.mark.parametrize("bounds", [(0, None), (0, 4), (3, None), (3, 7), (3, 100), (10, 20)])
def test_server_that_ignores_ranges_costs_time_and_nothing_else(behind, bounds):
    """The bytes are those of the part."""
    server, client = behind
    server.change = ignore_ranges
    assert read(client, *bounds) == DATA[slice(*bounds)]


def test_server_that_ignores_ranges_and_cuts_is_read_to_the_end(behind):
    """What came before is skipped in the second answer, and a cut within it is met by a third."""
    server, client = behind
    cuts = [5, 2, 6]

    def change(request, answer):
        ignore_ranges(request, answer)
        answer.cut_after = cuts.pop() if cuts else None

    server.change = change
    assert read(client, 3, 9) == b"345678"


@pytest.mark.parametrize(
    "found", ["bytes 2-6/10", "bytes 4-6/10", "bytes 0-9/10", "bytes */10", "lines 3-6/10", "", "x"]
)
def test_answer_with_another_range_is_an_integrity_error(behind, found):
    """Bytes from elsewhere in the object are other bytes."""
    server, client = behind
    server.change = lambda request, answer: set_header(answer, "Content-Range", found)
    with pytest.raises(IntegrityError):
        client.open_range(KEY, 3, 7)
    assert len(server.requests) == 1


def test_another_range_in_the_second_answer_is_an_integrity_error(behind):
    """The continuation is checked as the beginning."""
    server, client = behind

    def change(request, answer):
        answer.cut_after = 2
        if len(server.requests) > 1:
            set_header(answer, "Content-Range", "bytes 0-9/10")

    server.change = change
    with client.open_range(KEY, 3, 9) as section:
        assert section.read(2) == b"34"
        with pytest.raises(IntegrityError):
            section.read(2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("zodb-key", OTHER_KEY), ("zodb-key", "x"), ("zodb-size", "11"), ("zodb-size", "soon")],
)
@pytest.mark.parametrize("bounds", [(), (3, 7)])
def test_object_that_says_it_is_another_is_an_integrity_error(behind, name, value, bounds):
    """A blob under another's key, or one that was cut when it was stored."""
    server, client = behind
    server.change = lambda request, answer: set_header(answer, f"x-amz-meta-{name}", value)
    with pytest.raises(IntegrityError):
        client.open_range(KEY, *bounds)


def test_answer_of_something_else_than_s3_is_transient(behind):
    """A maintenance page with status 200 is no blob's bytes; it is asked again a few times."""
    server, client = behind
    page = Answer(200, [("Content-Type", "text/html")], b"<h1>Back soon</h1>")
    server.instead = lambda request: page
    with pytest.raises(TransientS3Error, match="something else than S3"):
        client.open_range(KEY, 3, 7)
    assert len(server.requests) <= 3
    pages = [page]
    server.instead = lambda request: pages.pop() if pages else None
    assert read(client, 3, 7) == b"3456"


@pytest.mark.parametrize("headers", [[], [("Content-Range", "bytes */5")], [("Content-Range", "")]])
def test_refused_range_has_no_bytes(behind, headers):
    """It is behind the end, whether or not the server says where that is."""
    server, client = behind
    answer = s3_error(416, "InvalidRange")
    answer.headers += headers
    server.instead = lambda request: answer
    for bounds in ((20, None), (20, 30)):
        with client.open_range(KEY, *bounds) as section:
            assert section.seek(0, io.SEEK_END) == 0
            assert section.read() == b""


def test_range_that_is_refused_in_the_middle_is_an_error(behind):
    """The object had bytes there a moment ago: they are not left out in silence."""
    server, client = behind
    with client.open_range(KEY) as section:
        assert section.read(2) == b"01"
        server.instead = lambda request: s3_error(416, "InvalidRange")
        section.seek(5)
        with pytest.raises(TransientS3Error):
            section.read()


# Closing


def descriptors():
    """Return how many files and connections this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("how", ["closed", "read and closed", "forgotten", "not read"])
def test_section_leaves_no_connection_open(s3, connect, how):
    """Whether it was read to its end or not."""
    client = connect(s3)
    put(client, bytes(8 * MiB))
    read(client, 0, 1)
    before = descriptors()
    for _ in range(5):
        section = client.open_range(KEY, 1000)
        if how != "not read":
            section.read(-1 if how == "read and closed" else 1000)
        if how != "forgotten":
            section.close()
            section.close()
            assert section.closed
            with pytest.raises(ValueError):
                section.read(1)
        del section
    assert descriptors() <= before


def test_answer_that_is_refused_leaves_no_connection_open(behind):
    """Nobody else could close it."""
    server, client = behind
    server.change = lambda request, answer: set_header(answer, "x-amz-meta-zodb-key", OTHER_KEY)
    for call in range(12):
        with pytest.raises(IntegrityError):
            client.open_range(KEY, 3, 7)
        if call == 1:
            before = descriptors()
    # The server's side is closed by threads of this process.
    wait_until(lambda: descriptors() <= before)


# Under a customer's key


@pytest.mark.ceph
def test_part_of_an_object_under_a_customers_key_needs_the_key(ceph, connect):
    """As the whole does; without it the error is permanent and does not show it."""
    place = dataclasses.replace(new_bucket(ceph), endpoint_url=ceph.tls_endpoint_url)
    key = "0123456789abcdef0123456789abcdeX"
    client = connect(place, ca_bundle=ceph.ca_bundle, sse_customer_key=key)
    data = random_bytes("sse", MiB)
    put(client, data)
    assert read(client, 1000, 500_000) == data[1000:500_000]
    assert read(client, MiB - 10) == data[-10:]
    assert client.object_size(KEY) == MiB
    plain = connect(place, ca_bundle=ceph.ca_bundle)
    with pytest.raises(PermanentS3Error) as caught:
        plain.open_range(KEY, 0, 10)
    assert key not in str(caught.value)


# What is counted


def counted(client, call):
    """Return what a call adds to the client's numbers, without those that stay."""
    before = client.counters.values()
    call()
    after = client.counters.values()
    return {
        name.removesuffix("_total"): after[name] - before[name]
        for name in after
        if after[name] != before[name]
    }


def fails(error, call, *args):
    """Return a callable that expects an error."""

    def expect():
        with pytest.raises(error):
            call(*args)

    return expect


def test_each_operation_is_counted(s3, connect, tmp_path):
    """Objects, their bytes, and requests."""
    client = connect(s3)
    target = str(tmp_path / "target")
    assert counted(client, lambda: put(client, DATA)) == {
        "requests": 1,
        "uploads": 1,
        "uploaded_bytes": 10,
    }
    assert counted(client, lambda: client.download_file(KEY, target)) == {
        "requests": 1,
        "downloads": 1,
        "downloaded_bytes": 10,
    }
    assert counted(client, lambda: read(client, 3, 7)) == {
        "requests": 1,
        "range_reads": 1,
        "downloaded_bytes": 4,
    }
    assert counted(client, lambda: client.object_size(KEY)) == {"requests": 1}
    assert counted(client, lambda: client.presigned_url(KEY)) == {}


def test_upload_in_parts_is_one_upload_of_many_requests(s3, connect):
    """Requests of the transfer manager's threads count as well."""
    client = connect(s3, multipart_threshold=6 * MiB, multipart_part_size=5 * MiB)
    assert counted(client, lambda: put(client, bytes(11 * MiB))) == {
        "requests": 5,
        "uploads": 1,
        "uploaded_bytes": 11 * MiB,
    }


def test_bytes_are_counted_as_they_arrive(s3, connect):
    """Those that nobody has read do not count."""
    client = connect(s3)
    put(client, bytes(8 * MiB))
    with client.open_range(KEY, 1000) as section:
        pieces = []
        found = counted(client, lambda: pieces.append(section.read(5000)))
        assert found == {"downloaded_bytes": len(pieces[0])}
        assert 0 < len(pieces[0]) <= 5000
        section.seek(0)
        assert counted(client, lambda: section.read(1)) == {
            "requests": 1,
            "range_reads": 1,
            "downloaded_bytes": 1,
        }


@pytest.mark.parametrize("operation", ["read", "size", "download", "upload", "list"])
def test_request_that_is_tried_again_is_one_retry_and_no_failure(behind, tmp_path, operation):
    """The operation succeeds, and the retry shows that the server was busy."""
    server, client = behind
    calls = {
        "read": lambda: read(client, 3, 7),
        "size": lambda: client.object_size(KEY),
        "download": lambda: client.download_file(KEY, str(tmp_path / "target")),
        "upload": lambda: put(client, DATA),
        "list": lambda: list(client.list_pages("")),
    }
    answers = [s3_error(503, "SlowDown")]
    server.instead = lambda request: answers.pop() if answers else None
    found = counted(client, calls[operation])
    assert (found["requests"], found["retries"]) == (2, 1)
    assert "failures" not in found


def test_cut_download_that_is_tried_again_is_no_failure(behind, tmp_path):
    """Only what S3 failed in the end is one."""
    server, client = behind
    cuts = [5]
    server.change = lambda request, answer: setattr(
        answer, "cut_after", cuts.pop() if cuts else None
    )
    assert counted(client, lambda: client.download_file(KEY, str(tmp_path / "target"))) == {
        "requests": 2,
        "retries": 1,
        "downloads": 1,
        "downloaded_bytes": 10,
    }


def test_operation_that_fails_is_one_failure(behind, tmp_path):
    """However often it was tried."""
    server, client = behind
    server.instead = lambda request: s3_error(503, "SlowDown")
    for call in (
        lambda: client.open_range(KEY),
        lambda: client.object_size(KEY),
        lambda: client.download_file(KEY, str(tmp_path / "target")),
        lambda: put(client, DATA),
        lambda: client.copy_object(KEY, OTHER_KEY),
        lambda: client.delete_object(KEY),
        lambda: list(client.list_pages("")),
    ):
        found = counted(client, fails(TransientS3Error, call))
        found.pop("range_reads", None)
        assert found == {"requests": 2, "retries": 1, "failures": 1}


def test_download_that_is_always_cut_is_one_failure(behind, tmp_path):
    """Three attempts are one operation."""
    server, client = behind
    server.change = lambda request, answer: setattr(answer, "cut_after", 5)
    call = fails(TransientS3Error, client.download_file, KEY, str(tmp_path / "target"))
    assert counted(client, call) == {"requests": 3, "retries": 2, "failures": 1}


def test_missing_object_is_no_failure(s3, connect, tmp_path):
    """S3 has answered."""
    client = connect(s3)
    for call in (
        fails(MissingObjectError, client.open_range, KEY),
        fails(MissingObjectError, client.object_size, KEY),
        fails(MissingObjectError, client.download_file, KEY, str(tmp_path / "target")),
        fails(MissingObjectError, client.copy_object, KEY, OTHER_KEY),
        lambda: client.head_object(KEY),
    ):
        assert "failures" not in counted(client, call)


def test_clients_count_apart(s3, connect):
    """Two storages of one process do not mix their numbers."""
    one, other = connect(s3), connect(s3)
    assert counted(other, lambda: put(one, DATA)) == {}
