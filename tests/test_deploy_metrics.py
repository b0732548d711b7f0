"""What deploy/ asks Prometheus for exists: names against the list that the services are held to, labels too.

And what clients store leaves room in compose's Redis for the members.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import surfaces
import yaml

from common.config.load import load

DEPLOY = Path(__file__).parent.parent / "deploy"
NAME = re.compile(r"nanodeploy:([a-z0-9_]+)")
HISTOGRAM = re.compile(r"_(bucket|sum|count)$")
KNOWN = {name for names in surfaces.METRICS.values() for name in names}
HISTOGRAMS = {name for name in KNOWN if re.search(r"_(seconds|tokens|sequences)$", name)}
LABELS = {
    "code", "group", "instance", "le", "model_name", "peer", "priority", "role", "state", "status", "transport", "job",
}  # fmt: skip


def alerts() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def panels() -> list[dict[str, Any]]:
    return [p for p in json.loads((DEPLOY / "grafana" / "nanodeploy.json").read_text())["panels"] if p["type"] != "row"]


def expressions() -> list[str]:
    return [rule["expr"] for rule in alerts()] + [target["expr"] for p in panels() for target in p["targets"]]


@pytest.mark.parametrize("expression", expressions())
def test_what_is_asked_for_exists(expression: str) -> None:
    for name in NAME.findall(expression):
        base = HISTOGRAM.sub("", name)
        assert name in KNOWN - HISTOGRAMS or (base in HISTOGRAMS and base != name), name
    for label in re.findall(r"[{,]\s*([a-z_]+)\s*=[~\"]", expression):
        assert label in LABELS, label
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        assert set(labels.replace(" ", "").split(",")) <= LABELS
    assert NAME.search(expression) or "up{" in expression
    assert expression.count("(") == expression.count(")")


def test_panels_do_not_overlap_and_alerts_say_what_they_mean() -> None:
    places = [(p["gridPos"]["x"] + dx, p["gridPos"]["y"] + dy) for p in panels()
              for dx in range(p["gridPos"]["w"]) for dy in range(p["gridPos"]["h"])]  # fmt: skip
    assert len(places) == len(set(places))
    assert all(x < 24 for x, _ in places)
    assert len({p["id"] for p in panels()}) == len(panels())
    assert len({rule["alert"] for rule in alerts()}) == len(alerts())
    for rule in alerts():
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("arguments", [("rules", "alerts.yaml"), ("config", "scrape.yaml")])
def test_promtool_takes_them(arguments: tuple[str, str]) -> None:
    command = ["promtool", "check", *arguments]
    done = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stored_objects_leave_room_in_the_redis_of_compose() -> None:
    """A full one refuses registrations and heartbeats, too."""
    config = load(str(DEPLOY / "compose.config.yaml"), {})
    words = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["redis"]["command"]
    most_mib = int(words[words.index("--maxmemory") + 1].removesuffix("mb"))
    assert config.controller.max_stored_bytes <= most_mib * 2**20 // 2
    assert config.router.max_file_bytes <= config.controller.max_object_bytes < config.controller.max_stored_bytes
