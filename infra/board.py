"""The Grafana board of extractions and trainings, made from the list of panels: deploy/monitoring/activations.json.

A test holds the file to that list, and says how to write it anew.
"""

import json
from pathlib import Path
from typing import Any

from infra.board_panels import ROWS, Panel

BOARD_PATH = Path(__file__).parent / "deploy" / "monitoring" / "activations.json"
UID = "activations"
_WIDTH = 24  # of Grafana's grid


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


def queries(rate_interval: str) -> list[tuple[Panel, str]]:
    """Every query of the board with its panel, as Prometheus takes it: with all stores and runs chosen.

    Args:
        rate_interval: What Grafana would put in, such as `infra.grafana.RATE_INTERVAL`.
    """
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
