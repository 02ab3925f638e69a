"""References in blobs' records: found again, invisible to plain ZODB, and harmless to look for."""

from contextlib import closing
import io
import os
import pickle
import struct

from hypothesis import example
from hypothesis import given
from hypothesis import strategies as st
from persistent.mapping import PersistentMapping
import pytest
from ZODB.blob import Blob
from ZODB.blob import is_blob_record
from ZODB.Connection import TransactionMetaData
from ZODB.DB import DB
from ZODB.FileStorage import FileStorage
from ZODB.POSException import ConflictError
from ZODB.serialize import get_refs
from ZODB.serialize import ObjectReader
from ZODB.serialize import ObjectWriter
from ZODB.serialize import referencesf
from ZODB.utils import get_pickle_metadata
from ZODB.utils import p64
from ZODB.utils import z64

from zodb_s3blobs.records import read_reference
from zodb_s3blobs.records import with_reference
from zodb_s3blobs.records import without_reference

from .storages import BLOB_RECORD
from .storages import PLAIN_RECORD
from .storages import read
from .storages import write_file


OID = p64(1)
STAMP = bytes(range(16))
MARKER = b"zodb-s3blobs:"
RECORD = with_reference(BLOB_RECORD, STAMP)

STAMPS = st.binary(min_size=16, max_size=16)
PROTOCOLS = [1, 2, 3, 4, 5]


def record_of(cls, state, protocol=3):
    """Return a record of two pickles."""
    return pickle.dumps(cls, protocol) + pickle.dumps(state, protocol)


class Call:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function, *args):
        self._call = function, args

    def __reduce__(self):
        return self._call


class TestRoundTrip:
    @given(STAMPS)
    @example(bytes(16))
    @example(MARKER + b"abc")
    def test_stamp_comes_back(self, stamp):
        """Whatever its bytes are."""
        record = with_reference(BLOB_RECORD, stamp)
        assert read_reference(record) == stamp
        assert without_reference(record) == BLOB_RECORD

    def test_new_reference_takes_the_place_of_the_old_one(self):
        """A record that travelled is stored with a reference of its own."""
        record = with_reference(with_reference(BLOB_RECORD, b"x" * 16), STAMP)
        assert record == RECORD

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_class_in_any_protocol_is_kept_byte_by_byte(self, protocol):
        """Older ZODBs have written 1 and 2; those above 3 are no ZODB's, and do no harm."""
        record = record_of(Blob, None, protocol)
        changed = with_reference(record, STAMP)
        assert changed.startswith(pickle.dumps(Blob, protocol))
        assert read_reference(changed) == STAMP
        assert read_reference(without_reference(changed)) is None
        for other in (changed, without_reference(changed)):
            assert is_blob_record(other) == is_blob_record(record) == (protocol <= 3)

    def test_reference_in_another_protocol_is_found(self):
        """Whoever copies records may pickle them anew."""
        for protocol in (3, 4, 5):
            assert read_reference(record_of(Blob, MARKER + STAMP, protocol)) == STAMP

    @pytest.mark.parametrize("memo", [b"q\x00", b"q\xff", b"r\x00\x01\x00\x00", b"\x94"])
    def test_memo_after_the_reference_is_no_part_of_it(self, memo):
        """An import writes both pickles with one memo."""
        head, end = RECORD.removesuffix(b"q\x00."), b"."
        assert read_reference(head + memo + end) == STAMP
        assert without_reference(head + memo + end) == BLOB_RECORD

    def test_record_without_a_reference_stays_as_it_is(self):
        """Byte by byte, also one that is no blob's, or none at all."""
        records = [record_of(Blob, None, protocol) for protocol in PROTOCOLS]
        for record in [BLOB_RECORD, PLAIN_RECORD, b"", b"anything", MARKER, *records]:
            assert read_reference(record) is None
            assert without_reference(record) == record

    @pytest.mark.parametrize(
        "record",
        [
            b"",
            b"anything",
            PLAIN_RECORD,
            record_of(PersistentMapping, {"blob": Blob}),
            record_of("ZODB.blob", None),
            record_of(("ZODB.blob", "Blob"), None),
            record_of((Blob, None), None),
            BLOB_RECORD[:10],
        ],
    )
    def test_record_of_anything_else_carries_no_reference(self, record):
        """What is no blob must not be written as one."""
        with pytest.raises(ValueError, match="not a Blob's"):
            with_reference(record, STAMP)


class TestPlainZODB:
    """Sites open their database without this package, too."""

    @pytest.fixture
    def db(self, tmp_path):
        """A database with a blob directory and a blob whose record has a reference."""
        storage = FileStorage(f"{tmp_path}/Data.fs", blob_dir=f"{tmp_path}/blobs")
        with DB(storage).transaction() as conn:
            conn.root()["blob"] = blob = Blob(b"before")
        storage.close()
        storage = FileStorage(f"{tmp_path}/Data.fs", blob_dir=f"{tmp_path}/blobs")
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        path = write_file(b"bytes", storage.temporaryDirectory())
        serial = storage.getTid(blob._p_oid)
        storage.storeBlob(blob._p_oid, serial, RECORD, path, "", txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        with closing(DB(storage)) as db:
            yield db

    def record(self, db, name="blob"):
        """The current record of a blob in the root."""
        with db.transaction() as conn:
            return db.storage.load(conn.root()[name]._p_oid)[0]

    def test_object_is_loaded_and_written_without_it(self, db):
        """A change drops the reference: nobody refers to an object that was never written."""
        assert read_reference(self.record(db)) == STAMP
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            assert read(blob) == b"bytes"
            with blob.open("w") as file:
                file.write(b"changed")
        assert self.record(db) == BLOB_RECORD
        with db.transaction() as conn:
            assert read(conn.root()["blob"]) == b"changed"

    def test_reader_makes_a_ghost_and_sets_its_state(self):
        """Blob ignores its state, whatever that is."""
        reader = ObjectReader(factory=lambda conn, module, name: Blob)
        assert type(reader.getGhost(RECORD)) is Blob
        assert reader.getClassName(RECORD) == "ZODB.blob.Blob"
        blob = Blob()
        before = dict(vars(blob))
        blob.__setstate__(reader.getState(RECORD))
        assert vars(blob).keys() == before.keys()
        assert reader.getState(RECORD) == MARKER + STAMP

    def test_record_is_a_blobs_without_references_to_objects(self):
        """Packs and copies ask that of each record."""
        assert is_blob_record(RECORD)
        assert (list(referencesf(RECORD)), list(get_refs(RECORD))) == ([], [])
        assert get_pickle_metadata(RECORD) == ("ZODB.blob", "Blob")

    def test_conflict_is_a_conflict(self, db):
        """Resolution reads the states of both records, and a Blob has nothing that resolves."""
        storage = db.storage
        with db.transaction() as conn:
            blob = conn.root()["blob"]
            oid, serial = blob._p_oid, storage.load(blob._p_oid)[1]
            with blob.open("w") as file:
                file.write(b"changed")
        txn = TransactionMetaData()
        storage.tpc_begin(txn)
        with pytest.raises(ConflictError):
            storage.store(oid, serial, RECORD, "", txn)
        storage.tpc_abort(txn)

    def test_import_brings_the_reference_along(self, db):
        """With the bytes; the importing storage decides what becomes of it."""
        file = io.BytesIO()
        with db.transaction() as conn:
            conn.exportFile(conn.root()["blob"]._p_oid, file)
        file.seek(0)
        with db.transaction() as conn:
            conn.root()["again"] = conn.importFile(file)
        record = self.record(db, "again")
        assert read_reference(record) == STAMP
        assert without_reference(record) == without_reference(self.record(db))
        with db.transaction() as conn:
            assert read(conn.root()["again"]) == b"bytes"


class TestOtherBytes:
    """Records come from the database: looking at them must neither fail nor do anything."""

    @given(st.binary(max_size=200))
    def test_any_bytes_are_a_record_without_a_reference(self, data):
        """Before, between and after what a reference consists of."""
        class_, state = pickle.dumps(Blob, 3), pickle.dumps(MARKER + STAMP, 3)
        for record in (data, MARKER + data, class_ + data + MARKER, data + class_ + state):
            read_reference(record)
            without_reference(record)
        assert read_reference(class_ + state + data) == (None if data else STAMP)

    @given(st.integers(0, len(RECORD) - 1), st.integers(0, 255))
    def test_changed_byte_raises_nothing(self, place, value):
        """A bit may flip anywhere."""
        record = bytearray(RECORD)
        record[place] = value if value not in b"rp" else 0
        found = read_reference(bytes(record))
        assert found is None or len(found) == 16

    @pytest.mark.parametrize("end", range(len(RECORD)))
    def test_truncated_record_has_none(self, end):
        """Wherever it ends."""
        assert read_reference(RECORD[:end]) is None

    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_nothing_in_a_record_is_called(self, tmp_path, protocol):
        """Neither instead of the class, nor instead of the state, nor inside one of them."""
        call = Call(os.mkdir, f"{tmp_path}/called")
        for record in (
            record_of(call, MARKER + STAMP, protocol),
            record_of(Blob, call, protocol),
            record_of(Blob, (MARKER + STAMP, call), protocol),
            record_of((Blob, call), MARKER + STAMP, protocol),
            pickle.dumps(call, protocol) + RECORD,
        ):
            assert read_reference(record + MARKER) is None
            without_reference(record + MARKER)
        with pytest.raises(ValueError, match="not a Blob's"):
            with_reference(record_of(call, None, protocol), STAMP)
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        "text",
        [
            b"cos\nsystem\n.",
            b"cos\nsystem\n(S'true'\ntR.",
            b"cbuiltins\neval\n(S'1'\ntR.",
            b"(S'true'\nios\nsystem\n.",
            b"\x8c\x02os\x8c\x06system\x93.",
            b"\x82\x01.",
            b"P1\n.",
            b"N(Q.",
            b"cZODB.blob\nBlob\n)\x81.",
            b"cZODB.blob\nBlob\n(tR.",
            b"cZODB.blob\nBlob\nN\x85R.",
            b"cZODB.blob\nBlob\nNb.",
            b"czodb_s3blobs.records\nread_reference\n.",
        ],
    )
    def test_globals_and_persistent_ids_are_not_looked_up(self, text):
        """Nothing is imported for a record, and no object asked for."""
        for record in (text + RECORD, BLOB_RECORD.split(b".\x80")[0] + b"." + text + MARKER):
            assert read_reference(record) is None

    def test_persistent_id_in_the_state_is_no_reference(self):
        """The state of some other object, in a record that says it is a Blob's."""
        file = io.BytesIO()
        pickler = pickle.Pickler(file, 3)
        pickler.persistent_id = lambda obj: (z64, None) if type(obj) is list else None
        pickler.dump(Blob)
        pickler.dump((MARKER + STAMP, []))
        assert read_reference(file.getvalue()) is None

    @pytest.mark.parametrize("opcode", [b"B", b"X", b"T", b"\x8b"])
    def test_length_beyond_the_record_raises_nothing(self, opcode):
        """Of bytes, a text or a number that is said to follow."""
        head = pickle.dumps(Blob, 3)
        for size in (len(MARKER) + 17, 1 << 20, (1 << 31) - 1):
            assert read_reference(head + opcode + struct.pack("<I", size) + MARKER + STAMP) is None

    @pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96", b"\x95"])
    def test_length_beyond_the_memory_raises_nothing_else(self, opcode):
        """A damaged length may ask for more than there is; that is no verdict on the record."""
        record = pickle.dumps(Blob, 3) + opcode + struct.pack("<Q", 1 << 62) + MARKER + STAMP
        try:
            assert read_reference(record) is None
        except MemoryError:
            pass

    def test_marker_in_the_record_of_another_object_is_none(self):
        """A text that somebody stored, or an object that holds a blob's record."""
        objects = [PersistentMapping(text=MARKER + STAMP), PersistentMapping(record=RECORD)]
        for record in map(ObjectWriter().serialize, objects):
            assert MARKER in record
            assert read_reference(record) is None
            assert without_reference(record) == record

    @pytest.mark.parametrize(
        "state",
        [
            MARKER,
            MARKER + STAMP[:15],
            MARKER + STAMP + b"!",
            b" " + MARKER + STAMP,
            (MARKER + STAMP).decode("latin-1"),
            bytearray(MARKER + STAMP),
            [MARKER + STAMP],
            {"reference": MARKER + STAMP},
        ],
    )
    def test_state_of_another_form_is_none(self, state):
        """Exactly one form is written, so that exactly one is read."""
        for protocol in PROTOCOLS[2:]:
            assert read_reference(record_of(Blob, state, protocol)) is None
