"""States of a vision transformer, taken by hooks on its blocks: layer 0 is what enters the first one."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pipeline.vit_models import Model


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one forward pass showed: the states, and what each block was given beside its tokens (rotary tables)."""

    embed_only: bool = False
    states: list[Any] = field(default_factory=list)
    extras: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Embedded(Exception):
    """State 0 is there, and no more was asked for."""


class StateRecorder:
    """Hooks on a model's blocks that note states for the threads that asked, each for itself."""

    def __init__(self, model: Model) -> None:
        self._here = threading.local()
        for block in model.blocks:
            block.register_forward_pre_hook(self._before, with_kwargs=True)
            block.register_forward_hook(self._after)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        record: Record | None = getattr(self._here, "record", None)
        if record is not None:
            if not record.states:
                record.states.append(args[0])
                if record.embed_only:
                    raise Embedded
            record.extras.append((args[1:], kwargs))

    def _after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record: Record | None = getattr(self._here, "record", None)
        if record is not None:
            record.states.append(output)

    @contextmanager
    def recording(self, *, embed_only: bool = False) -> Iterator[Record]:
        """Note the states of the forward pass that this thread makes meanwhile; with embed_only it ends at the first
        block."""
        self._here.record = record = Record(embed_only=embed_only)
        try:
            yield record
        finally:
            self._here.record = None
