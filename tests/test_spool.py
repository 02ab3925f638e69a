"""The spool loses nothing: whoever dies when, whoever uploads with us, whatever lies there."""

import contextlib
from contextlib import contextmanager
import errno
import fcntl
from functools import partial
from hashlib import sha256
from itertools import count
import logging
import os
from pathlib import Path
import shutil
import signal
import threading
import time

import pytest
from ZODB.utils import p64
from zope.interface.verify import verifyObject

from zodb_s3blobs import spool as spool_module
from zodb_s3blobs.cancellation import UploadCancelled
from zodb_s3blobs.draining import SpoolUploader
from zodb_s3blobs.interfaces import IBlobSource
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.spool import Spool
from zodb_s3blobs.uploads import UploadPool

from .disks import fill_inodes
from .disks import fill_up
from .disks import make_read_only
from .disks import MEGABYTE
from .disks import on_disks
from .faults import in_child
from .storages import Failure
from .storages import Gate
from .storages import HookedClient
from .storages import PATIENCE
from .storages import random_bytes
from .storages import start


PLACE = "https://s3.example.com", "bucket", "prefix"
Z = p64(0)
THREAD = "zodb-s3blobs-spool"


class DirectoryBucket:
    """What a `SpoolUploader` asks of a client; objects are files, so that processes share them."""

    def __init__(self, directory):
        self._directory = directory
        directory.mkdir(exist_ok=True)

    def upload_file(self, local_path, s3_key, cancelled=None):
        data = Path(local_path).read_bytes()
        temporary = self._directory / f"{os.urandom(8).hex()}.tmp"
        temporary.write_bytes(data)
        temporary.rename(self._path(s3_key))

    def head_object(self, s3_key):
        try:
            data = self._path(s3_key).read_bytes()
        except FileNotFoundError:
            return None
        return {
            "ContentLength": len(data),
            "Metadata": {"zodb-sha256": sha256(data).hexdigest()},
        }

    def _path(self, s3_key):
        return self._directory / s3_key.replace("/", "@")

    def strangers(self):
        """Return the names of what has no key of a blob."""
        return [path.name for path in self._directory.iterdir() if path.suffix != ".blob"]

    def objects(self):
        """Return the bytes of all objects by their keys."""
        paths = self._directory.glob("*.blob")
        return {path.name.replace("@", "/"): path.read_bytes() for path in paths}


class Host:
    """A directory with staged files, a spool and a bucket."""

    def __init__(self, directory, spool=None):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.spool_dir = spool or directory / "spool"
        self.bucket = DirectoryBucket(directory / "bucket")
        self.contents = {}

    def spool(self, **options):
        """Open the spool as one more process would."""
        return Spool(str(self.spool_dir), PLACE, **options)

    def stage(self, *numbers, size=1000):
        """Make staged files, and return what `Spool.take` wants."""
        files = []
        for number in numbers:
            key, path = key_of(number), self.directory / f"staged-{number}.tmp"
            self.contents[key] = random_bytes(number, size)
            path.write_bytes(self.contents[key])
            files.append((key, str(path)))
        return files

    def keep(self, *numbers):
        """Let a transaction put blobs into the spool, and end."""
        self.spool().take(self.stage(*numbers)).end()

    def uploader(self):
        """Return (a `SpoolUploader` as one more process has it, its `HookedClient`)."""
        client = HookedClient(self.bucket)
        return SpoolUploader(self.spool(), client, UploadPool(4)), client

    def drain(self):
        """Upload as one more process would, and return the report."""
        return self.uploader()[0].drain()

    def names(self):
        """Return the names of all files in the spool, but for its marker."""
        paths = [path for path in self.spool_dir.rglob("*") if not path.is_dir()]
        return sorted(path.name for path in paths if path.name != "bucket")

    def journal(self):
        """Return the path of the only journal."""
        (path,) = self.spool_dir.glob("*.journal")
        return path

    def blob(self, number):
        """Return the path of a blob in the spool, as others find it."""
        (path,) = (self.spool_dir / "blobs").glob(f"{number:x}-*.blob")
        return path

    def check_drained(self, *numbers):
        """Assert that exactly these blobs are in the bucket, and nothing in the spool."""
        expected = {key_of(number): self.contents[key_of(number)] for number in numbers}
        assert self.bucket.objects() == expected
        assert self.names() == []


def key_of(number):
    return blob_key(p64(number), p64(number + 1000))


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


@pytest.fixture(params=["links", "copies"])
def any_host(request, tmp_path, monkeypatch):
    """A host whose spool is on the file system of the staged files, or on another one."""
    if request.param == "copies":
        refuse_links(monkeypatch)
    return Host(tmp_path)


def refuse_links(monkeypatch, number=errno.EXDEV):
    def link(*args, **kw):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)


def entries(journal):
    return [entry.key for entry in journal.entries]


def journals(host):
    """Return the keys of what the spool yields, in this order."""
    return [entries(journal) for journal in host.spool().journals()]


# System calls

STEPS = [
    *[(os, name) for name in ("open", "write", "fsync", "link", "replace", "chmod", "remove")],
    (os, "close"),
    (fcntl, "flock"),
    (shutil, "copyfileobj"),
]


@contextmanager
def before_each_step(act):
    """Call act(number, function, args) before each system call that a spool makes here."""
    numbers = count(1)

    def wrap(function):
        def call(*args, **kw):
            act(next(numbers), function, args)
            return function(*args, **kw)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in STEPS:
            patch.setattr(module, name, wrap(getattr(module, name)))
        yield


def killed_at(number, function, prepare=lambda: None):
    """Call a function in a child that is killed at a system call; False when it makes fewer.

    :param prepare: called before the system calls are counted; the function gets what it returns.
    """
    pid = os.fork()
    if pid == 0:
        signal.alarm(PATIENCE)

        def act(reached, step, args):
            if reached == number:
                if step.__name__ == "write":
                    step(args[0], args[1][: len(args[1]) // 2])
                if step.__name__ == "copyfileobj":
                    args[1].write(args[0].read(10))
                    args[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            prepared = prepare()
            with before_each_step(act):
                function(prepared)
            os._exit(0)
        finally:
            os._exit(1)
    _pid, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


class Victim:
    """A child that has called a function, and stands still until it is killed."""

    def __init__(self, function):
        reading, writing = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            signal.alarm(PATIENCE)
            try:
                kept = function()  # noqa: F841  until the end
                os.write(writing, b"ready")
                time.sleep(PATIENCE)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb") as file:
            assert file.read(5) == b"ready"

    def kill(self):
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)


@pytest.fixture
def victim():
    """Return a function that starts a `Victim`."""
    victims = []

    def make(function):
        victims.append(Victim(function))
        return victims[-1]

    yield make
    for each in victims:
        try:
            each.kill()
        except (ProcessLookupError, ChildProcessError):
            pass  # the test has done so


# Taking and finding


def test_what_was_taken_is_found_and_uploaded_when_the_transaction_has_ended(any_host):
    """Bytes are there under their keys at once, and in the bucket after `end` and a drain."""
    spool = any_host.spool()
    taken = spool.take(any_host.stage(1, 2))
    for key, data in any_host.contents.items():
        (source,) = spool.find(key)
        assert verifyObject(IBlobSource, source)
        target = any_host.directory / "target.tmp"
        assert source.fetch(Z, Z, str(target))
        assert target.read_bytes() == data
        assert source.size(Z, Z) == 1000
        target.unlink()
    assert spool.find(key_of(3)) == []
    taken.end()
    report = any_host.drain()
    assert (report.uploaded, report.bytes, report.failed, report.lost) == (2, 2000, 0, 0)
    any_host.check_drained(1, 2)


def test_staged_file_may_go_after_it_was_taken(any_host):
    """The spool has a name or a copy of its own."""
    files = any_host.stage(1)
    taken = any_host.spool().take(files)
    os.remove(files[0][1])
    taken.end()
    any_host.drain()
    any_host.check_drained(1)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_where_links_are_refused_the_bytes_are_copied(host, monkeypatch, number):
    """Another file system, one without links, a file of another user: all are copied."""
    refuse_links(monkeypatch, number)
    host.keep(1)
    host.drain()
    host.check_drained(1)


def test_other_file_system_gets_copies_in_both_directions(tmp_path):
    """What is spooled on a real other disk comes back from there, too."""

    def child():
        host = Host(tmp_path / "host", tmp_path / "disk" / "spool")
        taken = host.spool().take(host.stage(1, 2))
        target = host.directory / "target.tmp"
        assert host.spool().find(key_of(1))[0].fetch(Z, Z, str(target))
        assert target.read_bytes() == host.contents[key_of(1)]
        taken.end()
        host.drain()
        host.check_drained(1, 2)

    on_disks(child, tmp_path / "disk")


def test_transaction_without_blobs_and_blob_without_bytes_are_kept(host):
    """Nothing to keep is no error, and an empty blob is one."""
    host.spool().take([]).end()
    host.spool().take(host.stage(1, size=0)).end()
    host.drain()
    host.check_drained(1)


def test_source_that_is_uploaded_meanwhile_says_that_it_has_nothing(host):
    """Who asks then turns to the bucket, where the blob is by now."""
    host.keep(1)
    (source,) = host.spool().find(key_of(1))
    host.drain()
    assert source.size(Z, Z) is None
    target = host.directory / "target.tmp"
    assert source.fetch(Z, Z, str(target)) is False
    assert not target.exists()


def test_source_whose_target_cannot_be_written_does_not_say_that_it_has_nothing(any_host):
    """A missing directory is another's trouble, and no missing blob."""
    any_host.keep(1)
    (source,) = any_host.spool().find(key_of(1))
    target = any_host.directory / "missing" / "target.tmp"
    with pytest.raises(FileNotFoundError) as caught:
        source.fetch(Z, Z, str(target))
    assert caught.value.filename == str(target)


def test_blob_that_is_spooled_already_is_kept_once(any_host):
    """A restore that is repeated finds its bytes; an abort leaves what an earlier one has put."""
    any_host.keep(1)
    again = any_host.spool().take(any_host.stage(1, 2))
    again.abort()
    any_host.drain()
    any_host.check_drained(1)


def test_blob_whose_spooled_file_is_damaged_is_replaced_by_who_brings_it_again(any_host):
    """A key has the same bytes for ever: those that come are right."""
    any_host.keep(1)
    damage(any_host.blob(1))
    any_host.keep(1)
    assert [any_host.drain().damaged for _number in range(2)] == [1, 0]
    any_host.check_drained(1)


# The same key with other bytes, as what a copy of a damaged database brings


def stage_other(host):
    """Return what `Spool.take` wants of the first blob, with other bytes."""
    path = host.directory / "other.tmp"
    path.write_bytes(b"other")
    return [(key_of(1), str(path))]


def read_all(host, key):
    """Return the bytes that the spool has of a blob, what came last first."""
    found = []
    for source in host.spool().find(key):
        target = host.directory / "target.tmp"
        assert source.fetch(Z, Z, str(target))
        found.append(target.read_bytes())
        target.unlink()
    return found


def test_of_two_with_the_same_key_the_later_one_is_read_and_uploaded_last(any_host):
    """As with S3, and each is removed by itself."""
    any_host.keep(1)
    any_host.spool().take(stage_other(any_host)).end()
    assert read_all(any_host, key_of(1)) == [b"other", any_host.contents[key_of(1)]]
    any_host.drain()
    assert any_host.bucket.objects() == {key_of(1): b"other"}
    assert any_host.names() == []


def test_kill_of_who_brings_other_bytes_leaves_the_committed_ones(any_host):
    """At any system call: whoever did not vote has changed nothing."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        host.keep(1)
        spool, files = host.spool(), stage_other(host)
        if not killed_at(number, lambda _none, spool=spool, files=files: spool.take(files)):
            break
        assert read_all(host, key_of(1))[-1] == host.contents[key_of(1)], number
        uploaded = []
        uploader, client = host.uploader()
        client.after["upload_file"] = lambda *_args, host=host, uploaded=uploaded: uploaded.append(
            host.bucket.objects()[key_of(1)]
        )
        assert uploader.drain().lost == 0
        # The other ones only where the kill came behind the last word of the journal.
        assert uploaded[0] == host.contents[key_of(1)], number
        assert uploaded[1:] in ([], [b"other"]), number
        assert host.names() == [], number
        voted = number if uploaded[1:] else None
    assert voted == number - 1  # at the fsync of that word
    assert number > 15


def test_kill_of_an_abort_of_other_bytes_leaves_the_committed_ones(any_host):
    """At any system call, too."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        host.keep(1)
        take = partial(host.spool().take, stage_other(host))
        if not killed_at(number, lambda taken: taken.abort(), take):
            break
        assert host.drain().lost == 0
        if number > 2:  # the word that says so is durable
            host.check_drained(1)
        assert host.names() == [], number
    assert number > 5


def test_blob_that_comes_again_after_its_object_was_packed_away_is_uploaded_again(any_host):
    """That it was uploaded once is said by the journal that says so, and by no other one."""
    any_host.keep(1)

    def upload_and_fail_to_remove(made):
        uploader, client = made
        client.after["upload_file"] = lambda *args: any_host.blob(1).unlink()
        uploader.drain()

    upload_and_fail_to_remove(any_host.uploader())
    os.remove(any_host.directory / "bucket" / key_of(1).replace("/", "@"))  # as a sweep does
    any_host.keep(1)
    any_host.drain()
    any_host.check_drained(1)


def test_kill_between_upload_and_removal_and_a_pack_and_a_restore_loses_nothing(any_host):
    """At each system call of a drain: the object goes, the blob comes again, and is uploaded."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        host.keep(1)
        if not killed_at(number, lambda made: made[0].drain(), host.uploader):
            break
        for path in (host.directory / "bucket").iterdir():
            path.unlink()
        host.keep(1)
        host.drain()
        host.check_drained(1)
    assert number > 8


def test_tid_that_is_given_out_again_frees_the_spool_of_its_blob(any_host, caplog):
    """What did not commit is neither uploaded over what commits now, nor missed."""
    any_host.keep(1, 2)
    uploader, _client = any_host.uploader()
    uploader.forget(key_of(1))
    uploader.forget(key_of(3))  # never there
    assert any_host.spool().find(key_of(1)) == []
    any_host.drain()
    any_host.check_drained(2)
    assert "gone" not in caplog.text


def test_tid_that_is_given_out_again_waits_for_another_process_s_upload(any_host):
    """Or what did not commit would come after what commits now."""
    any_host.keep(1)
    theirs = any_host.spool().journals()
    next(theirs)  # it is being uploaded
    uploader, _client = any_host.uploader()
    with pytest.raises(TransientS3Error, match="another process is uploading"):
        uploader.forget(key_of(1))
    theirs.close()
    uploader.forget(key_of(1))
    assert any_host.spool().find(key_of(1)) == []


def test_clock_that_was_put_back_changes_no_order(any_host, monkeypatch):
    """The later one is read, and uploaded last."""
    any_host.keep(1)
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() - 3600 * 10**9)
    any_host.spool().take(stage_other(any_host)).end()
    assert read_all(any_host, key_of(1))[0] == b"other"
    any_host.drain()
    assert any_host.bucket.objects() == {key_of(1): b"other"}


def test_files_that_are_not_mounted_are_not_lost(host):
    """Journals stay, nothing is put elsewhere, and all arrives when the files are back."""
    host.keep(1)
    spool, files = host.spool_dir / "blobs", host.directory / "elsewhere"
    spool.rename(files)
    for make in (lambda: None, partial(spool.mkdir, exist_ok=True)):
        make()
        with pytest.raises(OSError):
            host.drain()
        with pytest.raises(OSError):
            host.spool().take(host.stage(2))
    spool.rmdir()
    files.rename(spool)
    host.contents.pop(key_of(2))
    host.drain()
    host.check_drained(1)


def test_half_a_word_does_not_spoil_the_next_one(any_host):
    """A process that was killed while it said that it gives up."""
    any_host.keep(1, 2)
    with open(any_host.journal(), "a") as file:
        file.write("abor")
    uploader, client = any_host.uploader()
    client.before["upload_file"] = lambda path, *args: (
        Failure()() if os.path.basename(path).startswith("2-") else None
    )
    with pytest.raises(TransientS3Error):
        uploader.drain()
    any_host.drain()
    any_host.check_drained(1, 2)


def test_transaction_that_never_voted_changes_nothing_in_the_bucket(any_host):
    """What its journal lists is uploaded where nothing is, for the disk may have lost the end."""
    any_host.keep(1, 2, 3)
    path = any_host.journal()
    path.write_text(path.read_text().replace("complete\n", ""))
    there = any_host.stage(2)
    any_host.bucket.upload_file(there[0][1], key_of(2))
    any_host.contents[key_of(2)] = Path(there[0][1]).read_bytes()
    (broken,) = any_host.spool_dir.glob(f"blobs/{'-'.join(key_of(3)[6:-5].split('/'))}-*.blob")
    broken.chmod(0o600)
    broken.write_bytes(b"half")
    any_host.drain()
    any_host.check_drained(1, 2)


@pytest.mark.parametrize("left", [0, 1])
def test_journal_that_lost_lines_keeps_its_files(any_host, caplog, left):
    """A journal is on the disk before its files, so one that does not name them was damaged."""
    any_host.keep(1, 2)
    path = any_host.journal()
    data = path.read_bytes()
    path.write_bytes(b"".join(data.splitlines(keepends=True)[:left]) + b"\0" * 9)
    any_host.drain()
    assert caplog.text.count("spool has a damaged journal") == 1
    assert len(any_host.bucket.objects()) == left
    path.write_bytes(data)
    any_host.drain()
    any_host.check_drained(1, 2)


# The end of a transaction


def test_abort_leaves_nothing(any_host):
    """Neither files nor a journal, and nobody uploads anything."""
    taken = any_host.spool().take(any_host.stage(1, 2))
    taken.abort()
    assert any_host.names() == []
    assert journals(any_host) == []
    assert any_host.spool().find(key_of(1)) == []
    taken.abort()  # changes nothing
    taken.end()
    any_host.drain()
    any_host.check_drained()


def test_abort_after_the_end_removes_nothing(host):
    """What may have committed is no longer the transaction's."""
    taken = host.spool().take(host.stage(1))
    taken.end()
    taken.abort()
    host.drain()
    host.check_drained(1)


def test_journals_come_in_the_order_of_their_transactions(host):
    """What has waited longest is uploaded first."""
    for number in range(1, 6):
        host.keep(number)
    expected = [[key_of(number)] for number in range(1, 6)]
    assert journals(host) == expected
    uploader, client = host.uploader()
    uploader.drain()
    uploads = [key for name, path in client.calls if name == "upload_file" for key in [path]]
    assert [os.path.basename(path).partition("-")[0] for path in uploads] == list("12345")


def test_journal_of_a_running_transaction_is_nobody_s(host):
    """Neither this process nor another one uploads what may still be aborted."""
    taken = host.spool().take(host.stage(1))
    host.keep(2)
    assert journals(host) == [[key_of(2)]]
    in_child(lambda: check(journals(host) == [[key_of(2)]]))
    host.drain()
    assert list(host.bucket.objects()) == [key_of(2)]
    taken.end()
    assert journals(host) == [[key_of(1)]]
    host.drain()
    host.check_drained(1, 2)


def check(condition):
    assert condition


def test_journal_is_one_uploader_s_at_a_time(host):
    """While one has it, the others get the next ones."""
    host.keep(1)
    host.keep(2)
    mine = host.spool().journals()
    assert entries(next(mine)) == [key_of(1)]
    assert journals(host) == [[key_of(2)]]
    in_child(lambda: check(journals(host) == [[key_of(2)]]))
    assert entries(next(mine)) == [key_of(2)]
    assert journals(host) == [[key_of(1)]]
    mine.close()
    assert journals(host) == [[key_of(1)], [key_of(2)]]


def test_forked_child_does_not_keep_what_a_transaction_has_ended(host, victim):
    """A child that was forked while the transaction ran is no part of it."""
    taken = host.spool().take(host.stage(1))
    victim(lambda: None)
    taken.end()
    host.drain()
    host.check_drained(1)


def test_forked_child_does_not_keep_what_was_being_uploaded(host, victim):
    """A server that forks its workers while the spool is uploaded can go on with that later."""
    host.keep(1)
    uploader, client = host.uploader()

    def fork_and_fail(*args):
        victim(lambda: None)
        raise TransientS3Error("down")

    client.before["upload_file"] = fork_and_fail
    with pytest.raises(TransientS3Error):
        uploader.drain()
    host.drain()
    host.check_drained(1)


# Durable


class Recorder:
    """Records what was written, named and made durable, by inode."""

    def __init__(self):
        self.events = []

    def __call__(self, number, function, args):
        name = function.__name__
        if name in ("fsync", "write"):
            file = args[0] if isinstance(args[0], int) else args[0].fileno()
            self.events.append((name, os.fstat(file).st_ino))
        elif name in ("link", "replace"):
            self.events.append(("named", os.stat(args[0]).st_ino))
        elif name == "copyfileobj":
            self.events.append(("write", os.fstat(args[1].fileno()).st_ino))
        elif name == "remove" and os.path.exists(args[0]):
            self.events.append(("removed", os.stat(args[0]).st_ino))

    def last(self, name, *paths):
        """Return when something was last done with a file, or all of them."""
        found = {each: number for number, each in enumerate(self.events)}
        return [found[name, os.stat(path).st_ino] for path in paths]


def test_everything_is_durable_before_take_returns(any_host):
    """Files, their names and the journal are written with fsync, its end after all the others."""
    spool, files, recorder = any_host.spool(), any_host.stage(1, 2, 3), Recorder()
    with before_each_step(recorder):
        taken = spool.take(files)
    blobs = sorted((any_host.spool_dir / "blobs").glob("*.blob"))
    journal, names = any_host.journal(), blobs[0].parent
    (names_synced, spool_synced) = recorder.last("fsync", names, any_host.spool_dir)
    (written,), (journal_synced,) = recorder.last("write", journal), recorder.last("fsync", journal)
    assert len(blobs) == 3
    for named, synced in zip(
        recorder.last("named", *blobs), recorder.last("fsync", *blobs), strict=True
    ):
        assert named < names_synced < written
        assert synced < written
    assert written < journal_synced
    assert spool_synced > 0
    taken.abort()


def test_journal_is_durable_before_the_first_file_comes(any_host):
    """What lies in the spool after a crash is in a journal."""
    spool, files, recorder = any_host.spool(), any_host.stage(1), Recorder()
    with before_each_step(recorder):
        taken = spool.take(files)
    journal = os.stat(any_host.journal()).st_ino
    begun = recorder.events[: [name for name, _inode in recorder.events].index("named")]
    assert begun[:2] == [("write", journal), ("fsync", journal)]
    taken.abort()


def test_journal_goes_only_when_the_files_have_gone_for_good(any_host):
    """After a power failure no file is back whose journal is not."""
    any_host.keep(1, 2)
    names, journal = os.stat(any_host.spool_dir / "blobs"), os.stat(any_host.journal())
    blobs = [os.stat(path).st_ino for path in (any_host.spool_dir / "blobs").glob("*.blob")]
    uploader, _client = any_host.uploader()
    recorder = Recorder()
    with before_each_step(recorder):
        uploader.drain()
    removed = [recorder.events.index(("removed", inode)) for inode in blobs]
    synced = recorder.events.index(("fsync", names.st_ino))
    assert max(removed) < synced < recorder.events.index(("removed", journal.st_ino))


def test_new_spool_is_durable_itself(host):
    """The directories that are made are there after a power failure, too."""
    recorder = Recorder()
    with before_each_step(recorder):
        host.spool()
    recorder.last("fsync", host.spool_dir, host.directory)


def test_error_of_any_system_call_leaves_nothing_and_is_raised(any_host):
    """A disk that fails, wherever that is: `take` has taken all or nothing."""
    spool, files = any_host.spool(), any_host.stage(1, 2)
    failed = 0
    for number in count(1):
        steps = []

        def fail(reached, function, args, number=number, steps=steps):
            steps.append(function.__name__)
            if reached == number and function.__name__ not in ("close", "remove"):
                raise OSError(errno.EIO, "a disk that fails, says the test")

        try:
            with before_each_step(fail):
                spool.take(files).abort()
        except OSError:
            failed += 1
        assert any_host.names() == [], steps
        if len(steps) < number:
            break
    assert failed > 10


# Killed


def test_kill_at_any_system_call_of_take_leaves_whole_blobs_or_none(any_host):
    """Others find what is left, upload what is complete, and leave the spool empty."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        spool, files = host.spool(), host.stage(1, 2)
        if not killed_at(number, lambda _none, spool=spool, files=files: spool.take(files)):
            break
        report = host.drain()
        assert host.bucket.objects().items() <= host.contents.items(), number
        assert (report.failed, report.damaged, report.lost) == (0, 0, 0), number
        assert host.names() == [], number
    assert number > 20
    host.drain()  # it returned from take, and could have voted
    host.check_drained(1, 2)


def test_kill_at_any_system_call_of_an_abort_leaves_whole_blobs_or_none(any_host):
    """What is left of it is garbage, and whole."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        spool, files = host.spool(), host.stage(1, 2)
        take = partial(spool.take, files)
        if not killed_at(number, lambda taken: taken.abort(), take):
            break
        assert host.drain().lost == 0
        assert host.bucket.objects().items() <= host.contents.items(), number
        assert host.names() == [], number
    assert number > 4
    host.check_drained()


def test_kill_at_any_system_call_of_a_drain_loses_nothing(tmp_path):
    """Whatever was uploaded, removed or forgotten by then: the next one ends it."""
    for number in count(1):
        host = Host(tmp_path / str(number))
        host.keep(1, 2)
        host.keep(3)
        if not killed_at(number, lambda made: made[0].drain(), host.uploader):
            break
        report = host.drain()
        assert (report.failed, report.damaged, report.lost) == (0, 0, 0), number
        host.check_drained(1, 2, 3)
    assert number > 10
    host.check_drained(1, 2, 3)


@pytest.mark.parametrize("has_ended", [True, False], ids=["ended", "running"])
def test_journal_of_a_killed_process_is_uploaded_by_others(any_host, victim, has_ended):
    """Its lock ends with it: what it has put there, committed or not, is uploaded whole."""
    spool, files = any_host.spool(), any_host.stage(1, 2)

    def work():
        taken = spool.take(files)
        if has_ended:
            taken.end()
        return taken

    process = victim(work)
    assert journals(any_host) == ([[key_of(1), key_of(2)]] if has_ended else [])
    process.kill()
    any_host.drain()
    any_host.check_drained(1, 2)


def test_kill_during_an_upload_lets_another_process_upload_again(host, victim):
    """The blob stays until its object is there, and with the process goes its claim."""
    host.keep(1)
    host.keep(2)
    reading, writing = os.pipe()

    def work():
        uploader, client = host.uploader()

        def stand_still(*args):
            os.write(writing, b"x")
            time.sleep(PATIENCE)

        client.before["upload_file"] = stand_still
        start(uploader.drain)

    process = victim(work)
    assert os.read(reading, 1) == b"x"
    assert journals(host) == [[key_of(2)]]
    process.kill()
    host.drain()
    host.check_drained(1, 2)
    os.close(reading)
    os.close(writing)


def test_copy_of_a_killed_process_does_not_stop_who_brings_the_blob_again(host, monkeypatch):
    """A restore that was killed in an outage can be repeated in it."""
    refuse_links(monkeypatch)
    for number in count(1):
        one = Host(host.directory / str(number))
        spool, files = one.spool(), one.stage(1)
        if not killed_at(number, lambda _none, spool=spool, files=files: spool.take(files)):
            break
        one.keep(1)
        one.drain()
        one.check_drained(1)


# Several at once


def test_drain_at_any_system_call_of_take_changes_nothing(any_host):
    """Another process that looks into the spool just then leaves to a transaction what is its."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        spool, files, uploader = host.spool(), host.stage(1, 2), host.uploader()[0]
        taken, drained = interrupted(number, partial(spool.take, files), uploader.drain)
        assert host.bucket.objects() == {}
        taken.end()
        host.drain()
        host.check_drained(1, 2)
        if not drained:
            break
    assert number > 15


def test_drain_at_any_system_call_of_an_abort_uploads_nothing(any_host):
    """Until it has ended, nobody else has its journal."""
    for number in count(1):
        host = Host(any_host.directory / str(number))
        taken, uploader = host.spool().take(host.stage(1, 2)), host.uploader()[0]
        _none, drained = interrupted(number, taken.abort, uploader.drain)
        host.check_drained()
        if not drained:
            break
    assert number > 4


def test_drain_at_any_system_call_of_another_one_uploads_the_rest(tmp_path):
    """Two processes share the work, and none takes what the other has done for a loss."""
    for number in count(1):
        host = Host(tmp_path / str(number))
        host.keep(1, 2)
        host.keep(3)
        one, other = host.uploader()[0], host.uploader()[0]
        report, drained = interrupted(number, one.drain, other.drain)
        assert (report.failed, report.damaged, report.lost) == (0, 0, 0)
        host.check_drained(1, 2, 3)
        if not drained:
            break
    assert number > 10


def test_take_at_any_system_call_of_a_drain_that_uploads_the_same_blob(host):
    """A restore that is repeated while its first blobs are uploaded loses none."""
    for number in count(1):
        one = Host(host.directory / str(number))
        one.keep(1)
        take = partial(one.keep, 1, 2)
        _report, took = interrupted(number, one.uploader()[0].drain, take)
        if not took:
            break
        one.drain()
        one.check_drained(1, 2)
    assert number > 8


def interrupted(number, function, act):
    """Return (what a function returns, whether act() was called before its n-th system call)."""
    called = []

    def at(reached, _step, _args):
        if reached == number:
            called.append(True)
            act()

    with before_each_step(at):
        return function(), bool(called)


def test_two_uploaders_share_the_work(host):
    """While one waits for S3, the other uploads what comes after it."""
    for number in (1, 2, 3):
        host.keep(number)
    (one, client), gate = host.uploader(), Gate()
    client.before["upload_file"] = gate
    first = start(one.drain)
    gate.wait()
    assert host.drain().uploaded == 2
    assert sorted(host.bucket.objects()) == [key_of(2), key_of(3)]
    gate.open()
    assert first.result().uploaded == 1
    host.check_drained(1, 2, 3)


def test_calls_of_drain_take_turns(host):
    """The thread of an uploader and whoever calls `drain_spool` do not upload the same."""
    host.keep(1)
    (uploader, client), gate = host.uploader(), Gate()
    client.before["upload_file"] = gate
    calls = [start(uploader.drain) for _number in range(2)]
    gate.wait()
    gate.open()
    assert sorted(call.result().uploaded for call in calls) == [0, 1]
    assert client.count("upload_file") == 1


# Of one bucket


def test_spool_of_another_bucket_is_refused_and_says_what_to_do(host):
    """What waits for one bucket is never uploaded to another one."""
    host.keep(1)
    with pytest.raises(ValueError, match="not uploaded yet") as caught:
        Spool(str(host.spool_dir), ["https://s3.example.com", "another", ""])
    for word in (str(host.spool_dir), *PLACE, "another", "remove", f"{host.spool_dir}/bucket"):
        assert word in str(caught.value)
    assert len(journals(host)) == 1
    (host.spool_dir / "bucket").unlink()  # as it says, where it is the same
    host.drain()
    host.check_drained(1)


@pytest.mark.parametrize("changed", [0, 1, 2], ids=["endpoint", "bucket", "prefix"])
def test_each_part_of_the_place_counts(host, changed):
    """Another endpoint, bucket or prefix is another place, also for who only uploads."""
    host.keep(1)
    place = [*PLACE]
    place[changed] = "other"
    for takes_commits in (True, False):
        with pytest.raises(ValueError, match="not uploaded yet"):
            Spool(str(host.spool_dir), place, takes_commits)
    host.drain()
    host.check_drained(1)


def test_empty_spool_may_be_used_for_another_bucket(host):
    """Once all is uploaded, and nobody has it open any more, nothing binds it."""
    host.keep(1)
    host.drain()
    elsewhere = Spool(str(host.spool_dir), ["elsewhere"])
    with pytest.raises(ValueError, match="is in use"):
        host.spool()
    elsewhere.close()
    back = host.spool()
    back.take(host.stage(2)).end()
    back.close()
    with pytest.raises(ValueError, match="not uploaded yet"):
        Spool(str(host.spool_dir), ["elsewhere"])


def test_spool_that_another_bucket_s_process_has_open_is_refused(host, victim):
    """Two databases never get each other's blobs, also while nothing is there yet."""
    process = victim(host.spool)
    with pytest.raises(ValueError, match="is in use") as caught:
        Spool(str(host.spool_dir), ["elsewhere"])
    for word in (str(host.spool_dir), *PLACE, "elsewhere"):
        assert word in str(caught.value)
    spool = host.spool()
    process.kill()
    with pytest.raises(ValueError, match="is in use"):
        Spool(str(host.spool_dir), ["elsewhere"])
    spool.take(host.stage(1)).end()
    host.drain()
    host.check_drained(1)


def test_two_databases_that_name_the_same_spool_do_not_get_each_other_s_blobs(host):
    """Refused, or kept apart: never uploaded to the other's bucket and removed."""
    spool, bucket = host.spool(), DirectoryBucket(host.directory / "other")
    try:
        other = Spool(str(host.spool_dir), ["elsewhere"])
    except ValueError:
        other = None
    spool.take(host.stage(1)).end()
    if other is not None:
        SpoolUploader(other, bucket, UploadPool(1)).drain()
    SpoolUploader(spool, host.bucket, UploadPool(1)).drain()
    assert bucket.objects() == {}
    assert host.bucket.objects() == host.contents


def _start_into(threads, *call):
    threads.append(start(*call))


def test_processes_of_a_site_may_open_a_new_spool_at_the_same_time(tmp_path):
    """The first start of several processes, at any system call of one of them."""
    for number in count(1):
        host = Host(tmp_path / str(number))
        others = []
        # Not waited for there: it may have to wait for this one.
        begin = partial(_start_into, others, host.keep, 1)
        first, opened = interrupted(number, host.spool, begin)
        if not opened:
            break
        others[0].result()
        first.take(host.stage(2)).end()
        host.drain()
        host.check_drained(1, 2)
    assert number > 5


# Whose it is


def modes(host):
    return {
        str(path.relative_to(host.spool_dir.parent)): path.stat().st_mode & 0o777
        for path in (host.spool_dir, *host.spool_dir.rglob("*"))
    }


def test_spool_is_private(host, monkeypatch):
    """Nobody else reads what is committed, or learns of it; what is copied is not written again."""
    refuse_links(monkeypatch)
    before = os.umask(0)
    try:
        host.keep(1)
    finally:
        os.umask(before)
    found = modes(host)
    assert (found.pop("spool"), found.pop("spool/blobs")) == (0o700, 0o700)
    assert {Path(name).suffix: mode for name, mode in found.items()} == {
        "": 0o600,
        ".journal": 0o600,
        ".blob": 0o400,
    }


def test_existing_directory_is_used(host):
    """An operator may have made it, and keeps its mode."""
    host.spool_dir.mkdir(0o750)
    host.keep(1)
    assert host.spool_dir.stat().st_mode & 0o777 == 0o750
    host.drain()
    host.check_drained(1)


# Whatever lies there


def damage(path):
    data = path.read_bytes()
    path.chmod(0o600)
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["changed", "shorter", "longer", "empty"])
def test_damaged_blob_is_not_uploaded_and_stays(host, caplog, how):
    """Wrong bytes never go to the bucket; the log says which file it is, and the others go."""
    host.keep(1, 2)
    host.keep(3)
    path = host.blob(1)
    damage(path)
    data = host.contents[key_of(1)]
    changes = {"changed": path.read_bytes(), "shorter": data[:-1], "longer": data + b"x"}
    path.write_bytes(changes.get(how, b""))
    uploader, _client = host.uploader()
    report = uploader.drain()
    assert (report.uploaded, report.damaged, report.lost) == (2, 1, 0)
    assert sorted(host.bucket.objects()) == [key_of(2), key_of(3)]
    assert uploader.drain().damaged == 1
    assert caplog.text.count(f"spooled blob is damaged key={key_of(1)} path={path}") == 1
    path.write_bytes(data)  # from a backup, perhaps
    host.drain()
    host.check_drained(1, 2, 3)


def test_blob_that_somebody_has_removed_is_told_once(host, caplog):
    """Neither here nor in the bucket: that is logged as an error, and keeps nothing else."""
    host.keep(1, 2)
    host.blob(1).unlink()
    report = host.drain()
    assert (report.uploaded, report.lost) == (1, 1)
    assert f"spooled blob is gone key={key_of(1)}" in caplog.text
    host.check_drained(2)


def test_blob_that_is_in_the_bucket_already_is_not_lost(host, caplog):
    """A process that was killed behind its upload could not say so."""
    host.keep(1, 2)
    host.bucket.upload_file(host.blob(1), key_of(1))
    host.blob(1).unlink()
    assert host.drain().lost == 0
    assert "gone" not in caplog.text
    host.check_drained(1, 2)


@pytest.mark.parametrize(
    "line",
    [
        "{digest} {size} ../victim\n",
        "{digest} {size} blobs/../../victim\n",
        "{digest} {size} {victim}\n",
        "{digest} {size} blobs/1/../../../victim\n",
        "{digest} {size} blobs/1/2.blob/../../../../victim\n",
        "{digest} {size} other/1/2.blob\n",
        "{digest} {size} blobs/01/2.blob\n",
        "{digest} {size} blobs/1/2.blob x\n",
        "{digest} -1 blobs/1/2.blob\n",
        "../victim\n",
        "\x01\n",
        "\n\n\n",
        "complete\ncomplete\n",
        "{digest} {size} blobs/1/2.blo",
    ],
)
def test_line_of_another_form_reaches_no_file_outside(host, line):
    """Whatever a journal says, nothing goes to another key, and no other file goes."""
    victim = host.directory / "victim"
    victim.write_bytes(b"victim")
    host.keep(1)
    text = line.format(digest=sha256(b"victim").hexdigest(), size=6, victim=victim)
    (host.spool_dir / f"{0:016x}-{0:016x}.journal").write_text(text)
    # Where it would be looked for.
    for word in text.split():
        name = word.removeprefix("blobs/").replace("/", "-")
        (host.spool_dir / "blobs" / name).write_bytes(b"victim")
    host.drain()
    assert victim.read_bytes() == b"victim"
    assert host.bucket.objects() == host.contents
    assert host.bucket.strangers() == []


def test_blob_whose_line_is_damaged_is_not_forgotten(host):
    """A journal that was complete says of all its blobs where they are, or stays."""
    host.keep(1, 2)
    path = host.journal()
    path.write_text("Z" + path.read_text()[1:])
    with contextlib.suppress(Exception):  # whatever it says of it
        host.drain()
    assert key_of(1) in host.bucket.objects() or path.exists()


def put_directory(path, host):
    path.mkdir()


def put_link(path, host):
    path.symlink_to("nowhere")


def put_link_to_another_file(path, host):
    (host.directory / "elsewhere").write_text("elsewhere")
    path.symlink_to(host.directory / "elsewhere")


def put_bytes(path, host):
    path.write_bytes(b"\xff\xfe\0")


def put_unreadable(path, host):
    path.write_text("x")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads everything")


strangers = pytest.mark.parametrize(
    "put", [put_directory, put_link, put_link_to_another_file, put_bytes, put_unreadable]
)


@strangers
def test_stranger_among_the_journals_does_not_stop_the_others(host, put, caplog):
    """What cannot be read is told once and left; what can be is uploaded."""
    host.spool()
    path = host.spool_dir / "0000000000000000-0000000000000000.journal"
    put(path, host)
    host.keep(1)
    uploader, _client = host.uploader()
    for _number in range(2):
        uploader.drain()
    assert host.bucket.objects() == host.contents
    # Where it is told: a file with no line in it is one of a transaction that never voted.
    assert caplog.text.count("spool has a") == (path.exists() or path.is_symlink())


def test_strangers_among_the_files_do_no_harm(host):
    """Names of another form are left alone, in both directories."""
    host.keep(1)
    (host.spool_dir / "README").write_text("note of an operator")
    (host.spool_dir / "blobs" / "README").write_text("note of an operator")
    (host.spool_dir / "lost+found").mkdir()
    host.drain()
    assert host.bucket.objects() == host.contents
    assert host.names() == ["README", "README"]


def test_usage_is_told_whatever_the_names_are(host):
    """The numbers of a site do not depend on what else lies there."""
    host.keep(1)
    (host.spool_dir / "0 copy.journal").write_text("")
    found = host.spool().usage()
    assert (found["spool_blobs"], found["spool_bytes"]) == (1, 1000)


def test_usage_is_none_where_it_cannot_be_told(host):
    """A directory that went away makes no page of numbers fail."""
    spool = host.spool()
    shutil.rmtree(host.spool_dir)
    assert set(spool.usage()) == {"spool_blobs", "spool_bytes", "spool_age_seconds"}


def test_usage_tells_how_much_waits_and_how_long(host, monkeypatch):
    """What runs counts, too; what is half copied does not; and in the end there is no age."""
    spool = host.spool()
    nothing = {"spool_blobs": 0, "spool_bytes": 0, "spool_age_seconds": None}
    assert spool.usage() == nothing
    host.keep(1)
    taken = spool.take(host.stage(2, 3))
    (host.spool_dir / "blobs" / "4-4.blob.tmp").write_bytes(b"half")
    found = spool.usage()
    assert (found["spool_blobs"], found["spool_bytes"]) == (3, 3000)
    assert 0 <= found["spool_age_seconds"] < PATIENCE
    later = time.time() + 1000
    monkeypatch.setattr(time, "time", lambda: later)
    assert 1000 <= spool.usage()["spool_age_seconds"] < 1000 + PATIENCE
    monkeypatch.setattr(time, "time", lambda: 0.0)  # the clock was wrong
    assert spool.usage()["spool_age_seconds"] == 0
    (host.spool_dir / "blobs" / "4-4.blob.tmp").unlink()
    taken.abort()
    host.drain()
    assert spool.usage() == nothing


# Disks


@pytest.mark.parametrize("fill", [fill_up, fill_inodes])
def test_full_disk_takes_all_or_nothing(tmp_path, fill):
    """When the disk is full `take` says so and leaves nothing; with room it goes on."""
    disk = tmp_path / "disk"

    def child():
        host = Host(tmp_path / "host", disk / "spool")
        host.keep(1)
        fill(disk / "filler")
        names = host.names()
        with pytest.raises(OSError) as caught:
            host.spool().take(host.stage(2, 3, size=MEGABYTE))
        assert caught.value.errno == errno.ENOSPC
        assert host.names() == names
        assert len(journals(host)) == 1
        if fill is fill_up:
            (disk / "filler").unlink()
        else:
            shutil.rmtree(disk / "filler")
        host.keep(4)
        del host.contents[key_of(2)], host.contents[key_of(3)]
        host.drain()
        host.check_drained(1, 4)

    on_disks(child, disk, inodes=100)


def test_disk_that_gets_full_in_the_middle_keeps_nothing(tmp_path):
    """The first blobs of a transaction fit and the last one does not."""

    def child():
        host = Host(tmp_path / "host", tmp_path / "disk" / "spool")
        with pytest.raises(OSError) as caught:
            host.spool().take(host.stage(1, 2, 3, size=2 * MEGABYTE))
        assert caught.value.errno == errno.ENOSPC
        assert host.names() == []
        host.contents.clear()
        host.keep(4)
        host.drain()
        host.check_drained(4)

    on_disks(child, tmp_path / "disk")


def test_read_only_spool_refuses_and_still_shows_what_it_has(tmp_path):
    """Nothing is taken, nothing is lost, and what waits can be read."""
    disk = tmp_path / "disk"

    def child():
        host = Host(tmp_path / "host", disk / "spool")
        host.keep(1)
        make_read_only(disk)
        spool = host.spool()
        with pytest.raises(OSError):
            spool.take(host.stage(2))
        assert spool.find(key_of(1))[0].size(Z, Z) == 1000
        assert len(journals(host)) == 1

    on_disks(child, disk)


def test_spool_whose_directory_went_away_refuses(host):
    """It is not made again: the disk may not be mounted."""
    spool = host.spool()
    shutil.rmtree(host.spool_dir)
    with pytest.raises(FileNotFoundError):
        spool.take(host.stage(1))
    assert not host.spool_dir.exists()


# Uploading


def test_uploader_without_a_spool_has_nothing_to_do(host):
    """No thread, no count, no error."""
    uploader = SpoolUploader(None, host.bucket, UploadPool(1))
    uploader.wake()
    assert uploader.spool_of_commits is None
    assert uploader.drain().uploaded == 0
    assert uploader.usage()["spool_blobs"] == 0
    uploader.close()
    assert spool_threads() == []


def test_spool_that_takes_no_commits_is_uploaded(host):
    """After `abort` was configured again the rest goes to the bucket."""
    host.keep(1)
    uploader = SpoolUploader(host.spool(takes_commits=False), host.bucket, UploadPool(1))
    assert uploader.spool_of_commits is None
    uploader.drain()
    host.check_drained(1)


def test_outage_ends_a_drain_at_its_first_request(host):
    """While S3 is down one upload tries for all, and everything stays."""
    host.keep(1, 2, 3)
    host.keep(4)
    uploader, client = host.uploader()
    client.before["upload_file"] = Failure()
    with pytest.raises(TransientS3Error):
        uploader.drain()
    assert 1 <= client.count("upload_file") <= 3
    assert len(host.names()) == 6
    client.before.clear()
    assert uploader.drain().uploaded == 4
    host.check_drained(1, 2, 3, 4)


def test_outage_in_the_middle_of_a_drain_keeps_the_rest(host):
    """What is up is gone from the spool; the next drain goes on behind it."""
    host.keep(*range(1, 10))
    uploader, client = host.uploader()
    calls = count(1)
    client.before["upload_file"] = lambda *args: next(calls) > 6 and Failure()()
    with pytest.raises(TransientS3Error):
        uploader.drain()
    assert len(host.bucket.objects()) == 6
    assert len(host.names()) == 3 + 1
    client.before.clear()
    uploader.drain()
    host.check_drained(*range(1, 10))


def test_blob_that_s3_refuses_is_reported_and_stays(host):
    """An error that a retry does not mend is raised, and what it is about is not removed."""
    host.keep(1)
    uploader, client = host.uploader()
    client.before["upload_file"] = Failure(PermanentS3Error("403"))
    with pytest.raises(PermanentS3Error):
        uploader.drain()
    assert len(host.names()) == 2
    client.before.clear()
    uploader.drain()
    host.check_drained(1)


def test_blob_that_s3_refuses_does_not_stop_the_others(host):
    """One that is too large, or forbidden, stays alone: all others arrive, sooner or later."""
    host.keep(1, 2)
    host.keep(*range(3, 15))
    uploader, client = host.uploader()

    def refuse(path, *args):
        if os.path.basename(path).startswith("1-"):
            raise PermanentS3Error("400 EntityTooLarge")

    client.before["upload_file"] = refuse
    for _number in range(5):
        with pytest.raises(PermanentS3Error):
            uploader.drain()
    assert sorted(host.bucket.objects()) == sorted(key_of(number) for number in range(2, 15))
    assert len(host.names()) == 2


def test_report_counts_what_was_uploaded(host):
    """A journal that stays for one blob does not have the others counted again and again."""
    host.keep(1, 2)
    damage(host.blob(1))
    assert (host.drain().uploaded, host.drain().uploaded) == (1, 0)


def test_uploads_are_counted(host):
    """Each blob once, by the process that has uploaded it."""
    host.keep(1, 2)
    uploader, _client = host.uploader()
    uploader.drain()
    assert uploader.counters.values()["spool_uploads_total"] == 2
    uploader.drain()
    assert uploader.counters.values()["spool_uploads_total"] == 2


# The thread


def spool_threads():
    return [each for each in threading.enumerate() if each.name == THREAD]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def test_thread_uploads_what_is_there_and_ends_with_the_uploader(host):
    """One thread, however often it is woken, and none after `close`."""
    host.keep(1)
    uploader, _client = host.uploader()
    for _number in range(3):
        uploader.wake()
    wait_until(lambda: host.names() == [])
    host.keep(2)
    uploader.wake()
    wait_until(lambda: host.names() == [])
    assert len(spool_threads()) == 1
    uploader.close()
    assert spool_threads() == []
    uploader.wake()
    uploader.close()
    assert spool_threads() == []
    host.check_drained(1, 2)


def test_thread_goes_on_after_an_outage_and_tells_of_it_once(host, caplog):
    """Nothing but S3 has to come back, and a long outage does not fill the log."""
    caplog.set_level(logging.INFO, "zodb_s3blobs")
    host.keep(1)
    uploader, client = host.uploader()
    client.before["upload_file"] = Failure()
    for number in range(1, 4):
        uploader.wake()
        wait_until(lambda number=number: client.count("upload_file") >= number)
    client.before.clear()
    wait_until(lambda: uploader.wake() or host.names() == [])
    uploader.close()
    assert caplog.text.count("spool is kept") == 1
    assert "spool uploaded uploaded=1 bytes=1000" in caplog.text


def test_thread_survives_a_disk_that_fails(host, caplog):
    """Whatever goes wrong there, it is logged once, and tried again."""
    uploader, _client = host.uploader()
    aside = host.directory / "aside"
    host.spool_dir.rename(aside)
    uploader.wake()
    wait_until(lambda: "spool cannot be uploaded" in caplog.text)
    aside.rename(host.spool_dir)
    host.keep(1)
    wait_until(lambda: uploader.wake() or host.names() == [])
    uploader.close()
    assert caplog.text.count("spool cannot be uploaded") == 1
    host.check_drained(1)


class WatchedPool(UploadPool):
    """Tells when an uploader waits for what it has started.

    :param started: called before the uploader gets to know what it has started.
    """

    def __init__(self, started=lambda: None):
        super().__init__(4)
        self.waited_for = threading.Event()
        self._started = started

    def start(self, work):
        upload = super().start(work)
        self._started()
        return _WatchedUpload(upload, self.waited_for)


class _WatchedUpload:
    def __init__(self, upload, waited_for):
        self._upload = upload
        self._waited_for = waited_for
        self.cancel = upload.cancel

    @property
    def future(self):
        self._waited_for.set()
        return self._upload.future


def hang(_path, _key, cancelled):
    wait_until(lambda: cancelled)
    raise UploadCancelled


def test_close_during_an_upload_ends_it_and_keeps_the_blob(host):
    """What is not up stays in the spool, for the next process."""
    host.keep(1, 2)
    host.keep(3)
    client, pool = HookedClient(host.bucket), WatchedPool()
    client.before["upload_file"] = hang
    uploader = SpoolUploader(host.spool(), client, pool)
    uploader.wake()
    assert pool.waited_for.wait(PATIENCE)
    uploader.close()
    assert spool_threads() == []
    assert host.bucket.objects() == {}
    assert len(host.names()) == 5
    host.drain()
    host.check_drained(1, 2, 3)


def test_close_just_when_an_upload_begins_ends_that_too(host, monkeypatch):
    """Whenever it comes, nobody waits for a server that does not answer."""
    host.keep(1)
    client, gate, cancelled = HookedClient(host.bucket), Gate(), threading.Event()

    def wait_for_the_end(_path, _key, cancellation):
        cancellation.add_action(cancelled.set)
        assert at_end.wait(PATIENCE)
        raise UploadCancelled

    at_end = threading.Event()
    client.before["upload_file"] = wait_for_the_end
    uploader = SpoolUploader(host.spool(), client, WatchedPool(gate))
    uploader.wake()
    gate.wait()
    joining, join = threading.Event(), threading.Thread.join

    def tell_and_join(thread, *args):
        if thread.name == THREAD:
            joining.set()
        join(thread, *args)

    monkeypatch.setattr(threading.Thread, "join", tell_and_join)
    closing = start(uploader.close)
    assert joining.wait(PATIENCE)
    gate.open()
    try:
        assert cancelled.wait(1)
    finally:
        at_end.set()
        closing.result()


def test_forked_child_has_a_thread_of_its_own(host):
    """The parent's does not exist there; both upload, and neither waits for the other."""
    uploader, client = host.uploader()
    gate = Gate()
    client.before["upload_file"] = gate
    host.keep(1)
    uploader.wake()
    gate.wait()

    def child():
        client.before.clear()
        host.keep(2)
        uploader.wake()
        wait_until(lambda: len(host.names()) == 2)  # those of the parent
        uploader.close()
        assert spool_threads() == []

    in_child(child)
    gate.open()
    wait_until(lambda: host.names() == [])
    uploader.close()
    host.contents[key_of(2)] = random_bytes(2, 1000)
    host.check_drained(1, 2)


def test_uploads_of_a_large_transaction_are_parallel_and_few(host):
    """Commits use the same pool: no more than four at a time, and not one by one."""
    host.keep(*range(1, 30))
    client = HookedClient(host.bucket)
    uploader = SpoolUploader(host.spool(), client, UploadPool(16))
    lock, running, most = threading.Lock(), [], [0]
    together = threading.Barrier(4)

    def begin(path, *args):
        with lock:
            running.append(path)
            most[0] = max(most[0], len(running))
        if 2 <= client.count("upload_file") <= 5:
            together.wait(PATIENCE)

    def end(path, *args):
        with lock:
            running.remove(path)

    client.before["upload_file"], client.after["upload_file"] = begin, end
    uploader.drain()
    assert most[0] == 4
    host.check_drained(*range(1, 30))


def test_module_names_nothing_else(host):
    """The names that the tests replace are those that the spool uses."""
    assert {spool_module.os, spool_module.fcntl, spool_module.shutil} == {os, fcntl, shutil}
