"""A section is a file of its own, whatever is before and behind it in the whole."""

from contextlib import ExitStack
import io
import os

from hypothesis import given
from hypothesis import strategies as st
import pytest

from zodb_s3blobs.sections import FileSection
from zodb_s3blobs.sections import Section


DATA = b"0123456789"


@pytest.fixture
def whole(tmp_path):
    """Return a function that opens a file of some bytes."""
    with ExitStack() as stack:

        def open_file(data=DATA):
            path = tmp_path / "whole"
            path.write_bytes(data)
            return stack.enter_context(open(path, "rb", buffering=0))

        yield open_file


def section_of(data, start, stop):
    """Return a section of a file that has no name."""
    file = io.FileIO(os.memfd_create("whole"), "w+")
    file.write(data)
    return FileSection(file, start, stop)


# What is in it


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, None), (3, None), (0, 4), (3, 7), (9, 10), (3, 100), (10, None), (50, 60), (5, 5), (7, 3)],
)
def test_bytes_are_those_from_start_to_below_stop(whole, start, stop):
    """As a slice has it: what is beyond the file's end is left out."""
    for file in (FileSection(whole(), start, stop), FileSection(whole(), start, stop).buffered()):
        with file:
            assert file.seek(0, io.SEEK_END) == len(DATA[start:stop])
            assert file.read() == b""
            assert file.seek(0) == 0
            assert file.read() == DATA[start:stop]
            assert file.read() == file.read(1) == b""


def test_bounds_are_the_whole_file_by_default(whole):
    """A section of an empty file is empty."""
    assert FileSection(whole()).read() == DATA
    assert FileSection(whole(b"")).read() == b""
    assert FileSection(whole(b""), 3, 5).read() == b""


def test_file_that_grows_does_not_make_the_section_longer(whole, tmp_path):
    """Its size is that at the opening, so that it agrees with what was told of it."""
    section = FileSection(whole())
    with open(tmp_path / "whole", "ab") as file:
        file.write(b"more")
    assert section.read() == DATA
    assert section.seek(0, io.SEEK_END) == len(DATA)


def test_section_says_what_it_can(whole):
    """It is read and moved in, and never written."""
    for file in (FileSection(whole(), 1, 5), FileSection(whole(), 1, 5).buffered()):
        with file:
            assert file.readable() and file.seekable() and not file.writable()
            with pytest.raises((io.UnsupportedOperation, NotImplementedError)):
                file.write(b"x")


def test_section_without_a_way_to_read_says_so():
    """Those that inherit it give the bytes."""
    with pytest.raises(NotImplementedError):
        Section(0, 1).read(1)


# Reading


def test_reads_follow_each_other(whole):
    """Each goes on where the last one ended, and the last is short."""
    section = FileSection(whole(), 2, 9)
    assert [section.read(3) for _ in range(4)] == [b"234", b"567", b"8", b""]
    assert section.tell() == 7


def test_sections_of_one_file_do_not_move_each_other(whole):
    """Positions are their own, and the file's position is nobody's."""
    file = whole()
    first, second = FileSection(file, 0, 5), FileSection(file, 5)
    assert first.read(2) == b"01"
    assert second.read(2) == b"56"
    file.seek(9)
    assert (first.read(), second.read()) == (b"234", b"789")


@pytest.mark.parametrize("size", [0, 1, 4, 5])
def test_bytes_are_read_into_a_buffer(whole, size):
    """No more than it has room for; the rest of it stays as it was."""
    section = FileSection(whole(), 2, 6)
    buffer = bytearray(b"-" * size)
    count = section.readinto(buffer)
    assert count == min(size, 4) == section.tell()
    assert bytes(buffer) == (b"2345" + b"-")[:size]


def test_buffer_of_larger_items_is_filled_byte_by_byte(whole):
    """As other files fill it."""
    numbers = memoryview(bytearray(8)).cast("H")
    assert FileSection(whole(), 1).readinto(numbers) == 8
    assert bytes(numbers) == b"12345678"


def test_buffer_is_the_callers_again_when_it_is_filled(whole):
    """Nothing keeps it from being resized."""
    buffer = bytearray(4)
    FileSection(whole()).readinto(buffer)
    buffer.extend(b"more")
    assert buffer == b"0123more"


def test_buffered_reader_gives_lines_and_small_pieces(whole):
    """The first line begins with the section, and the last one ends with it."""
    data = b"one\ntwo\nthree\nfour\n"
    with FileSection(whole(data), 1, 16).buffered() as reader:
        assert list(reader) == [b"ne\n", b"two\n", b"three\n", b"fo"]
        assert reader.seek(3) == 3
        assert reader.readline() == b"two\n"
        assert reader.read(2) == b"th"
        assert reader.peek(1)[:1] == b"r"
        assert reader.tell() == 9


def test_buffered_reader_reads_more_than_its_buffer(whole):
    """Large sections come whole, in one read and in many."""
    data = os.urandom(300_000)
    with FileSection(whole(data), 10_000, 290_000).buffered() as reader:
        assert reader.read() == data[10_000:290_000]
        reader.seek(0)
        pieces = iter(lambda: reader.read(999), b"")
        assert b"".join(pieces) == data[10_000:290_000]


# Moving


def test_positions_count_from_the_sections_beginning(whole):
    """In all three ways; seek and tell agree."""
    section = FileSection(whole(), 2, 8)
    for arguments, position, byte in (
        ((3,), 3, b"5"),
        ((1, io.SEEK_SET), 1, b"3"),
        ((2, io.SEEK_CUR), 4, b"6"),
        ((-3, io.SEEK_CUR), 2, b"4"),
        ((-1, io.SEEK_END), 5, b"7"),
        ((-6, io.SEEK_END), 0, b"2"),
    ):
        assert section.seek(*arguments) == section.tell() == position
        assert section.read(1) == byte


@pytest.mark.parametrize("arguments", [(6,), (7,), (1 << 40,), (0, 2), (5, 2), (100, 1)])
def test_nothing_is_read_behind_the_end(whole, arguments):
    """To move there is allowed, and shows none of what follows in the whole."""
    section = FileSection(whole(), 2, 8)
    assert section.seek(*arguments) == section.tell() >= 6
    assert section.read(1) == section.read() == b""
    assert section.readinto(bytearray(3)) == 0
    section.seek(5)
    assert section.read() == b"7"


@pytest.mark.parametrize("arguments", [(-1,), (-5, 1), (-7, 2)])
def test_position_before_the_beginning_is_refused(whole, arguments):
    """What is before the section in the whole is out of reach, and the position stays."""
    section = FileSection(whole(), 2, 8)
    section.seek(4)
    with pytest.raises(ValueError, match="before the beginning"):
        section.seek(*arguments)
    assert section.tell() == 4
    assert section.read() == b"67"


# Closing


def test_closing_closes_the_file(whole):
    """Once; closing again does nothing."""
    file = whole()
    with FileSection(file, 2, 8) as section:
        assert not section.closed and not file.closed
    assert section.closed and file.closed
    section.close()
    other = whole()
    FileSection(other).buffered().close()
    assert other.closed


@pytest.mark.parametrize(
    "use",
    [
        lambda file: file.read(),
        lambda file: file.read(1),
        lambda file: file.read(0),
        lambda file: file.readline(),
        lambda file: file.readinto(bytearray(1)),
        lambda file: file.readinto(bytearray()),
        lambda file: file.__enter__(),
    ],
)
@pytest.mark.parametrize("buffered", [False, True])
def test_closed_section_is_a_value_error(whole, use, buffered):
    """As with every file of Python."""
    file = FileSection(whole(), 2, 8)
    if buffered:
        file = file.buffered()
    file.close()
    with pytest.raises(ValueError):
        use(file)


def test_closed_section_has_no_position(whole):
    """Neither to ask for nor to move to, in the section and in its reader."""
    section, reader = FileSection(whole()), FileSection(whole()).buffered()
    section.close()
    reader.close()
    for call in (section.tell, lambda: section.seek(0), reader.tell, lambda: reader.seek(0)):
        with pytest.raises(ValueError):
            call()


def test_section_that_nobody_keeps_closes_the_file(whole):
    """A reader that is forgotten holds nothing open."""
    file = whole()
    section = FileSection(file)
    del section
    assert file.closed


# Any use

POSITIONS = st.integers(-30, 30)
SEEKS = st.tuples(st.just("seek"), POSITIONS, st.sampled_from([0, 1, 2]))
READS = st.tuples(st.just("read"), st.integers(-1, 30))
READS_INTO = st.tuples(st.just("readinto"), st.integers(0, 30))
LINES = st.tuples(st.just("readline"), st.integers(-1, 5))


def outcome(file, name, *arguments):
    """Return what a method returns, and what it has read into a buffer."""
    if name == "readinto":
        buffer = bytearray(arguments[0])
        return file.readinto(buffer), bytes(buffer)
    return getattr(file, name)(*arguments)


def is_before_the_beginning(model, offset, whence):
    """A BytesIO goes to its beginning instead, other than files on a disk."""
    origin = [0, model.tell(), len(model.getvalue())][whence]
    return origin + offset < 0


@given(
    st.binary(max_size=25),
    st.integers(0, 30),
    st.none() | st.integers(0, 30),
    st.booleans(),
    st.lists(st.one_of(SEEKS, READS, READS_INTO, LINES), max_size=12),
)
def test_any_use_agrees_with_a_file_of_these_bytes_alone(data, start, stop, buffered, uses):
    """Whatever is read, and wherever somebody moves."""
    model = io.BytesIO(data[start:stop])
    section = section_of(data, start, stop)
    with section.buffered() if buffered else section as file:
        for use in uses:
            if use[0] == "seek" and is_before_the_beginning(model, *use[1:]):
                with pytest.raises((ValueError, OSError)):
                    file.seek(*use[1:])
            else:
                assert outcome(file, *use) == outcome(model, *use)
            assert file.tell() == model.tell()


class Slow(FileSection):
    """Counts how often it is asked for bytes."""

    asked = 0

    def _read_at(self, position, view):
        self.asked += 1
        return super()._read_at(position, view)


def test_all_is_read_in_large_pieces(tmp_path):
    """From a server each piece costs time."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    with open(path, "rb") as whole, Slow(whole, 0, 3 << 20).buffered() as file:
        assert len(file.read()) == 3 << 20
        assert file.raw.asked <= 5
