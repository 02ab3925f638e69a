"""Counts that a job hands back when it ends."""

from typing import TypeVar


Self = TypeVar("Self", bound="Report")


class Report:
    """Its attributes are the counts."""

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in vars(self).items())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self}>"

    def add(self: Self, other: Self) -> None:
        """Add the counts of another report to these."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)
