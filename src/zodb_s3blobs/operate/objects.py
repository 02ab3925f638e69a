"""Looks at single objects, and at files of the cache: are they what a revision needs?"""

import os
from typing import Any
from typing import NamedTuple

from ..interfaces import IntegrityError
from ..interfaces import ListedObject
from ..interfaces import S3OperationError
from ..keys import blob_key
from ..keys import is_waiting
from ..s3body import digest_of
from ..s3body import metadata_of
from .needs import Need


DEPTHS = ("list", "head", "read")

# What findings are called
MISSING = "missing"
WRONG_SIZE = "wrong size"
WRONG_DIGEST = "wrong digest"
SWAPPED = "swapped"
UNREADABLE = "unreadable"
DAMAGED_IN_CACHE = "damaged in cache"
ORPHANED = "orphaned"
FOREIGN = "foreign"
#: these are no findings
IN_SPOOL, IN_SOURCE = "in the spool", "in a source"


class Told(NamedTuple):
    """What an object says of itself; None where it does not."""

    #: as the server counts them
    length: int
    key: str | None
    size: int | None
    digest: str | None

    @classmethod
    def by(cls, head: Any) -> "Told":
        """Read what ``head_object`` has returned."""
        metadata = metadata_of(head)
        size = metadata.get("zodb-size", "")
        return cls(
            head["ContentLength"],
            metadata.get("zodb-key"),
            int(size) if size.isdecimal() else None,
            metadata.get("zodb-sha256"),
        )

    def is_of(self, path: str) -> bool:
        """Tell whether a file has the bytes that were stored, as far as is known."""
        with open(path, "rb") as file:
            size, digest = digest_of(file)
        expected = self.length if self.size is None else self.size
        return size == expected and self.digest in (None, digest.hexdigest())


class Examiner:
    """Any thread may ask it.

    :param str depth: one of `DEPTHS`.
    """

    def __init__(self, services: Any, depth: str) -> None:
        self._client = services.client
        self._cache = services.cache
        self._loader = services.loader
        self._depth = depth

    def seems_right(self, need: Need, listed: ListedObject) -> bool:
        """Tell with as few questions as possible whether `examine` need not be asked."""
        if self._cache.size(need.oid, need.tid) not in (None, listed.size):
            return False
        if self._depth == "list":
            return True
        try:
            if self._depth == "read":
                self._client.download_file(need.key, os.devnull)
                return True
            head = self._client.head_object(need.key)
        except S3OperationError:
            if self._client.is_down:
                raise
            return False
        return head is not None and difference(need, Told.by(head)) is None

    def examine(self, need: Need) -> tuple[str, str] | None:
        """Return what is wrong with the object that a revision needs, and what is known of that.

        :raises S3OperationError: while S3 does not answer at all.
        """
        try:
            head = self._client.head_object(need.key)
            if head is None:
                return self._look_elsewhere(need)
            return self._examine(need, Told.by(head))
        except IntegrityError as error:
            return WRONG_DIGEST, str(error)
        except S3OperationError as error:
            if self._client.is_down:
                raise
            return UNREADABLE, str(error)

    def _examine(self, need: Need, told: Told) -> tuple[str, str] | None:
        found = difference(need, told) or self._compare_with_cache(need, told)
        if found is None and self._depth == "read":
            self._client.download_file(need.key, os.devnull)
        return found

    def _compare_with_cache(self, need: Need, told: Told) -> tuple[str, str] | None:
        size = self._cache.size(need.oid, need.tid)
        if size in (None, told.length):
            return None
        sizes = f"{told.length} bytes in the bucket, {size} in the cache"
        if told.size is None:
            return WRONG_SIZE, f"{sizes}, and the object does not say how many there should be"
        return DAMAGED_IN_CACHE, sizes

    def _look_elsewhere(self, need: Need) -> tuple[str, str] | None:
        stamp, notes, damage = need.stamp, [], None
        by_tid = need._replace(key=blob_key(need.oid, need.tid))
        if stamp and (head := self._client.head_object(by_tid.key)) is not None:
            return self._examine(by_tid, Told.by(head))  # a database that has moved between bases
        for word, source in self._loader.elsewhere(need.oid, need.tid, stamp):
            try:
                if source.size(need.oid, need.tid) is not None:
                    if word == "spool" and self._depth == "read":
                        source.verify()
                    return IN_SPOOL if word == "spool" else IN_SOURCE, ""
            except IntegrityError as error:
                damage = WRONG_DIGEST, f"in the {word}: {error}"
            except OSError as error:
                notes.append(f"a {word} cannot be asked: {error}")
        if damage:
            return damage
        if stamp and is_waiting(stamp):
            notes.append("stored while S3 was down: perhaps in the spool of another host")
        return MISSING, "; ".join(notes)

    def is_right_in_cache(self, need: Need) -> bool:
        """Compare a cached file with what its object says of itself, as far as it does."""
        path = self._cache.path(need.oid, need.tid)
        try:
            head = self._client.head_object(need.key)
            if head is None or difference(need, told := Told.by(head)) is not None:
                return True  # that is a finding of its own, and the file may be the better one
            # What the older package has stored does not say which of the two is right.
            return told.size is None or told.is_of(path)
        except FileNotFoundError:
            return True  # evicted
        except S3OperationError:
            if self._client.is_down:
                raise
            return True  # who looks at the object tells that


def difference(need: Need, told: Told) -> tuple[str, str] | None:
    """Return what an object says of itself that cannot be right, as `Examiner.examine` does."""
    if told.key not in (None, need.key):
        return SWAPPED, f"says that it is {told.key}"
    if told.size not in (None, told.length):
        return WRONG_SIZE, f"{told.length} bytes, {told.size} were stored"
    return None
