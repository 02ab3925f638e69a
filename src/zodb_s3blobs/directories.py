"""Directories and files: private whatever the umask says, durable, and closed once."""

import os


def make_private(path: str) -> None:
    """Make a directory, and those above it that are missing; what exists keeps its mode.

    ``os.makedirs`` gives its mode to the last one only.
    """
    above = os.path.dirname(path)
    # What is no directory makes an error that names the path that was asked for.
    if above and not os.path.lexists(above):
        make_private(above)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def sync(path: str) -> None:
    """Make a file's bytes, or the names in a directory, durable."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def close_if(file: int, status: os.stat_result) -> None:
    """Close a descriptor if it is still of this file.

    A daemon closes all that it has when it begins, and then gives the numbers to other files.
    """
    if is_still(file, status):
        os.close(file)


def is_still(file: int, status: os.stat_result) -> bool:
    """Tell whether a descriptor is open, and of this file."""
    try:
        return os.path.samestat(os.fstat(file), status)
    except OSError:
        return False


def private(path: str, flags: int) -> int:
    """Open a file, as an ``opener`` of `open`."""
    return os.open(path, flags, 0o600)
