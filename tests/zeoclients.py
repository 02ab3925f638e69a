"""One ZEO server and one bucket that several clients share, most of them processes."""

from contextlib import closing
from contextlib import contextmanager
from itertools import count
import subprocess
import zlib

from ZEO.ClientStorage import ClientStorage
from ZODB.blob import is_blob_record
from ZODB.FileStorage import FileStorage

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.records import read_reference
from zodb_s3blobs.s3client import S3Client
from zodb_s3blobs.zeobase import ZeoBase

from .relstorages import Cluster
from .relstorages import Site
from .relstorages import wait_until
from .services.process import find_program
from .services.zeo import ZeoServer
from .storages import PATIENCE


FILE = "<filestorage {name}>\npath {name}.fs\n</filestorage>"


class ZeoDatabase:
    """A FileStorage that a ZEO server has open, as it is without any code of ours.

    :param ZeoServer server: runs, or will.
    :param str name: by which clients ask for it; that of its file, too.
    :param str around: a ZConfig text with "{}" in the place of the section <zeoclient>.
    """

    keep_history = True

    def __init__(self, server, name, around="{}"):
        self.server = server
        self.name = name
        self.around = around

    @property
    def section(self):
        """The text of the section <zeoclient>, with what is around it inside of ours."""
        return self.client()

    def client(self, address=None, **options):
        """Return the text of the section with other keys, or as seen through something."""
        lines = [f"{key.replace('_', '-')} {value}" for key, value in options.items()]
        server = f"server {address or self.server.address}"
        text = "\n".join(["<zeoclient>", server, f"storage {self.name}", *lines, "</zeoclient>"])
        return self.around.format(text)

    @property
    def path(self):
        """Of its file."""
        return self.server.directory / f"{self.name}.fs"

    def remove(self):
        """Lose it; the server is down."""
        for path in self.server.directory.glob(f"{self.name}.fs*"):
            path.unlink()

    def blobs(self):
        """Return all revisions of blobs, a mapping from (oid, tid) to the key they refer to."""
        with closing(FileStorage(str(self.path), read_only=True)) as storage:
            return {
                (record.oid, record.tid): blob_key(record.oid, read_reference(data) or record.tid)
                for transaction in storage.iterator()
                for record in transaction
                if (data := plain(record.data)) and is_blob_record(data)
            }


def plain(data):
    """Return a record as it is without zc.zlibstorage."""
    return zlib.decompress(data[2:]) if data and data[:2] == b".z" else data


class ZeoSite(Site):
    """The database and the bucket as a client has them open; it has heard of all commits."""

    points = {
        "staged": (S3Client, "upload_file", "before"),
        "uploaded": (S3Client, "upload_file", "after"),
        "beginning": (ClientStorage, "tpc_begin", "before"),
        "begun": (ClientStorage, "tpc_begin", "after"),
        "voting": (ClientStorage, "tpc_vote", "before"),
        "voted": (ClientStorage, "tpc_finish", "before"),
        "in finish": (ClientStorage, "tpc_finish", "inside"),
        "base finished": (ClientStorage, "tpc_finish", "after"),
        "packing": (ClientStorage, "pack", "before"),
        "packed": (ClientStorage, "pack", "after"),
        # The client's own method would not wait for the answer.
        "asking": (ZeoBase, "_load_before", "before"),
        "told": (ZeoBase, "_load_before", "after"),
        "deleting": (S3Client, "delete_objects", "before"),
    }

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        hear_of_all(self.db)

    def connect_before_going_on(self):
        """Wait for a connection before going on from where it stands still."""
        stand_still = self._stand_still

        def stand_still_and_connect(point):
            stand_still(point)
            wait_until(self.db.storage.is_connected)

        self._stand_still = stand_still_and_connect

    def last_undone(self):
        """Undo the last transaction."""
        self.undo(self.last())

    def rewrite_by_tid(self):
        """Take the references out of the records and return the counts."""
        return vars(self.db.storage.rewrite_by_tid())

    def dry_run(self):
        """Return the counts of a sweep that deletes nothing."""
        return vars(self.db.storage.sweep(dry_run=True))

    def pack_to(self, moment):
        """Pack to a time."""
        self.db.pack(moment)

    def give_out_oids(self, count):
        """Ask for new oids that nothing will have."""
        for _number in range(count):
            self.db.storage.new_oid()


def hear_of_all(db):
    """Let connections of a database know what others have committed when they open.

    The server sends what it has to say to a client before it answers to its questions.
    """
    open_ = db.open

    def ask_and_open(*args, **kw):
        db.storage.ping()
        return open_(*args, **kw)

    db.open = ask_and_open


class ZeoCluster(Cluster):
    """A ZEO server, a bucket, and the processes that share them."""

    site = ZeoSite
    imports = ()

    def __init__(self, *args):
        super().__init__(*args)
        self._opened = []
        self._checks = count()

    def here(self, name, location=None, **options):
        """Open a client in this process.

        :returns: its `ZeoSite`, which is closed in the end.
        """
        arguments = self._arguments(name, options)
        site = self.site(_nobody_waits, location or self.location, self.directory, **arguments)
        self._opened.append(site)
        return site

    def close(self):
        """Close what is open in this process."""
        while self._opened:
            self._opened.pop().db.close()

    def stop(self):
        """Kill the processes that are left, and close what is open here."""
        super().stop()
        self.close()

    def pack_base(self):
        """Pack as ZEO's own zeopack does, which knows nothing of buckets."""
        address = f"{self.database.server.address}:{self.database.name}"
        subprocess.run([find_program("zeopack"), address], check=True, timeout=2 * PATIENCE)

    def check(self, **expected):
        """Read all blobs through another client, from an empty cache.

        :param expected: the number of the contents of each blob.
        :returns: its `ZeoSite`, without a grace period.
        """
        site = self.here(f"check {next(self._checks)}", gc_grace="0s")
        assert {name: site.read(name) for name in site.names()} == expected
        return site

    def check_exact(self, **expected):
        """Do as `check`, and sweep: what revisions refer to is there, and nothing else."""
        site = self.check(**expected)
        report = site.sweep()
        assert (report["in_flight"], report["foreign"], report["failed"]) == (0, 0, 0)
        assert self.objects() == self.references()
        return site

    def check_packed(self, **expected):
        """Do as `check_exact`, pack, and do as `check`: only current revisions remain."""
        self.check_exact(**expected).pack()
        assert self.objects() == self.references()
        assert len(self.objects()) == len(expected)
        self.check(**expected)


def _nobody_waits(point):
    raise AssertionError(f"{point!r} is for processes")


@contextmanager
def shared_cluster(request, around="{}", server=FILE, imports=()):
    """Context manager: a `ZeoCluster` on a server that others use, too.

    :param str server: the ZConfig section that it serves.
    :param imports: the ZConfig components of that.
    """
    served = request.getfixturevalue("zeo").new(server, imports)
    database = ZeoDatabase(served.server, served.name, around)
    cluster = ZeoCluster(
        database, request.getfixturevalue("s3"), request.getfixturevalue("tmp_path")
    )
    try:
        yield cluster
    finally:
        cluster.stop()


@contextmanager
def own_cluster(request, fill=None, **options):
    """Context manager: a `ZeoCluster` whose server the test may kill.

    :param fill: called with the bucket, the test's directory and the path of the server's file
        before the server has that open.
    :param options: of the server.
    """
    # It skips where ZEO is missing.
    request.getfixturevalue("zeo")
    directory = request.getfixturevalue("tmp_path")
    location = request.getfixturevalue("s3")
    if fill is not None:
        (directory / "zeo").mkdir()
        fill(location, directory, directory / "zeo" / "main.fs")
    with ZeoServer(directory / "zeo", FILE.format(name="main"), **options) as server:
        database = ZeoDatabase(server, "main")
        cluster = ZeoCluster(database, location, directory)
        try:
            yield cluster
        finally:
            cluster.stop()
