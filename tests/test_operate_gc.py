"""Gc: reports first, deletes what no revision needs and no backup either, and nothing else."""

from contextlib import closing
import json
import random
import subprocess
import sys

import pytest
from ZODB.blob import Blob
from ZODB.utils import p64

from zodb_s3blobs import garbage
from zodb_s3blobs.interfaces import ListedObject
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.operate import ledger as ledger_module
from zodb_s3blobs.operate.ledger import CURRENT
from zodb_s3blobs.operate.ledger import LEDGER
from zodb_s3blobs.operate.ledger import Ledger
from zodb_s3blobs.operate.main import main
from zodb_s3blobs.operate.running import Work
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.s3reader import S3Reader

from .checks import filestorage_site
from .checks import put_blobs
from .checks import relstorage_site
from .checks import Stop
from .checks import zeo_site
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .storages import make_client
from .storages import read
from .storages import TcpProxy


DAY = 86400


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What a stopped run leaves is this test's."""
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/state")


@pytest.fixture(params=["FileStorage", "RelStorage", "RelStorage without history", "ZEO"])
def site(request, s3, tmp_path):
    """A `Site` whose packs leave the bucket alone."""
    kind = request.param
    options = {"sweep_after_pack": "false", "gc_grace": 0}
    if kind == "ZEO":
        made = zeo_site(s3, tmp_path, request.getfixturevalue("zeo"), **options)
    elif kind == "FileStorage":
        made = filestorage_site(s3, tmp_path, **options)
    else:
        made = relstorage_site(s3, tmp_path, kind == "RelStorage", **options)
    made.write()
    return made


@pytest.fixture
def quick_site(s3, tmp_path):
    """A `Site` on a FileStorage."""
    made = filestorage_site(s3, tmp_path, sweep_after_pack="false", gc_grace=0)
    made.write()
    return made


class Days:
    """Lets days pass, as the server's listings tell them."""

    def __init__(self, monkeypatch):
        self.passed = 0
        list_pages = S3Reader.list_pages

        def list_pages_later(client, *args):
            for page in list_pages(client, *args):
                yield [each._replace(listed=each.listed + self.passed * DAY) for each in page]

        monkeypatch.setattr(S3Reader, "list_pages", list_pages_later)


@pytest.fixture
def days(monkeypatch):
    return Days(monkeypatch)


def rewrite(site, count=3):
    """Store revisions of a blob, pack all but the last away; return the keys and the last one."""
    with site.open() as db:
        made = [put_blobs(db, {"a": b"%d" % number})["a"][2] for number in range(count)]
        db.pack()
    return made


def blobs(site):
    return keys(site.location, "blobs/")


class TestDeleting:
    def test_report_says_what_would_go_and_deletes_nothing(self, site, capsys):
        """Count, bytes and the oldest; what a pack with sweep-after-pack false has left."""
        made = rewrite(site)
        assert blobs(site) == sorted(made)
        result = site.run(capsys, "gc")
        assert (result["garbage"], result["bytes"], result["deleted"]) == (2, 2, 0)
        assert result["oldest"].startswith("20")
        assert blobs(site) == sorted(made)

    def test_delete_takes_garbage_and_nothing_else(self, site, capsys):
        """What a revision needs stays."""
        *_old, last = rewrite(site)
        result = site.run(capsys, "gc", "--delete")
        assert (result["garbage"], result["deleted"], result["kept"]) == (2, 2, 1)
        assert blobs(site) == [last]
        result = site.run(capsys, "gc", "--delete")
        assert (result["garbage"], result["deleted"], result["oldest"]) == (0, 0, None)

    def test_pack_sweeps_by_default(self, s3, tmp_path):
        """Sweep-after-pack is true where nobody says otherwise."""
        site = filestorage_site(s3, tmp_path)
        site.write()
        *_old, last = rewrite(site)
        assert blobs(site) == [last]

    def test_report_works_while_the_site_runs_and_deletion_does_not(self, quick_site, capsys):
        """A FileStorage belongs to one process."""
        made = rewrite(quick_site)
        with quick_site.open():
            assert quick_site.run(capsys, "gc")["garbage"] == 2
            error = quick_site.run(capsys, "gc", "--delete", status=2)
            assert "another process has the database" in error
        assert blobs(quick_site) == sorted(made)

    def test_read_only_access_deletes_nothing(self, quick_site, capsys):
        """A copy does not clean up what production needs."""
        made = rewrite(quick_site)
        quick_site.write(access="read-only")
        for options in (["--delete"], ["--keep-days", "3"]):
            assert "access is read-only" in quick_site.run(capsys, "gc", *options, status=2)
        assert keys(quick_site.location) == sorted(made)

    def test_read_only_access_deletes_what_the_copy_has_stored(self, quick_site, tmp_path, capsys):
        """In its own directory, which the report names; production's objects stay."""
        made = rewrite(quick_site)
        local = tmp_path / "local"
        options = {"access": "read-only", "local_blob_dir": local, "sweep_after_pack": "false"}
        quick_site.options = {**(quick_site.options or {}), **options}
        quick_site.write()
        with quick_site.open() as db:
            for data in (b"one", b"two"):
                with db.transaction() as connection:
                    connection.root()["local"] = Blob(data)
            db.pack()
        assert len([*local.rglob("*.blob")]) == 2
        found = quick_site.run(capsys, "gc", "--delete")
        assert (found["in"], found["deleted"]) == (str(local), 1)
        assert len([*local.rglob("*.blob")]) == 1
        assert keys(quick_site.location) == sorted(made)
        with quick_site.open() as db, db.transaction() as connection:
            assert read(connection.root()["local"]) == b"two"

    def test_text_tells_how_to_go_on(self, quick_site, capsys):
        """People read it without --json."""
        rewrite(quick_site)
        assert main(["-C", quick_site.path, "gc"]) == 0
        output = capsys.readouterr().out
        assert "garbage: 2\n" in output
        assert "say --delete" in output

    def test_stopped_run_goes_on_behind_its_last_key(self, quick_site, capsys, monkeypatch):
        """However often it is stopped, all garbage goes and all is counted once."""
        monkeypatch.setattr(garbage, "PAGES_AT_ONCE", 1)
        list_pages = S3Reader.list_pages

        def list_short_pages(client, *args):
            for page in list_pages(client, *args):
                yield from (page[at : at + 2] for at in range(0, len(page), 2))

        monkeypatch.setattr(S3Reader, "list_pages", list_short_pages)
        *_old, last = rewrite(quick_site, 9)
        stop = Stop(0)
        monkeypatch.setattr(Work, "is_stopped", property(stop))
        runs = 1
        while main(["-C", quick_site.path, "gc", "--delete", "--json"]) == 3:
            assert json.loads(capsys.readouterr().out)["stopped"]
            stop.again(0)
            runs += 1
        result = json.loads(capsys.readouterr().out)
        assert runs > 3
        assert (result["listed"], result["deleted"], result["kept"]) == (9, 8, 1)
        assert blobs(quick_site) == [last]


class TestKeepDays:
    def test_garbage_goes_when_no_backup_of_that_age_needs_it(self, site, capsys, days):
        """It is counted from the first run that saw it as garbage."""
        made = rewrite(site)
        arguments = "gc", "--delete", "--keep-days", "7"
        result = site.run(capsys, *arguments)
        assert (result["garbage"], result["held"], result["deleted"]) == (2, 2, 0)
        days.passed = 6.9
        assert site.run(capsys, *arguments)["held"] == 2
        assert blobs(site) == sorted(made)
        days.passed = 7.1
        result = site.run(capsys, *arguments)
        assert (result["held"], result["deleted"]) == (0, 2)
        assert blobs(site) == made[-1:]

    def test_report_lets_the_days_be_counted(self, quick_site, capsys, days):
        """While a site on a FileStorage runs only that is possible."""
        rewrite(quick_site)
        with quick_site.open():
            quick_site.run(capsys, "gc", "--keep-days", "7")
        days.passed = 7.1
        assert quick_site.run(capsys, "gc", "--keep-days", "7")["held"] == 0
        assert quick_site.run(capsys, "gc", "--keep-days", "7", "--delete")["deleted"] == 2

    def test_blob_that_is_needed_again_counts_from_anew(self, s3, tmp_path, capsys, days):
        """A database that was restored needs what was garbage; later it is garbage again."""
        site = filestorage_site(s3, tmp_path, sweep_after_pack="false", gc_grace=0)
        site.write()
        with site.open() as db:
            first = put_blobs(db, {"a": b"1"})["a"][2]
        backup = (tmp_path / "Data.fs").read_bytes()
        with site.open() as db:
            put_blobs(db, {"a": b"2"})
            db.pack()
        packed = (tmp_path / "Data.fs").read_bytes()

        def restore(data):
            # In its place: it stays the same file, and so the same database.
            (tmp_path / "Data.fs").write_bytes(data)
            (tmp_path / "Data.fs.index").unlink(missing_ok=True)

        site.run(capsys, "gc", "--keep-days", "7")
        restore(backup)
        days.passed = 5
        assert site.run(capsys, "gc", "--keep-days", "7")["garbage"] == 0
        restore(packed)
        days.passed = 10
        result = site.run(capsys, "gc", "--keep-days", "7", "--delete")
        assert (result["garbage"], result["held"]) == (1, 1)
        assert first in blobs(site)
        days.passed = 17.1
        assert site.run(capsys, "gc", "--keep-days", "7", "--delete")["deleted"] == 1

    def test_lost_or_damaged_ledger_only_makes_garbage_stay(self, quick_site, capsys, days):
        """Nothing is deleted earlier for it."""
        arguments = "gc", "--delete", "--keep-days", "7"
        rewrite(quick_site)
        quick_site.run(capsys, *arguments)
        with quick_site.bucket() as client:
            bucket = quick_site.location.bucket
            (part,) = [key for key in keys(quick_site.location, LEDGER) if key != CURRENT]
            for key, body in ((part, b"no ledger"), (CURRENT, b"{"), (CURRENT, b'{"parts": 3}')):
                client.put_object(Bucket=bucket, Key=key, Body=body)
                days.passed += 7.1
                assert quick_site.run(capsys, *arguments)["held"] == 2
                (part,) = [key for key in keys(quick_site.location, LEDGER) if key != CURRENT]

    def test_stopped_runs_keep_what_both_have_seen(self, quick_site, capsys, monkeypatch, days):
        """A run that was stopped halfway forgets nothing of the other half."""
        monkeypatch.setattr(garbage, "PAGES_AT_ONCE", 1)
        later = S3Reader.list_pages

        def list_short_pages(client, *args):
            for page in later(client, *args):
                yield from (page[at : at + 2] for at in range(0, len(page), 2))

        monkeypatch.setattr(S3Reader, "list_pages", list_short_pages)
        *_old, last = rewrite(quick_site, 9)
        quick_site.run(capsys, "gc", "--keep-days", "7")
        days.passed = 7.1
        stop = Stop(0)
        with monkeypatch.context() as patch:
            patch.setattr(Work, "is_stopped", property(stop))
            while main(["-C", quick_site.path, "gc", "--keep-days", "7", "--json"]) == 3:
                stop.again(0)
                capsys.readouterr()
        assert json.loads(capsys.readouterr().out)["held"] == 0
        assert quick_site.run(capsys, "gc", "--keep-days", "7", "--delete")["deleted"] == 8
        assert blobs(quick_site) == [last]

    def test_another_database_writes_no_ledger(self, quick_site, tmp_path, capsys):
        """The mark in the bucket keeps a copy from writing there."""
        rewrite(quick_site)
        (tmp_path / "Data.fs").write_bytes((tmp_path / "Data.fs").read_bytes())
        (tmp_path / "Data.fs.s3blobs").unlink()
        error = quick_site.run(capsys, "gc", "--keep-days", "7", status=1)
        assert "another one" in error
        assert keys(quick_site.location, LEDGER) == []


class TestLedger:
    def test_parts_stay_small_and_come_back_whole(self, s3):
        """A hundred thousand entries, whose parts one small object each can carry."""
        random_ = random.Random(7)
        count = 100_000
        listed = [
            ListedObject(blob_key(p64(number), random_.randbytes(16)), 1, 5.0, 1_800_000_000.0)
            for number in range(count)
        ]
        client = make_client(s3)
        with closing(Ledger(client)) as ledger:
            ledger.see(listed)
            ledger.write()
        with closing(boto3_client(s3)) as plain:
            pages = plain.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket)
            sizes = [each["Size"] for page in pages for each in page["Contents"]]
        assert max(sizes) < 1 << 20
        assert len(sizes) == count // ledger_module.ENTRIES_AT_ONCE + 1
        with closing(Ledger(client)) as ledger:
            ledger.read()
            ages = ledger.see([each._replace(listed=each.listed + 60) for each in listed])
        assert set(ages.values()) == {60.0}
        assert len(ages) == count
        client.close()

    def test_killed_run_leaves_the_ledger_before_it(self, quick_site, capsys, s3, days):
        """Killed while it writes a new one, the old one counts."""
        rewrite(quick_site)
        quick_site.run(capsys, "gc", "--keep-days", "7")
        with TcpProxy(s3.endpoint_url) as proxy:
            proxy.hold(lambda direction, chunk: chunk.startswith(b"PUT") and b"current" in chunk)
            quick_site.location = proxy.location(s3)
            quick_site.write()
            command = [sys.executable, "-m", "zodb_s3blobs.operate", "-C", quick_site.path]
            process = subprocess.Popen([*command, "gc", "--keep-days", "7"])
            assert proxy.reached.wait(30)
            process.kill()
            process.wait()
        quick_site.location = s3
        quick_site.write()
        assert len(keys(s3, LEDGER)) == 3
        days.passed = 7.1
        assert quick_site.run(capsys, "gc", "--keep-days", "7")["held"] == 0
        assert len(keys(s3, LEDGER)) == 2


class TestUploads:
    def begin(self, location, *names):
        with closing(boto3_client(location)) as client:
            for name in names:
                client.create_multipart_upload(Bucket=location.bucket, Key=name)

    def uploads(self, location):
        with closing(boto3_client(location)) as client:
            answer = client.list_multipart_uploads(Bucket=location.bucket)
        return [each["Key"] for each in answer.get("Uploads", ())]

    @pytest.fixture
    def later(self, monkeypatch):
        """Let days pass, as the server's listing of uploads tells them."""
        passed = []
        list_uploads = S3Client.list_uploads

        def list_later(client, prefix):
            for upload in list_uploads(client, prefix):
                yield upload._replace(age=upload.age + sum(passed) * DAY)

        monkeypatch.setattr(S3Client, "list_uploads", list_later)
        return passed

    @pytest.mark.ceph
    def test_old_uploads_are_aborted_and_young_ones_are_not(self, ceph, tmp_path, capsys, later):
        """From seven days on, or what --keep-days says; only below our own keys."""
        location = new_bucket(ceph)
        site = filestorage_site(location, tmp_path, gc_grace="24h")
        site.write()
        with site.open() as db:
            put_blobs(db, {"a": b"1"})
        key = blob_key(p64(1), p64(1))
        self.begin(location, key, "blobs/of/another", "elsewhere/1")
        result = site.run(capsys, "gc", "--delete")
        assert (result["uploads"], result["old uploads"]) == (2, 0)
        later.append(6.9)
        assert site.run(capsys, "gc", "--delete")["uploads aborted"] == 0
        later.append(0.2)
        assert site.run(capsys, "gc")["old uploads"] == 2
        assert len(self.uploads(location)) == 3
        assert site.run(capsys, "gc", "--keep-days", "8", "--delete")["old uploads"] == 0
        assert site.run(capsys, "gc", "--delete")["uploads aborted"] == 2
        assert self.uploads(location) == ["elsewhere/1"]

    @pytest.mark.parametrize(
        "status, code", [(403, "AccessDenied"), (501, "NotImplemented"), (500, "InternalError")]
    )
    def test_server_that_does_not_list_them_is_no_failure(self, s3, tmp_path, capsys, status, code):
        """It is said, and the rest is done."""
        page = f"<Error><Code>{code}</Code></Error>".encode()
        head = b"HTTP/1.1 %d No\r\nContent-Type: application/xml\r\nContent-Length: %d\r\n"
        refusal = head % (status, len(page)) + b"Connection: close\r\n\r\n" + page

        def refuse(chunk):
            return refusal if b"?uploads" in chunk.split(b"\r\n")[0] else None

        with TcpProxy(s3.endpoint_url, refuse) as proxy:
            site = filestorage_site(
                proxy.location(s3), tmp_path, sweep_after_pack="false", gc_grace=0
            )
            site.write()
            rewrite(site)
            result = site.run(capsys, "gc", "--delete")
        assert result["deleted"] == 2
        assert result["uploads not told"]
