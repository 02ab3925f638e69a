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
import random
import sqlite3
import threading
import time
from typing import TypeVar
import weakref


logger = logging.getLogger(__name__)

T = TypeVar("T")
# name, size in bytes, time of last use in seconds since the epoch
Row = tuple[str, int, float]

VERSION = 2
# Seconds until a process gives up waiting for the others.
BUSY_TIMEOUT = 10.0
# Seconds between looks at a lock that another process has. SQLite's own pauses grow to a tenth of
# a second, and whoever begins to wait later then comes first.
FIRST_PAUSE, LONGEST_PAUSE = 0.0002, 0.003

_SCHEMA = """
DROP TABLE IF EXISTS file;
DROP TABLE IF EXISTS directory;
DROP TABLE IF EXISTS state;
DROP TABLE IF EXISTS total;
CREATE TABLE file (name TEXT PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX file_used ON file (used, size);
CREATE TABLE directory (name TEXT PRIMARY KEY, modified INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE state (bytes INTEGER NOT NULL, complete INTEGER NOT NULL);
INSERT INTO state VALUES (0, 0);
"""


class IndexBusy(OSError):
    """Another process or thread has held the index for too long."""


class IndexRows:
    """The rows, for whoever holds the write lock.

    Attributes: ``total``, the sum of all sizes in bytes; ``is_complete``, whether all files that
    were there before the index are known. Until then the total is too small.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self._executemany = connection.executemany
        self._state = self._execute("SELECT bytes, complete FROM state").fetchone()
        self.total: int = self._state[0]
        self.is_complete = bool(self._state[1])

    def flush(self) -> None:
        """Write what the attributes say."""
        state = (self.total, int(self.is_complete))
        if state != self._state:
            self._execute("UPDATE state SET bytes = ?, complete = ?", state)
            self._state = state

    # Files

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, None when there is no such row."""
        row = self._execute("SELECT size FROM file WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def __contains__(self, name: str) -> bool:
        return self.size(name) is not None

    def put(self, name: str, size: int, used: float) -> None:
        self.total += size - (self.size(name) or 0)
        self._execute("INSERT OR REPLACE INTO file VALUES (?, ?, ?)", (name, size, used))

    def add(self, rows: list[Row]) -> None:
        """Put rows of which none is there yet."""
        self._executemany("INSERT INTO file VALUES (?, ?, ?)", rows)
        self.total += sum(size for _name, size, _used in rows)

    def remove(self, name: str) -> None:
        if (size := self.size(name)) is not None:
            self.remove_known([(name, size)])

    def remove_known(self, rows: Iterable[tuple[str, int]]) -> None:
        """Remove rows whose sizes are known."""
        rows = list(rows)
        self._executemany("DELETE FROM file WHERE name = ?", [(name,) for name, _size in rows])
        self.total -= sum(size for _name, size in rows)

    def rename(self, name: str, new_name: str) -> None:
        """Give a row another name, in the place of one that has that name already."""
        self.remove(new_name)
        self._execute("UPDATE file SET name = ? WHERE name = ?", (new_name, name))

    def mark(self, uses: list[tuple[str, float]]) -> None:
        """Set the time of last use of rows."""
        self._executemany("UPDATE file SET used = ? WHERE name = ?", [(u, n) for n, u in uses])

    def by_use(self) -> sqlite3.Cursor:
        """Iterate over all rows, that which was not used for longest first.

        The cursor must be closed before anything is changed.
        """
        return self._execute("SELECT name, size, used FROM file ORDER BY used")

    def between(self, low: str, high: str) -> dict[str, int]:
        """Return names from low to below high, and sizes in bytes."""
        rows = self._execute(
            "SELECT name, size FROM file WHERE name >= ? AND name < ?", (low, high)
        )
        return dict(rows.fetchall())

    def sum(self) -> int:
        """Return what the total should be, by adding all sizes."""
        (size,) = self._execute("SELECT SUM(size) FROM file").fetchone()
        return size or 0

    # Directories

    def directories(self) -> dict[str, int]:
        """Return when each directory was last changed, as far as is known, in nanoseconds."""
        return dict(self._execute("SELECT name, modified FROM directory").fetchall())

    def note(self, directories: dict[str, int | None]) -> None:
        """Remember when directories were last changed; None stands for one that is gone."""
        gone = [(name,) for name, modified in directories.items() if modified is None]
        there = [item for item in directories.items() if item[1] is not None]
        self._executemany("DELETE FROM directory WHERE name = ?", gone)
        self._executemany("INSERT OR REPLACE INTO directory VALUES (?, ?)", there)


_indexes: "weakref.WeakSet[CacheIndex]" = weakref.WeakSet()


class CacheIndex:
    """Opens the index, and makes it anew when it is missing or damaged; it is then incomplete.

    :param str path: the SQLite file, whose directory is made when missing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        # Guarded by _lock: _connection, _identity, what it is a connection to, and _opened, what
        # was under the path when it was opened last.
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, ...] | None = None
        self._opened: tuple[int, ...] | None = None
        _indexes.add(self)

    @contextmanager
    def writing(self) -> Iterator[IndexRows]:
        """Hold the write lock of the directory; what was changed is kept unless an error leaves.

        :raises IndexBusy: when others hold it for too long.
        :raises OSError: when the index cannot be opened, or has just been found damaged.
        """
        if not self._lock.acquire(timeout=BUSY_TIMEOUT):
            raise IndexBusy(f"threads wait too long for the index of the blob cache, {self._path}")
        try:
            connection = self._begin()
            try:
                rows = IndexRows(connection)
                yield rows
                rows.flush()
                connection.execute("COMMIT")
            except BaseException as error:
                # Whatever it was, the lock is given back.
                self._roll_back(connection)
                if isinstance(error, sqlite3.Error):
                    if not isinstance(error, sqlite3.OperationalError):
                        self._remove(error)
                    raise self._unusable(error) from error
                raise
        finally:
            self._lock.release()

    def verify(self) -> None:
        """Read all of the index, and give it up if it is damaged."""
        with self._lock:
            try:
                connection = self._connect()
                (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
            except sqlite3.OperationalError as error:
                raise self._unusable(error) from error
            except sqlite3.DatabaseError as error:
                self._remove(error)

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
        for is_last in (False, True):
            try:
                return _patiently(self._try_begin)
            except sqlite3.OperationalError as error:
                raise self._unusable(error) from error
            except sqlite3.DatabaseError as error:
                if is_last:
                    raise self._unusable(error) from error
                self._remove(error)
        raise AssertionError("unreachable")

    def _try_begin(self) -> sqlite3.Connection:
        connection = self._connect()
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            # The disk fails. With the connection goes its lock.
            connection.close()
            self._connection = None

    def _remove(self, error: sqlite3.Error) -> None:
        """Give up a damaged index; the next use makes it anew."""
        self._connection = None
        if self._opened is None or self._opened != self._identify():
            return  # another process was faster: what is there now is new
        logger.warning("cache index given up path=%s: %s", self._path, error)
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
        kind = IndexBusy if _is_locked(error) else OSError
        return kind(f"the index of the blob cache, {self._path}, cannot be used: {error}")

    def _connect(self) -> sqlite3.Connection:
        if self._connection is None or self._identity != self._identify():
            self._connection = self._open()
            self._identity = self._identify()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        self._opened = self._identify()
        connection = sqlite3.connect(
            self._path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            # The index can be made anew; it need not survive a power failure.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            # Whatever it was, nobody else closes it.
            connection.close()
            raise
        return connection


def _patiently(function: Callable[[], T]) -> T:
    """Call a function until the lock that it needs is free, for a bounded time."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    pause = FIRST_PAUSE
    while True:
        try:
            return function()
        except sqlite3.OperationalError as error:
            if not _is_locked(error) or time.monotonic() > deadline:
                raise
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 1.5, LONGEST_PAUSE)


def _is_locked(error: sqlite3.Error) -> bool:
    # Python 3.10 tells no code.
    return "locked" in str(error)


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
