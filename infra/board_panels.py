"""The panels of the Grafana board: what is asked, and how it is shown.

Ray drops a gauge from /metrics some 10 s after it was set, and a scrape may miss it; so gauges are read as their last
value over two minutes, and those that each driver sets for its own workers are added. Rates are over Grafana's own
interval, which fits how often is scraped; but shares and ratios are over five minutes, as seconds and bytes are counted
once per shard or once per logging interval. Where nothing is divided by nothing, nothing is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_STORE = 'store=~"$store"'
_RUN = 'run=~"$run",block=~"$block"'
_LONG = "5m"


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


def _gauges(name: str, by: str, labels: str) -> str:
    """Of each driver its own, added."""
    return f"sum by ({by}) (last_over_time(ray_activations_{name}{{{labels}}}[2m]))"


def _rate(name: str, by: str, labels: str, over: str = "$__rate_interval") -> str:
    return f"sum by ({by}) (rate(ray_activations_{name}{{{labels}}}[{over}]))"


def _share(part: str, whole: str) -> str:
    return f"{part} / ({whole} > 0)"


_BUSY = _share(
    _rate("stage_seconds_total", "store, stage", _STORE, _LONG), _gauges("stage_lanes", "store, stage", _STORE)
)
_PLANNED, _COMMITTED = (_gauge(f"{word}_images", "store", _STORE) for word in ("planned", "committed"))
_WAIT, _STEP = (_rate(f"train_{word}_seconds_total", "run, block", _RUN, _LONG) for word in ("loader_wait", "step"))
_STEPS, _SAMPLES = (_rate(f"train_{word}_total", "run, block", _RUN, _LONG) for word in ("steps", "samples"))
_FETCHED, _NEEDED = (_rate(f"train_{word}_bytes_total", "run, block", _RUN, _LONG) for word in ("fetched", "needed"))
_TRAIN_PLANNED, _TRAIN_DONE, _TRAIN_STEPS = (
    _gauge(f"train_{word}", "run, block", _RUN) for word in ("planned_samples", "done_samples", "done_steps")
)
#: A quantile of no shards is no number, and no number is >= 0.
_QUANTILE = (
    "histogram_quantile({0}, sum by (store, le) (rate("
    f"ray_activations_shard_duration_seconds_bucket{{{{{_STORE}}}}}[{_LONG}]))) >= 0"
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
            "run; when none is, workers wait for each other or for the store's commits. Over five minutes, so of a "
            "run that has just begun it is too low.",
        ),
        Panel(
            title="Busiest stage",
            queries={"{{stage}}": f"topk(1, max by (stage) ({_BUSY}))"},
            unit="percentunit",
            kind="stat",
            width=4,
        ),
        Panel(
            title="Done",
            queries={"{{store}}": _share(_COMMITTED, _PLANNED)},
            unit="percentunit",
            kind="stat",
            width=4,
        ),
        Panel(
            title="Time left",
            queries={
                "{{store}}": _share(f"({_PLANNED} - {_COMMITTED})", _rate("images_total", "store", _STORE, _LONG))
            },
            unit="s",
            kind="stat",
            width=4,
            about="At the rate of the last five minutes, of the jobs that are scraped here.",
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
                "{{store}} ready": _gauges("workers_ready", "store", _STORE),
                "{{store}} wanted": _gauges("workers_wanted", "store", _STORE),
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
        Panel(
            title="Trained",
            queries={"{{run}} {{block}}": _share(_TRAIN_DONE, _TRAIN_PLANNED)},
            unit="percentunit",
            top=1,
            about="Samples of the whole run, those before it was last resumed included.",
        ),
        Panel(title="Steps", queries={"{{run}} {{block}}": _TRAIN_STEPS}),
        Panel(
            title="Time left",
            queries={"{{run}} {{block}}": _share(f"({_TRAIN_PLANNED} - {_TRAIN_DONE})", _SAMPLES)},
            unit="s",
            about="At the rate of the last five minutes.",
        ),
        Panel(
            title="Samples per second",
            queries={"{{run}} {{block}}": _rate("train_samples_total", "run, block", _RUN)},
            unit="ops",
        ),
        Panel(title="Loss", queries={"{{run}} {{block}}": _gauge("train_loss", "run, block", _RUN)}),
        Panel(
            title="Share of time that waits for the loader",
            queries={"{{run}} {{block}}": _share(_WAIT, f"({_WAIT} + {_STEP})")},
            unit="percentunit",
            top=1,
            about="Below 2 % the store keeps up. The rest of the time is steps.",
        ),
        Panel(title="Seconds per step", queries={"{{run}} {{block}}": _share(_STEP, _STEPS)}, unit="s"),
        Panel(
            title="Read amplification",
            queries={"{{run}} {{block}}": _share(_FETCHED, _NEEDED)},
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
