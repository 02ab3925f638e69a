"""(oid, tid) to key text and back; the only place that knows the layout.

``blobs/{oid}/{tid}.blob`` with lower-case hex and without leading zeros.
"""

import re


PREFIX = "blobs/"
_FORM = re.compile(r"blobs/(0|[1-9a-f][0-9a-f]{0,15})/(0|[1-9a-f][0-9a-f]{0,15})\.blob")


def blob_key(oid: bytes, tid: bytes) -> str:
    """Return the key of a blob revision.

    :param bytes oid: 8 bytes.
    :param bytes tid: 8 bytes, the revision's own tid.
    """
    return f"{PREFIX}{int.from_bytes(oid, 'big'):x}/{int.from_bytes(tid, 'big'):x}.blob"


def parse_key(key: str) -> tuple[bytes, bytes] | None:
    """Return (oid, tid) of a key that `blob_key` made, None for any other text."""
    match = _FORM.fullmatch(key)
    if match is None:
        return None
    oid, tid = match.groups()
    return int(oid, 16).to_bytes(8, "big"), int(tid, 16).to_bytes(8, "big")
