"""Records as the base has them, which wrappers may have transformed."""

from collections.abc import Callable
from typing import Any

from ZODB.blob import is_blob_record

from .basecontract import Reading
from .records import read_reference
from .records import with_reference
from .records import without_reference


class Translator:
    """Reads and writes references in them; whoever wraps the storage tells how."""

    def __init__(self) -> None:
        #: makes of a record what the base stores
        self.transform: Callable[[bytes], bytes] = bytes
        #: makes of that the record again
        self.untransform: Callable[[bytes], bytes] = bytes

    def learn(self, db: Any) -> None:
        """Take over what ``registerDB`` is told."""
        self.transform = db.transform_record_data
        self.untransform = db.untransform_record_data

    def read(self, record: bytes | None) -> Reading:
        """Tell what a record is; without one it is no blob's."""
        if not record:
            return Reading(False, None)
        plain = self.untransform(record)
        return Reading(is_blob_record(plain), read_reference(plain))

    def with_reference(self, record: bytes, stamp: bytes) -> bytes:
        """Return the record with a reference.

        :raises ValueError: when it is not a Blob's.
        """
        return self.transform(with_reference(self.untransform(record), stamp))

    def without_reference(self, record: bytes) -> bytes:
        """Return the record without a reference; one that has none is returned unchanged."""
        plain = self.untransform(record)
        return self.transform(without_reference(plain)) if read_reference(plain) else record
