"""Values of the HTTP headers that name a file and its type, made from what users have typed."""

import re
from urllib.parse import quote


DISPOSITIONS = ("inline", "attachment")
# What file systems take; a browser shortens what is longer, and a URL must carry it.
LONGEST_NAME = 255

# RFC 9110, 5.6.2 and 5.6.6
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_PARAMETER = rf"{_TOKEN}=(?:{_TOKEN}|\"[ !#-\[\]-~]*\")"
_MEDIA_TYPE = re.compile(rf"{_TOKEN}/{_TOKEN}(?: *; *{_PARAMETER})*")
# Besides letters and digits: RFC 5987's attr-char
_UNQUOTED = "!#$&+.^_`|~-"
_SEPARATORS = re.compile(r"[/\\]")
# Control characters, and those that turn the direction of a text, so that an ending looks another.
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def media_type(text: str) -> str:
    """Return a media type such as ``text/plain; charset=utf-8``, without spaces around it.

    :raises ValueError: when it is none.
    """
    text = text.strip(" ")
    if not _MEDIA_TYPE.fullmatch(text) or len(text) > 255:
        raise ValueError(f"a content type is such as text/plain or image/png, not {text!r}")
    return text


def content_disposition(disposition: str, filename: str | None = None) -> str:
    """Return a value of Content-Disposition.

    A name that is not ASCII is given twice, the second time as most browsers read it. What cannot
    be part of a file's name becomes "_" or is left out; what is longer than 255 bytes is shortened
    before its ending.

    :param str disposition: "inline" or "attachment".
    :raises ValueError: for another disposition.

    Source: RFC 6266, section 5 and appendix D; RFC 5987 for the second name.
    """
    if disposition not in DISPOSITIONS:
        raise ValueError(f"a disposition is inline or attachment, not {disposition!r}")
    name = _clean(filename or "")
    if not name:
        return disposition
    # A percent sign or a backslash in the first form is read in different ways.
    plain = re.sub(r"[^ !#-$&-\[\]-~]", "_", name)
    value = f'{disposition}; filename="{plain}"'
    if plain != name:
        value += f"; filename*=UTF-8''{quote(name, safe=_UNQUOTED, errors='replace')}"
    return value


def _clean(name: str) -> str:
    name = _INVISIBLE.sub("", _SEPARATORS.sub("_", name)).strip()
    # Half of a surrogate pair is no character.
    data = name.encode("utf-8", "replace")
    if len(data) <= LONGEST_NAME:
        return data.decode()
    stem, dot, ending = name.rpartition(".")
    tail = (dot + ending).encode("utf-8", "replace") if stem else b""
    if len(tail) > 20:
        tail = b""
    return data[: LONGEST_NAME - len(tail)].decode("utf-8", "ignore").rstrip() + tail.decode()
