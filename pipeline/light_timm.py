"""timm, and with it torchvision, without torch's compiler: what of timm the project uses is imported from here.

Both ask for the compiler (torch._dynamo) while they are imported, and use it only when somebody compiles: torchvision
asks for one function of `torch._dynamo.utils`, timm marks methods of its NaFlex models with `torch.compiler.disable`.
Importing the compiler takes 2 to 3 s of CPU and 370 modules, in every process that has a teacher: the driver, each
worker, each command. So both get, during their import, stand-ins that load it at their first use, and which then do the
same. Afterwards torch is as it was.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_UTILS = "torch._dynamo.utils"


class _LateUtils(types.ModuleType):
    """Stands for `torch._dynamo.utils` during an import: whatever is asked of it but one function is the real one's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(_UTILS, None)
        return getattr(importlib.import_module(_UTILS), name)

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """As the real one, which this loads."""
        return importlib.import_module(_UTILS).is_compile_supported(device_type)


def _disabled_late(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compiler.disable`, applied when the function is first called."""

    @functools.cache
    def real() -> Callable[..., Any]:
        return torch.compiler.disable(fn)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        return real()(*args, **kwargs)

    return call


@contextmanager
def _without_compiler() -> Iterator[None]:
    if _UTILS in sys.modules:
        yield
        return
    disable = torch.compiler.disable
    sys.modules[_UTILS] = late = _LateUtils(_UTILS)
    torch.compiler.disable = _disabled_late  # type: ignore[assignment]  # timm's only use is as a bare decorator
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if sys.modules.get(_UTILS) is late:
            del sys.modules[_UTILS]


with _without_compiler():
    import timm
    from timm.layers import resample_abs_pos_embed
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import VisionTransformer

__all__ = ["Attention", "VisionTransformer", "resample_abs_pos_embed", "timm"]
