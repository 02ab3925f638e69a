"""The collector: what stats() tells, as Prometheus reads it."""

import math

from prometheus_client import CollectorRegistry
from prometheus_client import generate_latest
from prometheus_client.openmetrics import exposition
from prometheus_client.openmetrics import parser
from prometheus_client.parser import text_string_to_metric_families as parse
import pytest
from ZODB.utils import p64

from zodb_s3blobs.prometheus import S3BlobsCollector
from zodb_s3blobs.stats import MEANINGS

from .storages import commit_blob
from .storages import load
from .storages import make_storage
from .storages import open_db


OID = p64(1)


class Storage:
    """Tells numbers of which each is another one.

    :param without: names of numbers that cannot be told.
    """

    def __init__(self, without=()):
        self.numbers = {name: number + 0.5 for number, name in enumerate(MEANINGS)}
        self.numbers.update(dict.fromkeys(without))
        self.asked = 0

    def stats(self):
        self.asked += 1
        return dict(self.numbers)


def registered(**storages):
    """Return a registry that tells the numbers of storages."""
    registry = CollectorRegistry()
    registry.register(S3BlobsCollector(storages))
    return registry


def samples(registry, generate=generate_latest, parse=parse):
    """Return the values by name and database, as Prometheus reads them."""
    return {
        (sample.name, sample.labels["database"]): sample.value
        for family in parse(generate(registry).decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("generate", "parse"),
    [
        (generate_latest, parse),
        (exposition.generate_latest, parser.text_string_to_metric_families),
    ],
    ids=["text", "OpenMetrics"],
)
def test_all_numbers_are_told_in_both_formats(generate, parse):
    """Under their names after zodb_s3blobs_."""
    storage = Storage()
    assert samples(registered(main=storage), generate, parse) == {
        (f"zodb_s3blobs_{name}", "main"): value for name, value in storage.numbers.items()
    }


def test_what_only_grows_is_a_counter_and_the_rest_a_gauge():
    """And the help says what stats.MEANINGS does."""
    text = generate_latest(registered(main=Storage())).decode()
    for name, meaning in MEANINGS.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        assert f"# TYPE zodb_s3blobs_{name} {kind}\n" in text
        assert f"# HELP zodb_s3blobs_{name} {meaning}\n" in text


def test_number_that_cannot_be_told_is_left_out():
    """It is not zero, and the other database's is told."""
    found = samples(registered(main=Storage(["cache_bytes"]), other=Storage()))
    assert ("zodb_s3blobs_cache_bytes", "main") not in found
    assert ("zodb_s3blobs_cache_bytes", "other") in found
    assert not any(map(math.isnan, found.values()))


def test_databases_have_their_own_numbers():
    """Told apart by the label."""
    one, two = Storage(), Storage()
    two.numbers["hits_total"] = 77
    found = samples(registered(one=one, two=two))
    assert found["zodb_s3blobs_hits_total", "one"] == one.numbers["hits_total"]
    assert found["zodb_s3blobs_hits_total", "two"] == 77


def test_strange_name_of_a_database_is_kept():
    """It is a label's value, which may be any text."""
    name = 'a "quoted"\\ name\n'
    assert ("zodb_s3blobs_hits_total", name) in samples(registered(**{name: Storage()}))


def test_each_storage_is_asked_once_a_time_and_not_before():
    """To be registered must not wait for a cache; what is told together belongs together."""
    storage = Storage()
    registry = registered(main=storage)
    assert storage.asked == 0
    generate_latest(registry)
    assert storage.asked == 1


def test_real_storage_tells_its_numbers(s3, tmp_path):
    """As they are at the moment."""
    storage, _client = make_storage(s3, tmp_path)
    registry = registered(main=storage)
    tid = commit_blob(storage, OID, b"12345")
    for number in (1, 2):
        load(storage, OID, tid)
        assert (
            f'zodb_s3blobs_hits_total{{database="main"}} {number}.0\n'
            in generate_latest(registry).decode()
        )
    assert samples(registry)["zodb_s3blobs_uploaded_bytes_total", "main"] == 5
    storage.close()


def test_storage_of_a_database_with_zlibstorage_tells_them(s3, tmp_path):
    """It passes the question on."""
    around = "<zlibstorage>\n{}\n</zlibstorage>"
    db = open_db(s3, tmp_path, ["zc.zlibstorage"], around)
    found = samples(registered(main=db.storage))
    assert len(found) == len(MEANINGS) - 2  # an empty cache and an empty spool have no age
    assert found["zodb_s3blobs_cache_max_bytes", "main"] == 1 << 30
    db.close()


def test_what_has_no_numbers_is_refused_at_once():
    """And not by each scrape."""
    with pytest.raises(TypeError, match="main is no S3BlobStorage but a dict"):
        S3BlobsCollector({"main": {}})
