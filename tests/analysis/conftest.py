"""What tests of reports share."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed and not drawn, which takes most of the time of a report."""
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: file.write(b"<svg/>"))
