"""The minimal IAM policy of a site; README.rst shows what this returns, held by a test."""

from typing import Any


def minimal_policy(
    bucket_name: str,
    prefix: str = "",
    *,
    is_read_only: bool = False,
    creates_bucket: bool = False,
    kms_key: str | None = None,
    region: str | None = None,
) -> dict[str, Any]:
    """Return what the credentials of a site must be allowed, as AWS writes it.

    :param kms_key: the id or ARN of the key of ``aws:kms``; "" is the account's default.
    :param region: tells in which part of AWS the bucket is.
    """
    arn = f"arn:{_partition(region or '')}"
    bucket = f"{arn}:s3:::{bucket_name}"
    actions = ["s3:GetObject"]
    if not is_read_only:
        actions += ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    on_bucket = ["s3:ListBucket"]
    if creates_bucket and not is_read_only:
        on_bucket.append("s3:CreateBucket")
    statements = [
        _allow(actions, f"{bucket}/{prefix}/*" if prefix else f"{bucket}/*"),
        _allow(on_bucket, bucket),
    ]
    if kms_key is not None:
        actions = ["kms:Decrypt"] if is_read_only else ["kms:GenerateDataKey", "kms:Decrypt"]
        is_id = bool(kms_key) and not kms_key.startswith(("arn:", "alias/"))
        key = f"{arn}:kms:*:*:key/{kms_key if is_id else '*'}"
        statements.append(_allow(actions, kms_key if kms_key.startswith("arn:") else key))
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(actions: list[str], resource: str) -> dict[str, Any]:
    action = actions[0] if len(actions) == 1 else actions
    return {"Effect": "Allow", "Action": action, "Resource": resource}


def _partition(region: str) -> str:
    if region.startswith("cn-"):
        return "aws-cn"
    return "aws-us-gov" if region.startswith("us-gov-") else "aws"
