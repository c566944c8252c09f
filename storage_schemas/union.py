"""Several stores of the same samples, each with layers of its own, presented as one."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np

from infra.objects import Buffer, Folder, ObjectInfo, Objects
from storage_schemas.commit import Fidelity
from storage_schemas.commit_table import CommitTable
from storage_schemas.create import StoreDocument
from storage_schemas.errors import Problem, SchemaError
from storage_schemas.keys import SAMPLES_KEY, layer_path
from storage_schemas.reader import Store
from storage_schemas.spec import differences
from storage_schemas.statistics import Statistics

_FORM = ("backend", "codec", "shuffle")  # a union has one of each, since readers plan with one chunk layout


class UnionStore(Store):
    """The union of the layers of several stores; reads of a layer go to the first store that has it."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        layers = tuple(sorted({layer for store in stores for layer in store.layers}))
        first = stores[0]
        spec = dataclasses.replace(first.spec, layers=layers)
        owners = {layer: next(s for s in stores if layer in s.layers) for layer in layers}
        self._owners = owners
        document = StoreDocument(spec=spec, documents=_union_documents(first, owners))
        super().__init__(
            _RoutedObjects(first.objects, {layer_path(layer): s.objects for layer, s in owners.items()}),
            document,
            _union_table(stores, owners),
            {key: f"{s.location}: {text}" for s in reversed(stores) for key, text in s.damaged_commits.items()},
        )

    @property
    def statistics(self) -> Statistics:
        """As of a single store, each layer from the store that holds it."""
        self._check_undamaged()
        parts = [s.statistics.to_array()[s.layers.index(layer)] for layer, s in self._owners.items()]
        return Statistics.from_array(np.stack(parts))

    @property
    def fidelity(self) -> dict[str, Fidelity]:
        """Likewise; a shard that only some of the stores have counts in those."""
        self._check_undamaged()
        return {
            path: found
            for layer, store in self._owners.items()
            for path, found in store.fidelity.items()
            if path.startswith(f"{layer_path(layer)}/")
        }

    def shard_statistics(self, shard: SupportsIndex) -> Statistics:
        parts = [s.shard_statistics(shard).to_array()[s.layers.index(layer)] for layer, s in self._owners.items()]
        return Statistics.from_array(np.stack(parts))

    def verify(self, **options) -> list[Problem]:  # type: ignore[no-untyped-def]
        """Problems of all stores; keys are preceded by the store's location."""
        return [
            dataclasses.replace(problem, key=f"{store.location}/{problem.key}")
            for store in self._stores
            for problem in store.verify(**options)
        ]


class _RoutedObjects:
    """Reads by key, sent to the store that owns the key's layer; everything else goes to the first store."""

    def __init__(self, first: Objects, by_layer: dict[str, Objects]) -> None:
        self._first = first
        self._by_layer = by_layer

    @property
    def location(self) -> str:
        return " + ".join(dict.fromkeys(o.location for o in (self._first, *self._by_layer.values())))

    def _owner(self, key: str) -> Objects:
        return self._by_layer.get(key.partition("/")[0], self._first)

    def get(self, key: str, *, at_most: int | None = None) -> bytes:
        return self._owner(key).get(key, at_most=at_most)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self._owner(key).read_into(key, start, buffer)

    def read_parts(self, key: str, start: int, buffers: Sequence[memoryview]) -> Iterator[memoryview]:
        return self._owner(key).read_parts(key, start, buffers)

    def read_rows(self, key: str, start: int, out: np.ndarray, rows: np.ndarray) -> int:
        return self._owner(key).read_rows(key, start, out, rows)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from self._owner(prefix).list(prefix)

    def list_folder(self, prefix: str = "") -> Folder:
        return self._owner(prefix).list_folder(prefix)

    def put(self, key: str, data: Buffer | Sequence[Buffer]) -> None:
        raise PermissionError(f"{self.location}: a union of stores is read-only")

    def put_new(self, key: str, data: Buffer | Sequence[Buffer]) -> bool:
        raise PermissionError(f"{self.location}: a union of stores is read-only")

    def check_writable(self) -> None:
        raise PermissionError(f"{self.location}: a union of stores is read-only")

    def delete(self, key: str) -> None:
        raise PermissionError(f"{self.location}: a union of stores is read-only")

    def sweep(self) -> int:
        raise PermissionError(f"{self.location}: a union of stores is read-only")


def open_union(stores: Sequence[Store]) -> Store:
    """Present several stores as one.

    Raises:
        SchemaError: They are not of the same samples, teacher and settings; lists every difference.
    """
    if not stores:
        raise SchemaError("open_store([])", ["give at least one store"])
    first, problems = stores[0], []
    for other in stores[1:]:
        asked = dataclasses.replace(other.spec, layers=first.spec.layers)
        problems += differences(first.spec, asked, found_has=f"{first.location} has", asked_has=f"{other.location} has")
        if _samples_digest(other) != _samples_digest(first):
            problems.append(f"{other.location} is of other samples than {first.location}")
    if problems and all(problem.partition(":")[0] in _FORM for problem in problems):
        problems.append(f"bring them into one form first: make convert STORE={other.location} TO=... FORMAT= CODEC=")
    if problems:
        raise SchemaError("these stores do not belong together", problems)
    return stores[0] if len(stores) == 1 else UnionStore(stores)


def _union_documents(first: Store, owners: dict[int, Store]) -> dict[str, str]:
    """Digests of the first store's documents, and of each layer's from the store that holds it."""
    documents = {key: digest for key, digest in first.document.documents.items() if not key.startswith("layer_")}
    for layer, store in owners.items():
        prefix = f"{layer_path(layer)}/"
        documents |= {key: digest for key, digest in store.document.documents.items() if key.startswith(prefix)}
    return documents


def _samples_digest(store: Store) -> str:
    return store.document.documents[SAMPLES_KEY]


def _union_table(stores: Sequence[Store], owners: dict[int, Store]) -> CommitTable:
    chunks = {
        path: array
        for layer, store in owners.items()
        for path, array in store.table.chunks.items()
        if path.startswith(f"{layer_path(layer)}/")
    }
    chunks |= {path: array for path, array in stores[0].table.chunks.items() if "/" not in path}
    return CommitTable(
        committed=np.logical_and.reduce([s.committed for s in stores]),
        valid=np.logical_and.reduce([s.valid for s in stores]),
        bad_images={k: v for s in stores for k, v in s.table.bad_images.items()},
        chunks=chunks,
        statistics=stores[0].table.statistics,
        stored_nbytes=sum(s.table.stored_nbytes for s in stores),
        shard_fidelity={
            path: each
            for layer, store in owners.items()
            for path, each in store.table.shard_fidelity.items()
            if path.startswith(f"{layer_path(layer)}/")
        },
    )
