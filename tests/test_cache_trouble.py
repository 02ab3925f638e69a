"""Blobs are served whatever happens to the cache's disk, directory and index; caching resumes."""

from collections import Counter
from contextlib import contextmanager
from contextlib import ExitStack
import errno
import gc
import io
import os
from pathlib import Path
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import z64

from zodb_s3blobs import cache as cache_module
from zodb_s3blobs import cachechange
from zodb_s3blobs import directorylock
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.cacheindex import CacheIndex
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.sources import BlobDirSource
from zodb_s3blobs.storage import S3BlobStorage

from .disks import fill_inodes
from .disks import fill_up
from .disks import make_read_only
from .disks import make_writable
from .disks import MEGABYTE
from .disks import on_disks
from .faults import in_child
from .services.location import keys
from .storages import BLOB_RECORD
from .storages import Failure
from .storages import HookedClient
from .storages import make_client
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import start
from .storages import store_blob
from .storages import write_file


SIZE = 300_000
TID = (0x3E0F00D).to_bytes(8, "big")


def oid(number):
    """Return an oid."""
    return number.to_bytes(8, "big")


class Bucket:
    """Stands for S3: fills a cache with blobs, and counts how often each was asked for."""

    def __init__(self, cache, size=SIZE):
        self.cache = cache
        self.size = size
        self.fetched = Counter()

    def read(self, number):
        """Read a blob as the storage does, check its bytes and return its path."""
        expected = random_bytes(number, self.size)

        def fetch(path):
            self.fetched[number] += 1
            with open(path, "wb", buffering=0) as file:
                rest = memoryview(expected)
                while rest:
                    rest = rest[file.write(rest) :]

        path = self.cache.get(oid(number), TID) or self.cache.fill(oid(number), TID, fetch)
        with open(path, "rb") as file:
            assert file.read() == expected
        return path

    def is_cached(self, number):
        """Tell whether a blob is in the cache itself."""
        return os.path.exists(self.cache.path(oid(number), TID))

    def read_twice(self, number):
        """The second read asks for nothing."""
        self.read(number)
        before = self.fetched[number]
        path = self.read(number)
        assert self.fetched[number] == before
        return path

    def check_caching(self, *numbers):
        """What is read twice is fetched no more than once, and in the cache then."""
        for number in numbers:
            assert self.read_twice(number) == self.cache.path(oid(number), TID)


class Site:
    """A storage on a directory, with blobs in its bucket and none in its cache.

    Its database is in the directory, its cache may be on a disk below.
    """

    def __init__(self, location, directory, count=24):
        self.location = location
        self.directory = directory
        self.tids = {}
        self.open("seed")
        self.commit(*range(1, count + 1))
        self.close()

    def open(self, cache="disk/cache", cache_size=1 << 30, **options):
        self.cache = S3BlobCache(f"{self.directory}/{cache}", cache_size)
        self.client = HookedClient(make_client(self.location))
        base = FileStorage(f"{self.directory}/Data.fs")
        self.storage = S3BlobStorage(base, self.client, self.cache, **options)

    def close(self):
        self.storage.close()

    def commit(self, *numbers):
        """Commit new blobs in one transaction."""
        meta = TransactionMetaData()
        self.storage.tpc_begin(meta)
        for number in numbers:
            store_blob(self.storage, meta, oid(number), random_bytes(number, SIZE))
        self.storage.tpc_vote(meta)
        self.tids |= dict.fromkeys(numbers, self.storage.tpc_finish(meta))

    def read(self, number):
        """Read a blob, check its bytes and return its path."""
        with self.storage.openCommittedBlobFile(oid(number), self.tids[number]) as file:
            assert file.read() == random_bytes(number, SIZE)
            return file.name

    def is_cached(self, number):
        """Tell whether a blob is in the cache itself."""
        return os.path.exists(self.cache.path(oid(number), self.tids[number]))

    @property
    def downloads(self):
        return self.client.count("download_file")

    def read_twice(self, number):
        """The second read asks for nothing."""
        self.read(number)
        before = self.downloads
        path = self.read(number)
        assert self.downloads == before
        return path

    def check_caching(self, *numbers):
        """What is read twice is downloaded no more than once, and in the cache then."""
        for number in numbers:
            assert self.read_twice(number) == self.cache.path(oid(number), self.tids[number])

    def check_bucket(self):
        """Each record refers to an object that is there, and nothing else is."""
        records = {
            blob_key(record.oid, record.tid)
            for each in self.storage.iterator()
            for record in each
            if record.data == BLOB_RECORD
        }
        assert records == set(keys(self.location)) == set(self._keys())

    def _keys(self):
        return [blob_key(oid(number), tid) for number, tid in self.tids.items()]


@pytest.fixture
def site(s3, tmp_path):
    """A `Site` that is not open."""
    return Site(s3, tmp_path)


@pytest.fixture
def disk(tmp_path):
    """Where `on_disks` puts a disk, on which the cache is."""
    return str(tmp_path / "disk")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """The system's place for temporary files, of this test alone."""
    (tmp_path / "system").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    return str(tmp_path / "system")


def files_below(*directories):
    """Return the paths of all files but locks."""
    return [
        os.path.join(top, name)
        for directory in directories
        for top, _dirs, names in os.walk(directory)
        for name in names
        if not name.endswith(".lock")
    ]


def temporaries(cache):
    """Return the temporary files of a cache, those of its processes and those of ZODB."""
    below = [f"{cache.cache_dir}/{name}" for name in ("process", "tmp")]
    return files_below(*below)


def check_sound(cache):
    """Index and files agree, or do after a repair."""
    cache.check(fix=True)
    assert cache.check() == []


# A full disk


class TestFullDisk:
    def test_cache_gives_up_files_of_its_own_and_goes_on(self, site, disk, system):
        """Its budget is larger than the disk: an operator's mistake that nobody notices."""

        def child():
            site.open()
            for _ in range(3):
                for number in site.tids:
                    site.read_twice(number)
                assert 0 < sum(map(site.is_cached, site.tids)) < len(site.tids)
            assert files_below(system) == []
            check_sound(site.cache)
            site.close()
            assert temporaries(site.cache) == []

        on_disks(child, disk)

    @pytest.mark.parametrize("size", [1, 20_000])
    def test_many_small_files_fill_it_as_well(self, disk, system, size):
        """Then it is the index, or a directory, that finds no room."""

        def child():
            bucket = Bucket(S3BlobCache(f"{disk}/cache", 1 << 30), size)
            for number in range(1500):
                bucket.read_twice(number)
            assert 0 < sum(map(bucket.is_cached, range(1500))) < 1500
            assert files_below(system) == []
            check_sound(bucket.cache)

        on_disks(child, disk, size=16 * MEGABYTE if size > 1 else 5 * MEGABYTE)

    def test_threads_and_processes_that_share_it_read_the_right_bytes(self, disk, system):
        """Each gives up what another has just fetched."""

        def work(seed):
            bucket = Bucket(S3BlobCache(f"{disk}/cache", 1 << 30))

            def read(seed):
                chance = random.Random(seed)
                for _ in range(30):
                    number = chance.randrange(40)
                    for _attempt in range(10):
                        try:
                            bucket.read(number)
                            break
                        except FileNotFoundError:
                            continue  # evicted before it was opened: whoever opens asks again
                    else:
                        raise AssertionError("the file never stays")

            for thread in [start(read, 10 * seed + number) for number in range(3)]:
                thread.result()
            bucket.cache.close()

        def child():
            for thread in [start(in_child, lambda seed=seed: work(seed), 50) for seed in range(2)]:
                thread.result()
            bucket = Bucket(S3BlobCache(f"{disk}/cache", 1 << 30))
            bucket.check_caching(1, 2, 3)
            check_sound(bucket.cache)

        on_disks(child, disk)

    def test_blobs_are_served_from_elsewhere_when_nothing_can_be_given_up(self, site, disk, system):
        """Somebody else's file fills the disk; caching resumes when it is gone."""

        def child():
            site.open()
            fill_up(f"{disk}/foreign")
            for number in range(1, 6):
                assert site.read(number).startswith(system)
                site.read_twice(number)
            os.remove(f"{disk}/foreign")
            site.check_caching(*range(6, 12))
            check_sound(site.cache)
            site.close()
            assert files_below(system) == []
            assert temporaries(site.cache) == []

        on_disks(child, disk)

    def test_file_that_fills_the_disk_takes_the_cached_ones_place(self, site, disk, system):
        """What the cache gives up may be gone at once; nobody reads other bytes for that."""

        def child():
            site.open()
            for number in range(1, 6):
                site.read(number)
            fill_up(f"{disk}/foreign")
            for number in range(1, 13):
                site.read(number)
            os.remove(f"{disk}/foreign")
            site.check_caching(*range(13, 20))
            check_sound(site.cache)

        on_disks(child, disk)

    def test_giving_up_in_vain_costs_little(self, disk, system, monkeypatch):
        """What the cache gives up, another takes at once: a read holds the lock a few times."""
        changes = []

        def clock():
            changes.append(1)
            return 1000.0

        def child():
            bucket = Bucket(S3BlobCache(f"{disk}/cache", 1 << 30, clock), 5000)
            for number in range(100):
                bucket.read(number)
            fill_up(f"{disk}/foreign")
            remove = os.remove

            def remove_and_fill_up(path, **kw):
                remove(path, **kw)
                if str(path).endswith(".blob"):
                    fill_up(f"{disk}/foreign-{os.urandom(8).hex()}")

            monkeypatch.setattr(os, "remove", remove_and_fill_up)
            for number in range(100, 104):
                del changes[:]
                bucket.read(number)
                assert len(changes) < 30
            monkeypatch.undo()
            for path in Path(disk).glob("foreign*"):
                path.unlink()
            bucket.check_caching(*range(200, 205))
            check_sound(bucket.cache)

        on_disks(child, disk, size=16 * MEGABYTE)

    def test_both_places_full_is_an_error_that_tells_why(self, site, disk, system):
        """Nothing is left behind, and it works again where there is room."""

        def child():
            site.open()
            site.read(1)
            fill_up(f"{disk}/foreign")
            fill_up(f"{system}/foreign")
            for number in (2, 3, 2):
                with pytest.raises(OSError) as caught:
                    site.storage.loadBlob(oid(number), site.tids[number])
                assert caught.value.errno == errno.ENOSPC
                assert system in str(caught.value)
            # What it had was given up for the attempt.
            assert temporaries(site.cache) == []
            assert files_below(system) == [f"{system}/foreign"]
            os.remove(f"{system}/foreign")
            assert site.read(2).startswith(system)
            os.remove(f"{disk}/foreign")
            site.check_caching(3, 4, 5)
            check_sound(site.cache)
            site.close()
            assert files_below(system) == []
            assert temporaries(site.cache) == []

        on_disks(child, disk, system)

    @pytest.mark.parametrize("happened", ["nothing", "opened", "cached"])
    def test_site_starts_on_it_and_caches_when_there_is_room(self, site, disk, system, happened):
        """Whatever was there before; what is cached is served from there."""

        def child():
            if happened != "nothing":
                site.open()
                for number in (1, 2) if happened == "cached" else ():
                    site.read(number)
                site.close()
            fill_up(f"{disk}/foreign")
            site.open()
            if happened == "cached":
                site.read(1)
                assert site.downloads == 0
            for number in range(1, 6):
                site.read(number)
            os.remove(f"{disk}/foreign")
            site.check_caching(*range(6, 12))
            check_sound(site.cache)
            site.close()
            assert files_below(system) == []
            assert temporaries(site.cache) == []

        on_disks(child, disk)

    @pytest.mark.parametrize("happened", ["nothing", "opened", "cached"])
    def test_site_starts_where_not_even_a_directory_can_be_made(self, site, disk, system, happened):
        """The disk has bytes and no inodes: temporary files are elsewhere until there are some."""

        def child():
            os.mkdir(f"{disk}/cache")
            if happened != "nothing":
                site.open()
                for number in (1, 2) if happened == "cached" else ():
                    site.read(number)
                site.close()
            fill_inodes(f"{disk}/foreign")
            site.open()
            if happened == "cached":
                site.read(1)
                assert site.downloads == 0
            for number in range(3, 6):
                path = site.read(number)
                # Where there are files and directories to give up, others take their place.
                assert path.startswith(system) or happened == "cached"
            shutil.rmtree(f"{disk}/foreign")
            site.check_caching(*range(6, 12))
            check_sound(site.cache)
            site.close()
            assert temporaries(site.cache) == []

        on_disks(child, disk, inodes=100)


class TestCommitOnFullDisk:
    def test_blob_that_cannot_be_written_fails_where_it_is_written(self, site, disk, system):
        """The application hears of it; an abort leaves nothing, and a retry works."""

        def child():
            site.open()
            db = DB(site.storage)
            manager = transaction.TransactionManager()
            conn = db.open(manager)
            blob = conn.root()["blob"] = Blob()
            conn.add(blob)
            fill_up(f"{disk}/foreign")
            with pytest.raises(OSError, match="No space"), blob.open("w") as file:
                file.write(random_bytes(0, SIZE))
            manager.abort()
            del blob
            assert "blob" not in conn.root()
            os.remove(f"{disk}/foreign")
            blob = conn.root()["blob"] = Blob()
            conn.add(blob)
            with blob.open("w") as file:
                file.write(random_bytes(0, SIZE))
            manager.commit()
            assert read(blob) == random_bytes(0, SIZE)
            conn.close()
            db.close()
            assert temporaries(site.cache) == []

        on_disks(child, disk)

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    def test_file_that_cannot_be_staged_fails_and_stays_its_owner_s(
        self, site, disk, system, addressing
    ):
        """Half of a copy is removed; the transaction aborts, and its retry works."""

        def child():
            site.open(addressing=addressing)
            fill_up(f"{disk}/foreign")
            before = set(keys(site.location))
            for _ in range(2):
                path = write_file(random_bytes(99, SIZE), system)
                meta = TransactionMetaData()
                site.storage.tpc_begin(meta)
                with pytest.raises(OSError) as caught:
                    site.storage.storeBlob(oid(99), z64, BLOB_RECORD, path, "", meta)
                site.storage.tpc_abort(meta)
                assert caught.value.errno == errno.ENOSPC
                assert os.path.getsize(path) == SIZE
                assert temporaries(site.cache) == []
                os.remove(path)
            with pytest.raises(POSKeyError):
                site.storage.load(oid(99))
            assert set(keys(site.location)) == before
            os.remove(f"{disk}/foreign")
            site.commit(99)
            site.check_caching(99)
            site.close()

        on_disks(child, disk)

    @pytest.mark.parametrize("fills", ["store", "vote"])
    def test_commit_does_not_depend_on_room_in_the_cache(self, site, disk, system, fills):
        """Neither the reservation nor the file itself, once it is staged, keeps it from being."""

        def fill():
            for name in Path(site.cache.cache_dir).glob("index.sqlite*"):
                name.unlink()  # else it may have room of its own
            fill_up(f"{disk}/foreign")

        def child():
            site.open()
            meta = TransactionMetaData()
            site.storage.tpc_begin(meta)
            store_blob(site.storage, meta, oid(99), random_bytes(99, SIZE))
            if fills == "store":
                fill()
            site.storage.tpc_vote(meta)
            if fills == "vote":
                fill()
            site.tids[99] = site.storage.tpc_finish(meta)
            assert temporaries(site.cache) == []
            site.check_bucket()
            site.read(99)
            os.remove(f"{disk}/foreign")
            site.check_caching(*range(1, 6))
            check_sound(site.cache)
            site.close()

        on_disks(child, disk)

    def test_copies_into_the_cache_leave_no_half_behind(self, site, disk, system):
        """Uncommitted files are on another disk, and of two blobs only one fits here."""

        def child():
            site.open(temp_dir=system)
            fill_up(f"{disk}/foreign")
            meta = TransactionMetaData()
            site.storage.tpc_begin(meta)
            for number in (98, 99):
                store_blob(site.storage, meta, oid(number), random_bytes(number, SIZE))
            site.storage.tpc_vote(meta)
            leave_room(f"{disk}/foreign", SIZE * 3 // 2)
            tid = site.storage.tpc_finish(meta)
            site.tids |= {98: tid, 99: tid}
            site.check_bucket()
            assert temporaries(site.cache) == []
            assert files_below(system) == []
            for number in (98, 99):
                site.read(number)
            site.close()

        on_disks(child, disk)

    def test_commits_of_a_site_that_started_on_it_leave_nothing_behind(self, site, disk, system):
        """Its temporary files are on another disk: they come into the cache, or they go."""

        def child():
            os.mkdir(f"{disk}/cache")
            fill_inodes(f"{disk}/foreign")
            site.open()
            site.commit(97)
            site.commit(98)
            assert files_below(system) == []
            shutil.rmtree(f"{disk}/foreign")
            site.commit(99)
            assert files_below(system) == []
            site.check_bucket()
            for number in (97, 98, 99):
                site.read(number)
            site.close()

        on_disks(child, disk, inodes=100)

    @pytest.mark.parametrize("addressing", ["tid", "record"])
    @pytest.mark.parametrize("seed", range(2))
    def test_nothing_is_lost_while_the_disk_fills_and_empties(
        self, site, disk, system, addressing, seed
    ):
        """A commit is there with all its bytes, or it has failed and nothing of it is."""

        def child():
            site.open(addressing=addressing)
            writer = Writer(DB(site.storage), disk, seed)
            committed, failures = {}, 0
            for turn in range(40):
                try:
                    committed |= writer.commit(turn)
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    failures += 1
                assert writer.read_all() == committed
            assert 0 < failures < 40
            writer.db.close()
            gc.collect()  # the blobs of failed transactions, with their files
            assert temporaries(site.cache) == []
            site.open("elsewhere")
            writer.db = DB(site.storage)
            assert writer.read_all() == committed
            writer.db.close()

        on_disks(child, disk)

    @pytest.mark.parametrize("mode", ["w", "r+", "a"])
    def test_blob_that_fits_in_part_is_no_blob(self, site, disk, system, mode):
        """Neither what is written nor what is copied for a change may lack its end."""
        old, new = random_bytes("old", SIZE), random_bytes("new", SIZE)

        def write(conn):
            with conn.root()["blob"].open(mode) as file:
                file.write(new if mode == "w" else b"!")

        def child():
            site.open("roomy")
            db = DB(site.storage)
            with db.transaction() as conn:
                conn.root()["blob"] = Blob(old)
            db.close()
            site.open()
            db = DB(site.storage)
            with db.transaction() as conn:
                assert read(conn.root()["blob"]) == old  # cached, it needs no further room
            fill_up(f"{disk}/foreign")
            # For the copy's last part in part
            leave_room(f"{disk}/foreign", SIZE * 19 // 20)
            with pytest.raises(OSError, match="No space"), db.transaction() as conn:
                write(conn)
            with db.transaction() as conn:
                assert read(conn.root()["blob"]) == old
            os.remove(f"{disk}/foreign")
            with db.transaction() as conn:
                write(conn)
            with db.transaction() as conn:
                changed = {"w": new, "r+": b"!" + old[1:], "a": old + b"!"}[mode]
                assert read(conn.root()["blob"]) == changed
            db.close()

        on_disks(child, disk)

    def test_commit_takes_the_place_of_cached_blobs(self, site, disk, system):
        """Though the cache may be larger than the disk: new blobs come from another one."""

        def child():
            site.open()
            db = DB(site.storage)
            blobs = {f"{number}": random_bytes(f"{number}", SIZE) for number in range(60)}
            for name, data in blobs.items():
                with db.transaction() as conn:
                    conn.root()[name] = Blob(data)
            with db.transaction() as conn:
                assert all(read(conn.root()[name]) == data for name, data in blobs.items())
            db.close()

        on_disks(child, disk)


def leave_room(path, size):
    """Give back some bytes of a file that fills the disk."""
    os.truncate(path, max(0, os.path.getsize(path) - size))


class Writer:
    """Changes blobs at random, on a disk where somebody else comes and goes."""

    def __init__(self, db, disk, seed):
        self.db = db
        self._disk = Path(disk)
        self._chance = random.Random(seed)

    def read_all(self):
        with self.db.transaction() as conn:
            return {name: read(blob) for name, blob in conn.root().items()}

    def commit(self, turn):
        """Change some blobs in a transaction, and return their bytes by name."""
        changed = {}
        self._change_disk()
        with self.db.transaction() as conn:
            for number in range(self._chance.randrange(1, 4)):
                name = str(self._chance.randrange(10))
                size = self._chance.randrange(SIZE)
                changed[name] = random_bytes((turn, number), size)
                self._change(conn, name, changed[name])
                if self._happens(0.3):
                    self._change_disk()
                if self._happens(0.3):
                    conn.transaction_manager.savepoint()
            self._change_disk()
        return changed

    def _happens(self, chance):
        return self._chance.random() < chance

    def _change(self, conn, name, data):
        if name not in conn.root():
            conn.root()[name] = Blob()
            if self._happens(0.5):
                conn.add(conn.root()[name])
        with conn.root()[name].open("w") as file, io.BufferedWriter(file) as buffered:
            # Stock ZODB's file writes a part and says so only in its answer.
            buffered.write(data)

    def _change_disk(self):
        if self._happens(0.5):
            for path in self._disk.glob("foreign*"):
                path.unlink()
        if self._happens(0.6):
            path = self._disk / f"foreign-{os.urandom(4).hex()}"
            fill_up(path)
            if self._happens(0.5):
                leave_room(path, self._chance.randrange(2 * SIZE))


# A directory that cannot be written


@contextmanager
def closed(*directories):
    """Let nobody write into directories, or into those below."""
    found = [top for directory in directories for top, _dirs, _names in os.walk(directory)]
    for path in found:
        os.chmod(path, 0o500)
    try:
        yield
    finally:
        for path in found:
            os.chmod(path, 0o700)


class TestReadOnlyDirectory:
    def test_running_site_serves_and_resumes(self, site, system):
        """What is cached is a hit, what is not is fetched; nothing raises."""
        site.open("cache")
        for number in (1, 2):
            site.read(number)
        before = site.downloads
        with closed(site.cache.cache_dir):
            for number in (1, 2):
                assert site.read(number) == site.cache.path(oid(number), site.tids[number])
            assert site.downloads == before
            for number in range(3, 6):
                assert site.read_twice(number).startswith(system)
            site.cache.discard(oid(1), site.tids[1])
            site.cache.release([(oid(3), site.tids[3])])
        site.check_caching(*range(6, 9))
        check_sound(site.cache)
        site.close()
        assert files_below(system) == []
        assert temporaries(site.cache) == []

    @pytest.mark.parametrize("happened", ["nothing", "opened", "cached"])
    def test_new_site_serves_and_resumes(self, site, system, happened):
        """Whatever was there before."""
        directory = site.directory / "cache"
        directory.mkdir()
        if happened != "nothing":
            site.open("cache")
            for number in (1, 2) if happened == "cached" else ():
                site.read(number)
            site.close()
        with closed(directory):
            site.open("cache")
            for number in (1, 2):
                site.read(number)
            assert happened != "cached" or site.downloads == 0
            for number in range(3, 6):
                site.read_twice(number)
        site.check_caching(*range(6, 9))
        check_sound(site.cache)
        site.close()
        assert temporaries(site.cache) == []

    def test_smaller_budget_that_cannot_be_had_does_not_keep_a_site_from_starting(
        self, site, system
    ):
        """It holds from the next start on that can remove files."""
        site.open("cache")
        for number in range(1, 6):
            site.read(number)
        site.close()
        with closed(site.cache.cache_dir):
            site.open("cache", cache_size=2 * SIZE)
            for number in range(1, 8):
                site.read(number)
            site.close()
        site.open("cache", cache_size=2 * SIZE)
        assert site.cache.current_size() <= 2 * SIZE
        site.check_caching(8, 9)
        site.close()

    def test_disk_that_became_read_only_serves_and_resumes(self, site, disk, system):
        """Running, and started on it."""

        def child():
            site.open()
            for number in (1, 2):
                site.read(number)
            make_read_only(disk)
            before = site.downloads
            for number in (1, 2):
                assert site.read(number) == site.cache.path(oid(number), site.tids[number])
            assert site.downloads == before
            for number in range(3, 6):
                assert site.read(number).startswith(system)
            site.close()
            site.open()
            for number in (1, 2):
                site.read(number)
            assert site.downloads == 0
            for number in range(3, 6):
                site.read_twice(number)
            make_writable(disk)
            site.check_caching(*range(6, 9))
            check_sound(site.cache)
            site.close()
            assert temporaries(site.cache) == []

        on_disks(child, disk)

    def test_files_that_cannot_be_removed_do_not_keep_others_from_being_evicted(self, tmp_path):
        """They are another user's, more than a batch of them, and the oldest."""
        bucket = Bucket(S3BlobCache(f"{tmp_path}/cache", 300), 1)
        # All in one directory
        refused = [number << 12 for number in range(1, 201)]
        for number in refused:
            os.utime(bucket.read(number), (1, 1))
        with closed(os.path.dirname(bucket.cache.path(oid(0), TID))):
            for number in range(1, 301):
                bucket.read(number)
            bucket.check_caching(*range(301, 320))
            assert all(map(bucket.is_cached, refused))
        check_sound(bucket.cache)
        bucket.cache.close()

    @pytest.mark.parametrize("why", ["parent is closed", "parent is a file", "is a file"])
    def test_directory_that_cannot_be_made_is_a_clear_error(self, tmp_path, why):
        """Its path was mistyped: the site does not start, and says which it is."""
        (tmp_path / "closed").mkdir()
        (tmp_path / "file").touch()
        path = (
            tmp_path
            / {
                "parent is closed": "closed/cache",
                "parent is a file": "file/cache",
                "is a file": "file",
            }[why]
        )
        with closed(tmp_path / "closed"), pytest.raises(OSError) as caught:
            S3BlobCache(str(path), 100)
        assert str(path) in str(caught.value)
        assert caught.value.errno in (errno.EACCES, errno.ENOTDIR, errno.EEXIST)


# A directory whose parts are deleted


def delete_all(directory):
    shutil.rmtree(directory)


def delete_content(directory):
    """As "rm -rf cache/*" does it."""
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def delete_blobs(directory):
    for path in Path(directory).glob("[0-9a-f][0-9a-f][0-9a-f]"):
        shutil.rmtree(path)


def delete_index(directory):
    for path in Path(directory).glob("index.sqlite*"):
        path.unlink()


def _delete(name):
    def delete(directory):
        path = f"{directory}/{name}"
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)

    return delete


DELETIONS = {
    "all": delete_all,
    "content": delete_content,
    "blobs": delete_blobs,
    "index": delete_index,
    **{
        name: _delete(name)
        for name in (
            "process",
            "tmp",
            "lock",
            "boot",
            "index.sqlite",
            "index.sqlite-journal",
        )
    },
}
EVERY_DELETION = pytest.mark.parametrize("delete", DELETIONS.values(), ids=DELETIONS)

OTHER = """
import gc
import hashlib, os, sys
sys.path.insert(0, sys.argv[2])
from zodb_s3blobs.cache import S3BlobCache
from tests.test_cache_trouble import Bucket, check_sound
bucket = Bucket(S3BlobCache(sys.argv[1], 1 << 30))
print("ready", flush=True)
for line in sys.stdin:
    command, _, number = line.strip().partition(" ")
    if command == "read":
        path = bucket.read(int(number))
        answer = "beside" if path != bucket.cache.path(int(number).to_bytes(8, "big"), {tid!r}) \\
            else "fetched" if bucket.fetched.pop(int(number), 0) else "hit"
    else:
        check_sound(bucket.cache)
        answer = "sound"
    print(answer, flush=True)
bucket.cache.close()
"""


class OtherProcess:
    """Reads the blobs of a `Bucket` through a cache of its own on the same directory."""

    def __init__(self, directory):
        top = str(Path(__file__).parent.parent)
        self._process = subprocess.Popen(
            [sys.executable, "-c", OTHER.replace("{tid!r}", repr(TID)), directory, top],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def _answer(self):
        answer = self._process.stdout.readline().strip()
        assert answer, "the other process died"
        return answer

    def ask(self, command):
        """Return "hit", "fetched" or "beside" for a "read", "sound" for a "check"."""
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._process.communicate(timeout=PATIENCE)
        assert self._process.returncode == 0 or any(exc_info)


class TestDeletedDirectory:
    @EVERY_DELETION
    def test_running_site_serves_commits_and_caches(self, site, system, delete):
        """Anything may be deleted at any time."""
        site.open("cache")
        for number in range(1, 4):
            site.read(number)
        delete(site.cache.cache_dir)
        for number in range(1, 6):
            site.read(number)
        site.check_caching(*range(1, 6))
        delete(site.cache.cache_dir)
        site.commit(98)
        site.check_caching(98)
        delete(site.cache.cache_dir)
        db = DB(site.storage)
        with db.transaction() as conn:
            blob = conn.root()["blob"] = Blob()
            conn.add(blob)
            with blob.open("w") as file:
                file.write(b"written")
        delete(site.cache.cache_dir)
        with db.transaction() as conn, conn.root()["blob"].open("r+") as file:
            assert file.read() == b"written"
            file.write(b" and changed")
        delete(site.cache.cache_dir)
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"written and changed"
        check_sound(site.cache)
        db.close()

    @EVERY_DELETION
    def test_check_of_a_running_site_mends_what_is_missing(self, site, delete):
        """Right after the deletion, with nothing read in between."""
        site.open("cache")
        for number in range(1, 4):
            site.read(number)
        delete(site.cache.cache_dir)
        check_sound(site.cache)
        site.check_caching(*range(1, 6))
        check_sound(site.cache)
        site.close()

    @EVERY_DELETION
    def test_two_processes_go_on_sharing(self, tmp_path, delete):
        """Each finds what the other has made anew."""
        directory = f"{tmp_path}/cache"
        bucket = Bucket(S3BlobCache(directory, 1 << 30))
        with OtherProcess(directory) as other:
            for number in range(1, 4):
                bucket.read(number)
                assert other.ask(f"read {number}") == "hit"
            delete(directory)
            bucket.read(6)  # the first use may find that the index is damaged
            bucket.check_caching(*range(1, 6))
            for number in range(1, 6):
                assert other.ask(f"read {number}") == "hit"
            delete(directory)
            other.ask("read 16")
            for number in range(11, 16):
                assert other.ask(f"read {number}") == "fetched"
                assert other.ask(f"read {number}") == "hit"
            bucket.check_caching(*range(11, 16))
            assert not any(bucket.fetched[number] for number in range(11, 16))
            bucket.cache.check(fix=True)
            assert other.ask("check") == "sound"
            assert bucket.cache.check() == []
        bucket.cache.close()

    @EVERY_DELETION
    def test_readers_in_other_threads_do_not_notice(self, site, system, delete):
        """In whatever line of code they are."""
        site.open("cache")
        reads, is_over = threading.Semaphore(0), threading.Event()

        def work(seed):
            chance = random.Random(seed)
            while not is_over.is_set():
                site.read(chance.randrange(1, 9))
                reads.release()

        threads = [start(work, seed) for seed in range(3)]
        try:
            for turn in range(6):
                for _ in range(25):
                    assert reads.acquire(timeout=PATIENCE), "the readers stand still"
                _delete_again(delete, site.cache.cache_dir)
                if turn % 2:
                    site.commit(100 + turn)
        finally:
            is_over.set()
            for thread in threads:
                thread.result()
        check_sound(site.cache)
        site.check_caching(*range(9, 17))
        site.close()

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_reader_whose_directory_goes_during_a_download_is_served(self, site, system, when):
        """With the file that it has just fetched, or was about to."""
        site.open("cache")
        site.read(1)
        deletions = []

        def delete(*args):
            if not deletions:
                deletions.append(delete_all(site.cache.cache_dir))

        getattr(site.client, when)["download_file"] = delete
        site.read(2)
        assert len(deletions) == 1
        site.check_caching(3, 4)
        site.close()

    @pytest.mark.parametrize("mode", ["r+", "a", "r", "c"])
    def test_blob_whose_directory_goes_during_its_opening_keeps_its_bytes(self, site, system, mode):
        """In each mode that reads what is committed."""
        site.open("cache")
        db = DB(site.storage)
        with db.transaction() as conn:
            conn.root()["blob"] = Blob(b"precious")
        delete_all(site.cache.cache_dir)
        site.client.after["download_file"] = lambda *args: (
            site.client.after.clear(),
            delete_all(site.cache.cache_dir),
        )
        with db.transaction() as conn:
            with conn.root()["blob"].open(mode) as file:
                file.seek(0)
                assert mode == "a" or file.read() == b"precious"
            assert "download_file" not in site.client.after
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"precious"
        db.close()

    @pytest.mark.parametrize("when", ["store", "vote"])
    def test_transaction_that_lost_what_it_staged_fails_or_is_whole(self, site, when):
        """Once it has voted its bytes are in the bucket, and it needs the file no more."""
        site.open("cache")
        meta = TransactionMetaData()
        site.storage.tpc_begin(meta)
        store_blob(site.storage, meta, oid(99), random_bytes(99, SIZE))
        if when == "store":
            delete_all(site.cache.cache_dir)
            try:
                site.storage.tpc_vote(meta)
            except Exception:
                site.storage.tpc_abort(meta)
            else:
                site.tids[99] = site.storage.tpc_finish(meta)
        else:
            site.storage.tpc_vote(meta)
            delete_all(site.cache.cache_dir)
            site.tids[99] = site.storage.tpc_finish(meta)
        site.check_bucket()
        if 99 in site.tids:
            site.check_caching(99)
        site.commit(100)
        site.check_caching(100)
        check_sound(site.cache)
        site.close()

    def test_directory_that_a_file_has_replaced_serves_and_resumes(self, site, system):
        """An operator's mistake; closing works, too."""
        site.open("cache")
        site.read(1)
        directory = site.cache.cache_dir
        delete_all(directory)
        Path(directory).touch()
        for number in range(1, 4):
            site.read(number)
        site.close()
        os.remove(directory)
        site.open("cache")
        site.check_caching(1, 2, 3)
        delete_all(directory)
        Path(directory).touch()
        site.read(4)
        os.remove(directory)
        site.check_caching(5, 6)
        site.close()


def _delete_again(delete, directory):
    """Delete until nobody has made anything anew meanwhile."""
    while True:
        try:
            return delete(directory)
        except OSError:
            continue


class TestSource:
    @pytest.mark.parametrize("s3_is", ["up", "down"])
    def test_source_that_is_gone_is_no_trouble_of_the_cache(self, site, s3_is):
        """Its error comes through, and S3 is not asked again and again for that."""
        source = site.directory / "blobs"
        (source / "0x01").mkdir(parents=True)
        site.open("cache", sources=[BlobDirSource(str(source))])
        shutil.rmtree(source)
        if s3_is == "down":
            site.client.before["download_file"] = Failure()
        site.client.delete_object(blob_key(oid(1), site.tids[1]))
        with pytest.raises(FileNotFoundError, match="blobs"):
            site.storage.loadBlob(oid(1), site.tids[1])
        assert site.downloads <= 2
        site.client.before.clear()
        site.check_caching(2, 3)
        site.close()


# A blob larger than the cache


class TestLargeBlob:
    @pytest.fixture
    def conn(self, s3, tmp_path):
        """A connection whose root has a small blob, which is cached, and a large one."""
        site = Site(s3, tmp_path, 0)
        site.open("seed")
        with DB(site.storage).transaction() as conn:
            conn.root()["small"] = Blob(b"small")
            conn.root()["large"] = Blob(self.DATA)
        site.close()
        site.open("cache", cache_size=SIZE // 2)
        db = DB(site.storage)
        conn = db.open(transaction.TransactionManager())
        read(conn.root()["small"])
        conn.site = site
        yield conn
        conn.transaction_manager.abort()
        conn.close()
        db.close()
        assert temporaries(site.cache) == []

    DATA = random_bytes("large", SIZE)

    def read_fresh(self, conn):
        """Return the bytes as a process with an empty cache reads them."""
        site = conn.site
        blob = conn.root()["large"]
        cache = S3BlobCache(f"{site.directory}/fresh", 1 << 30)
        key = blob_key(blob._p_oid, blob._p_serial)

        def fetch(path):
            site.client.download_file(key, path)

        with open(cache.fill(blob._p_oid, blob._p_serial, fetch), "rb") as file:
            return file.read()

    @pytest.mark.parametrize("mode", ["r", "c"])
    def test_it_is_read_again_and_again(self, conn, mode):
        """With one download, and the cached file stays."""
        for _ in range(3):
            with conn.root()["large"].open(mode) as file:
                assert file.read() == self.DATA
        assert conn.site.downloads == 2
        assert read(conn.root()["small"]) == b"small"
        assert conn.site.downloads == 2
        assert conn.site.cache.check() == []
        assert conn.site.cache.current_size() == len(b"small")

    @pytest.mark.parametrize("mode", ["r+", "a"])
    def test_it_is_changed_and_committed(self, conn, mode):
        """What is committed is the old bytes with the change, in this process and in others."""
        for number in range(2):
            with conn.root()["large"].open(mode) as file:
                assert mode == "a" or file.read() == self.DATA + b"!" * number
                file.write(b"!")
            conn.transaction_manager.commit()
            assert read(conn.root()["large"]) == self.DATA + b"!" * (number + 1)
        assert self.read_fresh(conn) == self.DATA + b"!!"
        assert conn.site.cache.check() == []

    def test_it_is_changed_and_aborted(self, conn):
        """And is then what it was."""
        with conn.root()["large"].open("r+") as file:
            file.write(b"changed")
        conn.transaction_manager.abort()
        assert read(conn.root()["large"]) == self.DATA

    def test_it_is_changed_after_a_savepoint(self, conn):
        """What was saved is where the change begins."""
        with conn.root()["large"].open("a") as file:
            file.write(b"!")
        conn.transaction_manager.savepoint()
        with conn.root()["large"].open("a") as file:
            file.write(b"!")
        conn.transaction_manager.commit()
        assert read(conn.root()["large"]) == self.DATA + b"!!"

    def test_its_file_may_go_between_two_reads(self, conn):
        """In all modes it is fetched again."""
        for mode in ("r", "c", "r+"):
            os.remove(conn.root()["large"].committed())
            with conn.root()["large"].open(mode) as file:
                assert file.read() == self.DATA
            conn.transaction_manager.abort()

    def test_committed_tells_a_path_though_it_is_another_one(self, conn):
        """A web server that sends files itself asks for it, twice in a request."""
        blob = conn.root()["large"]
        blob._p_activate()
        first = blob.committed()
        assert blob.committed() == first
        os.remove(first)
        second = blob.committed()
        assert second != first
        with open(second, "rb") as file:
            assert file.read() == self.DATA
        assert blob.committed() == second

    def test_stock_committed_would_fail(self, conn):
        """Why the patch is there. When this fails, ZODB has mended it and the patch can go."""
        blob = conn.root()["large"]
        blob._p_activate()
        os.remove(blob.committed())
        with pytest.raises(AssertionError):
            Blob.committed.__wrapped__(blob)
        assert os.path.exists(blob.committed())

    def test_newer_one_of_the_same_blob_does_not_mix_with_it(self, conn):
        """Each connection reads the revision that it sees."""
        assert read(conn.root()["large"]) == self.DATA
        other_data = random_bytes("other", SIZE)
        with conn.db().transaction() as other, other.root()["large"].open("w") as file:
            file.write(other_data)
        for _ in range(2):
            assert read(conn.root()["large"]) == self.DATA
            with conn.db().transaction() as other:
                assert read(other.root()["large"]) == other_data

    def test_many_threads_want_it_at_once(self, conn):
        """One download serves all."""
        before = conn.site.downloads

        def work():
            with conn.db().transaction() as other:
                return read(other.root()["large"]) == self.DATA

        assert all(thread.result() for thread in [start(work) for _ in range(6)])
        assert conn.site.downloads == before + 1


# An index that somebody holds


HOLDER = """
import os, signal, sys
from zodb_s3blobs.cacheindex import CacheIndex
with CacheIndex(sys.argv[1]).writing():
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def hold():
    """Return a function that lets a process hold the lock of a cache, and stops it.

    What it returns lets the process go on, to its end.
    """
    with ExitStack() as stack:

        def hold(cache):
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, os.path.join(cache.cache_dir, "index.sqlite")]
            )
            stack.callback(process.wait, PATIENCE)
            stack.callback(process.kill)
            _pid, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)

            def go_on():
                process.send_signal(signal.SIGCONT)
                assert process.wait(PATIENCE) == 0

            return go_on

        yield hold


class Time:
    """Stands still but for those who sleep, and counts how long they did."""

    def __init__(self):
        self.now = 1000.0
        self.slept = 0.0

    def monotonic(self):
        return self.now

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds


@pytest.fixture
def time(monkeypatch):
    """The `Time` of the cache and its index."""
    time = Time()
    monkeypatch.setattr(cache_module, "time", time)
    monkeypatch.setattr(cachechange, "time", time)
    monkeypatch.setattr(directorylock, "time", time)
    return time


WAIT = directorylock.BUSY_TIMEOUT


class TestHeldIndex:
    def test_blobs_are_served_and_one_reader_waits_once(self, site, hold, time):
        """A stopped process stops nobody for long; caching resumes a while after it has gone on."""
        site.open("cache")
        site.read(1)
        go_on = hold(site.cache)
        site.read(1)
        assert time.slept == 0
        for number in range(2, 7):
            site.read(number)
        assert WAIT <= time.slept < WAIT + 1
        assert site.downloads == 6
        time.now += cachechange.REST + 1
        for number in range(7, 10):
            site.read(number)
        assert 2 * WAIT <= time.slept < 2 * WAIT + 2
        go_on()
        time.now += cachechange.REST + 1
        site.check_caching(10, 11)
        check_sound(site.cache)
        site.close()

    def test_commit_waits_once_and_is_committed(self, site, hold, time):
        """The vote waits, and the end does not."""
        site.open("cache")
        go_on = hold(site.cache)
        site.commit(98)
        site.commit(99)
        assert WAIT <= time.slept < WAIT + 1
        site.check_bucket()
        for number in (98, 99):
            site.read(number)
        assert temporaries(site.cache)  # where it was read from
        go_on()
        time.now += cachechange.REST + 1
        site.check_caching(1, 2)
        check_sound(site.cache)
        site.close()
        assert temporaries(site.cache) == []

    def test_lock_taken_between_vote_and_finish_does_not_undo_the_commit(self, site, hold, time):
        """The staged file goes, its room comes back."""
        site.open("cache")
        meta = TransactionMetaData()
        site.storage.tpc_begin(meta)
        store_blob(site.storage, meta, oid(99), random_bytes(99, SIZE))
        site.storage.tpc_vote(meta)
        go_on = hold(site.cache)
        site.tids[99] = site.storage.tpc_finish(meta)
        assert temporaries(site.cache) == []
        assert WAIT <= time.slept < WAIT + 1
        site.check_bucket()
        go_on()
        time.now += cachechange.REST + 1
        site.check_caching(99, 1)
        check_sound(site.cache)
        site.close()

    def test_site_that_starts_waits_once(self, site, hold, time):
        """And then serves like one that has been running."""
        site.open("cache")
        site.read(1)
        site.close()
        go_on = hold(site.cache)
        site.open("cache")
        for number in range(1, 6):
            site.read(number)
        assert site.downloads == 4
        assert WAIT <= time.slept < WAIT + 1
        go_on()
        time.now += cachechange.REST + 1
        site.check_caching(*range(6, 9))
        check_sound(site.cache)
        site.close()

    def test_threads_that_wait_together_are_served(self, site, hold, monkeypatch):
        """Those that wait for each other inside the process, too."""
        # The constant is no longer asked: it has become a default.
        monkeypatch.setattr(CacheIndex.writing.__wrapped__, "__defaults__", (0.2,))
        monkeypatch.setattr(cachechange, "REST", 0.0)
        site.open("cache")
        go_on = hold(site.cache)
        threads = [start(site.read, number) for number in range(1, 13)]
        for thread in threads:
            thread.result()
        go_on()
        site.check_caching(*range(13, 16))
        check_sound(site.cache)
        site.close()
