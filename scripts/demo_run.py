"""Show the life of blobs: a tree of files goes into S3 and comes back, byte by byte.

Starts a real S3 server (rclone), opens a ZODB database from a ZConfig text, stores the files as
blobs, reads them back through a second process with an empty cache, changes some and undoes that,
deletes some, packs, and compares SHA-256 digests all the way.
"""

import argparse
from contextlib import closing
from contextlib import contextmanager
import hashlib
import itertools
import json
import logging
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time

from BTrees.OOBTree import OOBTree
from tqdm import tqdm
import transaction
from ZODB.blob import Blob
from ZODB.config import databaseFromURL

from zodb_s3blobs.keys import blob_key
from zodb_s3blobs.ownership import MARKER
from zodb_s3blobs.testing.process import ServiceFailed
from zodb_s3blobs.testing.process import ServiceMissing
from zodb_s3blobs.testing.server import EmbeddedS3


CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
from tests.services.location import boto3_client  # noqa: E402  # the path comes first
from tests.services.location import S3Location  # noqa: E402


CONFIG = """\
%import zodb_s3blobs
<zodb main>
  <s3blobstorage>
    bucket-name {bucket}
    s3-prefix {prefix}
    s3-endpoint-url {endpoint_url}
    s3-access-key $(S3_ACCESS_KEY)
    s3-secret-key $(S3_SECRET_KEY)
    s3-create-bucket true
    cache-dir {directory}/{name}-cache
    cache-size 1GB
    <filestorage>
      path {directory}/Data.fs
      read-only {read_only}
    </filestorage>
  </s3blobstorage>
</zodb>
"""
BUCKET = "demo-blobs"
PREFIX = "main"
BATCH = 100  # files a transaction
CHUNK = 1 << 20


class Difference(Exception):
    """What came back is not what was stored."""


class Progress:
    """One step: a progress bar while it runs, a line with its figures at the end."""

    def __init__(self, title, count, unit="files"):
        self.title, self.unit = title, unit
        self.count = self.bytes = 0
        # None: only where it is seen
        self.bar = tqdm(
            total=count, unit=unit, unit_scale=True, desc=title, leave=False, disable=None
        )

    def add(self, size):
        """Count one more file or object."""
        self.count += 1
        self.bytes += size
        self.bar.update()

    def __enter__(self):
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind, *exc_info):
        seconds = time.perf_counter() - self.started
        self.bar.close()
        if kind is None:
            megabytes = self.bytes / 1e6
            print(
                f"{self.title:<38}{self.count:>7} {self.unit:<7} {megabytes:>9.2f} MB"
                f" {seconds:>7.2f} s {megabytes / seconds:>8.2f} MB/s",
                flush=True,
            )


@contextmanager
def tree_of(db):
    """Open a connection and give the tree: relative path to Blob."""
    with closing(db.open()) as connection:
        yield connection.root()["files"]


def write(blob, chunks):
    """Write a blob; return the size and the hex SHA-256 of what was written, a list."""
    digest, size = hashlib.sha256(), 0
    with blob.open("w") as target:
        for chunk in chunks:
            target.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def chunks_of(source):
    """Return an iterator over the bytes of an open file."""
    return iter(lambda: source.read(CHUNK), b"")


def store(db, root, paths):
    """Store files as blobs, a batch in each transaction; return sizes and digests by path."""
    stored = {}
    with Progress("store", len(paths)) as progress, closing(db.open()) as connection:
        tree = connection.root()["files"] = OOBTree()
        for number, path in enumerate(paths, 1):
            blob = tree[path] = Blob()
            with open(root / path, "rb") as source:
                stored[path] = write(blob, chunks_of(source))
            progress.add(stored[path][0])
            if number % BATCH == 0 or number == len(paths):
                transaction.get().note(f"store up to {path}")
                transaction.commit()
    return stored


def compare(db, title, stored, all_of_it=True):
    """Read blobs and compare sizes and digests.

    :param bool all_of_it: the database holds these paths and no others
    :raises Difference: the message names the first paths that differ
    """
    with Progress(title, len(stored)) as progress, tree_of(db) as tree:
        different = set(tree) ^ set(stored) if all_of_it else set(stored) - set(tree)
        for path in sorted(set(stored) - different):
            digest = hashlib.sha256()
            with tree[path].open("r") as source:
                for chunk in chunks_of(source):
                    digest.update(chunk)
                size = source.tell()
            progress.add(size)
            if [size, digest.hexdigest()] != stored[path]:
                different.add(path)
    if different:
        raise Difference(f"{title}: {len(different)} differ: {', '.join(sorted(different)[:5])}")


def compare_cold(config, title, stored):
    """Let another process, with an empty cache, compare all files of the database."""
    arguments = [sys.executable, __file__, "--cold", title, str(config)]
    # Ctrl-C is for the first process, which then ends this one.
    child = subprocess.run(arguments, input=json.dumps(stored), text=True, start_new_session=True)
    if child.returncode:
        raise Difference(f"{title}: the second process ended with status {child.returncode}")


def cold(title, config):
    """Be that other process."""
    # It would say that the index, which the first process has not written yet, is of no use.
    logging.getLogger("ZODB.FileStorage").setLevel(logging.ERROR)
    with closing(databaseFromURL(config)) as db:
        compare(db, title, json.load(sys.stdin))


def change(db, paths):
    """Give blobs other bytes; return their new sizes and digests by path."""
    changed = {}
    with Progress("change", len(paths)) as progress, tree_of(db) as tree:
        for number, path in enumerate(paths):
            changed[path] = write(tree[path], [f"changed {number}\n".encode() * 100])
            progress.add(changed[path][0])
        transaction.get().note("change")
        transaction.commit()
    return changed


def undo_last(db, sizes):
    """Undo the last transaction; the sizes are those of the files that come back by it."""
    with Progress("undo", len(sizes)) as progress:
        db.undo(db.undoInfo(0, 1)[0]["id"], transaction.get())
        transaction.commit()
        for size in sizes:
            progress.add(size)


def delete(db, sizes):
    """Take files, with their sizes by path, out of the tree."""
    with Progress("delete", len(sizes)) as progress, tree_of(db) as tree:
        for path, size in sizes.items():
            del tree[path]
            progress.add(size)
        transaction.get().note("delete")
        transaction.commit()


def objects(location):
    """Return the keys of all blobs in the bucket with their sizes."""
    with closing(boto3_client(location)) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=location.bucket)
        found = (item for page in pages for item in page.get("Contents", ()))
        return {item["Key"]: item["Size"] for item in found if not item["Key"].endswith(MARKER)}


def pack(db, location):
    """Pack, and check that the bucket holds what survives, no less and no more."""
    before = objects(location)
    with Progress("pack", len(before), "objects") as progress:
        db.pack()
        for size in before.values():
            progress.add(size)
    after = objects(location)
    needed = set()
    with tree_of(db) as tree:
        for blob in tree.values():
            blob._p_activate()  # its serial is known once it is loaded
            needed.add(f"{PREFIX}/{blob_key(blob._p_oid, blob._p_serial)}")
    for when, found in (("before", before), ("after", after)):
        size = sum(found.values()) / 1e6
        print(f"  in the bucket {when + ' the pack':<22}{len(found):>7} objects {size:>9.2f} MB")
    print(f"  needed by the database               {len(needed):>6} objects")
    if set(after) != needed:
        raise Difference(f"pack: {len(set(after) ^ needed)} objects too many or missing")


def write_config(directory, server, name, read_only):
    """Write the configuration of one process; return its path."""
    values = {"bucket": BUCKET, "prefix": PREFIX, "endpoint_url": server.endpoint_url}
    values |= {"directory": directory, "name": name, "read_only": read_only}
    path = directory / f"{name}.conf"
    path.write_text(CONFIG.format(**values))
    return path


def life(directory, server, root, paths):
    """Go through all steps."""
    location = S3Location(server.endpoint_url, server.access_key, server.secret_key, BUCKET)
    os.environ |= {"S3_ACCESS_KEY": server.access_key, "S3_SECRET_KEY": server.secret_key}
    os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}  # the server is on this machine
    config = write_config(directory, server, "main", "false")
    print(f"{config.read_text()}\n{len(paths)} files below {root}\n", flush=True)
    counter = itertools.count(1)

    def read_cold(title, stored):
        name = f"cold-{next(counter)}"  # a cache directory of its own
        compare_cold(write_config(directory, server, name, "true"), title, stored)

    with closing(databaseFromURL(str(config))) as db:
        stored = store(db, root, paths)
        read_cold("read by a second, cold process", stored)
        changed = change(db, paths[::10])
        compare(db, "read what was changed", changed, all_of_it=False)
        undo_last(db, [stored[path][0] for path in changed])
        compare(db, "read all after the undo", stored)
        read_cold("read all by a third, cold process", stored)
        delete(db, {path: stored.pop(path)[0] for path in paths[1::5]})
        pack(db, location)
        compare(db, "read what survived", stored)
        read_cold("read it by a fourth, cold process", stored)
    print("\nAll digests agree.")


def files_below(root, pattern):
    """Return the relative paths of the regular files below a directory, sorted."""
    found = (path for path in root.rglob(pattern) if "site-packages" not in path.parts)
    regular = (path for path in found if path.is_file() and not path.is_symlink())
    return sorted(str(path.relative_to(root)) for path in regular)


def arguments():
    """Parse the command line; unusable ones end with status 2."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("tree", nargs="?", type=Path, help="default: Python's own library, *.py")
    parser.add_argument("--directory", type=Path, help="for the data, which is kept; new or empty")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")
    options = parser.parse_args()
    library = Path(sysconfig.get_path("stdlib"))
    options.root = (options.tree or library).resolve()
    options.paths = files_below(options.root, "*" if options.tree else "*.py")
    if not options.paths:
        parser.error(f"there are no files below {options.root}")
    if options.directory and options.directory.exists() and any(options.directory.iterdir()):
        parser.error(f"{options.directory} is not empty")
    return options


def main():
    options = arguments()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="zodb-s3blobs-demo-"))
    directory = directory.resolve()
    try:
        with EmbeddedS3(directory / "s3") as server:
            life(directory, server, options.root, options.paths)
    except Difference as difference:
        return f"DIFFERENCE: {difference}"
    except (ServiceMissing, ServiceFailed) as failure:
        print(failure, file=sys.stderr)
        return 2
    finally:
        if options.keep or options.directory:
            print(f"The data is in {directory}")
        else:
            shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *args: sys.exit(143))
    try:
        if sys.argv[1:2] == ["--cold"]:
            cold(*sys.argv[2:])
        else:
            sys.exit(main())
    except Difference as difference:
        sys.exit(str(difference))
    except KeyboardInterrupt:
        sys.exit(130)
