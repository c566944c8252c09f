"""Where things lie in a store: object keys and array paths, and back. Opens nothing."""

import re

from storage_schemas.spec import ARRAY_KINDS, HEAD_INPUT, StoreSpec

STORE_KEY = "store.json"
SAMPLES_KEY = "samples.parquet"
INDEX_KEY = "index.parquet"
STATISTICS = "statistics"
COMMITS_PREFIX = "commits/"
TEACHER_PREFIX = "teacher/"
LOG_PREFIX = "log/"
HEARTBEAT_KEY = f"{LOG_PREFIX}heartbeat.json"  # of the job that leads
HEARTBEATS_PREFIX = f"{LOG_PREFIX}heartbeats/"  # of those that joined it
STATISTIC_NAMES = ("count", "mean", "M2", "min", "max")


def layer_path(layer: int) -> str:
    return f"layer_{layer:02d}"


def array_path(layer: int, kind: str) -> str:
    """Path of one (layer, kind) array, for example `layer_07/patches`."""
    return f"{layer_path(layer)}/{kind}"


def array_kind(path: str) -> str:
    """The kind of an array path: `layer_07/patches` -> `patches`, `head_input` -> `head_input`."""
    return path.rpartition("/")[2]


def sharded_array_paths(spec: StoreSpec) -> list[str]:
    """Every array of which a shard writes one object, in the format's order; statistics is not among them."""
    paths = [array_path(layer, kind) for layer in spec.layers for kind in spec.array_kinds]
    return [*paths, HEAD_INPUT] if spec.has_head_input else paths


def shard_object_key(spec: StoreSpec, path: str, shard: int) -> str:
    """Key of the object that holds one shard of an array."""
    if spec.backend == "webdataset":
        return f"{path}/{shard:06d}.tar"
    n_axes = 3 if array_kind(path) in ("registers", "patches") else 2
    return f"{path}/c/{shard}" + "/0" * (n_axes - 1)


def statistics_key(shard: int) -> str:
    return f"{STATISTICS}/c/{shard}/0/0/0/0"


def shard_object_keys(spec: StoreSpec, shard: int) -> list[str]:
    """Every data object of a shard, statistics last."""
    return [*(shard_object_key(spec, path, shard) for path in sharded_array_paths(spec)), statistics_key(shard)]


def data_object_keys(spec: StoreSpec) -> list[str]:
    """Every data object of a complete store: those of shard 0, of shard 1 ..."""
    paths = sharded_array_paths(spec)
    return [
        key
        for shard in range(spec.n_shards)
        for key in (*[shard_object_key(spec, path, shard) for path in paths], statistics_key(shard))
    ]


def commit_key(shard: int) -> str:
    return f"{COMMITS_PREFIX}{shard:06d}.json"


def commit_shard(key: str) -> int | None:
    """The shard of a commit's key, or None for another key."""
    match = re.fullmatch(r"commits/([0-9]{6,10})\.json", key)
    return int(match[1]) if match and commit_key(int(match[1])) == key else None


def zarr_json_keys(spec: StoreSpec) -> list[str]:
    """Every zarr.json: the root group, one group a layer, every array; in a WebDataset store the statistics' alone."""
    if spec.backend == "webdataset":
        return [f"{STATISTICS}/zarr.json"]
    folders = ["", *(layer_path(layer) for layer in spec.layers), *sharded_array_paths(spec), STATISTICS]
    return [f"{folder}/zarr.json" if folder else "zarr.json" for folder in folders]


_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"  # never "..", never hidden
_SHARDED = rf"layer_[0-9]{{2}}/(?:{'|'.join(ARRAY_KINDS)})|{HEAD_INPUT}"
_OWNED = re.compile(
    rf"store\.json|samples\.parquet|index\.parquet|zarr\.json|commits/[0-9]{{6,10}}\.json"
    rf"|teacher/{_NAME}|log(?:/{_NAME})+|layer_[0-9]{{2}}/zarr\.json"
    rf"|(?:{_SHARDED}|{STATISTICS})/(?:zarr\.json|c(?:/[0-9]+)+)|(?:{_SHARDED})/[0-9]{{6,10}}\.tar"
)


def is_owned(key: str) -> bool:
    """Whether a key is one that this format writes; nothing else is ever deleted."""
    return _OWNED.fullmatch(key) is not None


def is_teacher_key(key: str) -> bool:
    """Whether a key is that of a file below teacher/; such a key is a plain path."""
    return key.startswith(TEACHER_PREFIX) and is_owned(key)


def is_shard_object(spec: StoreSpec, key: str) -> bool:
    """Whether a key is that of a data object of some shard of this store."""
    match = re.fullmatch(r"(.+)/(?:c/([0-9]{1,10})(?:/0)+|([0-9]{6,10})\.tar)", key)
    if match is None:
        return False
    path, shard = match[1], int(match[2] or match[3])
    if shard >= spec.n_shards:
        return False
    if path == STATISTICS:
        return key == statistics_key(shard)
    return _is_sharded_array(spec, path) and key == shard_object_key(spec, path, shard)


def _is_sharded_array(spec: StoreSpec, path: str) -> bool:
    if path == HEAD_INPUT:
        return spec.has_head_input
    match = re.fullmatch(r"layer_([0-9]{2})/(\w+)", path)
    return match is not None and int(match[1]) in spec.layers and match[2] in spec.array_kinds
