"""A bucket is one database's: copies of it neither write there nor delete, and are told why."""

from contextlib import closing
from dataclasses import replace
import json
import os
import re
import shutil

import psycopg2
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError

from zodb_s3blobs import ownership
from zodb_s3blobs.basecontract import Identity
from zodb_s3blobs.interfaces import OtherDatabaseError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.ownership import identity_of_file
from zodb_s3blobs.ownership import MARKER
from zodb_s3blobs.ownership import Ownership

from .faults import FaultyServer
from .faults import in_child
from .relstorages import Database
from .services.location import boto3_client
from .storages import make_client
from .storages import open_db
from .storages import read
from .storages import start


def objects(location):
    """Return (key, ETag) of all that is in a bucket, the mark, too."""
    listed = boto3_client(location).list_objects_v2(Bucket=location.bucket)
    return [(item["Key"], item["ETag"]) for item in listed.get("Contents", ())]


def write(db, **contents):
    with db.transaction() as connection:
        for name, data in contents.items():
            connection.root()[name] = Blob(data)


def copy_of(directory, name):
    """Copy a database as an operator does, with all that lies beside it."""
    target = directory.parent / name
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns("*.lock"))
    return target


@pytest.fixture
def production(s3, tmp_path):
    """Return the directory of a database with a blob in the bucket."""
    directory = tmp_path / "production"
    directory.mkdir()
    db = open_db(s3, directory)
    write(db, a=b"first")
    db.close()
    return directory


def test_copy_may_not_write_and_is_told_what_to_do(s3, production):
    """Its transaction is refused, and the bucket is as it was."""
    before = objects(s3)
    db = open_db(s3, copy_of(production, "copy"))
    with pytest.raises(OtherDatabaseError, match="access read-only") as caught:
        write(db, b=b"of a copy")
    transaction.abort()
    for word in (str(production), "copy", "bucket-source", "zodb-s3blobs own --take"):
        assert word in str(caught.value)
    with db.transaction() as connection:
        assert read(connection.root()["a"]) == b"first"
        connection.root()["plain"] = "records need no bucket"
    db.close()
    assert objects(s3) == before


def test_copy_may_not_sweep_what_the_original_has_stored_since(s3, production):
    """What the copy does not know is no garbage, though it looks like that."""
    copy = copy_of(production, "copy")
    db = open_db(s3, production)
    with db.transaction() as connection, connection.root()["a"].open("w") as file:
        file.write(b"after the copy")
    db.close()
    before = objects(s3)
    other = open_db(s3, copy)
    with other.transaction() as connection:
        connection.root()["plain"] = "later than what was stored"
    with pytest.raises(OtherDatabaseError):
        other.pack()
    other.close()
    assert objects(s3) == before


def test_file_beside_that_was_copied_too_is_no_proof(s3, production):
    """It knows its inode, which a copy does not have; a rename has."""
    one = identity_of_file(str(production / "Data.fs"))
    assert identity_of_file(str(production / "Data.fs")) == one
    other = identity_of_file(str(copy_of(production, "copy") / "Data.fs"))
    assert other.id != one.id
    moved = production.rename(production.parent / "moved")
    assert identity_of_file(str(moved / "Data.fs")).id == one.id


def test_copy_that_got_the_same_inodes_is_no_proof(production, monkeypatch):
    """As one does on a new file system; the file knows the generation of its inode, too."""
    path = str(production / "Data.fs")
    one = identity_of_file(path)
    monkeypatch.setattr(ownership, "generation_of", lambda file: None)
    assert identity_of_file(path) == one  # by a way to the file that does not tell it
    monkeypatch.setattr(ownership, "generation_of", lambda file: 123)
    other = identity_of_file(path)
    assert other.id != one.id
    assert identity_of_file(path) == other


def test_generation_tells_files_apart(tmp_path):
    """It stays the same, and that of another file is another one."""
    found = []
    for name in ("one", "two", "one"):
        with open(tmp_path / name, "ab") as file:
            found.append(ownership.generation_of(file.fileno()))
    if found[0] is None:
        pytest.skip("this file system does not tell generations")
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": 1}', "\xff"])
def test_damaged_file_beside_makes_another_database(production, text, caplog):
    """Rather than a wrong belief; the log says why."""
    path = str(production / "Data.fs")
    one = identity_of_file(path)
    with open(f"{path}.s3blobs", "w", encoding="latin-1") as file:
        file.write(text)
    assert identity_of_file(path).id != one.id
    assert ("identity of a copy, or damaged" in caplog.text) == bool(text)


def test_file_beside_is_private_and_whole(production):
    """Nobody else makes another database of this one."""
    (path,) = production.glob("*.s3blobs")
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in production.glob("*.s3blobs*.tmp")] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_file_beside_that_root_makes_is_the_site_s(production):
    """An operator's command leaves nothing that the site cannot read."""
    os.chown(production / "Data.fs", 12345, 23456)
    (path,) = production.glob("*.s3blobs")
    path.unlink()
    identity_of_file(str(production / "Data.fs"))
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 23456)


def test_bucket_that_was_taken_is_refused_to_who_had_it(s3, production):
    """A database that moved takes it; the former place learns of that with its next sweep."""
    copy = copy_of(production, "copy")
    db = open_db(s3, production)
    write(db, b=b"second")  # it knows that the bucket is its
    taken = Ownership(lambda: identity_of_file(str(copy / "Data.fs")))
    taken.take(make_client(s3))
    with db.transaction() as connection:
        del connection.root()["b"]
    with pytest.raises(OtherDatabaseError):
        db.pack()
    db.close()
    moved = open_db(s3, copy)
    write(moved, b=b"at the new place")
    moved.close()


def test_sweep_makes_no_mark(s3, production):
    """A copy that is packed before the original has written does not get the bucket by that."""
    boto3_client(s3).delete_object(Bucket=s3.bucket, Key=MARKER)
    db = open_db(s3, copy_of(production, "copy"))
    before = objects(s3)
    with pytest.raises(OtherDatabaseError, match="own --take"):
        db.pack()
    assert objects(s3) == before
    db.close()


def test_empty_bucket_needs_no_mark_to_be_swept(s3, tmp_path):
    """A new site may be packed before it has a blob."""
    db = open_db(s3, tmp_path)
    with db.transaction() as connection:
        connection.root()["plain"] = "text"
    db.pack()
    db.close()


def test_links_of_a_copy_are_no_proof(production):
    """As ``cp -al`` makes them: the original stays what it is, and the copy is another one."""
    path = str(production / "Data.fs")
    one = identity_of_file(path)
    copy = production.parent / "copy"
    copy.mkdir()
    for name in ("Data.fs", "Data.fs.s3blobs"):
        os.link(production / name, copy / name)
    assert identity_of_file(path) == one
    other = identity_of_file(str(copy / "Data.fs"))
    assert other.id != one.id
    assert identity_of_file(path) == one
    assert identity_of_file(str(copy / "Data.fs")) == other


def test_link_to_the_database_is_the_database(production):
    """Each release of a site may have one of its own."""
    found = {identity_of_file(str(production / "Data.fs")).id}
    for name in ("first", "second"):
        (production.parent / name).mkdir()
        link = production.parent / name / "Data.fs"
        link.symlink_to(production / "Data.fs")
        found.add(identity_of_file(str(link)).id)
    assert len(found) == 1


def test_all_who_ask_first_get_the_same(tmp_path):
    """A site and an operator's command, for example."""
    for number in range(20):
        path = tmp_path / str(number) / "Data.fs"
        path.parent.mkdir()
        path.touch()
        threads = [start(identity_of_file, str(path)) for _thread in range(6)]
        assert len({thread.result() for thread in threads}) == 1


def test_bucket_of_the_former_version_is_marked_by_who_writes_first(s3, production):
    """There is no mark yet, and nothing to do."""
    boto3_client(s3).delete_object(Bucket=s3.bucket, Key=MARKER)
    db = open_db(s3, production)
    assert MARKER not in dict(objects(s3))
    write(db, b=b"second")
    db.close()
    told = json.loads(make_client(s3).read_small(MARKER))
    assert told["name"] == str(production / "Data.fs")
    assert told["database"] == identity_of_file(str(production / "Data.fs")).id


def test_mark_that_nobody_can_read_refuses(s3, production):
    """It may be of a later version."""
    make_client(s3).write_small(MARKER, b"\0")
    db = open_db(s3, production)
    with pytest.raises(OtherDatabaseError):
        write(db, b=b"second")
    transaction.abort()
    db.close()


def test_one_request_asks_for_all_that_a_process_writes(s3, production, latency_proxy):
    """In its life: a commit costs no more than before."""
    proxy = latency_proxy(s3.endpoint_url)
    db = open_db(replace(s3, endpoint_url=proxy.endpoint_url), production)
    assert proxy.stats()["requests"] == 0
    for number in range(3):
        write(db, **{f"blob-{number}-{each}": b"x" for each in range(5)})
    db.close()
    assert proxy.stats()["methods"] == {"GET": 1, "PUT": 15}


class Marks:
    """Stands for a client: keeps small objects, and does something before each call."""

    def __init__(self, before=lambda name: None):
        self.objects = {}
        self.calls = []
        self._before = before

    def read_small(self, key):
        self.calls.append("read")
        self._before("read")
        return self.objects.get(key)

    def write_small(self, key, data, only_new=False, or_replace=True):
        self.calls.append("write")
        self.replaces = or_replace
        self._before("write")
        if not (only_new and key in self.objects):
            self.objects[key] = data


def owner(name):
    return Ownership(lambda: Identity(name, name))


def test_of_two_that_begin_at_once_one_has_the_bucket():
    """Whoever's mark is there in the end; the other is refused before it writes."""
    marks = Marks()
    other = owner("other")
    first = Marks(lambda name: other.check(marks) if name == "write" else None)
    first.objects = marks.objects
    with pytest.raises(OtherDatabaseError):
        owner("first").check(first)
    other.check(marks, anew=True)


def test_threads_that_begin_to_write_ask_once():
    """The others wait for the answer."""
    marks, mine = Marks(), owner("mine")
    for thread in [start(mine.check, marks) for _number in range(8)]:
        thread.result()
    assert marks.calls == ["read", "write", "read"]


def test_write_that_another_one_is_in_the_way_of_is_tried_again():
    """A 409 says nothing of whose the bucket is."""

    class Busy(Marks):
        def write_small(self, *args, **kw):
            self.calls.append("write")

    with pytest.raises(TransientS3Error):
        owner("mine").check(Busy())


@pytest.mark.parametrize("also", ["read_small", "read_small write_small"])
def test_mark_that_policies_do_not_know_stops_no_site_and_all_sweeps(caplog, also):
    """Blobs are stored as before there were marks; the log tells, once."""

    class Denied(Marks):
        pass

    def deny(self, *args, **kw):
        self.calls.append("denied")
        raise PermanentS3Error("403")

    for name in also.split():
        setattr(Denied, name, deny)
    marks, mine = Denied(), owner("mine")
    for _time in range(2):
        mine.check(marks)
    if also == "read_small":
        assert not marks.replaces  # what nobody can read may be there
    assert caplog.text.count("mark of the owner cannot be had") == 1
    with pytest.raises(PermanentS3Error):
        mine.check(marks, anew=True)


def test_database_that_does_not_tell_itself_can_be_asked_again():
    """What its driver raises is an error that is retried, and names the key that helps."""

    def fail():
        raise OSError("too many connections")

    with pytest.raises(TransientS3Error, match=r"owner.*too many connections"):
        Ownership(fail).check(Marks())


def test_failure_is_no_answer():
    """The next one asks again."""
    failures = [TransientS3Error("down")]

    def fail(name):
        if failures:
            raise failures.pop()

    marks, mine = Marks(fail), owner("mine")
    with pytest.raises(TransientS3Error):
        mine.check(marks)
    mine.check(marks)


def test_forked_child_waits_for_nobody():
    """The lock of a thread of its parent's is not its."""
    mine = owner("mine")

    def fork(name):
        in_child(lambda: mine.check(Marks()))

    mine.check(Marks(lambda name: fork(name) if name == "read" else None))


@pytest.mark.parametrize("given", [True, False], ids=["named", "not named"])
def test_name_of_a_configuration_stands_in_where_nothing_else_is_known(given):
    """As for ZEO clients: one that names its database is not mistaken for one that does not."""
    marks = Marks()
    unknown = Ownership(lambda: None)
    if given:
        Ownership(lambda: ownership.identity_of_name("production")).check(marks)
        with pytest.raises(OtherDatabaseError, match="owner"):
            unknown.check(marks)
        with pytest.raises(OtherDatabaseError):
            Ownership(lambda: ownership.identity_of_name("staging")).check(marks)
    else:
        owner("a FileStorage").check(marks)
        unknown.check(marks)
    with pytest.raises(ValueError, match="owner"):
        unknown.take(marks)


def test_owner_key_names_the_database(s3, tmp_path):
    """Whatever it is made of, and wherever it is."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        db = open_db(s3, tmp_path / name, owner="production")
        write(db, a=name.encode())
        db.close()
    db = open_db(s3, tmp_path / "two", owner="staging")
    with pytest.raises(OtherDatabaseError):
        write(db, b=b"other")
    transaction.abort()
    db.close()


@pytest.fixture
def user_database(postgresql):
    """Return a function that makes a `Database` of a user who is nobody special."""
    made = []

    def make():
        dsn = postgresql.new_database()
        made.append(dsn)
        with closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = 'site'")
            if not cursor.fetchall():
                cursor.execute("CREATE ROLE site LOGIN")
            cursor.execute(f"ALTER DATABASE {dsn.split()[0].partition('=')[2]} OWNER TO site")
            connection.commit()
        return Database("postgresql", re.sub(r"user=\S+", "user=site", dsn), True)

    yield make
    for dsn in made:
        postgresql.drop_database(dsn)


def test_postgresql_knows_itself(user_database, s3, tmp_path):
    """From every process the same, and another one for each database."""
    one, other = user_database(), user_database()
    found = []
    for database in (one, one, other):
        db = open_db(s3, tmp_path, imports=["relstorage"], base=database.section)
        found.append(db.storage.parts.base.identity())
        db.close()
    assert found[0] == found[1]
    assert found[0].id != found[2].id


def test_blob_that_nobody_has_is_missing_for_a_copy_as_for_others(s3, production):
    """The mark changes nothing for readers."""
    copy = copy_of(production, "copy")
    for key, _etag in objects(s3):
        if key != MARKER:
            boto3_client(s3).delete_object(Bucket=s3.bucket, Key=key)
    db = open_db(s3, copy, cache="empty")
    with db.transaction() as connection, pytest.raises(POSKeyError):
        read(connection.root()["a"])
    db.close()


def test_base_that_cannot_be_written_beside_refuses(s3, production):
    """As the database itself would."""
    (path,) = production.glob("*.s3blobs")
    path.unlink()
    os.chmod(production, 0o500)
    try:
        if os.access(production, os.W_OK):
            pytest.skip("this user writes everywhere")
        with pytest.raises(OSError):
            identity_of_file(str(production / "Data.fs"))
    finally:
        os.chmod(production, 0o700)


def test_mark_that_arrives_in_part_is_asked_for_again(s3, production):
    """A connection that is cut says nothing of whose the bucket is."""
    cut = []

    def cut_once(request, answer):
        if request.target.endswith(MARKER) and request.method == "GET" and not cut:
            cut.append(request)
            answer.cut_after = 20

    with FaultyServer(s3.endpoint_url) as server:
        server.change = cut_once
        db = open_db(replace(s3, endpoint_url=server.endpoint_url), production)
        write(db, b=b"second")
        db.close()
    assert len(cut) == 1
