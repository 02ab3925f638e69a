"""Root without the right to pass over file permissions."""

import contextlib
import ctypes
import os
import sys


# linux/capability.h: _LINUX_CAPABILITY_VERSION_3, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
VERSION = 0x20080522
PASS_OVER_PERMISSIONS = 1 << 1 | 1 << 2


class Header(ctypes.Structure):
    """``struct __user_cap_header_struct``"""

    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class Sets(ctypes.Structure):
    """``struct __user_cap_data_struct``, 32 capabilities each"""

    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def call(function, sets):
    """Call capget or capset for this thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(ctypes.byref(Header(VERSION, 0)), ctypes.byref(sets)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@contextlib.contextmanager
def bound_by_permissions():
    """Let file permissions bind this thread, and threads it starts, also where it is root's.

    Suites of ZODB assert that a read-only file refuses writers; root would write nevertheless.
    """
    if sys.platform != "linux" or os.geteuid():
        yield
        return
    sets = (Sets * 2)()
    call("capget", sets)
    before = sets[0].effective
    sets[0].effective = before & ~PASS_OVER_PERMISSIONS
    call("capset", sets)
    try:
        yield
    finally:
        sets[0].effective = before
        call("capset", sets)
