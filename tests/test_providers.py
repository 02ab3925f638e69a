"""What S3 servers do differently: each known quirk has a test, here or elsewhere.

A class in front of a real server has the quirk that this one lacks.

====================================== =====================================================
Quirk                                  Test
====================================== =====================================================
checksum trailers are refused          test_site_lives_on_a_server_that_refuses_checksums;
                                       test_s3client: put_carries_length_and_signed_digest
a part carries the whole's checksum    test_part_of_an_object_with_a_checksum_is_read (rclone)
DeleteObjects wants Content-MD5        test_batches_carry_the_md5_that_older_servers_want;
                                       test_s3client: many_are_deleted_in_batches_with_their_md5
no DeleteObjects                       test_pack_of_a_server_without_batches_deletes_one_by_one;
                                       test_s3client: server_without_batches_gets_single_…,
                                       keys_that_a_batch_refuses_are_returned; test_garbage:
                                       TestFallBack
GCS: both, 404 for an absent key       test_site_lives_on_a_server_with_a_quirk[GoogleCloud],
                                       test_deleting_what_is_absent_succeeds_where_…
If-None-Match means something or not   test_site_lives_on_a_server_with_a_quirk: never sent
UploadPart 400 now and then            test_part_that_is_refused_once_costs_no_commit,
                                       test_part_that_is_refused_once_of_a_file_that_…;
                                       test_s3client: parts_that_the_server_refuses_go_in_one_…
missing key answers 403                test_missing_object_without_list_permission_… (Ceph);
                                       test_s3client: refused_permission_is_permanent_and_named
HEAD errors have no body               test_head_…; test_s3client: missing_bucket_is_permanent_…
ETag is no MD5                         test_site_lives_on_a_server_with_a_quirk[OpaqueETags]
metadata is forgotten                  test_site_lives_on_a_server_with_a_quirk[Forgetful],
                                       test_restart_that_loses_metadata_loses_no_blob (rclone);
                                       test_s3client: object_without_our_metadata_is_accepted_…
SSE-C ignored, or enforced             test_s3client_ceph: customer_key_round_trip_over_tls,
                                       object_is_refused_without_its_customer_key;
                                       test_s3range: part_of_an_object_under_a_customers_key_…
short names of buckets                 test_values: bucket_name_that_no_server_accepts_…;
                                       test_config: wrong_bucket_name_is_refused_with_its_line
presigned URLs are SigV2               test_presigned: signature_has_version_4, url_for_aws_…
their host is the browser's            test_presigned: url_names_the_public_endpoint_…
they die with the role's session       test_presigned: session_token_travels_with_the_url,
                                       url_lasts_a_minute_by_default; test_delivery:
                                       redirect_is_not_stored_by_any_cache
503, 429, 504                          test_site_lives_on_a_server_with_a_quirk[BusyAtFirst],
                                       test_server_that_stays_busy_fails_the_commit_…;
                                       test_uploads: work_runs_side_by_side_up_to_the_bound
hangs                                  test_s3client: server_that_never_answers_is_waited_for_…,
                                       answer_that_stops_in_its_body_…; test_outage
region redirect                        test_site_lives_on_a_server_with_a_quirk[OtherRegion],
                                       test_region_that_the_server_asks_for_is_named, test_url_…
clock skew                             test_wrong_clock_is_told_with_the_servers (Ceph)
listings slow, in pages                test_site_lives_on_a_server_with_a_quirk[SmallPages];
                                       test_s3client: listing_is_sorted_lazy_and_complete
listings not consistent                test_key_that_a_listing_lacks_…, test_key_that_is_listed_…;
                                       test_garbage: listing_that_begins_anew_each_time_…
versioned buckets                      test_pack_of_a_versioned_bucket_… (moto, Ceph)
deletions denied                       test_policy_ceph: without_an_action_what_needs_it_…;
                                       test_garbage: keys_whose_deletion_is_refused_…
unfinished uploads                     test_refused_abort_of_parts_hides_no_error;
                                       test_s3client: failed_part_leaves_nothing_behind,
                                       failed_copy_in_parts_…; test_crash: kill_in_the_middle_…
SSE-C blocked on new buckets           test_blocked_customer_keys_are_named
errors of KMS                          test_key_of_kms_that_is_disabled_…, test_refusal_names_…,
                                       test_encryption_that_the_server_lacks_… (Ceph)
roles whose credentials do not refresh test_credentials_of_a_role_are_renewed_once,
                                       test_role_that_cannot_be_had_at_first_…;
                                       test_s3client: expired_credentials_are_asked_for_anew_once
creating clients races; fork; pool     test_threads_at_once_keep_their_connections;
                                       test_s3client: threads_share_a_client_from_its_first_use,
                                       forked_child_uses_a_client_that_the_parent_has_used
copy above 5 GB                        test_s3client: large_object_is_copied_in_parts
codes of errors                        test_answer_is_of_the_kind_that_tells_what_to_do,
                                       test_refusal_names_what_to_do
an error with status 200               test_error_in_an_answer_that_says_200_is_one,
                                       test_page_of_a_proxy_…
====================================== =====================================================

Not shown: that Ceph and AWS honour If-None-Match, for it is sent for the owner's mark only, which
is read again; an object above 5 GB, which is stood for by a lower limit.
"""

from contextlib import contextmanager
from contextlib import ExitStack
import dataclasses
from datetime import datetime
from datetime import timedelta
from datetime import timezone
from email.utils import parsedate_to_datetime
import json
import os
import re
import shutil
import threading
import time
from urllib.parse import parse_qs
from urllib.parse import urlsplit

from botocore.exceptions import ClientError
from botocore.exceptions import FlexibleChecksumError
import pytest
import transaction
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zodb_s3blobs import blobs
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import S3OperationError
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.storage import S3BlobStorage
from zodb_s3blobs.testing.server import EmbeddedS3

from .faults import Answer
from .faults import FaultyServer
from .faults import s3_error
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.location import S3Location
from .services.process import ServiceMissing
from .storages import commit_blob
from .storages import commit_record
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_db
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import start
from .storages import write_file


KEY = "blobs/1/2.blob"
OTHER_KEY = "blobs/1/3.blob"
OID = p64(1)
HIGHEST = p64(0xFFFF)
MiB = 1 << 20

# In two parts
PARTS = {"multipart_threshold": 5 * MiB, "multipart_part_size": 5 * MiB}
LARGE = random_bytes("large", 5 * MiB + 1000)

XML = [("Content-Type", "application/xml")]
PAGE = Answer(200, [("Content-Type", "text/html")], b"<html><h1>Back soon</h1></html>")


@pytest.fixture
def moto(moto_server):
    """A fresh bucket on moto, which takes requests that were changed on their way."""
    return new_bucket(moto_server)


@pytest.fixture
def on_ceph(ceph):
    """A fresh bucket on the server that enforces policies and looks at the time."""
    return new_bucket(ceph)


@pytest.fixture
def faulty():
    """Return a function that puts a `FaultyServer` in front of a location: both are returned."""
    with ExitStack() as stack:

        def start(location):
            server = stack.enter_context(FaultyServer(location.endpoint_url))
            return server, dataclasses.replace(location, endpoint_url=server.endpoint_url)

        yield start


@pytest.fixture
def connect():
    """Return a function that makes a client, which is closed after the test."""
    with ExitStack() as stack:

        def connect(location, **options):
            client = make_client(location, **{"max_attempts": 1, **options})
            stack.callback(client.close)
            return client

        yield connect


@pytest.fixture(scope="module")
def answering():
    """(server, client): all that the server answers is what the test says."""
    with FaultyServer() as server:
        location = S3Location(server.endpoint_url, "access", "secret", "bucket")
        client = make_client(location, max_attempts=1, max_pause=0)
        yield server, client
        client.close()


@pytest.fixture
def open_site(tmp_path):
    """Return a function that opens the test's database, which is closed after the test."""
    opened = []

    def open_site(location, directory=tmp_path, **options):
        opened.append(open_db(location, directory, **{"s3_max_attempts": "1", **options}))
        return opened[-1]

    yield open_site
    for db in opened:
        db.close()


@pytest.fixture
def at_once(monkeypatch):
    """boto3 tries again without a pause."""
    backoff = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(backoff, lambda self, context: 0)


def commit(db, **objects):
    """Commit blobs with these bytes below the root."""
    with db.transaction() as conn:
        for name, data in objects.items():
            conn.root()[name] = Blob(data)


def read_all(db, *names):
    """Return the bytes of blobs below the root."""
    with db.transaction() as conn:
        return [read(conn.root()[name]) for name in names]


class FailsInVote:
    """A data manager that fails a transaction when all others have voted."""

    def sortKey(self):
        return "~~~"

    def tpc_vote(self, txn):
        return 1 / 0

    def nothing(self, txn):
        """Take part in the other steps."""

    tpc_begin = commit = tpc_finish = tpc_abort = abort = nothing


def uploads_under_way(location):
    """Return the unfinished multipart uploads of a bucket."""
    client = boto3_client(location)
    found = client.list_multipart_uploads(Bucket=location.bucket).get("Uploads", [])
    client.close()
    return found


def live(open_site, location, large):
    """Have a site do all that it does, and compare every byte.

    :param bytes large: of one of two blobs.
    """
    options = {
        "s3_multipart_threshold": "5MB",
        "s3_multipart_part_size": "5MB",
        "s3_max_attempts": "2",
    }
    db = open_site(location, **options)
    commit(db, small=b"one", large=large)
    with db.transaction() as conn, conn.root()["small"].open("w") as file:
        file.write(b"two")
    with pytest.raises(ZeroDivisionError), db.transaction() as conn:
        conn.root()["never"] = Blob(b"never")
        conn.transaction_manager.get().join(FailsInVote())
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    assert read_all(db, "small", "large") == [b"one", large]
    db.close()
    db = open_site(location, cache="cold", **options)
    with db.transaction() as conn:
        root = conn.root()
        assert blobs.presigned_url(root["small"])
        assert (blobs.size(root["small"]), blobs.size(root["large"])) == (3, len(large))
        with blobs.open_range(root["large"], 1000, 2000) as file:
            assert file.read() == large[1000:2000]
    assert read_all(db, "small", "large") == [b"one", large]
    db.pack(time.time() + 1)
    db.close()
    db = open_site(location, cache="colder", **options)
    assert read_all(db, "small", "large") == [b"one", large]
    db.close()


# Whole servers


class Quirk:
    """A server like another but for one thing; `met` counts how often that was seen.

    :ivar large: the bytes of a blob.
    """

    large = LARGE[:2000]

    def __init__(self):
        self.met = 0

    def instead(self, request):
        """Return an `Answer`, or None to pass the request on."""

    def change(self, request, answer):
        """Change the answer from behind."""


class OpaqueETags(Quirk):
    """MinIO, Exoscale, SSE-KMS, SSE-C: the ETag is no digest; here no two are alike."""

    large = LARGE

    def change(self, request, answer):
        # Those of parts are sent back.
        if "partNumber" not in request.target:
            others = [pair for pair in answer.headers if pair[0].lower() != "etag"]
            if len(others) < len(answer.headers):
                self.met += 1
                answer.headers = [*others, ("ETag", f'"no-md5-{self.met}"')]


class Forgetful(Quirk):
    """rclone after a restart: metadata is gone."""

    def change(self, request, answer):
        others = [pair for pair in answer.headers if not pair[0].lower().startswith("x-amz-meta")]
        self.met += len(others) < len(answer.headers)
        answer.headers = others


class SmallPages(Quirk):
    """Clones list fewer keys a page than they are asked for; here it is one."""

    def instead(self, request):
        if request.kind == "GET list-type":
            self.met += 1
            request.target += "&max-keys=1"


class GoogleCloud(Quirk):
    """GCS: no bulk deletion. (That it ignores conditions does not matter: none is sent.)"""

    def instead(self, request):
        if request.kind == "POST delete":
            self.met += 1
            return s3_error(400, "InvalidArgument")


BUSY = [
    s3_error(503, "SlowDown"),
    s3_error(429, "TooManyRequests"),
    Answer(504, [("Content-Type", "text/html")], b"<html>gateway time-out</html>"),
    Answer(429),
    s3_error(500, "InternalError"),
    Answer(502, [("Content-Type", "text/html")], b"<html>bad gateway</html>"),
]


class BusyAtFirst(Quirk):
    """All of them: busy when it is asked, and not when it is asked again."""

    large = LARGE

    def __init__(self):
        super().__init__()
        self._asked = set()

    def instead(self, request):
        # That of an upload in parts differs from run to run.
        name = (request.method, request.target.split("uploadId")[0], request.body)
        if name not in self._asked:
            self._asked.add(name)
            self.met += 1
            return BUSY[self.met % len(BUSY)]


REGION = "eu-central-1"


def scope(request):
    """Return the region that a request was signed for."""
    return request.headers["Authorization"].split("/")[2]


class OtherRegion(Quirk):
    """AWS, where no region is configured: what is signed for another one is sent on."""

    def instead(self, request):
        if scope(request) != REGION:
            self.met += 1
            answer = s3_error(301, "PermanentRedirect")
            answer.headers.append(("x-amz-bucket-region", REGION))
            return answer


@pytest.mark.parametrize(
    "quirk", [OpaqueETags, Forgetful, SmallPages, GoogleCloud, BusyAtFirst, OtherRegion]
)
def test_site_lives_on_a_server_with_a_quirk(open_site, moto, faulty, at_once, quirk):
    """Commit, change, undo, abort, read and pack are what they are elsewhere.

    No request for a blob has a condition, on which some servers cannot be relied.
    """
    server, behind = faulty(moto)
    quirk = quirk()
    server.instead, server.change = quirk.instead, quirk.change
    live(open_site, behind, quirk.large)
    assert quirk.met
    assert len(keys(moto)) == 2
    assert uploads_under_way(moto) == []
    conditions = ("If-Match", "If-None-Match", "If-Unmodified-Since")
    blobs = [request for request in server.requests if request.kind != "mark"]
    assert not [r for r in blobs if any(name in r.headers for name in conditions)]


def refuse_checksums(request):
    """Answer as Hetzner, R2 and others to what boto3 sends by default."""
    names = [name.lower() for name in request.headers]
    if any(name.startswith(("x-amz-checksum", "x-amz-trailer", "x-amz-sdk")) for name in names):
        return s3_error(501, "NotImplemented")
    if "Transfer-Encoding" in request.headers or "Content-Encoding" in request.headers:
        return s3_error(411, "MissingContentLength")


def test_site_lives_on_a_server_that_refuses_checksums(open_site, moto, faulty):
    """With the default of s3-checksum nothing of that kind is sent, by no request."""
    server, behind = faulty(moto)
    server.instead = refuse_checksums
    live(open_site, behind, LARGE)
    assert len(keys(moto)) == 2
    plain = boto3_client(behind, request_checksum_calculation="when_supported")
    with pytest.raises(ClientError, match="NotImplemented"):
        plain.put_object(Bucket=moto.bucket, Key=KEY, Body=b"what boto3 does by itself")
    plain.close()


def test_part_of_an_object_with_a_checksum_is_read(s3, connect):
    """Others have stored it; rclone then sends the whole's checksum with every part."""
    plain = boto3_client(
        s3,
        request_checksum_calculation="when_supported",
        response_checksum_validation="when_supported",
    )
    where = {"Bucket": s3.bucket, "Key": KEY}
    plain.put_object(**where, Body=b"0123456789")
    with pytest.raises(FlexibleChecksumError):
        plain.get_object(**where, Range="bytes=2-5")["Body"].read()
    plain.close()
    with connect(s3).open_range(KEY, 2, 6) as file:
        assert file.readall() == b"2345"


@pytest.fixture
def restarting(rclone, tmp_path):
    """A server of this test's own, which it may stop; `rclone` skips where there is none."""
    (tmp_path / "server").mkdir()
    try:
        with EmbeddedS3(tmp_path / "server") as server:
            yield server
    except ServiceMissing as missing:
        pytest.skip(str(missing))


def test_restart_that_loses_metadata_loses_no_blob(open_site, restarting):
    """Absence of our metadata is no corruption: blobs are read, undone and copied."""
    location = new_bucket(restarting)
    db = open_site(location)
    commit(db, blob=b"one")
    with db.transaction() as conn, conn.root()["blob"].open("w") as file:
        file.write(b"two")
    db.close()
    restarting.stop()
    restarting.start()
    plain = boto3_client(location)
    heads = [plain.head_object(Bucket=location.bucket, Key=key) for key in keys(location)]
    assert [head["Metadata"] for head in heads] == [{}, {}]
    plain.close()
    db = open_site(location, cache="cold")
    with db.transaction() as conn:
        assert blobs.size(conn.root()["blob"]) == 3
    assert read_all(db, "blob") == [b"two"]
    db.undo(db.undoLog(0, 1)[0]["id"])
    transaction.commit()
    db.close()
    assert read_all(open_site(location, cache="colder"), "blob") == [b"one"]


# Deleting


NO_BATCHES = [
    (400, "MissingContentMD5"),
    (501, "NotImplemented"),
    (400, "InvalidRequest"),
    (400, "MalformedXML"),
    (400, "InvalidArgument"),
    (411, "MissingContentLength"),
]


def make_garbage(location, count):
    """Put objects into the bucket that no revision refers to."""
    client = boto3_client(location)
    for number in range(2, count + 2):
        client.put_object(Bucket=location.bucket, Key=blob_key(p64(number), p64(5)), Body=b"")
    client.close()


@contextmanager
def swept(location, directory, **options):
    """(storage, tid of a blob in it); an object of it has a higher oid than the garbage."""
    storage, _client = make_storage(location, directory, **options)
    tid = commit_blob(storage, OID, b"ours")
    commit_record(storage, HIGHEST)
    try:
        yield storage, tid
    finally:
        storage.close()


def test_batches_carry_the_md5_that_older_servers_want(moto, faulty, tmp_path):
    """MinIO before 2025, OVH, PowerScale: no deletion is made one by one there."""
    server, behind = faulty(moto)
    server.instead = lambda request: (
        s3_error(400, "MissingContentMD5")
        if request.kind == "POST delete" and "Content-MD5" not in request.headers
        else None
    )
    with swept(behind, tmp_path) as (storage, _tid):
        make_garbage(moto, 3)
        assert storage.sweep().deleted == 3
    assert len(keys(moto)) == 1
    assert "DELETE" not in server.kinds()
    plain = boto3_client(behind)
    with pytest.raises(ClientError, match="MissingContentMD5"):
        plain.delete_objects(Bucket=moto.bucket, Delete={"Objects": [{"Key": KEY}]})
    plain.close()


@pytest.mark.parametrize(("status", "code"), NO_BATCHES)
def test_pack_of_a_server_without_batches_deletes_one_by_one(moto, faulty, tmp_path, status, code):
    """However it says so, and it is asked for a batch once."""
    server, behind = faulty(moto)
    server.instead = lambda request: (
        s3_error(status, code) if request.kind == "POST delete" else None
    )
    with swept(behind, tmp_path) as (storage, _tid):
        for _time in range(2):
            make_garbage(moto, 2)
            assert storage.sweep().deleted == 2
        assert len(keys(moto)) == 1
    assert server.kinds().count("POST delete") == 1


def test_deleting_what_is_absent_succeeds_where_the_server_answers_404(moto, faulty, connect):
    """GCS does; aborts, and two sweeps at the same time, delete what is gone already."""
    server, behind = faulty(moto)

    def instead(request):
        if request.method == "POST":
            return s3_error(400, "InvalidArgument")
        if request.target.endswith(KEY):
            return s3_error(404, "NoSuchKey")

    server.instead = instead
    client = connect(behind)
    assert client.delete_objects([KEY, OTHER_KEY]) == {}
    client.delete_object(KEY)


def test_absent_key_that_a_batch_reports_is_none_that_was_refused(moto, faulty, connect):
    """The object is not there, which is all that was wanted."""
    server, behind = faulty(moto)
    body = f"<DeleteResult><Error><Key>{KEY}</Key><Code>NoSuchKey</Code></Error></DeleteResult>"
    server.instead = lambda request: Answer(200, XML, body.encode())
    assert connect(behind).delete_objects([KEY]) == {}


@pytest.fixture(params=["moto_server", pytest.param("ceph", marks=pytest.mark.ceph)])
def versioned(request):
    """A fresh bucket that keeps versions."""
    location = new_bucket(request.getfixturevalue(request.param))
    client = boto3_client(location)
    client.put_bucket_versioning(
        Bucket=location.bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    client.close()
    return location


def test_pack_of_a_versioned_bucket_can_be_taken_back(open_site, versioned, tmp_path):
    """A deletion adds a marker: what is packed is gone for a read, and there without its marker."""
    db = open_site(versioned, owner="site")
    commit(db, blob=b"one")
    with db.transaction() as conn, conn.root()["blob"].open("w") as file:
        file.write(b"two")
    (tmp_path / "backup").mkdir()
    shutil.copy(tmp_path / "Data.fs", tmp_path / "backup" / "Data.fs")
    db.pack(time.time() + 1)
    db.close()
    assert len(keys(versioned)) == 1
    # Both say who they are: a restored database is another one by itself.
    backup = open_site(versioned, tmp_path / "backup", owner="site")
    last = backup.undoLog(0, 1)[0]["id"]
    backup.undo(last)
    with pytest.raises(POSKeyError):
        transaction.commit()
    transaction.abort()
    client = boto3_client(versioned)
    found = client.list_object_versions(Bucket=versioned.bucket)
    assert len(found["Versions"]) == 2 + 1  # the owner's mark
    # Also for keys that were never there, such as that of the undo's copy.
    for marker in found["DeleteMarkers"]:
        where = {"Key": marker["Key"], "VersionId": marker["VersionId"]}
        client.delete_object(Bucket=versioned.bucket, **where)
    client.close()
    backup.undo(last)
    transaction.commit()
    assert read_all(backup, "blob") == [b"one"]


# What is missing, or denied


def restricted(ceph, location, *actions):
    """Return the bucket as a new user sees it who may do no more than that."""
    user = f"site-{os.urandom(4).hex()}"
    ceph.create_user(user)
    arn = f"arn:aws:s3:::{location.bucket}"
    statement = {
        "Effect": "Allow",
        "Principal": {"AWS": [f"arn:aws:iam:::user/{user}"]},
        "Action": list(actions),
        "Resource": [arn, f"{arn}/*"],
    }
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    owner = boto3_client(location)
    owner.put_bucket_policy(Bucket=location.bucket, Policy=policy)
    owner.close()
    return dataclasses.replace(location, access_key=user, secret_key=user)


@pytest.mark.ceph
def test_missing_object_without_list_permission_is_denied_or_missing(ceph, on_ceph, open_site):
    """Nobody can tell then: it is no lost blob, the permission is named, nothing is remembered."""
    db = open_site(on_ceph)
    commit(db, blob=b"bytes")
    db.close()
    (key,) = keys(on_ceph)
    owner, where = boto3_client(on_ceph), {"Bucket": on_ceph.bucket, "Key": key}
    kept = owner.get_object(**where)
    data = kept["Body"].read()
    owner.delete_object(**where)
    db = open_site(restricted(ceph, on_ceph, "s3:GetObject"), cache="cold")
    with db.transaction() as conn:
        for ask in (read, blobs.size, blobs.presigned_url, lambda blob: blobs.open_range(blob, 1)):
            with pytest.raises(PermanentS3Error, match="denied or missing") as caught:
                ask(conn.root()["blob"])
            assert not isinstance(caught.value, KeyError)
            assert "s3:GetObject" in str(caught.value) and "s3:ListBucket" in str(caught.value)
    owner.put_object(**where, Body=data, Metadata=kept["Metadata"])
    with db.transaction() as conn:
        assert blobs.size(conn.root()["blob"]) == 5
    assert read_all(db, "blob") == [b"bytes"]
    owner.delete_object(**where)
    owner.close()
    db.close()
    db = open_site(restricted(ceph, on_ceph, "s3:GetObject", "s3:ListBucket"), cache="colder")
    with pytest.raises(POSKeyError):
        read_all(db, "blob")


ASK = {
    "size": lambda client: client.object_size(KEY),
    "copy": lambda client: client.copy_object(KEY, OTHER_KEY),
}


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
@pytest.mark.parametrize(
    ("code", "kind"), [("NoSuchKey", MissingObjectError), ("NoSuchBucket", PermanentS3Error)]
)
def test_head_that_answers_404_is_decided_by_get(moto, faulty, connect, ask, code, kind):
    """404 without a body is what a missing bucket is answered by, too."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(404, code)
    with pytest.raises(kind):
        ask(connect(behind))
    assert server.kinds() == ["HEAD", "GET"]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "s3:GetObject"),
        (403, "SignatureDoesNotMatch", "s3-secret-key"),
        (403, "InvalidAccessKeyId", "s3-access-key"),
        (403, "RequestTimeTooSkewed", "clock"),
        (400, "AuthorizationHeaderMalformed", "s3-region"),
        (301, "PermanentRedirect", "s3-region"),
        (400, "KMS.DisabledException", "400 KMS"),
    ],
)
def test_head_that_fails_without_a_body_says_why(answering, status, code, words):
    """GET tells the code that HEAD cannot; when the reason is gone, to ask again succeeds."""
    server, client = answering
    server.instead = lambda request: s3_error(status, code)
    with pytest.raises(PermanentS3Error, match=words):
        client.object_size(KEY)
    server.instead = lambda request: Answer(200, [("ETag", '"etag"')], b"bytes")
    assert client.object_size(KEY) == 5


def store(location, key, data):
    """Store an object by plain boto3."""
    client = boto3_client(location)
    client.put_object(Bucket=location.bucket, Key=key, Body=data)
    client.close()


# A page of a proxy, and an error, with status 200


def test_page_of_a_proxy_has_no_size(open_site, moto, faulty):
    """A wrong size would be remembered, as would that the blob is there."""
    server, behind = faulty(moto)
    db = open_site(behind)
    commit(db, blob=b"bytes")
    db.close()
    db = open_site(behind, cache="cold")
    server.instead = lambda request: PAGE
    with db.transaction() as conn, pytest.raises(TransientS3Error):
        blobs.size(conn.root()["blob"])
    server.instead = lambda request: None
    with db.transaction() as conn:
        assert blobs.size(conn.root()["blob"]) == 5


def test_page_of_a_proxy_is_no_empty_listing(moto, faulty, connect):
    """A rewriting would find nothing to do, and say that it is through."""
    server, behind = faulty(moto)
    store(moto, KEY, b"bytes")
    server.instead = lambda request: PAGE
    with pytest.raises(TransientS3Error):
        list(connect(behind).list_pages(""))


@pytest.mark.parametrize("has_batches", [True, False])
def test_page_of_a_proxy_deletes_nothing(moto, faulty, tmp_path, has_batches):
    """A sweep does not report what has not happened."""
    server, behind = faulty(moto)

    def instead(request):
        if request.kind == "POST delete" and not has_batches:
            return s3_error(501, "NotImplemented")
        return PAGE if request.kind in ("POST delete", "DELETE") else None

    server.instead = instead
    with swept(behind, tmp_path) as (storage, _tid):
        make_garbage(moto, 2)
        with pytest.raises(TransientS3Error):
            storage.sweep()
    assert len(keys(moto)) == 3


ERROR_INSIDE = Answer(200, XML, b"<Error><Code>InternalError</Code><Message>no</Message></Error>")


@pytest.mark.parametrize("kind", ["POST uploadId", "PUT"])
def test_error_in_an_answer_that_says_200_is_one(moto, faulty, connect, at_once, kind):
    """AWS begins to answer before a copy, or the end of an upload in parts, has succeeded."""
    server, behind = faulty(moto)
    client = connect(behind, **PARTS, max_attempts=2)
    answers = [ERROR_INSIDE]
    server.instead = lambda request: (
        answers.pop()
        if answers and request.kind == kind and "partNumber" not in request.target
        else None
    )
    client.upload_file(write_file(LARGE), KEY)
    client.copy_object(KEY, OTHER_KEY)
    assert not answers
    server.instead = lambda request: None
    assert client.object_size(OTHER_KEY) == len(LARGE)


# Parts


def test_part_that_is_refused_once_costs_no_commit(open_site, moto, faulty):
    """Seen at Hetzner now and then: the blob is stored, and no part stays behind."""
    server, behind = faulty(moto)
    refused = []

    def instead(request):
        if "partNumber" in request.target and not refused:
            refused.append(request)
            return s3_error(400, "InvalidRequest")

    server.instead = instead
    options = {"s3_multipart_threshold": "5MB", "s3_multipart_part_size": "5MB"}
    db = open_site(behind, **options)
    commit(db, blob=LARGE)
    db.close()
    assert refused
    assert uploads_under_way(moto) == []
    assert read_all(open_site(behind, cache="cold", **options), "blob") == [LARGE]


def test_part_that_is_refused_once_of_a_file_that_must_go_in_parts(
    moto, faulty, connect, monkeypatch, at_once
):
    """The part is sent again; 5 GB are 5 MiB here."""
    monkeypatch.setattr("zodb_s3blobs.s3client.LARGEST_SINGLE_REQUEST", 5 * MiB)
    server, behind = faulty(moto)
    refused = []

    def instead(request):
        if "partNumber" in request.target and not refused:
            refused.append(request)
            return s3_error(400, "InvalidRequest")

    server.instead = instead
    client = connect(behind, **PARTS, max_attempts=3)
    client.upload_file(write_file(LARGE), KEY)
    assert refused
    assert client.object_size(KEY) == len(LARGE)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (500, "InternalError"),
        (404, "NoSuchUpload"),
    ],
)
def test_upload_that_another_has_aborted_is_retried_by_the_transaction(
    moto, faulty, connect, status, code
):
    """A lifecycle rule, or the lost answer to the completion: the next try begins anew."""
    server, behind = faulty(moto)
    server.instead = lambda request: (
        s3_error(status, code) if request.kind == "POST uploadId" else None
    )
    client = connect(behind, **PARTS)
    with pytest.raises(TransientS3Error):
        client.upload_file(write_file(LARGE), KEY)
    server.instead = lambda request: None
    client.upload_file(write_file(LARGE), KEY)
    assert uploads_under_way(moto) == []


def test_refused_abort_of_parts_hides_no_error(moto, faulty, connect):
    """Without s3:AbortMultipartUpload the error is still that of the part, which may be retried."""
    server, behind = faulty(moto)

    def instead(request):
        if "partNumber=2" in request.target:
            return s3_error(503, "SlowDown")
        if request.kind == "DELETE uploadId":
            return s3_error(403, "AccessDenied")

    server.instead = instead
    with pytest.raises(TransientS3Error, match="SlowDown"):
        connect(behind, **PARTS).upload_file(write_file(LARGE), KEY)
    assert "DELETE uploadId" in server.kinds()


# Busy


@pytest.mark.parametrize("answer", BUSY[:3], ids=lambda answer: str(answer.status))
def test_server_that_stays_busy_fails_the_commit_in_a_way_that_is_retried(
    open_site, moto, faulty, at_once, answer
):
    """After as many attempts as are configured; no blob is lost, and what is cached is read."""
    server, behind = faulty(moto)
    db = open_site(behind)
    commit(db, uncached=b"uncached")
    db.close()
    db = open_site(behind, cache="cold", s3_max_attempts="3")
    commit(db, cached=b"cached")
    del server.requests[:]
    server.instead = lambda request: answer
    with pytest.raises(TransientS3Error, match=str(answer.status)) as caught:
        commit(db, new=b"new")
    assert isinstance(caught.value, TransientError)
    assert server.kinds() == ["PUT"] * 3 + ["POST delete"] * 3  # the abort's
    with pytest.raises(TransientS3Error) as caught:
        read_all(db, "uncached")
    assert not isinstance(caught.value, KeyError)
    assert read_all(db, "cached") == [b"cached"]
    server.instead = lambda request: None
    commit(db, new=b"new")
    assert read_all(db, "uncached", "new") == [b"uncached", b"new"]


def test_threads_at_once_keep_their_connections(moto, faulty, connect, caplog):
    """As many as may use the client: no connection is thrown away and opened anew."""
    count = 2 + 16  # with concurrency 1: an upload, a download of a prefetch, threads of the site
    server, behind = faulty(moto)
    store(moto, KEY, b"bytes")
    client = connect(behind, concurrency=1)
    together = threading.Barrier(count)

    def instead(request):
        together.wait(PATIENCE)

    server.instead = instead
    for _time in range(2):
        threads = [start(client.object_size, KEY) for _number in range(count)]
        assert [thread.result() for thread in threads] == [5] * count
    assert "pool is full" not in caplog.text


# Region, clock


def tell_region(request):
    """Answer as Garage does to what is signed for another region."""
    if scope(request) != REGION:
        body = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>{}</Region></Error>"
        return Answer(400, XML, body.format(REGION).encode())


def test_region_that_the_server_asks_for_is_learnt(open_site, moto, faulty):
    """By the first request that has an answer with a body."""
    server, behind = faulty(moto)
    server.instead = tell_region
    db = open_site(behind)
    commit(db, blob=b"one", other=b"two")
    db.close()
    db = open_site(behind, cache="cold")
    assert read_all(db, "blob", "other") == [b"one", b"two"]
    # The new client was told with its first request, and did not have to be told again.
    assert [scope(request) == REGION for request in server.requests[-3:]] == [False, True, True]


def test_region_that_the_server_asks_for_is_learnt_by_a_size(open_site, moto, faulty):
    """Which may be the first that is asked after a start."""
    server, behind = faulty(moto)
    server.instead = tell_region
    db = open_site(behind)
    commit(db, blob=b"bytes")
    db.close()
    db = open_site(behind, cache="cold")
    with db.transaction() as conn:
        assert blobs.size(conn.root()["blob"]) == 5


def test_url_is_signed_for_the_region_that_the_server_asks_for(moto, faulty, connect):
    """As the requests that the client makes itself, which boto3 has put right."""
    server, behind = faulty(moto)
    server.instead = tell_region
    client = connect(behind)
    client.upload_file(write_file(b"bytes"), KEY)
    (credential,) = parse_qs(urlsplit(client.presigned_url(KEY)).query)["X-Amz-Credential"] or ""
    assert credential.split("/")[2] == REGION


ENDPOINT = "<Endpoint>bucket.s3.eu-central-1.amazonaws.com</Endpoint>"


@pytest.mark.parametrize("call", ["upload", "list", "size"])
@pytest.mark.parametrize(
    ("status", "code", "told", "headers"),
    [
        (400, "AuthorizationHeaderMalformed", f"<Region>{REGION}</Region>", []),
        (301, "PermanentRedirect", ENDPOINT, [("x-amz-bucket-region", REGION)]),
    ],
)
def test_region_that_the_server_asks_for_is_named(
    moto, faulty, connect, status, code, told, headers, call
):
    """Where to ask there does not help: the endpoint may be that of one region."""
    server, behind = faulty(moto)
    body = f"<Error><Code>{code}</Code>{told}</Error>".encode()
    server.instead = lambda request: Answer(status, [*XML, *headers], body)
    client = connect(behind)
    calls = {
        "upload": lambda: client.upload_file(write_file(b"bytes"), KEY),
        "list": lambda: list(client.list_objects("")),
        "size": lambda: client.object_size(KEY),
    }
    with pytest.raises(PermanentS3Error, match=rf"s3-region.*{REGION}"):
        calls[call]()


@pytest.mark.parametrize(
    ("status", "call"),
    [
        *((301, call) for call in ("upload", "parts", "size", "list", "delete")),
        (302, "upload"),
        (307, "upload"),
    ],
)
def test_endpoint_that_sends_on_to_another_address_is_permanent(faulty, connect, status, call):
    """As from http to https, or to a log-in page: after a few requests the setting is named."""
    with FaultyServer() as server:
        page = [("Location", "https://s3.example.com/"), ("Content-Type", "text/html")]
        server.instead = lambda request: Answer(status, page, b"<html>elsewhere</html>")
        client = connect(S3Location(server.endpoint_url, "access", "secret", "bucket"), **PARTS)
        calls = {
            "upload": lambda: client.upload_file(write_file(b"bytes"), KEY),
            "parts": lambda: client.upload_file(write_file(LARGE), KEY),
            "size": lambda: client.object_size(KEY),
            "list": lambda: list(client.list_objects("")),
            "delete": lambda: client.delete_object(KEY),
        }
        with pytest.raises(PermanentS3Error, match="s3-endpoint-url"):
            calls[call]()
        assert len(server.requests) <= 6


@pytest.mark.ceph
@pytest.mark.parametrize("hours", [-1, 1])
def test_wrong_clock_is_told_with_the_servers(on_ceph, open_site, monkeypatch, hours):
    """A commit and a read are refused for good, and the operator sees how far the clocks differ."""
    db = open_site(on_ceph)
    commit(db, blob=b"bytes")
    db.close()
    db = open_site(on_ceph, cache="cold")
    now = datetime.now(timezone.utc)
    with monkeypatch.context() as patch:
        ours = now + timedelta(hours=hours)
        patch.setattr("botocore.auth.get_current_datetime", lambda *args: ours)
        for act in (lambda: commit(db, other=b"other"), lambda: read_all(db, "blob")):
            with pytest.raises(PermanentS3Error, match=r"RequestTimeTooSkewed.*clock") as caught:
                act()
            told = re.search(r"the server's is (.*)\)", str(caught.value))[1]
            assert abs(parsedate_to_datetime(told) - now) < timedelta(minutes=30)
    assert read_all(db, "blob") == [b"bytes"]


# Listings


def entries(body):
    """Return the entries of a listing as they stand in the answer's body."""
    return re.findall(rb"<Contents>.*?</Contents>", body, re.DOTALL)


def test_key_that_a_listing_lacks_is_not_taken_for_gone(moto, faulty, tmp_path):
    """Neither a blob nor garbage: the one is read, the other swept when it is listed."""
    server, behind = faulty(moto)
    lacking = [b"<Key>blobs/1/", b"<Key>blobs/2/"]

    def change(request, answer):
        if request.kind == "GET list-type":
            for entry in entries(answer.body):
                if any(key in entry for key in lacking):
                    answer.body = answer.body.replace(entry, b"")

    server.change = change
    with swept(behind, tmp_path) as (storage, tid):
        make_garbage(moto, 3)
        first = storage.sweep()
        assert (first.listed, first.deleted) == (2, 2)
        assert load(storage, OID, tid) == b"ours"
        lacking.clear()
        second = storage.sweep()
        assert (second.listed, second.kept, second.deleted) == (2, 1, 1)
    storage, _client = make_storage(behind, tmp_path, cache="cold")
    assert load(storage, OID, tid) == b"ours"
    storage.close()


@pytest.mark.parametrize("where", ["page", "pages"])
def test_key_that_is_listed_twice_is_swept_and_counted_once(moto, faulty, tmp_path, where):
    """Be it in one page or in two."""
    server, behind = faulty(moto)
    first_page = []

    def instead(request):
        if request.kind == "GET list-type" and where == "pages":
            request.target += "&max-keys=2"

    def change(request, answer):
        if request.kind != "GET list-type" or not (found := entries(answer.body)):
            return
        again = found if where == "page" else first_page[:1]
        first_page.append(found[-1])
        answer.body = answer.body.replace(found[0], b"".join([*again, found[0]]))

    server.instead, server.change = instead, change
    with swept(behind, tmp_path) as (storage, _tid):
        make_garbage(moto, 3)
        report = storage.sweep()
        assert (report.deleted, report.kept, report.failed) == (3, 1, 0)
        assert report.listed == report.kept + report.in_flight + report.foreign + report.garbage


def test_key_that_is_listed_after_its_deletion_hinders_nobody(moto, faulty, tmp_path):
    """The listing is late: what is gone already is deleted once more."""
    server, behind = faulty(moto)
    old = {}

    def change(request, answer):
        if request.kind == "GET list-type":
            answer.body = old.setdefault(request.target, answer.body)

    server.change = change
    with swept(behind, tmp_path) as (storage, _tid):
        make_garbage(moto, 2)
        for _time in range(2):
            report = storage.sweep()
            assert (report.deleted, report.kept) == (2, 1)
    assert len(keys(moto)) == 1


# Encryption


@pytest.mark.parametrize("data", [b"small", LARGE])
def test_blocked_customer_keys_are_named(open_site, moto, faulty, data):
    """AWS refuses SSE-C on new buckets: commits fail for good, and the message says what else."""
    server, behind = faulty(moto)
    server.instead = lambda request: (
        s3_error(403, "AccessDenied")
        if "x-amz-server-side-encryption-customer-key" in request.headers
        else None
    )
    options = {"s3_multipart_threshold": "5MB", "s3_multipart_part_size": "5MB"}
    db = open_site(behind, s3_sse_customer_key="0123456789abcdef0123456789abcdeX", **options)
    before = db.lastTransaction()
    message = r"AccessDenied.*s3:PutObject.*AWS refuses SSE-C on new buckets.*s3-sse"
    with pytest.raises(PermanentS3Error, match=message) as caught:
        commit(db, blob=data)
    assert "0123456789abcdef" not in str(caught.value)
    assert not isinstance(caught.value, TransientError)
    assert db.lastTransaction() == before
    db.close()
    db = open_site(behind, s3_sse="AES256", **options)
    commit(db, blob=data)
    assert read_all(db, "blob") == [data]


def test_key_of_kms_that_is_disabled_fails_reads_and_commits_until_it_is_back(
    open_site, moto, faulty
):
    """For good, and not as a lost blob; when it is enabled again no restart is needed."""
    server, behind = faulty(moto)
    db = open_site(behind, s3_sse="aws:kms", s3_sse_kms_key_id="key-1")
    commit(db, blob=b"bytes")
    db.close()
    db = open_site(behind, cache="cold", s3_sse="aws:kms", s3_sse_kms_key_id="key-1")
    server.instead = lambda request: s3_error(400, "KMS.DisabledException")
    for act in (lambda: commit(db, other=b"other"), lambda: read_all(db, "blob")):
        with pytest.raises(PermanentS3Error, match=r"400 KMS\.DisabledException") as caught:
            act()
        assert not isinstance(caught.value, (TransientError, KeyError))
    server.instead = lambda request: None
    commit(db, other=b"other")
    assert read_all(db, "blob", "other") == [b"bytes", b"other"]


@pytest.mark.parametrize(
    ("call", "permission"), [("upload", "kms:GenerateDataKey"), ("download", "kms:Decrypt")]
)
def test_denied_key_of_kms_names_its_permissions(moto, faulty, connect, tmp_path, call, permission):
    """AWS answers AccessDenied, as for a permission on the object."""
    server, behind = faulty(moto)
    server.instead = lambda request: s3_error(403, "AccessDenied")
    client = connect(behind, sse="aws:kms", sse_kms_key_id="key-1")
    calls = {
        "upload": lambda: client.upload_file(write_file(b"bytes"), KEY),
        "download": lambda: client.download_file(KEY, f"{tmp_path}/target"),
    }
    with pytest.raises(PermanentS3Error, match=permission):
        calls[call]()


@pytest.mark.ceph
def test_encryption_that_the_server_lacks_names_the_setting(on_ceph, connect):
    """Ceph without a key server answers InvalidArgument."""
    with pytest.raises(PermanentS3Error, match=r"InvalidArgument.*s3-sse"):
        connect(on_ceph, sse="aws:kms").upload_file(write_file(b"bytes"), KEY)


# Roles


def credentials(name):
    """Return an answer with the credentials of a role, valid for hours."""
    until = datetime.now(timezone.utc) + timedelta(hours=6)
    told = {
        "Code": "Success",
        "AccessKeyId": name,
        "SecretAccessKey": "secret",
        "Token": "token",
        "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return Answer(200, [("Content-Type", "application/json")], json.dumps(told).encode())


STS = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>{}</AccessKeyId>
<SecretAccessKey>secret</SecretAccessKey><SessionToken>token</SessionToken>
<Expiration>{}</Expiration></Credentials></AssumeRoleWithWebIdentityResult>
</AssumeRoleWithWebIdentityResponse>"""


class Role:
    """Where the credentials of a role come from: a server that gives them under changing names.

    :ivar name: of the credentials that it gives; None when it gives none.
    :ivar refusal: what it answers then.
    """

    def __init__(self, server):
        self.name = "first-access-key"
        self.refusal = Answer(503)
        self.asked = server.requests
        self.endpoint_url = server.endpoint_url
        server.instead = self._answer

    def _answer(self, request):
        if self.name is None:
            return self.refusal
        if request.target == "/latest/api/token":
            return Answer(200, [], b"token")
        if request.target.endswith("/security-credentials/"):
            return Answer(200, [], b"site")
        if request.method == "POST":
            until = datetime.now(timezone.utc) + timedelta(hours=6)
            return Answer(200, XML, STS.format(self.name, until.isoformat()).encode())
        return credentials(self.name)


def use_container(role, environ, directory):
    """As ECS and EKS Pod Identity."""
    environ.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{role.endpoint_url}/credentials")
    environ.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0)


def use_irsa(role, environ, directory):
    """As EKS with a role of a service account."""
    (directory / "token").write_text("header.claims.signature")
    environ.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(directory / "token"))
    environ.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/site")
    environ.setenv("AWS_ENDPOINT_URL_STS", role.endpoint_url)


def use_imds(role, environ, directory):
    """As EC2."""
    environ.setenv("AWS_EC2_METADATA_DISABLED", "false")
    environ.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", role.endpoint_url)


PROVIDERS = {"container": use_container, "irsa": use_irsa, "imds": use_imds}


@pytest.fixture(params=PROVIDERS)
def role(request, monkeypatch, tmp_path):
    """A `Role` that boto3 finds when no credentials are configured."""
    with FaultyServer() as server:
        role = Role(server)
        PROVIDERS[request.param](role, monkeypatch, tmp_path)
        yield role


@pytest.fixture
def guarded(moto, faulty, role):
    """(server, location) of a bucket that accepts what the role gives now, and nothing older."""
    server, behind = faulty(moto)
    server.valid, server.refused = role.name, []

    def instead(request):
        if f"Credential={server.valid}/" not in request.headers["Authorization"]:
            server.refused.append(request)
            return s3_error(400, "ExpiredToken")

    server.instead = instead
    return server, dataclasses.replace(behind, access_key=None, secret_key=None)


@pytest.fixture
def open_with_role(tmp_path, guarded):
    """Return a function that opens a database whose client has the credentials of a role."""
    _server, location = guarded
    with ExitStack() as stack:

        def open_with_role(cache):
            client = S3Client(
                location.bucket,
                endpoint_url=location.endpoint_url,
                addressing_style="path",
                max_attempts=1,
            )
            base = FileStorage(f"{tmp_path}/Data.fs")
            db = DB(S3BlobStorage(base, client, S3BlobCache(f"{tmp_path}/{cache}")))
            stack.callback(lambda: db.close())  # which does nothing the second time
            return db

        yield open_with_role


def test_credentials_of_a_role_are_renewed_once(open_with_role, guarded, role):
    """They expired before boto3 expected it: commit and read cost one more request each."""
    server, _location = guarded
    db = open_with_role("cache")
    commit(db, blob=b"one")
    db.close()
    db = open_with_role("cold")
    commit(db, other=b"two")
    for number, act in enumerate(
        (lambda: commit(db, new=b"three"), lambda: read_all(db, "blob"), lambda: db.pack(0))
    ):
        role.name = server.valid = f"access-key-{number}"
        act()
        assert len(server.refused) == number + 1
    server.valid = "what-nobody-has"
    del server.refused[:]
    with pytest.raises(TransientS3Error, match="ExpiredToken"):
        db.storage.sweep()
    assert len(server.refused) == 2


@pytest.mark.parametrize("ask", ASK.values(), ids=ASK)
def test_credentials_of_a_role_are_renewed_for_head(guarded, role, connect, moto, ask):
    """Sizes, URLs and undo begin with one."""
    server, location = guarded
    store(moto, KEY, b"bytes")
    client = connect(location)
    ask(client)
    role.name = server.valid = "second-access-key"
    ask(client)


def test_role_that_cannot_be_had_at_first_is_asked_again(guarded, role, connect, moto):
    """The site starts before whoever gives credentials does: no restart is needed."""
    _server, location = guarded
    role.name = None
    client = connect(location)
    with pytest.raises(S3OperationError):
        client.upload_file(write_file(b"bytes"), KEY)
    role.name = "first-access-key"
    client.upload_file(write_file(b"bytes"), KEY)
    assert keys(moto) == [KEY]


@pytest.mark.parametrize("role", ["irsa"], indirect=True)
@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "IDPCommunicationError", TransientS3Error),
        (503, "ServiceUnavailable", TransientS3Error),
        (403, "AccessDenied", PermanentS3Error),
        (400, "ExpiredTokenException", PermanentS3Error),
        (400, "InvalidIdentityToken", PermanentS3Error),
    ],
)
def test_refusal_of_the_role_is_of_the_kind_that_tells_what_to_do(
    guarded, role, connect, status, code, kind
):
    """Some come and go."""
    _server, location = guarded
    role.name, role.refusal = None, sts_error(status, code)
    with pytest.raises(kind, match=code):
        connect(location).upload_file(write_file(b"bytes"), KEY)


@pytest.mark.parametrize("role", ["irsa"], indirect=True)
@pytest.mark.parametrize("code", ["AccessDenied", "ExpiredTokenException", "InvalidIdentityToken"])
def test_refusal_of_the_role_is_told_from_one_of_the_bucket(guarded, role, connect, code):
    """The operator looks at the role, and not at the bucket's policy."""
    _server, location = guarded
    role.name, role.refusal = None, sts_error(403, code)
    with pytest.raises(PermanentS3Error, match=r"\brole\b") as caught:
        connect(location).upload_file(write_file(b"bytes"), KEY)
    assert "s3:PutObject" not in str(caught.value)


def sts_error(status, code):
    """Return an error answer as STS gives it."""
    body = f"<ErrorResponse><Error><Code>{code}</Code></Error></ErrorResponse>"
    return Answer(status, [("Content-Type", "text/xml")], body.encode())


# Codes: AWS (botocore's model of S3 lists them), Ceph, MinIO, GCS, R2


def fail(answering, answer):
    """Return the error that an upload meets."""
    server, client = answering
    server.instead = lambda request: answer
    with pytest.raises(S3OperationError) as caught:
        client.upload_file(write_file(b"bytes"), KEY)
    return caught.value


def rows(table):
    """Return parameters, with names."""
    return [pytest.param(*row, id="-".join(map(str, row[:2]))) for row in table]


KINDS = [
    # The server is busy, or the request came at a bad moment
    (503, "SlowDown", TransientS3Error),
    (503, "SlowDownRead", TransientS3Error),  # MinIO
    (503, "SlowDownWrite", TransientS3Error),
    (503, "ServiceUnavailable", TransientS3Error),
    (503, "ServerBusy", TransientS3Error),
    (503, "XMinioServerNotInitialized", TransientS3Error),
    (503, "XMinioReadQuorum", TransientS3Error),
    (503, "XMinioWriteQuorum", TransientS3Error),
    (503, "XMinioBackendDown", TransientS3Error),
    (429, "TooManyRequests", TransientS3Error),  # R2
    (429, "SlowDown", TransientS3Error),
    (400, "RequestTimeout", TransientS3Error),
    (408, "RequestTimeout", TransientS3Error),  # Ceph
    (400, "ThrottlingException", TransientS3Error),
    (400, "ThrottledException", TransientS3Error),
    (400, "RequestThrottledException", TransientS3Error),
    (400, "TooManyRequestsException", TransientS3Error),
    (400, "KMS.ThrottlingException", TransientS3Error),
    (400, "IncompleteBody", TransientS3Error),
    (400, "ClientDisconnect", TransientS3Error),  # R2
    (499, "ClientDisconnected", TransientS3Error),  # MinIO
    (409, "OperationAborted", TransientS3Error),
    (409, "ConditionalRequestConflict", TransientS3Error),
    (500, "InternalError", TransientS3Error),
    (500, "UnknownError", TransientS3Error),  # Ceph
    (404, "NoSuchUpload", TransientS3Error),
    (400, "InvalidPart", TransientS3Error),
    (307, "TemporaryRedirect", TransientS3Error),
    (307, "Redirect", TransientS3Error),
    (400, "ExpiredToken", TransientS3Error),
    (403, "ExpiredToken", TransientS3Error),
    (400, "TokenRefreshRequired", TransientS3Error),
    # Somebody must act
    (507, "InsufficientStorage", PermanentS3Error),
    (507, "XMinioStorageFull", PermanentS3Error),
    (505, "HTTPVersionNotSupported", PermanentS3Error),
    (400, "XMinioAdminBucketQuotaExceeded", PermanentS3Error),
    (403, "QuotaExceeded", PermanentS3Error),  # Ceph
    (403, "InsufficientQuota", PermanentS3Error),  # GCS
    (403, "AccessDenied", PermanentS3Error),
    (401, "Unauthorized", PermanentS3Error),  # R2
    (403, "AllAccessDisabled", PermanentS3Error),
    (403, "AccountProblem", PermanentS3Error),
    (403, "InvalidPayer", PermanentS3Error),
    (403, "NotSignedUp", PermanentS3Error),
    (403, "NotEntitled", PermanentS3Error),  # R2
    (403, "UserSuspended", PermanentS3Error),  # Ceph
    (403, "InvalidSecurity", PermanentS3Error),
    (403, "InvalidAccessKeyId", PermanentS3Error),
    (403, "SignatureDoesNotMatch", PermanentS3Error),
    (400, "InvalidToken", PermanentS3Error),
    (403, "InvalidTokenId", PermanentS3Error),  # MinIO
    (403, "RequestTimeTooSkewed", PermanentS3Error),
    (400, "RequestExpired", PermanentS3Error),
    (400, "EntityTooLarge", PermanentS3Error),
    (413, "EntityTooLarge", PermanentS3Error),
    (400, "EntityTooSmall", PermanentS3Error),
    (400, "InvalidPartOrder", PermanentS3Error),
    (400, "KeyTooLongError", PermanentS3Error),
    (400, "InvalidURI", PermanentS3Error),
    (400, "InvalidRequest", PermanentS3Error),
    (400, "InvalidArgument", PermanentS3Error),
    (400, "InvalidStorageClass", PermanentS3Error),
    (400, "InvalidEncryptionAlgorithmError", PermanentS3Error),
    (403, "InvalidObjectState", PermanentS3Error),
    (409, "InvalidBucketState", PermanentS3Error),
    (400, "InvalidBucketName", PermanentS3Error),
    (404, "NoSuchBucket", PermanentS3Error),
    (404, "404", TransientS3Error),  # a proxy's page, or S3's that was cut
    (405, "MethodNotAllowed", PermanentS3Error),
    (411, "MissingContentLength", PermanentS3Error),
    (412, "PreconditionFailed", PermanentS3Error),
    (501, "NotImplemented", PermanentS3Error),
    (301, "PermanentRedirect", PermanentS3Error),
    (302, "302", PermanentS3Error),  # the log-in page of a proxy
    (400, "AuthorizationHeaderMalformed", PermanentS3Error),
    (400, "IllegalLocationConstraintException", PermanentS3Error),
    (400, "KMS.DisabledException", PermanentS3Error),
    (400, "KMS.NotFoundException", PermanentS3Error),
    (400, "KMS.KMSInvalidStateException", PermanentS3Error),
    (400, "KMS.InvalidKeyUsageException", PermanentS3Error),
    # Other bytes
    (400, "BadDigest", IntegrityError),
    (400, "XAmzContentSHA256Mismatch", IntegrityError),
    (400, "XAmzContentChecksumMismatch", IntegrityError),
]


# A status of 3xx without a region: see test_endpoint_that_sends_on_to_another_…
@pytest.mark.parametrize(("status", "code", "kind"), rows(KINDS))
def test_answer_is_of_the_kind_that_tells_what_to_do(answering, status, code, kind):
    """Retry, act, or look for what changed the bytes; only transient errors are retried by Zope."""
    answer = PAGE_OF[code] if code in PAGE_OF else s3_error(status, code)
    error = fail(answering, answer)
    assert type(error) is kind
    assert code in str(error)
    assert isinstance(error, TransientError) is (kind is TransientS3Error)
    assert error.key == KEY


PAGE_OF = {
    "404": Answer(404, [("Content-Type", "text/html")], b"<html>not found</html>"),
    "302": Answer(302, [("Content-Type", "text/html"), ("Location", "/login")], b"<html></html>"),
}

REMEDIES = [
    (403, "AccessDenied", "s3:PutObject"),
    (401, "Unauthorized", "s3-access-key"),
    (403, "AllAccessDisabled", "account"),
    (403, "AccountProblem", "account"),
    (403, "NotSignedUp", "account"),
    (403, "UserSuspended", "suspended"),
    (403, "InvalidAccessKeyId", "s3-access-key"),
    (403, "SignatureDoesNotMatch", "s3-secret-key"),
    (400, "InvalidToken", "credentials"),
    (403, "InvalidTokenId", "credentials"),
    (403, "InvalidSecurity", "credentials"),
    (403, "RequestTimeTooSkewed", "clock"),
    (400, "RequestExpired", "clock"),
    (404, "NoSuchBucket", "bucket-name"),
    (400, "InvalidBucketName", "bucket-name"),
    (301, "PermanentRedirect", "s3-region.*s3-endpoint-url"),
    (400, "AuthorizationHeaderMalformed", "s3-region"),
    (400, "IllegalLocationConstraintException", "s3-region"),
    (400, "InvalidLocationConstraint", "s3-region"),
    (403, "InvalidObjectState", "s3-storage-class"),
    (400, "InvalidStorageClass", "s3-storage-class"),
    (403, "QuotaExceeded", "quota"),
    (403, "InsufficientQuota", "quota"),
    (400, "XMinioAdminBucketQuotaExceeded", "quota"),
    (507, "InsufficientStorage", "full"),
    (507, "XMinioStorageFull", "full"),
    (400, "EntityTooLarge", "s3-multipart-threshold"),
    (413, "413", "s3-multipart-threshold"),
    (400, "EntityTooSmall", "s3-multipart-part-size"),
    (400, "KeyTooLongError", "s3-prefix"),
    (405, "MethodNotAllowed", "s3-endpoint-url"),
    (411, "MissingContentLength", "s3-checksum"),
    (501, "NotImplemented", "s3-checksum"),
    (400, "InvalidArgument", "s3-sse"),
    (400, "InvalidRequest", "s3-sse"),
    (400, "InvalidEncryptionAlgorithmError", "s3-sse"),
    (400, "KMS.DisabledException", "s3-sse-kms-key-id"),
    (400, "KMS.NotFoundException", "s3-sse-kms-key-id"),
    (400, "KMS.KMSInvalidStateException", "s3-sse-kms-key-id"),
    (400, "KMS.InvalidKeyUsageException", "s3-sse-kms-key-id"),
]


@pytest.mark.parametrize(("status", "code", "words"), rows(REMEDIES))
def test_refusal_names_what_to_do(answering, status, code, words):
    """The operator need not look the code up."""
    answer = Answer(413, [("Content-Type", "text/html")], b"<html>nginx</html>")
    error = fail(answering, answer if code == "413" else s3_error(status, code))
    assert type(error) is PermanentS3Error
    assert re.search(words, str(error))


@pytest.mark.parametrize("element", ["Code", "Region"])
def test_hostile_code_changes_no_log(answering, element):
    """A server's words stand in logs and on pages: neither a new line, nor markup, nor a novel."""
    hostile = "x&#10;CRITICAL all is lost &lt;script&gt; \u202e" + "y" * 5000
    told = {"Code": "AccessDenied", "Region": "eu-central-1", element: hostile}
    body = "".join(f"<{name}>{text}</{name}>" for name, text in told.items())
    text = str(fail(answering, Answer(403, XML, f"<Error>{body}</Error>".encode())))
    assert text.isprintable()
    assert "<" not in text and "\u202e" not in text
    assert len(text) < 500
