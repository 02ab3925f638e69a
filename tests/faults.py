"""Small fault tools: a child process, and an S3 server in front of another that misbehaves."""

from dataclasses import dataclass
from dataclasses import field
import http.client
import http.server
import os
import signal
import socket
import struct
import threading
import time
import traceback
from urllib.parse import urlsplit

from zodb_s3blobs.ownership import MARKER


def in_child(function, seconds=20):
    """Call a function in a forked child; fail when it raises, dies or takes too long."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        # Whatever hangs there must not outlive the test.
        signal.alarm(seconds + 5)
        try:
            function()
            os.write(writing, b"ok")
        except BaseException:
            os.write(writing, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writing)
    try:
        answer = _read_until_end(reading, seconds)
    finally:
        os.close(reading)
        if not _ends(pid, 0.2):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert answer == b"ok", answer.decode() or "the child died or hung"


def _ends(pid, seconds):
    """Wait for a child's end; return whether it came."""
    deadline = time.monotonic() + seconds
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _read_until_end(file, seconds):
    answer = b""
    deadline = time.monotonic() + seconds
    os.set_blocking(file, False)
    while time.monotonic() < deadline:
        try:
            data = os.read(file, 10000)
        except BlockingIOError:
            time.sleep(0.005)
            continue
        if not data:
            break
        answer += data
    return answer


@dataclass
class Request:
    """A request as it arrived."""

    method: str
    target: str
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def kind(self):
        """The method, with the name of a subresource: "PUT", "PUT partNumber", "POST delete".

        "mark" are all requests for the mark that tells whose the bucket is.
        """
        if urlsplit(self.target).path.endswith(MARKER):
            return "mark"
        names = [part.split("=")[0] for part in urlsplit(self.target).query.split("&")]
        known = [n for n in names if n in ("delete", "uploads", "uploadId", "list-type")]
        return " ".join([self.method, *known])


@dataclass
class Answer:
    """What goes back, perhaps cut after some bytes of the body."""

    status: int
    headers: list = field(default_factory=list)
    body: bytes = b""
    cut_after: int | None = None
    reset: bool = False  # cut as by a host that went down; otherwise as by a proxy that closes


def s3_error(status, code, message="told by the test"):
    """Return an error answer as S3 gives it."""
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    ).encode()
    return Answer(status, [("Content-Type", "application/xml")], body)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True  # the client went away

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send(self.server.answer(Request(self.command, self.path, self.headers, body)))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def send(self, answer):
        self.send_response_only(answer.status)
        names = {name.lower() for name, _ in answer.headers}
        for name, value in answer.headers:
            self.send_header(name, value)
        if not names & {"content-length", "transfer-encoding"}:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.cut_after])
        self.wfile.flush()
        if answer.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())
        self.close_connection = self.close_connection or answer.cut_after is not None

    def log_message(self, *args):
        pass


class FaultyServer:
    """An S3 server that passes requests on to another, and misbehaves as told.

    :param str | None upstream: endpoint of the server behind; without one all answers are made here
    :ivar requests: all requests that came, in their order
    :ivar instead: called with each request; an `Answer` is sent and nothing passed on, None passes
    :ivar change: called with each request and the answer from behind, before it is sent
    """

    def __init__(self, upstream=None):
        self.requests = []
        self.instead = lambda request: None
        self.change = lambda request, answer: None
        self._upstream = upstream and urlsplit(upstream).netloc
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.answer = self.answer
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def kinds(self):
        """Return the kinds of the requests that came, in their order."""
        return [request.kind for request in self.requests]

    def answer(self, request):
        """Return the `Answer` to a request."""
        self.requests.append(request)
        answer = self.instead(request)
        if answer is None:
            answer = self._ask(request)
            self.change(request, answer)
        return answer

    def _ask(self, request):
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            # The signature covers the host that the client named.
            connection.putrequest(
                request.method, request.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in request.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(request.body)
            answer = connection.getresponse()
            body = answer.read()
            headers = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding")
                # The length of the body is told when it is sent; an answer to HEAD has none.
                and (name.lower() != "content-length" or request.method == "HEAD")
            ]
            return Answer(answer.status, headers, body)
        finally:
            connection.close()


class RawServer:
    """Accepts connections and lets a function do with each of them what it likes.

    :param handle: called with a socket, in a thread of its own, until the socket fails.
    """

    def __init__(self, handle):
        self._handle = handle
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepted = []
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        for connection in (self._listener, *self._accepted):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side has gone
            connection.close()

    def _accept(self):
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self._accepted.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        try:
            self._handle(connection)
        except OSError:
            pass  # the other side has gone


class SilentServer:
    """Accepts connections, reads what comes, and never answers."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepted = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for connection in self._accepted:
            connection.close()

    @property
    def connections(self):
        """How many came."""
        return len(self._accepted)

    def _accept(self):
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self._accepted.append(connection)


def refused_endpoint():
    """Return a URL of the loopback interface where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
