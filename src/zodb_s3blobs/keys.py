"""(oid, name) to key text and back; the only place that knows the layout.

The name is the revision's own tid, or a stamp that the revision's record
carries. The form of a key tells which::

    blobs/{oid}/{tid}.blob       lower-case hex without leading zeros
    blobs/{oid}/{stamp}.blob     the stamp has 32 digits
"""

from collections.abc import Callable
import os
import re

from ZODB.utils import newTid


PREFIX = "blobs/"
TID_SIZE = 8
# The end of a stamp says that its object was not in the bucket yet when the transaction committed.
_WAITING = b"wait"
_FORM = re.compile(
    r"blobs/(?P<oid>0|[1-9a-f][0-9a-f]{0,15})"
    r"/(?:(?P<tid>0|[1-9a-f][0-9a-f]{0,15})|(?P<stamp>[0-9a-f]{32}))\.blob"
)


def new_stamp(random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return 16 bytes that nobody else returns: the time, written as a tid, and random ones."""
    stamp: bytes = newTid(None) + random(8)
    return stamp


def new_waiting_stamp(random: Callable[[int], bytes] = os.urandom) -> bytes:
    """Return a stamp for a blob that the transaction commits before it is uploaded."""
    stamp: bytes = newTid(None) + random(8 - len(_WAITING)) + _WAITING
    return stamp


def is_waiting(name: bytes) -> bool:
    """Tell whether a name is such a stamp."""
    return len(name) > TID_SIZE and name.endswith(_WAITING)


def blob_key(oid: bytes, name: bytes) -> str:
    """Return the key of a blob.

    :param bytes oid: 8 bytes.
    :param bytes name: a tid of 8 bytes or a stamp of 16.
    """
    text = f"{int.from_bytes(name, 'big'):x}" if len(name) == TID_SIZE else name.hex()
    return f"{PREFIX}{int.from_bytes(oid, 'big'):x}/{text}.blob"


def parse_key(key: str) -> tuple[bytes, bytes] | None:
    """Return (oid, name) of a key that `blob_key` made, None for any other text."""
    match = _FORM.fullmatch(key)
    if match is None:
        return None
    oid, tid, stamp = match.groups()
    name = bytes.fromhex(stamp) if stamp else int(tid, 16).to_bytes(TID_SIZE, "big")
    return int(oid, 16).to_bytes(8, "big"), name
