"""The README stays true where a test can tell: its commands exist, its files exist, its Python runs."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"@[A-Z_]+@|TODO|TO BE FILLED", README) == []


@pytest.mark.parametrize("target", sorted({*re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, re.MULTILINE)}))
def test_every_target_named_exists(target: str) -> None:
    done = subprocess.run(
        ["make", "-n", target, "BLOCK=0-7"], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "variable", sorted(set(re.findall(r"\b([A-Z][A-Z_]{2,})=", README)) - {"RAY_ADDRESS", "BLOCKS", "CMD", "JOB"})
)
def test_every_variable_named_is_passed_on(variable: str) -> None:
    value = "1" if variable in ("NO_RAY", "REPAIR", "PARTIAL", "JOIN", "COMPAT") else "7"
    flag = f"--{variable.lower().replace('_', '-')}"
    said = "".join(
        subprocess.run(
            ["make", "-n", target, f"{variable}={value}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=True,
        ).stdout
        for target in (
            *("extract", "verify", "train", "raptor", "copy", "convert", "stores"),
            *("phases", "probe", "import", "table", "demo"),
        )
    )
    assert flag in said or variable == "ARGS"


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target
