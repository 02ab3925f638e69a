"""Lets one thread do at once what several want done, while the others go on."""

from collections import deque
from collections.abc import Callable
import os
import threading
from typing import Any
from typing import Generic
from typing import TypeVar


T = TypeVar("T")


class Batcher(Generic[T]):
    """Takes requests; whoever hands one in while nobody works does the work of all that come.

    :param work: called with requests, each once, by one thread of a process at a time. It tells
        whom it concerns what comes of a request, and raises nothing.
    :param int most: how many requests it is called with.
    """

    def __init__(self, work: Callable[[list[T]], Any], most: int) -> None:
        self._work = work
        self._most = most
        # By process, setdefault decides: a forked child begins anew, for the requests are its
        # parent's, and so is whoever has the lock.
        self._states: dict[int, tuple[threading.Lock, deque[T]]] = {}

    def hand_in(self, request: T) -> None:
        """Have a request worked on: by this thread, or by the one that is working now."""
        lock, waiting = self._states.setdefault(os.getpid(), (threading.Lock(), deque()))
        waiting.append(request)
        # Again after the lock was given back: a request that came just before has found it taken.
        while waiting and lock.acquire(blocking=False):
            try:
                while waiting:
                    count = min(len(waiting), self._most)
                    self._work([waiting.popleft() for _ in range(count)])
            finally:
                lock.release()
