"""What "byte-identical" means for stores: one digest over everything outside log/."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from infra.objects import Get, List
from storage_schemas.documents import sha256
from storage_schemas.keys import LOG_PREFIX


class GetAndList(Get, List, Protocol):
    """The verbs that a digest takes."""


def content_digest(objects: GetAndList, *, threads: int = 4) -> str:
    """sha256 over (key, sha256 of the object) of every object outside log/, in key order.

    Two stores with equal digests hold the same bytes under the same keys. Reads everything; memory: `threads` objects.
    """
    keys = sorted(info.key for info in objects.list() if not info.key.startswith(LOG_PREFIX))
    with ThreadPoolExecutor(threads) as pool:
        return digest_of(zip(keys, pool.map(lambda key: sha256(objects.get(key)), keys)))


def digest_of(digests: Iterable[tuple[str, str]]) -> str:
    """The content digest from (key, hex sha256) pairs in key order: one line `<sha256>  <key>` for each."""
    whole = hashlib.sha256()
    for key, digest in digests:
        whole.update(f"{digest}  {key}\n".encode())
    return whole.hexdigest()
