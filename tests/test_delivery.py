"""Requests for blobs: sent on to S3 where it can answer them, else answered with the bytes."""

from contextlib import closing
from contextlib import contextmanager
from dataclasses import replace
import http.client
from io import BytesIO
from socketserver import ThreadingMixIn
import sys
import threading
from types import SimpleNamespace
from urllib.parse import parse_qs
from urllib.parse import urlsplit
from urllib.request import urlopen
import uuid
from wsgiref.simple_server import make_server
from wsgiref.simple_server import WSGIRequestHandler
from wsgiref.simple_server import WSGIServer
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZPublisher.WSGIPublisher import publish_module

from zodb_s3blobs import blobs
from zodb_s3blobs.delivery import Delivery
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error

from .faults import FaultyServer
from .faults import s3_error
from .services.location import boto3_client
from .services.location import keys
from .storages import open_db
from .storages import random_bytes
from .storages import read


SIZE = 200_000
DATA = random_bytes("delivery", SIZE)
NAME = "Größe 测试.pdf"
DISPOSITION = (
    'attachment; filename="Gr__e __.pdf"; '
    "filename*=UTF-8''Gr%C3%B6%C3%9Fe%20%E6%B5%8B%E8%AF%95.pdf"
)
PDF = {"content_type": "application/pdf", "filename": NAME, "disposition": "attachment"}
# A site whose blobs only we can read: all are delivered from here.
SSE_C = {"s3_sse_customer_key": "0123456789abcdef0123456789abcdef"}
HOSTILE = [
    "a\r\nSet-Cookie: b=c",
    "a\nb",
    "a\rb",
    'a"\r\n\r\n<html>',
    "a\x00b\x0bc\x0cd",
    "a\x85b\u2028c",
    "a%0d%0ab",
    "\ud800\udfff\r\n",
]


@pytest.fixture
def front(s3):
    """A server in front of S3 that tells what was asked, and can be down."""
    with FaultyServer(s3.endpoint_url) as server:
        yield server


@pytest.fixture
def open_site(front, s3, tmp_path):
    """Return a function that opens a site's database, with an empty cache, as a rule.

    Its root has the blobs "file", "empty" and "other", which are committed.
    """
    location = replace(s3, endpoint_url=front.endpoint_url)
    opened = []

    def open_site(cache="cold", **options):
        opened.append(open_db(location, tmp_path, cache=cache, **options))
        return opened[-1]

    db = open_db(location, tmp_path, cache="first")
    with db.transaction() as conn:
        conn.root()["file"] = Blob(DATA)
        conn.root()["empty"] = Blob(b"")
        conn.root()["other"] = Blob(b"other")
    db.close()
    front.requests.clear()
    yield open_site
    for db in opened:
        db.close()


@pytest.fixture
def open_root(open_site):
    """Return a function that opens a site and returns its root."""
    connections = []

    def open_root(**options):
        connections.append(open_site(**options).open())
        return connections[-1].root()

    yield open_root
    transaction.abort()
    for connection in connections:
        connection.close()


@pytest.fixture
def urls(monkeypatch):
    """The presigned URLs that are made."""
    made = []
    presigned_url = blobs.presigned_url

    def record(*args, **kw):
        made.append(presigned_url(*args, **kw))
        return made[-1]

    monkeypatch.setattr(blobs, "presigned_url", record)
    return made


def body_of(answer):
    """Return the bytes of an answer, which are as many as it says."""
    if answer.body is None:
        return b""
    with answer.body as file:
        data = file.read()
    assert dict(answer.headers)["Content-Length"] == str(len(data))
    return data


def check_whole(answer, data):
    """The answer has all of the bytes."""
    assert answer.status == 200
    headers = dict(answer.headers)
    assert headers["Accept-Ranges"] == "bytes"
    assert headers["Content-Length"] == str(len(data))
    assert "Content-Range" not in headers
    assert body_of(answer) == data


# A redirect


def test_get_is_redirected_to_s3(open_root, front, urls):
    """Which answers with the bytes, and says of itself what it was told to say."""
    answer = Delivery().answer(open_root()["file"], **PDF)
    assert answer.status == 302
    assert answer.body is None
    assert dict(answer.headers)["Location"] == urls[0]
    with urlopen(urls[0]) as file:
        assert file.read() == DATA
        assert file.headers["Content-Type"] == "application/pdf"
        assert file.headers["Content-Disposition"] == DISPOSITION
    assert front.kinds() == ["HEAD", "GET"]


def test_redirect_is_not_stored_by_any_cache(open_root):
    """It would keep the URL longer than it is valid, or give it to somebody else."""
    answer = Delivery().answer(open_root()["file"])
    assert dict(answer.headers)["Cache-Control"] == "no-store"


@pytest.mark.parametrize(("options", "seconds"), [({}, "60"), ({"expires_in": 5}, "5")])
def test_url_is_valid_for_as_long_as_configured(open_root, options, seconds):
    """A minute by default."""
    answer = Delivery(**options).answer(open_root()["file"])
    query = parse_qs(urlsplit(dict(answer.headers)["Location"]).query)
    assert query["X-Amz-Expires"] == [seconds]


def test_range_is_redirected_as_a_whole_is(open_root):
    """The browser sends its Range header again, to S3."""
    assert Delivery().answer(open_root()["file"], "GET", "bytes=0-9").status == 302


def test_second_redirect_asks_s3_nothing(open_root, front):
    """Where a blob is does not change."""
    root = open_root()
    for _ in range(2):
        assert Delivery().answer(root["file"]).status == 302
    assert front.kinds() == ["HEAD"]


def test_redirect_goes_to_the_public_endpoint(open_root):
    """Where browsers find S3, if that is elsewhere."""
    root = open_root(s3_public_endpoint_url="https://files.example.com")
    answer = Delivery().answer(root["file"])
    assert dict(answer.headers)["Location"].startswith("https://files.example.com/bucket-")


@pytest.mark.parametrize(
    "options",
    [{"expires_in": 0}, {"expires_in": True}, {"expires_in": 60.5}, {"accel_location": "s3blobs"}],
)
def test_delivery_that_cannot_work_is_refused_at_once(options):
    """And not by each request."""
    with pytest.raises(ValueError, match=r"seconds|slash"):
        Delivery(**options)


def test_small_file_is_sent_from_here(open_root, front):
    """A second request of the browser would take longer; what is as large is S3's."""
    root = open_root()
    check_whole(Delivery(min_size=SIZE + 1).answer(root["file"]), DATA)
    assert front.kinds().count("GET") == 1
    assert Delivery(min_size=SIZE).answer(root["file"]).status == 302


# X-Accel-Redirect


@pytest.mark.parametrize("location", ["/s3blobs", "/s3blobs/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_nginx_gets_the_path_of_the_url(open_root, front, urls, location, method):
    """Below its location; it asks by GET, so HEAD is no exception."""
    answer = Delivery(accel_location=location).answer(open_root()["file"], method, **PDF)
    assert answer.status == 200
    assert answer.body is None
    headers = dict(answer.headers)
    assert front.endpoint_url + headers["X-Accel-Redirect"].removeprefix("/s3blobs") == urls[0]
    assert "Location" not in headers
    assert "Cache-Control" not in headers  # the browser sees no URL: that is the site's business
    assert front.kinds() == ["HEAD"]


def test_nginx_answers_ranges_too(open_root):
    """It passes the client's Range header on."""
    delivery = Delivery(accel_location="/s3blobs")
    answer = delivery.answer(open_root()["file"], "GET", "bytes=0-9")
    assert answer.status == 200
    assert "X-Accel-Redirect" in dict(answer.headers)


# Bytes from here


@pytest.mark.parametrize("name", ["file", "empty"])
def test_whole_is_served_where_s3_cannot_deliver(open_root, name):
    """Under SSE-C, there is no URL."""
    check_whole(Delivery().answer(open_root(**SSE_C)[name]), {"file": DATA, "empty": b""}[name])


def test_whole_under_sse_c_is_served_to_nginx(open_root):
    """With the bytes, and without X-Accel-Redirect."""
    answer = Delivery(accel_location="/s3blobs").answer(open_root(**SSE_C)["file"])
    assert "X-Accel-Redirect" not in dict(answer.headers)
    check_whole(answer, DATA)


def test_what_is_served_has_type_and_name(open_root):
    """And no browser guesses another type."""
    headers = dict(Delivery().answer(open_root(**SSE_C)["file"], **PDF).headers)
    assert headers["Content-Type"] == "application/pdf"
    assert headers["Content-Disposition"] == DISPOSITION
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("options", [{}, SSE_C])
def test_head_is_answered_without_a_body(open_root, front, options):
    """A signature is for GET, so S3 would refuse the redirected request."""
    answer = Delivery().answer(open_root(**options)["file"], "HEAD", **PDF)
    assert answer.status == 200
    assert answer.body is None
    headers = dict(answer.headers)
    assert headers["Content-Length"] == str(SIZE)
    assert headers["Content-Type"] == "application/pdf"
    assert headers["Accept-Ranges"] == "bytes"
    assert front.kinds() == ["HEAD"]


def test_head_has_no_ranges(open_root):
    """RFC 9110, 14.2: they are defined for GET alone."""
    blob = open_root()["file"]
    for text in ("bytes=0-9", f"bytes={SIZE}-"):
        answer = Delivery().answer(blob, "HEAD", text)
        assert answer.status == 200
        assert dict(answer.headers)["Content-Length"] == str(SIZE)


def test_whole_that_was_served_is_cached(open_root, front):
    """It came verified, and the next request costs S3 nothing."""
    root = open_root(**SSE_C)
    for _ in range(2):
        check_whole(Delivery().answer(root["file"]), DATA)
    assert front.kinds().count("GET") == 1


# Ranges


@pytest.mark.parametrize(
    ("text", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-9", 0, 10),
        ("bytes=100000-150000", 100_000, 150_001),
        ("bytes=100000-", 100_000, SIZE),
        ("bytes=0-", 0, SIZE),
        ("bytes=-1", SIZE - 1, SIZE),
        ("bytes=-70000", SIZE - 70_000, SIZE),
        (f"bytes=-{SIZE}", 0, SIZE),
        (f"bytes=-{SIZE + 1}", 0, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
        (f"bytes={SIZE - 5}-{SIZE + 5}", SIZE - 5, SIZE),
        (f"bytes=5-{'9' * 30}", 5, SIZE),
        (f"bytes=5-{'9' * 5000}", 5, SIZE),
        (f"bytes=-{'9' * 5000}", 0, SIZE),
        (f"bytes={'0' * 5000}5-9", 5, 10),
    ],
)
@pytest.mark.parametrize("is_cached", [True, False])
def test_range_is_answered_with_its_bytes(open_root, is_cached, text, start, stop):
    """From S3 and from the cache; what goes beyond the end is left out."""
    root = open_root(**SSE_C)
    if is_cached:
        read(root["file"])
    answer = Delivery().answer(root["file"], "GET", text, **PDF)
    assert answer.status == 206
    headers = dict(answer.headers)
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert headers["Content-Type"] == "application/pdf"
    assert headers["Accept-Ranges"] == "bytes"
    assert body_of(answer) == DATA[start:stop]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("file", f"bytes={SIZE}-"),
        ("file", f"bytes={SIZE}-{SIZE}"),
        ("file", f"bytes={SIZE + 7}-{SIZE + 9}"),
        ("file", "bytes=-0"),
        ("file", f"bytes={'9' * 5000}-"),
        ("empty", "bytes=0-"),
        ("empty", "bytes=0-0"),
        ("empty", "bytes=-1"),
    ],
)
def test_range_without_bytes_is_refused(open_root, name, text):
    """With the size, from which the client can ask again."""
    answer = Delivery().answer(open_root(**SSE_C)[name], "GET", text)
    assert answer.status == 416
    assert answer.body is None
    headers = dict(answer.headers)
    assert headers["Content-Range"] == f"bytes */{SIZE if name == 'file' else 0}"
    assert headers["Content-Length"] == "0"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "bytes",
        "bytes=",
        "bytes=-",
        "bytes=9",
        "bytes=9-5",
        "bytes=0-4,6-9",
        "bytes=0-4, -5",
        "bytes=a-b",
        "bytes=0x1-0x2",
        "bytes=--5",
        "bytes=+1-2",
        "bytes=1-2-3",
        "bytes=1.5-2",
        "bytes=\u00b2-",
        "bytes=0-9\n",
        "lines=0-9",
        f"bytes={'9' * 5000}-5",
    ],
)
def test_what_is_no_single_range_counts_as_none(open_root, text):
    """RFC 9110 allows that; so many ranges cannot make an answer larger than the blob."""
    check_whole(Delivery().answer(open_root(**SSE_C)["file"], "GET", text), DATA)


def test_range_under_a_condition_counts_as_none(open_root):
    """We have given out no ETag that If-Range could name."""
    answer = Delivery().answer(open_root(**SSE_C)["file"], "GET", "bytes=0-9", '"etag"')
    check_whole(answer, DATA)


def test_range_transfers_nothing_else(open_root, front):
    """No byte that was not asked for: it does not go through the cache."""
    root = open_root(**SSE_C)
    assert body_of(Delivery().answer(root["file"], "GET", "bytes=5-9")) == DATA[5:10]
    assert [r.headers["Range"] for r in front.requests if r.method == "GET"] == ["bytes=5-9"]


# Trouble


@pytest.mark.parametrize("options", [{}, {"accel_location": "/s3blobs"}])
def test_cached_blob_is_served_while_s3_is_down(open_root, front, options):
    """Whole and in part."""
    root = open_root()
    read(root["file"])
    front.instead = lambda request: s3_error(503, "ServiceUnavailable")
    check_whole(Delivery(**options).answer(root["file"]), DATA)
    assert body_of(Delivery(**options).answer(root["file"], "GET", "bytes=5-9")) == DATA[5:10]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_blob_that_is_not_cached_fails_while_s3_is_down(open_root, front, method):
    """With an error that is retried, and no half of an answer."""
    root = open_root(s3_max_attempts="1")
    front.instead = lambda request: s3_error(503, "ServiceUnavailable")
    with pytest.raises(TransientS3Error):
        Delivery().answer(root["file"], method)


def test_outage_costs_a_request_no_more_than_its_attempts(open_root, front):
    """Nobody waits for two time-outs where one has told all."""
    root = open_root(s3_max_attempts="1")
    front.instead = lambda request: s3_error(503, "ServiceUnavailable")
    with pytest.raises(TransientS3Error):
        Delivery().answer(root["file"])
    assert front.kinds() == ["HEAD"]


def test_refusal_by_s3_is_an_error(open_root, front):
    """Where the operator must act, nothing is glossed over."""
    front.instead = lambda request: s3_error(403, "AccessDenied")
    with pytest.raises(PermanentS3Error):
        Delivery().answer(open_root()["file"])


@pytest.mark.parametrize("options", [{}, {"accel_location": "/s3blobs"}])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_blob_that_is_nowhere_is_an_error(open_root, s3, options, method):
    """Nobody is redirected to what is missing."""
    client = boto3_client(s3)
    for key in keys(s3):
        client.delete_object(Bucket=s3.bucket, Key=key)
    client.close()
    with pytest.raises(POSKeyError):
        Delivery(**options).answer(open_root()["file"], method)


# What is not in S3


def test_new_blob_is_served(open_root):
    """Before it belongs to any database, and in one."""
    root = open_root()
    blob = Blob(DATA)
    check_whole(Delivery().answer(blob), DATA)
    root["new"] = blob
    check_whole(Delivery(accel_location="/s3blobs").answer(blob), DATA)
    assert body_of(Delivery().answer(blob, "GET", "bytes=5-9")) == DATA[5:10]


def test_blob_without_bytes_is_served_as_empty(open_root):
    """Nobody has written to it yet."""
    check_whole(Delivery().answer(Blob()), b"")


def test_uncommitted_bytes_are_served(open_root):
    """Not those that the transaction has replaced."""
    root = open_root()
    with root["file"].open("w") as file:
        file.write(b"newer")
    check_whole(Delivery().answer(root["file"]), b"newer")
    assert dict(Delivery().answer(root["file"], "HEAD").headers)["Content-Length"] == "5"
    transaction.abort()
    assert Delivery().answer(root["file"]).status == 302


def test_bytes_of_a_savepoint_are_served(open_root):
    """They are not in S3 before the commit; after it they are."""
    root = open_root()
    with root["file"].open("w") as file:
        file.write(b"newer")
    root["new"] = Blob(b"new")
    transaction.savepoint()
    check_whole(Delivery().answer(root["file"]), b"newer")
    check_whole(Delivery().answer(root["new"]), b"new")
    transaction.commit()
    assert Delivery().answer(root["file"]).status == 302
    assert Delivery().answer(root["new"]).status == 302


def test_blob_of_a_storage_that_is_not_ours_is_served(tmp_path):
    """The same code runs on a developer's machine."""
    with closing(DB(FileStorage(f"{tmp_path}/Data.fs", blob_dir=f"{tmp_path}/blobs"))) as db:
        with db.transaction() as conn:
            conn.root()["file"] = Blob(DATA)
        with db.transaction() as conn:
            blob = conn.root()["file"]
            check_whole(Delivery().answer(blob), DATA)
            assert body_of(Delivery().answer(blob, "GET", "bytes=-5")) == DATA[-5:]


# What users have typed


@pytest.mark.parametrize(
    "content_type", [None, "", "nonsense", "text/html\r\nSet-Cookie: a=b", "text/pl\u00e4in"]
)
@pytest.mark.parametrize("options", [{}, SSE_C])
def test_content_type_that_is_none_counts_as_unknown(open_root, content_type, options):
    """Users cannot break the delivery of their files by it."""
    answer = Delivery().answer(open_root(**options)["other"], content_type=content_type)
    headers = dict(answer.headers)
    if answer.status == 302:
        with urlopen(headers["Location"]) as file:
            headers = file.headers
    assert headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize("field", ["content_type", "filename"])
@pytest.mark.parametrize(
    ("options", "accel_location", "range_header"),
    [
        ({}, None, None),
        ({}, "/s3blobs", None),
        (SSE_C, None, None),
        (SSE_C, None, "bytes=0-1"),
        (SSE_C, None, "bytes=5-"),
    ],
)
def test_hostile_text_never_ends_a_header(open_root, field, options, accel_location, range_header):
    """Whatever the answer is: all its headers are printable ASCII."""
    delivery = Delivery(accel_location=accel_location)
    blob = open_root(**options)["other"]
    for text in HOSTILE:
        answer = delivery.answer(blob, "GET", range_header, **{field: text})
        body_of(answer)
        for name, value in answer.headers:
            assert name.isascii()
            assert value.isascii()
            assert value.isprintable()


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_disposition_is_refused(open_root, method):
    """It comes from a mistake in code, not from a user."""
    with pytest.raises(ValueError, match="inline or attachment"):
        Delivery().answer(open_root()["file"], method, disposition="form-data")


# WSGI


class Server(ThreadingMixIn, WSGIServer):
    """A browser opens connections on which it never asks: each has a thread."""

    daemon_threads = True


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served(application):
    """Serve a WSGI application in a thread, on loopback; yields (host, port)."""
    with make_server("127.0.0.1", 0, application, Server, QuietHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address
        finally:
            server.shutdown()
            thread.join()


def ask(address, method="GET", path="/", **headers):
    """Send a request; return status, headers and body of the answer."""
    with closing(http.client.HTTPConnection(*address, timeout=30)) as connection:
        connection.request(method, path, headers={k.replace("_", "-"): headers[k] for k in headers})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def application(db, delivery, name="file"):
    """Return an application that delivers a blob, whose connection is closed before the body."""

    def application(environ, start_response):
        with db.transaction() as conn:
            return delivery.wsgi(conn.root()[name], environ, start_response, **PDF)

    return application


# Settings of the site, arguments of Delivery, method, Range header, and status
REQUESTS = {
    "redirect": ({}, {}, "GET", None, 302),
    "nginx": ({}, {"accel_location": "/s3blobs"}, "GET", None, 200),
    "head": ({}, {}, "HEAD", None, 200),
    "nginx's head": ({}, {"accel_location": "/s3blobs"}, "HEAD", None, 200),
    "whole": (SSE_C, {}, "GET", None, 200),
    "range": (SSE_C, {}, "GET", "bytes=10-99", 206),
    "refused range": (SSE_C, {}, "GET", f"bytes={SIZE}-", 416),
}


@pytest.fixture(params=REQUESTS.values(), ids=REQUESTS.keys())
def wsgi_case(request, open_site):
    """(application, method, Range header, status)"""
    options, arguments, method, range_header, status = request.param
    return application(open_site(**options), Delivery(**arguments)), method, range_header, status


def expected_body(method, range_header, status):
    """Return the bytes that belong to an answer."""
    if method == "HEAD" or status in (302, 416):
        return b""
    return DATA[10:100] if range_header else DATA


def test_application_keeps_to_the_rules_of_wsgi(wsgi_case):
    """PEP 3333, as far as Python's validator knows it."""
    app, method, range_header, status = wsgi_case
    environ = {"REQUEST_METHOD": method, "QUERY_STRING": ""}
    if range_header:
        environ["HTTP_RANGE"] = range_header
    setup_testing_defaults(environ)
    told = []
    chunks = validator(app)(environ, lambda *args: told.append(args))
    body = b"".join(chunks)
    chunks.close()
    ((line, headers),) = told
    assert line.startswith(f"{status} ")
    if "X-Accel-Redirect" in dict(headers):
        assert body == b""
    else:
        assert body == expected_body(method, range_header, status)


def test_server_sends_what_the_application_answers(wsgi_case):
    """A real one, over the network, by its own ``wsgi.file_wrapper``."""
    app, method, range_header, expected = wsgi_case
    with served(app) as address:
        headers = {"Range": range_header} if range_header else {}
        status, headers, body = ask(address, method, **headers)
    assert status == expected
    if "X-Accel-Redirect" in headers:
        assert body == b""
        return
    assert body == expected_body(method, range_header, status)
    if method == "HEAD":
        assert headers["Content-Length"] == str(SIZE)
    else:
        assert headers["Content-Length"] == str(len(body))


def test_validated_application_works_behind_a_server(open_site):
    """Both together, so that the validator sees a server's environment and closing."""
    app = validator(application(open_site(**SSE_C), Delivery()))
    with served(app) as address:
        assert ask(address)[::2] == (200, DATA)
        assert ask(address, Range="bytes=5-9")[::2] == (206, DATA[5:10])


# Zope


class Root:
    """A site's root, as Zope's publisher finds it; its one view delivers a blob."""

    def __init__(self, connection, delivery, name):
        self._p_jar = connection
        self._delivery = delivery
        self._name = name

    def download(self, REQUEST):
        """Deliver the file."""
        blob = self._p_jar.root()[self._name]
        return self._delivery.zope(blob, REQUEST, **PDF)


@pytest.fixture
def zope(open_site, monkeypatch):
    """Return a function that makes the WSGI application of a Zope with one view."""

    def zope(delivery, name="file", **options):
        db = open_site(**options)
        module = f"site_{uuid.uuid4().hex}"  # the publisher remembers the first by its name
        application = SimpleNamespace(bobo_application=lambda: Root(db.open(), delivery, name))
        monkeypatch.setitem(sys.modules, module, application)

        def publish(environ, start_response):
            return publish_module(environ, start_response, _module_name=module)

        return publish

    return zope


def test_zope_redirects_to_the_very_url(zope, urls):
    """Byte for byte: what quotes it once more breaks the signature."""
    with served(zope(Delivery())) as address:
        status, headers, body = ask(address, path="/download")
    assert status == 302
    assert headers["Location"] == urls[0]
    assert headers["Cache-Control"] == "no-store"
    assert body == b""
    with urlopen(headers["Location"]) as file:
        assert file.read() == DATA
        assert file.headers["Content-Disposition"] == DISPOSITION


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_zope_passes_the_redirect_for_nginx_on(zope, urls, front, method):
    """Byte for byte, too, with type and name."""
    with served(zope(Delivery(accel_location="/s3blobs"))) as address:
        status, headers, body = ask(address, method, "/download")
    assert status == 200
    assert front.endpoint_url + headers["X-Accel-Redirect"].removeprefix("/s3blobs") == urls[0]
    assert body == b""


def test_zope_streams_the_whole(zope, front):
    """With the right length, type and name, and by one request to S3."""
    with served(zope(Delivery(), **SSE_C)) as address:
        status, headers, body = ask(address, path="/download")
    assert status == 200
    assert body == DATA
    assert headers["Content-Length"] == str(SIZE)
    assert headers["Content-Type"] == "application/pdf"
    assert headers["Content-Disposition"] == DISPOSITION
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert front.kinds().count("GET") == 1


def test_zope_streams_a_range(zope, front):
    """Of which it finds the length by moving in the file, which must not ask S3 again."""
    with served(zope(Delivery(), **SSE_C)) as address:
        status, headers, body = ask(address, path="/download", Range="bytes=100000-169999")
    assert status == 206
    assert body == DATA[100_000:170_000]
    assert headers["Content-Length"] == "70000"
    assert headers["Content-Range"] == f"bytes 100000-169999/{SIZE}"
    assert front.kinds().count("GET") == 1


def test_zope_refuses_a_range_without_bytes(zope):
    """With status and size."""
    with served(zope(Delivery(), **SSE_C)) as address:
        status, headers, body = ask(address, path="/download", Range=f"bytes={SIZE}-")
    assert (status, body) == (416, b"")
    assert headers["Content-Range"] == f"bytes */{SIZE}"
    assert headers["Content-Length"] == "0"


def test_zope_answers_if_range_with_the_whole(zope):
    """It passes both headers on."""
    with served(zope(Delivery(), **SSE_C)) as address:
        status, _headers, body = ask(
            address, path="/download", Range="bytes=0-9", If_Range='"etag"'
        )
    assert (status, body) == (200, DATA)


def test_zope_answers_head(zope):
    """With the length of what GET would send."""
    with served(zope(Delivery())) as address:
        status, headers, body = ask(address, "HEAD", "/download")
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == str(SIZE)
    assert headers["Content-Type"] == "application/pdf"


def test_zope_serves_an_empty_blob(zope):
    """Which is not "no content"."""
    with served(zope(Delivery(), name="empty", **SSE_C)) as address:
        status, headers, body = ask(address, path="/download")
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == "0"


def test_form_field_does_not_change_the_method(zope):
    """A query is what anybody writes into a link."""
    with served(zope(Delivery(), **SSE_C)) as address:
        status, _headers, body = ask(address, path="/download?REQUEST_METHOD=HEAD&Range=x")
    assert (status, body) == (200, DATA)


def test_zope_without_a_server_streams_a_file(zope):
    """Without ``wsgi.file_wrapper``, the file itself is what is iterated and closed."""
    environ = {"PATH_INFO": "/download", "wsgi.input": BytesIO()}
    setup_testing_defaults(environ)
    told = []
    body = zope(Delivery(), **SSE_C)(environ, lambda *args: told.append(args))
    assert b"".join(body) == DATA
    body.close()
    ((line, headers),) = told
    assert line == "200 OK"
    assert dict(headers)["Content-Length"] == str(SIZE)


class Wrapped:
    """What a server makes of a file, and reads when the client is ready."""

    def __init__(self, file, size):
        self.file = file


def test_server_reads_local_files_by_itself_and_others_not(open_root):
    """It does so in the thread that serves all clients: S3 must not keep that one waiting."""
    blob = open_root(**SSE_C)["file"]
    environ = {"REQUEST_METHOD": "GET", "HTTP_RANGE": "bytes=5-104", "wsgi.file_wrapper": Wrapped}
    answers = []

    def ask():
        return Delivery().wsgi(blob, environ, lambda *answer: answers.append(answer))

    remote = ask()
    assert not isinstance(remote, Wrapped)
    assert not hasattr(remote, "read")
    assert b"".join(remote) == DATA[5:105]
    assert len(remote) == 100
    remote.close()
    read(blob)
    local = ask()
    assert isinstance(local, Wrapped)
    with local.file:
        assert local.file.read() == DATA[5:105]


def test_cached_blob_is_sent_though_s3_refuses_to_tell_of_it(open_root, front):
    """Credentials that are no longer valid do not matter to what is here."""
    blob = open_root()["file"]
    read(blob)
    front.instead = lambda request: s3_error(403, "AccessDenied")
    check_whole(Delivery().answer(blob), DATA)
