"""Databases move between storages by RelStorage's own commands, and are packed by them."""

from contextlib import closing
import hashlib
import json
import re
import subprocess
import sys

from persistent.mapping import PersistentMapping
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.blob import is_blob_record
from ZODB.config import storageFromString
from ZODB.DB import DB
from ZODB.interfaces import IStorageUndoable
from ZODB.POSException import POSKeyError
from ZODB.utils import u64

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference

from .services.location import keys
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import section
from .storages import take


MiB = 1 << 20
IMPORTS = "%import zodb_s3blobs\n%import relstorage\n"


class Place:
    """ZConfig texts of the storages of one test.

    The same name is the same database: the same file, the same prefix in the bucket.
    """

    def __init__(self, directory, location, new_database=None):
        self.directory = directory
        self.location = location
        self._new_database = new_database
        self._dsns = {}

    def file(self, name, with_blobs=False):
        """Return a FileStorage, with a blob directory of its own or without."""
        blobs = [f"blob-dir {self.directory}/{name}.blobs"] if with_blobs else []
        path = f"path {self.directory}/{name}.fs"
        return "\n".join(["<filestorage>", path, *blobs, "</filestorage>"])

    def relstorage(self, name, keep_history=True, with_blobs=False, driver="sqlite3"):
        """Return a RelStorage, with a shared blob directory or without."""
        lines = [f"keep-history {str(keep_history).lower()}"]
        if with_blobs:
            lines += [f"blob-dir {self.directory}/{name}.blobs", "shared-blob-dir true"]
        if driver == "sqlite3":
            path = self.directory / f"{name}.sqlite3"
            path.mkdir(exist_ok=True)
            lines += ["<sqlite3>", f"data-dir {path}", "</sqlite3>"]
        else:
            if name not in self._dsns:
                self._dsns[name] = self._new_database()
            lines += ["<postgresql>", "driver psycopg2", f"dsn {self._dsns[name]}", "</postgresql>"]
        return "\n".join(["<relstorage>", *lines, "</relstorage>"])

    def s3(self, name, base, cache="cache", gc_grace="0s", **options):
        """Return our storage around another."""
        cache = f"{name}.{cache}"
        options |= {"s3_prefix": name, "gc_grace": gc_grace}
        return section(self.location, self.directory, cache=cache, base=base, **options)

    def keys(self, name):
        """Return the keys below a database's prefix, without that."""
        return {key.removeprefix(f"{name}/") for key in keys(self.location, f"{name}/")}

    def convert(self, source, destination, *options):
        """Run zodbconvert and return what it logs."""
        return self._run("zodbconvert", options, source=source, destination=destination)

    def pack(self, storage, *options):
        """Run zodbpack, to the current time, and return what it logs."""
        return self._run("zodbpack", ("--days=0", *options), packed=storage)

    def _run(self, command, options, **storages):
        path = self.directory / f"{command}.conf"
        named = [re.sub(r"^<(\w+)>", rf"<\1 {name}>", text) for name, text in storages.items()]
        path.write_text(IMPORTS + "\n".join(named))
        return run("-m", f"relstorage.{command}", *options, path)


def run(*arguments):
    """Run Python and return what it wrote, which must not be a traceback."""
    done = subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def place(s3, tmp_path, request):
    """A `Place`; PostgreSQL is started when a test first asks for it."""
    return Place(tmp_path, s3, lambda: request.getfixturevalue("postgresql").new_database())


def opened(text):
    """Open a storage until the end of a with statement."""
    return closing(storageFromString(IMPORTS + text))


# What is in the databases


class Site:
    """A database in use: a root object, and what people do with its blobs."""

    def __init__(self, storage):
        self.db = DB(storage)
        self._manager = transaction.TransactionManager()
        self.root = self.db.open(self._manager).root()

    def commit(self, note=""):
        self._manager.get().note(note)
        self._manager.commit()

    def undo(self):
        """Undo the last transaction."""
        self.db.undo(self.db.undoLog(0, 1)[0]["id"], self._manager.get())
        self.commit("undo")

    def rewrite(self, name, content):
        with self.root[name].open("w") as file:
            file.write(content)
        self.commit(f"rewrite {name}")

    def close(self):
        self._manager.abort()
        self.db.close()


def working(text):
    """Open a storage and work in it, a `Site`, until the end of a with statement."""
    return closing(Site(storageFromString(IMPORTS + text)))


def fill(text, seed=0):
    """Make what a site makes over the time: rewritten, undone and removed blobs."""
    with working(text) as site:
        root = site.root
        root["small"] = Blob(b"first")
        root["empty"] = Blob()
        root["tree"] = PersistentMapping(big=Blob(random_bytes(seed, MiB)), plain=seed)
        site.commit("make")
        site.rewrite("small", b"second")
        root["tree"]["twin"] = Blob(b"first")
        site.commit("twin")
        site.rewrite("small", b"third")
        if IStorageUndoable.providedBy(site.db.storage):
            site.undo()
            site.undo()
            root["never"] = Blob(b"undone")
            site.commit("never")
            site.undo()
        del root["tree"]["twin"]
        site.commit("remove")


def digest(data):
    return hashlib.sha256(data).hexdigest()


def contents(text):
    """Return {tid: (description, {oid: (record, digest of the blob)})} of a storage."""
    with opened(text) as storage:
        return {
            each.tid: (
                each.description,
                {record.oid: (record.data, blob_of(storage, record)) for record in each},
            )
            for each in storage.iterator()
        }


def blob_of(storage, record):
    if not (record.data and is_blob_record(record.data)):
        return None
    with storage.openCommittedBlobFile(record.oid, record.tid) as file:
        return digest(file.read())


def current(transactions):
    """Return {oid: (tid, record, digest)} of what is current after these transactions."""
    found = {}
    for tid in sorted(transactions):
        for oid, (record, blob) in transactions[tid][1].items():
            found[oid] = (tid, record, blob)
    return {oid: revision for oid, revision in found.items() if revision[1] is not None}


def blobs_of(transactions):
    """Return {(oid, tid): digest} of all revisions of blobs."""
    return {
        (oid, tid): blob
        for tid, (_description, records) in transactions.items()
        for oid, (_record, blob) in records.items()
        if blob
    }


def expected_keys(transactions):
    """Return the keys that these revisions need, by the references in their records."""
    return {
        blob_key(oid, read_reference(record) or tid)
        for tid, (_description, records) in transactions.items()
        for oid, (record, blob) in records.items()
        if blob
    }


# Conversions


def ours_over_file(place, name, cache="cache"):
    return place.s3(name, place.file(name), cache)


def ours_over_relstorage(place, name, cache="cache", **options):
    return place.s3(name, place.relstorage(name, **options), cache)


def ours_without_history(place, name, cache="cache", **options):
    return ours_over_relstorage(place, name, cache, keep_history=False, **options)


def ours_over_postgresql(place, name, cache="cache"):
    return ours_over_relstorage(place, name, cache, driver="postgresql")


def ours_over_postgresql_without_history(place, name, cache="cache"):
    return ours_without_history(place, name, cache, driver="postgresql")


def plain_file(place, name, cache=None):
    return place.file(name, with_blobs=True)


def plain_relstorage(place, name, cache=None):
    return place.relstorage(name, with_blobs=True)


def plain_relstorage_without_history(place, name, cache=None):
    return place.relstorage(name, keep_history=False, with_blobs=True)


WITHOUT_HISTORY = {
    ours_without_history,
    ours_over_postgresql_without_history,
    plain_relstorage_without_history,
}
DIRECTIONS = [
    (plain_file, ours_over_relstorage),
    (plain_file, ours_without_history),
    (plain_file, ours_over_postgresql),
    (plain_file, ours_over_postgresql_without_history),
    (plain_relstorage, ours_over_relstorage),
    (ours_over_file, ours_over_relstorage),
    (ours_over_file, ours_without_history),
    (ours_over_relstorage, ours_over_file),
    (ours_over_relstorage, ours_over_relstorage),
    (ours_over_relstorage, ours_without_history),
    (ours_over_relstorage, plain_file),
    (ours_over_relstorage, plain_relstorage),
    (ours_over_relstorage, plain_relstorage_without_history),
    (ours_over_postgresql, plain_file),
    (ours_over_postgresql_without_history, ours_over_file),
    (ours_without_history, ours_over_relstorage),
    (ours_without_history, plain_file),
]


def name_of(function):
    return function.__name__


@pytest.mark.parametrize("source, target", DIRECTIONS, ids=name_of)
def test_conversion_keeps_tids_records_and_blobs(source, target, place):
    """Each revision that the target can keep is there under its tid, its blob byte for byte."""
    fill(source(place, "source"))
    expected = contents(source(place, "source"))
    assert len(blobs_of(expected)) >= 3
    log = place.convert(source(place, "source", "cold"), target(place, "target"))
    assert "without its blob" not in log
    found = contents(target(place, "target", "colder"))
    if target in WITHOUT_HISTORY:
        assert current(found) == current(expected)
        assert current(found).keys() == {oid for each in found.values() for oid in each[1]}
    else:
        assert found == expected


@pytest.mark.parametrize("through", [plain_file, ours_over_file, plain_relstorage], ids=name_of)
def test_conversion_there_and_back_after_a_pack_is_the_original(through, place):
    """Every surviving revision comes back, also undone creations and shared references."""
    ours = ours_over_relstorage(place, "one")
    fill(ours)
    place.pack(ours)
    with working(ours) as site:
        site.rewrite("small", b"after the pack")
        site.rewrite("empty", b"no longer")
        site.undo()
        site.root["never again"] = Blob(b"undone, too")
        site.commit()
        site.undo()
    expected = contents(ours)
    place.convert(ours, through(place, "two"))
    place.convert(through(place, "two", "cold"), ours_over_relstorage(place, "three"))
    assert contents(ours_over_relstorage(place, "three", "cold")) == expected


@pytest.mark.parametrize("target", [ours_over_relstorage, ours_without_history], ids=name_of)
def test_converted_database_takes_part_in_everything(target, place):
    """What was copied can be undone, rewritten and packed, and a sweep knows what it needs."""
    fill(plain_file(place, "source"))
    place.convert(plain_file(place, "source"), target(place, "target"))
    with working(target(place, "target", "cold")) as site:
        site.rewrite("small", b"fourth")
        if IStorageUndoable.providedBy(site.db.storage):
            site.undo()
            assert read(site.root["small"]) == b"third"
        site.rewrite("small", b"fifth")
        site.root["new"] = Blob(b"new")
        site.commit()
        site.db.pack()
    with working(target(place, "target", "colder")) as site:
        names = "small", "empty", "new"
        assert [read(site.root[name]) for name in names] == [b"fifth", b"", b"new"]
        assert read(site.root["tree"]["big"]) == random_bytes(0, MiB)
    assert place.keys("target") == expected_keys(contents(target(place, "target")))
    assert len(place.keys("target")) == 4


@pytest.mark.parametrize(
    "source, target",
    [
        (plain_file, ours_over_relstorage),
        (plain_file, ours_without_history),
        (plain_file, ours_over_postgresql),
        (ours_over_file, ours_over_relstorage),
        (ours_over_relstorage, ours_over_file),
        (ours_over_relstorage, plain_relstorage),
        (ours_over_relstorage, plain_file),
    ],
    ids=name_of,
)
def test_incremental_conversion_copies_only_what_is_new(source, target, place):
    """A second run brings the new transactions with their blobs, and does not read the old."""
    text = source(place, "source")
    fill(text)
    place.convert(text, target(place, "target"), "--incremental")
    first = contents(text)
    with working(text) as site:
        site.rewrite("small", b"later")
        site.root["later"] = Blob(b"a late blob")
        site.commit()
    expected = contents(text)
    log = place.convert(source(place, "source", "cold"), target(place, "target"), "--incremental")
    assert "Resuming" in log
    new = blobs_of(expected).keys() - blobs_of(first).keys()
    assert len(new) == 2
    if source is not plain_file:
        assert len([*(place.directory / "source.cold").rglob("*.blob")]) == len(new)
    found = contents(target(place, "target", "colder"))
    if target in WITHOUT_HISTORY:
        assert current(found) == current(expected)
    else:
        assert found == expected


@pytest.mark.parametrize("target", [ours_over_relstorage, ours_without_history], ids=name_of)
def test_cleared_target_holds_the_changed_source_alone(target, place):
    """A trial copy is replaced by a later one, and a pack removes what only the first needed."""
    source = plain_file(place, "source")
    fill(source)
    place.convert(source, target(place, "target"))
    with working(source) as site:
        site.rewrite("small", b"since the trial")
        site.root["new"] = Blob(b"new")
        del site.root["empty"]
        site.commit()
        site.db.pack()
    place.convert(source, target(place, "target"), "--clear")
    expected = current(contents(source))
    assert current(contents(target(place, "target"))) == expected
    place.pack(target(place, "target"))
    found = contents(target(place, "target", "cold"))
    assert current(found) == expected
    assert place.keys("target") == expected_keys(found)
    assert len(place.keys("target")) == 3


@pytest.mark.parametrize("target", [ours_over_relstorage, ours_without_history], ids=name_of)
def test_target_cleared_for_another_database_reads_its_blobs_alone(target, place):
    """Blobs of the database before are neither read nor in the way."""
    fill(plain_file(place, "first"))
    place.convert(plain_file(place, "first"), target(place, "target"))
    with working(plain_file(place, "second")) as site:
        # The same oids, of other objects.
        site.root["plain"] = PersistentMapping()
        site.root["blob"] = Blob(b"of the second")
        site.commit()
    place.convert(plain_file(place, "second"), target(place, "target"), "--clear")
    place.pack(target(place, "target"))
    found = contents(target(place, "target", "cold"))
    assert current(found) == current(contents(plain_file(place, "second")))
    assert len(blobs_of(found)) == 1


@pytest.mark.parametrize(
    "before, after",
    [(Place.file, Place.relstorage), (Place.relstorage, Place.file)],
    ids=name_of,
)
def test_database_changes_its_base_and_keeps_its_bucket(before, after, place):
    """The records alone are copied, from the base without our section, and find their blobs."""
    source = place.s3("data", before(place, "before"))
    fill(source)
    expected = contents(source)
    present = place.keys("data")
    target = place.s3("data", after(place, "after"), "cold")
    place.convert(before(place, "before"), target)
    with opened(target) as storage:
        take(storage)
        assert storage.sweep().garbage == 0
    assert place.keys("data") == present
    assert contents(target) == expected


def test_missing_blob_is_named_and_its_record_copied(place):
    """A source that has lost a file can be moved: reading it says that it is gone."""
    source = plain_file(place, "source")
    fill(source)
    with opened(source) as storage, closing(DB(storage)) as db, db.transaction() as connection:
        lost = connection.root()["small"]
        oid, serial = lost._p_oid, lost._p_activate() or lost._p_serial
        path = storage.fshelper.getBlobFilename(oid, serial)
    (place.directory / path).unlink()
    log = place.convert(source, ours_over_relstorage(place, "target"))
    assert f"copied without its blob oid=0x{u64(oid):x} tid=0x{u64(serial):x}" in log
    with opened(ours_over_relstorage(place, "target")) as storage:
        assert is_blob_record(storage.loadSerial(oid, serial))
        with pytest.raises(POSKeyError):
            storage.loadBlob(oid, serial)
    with working(ours_over_relstorage(place, "target")) as site:
        assert read(site.root["tree"]["big"]) == random_bytes(0, MiB)


# Packs


def make_garbage(place, name, text):
    """Commit revisions that a pack removes; return the keys that survive it, and the others."""
    with working(text) as site:
        site.root["kept"] = Blob(b"first")
        site.root["removed"] = Blob(b"removed")
        site.commit()
        site.rewrite("kept", b"second")
        del site.root["removed"]
        site.commit()
    transactions = contents(text)
    oids = {blob: oid for (oid, _tid), blob in blobs_of(transactions).items()}
    _tid, record, _blob = current(transactions)[oids[digest(b"second")]]
    kept = {blob_key(oids[digest(b"second")], read_reference(record))}
    assert len(place.keys(name)) == 3
    return kept, place.keys(name) - kept


@pytest.mark.parametrize("keep_history", [True, False], ids=["history", "free"])
@pytest.mark.parametrize("driver", ["sqlite3", "postgresql"])
def test_zodbpack_sweeps_when_it_packs_and_not_before(keep_history, driver, place):
    """Neither --prepack nor --check-refs-only touches the bucket; --use-prepack-state does."""
    options = {"keep_history": keep_history, "driver": driver}
    text = ours_over_relstorage(place, "data", **options)
    kept, garbage = make_garbage(place, "data", text)
    place.pack(text, "--prepack")
    assert place.keys("data") == kept | garbage
    place.pack(text, "--check-refs-only")
    assert place.keys("data") == kept | garbage
    place.pack(text, "--use-prepack-state")
    assert place.keys("data") == kept
    with working(ours_over_relstorage(place, "data", "cold", **options)) as site:
        assert read(site.root["kept"]) == b"second"


def test_zodbpack_leaves_young_objects_alone(place):
    """By default what nobody refers to stays a day: another process may be about to commit it."""
    base = place.relstorage("data")
    kept, garbage = make_garbage(place, "data", place.s3("data", base))
    place.pack(place.s3("data", base, gc_grace="24h"))
    assert place.keys("data") == kept | garbage
    place.pack(place.s3("data", base))
    assert place.keys("data") == kept


def test_zodbpack_with_days_keeps_what_can_still_be_undone(place):
    """Revisions that the pack leaves keep their blobs."""
    text = ours_over_relstorage(place, "data")
    _kept, _garbage = make_garbage(place, "data", text)
    before = place.keys("data")
    place.pack(text, "--days=1")
    assert place.keys("data") == before
    with working(text) as site:
        site.undo()
        assert read(site.root["removed"]) == b"removed"


# Without the package


PLAIN = """
import sys
sys.modules["zodb_s3blobs"] = None  # importing it is an error
import hashlib, json, tempfile, time, transaction, ZODB.config
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob, is_blob_record

db = ZODB.config.databaseFromString(sys.argv[1])
manager = transaction.TransactionManager()
connection = db.open(manager)
root = connection.root()

def undo():
    db.undo(db.undoLog(0, 1)[0]["id"], manager.get())
    manager.commit()

def rewrite(name, content):
    with root[name].open("w") as file:
        file.write(content)
    manager.commit()

def records():
    return [each for txn in db.storage.iterator() for each in txn if each.data]

def classes():
    # Of ghosts: without their bytes, blobs have no state. Oids that are gone have no class.
    current = {each.oid: each.data for txn in db.storage.iterator() for each in txn}
    return sorted(type(connection.get(oid)).__name__ for oid, data in current.items() if data)

def digest(oid, tid):
    with db.storage.openCommittedBlobFile(oid, tid) as file:
        return hashlib.sha256(file.read()).hexdigest()

def blobs():
    return sorted(
        [each.oid.hex(), each.tid.hex(), digest(each.oid, each.tid)]
        for each in records() if is_blob_record(each.data)
    )

def exported(oid):
    file = tempfile.TemporaryFile()
    connection.exportFile(oid, file)
    file.seek(0)
    return file

exec(sys.argv[2])
manager.abort()
db.close()
"""


def plainly(text, program):
    """Run a program over a database where this package cannot be imported.

    :returns: what it prints as JSON in its last line
    """
    imports = "%import relstorage" if "<relstorage>" in text else ""
    config = "\n".join([imports, "<zodb>", text, "</zodb>"])
    return json.loads(run("-c", PLAIN, config, program).splitlines()[-1])


def blobs_in_json(transactions):
    """Return what ``blobs()`` there returns."""
    found = blobs_of(transactions).items()
    return sorted([oid.hex(), tid.hex(), blob] for (oid, tid), blob in found)


def test_converted_file_storage_needs_nothing_of_us(place):
    """All objects load and all blobs are there where the package is not installed."""
    ours = ours_over_relstorage(place, "data")
    fill(ours)
    expected = contents(ours)
    place.convert(ours, plain_file(place, "plain"))
    found = plainly(plain_file(place, "plain"), "print(json.dumps([classes(), blobs()]))")
    assert found == [["Blob"] * 4 + ["PersistentMapping"] * 2, blobs_in_json(expected)]


def test_converted_file_storage_comes_back_from_a_life_without_us(place):
    """Undo, export, import, rewriting and packing there lose no blob, whoever wrote its record."""
    ours = ours_over_relstorage(place, "data")
    fill(ours)
    place.convert(ours, plain_file(place, "plain"))
    kept = plainly(
        plain_file(place, "plain"),
        """
rewrite("small", b"there")
undo()
root["copy"] = connection.importFile(exported(root["tree"]._p_oid))
root["new"] = Blob(b"new")
del root["empty"]
manager.commit()
db.pack()
rewrite("small", b"there again")
undo()
rewrite("new", b"newer")
undo()
undo()
print(json.dumps(blobs()))
""",
    )
    place.convert(plain_file(place, "plain"), ours_over_relstorage(place, "back"))
    back = contents(ours_over_relstorage(place, "back", "cold"))
    assert blobs_in_json(back) == kept
    assert place.keys("back") == expected_keys(back)
    with working(ours_over_relstorage(place, "back")) as site:
        assert read(site.root["small"]) == b"third"
        assert read(site.root["copy"]["big"]) == random_bytes(0, MiB)
        assert read(site.root["new"]) == b"newer"
        site.db.pack()
        assert len(place.keys("back")) == 4


@pytest.mark.parametrize("keep_history", [True, False], ids=["history", "free"])
@pytest.mark.parametrize("driver", ["sqlite3", "postgresql"])
def test_relstorage_comes_back_from_a_life_without_us(keep_history, driver, place):
    """Without our section objects load, and what is written there does no harm to blobs in S3."""
    options = {"keep_history": keep_history, "driver": driver}
    text = ours_over_relstorage(place, "data", **options)
    fill(text)
    if keep_history:
        with working(text) as site:
            site.rewrite("small", b"undone there")
    found = plainly(
        place.relstorage("data", **options),
        """
if db.supportsUndo():
    undo()  # of our last rewriting
    undo()  # again
    undo()
root["tree"]["plain"] = "there"
manager.commit()
db.pack()
if db.supportsUndo():
    del root["tree"]["big"]
    manager.commit()
    undo()
print(json.dumps([classes(), len(exported(root["tree"]._p_oid).read())]))
""",
    )
    assert found[0] == ["Blob"] * 3 + ["PersistentMapping"] * 2
    assert found[1] > 0
    cold = ours_over_relstorage(place, "data", "cold", **options)
    with working(cold) as site:
        assert site.root["tree"]["plain"] == "there"
        assert read(site.root["small"]) == b"third"
        assert read(site.root["tree"]["big"]) == random_bytes(0, MiB)
        site.root["new"] = Blob(b"new")
        site.commit()
    place.pack(cold)
    assert place.keys("data") == expected_keys(contents(cold))
    assert len(place.keys("data")) == 4


def test_relstorage_comes_back_with_blobs_of_its_own_directory(place):
    """Blobs written there into a blob directory are read from it as a source."""
    fill(ours_over_relstorage(place, "data"))
    with_blobs = place.relstorage("data", with_blobs=True)
    plainly(
        with_blobs,
        """
root["tree"]["own"] = Blob(b"own")
manager.commit()
root["small"] = Blob(b"small there")
manager.commit()
undo()
with root["tree"]["own"].open("a") as file:
    file.write(b" and more")
manager.commit()
print(json.dumps("done"))
""",
    )
    source = f"<blobdir-source>\npath {place.directory}/data.blobs\n</blobdir-source>"
    back = place.s3("data", f"{place.relstorage('data')}\n{source}", "cold")
    with working(back) as site:
        assert read(site.root["small"]) == b"third"
        assert read(site.root["tree"]["own"]) == b"own and more"
        site.undo()
        assert read(site.root["tree"]["own"]) == b"own"
        site.rewrite("small", b"fourth")
    found = blobs_of(contents(back)).values()  # reads all revisions
    contents_there = [b"own", b"small there", b"own and more"]
    assert {digest(content) for content in contents_there} <= {*found}


# One bucket with both forms of keys


def test_bucket_with_both_forms_of_keys_is_read_and_swept_exactly(place):
    """A FileStorage whose records carry references goes on by tid, beside what they refer to."""
    fill(ours_over_relstorage(place, "source"))
    place.convert(ours_over_relstorage(place, "source"), ours_over_file(place, "data"))
    by_record = place.keys("data")
    assert all(len(key.rpartition("/")[2]) == len("0" * 32 + ".blob") for key in by_record)
    with working(ours_over_file(place, "data")) as site:
        site.rewrite("small", b"by tid")
        site.undo()  # to a revision by record
        site.undo()
        assert read(site.root["small"]) == b"by tid"
        site.rewrite("empty", b"also by tid")
        site.undo()
        site.root["new"] = Blob(b"new")
        site.commit()
        with site.root["tree"]["big"].open("a") as file:
            file.write(b"more")
        site.commit()
    by_tid = place.keys("data") - by_record
    assert len(by_tid) == 5
    cold = contents(ours_over_file(place, "data", "cold"))
    assert by_record | by_tid == expected_keys(cold)
    with opened(ours_over_file(place, "data", "colder")) as storage:
        report = storage.sweep()
        assert (report.garbage, report.foreign, report.kept) == (0, 0, report.listed)
    with working(ours_over_file(place, "data", "colder")) as site:
        site.db.pack()
        root = site.root
        found = [read(root["small"]), read(root["empty"]), read(root["new"])]
        assert found == [b"by tid", b"", b"new"]
        assert read(root["tree"]["big"]) == random_bytes(0, MiB) + b"more"
    left = contents(ours_over_file(place, "data", "coldest"))
    assert place.keys("data") == expected_keys(left)
    assert len(place.keys("data") & by_record) == 1
    assert len(place.keys("data") & by_tid) == 3
