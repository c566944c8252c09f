"""The back ends that the contract suite runs over. A new one is a line here."""

import secrets
from collections.abc import Callable
from pathlib import Path

from infra.objects import FolderObjects, MemoryObjects, Objects
from infra.s3 import S3Objects
from tests.s3_servers import settings_of, shared_server

#: Each makes empty objects; the path is an empty folder of the test's own.
BACKENDS: dict[str, Callable[[Path], Objects]] = {
    "folder": lambda folder: FolderObjects(folder / "objects"),
    "memory": lambda folder: MemoryObjects(),
    "s3-moto": lambda folder: _s3("moto"),
    "s3-rclone": lambda folder: _s3("rclone"),
}


def _s3(name: str) -> S3Objects:
    server = shared_server(name)
    if name not in _buckets:
        _buckets[name] = server.make_bucket()
    return S3Objects(f"s3://{_buckets[name]}/{secrets.token_hex(6)}", settings=settings_of(server.endpoint))


_buckets: dict[str, str] = {}
