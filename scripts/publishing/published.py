"""The author's published checkpoints as Hub repositories: config, preprocessor config and card.

    python -m scripts.publishing.published

writes hub_configs/ast-* from published_checkpoints.yaml, and the descendants' folders from
published_descendants.yaml.

`ast-convert original.pth --variant NAME --output DIR` adds the weights.
"""

import json
from pathlib import Path
from typing import Any

import transformers

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig

from ..common.bundled import hub_configs_folder, read_label_names
from ..common.descendants import published_descendants
from ..common.options import did_you_mean
from .cards import find_source, published_checkpoints, render_card
from .descendants import descendant_files

_DATA: dict[str, dict[str, Any]] = {
    "audioset": {
        "metric": "mean_average_precision",
        "metric_name": "mAP, evaluation set",
        "problem_type": "multi_label_classification",
        "max_length": 1024,
        "statistics": {"mean": -4.2677393, "std": 4.5689974},
        "recipe": {
            "epochs": 5,
            "batch size": 12,
            "learning rate": "1e-5, halved every epoch from the 2nd",
            "warm-up steps": 1000,
            "optimiser": "Adam (0.95, 0.999), weight decay 5e-7",
            "loss": "binary cross-entropy",
            "frequency_mask": 48,
            "time_mask": 192,
            "mixup": 0.5,
            "sampling": "balanced over classes",
        },
    },
    "speech_commands_v2": {
        "metric": "accuracy",
        "metric_name": "accuracy, evaluation set",
        "problem_type": "single_label_classification",
        "max_length": 128,
        "statistics": {"mean": -6.845978, "std": 5.5654526},
        "recipe": {
            "epochs": 30,
            "batch size": 128,
            "learning rate": "2.5e-4, times 0.85 every epoch from the 5th",
            "optimiser": "Adam (0.95, 0.999), weight decay 5e-7",
            "loss": "binary cross-entropy",
            "frequency_mask": 48,
            "time_mask": 48,
            "mixup": 0.6,
            "noise": "added, and rolled in time",
        },
    },
}


def published_config(name: str) -> tuple[ASTConfig, ASTFeatureExtractor]:
    """Config and feature extractor of one of the author's checkpoints.

    Raises:
        ValueError: for an unknown name.
    """
    known = published_checkpoints()
    if name not in known:
        raise ValueError(f"Unknown variant {name!r}{did_you_mean(name, list(known))}")
    checkpoint = known[name]
    data = _DATA[checkpoint["data"]]
    labels = read_label_names(checkpoint["data"])
    config = ASTConfig(
        architectures=["ASTForAudioClassification"],
        frequency_stride=checkpoint["stride"],
        time_stride=checkpoint["stride"],
        max_length=data["max_length"],
        layer_norm_eps=1e-6,
        problem_type=data["problem_type"],
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return config, ASTFeatureExtractor(max_length=data["max_length"], **data["statistics"])


def published_files(name: str) -> dict[str, str]:
    """The text files of one of the author's checkpoints as a Hub repository, by file name."""
    checkpoint = published_checkpoints()[name]
    data = _DATA[checkpoint["data"]]
    source = find_source("data", checkpoint["data"])
    config, extractor = published_config(name)
    settings = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key not in ASTConfig.__annotations__ or hasattr(transformers.ASTConfig, key)
    }
    settings.pop("transformers_version", None)  # of this machine
    average = "averaged over the epochs" if checkpoint.get("average") else "not averaged"
    card = render_card(
        name,
        config,
        extractor,
        license="bsd-3-clause",
        data=source,
        start=find_source("weights", "facebook/deit-base-distilled-patch16-384"),
        evaluations=[
            {
                "data": source,
                "where": source["name"],
                "source": "reported by the author, github.com/YuanGongND/ast",
                "metrics": [
                    {
                        "type": data["metric"],
                        "name": data["metric_name"],
                        "value": checkpoint["value"],
                        "text": f"{checkpoint['value']:.4f}",
                        "interval": "not reported",
                    }
                ],
            }
        ],
        pictures=[],
        recipe={**data["recipe"], "weights": average},
        cost="Not reported.",
        parameters=_parameters(config),
        about=f"Trained by Y. Gong, published as `{checkpoint['file']}` in his repository "
        f"YuanGongND/ast (BSD-3-Clause) and as "
        f"[{checkpoint['hub']}](https://huggingface.co/{checkpoint['hub']}).",
    )
    return {
        "config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "preprocessor_config.json": json.dumps(extractor.to_dict(), indent=2) + "\n",
        "README.md": card,
    }


def _parameters(config: ASTConfig) -> int:
    return (
        config.num_encoder_parameters
        + (config.hidden_size + 1) * config.num_labels
        + (2 * config.hidden_size)
    )


def main() -> None:
    repositories = dict.fromkeys(published_checkpoints(), published_files)
    repositories |= dict.fromkeys(published_descendants(), descendant_files)
    for name, files in repositories.items():
        folder: Path = hub_configs_folder() / name
        folder.mkdir(exist_ok=True)
        for file, text in files(name).items():
            (folder / file).write_text(text, encoding="utf-8")
        print(f"Wrote {folder}")


if __name__ == "__main__":
    main()
