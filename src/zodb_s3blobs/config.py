"""Builds a storage from a ``<s3blobstorage>`` section; its keys stand in component.xml."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from itertools import product
import os
import re
from typing import Any
from urllib.parse import urlsplit
import weakref

from ZConfig.datatypes import SuffixMultiplier
from ZODB.config import BaseConfig

from . import values
from .bases import base_of
from .cache import S3BlobCache
from .localbucket import LocalBucket
from .localbucket import Overlay
from .ownership import identity_of_name
from .ownership import Ownership
from .s3client import MiB
from .s3client import S3Client
from .sources import BlobDirSource
from .sources import BucketSource
from .spool import Spool
from .storage import S3BlobStorage
from .uploads import UploadPool


# Says for a process what the key "access" says for a database
ACCESS = "ZODB_S3BLOBS_ACCESS"
READ_ONLY = "read-only"

_bytes = SuffixMultiplier({"kb": 1 << 10, "mb": 1 << 20, "gb": 1 << 30, "tb": 1 << 40})


def byte_count(text: str) -> int:
    """Return a positive number of bytes, given with or without KB, MB, GB or TB."""
    try:
        size: int = _bytes(text)
    except ValueError:
        raise ValueError(
            f"expected a whole number with a unit, such as 64MB, not {text!r}"
        ) from None
    if size <= 0:
        raise ValueError(f"a size is at least one byte, not {text!r}")
    return size


def part_size(text: str) -> int:
    """Return the size of a part of a multipart upload, at least 5 MB."""
    size = byte_count(text)
    if not 5 * MiB <= size <= 5 * 1024 * MiB:
        raise ValueError(f"S3 takes parts of 5MB to 5GB, not {text!r}")
    return size


def threshold(text: str) -> int:
    """Return the size from which parts are sent, at most what S3 takes in one request."""
    size = byte_count(text)
    if size > 5 * 1024 * MiB:
        raise ValueError(f"S3 takes up to 5GB in one request, not {text!r}")
    return size


def count(text: str) -> int:
    """Return a whole number from 1 to 256."""
    number = int(text) if text.isdecimal() else 0
    if not 1 <= number <= 256:
        raise ValueError(f"expected a number from 1 to 256, not {text!r}")
    return number


def seconds(text: str) -> float:
    """Return a positive time, given in seconds or with the suffix ms, s, m or h."""
    for suffix, factor in (("ms", 0.001), ("s", 1.0), ("m", 60.0), ("h", 3600.0), ("", 1.0)):
        if text.lower().endswith(suffix):
            try:
                time = float(text[: len(text) - len(suffix)]) * factor
            except ValueError:
                time = 0.0
            break
    if not 0 < time < 86400:
        raise ValueError(f"expected a time such as 10s or 500ms, not {text!r}")
    return time


def grace(text: str) -> float:
    """Return a time in seconds, given with the suffix s, m, h or d; 0 needs none."""
    if text == "0":
        return 0.0
    for suffix, factor in (("s", 1), ("m", 60), ("h", 3600), ("d", 86400)):
        number = text.lower().removesuffix(suffix).strip()
        if text.lower().endswith(suffix) and number.isdecimal():
            return float(int(number) * factor)
    raise ValueError(f"expected a time such as 24h or 7d, not {text!r}")


def existing_directory(text: str) -> str:
    """Return the path of a directory that exists."""
    if not os.path.isdir(text):
        raise ValueError(f"there is no directory {text}")
    return text


def new_directory(text: str) -> str:
    """Return the absolute path of a directory that exists or can be made."""
    path = os.path.abspath(os.path.expanduser(text))
    if os.path.lexists(path) and not os.path.isdir(path):
        raise ValueError(f"{path} is no directory")
    return path


def storage_class(text: str) -> str:
    """Return a storage class whose objects can be read at once."""
    if text.upper() in ("GLACIER", "DEEP_ARCHIVE"):
        raise ValueError(f"objects of the class {text} cannot be read without a restore request")
    return text


def existing_file(text: str) -> str:
    """Return the path of a file that exists."""
    if not os.path.isfile(text):
        raise ValueError(f"there is no file {text}")
    return text


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a datatype that accepts these words and no others."""

    def choose(text: str) -> str:
        if text not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, not {text!r}")
        return text

    return choose


layout = one_of("automatic", "bushy", "lawn")
addressing = one_of("auto", "tid", "record")
addressing_style = one_of("auto", "path", "virtual")
checksum = one_of("when_required", "when_supported")
sse = one_of("AES256", "aws:kms")
on_upload_failure = one_of("abort", "spool")
access = one_of("read-write", "read-only")
bucket_name = values.bucket_name
key_prefix = values.key_prefix
endpoint_url = values.endpoint_url


class Secret:
    """A text that no print of a configuration shows."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return "(secret)"

    def __bool__(self) -> bool:
        return bool(self._text)

    def reveal(self) -> str:
        """Return the text."""
        return self._text


def sse_customer_key(text: str) -> Secret:
    """Return an SSE-C key that can be one."""
    values.sse_customer_key(text)
    return Secret(text)


def region(text: str) -> str:
    """Return the name of a region."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", text):
        raise ValueError(f"a region has only letters, digits and ._- : {text!r}")
    return text


class BlobDirSourceFactory:
    """Section ``<blobdir-source>``."""

    def __init__(self, section: Any) -> None:
        self.path = section.path
        self.layout = section.layout

    def open(self) -> BlobDirSource:
        return BlobDirSource(self.path, self.layout)


class BucketSourceFactory:
    """Section ``<bucket-source>``."""

    def __init__(self, section: Any) -> None:
        self._section = section
        self.place = _place(section)
        _check_bucket(section)

    def open(self) -> BucketSource:
        return BucketSource(_client(self._section, read_only=True))


class S3BlobStorageFactory(BaseConfig):
    """Section ``<s3blobstorage>``: checked while the configuration is parsed, opened later.

    :raises ValueError: when keys contradict each other; ZConfig adds file and line.
    """

    def __init__(self, section: Any) -> None:
        super().__init__(section)
        _check_bucket(section)
        if section.s3_sse and section.s3_sse_customer_key:
            raise ValueError("s3-sse and s3-sse-customer-key exclude each other")
        if section.s3_sse_kms_key_id and section.s3_sse != "aws:kms":
            raise ValueError("s3-sse-kms-key-id needs 's3-sse aws:kms'")
        if section.on_upload_failure == "spool" and not section.spool_dir:
            raise ValueError(
                "'on-upload-failure spool' needs a spool-dir, on a disk that is as safe as that of"
                " the database: until S3 is back it has the only copy of what is committed"
            )
        self._access()
        _check_places(section)
        _check_directories(section)
        _check_base(section.base)
        self._client()  # the constructor checks what the keys alone cannot tell

    def _access(self) -> str:
        """Return what the environment says, else the configuration."""
        try:
            return access(os.environ.get(ACCESS) or self.config.access)
        except ValueError as error:
            raise ValueError(f"{ACCESS}: {error}") from None

    @property
    def is_read_only(self) -> bool:
        """Whether nothing is written to the bucket, or deleted there."""
        return self._access() == READ_ONLY

    def open(self, database_name: str = "unnamed", databases: Any = None) -> S3BlobStorage:
        """Open the base and the cache; S3 is not asked for anything yet."""
        config = self.config
        is_read_only = self.is_read_only
        with ExitStack() as opened:
            base = config.base.open()
            opened.callback(base.close)
            # Refuses before anything is made on disk.
            kind = base_of(base, config.addressing)
            place = _place(config)
            if not is_read_only:
                _refuse_two_databases(place, kind.database())
            cache = S3BlobCache(config.cache_dir, config.cache_size)
            opened.callback(cache.close)
            sources = [source.open() for source in config.sources]
            pool = UploadPool(config.upload_concurrency)
            client: Any = self._client(is_read_only, self.ownership(kind))
            if config.local_blob_dir and is_read_only:
                client = Overlay(LocalBucket(config.local_blob_dir), client)
            elif config.local_blob_dir:
                sources.insert(0, BucketSource(LocalBucket(config.local_blob_dir)))
            spool = None
            # A copy without one makes none.
            if config.spool_dir and not (is_read_only and not os.path.isdir(config.spool_dir)):
                takes_commits = config.on_upload_failure == "spool" and not is_read_only
                spool = Spool(config.spool_dir, place, takes_commits, not is_read_only)
                opened.callback(spool.close)
            storage = S3BlobStorage(
                base,
                client,
                cache,
                sources=sources,
                pool=pool,
                addressing=config.addressing,
                gc_grace=config.gc_grace,
                spool=spool,
                sweep_after_pack=config.sweep_after_pack,
            )
            if not is_read_only:
                _places[place] = kind.database(), weakref.ref(storage)
            opened.pop_all()
        return storage

    def ownership(self, base: Any) -> Ownership:
        """Return what tells whether the bucket is this database's.

        :param Base base: see `bases.base_of`.
        """
        owner = self.config.owner
        return Ownership(partial(identity_of_name, owner) if owner else base.identity)

    @property
    def place(self) -> tuple[str, str, str]:
        """Endpoint, bucket and prefix, by which things outside the bucket know it."""
        return _place(self.config)

    def client(self, is_read_only: bool = True, kind: type[S3Client] = S3Client) -> S3Client:
        """Return a client of the bucket, which asks no database whose it is."""
        return self._client(is_read_only, kind=kind)

    def _client(
        self,
        is_read_only: bool = False,
        ownership: Ownership | None = None,
        kind: type[S3Client] = S3Client,
    ) -> S3Client:
        config = self.config
        return _client(
            config,
            kind,
            read_only=is_read_only,
            ownership=None if is_read_only else ownership,
            multipart_threshold=config.s3_multipart_threshold,
            multipart_part_size=config.s3_multipart_part_size,
            sse=config.s3_sse,
            sse_kms_key_id=config.s3_sse_kms_key_id,
            storage_class=config.s3_storage_class,
            create_bucket=config.s3_create_bucket,
            concurrency=config.upload_concurrency,
            public_endpoint_url=config.s3_public_endpoint_url,
        )


def _place(section: Any) -> tuple[str, str, str]:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")  # where boto3 looks
    endpoint = section.s3_endpoint_url or next(filter(None, map(os.environ.get, names)), "AWS")
    return (endpoint, section.bucket_name, section.s3_prefix)


def _check_bucket(section: Any) -> None:
    """Refuse keys that contradict each other."""
    scheme = urlsplit(section.s3_endpoint_url or "").scheme
    if scheme and section.s3_use_ssl not in (None, scheme == "https"):
        raise ValueError(
            f"s3-use-ssl contradicts s3-endpoint-url, which begins with {scheme}://;"
            " remove s3-use-ssl, the URL decides"
        )
    if bool(section.s3_access_key) != bool(section.s3_secret_key):
        raise ValueError("s3-access-key and s3-secret-key go together; one is missing")
    if section.s3_profile and section.s3_access_key:
        raise ValueError("s3-profile and s3-access-key exclude each other")


def _check_places(section: Any) -> None:
    """Refuse the database's own bucket as a source."""
    for source in section.sources:
        if getattr(source, "place", None) == _place(section):
            raise ValueError(
                "the <bucket-source> is the bucket itself, with the same s3-prefix: a copy that"
                " only reads it needs 'access read-only' and no source"
            )


def _client(section: Any, kind: type[S3Client] = S3Client, **more: Any) -> S3Client:
    """Return a client of the bucket that a section names."""
    return kind(
        section.bucket_name,
        section.s3_prefix,
        section.s3_endpoint_url,
        section.s3_region,
        section.s3_access_key,
        _revealed(section.s3_secret_key),
        section.s3_use_ssl is not False,
        section.s3_addressing_style,
        section.s3_connect_timeout,
        section.s3_read_timeout,
        _revealed(section.s3_sse_customer_key),
        max_attempts=section.s3_max_attempts,
        checksum=section.s3_checksum,
        ca_bundle=section.s3_ca_bundle,
        profile=section.s3_profile,
        **more,
    )


def _revealed(secret: Secret | None) -> str | None:
    return None if secret is None else secret.reveal()


# What this process has opened, by endpoint, bucket and prefix.
_places: dict[tuple[str, str, str], tuple[str, "weakref.ref[S3BlobStorage]"]] = {}


def _refuse_two_databases(place: tuple[str, str, str], database: str) -> None:
    """Refuse a second database under a prefix: each would pack away what is the other's."""
    name, reference = _places.get(place, (database, None))
    other = reference() if reference else None
    if other is not None and other.is_open and name != database:
        raise ValueError(
            f"{name} has bucket {place[1]!r} and s3-prefix {place[2]!r} already;"
            f" give {database} an s3-prefix of its own"
        )


def _check_directories(section: Any) -> None:
    """Refuse directories that are not apart from each other: who empties one would empty both."""
    ours = [("cache-dir", section.cache_dir)]
    if section.spool_dir:
        ours.append(("spool-dir", section.spool_dir))
    if section.local_blob_dir:
        ours.append(("local-blob-dir", section.local_blob_dir))
    directories = [source.path for source in section.sources if hasattr(source, "path")]
    sources = [("a <blobdir-source>", path) for path in directories]
    for (name, path), (other_name, other_path) in [*combinations(ours, 2), *product(ours, sources)]:
        one, other = os.path.realpath(path), os.path.realpath(other_path)
        if os.path.commonpath([one, other]) in (one, other):
            raise ValueError(f"{name} and {other_name} are not apart from each other")


def _check_base(base: Any) -> None:
    """Refuse a base with blobs of its own, however many wrappers are around it."""
    while base is not None:
        section: Any = getattr(base, "config", None)
        blob_dir = getattr(section, "blob_dir", None)
        if blob_dir:
            raise ValueError(
                f"the storage inside has a blob-dir, {blob_dir}, where undo would look for"
                " files that are in S3: remove it there, and name it as a <blobdir-source> unless"
                " it is a cache only, as a RelStorage's or ZEO client's is with shared-blob-dir"
                " false"
            )
        base = getattr(section, "base", None)
