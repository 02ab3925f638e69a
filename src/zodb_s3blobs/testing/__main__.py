"""Serves a bucket from a directory, to try a configuration with: python -m zodb_s3blobs.testing."""

import argparse
import signal
import sys
import threading

from .process import ServiceFailed
from .process import ServiceMissing
from .server import EmbeddedS3


KEYS = """\
  bucket-name {0.bucket}
  s3-endpoint-url {0.endpoint_url}
  s3-access-key {0.access_key}
  s3-secret-key {0.secret_key}"""


def main() -> int:
    """Serve until a signal ends it; return the exit status."""
    parser = argparse.ArgumentParser(
        "python -m zodb_s3blobs.testing",
        description="Serves an S3 bucket from a directory, for this machine alone, until Ctrl-C."
        " It prints the keys for <s3blobstorage>. To try things with, and not for files that"
        " somebody needs: what objects say of themselves is gone when it ends.",
    )
    parser.add_argument("directory", help="made if missing, and kept")
    parser.add_argument("--port", type=int, default=0, help="by default a free one")
    options = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *args: ended.set())
    server = EmbeddedS3(options.directory)
    server.port = options.port
    try:
        with server:
            print(KEYS.format(server), flush=True)
            while not ended.wait(1):
                if server.process.poll() is not None:
                    raise ServiceFailed("rclone has ended")
    except (ServiceMissing, ServiceFailed, OSError) as error:
        print(f"zodb_s3blobs.testing: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
