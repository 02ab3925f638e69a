"""Counts what came of many small jobs, and keeps what went wrong with some of them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from typing import NamedTuple

from ..interfaces import IntegrityError
from ..interfaces import TransientS3Error


# Failures after which it makes no sense to go on, and problems that are named
TOO_MANY, NAMED = 100, 100


class Outcome(NamedTuple):
    """What came of one blob."""

    #: what it is counted as; nothing where that is decided later
    word: str
    bytes: int = 0
    #: nothing where all is well
    problem: str = ""


class Tally:
    """What came of all so far.

    :param words: what is counted even where there is none.
    """

    def __init__(self, *words: str) -> None:
        self.counts = Counter(dict.fromkeys(words, 0))
        #: the first of them, by key
        self.problems: dict[str, str] = {}

    def note(self, key: str, problem: str) -> None:
        """Keep a problem."""
        if len(self.problems) < NAMED:
            self.problems[key] = problem

    def of(self, jobs: Any) -> Iterator[Any]:
        """Count what came of jobs, and yield their items, which have keys.

        :param jobs: a generator of items and futures of an `Outcome`.
        :raises PermanentS3Error: from a job, at once.
        """
        with closing(jobs):
            for item, future in jobs:
                try:
                    outcome = future.result()
                except (TransientS3Error, IntegrityError, OSError) as error:
                    # What is wrong with one blob does not keep the others from being brought.
                    if self.counts["failed"] == TOO_MANY:
                        raise
                    outcome = Outcome("failed", 0, str(error))
                if outcome.word:
                    self.counts[outcome.word] += 1
                if outcome.bytes:
                    self.counts[f"{outcome.word}_bytes"] += outcome.bytes
                if outcome.problem:
                    self.note(item.key, outcome.problem)
                yield item

    def report(self) -> dict[str, Any]:
        """Return counts and problems."""
        problems = [f"{key}: {problem}" for key, problem in self.problems.items()]
        return {**self.counts, "problems": problems}


def lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield a report as people read it."""
    for name, value in report.items():
        if name != "problems":
            yield f"{name.replace('_', ' ')}: {value}"
    yield from (f"problem: {problem}" for problem in report["problems"])
