"""Files that show a part of something else: bytes from here to there, read when they are wanted."""

import io
from operator import index
import os
from typing import Any


# Bytes that a reader of small pieces gets ahead
BUFFER = 64 << 10
# Bytes that are read at a time where all are wanted
CHUNK = 1 << 20


def checked_range(start: int, stop: int | None) -> tuple[int, int | None]:
    """Return start and stop of a section.

    :raises ValueError: when one is negative.
    :raises TypeError: when one is no whole number.
    """
    start, stop = index(start), None if stop is None else index(stop)
    if start < 0 or (stop is not None and stop < 0):
        raise ValueError(f"positions count from 0, not {start} to {stop}")
    return start, stop


class Section(io.RawIOBase):
    """A file of the bytes from start to below stop; its own positions begin with 0.

    :param int start: from 0.
    :param int stop: not below start.
    """

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self._start = start
        self._size = stop - start
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")

    def tell(self) -> int:
        self._check_open()
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position of the section, which may be behind its end."""
        self._check_open()
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}
        if whence not in origins:
            raise ValueError(f"a position counts from 0, 1 or 2, not {whence!r}")
        if (position := origins[whence] + offset) < 0:
            raise ValueError(f"position {position} is before the beginning")
        self._at = position
        return position

    def readinto(self, buffer: Any) -> int:
        self._check_open()
        with memoryview(buffer).cast("B") as whole:
            view = whole[: max(0, self._size - self._at)]
            count = self._read_at(self._start + self._at, view) if view else 0
        self._at += count
        return count

    def readall(self) -> bytes:
        # RawIOBase's asks for 8 KiB at a time.
        chunks = []
        while chunk := self.read(CHUNK):
            chunks.append(chunk)
        return b"".join(chunks)

    def _read_at(self, position: int, view: memoryview) -> int:
        """Read from a position of the whole; 0 only where that has ended."""
        raise NotImplementedError

    def buffered(self) -> io.BufferedReader:
        """Return a reader of this section with a buffer; it closes this."""
        return io.BufferedReader(self, BUFFER)


class FileSection(Section):
    """A part of a local file, which is closed with it.

    :param file: an open file.
    :param int stop: None is its end; what is behind its end is left out.
    """

    def __init__(self, file: Any, start: int = 0, stop: int | None = None) -> None:
        size = os.fstat(file.fileno()).st_size
        start, stop, _step = slice(start, stop).indices(size)
        super().__init__(start, max(start, stop))
        self._file = file

    def _read_at(self, position: int, view: memoryview) -> int:
        return os.preadv(self._file.fileno(), [view], position)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
