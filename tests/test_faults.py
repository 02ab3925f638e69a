"""Each fault of network, server and bucket, as a user of ZODB meets it; FAULTS.rst lists them.

What is shown at this level elsewhere is not shown here again: a disk that is full
(test_cache_trouble, test_spooling), whole outages (test_outage), processes that are killed.
"""

import ast
from contextlib import contextmanager
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field
from dataclasses import replace
from functools import cache
from functools import partial
from pathlib import Path
import re
import socket
import struct
import threading
import time

import pytest
from transaction.interfaces import TransientError
from ZODB.blob import Blob
from ZODB.Connection import TransactionMetaData

from zodb_s3blobs import blobs
from zodb_s3blobs import breaker
from zodb_s3blobs import commit
from zodb_s3blobs.interfaces import IntegrityError
from zodb_s3blobs.interfaces import PermanentS3Error
from zodb_s3blobs.interfaces import TransientS3Error
from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference

from .faults import Answer
from .faults import FaultyServer
from .faults import s3_error
from .relstorages import Database
from .relstorages import wait_until
from .services.location import boto3_client
from .services.location import keys
from .storages import leftovers
from .storages import load
from .storages import open_db
from .storages import PATIENCE
from .storages import random_bytes
from .storages import read
from .storages import start
from .storages import store_blob


MiB = 1 << 20
# More than the buffers between two sockets of a host hold
LARGE = 8 * MiB
# More than a request or an answer has before its body
HEAD = 4096
NAME = "s3.test"
REPOSITORY = Path(__file__).parents[1]
TABLE = REPOSITORY / "FAULTS.rst"

QUICK = {"s3_connect_timeout": "1s", "s3_read_timeout": "1s", "s3_max_attempts": "1"}
# Seconds that one attempt takes by these
ATTEMPT = 2
# Requests of a commit that a fault may meet: the upload, and the deletion of the abort; a download
# is tried three times when its body fails.
TURNS = 3
# Seconds for what a busy machine does besides
SLACK = 10
# For what hangs
SHORTER = {"s3_connect_timeout": "500ms", "s3_read_timeout": "500ms"}
IN_PARTS = {"s3_multipart_threshold": "5MB", "s3_multipart_part_size": "5MB"}

CACHED = b"cached"
UNCACHED = random_bytes("uncached", MiB)


# The way to S3


class Link:
    """One connection, and what has passed since the head of its last request."""

    def __init__(self, client, server):
        self.ends = client, server
        self.method = ""
        self.passed = {"up": 0, "down": 0}

    def cut(self):
        """Reset the connection at both ends, as when a host between them goes down."""
        for end in self.ends:
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        for end in self.ends:
            end.close()


class Wire:
    """Passes on what comes to one port, until a test breaks it.

    :param str upstream: URL of the server.
    :ivar treat: called with the link, "up" or "down", and each chunk; yields what goes on, or
        raises ConnectionError.
    :ivar reached: set when something has met a fault.
    """

    def __init__(self, upstream):
        self._upstream = self.target = upstream
        self._links = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._address = self._listener.getsockname()
        self.port = self._address[1]
        self.reached = threading.Event()
        self.healed = threading.Event()
        self.treat = None
        self._listen()

    def _listen(self):
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def refuse(self):
        """Let nobody listen."""
        self._stop_listening()
        self.cut()

    def _stop_listening(self):
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def cut(self):
        """Cut all connections that there are."""
        for link in list(self._links):
            link.cut()

    def begin(self, treat):
        """Treat what passes from now on."""
        self.cut()
        self.treat = treat

    def heal(self):
        """Pass on everything again; what was held is dropped."""
        self.healed.set()
        self.treat = None
        self.target = self._upstream
        if self._listener.fileno() == -1:
            self._listener = socket.create_server(self._address)
            self._listen()
        self.cut()

    def close(self):
        self.healed.set()
        self._stop_listening()
        self.cut()

    def _accept(self, listener):
        while True:
            try:
                client, _address = listener.accept()
            except OSError:
                return
            host, _, port = self.target.rpartition("/")[2].partition(":")
            try:
                server = socket.create_connection((host, int(port)))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._serve, args=(Link(client, server),), daemon=True).start()

    def _serve(self, link):
        client, server = link.ends
        self._links.add(link)
        back = threading.Thread(target=self._pass_on, args=(link, server, client, "down"))
        back.daemon = True
        back.start()
        self._pass_on(link, client, server, "up")
        back.join()
        self._links.discard(link)
        link.close()

    def _pass_on(self, link, source, target, way):
        try:
            while chunk := source.recv(1 << 16):
                head = re.match(rb"(GET|HEAD|PUT|POST|DELETE) /", chunk)
                if way == "up" and head:
                    link.method = head[1].decode()
                    link.passed = {"up": 0, "down": 0}
                link.passed[way] += len(chunk)
                treat = self.treat
                for piece in treat(link, way, chunk) if treat else (chunk,):
                    target.sendall(piece)
        except OSError:
            pass  # one end is gone, or shall be
        link.cut()


class Network:
    """How a site reaches its bucket, and what a `Fault` does to that.

    :ivar behind: the bucket's `S3Location` for those who look past it.
    """

    def __init__(self, location, server, monkeypatch):
        self.behind = location
        self.wire = Wire(location.endpoint_url)
        self._server = server
        self._resolves = True
        look_up = socket.getaddrinfo

        def getaddrinfo(host, *args, **kw):
            if host == NAME and not self._resolves:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return look_up("127.0.0.1" if host == NAME else host, *args, **kw)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    @property
    def location(self):
        """The bucket as a site sees it."""
        return replace(self.behind, endpoint_url=f"http://{NAME}:{self.wire.port}")

    def forget_name(self):
        self._resolves = False
        self.wire.cut()

    def refuse(self):
        self.wire.refuse()

    def answer(self, instead):
        """Let a server answer that knows better than to pass on each request."""
        self._server.instead = instead
        self.wire.target = self._server.endpoint_url
        self.wire.cut()

    def change(self, change):
        """Let a server change the answers from behind."""
        self._server.change = change
        self.answer(lambda request: None)

    def heal(self):
        self._resolves = True
        self.wire.heal()


# Faults


def forget_name(network):
    network.forget_name()


def refuse(network):
    network.refuse()


def _meets(link, way, method, after):
    return link.method == method and link.passed[way] > after


def cut(network, way, method, after=0, times=None):
    """Cut a connection when so many bytes of a request, or its answer, have passed."""
    left = [times]

    def treat(link, met_way, chunk):
        if met_way == way and _meets(link, way, method, after) and left[0] != 0:
            left[0] = left[0] and left[0] - 1
            raise ConnectionError("cut by the test")
        yield chunk

    network.wire.begin(treat)


def stall(network, way, method, after=0):
    """Pass nothing on any more when so many bytes have passed, and keep the connection."""
    wire = network.wire

    def treat(link, met_way, chunk):
        if met_way == way and (not method or _meets(link, way, method, after)):
            wire.reached.set()
            wire.healed.wait(4 * PATIENCE)
            raise ConnectionError("healed")
        yield chunk

    wire.begin(treat)


def trickle(network, way, method, piece, seconds):
    """Pass on the head of a request, or an answer, and then a little now and then."""
    wire = network.wire

    def treat(link, met_way, chunk):
        if met_way != way or link.method != method:
            yield chunk
            return
        wire.reached.set()
        yield chunk[:HEAD]
        for position in range(HEAD, len(chunk), piece):
            yield chunk[position : position + piece]
            if wire.healed.wait(seconds):
                raise ConnectionError("healed")

    wire.begin(treat)


def answer(network, status, code, times=None):
    """Answer each request with an error, or the first ones."""
    left = [times]

    def instead(request):
        if left[0] == 0:
            return None
        left[0] = left[0] and left[0] - 1
        return s3_error(status, code)

    network.answer(instead)


PAGE = Answer(200, [("Content-Type", "text/html")], b"<html><h1>Back soon</h1></html>")


def send_page(network):
    """Answer each request as a proxy in maintenance does."""
    network.answer(lambda request: replace(PAGE))


def lose_answer(network):
    """Let uploads happen, and nobody learn of it."""

    def change(request, answer):
        if request.method == "PUT":
            raise ConnectionError("lost by the test")

    network.change(change)


def truncate(network):
    """End the body of each object early, and say so nowhere but in the stored size."""

    def change(request, answer):
        if request.kind == "GET":
            answer.body = answer.body[:-1]

    network.change(change)


@dataclass
class Fault:
    """What happens, and what a user sees.

    :param begin: called with the `Network`.
    :param type kind: of the error that a commit or a read raises.
    :param str says: a pattern that its text has, for what an operator must mend.
    :param int size: of the blob that is committed, large where the middle of it matters.
    """

    begin: object
    kind: type = TransientS3Error
    says: str = ""
    size: int = 1000
    options: dict = field(default_factory=dict)


EVERYWHERE = {
    "DNS failure": Fault(forget_name),
    "refused connection": Fault(refuse),
    "no answer": Fault(partial(stall, way="up", method=""), options=SHORTER),
    "500 storm": Fault(partial(answer, status=500, code="InternalError")),
    "503 storm": Fault(partial(answer, status=503, code="SlowDown")),
    "403": Fault(
        partial(answer, status=403, code="AccessDenied"), PermanentS3Error, "grant s3:(Put|Get)Obj"
    ),
    "missing bucket": Fault(
        partial(answer, status=404, code="NoSuchBucket"), PermanentS3Error, "bucket-name"
    ),
    "wrong region": Fault(
        partial(answer, status=400, code="AuthorizationHeaderMalformed"),
        PermanentS3Error,
        "s3-region",
    ),
    "expired token": Fault(partial(answer, status=400, code="ExpiredToken")),
    "clock skew": Fault(
        partial(answer, status=403, code="RequestTimeTooSkewed"), PermanentS3Error, "clock"
    ),
    "page of a proxy": Fault(send_page),
}
OF_UPLOADS = {
    "cut in mid-upload": Fault(partial(cut, way="up", method="PUT", after=MiB), size=LARGE),
    "cut in mid-upload of parts": Fault(
        partial(cut, way="up", method="PUT", after=MiB), size=LARGE, options=IN_PARTS
    ),
    "stalled upload": Fault(
        partial(stall, way="up", method="PUT", after=MiB), size=LARGE, options=SHORTER
    ),
    "stalled upload of parts": Fault(
        partial(stall, way="up", method="PUT", after=MiB),
        size=LARGE,
        options={**SHORTER, **IN_PARTS},
    ),
    "no answer to an upload": Fault(partial(stall, way="down", method="PUT"), options=SHORTER),
    "lost answer to an upload": Fault(lose_answer),
}
OF_DOWNLOADS = {
    "cut in mid-download": Fault(partial(cut, way="down", method="GET", after=MiB // 2)),
    "stalled download": Fault(
        partial(stall, way="down", method="GET", after=MiB // 2), options=SHORTER
    ),
    "trickling download": Fault(
        # Nearly from the beginning: what has come fast counts for what comes slowly.
        partial(trickle, way="down", method="GET", piece=1, seconds=0.02)
    ),
    "truncated on the way": Fault(truncate, IntegrityError),
}
IN_A_COMMIT = {**EVERYWHERE, **OF_UPLOADS}
SHORT = {
    "500 storm": partial(answer, status=500, code="InternalError", times=2),
    "503 storm": partial(answer, status=503, code="SlowDown", times=2),
    "upload cut once": partial(cut, way="up", method="PUT", times=1),
    "download cut once": partial(cut, way="down", method="GET", after=MiB // 2, times=1),
}


def table(faults, *kinds):
    """Parametrize a test by faults, each over one or several kinds of storage."""
    return [
        pytest.param(kind, fault, id=f"{kind}-{name}")
        for name, fault in faults.items()
        for kind in kinds
    ]


# A site


@pytest.fixture
def network(s3, monkeypatch):
    """A `Network` before a bucket."""
    # So that a test need not wait for a second until S3 is asked again.
    monkeypatch.setattr(breaker, "FIRST_PAUSE", 0.1)
    with FaultyServer(s3.endpoint_url) as server:
        network = Network(s3, server, monkeypatch)
        yield network
        network.wire.close()


@pytest.fixture
def at_once(monkeypatch):
    """boto3 tries again without a pause."""
    backoff = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(backoff, lambda self, context: 0)


class Site:
    """A database of one kind of storage: "tid", "record" or "relstorage"."""

    def __init__(self, kind, network, directory, **options):
        self._kind = kind
        self._network = network
        self._directory = directory
        self._options = {**QUICK, "gc_grace": "0s", **options}
        self.db = None

    def open(self, cache="cache"):
        """Open it; another name of the cache is an empty one."""
        self.close()
        options = {"cache": cache, **self._options}
        if self._kind == "relstorage":
            place = self._directory / "sqlite3"
            place.mkdir(exist_ok=True)
            options["base"] = Database("sqlite3", str(place), True).section
            options["imports"] = ("relstorage",)
        else:
            options["addressing"] = self._kind
        self.db = open_db(self._network.location, self._directory, **options)

    def close(self):
        if self.db is not None:
            self.db.close()
        self.db = None

    def commit(self, **objects):
        """Commit values below the root; bytes are those of blobs, be they new or not."""
        with self.db.transaction() as conn:
            root = conn.root()
            for name, value in objects.items():
                if isinstance(value, bytes) and name in root:
                    with root[name].open("w") as file:
                        file.write(value)
                else:
                    root[name] = Blob(value) if isinstance(value, bytes) else value

    def read(self, *names):
        """Return the values below the root, all of them if none is named."""
        with self.db.transaction() as conn:
            root = conn.root()
            values = {name: root[name] for name in names or root}
            return {
                name: read(value) if isinstance(value, Blob) else value
                for name, value in values.items()
            }

    def state(self):
        """Return what changes with each transaction."""
        with self.db.transaction() as conn:
            return self.db.lastTransaction(), conn.root()._p_serial, sorted(conn.root())

    def is_cached(self, name):
        with self.db.transaction() as conn:
            return blobs.is_cached(conn.root()[name])

    def check_bucket(self):
        """After a pack each blob has its object, and there is no other."""
        self.db.pack(time.time() + 1)
        with self.db.transaction() as conn:
            expected = [
                self._key(value) for value in conn.root().values() if isinstance(value, Blob)
            ]
        assert keys(self._network.behind) == sorted(expected)

    def key(self, name):
        """Return the key of a blob below the root."""
        with self.db.transaction() as conn:
            return self._key(conn.root()[name])

    def _key(self, blob):
        blob._p_activate()
        oid, tid = blob._p_oid, blob._p_serial
        return blob_key(oid, read_reference(self.db.storage.loadSerial(oid, tid)) or tid)


@pytest.fixture
def open_site(network, tmp_path):
    """Return a function that makes a `Site` with a cached blob and another one, and opens it."""
    sites = []

    def open_site(kind, **options):
        site = Site(kind, network, tmp_path, **options)
        sites.append(site)
        site.open("seed")
        insist(site.commit, uncached=UNCACHED)
        site.open()
        insist(site.commit, cached=CACHED, count=1)
        return site

    yield open_site
    network.heal()
    for site in sites:
        site.close()


def insist(call, *args, **kw):
    """Try as Zope does until it succeeds; S3 is back, and the site notices soon."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return call(*args, **kw)
        except TransientError:
            assert time.monotonic() < deadline, "it does not come back"
            time.sleep(0.05)


@contextmanager
def within(seconds):
    """Fail what takes longer."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def beside(site, call, *args, seconds=PATIENCE, **kw):
    """Call in a thread while the cached blob is read again and again; return the error.

    :param float seconds: within which it ends.
    """
    thread = start(partial(call, *args, **kw))
    deadline = time.monotonic() + seconds
    running = True
    while running:
        assert time.monotonic() < deadline, "it does not end"
        running = thread.is_alive()
        assert site.read("cached") == {"cached": CACHED}
        thread.join(0.02)
    try:
        thread.result()
    except Exception as error:
        return error
    return None


def check_error(error, fault):
    """It says whether to try again, and what to do."""
    assert type(error) is fault.kind, repr(error)
    assert isinstance(error, TransientError) == (fault.kind is TransientS3Error)
    assert not isinstance(error, KeyError)
    assert re.search(fault.says, str(error))


SOME = "refused connection", "403", "no answer to an upload"


class TestCommit:
    @pytest.mark.parametrize(
        ("kind", "fault"),
        [
            *table(IN_A_COMMIT, "tid", "record"),
            *table({name: IN_A_COMMIT[name] for name in SOME}, "relstorage"),
        ],
    )
    def test_fails_as_a_whole_and_succeeds_when_the_fault_has_gone(
        self, network, open_site, kind, fault
    ):
        """In bounded time, without a trace or a restart; what is cached is read throughout."""
        site = open_site(kind, **fault.options)
        changes = {"new": random_bytes("new", fault.size), "uncached": b"changed", "count": 2}
        before = site.state()
        fault.begin(network)
        bound = TURNS * ATTEMPT + commit.ABORT_TIMEOUT + SLACK
        error = beside(site, site.commit, seconds=bound, **changes)
        check_error(error, fault)
        assert site.state() == before
        # Where S3 hangs, the abort may go on for a while.
        wait_until(lambda: leftovers(site.db.storage) == [])
        site.commit(plain="records need no S3")
        network.heal()
        insist(site.commit, **changes)
        everything = {**changes, "cached": CACHED, "plain": "records need no S3"}
        assert site.read() == everything
        insist(site.check_bucket)
        site.open("cold")
        assert site.read() == everything
        assert leftovers(site.db.storage) == []


class TestRead:
    @pytest.mark.parametrize(
        ("kind", "fault"),
        [
            *table({**EVERYWHERE, **OF_DOWNLOADS}, "tid"),
            *table({name: OF_DOWNLOADS[name] for name in ("cut in mid-download",)}, "record"),
            *table({name: EVERYWHERE[name] for name in ("DNS failure", "403")}, "relstorage"),
        ],
    )
    def test_fails_and_succeeds_when_the_fault_has_gone(self, network, open_site, kind, fault):
        """In bounded time, never as a lost blob; nothing enters the cache, and that is served."""
        site = open_site(kind, **fault.options)
        fault.begin(network)
        error = beside(site, site.read, "uncached", seconds=TURNS * ATTEMPT + SLACK)
        check_error(error, fault)
        assert not site.is_cached("uncached")
        assert leftovers(site.db.storage) == []
        network.heal()
        assert insist(site.read, "uncached") == {"uncached": UNCACHED}
        assert site.is_cached("uncached")


class TestShort:
    @pytest.mark.parametrize(
        ("kind", "begin"),
        [*table(SHORT, "tid"), *table({"503 storm": SHORT["503 storm"]}, "record")],
    )
    def test_costs_time_and_nothing_else(self, network, open_site, at_once, kind, begin):
        """What is over before the attempts are is seen by nobody, be it a commit or a read."""
        site = open_site(kind, s3_max_attempts="3")
        changes = {"new": random_bytes("new", 1000), "cached": b"changed"}
        begin(network)
        site.commit(**changes)
        begin(network)
        assert site.read("uncached") == {"uncached": UNCACHED}
        assert site.read("new", "cached") == changes
        network.heal()
        site.check_bucket()


def begun(storage):
    """Return a transaction that has begun."""
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    return txn


class TestBounds:
    @pytest.mark.parametrize("kind", ["tid", "record"])
    @pytest.mark.parametrize(
        ("size", "hang"),
        [
            pytest.param(1000, partial(stall, way="down", method="PUT"), id="stored"),
            pytest.param(LARGE, partial(stall, way="up", method="PUT", after=MiB), id="half"),
        ],
    )
    def test_abort_while_an_upload_hangs_ends(
        self, network, open_site, monkeypatch, kind, size, hang
    ):
        """Within ten seconds, whatever the time-outs are; the next commit does not wait for it."""
        assert commit.ABORT_TIMEOUT <= 10
        monkeypatch.setattr(commit, "ABORT_TIMEOUT", 0.5)
        long = {"s3_connect_timeout": "60s", "s3_read_timeout": "60s"}
        site = open_site(kind, **long)
        before = site.state()
        hang(network)
        storage = site.db.storage
        txn = begun(storage)
        store_blob(storage, txn, storage.new_oid(), random_bytes("hangs", size))
        assert network.wire.reached.wait(PATIENCE)
        with within(0.5 + SLACK):
            storage.tpc_abort(txn)
            assert site.state() == before
            site.commit(plain="records need no S3")
        assert site.read("cached") == {"cached": CACHED}
        network.heal()
        wait_until(lambda: leftovers(storage) == [])
        insist(site.commit, new=b"new")
        insist(site.check_bucket)

    @pytest.mark.parametrize("kind", ["tid", "record"])
    def test_second_store_of_an_object_while_the_first_hangs_ends(self, network, open_site, kind):
        """By the time-outs of the first; the vote fails, and a retry commits the last bytes."""
        site = open_site(kind, s3_max_attempts="2")
        before = site.state()
        storage = site.db.storage
        oid = storage.new_oid()
        stall(network, way="up", method="PUT")
        txn = begun(storage)
        store_blob(storage, txn, oid, b"first")
        assert network.wire.reached.wait(PATIENCE)
        with within(2 * ATTEMPT + SLACK):
            store_blob(storage, txn, oid, b"second")
        with within(2 * ATTEMPT + SLACK), pytest.raises(TransientS3Error):
            storage.tpc_vote(txn)
        with within(commit.ABORT_TIMEOUT + SLACK):
            storage.tpc_abort(txn)
        assert site.state() == before
        assert leftovers(storage) == []
        network.heal()

        def commit_twice():
            txn = begun(storage)
            try:
                store_blob(storage, txn, oid, b"first")
                store_blob(storage, txn, oid, b"second")
                storage.tpc_vote(txn)
                return storage.tpc_finish(txn)
            except TransientError:
                storage.tpc_abort(txn)
                raise

        assert load(storage, oid, insist(commit_twice)) == b"second"
        # The root does not know the object.
        insist(site.check_bucket)

    @pytest.mark.parametrize(
        ("options", "rate", "patience"),
        [
            pytest.param({}, "s3client.SLOWEST_RATE", None, id="one request"),
            pytest.param(
                {**IN_PARTS, "s3_read_timeout": "20s"}, "uploading.SLOWEST_RATE", 1, id="parts"
            ),
        ],
    )
    def test_commit_whose_upload_trickles_ends(
        self, network, open_site, monkeypatch, options, rate, patience
    ):
        """Though each step is within its time-out: the whole is bounded by the blob's size."""
        monkeypatch.setattr(f"zodb_s3blobs.{rate}", LARGE)
        monkeypatch.setattr(commit, "ABORT_TIMEOUT", 0.5)
        if patience:
            monkeypatch.setattr("zodb_s3blobs.uploading.UPLOAD_PATIENCE", patience)
        site = open_site("record", s3_connect_timeout="20s", **options)
        before = site.state()
        trickle(network, way="up", method="PUT", piece=1 << 14, seconds=0.05)
        error = beside(site, site.commit, seconds=3 + SLACK, new=random_bytes("new", 2 * LARGE))
        assert type(error) is TransientS3Error
        assert site.state() == before
        network.heal()
        wait_until(lambda: leftovers(site.db.storage) == [])
        insist(site.commit, new=b"new")
        insist(site.check_bucket)


# What lies in the bucket


class Object:
    """An object, past the site; `data` and `metadata` are as it was found."""

    def __init__(self, location, key):
        self._location = location
        self.key = key
        client = boto3_client(location)
        answer = client.get_object(Bucket=location.bucket, Key=key)
        self.data, self.metadata = answer["Body"].read(), answer["Metadata"]
        client.close()

    def put(self, data, metadata):
        """Put other bytes and metadata in its place."""
        client = boto3_client(self._location)
        client.put_object(Bucket=self._location.bucket, Key=self.key, Body=data, Metadata=metadata)
        client.close()

    def put_back(self):
        self.put(self.data, self.metadata)


@pytest.fixture
def stored(network, open_site, tmp_path):
    """Return a function that gives a site with blobs "one" and "two", and their objects."""

    def stored(kind):
        site = open_site(kind)
        site.commit(one=ONE, two=TWO)
        site.open("cold")
        assert site.read("cached") == {"cached": CACHED}
        return site, [Object(network.behind, site.key(name)) for name in ("one", "two")]

    return stored


ONE, TWO = random_bytes("one", 1000), random_bytes("two", 1000)


class TestObjects:
    @pytest.mark.parametrize(
        ("kind", "spoil"),
        table(
            {
                "truncated object": lambda data: data[:-1],
                "object without bytes": lambda data: b"",
                "object with more bytes": lambda data: data + b"!",
                "replaced object": lambda data: random_bytes("other", len(data)),
            },
            "tid",
            "record",
        ),
    )
    def test_other_bytes_are_an_error_until_they_are_put_right(self, stored, kind, spoil):
        """They never reach a reader or the cache; other blobs are read and committed."""
        site, (one, _two) = stored(kind)
        one.put(spoil(one.data), one.metadata)
        error = beside(site, site.read, "one")
        assert type(error) is IntegrityError
        assert error.key == one.key
        assert not site.is_cached("one")
        assert leftovers(site.db.storage) == []
        site.commit(new=b"new")
        assert site.read("two", "new") == {"two": TWO, "new": b"new"}
        one.put_back()
        assert site.read("one") == {"one": ONE}

    @pytest.mark.parametrize("kind", ["tid", "record", "relstorage"])
    def test_swapped_objects_are_errors_until_they_are_put_right(self, stored, kind):
        """An object says whose it is, so that whole and proper bytes of another are refused."""
        site, objects = stored(kind)
        one, two = objects
        one.put(two.data, two.metadata)
        two.put(one.data, one.metadata)
        for name in ("one", "two"):
            error = beside(site, site.read, name)
            assert type(error) is IntegrityError
            assert not site.is_cached(name)
        assert leftovers(site.db.storage) == []
        for each in objects:
            each.put_back()
        assert site.read("one", "two") == {"one": ONE, "two": TWO}

    @pytest.mark.parametrize("kind", ["tid", "record"])
    def test_objects_of_the_older_package_are_taken_as_they_are(self, stored, kind):
        """They carry neither digest nor name: swapped or cut in the bucket, nobody can tell."""
        site, (one, two) = stored(kind)
        one.put(two.data, {})
        two.put(one.data[:-1], {})
        assert site.read("one", "two") == {"one": TWO, "two": ONE[:-1]}

    def test_object_of_the_older_package_that_is_cut_on_its_way_is_noticed(self, network, stored):
        """The answer says how long it is."""
        site, (one, _two) = stored("tid")
        one.put(UNCACHED, {})
        fault = OF_DOWNLOADS["cut in mid-download"]
        fault.begin(network)
        check_error(beside(site, site.read, "one"), fault)
        assert not site.is_cached("one")
        network.heal()
        assert insist(site.read, "one") == {"one": UNCACHED}


# The table


@pytest.fixture(scope="module")
def text():
    """What FAULTS.rst says."""
    return TABLE.read_text()


@cache
def parsed(path):
    """Return the names of the tests of a file, and all texts that stand in it."""
    tree = ast.parse(path.read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    names = set()
    for node in tree.body:
        inner = [(node, "")]
        if isinstance(node, ast.ClassDef):
            inner = [(each, f"{node.name}::") for each in node.body]
        names |= {
            f"{prefix}{each.name}" for each, prefix in inner if isinstance(each, ast.FunctionDef)
        }
    return names, texts


class TestTable:
    def test_names_tests_that_exist(self, text):
        """And, in brackets, cases of theirs."""
        found = re.findall(r"``(test_\w+\.py)::([\w:]+)(?:\[([^]`]+)\])?``", text)
        assert len(found) == len(re.findall(r"\btest_\w+\.py", text)) > 40
        for file, name, case in found:
            names, texts = parsed(REPOSITORY / "tests" / file)
            assert name in names, f"{file}::{name}"
            assert not case or case in texts, f"{file}::{name}[{case}]"

    def test_has_a_test_in_each_row(self, text):
        """Four cells: the fault, what is seen, what is guaranteed, and by which test."""
        _, *rows = re.split(r"\n   \* - ", text)
        for row in rows:
            cells = re.split(r"\n     - ", row)
            assert len(cells) == 4, row
            assert cells[3] == "Test" or "``test_" in cells[3], row

    def test_has_each_fault_of_this_file(self, text):
        """What is tested here is told to operators."""
        assert {*IN_A_COMMIT, *OF_DOWNLOADS} <= set(re.findall(r"\[([^]`]+)\]``", text))
