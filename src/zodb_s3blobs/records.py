"""Reads and writes the reference in a blob's object record.

A blob's record is two pickles, the class ``ZODB.blob.Blob`` and a state that
is always None and that nobody reads. The reference takes the place of that
state: bytes, a marker and 16 more that name the S3 object together with the
oid. A plain ZODB loads such a record as it loads any other of a Blob.

Both pickles are known byte for byte but for the memo and the framing that
pickle's protocols add, so that nothing is ever unpickled here.
"""

import pickle
import re


# 8 bytes of time, written as a tid, and 8 random ones
STAMP_SIZE = 16

_MARKER = b"zodb-s3blobs:"
# Protocol 4 makes referencesf and loading raise; 2 and below have no bytes without a global.
_PROTOCOL = 3

_BEGIN = rb"(?:\x80[\x00-\x05])?(?:\x95.{8})?"
_END = rb"(?:q.|r.{4}|p\d+\n|\x94)?\."
_NAME = rb"(?:cZODB\.blob\nBlob\n|\x8c\x09ZODB\.blob\x94\x8c\x04Blob\x94\x93)"
_CLASS = re.compile(_BEGIN + _NAME + _END, re.DOTALL)
_BYTES = rb"C%c%b(.{%d})" % (len(_MARKER) + STAMP_SIZE, re.escape(_MARKER), STAMP_SIZE)
_STATE = re.compile(_BEGIN + _BYTES + _END, re.DOTALL)


def read_reference(record: bytes) -> bytes | None:
    """Return the stamp of a blob's record, 16 bytes, or None when it has none.

    Any bytes may be given.
    """
    head = _CLASS.match(record)
    state = head and _STATE.fullmatch(record, head.end())
    return state[1] if state else None


def with_reference(record: bytes, stamp: bytes) -> bytes:
    """Return a blob's record with a reference in the place of its state.

    :param bytes stamp: 16 bytes.
    :raises ValueError: when the record is not a Blob's.
    """
    return _class_of(record) + pickle.dumps(_MARKER + stamp, _PROTOCOL)


def without_reference(record: bytes) -> bytes:
    """Return the record as ZODB writes it; one without a reference is returned unchanged."""
    if read_reference(record) is None:
        return record
    return _class_of(record) + pickle.dumps(None, _PROTOCOL)


def _class_of(record: bytes) -> bytes:
    head = _CLASS.match(record)
    if head is None:
        raise ValueError("the record is not a Blob's, so it cannot carry a reference")
    return head[0]
