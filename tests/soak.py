"""A soak: several processes write, read, undo and pack at random, while all that can fails.

    python -m tests.soak --seconds 1200 --seed 1 --stack filestorage

More options are shown by --help.

A database has some slots. Each holds a blob or none, and a token that says which bytes the blob
must have. Worker processes change, read and undo them by several threads each. They tell this
process what they are about to commit before they do and how it ended, and what they have seen;
this one compares that with a `Model` of what must be there. Meanwhile S3 fails as a `FaultProxy` is
told, workers are killed and replaced, stopped for a while, and fork; caches are removed and
damaged; a ZEO server is killed. What ended without an answer is known when somebody sees it.

In the end all is healed, and everything is read through an empty cache and compared; then a pack
must leave exactly the objects that there should be. The exit status is 1 when anything was wrong.
The same seed gives the same plan, but not the same order of events: the processes race.
"""

import argparse
from base64 import encodebytes
from bisect import bisect_right
from bisect import insort
from collections import Counter
from collections import defaultdict
from collections import deque
from contextlib import closing
from contextlib import contextmanager
from contextlib import ExitStack
from contextlib import suppress
import ctypes
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
import faulthandler
import fcntl
import functools
import gc
import hashlib
import heapq
import itertools
import logging
import mmap
import multiprocessing
from multiprocessing.connection import wait
import os
from pathlib import Path
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback

from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from persistent.timestamp import TimeStamp
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.blob import is_blob_record
from ZODB.Connection import resetCaches
from ZODB.DB import TransactionalUndo
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64
from ZODB.utils import u64

from zodb_s3blobs import blobs
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.testing.server import EmbeddedS3

from .caches import committed
from .caches import committed_size
from .relstorages import Database
from .services.fault_proxy import FaultProxy
from .services.location import keys
from .services.location import new_bucket
from .services.location import S3Location
from .services.postgresql import PostgresqlServer
from .services.zeo import ZeoServer
from .storages import filestorage
from .storages import open_db
from .storages import random_bytes
from .zeoclients import FILE
from .zeoclients import hear_of_all
from .zeoclients import ZeoDatabase


SLOTS = 24
MiB = 1 << 20
# Seconds
CONNECT_TIMEOUT, READ_TIMEOUT = 1, 2
# of a worker without a word, until it hangs
LONGEST_SILENCE = 150
# of all workers, until they have ended
LONGEST_END = 150
# for which a fault can be the reason of an error that comes later
AFTERMATH = 45
# of a run that is too short for a grace period
SHORT = 30
# The short grace period. No commit takes half as long, and a machine that is busy no quarter of it.
GRACE = 20
SAME_OID = "A different object already has the same oid"
# Keys of <s3blobstorage>
QUICK = {
    "s3_connect_timeout": f"{CONNECT_TIMEOUT}s",
    "s3_read_timeout": f"{READ_TIMEOUT}s",
    "s3_max_attempts": 3,
    "s3_multipart_threshold": "1MB",
    "s3_multipart_part_size": "5MB",
    "upload_concurrency": 8,
}
SPOOL = {"on_upload_failure": "spool", "spool_dir": "{directory}/spool-{host}"}


# Bytes


@functools.lru_cache(maxsize=8)
def content(token):
    """Return the bytes that a token stands for, None where that is no blob.

    A token is the name of who made it, a letter and a size: "1.0.5/7:w100" is a blob of 100 bytes
    that worker 1 has written into slot 7. After "|" comes the token of the blob that was changed:
    "a" appends, "p" writes over the beginning, and "t" cuts it.
    """
    own, _, base = token.partition("|")
    what, size = own.rpartition(":")[2][:1], own.rpartition(":")[2][1:]
    if what == "-":
        return None
    if what == "t":
        return content(base)[: int(size)]
    fresh = random_bytes(own, int(size))
    if what == "w":
        return fresh
    before = content(base)
    return before + fresh if what == "a" else fresh + before[len(fresh) :]


def digest_of(data):
    """Return the digest of bytes, or of no blob."""
    return "none" if data is None else hashlib.sha256(data).hexdigest()[:24]


def whose(data):
    """Describe bytes that should be others."""
    return f"{len(data)} bytes {digest_of(data)}, beginning with {data[:16]!r}"


# What must be there


@dataclass
class Change:
    """What a transaction does to a slot.

    :ivar base_tid: the revision that it saw; None where only its token is known, as with an undo.
    """

    base_tid: int | None
    base_token: str
    token: str
    digest: str


@dataclass
class Write:
    """A transaction, known from before its commit.

    :ivar str state: "open", "committed", "aborted", or "lost" where nobody knows.
    :ivar changes: by slot.
    """

    name: str
    kind: str
    changes: dict
    state: str = "open"
    tid: int | None = None
    why: str = ""


@dataclass
class Look:
    """What one transaction has seen.

    :ivar str what: it was doing.
    :ivar int floor: it began after the commit of this tid was acknowledged.
    :ivar at: the tid that a historical connection was opened at, or None.
    :ivar seen: a dict from slot to (tid, token, digest).
    """

    who: str
    what: str
    floor: int
    at: int | None
    seen: dict


class Slot:
    """The revisions of a slot: by tid the name of the write, and the token."""

    def __init__(self, tid, token):
        self.tids = [tid]
        self.revisions = {tid: ("setup", token)}

    def add(self, tid, name, token):
        insort(self.tids, tid)
        self.revisions[tid] = name, token

    def last(self, tid):
        """Return the tid of the last revision up to a tid, or None."""
        place = bisect_right(self.tids, tid)
        return self.tids[place - 1] if place else None

    def next(self, tid):
        """Return the tid of the first revision after a tid, or None."""
        place = bisect_right(self.tids, tid)
        return self.tids[place] if place < len(self.tids) else None


class Model:
    """What must be in the database, as far as it was acknowledged or seen.

    :param wrong: called with the text of each discrepancy.
    :param bool loses_undos: whether the base lets an undo and another transaction write over each
        other.
    """

    def __init__(self, wrong, loses_undos=False):
        self._wrong = wrong
        self._loses_undos = loses_undos
        self.slots = {}
        self.writes = {}
        # By (slot, token)
        self._candidates = defaultdict(list)
        self.digests = {}
        #: what was superseded up to this tid may be gone
        self.packed_to = 0
        self._looks = []
        # What was seen before its writer was heard of, and what was missing
        self._unexplained = deque()
        self._missing = []
        #: undos without an answer, of which it cannot be told which one it was
        self.ambiguous = 0
        #: undos that were written over, or have written over something
        self.lost_undos = 0

    def set_up(self, number, tid, token):
        """Learn of a slot's first revision."""
        self.slots[number] = Slot(tid, token)
        self.digests[token] = digest_of(content(token))

    # What writers say

    def begin(self, name, kind, changes):
        """A commit is about to begin."""
        if name in self.writes:
            self._wrong(f"two transactions are called {name}")
        write = self.writes[name] = Write(name, kind, changes)
        for number, change in changes.items():
            self._candidates[number, change.token].append(write)
            known = self.digests.setdefault(change.token, change.digest)
            if known != change.digest:
                self._wrong(f"{name}: two contents of {change.token}")

    def commit(self, name, tid):
        """It succeeded, with this tid, or None where that is not known."""
        write = self.writes[name]
        if write.state == "committed" and tid not in (None, write.tid):
            self._wrong(f"{write} was seen before, and was committed as {tid:x}")
        write.state = "committed"
        if tid is not None and write.tid is None:
            self._place(write, tid)

    def abort(self, name, why):
        """It failed before the database was told to finish."""
        write = self.writes[name]
        if write.tid is not None:
            self._wrong(f"{write} was seen, and was aborted: {why}")
        write.state, write.why = "aborted", why

    def lose(self, name, why):
        """Nobody knows."""
        write = self.writes[name]
        if write.state == "open":
            write.state, write.why = "lost", why

    def lose_all(self, prefix, why):
        """The process of this prefix is dead."""
        for name, write in self.writes.items():
            if write.state == "open" and name.startswith(prefix):
                self.lose(name, why)

    def _place(self, write, tid):
        write.tid, write.state = tid, "committed"
        for number, change in write.changes.items():
            slot = self.slots[number]
            if tid in slot.revisions:
                self._wrong(
                    f"slot {number} {tid:x}: {write} and {slot.revisions[tid]} at a time"
                    f"\n{self.describe(number)}"
                )
            else:
                slot.add(tid, write.name, change.token)

    # What readers say

    def see(self, look):
        """Compare what a transaction has seen."""
        self._looks.append(look)
        for number, (tid, token, digest) in look.seen.items():
            if not self._explain(look.who, number, tid, token):
                self._unexplained.append((look.who, number, tid, token))
            if self.digests.get(token, digest) != digest:
                self._wrong(
                    f"{look.who}: slot {number} {tid:x} {token}: digest {digest} in its record"
                )

    def _explain(self, who, number, tid, token, finally_=False):
        """Say whether a revision is that of a known write."""
        slot = self.slots[number]
        if tid in slot.revisions:
            if slot.revisions[tid][1] != token:
                self._wrong(f"{who}: slot {number} {tid:x} has {token}\n{self.describe(number)}")
            return True
        writes = self._candidates[number, token]
        possible = [w for w in writes if w.tid is None and w.state != "aborted"]
        if possible:
            if len(possible) > 1:
                self.ambiguous += 1
            self._place(possible[0], tid)
            return True
        aborted = [write for write in writes if write.state == "aborted"]
        if aborted or finally_:
            self._wrong(
                f"{who}: slot {number} {tid:x} {token} was never committed; {writes}"
                f"\n{self.describe(number)}"
            )
        return bool(aborted)

    def miss(self, who, number, tid, floor, at, text):
        """A reader did not find a revision, or not even that (tid is None)."""
        self._missing.append((who, number, tid, floor, at, text))

    def pack(self, tid):
        """A pack or sweep is about to begin that may remove what is superseded up to a tid."""
        self.packed_to = max(self.packed_to, tid)

    def is_gone(self, number, tid):
        """Tell whether a revision may have been packed away."""
        following = self.slots[number].next(tid)
        return following is not None and following <= self.packed_to

    # In the end

    def finish(self):
        """Compare once more, when all writers have ended and all current revisions were seen."""
        for who, number, tid, token in self._unexplained:
            self._explain(who, number, tid, token, finally_=True)
        for look in self._looks:
            self._check_look(look)
        for who, number, tid, floor, at, text in self._missing:
            seen = at if tid is None and at is not None else tid
            if not self.is_gone(number, floor if seen is None else seen):
                self._wrong(
                    f"{who}: slot {number} misses {tid or 0:x}, view {floor:x} at {at}: {text}"
                    f"\n{self.describe(number)}"
                )
        for number, slot in self.slots.items():
            self._check_chain(number, slot)
        for write in self.writes.values():
            if write.state == "open":
                self._wrong(f"{write} never ended")
            if write.state == "committed" and write.tid is None:
                self._wrong(f"{write} was acknowledged, and nobody has seen it")

    def _check_look(self, look):
        """All that a transaction has seen was current at one time, not before it began."""
        view = look.at
        if view is None:
            view = max([look.floor, *(tid for tid, _token, _digest in look.seen.values())])
        for number, (tid, token, _digest) in look.seen.items():
            last = self.slots[number].last(view)
            if last != tid:
                self._wrong(
                    f"{look.who} {look.what}: slot {number} was {tid:x} {token} in a view of"
                    f" {view:x}, where {last or 0:x} is current: {look}"
                    f"\n{self.describe(number, view)}"
                )

    def _check_chain(self, number, slot):
        """Each revision was made from the one before."""
        for before, tid in itertools.pairwise(slot.tids):
            name, _token = slot.revisions[tid]
            change = self.writes[name].changes[number]
            _name, token = slot.revisions[before]
            if change.base_token == token and change.base_tid in (None, before):
                continue
            if self._is_beside_undo(slot, before, tid, change):
                self.lost_undos += 1
                continue
            base = f"{change.base_tid or 0:x} {change.base_token}"
            self._wrong(
                f"slot {number} {tid:x}: {name} was made from {base}, not from {before:x} {token}"
                f"\n{self.describe(number, tid)}"
            )

    def _is_beside_undo(self, slot, before, tid, change):
        """Tell whether an undo and others have not seen each other, and the base does that."""
        if not self._loses_undos:
            return False
        is_undo = self._is_undo(slot, tid)
        while before != slot.tids[0] and (is_undo or self._is_undo(slot, before)):
            before = slot.last(before - 1)
            if slot.revisions[before][1] == change.base_token:
                return change.base_tid in (None, before)
        return False

    def _is_undo(self, slot, tid):
        name, _token = slot.revisions[tid]
        return name in self.writes and self.writes[name].kind == "undo"

    def describe(self, number, tid=None):
        """Return as text what is known of a slot, at a tid or in the end."""
        slot = self.slots[number]
        place = len(slot.tids) if tid is None else bisect_right(slot.tids, tid)
        lines = []
        for each in slot.tids[max(0, place - 8) : place + 4]:
            name, token = slot.revisions[each]
            kind = self.writes[name].kind if name in self.writes else ""
            lines.append(f"  {each:x} {name} {kind} {token}")
        others = [
            f"  {write.state} {write.name} {write.kind} {write.changes[number].token} {write.why}"
            for write in list(self.writes.values())[-400:]
            if number in write.changes and write.tid is None
        ]
        return "\n".join(lines + others[-8:])


# In a worker


class Floor:
    """The highest tid that was acknowledged to any process: a file with a word for each writer."""

    def __init__(self, path, places):
        with open(path, "a+b") as file:
            file.truncate(8 * places)
            self._map = mmap.mmap(file.fileno(), 8 * places)
        self._words = memoryview(self._map).cast("Q")

    def note(self, place, tid):
        """A writer's commit was acknowledged."""
        self._words[place] = max(tid, self._words[place])

    def get(self):
        """Return the highest."""
        return max(self._words)

    def close(self):
        self._words.release()
        self._map.close()


@dataclass
class Task:
    """What a worker is to do; it can be pickled.

    :ivar int seat: whose place it has taken.
    :ivar int number: no other one's.
    :ivar database: the arguments of `open_db`.
    """

    seed: str
    seat: int
    number: int
    threads: int
    seats: int
    location: S3Location
    directory: str
    database: dict
    weights: dict
    keeps_history: bool
    is_zeo: bool
    opens_in_child: bool
    packs_alone: bool

    @contextmanager
    def alone(self, operation):
        """Hold a lock of all processes, where a pack must be alone and the base does not care.

        :param operation: fcntl.LOCK_EX to pack, fcntl.LOCK_SH to undo.
        """
        with open(f"{self.directory}/pack.lock", "a") as file:
            if self.packs_alone:
                fcntl.flock(file, operation)
            yield

    @property
    def cache_dir(self):
        return f"{self.directory}/{self.database['cache']}"

    @property
    def log(self):
        return f"{self.directory}/logs/{self.number}.log"

    def open(self):
        """Open the database; connections know what others have committed."""
        db = open_db(self.location, self.directory, **self.database)
        if self.is_zeo:
            hear_of_all(db)
            # Once more: the server may read a first question in the same turn of its loop in which
            # it has answered the writer, and what it has to say to others is for the next one.
            hear_of_all(db)
        return db

    def floor(self):
        return Floor(f"{self.directory}/floor", self.seats * (self.threads + 1))


class Wrong(Exception):
    """A discrepancy that a worker has found itself."""


class Given(Exception):
    """A turn is given up; what is the matter was said."""


class Refused(Exception):
    """The end of a transaction that was never meant to succeed."""


class Witness:
    """Takes each step of a transaction after ZODB.

    :ivar bool voted: whether all have voted for it, so that only the database knows the outcome of
        an error.
    :ivar tid: that the objects have got, or None.
    """

    transaction_manager = None

    def __init__(self, slots=(), refuse=False):
        self.voted = False
        self.tid = None
        self._slots = slots
        self._refuse = refuse

    def sortKey(self):
        return "~"

    def tpc_vote(self, txn):
        if self._refuse:
            raise Refused
        self.voted = True

    def tpc_finish(self, txn):
        for slot in self._slots:
            if slot._p_changed is not None:
                self.tid = u64(slot._p_serial)

    def abort(self, txn):
        pass

    commit = tpc_begin = tpc_abort = abort


class ToldUndo(TransactionalUndo):
    """ZODB's, and it tells the tid."""

    tid = None

    def tpc_finish(self, txn):
        def take(tid):
            self.tid = u64(tid)

        try:
            self._storage.tpc_finish(txn.data(self), take)
        finally:
            self.close()


class View:
    """A connection in a transaction, and what is seen there."""

    def __init__(self, hand, conn, floor, at):
        self.conn = conn
        self.floor = floor
        self.at = at
        self.seen = {}
        self._hand = hand
        self._slots = None

    def slot(self, number):
        """Return a slot that is loaded; what it says is noted the first time."""
        try:
            if self._slots is None:
                self._slots = self.conn.root()["slots"]
            slot = self._slots[number]
            slot._p_activate()
            if number not in self.seen and not slot._p_changed:
                self.seen[number] = u64(slot._p_serial), slot["token"], slot["digest"]
        except POSKeyError as error:
            self.miss(number, error)
        return slot

    def miss(self, number, error):
        """Say that a revision is missing, and give up."""
        tid = self.seen[number][0] if number in self.seen else None
        text = "".join(traceback.format_exception(error))
        self._hand.say("missing", self._hand.name, number, tid, self.floor, self.at, text)
        raise Given from error

    def told(self):
        """Say what was seen."""
        if self.seen:
            self._hand.say("saw", self._hand.name, self._hand.what, self.floor, self.at, self.seen)
            self.seen = {}


class Hand:
    """One thread of a worker.

    :param say: called with what the parent is to hear.
    """

    # Of all threads of the process
    _opening = threading.Lock()

    def __init__(self, task, number, db, floor, say):
        self.name = f"{task.number}.{number}"
        self.what = ""
        self.say = say
        self._task = task
        self._place = task.seat * (task.threads + 1) + number
        self._db = db
        self._floor = floor
        self._random = random.Random(f"{task.seed}/{self.name}")
        self._manager = transaction.TransactionManager()
        self._count = 0
        # Own commits, that can be undone: (tid, changes)
        self._done = deque(maxlen=40)
        chunk = SLOTS // (task.seats * task.threads) or 1
        self._own = [(self._place * chunk + n) % SLOTS for n in range(chunk)]
        # Ways to read a blob, be it committed or not, and one that is committed
        self._anywhere = [self._whole, self._whole, self._part, self._size, self._verify]
        self._everywhere = [*self._anywhere, self._whole, self._path, self._copy]

    def run(self, ending):
        """Go on until an event is set."""
        while not ending.is_set():
            self.turn()

    def turn(self, what=None):
        """Do one thing."""
        weights = self._task.weights
        what = self.what = what or self._random.choices([*weights], [*weights.values()])[0]
        begun = time.monotonic()
        try:
            getattr(self, what)()
            result = "done"
        except Given:
            result = "given up"
        except Wrong as error:
            result = "wrong"
            self.say("wrong", f"{self.name} {what}: {error}\n{traceback.format_exc()}")
        except Exception as error:
            result = type(error).__name__
            names = [cls.__name__ for cls in type(error).__mro__]
            self.say("error", self.name, what, names, traceback.format_exc())
        finally:
            self._manager.abort()
        took = time.monotonic() - begun
        self.say("turn", self.name, what, result, took)
        if result != "done" and took < 0.1:
            # As a browser that tries again.
            time.sleep(self._random.uniform(0, 0.2))

    def _chance(self, probability):
        return self._random.random() < probability

    @contextmanager
    def _view(self, at=None):
        floor = self._floor.get()
        conn = self._db.open(self._manager) if at is None else self._open_at(at)
        view = View(self, conn, floor, at)
        try:
            yield view
        except ValueError as error:
            if SAME_OID in str(error):
                # ZODB has disowned the other object, which is still referred to from its cache.
                resetCaches()
            raise
        finally:
            self._manager.abort()
            if self._chance(0.1):
                conn.cacheMinimize()
            conn.close()
            view.told()

    def _open_at(self, tid):
        # DB.open asks the storage itself, whose one connection a RelStorage does not guard.
        with self._opening:
            try:
                return self._db.open(self._manager, at=p64(tid))
            except ValueError as error:
                # A RelStorage that has not asked for a while does not know its last transactions.
                if "in the future" in str(error):
                    raise Given from error
                raise

    def _some(self, count):
        """Return numbers of slots; every second time of those that are mostly this thread's."""
        if count <= len(self._own) and self._chance(0.5):
            return self._random.sample(self._own, count)
        return self._random.sample(range(SLOTS), count)

    # Reading

    def read(self):
        """Read some slots."""
        with self._view() as view:
            numbers = self._some(self._random.choice((1, 2, 3, 6)))
            if self._chance(0.15):
                self._prefetch(view, numbers)
            for number in numbers:
                self._compare(view, number)

    def linger(self):
        """Load slots, and read their blobs some time after others may have changed them."""
        with self._view() as view:
            numbers = self._some(3)
            for number in numbers:
                view.slot(number)
            time.sleep(self._random.uniform(0.1, 2))
            for number in numbers:
                self._compare(view, number)

    def look_back(self):
        """Read slots as they were when a transaction of this thread was committed."""
        if not self._done:
            return self.read()
        tid, changes = self._random.choice(self._done)
        with self._view(tid) as view:
            for number in {*changes, *self._some(1)}:
                self._compare(view, number)

    def _prefetch(self, view, numbers):
        found = [view.slot(number)["blob"] for number in numbers]
        report = blobs.prefetch(blob for blob in found if blob is not None)
        if report.missing:
            # Who reads them knows which.
            self.say("count", "prefetch missed")

    def _compare(self, view, number, ways=None):
        """Read the blob of a slot in some way, and compare it with what the slot says."""
        slot = view.slot(number)
        blob, token = slot["blob"], slot["token"]
        if (blob is None) != (slot["digest"] == "none"):
            raise Wrong(f"slot {number} {token} has {blob!r}")
        if blob is None:
            return
        way = self._random.choice(ways or self._everywhere)
        try:
            way(blob, token, slot["digest"])
        except POSKeyError as error:
            view.miss(number, error)

    def _equal(self, data, token, digest, blob):
        if digest_of(data) != digest:
            raise Wrong(
                f"{token} has {whose(data)}, not {whose(content(token))}: oid {u64(blob._p_oid):x}"
                f" serial {u64(blob._p_serial):x}"
            )

    def _whole(self, blob, token, digest):
        with blob.open() as file:
            self._equal(file.read(), token, digest, blob)

    def _copy(self, blob, token, digest):
        with blob.open("c") as file:
            self._equal(file.read(), token, digest, blob)

    def _path(self, blob, token, digest):
        for _attempt in range(100):
            path = blob.committed()
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except FileNotFoundError:  # a path promises nothing
                continue
            return self._equal(data, token, digest, blob)
        raise Wrong(f"{token} was evicted again and again")

    def _part(self, blob, token, digest):
        expected = content(token)
        start = self._random.randrange(len(expected) + 1)
        stop = self._random.choice((None, start + 10, start + 100_000))
        with blobs.open_range(blob, start, stop) as file:
            data = file.read()
        if data != expected[start:stop]:
            raise Wrong(f"{token} from {start} to {stop} has {whose(data)}")

    def _verify(self, blob, token, digest):
        if not blobs.verify(blob):
            raise Wrong(f"{token} was damaged in the cache: serial {u64(blob._p_serial):x}")

    def _size(self, blob, token, digest):
        size = blobs.size(blob)
        if size != len(content(token)):
            raise Wrong(f"{token} has size {size}")

    # Writing

    def write(self):
        """Change some slots, perhaps with savepoints, and commit it, or do not."""
        with self._view() as view:
            plan = {}
            for number in self._some(self._random.choice((1, 1, 1, 2, 3, 4))):
                self._change(view, number, plan)
            if self._chance(0.25):
                self._change_after_savepoint(view, plan)
            if self._chance(0.3):
                self._compare_plan(view, plan)
            if self._chance(0.08):
                return  # abort
            self._commit(view, plan, refuse=self._chance(0.06))

    def _change_after_savepoint(self, view, plan):
        savepoint, before = self._manager.savepoint(), dict(plan)
        for number in self._some(self._random.choice((1, 2))):
            self._change(view, number, plan)
        if self._chance(0.3):
            self._compare_plan(view, plan)
        if self._chance(0.5):
            savepoint.rollback()
            plan.clear()
            plan.update(before)

    def _compare_plan(self, view, plan):
        """A transaction reads what it has written."""
        for number, change in plan.items():
            slot = view.slot(number)
            if slot["token"] != change.token:
                raise Wrong(f"slot {number} has {slot['token']}, not {change.token} as was written")
            self._compare(view, number, self._anywhere)

    def _change(self, view, number, plan):
        slot = view.slot(number)
        if number in plan:
            base = plan[number].base_tid, plan[number].base_token
        else:
            base = u64(slot._p_serial), slot["token"]
        before = slot["token"]
        self._count += 1
        name = f"{self.name}.{self._count}/{number}"
        if slot["blob"] is None:
            token = self._create(slot, name)
        else:
            ways = [self._overwrite] * 4 + [self._consume, self._delete]
            if "|" not in before:
                ways += [self._append, self._patch, self._cut]
            try:
                token = self._random.choice(ways)(slot, name, before)
            except POSKeyError as error:
                view.miss(number, error)
        data = content(token)
        slot["token"], slot["digest"] = token, digest_of(data)
        plan[number] = Change(*base, token, slot["digest"])

    def _new(self, name):
        size = self._random.choices(*zip(*self._sizes, strict=True))[0]
        token = f"{name}:w{size}"
        return token, content(token)

    _sizes = (
        (0, 3),
        (1, 2),
        (100, 8),
        (5000, 8),
        (70_000, 6),
        (300_000, 2),
        (1_200_000, 1),
        (3_000_000, 0.6),
        (6_000_000, 0.1),
    )

    def _create(self, slot, name):
        token, data = self._new(name)
        slot["blob"] = Blob(data)
        return token

    def _overwrite(self, slot, name, before):
        token, data = self._new(name)
        with slot["blob"].open("w") as file:
            file.write(data[: len(data) // 2])
            file.write(data[len(data) // 2 :])
        return token

    def _consume(self, slot, name, before):
        token, data = self._new(name)
        handle, path = tempfile.mkstemp(dir=self._task.directory)
        with open(handle, "wb") as file:
            file.write(data)
        try:
            slot["blob"].consumeFile(path)
        finally:
            with suppress(FileNotFoundError):
                os.remove(path)
        return token

    def _delete(self, slot, name, before):
        slot["blob"] = None
        return f"{name}:-"

    def _append(self, slot, name, before):
        own = f"{name}:a{self._random.choice((1, 1000))}"
        with slot["blob"].open("a") as file:
            file.write(random_bytes(own, int(own.rpartition(":a")[2])))
        return f"{own}|{before}"

    def _patch(self, slot, name, before):
        own = f"{name}:p50"
        with slot["blob"].open("r+") as file:
            file.write(random_bytes(own, 50))
        return f"{own}|{before}"

    def _cut(self, slot, name, before):
        size = self._random.randrange(len(content(before)) + 1)
        with slot["blob"].open("r+") as file:
            file.truncate(size)
        return f"{name}:t{size}|{before}"

    def _commit(self, view, plan, refuse):
        name = f"{self.name}.{self._count}"
        slots = [view.slot(number) for number in plan]
        view.told()
        witness = Witness(slots, refuse)
        txn = self._manager.get()
        txn.join(witness)
        txn.note(name)
        if self._settle(name, "refused" if refuse else "write", plan, witness):
            self._end(name, witness.tid, plan)

    def undo(self):
        """Undo transactions of this thread, also undos."""
        if not self._done:
            return self.read()
        recent = list(self._done)[-6:]
        chosen = [self._random.choice(recent)]
        if self._chance(0.2):
            other = self._random.choice(recent)
            if not other[1].keys() & chosen[0][1].keys():
                chosen.append(other)
        self._count += 1
        name = f"{self.name}.{self._count}"
        plan = {
            number: Change(
                None, change.token, change.base_token, digest_of(content(change.base_token))
            )
            for _tid, changes in chosen
            for number, change in changes.items()
        }
        witness = Witness()
        undo = ToldUndo(self._db, [encodebytes(p64(tid))[:-1] for tid, _changes in chosen])
        txn = self._manager.get()
        txn.join(undo)
        txn.join(witness)
        txn.note(name)
        with self._task.alone(fcntl.LOCK_SH):
            if self._settle(name, "undo", plan, witness):
                self._end(name, undo.tid, plan)

    def _settle(self, name, kind, plan, witness):
        """Commit, and say how that ended; return whether it succeeded."""
        self.say("intent", name, kind, plan)
        try:
            self._manager.commit()
        except Refused:
            self.say("aborted", name, "refused")
            return False
        except Exception as error:
            self.say("lost" if witness.voted else "aborted", name, repr(error)[:200])
            raise
        return True

    def _end(self, name, tid, plan):
        if tid is not None:
            self._floor.note(self._place, tid)
            self._done.append((tid, plan))
        self.say("committed", name, tid)

    # Maintenance

    def pack(self):
        """Pack to now, or to a moment ago."""
        moment = time.time() - self._random.choice((0, 5, 20))
        self.say("packs", tid_of(moment if self._task.keeps_history else time.time()))
        with self._task.alone(fcntl.LOCK_EX):
            self._db.pack(moment)

    def sweep(self):
        """Sweep, or count what would go."""
        if not self._task.keeps_history:
            self.say("packs", tid_of(time.time()))
        report = self._db.storage.sweep(dry_run=self._chance(0.3))
        if report.foreign:
            self.say("count", "sweep met foreign keys")
        if report.failed:
            raise Wrong(f"sweep failed: {vars(report)}")


def tid_of(moment):
    """Return a time, in seconds since the epoch, as a tid."""
    stamp = TimeStamp(*time.gmtime(moment)[:5], moment % 60)
    return u64(stamp.raw())


class Worker:
    """A process with the database open."""

    def __init__(self, pipe, task):
        self._pipe = pipe
        self._task = task
        self._saying = threading.Lock()

    def say(self, *message):
        with self._saying:
            self._pipe.send(message)

    def run(self):
        """Work until the pipe says that it is enough, and look at what remains open."""
        before = census()
        floor = self._task.floor()
        db = self._task.open()
        self.say("opened", os.getpid())
        hands = [Hand(self._task, n, db, floor, self.say) for n in range(self._task.threads)]
        ending = threading.Event()
        threads = [
            threading.Thread(target=hand.run, args=(ending,), name=f"hand {hand.name}")
            for hand in hands
        ]
        for thread in threads:
            thread.start()
        while (command := self._pipe.recv()) != "end":
            if command == "fork":
                self._fork(db, floor)
        ending.set()
        for thread in threads:
            thread.join()
        numbers = db.storage.stats()
        db.close()
        floor.close()
        del db, hands, threads
        self.say("closed", left_open(before), numbers)

    def _fork(self, db, floor):
        """Let a child do something, with what it inherits or by itself."""
        reading, writing = multiprocessing.Pipe(duplex=False)
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                die_with(parent)
                self._be_child(writing.send, db, floor)
            except BaseException:
                writing.send(("wrong", f"a child of {self._task.number}: {traceback.format_exc()}"))
            finally:
                os._exit(0)
        writing.close()
        deadline = time.monotonic() + 60
        while True:
            if not reading.poll(max(0, deadline - time.monotonic())):
                os.kill(pid, signal.SIGUSR1)  # its stacks, into the log
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
                self.say(
                    "wrong", f"a child of {self._task.number} hangs: {tail(self._task.log, 8000)}"
                )
                break
            try:
                message = reading.recv()
            except EOFError:
                break
            self.say(*message)
        reading.close()
        os.waitpid(pid, 0)
        self.say("count", "forks")

    def _be_child(self, say, db, floor):
        signal.alarm(70)
        # As a process that was forked off goes on with the parent's cache and counts.
        db.storage.stats()
        with closing(S3BlobCache(self._task.cache_dir, self._task_cache_size())) as cache:
            cache.current_size()
        if self._task.opens_in_child:
            own = self._task.open()
            number = self._task.threads
            hand = Hand(self._task, number, own, floor, lambda *args: say(args))
            hand.name += f"f{os.getpid()}"
            for what in ("read", "write", "read", "write"):
                hand.turn(what)
            own.close()

    def _task_cache_size(self):
        return int(self._task.database["cache_size"])


def die_with(parent):
    """Let this process be killed when its parent dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, linux/prctl.h
    if os.getppid() != parent:
        os._exit(1)


def census():
    """Return what this process has open, a Counter."""
    found = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing
            target = os.readlink(f"/proc/self/fd/{number}")
            found[re.sub(r"^(socket|pipe|anon_inode):.*", r"\1", target)] += 1
    return found


def left_open(before, patience=20):
    """Return what is still open, files and threads, some time after all was closed."""
    deadline = time.monotonic() + patience
    while True:
        gc.collect()
        threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
        files = dict(census() - before)
        if not (threads or files) or time.monotonic() > deadline:
            return [*threads, *(f"{name} {count}" for name, count in files.items())]
        time.sleep(0.1)


def serve(pipe, task):
    """Be a worker."""
    with open(task.log, "a") as log:
        faulthandler.enable(log)
        faulthandler.register(signal.SIGUSR1, log)
        form = "%(asctime)s %(levelname)s %(name)s %(threadName)s: %(message)s"
        logging.basicConfig(stream=log, level=logging.WARNING, format=form, force=True)
        logging.getLogger("zodb_s3blobs").setLevel(logging.INFO)
        tempfile.tempdir = f"{task.directory}/system"
        try:
            Worker(pipe, task).run()
        except (EOFError, BrokenPipeError):
            os._exit(1)  # whoever started us has gone
        except BaseException:
            pipe.send(("wrong", f"worker {task.number} failed: {traceback.format_exc()}"))
            raise


# The bases


class Stack:
    """A base storage, its server if it has one, and who may use it.

    :ivar int seats: processes at a time.
    :ivar bool opens_in_child: whether a forked child can open the database once more.
    :ivar bool packs_alone: whether users must see to it that a pack is alone.
    :ivar bool loses_undos: as a `Model` takes it.
    :ivar section: the ZConfig text of the base.
    """

    seats, threads = 3, 2
    imports = ()
    options = {}
    keeps_history = True
    opens_in_child = True
    is_zeo = False
    packs_alone = False
    loses_undos = False
    small_grace = f"{GRACE}s"

    def __init__(self, directory):
        self.directory = directory

    def start(self, exits):
        """Start what it needs, which ends with an ExitStack."""

    def disturb(self, chance):
        """Do something to the server, and return what was done, or None."""


class InOneProcess(Stack):
    """A FileStorage by tid."""

    seats, threads = 1, 6
    opens_in_child = False  # the file is locked
    small_grace = "0"

    @property
    def section(self):
        return filestorage(self.directory)

    def references(self):
        return _references(f"{self.directory}/Data.fs")


class ByRecord(InOneProcess):
    """A FileStorage by record."""

    options = {"addressing": "record"}


def _references(path):
    with closing(FileStorage(path, read_only=True)) as storage:
        return {
            blob_key(record.oid, read_reference(record.data) or record.tid)
            for txn in storage.iterator()
            for record in txn
            if record.data and is_blob_record(record.data)
        }


class OnSqlite(Stack):
    """RelStorage over SQLite."""

    imports = ("relstorage",)
    # Its pack lock does nothing (relstorage/adapters/sqlite/locker.py).
    packs_alone = True
    # SQLite's locks do not survive a fork.
    opens_in_child = False

    def start(self, exits):
        place = Path(self.directory, "sqlite3")
        place.mkdir()
        self.database = Database("sqlite3", str(place), self.keeps_history)

    @property
    def section(self):
        # Seen with RelStorage 4.3 alone, without blobs: its cache now and then gives a reader an
        # older record than it has seen already.
        return self.database.section.replace("<relstorage>", "<relstorage>\ncache-local-mb 0")

    def references(self):
        return set(self.database.blobs().values())


class OnPostgresql(OnSqlite):
    """RelStorage over PostgreSQL."""

    opens_in_child = True
    packs_alone = False
    # Seen with RelStorage 4.3 alone, without blobs: an undo waits for the commit lock after it has
    # looked for conflicts, and locks no rows.
    loses_undos = True

    def start(self, exits):
        # Its socket needs a short path, and another user must be able to enter.
        place = exits.enter_context(tempfile.TemporaryDirectory(prefix="postgresql-", dir="/tmp"))
        server = exits.enter_context(PostgresqlServer(place))
        self.database = Database("postgresql", server.new_database(), self.keeps_history)


class OnSqliteFree(OnSqlite):
    keeps_history = False


class OnPostgresqlFree(OnPostgresql):
    keeps_history = False


class OverZeo(Stack):
    """Clients of a ZEO server."""

    is_zeo = True

    def start(self, exits):
        directory = Path(self.directory, "zeo")
        self._server = exits.enter_context(ZeoServer(directory, FILE.format(name="main")))
        self.database = ZeoDatabase(self._server, "main")

    @property
    def section(self):
        return self.database.section

    def references(self):
        return set(self.database.blobs().values())

    def disturb(self, chance):
        self._server.kill()
        time.sleep(chance.uniform(0, 1.5))
        self._server.start()
        return "ZEO server killed"


STACKS = {
    "filestorage": InOneProcess,
    "record": ByRecord,
    "relstorage": OnPostgresql,
    "relstorage-free": OnPostgresqlFree,
    "sqlite": OnSqlite,
    "sqlite-free": OnSqliteFree,
    "zeo": OverZeo,
}


# In the parent


@dataclass
class Phase:
    """A part of the run, after which all workers end in good order.

    :ivar float part: of the time.
    :ivar bool is_rough: whether workers are killed and caches damaged.
    """

    name: str
    part: float
    grace: str
    is_rough: bool = True


@dataclass
class Seat:
    """A worker and what is known of it."""

    task: Task
    process: object
    pipe: object
    heard: float = field(default_factory=time.monotonic)
    is_open: bool = False
    is_closed: bool = False
    is_stopped: bool = False


# Faults that are met now and then, and those that come in storms
OFTEN = ("error", "cut_up", "lose_answer", "cut_down", "cut_head")
STORMS = ("stall", "silence")
CALM = {}
WEATHERS = (
    (3, lambda r: CALM),
    (6, lambda r: dict.fromkeys(OFTEN, r.uniform(0, 0.05))),
    (1, lambda r: {"error": r.uniform(0.5, 1)}),
    (1.5, lambda r: {"refuse": 1}),
    (1, lambda r: dict.fromkeys(STORMS, 0.2)),
    (1, lambda r: {"damage": 0.3}),
    (1, lambda r: {"delay_ms": r.uniform(50, 400)}),
    (1, lambda r: {"lose_answer": 0.3, "cut_up": 0.3, "cut_down": 0.1}),
)
# Defects that wait to be mended: in the class and text of an error, where this fault was there.
KNOWN = {
    # None: of a part no digest is verified, not even when it is the whole.
    "a part was damaged on its way": (r"Wrong: \S+ from \d+ to \S+ has ", "damage"),
}
# ZODB's: when an uncommitted file is gone, its abort stops in the middle, and objects that
# were changed stay so.
SPARED = "tmp"
# Numbers of the storage that the summary has, of those workers that were not killed
COUNTED = (
    "requests_total",
    "retries_total",
    "evictions_total",
    "downloads_total",
    "spooled_total",
    "spool_uploads_total",
)
# Entries of the log that are no news; each with the reason.
EXPECTED_IN_LOG = (
    # Whoever wanted the object has said so, and the model knows whether it had to be there.
    r"ERROR ZODB\.Connection .*: Couldn't load state for .*(POSKeyError|ClientDisconnected): ",
    # The errors come here by themselves, too.
    r"ERROR ZODB\.DB .*: packing\b",
    # Somebody has removed the cache's directory, with what was staged there: it is refused.
    r"ERROR zodb_s3blobs\.uploading .*: nothing can be spooled: .* No such file .*/cache-\w+/",
    r"ERROR ZEO\.asyncio\.client .* from server: ZODB\.POSException\.(Multiple)?Undo",
    r"ERROR ZEO\.asyncio\.client .* Exception for prefetch .*ClientDisconnected: ",
    r"CRITICAL txn\..*: A storage error occurred during the second phase",
    # ZODB's, after a savepoint that failed.
    r"ERROR txn\..*: Error in tpc_abort\(\) on .*, in savepoint\n.*raise KeyError\(ob\)",
    # ZODB's, after an undo whose end failed.
    r"ERROR txn\..*: Error in tpc_abort\(\) on .*Undo object.*'NoneType' .* 'tpc_abort'",
)


class Soak:
    """One run.

    :param str stack: a name of `STACKS`.
    :param float seconds: how long the workers work; to begin and to compare takes some more.
    :param str directory: exists and is empty.
    :param options: further keys of the workers' <s3blobstorage>, with "{directory}" and "{host}".
    :ivar problems: texts of all discrepancies.
    :ivar counts: of what was done, by name.
    :ivar location: of the bucket.
    """

    def __init__(self, stack, seed, seconds, directory, options=None, log=lambda text: None):
        self.problems = []
        self.counts = Counter()
        self.slowest = {}
        self._stack_name, self._seed, self._seconds = stack, seed, seconds
        self._directory = str(directory)
        self._random = random.Random(f"{stack}/{seed}")
        self._stack = STACKS[stack](self._directory)
        self.model = Model(self.wrong, self._stack.loses_undos)
        self._cache_size = self._random.choice((2, 4, 8)) * MiB
        self._options = {**QUICK, **self._stack.options, "cache_size": self._cache_size}
        # In a short run all goes faster, so that there is some of everything.
        self._is_short = seconds < SHORT
        self._unit = 0.15 if self._is_short else 1
        if self._is_short:
            self._options["s3_read_timeout"] = "1s"
        # Of the workers; in their values "{directory}" and "{host}" are replaced.
        self._further = options or {}
        self._log = log
        self._numbers = itertools.count(1)
        self._seats = {}
        self._begun = time.monotonic()
        self._events = deque(maxlen=60)
        # When a fault was there last, by name; of the monotonic clock
        self._last = defaultdict(lambda: -1e9)
        self._largest = 0
        self._before = {}
        # The weather
        self._values = CALM

    # Saying

    def note(self, text):
        """Write down what happens."""
        line = f"{time.monotonic() - self._begun:8.2f} {text}"
        self._events.append(line)
        self._log(line)

    def wrong(self, text):
        """Write down a discrepancy."""
        self.problems.append(text)
        self.note(f"WRONG {text}")
        if len(self.problems) == 1:
            self._log("what happened before:\n" + "\n".join(self._events))

    def summary(self):
        """Return what was done, as text."""
        writes = Counter(
            f"{write.kind} {write.state}" + ("" if write.state != "lost" else f" {write.why[:40]}")
            for write in self.model.writes.values()
        )
        parts = {
            "": self.counts,
            "write ": writes,
            "fault ": self._faults,
        }
        lines = [
            f"{prefix}{name:50}{count:8}"
            for prefix, counts in parts.items()
            for name, count in sorted(counts.items())
        ]
        lines += [f"slowest {what:20}{took:8.1f} s" for what, took in sorted(self.slowest.items())]
        lines += [
            f"largest cache: {self._largest} of {self._cache_size} bytes",
            f"undos that the base has let collide: {self.model.lost_undos}",
            f"undos of which it is not sure which: {self.model.ambiguous}",
            f"stack {self._stack_name} seed {self._seed} seconds {self._seconds:.0f}"
            f" problems {len(self.problems)}",
        ]
        return "\n".join(lines)

    # Running

    def run(self):
        """Do all of it; problems are in ``problems``."""
        for name in ("logs", "system", "s3"):
            os.makedirs(f"{self._directory}/{name}")
        with ExitStack() as exits:
            self._stack.start(exits)
            server = exits.enter_context(EmbeddedS3(f"{self._directory}/s3"))
            self.location = new_bucket(server)
            self._proxy = exits.enter_context(FaultProxy(server.endpoint_url, self._seed))
            self._outside = replace(self.location, endpoint_url=self._proxy.endpoint_url)
            exits.callback(self._kill_all)
            self._set_up()
            for phase in self._phases():
                self._run_phase(phase)
            self._look_for_leftovers()
            self._drain()
            self._faults = self._proxy.counts()
            self._proxy.stop()
            self.heal()
            self._audit()
        self._look_at_logs()
        return self

    def heal(self):
        """Workers and proxy have ended; what a test of this file does wrong, it does here."""

    def _phases(self):
        large = "1h"
        if self._is_short:
            grace = self._stack.small_grace
            return [Phase("short", 0.8, grace), Phase("quiet", 0.2, grace, is_rough=False)]
        return [
            Phase("large grace", 0.45, large),
            Phase("small grace", 0.4, self._stack.small_grace),
            Phase("quiet", 0.15, self._stack.small_grace, is_rough=False),
        ]

    def _database(self, cache, **options):
        return {
            "cache": cache,
            "imports": self._stack.imports,
            "base": self._stack.section,
            **self._options,
            **options,
        }

    def _of_host(self, host):
        values = {"directory": self._directory, "host": host}
        return {key: str(value).format(**values) for key, value in self._further.items()}

    def _open(self, cache, location=None, **options):
        """Open the database in this process, past the proxy unless another location is given."""
        place = location or self.location
        db = open_db(place, self._directory, **self._database(cache, **options))
        if self._stack.is_zeo:
            hear_of_all(db)
        return db

    def _set_up(self):
        with closing(self._open("setup")) as db:
            with db.transaction() as conn:
                slots = conn.root()["slots"] = PersistentList()
                for number in range(SLOTS):
                    token = f"setup/{number}:-"
                    slot = PersistentMapping(blob=None, token=token, digest="none")
                    slots.append(slot)
            with db.transaction() as conn:
                for number, slot in enumerate(conn.root()["slots"]):
                    slot._p_activate()
                    self.model.set_up(number, u64(slot._p_serial), slot["token"])

    def _task(self, seat, grace):
        # The last one is on another host.
        host = "b" if seat and seat == self._stack.seats - 1 else "a"
        weights = {"read": 10, "write": 10, "linger": 1, "pack": 0.15, "sweep": 0.15}
        if self._stack.keeps_history:
            weights |= {"undo": 2, "look_back": 2}
        return Task(
            seed=f"{self._stack_name}/{self._seed}",
            seat=seat,
            number=next(self._numbers),
            threads=self._stack.threads,
            seats=self._stack.seats,
            location=self._outside,
            directory=self._directory,
            database=self._database(f"cache-{host}", gc_grace=grace, **self._of_host(host)),
            weights=weights,
            keeps_history=self._stack.keeps_history,
            is_zeo=self._stack.is_zeo,
            opens_in_child=self._stack.opens_in_child,
            packs_alone=self._stack.packs_alone,
        )

    # A server that has imported everything forks them off.
    _context = multiprocessing.get_context("forkserver")
    _context.set_forkserver_preload([__name__])

    def _start(self, seat, grace):
        task = self._task(seat, grace)
        pipe, other = self._context.Pipe()
        process = self._context.Process(target=serve, args=(other, task), daemon=True)
        process.start()
        other.close()
        self._seats[seat] = Seat(task, process, pipe)
        self.note(f"worker {task.number} in seat {seat}: pid {process.pid}")

    def _kill_all(self):
        for seat in self._seats.values():
            seat.process.kill()
            seat.process.join()
            seat.pipe.close()
        self._seats.clear()

    def _run_phase(self, phase):
        self.note(f"phase {phase.name}, gc-grace {phase.grace}")
        self._phase = phase
        self._quiet_since = time.time()
        self._ending = False
        for seat in range(self._stack.seats):
            self._start(seat, phase.grace)
        end = time.monotonic() + self._seconds * phase.part
        agenda = []
        for number, (action, mean) in enumerate(self._agenda(phase)):
            heapq.heappush(agenda, (self._soon(mean), number, mean, action))
        while time.monotonic() < end and len(self.problems) < 20:
            self._listen(min(agenda[0][0], end) - time.monotonic())
            self._look_at_caches()
            while agenda[0][0] <= time.monotonic():
                _when, number, mean, action = heapq.heappop(agenda)
                action()
                heapq.heappush(agenda, (self._soon(mean), number, mean, action))
        self._weather(CALM)
        self._end_workers()

    def _soon(self, mean):
        return time.monotonic() + self._random.uniform(0.3, 1.7) * mean

    def _agenda(self, phase):
        """Yield actions and the seconds between them, in the mean."""
        unit = self._unit
        yield self._change_weather, 2.5 * unit
        if phase.is_rough:
            yield self._kill_one, 9 * unit
            yield self._fork_one, 11 * unit
            yield self._spoil_a_cache, 16 * unit
            if phase.grace != f"{GRACE}s":
                yield self._stop_one, 17 * unit
            if self._stack.is_zeo:
                yield self._disturb, 21 * unit

    # What is done to the others

    def _weather(self, values):
        self._proxy.set(**values)
        self._last.update(dict.fromkeys({*values, *self._values}, time.monotonic()))
        self._values = values

    def _change_weather(self):
        chances, kinds = zip(*WEATHERS, strict=True)
        values = self._random.choices(kinds, chances)[0](self._random)
        self.note(f"weather {values}")
        self._weather(values)

    def _one(self):
        there = [seat for seat in self._seats.values() if seat.is_open and not seat.is_stopped]
        return self._random.choice(there) if there else None

    def _kill_one(self):
        seat = self._one()
        if seat is None:
            return
        self.note(f"kill worker {seat.task.number}")
        self.counts["kills"] += 1
        seat.process.kill()
        seat.process.join()
        self._bury(seat, "killed")
        self._last["kill"] = time.monotonic()
        self._start(seat.task.seat, self._phase.grace)

    def _bury(self, seat, why):
        with suppress(EOFError, OSError):
            while seat.pipe.poll(0):
                self._hear(seat, seat.pipe.recv())
        seat.pipe.close()
        self.model.lose_all(f"{seat.task.number}.", why)

    def _fork_one(self):
        seat = self._one()
        if seat is not None:
            with suppress(OSError):
                seat.pipe.send("fork")

    def _stop_one(self):
        seat = self._one()
        if seat is None:
            return
        seconds = self._random.uniform(0.5, 5) * self._unit
        self.note(f"stop worker {seat.task.number} for {seconds:.1f} s")
        self.counts["stops"] += 1
        os.kill(seat.process.pid, signal.SIGSTOP)
        seat.is_stopped = True

        def go_on():
            os.kill(seat.process.pid, signal.SIGCONT)
            seat.is_stopped = False

        # A thread of its own: this one may be waiting for the rest of a message.
        threading.Timer(seconds, go_on).start()

    def _disturb(self):
        done = self._stack.disturb(self._random)
        self.note(done)
        self.counts[done] += 1
        self._last["server"] = time.monotonic()

    def _spoil_a_cache(self):
        directory = self._random.choice(self._caches())
        ways = (self._remove_all, self._remove_some, self._lose_index, self._damage_index)
        way = self._random.choice(ways)
        self.note(f"{way.__name__} {directory}")
        self.counts[f"cache: {way.__name__}"] += 1
        with suppress(FileNotFoundError):
            way(directory)
        self._last["cache"] = time.monotonic()

    def _caches(self):
        return sorted({seat.task.cache_dir for seat in self._seats.values()})

    def _remove_all(self, directory):
        for path in Path(directory).iterdir():
            if path.is_dir() and path.name != SPARED:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != SPARED:
                path.unlink(missing_ok=True)

    def _remove_some(self, directory):
        for name in committed(directory):
            if self._random.random() < 0.5:
                with suppress(FileNotFoundError):
                    oid = name.partition(".")[0]
                    os.remove(f"{directory}/{oid[-3:]}/{name}")

    def _lose_index(self, directory):
        os.remove(f"{directory}/index.sqlite")

    def _damage_index(self, directory):
        path = f"{directory}/index.sqlite"
        size = os.path.getsize(path)
        with open(path, "r+b") as file:
            if self._random.random() < 0.3:
                file.truncate(size // 2)
            else:
                file.seek(self._random.choice((0, size // 2)))
                file.write(random_bytes(self._random.random(), 2000))

    # Listening

    def _listen(self, seconds):
        """Hear what workers say, for so long or until nobody says anything any more."""
        places = {}
        for seat in self._seats.values():
            if not seat.is_closed:
                places[seat.pipe] = places[seat.process.sentinel] = seat
        ready = wait(list(places), max(0, min(seconds, 0.3)))
        for seat in {id(places[each]): places[each] for each in ready}.values():
            with suppress(EOFError, OSError):
                for _message in range(500):
                    if not seat.pipe.poll(0):
                        break
                    self._hear(seat, seat.pipe.recv())
            if seat.process.exitcode is not None and not seat.is_closed:
                self._mourn(seat)
        for seat in self._seats.values():
            if seat.is_stopped:
                seat.heard = time.monotonic()
            if not seat.is_closed and time.monotonic() - seat.heard > LONGEST_SILENCE:
                self._end_silent(seat)

    def _mourn(self, seat):
        """A worker has died by itself."""
        self.wrong(
            f"worker {seat.task.number} ended with {seat.process.exitcode}: {tail(seat.task.log)}"
        )
        self._bury(seat, "died")
        if self._ending:
            seat.is_closed = True
        else:
            self._start(seat.task.seat, self._phase.grace)

    def _end_silent(self, seat):
        os.kill(seat.process.pid, signal.SIGUSR1)
        time.sleep(1)
        self.wrong(f"worker {seat.task.number} hangs: {tail(seat.task.log, 20000)}")
        seat.process.kill()
        seat.process.join()
        self._bury(seat, "hung")
        if self._ending:
            seat.is_closed = True
        else:
            self._start(seat.task.seat, self._phase.grace)

    def _hear(self, seat, message):
        seat.heard = time.monotonic()
        kind, *rest = message
        getattr(self, f"_hear_{kind}")(seat, *rest)

    def _hear_opened(self, seat, pid):
        seat.is_open = True

    def _hear_closed(self, seat, left, numbers):
        seat.is_closed = True
        if left:
            self.wrong(f"worker {seat.task.number} has left open: {left}")
        for name in COUNTED:
            self.counts[f"stats: {name} of those that closed"] += int(numbers.get(name) or 0)

    def _hear_count(self, seat, what):
        self.counts[what] += 1

    def _hear_turn(self, seat, name, what, result, took):
        self.counts[f"turn: {what} {result}"] += 1
        self.slowest[what] = max(took, self.slowest.get(what, 0))

    def _hear_wrong(self, seat, text):
        if not self._is_known(text):
            self.wrong(text)

    def _hear_intent(self, seat, name, kind, changes):
        self.model.begin(name, kind, changes)

    def _hear_committed(self, seat, name, tid):
        self.model.commit(name, tid)

    def _hear_aborted(self, seat, name, why):
        self.model.abort(name, why)

    def _hear_lost(self, seat, name, why):
        self.note(f"{name} is lost: {why}")
        self.model.lose(name, why)

    def _hear_saw(self, seat, name, what, floor, at, seen):
        self.model.see(Look(name, what, floor, at, seen))

    def _hear_missing(self, seat, *args):
        self.counts["missing, superseded and packed away"] += 1
        self.model.miss(*args)

    def _hear_packs(self, seat, tid):
        self.model.pack(tid)

    def _hear_error(self, seat, name, what, classes, text):
        if not self._is_known(text) and not self._is_expected(what, classes, text):
            self.wrong(f"{name} {what} raised {classes[0]}: {text}")

    def _is_known(self, text):
        """Tell whether an error is a known defect, and count it."""
        for defect, (pattern, fault) in KNOWN.items():
            if re.search(pattern, text.strip()) and (not fault or fault in self._recent()):
                self.counts[f"known: {defect}"] += 1
                return True
        return False

    def _recent(self):
        """Return the names of what may still be the reason of an error."""
        since = time.monotonic() - AFTERMATH
        return {name for name, when in self._last.items() if when > since}

    def _is_expected(self, what, classes, text):
        """Tell whether what is going on explains an error."""
        recent = self._recent()
        explained = {
            "ConflictError": True,
            "UndoError": True,
            "NotUploadedError": "spool_dir" in self._further,
            # With the time-out of a short run it is enough that the machine is busy.
            "TransientS3Error": self._is_short
            or bool(recent & {"refuse", "delay_ms", "damage", *OFTEN, *STORMS}),
            "ClientDisconnected": "server" in recent,
            "IntegrityError": "damage" in recent,
            # Of the mark, which cannot be read then; to refuse is the safe side.
            "OtherDatabaseError": "damage" in recent,
            "FileNotFoundError": "cache" in recent,
            # Of the base, where a transaction was packed away that is undone or committed.
            "POSKeyError": bool(self.model.packed_to) and what in ("undo", "write"),
            "UnableToAcquirePackUndoLockError": what in ("pack", "undo"),
        }
        texts = {
            # It takes too long for the short grace period.
            "gc-grace": True,
            # A ZEO server's
            "ZODB.POSException.UndoError": True,
            "lready packing": what == "pack",
            # A FileStorage's own (seen without blobs), when others undo meanwhile.
            "fspack": what == "pack",
            # Clients keep oids in stock that a server gives out again after it was killed.
            SAME_OID: self._last["server"] > 0,
        }
        by_text = any(there for part, there in texts.items() if part in text)
        return by_text or next((explained[name] for name in classes if name in explained), False)

    def _end_workers(self):
        """Let all workers end in good order."""
        self._ending = True
        for seat in self._seats.values():
            with suppress(OSError):
                seat.pipe.send("end")
        deadline = time.monotonic() + LONGEST_END
        while not all(seat.is_closed for seat in self._seats.values()):
            self._listen(0.3)
            if time.monotonic() > deadline:
                for seat in self._seats.values():
                    if not seat.is_closed:
                        self._end_silent(seat)
        for seat in self._seats.values():
            seat.process.join(20)
            if seat.process.exitcode is None:
                self._end_silent(seat)
            elif seat.process.exitcode:
                self.wrong(f"worker {seat.task.number} ended with {seat.process.exitcode}")
        self._cache_dirs = self._caches()
        self._kill_all()

    # Looking

    def _look_at_caches(self):
        """What two looks in a row have seen unchanged was there together."""
        for directory in self._caches():
            now = committed(directory)
            both = now.items() & self._before.get(directory, {}).items()
            size = sum(status[0] for _name, status in both)
            self._before[directory] = now
            self._largest = max(self._largest, size)
            if size > self._cache_size:
                self.wrong(f"{directory} has {size} bytes of {self._cache_size}")

    def _look_for_leftovers(self):
        """After the last phase, in which nobody was killed, nothing temporary is left."""
        places = [f"{self._directory}/system"]
        for directory in self._cache_dirs:
            places += [f"{directory}/tmp", f"{directory}/process"]
        for path in itertools.chain.from_iterable(Path(place).rglob("*") for place in places):
            if not path.is_file() or path.suffix == ".lock":
                continue
            if path.stat().st_ctime < self._quiet_since:
                continue
            self.wrong(f"a temporary file is left: {path} {path.stat()}")

    def _drain(self):
        """Let what is in spools go into the bucket; nothing may stay there."""
        if "spool_dir" not in self._further:
            return
        for host in sorted({path[-1] for path in self._cache_dirs}):
            options = self._of_host(host)
            with closing(self._open("drain", self._outside, **options)) as db:
                deadline = time.monotonic() + AFTERMATH
                while db.storage.stats()["spool_blobs"] and time.monotonic() < deadline:
                    with suppress(TransientError):  # S3 is known to be down, for a while
                        db.storage.drain_spool()
                    time.sleep(0.1)
            for path in Path(options["spool_dir"]).rglob("*"):
                if path.is_file() and path.name != "bucket":
                    self.wrong(f"{path} is left in the spool")

    def _audit(self):
        """Compare everything, through an empty cache and past the proxy."""
        self._wait_for_bucket()
        with closing(self._open("audit", gc_grace="0")) as db:
            digests = self._read_all(db)
            self.model.finish()
            self._compare_with_model(db, digests)
            self._pass_all_oids(db)
            db.pack(time.time() + 1)
            report = db.storage.sweep(dry_run=True)
            if report.foreign or report.garbage or report.in_flight:
                self.wrong(f"after the last pack a sweep finds {report}")
        with closing(self._open("audit-2", gc_grace="0")) as db:
            self._read_all(db)
        there, needed = set(keys(self.location)), self._stack.references()
        for key in sorted(there - needed):
            self.wrong(f"{key} is left in the bucket")
        for key in sorted(needed - there):
            self.wrong(f"{key} is missing in the bucket")
        self.counts["objects in the end"] = len(there)
        for directory in self._cache_dirs:
            self._check_cache(directory, digests)

    def _wait_for_bucket(self):
        """Wait until the server has done what was sent by those who were killed."""
        before = None
        for _look in range(60):
            now = keys(self.location)
            if now == before:
                return
            before = now
            time.sleep(0.2)
        self.wrong("the bucket goes on changing")

    def _read_all(self, db):
        """Read all slots, and return the digests of the blobs, by oid and tid."""
        seen, digests = {}, {}
        with db.transaction() as conn:
            for number, slot in enumerate(conn.root()["slots"]):
                slot._p_activate()
                seen[number] = u64(slot._p_serial), slot["token"], slot["digest"]
                self._read_one(number, slot, digests)
        self.model.see(Look("audit", "audit", 0, None, seen))
        for number, (tid, token, _digest) in seen.items():
            slot = self.model.slots[number]
            if slot.tids[-1] != tid:
                self.wrong(f"slot {number} is {tid:x} {token}\n{self.model.describe(number)}")
        return digests

    def _read_one(self, number, slot, digests):
        blob, token = slot["blob"], slot["token"]
        data = None
        try:
            if blob is not None:
                with blob.open() as file:
                    data = file.read()
                digests[blob._p_oid, blob._p_serial] = digest_of(data)
        except Exception:
            self.wrong(f"slot {number} {token} cannot be read: {traceback.format_exc()}")
            return
        if digest_of(data) != self.model.digests.get(token, slot["digest"]):
            self.wrong(f"slot {number} {token} has {data and whose(data)}")

    def _compare_with_model(self, db, digests):
        """Read the revisions that a pack has left, as far as the model knows them."""
        if not self._stack.keeps_history:
            return
        tids = sorted(
            {
                tid
                for number, slot in self.model.slots.items()
                for tid in slot.tids
                if not self.model.is_gone(number, tid)
            }
        )
        for tid in tids[-400:]:
            conn = db.open(transaction.TransactionManager(), at=p64(tid))
            try:
                for number, slot in self.model.slots.items():
                    if tid in slot.revisions and not self.model.is_gone(number, tid):
                        self._compare_revision(conn, number, tid, slot.revisions[tid][1], digests)
            finally:
                conn.close()

    def _compare_revision(self, conn, number, tid, token, digests):
        self.counts["old revisions compared"] += 1
        try:
            slot = conn.root()["slots"][number]
            slot._p_activate()
        except POSKeyError:
            self.wrong(f"slot {number} {tid:x} is gone\n{self.model.describe(number)}")
            return
        if (u64(slot._p_serial), slot["token"]) != (tid, token):
            found = f"{u64(slot._p_serial):x} {slot['token']}"
            self.wrong(f"slot {number} {tid:x} is {found}\n{self.model.describe(number)}")
        self._read_one(number, slot, digests)

    def _pass_all_oids(self, db):
        """See to it that the highest oid is above all in the bucket.

        A base takes an oid for one of its own that it has given out. Of the transactions of killed
        processes it may not know.
        """
        parsed = [parse_key(key) for key in keys(self.location)]
        highest = max((oid for oid, _name in filter(None, parsed)), default=p64(0))
        storage = db.storage
        oid = storage.new_oid()
        while oid <= highest:
            oid = storage.new_oid()
        with db.transaction() as conn:
            conn.root()["last"] = PersistentMapping()

    def _check_cache(self, directory, digests):
        if not os.path.isdir(directory):
            return
        with closing(S3BlobCache(directory, self._cache_size)) as cache:
            for finding in cache.check():
                self.wrong(f"{directory}: {finding}")
            # The room of files that were about to come when a process was killed counts, too.
            there, known = committed_size(directory), cache.current_size()
            if not there <= known <= self._cache_size:
                self.wrong(f"{directory}: {known} bytes are known, {there} are there")
        for name in committed(directory):
            oid, tid = (bytes.fromhex(part) for part in name.split(".")[:2])
            data = Path(directory, name.partition(".")[0][-3:], name).read_bytes()
            if digests.get((oid, tid), digest_of(data)) != digest_of(data):
                self.wrong(f"{directory}: {name} has {whose(data)}")
            self.counts["cached files compared"] += (oid, tid) in digests

    def _look_at_logs(self):
        """Errors in the logs of workers are problems, too."""
        expected = re.compile("|".join(EXPECTED_IN_LOG), re.DOTALL)
        for path in sorted(Path(self._directory, "logs").iterdir()):
            for entry in re.split(r"^(?=\d{4}-\d\d-\d\d )", path.read_text(), flags=re.MULTILINE):
                level = re.match(r"\S+ \S+ (WARNING|ERROR|CRITICAL) (\S+) [^:]*: (.*)", entry)
                if level is None:
                    continue
                words = " ".join(level[3].split()[:4])
                self.counts[f"log: {level[1]} {level[2]}: {words}"] += 1
                if level[1] == "WARNING" or expected.search(entry.strip()):
                    continue
                self.wrong(f"{path.name}: {entry}")


def tail(path, size=4000):
    """Return the end of a log."""
    with suppress(FileNotFoundError):
        return Path(path).read_text(errors="replace")[-size:]
    return "no log"


def main(arguments=None):
    """Run from a command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of work; 60 by default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stack", choices=[*STACKS], default="filestorage")
    parser.add_argument("--spool", action="store_true", help="commit to a spool while S3 is down")
    parser.add_argument("--keep", help="a new directory, which stays; another only with problems")
    parser.add_argument("--verbose", action="store_true", help="say what happens")
    options = parser.parse_args(arguments)
    # Nothing of whoever runs it is used.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    directory = options.keep or tempfile.mkdtemp(prefix="soak-")
    os.makedirs(directory, exist_ok=True)
    with open(f"{directory}/soak.log", "w") as file:

        def log(text):
            file.write(f"{text}\n")
            file.flush()
            if options.verbose or text[9:].startswith("WRONG"):
                sys.stderr.write(f"{text}\n")

        soak = Soak(
            options.stack,
            options.seed,
            options.seconds,
            directory,
            SPOOL if options.spool else {},
            log,
        )
        soak.run()
        log(soak.summary())
    sys.stdout.write(f"{soak.summary()}\n")
    if soak.problems:
        sys.stdout.write(f"see {directory}/soak.log and {directory}/logs\n")
    elif not options.keep:
        shutil.rmtree(directory)
    return 1 if soak.problems else 0


if __name__ == "__main__":
    # By the name under which its workers import it; they need not run this one, too.
    from tests import soak

    this = sys.modules["__main__"]
    this.__spec__ = None
    del this.__file__
    sys.exit(soak.main())
