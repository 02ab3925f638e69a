"""`zodb-s3blobs doctor`: what it says of servers that have a fault, and that it leaves nothing."""

from contextlib import ExitStack
from dataclasses import replace
import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys

from botocore.exceptions import ClientError
import pytest
from ZODB.blob import Blob

from zodb_s3blobs.operate.lifecycle import judge_lifecycle
from zodb_s3blobs.operate.main import main
from zodb_s3blobs.operate.policy import minimal_policy
from zodb_s3blobs.ownership import MARKER

from .faults import Answer
from .faults import FaultyServer
from .faults import refused_endpoint
from .faults import s3_error
from .faults import SilentServer
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.location import S3Location
from .services.process import wait_until
from .storages import open_db
from .storages import PATIENCE
from .storages import section


HERE = "127.0.0.1"
WRITING = {"put", "copy", "conditional put", "multipart", "batch delete"}
PARTS = {"s3_multipart_part_size": "5MB"}


@pytest.fixture
def doctor(tmp_path, capsys):
    """Return a function that runs the command and returns (its status, what it found)."""

    def doctor(location, *arguments, **options):
        path = configure(tmp_path, location, **options)
        status = main(["-C", str(path), "doctor", "--json", *arguments])
        return status, json.loads(capsys.readouterr().out)

    return doctor


@pytest.fixture
def moto(moto_server):
    """A fresh bucket on a server that compares no signatures."""
    return new_bucket(moto_server)


@pytest.fixture
def faulty():
    """Return a function that puts a `FaultyServer` in front of a location: both are returned."""
    with ExitStack() as stack:

        def start(location):
            server = stack.enter_context(FaultyServer(location.endpoint_url))
            return server, replace(location, endpoint_url=server.endpoint_url)

        yield start


def configure(directory, location, **options):
    """Write a configuration and return its path."""
    text = section(location, directory, **{"s3_prefix": "main", **PARTS, **options})
    style = options.get("s3_addressing_style")
    if style is not None:
        text = text.replace("s3-addressing-style path\n", "", 1)
    if location.ca_bundle:
        text = text.replace("cache-dir", f"s3-ca-bundle {location.ca_bundle}\ncache-dir", 1)
    path = directory / "zope.conf"
    path.write_text(f"%import zodb_s3blobs\n<zodb_db main>\nmount-point /\n{text}\n</zodb_db>\n")
    return path


def states(result, state):
    """Return the names of the probes that came to this."""
    return {name for name, found in result["probes"].items() if found["state"] == state}


def said(result, name):
    """Return what was said of a probe."""
    found = result["probes"][name]
    return f"{found['meaning']} -> {found['remedy']}"


# Servers as they are


def test_server_that_has_all_of_it_passes_and_is_left_as_it_was(doctor, ceph):
    """Each probe succeeds on Ceph, but for what is a choice; no object and no part stays."""
    location = new_bucket(ceph)
    status, result = doctor(location)
    assert status == 0
    assert states(result, "failed") == states(result, "not tried") == set()
    assert states(result, "not available") == {"TLS", "encryption", "lifecycle"}
    assert keys(location) == []
    client = boto3_client(location)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=location.bucket)


def test_embedded_server_is_told_what_it_lacks(doctor, s3):
    """Rclone ignores conditions and forgets nothing that a site needs."""
    status, result = doctor(s3)
    assert (status, states(result, "failed")) == (0, set())
    assert "conditional put" in states(result, "not available")
    assert "two databases" in said(result, "conditional put")
    assert keys(s3) == []


def test_text_has_a_line_for_each_probe_and_the_policy(s3, tmp_path, capsys):
    """People read the state first, then the probe, and advice below it."""
    assert main(["-C", str(configure(tmp_path, s3)), "doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("name", "connection", "clock", "put", "batch delete", "lifecycle", "clean"):
        assert re.search(rf"^(ok|not available) +{name} +\w", text, re.MULTILINE), name
    policy = json.loads(text[text.index("{") :])
    assert policy == minimal_policy(s3.bucket, "main")


# What is wrong with the way to it


def test_host_that_has_no_address_is_named(doctor, s3):
    """Nothing else is tried then."""
    status, result = doctor(replace(s3, endpoint_url="http://storage.invalid"))
    assert (status, states(result, "failed")) == (1, {"name"})
    assert "storage.invalid has no address" in said(result, "name")
    assert "check s3-endpoint-url" in said(result, "name")
    assert {"connection", "put", "lifecycle"} <= states(result, "not tried")


def test_host_of_a_bucket_that_is_unknown_is_asked_for_by_path(doctor, s3):
    """Many servers know no host for each bucket."""
    location = replace(s3, endpoint_url="http://storage.invalid")
    _status, result = doctor(location, s3_addressing_style="virtual")
    assert f"{s3.bucket}.storage.invalid has no address" in said(result, "name")
    assert "set s3-addressing-style path" in said(result, "name")


def test_host_of_aws_is_that_of_the_region(s3, tmp_path, capsys, monkeypatch):
    """Requests go there, though URLs for browsers may name another one."""
    asked = []

    def look_up(host, *args, **kw):
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    path = configure(tmp_path, s3, s3_region="eu-central-1")
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(line for line in lines if "endpoint" not in line and "style" not in line)
    )
    assert main(["-C", str(path), "doctor", "--json"]) == 1
    assert "s3-addressing-style" not in said(json.loads(capsys.readouterr().out), "name")
    assert asked == [f"{s3.bucket}.s3.eu-central-1.amazonaws.com"]


def test_port_where_nothing_listens_is_named(doctor, s3):
    """The port stands in s3-endpoint-url."""
    location = replace(s3, endpoint_url=refused_endpoint())
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"connection"})
    assert location.endpoint_url.rpartition(":")[2] in said(result, "connection")
    assert "port of s3-endpoint-url" in said(result, "connection")


def test_certificate_that_nobody_knows_wants_a_bundle(doctor, ceph):
    """With s3-ca-bundle all goes on."""
    location = replace(new_bucket(ceph), endpoint_url=ceph.tls_endpoint_url)
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"TLS"})
    assert "s3-ca-bundle" in said(result, "TLS")
    status, result = doctor(replace(location, ca_bundle=ceph.ca_bundle))
    assert (status, "TLS" in states(result, "ok")) == (0, True)


def test_certificate_of_another_name_is_told(doctor, ceph, monkeypatch):
    """The name in s3-endpoint-url is compared."""
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kw: look_up(HERE, *args, **kw))
    url = ceph.tls_endpoint_url.replace("localhost", "storage.example.com")
    location = replace(new_bucket(ceph), endpoint_url=url, ca_bundle=ceph.ca_bundle)
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"TLS"})
    assert "the name that the certificate has" in said(result, "TLS")


def test_server_without_tls_is_told_from_a_bad_certificate(doctor, s3):
    """Https at the port of http."""
    location = replace(s3, endpoint_url=s3.endpoint_url.replace("http:", "https:"))
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"TLS"})
    assert "speaks no TLS" in said(result, "TLS")
    assert "http://" in said(result, "TLS")


def test_what_is_no_s3_server_is_told(doctor, s3, faulty):
    """A web server answers, too."""
    server, location = faulty(s3)
    server.instead = lambda request: Answer(404, [("Content-Type", "text/html")], b"<html>")
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"answer"})
    assert "check s3-endpoint-url" in said(result, "answer")


def test_server_that_never_answers_is_given_up(doctor, s3):
    """It accepts connections, and so shows only here."""
    with SilentServer() as server:
        location = replace(s3, endpoint_url=server.endpoint_url)
        status, result = doctor(location, s3_read_timeout="500ms")
    assert (status, states(result, "failed")) == (1, {"answer"})
    assert "what stands between" in said(result, "answer")


def test_http_where_https_is_spoken_is_told(doctor, ceph):
    """The port answers, and not with S3."""
    url = ceph.tls_endpoint_url.replace("https:", "http:")
    status, result = doctor(replace(new_bucket(ceph), endpoint_url=url))
    assert (status, states(result, "failed")) == (1, {"answer"})
    assert "http or https" in said(result, "answer")


# What is wrong with the first answer


@pytest.mark.parametrize(
    "wrong, advice",
    [
        ({"secret_key": "wrong"}, "s3-secret-key"),
        ({"access_key": "wrong"}, "s3-access-key"),
    ],
)
def test_wrong_credentials_are_told_by_their_key(doctor, ceph, wrong, advice):
    """Of the two the one that is wrong is named, and neither is quoted."""
    location = new_bucket(ceph)
    status, result = doctor(replace(location, **wrong))
    assert (status, states(result, "failed")) == (1, {"credentials"})
    assert f"check {advice}" in said(result, "credentials")
    assert location.secret_key not in json.dumps(result).replace(location.bucket, "")


def test_without_credentials_it_says_where_they_go(doctor, s3, tmp_path, capsys):
    """Nothing is asked without them."""
    path = configure(tmp_path, s3)
    lines = [line for line in path.read_text().splitlines() if "-key" not in line]
    path.write_text("\n".join(lines))
    assert main(["-C", str(path), "doctor", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert states(result, "failed") == {"credentials"}
    assert "set s3-access-key and s3-secret-key" in said(result, "credentials")


def test_missing_bucket_is_told(doctor, s3):
    """Its name, or that it can be created."""
    status, result = doctor(replace(s3, bucket="no-such-bucket"))
    assert (status, states(result, "failed")) == (1, {"bucket"})
    assert "check bucket-name" in said(result, "bucket")
    assert "s3-create-bucket" in said(result, "bucket")


def test_missing_bucket_is_not_created_by_a_probe(doctor, s3):
    """The first upload does."""
    location = replace(s3, bucket="no-such-bucket")
    status, result = doctor(location, s3_create_bucket="true")
    assert (status, states(result, "failed")) == (1, {"bucket"})
    assert "the first upload creates it" in said(result, "bucket")
    with pytest.raises(ClientError, match="NoSuchBucket"):
        boto3_client(location).list_objects_v2(Bucket="no-such-bucket")


def test_wrong_clock_is_told_with_the_difference(doctor, s3, faulty):
    """It is the cause of a refusal that names a signature."""
    server, location = faulty(s3)

    def later(request):
        answer = s3_error(403, "RequestTimeTooSkewed")
        answer.headers.append(("Date", "Fri, 01 Jan 2100 00:00:00 GMT"))
        return answer

    server.instead = later
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"clock"})
    assert "behind the server's" in said(result, "clock")
    assert "set this host's clock" in said(result, "clock")


def test_region_that_the_server_asks_for_is_told(doctor, s3, faulty):
    """Garage, for example, refuses signatures for another one."""
    server, location = faulty(s3)
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>garage</Region></Error>"
    server.instead = lambda request: Answer(400, [("Content-Type", "application/xml")], body)
    status, result = doctor(location, s3_region="eu-west-3")
    assert (status, states(result, "failed")) == (1, {"region"})
    assert "set s3-region" in said(result, "region")
    assert "(garage)" in said(result, "region")


def test_missing_object_that_is_denied_wants_a_permission(doctor, s3, faulty):
    """AWS answers so without s3:ListBucket; where a mark is, a site lives with that."""
    client = boto3_client(s3)
    client.put_object(Bucket=s3.bucket, Key=f"main/{MARKER}", Body=b"{}")
    server, location = faulty(s3)

    def deny(request, answer):
        if answer.status == 404 and request.method == "GET":
            answer.status, answer.body = 403, s3_error(403, "AccessDenied").body

    server.change = deny
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (0, set())
    assert "missing key" in states(result, "not available")
    assert "s3:ListBucket" in said(result, "missing key")


# What is wrong with objects


def test_server_that_ignores_ranges_is_told(doctor, moto, faulty):
    """A site works on it; a part costs what comes before it."""
    server, location = faulty(moto)

    def forget(request):
        del request.headers["Range"]

    server.instead = forget
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (0, set())
    assert "ignores ranges" in said(result, "range")


def test_server_without_batches_is_told(doctor, s3, faulty):
    """Packs take longer there."""
    server, location = faulty(s3)
    server.instead = lambda request: (
        s3_error(501, "NotImplemented") if request.kind == "POST delete" else None
    )
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (0, set())
    assert "one by one" in said(result, "batch delete")
    assert keys(s3) == []


def test_server_without_startafter_fails(doctor, moto, faulty):
    """A sweep cannot end there."""
    server, location = faulty(moto)

    def forget(request):
        request.target = re.sub("start-after=[^&]*&?", "", request.target)

    server.instead = forget
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"list"})
    assert "StartAfter" in said(result, "list")


def test_proxy_that_takes_no_large_bodies_is_told(doctor, s3, faulty):
    """Such as nginx with its default; small blobs pass."""
    server, location = faulty(s3)
    server.instead = lambda request: Answer(413) if len(request.body) > 1 << 20 else None
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"multipart"})
    assert "s3-multipart-threshold" in said(result, "multipart")
    assert keys(s3) == []


@pytest.mark.parametrize("options", [{"s3_sse": "AES256"}, {"s3_sse_customer_key": "k" * 32}])
def test_encryption_that_the_server_ignores_fails(doctor, s3, faulty, options):
    """Such a server stores what it gets, whatever is asked of it."""
    server, location = faulty(s3)

    def forget(request, answer):
        answer.headers = [each for each in answer.headers if "encryption" not in each[0].lower()]

    server.change = forget
    status, result = doctor(location, **options)
    assert (status, states(result, "failed")) == (1, {"encryption"})
    assert next(iter(options)).replace("_", "-") in said(result, "encryption")


def test_customer_key_that_the_server_honours_passes(doctor, ceph):
    """URLs cannot be had then, and Ceph does not copy what it encrypts."""
    location = replace(
        new_bucket(ceph), endpoint_url=ceph.tls_endpoint_url, ca_bundle=ceph.ca_bundle
    )
    status, result = doctor(location, s3_sse_customer_key="k" * 32)
    assert (status, states(result, "failed")) == (0, set())
    assert "s3-sse-customer-key" in said(result, "encryption")
    assert "SSE-C" in said(result, "presigned URL")
    assert "an undo sends the bytes once more" in said(result, "copy")


def test_rule_that_deletes_blobs_fails(doctor, moto):
    """It would delete what the database still refers to."""
    client = boto3_client(moto)
    rule = {"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 90}}
    client.put_bucket_lifecycle_configuration(
        Bucket=moto.bucket, LifecycleConfiguration={"Rules": [rule]}
    )
    status, result = doctor(moto)
    assert (status, states(result, "failed")) == (1, {"lifecycle"})
    assert "tidy deletes blobs after 90 days" in said(result, "lifecycle")


def test_versioned_bucket_is_told_and_keeps_no_version_of_a_probe(doctor, moto):
    """Neither objects nor markers of their deletion."""
    client = boto3_client(moto)
    client.put_bucket_versioning(Bucket=moto.bucket, VersioningConfiguration={"Status": "Enabled"})
    status, result = doctor(moto)
    assert (status, states(result, "failed")) == (0, set())
    assert "expire noncurrent versions" in said(result, "versioning")
    left = client.list_object_versions(Bucket=moto.bucket)
    assert "Versions" not in left
    assert "DeleteMarkers" not in left


def test_what_cannot_be_removed_is_named(doctor, s3, faulty):
    """Whoever reads it can remove it."""
    server, location = faulty(s3)
    server.instead = lambda request: (
        s3_error(403, "AccessDenied") if request.kind in ("DELETE", "POST delete") else None
    )
    status, result = doctor(location)
    assert status == 1
    assert "s3:DeleteObject" in said(result, "batch delete")
    assert "below main/doctor-" in said(result, "clean")
    assert keys(s3) != []


# Rules of lifecycles

PARTS_RULE = {"Status": "Enabled", "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}


@pytest.mark.parametrize(
    "rule, expected",
    [
        ({"Prefix": "", "Expiration": {"Days": 3}}, False),
        ({"Prefix": "main/", "Expiration": {"Days": 3}}, False),
        ({"Filter": {"Prefix": "main/blobs/1"}, "Expiration": {"Date": "2030-01-01"}}, False),
        ({"Filter": {"And": {"Prefix": "m"}}, "Expiration": {"Days": 3}}, False),
        ({"Filter": {}, "Transitions": [{"StorageClass": "GLACIER"}]}, False),
        ({"Filter": {"Prefix": "other/"}, "Expiration": {"Days": 3}}, True),
        ({"Filter": {"Tag": {"Key": "a", "Value": "b"}}, "Expiration": {"Days": 3}}, True),
        ({"Filter": {}, "Expiration": {"Days": 3}, "Status": "Disabled"}, True),
        ({"Filter": {}, "Expiration": {"ExpiredObjectDeleteMarker": True}}, True),
        ({"Filter": {}, "NoncurrentVersionExpiration": {"NoncurrentDays": 30}}, True),
        ({"Filter": {}, "Transitions": [{"StorageClass": "STANDARD_IA"}]}, True),
    ],
)
def test_rule_is_judged_by_what_it_does_with_blobs(rule, expected):
    """Only a rule that meets them and makes them unreadable is refused."""
    rules = [PARTS_RULE, {"Status": "Enabled", **rule}]
    assert judge_lifecycle(rules, "", "main/")[0] is expected


def test_rules_that_are_not_told_fail_nothing():
    """A site needs no permission to read them."""
    state, meaning, _remedy = judge_lifecycle([], "AccessDenied", "")
    assert state is None
    assert "AccessDenied" in meaning


# Whose the bucket is


def test_bucket_of_another_database_is_only_read(doctor, s3, faulty, tmp_path):
    """A copy that has production's configuration changes nothing there."""
    db = open_db(s3, tmp_path, s3_prefix="main")
    with db.transaction() as connection:
        connection.root()["blob"] = Blob(b"some bytes")
    db.close()
    server, location = faulty(s3)
    status, result = doctor(location)
    assert (status, "owner" in states(result, "ok"), "put" in states(result, "ok")) == (
        0,
        True,
        True,
    )
    server.requests.clear()
    os.remove(tmp_path / "Data.fs.s3blobs")
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (1, {"owner"})
    assert "zodb-s3blobs own" in said(result, "owner")
    assert "get" in states(result, "ok")
    assert {request.method for request in server.requests} == {"GET", "HEAD"}


def test_marked_bucket_of_a_database_that_is_not_there_is_only_read(doctor, s3, faulty):
    """It cannot be told whose it is."""
    client = boto3_client(s3)
    client.put_object(Bucket=s3.bucket, Key=f"main/{MARKER}", Body=b"{}")
    server, location = faulty(s3)
    status, result = doctor(location)
    assert (status, "owner" in states(result, "not available")) == (0, True)
    assert {request.method for request in server.requests} <= {"GET", "HEAD"}


# Reading only


def test_read_only_sends_nothing_that_changes(doctor, s3, faulty, tmp_path, monkeypatch):
    """Production's bucket gets GET and HEAD alone, and is as it was."""
    db = open_db(s3, tmp_path, s3_prefix="main")
    with db.transaction() as connection:
        connection.root()["blob"] = Blob(b"some bytes")
    db.close()
    client = boto3_client(s3)
    before = client.list_objects_v2(Bucket=s3.bucket)["Contents"]
    server, location = faulty(s3)
    monkeypatch.setenv("ZODB_S3BLOBS_ACCESS", "read-only")
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (0, set())
    assert {"list", "get", "range", "head", "presigned URL"} <= states(result, "ok")
    assert not WRITING & set(result["probes"])
    assert result["access"] == "read-only"
    assert {request.method for request in server.requests} <= {"GET", "HEAD"}
    assert client.list_objects_v2(Bucket=s3.bucket)["Contents"] == before
    actions = [statement["Action"] for statement in result["policy"]["Statement"]]
    assert actions == ["s3:GetObject", "s3:ListBucket"]


def test_read_only_of_a_prefix_without_blobs_says_so(doctor, s3):
    """There is nothing to read, which is no fault."""
    status, result = doctor(s3, access="read-only")
    assert (status, states(result, "failed")) == (0, set())
    assert {"get", "range", "head"} <= states(result, "not tried")


# The policy


def test_policy_of_the_readme_is_the_one_that_is_printed():
    """They come from one place, and test_policy_ceph.py shows that it is minimal."""
    text = (Path(__file__).parent.parent / "README.rst").read_text()
    block = re.search(r"minimal IAM policy::\n\n((?:    .*\n)+)", text)[1]
    assert json.loads(block) == minimal_policy("my-site-blobs", "main")


def test_policy_has_what_options_need():
    """And no more."""
    everything = minimal_policy("bucket", creates_bucket=True, kms_key="abc", region="cn-north-1")
    objects, bucket, kms = everything["Statement"]
    assert objects["Resource"] == "arn:aws-cn:s3:::bucket/*"
    assert bucket["Action"] == ["s3:ListBucket", "s3:CreateBucket"]
    assert kms["Action"] == ["kms:GenerateDataKey", "kms:Decrypt"]
    assert kms["Resource"] == "arn:aws-cn:kms:*:*:key/abc"
    assert len(minimal_policy("bucket")["Statement"]) == 2


@pytest.fixture
def user(ceph):
    """A user of the gateway whom nothing is allowed yet."""
    name = "doctors-patient"
    try:
        ceph.create_user(name)
    except subprocess.CalledProcessError:
        pass  # of the test before
    return name


def allow(location, user, policy, without=None):
    """Give a user a policy on somebody's bucket, perhaps without one action."""
    statements = []
    for statement in policy["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else None
        actions = [action for action in actions or statement["Action"] if action != without]
        principal = {"AWS": [f"arn:aws:iam:::user/{user}"]}
        if actions:
            statements.append({**statement, "Action": actions, "Principal": principal})
    client = boto3_client(location)
    policy = {"Version": "2012-10-17", "Statement": statements}
    client.put_bucket_policy(Bucket=location.bucket, Policy=json.dumps(policy))


def test_printed_policy_is_enough_for_all_that_a_site_needs(doctor, ceph, user):
    """Whoever gives it to a user sees no probe fail; the rules of the bucket stay untold."""
    owner = new_bucket(ceph)
    allow(owner, user, minimal_policy(owner.bucket, "main"))
    location = S3Location(ceph.endpoint_url, user, user, owner.bucket)
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (0, set())
    assert keys(owner) == []


def test_versions_that_must_stay_are_told(doctor, ceph, user):
    """The minimal policy does not allow to remove them, and a lifecycle rule does."""
    owner = new_bucket(ceph)
    client = boto3_client(owner)
    versioned = {"Status": "Enabled"}
    client.put_bucket_versioning(Bucket=owner.bucket, VersioningConfiguration=versioned)
    allow(owner, user, minimal_policy(owner.bucket, "main"))
    location = S3Location(ceph.endpoint_url, user, user, owner.bucket)
    status, result = doctor(location)
    assert (status, states(result, "failed")) == (0, set())
    assert "expire noncurrent versions" in said(result, "versioning")
    assert "noncurrent versions" in said(result, "clean")
    assert keys(owner) == []


@pytest.mark.parametrize("action, probe", [("s3:ListBucket", "list"), ("s3:PutObject", "put")])
def test_permission_that_is_missing_is_named(doctor, ceph, user, action, probe):
    """By the probe that needs it."""
    owner = new_bucket(ceph)
    allow(owner, user, minimal_policy(owner.bucket, "main"), without=action)
    location = S3Location(ceph.endpoint_url, user, user, owner.bucket)
    status, result = doctor(location)
    assert status == 1
    assert probe in states(result, "failed")
    assert f"grant {action}" in said(result, probe)
    assert keys(owner) == []


# Being stopped


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_leaves_nothing(ceph, faulty, tmp_path, times):
    """Neither objects nor parts, be it pressed once, or twice in the middle of a part."""
    owner = new_bucket(ceph)
    server, location = faulty(owner)
    path = configure(tmp_path, location)
    errors = tmp_path / "errors"
    with open(errors, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "zodb_s3blobs.operate", "-C", str(path), "doctor"],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    came = []

    def interrupt(request):
        if "partNumber=1" in request.target and not came:
            came.append(request)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: "stopping" in errors.read_text())
            if times == 2:
                process.send_signal(signal.SIGINT)
                wait_until(lambda: "ended at once" in errors.read_text())

    server.instead = interrupt
    output, _errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, errors.read_text()
    assert keys(owner) == []
    client = boto3_client(owner)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=owner.bucket)
    if times == 1:
        assert re.search("^not tried +batch delete", output, re.MULTILINE)


def test_time_limit_ends_it_between_two_probes(doctor, s3):
    """Schedulers end jobs; what was made is removed."""
    status, result = doctor(s3, "--time-limit", "0.000001s")
    assert status == 3
    assert "put" in states(result, "not tried")
    assert keys(s3) == []
