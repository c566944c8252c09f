"""Board and alert rules ask only for series that exist, by labels that they have; promtool and our own rules agree."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from infra import board
from infra.grafana import RATE_INTERVAL, SCRAPE_EVERY_S
from infra.metrics import NAMESPACE, SERIES
from infra.monitoring import manifests, monitoring
from infra.prometheus import MONITORING, scrape_settings
from tests.infra.exported import exported_names, label_names, series_names

RULES = yaml.safe_load((MONITORING / "alerts.yml").read_text())
promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)"
)


def alerts() -> list[dict]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def names_in(query: str) -> set[str]:
    """Names of series in a PromQL expression."""
    bare = re.sub(r'"[^"]*"', '""', query)
    return set(re.findall(r"\bray_\w+|\bup\b", re.sub(r"\b(?:by|on) \([^)]*\)", "", bare)))


def selectors_in(query: str) -> Iterator[tuple[str, set[str]]]:
    for name, labels in re.findall(r"(\bray_\w+|\bup\b)\{([^}]*)\}", query):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))


def grouped_in(query: str) -> set[str]:
    """Labels after `by` and `on`."""
    found = re.findall(r"\b(?:by|on) \(([^)]*)\)", query)
    return {label.strip() for labels in found for label in labels.split(",")}


def check(query: str) -> None:
    """Every name exists, every label belongs to it."""
    names = names_in(query)
    assert names, query
    known = series_names()
    for name in names:
        assert name in known, f"{name} is exported by nobody: {query}"
    for name, labels in selectors_in(query):
        assert labels <= label_names(name), f"{name} has no {labels - label_names(name)}: {query}"
    for name in names:
        missing = grouped_in(query) - label_names(name) - {"le"}
        # topk(1, max by (stage) (...)) groups again by fewer; what all share must hold the inner ones
        assert not missing, f"{name} has no {missing}: {query}"


def test_the_board_asks_only_for_what_is_exported():
    asked = board.queries(RATE_INTERVAL)
    assert len(asked) > 30
    for _, query in asked:
        check(query)


def test_alerts_ask_only_for_what_is_exported():
    for rule in alerts():
        check(rule["expr"])


@pytest.mark.parametrize(
    "query",
    [
        "sum by (store) (rate(ray_activations_image_total[1m]))",
        'ray_activations_images_total{shop="a"}',
        "sum by (stage) (ray_activations_images_total)",
        "ray_node_memory",
        "ray_activations_workers_ready_total",
        "vector(1)",
    ],
)
def test_the_check_sees_what_is_wrong(query):
    with pytest.raises(AssertionError):
        check(query)


def test_every_series_of_ours_is_on_the_board_or_told_why_not():
    shown = set().union(*(names_in(query) for _, query in board.queries(RATE_INTERVAL)))
    ours = {name for name in series_names() if name.startswith(f"ray_{NAMESPACE}_")}
    unseen = {name.removeprefix(f"ray_{NAMESPACE}_") for name in ours - shown}
    # Parts of a histogram that quantiles do not take; and what passes outside the loop, a few times a run.
    aside = {
        *("shard_duration_seconds_sum", "shard_duration_seconds_count"),
        *("train_validation_seconds_total", "train_checkpoint_seconds_total"),
    }
    assert unseen == aside


def test_the_kept_board_is_the_one_of_the_list():
    assert board.BOARD_PATH.read_text() == board.board_text(), (
        'to write it anew: python -c "from infra.board import *; BOARD_PATH.write_text(board_text())"'
    )


def test_the_board_is_one_that_grafana_can_show():
    found = json.loads(board.BOARD_PATH.read_text())
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", found["uid"])
    numbers = [panel["id"] for panel in found["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"] for variable in found["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another"
        taken |= cells
        for target in panel.get("targets", ()):
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, target
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert label in grouped_in(target["expr"]), f"{panel['title']}: legend {label}"


def test_every_alert_says_what_and_what_to_do():
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names) >= 10
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "warn"), rule["alert"]
        assert "quarantined" in rule["expr"] or re.fullmatch(r"\d+m", rule["for"]), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
        for label in re.findall(r"\$labels\.(\w+)", str(rule["annotations"])):
            everywhere = all(label in label_names(name) for name in names_in(rule["expr"]))
            assert everywhere, f"{rule['alert']}: label {label}"


def test_every_alert_is_tried():
    tried = (MONITORING / "alerts.test.yml").read_text()
    for rule in alerts():
        assert f'alertname="{rule["alert"]}"' in tried


def test_gauges_of_ours_are_read_over_two_minutes():
    """Ray shows a gauge only for the interval in which it was set, so a bare one is there now and gone then."""
    gauges = {f"ray_{NAMESPACE}_{name}" for name, series in SERIES.items() if series.kind == "gauge"}
    for query in [*(query for _, query in board.queries(RATE_INTERVAL)), *(rule["expr"] for rule in alerts())]:
        for name in names_in(query) & gauges:
            n_all = len(re.findall(rf"\b{name}\b", query))
            assert len(re.findall(rf"last_over_time\({name}(?:{{[^}}]*}})?\[2m\]", query)) == n_all, query


def test_local_settings_are_the_kept_ones_with_this_ray_put_in(tmp_path):
    kept = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    here = scrape_settings(targets=["127.0.0.1:1"], files=[tmp_path / "sd.json"], every_s=2)
    (ray,) = here["scrape_configs"]
    assert ray["static_configs"] == [{"targets": ["127.0.0.1:1"]}]
    assert ray["file_sd_configs"][0]["files"] == [str(tmp_path / "sd.json")]
    assert here["global"]["scrape_interval"] == here["global"]["evaluation_interval"] == "2s"
    assert here["rule_files"] == [str(MONITORING / "alerts.yml")]
    assert kept["global"]["scrape_interval"] == f"{SCRAPE_EVERY_S}s"  # as Grafana is told
    assert kept["scrape_configs"][0]["job_name"] == ray["job_name"] == "ray"  # which the alerts ask for


def test_what_ray_declares_for_gpus_is_what_we_ask_for():
    """A machine without a GPU exports none of these; Ray's own list of them is the next best."""
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    declared = json.loads((MONITORING.parents[2] / "tests/infra/ray_series.json").read_text())["declared"]
    for name, labels in declared.items():
        gauge = METRICS_GAUGES[name.removeprefix("ray_")]
        assert set(labels) == set(gauge.view.columns), name


def test_on_kubernetes_the_same_rules_and_board_are_applied():
    pods, rules, shown = manifests("research", "stack")
    assert all(one["metadata"]["namespace"] == "research" for one in (pods, rules, shown))
    assert pods["metadata"]["labels"] == rules["metadata"]["labels"] == {"release": "stack"}
    assert rules["spec"] == RULES
    assert shown["data"] == {"activations.json": board.board_text()}
    assert shown["metadata"]["labels"] == {"grafana_dashboard": "1"}
    (endpoint,) = pods["spec"]["podMetricsEndpoints"]
    rayjob = (MONITORING.parent / "kubernetes" / "rayjob.yaml").read_text()
    assert rayjob.count(f"{{name: {endpoint['port']}, containerPort: 8080}}") == 2  # of the head, of the workers
    assert endpoint["interval"] == f"{SCRAPE_EVERY_S}s"
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": "ray"}]
    assert 'up{job="ray"' in (MONITORING / "alerts.yml").read_text()


def test_the_manifests_are_written(tmp_path, capsys):
    monitoring(out=tmp_path / "new")
    kinds = [one["kind"] for one in yaml.safe_load_all((tmp_path / "new" / "monitoring.yaml").read_text())]
    assert kinds == ["PodMonitor", "PrometheusRule", "ConfigMap"]
    assert f"kubectl apply -f {tmp_path}/new/monitoring.yaml" in capsys.readouterr().out


DOCS = (MONITORING.parents[2] / "docs" / "monitoring.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading of docs/monitoring.md."""
    part = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in cells] for cells in lines]


def test_the_documented_series_are_those_that_are_exported():
    ending = {"counter": "_total", "gauge": "", "histogram": ""}
    expected = [[f"{name}{ending[one.kind]}", ", ".join(one.tags), one.kind] for name, one in SERIES.items()]
    assert [row[:3] for row in rows("The series")] == expected


def test_the_documented_alerts_are_those_that_ring():
    expected = [[rule["alert"], rule["labels"]["severity"]] for rule in alerts()]
    assert [row[:2] for row in rows("The alerts")] == expected


def test_the_documented_pictures_exist_and_are_small():
    names = re.findall(r"\]\((images/[\w-]+\.png)\)", DOCS)
    assert len(names) >= 2
    for name in names:
        assert (MONITORING.parents[2] / "docs" / name).stat().st_size < 300_000


@promtool
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts.test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_agrees(command):
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_takes_local_settings_and_every_query_of_the_board(tmp_path):
    (tmp_path / "local.yml").write_text(yaml.safe_dump(scrape_settings(files=[tmp_path / "sd.json"])))
    (tmp_path / "sd.json").write_text('[{"labels": {"job": "ray"}, "targets": ["127.0.0.1:1"]}]')
    rules = [{"record": f"query:{i}", "expr": query} for i, (_, query) in enumerate(board.queries(RATE_INTERVAL))]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    for command in (["check", "config", "local.yml"], ["check", "rules", "queries.yml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr


def try_queries(folder: Path, series: dict[str, str], expected: dict[str, list[dict]], more: str = "") -> str:
    """What promtool has to say about the board's queries at minute 20 of planted series; "" if all are as expected."""
    queries = [query for _, query in board.queries(RATE_INTERVAL)] + ([more] if more else [])
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    (folder / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {"expr": expression, "eval_time": "20m", "exp_samples": samples} for expression, samples in expected.items()
        ],
    }
    kept = {"rule_files": ["queries.yml"], "evaluation_interval": "10s", "tests": [test]}
    (folder / "test.yml").write_text(yaml.safe_dump(kept))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, timeout=500
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


@promtool
def test_a_run_that_stands_still_shows_no_nan(tmp_path):
    """All counters stay as they are, and every gauge is zero."""
    series = {}
    for name, one in SERIES.items():
        values = {"stage": "decode", "result": "done", "where": "store", "kind": "reset"}
        labels = ",".join(f'{tag}="{values.get(tag, "a")}"' for tag in one.tags)
        for exported in exported_names(name, one):
            for le in ("1", "+Inf") if exported.endswith("_bucket") else ("",):
                more = f',le="{le}"' if le else ""
                series[f"{exported}{{{labels}{more}}}"] = "0x130"
    n = len(board.queries(RATE_INTERVAL))
    none = {f"query:{i} != query:{i}": [] for i in range(n)}  # only what is no number differs from itself
    assert try_queries(tmp_path, series, none) == ""
    planted = none | {f"query:{n} != query:{n}": []}
    bare = "rate(ray_activations_train_step_seconds_total[5m]) / rate(ray_activations_train_steps_total[5m])"
    assert f"query:{n}" in try_queries(tmp_path, series, planted, more=bare)


@promtool
def test_what_two_drivers_do_in_bursts_is_shown_as_it_is(tmp_path):
    """Each has four lanes that are busy half of the time, and commits a shard of 120 images every two minutes."""
    burst = 120 // 10
    steps = [str(i // burst) for i in range(130)]
    series = {}
    for driver in ("1", "2"):
        labels = f'store="s",WorkerId="{driver}"'
        seconds = " ".join(str(240 * int(step)) for step in steps)
        images = " ".join(str(120 * int(step)) for step in steps)
        series |= {
            f'ray_activations_stage_seconds_total{{{labels},stage="device"}}': seconds,
            f'ray_activations_stage_lanes{{{labels},stage="device"}}': "4x130",
            f"ray_activations_images_total{{{labels}}}": images,
            f"ray_activations_planned_images{{{labels}}}": "6000x130",
            f"ray_activations_committed_images{{{labels}}}": "3000x130",
            f"ray_activations_workers_ready{{{labels}}}": "2x130",
        }
    titles = [(panel.title, query) for panel, query in board.queries(RATE_INTERVAL)]
    number = {title: f"query:{i}" for i, (title, _) in reversed(list(enumerate(titles)))}
    ready = next(f"query:{i}" for i, (_, query) in enumerate(titles) if "workers_ready" in query)
    one = [{"labels": "{}", "value": 1}]
    within = {
        number["Busy share per stage"]: (0.38, 0.62),
        number["Time left"]: (3000 / 2 * 0.8, 3000 / 2 * 1.3),
        number["Done"]: (0.5, 0.5),
        ready: (4, 4),
    }
    expected = {f"count({query} >= {low} <= {high})": one for query, (low, high) in within.items()}
    assert try_queries(tmp_path, series, expected) == ""


@promtool
def test_promtool_sees_a_rule_that_does_not_fire(tmp_path):
    """The test of the rules can fail: with a threshold that is never reached it does."""
    text = (MONITORING / "alerts.yml").read_text()
    assert text.count("> 90") == 1
    (tmp_path / "alerts.yml").write_text(text.replace("> 90", "> 99"))
    shutil.copy(MONITORING / "alerts.test.yml", tmp_path)
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts.test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode != 0
    assert "DiskNearlyFull" in done.stdout + done.stderr
