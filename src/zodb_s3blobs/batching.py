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
        self._begin()

    def _begin(self) -> None:
        # A forked child begins anew: the requests are its parent's, and so is whoever has the lock.
        self._lock = threading.Lock()
        self._waiting: deque[T] = deque()
        self._pid = os.getpid()

    def hand_in(self, request: T) -> None:
        """Have a request worked on: by this thread, or by the one that is working now."""
        if self._pid != os.getpid():
            self._begin()
        self._waiting.append(request)
        # Again after the lock was given back: a request that came just before has found it taken.
        while self._waiting and self._lock.acquire(blocking=False):
            try:
                while self._waiting:
                    count = min(len(self._waiting), self._most)
                    self._work([self._waiting.popleft() for _ in range(count)])
            finally:
                self._lock.release()
