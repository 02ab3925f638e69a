"""Start a server as a child process that does not outlive this one."""

from collections.abc import Callable
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any
from typing import TypeVar


Found = TypeVar("Found")


class ServiceMissing(Exception):
    """The service is not installed here; the message says what is missing."""


class ServiceFailed(Exception):
    """The service is installed, but did not start; the message says why."""


def spawn(arguments: list[Any], **options: Any) -> "subprocess.Popen[Any]":
    """Start a program that is killed when the calling thread ends, whatever ends it.

    Elsewhere than on Linux it outlives a process that is killed. A session of its own keeps Ctrl-C
    away from it: the caller ends its servers in its own order.
    """
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=_dying_with_parent() if sys.platform == "linux" else None,
        **options,
    )


def _dying_with_parent() -> Callable[[], None]:
    pr_set_pdeathsig = 1  # linux/prctl.h
    # Loaded before the fork: in the child another thread's lock may never be released.
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask_for_signal() -> None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died first, and no signal comes
            os._exit(1)

    return ask_for_signal


def end(process: "subprocess.Popen[Any]", seconds: float = 5.0) -> None:
    """End a child politely, then by force; ending it again does nothing."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for_line(
    process: "subprocess.Popen[Any]",
    path: "str | os.PathLike[str]",
    found: Callable[[str], Found | None],
    seconds: float = 20.0,
) -> Found:
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
            if not (line.endswith("\n") or ended):
                break  # it is being written
            if result := found(line):
                return result
        if ended or time.monotonic() > deadline:
            program: Any = process.args[0]  # type: ignore[index]  # spawn gives it a list
            raise ServiceFailed(f"{program} did not start:\n{''.join(lines)}")
        time.sleep(0.01)


def find_program(name: str) -> str | None:
    """Return the path of a program: beside this Python first, then on the search path, or None."""
    beside = os.path.join(os.path.dirname(sys.executable), name)
    return beside if os.access(beside, os.X_OK) else shutil.which(name)
