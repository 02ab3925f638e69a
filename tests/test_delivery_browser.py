"""A real nginx and a real browser, with Ceph's gateway: what arrives in the end."""

from contextlib import contextmanager
from contextlib import ExitStack
from dataclasses import replace
import struct
import tempfile
from urllib.parse import urlsplit
import zlib

import pytest
from ZODB.blob import Blob

from zodb_s3blobs.delivery import Delivery

from .conftest import run_service
from .faults import FaultyServer
from .services.chromium import Chromium
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.nginx import NginxServer
from .services.process import wait_until
from .services.readme import example
from .storages import open_db
from .storages import random_bytes
from .test_delivery import ask
from .test_delivery import served


pytestmark = pytest.mark.ceph

MiB = 1 << 20
SIZE = 20 * MiB
WIDTH, HEIGHT = 7, 5
NAME = "Größe 测试.pdf"
DISPOSITION = (
    'attachment; filename="Gr__e __.pdf"; '
    "filename*=UTF-8''Gr%C3%B6%C3%9Fe%20%E6%B5%8B%E8%AF%95.pdf"
)


def png(width, height):
    """Return a black image."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(width + 1) * height)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# By the names of the blobs: bytes, and content type, file name and disposition as users gave them
FILES = {
    "large": (random_bytes("large", SIZE), "application/pdf", NAME, "attachment"),
    "empty": (b"", "application/pdf", NAME, "attachment"),
    "pdf": (random_bytes("pdf", 100_000), "application/pdf", NAME, "attachment"),
    "lost": (b"lost", "application/pdf", NAME, "attachment"),
    "image": (png(WIDTH, HEIGHT), "image/png", "image.png", "inline"),
    "text": (
        b"<script>document.title = 'run'</script>",
        "text/plain",
        'a.txt"\r\nContent-Type: text/html\r\n\r\n<script>document.title = "run"</script>',
        "inline",
    ),
}
DATA = FILES["large"][0]
PAGE = b'<!doctype html><title>A page</title><a id="pdf" href="/pdf">PDF</a><img src="/image">'


@pytest.fixture(scope="module")
def site(ceph, tmp_path_factory):
    """(bucket, directory) of a database whose root has the blobs of FILES."""
    location, directory = new_bucket(ceph), tmp_path_factory.mktemp("site")
    db = open_db(location, directory)
    with db.transaction() as conn:
        for name, (data, *_) in FILES.items():
            conn.root()[name] = Blob(data)
    db.close()
    return location, directory


@contextmanager
def application(location, directory, delivery, **options):
    """Serve the blobs, each below its name, and PAGE at "/"; yields (host, port)."""

    def app(environ, start_response):
        name = environ["PATH_INFO"].removeprefix("/")
        if name not in FILES:
            start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
            return [PAGE]
        with db.transaction() as conn:
            return delivery.wsgi(conn.root()[name], environ, start_response, *FILES[name][1:])

    db = open_db(location, directory, cache="cold", **options)
    try:
        with served(app) as address:
            yield address
    finally:
        db.close()


# nginx


@pytest.fixture
def open_nginx(site, tmp_path):
    """Return a function that starts nginx before an application; returns nginx's (host, port).

    Its location is that of README.rst, but for the host, the certificate and perhaps TLS.
    """
    location, directory = site

    def open_nginx(endpoint_url, ca_bundle=None):
        options = {"s3_ca_bundle": ca_bundle} if ca_bundle else {}
        place = replace(location, endpoint_url=endpoint_url)
        delivery = Delivery(accel_location="/s3blobs")
        host, port = stack.enter_context(application(place, directory, delivery, **options))
        parts = urlsplit(endpoint_url)
        text = example(containing="internal;")
        for old, new in (
            ("https://", f"{parts.scheme}://"),
            ("s3.example.com", parts.netloc),
            (
                "/etc/ssl/certs/ca-certificates.crt",
                ca_bundle or "/etc/ssl/certs/ca-certificates.crt",
            ),
        ):
            assert old in text
            text = text.replace(old, new)
        text += f"location / {{ proxy_pass http://{host}:{port}; }}"
        server = NginxServer(tmp_path / "nginx", text)
        stack.enter_context(contextmanager(run_service)("nginx", server))
        return "127.0.0.1", server.port

    with ExitStack() as stack:
        yield open_nginx


@pytest.fixture
def nginx(open_nginx, ceph):
    """(host, port) of nginx before Ceph with TLS, as in README.rst."""
    return open_nginx(ceph.tls_endpoint_url, ceph.ca_bundle)


@pytest.fixture
def front(ceph):
    """A server between nginx and Ceph that tells what was asked."""
    with FaultyServer(ceph.endpoint_url) as server:
        yield server


@pytest.mark.parametrize("name", ["large", "empty"])
def test_nginx_delivers_the_whole(nginx, name):
    """From S3, as if it were the site's own; the browser learns nothing of a redirect."""
    status, headers, body = ask(nginx, path=f"/{name}")
    assert status == 200
    assert body == FILES[name][0]
    assert headers["Content-Length"] == str(len(body))
    assert headers["X-Accel-Redirect"] is None
    assert headers["Location"] is None


def test_nginx_tells_type_and_name_once(nginx):
    """Those that the application gave; S3 says the same, and browsers take no name given twice."""
    _status, headers, _body = ask(nginx, path="/pdf")
    assert headers.get_all("Content-Type") == ["application/pdf"]
    assert headers.get_all("Content-Disposition") == [DISPOSITION]


def test_nginx_lets_no_browser_guess_the_type(nginx):
    """What users have uploaded is delivered as the site's own."""
    _status, headers, _body = ask(nginx, path="/pdf")
    assert headers.get_all("X-Content-Type-Options") == ["nosniff"]


@pytest.mark.parametrize(
    ("text", "start", "stop"),
    [
        ("bytes=0-9", 0, 10),
        (f"bytes={SIZE // 2}-", SIZE // 2, SIZE),
        ("bytes=-10", SIZE - 10, SIZE),
        (f"bytes={SIZE - 5}-{SIZE + 5}", SIZE - 5, SIZE),
    ],
)
def test_nginx_delivers_a_range(nginx, text, start, stop):
    """The client's header reaches S3, and S3's answer the client."""
    status, headers, body = ask(nginx, path="/large", Range=text)
    assert status == 206
    assert body == DATA[start:stop]
    assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/{SIZE}"
    assert headers["Content-Length"] == str(stop - start)


def test_nginx_passes_the_refusal_of_a_range_on(nginx):
    """S3 has decided."""
    assert ask(nginx, path="/large", Range=f"bytes={SIZE}-")[0] == 416


def test_nginx_continues_a_download(nginx):
    """By the ETag of S3, when the object is still the same."""
    etag = ask(nginx, path="/pdf")[1]["ETag"]
    status, _headers, body = ask(nginx, path="/pdf", Range="bytes=99990-", If_Range=etag)
    assert (status, body) == (206, FILES["pdf"][0][99990:])


def test_nginx_answers_head(nginx):
    """With the length and without the bytes."""
    status, headers, body = ask(nginx, "HEAD", "/large")
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == str(SIZE)
    assert headers["Content-Type"] == "application/pdf"


def test_client_cannot_ask_for_the_location_itself(nginx, site):
    """Whatever is in the bucket: it is nginx's alone."""
    location, _directory = site
    for key in (*keys(location), "", "nothing"):
        assert ask(nginx, path=f"/s3blobs/{location.bucket}/{key}")[0] == 404


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_credentials_of_the_client_do_not_reach_s3(open_nginx, front, method):
    """It would refuse two kinds of authorization, and the cookie is none of its business."""
    nginx = open_nginx(front.endpoint_url)
    front.requests.clear()
    secrets = {"Authorization": "Basic c2VjcmV0", "Cookie": "__ac=secret"}
    assert ask(nginx, method, "/pdf", **secrets)[0] == 200
    _asked, delivered = front.requests
    assert delivered.method == "GET"
    assert delivered.headers["Authorization"] is None
    assert delivered.headers["Cookie"] is None


def test_object_that_has_gone_is_not_found(open_nginx, front, site):
    """Where it was is remembered, so that S3 is the first to know; its status arrives."""
    location, _directory = site
    nginx = open_nginx(front.endpoint_url)
    assert ask(nginx, path="/lost")[0] == 200
    _, bucket, key = urlsplit(front.requests[-1].target).path.split("/", 2)
    client = boto3_client(location)
    client.delete_object(Bucket=bucket, Key=key)
    client.close()
    assert ask(nginx, path="/lost")[0] == 404


# A browser


@pytest.fixture(scope="module")
def chromium():
    """A `Chromium`."""
    with tempfile.TemporaryDirectory(prefix="chromium-") as directory:
        yield from run_service("chromium", Chromium(directory))


@pytest.fixture
def browser(chromium):
    """The same, without the downloads of other tests."""
    for path in chromium.downloads.iterdir():
        path.unlink()
    return chromium


@pytest.fixture
def redirecting(site):
    """URL of a site that redirects to S3."""
    with application(*site, Delivery()) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture
def passing(open_nginx, ceph):
    """URL of a site whose nginx passes on what S3 delivers."""
    host, port = open_nginx(ceph.endpoint_url)
    return f"http://{host}:{port}"


@pytest.mark.parametrize("kind", ["redirecting", "passing"])
def test_click_saves_an_attachment_under_its_name(browser, kind, request):
    """Not that of the key, and all of its bytes."""
    browser.driver.get(request.getfixturevalue(kind))
    browser.driver.find_element("id", "pdf").click()
    data = FILES["pdf"][0]
    wait_until(lambda: [path.name for path in browser.downloads.iterdir()] == [NAME])
    wait_until(lambda: (browser.downloads / NAME).stat().st_size == len(data))
    assert (browser.downloads / NAME).read_bytes() == data


@pytest.mark.parametrize("kind", ["redirecting", "passing"])
def test_page_shows_an_image(browser, kind, request):
    """A presigned URL serves an <img>, too."""
    browser.driver.get(request.getfixturevalue(kind))
    size = "const image = document.images[0]; return [image.naturalWidth, image.naturalHeight]"
    assert browser.driver.execute_script(size) == [WIDTH, HEIGHT]


def test_inline_image_is_a_document_of_s3(browser, redirecting, ceph):
    """Of the type that it was given, and of another origin than the site's."""
    browser.driver.get(f"{redirecting}/image")
    tell = "return [document.contentType, location.origin]"
    assert browser.driver.execute_script(tell) == ["image/png", ceph.endpoint_url]


@pytest.mark.parametrize("kind", ["redirecting", "passing"])
def test_name_that_would_end_a_header_changes_no_type(browser, kind, request):
    """The text is shown, and nothing of it or of its name runs."""
    browser.driver.get(f"{request.getfixturevalue(kind)}/text")
    tell = "return [document.contentType, document.body.textContent, document.title]"
    content_type, text, title = browser.driver.execute_script(tell)
    assert content_type == "text/plain"
    assert text == FILES["text"][0].decode()
    assert title != "run"
