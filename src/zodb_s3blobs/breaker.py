"""Remembers that S3 does not answer, so that not every thread has to find out by itself."""

from collections.abc import Callable
import logging
import time


logger = logging.getLogger(__name__)

# Seconds
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
# How many operations in a row may end with an error of the server, and none with an answer.
BAD_ENDS = 5


class NotTried(Exception):
    """A request was not sent: S3 is known to be down."""


class Breaker:
    """Lets requests fail at once for a while after S3 did not answer.

    Then one request tries for all: an answer ends the pause; until it comes the next one, twice as
    long, has begun.
    Threads share this, and nothing is locked: at worst two requests try where one would do.

    :param float longest_pause: seconds; 0 lets all requests be tried.
    :param clock: returns a time in seconds that only grows.
    """

    def __init__(
        self, longest_pause: float = LONGEST_PAUSE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._longest_pause = longest_pause
        self._clock = clock
        # 0 while S3 answers
        self._pause = 0.0
        self._until = 0.0
        self._bad_ends = 0
        #: how often S3 has answered
        self.answers = 0

    def is_open(self) -> bool:
        """Tell whether S3 is known not to answer, be it in a pause or after one."""
        return bool(self._pause)

    def check(self) -> None:
        """Let a request pass, or not.

        :raises NotTried: while S3 is known to be down.
        """
        if not self._pause:
            return
        now = self._clock()
        if now < self._until:
            raise NotTried(
                f"S3 did not answer; it is asked again in {self._until - now:.1f} seconds"
            )
        # The others wait for what this request finds out, and longer than the last time.
        self._pause_until_later(now)

    def answered(self) -> None:
        """Take note of an answer that is no error of the server."""
        self.answers += 1
        self._bad_ends = 0
        if self._pause:
            self._pause = 0.0
            logger.info("S3 answers again")

    def failed(self, answers_before: int, was_silent: bool) -> None:
        """Take note of an operation that failed in the end, with all its attempts.

        An object that a server cannot deliver, or one request that is lost, must not stop all
        others: so nothing happens when others had an answer meanwhile, and errors of the server
        count when there are several.

        :param int answers_before: `answers` when the operation began.
        :param bool was_silent: no answer came at all.
        """
        if self.answers != answers_before or self._pause:
            return
        self._bad_ends += 1
        if self._longest_pause and (was_silent or self._bad_ends >= BAD_ENDS):
            self._pause_until_later(self._clock())
            logger.warning("S3 does not answer, requests fail at once")

    def _pause_until_later(self, now: float) -> None:
        self._pause = min(self._pause * 2 or FIRST_PAUSE, self._longest_pause)
        self._until = now + self._pause
