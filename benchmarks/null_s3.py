"""An S3 server that does next to nothing, for what a real one beside it would hold back.

It accepts every PUT and part and drops the body; it answers every GET with one given file, and
every listing with the keys it was given or has accepted. It checks no signature. Only the mark that
tells whose the bucket is comes back as it was.

    python -m benchmarks.null_s3 [--body FILE] [--keys FILE]

prints "ready PORT" when it listens. It serves each connection in a thread of its own.
"""

import argparse
from bisect import bisect_right
from email.utils import formatdate
import hashlib
import mmap
from pathlib import Path
import re
import socketserver
import sys
import tempfile
from urllib.parse import parse_qs
from urllib.parse import unquote
from urllib.parse import urlsplit

from zodb_s3blobs.ownership import MARKER
from zodb_s3blobs.testing.process import end
from zodb_s3blobs.testing.process import spawn
from zodb_s3blobs.testing.process import wait_for_line


PAGE = 1000
DATE = "2020-01-01T00:00:00.000Z"


class NullS3:
    """The server as a child process.

    :param body: path of the file that every GET returns
    :param keys: those that a listing finds
    """

    access_key = "null-access"
    secret_key = "null-secret"

    def __init__(self, body=None, keys=()):
        arguments = [sys.executable, "-m", "benchmarks.null_s3"]
        with tempfile.TemporaryDirectory(prefix="null-s3-") as directory:
            log = Path(directory, "log")
            if body is not None:
                arguments += ["--body", str(body)]
            if keys:
                Path(directory, "keys").write_text("\n".join(keys))
                arguments += ["--keys", f"{directory}/keys"]
            with open(log, "w") as output:
                root = Path(__file__).parents[1]
                self._process = spawn(arguments, cwd=root, stdout=output, stderr=output)
            port = wait_for_line(self._process, log, re.compile(r"ready (\d+)").search)[1]
        self.endpoint_url = f"http://127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        end(self._process)


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, body, keys):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.metadata = {
            "x-amz-meta-zodb-size": len(body),
            "x-amz-meta-zodb-sha256": hashlib.sha256(body).hexdigest(),
        }
        self.mark = None
        self.keys = dict.fromkeys(keys)
        self.sorted = []


class Handler(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    rbufsize = 1 << 18

    def handle(self):
        self.scratch = bytearray(1 << 18)
        try:
            while line := self.rfile.readline():
                method, target, _version = line.decode("latin-1").split()
                self._answer(method, urlsplit(target))
        except ConnectionError:
            pass  # the client went away

    def _answer(self, method, url):
        size = self._read_header()
        query = parse_qs(url.query, keep_blank_values=True)
        _, _bucket, key = [*unquote(url.path).split("/", 2), ""][:3]
        if method == "POST" and "delete" in query:
            for name in re.findall(rb"<Key>(.*?)</Key>", self.rfile.read(size)):
                self.server.keys.pop(name.decode(), None)
            return self._send(b"<DeleteResult></DeleteResult>")
        if key.endswith(MARKER):
            return self._keep_mark(method, size)
        self._drop(size)
        if method == "GET" and key:
            return self._send(self.server.body, **self.server.metadata)
        if method == "GET":
            return self._send(self._list(query))
        if method == "POST" and "uploads" in query:
            tag, text = "InitiateMultipartUploadResult", "<UploadId>1</UploadId>"
            return self._send(f"<{tag}>{text}</{tag}>".encode())
        if method == "POST":
            tag, text = "CompleteMultipartUploadResult", "<ETag>x</ETag>"
            return self._send(f"<{tag}>{text}</{tag}>".encode())
        if method == "PUT" and "partNumber" not in query and key:
            self.server.keys[key] = None
        return self._send(b"")

    def _keep_mark(self, method, size):
        if method == "PUT":
            self.server.mark = self.rfile.read(size)
            return self._send(b"")
        if self.server.mark is not None:
            return self._send(self.server.mark)
        body = b"<Error><Code>NoSuchKey</Code><Message>no mark</Message></Error>"
        head = f"HTTP/1.1 404 Not Found\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        return self.connection.sendall(head + body)

    def _read_header(self):
        size = 0
        while (line := self.rfile.readline()) != b"\r\n":
            name, _, value = line.lower().partition(b":")
            if name == b"content-length":
                size = int(value)
            elif name == b"expect":
                self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        return size

    def _drop(self, size):
        with memoryview(self.scratch) as scratch:
            while size:
                size -= self.rfile.readinto(scratch[: min(size, len(scratch))])

    def _list(self, query):
        if "continuation-token" not in query:
            self.server.sorted = sorted(self.server.keys)
        [after] = query.get("continuation-token") or query.get("start-after", [""])
        prefix = query.get("prefix", [""])[0]
        start = bisect_right(self.server.sorted, after)
        rest = [key for key in self.server.sorted[start:] if key.startswith(prefix)]
        page, more = rest[:PAGE], len(rest) > PAGE
        contents = "".join(
            f"<Contents><Key>{key}</Key><LastModified>{DATE}</LastModified><ETag>x</ETag>"
            "<Size>1</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}"
            "</ListBucketResult>"
        ).encode()

    def _send(self, body, **headers):
        headers = {"ETag": '"0"', "Date": formatdate(usegmt=True), **headers}
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{''.join(lines)}\r\n".encode()
        if len(body) < 1 << 16:
            self.connection.sendall(head + bytes(body))
        else:
            self.connection.sendall(head)
            self.connection.sendall(body)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", type=Path)
    parser.add_argument("--keys", type=Path)
    arguments = parser.parse_args()
    body = b""
    if arguments.body is not None:
        with arguments.body.open("rb") as file:
            body = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    keys = arguments.keys.read_text().split() if arguments.keys is not None else ()
    with Server(body, keys) as server:
        print("ready", server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
