"""`python -m infra monitoring`: scraping, alert rules and the board, for a cluster with Prometheus' operator."""

from pathlib import Path
from typing import Any

import yaml

from infra.board import BOARD_PATH
from infra.prometheus import MONITORING

NAME = "activations"


def manifests(namespace: str, release: str) -> list[dict[str, Any]]:
    """What `kubectl apply` is given: who is scraped, when to ring, what Grafana shows.

    Args:
        namespace: Of the Ray clusters.
        release: Value of the label by which the operator's Prometheus chooses what it takes; usually the name that
            its chart was installed under.
    """

    def about(labels: dict[str, str]) -> dict[str, Any]:
        return {"name": NAME, "namespace": namespace, "labels": labels}

    chosen = {"release": release}
    pods = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": about(chosen),
        "spec": {
            # Head and workers of every KubeRay cluster of the namespace.
            "selector": {"matchExpressions": [{"key": "ray.io/node-type", "operator": "Exists"}]},
            "podMetricsEndpoints": [
                {
                    "port": "metrics",
                    "interval": "10s",
                    "relabelings": [{"targetLabel": "job", "replacement": "ray"}],  # which the rules ask for
                }
            ],
        },
    }
    rules = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": about(chosen),
        "spec": yaml.safe_load((MONITORING / "alerts.yml").read_text()),
    }
    board = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": about({"grafana_dashboard": "1"}),
        "data": {BOARD_PATH.name: BOARD_PATH.read_text()},
    }
    return [pods, rules, board]


def monitoring(namespace: str = "ray", release: str = "prometheus", out: Path = Path("data/deploy/monitoring")) -> None:
    """Write what a Kubernetes cluster needs to watch extractions and trainings, and say how to apply it.

    Args:
        namespace: Of the Ray clusters.
        release: Name under which the chart kube-prometheus-stack was installed.
        out: Folder for monitoring.yaml.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "monitoring.yaml"
    path.write_text(yaml.safe_dump_all(manifests(namespace, release), sort_keys=False))
    print(path)
    print(f"Next, as docs/monitoring.md explains:\n  kubectl apply -f {path}")
