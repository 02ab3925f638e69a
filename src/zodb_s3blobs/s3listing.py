"""What an answer to a request for a listing says, with the times in it."""

from collections.abc import Mapping
from datetime import datetime
from datetime import timezone
from email.utils import parsedate_to_datetime
import logging
from typing import Any

from .interfaces import ListedObject
from .interfaces import UnfinishedUpload


logger = logging.getLogger(__name__)


def read_page(answer: Mapping[str, Any], cut: int) -> list[ListedObject]:
    """Return the objects of an answer to ListObjectsV2 whose dates were left as text.

    :param int cut: length of the prefix that keys have in the bucket.
    """
    contents = answer.get("Contents", ())
    if not contents:
        return []
    try:
        date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
        listed = _seconds(parsedate_to_datetime(date))
        times = [_seconds(datetime.fromisoformat(_iso(item["LastModified"]))) for item in contents]
    except (KeyError, ValueError):
        # Ages decide what is deleted: where they cannot be told, all is new.
        logger.warning("listing without usable dates")
        return [ListedObject(item["Key"][cut:], item["Size"], 0.0, 0.0) for item in contents]
    return [
        ListedObject(item["Key"][cut:], item["Size"], time, listed)
        for item, time in zip(contents, times, strict=True)
    ]


def read_uploads(answer: Mapping[str, Any], cut: int) -> list[UnfinishedUpload]:
    """Return the uploads of an answer to ListMultipartUploads whose dates were left as text.

    :param int cut: length of the prefix that keys have in the bucket.
    """
    uploads = answer.get("Uploads", ())
    if not uploads:
        return []
    try:
        listed = _seconds(parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]))
        ages = [
            listed - _seconds(datetime.fromisoformat(_iso(item["Initiated"]))) for item in uploads
        ]
    except (KeyError, ValueError):
        logger.warning("listing without usable dates")
        ages = [0.0 for _item in uploads]
    return [
        UnfinishedUpload(item["Key"][cut:], item["UploadId"], max(0.0, age))
        for item, age in zip(uploads, ages, strict=True)
    ]


def _seconds(time: datetime) -> float:
    # S3's times are UTC, also where the server does not say so.
    return (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()


def _iso(text: str) -> str:
    # Python 3.10 does not know the Z.
    return text[:-1] + "+00:00" if text.endswith("Z") else text
