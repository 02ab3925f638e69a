"""From (oid, serial) to a complete file, or to where it is: hit, single flight, S3, sources."""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
import errno
from functools import partial
from itertools import chain
import logging
import os
from typing import Any
from typing import NamedTuple
from typing import TypeVar

from ZODB.POSException import POSKeyError

from .batching import Batcher
from .interfaces import DISK_FULL
from .interfaces import FILES_AT_ONCE
from .interfaces import IntegrityError
from .interfaces import MissingObjectError
from .interfaces import NotUploadedError
from .interfaces import S3OperationError
from .keys import blob_key
from .keys import is_waiting
from .sections import Section
from .staged import remove_quietly
from .stats import ReadCounters


logger = logging.getLogger(__name__)

T = TypeVar("T")
E = TypeVar("E", bound=S3OperationError)

# From (oid, serial) to the stamp in the revision's record, if there is one
FindReference = Callable[[bytes, bytes], bytes | None]


# Errors that are those of the target, whatever file they name
NO_WRITING = (*DISK_FULL, errno.EROFS)

# Objects of which it is remembered where they are
REMEMBERED = 10_000


class Located(NamedTuple):
    """Where the bytes of a revision are."""

    #: in the bucket; None where only a source has them
    key: str | None
    #: in bytes
    size: int


class _SourceFailed(Exception):
    """Takes the error of a source past the cache, for which an OSError is one of its own."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error)
        self.error = error


class _Flight(NamedTuple):
    """A blob that was downloaded, on its way into the cache."""

    oid: bytes
    serial: bytes
    #: of the complete file
    path: str
    #: has its path in the cache in the end
    outcome: "Future[str | None]"


class BlobLoader:
    """Fills the cache on demand; threads share it."""

    def __init__(
        self,
        cache: Any,
        client: Any,
        sources: Sequence[Any],
        counters: ReadCounters | None = None,
        spool: Any = None,
    ) -> None:
        self._cache = cache
        self._client = client
        self._sources = sources
        self._spool = spool
        self._counters = counters or ReadCounters()
        # What threads are fetching now; setdefault decides between them.
        self._flights: dict[tuple[int, bytes, bytes], Future[str | None]] = {}
        self._landing = Batcher(self._land, FILES_AT_ONCE)
        self._located = _Located()

    def load(self, oid: bytes, serial: bytes, find_reference: FindReference) -> str:
        """Return the path of a complete, verified file with the revision's bytes.

        :param find_reference: called on a miss, in the calling thread.
        :raises POSKeyError: when neither the bucket nor a source has it.
        :raises S3OperationError: when that cannot be told.
        """
        path: str | None = self._cache.get(oid, serial)
        while path is None:
            path = self._load_together(oid, serial, find_reference)
        return path

    def _load_together(
        self, oid: bytes, serial: bytes, find_reference: FindReference
    ) -> str | None:
        """Fetch, or share the outcome of the thread that is fetching; None when that was killed.

        Failures are shared, too: while S3 is down nobody waits for more than one time-out.
        """
        mine: Future[str | None] = Future()
        # A forked child does not wait for its parent's threads.
        name = (os.getpid(), oid, serial)
        flight = self._flights.setdefault(name, mine)
        if flight is not mine:
            self._counters.add(waits=1)
            return flight.result()
        self._counters.add(misses=1)
        try:
            mine.set_result(self._fill(oid, serial, find_reference))
        except Exception as error:
            mine.set_exception(error)
        finally:
            del self._flights[name]
            if not mine.done():
                mine.set_result(None)
        return mine.result()

    def _fill(self, oid: bytes, serial: bytes, find_reference: FindReference) -> str:
        # Before the cache has its lock: the base may be slow.
        stamp = find_reference(oid, serial)
        try:
            filled: str = self._cache.fill(
                oid, serial, lambda path: self._fetch(oid, serial, stamp, path)
            )
        except _SourceFailed as failed:
            raise failed.error from None
        return filled

    def _fetch(self, oid: bytes, serial: bytes, stamp: bytes | None, target_path: str) -> None:
        def ask_source(source: Any) -> bool | None:
            try:
                return source.fetch(oid, serial, target_path) or None
            except OSError as error:
                if error.errno in NO_WRITING or error.filename == target_path:
                    raise
                raise _SourceFailed(error) from error

        def download(key: str) -> bool:
            self._client.download_file(key, target_path)
            return True

        self._ask(oid, serial, stamp, download, ask_source)

    def load_soon(self, oid: bytes, serial: bytes, stamp: bytes | None) -> "Future[str | None]":
        """Download what is not cached, and have it put into the cache with what others download.

        The thread is free again before that, so that many threads do not wait for one lock.

        :param stamp: what the revision's record refers to.
        :returns: what has the path in the end, or None when it was given up, or an error.
        """
        mine: Future[str | None] = Future()
        name = (os.getpid(), oid, serial)
        other = self._flights.setdefault(name, mine)
        if other is not mine:
            return other
        self._counters.add(prefetches=1)
        mine.add_done_callback(lambda _mine: self._flights.pop(name))
        try:
            if self._takes_off(oid, serial, stamp, mine):
                return mine
            mine.set_result(self._fill(oid, serial, lambda oid, serial: stamp))
        except BaseException as error:
            # Whatever it was, those who wait must learn of it.
            mine.set_exception(error)
        return mine

    def _takes_off(
        self, oid: bytes, serial: bytes, stamp: bytes | None, mine: "Future[str | None]"
    ) -> bool:
        """Download and hand on.

        :returns: False when the blob is there by now, or another process fetches it, or the disk
            makes trouble: `_fill` finds it, or waits for it, or knows what to do.
        """
        try:
            filling = self._cache.begin_filling(oid, serial)
        except OSError:
            filling = None
        if filling is None:
            return False
        path, end = filling
        mine.add_done_callback(lambda _mine: end())
        if self._cache.get(oid, serial) is not None:
            return False
        return self._fly(_Flight(oid, serial, path, mine), stamp)

    def _fly(self, flight: "_Flight", stamp: bytes | None) -> bool:
        """Download and hand on, unless the file cannot be written."""
        try:
            self._fetch(flight.oid, flight.serial, stamp, flight.path)
        except BaseException as error:
            # Whatever it was, half a file is of no use.
            try:
                os.remove(flight.path)
            except OSError:
                pass  # nothing was written, or it goes with this process's temporary files
            if isinstance(error, _SourceFailed):
                raise error.error from None
            if isinstance(error, OSError):
                return False
            raise
        self._landing.hand_in(flight)
        return True

    def _land(self, flights: list["_Flight"]) -> None:
        """Put what has arrived into the cache, for all threads that have fetched something."""
        paths: list[str | None] = [None] * len(flights)
        try:
            entries = [(flight.oid, flight.serial, flight.path) for flight in flights]
            paths = self._cache.put_all(entries)
        except Exception:
            pass  # whatever it is, each is tried alone
        for flight, path in zip(flights, paths, strict=True):
            try:
                path = path or self._cache.put(flight.oid, flight.serial, flight.path)
            except Exception:
                # Whatever it is, such as somebody who removes the directory: who wants the blob
                # loads it by himself.
                logger.warning("prefetched, but not cached path=%s", flight.path, exc_info=True)
            flight.outcome.set_result(path)

    def verify(self, oid: bytes, serial: bytes, find_reference: FindReference) -> bool:
        """Compare a cached file with what was stored, and replace it when it differs.

        :returns: False when it was replaced; True when it was right, or fetched just now.
        :raises POSKeyError: when neither the bucket nor a source has the blob.
        :raises S3OperationError: when that cannot be told; the file stays as it is.
        """
        path = self._cache.get(oid, serial)
        if path is None:
            self.load(oid, serial, find_reference)
            return True
        stamp = find_reference(oid, serial)
        try:
            same_size = partial(_same_size, path, oid, serial)
            if self._ask(oid, serial, stamp, partial(self._compare, path), same_size):
                return True
            # The new one is complete, and verified, before the old one goes.
            arrived = self._cache.temporary_file()
            try:
                self._fetch(oid, serial, stamp, arrived)
                self._cache.discard(oid, serial)
                self._cache.put(oid, serial, arrived)
            except BaseException:
                # Whatever it was, nobody else removes it.
                remove_quietly(arrived)
                raise
        except FileNotFoundError:
            return True  # evicted meanwhile
        except _SourceFailed as failed:
            raise failed.error from None
        return False

    def _compare(self, path: str, key: str) -> bool:
        try:
            self._client.verify_file(key, path)
        except IntegrityError as error:
            # And not one of the bucket, for which a source would be asked.
            logger.warning("cached file replaced key=%s: %s", key, error)
            return False
        return True

    def elsewhere(
        self, oid: bytes, serial: bytes, stamp: bytes | None
    ) -> Iterator[tuple[str, Any]]:
        """Yield what may have the bytes of a revision besides the bucket, as `IBlobSource`.

        :param stamp: what its record refers to.
        :returns: each with a word: spool or source.
        """
        keys = [blob_key(oid, name) for name in (stamp, serial) if name]
        if self._spool is not None:
            for spooled in chain.from_iterable(map(self._spool.find, keys)):
                yield "spool", spooled
        for source in self._sources:
            for place in _places(source, keys):
                yield "source", place

    def locate(self, oid: bytes, serial: bytes, find_reference: FindReference) -> Located:
        """Return where the bytes of a revision are, and how many.

        What is in the bucket is remembered, for it does not change: a second question costs
        nothing.

        :raises POSKeyError: when neither the bucket nor a source has it.
        :raises S3OperationError: when that cannot be told.
        """

        def ask_source(source: Any) -> Located | None:
            size = source.size(oid, serial)
            return None if size is None else Located(None, size)

        def look(key: str) -> Located:
            return Located(key, self._client.object_size(key))

        found = self._located.get(oid, serial)
        if found is None:
            stamp = find_reference(oid, serial)
            found = self._ask(oid, serial, stamp, look, ask_source)
            self._located.put(oid, serial, found)
        return found

    def open_range(
        self,
        oid: bytes,
        serial: bytes,
        start: int,
        stop: int | None,
        find_reference: FindReference,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> Section | None:
        """Open a part of what is in the bucket, which the cache does not get.

        :param waiting: entered while the section waits for S3, when it is read.
        :returns: None where a source has the bytes.
        :raises POSKeyError: when neither the bucket nor a source has it.
        :raises S3OperationError: when that cannot be told.
        """

        def ask_source(source: Any) -> bool | None:
            return None if source.size(oid, serial) is None else False

        def open_range(key: str) -> Section | bool:
            section: Section = self._client.open_range(key, start, stop, waiting)
            return section

        # A key that is remembered may have gone with a revision that was packed away.
        stamp = find_reference(oid, serial)
        found = self._ask(oid, serial, stamp, open_range, ask_source)
        return None if isinstance(found, bool) else found

    def _ask(
        self,
        oid: bytes,
        serial: bytes,
        stamp: bytes | None,
        ask: Callable[[str], T],
        ask_source: Callable[[Any], T | None],
    ) -> T:
        """Ask for each key that the bytes may have, then each source, until one has them."""
        # A database that has moved between bases keeps under the tid what its records refer to.
        keys = [blob_key(oid, name) for name in (stamp, serial) if name]
        damaged: list[IntegrityError] = []
        # Before the bucket, where it is before it goes from there.
        if (answer := self._ask_spool(keys, ask_source, damaged)) is not None:
            return answer
        try:
            return _first_of(keys, ask)
        except S3OperationError as error:
            # A revision has the same bytes wherever they are.
            if (answer := self._ask_sources(keys, ask_source)) is not None:
                return answer
            if isinstance(error, MissingObjectError):
                # A migration may have brought it there meanwhile, and removed it here.
                if self._sources and (answer := _found_by_now(keys, ask)) is not None:
                    return answer
                if damaged:
                    raise _described(damaged[0], keys[0], oid, serial) from error
                if stamp and is_waiting(stamp):
                    raise _not_uploaded(keys[0], oid, serial) from error
                where = " or ".join(keys)
                raise POSKeyError(f"No blob {where} in the bucket", oid, serial) from error
            error.oid, error.tid = oid, serial
            raise

    def _ask_sources(self, keys: Sequence[str], ask_source: Callable[[Any], T | None]) -> T | None:
        for source in self._sources:
            for place in _places(source, keys):
                if (answer := ask_source(place)) is not None:
                    return answer
        return None

    def _ask_spool(
        self,
        keys: Sequence[str],
        ask_source: Callable[[Any], T | None],
        damaged: list[IntegrityError],
    ) -> T | None:
        """Return the first answer; what is damaged may be in the bucket by now."""
        if self._spool is None:
            return None
        for spooled in chain.from_iterable(map(self._spool.find, keys)):
            try:
                if (answer := ask_source(spooled)) is not None:
                    return answer
            except IntegrityError as error:
                damaged.append(error)
        return None


def _same_size(path: str, oid: bytes, serial: bytes, source: Any) -> bool | None:
    size = source.size(oid, serial)
    if size is None:
        return None
    if size != os.path.getsize(path):
        logger.warning("cached file replaced path=%s", path)
        return False
    return True


def _places(source: Any, keys: Sequence[str]) -> Iterable[Any]:
    """Return where a source may have what has these keys: see `IBlobSource`."""
    find = getattr(source, "find", None)
    return [source] if find is None else chain.from_iterable(map(find, keys))


def _not_uploaded(key: str, oid: bytes, serial: bytes) -> NotUploadedError:
    error = NotUploadedError(
        f"the blob {key!r} was committed while S3 was down, and the host that has it in its spool"
        " has not uploaded it yet"
    )
    return _described(error, key, oid, serial)


def _described(error: E, key: str, oid: bytes, serial: bytes) -> E:
    error.operation, error.key, error.oid, error.tid = "download", key, oid, serial
    return error


def _first_of(keys: Sequence[str], ask: Callable[[str], T]) -> T:
    for key in keys:
        try:
            return ask(key)
        except MissingObjectError:
            if key == keys[-1]:
                raise
    raise AssertionError("unreachable")


def _found_by_now(keys: Sequence[str], ask: Callable[[str], T]) -> T | None:
    try:
        return _first_of(keys, ask)
    except MissingObjectError:
        return None


class _Located:
    """Remembers where objects are; what was found first is forgotten first."""

    def __init__(self) -> None:
        # Threads share it: each call is one step.
        self._found: OrderedDict[tuple[bytes, bytes], Located] = OrderedDict()

    def get(self, oid: bytes, serial: bytes) -> Located | None:
        return self._found.get((oid, serial))

    def put(self, oid: bytes, serial: bytes, located: Located) -> None:
        if located.key is None:
            return  # a migration may bring it into the bucket at any moment
        self._found[oid, serial] = located
        if len(self._found) > REMEMBERED:
            self._found.popitem(last=False)
