"""A cancellation reaches the upload whenever it comes."""

import threading

from zodb_s3blobs.cancellation import Cancellation
from zodb_s3blobs.cancellation import UploadCancelled


def test_action_added_before_the_cancellation_runs_with_it_and_once():
    """What was registered is called when the other thread cancels, not again after that."""
    calls = []
    cancelled = Cancellation()
    cancelled.add_action(lambda: calls.append("first"))
    cancelled.add_action(lambda: calls.append("second"))
    assert not cancelled and calls == []
    cancelled.cancel()
    cancelled.cancel()
    assert cancelled and calls == ["first", "second"]


def test_action_added_after_the_cancellation_runs_at_once():
    """An upload that begins too late ends as well."""
    calls = []
    cancelled = Cancellation()
    cancelled.cancel()
    cancelled.add_action(lambda: calls.append("late"))
    assert calls == ["late"]


def test_action_may_look_at_the_cancellation_and_add_another():
    """No lock is held while actions run."""
    calls = []
    cancelled = Cancellation()
    cancelled.add_action(lambda: cancelled.add_action(lambda: calls.append(bool(cancelled))))
    thread = threading.Thread(target=cancelled.cancel, daemon=True)
    thread.start()
    thread.join(10)
    assert calls == [True]


def test_cancelled_upload_is_not_an_ordinary_exception():
    """botocore retries on any Exception; this one passes it."""
    assert not issubclass(UploadCancelled, Exception)
