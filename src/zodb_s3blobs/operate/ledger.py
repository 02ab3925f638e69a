"""Since when objects are garbage, which S3 does not know: kept beside the mark of the owner.

::

    zodb-s3blobs-gc/current.json               which of the others count
    zodb-s3blobs-gc/{generation}/{number}      lines "oid/name time", compressed

A run reads all of it into a file, and writes it anew in the end. An entry whose object was not
garbage any more is dropped. What is lost of it only makes garbage stay longer.
"""

from collections.abc import Collection
from collections.abc import Iterator
import json
import os
import sqlite3
from typing import Any
import zlib

from ..interfaces import ListedObject
from ..keys import PREFIX


LEDGER = "zodb-s3blobs-gc/"
CURRENT = f"{LEDGER}current.json"
# Each has 61 bytes at most before it is compressed, and a small object one MiB.
ENTRIES_AT_ONCE = 10_000
SUFFIX = ".blob"


class Ledger:
    """One thread may use it.

    :param client: an `S3Client`.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._database = sqlite3.connect("")
        self._database.execute(
            "CREATE TABLE entry (key TEXT PRIMARY KEY, since INTEGER, seen INTEGER) WITHOUT ROWID"
        )

    def close(self) -> None:
        """Forget what was not written."""
        self._database.close()

    def read(self) -> None:
        """Take over what the last run has written."""
        generation, parts = _current(self._client.read_small(CURRENT))
        for number in range(parts):
            data = self._client.read_small(f"{LEDGER}{generation}/{number}")
            insert = "INSERT OR IGNORE INTO entry VALUES (?, ?, 0)"
            self._database.executemany(insert, _entries(data))

    def see(self, garbage: Collection[ListedObject]) -> dict[str, float]:
        """Note what is garbage now.

        :returns: by key, for how many seconds that is known.
        """
        ages = {}
        for listed in garbage:
            now = int(listed.listed)
            self._database.execute(
                "INSERT INTO entry VALUES (?, ?, 1) ON CONFLICT (key) DO UPDATE SET seen = 1",
                (listed.key, now),
            )
            query = "SELECT since FROM entry WHERE key = ?"
            ((since,),) = self._database.execute(query, (listed.key,))
            ages[listed.key] = float(now - since)
        return ages

    def forget(self, after: str, last: str | None) -> None:
        """Drop what was not seen again behind a key, up to another; None is the end."""
        where = "seen = 0 AND key > ?" + ("" if last is None else " AND key <= ?")
        self._database.execute(
            f"DELETE FROM entry WHERE {where}", (after,) if last is None else (after, last)
        )

    def write(self) -> None:
        """Replace what the last run has written.

        :raises S3OperationError: when S3 does not take it; the old one counts, then.
        """
        generation, parts = os.urandom(8).hex(), 0
        rows = self._database.execute("SELECT key, since FROM entry ORDER BY key")
        while some := rows.fetchmany(ENTRIES_AT_ONCE):
            names = [key.removeprefix(PREFIX).removesuffix(SUFFIX) for key, _since in some]
            times = [since for _key, since in some]
            lines = [f"{name} {since}" for name, since in zip(names, times, strict=True)]
            data = zlib.compress("\n".join(lines).encode(), 9)
            self._client.write_small(f"{LEDGER}{generation}/{parts}", data)
            parts += 1
        current = {"generation": generation, "parts": parts}
        self._client.write_small(CURRENT, json.dumps(current).encode())
        # Those of runs that were killed, too
        keep = CURRENT, f"{LEDGER}{generation}/"
        keys = self._client.list_objects(LEDGER)
        self._client.delete_objects([key for key in keys if not key.startswith(keep)])


def _current(data: bytes | None) -> tuple[str, int]:
    try:
        told = json.loads(data or b"")
        return str(told["generation"]), int(told["parts"])
    except (ValueError, KeyError, TypeError):
        return "", 0  # there is none yet, or somebody else has written it


def _entries(data: bytes | None) -> Iterator[tuple[str, int]]:
    try:
        text = zlib.decompress(data or b"").decode()
        for line in text.splitlines():
            name, since = line.split(" ")
            yield f"{PREFIX}{name}{SUFFIX}", int(since)
    except (ValueError, zlib.error):
        return  # written by somebody else, or lost
