"""Which files a cache directory holds, how large they are and when each was last known to be used.

One SQLite file serves all threads and processes of a host. Its write lock is
the lock of the whole directory: files appear and vanish only while it is held,
so that the rows never lack a file that exists. A crash can leave a row without
a file; it costs room until eviction comes by and drops it.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from contextlib import contextmanager
import logging
import os
import sqlite3
import threading
import time
import weakref


logger = logging.getLogger(__name__)

# Yields name, size in bytes and time of last use of each file.
Scan = Callable[[], Iterable[tuple[str, int, float]]]

VERSION = 1
# Seconds until a process gives up waiting for the others.
BUSY_TIMEOUT = 60.0

_SCHEMA = """
DROP TABLE IF EXISTS file;
DROP TABLE IF EXISTS total;
CREATE TABLE file (name TEXT PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX file_used ON file (used);
CREATE TABLE total (bytes INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TRIGGER file_added AFTER INSERT ON file
    BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER file_removed AFTER DELETE ON file
    BEGIN UPDATE total SET bytes = bytes - old.size; END;
CREATE TRIGGER file_resized AFTER UPDATE OF size ON file
    BEGIN UPDATE total SET bytes = bytes + new.size - old.size; END;
"""


class IndexRows:
    """The rows, for whoever holds the write lock."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute

    def total(self) -> int:
        """Return the sum of all sizes, in bytes."""
        (size,) = self._execute("SELECT bytes FROM total").fetchone()
        return int(size)

    def __contains__(self, name: str) -> bool:
        return self._execute("SELECT 1 FROM file WHERE name = ?", (name,)).fetchone() is not None

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._execute("SELECT name, size FROM file").fetchall())

    def put(self, name: str, size: int, used: float) -> None:
        self._execute(
            "INSERT INTO file VALUES (?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET size = excluded.size, used = excluded.used",
            (name, size, used),
        )

    def remove(self, name: str) -> None:
        self._execute("DELETE FROM file WHERE name = ?", (name,))

    def rename(self, name: str, new_name: str) -> None:
        """Give a row another name, in the place of one that has that name already."""
        self.remove(new_name)
        self._execute("UPDATE file SET name = ? WHERE name = ?", (new_name, name))

    def mark(self, name: str, used: float) -> None:
        self._execute("UPDATE file SET used = ? WHERE name = ?", (used, name))

    def oldest(self) -> tuple[str, int, float] | None:
        """Return name, size and last known use of the row that was not used for longest."""
        row: tuple[str, int, float] | None = self._execute(
            "SELECT name, size, used FROM file ORDER BY used LIMIT 1"
        ).fetchone()
        return row


_indexes: "weakref.WeakSet[CacheIndex]" = weakref.WeakSet()


class CacheIndex:
    """Opens the index, makes it anew from the files when it is missing or damaged.

    :param str path: the SQLite file.
    :param scan: called without arguments, yields (name, size, used) of the files there are.
    """

    def __init__(self, path: str, scan: Scan) -> None:
        self._path = path
        self._scan = scan
        self._lock = threading.Lock()
        # Guarded by _lock: _connection and _identity, what it is a connection to.
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, ...] | None = None
        _indexes.add(self)

    @contextmanager
    def writing(self) -> Iterator[IndexRows]:
        """Hold the write lock of the directory; what was changed is kept unless an error leaves.

        :raises OSError: when the index cannot be opened, or others hold it for too long.
        """
        with self._lock:
            connection = self._begin()
            try:
                yield IndexRows(connection)
                connection.execute("COMMIT")
            except BaseException as error:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    if not isinstance(error, sqlite3.OperationalError):
                        self._remove(error)
                    raise self._unusable(error) from error
                raise

    def close(self) -> None:
        with self._lock:
            if self._connection is not None and self._identity == self._identify():
                self._connection.close()
            self._connection = None

    def _identify(self) -> tuple[int, ...] | None:
        """Name this process and the file now under the path: neither may change unnoticed."""
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            return None
        return os.getpid(), status.st_dev, status.st_ino

    def _begin(self) -> sqlite3.Connection:
        try:
            return self._try_begin()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise self._unusable(error) from error
            self._remove(error)
        try:
            return self._try_begin()
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _remove(self, error: sqlite3.Error) -> None:
        """Give up a damaged index; the next use makes it anew."""
        logger.warning("cache index given up path=%s: %s", self._path, error)
        self._connection = None
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(self._path + suffix):
                os.remove(self._path + suffix)

    def before_fork(self) -> None:
        """Leave nothing open: SQLite's locks belong to the process, its memory of them does not."""
        self._lock.acquire()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def after_fork(self) -> None:
        self._lock.release()

    def _unusable(self, error: sqlite3.Error) -> OSError:
        return OSError(f"the index of the blob cache, {self._path}, cannot be used: {error}")

    def _try_begin(self) -> sqlite3.Connection:
        if self._connection is None or self._identity != self._identify():
            self._connection = self._open()
            self._identity = self._identify()
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            # Whatever it was, nobody else closes it.
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + BUSY_TIMEOUT
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                # SQLite does not wait here while another process makes the index.
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        # The index can be made anew; it need not survive a power failure.
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if version != VERSION:
            for statement in _statements(_SCHEMA):
                connection.execute(statement)
            rows = IndexRows(connection)
            for name, size, used in self._scan():
                rows.put(name, size, used)
            connection.execute(f"PRAGMA user_version = {VERSION}")
        connection.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


# Held from before a fork until after it: guards _held, and two threads may fork at a time.
_forking = threading.Lock()
_held: list[CacheIndex] = []


def _before_fork() -> None:
    _forking.acquire()
    _held[:] = list(_indexes)
    for index in _held:
        index.before_fork()


def _after_fork() -> None:
    for index in _held:
        index.after_fork()
    _held.clear()
    _forking.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
