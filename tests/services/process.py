"""Start a server as a child process that does not outlive this one."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time


class ServiceMissing(Exception):
    """The service is not installed here; the message says what is missing."""


class ServiceFailed(Exception):
    """The service is installed, but did not start; the message says why."""


def spawn(arguments, **options):
    """Start a program that is killed when the calling thread ends, whatever ends it.

    A session of its own keeps Ctrl-C away from it: the caller ends its servers in its own order.

    :returns: a `subprocess.Popen`
    """
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        **options,
    )


def _die_with_parent():
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def end(process, seconds=5.0):
    """End a child politely, then by force; ending it again does nothing."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_line(process, path, found, seconds=20.0):
    """Wait until a line of a server's log is the awaited one.

    :param found: called with each line; its first true result is returned
    :raises ServiceFailed: the server ended, or said nothing of the kind in time
    """
    deadline = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None
        with open(path, errors="replace") as log:
            lines = log.readlines()
        for line in lines:
            if result := found(line):
                return result
        if ended or time.monotonic() > deadline:
            raise ServiceFailed(f"{process.args[0]} did not start:\n{''.join(lines)}")
        time.sleep(0.01)


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


def find_program(name):
    """Return the path of a program: beside this Python first, then on the search path, or None."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.access(beside, os.X_OK) else shutil.which(name)
