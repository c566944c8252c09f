"""docs/rows.md names tests that exist, and leaves out no row of the tables that it is about."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGE = (REPOSITORY / "docs/rows.md").read_text()
LAST_ROWS = {"A": 15, "B": 10, "C": 15, "D": 13, "E": 10, "F": 11, "G": 11, "H": 10, "I": 12, "J": 10}


def test_every_row_stands_there_once() -> None:
    found = re.findall(r"^\| ([A-J]\d+)\b", PAGE, re.MULTILINE)
    assert sorted(found) == sorted(f"{letter}{n}" for letter, last in LAST_ROWS.items() for n in range(1, last + 1))


def test_every_test_that_is_named_exists() -> None:
    """A name may be cut short by three dots; files of tests are named without their folder too."""
    files = sorted((REPOSITORY / "tests").rglob("*.py"))
    tests = {name for path in files for name in re.findall(r"def test_(\w+)", path.read_text())}
    modules = {path.stem for path in files}
    named = re.findall(r"`([a-z0-9_]+)(\.\.\.)?`", PAGE)
    assert len(named) > 200
    missing = [
        name
        for name, cut in named
        if not (name in tests or (cut and any(test.startswith(name) for test in tests)) or name in modules)
    ]
    assert missing == []
