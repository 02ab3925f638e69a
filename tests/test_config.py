"""A mistake in zope.conf is told with its line, before anything is opened; opening asks nobody."""

import base64
from contextlib import closing
import io
import os
import subprocess
import sys
import textwrap

import pytest
import transaction
import ZConfig
from ZODB.blob import Blob
from ZODB.blob import FilesystemHelper
from ZODB.config import databaseFromString
from ZODB.config import getDbSchema
from ZODB.config import getStorageSchema
from ZODB.config import storageFromString
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.interfaces import IMVCCStorage
from ZODB.POSException import POSKeyError

from zodb_s3blobs.config import S3BlobStorageFactory
from zodb_s3blobs.config import Secret
from zodb_s3blobs.interfaces import IS3BlobStorage
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.keys import new_stamp

from .faults import refused_endpoint
from .services.location import boto3_client
from .services.location import keys
from .storages import take


SSE_KEY = base64.b64encode(b"0123456789abcdef0123456789abcdeX").decode()


@pytest.fixture
def text(tmp_path):
    """Return a function that makes a section of keys, with the two that are required."""

    def text(*lines, base="<mappingstorage>\n</mappingstorage>", bucket="bucket", cache="cache"):
        keys = [f"bucket-name {bucket}", f"cache-dir {tmp_path / cache}", *lines]
        body = textwrap.indent("\n".join([*keys, base]), "  ")
        return f"%import zodb_s3blobs\n<s3blobstorage>\n{body}\n</s3blobstorage>\n"

    return text


def parse(text):
    """Return the factory of the section, nothing opened."""
    config, _ = ZConfig.loadConfigFile(getStorageSchema(), io.StringIO(text), "zope.conf")
    return config.storage


def keys_of(location):
    """Return the lines that lead to a test's bucket."""
    return [
        f"s3-endpoint-url {location.endpoint_url}",
        f"s3-access-key {location.access_key}",
        f"s3-secret-key {location.secret_key}",
        "s3-addressing-style path",
    ]


# Keys


def test_defaults_are_those_of_the_documentation(text):
    """Only bucket and cache directory must be given."""
    factory = parse(text())
    assert isinstance(factory, S3BlobStorageFactory)
    config = factory.config
    found = {
        name: getattr(config, name)
        for name in config.getSectionAttributes()
        if name not in ("base", "cache_dir", "bucket_name")
    }
    assert found == {
        "sources": [],
        "s3_prefix": "",
        "s3_endpoint_url": None,
        "s3_public_endpoint_url": None,
        "s3_region": None,
        "s3_access_key": None,
        "s3_secret_key": None,
        "s3_profile": None,
        "s3_use_ssl": None,
        "s3_ca_bundle": None,
        "s3_addressing_style": "auto",
        "s3_create_bucket": False,
        "s3_sse_customer_key": None,
        "s3_sse": None,
        "s3_sse_kms_key_id": None,
        "s3_storage_class": None,
        "s3_checksum": "when_required",
        "s3_connect_timeout": 10,
        "s3_read_timeout": 60,
        "s3_max_attempts": 5,
        "s3_multipart_threshold": 64 << 20,
        "s3_multipart_part_size": 16 << 20,
        "addressing": "auto",
        "gc_grace": 86400,
        "access": "read-write",
        "local_blob_dir": None,
        "owner": None,
        "sweep_after_pack": True,
        "on_upload_failure": "abort",
        "spool_dir": None,
        "upload_concurrency": 32,
        "cache_size": 1 << 30,
    }


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("s3-prefix my/site/", "my/site"),
        ("s3-endpoint-url https://s3.example.com", "https://s3.example.com"),
        ("s3-public-endpoint-url https://files.example.com", "https://files.example.com"),
        ("s3-region eu-central-1", "eu-central-1"),
        ("s3-use-ssl no", False),
        ("s3-addressing-style virtual", "virtual"),
        ("s3-create-bucket on", True),
        (f"s3-sse-customer-key {SSE_KEY}", SSE_KEY),
        ("s3-sse AES256", "AES256"),
        ("s3-sse aws:kms", "aws:kms"),
        ("s3-storage-class STANDARD_IA", "STANDARD_IA"),
        ("s3-checksum when_supported", "when_supported"),
        ("s3-connect-timeout 500ms", 0.5),
        ("s3-connect-timeout 3", 3),
        ("s3-read-timeout 2m", 120),
        ("s3-read-timeout 1.5h", 5400),
        ("s3-max-attempts 1", 1),
        ("s3-multipart-threshold 1GB", 1 << 30),
        ("s3-multipart-part-size 5MB", 5 << 20),
        ("s3-profile archive", "archive"),
        ("addressing auto", "auto"),
        ("addressing tid", "tid"),
        ("addressing record", "record"),
        ("gc-grace 0", 0),
        ("gc-grace 0s", 0),
        ("gc-grace 90s", 90),
        ("gc-grace 90m", 5400),
        ("gc-grace 36h", 129600),
        ("gc-grace 7d", 604800),
        ("gc-grace 7D", 604800),
        ("upload-concurrency 256", 256),
        ("cache-size 20gb", 20 << 30),
        ("cache-size 2TB", 2 << 40),
        ("cache-size 4096", 4096),
    ],
)
def test_key_is_taken(text, line, value):
    """Each key reaches the section, converted."""
    name = line.split()[0].replace("-", "_")
    found = getattr(parse(text(line)).config, name)
    assert (found.reveal() if isinstance(found, Secret) else found) == value


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("s3-prefix /site", "begin with a slash"),
        ("s3-prefix site/../other", "segment"),
        ("s3-prefix site//x", "segment"),
        ("s3-prefix my site", "letters"),
        ("s3-prefix caf\u00e9", "letters"),
        ("s3-prefix a?b", "letters"),
        ("s3-prefix a\\b", "letters"),
        ("s3-endpoint-url s3.example.com", "such as https://"),
        ("s3-endpoint-url s3://bucket", "such as https://"),
        ("s3-public-endpoint-url files.example.com", "such as https://"),
        ("s3-endpoint-url https://s3.example.com:port", "[Pp]ort"),
        ("s3-endpoint-url https://user:pw@s3.example.com", "no user, password"),
        ("s3-use-ssl maybe", "boolean"),
        ("s3-addressing-style dns", "auto, path, virtual"),
        ("s3-sse-customer-key hunter2", "32 bytes"),
        ("s3-sse aes", "AES256, aws:kms"),
        ("s3-checksum never", "when_required, when_supported"),
        ("s3-connect-timeout 0", "such as 10s"),
        ("s3-connect-timeout -1s", "such as 10s"),
        ("s3-connect-timeout soon", "such as 10s"),
        ("s3-connect-timeout nan", "such as 10s"),
        ("s3-read-timeout inf", "such as 10s"),
        ("s3-read-timeout 25h", "such as 10s"),
        ("s3-max-attempts 0", "from 1 to 256"),
        ("s3-max-attempts many", "from 1 to 256"),
        ("upload-concurrency 257", "from 1 to 256"),
        ("upload-concurrency 1.5", "from 1 to 256"),
        ("addressing tids", "auto, tid, record"),
        ("addressing Record", "auto, tid, record"),
        ("gc-grace soon", "such as 24h or 7d"),
        ("gc-grace 24", "such as 24h or 7d"),
        ("gc-grace -1h", "such as 24h or 7d"),
        ("gc-grace 1.5h", "such as 24h or 7d"),
        ("gc-grace 500ms", "such as 24h or 7d"),
        ("gc-grace 1w", "such as 24h or 7d"),
        ("gc-grace h", "such as 24h or 7d"),
        ("gc-grace nan", "such as 24h or 7d"),
        ("gc-grace inf", "such as 24h or 7d"),
        ("s3-multipart-threshold 0", "at least one byte"),
        ("s3-multipart-threshold large", "such as 64MB"),
        ("s3-multipart-part-size 4MB", "5MB to 5GB"),
        ("s3-multipart-part-size 6GB", "5MB to 5GB"),
        ("cache-size 0", "at least one byte"),
        ("cache-size -1GB", "at least one byte"),
        ("cache-size 1.5GB", "such as 64MB"),
        ("s3-ca-bundle /nowhere/bundle.pem", "no file /nowhere/bundle.pem"),
        ("s3-create-bucket perhaps", "boolean"),
    ],
)
def test_wrong_value_is_refused_with_its_line(text, line, reason):
    """The operator sees which line, and what would be right."""
    with pytest.raises(ZConfig.DataConversionError, match=reason) as caught:
        parse(text(line))
    assert caught.value.lineno == 5
    assert "zope.conf" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_wrong_bucket_name_is_refused_with_its_line(text):
    """Also where the server would only say 400."""
    with pytest.raises(ZConfig.DataConversionError, match="3 to 63") as caught:
        parse(text(bucket="x"))
    assert caught.value.lineno == 3


def test_required_keys_are_required():
    """There is no default bucket."""
    for lines in ("bucket-name bucket", "cache-dir /nowhere/cache"):
        with pytest.raises(ZConfig.ConfigurationError, match=r"bucket-name|cache-dir"):
            parse(
                f"%import zodb_s3blobs\n<s3blobstorage>\n{lines}\n"
                "<mappingstorage>\n</mappingstorage>\n</s3blobstorage>\n"
            )
    with pytest.raises(ZConfig.ConfigurationError):
        parse(
            "%import zodb_s3blobs\n<s3blobstorage>\nbucket-name bucket\n"
            "cache-dir /nowhere/cache\n</s3blobstorage>\n"
        )


def test_unknown_key_is_refused(text):
    """A typing error does not silently leave the default."""
    with pytest.raises(ZConfig.ConfigurationError, match="cache-siez"):
        parse(text("cache-siez 1GB"))


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["s3-endpoint-url https://s3.example.com", "s3-use-ssl false"], "contradicts"),
        (["s3-endpoint-url http://s3.example.com", "s3-use-ssl true"], "contradicts"),
        (["s3-access-key key"], "go together"),
        (["s3-secret-key hunter2"], "go together"),
        (["s3-sse AES256", f"s3-sse-customer-key {SSE_KEY}"], "exclude each other"),
        (["s3-sse-kms-key-id key"], "needs 's3-sse aws:kms'"),
        (["s3-sse AES256", "s3-sse-kms-key-id key"], "needs 's3-sse aws:kms'"),
        (["s3-endpoint-url http://s3.example.com", f"s3-sse-customer-key {SSE_KEY}"], "https"),
        (["s3-use-ssl false", f"s3-sse-customer-key {SSE_KEY}"], "https"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(text, lines, reason):
    """While parsing, with the line of the section; a secret is not quoted."""
    with pytest.raises(ZConfig.DataConversionError, match=reason) as caught:
        parse(text(*lines))
    assert caught.value.lineno
    assert "hunter2" not in str(caught.value) and SSE_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "lines",
    [
        ["s3-endpoint-url https://s3.example.com", "s3-use-ssl true"],
        ["s3-endpoint-url http://s3.example.com", "s3-use-ssl false"],
        ["s3-endpoint-url http://localhost:9000", f"s3-sse-customer-key {SSE_KEY}"],
        ["s3-endpoint-url http://127.0.0.1:9000", f"s3-sse-customer-key {SSE_KEY}"],
        ["s3-endpoint-url https://s3.example.com", f"s3-sse-customer-key {SSE_KEY}"],
        ["s3-sse aws:kms", "s3-sse-kms-key-id key"],
    ],
)
def test_keys_that_agree_are_taken(text, lines):
    """The refusals above go no further than they must."""
    assert parse(text(*lines))


def test_environment_is_read_with_dollar_and_parentheses(text, monkeypatch):
    """Secrets need not stand in the file."""
    monkeypatch.setenv("TEST_S3_SECRET", "from the environment")
    lines = ["s3-access-key key", "s3-secret-key $(TEST_S3_SECRET)"]
    assert parse(text(*lines)).config.s3_secret_key.reveal() == "from the environment"
    monkeypatch.delenv("TEST_S3_SECRET")
    with pytest.raises(ZConfig.ConfigurationError):
        parse(text(*lines))


# The base


def with_blob_dir(tmp_path):
    return f"<filestorage>\n path {tmp_path}/Data.fs\n blob-dir {tmp_path}/blobs\n</filestorage>"


@pytest.mark.parametrize("inside", ["{}", "<zlibstorage>\n{}\n</zlibstorage>"])
def test_base_with_a_blob_directory_is_refused(text, tmp_path, inside):
    """With the advice what to do with it, and before a file is made."""
    base = inside.format(with_blob_dir(tmp_path))
    with pytest.raises(ZConfig.DataConversionError, match="blobdir-source") as caught:
        parse("%import zc.zlibstorage\n" + text(base=base))
    assert caught.value.lineno
    assert os.listdir(tmp_path) == []


def test_blobstorage_as_base_is_refused(text, tmp_path):
    """Two blob storages on top of each other."""
    base = (
        f"<blobstorage>\nblob-dir {tmp_path}/blobs\n"
        f"<filestorage>\npath {tmp_path}/Data.fs\n</filestorage>\n</blobstorage>"
    )
    with pytest.raises(ZConfig.DataConversionError, match="blobdir-source"):
        parse(text(base=base))
    assert os.listdir(tmp_path) == []


def filestorage(path, name="", *lines):
    """Return the text of a section."""
    return "\n".join([f"<filestorage {name}>", f"path {path}", *lines, "</filestorage>"])


def test_base_that_cannot_be_wrapped_is_refused_at_open_and_closed(text, tmp_path):
    """The changes of a DemoStorage have blobs of their own; the message says what to do."""
    below = filestorage(tmp_path / "Data.fs", "base")
    changes = filestorage(tmp_path / "Changes.fs", "changes", f"blob-dir {tmp_path}/blobs")
    factory = parse(text(base=f"<demostorage>\n{below}\n{changes}\n</demostorage>"))
    with pytest.raises(ValueError, match="put the <s3blobstorage> around the changes"):
        factory.open()
    assert not (tmp_path / "cache").exists()
    for name in ("Data.fs", "Changes.fs"):
        FileStorage(str(tmp_path / name)).close()  # its lock is free


@pytest.mark.parametrize("addressing", ["auto", "tid", "record"])
@pytest.mark.parametrize("kind", ["filestorage", "demostorage", "relstorage"])
def test_addressing_that_does_not_fit_is_refused_at_open(text, tmp_path, kind, addressing):
    """What fits opens; what does not leaves nothing behind, and the message says what to write."""
    base = {
        "filestorage": filestorage(tmp_path / "Data.fs"),
        "demostorage": f"<demostorage>\n{filestorage(tmp_path / 'Data.fs')}\n</demostorage>",
        "relstorage": relstorage(tmp_path),
    }[kind]
    factory = parse(f"%import relstorage\n{text(f'addressing {addressing}', base=base)}")
    if addressing != "tid" or kind == "filestorage":
        storage = factory.open()
        assert IMVCCStorage.providedBy(storage) == (kind == "relstorage")
        storage.close()
    else:
        with pytest.raises(ValueError, match=r"addressing tid does not fit .* or say auto"):
            factory.open()
        assert not (tmp_path / "cache").exists()
    if kind != "relstorage":
        FileStorage(str(tmp_path / "Data.fs")).close()  # its lock is free


def test_addressing_decides_whether_uploads_hold_the_lock(text, tmp_path):
    """By record a second transaction begins while the first has; by tid it would wait."""
    base = filestorage(tmp_path / "Data.fs")
    storage = parse(text("addressing record", base=base)).open()
    first, second = TransactionMetaData(), TransactionMetaData()
    for txn in (first, second):
        storage.tpc_begin(txn)
    for txn in (first, second):
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
    storage.close()


def relstorage(directory, *lines, name="database"):
    """Return the text of a section over SQLite."""
    (directory / name).mkdir(exist_ok=True)
    body = "\n".join([*lines, "<sqlite3>", f"data-dir {directory}/{name}", "</sqlite3>"])
    return f"<relstorage>\n{body}\n</relstorage>"


def test_relstorage_with_a_blob_directory_is_refused_with_its_line(text, tmp_path):
    """While parsing; the message says what to do with it."""
    base = relstorage(tmp_path, f"blob-dir {tmp_path}/blobs")
    with pytest.raises(ZConfig.DataConversionError, match="blobdir-source"):
        parse(f"%import relstorage\n{text(base=base)}")
    assert os.listdir(tmp_path) == ["database"]


@pytest.mark.parametrize(("line", "deleted"), [("", 0), ("gc-grace 1h", 0), ("gc-grace 0", 1)])
def test_grace_decides_what_a_sweep_spares(text, tmp_path, s3, line, deleted):
    """By default a day, in which a transaction of another process may need what it uploaded."""
    lines = [*keys_of(s3), line] if line else keys_of(s3)
    config = text(*lines, base=relstorage(tmp_path), bucket=s3.bucket)
    storage = storageFromString(f"%import relstorage\n{config}")
    orphan = storage.new_oid()
    storage.new_oid()
    client = boto3_client(s3)
    client.put_object(Bucket=s3.bucket, Key=blob_key(orphan, new_stamp()), Body=b"orphan")
    client.close()
    with closing(storage):
        take(storage)
        report = storage.sweep()
    assert (report.listed, report.deleted) == (1, deleted)


def test_two_relstorages_do_not_share_a_prefix(text, tmp_path, s3):
    """Each would pack away what is the other's; one database may be opened twice."""
    texts = [
        "%import relstorage\n"
        + text(
            *keys_of(s3),
            base=relstorage(tmp_path, name=name),
            bucket=s3.bucket,
            cache=f"cache-{number}",
        )
        for number, name in enumerate(("one", "one", "two"))
    ]
    opened = [storageFromString(text) for text in texts[:2]]
    with pytest.raises(ValueError, match="an s3-prefix of its own"):
        storageFromString(texts[2])
    for storage in opened:
        storage.close()


def test_filestorage_is_closed_when_the_cache_cannot_be_opened(text, tmp_path):
    """The lock of Data.fs can be taken again after the mistake was mended."""
    base = f"<filestorage>\n path {tmp_path}/Data.fs\n</filestorage>"
    factory = parse(text(base=base))
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(OSError):
        factory.open()
    (tmp_path / "cache").unlink()
    storage = factory.open()
    storage.close()


def test_filestorage_is_closed_when_a_source_vanished(text, tmp_path):
    """Between parsing and opening."""
    (tmp_path / "blobs").mkdir()
    base = (
        f"<filestorage>\n path {tmp_path}/Data.fs\n</filestorage>\n"
        f"<blobdir-source>\n path {tmp_path}/blobs\n</blobdir-source>"
    )
    factory = parse(text(base=base))
    (tmp_path / "blobs").rmdir()
    with pytest.raises(ValueError, match="no blob directory"):
        factory.open()
    FileStorage(str(tmp_path / "Data.fs")).close()
    (tmp_path / "blobs").mkdir()
    factory.open().close()


# Opening


@pytest.mark.parametrize("inside", ["{}", "<zlibstorage>\n{}\n</zlibstorage>"])
def test_opened_storage_provides_its_interfaces_and_works(text, tmp_path, s3, inside):
    """What the README shows: a FileStorage, perhaps compressed, whose blobs go to the bucket."""
    base = inside.format(f"<filestorage>\n path {tmp_path}/Data.fs\n</filestorage>")
    section = "%import zc.zlibstorage\n" + text(
        *keys_of(s3), "s3-prefix my/site", base=base, bucket=s3.bucket
    )
    storage = storageFromString(section)
    assert IS3BlobStorage.providedBy(storage) and IBlobStorage.providedBy(storage)
    storage.close()
    database = databaseFromString(section_in_zodb(section))
    connection = database.open()
    connection.root()["blob"] = Blob(b"some bytes")
    transaction.commit()
    with connection.root()["blob"].open() as file:
        assert file.read() == b"some bytes"
    connection.close()
    database.close()
    assert len(keys(s3, "my/site/blobs/")) == 1


def section_in_zodb(section, name=""):
    """Put a storage section into a database section."""
    imports = [line for line in section.splitlines() if line.startswith("%import")]
    rest = [line for line in section.splitlines() if not line.startswith("%import")]
    return "\n".join([*imports, f"<zodb {name}>", *rest, "</zodb>"])


def test_opening_asks_nobody_and_does_not_import_boto3(text, tmp_path):
    """A site starts while S3 is down, and at the speed of FileStorage."""
    base = f"<filestorage>\n path {tmp_path}/Data.fs\n</filestorage>"
    lines = ["s3-access-key key", "s3-secret-key secret"]
    section = text(f"s3-endpoint-url {refused_endpoint()}", *lines, base=base)
    code = f"""
import socket, sys

class NoNetwork(socket.socket):
    def connect(self, address):
        raise AssertionError(f"connects to {{address}}")
    connect_ex = connect

socket.socket = NoNetwork
def refuse(*args, **kwargs):
    raise AssertionError("looks a name up")
socket.getaddrinfo = refuse

from ZODB.config import databaseFromString
import transaction
database = databaseFromString({section_in_zodb(section)!r})
connection = database.open()
connection.root()["key"] = "value"
transaction.commit()
connection.close()
database.close()
print([name for name in ("boto3", "botocore", "s3transfer", "urllib3") if name in sys.modules])
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == "[]", child.stderr


def test_site_serves_what_is_cached_while_s3_is_down(text, tmp_path, s3):
    """What is not cached is unreachable, which is not the same as lost."""
    base = f"<filestorage>\n path {tmp_path}/Data.fs\n</filestorage>"
    section = text(*keys_of(s3), base=base, bucket=s3.bucket)
    database = databaseFromString(section_in_zodb(section))
    connection = database.open()
    for name in ("cached", "evicted"):
        connection.root()[name] = Blob(name.encode())
    transaction.commit()
    blob = connection.root()["evicted"]
    blob._p_activate()
    os.remove(blob.committed())
    connection.close()
    database.close()

    section = text(
        *keys_of(s3)[1:],
        f"s3-endpoint-url {refused_endpoint()}",
        "s3-max-attempts 1",
        base=base,
        bucket=s3.bucket,
    )
    database = databaseFromString(section_in_zodb(section))
    root = database.open().root()
    with root["cached"].open() as file:
        assert file.read() == b"cached"
    with pytest.raises(TransientS3Error) as caught:
        root["evicted"].open()
    assert not isinstance(caught.value, POSKeyError)
    transaction.abort()
    database.close()


@pytest.mark.parametrize("layout", ["bushy", "lawn"])
@pytest.mark.parametrize("named", [False, True])
def test_site_with_an_old_blob_directory_switches_at_once(text, tmp_path, s3, layout, named):
    """Old blobs are read from <blobdir-source>, new ones go to the bucket; it is not written."""
    FileStorage(str(tmp_path / "Data.fs")).close()  # which would remove the directory
    FilesystemHelper(str(tmp_path / "blobs"), layout).create()
    old = databaseFromString(f"<zodb>\n{with_blob_dir(tmp_path)}\n</zodb>")
    connection = old.open()
    connection.root()["old"] = Blob(b"old bytes")
    transaction.commit()
    connection.close()
    old.close()
    before = sorted(os.walk(tmp_path / "blobs"))

    base = (
        f"<filestorage>\n path {tmp_path}/Data.fs\n</filestorage>\n"
        f"<blobdir-source>\n path {tmp_path}/blobs\n{f'layout {layout}' if named else ''}\n"
        "</blobdir-source>"
    )
    section = text(*keys_of(s3), base=base, bucket=s3.bucket)
    database = databaseFromString(section_in_zodb(section))
    connection = database.open()
    with connection.root()["old"].open() as file:
        assert file.read() == b"old bytes"
    connection.root()["new"] = Blob(b"new bytes")
    with connection.root()["old"].open("a") as file:
        file.write(b", changed")
    transaction.commit()
    with connection.root()["old"].open() as file:
        assert file.read() == b"old bytes, changed"
    connection.close()
    database.close()
    assert len(keys(s3)) == 2
    assert sorted(os.walk(tmp_path / "blobs")) == before


@pytest.mark.parametrize(
    ("lines", "reason"),
    [("path /nowhere/blobs", "no directory"), ("path /\nlayout shrub", "automatic, bushy, lawn")],
)
def test_wrong_source_is_refused_with_its_line(text, lines, reason):
    """A mistyped directory would look like lost blobs."""
    base = f"<mappingstorage>\n</mappingstorage>\n<blobdir-source>\n{lines}\n</blobdir-source>"
    with pytest.raises(ZConfig.DataConversionError, match=reason) as caught:
        parse(text(base=base))
    assert caught.value.lineno


def test_several_databases_share_a_bucket_and_nothing_else(text, tmp_path, s3):
    """Each has its prefix and its cache directory; the same oid is two blobs."""
    sections = []
    for name in ("main", "archive"):
        base = f"<filestorage>\n path {tmp_path}/{name}.fs\n</filestorage>"
        sections.append(
            section_in_zodb(
                text(
                    *keys_of(s3),
                    f"s3-prefix {name}",
                    base=base,
                    bucket=s3.bucket,
                    cache=f"cache-{name}",
                ),
                name,
            )
        )
    config, _ = ZConfig.loadConfigFile(getDbSchema(), io.StringIO("\n".join(sections)))
    databases = {}
    for factory in config.database:
        factory.open(databases)
    assert sorted(databases) == ["archive", "main"]
    connection = databases["main"].open()
    for name in databases:
        connection.get_connection(name).root()["blob"] = Blob(name.encode())
    transaction.commit()
    for name in databases:
        with connection.get_connection(name).root()["blob"].open() as file:
            assert file.read() == name.encode()
        assert len(keys(s3, f"{name}/blobs/")) == 1
    connection.close()
    for database in databases.values():
        database.close()


def test_repr_of_what_was_opened_has_no_secret(text):
    """Neither the storage nor the client nor the factory."""
    factory = parse(text("s3-access-key key", "s3-secret-key hunter2"))
    storage = factory.open()
    assert "hunter2" not in repr(storage) + repr(factory) + str(vars(factory))
    storage.close()


@pytest.mark.parametrize("name", ["GLACIER", "deep_archive"])
def test_archive_class_is_refused(text, name):
    """Its objects cannot be read at once."""
    with pytest.raises(ZConfig.DataConversionError, match="restore request"):
        parse(text(f"s3-storage-class {name}"))


def test_profile_beside_keys_is_refused(text):
    """boto3 would ignore one of them."""
    with pytest.raises(ZConfig.DataConversionError, match="s3-profile"):
        parse(text("s3-profile site", "s3-access-key a", "s3-secret-key b"))


def test_source_in_the_cache_directory_is_refused(text, tmp_path):
    """Files of one would be taken for files of the other."""
    (tmp_path / "cache").mkdir()
    source = f"<blobdir-source>\n path {tmp_path}/cache\n</blobdir-source>"
    with pytest.raises(ZConfig.DataConversionError, match="apart from each other"):
        parse(text(base=f"<mappingstorage>\n</mappingstorage>\n{source}"))


def test_cache_directory_that_is_a_file_is_refused_with_its_line(text, tmp_path):
    """As every mistake that can be seen while parsing."""
    (tmp_path / "cache").write_text("")
    with pytest.raises(ZConfig.DataConversionError, match=r"no directory.*line"):
        parse(text())


def test_home_directory_is_expanded(text, tmp_path, monkeypatch):
    """As the shell does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(text().replace(str(tmp_path), "~")).config.cache_dir == str(tmp_path / "cache")


def test_second_database_under_one_prefix_is_refused(text, tmp_path):
    """Each would pack away what is the other's; the first, opened again, is no other."""
    bases = [f"<filestorage>\n path {tmp_path}/{name}.fs\n</filestorage>" for name in "ab"]
    first = parse(text(base=bases[0])).open()
    second = parse(text(base=bases[1], cache="other"))
    with pytest.raises(ValueError, match="s3-prefix of its own"):
        second.open()
    parse(text("s3-prefix own", base=bases[1], cache="other")).open().close()
    first.close()
    second.open().close()
    parse(text(base=bases[0])).open().close()
