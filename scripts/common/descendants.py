"""The published checkpoints of AST's descendants: where their weights are, and whose.

`hub_configs/published_descendants.yaml` lists them. Nothing here imports torch or transformers.
"""

from typing import Any

from .bundled import hub_configs_folder

_LICENSES = {  # of the weights, by family, as the Hub spells them
    "CED": "apache-2.0",
    "Dasheng": "apache-2.0",
    "PaSST": "apache-2.0",
    "AudioMAE": "cc-by-nc-4.0",
    "SSAST": "bsd-3-clause",
}


def published_descendants() -> dict[str, dict[str, Any]]:
    """The descendants' checkpoints by folder name."""
    import yaml

    path = hub_configs_folder() / "published_descendants.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def descendant_license(name: str) -> str:
    """The licence of its weights, as the Hub spells it."""
    return _LICENSES[published_descendants()[name]["family"]]


def weights_file(name: str) -> str:
    """The name of the authors' file."""
    checkpoint = published_descendants()[name]
    if "hub" in checkpoint:
        return "model.safetensors"
    return checkpoint.get("file") or checkpoint["url"].rpartition("/")[2].partition("?")[0]


def weights_page(name: str) -> str:
    """The page where people find it."""
    checkpoint = published_descendants()[name]
    if "hub" in checkpoint:
        return f"https://huggingface.co/{checkpoint['hub']}"
    return checkpoint.get("page") or checkpoint["url"]
