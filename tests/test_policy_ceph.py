"""The policy of README.rst: with one action less an operation of a site fails, and nothing is lost.

Ceph's gateway enforces policies. That the whole policy suffices for the life of a site, and opens
nothing beside the prefix, is shown in test_s3client_ceph.py.
"""

import json
import os
from pathlib import Path
import re

from botocore import UNSIGNED
from botocore.exceptions import ClientError
import pytest
import transaction
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError

from zodb_s3blobs import blobs
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import PermanentS3Error

from .faults import FaultyServer
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.location import S3Location
from .storages import open_db
from .storages import read


pytestmark = pytest.mark.ceph

MiB = 1 << 20
LARGE = os.urandom(5 * MiB + 1)


def statements():
    """Return the statements of the policy that README.rst shows."""
    text = (Path(__file__).parent.parent / "README.rst").read_text()
    block = re.search(r"minimal IAM policy::\n\n((?:    .*\n)+)", text)[1]
    return json.loads(block)["Statement"]


def actions(statement):
    """Return the actions of a statement, a list."""
    action = statement["Action"]
    return [action] if isinstance(action, str) else action


ACTIONS = [action for statement in statements() for action in actions(statement)]


class Site:
    """A database whose credentials may do what the policy of README.rst allows.

    :param S3Location owner: the bucket as its owner sees it.
    :param str user: whom only that policy allows anything.
    :param FaultyServer server: stands between the site and S3.
    """

    def __init__(self, owner, user, server, directory):
        self.owner = owner
        self.server = server
        self.location = S3Location(server.endpoint_url, user, user, owner.bucket)
        self.directory = directory
        self._caches = 0

    def allow(self, without=None):
        """Put the policy in force, perhaps without one of its actions."""
        client = boto3_client(self.owner)
        policy = {"Version": "2012-10-17", "Statement": list(self._statements(without))}
        client.put_bucket_policy(Bucket=self.owner.bucket, Policy=json.dumps(policy))
        client.close()

    def _statements(self, without):
        for statement in statements():
            resource = statement["Resource"].replace("my-site-blobs", self.owner.bucket)
            principal = {"AWS": [f"arn:aws:iam:::user/{self.location.access_key}"]}
            allowed = {**statement, "Resource": resource, "Principal": principal}
            yield allowed
            if without in actions(statement):
                # Not only left out: who has uploaded an object is its owner for Ceph, and may do
                # with it what nobody forbids.
                yield {**allowed, "Effect": "Deny", "Action": without}

    def open(self):
        """Open the database with an empty cache."""
        self._caches += 1
        return open_db(
            self.location,
            self.directory,
            cache=f"cache{self._caches}",
            s3_prefix="main",
            s3_multipart_threshold="5MB",
            s3_multipart_part_size="5MB",
            s3_max_attempts=2,
        )

    def parts(self):
        """Return how many uploads in parts are neither completed nor aborted."""
        client = boto3_client(self.owner)
        uploads = client.list_multipart_uploads(Bucket=self.owner.bucket).get("Uploads", ())
        client.close()
        return len(uploads)


@pytest.fixture(scope="module")
def user(ceph):
    """A user of the gateway whom nothing is allowed yet."""
    name = f"site-{os.urandom(4).hex()}"
    ceph.create_user(name)
    return name


@pytest.fixture
def site(ceph, user, tmp_path):
    """A `Site` with one blob, changed once, and one that was lost; the policy is in force."""
    with FaultyServer(ceph.endpoint_url) as server:
        site = Site(new_bucket(ceph), user, server, tmp_path)
        site.allow()
        db = site.open()
        for data in (b"first", b"second"):
            write(db, "blob", data)
        before = set(keys(site.owner))
        write(db, "lost", b"bytes")
        db.close()
        client = boto3_client(site.owner)
        for key in set(keys(site.owner)) - before:
            client.delete_object(Bucket=site.owner.bucket, Key=key)
        client.close()
        yield site


def write(db, name, data):
    """Commit a revision of a blob."""
    with db.transaction() as connection:
        connection.transaction_manager.get().note(name)
        root = connection.root()
        if name not in root:
            root[name] = Blob()
        with root[name].open("w") as file:
            file.write(data)


class LeftBehind(Exception):
    """Something stays in the bucket that no longer belongs to anything."""


# What a site does. Each raises what a user would see, and leaves the database as it was but for
# the blob "new".


def commit(site, db, caplog):
    """Commit a small blob."""
    write(db, "new", b"bytes")


def commit_in_parts(site, db, caplog):
    """Commit a large blob."""
    write(db, "new", LARGE)


def read_uncached(site, db, caplog):
    """Read a blob that is not cached."""
    with db.transaction() as connection:
        assert read(connection.root()["blob"]) == b"second"


def size_uncached(site, db, caplog):
    """Ask for the size of a blob that is not cached."""
    with db.transaction() as connection:
        assert blobs.size(connection.root()["blob"]) == len(b"second")


def undo(site, db, caplog):
    """Undo a change and redo it."""
    changes = [entry["id"] for entry in db.undoLog(0, 99) if entry["description"] == "blob"]
    for expected in (b"first", b"second"):
        try:
            db.undo(changes[0] if expected == b"first" else db.undoLog(0, 1)[0]["id"])
            transaction.commit()
        except BaseException:
            transaction.abort()
            raise
        with db.transaction() as connection:
            assert read(connection.root()["blob"]) == expected


def abort(site, db, caplog):
    """Abort a transaction when its blob has been uploaded."""
    before = keys(site.owner)
    with pytest.raises(ZeroDivisionError), db.transaction() as connection:
        with connection.root()["blob"].open("w") as file:
            file.write(b"never")
        connection.transaction_manager.get().join(RaisesInVote())
    if keys(site.owner) != before:
        raise LeftBehind(caplog.text)


def give_up_parts(site, db, caplog):
    """Begin an upload in parts that fails."""

    def damage(request):
        if "partNumber=2" in request.target:
            request.body = bytes([request.body[0] ^ 1])

    site.server.instead = damage
    try:
        with pytest.raises(IntegrityError):
            write(db, "new", LARGE)
    finally:
        site.server.instead = lambda request: None
    if site.parts():
        raise LeftBehind(caplog.text)


def read_lost(site, db, caplog):
    """Learn that a blob is nowhere."""
    with db.transaction() as connection, pytest.raises(POSKeyError):
        read(connection.root()["lost"])


def pack(site, db, caplog):
    """Pack, with something to delete."""
    write_garbage(site)
    db.pack()


def write_garbage(site):
    """Have the owner put the bytes of an aborted transaction there."""
    client = boto3_client(site.owner)
    client.put_object(Bucket=site.owner.bucket, Key="main/blobs/1/1.blob", Body=b"garbage")
    client.close()


class RaisesInVote:
    """A data manager that fails a transaction when all others have voted."""

    def sortKey(self):
        return "~~~"

    def tpc_vote(self, txn):
        return 1 / 0

    def nothing(self, txn):
        """Take part in the other steps."""

    tpc_begin = commit = tpc_finish = tpc_abort = abort = nothing


QUICK = [commit, read_uncached, size_uncached, undo, abort, read_lost]
IN_PARTS = [commit_in_parts, give_up_parts]

# By the action that is missing
FAILING = {
    # Who cannot read the owner's mark deletes no garbage.
    "s3:GetObject": [read_uncached, size_uncached, undo, pack],
    "s3:PutObject": [commit, undo, abort, *IN_PARTS],
    "s3:DeleteObject": [abort, pack],
    "s3:AbortMultipartUpload": [give_up_parts],
    "s3:ListBucket": [read_lost, pack],
}


def failures(site, operations, caplog):
    """Return by operation what it raises in a site that was just started, unless it succeeds."""
    found = {}
    for operation in operations:
        caplog.clear()
        db = site.open()
        try:
            operation(site, db, caplog)
        except (PermanentS3Error, LeftBehind) as error:
            found[operation] = error
        finally:
            db.close()
    return found


def test_with_all_actions_no_operation_fails(site, caplog):
    """So what fails below fails for the lack of an action; those are tested that the policy has."""
    assert failures(site, [*QUICK, *IN_PARTS, pack], caplog) == {}
    assert sorted(FAILING) == sorted(ACTIONS)


@pytest.mark.parametrize("action", ACTIONS)
def test_without_an_action_what_needs_it_fails_by_name_and_nothing_is_lost(site, caplog, action):
    """All else goes on; with the action again everything is there, and no garbage is."""
    needed_by = FAILING[action]
    in_parts = [operation for operation in IN_PARTS if operation in needed_by]
    site.allow(without=action)
    found = failures(site, [*QUICK, *in_parts, pack], caplog)
    assert set(found) == set(needed_by)
    for operation, error in found.items():
        assert operation is give_up_parts or action in str(error)
    site.allow()
    assert failures(site, [commit, abort, read_uncached, read_lost, pack], caplog) == {}
    db = site.open()
    with db.transaction() as connection:
        root = connection.root()
        assert (read(root["blob"]), read(root["new"])) == (b"second", b"bytes")
    db.close()
    assert len(keys(site.owner)) == 2


def test_parts_that_must_stay_are_told_with_the_missing_permission(site, caplog):
    """They cost as much as objects, no listing shows them, and no sweep removes them."""
    site.allow(without="s3:AbortMultipartUpload")
    found = failures(site, [give_up_parts], caplog)
    assert "s3:AbortMultipartUpload" in str(found[give_up_parts])


def test_policy_opens_nothing_else_and_nothing_to_others(site):
    """Who has the site's credentials changes neither bucket nor policy; without any, none of it."""
    bucket = site.owner.bucket
    client = boto3_client(site.location)
    other = new_bucket(site.owner).bucket
    versions = {"Status": "Suspended"}
    calls = [
        lambda: client.get_bucket_policy(Bucket=bucket),
        lambda: client.delete_bucket_policy(Bucket=bucket),
        lambda: client.put_bucket_acl(Bucket=bucket, ACL="public-read"),
        lambda: client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration=versions),
        lambda: client.delete_bucket_lifecycle(Bucket=bucket),
        lambda: client.list_multipart_uploads(Bucket=bucket),
        lambda: client.delete_bucket(Bucket=bucket),
        lambda: client.list_objects_v2(Bucket=other),
        lambda: client.put_object(Bucket=other, Key="main/blobs/1/1.blob", Body=b""),
    ]
    nobody = boto3_client(site.owner, signature_version=UNSIGNED)
    (key, *_) = keys(site.owner)
    calls += [
        lambda: nobody.list_objects_v2(Bucket=bucket),
        lambda: nobody.get_object(Bucket=bucket, Key=key),
        lambda: nobody.delete_object(Bucket=bucket, Key=key),
    ]
    for call in calls:
        with pytest.raises(ClientError) as caught:
            call()
        assert caught.value.response["Error"]["Code"] == "AccessDenied"
    client.get_object(Bucket=bucket, Key=key)["Body"].close()
    for each in (client, nobody):
        each.close()
