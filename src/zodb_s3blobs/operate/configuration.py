"""Finds the databases of a zope.conf, a zeo.conf or a ZODB configuration, without Zope."""

from collections.abc import Iterator
import io
import os
import pwd
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit

import ZConfig
from ZConfig.cfgparser import ZConfigParser
from ZConfig.schemaless import Context
from ZConfig.schemaless import Resource
from ZConfig.schemaless import Section
from ZODB.config import getStorageSchema
from ZODB.POSException import StorageError

from ..config import ACCESS
from ..config import READ_ONLY
from ..config import S3BlobStorageFactory
from ..ownership import Ownership
from ..s3client import S3Client
from ..storage import S3BlobStorage


# Sections with a database in them: of Zope, of ZODB
DATABASES = ("zodb_db", "zodb")
OURS = "s3blobstorage"
ENVIRONMENT = "environment"
DEFAULT_PATHS = ("etc/zope.conf", "etc/zeo.conf")


class UsageError(Exception):
    """The command line or the configuration cannot be used; the text says what to do."""


class Database:
    """One storage of a configuration with an ``<s3blobstorage>`` in it, nothing opened.

    :param str name: of the database, or of the storage in a zeo.conf.
    :param factory: what ZConfig makes of the outermost section.
    """

    def __init__(self, name: str, factory: Any) -> None:
        self.name = name
        self._factory = factory
        while not isinstance(factory, S3BlobStorageFactory):
            factory = factory.config.base
        self._ours = factory
        #: the keys of the ``<s3blobstorage>``
        self.config: Any = factory.config

    @property
    def is_read_only(self) -> bool:
        """Whether the configuration, or the environment, says that the bucket is only read."""
        return self._ours.is_read_only

    def open(self) -> Any:
        """Return an `S3BlobStorage`, open to write.

        :raises UsageError: when another process has the database, or it is not there; or when root
            would leave directories there that the site cannot use.
        """
        self._check_user()
        try:
            storage = self._factory.open()
        except (StorageError, OSError, ValueError) as error:
            raise UsageError(f"the database {self.name} cannot be opened: {error}") from error
        except Exception as error:
            # Of zc.lockfile, which need not be known here.
            if type(error).__name__ != "LockError":
                raise
            raise UsageError(
                f"another process has the database {self.name}: stop it, or let it do this itself"
            ) from error
        if self._factory is not self._ours:
            # Wrappers tell us then how they change records.
            storage.registerDB(_NoDatabase())
        while not isinstance(storage, S3BlobStorage):
            storage = storage.base
        return storage

    def _check_user(self) -> None:
        if os.geteuid() != 0:
            return
        config = self.config
        places = [config.cache_dir]
        if not os.path.exists(config.cache_dir):
            # Whoever runs the site has not run it with this yet.
            places = [config.spool_dir, *_paths(config.base)]
        for place in filter(os.path.exists, filter(None, places)):
            if owner := os.stat(place).st_uid:
                raise UsageError(
                    f"run this as the site's user: {place} is of user {_name_of(owner)}, who cannot"
                    " use what root makes"
                )

    def open_to_read(self) -> Any:
        """Return an `S3BlobStorage` over a base that is only read, also while the site runs.

        It shows the database as of now. The bucket may be written.
        """
        section = self.config.base.config
        while section is not None:
            if "read_only" in section.getSectionAttributes():
                section.read_only = True
            section = getattr(getattr(section, "base", None), "config", None)
        return self.open()

    def client(self, read_only: bool = True, kind: type[S3Client] = S3Client) -> Any:
        """Return an `S3Client` of the bucket, which does not ask whose that is."""
        return self._ours.client(read_only, kind)

    def place(self, storage: Any) -> list[Any]:
        """Return what tells a database and its bucket from others, for what a run leaves."""
        return [self.name, *self._ours.place, self.ownership(storage).id]

    def ownership(self, storage: Any) -> Ownership:
        """Return what tells whether the bucket is that of a storage of this database."""
        return self._ours.ownership(storage.parts.base)


def _paths(factory: Any) -> Iterator[str]:
    """Yield the paths of the storages inside, which may be wrapped."""
    section = getattr(factory, "config", None)
    if path := getattr(section, "path", None):
        yield path
    base = getattr(section, "base", None)
    for inner in (*([base] if base else ()), *getattr(section, "factories", ())):
        yield from _paths(inner)


def _name_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


class _NoDatabase:
    """Stands for a ``ZODB.DB`` at the storages that want to know one."""

    def invalidate(self, *args: Any) -> None:
        pass

    invalidateCache = invalidate

    def references(self, *args: Any) -> list[Any]:
        return []

    def transform_record_data(self, data: bytes) -> bytes:
        return data

    untransform_record_data = transform_record_data


def find_database(path: str | None, name: str | None) -> Database:
    """Return the database of a configuration file, and set what its ``<environment>`` says.

    Zope sets that, too, when it has read the file and before it opens a database.

    :param path: None looks in the current directory, where an instance has it.
    :param name: None where there is only one with an ``<s3blobstorage>``.
    :raises UsageError: when there is none, or not exactly one, or it cannot be right.
    """
    path = path or next(filter(os.path.isfile, DEFAULT_PATHS), None)
    if path is None:
        raise UsageError("say which configuration it is: zodb-s3blobs -C etc/zope.conf COMMAND")
    context = _Context()
    try:
        _parse(os.path.abspath(path), context, context.top, {})
    except (OSError, ZConfig.ConfigurationError) as error:
        raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    found = dict(_storages(context.top))
    if not found:
        raise UsageError(f"{path} has no database with an <s3blobstorage>")
    if name is None and len(found) > 1:
        raise UsageError(f"say --database, one of {', '.join(sorted(found))}")
    if name is None:
        (name,) = found
    if name not in found:
        raise UsageError(f"{path} has no database {name}, but {', '.join(sorted(found))}")
    imports = [f"%import {package}" for package in context.top.imports]
    text = "\n".join([*imports, *_lines(found[name]), ""])
    try:
        config, _handlers = ZConfig.loadConfigFile(getStorageSchema(), io.StringIO(text), path)
    except ZConfig.ConfigurationError as error:
        # Its line is one of the text above.
        raise UsageError(f"the database {name} in {path}: {error.message}") from error
    _set_environment(context.top)
    database = Database(name, config.storage)
    try:
        database.is_read_only  # noqa: B018  (the environment may say what nobody understands)
    except ValueError as error:
        raise UsageError(f"the database {name} in {path}: {error}") from error
    return database


class _Context(Context):
    """Takes any section, as nothing here knows those of Zope."""

    def includeConfiguration(self, section: Section, url: str, defines: dict[str, str]) -> None:
        _parse(unquote(urlsplit(url).path), self, section, defines)


def _parse(path: str, context: _Context, section: Section, defines: dict[str, str]) -> None:
    with open(path, encoding="utf-8") as file:
        ZConfigParser(Resource(file, path), context, defines).parse(section)


def _set_environment(tree: Section) -> None:
    was_read_only = os.environ.get(ACCESS) == READ_ONLY
    for section in tree.sections:
        if section.type == ENVIRONMENT:
            os.environ.update({name: values[-1] for name, values in section.items()})
    if was_read_only:
        # Whoever says that of a command means it.
        os.environ[ACCESS] = READ_ONLY


def _storages(tree: Section) -> Iterator[tuple[str, Section]]:
    for section in tree.sections:
        if section.type in DATABASES:
            for storage in filter(_has_ours, section.sections):
                yield section.name or "main", storage
        elif _has_ours(section):
            yield section.name or "1", section


def _has_ours(section: Section) -> bool:
    return section.type == OURS or any(map(_has_ours, section.sections))


def _lines(section: Section) -> Iterator[str]:
    """Yield a section as a text that has the same values."""
    yield f"<{section.type} {section.name or ''}".rstrip() + ">"
    for key, values in section.items():
        # They have been substituted.
        yield from (f"{key} {value.replace('$', '$$')}" for value in values)
    for inner in section.sections:
        yield from _lines(inner)
    yield f"</{section.type}>"
