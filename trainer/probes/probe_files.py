"""The place of one probe, a folder or S3 prefix, written so that a kill at any moment damages nothing.

config.json                 what the probe is; another probe in the same place is refused
checkpoint-000000003.safetensors   readout, best readout, optimizer moments
checkpoint.json             iteration, history, sha256 of that file; written after it
heartbeat.json              where there are no file locks, as in S3: the process that is probing here now
head.safetensors            the readout after the last epoch
best_head.safetensors       the readout of the best epoch
result.json                 see trainer.probes.results; written last: the probe is finished
"""

import json
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from infra.console import UserError
from infra.objects import FolderObjects, ObjectAccessError, ObjectMissingError, Objects, ObjectTooLargeError
from storage_schemas.documents import MAX_DOCUMENT_NBYTES, seal, sha256, unseal
from storage_schemas.errors import SchemaError
from trainer.probes.results import ProbeResult, read_result, write_result
from trainer.run_files import differences
from trainer.run_lock import HEARTBEAT_KEY, LOCK_NAME, StillOurs, hold_folder, hold_prefix

CONFIG_KEY = "config.json"
CHECKPOINT_KEY = "checkpoint.json"
HEAD_KEY = "head.safetensors"
BEST_HEAD_KEY = "best_head.safetensors"

_FORMAT_VERSION = 1
_TENSORS_KEY = re.compile(r"checkpoint-(\d{9,})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class ProbeCheckpoint:
    """Everything a probe needs to go on as if it had never stopped.

    Attributes:
        iteration: Iterations done.
        tensors: By name.
        state: JSON values.
    """

    iteration: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


class ProbeFiles:
    """The objects of one probe."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    @property
    def location(self) -> str:
        return self._objects.location

    def exclusive(self) -> AbstractContextManager[StillOurs]:
        """Keep other processes out for a while.

        Raises:
            UserError: Another process is in it, or nothing can be written there.
        """
        if isinstance(self._objects, FolderObjects):
            return hold_folder(self._objects.location, "OUT")
        try:
            self._objects.check_writable()
        except ObjectAccessError as error:
            raise UserError(f"OUT={self.location} may not be written: {error}. Give another place (OUT=...)") from error
        return hold_prefix(self._objects, "OUT")

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether this place was claimed for `config` before; False where there is no probe yet.

        Raises:
            UserError: It holds another probe, and every field that differs is listed.
        """
        document = self._read_document(CONFIG_KEY)
        if document is None:
            return False
        found, asked = document.get("probe"), json.loads(json.dumps(config))
        if not isinstance(found, dict):
            raise UserError(f"{self.location}/{CONFIG_KEY} is not that of a probe. Give another place (OUT=...)")
        if found != asked:
            lines = [line.replace(": the run has", ": that probe has") for line in differences(found, asked)]
            advice = "Give another place (OUT=...), or the same settings to go on with that probe"
            raise UserError("\n  ".join([f"{self.location} holds another probe:", *lines, advice]))
        return True

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make this place that of `config`, or see that it is already. Call it within `exclusive`.

        Raises:
            UserError: It holds another probe, or files and no probe.
        """
        if not self.is_of(config):
            keys = (info.key for info in self._objects.list() if info.key not in (LOCK_NAME, HEARTBEAT_KEY))
            found = list(islice(keys, 5))
            if found:
                raise UserError(
                    f"OUT={self.location} has no {CONFIG_KEY}, so it is no probe, but it holds {', '.join(found)}. "
                    "Give an empty or new place (OUT=...)"
                )
            self._objects.put(CONFIG_KEY, seal({"format_version": _FORMAT_VERSION, "probe": dict(config)}))
        self._objects.sweep()

    def save_checkpoint(self, checkpoint: ProbeCheckpoint) -> None:
        """Write it in the place of the one before."""
        key = f"checkpoint-{checkpoint.iteration:09d}.safetensors"
        data = _to_bytes(checkpoint.tensors)
        self._objects.put(key, data)
        document = {"format_version": _FORMAT_VERSION, "iteration": checkpoint.iteration, "sha256": sha256(data)}
        self._objects.put(CHECKPOINT_KEY, seal({**document, "state": dict(checkpoint.state)}))
        self._delete_tensors_but(key)

    def read_checkpoint(self) -> ProbeCheckpoint | None:
        """Where the probe stands; None at its beginning.

        Raises:
            UserError: It is damaged.
        """
        document = self._read_document(CHECKPOINT_KEY)
        if document is None:
            return None
        try:
            iteration, digest, state = int(document["iteration"]), document["sha256"], dict(document["state"])
            key = f"checkpoint-{iteration:09d}.safetensors"
            data = self._objects.get(key)
            if sha256(data) != digest:
                raise UserError(f"{key} has sha256 {sha256(data)[:16]}, {CHECKPOINT_KEY} says {digest[:16]}")
            return ProbeCheckpoint(iteration=iteration, tensors=tensors_from_bytes(data), state=state)
        except (UserError, ObjectMissingError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{self.location}: the checkpoint is damaged ({error}). Delete {CHECKPOINT_KEY} there to begin the "
                "probe anew"
            ) from error

    def finish(self, head: Mapping[str, Tensor], best_head: Mapping[str, Tensor], result: ProbeResult) -> None:
        """Write the readouts and then the result, which marks the probe as finished."""
        self._objects.put(HEAD_KEY, _to_bytes(head))
        self._objects.put(BEST_HEAD_KEY, _to_bytes(best_head))
        write_result(self._objects, result)
        self._delete_tensors_but(None)

    def read_result(self) -> ProbeResult | None:
        """What `finish` was given; None while the probe is not finished.

        Raises:
            UserError: The document was changed.
        """
        try:
            return read_result(self._objects)
        except ObjectMissingError:
            return None

    def _delete_tensors_but(self, kept: str | None) -> None:
        """The last checkpoint's document goes with its tensors, and before them."""
        if kept is None:
            self._objects.delete(CHECKPOINT_KEY)
        doomed = [info.key for info in self._objects.list() if _TENSORS_KEY.fullmatch(info.key) and info.key != kept]
        for key in doomed:
            self._objects.delete(key)

    def _read_document(self, key: str) -> dict[str, Any] | None:
        try:
            return unseal(key, self._objects.get(key, at_most=MAX_DOCUMENT_NBYTES))
        except ObjectMissingError:
            return None
        except (SchemaError, ObjectTooLargeError) as error:
            raise UserError(f"{self.location}: {error}\nGive another place (OUT=...), or delete this one") from error


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return tensors_to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
