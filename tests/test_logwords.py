"""Every log line begins with fixed words, and README.rst explains those of all lines."""

import ast
from pathlib import Path
import re

import zodb_s3blobs


SOURCE = Path(zodb_s3blobs.__file__).parent
README = Path(__file__).parents[1] / "README.rst"

# Words; then key=value pairs, or what writes itself as such; then the cause
FORM = re.compile(r"[^%:=]+( \w+=(0x)?%\w| %s)*(: %s)?")
END_OF_WORDS = re.compile(r" \w+=| %|: ")


def formats():
    """Return a mapping from places in the source to the formats of the lines logged there."""
    return {
        f"{path.name}:{node.lineno}": getattr(node.args[0], "value", None)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
    }


def documented():
    """Return the words that README.rst explains: the first column of the table."""
    section = re.search(r"\nIn the log\n-+\n(.*?)\n-----", README.read_text(), re.DOTALL)
    return set(re.findall(r"^``([^`]+)``", section[1], re.MULTILINE))


def test_log_lines_begin_with_fixed_words():
    """They can be searched for; what varies comes after them."""
    others = {
        place: text for place, text in formats().items() if not FORM.fullmatch(str(text or "%"))
    }
    assert others == {}


def test_log_lines_are_documented_and_no_others():
    """Whoever finds one in a log finds it in README.rst."""
    assert {END_OF_WORDS.split(text)[0] for text in formats().values()} == documented()
