"""The examples of README.rst, as files that run."""

from pathlib import Path
import textwrap


README = Path(__file__).parents[2] / "README.rst"


def example(containing):
    """Return the one literal block of README.rst that contains a text."""
    blocks, block = [], None
    for line in README.read_text().splitlines():
        indent = len(line) - len(line.lstrip())
        if block is not None and (not line or indent > block[0]):
            block[1].append(line)
            continue
        block = None
        if line.endswith("::"):
            block = (indent, [])
            blocks.append(block)
    texts = [textwrap.dedent("\n".join(lines)).strip() + "\n" for _, lines in blocks]
    (found,) = [text for text in texts if containing in text]
    return found
