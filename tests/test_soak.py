"""The soak, for some seconds on each kind of base; and that it would notice."""

import itertools

import pytest

from zodb_s3blobs.testing.process import ServiceMissing

from .conftest import is_required
from .services.location import boto3_client
from .services.location import keys
from .soak import Change
from .soak import content
from .soak import digest_of
from .soak import Look
from .soak import Model
from .soak import Soak
from .soak import SPOOL
from .storages import random_bytes


# Of work; to begin and to compare takes twice as long.
SECONDS = 2


def soak_of(directory, stack, options=None, cls=Soak, seconds=SECONDS):
    """Run a soak, or skip where a service is missing."""
    # A seed of its own for each stack, always the same.
    soak = cls(stack, sum(map(ord, stack)), seconds, directory, options)
    try:
        return soak.run()
    except ServiceMissing as missing:
        act = pytest.fail if is_required("soak") else pytest.skip
        act(str(missing))


@pytest.mark.parametrize(
    "stack, options",
    [
        ("filestorage", None),
        ("record", SPOOL),
        ("relstorage", None),
        ("zeo", None),
    ],
)
def test_short_soak_finds_nothing_wrong(tmp_path, stack, options):
    """Faults, kills and spoiled caches lose nothing, change no byte and leave nothing behind."""
    soak = soak_of(tmp_path, stack, options)
    assert soak.problems == [], soak.summary()
    assert soak.counts["turn: write done"], soak.summary()
    assert soak.counts["turn: read done"], soak.summary()


class Vandal(Soak):
    """Spoils the bucket before all is compared."""

    def heal(self):
        client = boto3_client(self.location)
        place = {"Bucket": self.location.bucket}
        found = keys(self.location)
        # Some are garbage, so one would not do.
        for key in found[::2]:
            client.delete_object(**place, Key=key)
        # Somebody else's bytes, with the metadata of what was there.
        for key in found[1::2]:
            old = client.get_object(**place, Key=key)
            body = random_bytes(key, old["ContentLength"])
            client.put_object(**place, Key=key, Body=body, Metadata=old["Metadata"])
        client.put_object(**place, Key="blobs/1/1.blob", Body=b"left behind")
        client.close()


def test_soak_notices_what_is_wrong_in_the_bucket(tmp_path):
    """A soak that finds nothing has looked."""
    soak = soak_of(tmp_path, "filestorage", cls=Vandal, seconds=1.5)
    problems = "\n".join(soak.problems)
    assert "cannot be read" in problems
    assert "missing in the bucket" in problems or "No blob" in problems


# The model


@pytest.fixture
def wrong():
    """What the model complains about."""
    return []


@pytest.fixture
def model(wrong):
    """A model of two slots, both of tid 10."""
    model = Model(wrong.append)
    for number in range(2):
        model.set_up(number, 10, f"setup/{number}:-")
    return model


_names = itertools.count()


def change(base_tid, base_token, token):
    return Change(base_tid, base_token, token, digest_of(content(token)))


def begin(model, slots=(0,), base=10, tokens=None, kind="write"):
    """Begin a transaction that changes slots, and return its name and its tokens."""
    name = f"1.1.{next(_names)}"
    tokens = tokens or [f"setup/{number}:-" for number in slots]
    new = [f"{name}/{number}:w10" for number in slots]
    changes = {
        n: change(base, old, token) for n, old, token in zip(slots, tokens, new, strict=True)
    }
    model.begin(name, kind, changes)
    return name, new


def see(model, floor=0, at=None, **seen):
    """Let somebody see slots: slot0=(tid, token)."""
    found = {
        int(slot[4:]): (tid, token, digest_of(content(token)))
        for slot, (tid, token) in seen.items()
    }
    model.see(Look("2.1", "read", floor, at, found))


def test_commit_that_is_acknowledged_and_seen_is_right(model, wrong):
    """Nothing is wrong with what was committed and is there."""
    name, (token,) = begin(model)
    model.commit(name, 20)
    see(model, floor=20, slot0=(20, token))
    model.finish()
    assert wrong == []


def test_commit_that_is_acknowledged_and_not_there_is_noticed(model, wrong):
    """A loss: who begins later sees what was before."""
    name, _tokens = begin(model)
    model.commit(name, 20)
    see(model, floor=20, slot0=(10, "setup/0:-"))
    model.finish()
    assert len(wrong) == 1


def test_reader_that_began_before_a_commit_need_not_see_it(model, wrong):
    """A transaction sees what was there when it began."""
    name, _tokens = begin(model)
    model.commit(name, 20)
    see(model, floor=15, slot0=(10, "setup/0:-"))
    model.finish()
    assert wrong == []


def test_half_of_a_transaction_is_noticed(model, wrong):
    """One slot is of the transaction and the other of the time before it."""
    name, tokens = begin(model, slots=(0, 1))
    model.commit(name, 20)
    see(model, slot0=(20, tokens[0]), slot1=(10, "setup/1:-"))
    model.finish()
    assert len(wrong) == 1


def test_lost_update_is_noticed(model, wrong):
    """Two transactions were made from the same revision, and both were committed."""
    (one, _), (two, _) = begin(model), begin(model)
    model.commit(one, 20)
    model.commit(two, 30)
    model.finish()
    assert len(wrong) == 1


def test_aborted_transaction_that_is_seen_is_noticed(model, wrong):
    """Whoever was told that a commit failed tries it again."""
    name, (token,) = begin(model)
    model.abort(name, "it failed")
    see(model, slot0=(20, token))
    assert len(wrong) == 1


def test_revision_that_nobody_has_written_is_noticed(model, wrong):
    """In the end, for its writer may be heard of later."""
    see(model, slot0=(20, "1.1.x/0:w10"))
    assert wrong == []
    model.finish()
    assert "was never committed" in wrong[0]


def test_revision_that_is_seen_before_its_writer_is_heard_of_is_right(model, wrong):
    """What two processes say comes in any order."""
    see(model, slot0=(20, f"1.1.{next(_names) + 1}/0:w10"))
    name, _tokens = begin(model)
    model.commit(name, 20)
    model.finish()
    assert wrong == []


@pytest.mark.parametrize("is_there", [True, False])
def test_commit_without_an_answer_may_be_there_or_not(model, wrong, is_there):
    """Both are right, and what is seen decides for both of its slots."""
    name, tokens = begin(model, slots=(0, 1))
    model.lose(name, "killed")
    if is_there:
        see(model, slot0=(20, tokens[0]), slot1=(20, tokens[1]))
    else:
        see(model, slot0=(10, "setup/0:-"), slot1=(10, "setup/1:-"))
    model.finish()
    assert wrong == []


def test_commit_without_an_answer_that_is_there_by_half_is_noticed(model, wrong):
    """Its other slot must be there, too."""
    name, tokens = begin(model, slots=(0, 1))
    model.lose(name, "killed")
    see(model, slot0=(20, tokens[0]), slot1=(10, "setup/1:-"))
    model.finish()
    assert len(wrong) == 1


def test_other_bytes_than_were_written_are_noticed(model, wrong):
    """The record has another digest than its writer said."""
    name, (token,) = begin(model)
    model.commit(name, 20)
    model.see(Look("2.1", "read", 20, None, {0: (20, token, digest_of(b"others"))}))
    assert len(wrong) == 1


@pytest.mark.parametrize("packed_to, problems", [(0, 1), (15, 1), (20, 0)])
def test_revision_may_be_missing_when_a_pack_could_take_it(model, wrong, packed_to, problems):
    """From the time on at which it was superseded."""
    name, _tokens = begin(model)
    model.commit(name, 20)
    model.pack(packed_to)
    model.miss("2.1", 0, 10, 0, None, "POSKeyError")
    model.finish()
    assert len(wrong) == problems


def test_current_revision_that_is_missing_is_noticed(model, wrong):
    """No pack takes it."""
    model.pack(100)
    model.miss("2.1", 0, 10, 0, None, "POSKeyError")
    model.finish()
    assert len(wrong) == 1


def test_undo_gives_back_what_was_before(model, wrong):
    """Its token is an old one; the next transaction is made from the revision of the undo."""
    name, (token,) = begin(model)
    model.commit(name, 20)
    model.begin("undo", "undo", {0: change(None, token, "setup/0:-")})
    model.lose("undo", "killed")
    see(model, floor=20, slot0=(30, "setup/0:-"))
    name, _tokens = begin(model, base=30)
    model.commit(name, 40)
    model.finish()
    assert wrong == []


@pytest.mark.parametrize("loses_undos, problems", [(False, 1), (True, 0)])
def test_undo_that_is_written_over_is_noticed_unless_the_base_does_that(
    wrong, loses_undos, problems
):
    """A transaction that was made from the revision before the undo did not see it."""
    model = Model(wrong.append, loses_undos)
    model.set_up(0, 10, "setup/0:-")
    name, (token,) = begin(model)
    model.commit(name, 20)
    model.begin("undo", "undo", {0: change(None, token, "setup/0:-")})
    model.commit("undo", 30)
    name, _tokens = begin(model, base=20, tokens=[token])
    model.commit(name, 40)
    model.finish()
    assert len(wrong) == problems
