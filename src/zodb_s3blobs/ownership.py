"""Which database a bucket is of: a marker in it says so, and others do not write there.

A copy of a database has the same objects in its records as the original, and would sweep what
the original has stored since. So what tells them apart is not in the database: a file beside it, or
what its server says of itself.
"""

from collections.abc import Callable
import fcntl
import json
import logging
import os
import struct
import sys
import threading
import time
from typing import Any
from typing import TextIO

from .basecontract import Identity
from .directories import sync
from .forks import begin_in_children
from .interfaces import OtherDatabaseError
from .interfaces import PermanentS3Error
from .interfaces import S3OperationError
from .interfaces import TransientS3Error


logger = logging.getLogger(__name__)

#: key of the marker, beside those of the blobs
MARKER = "zodb-s3blobs-owner.json"


# Of ids that a configuration gives
_NAMED = "name:"


def identity_of_name(name: str) -> Identity:
    """Return the identity of a database that its configuration names."""
    return Identity(_NAMED + name, name)


def identity_of_file(path: str) -> Identity:
    """Return the identity of a database in a file, which a file beside it keeps.

    That knows the inodes of itself and of its directory, so that a copy of both is another
    database, also where its files are links. On a new file system a copy may get the same numbers,
    but hardly the same generation.

    :raises OSError: when it can be neither read nor made.
    """
    path = os.path.realpath(path)
    beside = f"{path}.s3blobs"
    directory = os.stat(os.path.dirname(path)).st_ino
    try:
        with open(beside, encoding="ascii") as file:
            identity = _identity_in(file, directory)
    except FileNotFoundError:
        identity = None
    return Identity(identity or _new_identity(beside, directory, os.stat(path)), path)


def _identity_in(file: TextIO, directory: int) -> str | None:
    try:
        told = json.load(file)
        inode, generation = os.fstat(file.fileno()).st_ino, generation_of(file.fileno())
        # Whether it is told depends on the way to the file system, such as NFS.
        if (told["inode"], told["directory"]) == (inode, directory) and (
            None in (generation, told.get("generation")) or generation == told["generation"]
        ):
            return str(told["id"])
    except (ValueError, KeyError, TypeError):
        pass  # of another directory, half written by somebody else just now, or damaged
    return None


def generation_of(file: int) -> int | None:
    """Return a number that tells a file from others that had its inode, None where none does."""
    try:
        # linux/fs.h, FS_IOC_GETVERSION; ext4 and XFS choose it at random, and keep it.
        answer = fcntl.ioctl(file, 0x80007601 | struct.calcsize("l") << 16, bytes(8))
    except OSError:
        return None
    return int.from_bytes(answer[:4], sys.byteorder)


def _new_identity(path: str, directory: int, database: os.stat_result) -> str:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(file, "r+", encoding="ascii") as text:
        # Who comes second takes what is there then.
        fcntl.flock(text, fcntl.LOCK_EX)
        identity = _identity_in(text, directory)
        if identity is None:
            status = os.fstat(file)
            if status.st_size:
                logger.warning("identity of a copy, or damaged, is made anew path=%s", path)
            if status.st_nlink > 1:
                # A copy that is a link must not change the original's.
                os.remove(path)
                return _new_identity(path, directory, database)
            identity = os.urandom(16).hex()
            told = {"id": identity, "inode": status.st_ino, "directory": directory}
            told["generation"] = generation_of(file)
            if os.geteuid() == 0:
                # An operator's command must not leave the site what it cannot read.
                os.fchown(file, database.st_uid, database.st_gid)
            text.seek(0)
            text.truncate()
            json.dump(told, text)
            text.flush()
            os.fsync(file)
            sync(os.path.dirname(path))
    return identity


class Ownership:
    """Asks before the first write of a process, and before each deletion of garbage.

    :param find_identity: returns the database's `Identity`, or None where it cannot be told, as by
        a ZEO client: then any mark is believed but one that a configuration gives.
    """

    def __init__(self, find_identity: Callable[[], Identity | None]) -> None:
        self._find_identity = find_identity
        self._is_known = False
        self.begin()
        begin_in_children(self)

    def begin(self) -> None:
        """Begin with a lock of this process."""
        self._asking = threading.Lock()

    def check(self, client: Any, anew: bool = False, marks: bool | None = None) -> None:
        """See that the bucket is this database's, or nobody's so far, and then make it so.

        :param bool anew: ask, though it was so a while ago.
        :param bool marks: whether a bucket without a mark becomes this database's, or is refused;
            by default unless it is asked anew.
        :raises OtherDatabaseError: when it is another database's.
        :raises S3OperationError: when that cannot be told.
        """
        if self._is_known and not anew:
            return
        # One asks for all that begin to write at the same time.
        with self._asking:
            if self._is_known and not anew:
                return
            identity = self._identity()
            try:
                found = self._find(client, identity, not anew if marks is None else marks)
            except PermanentS3Error as error:
                if anew or isinstance(error, OtherDatabaseError):
                    raise
                # Policies that know the blobs alone are no reason to stop a site.
                logger.warning("mark of the owner cannot be had: %s", error)
                self._is_known = True
                return
            owner, name = read_mark(found)
            if _is_others(identity, owner):
                raise _other(identity, name)
            self._is_known = True

    def is_others(self, client: Any) -> bool:
        """Tell whether the bucket is known to be another database's; nothing is written."""
        try:
            found = client.read_small(MARKER)
            return found is not None and _is_others(self._identity(), read_mark(found)[0])
        except S3OperationError:
            return False

    @property
    def id(self) -> str | None:
        """What tells the database from others, None where that cannot be had."""
        try:
            identity = self._identity()
        except TransientS3Error:
            return None
        return identity and identity.id

    def _identity(self) -> Identity | None:
        try:
            return self._find_identity()
        except Exception as error:
            # Of a disk, or whatever a database's driver raises. Another try may succeed.
            raise TransientS3Error(
                "it cannot be told which database this is, which the key owner would tell:"
                f" {type(error).__name__}: {error}"
            ) from error

    def _find(self, client: Any, identity: Identity | None, marks: bool) -> bytes | None:
        """Return the mark, and make it where there is none."""
        found: bytes | None = None
        is_told = True
        try:
            found = client.read_small(MARKER)
        except PermanentS3Error:
            if not marks or identity is None:
                raise
            is_told = False  # missing, perhaps, where nobody may list
        if found is not None or identity is None:
            return found
        if not marks:
            raise _unmarked()
        client.write_small(MARKER, _text(identity), only_new=True, or_replace=is_told)
        # Another one may have been faster.
        found = client.read_small(MARKER)
        if found is None:
            raise TransientS3Error("the mark of the owner is not there yet")
        return found

    def take(self, client: Any) -> Identity:
        """Make the bucket this database's, whoever's it is.

        :raises ValueError: when it cannot be told which database this is.
        """
        identity = self._identity()
        if identity is None:
            raise ValueError("this database cannot be told from its copies: give it an owner key")
        client.write_small(MARKER, _text(identity))
        return identity


def _text(identity: Identity) -> bytes:
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return json.dumps({"database": identity.id, "name": identity.name, "since": since}).encode()


def read_mark(found: bytes | None) -> tuple[str, str]:
    """Return the id and the name in a mark."""
    try:
        told = json.loads(found or b"")
        return str(told["database"]), f"{told['name']} (since {told['since']})"
    except (ValueError, KeyError, TypeError):
        return "", "somebody whose mark cannot be read"


def _is_others(identity: Identity | None, owner: str) -> bool:
    return owner.startswith(_NAMED) if identity is None else owner != identity.id


def _unmarked() -> OtherDatabaseError:
    error = OtherDatabaseError(
        "the bucket has no mark that says whose it is, so nothing is deleted there: this may be a"
        " copy of the database that the blobs are of. The first blob that is stored makes the mark,"
        " or 'zodb-s3blobs own --take'"
    )
    error.operation, error.key = "delete", MARKER
    return error


def _other(identity: Identity | None, name: str) -> OtherDatabaseError:
    this = identity.name if identity else "this one, which has no owner key,"
    error = OtherDatabaseError(
        f"the bucket is marked as that of the database {name}, and {this} is another one, perhaps"
        " a copy: nothing is written or deleted. Let a copy have 'access read-only', or a"
        " bucket or s3-prefix of its own with that one as <bucket-source>. Where this is that"
        " database, moved or restored, say 'zodb-s3blobs own --take' once"
    )
    error.operation, error.key = "write", MARKER
    return error
