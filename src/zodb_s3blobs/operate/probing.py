"""What the probes of `doctor` share: what they work with, and what comes of one."""

from collections.abc import Callable
import os
from typing import Any
from typing import NamedTuple

from ..s3probe import S3Probe
from ..s3probe import trusted_certificates


OK, LACKS, FAILED, SKIPPED = "ok", "not available", "failed", "not tried"
# Bytes of the objects that are stored
SMALL = 1000


class Finding(NamedTuple):
    """What came of a probe."""

    state: str
    #: what it means for a site
    meaning: str
    #: what to do, "" where nothing is to be done
    remedy: str = ""


#: a probe, by its name
Probe = tuple[str, Callable[[], Finding]]


def of_error(error: Exception) -> Finding:
    """Return the finding that an error is, whose text ends with what to do."""
    meaning, _, remedy = str(error).partition("; ")
    return Finding(FAILED, meaning, remedy)


class Subject:
    """What is probed.

    :param S3Probe client: may write unless it is read-only.
    :param config: the keys of the section.
    :param str scratch: the prefix below which everything is made.
    """

    def __init__(self, client: S3Probe, config: Any, scratch: str) -> None:
        self.client = client
        self.config = config
        self.scratch = scratch
        #: whether anything is stored
        self.may_write = not client.is_read_only
        #: keys that were stored, or may have been
        self.keys: list[str] = []
        #: an object to read, as far as there is one: its key, size and bytes
        self.key, self.size, self.data = "", 0, os.urandom(SMALL)
        #: what HEAD told of it
        self.head: Any = {}

    def ca_bundle(self) -> str:
        """Return the path of the certificates that are trusted."""
        configured: str | None = self.config.s3_ca_bundle
        return configured or trusted_certificates(self.config.s3_profile)

    @property
    def keeps_versions(self) -> bool:
        """Whether the bucket keeps versions, as far as HEAD has told it."""
        return self.head.get("VersionId") not in (None, "null")
