"""S3 is down: the site starts, serves what is cached, says "try again", and recovers by itself."""

import time

import pytest
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.POSException import POSKeyError

from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.testing.server import EmbeddedS3

from .services.location import keys
from .services.location import new_bucket
from .services.process import ServiceMissing
from .storages import leftovers
from .storages import open_db
from .storages import PATIENCE
from .storages import read
from .storages import start
from .storages import TcpProxy
from .storages import until_s3_is_back


# One attempt: an outage is then as quick as a refused connection.
QUICK = {"s3_max_attempts": "1", "s3_connect_timeout": "2s", "s3_read_timeout": "1s"}


@pytest.fixture
def server(rclone, tmp_path):
    """A server of this test's own, which it may stop; `rclone` skips where there is none."""
    (tmp_path / "server").mkdir()
    try:
        with EmbeddedS3(tmp_path / "server") as server:
            yield server
    except ServiceMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def site(server, tmp_path):
    """(bucket, directory) of a site with a cached and an uncached blob."""
    location = new_bucket(server)
    db = open_db(location, tmp_path)
    with db.transaction() as conn:
        conn.root()["uncached"] = Blob(b"uncached")
    db.close()
    (tmp_path / "cache").rename(tmp_path / "away")
    db = open_db(location, tmp_path)
    with db.transaction() as conn:
        conn.root()["cached"] = Blob(b"cached")
    db.close()
    return location, tmp_path


def check_outage(db):
    """What works without S3, works; what does not, says so in a way that is retried."""
    before = db.lastTransaction()
    with db.transaction() as conn:
        assert read(conn.root()["cached"]) == b"cached"
        with pytest.raises(TransientS3Error) as caught:
            read(conn.root()["uncached"])
        assert not isinstance(caught.value, (POSKeyError, KeyError))
        assert caught.value.operation == "download"
        with pytest.raises(TransientS3Error):
            conn.root()["uncached"].open("r+")
    with pytest.raises(TransientError), db.transaction() as conn:
        conn.root()["refused"] = Blob(b"refused")
    assert db.lastTransaction() == before
    assert leftovers(db.storage) == []
    with db.transaction() as conn:
        assert "refused" not in conn.root()
        conn.root()["plain"] = "records need no S3"
    with db.transaction() as conn:
        assert conn.root()["plain"]


def check_recovery(db, location):
    """Everything works again, in the same process."""
    until_s3_is_back(db.storage)
    with db.transaction() as conn:
        assert read(conn.root()["uncached"]) == b"uncached"
        conn.root()["refused"] = Blob(b"accepted")
        with conn.root()["cached"].open("a") as file:
            file.write(b", changed")
    db.pack(time.time() + 1)
    assert len(keys(location)) == 3
    with db.transaction() as conn:
        assert read(conn.root()["refused"]) == b"accepted"
        assert read(conn.root()["cached"]) == b"cached, changed"
        assert read(conn.root()["uncached"]) == b"uncached"


def test_site_that_starts_during_an_outage_serves_its_cache_and_recovers(server, site):
    """Opening needs no S3, and no restart is needed when it is back."""
    location, directory = site
    server.stop()
    db = open_db(location, directory, **QUICK)
    check_outage(db)
    server.start()
    check_recovery(db, location)
    db.close()


def test_site_that_loses_s3_while_it_runs_serves_its_cache_and_recovers(server, site):
    """Connections that were open before the outage are no hindrance after it."""
    location, directory = site
    db = open_db(location, directory, **QUICK)
    db.storage.sweep(dry_run=True)
    for _ in range(2):
        server.stop()
        check_outage(db)
        server.start()
        until_s3_is_back(db.storage)
    check_recovery(db, location)
    db.close()


def test_short_outage_is_survived_by_the_default_retries(server, site):
    """With the settings of a site that sets none, a restart of S3 costs time, no error."""
    location, directory = site
    db = open_db(location, directory)
    server.stop()

    def read_uncached():
        with db.transaction() as conn:
            return read(conn.root()["uncached"])

    reader = start(read_uncached)
    reader.join(0.05)
    server.start()
    assert reader.result() == b"uncached"
    db.close()


def test_server_that_hangs_is_an_outage_after_the_time_out(server, site):
    """No wait without a bound: an answer that does not come is no answer."""
    location, directory = site
    with TcpProxy(location.endpoint_url) as proxy:
        db = open_db(proxy.location(location), directory, **QUICK)
        proxy.hold(lambda way, chunk: True)
        begin = time.monotonic()
        check_outage(db)
        assert time.monotonic() - begin < PATIENCE
        proxy.release()
        check_recovery(db, location)
        db.close()


def test_cached_reads_do_not_wait_for_a_commit_that_hangs(server, site):
    """While a commit waits for S3, readers of cached blobs and other records go on."""
    location, directory = site
    with TcpProxy(location.endpoint_url) as proxy:
        options = {**QUICK, "s3_read_timeout": "20s"}
        db = open_db(proxy.location(location), directory, **options)
        proxy.hold(lambda way, chunk: True)

        def commit():
            with db.transaction() as conn:
                conn.root()["late"] = Blob(b"late")

        committer = start(commit)
        assert proxy.reached.wait(PATIENCE)
        with db.transaction() as conn:
            assert read(conn.root()["cached"]) == b"cached"
        assert committer.is_alive()
        proxy.release()
        committer.result()
        with db.transaction() as conn:
            assert read(conn.root()["late"]) == b"late"
        db.close()


def test_pack_during_an_outage_fails_and_is_made_up_for_later(server, site):
    """The base is packed, the sweep says what it met, the next pack deletes what is due."""
    location, directory = site
    db = open_db(location, directory, **QUICK)
    with db.transaction() as conn:
        del conn.root()["cached"]
    server.stop()
    with pytest.raises(TransientS3Error):
        db.pack(time.time() + 1)
    server.start()
    assert len(keys(location)) == 2
    until_s3_is_back(db.storage)
    db.pack(time.time() + 1)
    assert len(keys(location)) == 1
    with db.transaction() as conn:
        assert read(conn.root()["uncached"]) == b"uncached"
    db.close()
