"""Tells who only wants to know where a blob's file would be.

ZODB's ``Connection.setstate`` asks for the file of every Blob that it loads, whether or not its
bytes are ever read, and remembers the path. Nobody opens that path before the storage is asked
again: see `blobpatch`. So this one caller needs no file; it is known by its code, and whoever else
asks gets one.
"""

from types import FrameType
from typing import Any

from ZODB.Connection import Connection
from ZODB.Connection import TmpStore
from ZODB.DemoStorage import DemoStorage


def _code_of(function: Any) -> Any:
    # Tools that trace put others in the place of functions. Where what was there cannot be told no
    # caller is known, and each gets a file.
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return getattr(function, "__code__", None)


_LOADING = _code_of(Connection.setstate)
# They pass the question on to us.
_AFTER_SAVEPOINT = _code_of(TmpStore.loadBlob)
_OF_CHANGES = _code_of(DemoStorage.loadBlob)


def loads_object(frame: FrameType | None) -> bool:
    """Tell whether a frame that has called ``loadBlob`` loads an object, and not its bytes.

    Source: ZODB/Connection.py, ``setstate``, "Blob support".
    """
    # Not a set of codes: to hash one takes longer than the whole question.
    while frame is not None:
        code = frame.f_code
        if code is _LOADING:
            return True
        if code is not _AFTER_SAVEPOINT and code is not _OF_CHANGES:
            return False
        frame = frame.f_back
    return False
