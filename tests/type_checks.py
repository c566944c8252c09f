"""How jaxtyping instruments our packages while tests run: the same checks as its own, at a part of their cost.

`install` changes jaxtyping in this process; imported before any package that it instruments.
"""

import dataclasses
import inspect
import typing
from collections.abc import Callable
from functools import cache, partial
from importlib.machinery import SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args
from unittest.mock import patch

import jaxtyping
import jaxtyping._import_hook
from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, TypeCheckError, jaxtyped
from jaxtyping._import_hook import _JaxtypingLoader, _optimized_cache_from_source

_checked_by_type = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


class _Instrumented(_JaxtypingLoader):
    """jaxtyping's loader, whose own name for bytecode holds while one module's is looked for, and no longer.

    It holds that name while the module runs, and so for all that the module imports: 1,400 modules of libraries would
    be compiled from source, in every test process.
    """

    def get_code(self, fullname: str) -> CodeType | None:
        own_name = partial(_optimized_cache_from_source, self._typechecker.get_hash())
        with patch("importlib._bootstrap_external.cache_from_source", own_name):
            return super().get_code(fullname)

    def exec_module(self, module: ModuleType) -> None:
        SourceFileLoader.exec_module(self, module)


def install() -> None:
    typing._get_protocol_attrs = cache(typing._get_protocol_attrs)  # Python 3.11 asks at each check for a protocol
    jaxtyping._import_hook._JaxtypingLoader = _Instrumented
    jaxtyping.jaxtyped = _checked_where_it_matters


def _checked_where_it_matters(*, typechecker: Callable[..., Any]) -> Callable[..., Any]:
    """In the place of `jaxtyped(typechecker=)`, which binds and checks arguments twice to follow the names of axes.

    Only one function in ten takes or returns arrays. The others are left to beartype: half of the time of the tests
    of extraction went into following axes that there are none of.
    """

    def decorate(thing: Any) -> Any:
        if _names_axes(thing):
            return jaxtyped(thing, typechecker=typechecker)
        if not inspect.isclass(thing):
            return thing if _is_called_per_byte(thing) else _checked_by_type(thing)
        if dataclasses.is_dataclass(thing):
            thing.__init__ = _checked_by_type(thing.__init__)
        return thing

    return decorate


def _names_axes(thing: Any) -> bool:
    """Whether annotations hold arrays, or text, which may name what is not there yet: jaxtyping knows what to do."""
    function = thing.__init__ if inspect.isclass(thing) else thing
    return any(map(_is_about_arrays, getattr(function, "__annotations__", {}).values()))


def _is_called_per_byte(function: Callable[..., Any]) -> bool:
    """The parts of the parser of Parquet footers: checking them took a tenth of the time of opening stores."""
    return function.__module__ == "storage_schemas.parquet" and function.__name__.startswith("_")


def _is_about_arrays(hint: Any) -> bool:
    if isinstance(hint, str) or (inspect.isclass(hint) and issubclass(hint, AbstractArray)):
        return True
    parts = hint if isinstance(hint, list) else get_args(hint)  # a list: what a Callable takes
    return any(map(_is_about_arrays, parts))
