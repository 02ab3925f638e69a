"""The bounded pool of uploads of this process."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor
import os
import threading
from typing import Any

from .cancellation import Cancellation


Work = Callable[[Cancellation], Any]


class Upload:
    """One piece of work, somewhere between waiting in the pool and done.

    Attributes: ``future``, with the work's result.
    """

    def __init__(self, future: "Future[Any]", cancelled: Cancellation) -> None:
        self.future = future
        self._cancelled = cancelled

    def cancel(self) -> None:
        """Take the work from the queue, or make it end early."""
        self.future.cancel()
        self._cancelled.cancel()

    @property
    def may_have_sent(self) -> bool:
        """Tell whether an object may exist by now: false only for work that never began."""
        return not self.future.cancelled()


class UploadPool:
    """Threads shared by all transactions of a storage; a forked child gets its own.

    :param int concurrency: how many uploads run at the same time.
    :param str name: of its threads.
    """

    def __init__(self, concurrency: int = 32, name: str = "zodb-s3blobs") -> None:
        self.concurrency = concurrency
        self._name = name
        self._lock = threading.Lock()
        # Guarded by _lock: (pid, executor) of this process.
        self._made: tuple[int, ThreadPoolExecutor] | None = None

    def start(self, work: Work) -> Upload:
        """Run work(cancelled) in the pool."""
        cancelled = Cancellation()
        return Upload(self._submit(work, cancelled), cancelled)

    def _submit(self, work: Work, cancelled: Cancellation) -> "Future[Any]":
        # A submit that can start no thread raises with the work in the queue all the same.
        mine = threading.Lock()

        def once(cancelled: Cancellation) -> Any:
            return work(cancelled) if mine.acquire(blocking=False) else None

        try:
            return self._executor().submit(once, cancelled)
        except RuntimeError:
            # The interpreter is shutting down and takes no new work: do it here.
            future: Future[Any] = Future()
            try:
                future.set_result(once(cancelled))
            except BaseException as error:
                future.set_exception(error)
            return future

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._made is None or self._made[0] != os.getpid():
                executor = ThreadPoolExecutor(self.concurrency, self._name)
                self._made = (os.getpid(), executor)
            return self._made[1]

    def close(self) -> None:
        """Wait for what is running and end the threads; a later start makes new ones."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None and made[0] == os.getpid():
            made[1].shutdown()
