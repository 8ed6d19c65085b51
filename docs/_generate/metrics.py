"""The reference of the metrics: what the service registers, by name, type, labels and help text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from unittest.mock import MagicMock

from prometheus_client.core import Metric
from prometheus_client.metrics import MetricWrapperBase

from vflow_server.monitoring.gauges import Gauges
from vflow_server.telemetry.metrics import Metrics

_INTRODUCTION = """\
# Metrics

The service serves these to Prometheus at `/metrics` of `--metrics-port`. Durations are in seconds. A counter's series
appears with its first count, unless all values of its labels are known beforehand. Prometheus' own collector adds
`process_*`: CPU, memory and file descriptors.

See [Monitor the service](../how-to/monitor.md) for the alarms that are built on them.

| Metric | Type | Meaning |
|---|---|---|
"""


def page() -> str:
    """The Markdown page."""
    rows = []
    for family, labels in families():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        name += "_info" if family.type == "info" else ""
        shown = f"{{{','.join(labels)}}}" if labels else ""
        rows.append(f"| `{name}{shown}` | {family.type} | {family.documentation}{_values(family)} |")
    return _INTRODUCTION + "\n".join(rows) + "\n"


def _values(family: Metric) -> str:
    """The values that a family's labels are known to have, as sentences."""
    known: dict[str, list[str]] = {}
    for sample in family.samples:
        if family.type in ("counter", "gauge"):
            for label, value in sample.labels.items():
                known.setdefault(label, []).append(f"`{value}`")
    return "".join(f" `{label}`: {', '.join(dict.fromkeys(values))}." for label, values in known.items())


def families() -> Iterator[tuple[Metric, tuple[str, ...]]]:
    """Each family of metrics that the service has of its own, with the names of its labels."""
    registry = Metrics().registry
    # The registry tells the labels of a family only once it has a sample; its instruments know them from the start.
    instruments = [each for each in registry._collector_to_names if isinstance(each, MetricWrapperBase)]
    labels = {each._name: tuple(each._labelnames) for each in instruments}
    yield from ((family, labels[family.name]) for family in registry.collect() if family.name in labels)
    # Gauges are read off the parts of a service when somebody asks. Which there are depends on no part's state.
    parts = {name: MagicMock() for name in inspect.signature(Gauges).parameters}
    yield from ((family, tuple(getattr(family, "_labelnames", ()))) for family in Gauges(**parts).collect())
