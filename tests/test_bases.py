"""TidBase: which bases can be wrapped, and what they say about an object's revisions."""

import pytest
from ZODB.blob import BlobStorage
from ZODB.Connection import TransactionMetaData
from ZODB.DemoStorage import DemoStorage
from ZODB.FileStorage import FileStorage
from ZODB.MappingStorage import MappingStorage
from ZODB.tests.hexstorage import HexStorage
from ZODB.utils import p64
from ZODB.utils import z64

from zodb_s3blobs.bases import TidBase

from .storages import BLOB_RECORD
from .storages import commit_record
from .storages import PLAIN_RECORD


OID = p64(1)


@pytest.fixture(params=["FileStorage", "MappingStorage"])
def base(request, tmp_path):
    if request.param == "FileStorage":
        base = FileStorage(f"{tmp_path}/Data.fs")
    else:
        base = MappingStorage()
    yield base
    base.close()


def is_blob(record):
    return record == BLOB_RECORD


class TestWrapping:
    def test_tid_is_known_from_begin_on(self, base):
        """What the base says at tpc_begin is what it commits."""
        wrapped = TidBase(base)
        txn = TransactionMetaData()
        base.tpc_begin(txn)
        tid = wrapped.tid()
        base.store(OID, z64, PLAIN_RECORD, "", txn)
        base.tpc_vote(txn)
        assert base.tpc_finish(txn) == tid

    def test_wrappers_around_a_base_are_looked_through(self, base):
        """The kind of the innermost storage decides."""
        wrapped = TidBase(HexStorage(HexStorage(base)))
        txn = TransactionMetaData()
        base.tpc_begin(txn)
        assert len(wrapped.tid()) == 8
        base.tpc_abort(txn)

    def test_base_that_tells_its_tid_too_late_is_refused(self, base, tmp_path):
        """A DemoStorage is no mere wrapper: the tid of its base is not that of its changes."""
        demo = DemoStorage(base=base, changes=FileStorage(f"{tmp_path}/Changes.fs"))
        for storage in (demo, HexStorage(demo)):
            with pytest.raises(ValueError, match="FileStorage or a MappingStorage"):
                TidBase(storage)
        demo.close()

    def test_base_with_blobs_of_its_own_is_refused_with_advice(self, tmp_path):
        """Its undo would look for files that are in the bucket."""
        storage = FileStorage(f"{tmp_path}/Blobs.fs", blob_dir=f"{tmp_path}/blobs")
        with pytest.raises(ValueError, match="<blobdir-source>"):
            TidBase(storage)
        storage.close()
        mapping = MappingStorage()
        with pytest.raises(ValueError, match="<blobdir-source>"):
            TidBase(BlobStorage(f"{tmp_path}/more", mapping))


class TestSurvivors:
    def test_revisions_asked_about_are_told_from_others(self, base):
        """Those that exist survive, tids that no revision has do not."""
        first = commit_record(base, OID, z64, BLOB_RECORD)
        second = commit_record(base, OID, first, BLOB_RECORD)
        answer = TidBase(base).survivors(OID, {first, second, p64(5)}, is_blob)
        assert answer == ({first, second}, None)
        assert TidBase(base).survivors(OID, {p64(5)}, is_blob) == (set(), None)

    def test_unknown_oid_has_no_survivors(self, base):
        """An object that is gone needs no blob."""
        commit_record(base, p64(9))
        assert TidBase(base).survivors(OID, {p64(5)}, is_blob) == (set(), None)

    def test_object_that_is_no_blob_says_since_when(self, base):
        """That its oid is another object's is told apart from that its revision is gone."""
        first = commit_record(base, OID)
        commit_record(base, OID, first)
        assert TidBase(base).survivors(OID, {p64(5)}, is_blob) == (set(), first)

    def test_errors_other_than_poskeyerror_are_raised(self, base):
        """No answer is not the answer that nothing survives."""
        first = commit_record(base, OID, z64, BLOB_RECORD)

        def fail(record):
            raise OSError("says the test")

        with pytest.raises(OSError, match="says the test"):
            TidBase(base).survivors(OID, {first}, fail)

    def test_undone_creation_keeps_the_revisions_before_it(self, tmp_path):
        """A null record neither ends the history nor is it a revision with a blob."""
        base = FileStorage(f"{tmp_path}/Undo.fs")
        first = commit_record(base, OID, z64, BLOB_RECORD)
        txn = TransactionMetaData()
        base.tpc_begin(txn)
        base.undo(base.undoLog(0, 1)[0]["id"], txn)
        base.tpc_vote(txn)
        undone = base.tpc_finish(txn)
        answer = TidBase(base).survivors(OID, {first, undone}, is_blob)
        assert answer == ({first}, None)
        base.close()
