"""Check: finds each planted fault and nothing else, names it, and mends what can be mended."""

from contextlib import closing
import itertools
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import time

import pytest
import transaction
from ZODB.blob import Blob
from ZODB.blob import FilesystemHelper
from ZODB.config import databaseFromString
from ZODB.utils import p64

from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.operate import looking
from zodb_s3blobs.operate import needs as needs_module
from zodb_s3blobs.operate.findings import COMPLETE
from zodb_s3blobs.operate.looking import Look
from zodb_s3blobs.operate.main import main
from zodb_s3blobs.operate.needs import Needs
from zodb_s3blobs.operate.objects import Examiner
from zodb_s3blobs.operate.running import Work
from zodb_s3blobs.ownership import MARKER
from zodb_s3blobs.s3client import S3Client

from .checks import cached_path
from .checks import filestorage_site
from .checks import hexadecimal
from .checks import overwrite
from .checks import put_blobs
from .checks import relstorage_site
from .checks import Site
from .checks import Stop
from .checks import zeo_site
from .faults import FaultyServer
from .faults import s3_error
from .relstorages import Database
from .services.location import keys
from .services.location import S3Location
from .storages import filestorage
from .storages import PATIENCE
from .storages import TcpProxy
from .storages import until_s3_is_back


KINDS = ["FileStorage", "RelStorage", "RelStorage without history", "ZEO"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What a stopped run leaves is this test's."""
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/state")


@pytest.fixture(params=KINDS)
def site(request, s3, tmp_path):
    """A `Site` on each kind of base."""
    kind = request.param
    if kind == "ZEO":
        made = zeo_site(s3, tmp_path, request.getfixturevalue("zeo"))
    elif kind == "FileStorage":
        made = filestorage_site(s3, tmp_path, gc_grace=0)
    else:
        made = relstorage_site(s3, tmp_path, keep_history=kind == "RelStorage")
    made.write()
    return made


def contents(*names):
    return {name: f"bytes of {name}\n".encode() * 100 for name in names}


def kinds(result):
    """Return the findings as (kind, key, path), sorted."""
    return sorted((each["kind"], each["key"], each["path"]) for each in result["findings"])


def damage(site, key, data=None, metadata=None, source=None):
    """Replace an object's bytes, or metadata, by what somebody else might write."""
    with site.bucket() as client:
        old = client.get_object(Bucket=site.location.bucket, Key=source or key)
        body = old["Body"].read() if data is None else data
        client.put_object(
            Bucket=site.location.bucket,
            Key=key,
            Body=body,
            Metadata={**old["Metadata"], **(metadata or {})},
        )


def delete(site, *keys):
    with site.bucket() as client:
        for key in keys:
            client.delete_object(Bucket=site.location.bucket, Key=key)


def put(site, key, data=b"12345"):
    with site.bucket() as client:
        client.put_object(Bucket=site.location.bucket, Key=key, Body=data)


def read_all(site, path, expected):
    """Read blobs with an empty cache."""
    site.cache = "empty"
    with site.open() as db, db.transaction() as conn:
        folder = conn.root()
        for name in path:
            folder = folder[name]
        for name, data in expected.items():
            with folder[name].open() as file:
                assert file.read() == data


@pytest.mark.parametrize("depth", ["list", "head", "read"])
def test_sound_site_has_no_findings(site, capsys, depth):
    """Whatever is compared: several revisions, an undo and a pack leave nothing to find."""
    with site.open() as db:
        put_blobs(db, contents("a", "b"), "Plone")
        put_blobs(db, {"a": b"second"}, "Plone")
        if db.supportsUndo():
            db.undo(db.undoLog(0, 1)[0]["id"])
            transaction.commit()
        else:
            db.storage.sweep()  # the revision before the current is garbage at once
        result = site.run(capsys, "check", "--depth", depth, "--cache")
        assert result["findings"] == []
        assert result["counts"]["revisions"] >= 2
        assert result["counts"]["objects"] >= 2
        assert result["counts"]["cached files"] >= 2
        db.pack()
    assert site.run(capsys, "check", "--depth", depth)["findings"] == []


def stop_once(monkeypatch):
    """Let the next check end before it looks again."""
    confirm = Look.confirm

    def stop(self):
        monkeypatch.setattr(Look, "confirm", confirm)
        return False

    monkeypatch.setattr(Look, "confirm", stop)


def test_stopped_check_of_a_database_that_was_restored_begins_anew(
    s3, tmp_path, capsys, monkeypatch
):
    """What the restored one needs may have been garbage before."""
    site = filestorage_site(s3, tmp_path, gc_grace=0)
    site.write()
    with site.open() as db:
        key = put_blobs(db, contents("a", "b"))["b"][2]
    shutil.copy(tmp_path / "Data.fs", tmp_path / "backup.fs")
    with site.open() as db:
        with db.transaction() as connection:
            del connection.root()["b"]
        db.pack()
    stop_once(monkeypatch)
    site.run(capsys, "check", status=3)
    shutil.copy(tmp_path / "backup.fs", tmp_path / "Data.fs")
    os.remove(tmp_path / "Data.fs.index")
    result = site.run(capsys, "check", status=1)
    assert [(each["kind"], each["key"]) for each in result["findings"]] == [("missing", key)]


def test_stopped_check_of_a_database_that_went_on_is_gone_on_with(site, capsys, monkeypatch):
    """What has been looked at is not looked at again."""
    with site.open() as db:
        put_blobs(db, contents("a", "b"))
        stop_once(monkeypatch)
        site.run(capsys, "check", status=3)
        with db.transaction() as connection:
            connection.root()["later"] = "a change"
    with monkeypatch.context() as patch:
        patch.setattr(Look, "_compare_bucket", lambda self: pytest.fail("begun anew"))
        assert site.run(capsys, "check")["counts"]["objects"] >= 2


def test_stopped_check_of_another_server_is_not_gone_on_with(s3, tmp_path, capsys, monkeypatch):
    """Also where the environment says which it is."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint_url)
    site = filestorage_site(s3, tmp_path)
    text = site.text()
    site.text = lambda: text.replace(f"s3-endpoint-url {s3.endpoint_url}\n", "")
    site.write()
    with site.open() as db:
        key = put_blobs(db, contents("a"))["a"][2]
    stop_once(monkeypatch)
    site.run(capsys, "check", status=3)
    with FaultyServer(s3.endpoint_url) as other:
        other.instead = lambda request: None
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", other.endpoint_url)
        with site.bucket() as client:
            client.delete_object(Bucket=s3.bucket, Key=key)
        result = site.run(capsys, "check", status=1)
    assert [each["kind"] for each in result["findings"]] == ["missing"]


def test_what_the_owner_needs_is_no_garbage_for_a_copy(s3, tmp_path, capsys):
    """A bucket of another database is a finding, and nothing in it is orphaned."""
    site = filestorage_site(s3, tmp_path, gc_grace=0)
    site.write()
    with site.open() as db:
        needs = put_blobs(db, contents("a"))
    put(site, blob_key(needs["a"][0], p64(1)))
    os.remove(tmp_path / "Data.fs.s3blobs")
    (finding,) = site.run(capsys, "check", status=1)["findings"]
    assert (finding["kind"], finding["key"]) == ("foreign", MARKER)
    assert "another database's" in finding["note"]


def test_damaged_file_in_the_spool_is_found_where_all_is_read(s3, tmp_path, capsys):
    """It is nowhere else; a good one waits, and the text says that."""
    site = filestorage_site(
        s3, tmp_path, spool_dir=tmp_path / "spool", on_upload_failure="spool", s3_max_attempts=1
    )
    site.write()
    with site.open() as db:
        put_blobs(db, contents("before"))
    with FaultyServer(s3.endpoint_url) as server:
        site.location = S3Location(server.endpoint_url, s3.access_key, s3.secret_key, s3.bucket)
        site.write()

        def refuse(request):
            raise ConnectionError("says the test")

        server.instead = refuse
        with site.open() as db:
            put_blobs(db, contents("a"))
        server.instead = lambda request: (
            s3_error(503, "SlowDown") if request.method == "PUT" else None
        )
        (path,) = (tmp_path / "spool" / "blobs").glob("*.blob")
        capsys.readouterr()
        assert main(["-C", site.path, "check", "--depth", "read"]) == 0
        assert capsys.readouterr().out.endswith(" Not in the bucket yet: 1.\n")
        os.chmod(path, 0o600)
        path.write_bytes(b"bad")
        (finding,) = site.run(capsys, "check", "--depth", "read", status=1)["findings"]
        assert finding["kind"] == "wrong digest"
        assert "in the spool" in finding["note"]
        path.unlink()


def test_garbage_that_waits_for_a_sweep_is_named_and_not_wrong(s3, tmp_path, capsys):
    """A run each night ends with 0, though not each night packs."""
    site = filestorage_site(s3, tmp_path, gc_grace=0)
    site.write()
    with site.open() as db:
        needs = put_blobs(db, contents("a"))
    put(site, key := blob_key(needs["a"][0], p64(1)))
    result = site.run(capsys, "check", status=0)
    assert [(each["kind"], each["key"]) for each in result["findings"]] == [("orphaned", key)]
    assert main(["-C", site.path, "check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"orphaned oid={hexadecimal(needs['a'][0])} ")
    assert lines[-1] == COMPLETE


def plant(site, needs, tid):
    """Plant a fault of each kind; return the findings by the depth that has them."""
    oid = needs["orphan"][0]
    stray = blob_key(oid, p64(1))
    put(site, stray)
    put(site, "blobs/of/another/form")
    alien = blob_key(p64(0x7000_0000), p64(1))
    put(site, alien)
    delete(site, needs["missing"][2])
    damage(site, needs["short"][2], b"short")
    damage(site, needs["other"][2], bytes(len(contents("other")["other"])))
    damage(site, needs["swapped"][2], source=needs["orphan"][2])
    path = cached_path(site, *needs["cached"][:2])
    overwrite(path, bytes(os.path.getsize(path)))
    listed = [
        ("orphaned", stray, "/Plone/folder/orphan"),
        ("foreign", "blobs/of/another/form", "?"),
        ("foreign", alien, "?"),
        ("missing", needs["missing"][2], "/Plone/folder/missing"),
    ]
    headed = [
        ("wrong size", needs["short"][2], "/Plone/folder/short"),
        ("swapped", needs["swapped"][2], "/Plone/folder/swapped"),
    ]
    return {
        # Of these the cache knows the sizes.
        "list": [*listed, *headed],
        "head": [*listed, *headed],
        "read": [
            *listed,
            *headed,
            ("wrong digest", needs["other"][2], "/Plone/folder/other"),
            ("damaged in cache", needs["cached"][2], "/Plone/folder/cached"),
        ],
    }


@pytest.mark.parametrize("keep_history", [True, False])
def test_faults_on_postgresql(postgresql, s3, tmp_path, capsys, keep_history):
    """Found by its own SQL, and mended."""
    place = postgresql.new_database()
    base = Database("postgresql", place, keep_history).section
    site = Site(s3, tmp_path, base, ("relstorage",), options={"gc_grace": 0})
    site.write()
    with site.open() as db:
        needs = put_blobs(db, contents(*NAMES), "Plone", "folder")
        planted = plant(site, needs, db.lastTransaction())
        result = site.run(capsys, "check", "--depth", "read", "--repair", status=1)
        assert kinds(result) == sorted(planted["read"])
        assert result["counts"]["repaired"] == 5
        result = site.run(capsys, "check", "--depth", "read", status=1)
        assert {each["kind"] for each in result["findings"]} == {"foreign", "orphaned"}
    postgresql.drop_database(place)


@pytest.mark.parametrize("kind", ["FileStorage", "RelStorage", "ZEO"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_faults_where_records_are_compressed(request, s3, tmp_path, capsys, kind, where):
    """With zc.zlibstorage between us and the base, or around us."""
    if kind == "ZEO":
        site = zeo_site(s3, tmp_path, request.getfixturevalue("zeo"))
    else:
        make = filestorage_site if kind == "FileStorage" else relstorage_site
        site = make(s3, tmp_path, gc_grace=0)
    site.imports = *site.imports, "zc.zlibstorage"
    wrapper = "<zlibstorage>\ncompress true\n{}\n</zlibstorage>"
    if where == "inside":
        site.base = wrapper.format(site.base or filestorage(tmp_path))
    else:
        site.around = wrapper
    site.write()
    with site.open() as db:
        needs = put_blobs(db, contents("a", "b"), "Plone" * 100)
        delete(site, needs["a"][2])
        result = site.run(capsys, "check", "--depth", "head", "--cache", status=1)
    assert kinds(result) == [("missing", needs["a"][2], f"/{'Plone' * 100}/a")]


def test_database_below_a_demostorage_is_looked_for_there(s3, tmp_path, capsys):
    """What the changes need is told from what the database below has, and no garbage is told."""
    keys_below = f"path {tmp_path}/below.fs\nblob-dir {tmp_path}/below\n</filestorage>\n"
    changes = f"<filestorage changes>\npath {tmp_path}/changes.fs\n</filestorage>\n"
    base = f"<demostorage>\n<filestorage base>\n{keys_below}{changes}</demostorage>"
    site = Site(s3, tmp_path, base)
    site.write()
    config = f"<zodb>\n<filestorage>\n{keys_below}</zodb>"
    with closing(databaseFromString(config)) as db, db.transaction() as conn:
        conn.root()["below"] = Blob(b"bytes")
    with site.open() as db:
        needs = put_blobs(db, contents("here", "gone"))
    put(site, blob_key(needs["here"][0], p64(1)))
    delete(site, needs["gone"][2])
    result = site.run(capsys, "check", status=1)
    assert kinds(result) == [("missing", needs["gone"][2], "?")]
    assert result["counts"]["in a source"] == 1


NAMES = "missing", "short", "other", "swapped", "cached", "orphan", "sound"


def test_each_planted_fault_is_found_and_nothing_else(site, capsys):
    """At each depth what that depth can tell; named by oid, tid, key and path."""
    with site.open() as db:
        needs = put_blobs(db, contents(*NAMES), "Plone", "folder")
        planted = plant(site, needs, db.lastTransaction())
        for depth, expected in planted.items():
            result = site.run(capsys, "check", "--depth", depth, status=1)
            assert kinds(result) == sorted(expected)
        oid, tid, key = needs["missing"]
        (missing,) = [each for each in result["findings"] if each["kind"] == "missing"]
        assert missing == {
            "kind": "missing",
            "oid": hexadecimal(oid),
            "tid": hexadecimal(tid),
            "key": key,
            "path": "/Plone/folder/missing",
            "note": "",
            "repaired from": None,
        }


def test_repair_mends_what_the_cache_still_has(site, capsys):
    """Missing and damaged objects, and damaged cached files; what nobody has stays a finding."""
    with site.open() as db:
        needs = put_blobs(db, contents(*NAMES), "Plone", "folder")
        plant(site, needs, db.lastTransaction())
    os.remove(cached_path(site, *needs["short"][:2]))
    result = site.run(capsys, "check", "--depth", "read", "--repair", status=1)
    by_key = {each["key"]: each["repaired from"] for each in result["findings"]}
    for name in ("missing", "other", "swapped"):
        assert by_key.pop(needs[name][2]) == "the cache"
    assert by_key.pop(needs["cached"][2]) == "the bucket"
    assert by_key.pop(needs["short"][2]) == ""
    assert set(by_key.values()) == {None}
    assert result["counts"]["repaired"] == 4
    result = site.run(capsys, "check", "--depth", "read", status=1)
    assert sorted(each["kind"] for each in result["findings"]) == [
        "foreign", "foreign", "orphaned", "wrong size",
    ]  # fmt: skip
    read_all(site, ("Plone", "folder"), contents("missing", "other", "swapped", "cached", "sound"))


class TestWhatIsNoFinding:
    def test_blob_of_a_source_is_counted_and_no_finding(self, s3, tmp_path, capsys):
        """A migration that runs behind a site leaves nothing to find."""
        site = filestorage_site(s3, tmp_path)
        site.write()
        data = contents("here", "there")
        with site.open() as db:
            needs = put_blobs(db, data)
        oid, tid, key = needs["there"]
        source = tmp_path / "blobs"
        helper = FilesystemHelper(str(source), "bushy")
        helper.create()
        helper.getPathForOID(oid, create=True)
        os.rename(cached_path(site, oid, tid), helper.getBlobFilename(oid, tid))
        delete(site, key)
        base = f"<blobdir-source>\npath {source}\n</blobdir-source>\n{filestorage(tmp_path)}"
        site.base = base
        site.write()
        for depth in ("list", "read"):
            result = site.run(capsys, "check", "--depth", depth)
            assert result["findings"] == []
            assert result["counts"]["in a source"] == 1
        shutil.rmtree(source / "0x00")
        assert kinds(site.run(capsys, "check", status=1)) == [("missing", key, "/there")]

    @pytest.mark.parametrize("kind", ["FileStorage", "RelStorage"])
    def test_blob_in_the_spool_is_counted_and_no_finding(self, s3, tmp_path, capsys, kind):
        """What was committed while S3 took nothing is not missing."""
        make = filestorage_site if kind == "FileStorage" else relstorage_site
        refused = []

        def refuse(chunk):
            if refused and chunk.startswith(b"PUT ") and b"/blobs/" in chunk.split(b"\r\n")[0]:
                return b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            return None

        with TcpProxy(s3.endpoint_url, refuse) as proxy:
            options = {"on_upload_failure": "spool", "spool_dir": tmp_path / "spool"}
            site = make(proxy.location(s3), tmp_path, **options)
            site.write()
            with site.open() as db:
                put_blobs(db, contents("before"))
                refused.append(True)
                put_blobs(db, contents("spooled"))
                until_s3_is_back(db.storage)
                result = site.run(capsys, "check")
        assert result["findings"] == []
        assert result["counts"]["in the spool"] == 1
        assert len(keys(s3, "blobs/")) == 1

    def test_young_garbage_is_in_flight(self, s3, tmp_path, capsys):
        """It may be of a transaction that has not ended."""
        site = filestorage_site(s3, tmp_path)  # with the default grace
        site.write()
        with site.open() as db:
            (need,) = put_blobs(db, contents("a")).values()
        put(site, blob_key(need[0], p64(1)))
        assert site.run(capsys, "check")["findings"] == []

    def test_revisions_that_are_newer_or_packed_meanwhile_are_none(self, site, capsys, monkeypatch):
        """A site goes on storing, rewriting and packing while it is checked."""
        with site.open() as db:
            put_blobs(db, contents("a", "b"), "Plone")
            compare = Needs.compare

            def compare_late(needs, *args, **kw):
                put_blobs(db, {"a": b"rewritten"}, "Plone")
                put_blobs(db, contents("new"), "Plone")
                db.pack(time.time() + 1)
                return compare(needs, *args, **kw)

            monkeypatch.setattr(Needs, "compare", compare_late)
            result = site.run(capsys, "check", "--depth", "head")
        assert result["findings"] == []
        assert result["counts"]["objects"] == 3

    def test_revision_that_is_packed_at_the_last_moment_is_none(self, site, capsys, monkeypatch):
        """The object is seen to be missing after the base was asked, and before it is again."""
        with site.open() as db:
            need = put_blobs(db, contents("a"), "Plone")["a"]
            delete(site, need[2])
            examine = Examiner.examine

            def examine_late(examiner, need):
                monkeypatch.setattr(Examiner, "examine", examine)
                put_blobs(db, {"a": b"rewritten"}, "Plone")
                db.pack(time.time() + 1)
                return examine(examiner, need)

            monkeypatch.setattr(Examiner, "examine", examine_late)
            assert site.run(capsys, "check")["findings"] == []

    def test_what_another_database_needs_is_none_where_access_is_read_only(
        self, s3, tmp_path, capsys
    ):
        """A copy of production's database does not judge what production has stored since."""
        site = filestorage_site(s3, tmp_path, gc_grace=0)
        site.write()
        with site.open() as db:
            (need,) = put_blobs(db, contents("a")).values()
        put(site, blob_key(need[0], p64(1)))
        site.write(access="read-only", local_blob_dir=tmp_path / "own")
        with site.open(access="read-only", local_blob_dir=tmp_path / "own") as db:
            put_blobs(db, contents("own"))
            assert site.run(capsys, "check", "--depth", "read")["findings"] == []
        error = site.run(capsys, "check", "--repair", status=2)
        assert "access is read-only" in error


BUSY = """
import itertools, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from ZODB.config import databaseFromString
from tests.checks import put_blobs
db = databaseFromString(Path({text!r}).read_text())
put_blobs(db, dict.fromkeys("abcdef", b"begin"), "Plone")
print("ready", flush=True)
for number in itertools.count():
    put_blobs(db, {{"abcdef"[number % 6]: b"%d" % number}}, "Plone")
    if number % 10 == 9:
        db.pack()
    if number == 40:
        print("busy", flush=True)
"""


@pytest.mark.parametrize("kind", ["FileStorage", "RelStorage", "ZEO"])
def test_site_that_writes_and_packs_all_the_time_has_no_findings(
    request, s3, tmp_path, kind, capsys
):
    """Another process does; a FileStorage is even read while it is written."""
    if kind == "ZEO":
        site = zeo_site(s3, tmp_path, request.getfixturevalue("zeo"), gc_grace="1h")
    elif kind == "FileStorage":
        site = filestorage_site(s3, tmp_path, gc_grace=0)
    else:
        site = relstorage_site(s3, tmp_path, gc_grace="1h")
    site.write()
    text = tmp_path / "zodb.conf"
    text.write_text(f"{site.head}<zodb>\n{site.text()}\n</zodb>\n")
    root = str(Path(__file__).parents[1])
    script = BUSY.format(root=root, text=str(text))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for depth in ("list", "head", "read") * 3:
            result = site.run(capsys, "check", "--depth", depth)
            assert result["findings"] == []
            assert result["counts"]["objects"] >= 6
        assert process.stdout.readline() == "busy\n"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class TestStopping:
    @pytest.mark.parametrize("depth", ["list", "head"])
    def test_stopped_check_goes_on_and_finds_all(self, site, capsys, monkeypatch, depth):
        """Stopped as often as you like, it finds what one run finds, each once."""
        monkeypatch.setattr(looking, "OBJECTS_AT_ONCE", 2)
        monkeypatch.setattr(needs_module, "NEEDS_AT_ONCE", 3)
        with site.open() as db:
            needs = put_blobs(db, contents(*map(str, range(20))), "Plone")
        lost = [needs[str(number)][2] for number in range(0, 20, 3)]
        delete(site, *lost)
        put(site, stray := blob_key(next(iter(needs.values()))[0], p64(1)))
        stop = Stop(0)
        monkeypatch.setattr(Work, "is_stopped", property(stop))
        while (status := main(["-C", site.path, "check", "--depth", depth, "--json"])) == 3:
            stop.again()
            capsys.readouterr()
        result = json.loads(capsys.readouterr().out)
        assert status == 1
        assert stop.count > 2
        assert sorted(each["key"] for each in result["findings"]) == sorted([*lost, stray])
        assert result["counts"]["objects"] == 14
        assert os.listdir(f"{site.directory}/state/zodb-s3blobs") == []

    def test_killed_check_is_run_again(self, s3, tmp_path, capsys):
        """Whatever a kill leaves, the next run tells the truth."""
        site = filestorage_site(s3, tmp_path)
        site.write()
        with site.open() as db:
            needs = put_blobs(db, contents(*map(str, range(30))))
        delete(site, needs["7"][2])
        with TcpProxy(s3.endpoint_url) as proxy:
            command = [sys.executable, "-m", "zodb_s3blobs.operate", "-C", site.path]
            seen = itertools.count()
            proxy.hold(lambda direction, chunk: b"HEAD /" in chunk and next(seen) == 12)
            there, site.location = site.location, proxy.location(s3)
            site.write()
            process = subprocess.Popen([*command, "check", "--depth", "head", "--workers", "1"])
            assert proxy.reached.wait(PATIENCE)
            process.kill()
            process.wait()
        site.location = there
        site.write()
        assert kinds(site.run(capsys, "check", "--depth", "head", status=1)) == [
            ("missing", needs["7"][2], "/7")
        ]

    def test_file_that_a_crash_has_damaged_is_given_up(self, s3, tmp_path, capsys, monkeypatch):
        """The next run begins anew."""
        site = filestorage_site(s3, tmp_path)
        site.write()
        with site.open() as db:
            put_blobs(db, contents("a"))
        with monkeypatch.context() as patch:
            patch.setattr(Work, "is_stopped", property(Stop(0)))
            assert site.run(capsys, "check", status=3) == {"stopped": True}
        (path,) = (tmp_path / "state").rglob("*.sqlite")
        path.write_bytes(b"damaged" * 1000)
        assert "run it again" in site.run(capsys, "check", status=2)
        assert site.run(capsys, "check")["counts"]["objects"] == 1

    def test_second_check_at_the_same_time_is_refused(self, s3, tmp_path, capsys, monkeypatch):
        """Each would spoil what the other one has noted."""
        site = filestorage_site(s3, tmp_path)
        site.write()
        with site.open() as db:
            put_blobs(db, contents("a"))
        errors = []
        read_all = Look.read_all

        def run_another(look):
            monkeypatch.setattr(Look, "read_all", read_all)
            errors.append(subprocess.run(
                [sys.executable, "-m", "zodb_s3blobs.operate", "-C", site.path, "check"],
                capture_output=True, text=True,
            ))  # fmt: skip
            return read_all(look)

        monkeypatch.setattr(Look, "read_all", run_another)
        site.run(capsys, "check")
        (other,) = errors
        assert other.returncode == 2
        assert "another process" in other.stderr


def test_objects_that_the_older_package_wrote_are_taken_by_their_length(s3, tmp_path, capsys):
    """They say nothing of themselves: no finding, but where the cache has another size."""
    site = filestorage_site(s3, tmp_path)
    site.write()
    with site.open() as db:
        needs = put_blobs(db, contents("right", "wrong"))
    put(site, needs["right"][2], contents("right")["right"])
    put(site, needs["wrong"][2], b"short")
    result = site.run(capsys, "check", "--depth", "read", "--repair", status=1)
    assert kinds(result) == [("wrong size", needs["wrong"][2], "/wrong")]
    assert "does not say how many" in result["findings"][0]["note"]
    with site.bucket() as client:
        found = client.get_object(Bucket=s3.bucket, Key=needs["wrong"][2])["Body"].read()
    assert found == b"short"


def test_truncated_file_of_the_cache_does_not_repair_anything(s3, tmp_path, capsys):
    """What is uploaded has the size that it had when it came into the cache."""
    site = filestorage_site(s3, tmp_path)
    site.write()
    with site.open() as db:
        (need,) = put_blobs(db, contents("a")).values()
    delete(site, need[2])
    overwrite(cached_path(site, *need[:2]), b"half")
    result = site.run(capsys, "check", "--repair", status=1)
    assert [each["repaired from"] for each in result["findings"]] == [""]
    assert keys(s3, "blobs/") == []


def test_what_cannot_be_repaired_says_why_and_the_rest_is(s3, tmp_path, capsys, monkeypatch):
    """One blob that S3 does not take keeps nobody from mending the others."""
    site = filestorage_site(s3, tmp_path)
    site.write()
    with site.open() as db:
        needs = put_blobs(db, contents("a", "b", "c"))
    delete(site, *(need[2] for need in needs.values()))
    upload_file = S3Client.upload_file

    def upload_but_one(client, path, key, *args):
        if key == needs["b"][2]:
            raise PermanentS3Error("not this one, says the test")
        return upload_file(client, path, key, *args)

    monkeypatch.setattr(S3Client, "upload_file", upload_but_one)
    result = site.run(capsys, "check", "--repair", status=1)
    found = {each["path"]: (each["repaired from"], each["note"]) for each in result["findings"]}
    assert found == {
        "/a": ("the cache", ""),
        "/b": ("", "not this one, says the test"),
        "/c": ("the cache", ""),
    }


def test_another_database_repairs_nothing(s3, tmp_path, capsys):
    """The mark in the bucket keeps a copy from writing."""
    site = filestorage_site(s3, tmp_path)
    site.write()
    with site.open() as db:
        (need,) = put_blobs(db, contents("a")).values()
    delete(site, need[2])
    shutil.copy(tmp_path / "Data.fs", tmp_path / "copy.fs")
    os.rename(tmp_path / "copy.fs", tmp_path / "Data.fs")
    os.remove(tmp_path / "Data.fs.s3blobs")
    error = site.run(capsys, "check", "--repair", status=1)
    assert "another one" in error
    assert keys(s3, "blobs/") == []


def test_text_has_a_line_for_each_finding(s3, tmp_path, capsys):
    """People read it without --json."""
    site = filestorage_site(s3, tmp_path)
    site.write()
    with site.open() as db:
        (need,) = put_blobs(db, contents("a"), "Plone").values()
    delete(site, need[2])
    assert main(["-C", site.path, "check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"missing oid={hexadecimal(need[0])} tid={hexadecimal(need[1])} key={need[2]} path=/Plone/a"
    )
    assert "missing: 1" in lines
    assert COMPLETE not in lines
    assert main(["-C", site.path, "check", "--repair"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == COMPLETE
