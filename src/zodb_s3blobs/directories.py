"""Directories and files that nobody but this user may look into, whatever the umask says."""

import os


def make_private(path: str) -> None:
    """Make a directory, and those above it that are missing; what exists keeps its mode.

    ``os.makedirs`` gives its mode to the last one only.
    """
    above = os.path.dirname(path)
    if above and not os.path.isdir(above):
        make_private(above)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise


def private(path: str, flags: int) -> int:
    """Open a file, as an ``opener`` of `open`."""
    return os.open(path, flags, 0o600)
