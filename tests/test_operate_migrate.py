"""Blobs are brought into the bucket from wherever they were, whatever stops the run."""

from contextlib import closing
from contextlib import ExitStack
from dataclasses import replace
import os
from pathlib import Path
import random
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time

import pytest
from ZODB.blob import Blob
from ZODB.blob import FilesystemHelper
from ZODB.config import databaseFromString
from ZODB.FileStorage import FileStorage
from ZODB.serialize import referencesf
from ZODB.utils import p64

from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import parse_key
from zodb_s3blobs.operate import migration
from zodb_s3blobs.operate.main import main
from zodb_s3blobs.operate.origins import BlobDirectory
from zodb_s3blobs.operate.origins import compared
from zodb_s3blobs.operate.origins import Found
from zodb_s3blobs.operate.running import Work
from zodb_s3blobs.ownership import MARKER

from .faults import FaultyServer
from .faults import s3_error
from .migrations import blobdir_source
from .migrations import end_of
from .migrations import files_below
from .migrations import fill
from .migrations import make_blobs
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
from .services.location import new_bucket
from .services.zeo import ZeoServer
from .storages import filestorage
from .storages import open_db
from .storages import PATIENCE
from .storages import start


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


def old_database(directory, count=20, layout="bushy", **options):
    """Make a FileStorage with a blob directory; return what its blobs are."""
    if layout == "lawn":
        FilesystemHelper(f"{directory}/blobs", "lawn").create()
    return fill(OLD.format(directory=directory), count, **options)


def place_of(result):
    """Return what was told of the only place."""
    (place,) = result["places"]
    return place


# The order of the keys


@pytest.mark.parametrize("layout", ["bushy", "lawn"])
@pytest.mark.parametrize("seed", range(4))
def test_directory_is_walked_in_the_order_of_the_keys(tmp_path, layout, seed):
    """Whatever the oids, and from wherever on: it can be compared with a listing."""
    rng = random.Random(seed)
    oids = {0, 0xF, 0x10, 0xFF, 0x100, (1 << 64) - 1}
    oids |= {rng.getrandbits(rng.randrange(1, 65)) for _ in range(60)}
    revisions = [(oid, rng.getrandbits(rng.randrange(1, 65))) for oid in oids for _ in range(2)]
    make_blobs(tmp_path / "blobs", revisions, layout)
    (tmp_path / "blobs" / "0x00" / "0xzz").mkdir(parents=True)
    expected = sorted({blob_key(p64(oid), p64(tid)) for oid, tid in revisions})
    directory = BlobDirectory(str(tmp_path / "blobs"))
    found = list(directory.blobs())
    assert [each.key for each in found] == expected
    assert all(each.size == int.from_bytes(each.oid, "big") % 7 for each in found)
    for after in [*rng.sample(expected, 10), blob_key(p64(0x123), p64(5))]:
        rest = [key for key in expected if key > after]
        assert [each.key for each in directory.blobs(after)] == rest


def test_what_is_no_file_of_a_blob_is_passed_over(tmp_path):
    """Temporary files, locks and directories are no blobs."""
    make_blobs(tmp_path / "blobs", [(1, 5)])
    directory = BlobDirectory(str(tmp_path / "blobs"))
    (found,) = directory.blobs()
    beside = Path(directory.path(found)).parent
    for name in (".lock", "0x05.blob.tmp", "0x5.blob", "tmp0x06.blob", "0x0007.blob"):
        (beside / name).touch()
    assert [*directory.blobs()] == [found]


def test_directory_that_goes_away_is_an_error(tmp_path):
    """It has not become empty."""
    make_blobs(tmp_path / "blobs", [(oid, 5) for oid in range(0x300)])
    directory = BlobDirectory(str(tmp_path / "blobs"))
    blobs = directory.blobs()
    next(blobs)
    os.rename(tmp_path / "blobs", tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        list(blobs)


class Listing:
    """A client that only lists."""

    def __init__(self, *pages):
        self._pages = pages

    def list_pages(self, prefix, after=""):
        return iter(self._pages)


def test_listing_that_is_not_sorted_is_an_error():
    """What it has would seem to be missing."""

    client = Listing([Listed("blobs/2/1.blob"), Listed("blobs/1/1.blob")])
    blobs = [Found(f"blobs/{n}/1.blob", p64(n), p64(1), 0) for n in (1, 2, 3)]
    with pytest.raises(PermanentS3Error, match="sort"):
        list(compared(blobs, client))


class Listed:
    """What a bucket tells of an object."""

    def __init__(self, key, size=0):
        self.key = key
        self.size = size


@pytest.mark.parametrize("seed", range(5))
def test_blobs_are_compared_with_a_listing_of_many_pages(seed):
    """Each with its own object, wherever the pages end, and whatever else is in the bucket."""
    rng = random.Random(seed)
    numbers = [rng.getrandbits(rng.randrange(1, 65)) for _ in range(200)]
    blobs = sorted({Found(blob_key(p64(n), p64(1)), p64(n), p64(1), n % 9) for n in numbers})
    objects = [Listed(found.key, found.size) for found in blobs if rng.random() < 0.5]
    objects += [Listed(f"blobs/{rng.getrandbits(30):x}/2.blob") for _ in range(100)]
    objects = sorted(objects, key=lambda listed: listed.key)
    pages = []
    while objects:
        size = rng.randrange(1, 20)
        pages.append(objects[:size])
        del objects[:size]
    by_key = {listed.key: listed for page in pages for listed in page}
    found = list(compared(blobs, Listing(*pages)))
    assert found == [(each, by_key.get(each.key)) for each in blobs]


# From a blob directory


@pytest.mark.parametrize("at_once", [migration.AT_ONCE, 7])
@pytest.mark.parametrize("layout", ["bushy", "lawn"])
def test_blobs_of_a_directory_come_into_the_bucket(
    s3, tmp_path, operate, layout, at_once, monkeypatch
):
    """All revisions, each once; the directory stays as it is."""
    monkeypatch.setattr(migration, "AT_ONCE", at_once)
    expected = old_database(tmp_path, 20, layout, change=5)
    before = files_below(tmp_path / "blobs")
    run = operate(s3)
    status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
    assert (status, place_of(result)["problems"]) == (0, [])
    assert objects(s3) == expected
    assert len(expected) == 25
    assert place_of(result)["uploaded"] == place_of(result)["verified"] == 25
    assert place_of(result)["uploaded_bytes"] == sum(map(len, expected.values()))
    status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs")
    place = place_of(result)
    assert (status, place["found"], place["present"], place["uploaded"]) == (0, 25, 25, 0)
    assert files_below(tmp_path / "blobs") == before


@pytest.mark.parametrize("addressing", ["tid", "record"])
@pytest.mark.parametrize("place", ["inside", "around"])
def test_compressed_records_are_understood(s3, tmp_path, operate, place, addressing):
    """Whichever wrapper is inside of the other, what is needed is found, and nothing else."""
    old = OLD.format(directory=tmp_path)
    expected = fill(ZLIB.format(old), 12, change=4)
    options = (
        {"around": ZLIB} if place == "around" else {"base": ZLIB.format(filestorage(tmp_path))}
    )
    run = operate(s3, addressing=addressing, **options)
    status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
    assert (status, place_of(result)["problems"]) == (0, [])
    assert objects(s3) == expected


def test_sources_of_the_configuration_are_the_default(s3, tmp_path, operate):
    """Once they are in the bucket a site needs them no more."""
    expected = old_database(tmp_path)
    run = operate(s3, base=filestorage(tmp_path) + blobdir_source(tmp_path / "blobs"))
    status, result = run("migrate")
    assert (status, place_of(result)["from"]) == (0, f"{tmp_path}/blobs")
    assert objects(s3) == expected


def test_several_sources_are_brought_one_after_the_other(s3, tmp_path, operate):
    """What two of them have is uploaded once."""
    expected = old_database(tmp_path, 9)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    shutil.copytree(tmp_path / "blobs", tmp_path / "others")
    blobs = [Path(directory.path(found)) for found in directory.blobs()]
    for path in blobs[:3]:
        path.unlink()
    for path in blobs[6:]:
        (tmp_path / "others" / path.relative_to(tmp_path / "blobs")).unlink()
    sources = blobdir_source(tmp_path / "blobs") + blobdir_source(tmp_path / "others")
    status, result = operate(s3, base=filestorage(tmp_path) + sources)("migrate", "--verify")
    assert status == 0
    found = [(place["uploaded"], place["present"]) for place in result["places"]]
    assert found == [(6, 0), (3, 3)]
    assert objects(s3) == expected


def test_result_is_told_to_people(s3, tmp_path, operate, capsys):
    """A line for each number and each problem, and what to do next."""
    old_database(tmp_path, 3)
    run = operate(s3)
    arguments = "--from-blob-dir", f"{tmp_path}/blobs", "--remove-local"
    assert main(["-C", run.path, "migrate", *arguments]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {"uploaded: 3", "verified: 3", f"from: {tmp_path}/blobs"} <= {*told}
    assert "--delete" in told[-1]
    (key, *_others) = keys(s3, "blobs/")
    boto3_client(s3).put_object(Bucket=s3.bucket, Key=key, Body=b"other")
    assert main(["-C", run.path, "migrate", *arguments]) == 1
    assert f"problem: {key}: " in capsys.readouterr().out


def test_nowhere_to_migrate_from_is_told(s3, tmp_path, operate):
    """The command says what is missing."""
    old_database(tmp_path, 1)
    status, text = operate(s3)("migrate")
    assert status == 2
    assert "--from-blob-dir" in text


def test_directory_that_seems_not_to_be_mounted_is_refused(s3, tmp_path, operate):
    """Nobody shall think that all of its blobs are in the bucket."""
    old_database(tmp_path, 1)
    (tmp_path / "mount").mkdir()
    status, text = operate(s3)("migrate", "--from-blob-dir", f"{tmp_path}/mount")
    assert status == 2
    assert "mounted" in text


def test_what_the_database_does_not_need_is_left(s3, tmp_path, operate):
    """Packed revisions, which a FileStorage without this directory left there."""
    expected = old_database(tmp_path, 6, change=6)
    with closing(FileStorage(f"{tmp_path}/Data.fs")) as storage:
        storage.pack(time.time() + 1, referencesf)
        alive = {blob_key(record.oid, record.tid) for txn in storage.iterator() for record in txn}
    status, result = operate(s3)("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
    place = place_of(result)
    assert (status, place["uploaded"], place["unneeded"]) == (0, 6, 6)
    assert objects(s3) == {key: data for key, data in expected.items() if key in alive}


def test_what_may_not_be_complete_yet_is_left_to_the_next_run(s3, tmp_path, operate):
    """A FileStorage puts files in their place before it commits."""
    old_database(tmp_path, 3)
    make_blobs(tmp_path / "blobs", [(1, (1 << 63) - 1)])
    status, result = operate(s3)("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
    place = place_of(result)
    assert (status, place["uploaded"], place["newer"]) == (0, 3, 1)
    assert len(keys(s3, "blobs/")) == 3


def test_directory_of_another_database_is_told(s3, tmp_path, operate):
    """Nothing of it is uploaded."""
    old_database(tmp_path, 3)
    (tmp_path / "other").mkdir()
    with closing(FileStorage(f"{tmp_path}/Data.fs")) as storage:
        last = int.from_bytes(storage.lastTransaction(), "big")
    # The root object is no blob.
    make_blobs(tmp_path / "other" / "blobs", [(0, last - 1)])
    run = operate(s3)
    status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/other/blobs")
    assert status == 1
    assert "right place" in place_of(result)["problems"][0]
    assert keys(s3, "blobs/") == []


def test_object_of_another_size_is_told_and_left(s3, tmp_path, operate):
    """Nobody knows which of the two is right."""
    expected = old_database(tmp_path, 5)
    key = min(expected)
    boto3_client(s3).put_object(Bucket=s3.bucket, Key=key, Body=b"something else")
    status, result = operate(s3)("migrate", "--from-blob-dir", f"{tmp_path}/blobs")
    assert status == 1
    (problem,) = place_of(result)["problems"]
    assert problem.startswith(key)
    assert objects(s3) == {**expected, key: b"something else"}


def test_file_that_cannot_be_read_does_not_hold_up_the_others(s3, tmp_path, operate):
    """It is told, and the next run brings it."""
    expected = old_database(tmp_path, 5)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    bad = list(directory.blobs())[2]
    os.chmod(directory.path(bad), 0)
    run = operate(s3)
    status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs")
    assert (status, place_of(result)["failed"], place_of(result)["uploaded"]) == (1, 1, 4)
    assert place_of(result)["problems"][0].startswith(bad.key)
    os.chmod(directory.path(bad), 0o400)
    assert run("migrate", "--from-blob-dir", f"{tmp_path}/blobs")[0] == 0
    assert objects(s3) == expected


def test_link_to_nowhere_is_told(s3, tmp_path, operate):
    """It is not a blob that was packed."""
    old_database(tmp_path, 3)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    found = next(directory.blobs())
    os.remove(directory.path(found))
    os.symlink(tmp_path / "nowhere", directory.path(found))
    status, result = operate(s3)("migrate", "--from-blob-dir", f"{tmp_path}/blobs")
    place = place_of(result)
    assert (status, place["failed"], place["gone"], place["uploaded"]) == (1, 1, 0, 2)
    assert place["problems"][0].startswith(found.key)


# While others change things


class Meanwhile(SignallingServer):
    """Does something at the first upload of a blob."""

    def __init__(self, upstream, act):
        super().__init__(upstream, "PUT")
        self._act = act
        self._first = threading.Lock()

    def _look(self, request):
        is_upload = request.kind == "PUT" and "/blobs/" in request.target
        if is_upload and self._first.acquire(blocking=False):
            self._act(request)
        return None


def test_file_that_vanishes_meanwhile_is_no_failure(s3, tmp_path, operate):
    """It was packed."""
    expected = old_database(tmp_path, 30)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    *_others, last = directory.blobs()

    def pack(request):
        os.remove(directory.path(last))

    with Meanwhile(s3.endpoint_url, pack) as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        status, result = run(
            "migrate", "--workers", "1", "--from-blob-dir", f"{tmp_path}/blobs", "--verify"
        )
    del expected[last.key]
    place = place_of(result)
    assert (status, place["gone"], place["uploaded"], place["problems"]) == (0, 1, 29, [])
    assert objects(s3) == expected


def test_file_that_changes_meanwhile_is_uploaded_again(s3, tmp_path, operate):
    """As one that was not complete yet when its upload began."""
    old_database(tmp_path, 1)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    (found,) = directory.blobs()

    def complete(request):
        path = Path(directory.path(found))
        path.chmod(0o600)
        path.write_bytes(b"all of it")

    with Meanwhile(s3.endpoint_url, complete) as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
    assert (status, place_of(result)["uploaded"]) == (0, 1)
    assert objects(s3) == {found.key: b"all of it"}


def test_file_that_changes_all_the_time_is_told(s3, tmp_path, operate):
    """Nobody knows what was uploaded, so it does not stay."""
    expected = old_database(tmp_path, 4)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    found = next(directory.blobs())

    class Changing(SignallingServer):
        def _look(self, request):
            if request.kind == "PUT" and found.key in request.target:
                path = Path(directory.path(found))
                path.chmod(0o600)
                path.write_bytes(path.read_bytes() + b".")

    with Changing(s3.endpoint_url, "PUT") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs")
    place = place_of(result)
    assert (status, place["failed"], place["uploaded"]) == (1, 1, 3)
    assert "changes" in place["problems"][0]
    del expected[found.key]
    assert objects(s3) == expected


def test_file_that_vanishes_before_it_is_verified_is_no_failure(s3, tmp_path, operate):
    """It was packed."""
    old_database(tmp_path, 30)
    directory = BlobDirectory(f"{tmp_path}/blobs")
    *_others, last = directory.blobs()
    arguments = "migrate", "--workers", "1", "--from-blob-dir", f"{tmp_path}/blobs"

    class Packing(SignallingServer):
        def _look(self, request):
            path = directory.path(last)
            if request.kind == "HEAD" and os.path.exists(path):
                os.remove(path)

    with Packing(s3.endpoint_url, "HEAD") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        status, result = run(*arguments, "--verify")
    place = place_of(result)
    assert (status, place["verified"], place["gone"], place["problems"]) == (0, 29, 1, [])


def refusing(code, text):
    """Return what refuses uploads of blobs."""

    def refuse(request):
        is_upload = request.kind == "PUT" and "/blobs/" in request.target
        return s3_error(code, text) if is_upload else None

    return refuse


def test_s3_that_fails_all_the_time_ends_the_run(s3, tmp_path, operate):
    """What has come so far is told, and the next run brings the rest."""
    expected = old_database(tmp_path, 150)
    arguments = "migrate", "--from-blob-dir", f"{tmp_path}/blobs"
    with FaultyServer(s3.endpoint_url) as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url), s3_max_attempts=1)
        server.instead = refusing(503, "SlowDown")
        status, result = run(*arguments)
        assert (status, place_of(result)["failed"], place_of(result)["uploaded"]) == (1, 100, 0)
        server.instead = lambda request: None
        assert run(*arguments)[0] == 0
    assert objects(s3) == expected


def test_s3_that_refuses_ends_the_run_at_once(s3, tmp_path, operate):
    """Whoever has no permission for the first has none for the others."""
    old_database(tmp_path, 150)
    with FaultyServer(s3.endpoint_url) as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        server.instead = refusing(403, "AccessDenied")
        arguments = "--workers", "1", "--from-blob-dir", f"{tmp_path}/blobs"
        assert run("migrate", *arguments)[0] == 1
        assert 1 <= server.kinds().count("PUT") < 10
    assert keys(s3, "blobs/") == []


def test_progress_is_shown_where_somebody_looks(s3, tmp_path, operate, capsys, monkeypatch):
    """With what there is in all, so that the time left can be told."""
    old_database(tmp_path, 5)
    run = operate(s3)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = "--from-blob-dir", f"{tmp_path}/blobs", "--verify"
    assert main(["-C", run.path, "migrate", *arguments]) == 0
    told = capsys.readouterr().err
    for what in ("upload", "verify"):
        assert re.search(rf"{what}: 100%.* 5.*/5", told)


def test_site_reads_all_the_time(s3, tmp_path, operate):
    """It has the database open, and misses nothing, until the files are gone and afterwards."""
    old_database(tmp_path, 40)
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    run = operate(s3, base=base)
    stop = threading.Event()
    with closing(open_db(s3, tmp_path, base=base, cache_size="2KB")) as db:

        def keep_reading():
            rounds = 0
            with db.transaction() as connection:
                while rounds < 3 or not stop.is_set():
                    for number, blob in enumerate(connection.root()["blobs"]):
                        with blob.open() as file:
                            assert len(file.read()) == 200 + number
                    rounds += 1

        reader = start(keep_reading)
        status, result = run("migrate", "--remove-local", "--delete")
        stop.set()
        reader.result()
    assert (status, place_of(result)["removed"]) == (0, 40)
    assert [*BlobDirectory(f"{tmp_path}/blobs").blobs()] == []


def test_file_is_removed_only_when_its_object_was_read(s3, tmp_path, operate):
    """What an object says of itself does not prove that its bytes are still those."""
    (key,) = old_database(tmp_path, 1)
    run = operate(s3)
    arguments = "--from-blob-dir", f"{tmp_path}/blobs", "--remove-local", "--delete"
    assert run("migrate", *arguments[:2])[0] == 0
    client = boto3_client(s3)
    head = client.head_object(Bucket=s3.bucket, Key=key)
    body = bytes(head["ContentLength"])
    client.put_object(Bucket=s3.bucket, Key=key, Body=body, Metadata=head["Metadata"])
    before = files_below(tmp_path / "blobs")
    status, result = run("migrate", *arguments)
    place = place_of(result)
    assert (status, place["removed"], place["different"]) == (1, 0, 1)
    assert files_below(tmp_path / "blobs") == before


@pytest.mark.parametrize("is_full", [False, True])
def test_bucket_of_another_database_is_not_written(s3, tmp_path, operate, is_full):
    """Its mark is respected, though nothing is missing: no file is removed, either."""
    expected = old_database(tmp_path, 3)
    if is_full:
        for key, data in expected.items():
            boto3_client(s3).put_object(Bucket=s3.bucket, Key=key, Body=data)
    before = files_below(tmp_path / "blobs")
    body = b'{"database": "other", "name": "another one", "since": "today"}'
    boto3_client(s3).put_object(Bucket=s3.bucket, Key=MARKER, Body=body)
    run = operate(s3)
    arguments = "--from-blob-dir", f"{tmp_path}/blobs", "--remove-local", "--delete"
    assert run("migrate", *arguments)[0] == 1
    assert keys(s3, "blobs/") == (sorted(expected) if is_full else [])
    assert files_below(tmp_path / "blobs") == before


@pytest.mark.parametrize("options", [{}, {"local_blob_dir": "local"}])
def test_read_only_access_is_respected(s3, tmp_path, operate, options):
    """Nor are the blobs copied into the directory that takes what a copy stores."""
    old_database(tmp_path, 3)
    options = {name: tmp_path / value for name, value in options.items()}
    run = operate(s3, access="read-only", **options)
    status, text = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs")
    assert status == 2
    assert "read-only" in text
    assert keys(s3) == []
    assert not (tmp_path / "local").exists()


def test_large_file_does_not_hold_up_the_others():
    """They are uploaded while it is, however many they are."""
    others = threading.Semaphore(0)

    def upload(number):
        if number:
            others.release()
        else:
            for _other in range(400):
                assert others.acquire(timeout=PATIENCE)
        return number

    work = Work(2, None, False)
    done = [future.result() for _number, future in work.each_as_done(range(500), upload)]
    assert sorted(done) == [*range(500)]


# Verifying, and removing


def test_what_differs_is_found_and_stays(s3, tmp_path, operate):
    """By digest, though the size is the same; what cannot tell its digest is read."""
    expected = old_database(tmp_path, 6)
    before = files_below(tmp_path / "blobs")
    run = operate(s3, base=filestorage(tmp_path) + blobdir_source(tmp_path / "blobs"))
    assert run("migrate")[0] == 0
    wrong, old, swapped, *_others = sorted(expected)
    client = boto3_client(s3)
    for key, data, metadata in (
        (wrong, expected[wrong][::-1], {}),
        (old, expected[old], {}),  # of the older package
        (swapped, expected[swapped], {"zodb-key": wrong}),
    ):
        client.put_object(Bucket=s3.bucket, Key=key, Body=data, Metadata=metadata)
    status, result = run("migrate", "--remove-local", "--delete")
    place = place_of(result)
    assert status == 1
    assert [problem.partition(": ")[0] for problem in place["problems"]] == [wrong, swapped]
    assert (place["removed"], place["different"]) == (4, 2)
    left = {each.key for each in BlobDirectory(f"{tmp_path}/blobs").blobs()}
    assert left == {wrong, swapped}
    after = files_below(tmp_path / "blobs")
    assert after.items() <= before.items()


def test_file_that_has_changed_since_it_was_compared_stays(s3, tmp_path, operate):
    """What is removed is what was verified."""
    old_database(tmp_path, 3)
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    assert operate(s3, base=base)("migrate")[0] == 0
    directory = BlobDirectory(f"{tmp_path}/blobs")
    found = next(directory.blobs())

    class Changing(SignallingServer):
        def _look(self, request):
            if request.kind == "HEAD" and found.key in request.target:
                path = Path(directory.path(found))
                path.chmod(0o600)
                path.write_bytes(b"changed")

    with Changing(s3.endpoint_url, "HEAD") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url), base=base)
        status, result = run("migrate", "--remove-local", "--delete")
    assert (status, place_of(result)["removed"], place_of(result)["failed"]) == (1, 2, 1)
    assert [each.key for each in directory.blobs()] == [found.key]
    assert Path(directory.path(found)).read_bytes() == b"changed"


def test_removal_is_shown_first(s3, tmp_path, operate):
    """Without --delete nothing is removed; with it the site reads from the bucket."""
    expected = old_database(tmp_path, 6)
    before = files_below(tmp_path / "blobs")
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    run = operate(s3, base=base)
    status, result = run("migrate", "--remove-local")
    assert (status, place_of(result)["verified"], place_of(result)["removed"]) == (0, 6, 0)
    assert files_below(tmp_path / "blobs") == before
    assert run("migrate", "--delete")[0] == 2
    status, result = run("migrate", "--remove-local", "--delete")
    assert (status, place_of(result)["removed"]) == (0, 6)
    assert set(files_below(tmp_path / "blobs")) == {tmp_path / "blobs" / ".layout"}
    with closing(open_db(s3, tmp_path, base=base)) as db:
        assert read_all(db) == expected
    # The directory, empty now, is still one.
    assert run("migrate", "--verify")[0] == 0


def test_what_is_missing_when_it_is_verified_is_told(s3, tmp_path, operate):
    """Somebody has deleted it meanwhile."""
    old_database(tmp_path, 4)
    run = operate(s3, base=filestorage(tmp_path) + blobdir_source(tmp_path / "blobs"))
    assert run("migrate")[0] == 0
    key = min(keys(s3, "blobs/"))
    client = boto3_client(s3)

    class Deleting(SignallingServer):
        def _look(self, request):
            if request.kind == "HEAD" and key in request.target:
                client.delete_object(Bucket=s3.bucket, Key=key)

    with Deleting(s3.endpoint_url, "HEAD") as server:
        through = replace(s3, endpoint_url=server.endpoint_url)
        run = operate(through, base=filestorage(tmp_path) + blobdir_source(tmp_path / "blobs"))
        status, result = run("migrate", "--remove-local", "--delete")
    place = place_of(result)
    assert (status, place["missing"], place["removed"]) == (1, 1, 3)
    assert [each.key for each in BlobDirectory(f"{tmp_path}/blobs").blobs()] == [key]


# Stopped and killed


def test_time_limit_stops_and_the_next_run_goes_on(s3, tmp_path, operate):
    """The status says that there is more to do."""
    expected = old_database(tmp_path, 5)
    run = operate(s3)
    arguments = "migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify"
    status, result = run(*arguments, "--time-limit", "0.000001s")
    assert (status, place_of(result)["uploaded"]) == (3, 0)
    assert run(*arguments)[0] == 0
    assert objects(s3) == expected


def test_verifying_goes_on_where_it_was_stopped(s3, tmp_path, operate, state):
    """Ctrl-C ends it, the next run does the rest and tells of all."""
    expected = old_database(tmp_path, 300)
    run = operate(s3)
    arguments = "migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--workers", "2"
    assert run(*arguments)[0] == 0
    with SignallingServer(s3.endpoint_url, "HEAD") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        server.arm(100, signal.SIGINT)
        server.process = run.start(*arguments, "--verify")
        status, result = end_of(server.process)
        first = place_of(result)["verified"]
        assert status == 3
        assert 50 <= first < 300
        server.requests.clear()
        # The bucket is the same, and its endpoint is what the state is kept for.
        status, result = run(*arguments, "--verify")
        heads = server.kinds().count("HEAD")
    assert (status, place_of(result)["verified"], heads) == (0, 300, 300 - first)
    assert objects(s3) == expected
    assert not any(state.rglob("*.json"))


def test_what_was_wrong_is_looked_at_again(s3, tmp_path, operate):
    """A run that goes on does not tell of what was mended since."""
    expected = old_database(tmp_path, 300)
    run = operate(s3)
    arguments = "migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--workers", "2"
    assert run(*arguments)[0] == 0
    wrong, mended, *_others = sorted(expected)
    client = boto3_client(s3)
    for key in (wrong, mended):
        client.put_object(Bucket=s3.bucket, Key=key, Body=expected[key][::-1])
    with SignallingServer(s3.endpoint_url, "HEAD") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url))
        server.arm(100, signal.SIGINT)
        server.process = run.start(*arguments, "--verify")
        status, result = end_of(server.process)
        assert (status, place_of(result)["different"]) == (3, 2)
        client.put_object(Bucket=s3.bucket, Key=mended, Body=expected[mended])
        status, result = run(*arguments, "--verify")
    place = place_of(result)
    assert (status, place["different"], place["verified"]) == (1, 1, 299)
    assert [problem.partition(": ")[0] for problem in place["problems"]] == [wrong]


@pytest.mark.parametrize("seed", [0])
def test_killed_again_and_again_it_ends_exact(s3, tmp_path, operate, seed):
    """Whatever was running at that moment: nothing is half done, and nothing done twice wrong."""
    rng = random.Random(seed)
    expected = old_database(tmp_path, 300, change=20)
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    with SignallingServer(s3.endpoint_url, "PUT") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url), base=base)
        for _kill in range(5):
            server.arm(rng.randrange(1, 60))
            server.process = run.start("migrate", "--workers", "8")
            assert end_of(server.process)[0] == -signal.SIGKILL
        assert 5 < len(keys(s3, "blobs/")) < 320
        server.arm(0)
        status, result = run("migrate", "--verify")
        server.requests.clear()
        assert status == 0
        assert place_of(result)["found"] == 320
        assert run("migrate")[0] == 0
        assert "PUT" not in server.kinds()
    assert objects(s3) == expected


def test_killed_while_it_removes_it_loses_nothing(s3, tmp_path, operate):
    """What is not here any more is in the bucket."""
    expected = old_database(tmp_path, 100)
    base = filestorage(tmp_path) + blobdir_source(tmp_path / "blobs")
    with SignallingServer(s3.endpoint_url, "HEAD") as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url), base=base)
        for number in (10, 40):
            server.arm(number)
            server.process = run.start("migrate", "--workers", "4", "--remove-local", "--delete")
            assert end_of(server.process)[0] == -signal.SIGKILL
            assert objects(s3) == expected
        assert run("migrate", "--remove-local", "--delete")[0] == 0
    assert [*BlobDirectory(f"{tmp_path}/blobs").blobs()] == []


# From elsewhere


@pytest.fixture
def place(request, tmp_path, postgresql):
    """Where the database of the kind that the test names is."""
    if request.param == "sqlite3":
        yield "sqlite3", f"{tmp_path}/sqlite"
    else:
        dsn = postgresql.new_database()
        yield "postgresql", dsn
        postgresql.drop_database(dsn)


@pytest.mark.parametrize("place", ["postgresql", "sqlite3"], indirect=True)
@pytest.mark.parametrize("keep_history", [True, False])
def test_blobs_in_the_tables_of_a_relstorage_come_into_the_bucket(
    s3, tmp_path, operate, place, keep_history
):
    """Those of all revisions that it keeps, small and large."""
    old = relstorage(*place, keep_history, blob_dir=f"{tmp_path}/old-cache")
    expected = fill(old, 12, change=4) | fill(old, 2, 3 << 20)
    new = relstorage(*place, keep_history)
    run = operate(s3, base=new)
    status, result = run("migrate", "--from-relstorage", "--verify")
    assert (status, place_of(result)["problems"]) == (0, [])
    found = objects(s3)
    if keep_history:
        assert found == expected
    else:
        assert found.items() < expected.items()
    assert len(found) == place_of(result)["verified"] == (18 if keep_history else 14)
    assert run("migrate", "--from-relstorage")[1]["places"][0]["uploaded"] == 0
    with closing(open_db(s3, tmp_path, ["relstorage"], base=new)) as db:
        assert read_all(db).items() <= expected.items()
    assert run("migrate", "--from-relstorage", "--remove-local")[0] == 2


@pytest.mark.parametrize("place", ["postgresql", "sqlite3"], indirect=True)
def test_blob_that_vanishes_from_the_tables_is_no_failure(s3, tmp_path, operate, place):
    """It was packed after it was found."""
    expected = fill(relstorage(*place, blob_dir=f"{tmp_path}/old-cache"), 30)
    last = max(expected)
    ((oid, _tid),) = [(int.from_bytes(each, "big") for each in parse_key(last))]
    with Meanwhile(s3.endpoint_url, lambda request: pack_away(place, oid)) as server:
        run = operate(replace(s3, endpoint_url=server.endpoint_url), base=relstorage(*place))
        status, result = run("migrate", "--from-relstorage", "--workers", "1", "--verify")
    told = place_of(result)
    assert (status, told["gone"], told["uploaded"], told["problems"]) == (0, 1, 29, [])
    del expected[last]
    assert objects(s3) == expected


def pack_away(place, oid):
    """Delete the blobs of an object, as a pack does."""
    kind, where = place
    if kind == "sqlite3":
        connection = sqlite3.connect(f"{where}/main.sqlite3")
    else:
        connection = pytest.importorskip("psycopg2").connect(where)
    with closing(connection), closing(connection.cursor()) as cursor:
        cursor.execute(f"DELETE FROM blob_chunk WHERE zoid = {oid}")
        connection.commit()


def test_database_that_is_no_relstorage_is_told(s3, tmp_path, operate):
    """What was asked for cannot be."""
    old_database(tmp_path, 1)
    status, text = operate(s3)("migrate", "--from-relstorage")
    assert status == 2
    assert "FileStorage" in text


def test_directory_that_relstorages_share_comes_into_the_bucket(s3, tmp_path, operate):
    """It is a blob directory; the database has the records alone."""
    place = "sqlite3", f"{tmp_path}/sqlite"
    old = relstorage(*place, blob_dir=f"{tmp_path}/blobs", shared_blob_dir="true")
    expected = fill(old, 12, change=4)
    run = operate(s3, base=relstorage(*place))
    status, _result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
    assert status == 0
    assert objects(s3) == expected


def test_cache_of_a_relstorage_is_no_place_to_migrate_from(s3, tmp_path, operate):
    """It has a part of the blobs only."""
    place = "sqlite3", f"{tmp_path}/sqlite"
    fill(relstorage(*place, blob_dir=f"{tmp_path}/cache-of-old"), 2)
    run = operate(s3, base=relstorage(*place))
    status, text = run("migrate", "--from-blob-dir", f"{tmp_path}/cache-of-old")
    assert status == 2
    assert "cache" in text


def test_directory_of_a_zeo_server_comes_into_the_bucket(s3, tmp_path, operate, zeo):
    """From a host with a client, while the server runs without it."""
    server_text = "<filestorage 1>\npath {0}/Data.fs\n{1}\n</filestorage>"
    blobs = f"blob-dir {tmp_path}/blobs"
    with ExitStack() as stack:
        old = ZeoServer(tmp_path / "server", server_text.format(tmp_path, blobs))
        with old:
            client = f"<zeoclient>\nserver {old.address}\nblob-dir {tmp_path}/zeo-cache"
            expected = fill(f"{client}\n</zeoclient>", 12, change=4)
        new = stack.enter_context(ZeoServer(tmp_path / "server", server_text.format(tmp_path, "")))
        run = operate(s3, base=f"<zeoclient>\nserver {new.address}\n</zeoclient>")
        status, result = run("migrate", "--from-blob-dir", f"{tmp_path}/blobs", "--verify")
        assert (status, place_of(result)["problems"]) == (0, [])
    assert objects(s3) == expected


def bucket_source(location):
    """Return the text of a section."""
    lines = [
        "\n<bucket-source>",
        f"bucket-name {location.bucket}",
        f"s3-endpoint-url {location.endpoint_url}",
        f"s3-access-key {location.access_key}",
        f"s3-secret-key {location.secret_key}",
        "s3-addressing-style path",
        "</bucket-source>",
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("addressing", ["tid", "record"])
def test_blobs_of_another_bucket_come_into_the_own_one(s3, rclone, tmp_path, operate, addressing):
    """Under the keys they have there; that bucket stays as it is."""
    other = new_bucket(rclone)
    with closing(open_db(other, tmp_path, addressing=addressing)) as db:
        for number in range(5):
            with db.transaction() as connection:
                connection.root()[number] = Blob(b"%d" % number * number)
    expected = objects(other)
    base = filestorage(tmp_path) + bucket_source(other)
    (tmp_path / "Data.fs.s3blobs").unlink()  # a copy of the database
    run = operate(s3, base=base, addressing=addressing)
    status, result = run("migrate", "--verify")
    assert (status, place_of(result)["verified"]) == (0, 5)
    assert objects(s3) == objects(other) == expected
    assert run("migrate", "--remove-local")[0] == 2


def test_what_a_copy_has_stored_locally_comes_into_the_bucket(s3, tmp_path, operate):
    """Once it may write there; then the directory can be emptied."""
    options = {"local_blob_dir": tmp_path / "local"}
    database = open_db(s3, tmp_path, access="read-only", **options)
    with closing(database), database.transaction() as connection:
        connection.root()["blob"] = Blob(b"stored by a copy")
    assert keys(s3) == []
    run = operate(s3, **options)
    status, result = run("migrate", "--remove-local", "--delete")
    assert (status, place_of(result)["removed"]) == (0, 1)
    assert [*objects(s3).values()] == [b"stored by a copy"]
    assert not any(path.is_file() for path in (tmp_path / "local").rglob("*.blob"))


@pytest.mark.parametrize("place", ["postgresql", "sqlite3"], indirect=True)
def test_tables_are_read_while_the_old_site_runs(s3, tmp_path, operate, place):
    """Before the switch; what it stores meanwhile the next run brings."""
    old = relstorage(*place, blob_dir=f"{tmp_path}/old-cache")
    expected = fill(old, 5)
    run = operate(s3, base=relstorage(*place))
    with closing(databaseFromString(f"%import relstorage\n<zodb>\n{old}\n</zodb>")) as db:
        assert run("migrate", "--from-relstorage")[0] == 0
        assert objects(s3) == read_all(db) == expected
        with db.transaction() as connection:
            connection.root()["blobs"].append(Blob(b"stored meanwhile"))
            connection.root()._p_changed = True
        status, result = run("migrate", "--from-relstorage", "--verify")
        assert (status, place_of(result)["uploaded"]) == (0, 1)
        assert objects(s3) == read_all(db)


def test_old_database_reads_on_with_its_directory(s3, tmp_path, operate):
    """A migration before the switch changes nothing that the old configuration has."""
    expected = old_database(tmp_path, 5)
    text = OLD.format(directory=tmp_path)
    with closing(databaseFromString(f"<zodb>\n{text}\n</zodb>")) as db:
        run = operate(s3)
        assert run("migrate", "--from-blob-dir", f"{tmp_path}/blobs")[0] == 0
        assert read_all(db) == expected
    assert objects(s3) == expected
