"""Commands that need no torch, in processes that never load it.

The libraries' modules that need no torch are imported one by one; their packages' `__init__`, which
imports torch and transformers, runs when somebody asks the package itself for a name.
"""

import importlib.util
import sys
import types
from typing import Any

_PACKAGES = ("feature_extraction", "modeling_ast")


class _Postponed(types.ModuleType):
    """A package whose `__init__` has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(name)
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def postpone_libraries() -> None:
    """From now on; nothing changes where they are imported already."""
    for name in _PACKAGES:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            package = importlib.util.module_from_spec(spec)
            package.__class__ = _Postponed
            sys.modules[name] = package


def quiet_libraries(model: str) -> None:
    """What a command does before it imports the rest: nothing that an ONNX file does not need."""
    if model.endswith(".onnx"):
        postpone_libraries()
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
