"""The command line finds its database, stops when it must, and tells what came of it."""

from contextlib import redirect_stderr
from contextlib import redirect_stdout
import io
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import threading
from unittest.mock import patch
import urllib.request

import pytest
from ZODB.blob import Blob

from zodb_s3blobs.operate import running
from zodb_s3blobs.operate.configuration import find_database
from zodb_s3blobs.operate.configuration import UsageError
from zodb_s3blobs.operate.main import main
from zodb_s3blobs.operate.running import State
from zodb_s3blobs.operate.running import Work
from zodb_s3blobs.ownership import MARKER
from zodb_s3blobs.spool import Spool

from .services.location import keys
from .storages import make_client
from .storages import open_db
from .storages import PATIENCE
from .storages import read
from .storages import section


class Site:
    """A directory with a zope.conf, as an instance has it."""

    def __init__(self, location, directory, around="{}", imports=(), **options):
        self.directory = directory
        self.location = location
        self.options = options
        self.path = str(directory / "zope.conf")
        lines = [f"%import {name}" for name in ("zodb_s3blobs", *imports)]
        text = around.format(section(location, directory, **options))
        lines += [
            "%define HERE /nowhere",
            "instancehome $HERE",
            "<environment>",
            "  TZ UTC",
            "</environment>",
            "<zodb_db main>",
            "  mount-point /",
            text,
            "</zodb_db>",
        ]
        (directory / "zope.conf").write_text("\n".join(lines))

    def open(self, **options):
        return open_db(self.location, self.directory, **{**self.options, **options})

    def run(self, *arguments):
        """Run a command; return (exit status, standard output, standard error)."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ):
            try:
                status = main(["-C", self.path, *arguments])
            except SystemExit as ended:
                status = ended.code
        return status, out.getvalue(), err.getvalue()

    def json(self, *arguments, status=0):
        """Run a command with ``--json``, and return what it printed."""
        found, out, err = self.run(*arguments, "--json")
        assert found == status, out + err
        return json.loads(out)


@pytest.fixture
def site(s3, tmp_path):
    return Site(s3, tmp_path)


def write(db, **contents):
    with db.transaction() as connection:
        for name, data in contents.items():
            connection.root()[name] = Blob(data)


# Its configuration


def conf(tmp_path, text, name="zope.conf"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


OURS = """<s3blobstorage>
  bucket-name {name}
  cache-dir {directory}/{name}
  s3-secret-key with$$dollar
  s3-access-key key
  <mappingstorage>
  </mappingstorage>
</s3blobstorage>"""


def ours(tmp_path, name):
    return OURS.format(name=name, directory=tmp_path)


def test_database_is_found_in_any_configuration_of_the_family(tmp_path):
    """Of Zope, of ZODB, of ZEO; with defines, includes and other sections that nobody knows."""
    conf(tmp_path, f"<zodb two>\n{ours(tmp_path, 'second')}\n</zodb>", "more.conf")
    text = (
        "%import zodb_s3blobs\n%define PLACE /nowhere\n%include more.conf\ninstancehome $PLACE\n"
        "<unknown thing>\n key $PLACE\n</unknown>\n"
        f"<zodb_db main>\n mount-point /\n{ours(tmp_path, 'first')}\n</zodb_db>\n"
        "<zodb_db temporary>\n<mappingstorage>\n</mappingstorage>\n</zodb_db>\n"
    )
    path = conf(tmp_path, text)
    for name, bucket in (("main", "first"), ("two", "second")):
        database = find_database(path, name)
        assert (database.name, database.config.bucket_name) == (name, bucket)
        assert database.config.s3_secret_key.reveal() == "with$dollar"
    text = f"%import zodb_s3blobs\n<zeo>\n address 1\n</zeo>\n{ours(tmp_path, 'third')}"
    assert find_database(conf(tmp_path, text), None).config.bucket_name == "third"


def test_environment_that_says_read_only_is_not_overridden(tmp_path):
    """Whoever puts it before a command means it; and a wrong value is told."""
    text = "<environment>\n  ZODB_S3BLOBS_ACCESS {}\n</environment>\n%import zodb_s3blobs\n"
    path = conf(tmp_path, text.format("read-write") + ours(tmp_path, "bucket"))
    with patch.dict(os.environ, ZODB_S3BLOBS_ACCESS="read-only"):
        assert find_database(path, None).is_read_only
    with patch.dict(os.environ):
        assert not find_database(path, None).is_read_only
    path = conf(tmp_path, text.format("readonly") + ours(tmp_path, "bucket"))
    with patch.dict(os.environ), pytest.raises(UsageError, match="readonly"):
        find_database(path, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root is not the site's user")
@pytest.mark.parametrize("whose", ["Data.fs", "cache"])
def test_root_is_sent_to_the_site_s_user(site, tmp_path, whose):
    """What root makes there the site could not use; nothing is made."""
    write(db := site.open(), a=b"bytes")
    db.close()
    os.chown(tmp_path / whose, 12345, -1)
    if whose == "Data.fs":
        assert site.run("stats")[0] == 0  # whoever has the cache runs the site
        shutil.rmtree(tmp_path / "cache")
    spool = tmp_path / "spool"
    text = Path(site.path).read_text()
    Path(site.path).write_text(text.replace("bucket-name", f"spool-dir {spool}\n bucket-name"))
    for command in ("stats", "check"):
        status, _out, err = site.run(command)
        assert (status, "run this as the site's user" in err) == (2, True)
    assert "run this as the site's user" in " ".join(site.run("doctor")[1].split())
    assert not spool.exists()


def test_environment_of_a_zope_conf_is_set_as_zope_sets_it(tmp_path):
    """Over that of the process, and when the file has been read: ``$(NAME)`` is older."""
    text = (
        "<environment>\n  ZODB_S3BLOBS_ACCESS read-only\n  AWS_PROFILE a Profile\n"
        "  BUCKET other\n</environment>\n"
        f"%import zodb_s3blobs\n{ours(tmp_path, '$(BUCKET)')}"
    )
    outside = {"AWS_PROFILE": "of the process", "BUCKET": "bucket"}
    with patch.dict(os.environ, outside):
        database = find_database(conf(tmp_path, text), None)
        assert os.environ["AWS_PROFILE"] == "a Profile"
        assert os.environ["BUCKET"] == "other"
        assert database.config.bucket_name == "bucket"
        assert database.is_read_only


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("", None, "has no database with an <s3blobstorage>"),
        (
            "<zodb_db main>\n<mappingstorage>\n</mappingstorage>\n</zodb_db>",
            None,
            "has no database",
        ),
        ("<zodb_db", None, "cannot be read"),
        ("%include missing.conf", None, "missing.conf"),
        ("$(NOBODY_HAS_THIS) x\nx $(NOBODY_HAS_THIS)", None, "NOBODY_HAS_THIS"),
        ("{one}{two}", None, "--database, one of one, two"),
        ("{one}{two}", "three", "no database three, but one, two"),
        ("{bad}", None, "bucket"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_told(tmp_path, text, name, words):
    """In a line, with what to do; no traceback."""
    one = f"<zodb_db one>\n{ours(tmp_path, 'first')}\n</zodb_db>\n"
    bad = one.replace("bucket-name first", "bucket-name x")
    text = text.format(one=one, two=one.replace("db one", "db two"), bad=bad)
    path = conf(tmp_path, f"%import zodb_s3blobs\n{text}\n")
    with pytest.raises(UsageError) as caught:
        find_database(path, name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "dollar" not in str(caught.value)


def test_missing_configuration_is_told(tmp_path, monkeypatch):
    """Whether it was given or looked for; where an instance has it, it is found."""
    with pytest.raises(UsageError, match="cannot be read"):
        find_database(str(tmp_path / "zope.conf"), None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="zodb-s3blobs -C"):
        find_database(None, None)
    (tmp_path / "etc").mkdir()
    conf(tmp_path, f"%import zodb_s3blobs\n{ours(tmp_path, 'first')}", "etc/zope.conf")
    assert find_database(None, None).config.bucket_name == "first"


def test_base_is_read_while_the_site_runs(site):
    """The lock of its FileStorage is not asked for; to write it is, and that is told."""
    db = site.open()
    write(db, a=b"bytes")
    database = find_database(site.path, None)
    storage = database.open_to_read()
    assert storage.isReadOnly()
    assert len(storage) == len(db.storage)
    storage.close()
    with pytest.raises(UsageError, match="another process has the database main: stop it"):
        find_database(site.path, None).open()
    db.close()
    find_database(site.path, None).open().close()


def test_records_inside_a_wrapper_are_understood(s3, tmp_path):
    """As zlibstorage makes them, which the site has around ours."""
    site = Site(
        s3,
        tmp_path,
        around="<zlibstorage>\n{}\n</zlibstorage>",
        imports=["zc.zlibstorage"],
        addressing="record",
    )
    db = site.open(imports=["zc.zlibstorage"], around="<zlibstorage>\n{}\n</zlibstorage>")
    write(db, a=b"bytes" * 100)
    db.close()
    storage = find_database(site.path, None).open_to_read()
    record, _serial = storage.parts.base.storage.load((1).to_bytes(8, "big"))
    assert storage.parts.read(record).stamp is not None
    storage.close()


# The program


def test_program_is_installed_and_explains_itself():
    """With each command, and what its exit status says."""
    run = [sys.executable, "-m", "zodb_s3blobs.operate", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    for word in ("stats", "spool", "own", "presign", "warm", "Exit status", "-C"):
        assert word in done.stdout


def test_wrong_use_has_a_status_of_its_own(site):
    """2, as that of argparse; and a line that says what to do."""
    status, out, err = site.run("stats", "--workers", "0")
    assert (status, out) == (2, "")
    assert "expected a whole number from 1 on" in err
    status, out, err = site.run("stats", "--time-limit", "soon")
    assert status == 2
    assert "such as 90s, 30m or 2h" in err
    os.remove(site.path)
    status, out, err = site.run("stats")
    assert (status, out) == (2, "")
    assert "cannot be read" in err


def test_failure_of_s3_is_told_in_a_line(site, s3):
    """Without a traceback, and without a secret."""
    write(db := site.open(), a=b"bytes")
    db.close()
    with open(site.path) as file:
        text = file.read()
    with open(site.path, "w") as file:
        file.write(text.replace(s3.endpoint_url, "http://127.0.0.1:9"))
    status, _out, err = site.run("own")
    assert status == 1
    assert err.startswith("zodb-s3blobs: S3 ")
    assert s3.secret_key not in err


# Simple commands


def test_stats_show_cache_and_spool(site):
    """As text and as JSON; while the site runs."""
    db = site.open()
    write(db, a=b"0123456789")
    found = site.json("stats")
    assert found["cache_bytes"] == 10
    assert found["spool_blobs"] == 0
    status, out, _err = site.run("stats")
    assert status == 0
    assert "cache_bytes: 10" in out
    db.close()


def test_spool_is_shown_and_uploaded(s3, tmp_path):
    """The status says whether something waits; it is uploaded while no site runs."""
    site = Site(s3, tmp_path, spool_dir=tmp_path / "spool", on_upload_failure="spool")
    site.open().close()
    assert site.json("spool")["spool_blobs"] == 0
    spool = Spool(str(tmp_path / "spool"), (s3.endpoint_url, s3.bucket, ""))
    path = tmp_path / "file"
    path.write_bytes(b"spooled")
    spool.take([("blobs/1/2.blob", str(path))]).end()
    spool.close()
    assert site.json("spool", status=1)["spool_blobs"] == 1
    found = site.json("spool", "--drain")
    assert (found["uploaded"], found["spool_blobs"]) == (1, 0)
    spool = Spool(str(tmp_path / "spool"), (s3.endpoint_url, s3.bucket, ""))
    path.write_bytes(b"spooled")
    spool.take([("blobs/1/3.blob", str(path))]).end()
    spool.close()
    for file in (tmp_path / "spool" / "blobs").glob("*.blob"):
        file.unlink()
    assert site.json("spool", "--drain", status=1)["lost"] == 1
    assert "blobs/1/2.blob" in keys(s3)


def test_spool_without_a_directory_is_told(site):
    """There is nothing to show."""
    status, _out, err = site.run("spool")
    assert status == 2
    assert "has no spool-dir" in err


def test_owner_is_shown_and_taken(site, s3, tmp_path):
    """A bucket without a mark, with ours, with another's; only --take changes it."""
    site.open().close()
    assert site.json("own") == {"owner": None, "is this one": True}
    assert make_client(s3).read_small(MARKER) is None
    write(db := site.open(), a=b"bytes")
    db.close()
    assert site.json("own")["is this one"] is True
    (tmp_path / "Data.fs.s3blobs").unlink()  # as a restore from a backup does
    assert site.json("own", status=1)["is this one"] is False
    found = site.json("own", "--take")
    assert found["is this one"] is True
    assert found["owner"].startswith(f"{tmp_path / 'Data.fs'} (since ")
    write(db := site.open(), b=b"bytes")
    db.close()


def test_presigned_url_of_a_blob_is_printed(site):
    """Of the current revision; who has it needs no credentials."""
    write(db := site.open(), a=b"bytes")
    with db.transaction() as connection:
        oid = connection.root()["a"]._p_oid
    status, out, _err = site.run("presign", f"0x{int.from_bytes(oid, 'big'):x}")
    assert status == 0
    with urllib.request.urlopen(out.strip()) as answer:
        assert answer.read() == b"bytes"
    for wrong in ("x", "0x" + "f" * 17, "-1", "1f", "0x", "31"):
        assert site.run("presign", wrong)[0] == 2
    status, _out, err = site.run("presign", "0xabcdef")
    assert status == 2
    assert "there is no blob 0xabcdef\n" in err
    db.close()


def test_warm_fetches_the_newest_that_fit(s3, tmp_path):
    """Current revisions only, up to cache-size; what is cached is not fetched again."""
    site = Site(s3, tmp_path, cache="new", cache_size="4KB")
    db = site.open(cache="old", cache_size="1MB")
    write(db, old=b"0" * 3000)
    write(db, a=b"1" * 1000)
    write(db, b=b"2" * 1000)
    with db.transaction() as connection, connection.root()["b"].open("w") as file:
        file.write(b"3" * 1500)
    db.close()
    found = site.json("warm")
    assert found == {"fetched": 2, "failed": 0, "bytes": 2500}
    db = site.open(cache="new", cache_size="4KB")
    with db.transaction() as connection:
        is_cached = {
            name: db.storage.blob_is_cached(blob._p_oid, blob._p_serial)
            for name, blob in connection.root().items()
            if [blob._p_activate()]
        }
        assert is_cached == {"old": False, "a": True, "b": True}
        assert read(connection.root()["b"]) == b"3" * 1500
    db.close()
    assert site.json("warm")["fetched"] == 0


# Running


def test_results_come_in_order_and_few_are_ahead():
    """However long each takes; what is not asked for yet is not begun."""
    work, taken = Work(4, None, shows=False), []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    found = []
    for number, future in work.each(items(), lambda number: number * 2):
        assert len(taken) <= number + 4 * 4 + 1
        found.append((number, future.result()))
    assert found == [(number, number * 2) for number in range(100)]


def test_failure_of_one_job_stops_no_other():
    """It is in its future."""

    def job(number):
        if number == 3:
            raise ZeroDivisionError
        return number

    work = Work(2, None, shows=False)
    failed = [number for number, future in work.each(range(6), job) if future.exception()]
    assert failed == [3]


def test_time_limit_begins_nothing_more_and_ends_what_runs(monkeypatch):
    """So that the next run can go on behind it."""
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    work = Work(1, 10, shows=False)

    def job(number):
        now[0] += 1
        return number

    done = [future.result() for _number, future in work.each(range(100), job)]
    assert done == list(range(len(done)))
    assert 10 <= len(done) < 20
    assert work.is_stopped


INTERRUPTED = """
import os
from zodb_s3blobs.operate import main
from zodb_s3blobs.operate.running import Work
def job(number):
    os.write(1, b"begun\\n")
    os.read(0, 1)
    return number
def run():
    work = Work(2, None, False)
    with work.interruptible():
        done = [future.result() for number, future in work.each(range(1000), job)]
        print("done", len(done), work.is_stopped, flush=True)
main.main = run
main.program()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_signal_stops_when_what_runs_has_ended_and_a_second_one_at_once(number, times):
    """Ctrl-C, or a scheduler's: nothing is left half done by the first."""
    run = [sys.executable, "-c", INTERRUPTED]
    pipe = subprocess.PIPE
    with subprocess.Popen(run, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        timer = threading.Timer(PATIENCE, process.kill)
        timer.start()
        assert process.stdout.readline() == "begun\n"
        for _time in range(times):
            process.send_signal(number)
            assert "stopping" in process.stderr.readline() if _time == 0 else True
        if times == 1:
            process.stdin.write("\n" * 100)
            process.stdin.flush()
        rest = process.stdout.read().split("\n")
        timer.cancel()
    if times == 1:
        word, count, is_stopped = rest[-2].split()
        assert (word, is_stopped) == ("done", "True")
        assert 1 <= int(count) <= 2 * 4
    else:
        assert set(rest) <= {"begun", ""}
        assert process.wait() == 3


def test_state_is_of_one_work_and_goes_with_its_end(tmp_path, monkeypatch):
    """Private, whole, and nothing where nobody can read it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    one, other = State("gc", "bucket"), State("gc", "another")
    assert one.load() is None
    one.save({"after": "blobs/1"})
    assert State("gc", "bucket").load() == {"after": "blobs/1"}
    assert other.load() is None
    assert os.stat(os.path.dirname(one.path)).st_mode & 0o777 == 0o700
    with open(one.path, "w") as file:
        file.write("{")
    assert one.load() is None
    one.clear()
    one.clear()
    assert os.listdir(os.path.dirname(one.path)) == []
