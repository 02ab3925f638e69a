"""Databases as they are before they move to S3, and the command line that moves them."""

from contextlib import closing
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading

import transaction
from ZODB.blob import Blob
from ZODB.blob import FilesystemHelper
from ZODB.config import databaseFromString
from ZODB.utils import p64

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.operate.main import main

from .faults import FaultyServer
from .services.location import boto3_client
from .services.location import keys
from .storages import PATIENCE
from .storages import random_bytes
from .storages import section


OLD = "<filestorage>\npath {directory}/Data.fs\nblob-dir {directory}/blobs\n</filestorage>"


def fill(text, count, size=200, change=0):
    """Commit blobs of a database without S3, and change some of them.

    :param str text: the section of the storage.
    :returns: their bytes by the key that they have once they are in a bucket, of all revisions.
    """
    expected = {}

    def take_note(blobs):
        for blob in blobs:
            blob._p_activate()
            with blob.open() as file:
                expected[blob_key(blob._p_oid, blob._p_serial)] = file.read()

    database = databaseFromString(
        f"%import relstorage\n%import zc.zlibstorage\n<zodb>\n{text}\n</zodb>"
    )
    with closing(database), closing(database.open()) as connection:
        blobs = connection.root()["blobs"] = connection.root().get("blobs", [])
        begin = len(blobs)
        blobs += (Blob(random_bytes((begin + n, 0), size + n)) for n in range(count))
        transaction.commit()
        take_note(blobs[begin:])
        for number, blob in enumerate(blobs[:change]):
            with blob.open("w") as file:
                file.write(random_bytes((number, begin + 1), size))
        transaction.commit()
        take_note(blobs[:change])
    return expected


def read_all(database):
    """Return the bytes of the current revisions of blobs, by the key of their tid."""
    found = {}
    with database.transaction() as connection:
        for blob in connection.root()["blobs"]:
            with blob.open() as file:
                found[blob_key(blob._p_oid, blob._p_serial)] = file.read()
    return found


def make_blobs(directory, revisions, layout="bushy"):
    """Make a blob directory with these revisions, by oid and tid as numbers."""
    files = FilesystemHelper(str(directory), layout)
    files.create()
    for oid, tid in revisions:
        files.getPathForOID(p64(oid), create=True)
        Path(files.getBlobFilename(p64(oid), p64(tid))).write_bytes(b"x" * (oid % 7))


def files_below(directory):
    """Return the bytes of all files below a directory, by their paths."""
    return {path: path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()}


def objects(location):
    """Return the bytes of the objects of blobs in a bucket, by their keys."""
    client = boto3_client(location)
    return {
        key: client.get_object(Bucket=location.bucket, Key=key)["Body"].read()
        for key in keys(location, "blobs/")
    }


ZLIB = "<zlibstorage>\n{}\n</zlibstorage>"


def write_configuration(directory, location, around="{}", **options):
    """Write a configuration with our section and return its path."""
    path = Path(directory) / "zope.conf"
    text = around.format(section(location, directory, **options))
    imports = "%import zodb_s3blobs\n%import relstorage\n%import zc.zlibstorage\n"
    path.write_text(f"{imports}<zodb_db main>\nmount-point /\n{text}\n</zodb_db>\n")
    return path


def blobdir_source(path):
    """Return the text of a section."""
    return f"\n<blobdir-source>\npath {path}\n</blobdir-source>"


def relstorage(kind, place, keep_history=True, **options):
    """Return the text of a section <relstorage>."""
    keys = {"postgresql": "driver psycopg2\ndsn", "sqlite3": "data-dir"}
    lines = [f"{name.replace('_', '-')} {value}" for name, value in options.items()]
    inner = f"<{kind}>\n{keys[kind]} {place}\n</{kind}>"
    history = f"keep-history {str(keep_history).lower()}"
    return "\n".join(["<relstorage>", history, *lines, inner, "</relstorage>"])


class Operator:
    """Runs commands with a configuration, in this process or in another one."""

    def __init__(self, path, capsys=None):
        self.path = str(path)
        self._capsys = capsys

    def __call__(self, *arguments):
        """Run a command; return its status and what it tells."""
        self._capsys.readouterr()
        status = main(["-C", self.path, *self._with_json(arguments)])
        output = self._capsys.readouterr()
        return status, json.loads(output.out) if output.out else output.err

    def _with_json(self, arguments):
        return [arguments[0], "--json", *arguments[1:]]

    def start(self, *arguments):
        """Start a command in a process of its own and return that."""
        command = [sys.executable, "-m", "zodb_s3blobs.operate", "-C", self.path]
        return subprocess.Popen(
            [*command, *self._with_json(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


class SignallingServer(FaultyServer):
    """Sends a process a signal when a request of a kind comes for the nth time."""

    def __init__(self, upstream, kind):
        super().__init__(upstream)
        self._kind = kind
        self._lock = threading.Lock()
        self.process = None
        self.instead = self._look
        self.arm(0)

    def arm(self, number, with_signal=signal.SIGKILL):
        """Begin to count anew."""
        self._left, self._signal = number, with_signal

    def _look(self, request):
        with self._lock:
            if request.kind == self._kind and "/blobs/" in request.target:
                self._left -= 1
                if not self._left:
                    # It has been started by whoever waits for it now.
                    os.kill(self.process.pid, self._signal)
        return None


def end_of(process):
    """Wait for the end of a process and return its status and what it has told."""
    out, err = process.communicate(timeout=PATIENCE * 2)
    return process.returncode, json.loads(out) if out else err
