"""The cache by itself: eviction and hits among many files, and one blob that many want at once."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
import gc
import glob
import hashlib
import itertools
import logging
import multiprocessing
import os
import random
import statistics
from threading import Thread
import time

from ZODB.utils import p64

from tests.services.location import new_bucket
from tests.services.proxy import LatencyProxy
from zodb_s3blobs.cache import S3BlobCache

from .beside import Writer
from .common import alternate
from .common import at_most
from .common import for_information
from .common import in_memory
from .common import LINK
from .common import MAPPINGSTORAGE
from .common import MiB
from .common import open_storage
from .common import random_file
from .common import store_records
from .common import within
from .common import workspace
from .null_s3 import NullS3


FILES = 200_000
EVICTED = FILES // 10
SIZE = 100
TID = p64(1)
# Seconds since the epoch
FIRST_USE = 1_500_000_000
# Longer than a tick of a file system's clock: what has just changed is read at the next opening.
PAUSE = 0.02
# Puts at a time, and in all
PUTS, ALL_PUTS = 500, 2000
ROUNDS = 3
# Hits between two looks at whether more are wanted
HITS = 100

LARGE = 50 * MiB
PROCESSES, THREADS = 2, 8


class FilledCache:
    """A cache directory whose files were used in no order of their names.

    The files have 100 bytes, for which no disk has to provide a block.

    Attribute ``numbers``: the files', that which was not used for longest first.
    """

    def __init__(self, directory, count):
        self.directory = str(directory)
        self.size = count * SIZE
        self.numbers = random.Random(count).sample(range(count), count)
        for number in range(min(count, 0x1000)):
            os.makedirs(os.path.dirname(self.path(number)))
        self._write(count)

    def path(self, number):
        return f"{self.directory}/{number & 0xFFF:03x}/{number:016x}.{TID.hex()}.blob"

    def _write(self, count):
        """Write the files that were not used for longest."""
        for rank, number in enumerate(self.numbers[:count]):
            if rank == count - 1:
                time.sleep(PAUSE)
            file = os.open(self.path(number), os.O_WRONLY | os.O_CREAT, 0o400)
            os.ftruncate(file, SIZE)
            os.utime(file, (FIRST_USE + rank, FIRST_USE + rank))
            os.close(file)

    def restore(self):
        """Write the files that were evicted, and make the index anew."""
        self._write(EVICTED)
        for path in glob.glob(f"{self.directory}/index.sqlite*"):
            os.remove(path)
        self.make_index()

    def make_index(self):
        make_index(self.directory, self.size).close()

    def open_smaller(self):
        """Open the cache with a budget for nine files of ten: the others are evicted."""
        return S3BlobCache(self.directory, self.size * 9 // 10)

    def walk(self):
        """Look at each file, as a cache without an index does."""
        for entry in entries(self.directory):
            entry.stat()


def make_index(directory, size):
    """Return a cache that had no index."""
    logger = logging.getLogger("zodb_s3blobs.cachesurvey")
    logger.disabled = True  # it would warn
    cache = S3BlobCache(directory, size)
    logger.disabled = False
    return cache


def entries(directory):
    """Yield what os.scandir tells of each file of a cache."""
    for below in os.scandir(directory):
        if len(below.name) == 3 and below.is_dir():
            with os.scandir(below) as found:
                yield from found


def cpu(function, *arguments):
    """Return the seconds of user and system time that a call takes."""
    begun = time.process_time()
    function(*arguments)
    return time.process_time() - begun


def eviction():
    """Evict a tenth of 200,000 files, beside one walk over all of them; CPU counts."""
    with in_memory() as directory:
        filled = FilledCache(directory / "cache", FILES)
        filled.make_index()
        gone = [filled.path(number) for number in filled.numbers[:EVICTED]]
        stay = {filled.path(number) for number in filled.numbers[EVICTED:]}

        def remove():
            for path in gone:
                os.remove(path)

        def bare():
            seconds = cpu(remove)
            filled.restore()
            return seconds

        def ours():
            begun = time.process_time()
            cache = filled.open_smaller()
            seconds = time.process_time() - begun
            cache.close()
            assert {entry.path for entry in entries(directory / "cache")} == stay
            filled.restore()
            return seconds

        walk, kernel, seconds = alternate(ROUNDS, lambda: cpu(filled.walk), bare, ours)
        cache = filled.open_smaller()
        one = one_eviction(cache)
        cache.close()
    what, walk = f"evict {EVICTED:,} of {FILES:,}: CPU", walk * 1e3
    return [
        at_most(0.1, f"{what}, beside a walk", "none", "ms", seconds * 1e3, walk),
        at_most(0.1, f"{what}, less unlink", "none", "ms", (seconds - kernel) * 1e3, walk),
        at_most(0.1, f"evict 1 of {FILES:,} by a put: CPU", "none", "ms", one * 1e3, walk),
    ]


def one_eviction(cache):
    """Return the CPU seconds by which a put takes longer for an eviction, of 2,000 each."""
    numbers = itertools.count(1 << 32)
    seconds = {False: 0.0, True: 0.0}
    for is_full in (False, True) * (ALL_PUTS // PUTS):
        cache.max_size = cache.current_size() + (0 if is_full else PUTS * SIZE)
        files = new_files(cache, PUTS)
        seconds[is_full] += cpu(put, cache, numbers, files)
    return (seconds[True] - seconds[False]) / ALL_PUTS


def new_files(cache, count):
    """Return paths of files for a cache to put."""
    files = [cache.temporary_file() for _ in range(count)]
    for path in files:
        with open(path, "wb") as file:
            file.truncate(SIZE)
    return files


def put(cache, numbers, files):
    for path in files:
        cache.put(p64(next(numbers)), TID, path)


def hits():
    """Hit files that stay while 20,000 of 200,000 are evicted, beside a quiet time."""
    rows = []
    with in_memory() as directory:
        filled = FilledCache(directory / "cache", FILES)
        filled.make_index()
        oids = [p64(number) for number in filled.numbers[EVICTED:]]
        limit = partial(within, 100)
        hitter = Writer(Thread, _hit, S3BlobCache(filled.directory), oids)
        rows += _beside_eviction(filled, "thread", limit, hitter)
        process = multiprocessing.get_context("spawn").Process
        hitter = Writer(process, _hit_apart, filled.directory, oids)
        rows += _beside_eviction(filled, "process", partial(at_most, 1.5), hitter)
    return rows


def _beside_eviction(filled, where, goal, hitter):
    """Return the rows of hits somewhere; the first with a goal."""
    quiet, busy = [], []
    seconds = 1.0
    with hitter:
        for _ in range(ROUNDS):
            gc.collect()
            hitter.start()
            time.sleep(seconds)
            quiet.append(_times(hitter))
            hitter.start()
            begun = time.perf_counter()
            cache = filled.open_smaller()
            seconds = time.perf_counter() - begun
            busy.append(_times(hitter))
            cache.close()
            filled.restore()
    rows = []
    for name, measure in MEASURES.items():
        what = f"hit, {EVICTED:,} evicted in another {where}: {name}"
        ours, reference = (measure(rounds) * 1e6 for rounds in (busy, quiet))
        rows.append((for_information if rows else goal)(what, "none", "us", ours, reference))
    return rows


def _times(hitter):
    times, misses = hitter.stop()
    assert not misses, misses
    return times


def _late(times):
    return statistics.quantiles(times, n=100)[-1]


MEASURES = {
    "99 %": lambda rounds: min(map(_late, rounds)),
    "99 %, worst": lambda rounds: max(map(_late, rounds)),
    "median": lambda rounds: min(map(statistics.median, rounds)),
    "longest": lambda rounds: min(map(max, rounds)),
}


def _hit_apart(directory, oids, pipe):
    cache = S3BlobCache(directory)
    _hit(cache, oids, pipe)
    cache.close()


def _hit(cache, oids, pipe):
    """Hit without a pause: after one, it would be the waking up that is measured."""
    hits = itertools.cycle(oids)
    try:
        while pipe.recv():
            times, misses = [], 0
            gc.collect()
            gc.disable()
            pipe.send("started")
            while not pipe.poll():
                for oid in itertools.islice(hits, HITS):
                    begun = time.perf_counter()
                    path = cache.get(oid, TID)
                    times.append(time.perf_counter() - begun)
                    misses += path is None
            gc.enable()
            pipe.recv()
            pipe.send((times, misses))
    except EOFError:
        pass  # nobody wants more


def one_blob():
    """Read one cold blob of 50 MB in eight threads of each of two processes with one cache."""
    with workspace() as directory:
        body = random_file(directory / "body", LARGE)
        with (
            NullS3(body) as server,
            LatencyProxy(server.endpoint_url, down_mbps=LINK) as proxy,
        ):
            location = replace(new_bucket(server), endpoint_url=proxy.endpoint_url)
            counts = [_read_together(directory, location, proxy, n) for n in range(1, ROUNDS + 1)]
    what = f"{PROCESSES} x {THREADS} threads, one cold blob of 50 MB"
    downloaded = max(count["bytes_down"] for count in counts) / LARGE
    requests = max(count["requests"] for count in counts)
    return [
        within(1.01, f"{what}: x downloaded", "link", "", downloaded),
        within(1, f"{what}: requests", "link", "", requests),
    ]


def _read_together(directory, location, proxy, number):
    """Return what the proxy counts while all threads read a blob."""
    spawn = multiprocessing.get_context("spawn")
    together, answers = spawn.Barrier(PROCESSES * THREADS, timeout=60), spawn.Queue()
    work = (directory, location, number, together, answers)
    processes = [spawn.Process(target=_read_in_threads, args=work) for _ in range(PROCESSES)]
    proxy.reset()
    for process in processes:
        process.start()
    digests = [digest for _ in processes for digest in answers.get(timeout=120)]
    for process in processes:
        process.join()
    assert digests == [_sha256(directory / "body")] * PROCESSES * THREADS
    return proxy.stats()


def _read_in_threads(directory, location, number, together, answers):
    storage = open_storage(directory, location, base=MAPPINGSTORAGE)
    store_records(storage, number, TID)

    def read(_turn):
        together.wait()
        return _sha256(storage.loadBlob(p64(number), TID))

    with ThreadPoolExecutor(THREADS) as pool:
        answers.put(list(pool.map(read, range(THREADS))))
    storage.close()


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(MiB):
            digest.update(data)
    return digest.digest()
