"""Containers: paths as people know them, found by records alone."""

from contextlib import closing
import datetime
import sys
import types

from BTrees.OOBTree import OOBTree
from persistent import Persistent
from persistent.list import PersistentList
from persistent.mapping import PersistentMapping
from persistent.wref import WeakRef
import pytest
from ZODB.blob import Blob

from zodb_s3blobs.operate.containers import Containers
from zodb_s3blobs.operate.running import Work

from .storages import open_db


class Item(Persistent):
    """As a content object, with whatever attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


@pytest.fixture
def db(s3, tmp_path):
    db = open_db(s3, tmp_path)
    yield db
    db.close()


def new_blob():
    blob = Blob()
    with blob.open("w") as file:
        file.write(b"bytes")
    return blob


def path_of(db, blob_oid, work=None):
    with closing(Containers(db.storage)) as containers:
        containers.read(work or Work(1, None, False))
        return containers.path(blob_oid)


def store(db, build):
    """Let a function put a blob below the root; return its path as found."""
    blob = new_blob()
    with db.transaction() as conn:
        build(conn.root(), blob)
    with db.transaction() as conn:
        return path_of(db, blob._p_oid)


def zope(root, **content):
    """Build what Zope and Plone have: an application, a site, and a folder with a BTree."""
    tree = OOBTree()
    folder = Item(id="folder", title="A folder", _tree=tree, __annotations__=OOBTree())
    site = Item(id="Plone", folder=folder, created=datetime.datetime(2026, 1, 1))
    root["Application"] = Item(title="Zope", Plone=site)
    tree.update(content)
    return folder


def test_file_of_plone_has_the_path_of_its_object(db):
    """The BTree of its folder, and the field that has the blob, have no names in it."""

    def build(root, blob):
        field = Item(filename="photo.jpg", _blob=blob)
        zope(root, file=Item(id="file", file=field))

    assert store(db, build) == "/Plone/folder/file"


def test_many_objects_in_a_folder_have_their_own_names(db):
    """Its BTree has buckets, each of which refers to the next one."""

    def build(root, blob):
        others = {f"file-{number:04}": Item(id=f"file-{number:04}") for number in range(500)}
        zope(root, **others, **{"file-0317a": Item(id="file-0317a", file=blob)})

    assert store(db, build) == "/Plone/folder/file-0317a"


def test_scale_in_annotations_is_named_by_its_keys(db):
    """What has neither id nor __name__ has the key by which it is kept."""

    def build(root, blob):
        folder = zope(root)
        folder.__annotations__["plone.scale"] = PersistentMapping({"uid-1": Item(data=blob)})

    assert store(db, build) == "/Plone/folder/plone.scale/uid-1"


@pytest.mark.parametrize(
    "build, path",
    [
        (lambda root, blob: root.update(blob=blob), "/blob"),
        (lambda root, blob: root.update(a=PersistentMapping(b=blob)), "/a/b"),
        (lambda root, blob: root.update(a=OOBTree({7: blob})), "/a/7"),
        (lambda root, blob: root.update(a={"b": {"c": blob}}), "/c"),
        (lambda root, blob: root.update(a=PersistentList([Item(x=blob)])), "/a"),
        (lambda root, blob: root.update(a=Item(__name__="named", _x=blob)), "/named"),
        (lambda root, blob: root.update(a=Item(x=Item(y=blob, z=datetime.date(2026, 1, 1)))), "/a"),
    ],
)
def test_other_containers(db, build, path):
    """Mappings by their keys, others by the names that they have themselves."""
    assert store(db, build) == path


def test_index_that_knows_an_object_does_not_contain_it(db):
    """The way through it would be shorter."""
    module = types.ModuleType("zope.keyreference.testing")
    module.Reference = type("Reference", (Persistent,), {"__module__": module.__name__})
    sys.modules[module.__name__] = module

    def build(root, blob):
        item = Item(id="item", blob=blob)
        zope(root, item=item)
        reference = module.Reference()
        reference.object = item
        root["intids"] = reference

    try:
        assert store(db, build) == "/Plone/folder/item"
    finally:
        del sys.modules[module.__name__]


def test_objects_in_a_circle_and_weak_references_are_no_trouble(db):
    """Children refer to their parents, and something weakly to both."""

    def build(root, blob):
        folder = zope(root)
        item = Item(id="item", blob=blob, __parent__=folder)
        folder.item = item
        folder.weak = WeakRef(blob)

    assert store(db, build) == "/Plone/folder/item"


def test_object_that_nothing_refers_to_has_no_path(db):
    """It waits for the next pack."""
    blob = new_blob()
    with db.transaction() as conn:
        conn.root()["a"] = blob
    with db.transaction() as conn:
        del conn.root()["a"]
    assert path_of(db, blob._p_oid) is None


def test_classes_are_not_imported(s3, tmp_path):
    """The command needs nothing of the site's code, and runs none of it."""
    module = types.ModuleType("not_installed_here")
    module.Content = type("Content", (Persistent,), {"__module__": module.__name__})
    module.Value = type("Value", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    blob = new_blob()
    with closing(open_db(s3, tmp_path)) as db:
        with db.transaction() as conn:
            conn.root()["content"] = content = module.Content()
            content.id, content.value, content.blob = "name", module.Value(), blob
        del sys.modules[module.__name__]
    with closing(open_db(s3, tmp_path)) as db:
        assert path_of(db, blob._p_oid) == "/name"
    assert module.__name__ not in sys.modules
