"""The Grafana board of extractions and trainings, made from one list of panels: deploy/monitoring/activations.json.

Ray drops a gauge from /metrics some 10 s after it was set, and a scrape may miss it; so gauges are read as their last
value over two minutes. Rates are over Grafana's own interval, which fits how often is scraped.

A test holds the file to this list, and says how to write it anew.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BOARD_PATH = Path(__file__).parent / "deploy" / "monitoring" / "activations.json"
UID = "activations"
_STORE = 'store=~"$store"'
_RUN = 'run=~"$run",block=~"$block"'
_WIDTH = 24  # of Grafana's grid


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph or number.

    Attributes:
        queries: By legend, in which {{label}} stands for a label's value.
        unit: In Grafana's naming.
        kind: timeseries, or stat for the newest value alone.
        needs: What must be there for it to have data, "" when a run suffices: "a GPU", "errors", "several workers".
    """

    title: str
    queries: Mapping[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    about: str = ""
    top: float | None = None
    needs: str = ""


def _gauge(name: str, by: str, labels: str) -> str:
    return f"max by ({by}) (last_over_time(ray_activations_{name}{{{labels}}}[2m]))"


def _rate(name: str, by: str, labels: str) -> str:
    return f"sum by ({by}) (rate(ray_activations_{name}{{{labels}}}[$__rate_interval]))"


_BUSY = f"{_rate('stage_seconds_total', 'store, stage', _STORE)} / {_gauge('stage_lanes', 'store, stage', _STORE)}"
_PLANNED, _COMMITTED = (_gauge(f"{word}_images", "store", _STORE) for word in ("planned", "committed"))
_WAIT, _STEP = (_rate(f"train_{word}_seconds_total", "run, block", _RUN) for word in ("loader_wait", "step"))
_STEPS, _SAMPLES = (_rate(f"train_{word}_total", "run, block", _RUN) for word in ("steps", "samples"))
_FETCHED, _NEEDED = (_rate(f"train_{word}_bytes_total", "run, block", _RUN) for word in ("fetched", "needed"))
_QUANTILE = (
    "histogram_quantile({0}, sum by (store, le) (rate("
    f"ray_activations_shard_duration_seconds_bucket{{{{{_STORE}}}}}[$__rate_interval])))"
)

ROWS: Mapping[str, Sequence[Panel]] = {
    "What limits this run?": (
        Panel(
            title="Busy share per stage",
            queries={"{{store}} {{stage}}": _BUSY},
            unit="percentunit",
            width=12,
            top=1,
            about="Seconds in a stage per second, over the threads that can be in it. The stage near 100 % limits the "
            "run; when none is, workers wait for each other or for the store's commits.",
        ),
        Panel(
            title="Busiest stage",
            queries={"{{stage}}": f"topk(1, max by (stage) ({_BUSY}))"},
            unit="percentunit",
            kind="stat",
            width=4,
        ),
        Panel(
            title="Done", queries={"{{store}}": f"{_COMMITTED} / {_PLANNED}"}, unit="percentunit", kind="stat", width=4
        ),
        Panel(
            title="Time left",
            queries={"{{store}}": f"({_PLANNED} - {_COMMITTED}) / {_rate('images_total', 'store', _STORE)}"},
            unit="s",
            kind="stat",
            width=4,
            about="At the present rate of the jobs that are scraped here.",
        ),
    ),
    "Throughput": (
        Panel(title="Images per second", queries={"{{store}}": _rate("images_total", "store", _STORE)}, unit="ops"),
        Panel(title="Written", queries={"{{store}}": _rate("written_bytes_total", "store", _STORE)}, unit="Bps"),
        Panel(
            title="Images",
            queries={"{{store}} committed": _COMMITTED, "{{store}} planned": _PLANNED},
        ),
    ),
    "Shards and errors": (
        Panel(
            title="Shards",
            queries={"{{store}} {{result}}": f"sum by (store, result) (ray_activations_shards_total{{{_STORE}}})"},
        ),
        Panel(
            title="Seconds per shard",
            queries={"{{store}} median": _QUANTILE.format(0.5), "{{store}} 95 %": _QUANTILE.format(0.95)},
            unit="s",
        ),
        Panel(
            title="Errors per second",
            queries={"{{store}} {{where}} {{kind}}": _rate("errors_total", "store, where, kind", _STORE)},
            unit="ops",
            about="Requests that failed and were made again: throttling, time-outs, lost connections.",
            needs="errors",
        ),
        Panel(
            title="Images that do not decode",
            queries={"{{store}}": f"sum by (store) (ray_activations_bad_images_total{{{_STORE}}})"},
            needs="bad images",
        ),
    ),
    "Workers": (
        Panel(
            title="Workers",
            queries={
                "{{store}} ready": _gauge("workers_ready", "store", _STORE),
                "{{store}} wanted": _gauge("workers_wanted", "store", _STORE),
            },
        ),
        Panel(
            title="Actors by state",
            queries={"{{Name}} {{State}}": 'sum by (Name, State) (ray_actors{Source="gcs"})'},
            about="As Ray's own head sees them; PENDING_CREATION waits for a machine.",
        ),
        Panel(title="Processor use", queries={"{{ip}}": "avg by (ip) (ray_node_cpu_utilization)"}, unit="percent"),
    ),
    "Training": (
        Panel(title="Samples per second", queries={"{{run}} {{block}}": _SAMPLES}, unit="ops"),
        Panel(title="Loss", queries={"{{run}} {{block}}": _gauge("train_loss", "run, block", _RUN)}),
        Panel(
            title="Share of time that waits for the loader",
            queries={"{{run}} {{block}}": f"{_WAIT} / ({_WAIT} + {_STEP})"},
            unit="percentunit",
            top=1,
            about="Below 2 % the store keeps up. The rest of the time is steps.",
        ),
        Panel(title="Seconds per step", queries={"{{run}} {{block}}": f"{_STEP} / {_STEPS}"}, unit="s"),
        Panel(
            title="Read amplification",
            queries={"{{run}} {{block}}": f"{_FETCHED} / {_NEEDED}"},
            about="Bytes fetched per byte asked for. 1 is ideal.",
        ),
        Panel(
            title="Read from the store",
            queries={"{{run}} {{block}}": _FETCHED},
            unit="Bps",
        ),
        Panel(
            title="Model FLOPs utilisation",
            queries={"{{run}} {{block}}": _gauge("train_mfu_ratio", "run, block", _RUN)},
            unit="percentunit",
            needs="a GPU whose peak is known",
        ),
        Panel(
            title="Errors per second",
            queries={
                "{{run}} {{block}} {{where}} {{kind}}": _rate("train_errors_total", "run, block, where, kind", _RUN)
            },
            unit="ops",
            needs="errors",
        ),
    ),
    "Memory, disk, object store, GPU (Ray's own series)": (
        Panel(
            title="Memory in use",
            queries={"{{ip}}": "max by (ip) (ray_node_mem_used / ray_node_mem_total)"},
            unit="percentunit",
            top=1,
        ),
        Panel(
            title="Largest processes",
            queries={"{{ip}} {{Component}}": "topk(8, max by (ip, Component) (ray_component_uss_bytes))"},
            unit="bytes",
        ),
        Panel(
            title="Object store in use",
            queries={"{{NodeAddress}}": "sum by (NodeAddress) (ray_object_store_used_memory)"},
            unit="bytes",
            about="Stays near zero: activations never pass through it.",
        ),
        Panel(
            title="Disk in use",
            queries={"{{ip}}": "max by (ip) (ray_node_disk_utilization_percentage)"},
            unit="percent",
            top=100,
        ),
        Panel(
            title="Network",
            queries={
                "{{ip}} sent": "sum by (ip) (ray_node_network_send_speed)",
                "{{ip}} received": "sum by (ip) (ray_node_network_receive_speed)",
            },
            unit="Bps",
        ),
        Panel(
            title="GPU use",
            queries={"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gpus_utilization)"},
            unit="percent",
            top=100,
            needs="a GPU",
        ),
        Panel(
            title="GPU memory",
            queries={"{{ip}} {{GpuIndex}}": "max by (ip, GpuIndex) (ray_node_gram_used)"},
            unit="mbytes",
            needs="a GPU",
        ),
    ),
}


def make_board() -> dict[str, Any]:
    """The board as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "gridPos": {"h": 1, "w": _WIDTH, "x": 0, "y": y}, "panels": []})
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > _WIDTH:
                x, y = 0, y + 8
            panels.append(_panel(panel, x, y))
            x += panel.width
        y += 8
    for number, one in enumerate(panels, 1):
        one["id"] = number
    return {
        "uid": UID,
        "title": "Activations: extraction and training",
        "tags": ["activations"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_source_variable(), *_label_variables()]},
        "panels": panels,
    }


def _panel(panel: Panel, x: int, y: int) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.top is not None:
        defaults["max"] = panel.top
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about + (f" Empty without {panel.needs}." if panel.needs else ""),
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": {"h": 8, "w": panel.width, "x": x, "y": y},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}} if panel.kind == "timeseries" else {},
        "targets": [
            {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}


def _label_variables() -> list[dict[str, Any]]:
    asked = {
        "store": "label_values(ray_activations_images_total, store)",
        "run": "label_values(ray_activations_train_samples_total, run)",
        "block": 'label_values(ray_activations_train_samples_total{run=~"$run"}, block)',
    }
    return [
        {
            "name": name,
            "type": "query",
            "datasource": {"type": "prometheus", "uid": "${datasource}"},
            "query": {"query": query, "refId": name},
            "refresh": 2,  # when the time range changes
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": {"text": "All", "value": "$__all"},
        }
        for name, query in asked.items()
    ]


def queries(rate_interval: str = "1m") -> list[tuple[Panel, str]]:
    """Every query of the board with its panel, as Prometheus takes it: with all stores and runs chosen."""
    chosen = {"$store": ".*", "$run": ".*", "$block": ".*", "$__rate_interval": rate_interval}
    found = []
    for row in ROWS.values():
        for panel in row:
            for query in panel.queries.values():
                for name, value in chosen.items():
                    query = query.replace(name, value)
                found.append((panel, query))
    return found


def board_text() -> str:
    """The file's text."""
    return json.dumps(make_board(), indent=1) + "\n"
