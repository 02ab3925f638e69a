"""The pages below docs/: their literal blocks, and what those show."""

from pathlib import Path
import textwrap


DOCS = Path(__file__).parents[2] / "docs"


def blocks(path):
    """Return the literal blocks of a page, dedented, in their order."""
    found, block = [], None
    for line in Path(path).read_text().splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and (not line or indent > block[0]):
            block[1].append(line)
            continue
        block = None
        if line.endswith("::") and not line.lstrip().startswith(".."):
            block = (indent, [])
            found.append(block)
    return [textwrap.dedent("\n".join(lines)).strip() + "\n" for _, lines in found]


def example(name, containing):
    """Return the one literal block of a page that contains a text."""
    (found,) = [text for text in blocks(DOCS / name) if containing in text]
    return found
