"""Commands start fast: those that need no torch never load it, the others load it in one go.

Without torch, the libraries' modules that need none are imported one by one; their packages'
`__init__`, which imports torch and transformers, runs when somebody asks the package itself for a
name.
"""

import gc
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


def quiet_libraries(model: str = "") -> None:
    """What a command does before it imports the rest: nothing that an ONNX file does not need."""
    if model.endswith(".onnx"):
        postpone_libraries()
        return
    _load_libraries()
    from transformers.utils import logging

    logging.disable_progress_bar()


def _load_libraries() -> None:
    """Import torch, transformers and ours, without a search for garbage among what stays.

    Imports make many objects and hardly any garbage. Collecting it again and again, and once more
    at exit, takes a good part of a cold start; frozen, they are left out from then on.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        from modeling_ast import ASTModel  # noqa: F401  (a name, in case the package is postponed)

        gc.freeze()
    finally:
        gc.enable()
