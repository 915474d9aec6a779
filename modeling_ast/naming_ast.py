"""The two naming schemes for AST's layers: the checkpoints', which is ours, and `transformers` 5's.

    encoder.layer.N.attention.attention.query   layers.N.attention.q_proj (key, value likewise)
    encoder.layer.N.attention.output.dense      layers.N.attention.o_proj
    encoder.layer.N.intermediate.dense          layers.N.mlp.fc1
    encoder.layer.N.output.dense                layers.N.mlp.fc2

Checkpoints use the left one. The right one appears in folders that `transformers` 5 wrote with
`save_original_format=False`, in its state dicts in memory, and in PEFT adapters trained on its AST.
All of these are read here; `rename_adapter` converts an adapter from one scheme to the other.
"""

import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

# Regular expressions for `from_pretrained(key_mapping=…)`: none matches one of our names.
NATIVE_TO_OURS = {
    r"\blayers\.": "encoder.layer.",
    r"\battention\.q_proj\b": "attention.attention.query",
    r"\battention\.k_proj\b": "attention.attention.key",
    r"\battention\.v_proj\b": "attention.attention.value",
    r"\battention\.o_proj\b": "attention.output.dense",
    r"\bmlp\.fc1\b": "intermediate.dense",
    r"\bmlp\.fc2\b": "output.dense",
}
_OURS_TO_NATIVE = {  # attention's output before the layer's, whose name is a suffix of it
    r"\battention\.attention\.query\b": "attention.q_proj",
    r"\battention\.attention\.key\b": "attention.k_proj",
    r"\battention\.attention\.value\b": "attention.v_proj",
    r"\battention\.output\.dense\b": "attention.o_proj",
    r"\bintermediate\.dense\b": "mlp.fc1",
    r"(?<!attention\.)\boutput\.dense\b": "mlp.fc2",
    r"\bencoder\.layer\.": "layers.",
}


def our_name(name: str) -> str:
    """A parameter's or module's name in checkpoints, from either scheme."""
    return _renamed(name, NATIVE_TO_OURS)


def native_name(name: str) -> str:
    """A parameter's or module's name in `transformers` 5, from either scheme."""
    return _renamed(name, _OURS_TO_NATIVE)


def _renamed(name: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in patterns.items():
        name = re.sub(pattern, replacement, name)
    return name


def rename_state_dict(module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook for `load_state_dict`: turns the names of `transformers` 5 into ours."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        state_dict[prefix + our_name(name.removeprefix(prefix))] = state_dict.pop(name)


def read_adapter_config(folder: str | os.PathLike, **hub_arguments: Any) -> Any:
    """The `PeftConfig` of an adapter."""
    return _import_peft().PeftConfig.from_pretrained(str(folder), **hub_arguments)


def fit_adapter_config(config: Any, modules: Iterable[str]) -> None:
    """Make a PEFT config name our modules, whichever scheme it uses.

    Args:
        config: a `PeftConfig`, changed in place.
        modules: the names of all modules of the model.
    """
    if getattr(config, "target_modules", None) in (None, "all-linear"):
        return
    is_named = _import_peft().tuners.tuners_utils.check_target_module_exists
    names = {name: native_name(name) for name in modules}
    targets = {name for name in names if is_named(config, name)}
    native_targets = {name for name, native in names.items() if is_named(config, native)}
    if native_targets - targets:
        _set_targets(config, {name: names[name] for name in targets | native_targets})


def rename_adapter(
    source: str | os.PathLike, target: str | os.PathLike, *, native: bool = True
) -> None:
    """Write a PEFT adapter of an AST with the other implementation's layer names.

    Our models' `from_pretrained` and `load_adapter` read both schemes. PEFT's own
    `PeftModel.from_pretrained` and `transformers`' AST read only one each.

    Args:
        source: the adapter's folder, in either scheme.
        target: the folder to write to.
        native: for `transformers`' AST; False: for ours.

    Raises:
        ValueError: if there is no such adapter, or PEFT is missing.
    """
    weights = Path(source, "adapter_model.safetensors")
    if not weights.is_file() or not Path(source, "adapter_config.json").is_file():
        raise ValueError(
            f"{source} is not a PEFT adapter: expected adapter_config.json and "
            "adapter_model.safetensors in it."
        )
    config = read_adapter_config(source)
    rename = native_name if native else our_name
    state = load_file(weights)
    # The state dict reveals the targets: base_model.model.TARGET.lora_A.weight
    prefix = _import_peft().mapping.PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
    adapted = {
        name.removeprefix("base_model.model.").split(f".{prefix}")[0]
        for name in state
        if f".{prefix}" in name
    }
    if config.target_modules != "all-linear":
        _set_targets(config, {rename(name): name for name in adapted})
    Path(target).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(target))
    save_file({rename(name): tensor for name, tensor in state.items()}, Path(target, weights.name))


def _set_targets(config: Any, names: dict[str, str]) -> None:
    """Give a PEFT config these targets: new names -> the names it knew them by."""
    for field in ("rank_pattern", "alpha_pattern"):
        old = getattr(config, field, None) or {}
        new = {
            name: value
            for name, known_as in names.items()
            for pattern, value in old.items()
            if re.match(rf"(.*\.)?({pattern})$", known_as)
        }
        if old:
            setattr(config, field, new)
    config.target_modules = set(names)
    for field in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, field, None) is not None:  # now part of the targets
            setattr(config, field, None)


def _import_peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ValueError("PEFT adapters need PEFT: pip install peft") from error
