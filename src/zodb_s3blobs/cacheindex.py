"""Which files a cache directory holds, how large they are and when each was last known to be used.

One SQLite file serves all threads and processes of a host. Files appear and
vanish only while the lock of the directory is held, so that the rows never lack
a file that exists. That lock is the directory's own (flock), and not SQLite's:
an index can be lost or damaged, and then two processes would each have one. A
crash can leave a row without a file; it costs room until eviction comes by.
"""

from collections.abc import Callable
from collections.abc import Generator
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from contextlib import closing
from contextlib import contextmanager
import logging
import os
import sqlite3
import threading
import time
from typing import Any
from typing import TypeVar
import weakref

from .directorylock import BUSY_TIMEOUT
from .directorylock import DirectoryBusy
from .directorylock import DirectoryLock
from .interfaces import FILES_AT_ONCE


logger = logging.getLogger(__name__)

T = TypeVar("T")
# name, size in bytes, time of last use in seconds since the epoch
Row = tuple[str, int, float]

VERSION = 2
# Seconds between looks at SQLite's own locks, and for how long: only who looks in by hand has them.
SQLITE_PAUSE, SQLITE_TIMEOUT = 0.003, 2.0
# Bytes that the journal keeps on disk when it is not needed
JOURNAL_LIMIT = 4 << 20
# What SQLite says of the machine; whatever else it says is said of a damaged index.
_MACHINE = ("locked", "full", "I/O error", "unable to open", "readonly", "memory")

_SCHEMA = """
DROP TABLE IF EXISTS file;
DROP TABLE IF EXISTS directory;
DROP TABLE IF EXISTS state;
DROP TABLE IF EXISTS total;
CREATE TABLE file (
    name TEXT PRIMARY KEY, size INTEGER NOT NULL, used REAL NOT NULL, placed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX file_used ON file (used, size);
CREATE TABLE directory (name TEXT PRIMARY KEY, modified INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE state (bytes INTEGER NOT NULL, complete INTEGER NOT NULL);
INSERT INTO state VALUES (0, 0);
"""


class IndexDamaged(OSError):
    """The index was damaged and is gone; the next use makes it anew."""


class IndexRows:
    """The rows, for whoever holds the write lock.

    Attributes: ``total``, the sum of all sizes in bytes; ``is_complete``, whether all files that
    were there before the index are known. Until then the total is too small.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        self._executemany = connection.executemany
        self._state = self._execute("SELECT bytes, complete FROM state").fetchone()
        if self._state is None or [type(value) for value in self._state] != [int, int]:
            raise sqlite3.DatabaseError(f"the state of the index is {self._state}")
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
        return None if row is None else _checked(row[0], int)

    def sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Return the sizes of those of some files that have a row, in bytes.

        :param names: not more than ``FILES_AT_ONCE``, as for all methods that take some at a time.
        """
        rows = self._execute(
            f"SELECT name, size FROM file WHERE name IN {_marks(names)}", names
        ).fetchall()
        return {_checked(name, str): _checked(size, int) for name, size in rows}

    def __contains__(self, name: str) -> bool:
        return self.size(name) is not None

    def put(self, name: str, size: int, used: float, is_placed: bool = False) -> None:
        """Put a row, in the place of one that has that name already.

        :param bool is_placed: whether the file is there.
        """
        self.total += size - (self.size(name) or 0)
        row = (name, size, used, int(is_placed))
        self._execute("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?)", row)

    def put_all(self, files: Sequence[tuple[str, int]], used: float) -> None:
        """Put rows, given by names and sizes, of files that are to come; each name stands once."""
        known = self.sizes([name for name, _size in files])
        values = [value for name, size in files for value in (name, size, used, 0)]
        rows = ", ".join(["(?, ?, ?, ?)"] * len(files))
        self._execute(f"INSERT OR REPLACE INTO file VALUES {rows}", values)
        self.total += sum(size for _name, size in files) - sum(known.values())

    def mark_placed(self, *names: str) -> None:
        """Remember that files are there."""
        self._execute(f"UPDATE file SET placed = 1 WHERE name IN {_marks(names)}", names)

    def add(self, rows: list[Row]) -> None:
        """Put rows of files that are there, of which none has a row yet."""
        self._executemany("INSERT INTO file VALUES (?, ?, ?, 1)", rows)
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

    def by_use(self) -> Generator[Row, None, None]:
        """Iterate over all rows, that which was not used for longest first.

        The iterator must be closed before anything is changed.
        """
        with closing(self._execute("SELECT name, size, used FROM file ORDER BY used")) as rows:
            for name, size, used in rows:
                yield _checked(name, str), _checked(size, int), _checked(used, float)

    def first_use(self) -> float | None:
        """Return the time of the oldest known use, None where there are no files."""
        with closing(self.by_use()) as rows:
            return next((used for _name, _size, used in rows), None)

    def between(self, low: str, high: str) -> dict[str, int]:
        """Return names from low to below high, and sizes in bytes."""
        return dict(row[:2] for row in self._between(low, high))

    def reserved(self, low: str, high: str) -> dict[str, float]:
        """Return those of them whose files are not there yet, and when they were reserved."""
        return {name: used for name, _, used, placed in self._between(low, high) if not placed}

    def _between(self, low: str, high: str) -> list[tuple[str, int, float, int]]:
        rows = self._execute(
            "SELECT name, size, used, placed FROM file WHERE name >= ? AND name < ?", (low, high)
        )
        return [
            (_checked(name, str), _checked(size, int), _checked(used, float), _checked(placed, int))
            for name, size, used, placed in rows.fetchall()
        ]

    def sum(self) -> int:
        """Return what the total should be, by adding all sizes."""
        # Of the table: the index by use has the sizes, too, and may be what is damaged.
        (size,) = self._execute("SELECT SUM(size) FROM file WHERE name > ''").fetchone()
        return _checked(size or 0, int)

    # Directories

    def directories(self) -> dict[str, int]:
        """Return when each directory was last changed, as far as is known, in nanoseconds."""
        rows = self._execute("SELECT name, modified FROM directory").fetchall()
        return {_checked(name, str): _checked(modified, int) for name, modified in rows}

    def modified(self, directory: str) -> int | None:
        """Return when a directory was last changed, as far as is known, in nanoseconds."""
        where = "WHERE name = ?"
        row = self._execute(f"SELECT modified FROM directory {where}", (directory,)).fetchone()
        return None if row is None else _checked(row[0], int)

    def modified_of(self, directories: Sequence[str]) -> dict[str, int]:
        """Return when some of them were last changed, as far as is known, in nanoseconds."""
        where = f"WHERE name IN {_marks(directories)}"
        rows = self._execute(f"SELECT name, modified FROM directory {where}", directories)
        return {_checked(name, str): _checked(when, int) for name, when in rows.fetchall()}

    def note(self, directories: dict[str, int | None]) -> None:
        """Remember when directories were last changed; None stands for one that is gone."""
        gone = [(name,) for name, modified in directories.items() if modified is None]
        there = [item for item in directories.items() if item[1] is not None]
        if gone:
            self._executemany("DELETE FROM directory WHERE name = ?", gone)
        for some in (
            there[begin : begin + FILES_AT_ONCE] for begin in range(0, len(there), FILES_AT_ONCE)
        ):
            rows = ", ".join(["(?, ?)"] * len(some))
            values = [value for item in some for value in item]
            self._execute(f"INSERT OR REPLACE INTO directory VALUES {rows}", values)


def _marks(values: Sequence[str]) -> str:
    return f"({', '.join('?' * len(values))})"


def _checked(value: Any, kind: type[T]) -> T:
    """Return a value as it was written; SQLite keeps anything in any column."""
    if type(value) is not kind:
        raise sqlite3.DatabaseError(f"the index has {value!r} in the place of a {kind.__name__}")
    return value


_indexes: "weakref.WeakSet[CacheIndex]" = weakref.WeakSet()


class CacheIndex:
    """Opens the index, and makes it anew when it is missing or damaged; it is then incomplete.

    :param str path: the SQLite file, whose directory is made when missing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = DirectoryLock(os.path.dirname(path))
        # Guarded by _lock: _connection and _identity, what was under the path when it was opened.
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, ...] | None = None
        _indexes.add(self)

    @contextmanager
    def writing(self, patience: float = BUSY_TIMEOUT) -> Iterator[IndexRows]:
        """Hold the lock of the directory; what was changed is kept unless an error leaves.

        :param float patience: seconds.
        :raises DirectoryBusy: when others hold it for too long.
        :raises OSError: when the index cannot be opened, or has just been found damaged.
        """
        with self._lock.held(patience):
            connection = self._begin()
            try:
                rows = IndexRows(connection)
                yield rows
                rows.flush()
                connection.execute("COMMIT")
            except BaseException as error:
                # Whatever it was, nothing of it is kept.
                self._roll_back(connection)
                if isinstance(error, sqlite3.Error):
                    raise self._unusable(error) from error
                raise

    def verify(self) -> None:
        """Read all of the index, and give it up if it is damaged."""
        with self._lock.held():
            try:
                connection = self._begin()
                try:
                    # Not quick_check, which does not look whether table and index agree.
                    verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
                finally:
                    self._roll_back(connection)
                if verdict != "ok":
                    raise sqlite3.DatabaseError(verdict)
            except sqlite3.Error as error:
                failure = self._unusable(error)
                if _is_the_machine(error):
                    raise failure from error

    def close(self) -> None:
        with self._lock.threads:
            self._close()

    def _close(self) -> None:
        # At once, and not when nobody refers to it any more: SQLite's locks are on files, and with
        # one connection of this process all others to the same file would lose them.
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def before_fork(self) -> None:
        """Leave nothing open: SQLite's locks belong to the process, its memory of them does not."""
        self._lock.threads.acquire()
        self._close()

    def after_fork(self) -> None:
        self._lock.threads.release()

    # The connection, while the lock is held

    def _begin(self) -> sqlite3.Connection:
        for is_last in (False, True):
            try:
                return _patiently(self._try_begin)
            except sqlite3.Error as error:
                failure = self._unusable(error)
                if is_last or _is_the_machine(error):
                    raise failure from error
        raise AssertionError("unreachable")

    def _try_begin(self) -> sqlite3.Connection:
        if self._connection is not None:
            self._roll_back(self._connection)  # of whoever was interrupted
        if self._connection is None or self._identity != self._identify():
            self._close()
            self._connection = self._open()
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def _identify(self) -> tuple[int, ...] | None:
        """Name the file now under the path: it may be removed by hand."""
        try:
            status = os.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_dev, status.st_ino

    def _open(self) -> sqlite3.Connection:
        if not os.path.exists(self._path):
            self._remove_files()  # what belonged to one that was removed by hand
        connection = sqlite3.connect(
            self._path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            self._identity = self._identify()
            # Not WAL: with its files, which belong to a path and not to the index, an index that is
            # removed by hand would share them with the next.
            connection.execute("PRAGMA journal_mode = PERSIST")
            # The index can be made anew; it need not survive a power failure.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA journal_size_limit = {JOURNAL_LIMIT}")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version != VERSION:
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
            # Fails on a read-only disk, on which the connection would stay read-only for ever.
            connection.execute("UPDATE state SET bytes = bytes")
            connection.execute("COMMIT")
        except BaseException:
            # Whatever it was, nobody else closes it.
            connection.close()
            raise
        return connection

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            self._close()  # the disk fails

    def _unusable(self, error: sqlite3.Error) -> OSError:
        """Return the error for the caller; a damaged index goes, and the next use makes one."""
        # One that was opened while the disk was read-only stays so.
        self._close()
        kind: type[OSError] = DirectoryBusy if "locked" in str(error) else OSError
        if not _is_the_machine(error):
            kind = IndexDamaged
            if self._identity == self._identify():
                logger.warning("cache index given up path=%s: %s", self._path, error)
                self._remove_files()
        return kind(f"the index of the blob cache, {self._path}, cannot be used: {error}")

    def _remove_files(self) -> None:
        for suffix in ("", "-journal"):
            if os.path.exists(self._path + suffix):
                os.remove(self._path + suffix)


def _is_the_machine(error: sqlite3.Error) -> bool:
    # Python 3.10 tells no codes.
    return isinstance(error, sqlite3.OperationalError) and any(
        what in str(error) for what in _MACHINE
    )


def _patiently(function: Callable[[], T]) -> T:
    """Call a function until SQLite lets it, for a bounded time: not all of it waits by itself."""
    deadline = time.monotonic() + SQLITE_TIMEOUT
    while True:
        try:
            return function()
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(SQLITE_PAUSE)


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
