"""Chooses what is known about a base storage by its kind."""

from typing import Any

from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage.FileStorage import FileStorage
from ZODB.interfaces import IBlobStorage
from ZODB.MappingStorage import MappingStorage

from .basecontract import Base
from .basecontract import innermost
from .demobase import DemoBase
from .historybase import LocalBase
from .relstoragebase import RelStorageBase


def base_of(storage: Any, addressing: str = "auto", directory: str | None = None) -> Base:
    """Return what is known about a storage.

    :param str addressing: "auto", "tid", or "record".
    :param str directory: where large transactions spill to that are held back until their uploads
        are done; by default the system's.
    :raises ValueError: when it cannot be the base of ours.
    """
    if addressing not in ("auto", "tid", "record"):
        raise ValueError(f"addressing is auto, tid or record, not {addressing!r}")
    inside = innermost(storage)
    name = type(inside).__name__
    base: Base | None = None
    if isinstance(inside, DemoStorage):
        base = DemoBase(storage)
    elif _is_called(inside, "ZEO.ClientStorage.ClientStorage"):
        # It may not be installed.
        from .zeobase import ZeoBase

        base = ZeoBase(storage, directory)
    elif IBlobStorage.providedBy(storage):
        raise ValueError(
            f"this {type(storage).__name__} has a blob directory of its own, where undo would look"
            " for files that are in S3. Use a storage without blob-dir, and name the directory,"
            " where there is one, as a <blobdir-source>"
        )
    elif isinstance(inside, (FileStorage, MappingStorage)):
        return LocalBase(storage, addressing != "record", directory)
    elif _is_called(inside, "relstorage.storage.RelStorage"):
        base = RelStorageBase(storage)
    if base is None:
        raise ValueError(
            f"a {name} cannot be wrapped: it does not tell the tid of a transaction in time, and"
            " which revisions survive its pack is not known. Use a FileStorage, a MappingStorage, a"
            " RelStorage, a ZEO client or a DemoStorage"
        )
    if addressing == "tid":
        raise ValueError(
            f"addressing tid does not fit a {name}, which tells a transaction's tid too late:"
            " leave the key out, or say auto"
        )
    return base


def _is_called(storage: Any, name: str) -> bool:
    # Its package need not be installed.
    return name in [f"{cls.__module__}.{cls.__name__}" for cls in type(storage).__mro__]
