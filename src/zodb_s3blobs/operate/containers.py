"""Finds the path of the object that a blob belongs to, by the records that refer to it.

One pass over the current records notes who refers to whom, in a file: some forty bytes on disk for
each reference. From a blob the shortest way back to the root is taken; nothing is imported.
"""

from collections import deque
from collections.abc import Iterator
import io
import pickle
import sqlite3
from typing import Any

from ZODB.POSException import POSKeyError
from ZODB.serialize import referencesf
from ZODB.utils import p64
from ZODB.utils import u64

from .running import Work


# Objects that are looked at on the way from a blob to the root
PATIENCE = 5000
RECORDS_AT_ONCE = 5000
ROOT = 0
# Indexes and the like refer to what they know, but contain nothing.
_NO_CONTAINERS = (
    "five.intid.", "plone.app.linkintegrity.", "Products.ZCatalog.", "z3c.relationfield.",
    "zc.relation.", "zope.app.keyreference.", "zope.intid.", "zope.keyreference.",
)  # fmt: skip
# What Zope calls the root of its objects
_APPLICATION = "Application"


class Containers:
    """Finds paths, of one database, in one thread.

    :param storage: an `S3BlobStorage`.
    """

    def __init__(self, storage: Any) -> None:
        self._storage = storage.parts.base.storage
        self._untransform = storage.parts.untransform
        self._edges = sqlite3.connect("")
        self._edges.execute("CREATE TABLE edge (child INTEGER, parent INTEGER)")

    def close(self) -> None:
        """Forget all."""
        self._edges.close()

    def exists(self, oid: bytes) -> bool:
        """Tell whether there is an object now."""
        return self._load(oid) is not None

    def read(self, work: Work) -> bool:
        """Note who refers to whom; False when that was stopped."""
        if not hasattr(self._storage, "record_iternext"):
            return True  # a DemoStorage: no path is found
        edges: set[tuple[int, int]] = set()
        with work.progress("containers", unit=" records") as bar:
            for count, (oid, data) in enumerate(self._records(), 1):
                # What Python's integers of a column cannot hold no storage gives out.
                edges.update((u64(child), u64(oid)) for child in referencesf(data))
                if count % RECORDS_AT_ONCE == 0:
                    bar.update(RECORDS_AT_ONCE)
                    self._put(edges)
                    if work.is_stopped:
                        return False
        self._put(edges)
        self._edges.execute("CREATE INDEX by_child ON edge (child)")
        return True

    def _put(self, edges: set[tuple[int, int]]) -> None:
        self._edges.executemany("INSERT INTO edge VALUES (?, ?)", edges)
        edges.clear()

    def _records(self) -> Iterator[tuple[bytes, bytes]]:
        following: Any = None
        while True:
            try:
                oid, _tid, data, following = self._storage.record_iternext(following)
            except POSKeyError as error:
                # An object whose creation was undone
                following = p64(u64(error.args[0]) + 1)
                continue
            except ValueError:
                return  # there is none behind it
            if data:
                yield oid, self._untransform(data)
            if following is None:
                return

    def path(self, oid: bytes) -> str | None:
        """Return a path such as /Plone/folder/file, None where none is found."""
        before: dict[int, int] = {u64(oid): u64(oid)}
        queue = deque(before)
        while queue and len(before) < PATIENCE:
            child = queue.popleft()
            if child == ROOT:
                return self._name(before)
            query = "SELECT parent FROM edge WHERE child = ? ORDER BY parent"
            for (parent,) in self._edges.execute(query, (child,)):
                if parent not in before and not self._only_knows(parent):
                    before[parent] = child
                    queue.append(parent)
        return None

    def _only_knows(self, oid: int) -> bool:
        return f"{_module(self._load(p64(oid)))}.".startswith(_NO_CONTAINERS)

    def _name(self, before: dict[int, int]) -> str:
        """Return the path along a way that leads from the root to the blob."""
        names: list[str] = []
        parent = ROOT
        while (child := before[parent]) != parent:
            state = _state(self._load(p64(parent)))
            own = _own_name(_state(self._load(p64(child))))
            key = own or _key_of(state, p64(child))
            if key:
                names.append(key)
            parent = child
        if names[:1] == [_APPLICATION] and len(names) > 1:
            del names[0]
        return "/" + "/".join(names)

    def _load(self, oid: bytes) -> bytes | None:
        try:
            data, _tid = self._storage.load(oid, "")
        except POSKeyError:
            return None
        plain: bytes = self._untransform(data)
        return plain


class _Reference:
    """A persistent reference in a state."""

    def __init__(self, oid: bytes) -> None:
        self.oid = oid


class _Thing:
    """Stands for whatever a state has an instance of, so that no class is imported."""

    state: Any = None

    def __new__(cls, *args: Any, **kw: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kw: Any) -> None:
        self.state = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_Thing,), {"__module__": module})

    def persistent_load(self, reference: Any) -> _Reference:
        # See ZODB.serialize; weak ones, and those to other databases, are lists.
        if isinstance(reference, tuple):
            reference = reference[0]
        return _Reference(reference if isinstance(reference, bytes) else b"")


def _read(data: bytes | None) -> tuple[Any, Any]:
    """Return the class and the state in a record, None where they cannot be read."""
    unpickler = _Unpickler(io.BytesIO(data or b""))
    try:
        return unpickler.load(), unpickler.load()
    except Exception:
        # Whatever a pickle of somebody else's raises: there is no name, then.
        return None, None


def _state(data: bytes | None) -> Any:
    return _read(data)[1]


def _module(data: bytes | None) -> str:
    # The class, or it and its arguments; in old databases module and name
    found = _read(data)[0]
    while isinstance(found, tuple) and found:
        found = found[0]
    return str(found if isinstance(found, str) else getattr(found, "__module__", ""))


def _own_name(state: Any) -> str | None:
    if not isinstance(state, dict):
        return None
    for name in ("__name__", "id"):
        if isinstance(value := state.get(name), str) and value:
            return value
    return None


def _key_of(state: Any, oid: bytes) -> str | None:
    """Return the key by which a mapping has an object, None where it is an attribute."""
    if not isinstance(state, dict):
        return _find(state, oid)
    for value in state.values():
        if not isinstance(value, _Reference) and (key := _find(value, oid)):
            return key
    return None


def _find(value: Any, oid: bytes, depth: int = 0) -> str | None:
    """Return the key before an object in a dict, or in the state of a BTree or bucket."""
    if depth > 20:
        return None
    if isinstance(value, _Thing):
        value = value.state
    if isinstance(value, dict):
        pairs = [*value.items()]
    elif isinstance(value, (list, tuple)):
        # Of a bucket (key, value, key, value); of a BTree (child, key, child), where keys lead on.
        pairs = [(value[at - 1] if at % 2 else "", item) for at, item in enumerate(value)]
    else:
        return None
    for key, item in pairs:
        if isinstance(item, _Reference):
            if item.oid == oid and isinstance(key, (str, int)) and key != "":
                return str(key)
        elif found := _find(item, oid, depth + 1):
            return found
    return None
