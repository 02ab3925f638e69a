"""Start servers as child processes, and look at their ports."""

import socket
import time
from urllib.parse import urlsplit

from zodb_s3blobs.testing.process import end
from zodb_s3blobs.testing.process import find_program
from zodb_s3blobs.testing.process import ServiceFailed
from zodb_s3blobs.testing.process import ServiceMissing
from zodb_s3blobs.testing.process import spawn
from zodb_s3blobs.testing.process import wait_for_line


__all__ = [
    "ServiceFailed",
    "ServiceMissing",
    "end",
    "find_program",
    "listens",
    "ports_free",
    "spawn",
    "wait_for_line",
    "wait_until",
]


def ports_free(*ports):
    """Return whether nothing listens on any of these ports of the loopback interface."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def listens(url):
    """Return whether something accepts connections at a URL."""
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


def wait_until(condition, seconds=20):
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
