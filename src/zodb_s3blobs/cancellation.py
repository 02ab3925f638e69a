"""A way for one thread to end the upload that another has begun."""

from collections.abc import Callable
import threading


class Cancellation:
    """Lets another thread end an upload early."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Guarded by _lock: both fields.
        self._cancelled = False
        self._actions: list[Callable[[], object]] = []

    def __bool__(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            actions, self._actions = self._actions, []
        for action in actions:
            action()

    def add_action(self, action: Callable[[], object]) -> None:
        """Call action when cancelled; at once when that has happened already."""
        with self._lock:
            if not self._cancelled:
                self._actions.append(action)
                return
        action()


class UploadCancelled(BaseException):
    """Not an Exception: botocore would retry the request."""
