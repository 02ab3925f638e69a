"""Where a test's bucket is, and plain boto3 access to it."""

from dataclasses import dataclass
from dataclasses import replace
import functools
import os
import uuid

import boto3
from botocore.config import Config

from zodb_s3blobs.ownership import MARKER


@dataclass(frozen=True)
class S3Location:
    """A bucket and the credentials for it.

    :param str | None ca_bundle: certificate file for an https endpoint that is signed privately
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    bucket: str
    ca_bundle: str | None = None


def new_bucket(server):
    """Create a bucket that no other test uses.

    :param server: has the attributes endpoint_url, access_key and secret_key
    :returns: its `S3Location`
    """
    location = S3Location(
        server.endpoint_url, server.access_key, server.secret_key, f"bucket-{uuid.uuid4().hex}"
    )
    _shared_client(location).create_bucket(Bucket=location.bucket)
    return location


def boto3_client(location, **config):
    """Return a client without any code of ours in it, to arrange and to look things up.

    :param config: options of `botocore.config.Config`
    """
    return boto3.client(
        "s3",
        endpoint_url=location.endpoint_url,
        aws_access_key_id=location.access_key,
        aws_secret_access_key=location.secret_key,
        region_name="us-east-1",
        verify=location.ca_bundle,
        config=Config(
            **{
                "signature_version": "s3v4",
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "s3": {"addressing_style": "path"},
                **config,
            }
        ),
    )


def keys(location, prefix=""):
    """Return all keys of a bucket that begin with a prefix, sorted, but for the owner's mark."""
    paginator = _shared_client(location).get_paginator("list_objects_v2")
    pages = paginator.paginate(Bucket=location.bucket, Prefix=prefix)
    found = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return sorted(key for key in found if not key.endswith(MARKER))


def _shared_client(location):
    """Return a client, one for each server and process: to make it takes longer than to ask."""
    return _client_of_process(replace(location, bucket=""), os.getpid())


@functools.lru_cache(maxsize=16)
def _client_of_process(server, pid):
    return boto3_client(server)
