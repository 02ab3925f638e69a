"""Disks of a few megabytes that only one child process sees, so that it can fill them."""

import ctypes
import errno
import functools
import itertools
import os

import pytest

from .conftest import is_required
from .faults import in_child


# From <linux/sched.h> and <linux/mount.h>
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
MEGABYTE = 1 << 20


def on_disks(function, *paths, size=4 * MEGABYTE, inodes=0, seconds=60):
    """Call a function in a forked child for which each path is a small, empty disk of its own.

    Where the system lets nobody mount, the test is skipped, but not where `is_required` says so.

    :param int size: bytes of each disk.
    :param int inodes: how many files and directories fit on it, 0 for any number.
    """
    if reason := _refusal():
        act = pytest.fail if is_required("mounts") else pytest.skip
        act(f"no disks of our own: {reason}")
    for path in paths:
        os.makedirs(path, exist_ok=True)

    def child():
        _enter_namespaces()
        for path in paths:
            _mount("tmpfs", path, "tmpfs", 0, f"size={size},nr_inodes={inodes}")
        function()

    in_child(child, seconds)


def make_read_only(path):
    """Let nobody write below a directory any more, in a child of `on_disks`.

    What is open for writing stays so.
    """
    _mount(path, path, None, MS_BIND)
    _mount("none", path, None, MS_REMOUNT | MS_BIND | MS_RDONLY)


def make_writable(path):
    """Undo `make_read_only`."""
    # Lazily: files may be open.
    if _libc().umount2(os.fsencode(path), 2):
        raise _error(path)


def fill_up(path):
    """Write a file until nothing more fits on its disk."""
    with open(path, "wb", buffering=0) as file:
        for size in (MEGABYTE, 4096):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def fill_inodes(path):
    """Make a directory, and files in it until no more fit on its disk."""
    os.mkdir(path)
    for number in itertools.count():
        try:
            with open(f"{path}/{number}", "wb"):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return


def free_bytes(path):
    """Return how many bytes still fit on a disk."""
    status = os.statvfs(path)
    return status.f_bavail * status.f_bsize


@functools.cache
def _refusal():
    """Return why nothing can be mounted here, None if it can."""
    try:
        in_child(_enter_namespaces)
    except AssertionError as error:
        return str(error).strip().splitlines()[-1]
    return None


def _enter_namespaces():
    uid, gid = os.getuid(), os.getgid()
    if not hasattr(_libc(), "unshare"):
        raise OSError("not Linux")
    if _libc().unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise _error("unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)


def _mount(source, target, kind, flags, options=None):
    arguments = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if _libc().mount(*arguments, flags, options and options.encode()):
        raise _error(target)


def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
    return libc


def _error(what):
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(what))
