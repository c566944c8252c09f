"""A RUN folder: what one training leaves behind, written so that a kill at any moment damages nothing.

    config.json                     what the run is; another config in the same RUN is refused
    checkpoints/000001200/*.safetensors   weights, optimizer moments, random state
    checkpoints/000001200.json      place in the stream, sha256 of those files; written last: without it, no checkpoint
    metrics.jsonl                   one line per logging interval and validation
    tensorboard/                    the same, for TensorBoard
    block.safetensors               the trained weights
    result.json                     the last validation; written last: the run is finished

Everything but tensorboard/ is put as whole objects through `infra.objects`. No pickles.
"""

import fcntl
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from infra.console import UserError
from infra.objects import FolderObjects, ObjectMissingError, Objects
from storage_schemas.documents import seal, sha256, unseal
from storage_schemas.errors import SchemaError

CONFIG_KEY = "config.json"
METRICS_KEY = "metrics.jsonl"
WEIGHTS_KEY = "block.safetensors"
RESULT_KEY = "result.json"
CHECKPOINTS_PREFIX = "checkpoints/"
LOCK_NAME = ".lock"

CHECKPOINT_FILES = ("block", "optimizer", "random")

KEPT_CHECKPOINTS = 3
_FORMAT_VERSION = 1
_CHECKPOINT_KEY = re.compile(rf"{CHECKPOINTS_PREFIX}(\d{{9,}})(\.json|/({'|'.join(CHECKPOINT_FILES)})\.safetensors)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything a training needs to go on as if it had never stopped.

    Attributes:
        step: Optimizer steps taken.
        tensors: Tensors by name, by file (`CHECKPOINT_FILES`).
        state: Plain JSON values: position in the stream, losses not logged yet, the last one logged.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


class DamagedCheckpointError(Exception):
    """A checkpoint's document or one of its files is not what was written."""


class RunFiles:
    """The objects of one RUN."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    @property
    def location(self) -> str:
        return self._objects.location

    @property
    def local_folder(self) -> str | None:
        """The folder, where these objects are files; TensorBoard writes to folders only."""
        return self._objects.location if isinstance(self._objects, FolderObjects) else None

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other processes out of a RUN in a local folder, for a while; a dead process keeps nobody out.

        Raises:
            UserError: Another process is in it, or the folder cannot be made.
        """
        if self.local_folder is None:
            yield
            return
        if os.path.exists(self.local_folder) and not os.path.isdir(self.local_folder):
            raise UserError(f"RUN={self.location} is a file, not a folder: give another place (RUN=...)")
        try:
            os.makedirs(self.local_folder, exist_ok=True)
            lock = open(os.path.join(self.local_folder, LOCK_NAME), "a")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"RUN={self.location} cannot be written: {error.strerror}. Give another place (RUN=...)"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is training in {self.location}: wait for it, stop it, or give another RUN"
                ) from error
            except OSError as error:
                raise UserError(
                    f"RUN={self.location} lies on a file system without locks ({error.strerror}), so two processes "
                    "could write into it at once: give a place on a local disk (RUN=...)"
                ) from error
            yield

    # ------------------------------------------------------------ identity

    def read_config(self) -> dict[str, Any] | None:
        """The config of the run in this place, nested as it was written, or None if there is none."""
        document = self._read_document(CONFIG_KEY)
        return None if document is None else document["run"]

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make this RUN that of `config`, or see that it is already, and sweep what torn writes left in it.

        Call it within `exclusive`.

        Raises:
            UserError: The RUN holds another run, and every field that differs is listed; or it holds files and no run.
        """
        asked = json.loads(json.dumps(config))  # tuples become lists, as in what was read
        found = self.read_config()
        if found is None:
            self._check_empty()
            self._objects.put(CONFIG_KEY, seal({"format_version": _FORMAT_VERSION, "run": asked}))
        elif found != asked:
            raise UserError(
                "\n  ".join(
                    [
                        f"{self.location} holds another run:",
                        *differences(found, asked),
                        "Give another place (RUN=...), or the same settings to go on with that run",
                    ]
                )
            )
        self._objects.sweep()

    def _check_empty(self) -> None:
        """A folder that is no run must hold nothing: a run deletes old checkpoints, and resumes from those it finds."""
        found = [info.key for info in self._objects.list() if info.key != LOCK_NAME]
        if found:
            raise UserError(
                f"RUN={self.location} has no {CONFIG_KEY}, so it is no run, but it holds {', '.join(found[:5])}"
                f"{f' and {len(found) - 5:,} more' if len(found) > 5 else ''}. Give an empty or new place (RUN=...)"
            )

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, its document last, then delete the oldest beyond the last few."""
        name = _checkpoint_name(checkpoint.step)
        digests = {}
        for file, tensors in checkpoint.tensors.items():
            assert file in CHECKPOINT_FILES, "a file by another name would never be deleted"
            data = tensors_to_bytes({key: value.contiguous() for key, value in tensors.items()})
            digests[file] = sha256(data)
            self._objects.put(f"{name}/{file}.safetensors", data)
        document = {"format_version": _FORMAT_VERSION, "step": checkpoint.step, "state": checkpoint.state}
        self._objects.put(f"{name}.json", seal({**document, "sha256": digests}))
        self._delete_checkpoints_but(self._checkpoint_steps()[-KEPT_CHECKPOINTS:])

    def newest_checkpoint(self, report: Callable[[str], None] | None = None) -> Checkpoint | None:
        """The newest whole checkpoint; None if there is none, not even a damaged one.

        A damaged one is reported (to standard error by default) and passed over for the one before it.

        Raises:
            UserError: All of them are damaged. To begin again in silence could throw days of work away.
        """
        steps = self._checkpoint_steps()
        for step in reversed(steps):
            try:
                return self._read_checkpoint(step)
            except DamagedCheckpointError as error:
                (report or _say)(f"{self.location}: the checkpoint of step {step:,} is damaged: {error}")
        if steps:
            raise UserError(
                f"{self.location}: all {len(steps)} checkpoints are damaged, of steps "
                f"{', '.join(f'{step:,}' for step in steps)}. Bring one back from a copy, or delete "
                f"{self.location}/{CHECKPOINTS_PREFIX.rstrip('/')} to train from the beginning"
            )
        return None

    def _read_checkpoint(self, step: int) -> Checkpoint:
        name = _checkpoint_name(step)
        try:
            document = unseal(f"{name}.json", self._objects.get(f"{name}.json"))
            files = {
                file: self._read_tensors(f"{name}/{file}.safetensors", d) for file, d in document["sha256"].items()
            }
        except (SchemaError, ObjectMissingError, SafetensorError) as error:
            raise DamagedCheckpointError(str(error)) from error
        return Checkpoint(step=document["step"], tensors=files, state=document["state"])

    def _read_tensors(self, key: str, digest: str) -> dict[str, Tensor]:
        data = self._objects.get(key)
        if sha256(data) != digest:
            raise DamagedCheckpointError(f"{key} has sha256 {sha256(data)[:16]}, its document says {digest[:16]}")
        return tensors_from_bytes(data)

    def _checkpoint_steps(self) -> list[int]:
        return sorted(step for key, step in self._checkpoint_keys().items() if key.endswith(".json"))

    def _delete_checkpoints_but(self, steps: Sequence[int]) -> None:
        """The document goes first, so that what is left of an interrupted deletion is no checkpoint."""
        doomed = [key for key, step in self._checkpoint_keys().items() if step not in steps]
        for key in sorted(doomed, key=lambda key: not key.endswith(".json")):
            self._objects.delete(key)

    def _checkpoint_keys(self) -> dict[str, int]:
        """What we wrote below checkpoints/, each with its step; other people's files there are not ours to delete."""
        found = (_CHECKPOINT_KEY.fullmatch(info.key) for info in self._objects.list(CHECKPOINTS_PREFIX))
        return {match[0]: int(match[1]) for match in found if match}

    # ------------------------------------------------------------ metrics

    def write_metrics(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace metrics.jsonl."""
        text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
        self._objects.put(METRICS_KEY, text.encode())

    def read_metrics(self, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where there is no such file.

        Lines that are damaged are left out and reported, to standard error by default: training does not need them.
        """
        try:
            data = self._objects.get(METRICS_KEY)
        except ObjectMissingError:
            return []
        lines, bad = [], []
        for number, text in enumerate(data.splitlines(), 1):
            line = _metrics_line(text)
            if line is None:
                bad.append(number)
            else:
                lines.append(line)
        if bad:
            (report or _say)(
                f"{self.location}/{METRICS_KEY}: {len(bad)} of {len(bad) + len(lines)} lines are damaged and left out: "
                f"{', '.join(map(str, bad[:10]))}{' ...' if len(bad) > 10 else ''}"
            )
        return lines

    # ------------------------------------------------------------ the end

    def finish(self, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Write the trained weights and then the result, which marks the run as finished."""
        data = tensors_to_bytes({key: value.contiguous() for key, value in weights.items()})
        self._objects.put(WEIGHTS_KEY, data)
        self._objects.put(RESULT_KEY, seal({**result, "weights_nbytes": len(data), "weights_sha256": sha256(data)}))

    def read_result(self) -> dict[str, Any] | None:
        """What `finish` was given, or None while the run is not finished."""
        return self._read_document(RESULT_KEY)

    def read_weights(self) -> dict[str, Tensor]:
        """The trained weights of a finished run.

        Raises:
            UserError: The run is not finished, or the weights are not the ones that its result names.
        """
        result = self.read_result()
        if result is None:
            raise UserError(
                f"{self.location} holds no finished run: it has no {RESULT_KEY}. Finish it: make train RUN=..."
            )
        try:
            return self._read_tensors(WEIGHTS_KEY, result["weights_sha256"])
        except (DamagedCheckpointError, ObjectMissingError, SafetensorError) as error:
            raise UserError(
                f"{self.location}: {error}. Delete {RESULT_KEY} and run the same make train again"
            ) from error

    def _read_document(self, key: str) -> dict[str, Any] | None:
        try:
            data = self._objects.get(key)
        except ObjectMissingError:
            return None
        try:
            return unseal(key, data)
        except SchemaError as error:
            raise UserError(f"{self.location}: {error}\nGive another place (RUN=...), or delete this one") from error


def differences(found: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Field by field, how what a RUN holds differs from what is asked for."""
    lines = []
    for name in [*found, *(name for name in asked if name not in found)]:
        old, new = found.get(name, "nothing"), asked.get(name, "nothing")
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            lines.append(f"{prefix}{name}: the run has {old!r}, this command asks for {new!r}")
    return lines


def _checkpoint_name(step: int) -> str:
    return f"{CHECKPOINTS_PREFIX}{step:09d}"


def _metrics_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None if it is none."""
    try:
        line = json.loads(text)
    except ValueError:  # no JSON, or no UTF-8
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
