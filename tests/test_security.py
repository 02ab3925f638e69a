"""What others write to a bucket, a record, a shared disk or a log stays within its bounds.

SECURITY.rst tells whom these tests play. Who types names and types of files is played in
test_headers.py and test_delivery.py, and who lacks a permission in test_policy_ceph.py.
"""

from contextlib import closing
from contextlib import ExitStack
import dataclasses
import gc
import http.server
import io
import json
import logging
import os
from pathlib import Path
import pickle
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from types import SimpleNamespace
from xml.sax.saxutils import escape

import pytest
import ZConfig
from ZODB.blob import Blob
from ZODB.config import getStorageSchema
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import POSKeyError
from ZODB.utils import p64

from zodb_s3blobs import blobs
from zodb_s3blobs.cache import S3BlobCache
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import MissingObjectError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.s3client import S3OperationError
from zodb_s3blobs.spool import Spool
from zodb_s3blobs.storage import S3BlobStorage

from .faults import Answer
from .faults import FaultyServer
from .faults import refused_endpoint
from .faults import s3_error
from .services.location import boto3_client
from .services.location import keys
from .services.location import new_bucket
from .services.location import S3Location
from .storages import BLOB_RECORD
from .storages import commit_blob
from .storages import commit_record
from .storages import HookedClient
from .storages import load
from .storages import make_client
from .storages import make_storage
from .storages import open_db
from .storages import read
from .storages import write_file


KEY = "blobs/1/2.blob"
OTHER_KEY = "blobs/1/3.blob"
OID = p64(1)
SECRET = "hunter2/hunter2+hunter2"
SSE_KEY = "0123456789abcdef0123456789abcdeX"
ETAG = ("ETag", '"0123456789abcdef0123456789abcdef"')
XML = ("Content-Type", "application/xml")
MANY = "9" * 5000
MiB = 1 << 20
PARTS = {"multipart_threshold": 5 * MiB, "multipart_part_size": 5 * MiB}
LARGE = bytes(5 * MiB + 1)


@pytest.fixture
def server():
    """A `FaultyServer` with nothing behind it."""
    with FaultyServer() as server:
        yield server


@pytest.fixture
def connect():
    """Return a function that makes a client, which is closed after the test."""
    with ExitStack() as stack:

        def connect(location, **options):
            options = {"max_attempts": 1, "max_pause": 0, "read_timeout": 5, **PARTS, **options}
            client = make_client(location, **options)
            stack.callback(client.close)
            return client

        yield connect


def nowhere(server):
    """Return the location of a bucket that only a `FaultyServer` tells of."""
    return S3Location(server.endpoint_url, "access", SECRET, "bucket")


def operations(client, directory):
    """Return functions that ask S3 for something, by name.

    :param directory: where files are written.
    """
    small, large, target = (f"{directory}/{name}" for name in ("small", "large", "target"))
    Path(small).write_bytes(b"some bytes")
    Path(large).write_bytes(LARGE)
    return {
        "upload": lambda: client.upload_file(small, KEY),
        "upload in parts": lambda: client.upload_file(large, KEY),
        "download": lambda: client.download_file(KEY, target),
        "range": lambda: client.open_range(KEY, 1, 3).read(2),
        "size": lambda: client.object_size(KEY),
        "copy": lambda: client.copy_object(KEY, OTHER_KEY),
        "list": lambda: list(client.list_pages("blobs/")),
        "delete": lambda: client.delete_objects([KEY]),
    }


def tree(directory):
    """Return the paths of all that is below a directory, and the times of their last change."""
    return {path: path.lstat().st_mtime_ns for path in Path(directory).rglob("*")}


def listing(inside, head=""):
    """Return an answer to a request for a listing."""
    return Answer(200, [XML], f"{head}<ListBucketResult>{inside}</ListBucketResult>".encode())


def entry(key="blobs/1/2.blob", size="1"):
    """Return an entry of a listing."""
    dated = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    return f"<Contents><Key>{key}</Key><Size>{size}</Size>{dated}</Contents>"


# Who writes to the bucket: keys


HOSTILE_KEYS = [
    "blobs/../../x",
    "blobs/1/../../../x.blob",
    "blobs/1/2.blob/../../../x",
    "blobs/1//2.blob",
    "blobs//etc/passwd",
    "blobs/1/2.blob\n",
    "blobs/1/2\x7f.blob",
    "blobs/\u0661/\u0662.blob",
    "blobs/1/" + "f" * 33 + ".blob",
    "blobs/1/%2e%2e%2f%2e%2e%2fx.blob",
    "blobs/$(touch x)/2.blob",
]


def test_keys_of_any_form_lead_to_no_file_and_to_no_other_object(s3, tmp_path):
    """A sweep looks at them, counts them, and leaves them and the disk alone."""
    added = "".join(entry(escape(key)) for key in sorted(HOSTILE_KEYS))

    def add(request, answer):
        if request.kind == "GET list-type" and "start-after" not in request.target:
            answer.body = answer.body.replace(
                b"</ListBucketResult>", b"%s</ListBucketResult>" % added.encode()
            )

    with FaultyServer(s3.endpoint_url) as server:
        server.change = add
        behind = dataclasses.replace(s3, endpoint_url=server.endpoint_url)
        storage, client = make_storage(behind, tmp_path)
        with closing(storage):
            tid = commit_blob(storage, OID, b"some bytes")
            before, in_bucket = tree(tmp_path), keys(s3)
            report = storage.sweep()
            assert (report.foreign, report.kept) == (len(HOSTILE_KEYS), 1)
            assert client.count("delete_objects") == 0
            assert (tree(tmp_path), keys(s3)) == (before, in_bucket)
            assert load(storage, OID, tid) == b"some bytes"


# Who writes to the bucket: objects


@pytest.fixture
def swapped(s3, connect):
    """A client of a bucket in which the object under KEY has been replaced by that of OTHER_KEY."""
    client = connect(s3)
    client.upload_file(write_file(b"mine"), KEY)
    client.upload_file(write_file(b"another's"), OTHER_KEY)
    plain = boto3_client(s3)
    source = {"Bucket": s3.bucket, "Key": OTHER_KEY}
    plain.copy_object(Bucket=s3.bucket, Key=KEY, CopySource=source)
    plain.close()
    return client


def test_copy_of_a_swapped_object_is_refused(swapped, tmp_path):
    """As its download is: an undo would make it the right one for ever."""
    target = "blobs/1/4.blob"
    with pytest.raises(IntegrityError):
        swapped.copy_object(KEY, target)
    assert swapped.head_object(target) is None


def test_metadata_of_an_object_adds_no_header_to_a_copy(s3, connect):
    """What a folded header says in its second line is a part of its value."""
    with FaultyServer(s3.endpoint_url) as server:
        client = connect(dataclasses.replace(s3, endpoint_url=server.endpoint_url))
        client.upload_file(write_file(b"some bytes"), KEY)

        def fold(request, answer):
            if request.method == "HEAD":
                answer.headers.append(("x-amz-meta-a", "b\r\n x-amz-acl: public-read"))

        server.change = fold
        client.copy_object(KEY, OTHER_KEY)
        (copy,) = [request for request in server.requests if "x-amz-copy-source" in request.headers]
        assert "x-amz-acl" not in copy.headers
        assert copy.headers["x-amz-meta-zodb-key"] == OTHER_KEY


# Who answers in the place of S3


def test_answer_that_leads_elsewhere_takes_no_credentials_there(server, connect, tmp_path):
    """Neither a redirect nor a region that is none: signature, token and SSE-C key stay here."""
    with FaultyServer() as elsewhere:
        elsewhere.instead = lambda request: Answer(200, [ETAG], b"not ours")
        host = elsewhere.endpoint_url.removeprefix("http://")
        client = connect(nowhere(server), sse_customer_key=SSE_KEY)
        signer = connect(nowhere(server))
        for status, code in [
            (301, "PermanentRedirect"),
            (307, "TemporaryRedirect"),
            (400, "AuthorizationHeaderMalformed"),
        ]:
            for region in (f"{host}/#", "eu-central-1"):
                answer = s3_error(status, code)
                told = f"<Endpoint>{host}</Endpoint><Region>{region}</Region></Error>".encode()
                answer.body = answer.body.replace(b"</Error>", told)
                answer.headers += [("Location", f"http://{host}/"), ("x-amz-bucket-region", region)]
                server.instead = lambda request, answer=answer: answer
                for operation in operations(client, tmp_path).values():
                    with pytest.raises(S3OperationError):
                        operation()
                assert signer.presigned_url(KEY).startswith(f"{server.endpoint_url}/bucket/")
        assert elsewhere.requests == []


PAGE = Answer(200, [("Content-Type", "text/html")], b"<html><body>Log in</body></html>")


@pytest.mark.parametrize(
    ("operation", "is_last"),
    [
        ("copy", lambda request: "x-amz-copy-source" in request.headers),
        ("upload in parts", lambda request: request.kind == "POST uploadId"),
    ],
    ids=["copy", "parts"],
)
def test_page_of_a_proxy_is_no_object_that_was_stored(s3, connect, tmp_path, operation, is_last):
    """A commit that went on would refer to bytes that are nowhere."""
    with FaultyServer(s3.endpoint_url) as server:
        client = connect(dataclasses.replace(s3, endpoint_url=server.endpoint_url))
        client.upload_file(write_file(b"some bytes"), KEY)
        server.instead = lambda request: PAGE if is_last(request) else None
        with pytest.raises(TransientS3Error):
            operations(client, tmp_path)[operation]()


def entities(*definitions):
    """Return the head of a document that defines entities."""
    text = "".join(f"<!ENTITY {definition}>" for definition in definitions)
    return f'<?xml version="1.0"?><!DOCTYPE a [{text}]>'


BILLION_LAUGHS = entities('a0 "ha"', *(f'a{n} "{f"&a{n - 1};" * 10}"' for n in range(1, 10)))
PASSWD = entities('x SYSTEM "file:///etc/passwd"')
ENDED = "<IsTruncated>false</IsTruncated>"
DEEP = "<a>" * 100_000 + "</a>" * 100_000


def says(body=b"", status=200, **headers):
    """Return an answer with an ETag and further headers, in whose names "_" stands for "-"."""
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    # The end of the connection is that of a body whose length nobody knows.
    return Answer(status, [ETAG, *named], body, cut_after=len(body))


HOSTILE = {
    "entity bomb": ("list", listing(entry("&a9;"), BILLION_LAUGHS)),
    "entity that is a file": ("list", listing(entry("&x;"), PASSWD)),
    "entity in an error": ("download", s3_error(403, "&a9;")),
    "bytes that are no XML": ("list", says(b"\x00\xff<")),
    "header too long": ("download", says(b"x", x_amz_meta_a="x" * 70_000)),
    "headers too many": ("download", says(b"x", **{f"x-{n}": "x" for n in range(200)})),
    "another range": ("range", says(b"xx", 206, content_range="bytes 0-1/9")),
    "range of words": ("range", says(b"xx", 206, content_range="a lot")),
    "range of many": ("range", says(b"xx", 206, content_range=f"bytes 1-2/{MANY}")),
    "end of many": ("range", says(b"", 416, content_range=f"bytes */{MANY}")),
    "length of minus 5": ("download", says(b"x", content_length="-5")),
    "length of words": ("download", says(b"x", content_length="a lot")),
    "size of minus 5": ("size", says(content_length="-5")),
    "size of words": ("size", says(content_length="a lot")),
    "no size": ("size", says(transfer_encoding="chunked")),
    "part without a size": ("range", says(b"0\r\n\r\n", transfer_encoding="chunked")),
    "listed without a key": ("list", listing("<Contents><Size>1</Size></Contents>")),
    "listed without a size": ("list", listing("<Contents><Key>a</Key></Contents>")),
    "listed with words": ("list", listing(entry(size="a lot"))),
    "listed with many": ("list", listing(entry(size=MANY))),
}


@pytest.mark.parametrize(("operation", "answer"), HOSTILE.values(), ids=HOSTILE)
def test_answer_of_any_form_is_an_error_of_the_family(server, connect, tmp_path, operation, answer):
    """A caller catches it; a KeyError would tell him that the blob is gone."""
    server.instead = lambda request: answer
    client = connect(nowhere(server))
    with pytest.raises(S3OperationError) as caught:
        operations(client, tmp_path)[operation]()
    assert not isinstance(caught.value, MissingObjectError)
    assert "root:" not in everything_about(caught.value)


def test_answer_of_a_hundred_thousand_levels_ends_nothing(server, connect):
    """Not even the interpreter."""
    server.instead = lambda request: listing(ENDED + entry() + DEEP)
    ((listed,),) = connect(nowhere(server)).list_pages("blobs/")
    assert listed.key == KEY


def test_listing_that_goes_in_circles_ends(server, connect):
    """A page whose token for the next one is its own."""
    token = "<NextContinuationToken>a</NextContinuationToken>"
    page = listing(f"<IsTruncated>true</IsTruncated>{token}")
    enough = s3_error(400, "EnoughOfThis")
    server.instead = lambda request: page if len(server.requests) < 10 else enough
    with pytest.raises(S3OperationError):
        list(connect(nowhere(server)).list_pages("blobs/"))
    assert len(server.requests) < 5


def test_sweep_of_a_listing_in_disorder_ends(server, connect, tmp_path):
    """It goes on behind the last key of a page, and would come to the same page again."""
    page = listing(entry("blobs/b") + entry("blobs/a"))
    enough = s3_error(400, "EnoughOfThis")
    server.instead = lambda request: page if len(server.requests) < 10 else enough
    cache = S3BlobCache(str(tmp_path / "cache"))
    storage = S3BlobStorage(MappingStorage(), connect(nowhere(server)), cache)
    with closing(storage), pytest.raises(S3OperationError):
        storage.sweep()
    assert len(server.requests) < 5


class Flood:
    """Answers each request with a length of 10, and 64 MiB in chunks; counts what is taken."""

    SIZE = 64 * MiB

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.taken = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        chunk = b"100000\r\n" + bytes(MiB) + b"\r\n"
        head = "\r\n".join(
            ["HTTP/1.1 200 OK", ": ".join(ETAG), "Content-Length: 10", "Transfer-Encoding: chunked"]
        )
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(1 << 16)
                    connection.sendall(f"{head}\r\n\r\n".encode())
                    for _ in range(self.SIZE // MiB):
                        connection.sendall(chunk)
                        self.taken += MiB
                except OSError:
                    pass  # the client has had enough

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def test_body_longer_than_it_says_is_not_taken_into_memory(connect, tmp_path):
    """Some megabytes are in the buffers of the system; the rest is left where it is."""
    with Flood() as flood:
        client = connect(S3Location(flood.endpoint_url, "access", SECRET, "bucket"))
        with pytest.raises(S3OperationError):
            client.download_file(KEY, str(tmp_path / "file"))
        client.close()
    assert flood.taken < 3 * 16 * MiB


# Who writes records, or a file that is imported


STAMP = b"../../../../etc/"


def test_reference_of_any_bytes_leads_to_a_key_of_its_own_object(s3, tmp_path):
    """Its stamp is digits there, and the object is always the record's."""
    storage, client = make_storage(s3, tmp_path)
    with closing(storage):
        tid = commit_record(storage, OID, record=with_reference(BLOB_RECORD, STAMP))
        before = tree(tmp_path / "cache")
        with pytest.raises(POSKeyError):
            storage.loadBlob(OID, tid)
        asked = [call for call in client.calls if call[0] == "download_file"]
        assert [name for _call, name in asked] == [
            "blobs/1/2e2e2f2e2e2f2e2e2f2e2e2f6574632f.blob",
            f"blobs/1/{tid.hex().lstrip('0')}.blob",
        ]
        new = set(tree(tmp_path / "cache")) - set(before)
        assert {path.relative_to(tmp_path / "cache").parts[0] for path in new} <= {
            "lock",
            "process",
        }


def calling(function, *arguments):
    """Return a pickle that calls a function."""

    class Call:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(Call(), 3)


def test_nothing_in_a_record_is_run(s3, tmp_path, monkeypatch):
    """Neither by a read nor by a sweep, whatever stands in the place of class and state."""
    sentinel, system = tmp_path / "sentinel", tmp_path / "system"
    system.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(system))
    command = calling(os.system, f"touch {sentinel} # ZODB.blob")
    class_, state = BLOB_RECORD[: BLOB_RECORD.index(b".") + 1], pickle.dumps(None, 3)
    records = [
        command + state,
        class_ + command,
        calling(eval, f"open({str(sentinel)!r}, 'w') or 'ZODB.blob'") + state,
        calling(Blob, b"bytes of a blob that nobody wants") + state,
        class_ + b"\x80\x03B\xff\xff\xff\x7fzodb-s3blobs:" + STAMP + b".",
        class_ + b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
    ]
    storage, _client = make_storage(s3, tmp_path)
    with closing(storage):
        for number, record in enumerate(records, 1):
            tid = commit_record(storage, p64(number), record=record)
            with pytest.raises(POSKeyError):
                storage.loadBlob(p64(number), tid)
        storage.sweep()
    gc.collect()
    assert list(system.iterdir()) == []
    assert not sentinel.exists()
    pickle.loads(command)
    assert sentinel.exists()


@pytest.mark.parametrize("addressing", ["tid", "record"])
def test_import_reaches_no_blob_that_is_there(s3, tmp_path, addressing):
    """A file whose record refers to another's blob brings its own bytes, under a key of its own."""
    options = {"base": "<mappingstorage>\n</mappingstorage>", "addressing": "record"}
    source = open_db(s3, tmp_path, cache="source", s3_prefix="source", **options)
    with source.transaction() as connection:
        connection.root()["blob"] = Blob(b"the importer's")
    with source.transaction() as connection:
        blob = connection.root()["blob"]
        exported = connection.exportFile(blob._p_oid, io.BytesIO()).getvalue()
        stamp = read_reference(source.storage.load(blob._p_oid)[0])
    source.close()
    db = open_db(s3, tmp_path, cache="target", s3_prefix="target", addressing="record")
    with db.transaction() as connection:
        connection.root()["blob"] = Blob(b"a secret")
    with db.transaction() as connection:
        victim = read_reference(db.storage.load(connection.root()["blob"]._p_oid)[0])
    db.close()
    before = keys(s3, "target/")
    db = open_db(s3, tmp_path, cache="target", s3_prefix="target", addressing=addressing)
    assert stamp in exported
    with db.transaction() as connection:
        crafted = io.BytesIO(exported.replace(stamp, victim))
        connection.root()["imported"] = connection.importFile(crafted)
    db.close()
    db = open_db(s3, tmp_path, cache="cold", s3_prefix="target", addressing=addressing)
    with db.transaction() as connection:
        root = connection.root()
        assert (read(root["blob"]), read(root["imported"])) == (b"a secret", b"the importer's")
    db.close()
    (new,) = set(keys(s3, "target/")) - set(before)
    assert victim.hex() not in new


def test_journal_of_any_text_uploads_nothing_from_elsewhere(s3, tmp_path):
    """A spool takes names of keys alone from it; what it cannot read it leaves."""
    (tmp_path / "secret").write_bytes(b"some bytes")
    spool = tmp_path / "spool"
    storage, _client = make_storage(s3, tmp_path, spool=Spool(str(spool), ["bucket"]))
    digest = "0" * 64
    lines = [
        f"{digest} 10 ../../secret",
        f"{digest} 10 blobs/../../secret",
        f"{digest} 10 {tmp_path}/secret",
        f"{digest} 10 blobs/1/../../../secret.blob",
        "complete",
    ]
    journal = spool / f"{0:016x}-{0:016x}.journal"
    (spool / f"{1:016x}-{0:016x}.journal.tmp").symlink_to(tmp_path / "secret")
    with closing(storage):
        journal.write_text("\n".join(lines) + "\n")
        storage.drain_spool()
    assert keys(s3) == []
    assert (tmp_path / "secret").read_bytes() == b"some bytes"


# Who works on the same host


@pytest.fixture
def umask():
    """Return a function that sets the umask until the end of the test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    """Return the permissions of a file, not followed."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def open_to_others(directory):
    """Return what others can read, and what they can write, below a directory they may enter."""
    readable, writable = [], []
    for place, names, files in os.walk(directory):
        for name in [*names, *files]:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                readable += [path] if mode(path) & 0o004 else []
                writable += [path] if mode(path) & 0o002 else []
        names[:] = [name for name in names if mode(os.path.join(place, name)) & 0o001]
    return sorted(readable), sorted(writable)


def live(db, large=LARGE):
    """Commit and read blobs, and leave a transaction with a savepoint under way; return its end."""
    with db.transaction() as connection:
        connection.root()["blob"] = Blob(b"some bytes")
        connection.root()["large"] = Blob(large)
    connection = db.open()
    blob = connection.root()["blob"]
    assert read(blob) == b"some bytes"
    with blob.open("a") as file:
        file.write(b", and more")
    connection.transaction_manager.savepoint(True)
    connection.root()["other"] = Blob(b"staged")
    return connection.transaction_manager.abort


@pytest.mark.parametrize("mask", [0o022, 0], ids=oct)
def test_directory_that_is_made_is_private_whatever_the_umask(s3, tmp_path, umask, mask):
    """So is all in it, be it staged, committed, or cached."""
    umask(mask)
    db = open_db(s3, tmp_path, cache="new")
    abort = live(db)
    cache = tmp_path / "new"
    assert mode(cache) == 0o700
    for name in ("tmp", "process"):
        assert mode(cache / name) == 0o700
        for path in (cache / name).iterdir():
            assert not mode(path) & 0o077
    abort()
    db.close()


def test_bytes_in_a_directory_that_others_may_enter_are_private(s3, tmp_path, umask):
    """They see of what size blobs are and when they were used, no more."""
    umask(0)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o755)
    db = open_db(s3, tmp_path)
    abort = live(db)
    readable, _writable = open_to_others(cache)
    assert {os.path.basename(path) for path in readable} <= {
        "boot",
        "index.sqlite",
        "index.sqlite-journal",
    }
    abort()
    db.close()


def test_nothing_in_a_directory_that_others_may_enter_is_theirs_to_change(s3, tmp_path, umask):
    """With a umask of 0: what was cached before a boot could be made to count as doubtful."""
    umask(0)
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o755)
    with closing(open_db(s3, tmp_path)) as db:
        live(db)()
        assert open_to_others(cache)[1] == []


def test_directory_that_somebody_has_removed_comes_back_private(s3, tmp_path, umask):
    """A read, and a commit, make it anew while the process goes on."""
    db = open_db(s3, tmp_path)
    live(db)()
    cache = tmp_path / "cache"
    for act in (
        lambda: read(db.open().root()["large"]),
        lambda: live(db)(),
    ):
        shutil.rmtree(cache)
        act()
        assert mode(cache) == 0o700
    db.close()


@pytest.mark.parametrize("mask", [0o022, 0], ids=oct)
def test_spool_directory_is_private_whatever_the_umask(tmp_path, umask, mask):
    """Who could write there would choose what is uploaded, and under which key."""
    umask(mask)
    Spool(str(tmp_path / "spool"), ["bucket"])
    assert mode(tmp_path / "spool") == 0o700


def test_directories_above_are_not_others_to_change(tmp_path, umask):
    """With a umask of 0: they could put another directory in the place of the cache."""
    umask(0)
    S3BlobCache(str(tmp_path / "var" / "site" / "cache")).close()
    assert open_to_others(tmp_path)[1] == []


def test_files_beside_a_cache_that_cannot_be_written_are_private(tmp_path, umask, monkeypatch):
    """In the system's directory for temporary files, which all share."""
    umask(0)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(shared))
    cache = S3BlobCache(str(tmp_path / "cache"))
    for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
        if path.is_dir():
            path.chmod(0o500)
    path = cache.fill(OID, OID, lambda path: Path(path).write_bytes(b"some bytes"))
    try:
        assert Path(path).is_relative_to(shared)
        assert open_to_others(shared) == ([], [])
    finally:
        cache.close()
        for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")):
            path.chmod(0o700)


def test_copies_in_a_directory_that_others_share_are_private(s3, tmp_path, umask):
    """A ``temp_dir`` that a program chooses may be everybody's."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    seen = []
    source, _client = make_storage(s3, tmp_path, cache="source")
    client = HookedClient(make_client(s3, prefix="target"))
    client.before["upload_file"] = lambda path, *args: seen.append(mode(path))
    cache = S3BlobCache(str(tmp_path / "target"))
    base = FileStorage(f"{tmp_path}/Target.fs")
    target = S3BlobStorage(base, client, cache, temp_dir=str(shared))
    with closing(source), closing(target):
        commit_blob(source, OID, b"some bytes")
        target.copyTransactionsFrom(source)
    assert [permissions & 0o077 for permissions in seen] == [0]


def test_cache_directory_that_others_can_write_is_told(tmp_path, caplog):
    """Who can put files there decides what the site serves: cached files are not verified."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    S3BlobCache(str(cache)).close()
    assert str(cache) in caplog.text


# Who reads logs, tracebacks, pickles and the list of processes


def everything_about(error):
    """Return the texts of an error and of its causes, as a log would have them."""
    return "".join(traceback.format_exception(error)) + repr(error)


def spend_a_life():
    """Do all that a site does with S3; print as JSON what a log and ``ps`` would have shown.

    Called in a process of its own. A line of its input says where the bucket is; credentials with
    a token are in its environment.
    """
    location, directory = S3Location(*json.loads(sys.stdin.readline())), tempfile.mkdtemp()
    log, our_log, processes, environment = io.StringIO(), io.StringIO(), [], dict(os.environ)
    logging.basicConfig(level=logging.DEBUG, stream=log)
    logging.getLogger("zodb_s3blobs").addHandler(logging.StreamHandler(our_log))
    logging.getLogger("boto3").setLevel(logging.DEBUG)

    def notice(event, arguments):
        if event.startswith(("subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork")):
            processes.append(repr((event, arguments)))

    sys.addaudithook(notice)
    urls = [*use_databases(location, directory), *use_clients(location, directory)]
    shutil.rmtree(directory)
    found = {
        "log": log.getvalue(),
        "our_log": our_log.getvalue(),
        "urls": urls,
        "level": logging.getLogger("boto3").level,
        "processes": processes,
        "environment_stays": dict(os.environ) == environment,
    }
    json.dump(found, sys.stdout)


def use_databases(location, directory):
    """Commit, read, abort and pack, with a customer's key and without; return URLs."""
    for name, options in [("plain", {}), ("with-key", {"s3_sse_customer_key": SSE_KEY})]:
        base = f"<filestorage>\npath {directory}/{name}.fs\n</filestorage>"
        db = open_db(location, directory, cache=name, base=base, s3_prefix=name, **options)
        live(db, bytes(2 * MiB))()
        with db.transaction() as connection:
            blob = connection.root()["blob"]
            if url := blobs.presigned_url(blob):
                yield url
        db.pack()
        db.close()


def use_clients(location, directory):
    """Do what a client can do, with good credentials, wrong ones, and no server; return URLs."""
    by_role = dataclasses.replace(location, access_key=None, secret_key=None)
    wrong = dataclasses.replace(location, secret_key=SECRET)
    down = dataclasses.replace(location, endpoint_url=refused_endpoint())
    log = logging.getLogger("zodb_s3blobs.test")
    for place in (by_role, wrong, down):
        for options in ({}, {"sse_customer_key": SSE_KEY}):
            client = make_client(place, max_attempts=1, max_pause=0, **PARTS, **options)
            for name, operation in operations(client, directory).items():
                try:
                    operation()
                except S3OperationError:
                    log.exception("failed operation=%s client=%r", name, client)
            if url := client.presigned_url(KEY):
                yield url
            client.close()


@pytest.fixture(scope="module")
def life(rclone):
    """What `spend_a_life` has printed, and by its kind all that was secret then."""
    location, token = new_bucket(rclone), "token/hunter2+token"
    environment = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": location.access_key,
        "AWS_SECRET_ACCESS_KEY": location.secret_key,
        "AWS_SESSION_TOKEN": token,
    }
    with FaultyServer(location.endpoint_url) as server:
        behind = dataclasses.replace(location, endpoint_url=server.endpoint_url)
        child = subprocess.run(
            [sys.executable, "-c", "from tests.test_security import *; spend_a_life()"],
            cwd=Path(__file__).parent.parent,
            env=environment,
            input=json.dumps(dataclasses.astuple(behind)),
            stdout=subprocess.PIPE,
            text=True,
            timeout=120,
            check=True,
        )
        sent = [
            (name.lower(), value)
            for request in server.requests
            for name, value in request.headers.items()
        ]
    found = SimpleNamespace(**json.loads(child.stdout))
    found.secrets = {
        "secret key": {location.secret_key, SECRET},
        "token": {value for name, value in sent if name == "x-amz-security-token"},
        "SSE-C key": {SSE_KEY, *(value for name, value in sent if name.endswith("customer-key"))},
        "signature": {
            value.rpartition("Signature=")[2] for name, value in sent if name == "authorization"
        },
        "URL": {url.rpartition("X-Amz-Signature=")[2] for url in found.urls},
    }
    assert token in found.secrets["token"]
    assert len(found.secrets["SSE-C key"]) > 1
    assert len(found.secrets["signature"]) > 20
    assert len(found.urls) == 4
    return found


def told(life, text):
    """Return what secrets a text has."""
    return {name for name, secrets in life.secrets.items() if any(map(text.__contains__, secrets))}


def test_our_log_has_no_secret_at_any_level(life):
    """Nor have the tracebacks in it."""
    assert "uploaded key=" in life.our_log
    assert "Traceback" in life.our_log
    assert told(life, life.our_log) == set()


def test_whole_log_has_no_secret_at_debug(life):
    """As a site has it whose root logger is set to that level."""
    assert told(life, life.log) == set()


def test_level_that_somebody_has_set_for_a_logger_of_botos_stays(life):
    """Who asks for its lines by its name gets them."""
    assert life.level == logging.DEBUG


def test_no_process_is_started_and_the_environment_stays(life):
    """So ``ps`` shows no secret."""
    assert life.processes == []
    assert life.environment_stays


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (TransientS3Error, s3_error(503, "SlowDown")),
        (PermanentS3Error, s3_error(403, "SignatureDoesNotMatch")),
        (IntegrityError, s3_error(400, "BadDigest")),
        (MissingObjectError, s3_error(404, "NoSuchKey")),
    ],
)
def test_error_is_pickled_without_client_and_secrets(server, connect, tmp_path, kind, answer):
    """As a ZEO server sends one; what it says arrives."""
    server.instead = lambda request: answer
    client = connect(nowhere(server), sse_customer_key=SSE_KEY)
    with pytest.raises(kind) as caught:
        client.download_file(KEY, str(tmp_path / "file"))
    error = caught.value
    data = pickle.dumps(error)
    for text in (SECRET, SSE_KEY, "boto", "S3Client", server.endpoint_url):
        assert text.encode() not in data
    again = pickle.loads(data)
    assert type(again) is kind
    assert (str(again), again.operation, again.key) == (str(error), "download", KEY)


def parse(text, directory):
    """Return the factory of a section with these keys, nothing opened."""
    required = f"bucket-name bucket\ncache-dir {directory}/cache\n"
    base = "\n<mappingstorage>\n</mappingstorage>\n"
    section = f"%import zodb_s3blobs\n<s3blobstorage>\n{required}{text}{base}</s3blobstorage>\n"
    config, _ = ZConfig.loadConfigFile(getStorageSchema(), io.StringIO(section), "zope.conf")
    return config.storage


CONFIGURED = f"s3-access-key key\ns3-secret-key {SECRET}\ns3-endpoint-url https://localhost"


@pytest.mark.parametrize("what", ["client", "client that was used", "storage", "configuration"])
def test_what_has_secrets_is_not_pickled(server, connect, tmp_path, what):
    """Nobody takes it along by mistake, such as to another process."""
    client = connect(nowhere(server), sse_customer_key=SSE_KEY)
    if what == "client":
        thing = client
    elif what == "client that was used":
        server.instead = lambda request: s3_error(404, "NoSuchKey")
        client.head_object(KEY)
        thing = client
    elif what == "storage":
        cache = S3BlobCache(str(tmp_path / "cache"))
        thing = S3BlobStorage(MappingStorage(), client, cache)
    else:
        thing = parse(CONFIGURED, tmp_path)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
            pickle.dumps(thing, protocol)
    assert SECRET not in f"{thing!r} {thing!s}"


@pytest.mark.parametrize("key", [f"s3-secret-key {SECRET}", f"s3-sse-customer-key {SSE_KEY}"])
def test_configuration_does_not_print_its_secrets(tmp_path, key):
    """It is an attribute of the factory, as that of every storage's is."""
    lines = [key, "s3-endpoint-url https://localhost"]
    if SECRET in key:
        lines.append("s3-access-key key")
    factory = parse("\n".join(lines), tmp_path)
    text = f"{factory.config!s} {factory.config!r} {factory!s} {factory!r}"
    assert SECRET not in text and SSE_KEY not in text


@pytest.mark.parametrize(
    "text",
    [
        f"s3-secret-key {SECRET}",
        f"s3-access-key key\ns3-secret-key {SECRET}\ns3-profile site",
        f"s3-access-key key\ns3-secret-key {SECRET}\ns3-secret-key {SECRET}",
        f"s3-access-key key\ns3-secret-key {SECRET}$",
        f"s3-access-key key\ns3-secret-key {SECRET}${{",
        f"s3-access-key key\ns3-secret-key {SECRET}$MISSING",
        f"s3-access-key key\ns3-secret-key {SECRET}$(MISSING)",
        f"s3-sse-customer-key {SECRET}",
        f"s3-sse-customer-key {SSE_KEY}\ns3-endpoint-url http://s3.example.com",
        f"s3-sse-customer-key {SSE_KEY}\ns3-sse AES256",
        f"s3-endpoint-url https://key:{SECRET}@s3.example.com",
        f"{CONFIGURED}\ns3-use-ssl no",
    ],
)
def test_mistake_in_a_configuration_quotes_no_secret(tmp_path, text):
    """Its traceback neither: both end in a log, or in a question to a mailing list."""
    with pytest.raises((ValueError, ZConfig.ConfigurationError)) as caught:
        parse(text, tmp_path)
    everything = everything_about(caught.value)
    assert "hunter2" not in everything and SSE_KEY not in everything


# Who stands between us and S3


class TlsServer:
    """An S3 server, without any object, whose certificate is for another host and signed by itself.

    :param directory: where its certificate is put, as ``certificate``.
    :param str host: whom the certificate is for.
    """

    def __init__(self, directory, host):
        self.certificate, key = str(directory / "certificate"), str(directory / "key")
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
        command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={host}"]
        command += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", key]
        subprocess.run([*command, "-out", self.certificate], check=True, capture_output=True)
        self.requests = requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                answer = s3_error(404, "NoSuchKey")
                self.send_response_only(answer.status)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                pass  # the client does not trust it

        self._server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self._server.socket = context.wrap_socket(
            self._server.socket, server_side=True, do_handshake_on_connect=False
        )
        self.endpoint_url = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def tls(tmp_path):
    """Return a function that starts a `TlsServer` for a host."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    with ExitStack() as stack:
        yield lambda host: stack.enter_context(TlsServer(tmp_path, host))


def ask(server, connect, directory, **options):
    """Ask for an object that is not there."""
    client = connect(nowhere(server), **options)
    client.download_file(KEY, str(directory / "file"))


def test_server_with_the_certificate_that_was_configured_is_asked(tls, connect, tmp_path):
    """So what is refused below is refused for its certificate."""
    server = tls("localhost")
    with pytest.raises(MissingObjectError):
        ask(server, connect, tmp_path, ca_bundle=server.certificate)
    assert len(server.requests) == 1


@pytest.mark.parametrize("host", ["localhost", "s3.example.com"])
def test_server_with_another_certificate_is_told_nothing(tls, connect, tmp_path, host):
    """Be it signed by nobody whom we know, or for another host."""
    server = tls(host)
    known = {} if host == "localhost" else {"ca_bundle": server.certificate}
    with pytest.raises(PermanentS3Error, match="s3-ca-bundle"):
        ask(server, connect, tmp_path, **known)
    assert server.requests == []


def test_environment_does_not_switch_verification_off(tls, connect, tmp_path, monkeypatch):
    """Whatever other programs take for that."""
    server = tls("localhost")
    (tmp_path / "config").write_text("[default]\nca_bundle =\n")
    for name, value in [
        ("AWS_CA_BUNDLE", ""),
        ("REQUESTS_CA_BUNDLE", ""),
        ("CURL_CA_BUNDLE", ""),
        ("PYTHONHTTPSVERIFY", "0"),
        ("AWS_CONFIG_FILE", str(tmp_path / "config")),
    ]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(PermanentS3Error):
                ask(server, connect, tmp_path)
    assert server.requests == []


@pytest.mark.parametrize("value", [False, ""])
def test_option_that_would_switch_verification_off_is_refused(value):
    """Where it is given, and not with the first request."""
    with pytest.raises(ValueError, match="ca_bundle"):
        S3Client("bucket", endpoint_url="https://localhost", ca_bundle=value)


@pytest.mark.parametrize("value", ["false", "no", "none", "off", ""])
def test_configuration_has_no_word_to_switch_verification_off(tmp_path, value):
    """A file with that name is missing; a key with another name is unknown."""
    for key in ("s3-ca-bundle", "s3-verify", "s3-tls-verify"):
        with pytest.raises((ValueError, ZConfig.ConfigurationError)):
            parse(f"{CONFIGURED}\n{key} {value}", tmp_path)


def test_customer_key_stays_here_where_the_environment_names_an_endpoint(monkeypatch, tmp_path):
    """That is without TLS: no name is looked up, and no connection made."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3.example.com")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kw: pytest.fail("it is asked"))
    client = S3Client("bucket", "", None, "us-east-1", "key", SECRET, sse_customer_key=SSE_KEY)
    for operation in operations(client, tmp_path).values():
        with pytest.raises(PermanentS3Error, match="needs https") as caught:
            operation()
        assert SSE_KEY not in everything_about(caught.value)
    client.close()
