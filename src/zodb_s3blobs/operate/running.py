"""Runs many small jobs in threads, until they are done or must stop, and tells how far they are."""

from collections import deque
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
import hashlib
import json
import os
from queue import Empty
from queue import SimpleQueue
import signal
import sys
import threading
import time
from typing import Any
from typing import TypeVar


T = TypeVar("T")
R = TypeVar("R")

#: what a program that ran this one can tell from its exit status
OK, FINDINGS, USAGE, STOPPED = 0, 1, 2, 3

# Jobs for each worker that are begun before the oldest has ended
AHEAD = 4


class Work:
    """Runs jobs until all are done, the time is over, or somebody presses Ctrl-C.

    :param int workers: threads.
    :param float time_limit: seconds; None is no limit.
    :param bool shows: whether the progress is shown, on the standard error.
    """

    def __init__(self, workers: int, time_limit: float | None, shows: bool) -> None:
        self.workers = workers
        self._deadline = None if time_limit is None else time.monotonic() + time_limit
        #: whether somebody looks
        self.shows = shows
        self._interrupted = threading.Event()

    @property
    def is_stopped(self) -> bool:
        """Whether what is not begun yet is left to the next run."""
        is_late = self._deadline is not None and time.monotonic() >= self._deadline
        return is_late or self._interrupted.is_set()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C, or a scheduler's SIGTERM, stop the work when what runs has ended.

        A second Ctrl-C ends it at once.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # of a test: only the main thread hears of signals
            return

        def stop(number: int, frame: Any) -> None:
            if self._interrupted.is_set():
                raise KeyboardInterrupt
            self._interrupted.set()
            print("stopping; once more ends it at once", file=sys.stderr)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def each(self, items: Iterable[T], job: Callable[[T], R]) -> Iterator[tuple[T, "Future[R]"]]:
        """Yield items and their futures, which are done, in the order of the items.

        Once `is_stopped` no further item is begun.
        """
        running: deque[tuple[T, Future[R]]] = deque()
        iterator = iter(items)
        pool = ThreadPoolExecutor(self.workers, "zodb-s3blobs-work")
        try:
            while True:
                while len(running) < self.workers * AHEAD and not self.is_stopped:
                    try:
                        item = next(iterator)
                    except StopIteration:
                        break
                    running.append((item, pool.submit(job, item)))
                if not running:
                    return
                item, future = running.popleft()
                wait([future])
                yield item, future
        finally:
            # Nothing runs any more, but after a second Ctrl-C.
            pool.shutdown(wait=False, cancel_futures=True)

    def each_as_done(
        self, items: Iterable[T], job: Callable[[T], R]
    ) -> Iterator[tuple[T, "Future[R]"]]:
        """Yield items and their futures as they get done: none waits for one that takes long.

        Once `is_stopped` no further item is begun.
        """
        done: SimpleQueue[tuple[T, Future[R]]] = SimpleQueue()

        def tell(item: T, future: "Future[R]") -> None:
            done.put((item, future))

        iterator = iter(items)
        running = 0
        pool = ThreadPoolExecutor(self.workers, "zodb-s3blobs-work")
        try:
            while True:
                while running < self.workers * AHEAD and not self.is_stopped:
                    try:
                        item = next(iterator)
                    except StopIteration:
                        break
                    running += 1
                    pool.submit(job, item).add_done_callback(partial(tell, item))
                if not running:
                    return
                try:
                    # Not for ever: a signal must be heard.
                    ended = done.get(timeout=0.2)
                except Empty:
                    continue
                running -= 1
                yield ended
        finally:
            # Who has seen enough does not wait for what has not begun.
            pool.shutdown(cancel_futures=True)

    @contextmanager
    def progress(self, what: str, total: int | None = None, unit: str = " blobs") -> Iterator[Any]:
        """Give a progress bar with rate and time left; its ``update(n)`` moves it."""
        # Slow to import, and not needed by schedulers.
        from tqdm import tqdm

        is_bytes = unit == "B"
        with tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=is_bytes,
            unit_divisor=1024,
            disable=not self.shows,
            file=sys.stderr,
            mininterval=0.5,
        ) as bar:
            yield bar


class State:
    """Where a command was stopped, for the next run; nothing when it has come to its end.

    :param name: what tells this work from other work: a command, its database and options.
    """

    def __init__(self, *name: Any) -> None:
        home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
        digest = hashlib.sha256(json.dumps(name, default=str).encode()).hexdigest()[:32]
        self.path = os.path.join(home, "zodb-s3blobs", f"{digest}.json")

    def load(self) -> Any:
        """Return what was saved, None where nothing was, or nobody can read it."""
        try:
            with open(self.path, encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError):
            return None

    def save(self, value: Any) -> None:
        """Keep a value, which JSON can say."""
        os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
        temporary = f"{self.path}-{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file)
        os.replace(temporary, self.path)

    def clear(self) -> None:
        """Forget it."""
        try:
            os.remove(self.path)
        except FileNotFoundError:
            pass
