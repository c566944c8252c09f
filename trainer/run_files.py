"""A RUN, a folder or S3 prefix: what one training leaves behind, written so that a kill at any moment damages nothing.

    config.json                     what the run is; another config in the same RUN is refused
    checkpoints/000001200/*.safetensors   weights, optimizer moments, random state
    checkpoints/000001200.json      place in the stream, sha256 of those files; written last: without it, no checkpoint
    metrics.jsonl                   one line per logging interval and validation
    tensorboard/                    the same, for TensorBoard
    log/status.json                 how far it is and how fast, renewed every ten seconds for people and tools
    heartbeat.json                  where there are no file locks, as in S3: the process that is training here now
    teacher/                        embedding, final norm and head of the teacher that it was trained on, no blocks
    block.safetensors               the trained weights; of several blocks: raptor.safetensors
    result.json                     the last validation; written last: the run is finished

All are whole objects, put through `infra.objects`, into a local folder or S3; only local TensorBoard files grow. No
pickles.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
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
from trainer.run_lock import HEARTBEAT_KEY, LOCK_NAME, StillOurs, hold_folder, hold_prefix

CONFIG_KEY = "config.json"
METRICS_KEY = "metrics.jsonl"
BLOCK_KEY = "block.safetensors"
RAPTOR_KEY = "raptor.safetensors"
RESULT_KEY = "result.json"
STATUS_KEY = "log/status.json"
CHECKPOINTS_PREFIX = "checkpoints/"
EVENTS_PREFIX = "tensorboard/"
TEACHER_PREFIX = "teacher/"

CHECKPOINT_FILES = ("model", "optimizer", "random")

KEPT_CHECKPOINTS = 3
_MAX_METRICS_NBYTES = 2**30
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
        """The folder, where these objects are files."""
        return self._objects.location if isinstance(self._objects, FolderObjects) else None

    def exclusive(self) -> AbstractContextManager[StillOurs]:
        """Keep other processes out of this RUN, for a while; a dead process keeps nobody out.

        Raises:
            UserError: Another process is in it, or the folder cannot be made.
        """
        return hold_prefix(self._objects) if self.local_folder is None else hold_folder(self.local_folder)

    def check_writable(self) -> None:
        """Find out at once, and not at the first checkpoint, that nothing may be written here.

        Raises:
            UserError: Says what was refused.
        """
        if self.local_folder is not None:
            return  # `exclusive` finds out
        try:
            self._objects.check_writable()
        except ObjectAccessError as error:
            raise UserError(
                f"RUN={self.location} may not be written: {error}. Give a place that these credentials may write to "
                "(RUN=...), such as a local folder"
            ) from error

    # ------------------------------------------------------------ identity

    def read_config(self) -> dict[str, Any] | None:
        """The config of the run in this place, nested as it was written, or None if there is none."""
        document = self._read_document(CONFIG_KEY)
        if document is not None and not isinstance(document.get("run"), dict):
            raise UserError(
                f"{self.location}/{CONFIG_KEY} names no 'run', so it is not ours. Give another place (RUN=...)"
            )
        return None if document is None else document["run"]

    def claim(self, config: Mapping[str, Any]) -> None:
        """Make this RUN that of `config`, or see that it is already, and sweep what torn writes left in it.

        Call it within `exclusive`.

        Raises:
            UserError: The RUN holds another run, and every field that differs is listed; or it holds files and no run.
        """
        if not self.is_of(config):
            self._check_empty()
            self._objects.put(CONFIG_KEY, seal({"format_version": _FORMAT_VERSION, "run": _as_json(config)}))
        self._objects.sweep()

    def is_of(self, config: Mapping[str, Any]) -> bool:
        """Whether this RUN was claimed for `config` before; False where there is no run yet.

        Raises:
            UserError: The RUN holds another run, and every field that differs is listed.
        """
        asked, found = _as_json(config), self.read_config()
        if found is not None and found != asked:
            raise UserError(
                "\n  ".join(
                    [
                        f"{self.location} holds another run:",
                        *differences(found, asked),
                        "Give another place (RUN=...), or the same settings to go on with that run",
                    ]
                )
            )
        return found is not None

    def _check_empty(self) -> None:
        """A folder that is no run must hold nothing: a run deletes old checkpoints, and resumes from those it finds."""
        keys = (info.key for info in self._objects.list() if info.key not in (LOCK_NAME, HEARTBEAT_KEY))
        found = list(islice(keys, 6))  # a bucket may hold millions
        if found:
            raise UserError(
                f"RUN={self.location} has no {CONFIG_KEY}, so it is no run, but it holds {', '.join(found[:5])}"
                f"{' and more' if len(found) > 5 else ''}. Give an empty or new place (RUN=...)"
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

    def saved_step(self) -> int:
        """How far this run is: the step of its newest checkpoint, which was not read; 0 without any."""
        return max(self._checkpoint_steps(), default=0)

    def _read_checkpoint(self, step: int) -> Checkpoint:
        name = _checkpoint_name(step)
        try:
            document = unseal(f"{name}.json", self._objects.get(f"{name}.json", at_most=MAX_DOCUMENT_NBYTES))
            _check_checkpoint(document, step)
            files = {
                file: self._read_tensors(f"{name}/{file}.safetensors", d) for file, d in document["sha256"].items()
            }
        except (SchemaError, ObjectMissingError, ObjectTooLargeError, SafetensorError) as error:
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

    def write_events(self, name: str, data: bytes, n_written: int) -> None:
        """Bring an event file of TensorBoard up to date.

        Args:
            name: Of the file.
            data: Everything that it has to hold.
            n_written: Bytes of it that an earlier call has written. A local file only grows, as TensorBoard keeps it
                open; elsewhere the object is put anew.

        Raises:
            ObjectAccessError: It could not be written.
        """
        if self.local_folder is None:
            self._objects.put(f"{EVENTS_PREFIX}{name}", data)
            return
        path = f"{self.local_folder}/{EVENTS_PREFIX}{name}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "ab") as file:
                file.write(data[n_written:])
        except OSError as error:
            raise ObjectAccessError(name, f"{path} could not be written: {error.strerror}") from error

    def read_metrics(self, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; none where there is no such file.

        Lines that are damaged are left out and reported, to standard error by default: training does not need them.
        """
        try:
            data = self._objects.get(METRICS_KEY, at_most=_MAX_METRICS_NBYTES)
        except ObjectMissingError:
            return []
        except ObjectTooLargeError as error:
            (report or _say)(f"{error}; they are left out")
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

    def write_status(self, document: bytes) -> None:
        """Replace log/status.json."""
        self._objects.put(STATUS_KEY, document)

    def read_status(self) -> bytes:
        """log/status.json.

        Raises:
            ObjectError: There is none, or it cannot be read.
        """
        return self._objects.get(STATUS_KEY, at_most=MAX_DOCUMENT_NBYTES)

    # ------------------------------------------------------------ the teacher's ends

    def write_teacher_files(self, files: Mapping[str, bytes]) -> None:
        """Put what the RUN keeps of its teacher (`trainer.raptor_teacher.ends_files`), by name."""
        for name, data in files.items():
            self._objects.put(f"{TEACHER_PREFIX}{name}", data)

    def read_teacher_files(self) -> dict[str, bytes]:
        """The same back; empty where nothing was kept."""
        keys = [info.key for info in self._objects.list(TEACHER_PREFIX)]
        return {key.removeprefix(TEACHER_PREFIX): self._objects.get(key) for key in keys}

    # ------------------------------------------------------------ the end

    def finish(self, weights: Mapping[str, Tensor], result: Mapping[str, Any]) -> None:
        """Write the trained weights and then the result, which marks the run as finished.

        Args:
            weights: Of a Block, or of a Raptor, whose names begin with "blocks.N.".
            result: JSON values.
        """
        key = RAPTOR_KEY if all(name.startswith("blocks.") for name in weights) else BLOCK_KEY
        data = tensors_to_bytes({name: value.contiguous() for name, value in weights.items()})
        self._objects.put(key, data)
        about = {"weights_key": key, "weights_nbytes": len(data), "weights_sha256": sha256(data)}
        self._objects.put(RESULT_KEY, seal({**result, **about}))

    def read_result(self) -> dict[str, Any] | None:
        """What `finish` was given, or None while the run is not finished.

        Raises:
            UserError: The document was changed, or is none of ours.
        """
        result = self._read_document(RESULT_KEY)
        if result is None:
            return None
        if result.get("weights_key") not in (BLOCK_KEY, RAPTOR_KEY) or not isinstance(
            result.get("weights_sha256"), str
        ):
            raise UserError(
                f"{self.location}/{RESULT_KEY} names no 'weights_key' and 'weights_sha256', so it is not ours. Delete "
                "it and run the same make train again"
            )
        return result

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
            return self._read_tensors(result["weights_key"], result["weights_sha256"])
        except (DamagedCheckpointError, ObjectMissingError, SafetensorError) as error:
            raise UserError(
                f"{self.location}: {error}. Delete {RESULT_KEY} and run the same make train again"
            ) from error

    def _read_document(self, key: str) -> dict[str, Any] | None:
        try:
            data = self._objects.get(key, at_most=MAX_DOCUMENT_NBYTES)
            return unseal(key, data)
        except ObjectMissingError:
            return None
        except (SchemaError, ObjectTooLargeError) as error:
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


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read back: tuples become lists."""
    return json.loads(json.dumps(config))


def _checkpoint_name(step: int) -> str:
    return f"{CHECKPOINTS_PREFIX}{step:09d}"


def _check_checkpoint(document: Mapping[str, Any], step: int) -> None:
    """See that a document is that of a checkpoint, before anything that it names is read.

    Raises:
        DamagedCheckpointError: It is of another version or step, or names other files than ours.
    """
    digests, state = document.get("sha256"), document.get("state")
    if document.get("format_version") != _FORMAT_VERSION or document.get("step") != step:
        raise DamagedCheckpointError(
            f"its document is of version {document.get('format_version')!r:.40} and step {document.get('step')!r:.40}"
        )
    named = isinstance(digests, dict) and all(isinstance(digest, str) for digest in digests.values())
    if not named or not digests or not set(digests) <= set(CHECKPOINT_FILES) or not isinstance(state, dict):
        files = ", ".join(CHECKPOINT_FILES)
        raise DamagedCheckpointError(
            f"its document is not that of a checkpoint: expected a 'state', and 'sha256' of {files}"
        )


def _metrics_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None if it is none that can be written again."""
    try:
        line = json.loads(text)
        json.dumps(line, allow_nan=False)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8; or NaN
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
