"""One thread works for all that have handed something in, and nobody waits."""

import threading

from zodb_s3blobs.batching import Batcher

from .faults import in_child
from .storages import Gate
from .storages import start


class Work:
    """Keeps the batches; the first waits at a gate."""

    def __init__(self):
        self.gate = Gate()
        self.batches = []
        self.threads = set()

    def __call__(self, requests):
        self.batches.append(requests)
        self.threads.add(threading.current_thread())
        if len(self.batches) == 1:
            self.gate()


def test_request_of_one_thread_is_worked_on_at_once():
    """Without others there is no delay, and each is worked on once."""
    batches = []
    batcher = Batcher(batches.append, 10)
    for number in range(3):
        batcher.hand_in(number)
    assert batches == [[0], [1], [2]]


def test_requests_that_come_meanwhile_are_one_batch():
    """Who hands them in goes on; the thread that works takes them all, as many as are allowed."""
    work = Work()
    batcher = Batcher(work, 4)
    working = start(batcher.hand_in, 0)
    work.gate.wait()
    for number in range(1, 7):
        batcher.hand_in(number)  # returns, though nothing is done yet
    assert work.batches == [[0]]
    work.gate.open()
    working.result()
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert len(work.threads) == 1


def test_no_request_of_many_threads_is_lost_or_done_twice():
    """Whatever the moment at which one gives the lock back."""
    done = []
    batcher = Batcher(done.extend, 3)
    numbers = [range(first, 2000, 8) for first in range(8)]
    threads = [start(lambda some: [batcher.hand_in(n) for n in some], some) for some in numbers]
    for thread in threads:
        thread.result()
    assert sorted(done) == list(range(2000))


def test_forked_child_does_not_wait_for_a_thread_of_its_parent():
    """The lock that a thread has at the fork is never given back in the child."""
    work = Work()
    batcher = Batcher(work, 10)
    working = start(batcher.hand_in, 0)
    work.gate.wait()
    batcher.hand_in(1)  # the parent's

    def child():
        before = len(work.batches)
        batcher.hand_in(2)
        assert work.batches[before:] == [[2]]

    in_child(child)
    work.gate.open()
    working.result()
    assert work.batches == [[0], [1]]
