"""When S3 is known to be down, requests fail at once for a while; then one of them tries."""

import pytest

from zodb_s3blobs.breaker import BAD_ENDS
from zodb_s3blobs.breaker import Breaker
from zodb_s3blobs.breaker import FIRST_PAUSE
from zodb_s3blobs.breaker import LONGEST_PAUSE
from zodb_s3blobs.breaker import NotTried
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import TransientS3Error

from .faults import FaultyServer
from .faults import SilentServer
from .services.location import S3Location
from .storages import Gate
from .storages import make_client
from .storages import start


class Clock:
    """A time that the test moves."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return Breaker(clock=clock)


def fail(breaker, was_silent=True):
    """One operation ends without an answer, or with errors of the server."""
    breaker.failed(breaker.answers, was_silent)


def passes(breaker):
    try:
        breaker.check()
    except NotTried:
        return False
    return True


def test_while_s3_answers_all_requests_pass(breaker):
    """No request is stopped before one has failed."""
    assert all(passes(breaker) for _ in range(10))
    breaker.answered()
    assert passes(breaker)
    assert not breaker.is_open()


def test_silence_stops_all_requests_for_a_while(breaker, clock):
    """One operation without an answer is enough, and tells when the next request goes out."""
    fail(breaker)
    clock.now += FIRST_PAUSE - 0.1
    assert breaker.is_open()
    with pytest.raises(NotTried, match=r"asked again in 0\.1 seconds"):
        breaker.check()


def test_one_request_tries_for_all_when_the_pause_ends(breaker, clock):
    """Not every thread waits for the same time-out again."""
    fail(breaker)
    clock.now += FIRST_PAUSE
    assert breaker.is_open()  # as far as anybody knows
    assert [passes(breaker) for _ in range(3)] == [True, False, False]


def test_answer_ends_the_pause(breaker, clock):
    """Service returns by itself, for all threads at once."""
    fail(breaker)
    clock.now += FIRST_PAUSE
    assert passes(breaker)
    breaker.answered()
    assert all(passes(breaker) for _ in range(3))
    fail(breaker)
    clock.now += FIRST_PAUSE
    assert passes(breaker)  # and the next outage begins with a short one


def test_pauses_get_longer_up_to_a_bound(breaker, clock):
    """A long outage costs few requests, and its end is noticed soon."""
    fail(breaker)
    pauses = []
    for _ in range(8):
        begun = clock.now
        while not passes(breaker):
            clock.now += 0.5
        pauses.append(clock.now - begun)
        fail(breaker)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, LONGEST_PAUSE]


def test_failures_of_requests_that_began_together_count_once(breaker, clock):
    """Eight threads that lose the same server do not make the pause eight times as long."""
    for _ in range(8):
        fail(breaker)
    clock.now += FIRST_PAUSE
    assert passes(breaker)


def test_failure_beside_an_answer_stops_nothing(breaker):
    """One object that a server cannot deliver must not stop all others."""
    before = breaker.answers
    breaker.answered()
    breaker.failed(before, was_silent=True)
    assert passes(breaker)


def test_errors_of_the_server_count_in_a_row(breaker):
    """One error of a server that lives is none of the whole; several without an answer are."""
    for _ in range(BAD_ENDS - 1):
        fail(breaker, was_silent=False)
    assert passes(breaker)
    breaker.answered()
    for _ in range(BAD_ENDS - 1):
        fail(breaker, was_silent=False)
    assert passes(breaker)
    fail(breaker, was_silent=False)
    assert not passes(breaker)


def test_without_a_pause_all_requests_are_tried(clock):
    """Who wants to try each time can."""
    breaker = Breaker(0, clock)
    fail(breaker)
    assert passes(breaker)
    assert not breaker.is_open()


# With a client


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def test_client_asks_a_dead_server_once(target):
    """After one time-out other requests do not wait for another one, and say so."""
    with SilentServer() as server:
        location = S3Location(server.endpoint_url, "access", "secret", "bucket")
        client = make_client(location, read_timeout=0.3, max_attempts=1)
        with pytest.raises(TransientS3Error, match="cannot be reached"):
            client.download_file("key", target)
        assert client.is_down
        connections = server.connections
        for call in (
            lambda: client.download_file("key", target),
            lambda: client.upload_file(__file__, "key"),
            lambda: client.head_object("key"),
            lambda: client.delete_objects(["key"]),
            lambda: list(client.list_objects("")),
            lambda: client.presigned_url("key"),
        ):
            with pytest.raises(TransientS3Error, match="not answer"):
                call()
        assert server.connections == connections


def test_attempts_end_when_another_thread_knows(target):
    """Who is in the middle of his attempts does not go on with them."""
    gate = Gate()

    def close_connection(request):
        if request.target.endswith("/slow"):
            gate()
        raise OSError("the server goes away")

    with FaultyServer() as server:
        server.instead = close_connection
        location = S3Location(server.endpoint_url, "access", "secret", "bucket")
        client = make_client(location, max_attempts=2)
        slow = start(client.download_file, "slow", target)
        gate.wait()
        with pytest.raises(TransientS3Error, match="cannot be reached"):
            client.download_file("quick", target)
        gate.open()
        with pytest.raises(TransientS3Error, match="not answer"):
            slow.result()
        assert [request.target for request in server.requests].count("/bucket/slow") == 1


def test_answers_of_a_live_server_stop_nothing(s3, target):
    """A missing object is an answer."""
    client = make_client(s3)
    for _ in range(BAD_ENDS + 1):
        with pytest.raises(MissingObjectError):
            client.download_file("blobs/1/1.blob", target)
    assert not client.is_down
