"""Manifest, and the page about backups: what a saved database needs is proved to be there."""

import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

import pytest

from zodb_s3blobs.interfaces import S3OperationError
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.operate.running import Work
from zodb_s3blobs.testing import server

from .checks import filestorage_site
from .checks import hexadecimal
from .checks import put_blobs
from .checks import relstorage_site
from .checks import Site
from .checks import Stop
from .checks import zeo_site
from .services.location import keys
from .services.location import new_bucket
from .storages import filestorage
from .storages import TcpProxy


PAGE = Path(__file__).parents[1] / "docs" / "backup.rst"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """What a stopped run leaves is this test's."""
    monkeypatch.setenv("XDG_STATE_HOME", f"{tmp_path}/state")


@pytest.fixture(params=["FileStorage", "RelStorage", "RelStorage without history", "ZEO"])
def site(request, s3, tmp_path):
    kind = request.param
    if kind == "ZEO":
        made = zeo_site(s3, tmp_path, request.getfixturevalue("zeo"))
    elif kind == "FileStorage":
        made = filestorage_site(s3, tmp_path)
    else:
        made = relstorage_site(s3, tmp_path, kind == "RelStorage")
    made.write()
    return made


@pytest.fixture
def quick_site(s3, tmp_path):
    made = filestorage_site(s3, tmp_path)
    made.write()
    return made


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def delete(site, key):
    with site.bucket() as client:
        client.delete_object(Bucket=site.location.bucket, Key=key)


def shorten(site, key):
    """Replace an object by a shorter one that says the same of itself."""
    with site.bucket() as client:
        old = client.head_object(Bucket=site.location.bucket, Key=key)
        client.put_object(Bucket=site.location.bucket, Key=key, Body=b"", Metadata=old["Metadata"])


def test_a_line_for_each_revision_and_one_that_counts_them(site, tmp_path, capsys):
    """Oid, tid, key and size, and with --head the SHA-256; an undo may share a key."""
    with site.open() as db:
        first = put_blobs(db, {"a": b"first"})["a"]
        second = put_blobs(db, {"a": b"second one"})["a"]
        other = put_blobs(db, {"b": b"other"})["b"]
    result = site.run(capsys, "manifest", "--head", f"{tmp_path}/manifest")
    assert result["findings"] == []
    *lines, last = lines_of(tmp_path / "manifest")
    assert last == {"revisions": len(lines)}
    expected = {second: 10, other: 5}
    if "history false" not in (site.base or ""):
        expected[first] = 5
    found = {(line["oid"], line["tid"], line["key"]): line["size"] for line in lines}
    assert found == {
        (hexadecimal(oid), hexadecimal(tid), key): size
        for (oid, tid, key), size in expected.items()
    }
    assert all(len(line["sha256"]) == 64 for line in lines)
    assert not list(tmp_path.glob("manifest-*"))


def test_complete_bucket_is_proved_without_a_download(site, tmp_path, capsys):
    """By the database and by a file of it; the bytes of no blob are asked for."""
    with site.open() as db:
        put_blobs(db, {str(number): b"%d" % number for number in range(20)})
    heads = []

    def note(chunk):
        heads.append(chunk.split(b"\r\n")[0])

    with TcpProxy(site.location.endpoint_url, note) as proxy:
        site.location = proxy.location(site.location)
        site.write()
        for options in ([f"{tmp_path}/manifest"], ["--compare"], ["--compare", "--head"]):
            assert site.run(capsys, "manifest", *options)["findings"] == []
        result = site.run(capsys, "manifest", "--compare", f"{tmp_path}/manifest")
    assert result == {"findings": [], "counts": {"objects": 20, "revisions": 20}}
    assert [head for head in heads if head.startswith(b"GET") and b"/blobs/" in head] == []
    assert any(head.startswith(b"HEAD") for head in heads)


def test_missing_and_short_objects_are_found(site, tmp_path, capsys):
    """Missing ones by the listing, short ones by the file or by --head; exit status 1."""
    with site.open() as db:
        needs = put_blobs(db, {str(number): b"%d" % number for number in range(5)})
    manifest = f"{tmp_path}/manifest"
    site.run(capsys, "manifest", manifest)
    delete(site, needs["1"][2])
    shorten(site, needs["3"][2])
    missing, short = ("missing", needs["1"][2]), ("wrong size", needs["3"][2])
    for options, expected in (
        (["--compare"], {missing}),
        (["--compare", "--head"], {missing, short}),
        (["--compare", manifest], {missing, short}),
        (["--compare", "--head", manifest], {missing, short}),
        ([f"{tmp_path}/later"], {missing}),
    ):
        result = site.run(capsys, "manifest", *options, status=1)
        assert {(each["kind"], each["key"]) for each in result["findings"]} == expected
    sizes = {line["key"]: line["size"] for line in lines_of(tmp_path / "later")[:-1]}
    assert sizes[needs["1"][2]] is None
    assert len(sizes) == 5


def test_other_bytes_are_found_by_their_digest(quick_site, tmp_path, capsys):
    """An object of the right size that says another SHA-256 than the manifest."""
    with quick_site.open() as db:
        need = put_blobs(db, {"a": b"right"})["a"]
    quick_site.run(capsys, "manifest", "--head", f"{tmp_path}/manifest")
    with quick_site.open() as db:
        path = tmp_path / "other"
        path.write_bytes(b"wrong")
        db.storage.parts.services.client.upload_file(str(path), need[2])
    options = "--compare", f"{tmp_path}/manifest"
    assert quick_site.run(capsys, "manifest", *options)["findings"] == []
    result = quick_site.run(capsys, "manifest", "--head", *options, status=1)
    assert [each["kind"] for each in result["findings"]] == ["wrong digest"]


def test_revision_that_is_packed_meanwhile_is_not_missing(quick_site, capsys, tmp_path):
    """A site goes on while its manifest is written."""
    from zodb_s3blobs.operate.needs import Needs

    with quick_site.open() as db, pytest.MonkeyPatch.context() as patch:
        put_blobs(db, {"a": b"1", "b": b"1"})
        compare = Needs.compare

        def compare_late(needs, *args, **kw):
            put_blobs(db, {"a": b"2"})
            db.pack()
            return compare(needs, *args, **kw)

        patch.setattr(Needs, "compare", compare_late)
        assert quick_site.run(capsys, "manifest", f"{tmp_path}/m")["findings"] == []
    assert lines_of(tmp_path / "m")[-1] == {"revisions": 1}


def test_what_has_moved_between_bases_is_found_by_tid(s3, tmp_path, capsys):
    """Records with references whose objects are kept by tid, as copying such a database leaves."""
    site = filestorage_site(s3, tmp_path, addressing="record")
    site.write()
    with site.open() as db:
        oid, tid, key = put_blobs(db, {"a": b"bytes"})["a"]
    by_tid = blob_key(oid, tid)
    assert by_tid != key
    with site.bucket() as client:
        client.put_object(
            Bucket=s3.bucket, Key=by_tid, Body=b"bytes", Metadata={"zodb-key": by_tid}
        )
    delete(site, key)
    assert site.run(capsys, "manifest", f"{tmp_path}/manifest")["findings"] == []
    assert lines_of(tmp_path / "manifest")[0]["key"] == by_tid
    assert site.run(capsys, "check")["findings"] == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json\n",
        "[]\n",
        '{"revisions": 1}\n',
        '{"oid": "0x1", "tid": "0x2", "key": "blobs/1/2.blob", "size": 3}\n',
        '{"oid": "0x1", "tid": "0x2", "key": "elsewhere", "size": 3}\n{"revisions": 1}\n',
        '{"oid": "0x1", "tid": "0x2", "key": "blobs/1/2.blob", "size": "3"}\n{"revisions": 1}\n',
        '{"oid": "0x1", "tid": "0x2", "key": "blobs/1/2.blob"}\n{"revisions": 1}\n',
        '{"revisions": 0}\n{"revisions": 1}\n',
    ],
)
def test_what_is_no_manifest_or_was_cut_proves_nothing(quick_site, tmp_path, capsys, text):
    """The text names the file; exit status 2."""
    path = tmp_path / "manifest"
    path.write_text(text)
    error = quick_site.run(capsys, "manifest", "--compare", str(path), status=2)
    assert str(path) in error


def test_wrong_uses_say_what_to_do(quick_site, tmp_path, capsys):
    """Without a file and --compare, or where nothing can be written."""
    assert "say into which FILE" in quick_site.run(capsys, "manifest", status=2)
    with quick_site.open() as db:
        put_blobs(db, {"a": b"bytes"})
    error = quick_site.run(capsys, "manifest", f"{tmp_path}/nowhere/manifest", status=2)
    assert "cannot be written" in error
    error = quick_site.run(capsys, "manifest", "--compare", f"{tmp_path}/nowhere", status=2)
    assert "nowhere" in error


def test_stopped_run_writes_nothing(quick_site, tmp_path, capsys, monkeypatch):
    """Half a manifest would be taken for a whole one."""
    with quick_site.open() as db:
        put_blobs(db, {"a": b"bytes"})
    (tmp_path / "manifest").write_text("the old one")
    for patience in range(3):
        monkeypatch.setattr(Work, "is_stopped", property(Stop(patience)))
        result = quick_site.run(capsys, "manifest", f"{tmp_path}/manifest", status=3)
        assert result == {"stopped": True}
        assert (tmp_path / "manifest").read_text() == "the old one"
        assert not list(tmp_path.glob("manifest-*"))


# The page


def commands():
    """Return the commands that the page shows, in their order."""
    lines = (line.strip() for line in PAGE.read_text().splitlines())
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


class Shell:
    """Runs the commands of the page as its reader does, in a directory with a site."""

    def __init__(self, directory, locations):
        self.directory = directory
        programs = directory / "bin"
        programs.mkdir()
        program = programs / "zodb-s3blobs"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m zodb_s3blobs.operate "$@"\n')
        program.chmod(0o755)
        rclone = server._find_rclone()
        path = [str(programs), os.path.dirname(sys.executable), os.path.dirname(rclone)]
        self.environ = {**os.environ, "PATH": os.pathsep.join([*path, os.environ["PATH"]])}
        self.environ["RCLONE_CONFIG"] = "/dev/null"
        for name, location in locations.items():
            options = {
                "TYPE": "s3",
                "PROVIDER": "Rclone",
                "ENDPOINT": location.endpoint_url,
                "ACCESS_KEY_ID": location.access_key,
                "SECRET_ACCESS_KEY": location.secret_key,
                "FORCE_PATH_STYLE": "true",
            }
            for option, value in options.items():
                self.environ[f"RCLONE_CONFIG_{name.upper()}_{option}"] = value

    def run(self, command, names, status=0):
        """Run a command, with names that were replaced; return what it prints."""
        for shown, real in names.items():
            command = command.replace(shown, real)
        done = subprocess.run(
            command, shell=True, cwd=self.directory, env=self.environ, text=True,
            capture_output=True,
        )  # fmt: skip
        assert status in (None, done.returncode), (command, done.stdout, done.stderr)
        return done.stdout


class Backups:
    """A site whose days go by as the page tells; each step is called after its command."""

    def __init__(self, s3, safe, directory):
        self.s3, self.safe, self.directory = s3, safe, directory
        for name in ("etc", "var"):
            (directory / name).mkdir(parents=True)
        self.shell = Shell(directory, {"site": s3, "safe": safe})
        self.site = self.configure("zope", "var", s3, sweep_after_pack="false", gc_grace=0)
        self.configure("restored", "restored", s3, access="read-only")
        self.configure("safe", "restored", safe, access="read-only")
        self.contents = {}

    def configure(self, name, database, location, **options):
        base = filestorage(self.directory / database)
        options["s3_prefix"] = "main"
        site = Site(location, self.directory, base, cache=f"cache-{name}", options=options)
        site.write()
        os.rename(site.path, self.directory / "etc" / f"{name}.conf")
        return site

    def run(self, command, status=0):
        names = {"my-site-blobs": self.s3.bucket, "backup-blobs": self.safe.bucket}
        return self.shell.run(command, names, status)

    def store(self, **contents):
        with self.site.open() as db:
            put_blobs(db, contents)
            db.pack()
        self.contents.update(contents)

    def read(self):
        """Return what the site has, read with an empty cache."""
        shutil.rmtree(self.directory / "cache-zope", ignore_errors=True)
        with self.site.open() as db, db.transaction() as conn:
            found = {}
            for name, blob in conn.root().items():
                with blob.open() as file:
                    found[name] = file.read()
        return found


@pytest.mark.slow
def test_each_command_of_the_page_does_what_the_page_says(rclone, s3, tmp_path):
    """A site is packed, saved, proved, lost with its bucket, restored: all bytes are there."""
    site = Backups(s3, new_bucket(rclone), tmp_path)
    site.store(a=b"a of the backup", b=b"b")
    site.store(b=b"b of the backup")
    backed_up = dict(site.contents)
    shown = iter(commands())

    def run(expected, status=0):
        command = next(shown)
        assert command.startswith(expected), command
        return site.run(command, status)

    # Prepare
    assert "held: 1\n" in run("zodb-s3blobs -C etc/zope.conf gc --keep-days 30")
    assert "deleted: 0\n" in run("zodb-s3blobs -C etc/zope.conf gc --keep-days 30 --delete")
    assert len(keys(s3, "main/blobs/")) == 3
    # Back up; what comes after the database and before the bucket does no harm.
    run("mkdir -p")
    run("repozo -B")
    site.store(a=b"a that is lost", c=b"c that is lost")
    run("rclone copy")
    assert keys(site.safe, "main/blobs/") == keys(s3, "main/blobs/")
    # Prove it
    run("repozo -R -r backup/database -o restored/Data.fs")
    assert "objects: 2\n" in run("zodb-s3blobs -C etc/restored.conf manifest --compare")
    run("zodb-s3blobs -C etc/restored.conf manifest --head backup/manifest")
    *lines, last = lines_of(tmp_path / "backup" / "manifest")
    assert last == {"revisions": 2}
    assert all(line["sha256"] for line in lines)
    safe = "zodb-s3blobs -C etc/safe.conf manifest --compare backup/manifest"
    assert "objects: 2\n" in run(safe)
    with Site(site.safe, tmp_path).bucket() as client:
        stored = client.head_object(Bucket=site.safe.bucket, Key=f"main/{lines[0]['key']}")
        client.delete_object(Bucket=site.safe.bucket, Key=f"main/{lines[0]['key']}")
    metadata = {name.lower(): value for name, value in stored["Metadata"].items()}
    assert metadata["zodb-sha256"] == lines[0]["sha256"]
    assert "missing: 1\n" in site.run(safe, status=1)
    site.run("rclone copy --metadata site:my-site-blobs/main/blobs safe:backup-blobs/main/blobs")
    # Restore, after all was lost
    for path in (tmp_path / "var").glob("Data.fs*"):
        path.unlink()
    for key in keys(s3, "main/blobs/"):
        delete(site.site, key)
    run("repozo -R -r backup/database -o var/Data.fs")
    run("rclone copy")
    with pytest.raises(S3OperationError):
        site.store(a=b"of a database that is not the owner")
    assert "is this one: True" in run("zodb-s3blobs -C etc/zope.conf own --take")
    report = run("zodb-s3blobs -C etc/zope.conf check --depth head", status=None)
    assert "missing" not in report
    assert site.read() == backed_up
    assert "deleted: 0\n" in run("zodb-s3blobs -C etc/zope.conf gc --keep-days 30")
    site.store(c=b"stored after the restore")
    assert site.read() == {**backed_up, "c": b"stored after the restore"}
    assert next(shown, None) is None
