"""Lets objects begin anew in a forked child, before anything else runs there."""

import os
from typing import Protocol
import weakref


class Beginner(Protocol):
    """Has threads or locks, which are its parent's in a forked child."""

    def begin(self) -> None:
        """Forget all that belongs to another process."""


_all: "weakref.WeakSet[Beginner]" = weakref.WeakSet()


def begin_in_children(beginner: Beginner) -> None:
    """Call an object's `begin` in each forked child, for as long as the object lives."""
    _all.add(beginner)


def _begin_all() -> None:
    for beginner in list(_all):
        beginner.begin()


os.register_at_fork(after_in_child=_begin_all)
