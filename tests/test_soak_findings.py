"""What the soak has found, each by itself."""

from dataclasses import replace
import os
import threading

import pytest
from ZODB.blob import Blob

from zodb_s3blobs import blobs
from zodb_s3blobs.interfaces import S3OperationError
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.singleflight import SingleFlight
from zodb_s3blobs.spool import Spool

from .faults import FaultyServer
from .faults import refused_endpoint
from .faults import s3_error
from .storages import make_client
from .storages import open_db
from .storages import write_file


MiB = 1 << 20


class HeadCutter:
    """A server in front of another that cuts the heads of answers, `times` of them.

    :param matches: of a request's first line (bytes).
    :param until: the head ends before this header.
    """

    def __init__(self, upstream, matches, until=b"Content-Length", times=100, tail=b""):
        import socket

        host, _, port = upstream.rpartition("/")[2].partition(":")
        self._upstream, self._matches, self._until, self.times = (
            (host, int(port)),
            matches,
            until,
            times,
        )
        self._tail = tail
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        import http.client

        file = client.makefile("rb")
        try:
            while line := file.readline():
                headers = []
                while (header := file.readline()).strip():
                    headers.append(header)
                fields = {
                    name.lower(): value.strip()
                    for name, _, value in (h.decode("latin-1").partition(":") for h in headers)
                }
                if "expect" in fields:
                    client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = file.read(int(fields.get("content-length", 0)))
                method, target, _ = line.decode().split(" ", 2)
                connection = http.client.HTTPConnection(*self._upstream, timeout=30)
                connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
                for header in headers:
                    name, _, value = header.decode("latin-1").partition(":")
                    if name.lower() not in ("connection", "expect"):
                        connection.putheader(name, value.strip())
                connection.endheaders(body)
                answer = connection.getresponse()
                data = answer.read()
                head = f"HTTP/1.1 {answer.status} {answer.reason}\r\n".encode()
                names = dict(answer.getheaders())
                names.pop("Transfer-Encoding", None)
                if method != "HEAD":
                    names["Content-Length"] = str(len(data))
                # so that what the test wants to be lost comes last
                last = names.pop(self._until.decode(), None)
                for name, value in names.items():
                    head += f"{name}: {value}\r\n".encode()
                connection.close()
                if self._matches(line) and self.times > 0:
                    self.times -= 1
                    client.sendall(head + self._tail)  # and no more
                    return
                if last is not None:
                    head += self._until + b": " + last.encode() + b"\r\n"
                client.sendall(head + b"\r\n" + data)
        finally:
            client.close()

    def close(self):
        self._listener.close()


def cutting(s3, matches, **options):
    cutter = HeadCutter(s3.endpoint_url, matches, **options)
    return cutter, replace(s3, endpoint_url=cutter.endpoint_url)


def test_head_of_an_answer_to_upload_part_is_cut(s3, tmp_path):
    """KeyError('ETag') leaves upload_file: it should be tried again, or be a TransientS3Error."""
    cutter, location = cutting(s3, lambda line: b"partNumber" in line, until=b"Etag", times=1)
    client = make_client(location, multipart_threshold=MiB)
    path = write_file(b"x" * 2 * MiB, tmp_path)
    try:
        client.upload_file(path, "blobs/1/2.blob")
    except S3OperationError:
        pass
    finally:
        cutter.close()


def test_head_of_an_answer_to_create_multipart_upload_is_cut(s3, tmp_path):
    """KeyError('UploadId') leaves upload_file."""
    cutter, location = cutting(s3, lambda line: b"?uploads" in line, times=1)
    client = make_client(location, multipart_threshold=MiB)
    path = write_file(b"x" * 2 * MiB, tmp_path)
    try:
        client.upload_file(path, "blobs/1/2.blob")
    except S3OperationError:
        pass
    finally:
        cutter.close()


def test_head_of_an_answer_to_head_is_cut(s3, tmp_path):
    """KeyError('ContentLength') leaves object_size."""
    make_client(s3).upload_file(write_file(b"bytes", tmp_path), "blobs/1/2.blob")
    cutter, location = cutting(s3, lambda line: line.startswith(b"HEAD"), times=1)
    try:
        assert make_client(location).object_size("blobs/1/2.blob") == 5
    except S3OperationError:
        pass
    finally:
        cutter.close()


def test_head_of_an_answer_404_is_cut(s3, tmp_path):
    """PermanentS3Error "404 404": should be MissingObjectError, or be tried again, or transient."""
    cutter, location = cutting(s3, lambda line: line.startswith(b"GET"), times=1)
    from zodb_s3blobs.interfaces import MissingObjectError

    try:
        with pytest.raises((MissingObjectError, TransientS3Error)):
            make_client(location).download_file("blobs/1/2.blob", str(tmp_path / "file"))
    finally:
        cutter.close()


def test_verify_with_a_head_that_is_cut_says_that_nothing_is_damaged(s3, tmp_path):
    """It finds "SHA-256 is ..., expected ''", says False, and fetches the file anew."""
    with open_db(s3, tmp_path).transaction() as conn:
        conn.root()["blob"] = Blob(b"bytes")
        db = conn.db()
    db.close()

    name = b"X-Amz-Meta-Zodb-Sha256"
    cutter = HeadCutter(
        s3.endpoint_url,
        lambda line: line.startswith(b"HEAD"),
        until=name,
        times=1,
        tail=name + b": ",
    )
    location = replace(s3, endpoint_url=cutter.endpoint_url)
    db = open_db(location, tmp_path)
    try:
        with db.transaction() as conn:
            try:
                assert blobs.verify(conn.root()["blob"])
            except S3OperationError:
                pass
    finally:
        db.close()
        cutter.close()


def test_answer_to_complete_multipart_upload_is_lost(s3, tmp_path):
    """PermanentS3Error 404 NoSuchUpload, though the object is there: at least transient."""
    with FaultyServer(s3.endpoint_url) as server:
        lost = []

        def change(request, answer):
            if request.method == "POST" and "uploadId" in request.target and not lost:
                lost.append(request)
                answer.body, answer.cut_after, answer.reset = b"x" * 10, 0, True

        server.change = change
        client = make_client(replace(s3, endpoint_url=server.endpoint_url), multipart_threshold=MiB)
        try:
            client.upload_file(write_file(b"x" * 2 * MiB, tmp_path), "blobs/1/2.blob")
        except TransientS3Error:
            pass
        assert lost
        client.close()


def test_lock_file_of_single_flight_is_closed_when_two_threads_opened_it(tmp_path, monkeypatch):
    """Two descriptors, one stays open after close() until the process ends."""
    flight = SingleFlight(str(tmp_path / "lock"))
    barrier = threading.Barrier(2, timeout=10)
    real = os.open

    def open_together(*args, **kw):
        file = real(*args, **kw)
        if args[0] == str(tmp_path / "lock"):
            barrier.wait()
        return file

    monkeypatch.setattr(os, "open", open_together)
    threads = [threading.Thread(target=lambda: flight.begin("name")()) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    flight.close()
    still = [
        number
        for number in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{number}")
        and os.readlink(f"/proc/self/fd/{number}") == str(tmp_path / "lock")
    ]
    assert still == []


def test_spooled_blob_that_is_read_is_a_copy(tmp_path):
    """To rename one name of a file to another does nothing, and would leave one behind."""
    path = write_file(b"bytes", tmp_path)
    spool = Spool(str(tmp_path / "spool"), ["bucket"])
    spool.take([("blobs/1/2.blob", path)]).end()
    target = tmp_path / "target"
    (source,) = spool.find("blobs/1/2.blob")
    assert source.fetch(bytes(8), bytes(8), str(target))
    assert target.read_bytes() == b"bytes"
    assert target.stat().st_nlink == 1
    spool.close()


def test_revision_that_was_uploaded_and_packed_away_is_not_said_to_be_lost(s3, tmp_path, caplog):
    """Of a transaction with two blobs one was uploaded from the spool, superseded, and packed away.

    The journal waits for the other one, and the next drain must not take the first for lost.
    """
    import logging
    import time

    caplog.set_level(logging.INFO)
    with FaultyServer(s3.endpoint_url) as server:
        server.instead = lambda request: (
            s3_error(503, "SlowDown") if request.method in ("PUT", "HEAD") else None
        )
        location = replace(s3, endpoint_url=server.endpoint_url)
        options = {
            "on_upload_failure": "spool",
            "spool_dir": tmp_path / "spool",
            "s3_max_attempts": 1,
        }
        db = open_db(location, tmp_path, **options)
        with db.transaction() as conn:
            conn.root()["one"] = Blob(b"one")
            conn.root()["two"] = Blob(b"two")
        assert db.storage.stats()["spool_blobs"] == 2
        puts = []

        def only_the_first(request):
            if request.kind == "PUT":
                puts.append(request)
                if len(puts) > 1:
                    return s3_error(503, "SlowDown")
            return None

        server.instead = only_the_first
        deadline = time.monotonic() + 30
        while db.storage.stats()["spool_blobs"] == 2 and time.monotonic() < deadline:
            try:
                db.storage.drain_spool()
            except TransientS3Error:
                time.sleep(0.2)
        assert db.storage.stats()["spool_blobs"] == 1
        server.instead = lambda request: None
        time.sleep(1.1)  # the breaker
        with db.transaction() as conn:
            for name in ("one", "two"):
                with conn.root()[name].open("w") as file:
                    file.write(b"new")
        db.pack(time.time() + 1)
        report = db.storage.drain_spool()
        db.close()
        assert "spooled blob is gone" not in caplog.text
        assert report.lost == 0


@pytest.mark.parametrize("fault", ["cut", "stall"])
@pytest.mark.parametrize("call", ["get_404", "list", "delete"])
def test_body_of_an_answer_that_is_no_object_is_cut_or_stalled(s3, tmp_path, call, fault):
    """botocore reads such bodies outside of its try: errors of urllib3 leave the client."""

    make_client(s3).upload_file(write_file(b"bytes", tmp_path), "blobs/1/2.blob")
    times = [3]

    class Stalling(FaultyServer):
        pass

    with FaultyServer(s3.endpoint_url) as server:

        def change(request, answer):
            if times[0] and answer.body:
                times[0] -= 1
                if fault == "cut":
                    answer.cut_after = len(answer.body) // 2
                else:
                    # The rest never comes.
                    answer.headers = [
                        (n, v) for n, v in answer.headers if n.lower() != "content-length"
                    ] + [("Content-Length", str(len(answer.body) + 100))]

        server.change = change
        client = make_client(
            replace(s3, endpoint_url=server.endpoint_url), read_timeout=1, connect_timeout=1
        )
        try:
            if call == "get_404":
                client.download_file("blobs/3/4.blob", str(tmp_path / "file"))
            elif call == "list":
                list(client.list_pages("blobs/"))
            else:
                client.delete_objects(["blobs/1/2.blob", "blobs/1/3.blob"])
        except S3OperationError:
            pass
        assert times[0] < 3
        client.close()


FORK = '''
import os, signal, sys, threading, importlib.abc
from zodb_s3blobs.s3client import S3Client

reached, go_on = threading.Event(), threading.Event()

class Slow(importlib.abc.MetaPathFinder):
    """Another thread stands in the middle of the import, as it does for a tenth of a second."""
    def find_spec(self, name, path, target=None):
        if name == "boto3.s3.inject" and threading.current_thread() is not threading.main_thread():
            reached.set()
            go_on.wait(20)
        return None

sys.meta_path.insert(0, Slow())
client = S3Client("bucket", endpoint_url=sys.argv[1], aws_access_key_id="a",
    aws_secret_access_key="b", max_attempts=1, connect_timeout=1, read_timeout=1)

def use():
    try:
        client.head_object("blobs/1/2.blob")
    except Exception as error:
        return type(error).__name__

thread = threading.Thread(target=use)
thread.start()
reached.wait(20)
threading.Timer(1, go_on.set).start()
pid = os.fork()
if pid == 0:
    signal.alarm(10)
    use()
    os._exit(0)
status = os.waitpid(pid, 0)[1]
go_on.set()
thread.join()
print("hangs" if os.WIFSIGNALED(status) else "fine")
'''


def test_child_forked_while_another_thread_makes_the_first_request_can_make_one(tmp_path):
    """It waits for ever for the lock of a module that the other thread was importing.

    `_creating` could be held over a fork, as the locks of the cache's index are.
    """
    import subprocess
    import sys

    answer = subprocess.run(
        [sys.executable, "-c", FORK, refused_endpoint()], capture_output=True, text=True, timeout=60
    )
    assert answer.stdout == "fine\n", answer


def answering(head):
    """Return the URL of a server that answers each request with this and closes."""
    import socket

    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            client, _ = listener.accept()
            client.recv(1 << 16)
            client.sendall(head)
            client.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("call", ["download", "list", "range", "size", "copy"])
@pytest.mark.parametrize(
    "head",
    [
        # AWS sends the ETag before the metadata and Content-Length.
        pytest.param(b'HTTP/1.1 200 OK\r\nETag: "abc"\r\n', id="cut behind the ETag"),
        pytest.param(b'HTTP/1.1 200 OK\r\nETag: "abc"\r\nContent-Length: ', id="cut in the length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nServer: x", id="cut at the beginning"),
        pytest.param(b'HTTP/1.1 200 OK\r\nETag: "abc"\r\n\r\n', id="no length at all"),
    ],
)
def test_half_a_head_is_no_answer(s3, tmp_path, call, head):
    """Nor is it an empty object, an empty bucket, or a KeyError."""
    client = make_client(replace(s3, endpoint_url=answering(head)), max_attempts=1)
    with pytest.raises(TransientS3Error):
        if call == "download":
            client.download_file("blobs/1/2.blob", str(tmp_path / "file"))
        elif call == "list":
            list(client.list_pages("blobs/"))
        elif call == "range":
            client.open_range("blobs/1/2.blob", 0, 5).read(5)
        elif call == "size":
            client.object_size("blobs/1/2.blob")
        else:
            client.copy_object("blobs/1/2.blob", "blobs/1/3.blob")


def test_head_of_a_part_that_is_cut_in_the_key_is_no_other_object(s3, tmp_path):
    """IntegrityError "key is ..., expected blobs/" though the connection was cut."""
    make_client(s3).upload_file(write_file(b"bytes", tmp_path), "blobs/1/2.blob")
    name = b"X-Amz-Meta-Zodb-Key"
    cutter, location = cutting(
        s3, lambda line: line.startswith(b"GET"), until=name, times=1, tail=name + b": blobs/"
    )
    try:
        assert make_client(location).open_range("blobs/1/2.blob", 1, 3).read(2) == b"yt"
    except TransientS3Error:
        pass
    finally:
        cutter.close()
