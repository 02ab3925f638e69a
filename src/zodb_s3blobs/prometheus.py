"""The numbers of storages for Prometheus; needs the extra ``prometheus``.

::

    from prometheus_client import REGISTRY
    from zodb_s3blobs.prometheus import S3BlobsCollector

    REGISTRY.register(S3BlobsCollector({"main": db.storage}))
"""

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from .stats import MEANINGS


class S3BlobsCollector(Collector):
    """Tells what `stats` of storages tells, as ``zodb_s3blobs_hits_total`` and so on.

    :param storages: by the value of the label ``database``, such as the ``storage`` of a
        ``ZODB.DB``.
    :raises TypeError: for a storage that has no numbers.
    """

    def __init__(self, storages: Mapping[str, Any]) -> None:
        self._storages = dict(storages)
        for database, storage in self._storages.items():
            if not hasattr(storage, "stats"):
                raise TypeError(f"{database} is no S3BlobStorage but a {type(storage).__name__}")

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers; those that cannot be told at the moment are left out."""
        numbers = {database: storage.stats() for database, storage in self._storages.items()}
        for name, meaning in MEANINGS.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            metric = family(f"zodb_s3blobs_{name}", meaning, labels=["database"])
            for database, values in numbers.items():
                if values[name] is not None:
                    metric.add_metric([database], values[name])
            yield metric

    def describe(self) -> Iterator[Metric]:
        """Yield no numbers: to be registered must not ask a cache."""
        yield from ()
