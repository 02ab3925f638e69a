"""Eviction is exact, goes on where a file cannot be removed, and never takes the lock for long."""

import os
import random

import pytest

from zodb_s3blobs import cachechange

from .test_cache import assert_sound
from .test_cache import Clock
from .test_cache import fill
from .test_cache import held
from .test_cache import oid
from .test_cache import open_cache
from .test_cache import temporaries
from .test_cache import TID


__all__ = ["open_cache"]  # a fixture


@pytest.mark.parametrize("batch", [1, 2, 3, 64])
def test_order_is_that_of_the_last_uses_whatever_the_batch(open_cache, monkeypatch, batch):
    """Simulated with random uses and sizes against a list."""
    monkeypatch.setattr(cachechange, "BATCH", batch)
    chance, clock = random.Random(batch), Clock()
    cache = open_cache(100, clock=clock)
    model = []
    for _ in range(400):
        clock.time += 1
        number = chance.randrange(30)
        path = cache.path(oid(number), TID)
        known = [entry for entry in model if entry[0] == number]
        if known:
            model.remove(known[0])
            size = known[0][1]
        else:
            size = chance.randrange(1, 60)
            while sum(size for _number, size in model) + size > 100:
                model.pop(0)
            fill(cache, number, b"x" * size)
        model.append((number, size))
        os.utime(path, (clock.time, clock.time))
        assert held(cache) == sorted(number for number, _size in model)
    assert_sound(cache)


def test_files_that_are_all_in_use_are_evicted_in_their_order(open_cache, monkeypatch):
    """Each is looked at, put back, and then its turn comes: also in many batches."""
    monkeypatch.setattr(cachechange, "BATCH", 3)
    clock = Clock()
    cache = open_cache(200, clock=clock)
    for number in range(20):
        fill(cache, number)
    order = list(range(20))
    random.Random(1).shuffle(order)
    for place, number in enumerate(order):
        os.utime(cache.path(oid(number), TID), (2000 + place, 2000 + place))
    clock.time = 3000
    fill(cache, 30, b"x" * 50)
    assert held(cache) == sorted([*order[5:], 30])
    cache.close()
    assert held(open_cache(100, clock=clock)) == sorted([*order[15:], 30])


def test_file_that_cannot_be_removed_does_not_keep_others(open_cache):
    """As one in a directory that another user has made: it goes behind, the bound holds."""
    clock = Clock()
    cache = open_cache(50, clock=clock)
    for number in range(5):
        clock.time += 1
        os.utime(fill(cache, number), (clock.time, clock.time))
    refusing = os.path.dirname(cache.path(oid(0), TID))
    os.chmod(refusing, 0o500)
    try:
        for number in (10, 11):
            clock.time += 1
            os.utime(fill(cache, number), (clock.time, clock.time))
        assert held(cache) == [0, 3, 4, 10, 11]
        assert_sound(cache)
    finally:
        os.chmod(refusing, 0o700)


def test_files_that_cannot_be_removed_beside_files_in_use_do_not_keep_others(
    open_cache, monkeypatch
):
    """A whole batch of neither: the next one gets its turn, now and with the next file."""
    monkeypatch.setattr(cachechange, "BATCH", 4)
    clock = Clock()
    cache = open_cache(200, clock=clock)
    for number in range(20):
        clock.time += 1
        os.utime(fill(cache, number), (clock.time, clock.time))
    for number in (1, 2, 3):
        os.utime(cache.path(oid(number), TID), (clock.time, clock.time))
    refusing = [os.path.dirname(cache.path(oid(number), TID)) for number in (0, 4, 5, 6, 7, 8)]
    for directory in refusing:
        os.chmod(directory, 0o500)
    try:
        for number in (30, 31, 32):
            clock.time += 1
            fill(cache, number)
        assert held(cache) == [*range(9), *range(12, 20), 30, 31, 32]
        assert_sound(cache)
    finally:
        for directory in refusing:
            os.chmod(directory, 0o700)


def test_blob_is_served_where_no_file_can_be_removed(open_cache):
    """And the bound holds."""
    cache = open_cache(50)
    for number in range(5):
        fill(cache, number)
    directories = [os.path.dirname(cache.path(oid(number), TID)) for number in range(5)]
    for directory in directories:
        os.chmod(directory, 0o500)
    try:
        path = fill(cache, 10, b"from beside")
        with open(path, "rb") as file:
            assert file.read() == b"from beside"
        assert held(cache) == list(range(5))
    finally:
        for directory in directories:
            os.chmod(directory, 0o700)
    fill(cache, 11)
    assert 11 in held(cache)
    assert_sound(cache)


def test_large_file_is_removed_after_the_lock_is_given_back(open_cache, monkeypatch):
    """It is renamed under the lock; nothing of it remains, and who has it open reads on."""
    monkeypatch.setattr(cachechange, "LARGE", 50)
    cache = open_cache(100)
    with open(fill(cache, 1, b"x" * 60), "rb") as file:
        fill(cache, 2, b"y" * 70)
        assert held(cache) == [2]
        assert temporaries(cache) == []
        assert file.read() == b"x" * 60
    assert_sound(cache)


def test_large_file_goes_though_there_is_no_place_to_rename_it_to(open_cache, monkeypatch):
    """Then it is removed at once."""
    monkeypatch.setattr(cachechange, "LARGE", 50)
    cache = open_cache(100)
    fill(cache, 1, b"x" * 60)
    directory = os.path.join(cache.cache_dir, "process")
    os.chmod(os.path.dirname(cache.temporary_file()), 0o500)
    path = os.path.join(cache.temp_dir, "source")
    with open(path, "wb") as file:
        file.write(b"y" * 70)
    try:
        cache.put(oid(2), TID, path)
        assert held(cache) == [2]
        assert_sound(cache)
    finally:
        for name in os.listdir(directory):
            os.chmod(os.path.join(directory, name), 0o700)


def test_room_for_a_file_that_grows_is_what_it_grows_by(open_cache):
    """The row of the same name gives its own room."""
    cache = open_cache(100)
    fill(cache, 1, b"x" * 60)
    fill(cache, 2, b"x" * 30)
    cache.reserve([(oid(1), TID, 70)])
    assert held(cache) == [1, 2]
    cache.reserve([(oid(1), TID, 100)])
    assert cache.current_size() == 100


def test_room_is_found_soon_though_all_files_are_in_use(open_cache, monkeypatch):
    """Nobody waits until a million files were looked at: of those that were, the oldest goes."""
    monkeypatch.setattr(cachechange, "BATCH", 2)
    monkeypatch.setattr(cachechange, "LARGE_BATCH", 20)
    clock = Clock()
    cache = open_cache(1000, clock=clock)
    for number in range(100):
        clock.time += 1
        fill(cache, number)
    for number in range(100):
        os.utime(cache.path(oid(number), TID), (3000 - number, 3000 - number))
    monkeypatch.setattr(cachechange, "IN_VAIN", 2)
    pauses = []
    monkeypatch.setattr(cachechange.time, "sleep", pauses.append)
    fill(cache, 200)
    assert len(pauses) == 2
    assert len(held(cache)) == 100
    (gone,) = set(range(100)) - set(held(cache))
    assert gone == 2 + 20 + 20 - 1
    assert_sound(cache)
