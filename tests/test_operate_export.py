"""A site can leave: plain ZODB reads from a blob directory what was in the bucket."""

from contextlib import closing
from contextlib import contextmanager
from dataclasses import replace
import os
from pathlib import Path
import random
import signal
import stat

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.config import databaseFromString
from ZODB.config import storageFromString
from ZODB.serialize import referencesf

from zodb_s3blobs.directorylock import DirectoryLock
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.operate import needs
from zodb_s3blobs.operate.origins import BlobDirectory

from .disks import MEGABYTE
from .disks import on_disks
from .migrations import blobdir_source
from .migrations import end_of
from .migrations import files_below
from .migrations import fill
from .migrations import objects
from .migrations import OLD
from .migrations import Operator
from .migrations import read_all
from .migrations import relstorage
from .migrations import SignallingServer
from .migrations import write_configuration
from .migrations import ZLIB
from .services.location import boto3_client
from .services.location import keys
from .services.zeo import ZeoServer
from .storages import filestorage
from .storages import open_db
from .storages import random_bytes


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch):
    """What a run leaves for the next one."""
    directory = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(directory))
    return directory


@pytest.fixture
def operate(tmp_path, capsys):
    """Return a function that writes a configuration and returns an `Operator` of it."""
    return lambda location, **options: Operator(
        write_configuration(tmp_path, location, **options), capsys
    )


@contextmanager
def database(text):
    """Context manager: a database without S3."""
    opened = databaseFromString(
        f"%import relstorage\n%import zc.zlibstorage\n<zodb>\n{text}\n</zodb>"
    )
    with closing(opened):
        yield opened


def store(location, directory, count, change=0, **options):
    """Commit blobs to the bucket, and change some; return the bytes by (oid, tid)."""
    found = {}
    with closing(open_db(location, directory, ["relstorage"], **options)) as db:
        for begin, numbers in ((0, range(count)), (count, range(change))):
            with db.transaction() as connection:
                blobs = connection.root().setdefault("blobs", [])
                begin = begin or len(blobs)
                for number in numbers:
                    data = random_bytes((begin, number), 100 + number)
                    if begin != count:
                        blobs.append(Blob(data))
                    else:
                        with blobs[number].open("w") as file:
                            file.write(data)
                connection.root()._p_changed = True
            found |= current(db)
    return found


def current(db):
    """Return the bytes of the current revisions, by (oid, tid)."""
    return {parse_key(key): data for key, data in read_all(db).items()}


def exported(directory):
    """Return the bytes of the files of a blob directory, by (oid, tid)."""
    blobs = BlobDirectory(str(directory))
    return {(each.oid, each.name): Path(blobs.path(each)).read_bytes() for each in blobs.blobs()}


@pytest.mark.parametrize("addressing", ["tid", "record"])
def test_plain_filestorage_reads_what_was_exported(s3, tmp_path, operate, addressing, monkeypatch):
    """All revisions, by record, too; it can go on with them."""
    monkeypatch.setattr(needs, "NEEDS_AT_ONCE", 5)
    expected = store(s3, tmp_path, 12, change=4, addressing=addressing)
    status, result = operate(s3, addressing=addressing)("export", f"{tmp_path}/blobs")
    assert (status, result["problems"], result["copied"]) == (0, [], 16)
    assert exported(tmp_path / "blobs") == expected
    assert (tmp_path / "blobs" / ".layout").read_text() == "bushy"
    with database(OLD.format(directory=tmp_path)) as db:
        before = current(db)
        assert len(before) == 12
        assert before.items() <= expected.items()
        for (oid, tid), data in expected.items():
            assert Path(db.storage.loadBlob(oid, tid)).read_bytes() == data
        with db.transaction() as connection:
            with connection.root()["blobs"][0].open("r+") as file:
                file.write(b"goes on")
            connection.root()["new"] = Blob(b"goes on")
        db.undo(db.undoInfo()[0]["id"])
        transaction.commit()
        assert [*current(db).values()] == [*before.values()]
        db.pack()
        assert [*current(db).values()] == [*before.values()]


@pytest.mark.parametrize("place", ["inside", "around"])
def test_compressed_records_are_understood(s3, tmp_path, operate, place):
    """Whichever wrapper is inside of the other, all blobs are found."""
    options = (
        {"around": ZLIB} if place == "around" else {"base": ZLIB.format(filestorage(tmp_path))}
    )
    imports = ["zc.zlibstorage"]
    with closing(open_db(s3, tmp_path, imports, addressing="record", **options)) as db:
        with db.transaction() as connection:
            connection.root()["blobs"] = [Blob(b"%d" % number) for number in range(5)]
        expected = current(db)
    status, _result = operate(s3, addressing="record", **options)("export", f"{tmp_path}/blobs")
    assert status == 0
    assert exported(tmp_path / "blobs") == expected
    with database(ZLIB.format(OLD.format(directory=tmp_path))) as db:
        assert current(db) == expected


def test_files_are_as_zodb_makes_them(s3, tmp_path, operate):
    """Nobody writes them; who may read the directory may read them."""
    store(s3, tmp_path, 3)
    before = os.umask(0o027)
    try:
        (tmp_path / "blobs").mkdir(0o750)
        assert operate(s3)("export", f"{tmp_path}/blobs")[0] == 0
    finally:
        os.umask(before)
    files = [path for path in files_below(tmp_path / "blobs") if path.suffix == ".blob"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o440}
    assert os.listdir(tmp_path / "blobs" / "tmp") == []


def test_new_directory_is_private(s3, tmp_path, operate):
    """Whatever the umask: blobs are nobody else's business."""
    store(s3, tmp_path, 1)
    assert operate(s3)("export", f"{tmp_path}/new/blobs")[0] == 0
    assert stat.S_IMODE((tmp_path / "new" / "blobs").stat().st_mode) == 0o700


@pytest.mark.parametrize("keep_history", [True, False])
def test_relstorages_share_what_was_exported(s3, tmp_path, operate, keep_history):
    """Records that refer to an object, and the revisions that they belong to."""
    place = "sqlite3", f"{tmp_path}/sqlite"
    base = relstorage(*place, keep_history)
    expected = store(s3, tmp_path, 6, change=2, base=base)
    assert operate(s3, base=base)("export", f"{tmp_path}/blobs")[0] == 0
    old = relstorage(*place, keep_history, blob_dir=f"{tmp_path}/blobs", shared_blob_dir="true")
    with database(old) as db:
        found = current(db)
        assert len(found) == 6
        assert found.items() <= expected.items()
    assert exported(tmp_path / "blobs") == (expected if keep_history else found)


def test_zeo_server_serves_what_was_exported(s3, tmp_path, operate, zeo):
    """From a client's host, while the server runs."""
    text = "<filestorage 1>\npath {0}/Data.fs\n{1}\n</filestorage>"
    with ZeoServer(tmp_path / "server", text.format(tmp_path, "")) as server:
        base = f"<zeoclient>\nserver {server.address}\n</zeoclient>"
        expected = store(s3, tmp_path, 6, change=2, base=base)
        assert operate(s3, base=base)("export", f"{tmp_path}/blobs")[0] == 0
    assert exported(tmp_path / "blobs") == expected
    blobs = f"blob-dir {tmp_path}/blobs"
    with ZeoServer(tmp_path / "server", text.format(tmp_path, blobs)) as server:
        client = f"<zeoclient>\nserver {server.address}\nblob-dir {tmp_path}/client\n</zeoclient>"
        with database(client) as db:
            assert len(current(db)) == 6
            assert current(db).items() <= expected.items()


def test_next_run_copies_what_is_new(s3, tmp_path, operate):
    """And asks for nothing else."""
    store(s3, tmp_path, 10)
    with SignallingServer(s3.endpoint_url, "GET") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        assert run("export", f"{tmp_path}/blobs")[0] == 0
        expected = store(s3, tmp_path, 1)
        server.requests.clear()
        status, result = run("export", f"{tmp_path}/blobs")
        assert (status, result["revisions"], result["copied"]) == (0, 11, 1)
        assert server.kinds() == ["GET"]
    assert exported(tmp_path / "blobs") == expected


def test_site_runs_meanwhile(s3, tmp_path, operate):
    """It has its database open."""
    with closing(open_db(s3, tmp_path)) as db:
        with db.transaction() as connection:
            connection.root()["blobs"] = [Blob(b"%d" % number) for number in range(5)]
        status, result = operate(s3)("export", f"{tmp_path}/blobs")
        assert (status, result["copied"]) == (0, 5)
        assert exported(tmp_path / "blobs") == current(db)


def test_blob_that_is_in_a_source_only_is_copied(s3, tmp_path, operate):
    """Not all has been migrated yet; what is in the bucket is damaged, or all is there."""
    expected = fill(OLD.format(directory=tmp_path), 5)
    damaged, present, *_missing = sorted(expected)
    client = boto3_client(s3)
    for key, body in ((damaged, b"other bytes"), (present, expected[present])):
        client.put_object(
            Bucket=s3.bucket,
            Key=key,
            Body=body,
            Metadata={"zodb-sha256": "0" * 64} if key == damaged else {},
        )
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    status, result = operate(s3, base=base)("export", f"{tmp_path}/other")
    assert (status, result["problems"]) == (0, [])
    assert exported(tmp_path / "other") == exported(tmp_path / "blobs")


def test_old_directory_gets_what_is_new(s3, tmp_path, operate):
    """The shortest way back, while it is still a source."""
    fill(OLD.format(directory=tmp_path), 5)
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    before = files_below(tmp_path / "blobs")
    store(s3, tmp_path, 2, base=base)
    status, result = operate(s3, base=base)("export", f"{tmp_path}/blobs")
    assert (status, result["revisions"], result["copied"]) == (0, 7, 2)
    assert before.items() <= files_below(tmp_path / "blobs").items()
    with database(OLD.format(directory=tmp_path)) as db:
        assert len(current(db)) == 7


def test_blob_that_is_nowhere_is_told(s3, tmp_path, operate):
    """All others are there."""
    expected = store(s3, tmp_path, 5)
    lost = min(expected)
    boto3_client(s3).delete_object(Bucket=s3.bucket, Key=blob_key(*lost))
    run = operate(s3)
    status, result = run("export", f"{tmp_path}/blobs")
    assert (status, result["missing"], result["copied"]) == (1, 1, 4)
    assert result["problems"][0].startswith(blob_key(*lost))
    del expected[lost]
    assert exported(tmp_path / "blobs") == expected
    assert os.listdir(tmp_path / "blobs" / "tmp") == []


def test_revision_that_is_packed_meanwhile_is_no_failure(s3, tmp_path, operate):
    """Its object was swept after the database was read."""
    store(s3, tmp_path, 4, change=4)
    with closing(open_db(s3, tmp_path)) as db:

        class Packing(SignallingServer):
            def _look(self, request):
                if request.kind == "GET" and "/blobs/" in request.target:
                    self.instead = lambda request: None
                    db.pack()

        with Packing(s3.endpoint_url, "GET") as server:
            run = operate(replace(s3, endpoint_url=server.endpoint_url))
            status, result = run("export", f"{tmp_path}/blobs", "--workers", "1")
        assert (status, result["missing"], result["problems"]) == (0, 0, [])
        assert (result["gone"], result["copied"]) == (4, 4)
        assert exported(tmp_path / "blobs") == current(db)


def test_damaged_object_is_told_and_no_file_is_made(s3, tmp_path, operate):
    """Bytes that are not those that were stored are worse than none."""
    expected = store(s3, tmp_path, 5)
    lost = min(expected)
    client = boto3_client(s3)
    head = client.head_object(Bucket=s3.bucket, Key=blob_key(*lost))
    client.put_object(
        Bucket=s3.bucket,
        Key=blob_key(*lost),
        Body=expected[lost][::-1],
        Metadata=head["Metadata"],
    )
    status, result = operate(s3)("export", f"{tmp_path}/blobs")
    assert (status, result["failed"], result["copied"]) == (1, 1, 4)
    del expected[lost]
    assert exported(tmp_path / "blobs") == expected


def test_full_disk_ends_the_run_and_leaves_whole_files(s3, tmp_path, operate):
    """Whoever makes room lets it go on."""
    with closing(open_db(s3, tmp_path)) as db:
        with db.transaction() as connection:
            blobs = [Blob(random_bytes(number, MEGABYTE // 2)) for number in range(20)]
            connection.root()["blobs"] = blobs
        expected = current(db)
    run = operate(s3)

    def export():
        status, result = run("export", f"{tmp_path}/disk/blobs", "--workers", "2")
        assert status == 2
        found = exported(tmp_path / "disk" / "blobs")
        # Some are written just when the error comes.
        assert 0 < result["copied"] <= len(found) < 20
        assert found.items() < expected.items()
        assert os.listdir(tmp_path / "disk" / "blobs" / "tmp") == []

    on_disks(export, tmp_path / "disk")
    assert run("export", f"{tmp_path}/disk/blobs")[0] == 0
    assert exported(tmp_path / "disk" / "blobs") == expected


@pytest.mark.parametrize("seed", [0])
def test_killed_again_and_again_it_ends_exact(s3, tmp_path, operate, seed):
    """At no moment there is a file with other bytes than the blob's."""
    rng = random.Random(seed)
    expected = store(s3, tmp_path, 150, change=20)
    with SignallingServer(s3.endpoint_url, "GET") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        for _kill in range(4):
            server.arm(rng.randrange(1, 35))
            server.process = run.start("export", f"{tmp_path}/blobs", "--workers", "8")
            assert end_of(server.process)[0] == -signal.SIGKILL
            assert exported(tmp_path / "blobs").items() < expected.items()
        server.arm(0)
        status, result = run("export", f"{tmp_path}/blobs")
    assert (status, result["revisions"], result["problems"]) == (0, 170, [])
    assert exported(tmp_path / "blobs") == expected
    assert os.listdir(tmp_path / "blobs" / "tmp") == []


def test_stopped_run_is_continued_with_what_is_new_since(s3, tmp_path, operate, state):
    """Ctrl-C, or a scheduler's end of time, costs nothing but time."""
    store(s3, tmp_path, 150)
    with SignallingServer(s3.endpoint_url, "GET") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        server.arm(30, signal.SIGINT)
        server.process = run.start("export", f"{tmp_path}/blobs", "--workers", "2")
        status, result = end_of(server.process)
        assert status == 3
        copied = result["copied"]
        assert 20 < copied < 150
        expected = store(s3, tmp_path, 3)
        status, result = run("export", f"{tmp_path}/blobs")
    assert (status, result["revisions"], result["copied"]) == (0, 153, 153 - copied)
    assert exported(tmp_path / "blobs") == expected
    assert not any(path.is_file() for path in state.rglob("*"))


@pytest.mark.parametrize("place", ["cache", "cache/below", ""])
def test_place_that_is_something_else_is_refused(s3, tmp_path, operate, place):
    """Such as the cache, which evicts what is there."""
    store(s3, tmp_path, 1)
    before = files_below(tmp_path)
    status, text = operate(s3)("export", f"{tmp_path}/{place}")
    assert status == 2
    assert text
    assert {name for name in files_below(tmp_path) if name.suffix == ".blob"} == {
        name for name in before if name.suffix == ".blob"
    }


def test_two_exports_into_one_directory_are_refused(s3, tmp_path, operate):
    """They would write the same temporary files."""
    store(s3, tmp_path, 1)
    run = operate(s3)
    assert run("export", f"{tmp_path}/blobs")[0] == 0
    with DirectoryLock(f"{tmp_path}/blobs/tmp").held():
        status, _text = run("export", f"{tmp_path}/blobs")
    assert status == 2


def test_objects_come_to_keys_that_older_versions_know(s3, tmp_path, operate):
    """The records lose their references; the next run finds nothing to do."""
    base = relstorage("sqlite3", f"{tmp_path}/sqlite", keep_history=False)
    before = store(s3, tmp_path, 5, base=base)
    run = operate(s3, base=base)
    status, result = run("export", "--by-tid")
    assert (status, result["rewritten"]) == (0, 5)
    status, result = run("export", "--by-tid")
    assert (status, result["rewritten"], result["copied"]) == (0, 0, 0)
    with closing(open_db(s3, tmp_path, ["relstorage"], base=base)) as db:
        after = current(db)
        assert sorted(after.values()) == sorted(before.values())
        assert {blob_key(*revision) for revision in after} <= set(keys(s3, "blobs/"))
        storage = storageFromString(f"%import relstorage\n{base}")
        with closing(storage):
            for oid, _tid in after:
                assert b"zodb-s3blobs:" not in storage.load(oid)[0]
                assert not referencesf(storage.load(oid)[0])
    found = objects(s3)
    assert all(found[blob_key(*revision)] == data for revision, data in after.items())


def test_database_that_a_site_has_is_not_rewritten(s3, tmp_path, operate):
    """Its records change: the site must be stopped."""
    with closing(open_db(s3, tmp_path, addressing="record")):
        status, text = operate(s3, addressing="record")("export", "--by-tid")
    assert status == 2
    assert "stop" in text


def test_rewriting_can_be_stopped(s3, tmp_path, operate):
    """The next run goes on."""
    base = relstorage("sqlite3", f"{tmp_path}/sqlite", keep_history=False)
    store(s3, tmp_path, 5, base=base)
    run = operate(s3, base=base)
    status, result = run("export", "--by-tid", "--time-limit", "0.000001s")
    assert (status, result["rewritten"]) == (3, 0)
    assert run("export", "--by-tid")[1]["rewritten"] == 5
