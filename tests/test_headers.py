"""Whatever users have typed, a header has one line, and names a file that can be saved."""

from email.message import Message
import operator
import re
import unicodedata
from urllib.parse import unquote

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
import pytest

from zodb_s3blobs.headers import content_disposition
from zodb_s3blobs.headers import media_type


# The forms of RFC 6266, 4.1, that we use, with RFC 5987's attr-char in the second name
FORM = re.compile(
    r"(inline|attachment)"
    r'(?:; filename="([^"\\%]+)"(?:; filename\*=UTF-8\'\'((?:[\w!#$&+.^`|~-]|%[0-9A-F]{2})+))?)?',
    re.ASCII,
)
BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

TEXTS = st.text(st.characters())
LONG_TEXTS = st.builds(operator.mul, st.text(st.characters(), min_size=1), st.integers(80, 300))


def parse(value):
    """Return (disposition, name for old browsers, name for browsers); no name is None."""
    match = FORM.fullmatch(value)
    assert match, value
    disposition, plain, encoded = match.groups()
    return disposition, plain, plain if encoded is None else unquote(encoded, errors="strict")


def name_of(filename):
    """Return the name that a browser gives to a file."""
    return parse(content_disposition("attachment", filename))[2]


# Content-Disposition


@pytest.mark.parametrize("disposition", ["inline", "attachment"])
@pytest.mark.parametrize("filename", [None, "", " ", "\r\n", "\u202e", "\u200e \x00"])
def test_name_that_is_empty_is_left_out(disposition, filename):
    """Also one of which nothing remains: the browser finds a name itself."""
    assert content_disposition(disposition, filename) == disposition


@pytest.mark.parametrize("disposition", ["inline", "attachment"])
def test_name_in_ascii_is_given_once(disposition):
    """Every browser reads it."""
    value = content_disposition(disposition, "minutes (v1), final;=.pdf")
    assert value == f'{disposition}; filename="minutes (v1), final;=.pdf"'


def test_name_that_is_not_ascii_is_given_twice():
    """The form of RFC 6266, section 5: the second name is the one that counts."""
    value = content_disposition("attachment", "Größe 测试.pdf")
    assert value == (
        'attachment; filename="Gr__e __.pdf"; '
        "filename*=UTF-8''Gr%C3%B6%C3%9Fe%20%E6%B5%8B%E8%AF%95.pdf"
    )
    assert parse(value) == ("attachment", "Gr__e __.pdf", "Größe 测试.pdf")


def test_each_name_is_read_by_a_parser_that_is_not_ours():
    """That of Python's email package, of which HTTP has taken the parameters."""
    value = content_disposition("attachment", "Größe 测试.pdf")
    message = Message()
    message["Content-Disposition"] = value
    assert message.get_content_disposition() == "attachment"
    assert message.get_filename() == "Gr__e __.pdf"
    message.replace_header("Content-Disposition", value.replace('filename="Gr__e __.pdf"; ', ""))
    assert message.get_filename() == "Größe 测试.pdf"


@pytest.mark.parametrize(
    "filename",
    [
        "a.txt",
        "Größe 测试.pdf",
        'say "a".txt',
        "100%.txt",
        "%0d%0a.txt",
        "it's.txt",
        "a'b''c é.txt",
        "=?utf-8?q?a?=.txt",
        "filename*=UTF-8''x é",
        "e\u0301.txt",
        "👩‍💻.txt",
        ".profile",
        "no ending",
        "é" * 127 + "x",
    ],
)
def test_name_that_can_be_saved_is_kept(filename):
    """Quotes, percent signs, what looks like an encoding, and 255 bytes."""
    assert name_of(filename) == filename


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("C:\\boot.ini", "C:_boot.ini"),
        ("a\r\nSet-Cookie: b=c", "aSet-Cookie: b=c"),
        ('a"\r\n\r\n<script>', 'a"<script>'),
        ("a\x00\t\x1b\x7f\x85b.txt", "ab.txt"),
        ("a\u2028\u2029b.txt", "ab.txt"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        (f"a{BIDI}b.txt", "ab.txt"),
        ("  a.txt\n ", "a.txt"),
        ("\u200e a.txt", "a.txt"),
        ("\ud83d.txt", "?.txt"),
        ("ö\udcff.txt", "ö?.txt"),
    ],
)
def test_what_cannot_be_part_of_a_name_is_replaced_or_left_out(filename, expected):
    """Directories, line breaks, turned directions of text, and halves of surrogate pairs."""
    assert name_of(filename) == expected


def test_quote_and_backslash_and_percent_are_not_in_the_first_form():
    """Browsers differ in how they read them."""
    value = content_disposition("inline", 'a"b%41.txt')
    assert value == "inline; filename=\"a_b_41.txt\"; filename*=UTF-8''a%22b%2541.txt"


@pytest.mark.parametrize(
    ("filename", "expected"),
    [
        ("x" * 300 + ".pdf", "x" * 251 + ".pdf"),
        ("é" * 200 + ".pdf", "é" * 125 + ".pdf"),
        ("测" * 100 + ".tar.gz", "测" * 84 + ".gz"),
        ("x" * 250 + "   " + "x" * 9 + ".pdf", "x" * 250 + ".pdf"),
        ("x" * 300, "x" * 255),
        ("." + "x" * 300, "." + "x" * 254),
        ("x." + "y" * 300, "x." + "y" * 253),
        ("é" * 300, "é" * 127),
        ("\ud800" * 300, "?" * 255),
    ],
)
def test_name_that_is_too_long_is_shortened_before_its_ending(filename, expected):
    """To 255 bytes, as file systems take, and never within a character."""
    assert name_of(filename) == expected
    assert len(expected.encode()) <= 255


@pytest.mark.parametrize(
    "disposition", ["", "form-data", "Inline", "inline ", "inline; x=y", "attachment\r\n", None]
)
def test_other_disposition_is_refused(disposition):
    """Such a value comes from a mistake in code, not from a user."""
    with pytest.raises(ValueError, match="inline or attachment"):
        content_disposition(disposition, "a.txt")


@given(TEXTS | LONG_TEXTS)
@example("\r\nX-Injected: yes")
@example("\ud800/\\\u202e\x00")
@example("\"; filename*=UTF-8''%2e%2e%2f")
def test_any_text_gives_one_line_and_a_name_that_can_be_saved(text):
    """Printable ASCII that parses; a name in valid UTF-8 that stays what it is."""
    value = content_disposition("attachment", text)
    assert value.isascii()
    assert value.isprintable()
    _disposition, plain, name = parse(value)
    if name is None:
        return
    assert len(plain) == len(name)
    assert len(name.encode()) <= 255
    assert not set(name) & set(f"/\\{BIDI}")
    assert not {unicodedata.category(character) for character in name} & {"Cc", "Zl", "Zp"}
    assert content_disposition("attachment", name) == value


# Content-Type


@pytest.mark.parametrize(
    "text",
    [
        "text/plain",
        "image/svg+xml",
        "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
        "text/plain; charset=utf-8",
        "text/plain;charset=utf-8",
        'text/plain; charset="utf-8"; format=flowed',
        'text/plain; note="a; b, <c>"',
        "x/" + "y" * 253,
    ],
)
def test_media_type_is_returned(text):
    """With its parameters, quoted or not."""
    assert media_type(text) == text


def test_spaces_around_a_media_type_are_left_out():
    """Forms and files have them."""
    assert media_type("  text/plain ") == "text/plain"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "text",
        "text/",
        "/plain",
        "text/plain/x",
        "text /plain",
        "text/plain, text/html",
        "text/plain;",
        "text/plain; charset",
        "text/plain; charset=",
        "text/plain; charset = utf-8",
        'text/plain; note="open',
        'text/plain; note="a"b"',
        "text/plain\n",
        "text/plain\r\nSet-Cookie: a=b",
        'text/plain; note="a\r\nb"',
        'text/plain; note="\x00"',
        "text/pl\u00e4in",
        'text/plain; note="\u00e4"',
        "text/plain\u00a0",
        "text/plain\ud800",
        "x/" + "y" * 254,
    ],
)
def test_what_is_no_media_type_is_refused(text):
    """Above all what would end the line of the header."""
    with pytest.raises(ValueError, match="a content type is such as"):
        media_type(text)


@given(TEXTS)
@example("text/plain\r\nX-Injected: yes")
def test_any_text_is_a_media_type_of_one_line_or_refused(text):
    """Nothing else comes out, and no other error."""
    for candidate in (text, f"text/plain; {text}", f'text/plain; note="{text}"'):
        try:
            value = media_type(candidate)
        except ValueError:
            continue
        assert value.isascii()
        assert value.isprintable()
