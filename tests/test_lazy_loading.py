"""Loading Blob objects downloads nothing, and every way of reading one still gives its bytes."""

from contextlib import closing
from contextlib import contextmanager
from dataclasses import replace
import io
from itertools import count
import os
from pathlib import Path
import shutil

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.Connection import Connection
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZPublisher.Iterators import filestream_iterator

from zodb_s3blobs.interfaces import TransientS3Error

from .relstorages import Database
from .services.location import boto3_client
from .services.location import keys
from .storages import make_storage
from .storages import read
from .storages import section
from .zeoclients import FILE
from .zeoclients import ZeoDatabase


IMPORTS = "\n".join(f"%import {name}" for name in ("zodb_s3blobs", "zc.zlibstorage", "relstorage"))

# What is around ours, the name of ours in there, and keys of ours
KINDS = {
    "FileStorage": {},
    "MappingStorage": {},
    "by record": {"addressing": "record"},
    "RelStorage": {},
    "RelStorage without history": {},
    "ZEO": {},
    "zlibstorage around": {"around": "<zlibstorage>\n{}\n</zlibstorage>"},
    "below a DemoStorage": {"around": "<demostorage>\n{}\n</demostorage>", "name": "base"},
    "changes of a DemoStorage": {
        "around": "<demostorage>\n<mappingstorage base>\n</mappingstorage>\n{}\n</demostorage>",
        "name": "changes",
    },
}
HISTORICAL = [kind for kind in KINDS if kind != "RelStorage without history"]
UNDOING = [kind for kind in HISTORICAL if kind not in ("MappingStorage", "below a DemoStorage")]
# What a FileStorage can copy from
COPYABLE = [kind for kind in KINDS if "DemoStorage" not in kind and kind != "MappingStorage"]


class Place:
    """A database with two revisions of a blob, and of nothing else, or with many blobs.

    It is opened again and again, each time with an empty cache.
    """

    def __init__(self, kind, location, directory, base=None):
        self.location = location
        self.directory = directory
        self._is_mapping = kind == "MappingStorage"
        self._base = MappingStorage() if self._is_mapping else base
        self._options = {"around": "{}", "name": "", **KINDS[kind]}
        self._caches = count()
        self._opened = []
        #: the tid of the first revisions
        self.first = None

    def open(self, location=None, **options):
        """Open the database; what was opened before is closed.

        :param location: the bucket as seen through something.
        :param options: in the place of those of the kind.
        """
        location, cache = location or self.location, f"cache-{next(self._caches)}"
        if self._is_mapping:
            # It would be empty after close().
            storage, _client = make_storage(location, self.directory, cache, self._base)
            db = DB(storage)
        else:
            self.close()
            options = self._options | options
            around, name = options.pop("around"), options.pop("name")
            text = section(location, self.directory, cache, self._base, **options)
            text = around.format(text.replace("<s3blobstorage>", f"<s3blobstorage {name}>"))
            db = databaseFromString(f"{IMPORTS}\n<zodb>\n{text}\n</zodb>")
        self._opened.append(db)
        return db

    @contextmanager
    def connection(self, *args, **options):
        """Context manager: a connection to what `open` opens."""
        manager = transaction.TransactionManager()
        conn = self.open(*args, **options).open(manager)
        try:
            yield conn
        finally:
            manager.abort()
            conn.close()

    def fill(self, size=1):
        """Commit the blobs, without a DemoStorage that would forget them."""
        options = {"around": "{}"} if self._options["name"] == "base" else {}
        db = self.open(**options)
        for number in (0, 1):
            with db.transaction() as conn:
                blobs = conn.root().setdefault("blobs", {})
                blobs.update({name: Blob() for name in range(size) if name not in blobs})
                conn.root()["blobs"] = blobs
                for name in range(size) if number == 0 else (0,):
                    with blobs[name].open("w") as file:
                        file.write(contents(name, number))
            if number == 0:
                with db.transaction() as conn:
                    blob_of(conn)._p_activate()
                    self.first = blob_of(conn)._p_serial

    def close(self):
        while self._opened:
            self._opened.pop().close()


def contents(name, number=0):
    """Return the bytes of a revision, more than a buffer holds."""
    return b"blob %d of revision %d\n" % (name, number) * 5000


CURRENT = contents(0, 1)


def blob_of(conn, name=0):
    return conn.root()["blobs"][name]


def load_all(conn):
    """Load all Blob objects, which are ghosts at first, and return how many."""
    blobs = conn.root()["blobs"].values()
    for blob in blobs:
        assert blob._p_changed is None
        blob._p_activate()
        assert blob._p_changed is False
    return len(blobs)


@pytest.fixture
def make_place(request, s3, tmp_path):
    """Return a function that makes a `Place` of a kind."""
    places = []

    def make(kind, size=1):
        base = None
        if kind.startswith("RelStorage"):
            (tmp_path / "sqlite3").mkdir()
            base = Database("sqlite3", f"{tmp_path}/sqlite3", kind == "RelStorage").section
        elif kind == "ZEO":
            served = request.getfixturevalue("zeo").new(FILE)
            base = ZeoDatabase(served.server, served.name).section
        places.append(Place(kind, s3, tmp_path, base))
        places[-1].fill(size)
        return places[-1]

    yield make
    for place in places:
        place.close()


@pytest.fixture(params=KINDS)
def place(request, make_place):
    """A `Place` of each kind, with one blob."""
    return make_place(request.param)


@pytest.fixture
def on_file(make_place):
    """A `Place` on a FileStorage, with one blob."""
    return make_place("FileStorage")


def through(proxy, place):
    """Return the bucket of a place as seen through a proxy."""
    return replace(place.location, endpoint_url=proxy.endpoint_url)


def of_kinds(kinds):
    """Let `place` be of these kinds only."""
    return pytest.mark.parametrize("place", kinds, indirect=True)


class TestRequests:
    @pytest.mark.parametrize("kind", KINDS)
    def test_loading_makes_none(self, kind, make_place, s3, latency_proxy):
        """However many Blobs a page or a catalog touches, in a first transaction or a later one."""
        size = 500 if kind == "FileStorage" else 20
        place, proxy = make_place(kind, size), latency_proxy(s3.endpoint_url)
        with place.connection(through(proxy, place)) as conn:
            assert load_all(conn) == size
            conn.cacheMinimize()
            conn.transaction_manager.begin()
            assert load_all(conn) == size
            assert proxy.stats()["requests"] == 0
            assert read(blob_of(conn)) == CURRENT
            assert proxy.stats()["requests"] > 0

    def test_loading_after_a_savepoint_makes_none(self, place, s3, latency_proxy):
        """The connection's storage is a temporary one then, which asks ours."""
        proxy = latency_proxy(s3.endpoint_url)
        with place.connection(through(proxy, place)) as conn:
            conn.root()["other"] = Blob(b"new")
            conn.transaction_manager.savepoint()
            load_all(conn)
            conn.root()["other"]._p_deactivate()
            assert read(conn.root()["other"]) == b"new"
            assert proxy.stats()["requests"] == 0
            assert read(blob_of(conn)) == CURRENT

    @of_kinds(HISTORICAL)
    def test_loading_in_a_historical_connection_makes_none(self, place, s3, latency_proxy):
        """And reading there gives the bytes of then."""
        proxy = latency_proxy(s3.endpoint_url)
        db = place.open(through(proxy, place))
        with closing(db.open(at=place.first)) as conn:
            load_all(conn)
            assert proxy.stats()["requests"] == 0
            assert read(blob_of(conn)) == contents(0)


# Ways of reading, each from a Blob whose file is not there; all but the first lines are others'


class range_iterator:
    """Reads a file from a position, as plone.namedfile's does."""

    def __init__(self, path, start):
        self._file = io.FileIO(path)
        self._file.seek(start)

    def __iter__(self):
        return self

    def __next__(self):
        data = self._file.read(1 << 16)
        if not data:
            self._file.close()
            raise StopIteration
        return data


def seek_and_tell(blob):
    with blob.open("r") as file:
        file.seek(0, os.SEEK_END)
        assert file.tell() == len(CURRENT)
        file.seek(100_000)
        rest = file.read()
        file.seek(0)
        return file.read(100_000) + rest


def copy_object(blob):
    target = io.BytesIO()
    with blob.open() as file:
        shutil.copyfileobj(file, target)
    return target.getvalue()


def open_as_committed(blob):
    with blob.open("c") as file:
        return file.read()


def open_committed_path(blob):
    with open(blob.committed(), "rb") as file:
        return file.read()


def iterate_over_committed_path(blob):
    with filestream_iterator(blob.committed()) as stream:
        assert len(stream) == len(CURRENT)
        return b"".join(stream)


def iterate_over_range(blob):
    return CURRENT[:1000] + b"".join(range_iterator(blob.committed(), 1000))


def open_loaded_path(blob):
    with open(blob._p_jar._storage.loadBlob(blob._p_oid, blob._p_serial), "rb") as file:
        return file.read()


def read_after_a_savepoint(blob):
    blob._p_jar.root()["other"] = Blob(b"new")
    blob._p_jar.transaction_manager.savepoint()
    return read(blob)


def read_after_a_savepoint_as_ghost(blob):
    blob._p_jar.root()["other"] = Blob(b"new")
    blob._p_jar.transaction_manager.savepoint()
    blob._p_deactivate()
    return read(blob)


def read_after_a_rollback(blob):
    savepoint = blob._p_jar.transaction_manager.savepoint()
    with blob.open("w") as file:
        file.write(b"rolled back")
    savepoint.rollback()
    return read(blob)


def export(blob):
    with io.BytesIO() as file:
        blob._p_jar.exportFile(blob._p_oid, file)
        return file.getvalue()[-len(CURRENT) - 16 : -16]


READING = [
    read,
    seek_and_tell,
    copy_object,
    open_as_committed,
    open_committed_path,
    iterate_over_committed_path,
    iterate_over_range,
    open_loaded_path,
    read_after_a_savepoint,
    read_after_a_savepoint_as_ghost,
    read_after_a_rollback,
    export,
]


@contextmanager
def cold(place, **options):
    """Context manager: a Blob object that is loaded, in a connection, while its file never was."""
    with place.connection(**options) as conn:
        blob = blob_of(conn)
        blob._p_activate()
        assert not cached_files(place)
        yield blob


@contextmanager
def evicted(place, **options):
    """Context manager: a Blob object that was read, in a connection, and whose file has gone."""
    with cold(place, **options) as blob:
        assert read(blob) == CURRENT
        (path,) = cached_files(place)
        path.unlink()
        yield blob


def cached_files(place):
    """Return the paths of the files in the last cache of a place."""
    last = max(place.directory.glob("cache-*"), key=lambda path: int(path.name[6:]))
    return [*last.glob("???/*.blob")]


STATES = pytest.mark.parametrize("state", [cold, evicted])


def downloads(proxy):
    """Return how many blobs were asked for."""
    log = map(str, proxy.stats(log=True)["log"])
    return sum("GET" in line and "/blobs/" in line for line in log)


@STATES
class TestReading:
    def test_each_way_gives_the_bytes(self, place, state):
        """As if the file had been there."""
        for way in READING:
            with state(place) as blob:
                assert way(blob) == CURRENT, way

    @pytest.mark.parametrize("mode", ["r+", "a"])
    def test_change_begins_with_the_committed_bytes(self, place, state, mode):
        """They are kept, and committed with what was added."""
        with state(place) as blob:
            with blob.open(mode) as file:
                file.seek(0, os.SEEK_END)
                file.write(b"added")
            assert read(blob) == CURRENT + b"added"
            blob._p_jar.transaction_manager.commit()
            with blob._p_jar.db().transaction() as conn:
                assert read(blob_of(conn)) == CURRENT + b"added"

    def test_replacement_needs_no_download(self, place, state, s3, latency_proxy):
        """What is written to it from the beginning is all that is committed."""
        proxy = latency_proxy(s3.endpoint_url)
        with state(place, location=through(proxy, place)) as blob:
            before = downloads(proxy)
            with blob.open("w") as file:
                file.write(b"replaced")
            blob._p_jar.transaction_manager.commit()
            assert downloads(proxy) == before
            with blob._p_jar.db().transaction() as conn:
                assert read(blob_of(conn)) == b"replaced"

    def test_exported_blob_is_imported_into_another_database(self, place, state, tmp_path):
        """The bytes are in the file."""
        with state(place) as blob, closing(plain(tmp_path)) as other:
            with io.BytesIO() as file:
                blob._p_jar.exportFile(blob._p_oid, file)
                file.seek(0)
                with other.transaction() as conn:
                    conn.root()["blob"] = conn.importFile(file)
            with other.transaction() as conn:
                assert read(conn.root()["blob"]) == CURRENT


def plain(directory):
    """Return a database on a new FileStorage with a blob directory, and with nothing of ours."""
    place = directory / f"plain-{len([*directory.glob('plain-*')])}"
    place.mkdir()
    return DB(FileStorage(f"{place}/Data.fs", blob_dir=f"{place}/blobs"))


class TestOtherReaders:
    @of_kinds(UNDOING)
    def test_undo_brings_the_older_bytes_back(self, place):
        """In an empty cache, and seen by a connection that has loaded the newer revision."""
        with cold(place) as blob:
            manager, db = blob._p_jar.transaction_manager, blob._p_jar.db()
            db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
            manager.commit()
            assert read(blob) == contents(0)

    @of_kinds(COPYABLE)
    def test_transactions_are_copied_with_their_blobs(self, place, tmp_path):
        """To a FileStorage with a blob directory, all revisions that there are."""
        with closing(FileStorage(f"{tmp_path}/Copy.fs", blob_dir=f"{tmp_path}/copy")) as copy:
            storage = place.open().storage
            copy.copyTransactionsFrom(storage)
            files = [path.read_bytes() for path in (tmp_path / "copy").rglob("*.blob")]
        db = DB(FileStorage(f"{tmp_path}/Copy.fs", blob_dir=f"{tmp_path}/copy"))
        with closing(db), db.transaction() as conn:
            assert read(blob_of(conn)) == CURRENT
        # In a RelStorage without history the older revision has gone, in others it came along.
        assert sorted(files) in ([contents(0), CURRENT], [CURRENT])

    def test_caller_of_the_storage_gets_a_file(self, on_file):
        """Whoever calls loadBlob and is not the Connection that loads the object."""
        with cold(on_file) as blob:
            storage = blob._p_jar.db().storage
            path = storage.loadBlob(blob._p_oid, blob._p_serial)
            assert Path(path).read_bytes() == CURRENT

    def test_function_that_is_called_as_zodbs_gets_a_file(self, on_file):
        """It is known by its code, and not by its name."""

        def setstate(blob):
            return blob._p_jar._storage.loadBlob(blob._p_oid, blob._p_serial)

        with cold(on_file) as blob:
            assert Path(setstate(blob)).read_bytes() == CURRENT

    def test_connection_of_another_class_loads_without_a_request(
        self, on_file, s3, latency_proxy, monkeypatch
    ):
        """What wraps setstate, as a profiler does, calls ZODB's in the end."""
        original, calls = Connection.setstate, []

        def setstate(self, obj):
            calls.append(obj)
            return original(self, obj)

        monkeypatch.setattr(Connection, "setstate", setstate)
        proxy = latency_proxy(s3.endpoint_url)
        with on_file.connection(through(proxy, on_file)) as conn:
            load_all(conn)
            assert blob_of(conn) in calls
            assert proxy.stats()["requests"] == 0


def delete_all(location):
    client = boto3_client(location)
    for key in keys(location):
        client.delete_object(Bucket=location.bucket, Key=key)
    client.close()


class TestTrouble:
    def test_missing_object_is_told_by_what_needs_it(self, place):
        """The container and the Blob object can be loaded, and deleted."""
        delete_all(place.location)
        with cold(place) as blob:
            for use in (read, open_as_committed, open_committed_path, open_loaded_path):
                with pytest.raises(POSKeyError):
                    use(blob)
            for mode in ("r+", "a"):
                with pytest.raises(POSKeyError):
                    blob.open(mode)
            del blob._p_jar.root()["blobs"]
            blob._p_jar.transaction_manager.commit()

    def test_outage_is_told_by_what_needs_s3(self, place, s3, latency_proxy):
        """What is loaded is loaded, what is cached is read, and the rest is a TransientS3Error."""
        proxy = latency_proxy(s3.endpoint_url)
        with place.connection(through(proxy, place), s3_max_attempts=2) as conn:
            conn.root()["other"] = Blob(b"cached")
            conn.transaction_manager.commit()
            conn.cacheMinimize()
            proxy.stop()
            load_all(conn)
            assert read(conn.root()["other"]) == b"cached"
            for use in (read, open_as_committed, open_committed_path, open_loaded_path):
                with pytest.raises(TransientS3Error):
                    use(blob_of(conn))
            for mode in ("r+", "a"):
                with pytest.raises(TransientS3Error):
                    blob_of(conn).open(mode)
