"""Uploads run side by side up to a bound, and each can be ended."""

from concurrent.futures import CancelledError
import os
import subprocess
import sys
import threading

import pytest

from zodb_s3blobs.uploads import UploadPool

from .faults import in_child


@pytest.fixture
def pool():
    pool = UploadPool(2)
    yield pool
    pool.close()


class Gate:
    """Work that says it has begun and waits until it may end."""

    def __init__(self):
        self.begun = threading.Event()
        self.may_end = threading.Event()

    def __call__(self, cancelled):
        self.begun.set()
        assert self.may_end.wait(20)


def test_work_runs_side_by_side_up_to_the_bound(pool):
    """Two of three pieces of work run at once; the third begins when one has ended."""
    first, second, third = gates = [Gate() for _ in range(3)]
    uploads = [pool.start(gate) for gate in gates]
    assert first.begun.wait(10) and second.begun.wait(10)
    assert not third.begun.is_set()
    second.may_end.set()
    assert third.begun.wait(10)
    first.may_end.set()
    third.may_end.set()
    assert [upload.future.result(10) for upload in uploads] == [None] * 3


def test_error_of_the_work_is_the_future_s(pool):
    """Whoever waits sees what failed."""

    def fail(cancelled):
        raise OSError("no bytes")

    with pytest.raises(OSError, match="no bytes"):
        pool.start(fail).future.result(10)


def test_cancelled_while_waiting_never_begins(pool):
    """The object of such an upload cannot exist, and the abort need not delete it."""
    gates = [Gate(), Gate()]
    running = [pool.start(gate) for gate in gates]
    waiting = pool.start(Gate())
    waiting.cancel()
    for gate in gates:
        gate.may_end.set()
    for upload in running:
        upload.future.result(10)
        assert upload.may_have_sent
    with pytest.raises(CancelledError):
        waiting.future.result(10)
    assert not waiting.may_have_sent


def test_cancelled_while_running_is_told_and_counts_as_sent(pool):
    """The work sees the cancellation; what it sent until then is not known."""
    begun, told = threading.Event(), threading.Event()

    def work(cancelled):
        cancelled.add_action(told.set)
        begun.set()
        assert told.wait(20)

    upload = pool.start(work)
    assert begun.wait(10)
    upload.cancel()
    assert upload.future.result(10) is None
    assert upload.may_have_sent


def test_closed_pool_finishes_its_work_and_starts_again(pool):
    """A storage that was closed and is used again uploads as before."""
    done = []
    uploads = [pool.start(lambda cancelled: done.append(1)) for _ in range(5)]
    pool.close()
    assert all(upload.future.done() for upload in uploads)
    pool.start(lambda cancelled: done.append(1)).future.result(10)
    assert len(done) == 6


def test_forked_child_has_threads_of_its_own(pool):
    """The threads of the parent do not exist in a child: it makes others."""
    pool.start(lambda cancelled: None).future.result(10)

    def child():
        seen = []
        pool.start(lambda cancelled: seen.append(os.getpid())).future.result(10)
        assert seen == [os.getpid()]
        pool.close()

    in_child(child)
    assert pool.start(lambda cancelled: None).future.result(10) is None


def test_child_forked_while_the_parent_uploads_can_upload(pool):
    """What runs in the parent's threads is nothing the child waits for."""
    gate = Gate()
    upload = pool.start(gate)
    assert gate.begun.wait(10)
    in_child(lambda: pool.start(lambda cancelled: None).future.result(10))
    gate.may_end.set()
    upload.future.result(10)


def test_work_runs_once_where_no_thread_can_be_started(pool, monkeypatch):
    """At the limit of threads it runs inline, and not again when a thread comes free."""
    runs = []

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pool.start(lambda cancelled: runs.append("first")).future.result(10)
    for _ in range(3):
        pool.start(lambda cancelled: runs.append("later")).future.result(10)
    pool.close()
    assert runs == ["first", "later", "later", "later"]


def test_work_at_interpreter_shutdown_runs_inline():
    """A commit in an atexit handler still uploads, and its error is still reported."""
    code = """
import atexit
from zodb_s3blobs.uploads import UploadPool
pool = UploadPool()
pool.start(lambda cancelled: None).future.result()

def late():
    pool.start(lambda cancelled: print("uploaded")).future.result()
    try:
        pool.start(lambda cancelled: 1 / 0).future.result()
    except ZeroDivisionError:
        print("failed")

atexit.register(late)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout.split() == ["uploaded", "failed"], child.stderr
