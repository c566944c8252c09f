"""Names and labels of what is exported: ours as infra/metrics.py lists them, Ray's as a real /metrics had them."""

import json
from functools import cache
from pathlib import Path

from infra.metrics import NAMESPACE, SERIES, Series

_ENDINGS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
_RAYS_OWN = {"SessionName", "NodeAddress", "WorkerId", "Component", "Version"}
_PROMETHEUS_OWN = {"job", "instance"}


def exported_names(name: str, series: Series) -> list[str]:
    """What a series of ours is called in /metrics."""
    return [f"ray_{NAMESPACE}_{name}{ending}" for ending in _ENDINGS[series.kind]]


@cache
def _labels() -> dict[str, set[str]]:
    ours = {
        exported: {*series.tags, *_RAYS_OWN}
        for name, series in SERIES.items()
        for exported in exported_names(name, series)
    }
    rays = json.loads((Path(__file__).parent / "ray_series.json").read_text())
    return {**ours, **{name: set(labels) for part in rays.values() for name, labels in part.items()}, "up": set()}


def series_names() -> set[str]:
    return set(_labels())


def label_names(name: str) -> set[str]:
    labels = _labels()[name] | _PROMETHEUS_OWN
    return labels | {"le"} if name.endswith("_bucket") else labels
