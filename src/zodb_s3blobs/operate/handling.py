"""The probes of `doctor` that handle objects, and look at what the bucket does with them."""

import os
import tempfile

from ..interfaces import PermanentS3Error
from ..keys import PREFIX
from .lifecycle import judge_lifecycle
from .network import Address
from .network import fetch
from .probing import FAILED
from .probing import Finding
from .probing import LACKS
from .probing import of_error
from .probing import OK
from .probing import Probe
from .probing import SKIPPED
from .probing import SMALL
from .probing import Subject


# Bytes of an object that is read as a whole when only reading is allowed
LARGEST_DOWNLOAD = 8 << 20
LARGEST_PART = 64 << 20


class Handling:
    """Reads objects, its own or, where access is read-only, those that are there."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._client, self._config = subject.client, subject.config

    def probes(self) -> list[Probe]:
        """Return the probes, in their order."""
        reading: list[Probe] = [
            ("get", self.get),
            ("range", self.range),
            ("head", self.head),
            ("presigned URL", self.presigned_url),
            ("encryption", self.encryption),
        ]
        asking: list[Probe] = [("versioning", self.versioning), ("lifecycle", self.lifecycle)]
        if not self._subject.may_write:
            return [("list", self.list_existing), *reading, *asking]
        return [
            ("put", self.put),
            ("list", self.list_own),
            *reading,
            ("copy", self.copy),
            ("conditional put", self.conditional_put),
            ("multipart", self.multipart),
            ("batch delete", self.batch_delete),
            *asking,
        ]

    def put(self) -> Finding:
        """Store an object."""
        self._subject.key = self._store("1", self._subject.data)
        self._subject.size = SMALL
        return Finding(OK, "an object is stored")

    def _store(self, name: str, data: bytes) -> str:
        key = self._subject.scratch + name
        # Before: an answer can be lost.
        self._subject.keys.append(key)
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            self._client.upload_file(file.name, key)
        return key

    def list_own(self) -> Finding:
        """List three objects behind the first of them."""
        stored = [self._subject.key, *(self._store(name, b"bytes") for name in ("2", "3"))]
        return self._judge_listing(stored, self._subject.scratch)

    def list_existing(self) -> Finding:
        """List the blobs, and find one that can be read."""
        page = next(self._client.list_pages(PREFIX), [])
        if not page:
            return Finding(OK, "there is no blob yet, so nothing can be read")
        smallest = min(page, key=lambda listed: (not listed.size, listed.size))
        self._subject.key, self._subject.size = smallest.key, smallest.size
        return self._judge_listing([listed.key for listed in page], PREFIX)

    def _judge_listing(self, stored: list[str], prefix: str) -> Finding:
        listed = next(self._client.list_pages(prefix, stored[0]), [])
        keys = [each.key for each in listed]
        if stored[0] in keys or keys != sorted(keys):
            return Finding(
                FAILED,
                "the server does not know StartAfter, or does not sort: a sweep, and so the end"
                " of each pack, raises an error and deletes nothing",
                "use a server, or a version of it, that has ListObjectsV2",
            )
        if not set(stored[1:]) <= {stored[0], *keys} and prefix == self._subject.scratch:
            return Finding(
                FAILED,
                "the listing lacks objects that were stored just before: a sweep finds garbage"
                " later than it could",
                "ask the provider whether listings are consistent",
            )
        if not all(each.listed for each in listed):
            return Finding(
                FAILED,
                "the listing has no usable dates: a sweep takes all objects for new, and deletes"
                " nothing by record",
                "use a server that tells Date and LastModified",
            )
        return Finding(OK, "objects are listed in order, and behind a key")

    def _nothing_to_read(self) -> Finding | None:
        return None if self._subject.key else Finding(SKIPPED, "there is nothing to read")

    def get(self) -> Finding:
        """Read an object and compare its bytes."""
        if nothing := self._nothing_to_read():
            return nothing
        if self._subject.size > LARGEST_DOWNLOAD:
            return Finding(
                SKIPPED, f"the smallest blob that was listed has {self._subject.size} bytes"
            )
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "object")
            self._client.download_file(self._subject.key, path)
            with open(path, "rb") as file:
                self._subject.data = file.read()
        return Finding(OK, "the bytes are those that were stored")

    def range(self) -> Finding:
        """Read some bytes of an object."""
        if nothing := self._nothing_to_read():
            return nothing
        start, stop = (100, 200) if self._subject.size >= 200 else (0, 1)
        data, is_part = self._client.read_part(self._subject.key, start, stop)
        if not is_part:
            return Finding(
                LACKS,
                "the server ignores ranges and sends all: open_range, and parts of downloads, are"
                " read from the beginning",
                "use a server that knows Range, or see that a proxy before it passes it on",
            )
        whole = len(self._subject.data) == self._subject.size
        if whole and data != self._subject.data[start:stop]:
            return Finding(FAILED, "a range has other bytes", "see the server's documentation")
        return Finding(OK, "a part of an object is sent alone")

    def head(self) -> Finding:
        """Ask for an object's size."""
        if nothing := self._nothing_to_read():
            return nothing
        head = self._client.head_object(self._subject.key)
        if head is None or head["ContentLength"] != self._subject.size:
            found = head and head["ContentLength"]
            return Finding(
                FAILED,
                f"HEAD tells {found} bytes of an object of {self._subject.size}",
                "see that a proxy before the server does not change HEAD",
            )
        self._subject.head = head
        names = {name.lower() for name in head.get("Metadata", {})}
        if "zodb-sha256" not in names and self._subject.may_write:
            return Finding(
                OK, "the server keeps no metadata: downloads are compared by their length alone"
            )
        return Finding(OK, "size and metadata are told without the bytes")

    def presigned_url(self) -> Finding:
        """Read an object by a URL, as a browser does."""
        if nothing := self._nothing_to_read():
            return nothing
        url = self._client.presigned_url(self._subject.key)
        if url is None:
            return Finding(LACKS, "under SSE-C browsers cannot read: Delivery sends the bytes")
        host = Address.of(url).host
        public = self._config.s3_public_endpoint_url
        try:
            status, data = fetch(
                url,
                self._config.s3_connect_timeout,
                self._subject.ca_bundle(),
                LARGEST_DOWNLOAD,
            )
        except OSError as error:
            return Finding(
                LACKS,
                f"{host} does not answer this host: {error}",
                "open such a URL in a browser, which may reach it; else check"
                f" {'s3-public-endpoint-url' if public else 's3-endpoint-url'}",
            )
        whole = len(self._subject.data) == self._subject.size
        if status != 200 or (whole and data != self._subject.data):
            return Finding(
                LACKS,
                f"{host} answers a signed URL with {status}",
                "see that what stands before the server keeps the Host, or set"
                " s3-public-endpoint-url to the URL that browsers use",
            )
        return Finding(OK, f"anybody can read an object by a URL of {host}, for a while")

    def encryption(self) -> Finding:
        """See what the server says of it."""
        if nothing := self._nothing_to_read():
            return nothing
        config, head = self._config, self._subject.head
        told = head.get("ServerSideEncryption")
        if config.s3_sse_customer_key and (
            not head.get("SSECustomerAlgorithm")
            or self._client.is_readable_without_key(self._subject.key)
        ):
            return Finding(
                FAILED,
                "the server ignores s3-sse-customer-key: objects are stored unencrypted",
                "use a server that has SSE-C, or remove s3-sse-customer-key",
            )
        if config.s3_sse_customer_key:
            return Finding(OK, "objects are encrypted with s3-sse-customer-key, and need it")
        if config.s3_sse and told != config.s3_sse:
            return Finding(
                FAILED,
                f"s3-sse is {config.s3_sse}, and the server tells {told or 'no encryption'}",
                "check s3-sse and the bucket's default, or remove s3-sse",
            )
        if told:
            where = "as s3-sse says" if config.s3_sse else "by the bucket's default"
            return Finding(OK, f"objects are encrypted with {told}, {where}")
        return Finding(
            LACKS,
            "the server tells of no encryption of its own",
            "where blobs must be encrypted at rest, set s3-sse AES256 or s3-sse-customer-key",
        )

    # What changes

    def copy(self) -> Finding:
        """Copy an object, as an undo does."""
        key = f"{self._subject.scratch}copy"
        self._subject.keys.append(key)
        try:
            self._client.copy_object(self._subject.key, key)
        except PermanentS3Error as error:
            reason = of_error(error).meaning
            return Finding(LACKS, f"an undo sends the bytes once more instead ({reason})")
        data, _is_part = self._client.read_part(key, 0, SMALL)
        if data != self._subject.data:
            return Finding(FAILED, "a copy has other bytes", "see the server's documentation")
        return Finding(OK, "objects are copied inside the bucket, as an undo wants it")

    def conditional_put(self) -> Finding:
        """Store an object where one is, on the condition that none is."""
        if self._client.is_kept(self._subject.key):
            return Finding(OK, "If-None-Match is honoured")
        # It has other bytes now.
        self._client.delete_object(self._subject.key)
        return Finding(
            LACKS,
            "If-None-Match is ignored; only the mark of the owner uses it: do not start two"
            " databases at the same time on an empty prefix",
        )

    def multipart(self) -> Finding:
        """Upload in parts; complete that, and abort another."""
        size = min(self._config.s3_multipart_part_size, LARGEST_PART)
        key = f"{self._subject.scratch}parts"
        self._subject.keys.append(key)
        part = os.urandom(1 << 20) * (size >> 20) + bytes(size % (1 << 20))
        try:
            self._client.send_parts(key, [part, self._subject.data], completes=True)
        except PermanentS3Error as error:
            found = of_error(error)
            remedy = "s3-multipart-threshold 5GB sends what is smaller in one request"
            return found._replace(remedy="; ".join(filter(None, (found.remedy, remedy))))
        total = self._client.object_size(key)
        if total != size + len(self._subject.data):
            return Finding(
                FAILED,
                f"an object in parts has {total} bytes, not {size + len(self._subject.data)}",
                "set s3-multipart-threshold 5GB",
            )
        self._client.send_parts(f"{key}-aborted", [self._subject.data], completes=False)
        return Finding(OK, f"parts of {size >> 20} MB are taken, completed and aborted")

    def batch_delete(self) -> Finding:
        """Delete two objects in one request."""
        keys = [f"{self._subject.scratch}{name}" for name in ("2", "3")]
        refused = self._client.batch_deletes(keys)
        if refused is False:
            return Finding(LACKS, "objects are deleted one by one: packs take longer")
        left = [key for key in keys if self._client.head_object(key) is not None]
        if refused is not True or left:
            code = next(iter(refused.values())) if isinstance(refused, dict) else "nothing"
            return Finding(
                FAILED,
                f"the server answers and deletes {len(keys) - len(left)} of {len(keys)} ({code})",
                "grant s3:DeleteObject; see whether the bucket locks its objects",
            )
        return Finding(OK, "many objects are deleted in one request")

    # What the bucket is set to

    def versioning(self) -> Finding:
        """See whether deleted objects stay as versions."""
        told = self._client.versioning()
        if self._subject.keeps_versions or told == "Enabled":
            return Finding(
                OK,
                "the bucket keeps versions: what a pack deletes can be brought back, and is paid",
                "let a lifecycle rule expire noncurrent versions, later than database backups are",
            )
        return Finding(OK, "the bucket keeps no versions: what a pack deletes is gone")

    def lifecycle(self) -> Finding:
        """See what the bucket's rules do with blobs and unfinished uploads."""
        rules, refusal = self._client.lifecycle()
        prefix = f"{self._client.prefix}/" if self._client.prefix else ""
        state, meaning, remedy = judge_lifecycle(rules, refusal, prefix)
        return Finding({True: OK, False: FAILED, None: LACKS}[state], meaning, remedy)
