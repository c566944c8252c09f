"""The benchmark of S3 clients compares all of them on both servers."""

import pytest

from benchmarks import clients


@pytest.mark.s3
def test_every_client_does_every_task_on_both_servers():
    result = clients.run(clients.QUICK)
    assert {row["server"] for row in result.rows} == {"moto", "rclone"}
    assert len(result.rows) == 10
    for row in result.rows:
        assert all(float(row[name]) > 0 for name in ("obstore", "s3fs", "ours")), row
    assert "MB/s" in result.to_text()
