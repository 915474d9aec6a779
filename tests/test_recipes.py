"""Every recipe, tried on a synthetic sample with the columns of the dataset it names."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from datasets import Audio, ClassLabel, Dataset, Features, List, Value

from modeling_ast import ASTForAudioClassification
from scripts.common.bundled import hub_configs_folder
from scripts.common.options import parse_arguments
from scripts.training import start as training
from scripts.training import with_accelerate, with_trainer
from scripts.training.options import FinetuneOptions

from .conftest import TINY_RECIPE
from .sounds import PITCHES, encode, tone

RECIPES = sorted(path.name for path in (hub_configs_folder() / "recipes").glob("*.yaml"))
TEXT, NUMBER = Value("string"), Value("int64")
WORD = ClassLabel(names=list(PITCHES))
# Columns besides the sound: their type, and their value in a clip of class 0, 1 or 2.
AUDIOSET = {
    "video_id": (TEXT, "--PJHxphWEs"),
    "labels": (List(TEXT), [["/m/09x0r"], ["/t/dd00088"], ["/m/09x0r", "/t/dd00088"]]),
    "human_labels": (List(TEXT), [["Speech"], ["Gush"], ["Speech", "Gush"]]),
}
ESC50 = {
    "filename": (TEXT, "1-100032-A-0.wav"),
    "target": (NUMBER, [0, 1, 2]),
    "category": (TEXT, list(PITCHES)),
    "esc10": (Value("bool"), True),
    "src_file": (NUMBER, 100032),
    "take": (TEXT, "A"),
}
SCHEMAS = {
    "audioset_full.yaml": AUDIOSET,
    "audioset_balanced.yaml": AUDIOSET,
    "esc50_from_audioset.yaml": ESC50,
    "esc50_from_imagenet.yaml": ESC50,
    "esc10.yaml": {"label": (WORD, [0, 1, 2]), "clip_id": (TEXT, "1-100032-A-0")},
    "speech_commands_v2.yaml": {
        "file": (TEXT, "backward/0165e0e8_nohash_0.wav"),
        "label": (WORD, [0, 1, 2]),
        "is_unknown": (Value("bool"), False),
        "speaker_id": (TEXT, "0165e0e8"),
        "utterance_id": (Value("int8"), 0),
    },
    "arabic_speech_commands.yaml": {"label": (WORD, [0, 1, 2]), "speaker_id": (TEXT, None)},
    "demo.yaml": {"label": (WORD, [0, 1, 2])},
}
GEOMETRY = {"max_length": 1024, "num_mel_bins": 128, "frequency_stride": 10, "time_stride": 10}
# The papers' numbers, with their decimals.
PUBLISHED = {
    "audioset_full.yaml": {
        "learning_rate": 1e-5, "num_epochs": 5, "batch_size": 12, "mixup_rate": 0.5,
        "time_mask": 192, "frequency_mask": 48, "warmup_steps": 1000, "averaged_epochs": 5,
        "balanced_sampling": True, "mean": -4.2677393, "std": 4.5689974, "max_length": 1024,
    },
    "audioset_balanced.yaml": {
        "learning_rate": 5e-5, "num_epochs": 25, "averaged_epochs": 20, "lr_step_start": 10,
        "lr_step_epochs": 5, "lr_step_factor": 0.5, "max_length": 1024,
    },
    "esc50_from_audioset.yaml": {
        "learning_rate": 1e-5, "num_epochs": 25, "batch_size": 48, "time_mask": 96,
        "frequency_mask": 24, "loss": "cross_entropy", "mean": -6.6268077, "std": 5.358466,
    },
    "esc50_from_imagenet.yaml": {"learning_rate": 1e-4, "num_epochs": 25, "batch_size": 48},
    "speech_commands_v2.yaml": {
        "learning_rate": 2.5e-4, "num_epochs": 30, "batch_size": 128, "time_mask": 48,
        "frequency_mask": 48, "mixup_rate": 0.6, "loss": "binary_cross_entropy",
        "mean": -6.845978, "std": 5.5654526, "lr_step_factor": 0.85, "max_length": 128,
    },
}  # fmt: skip


def write_sample(folder: Path, schema: dict, split: str, first: int) -> None:
    """Two clips of each class, as Parquet; with folds where the set has them."""
    rows: dict[str, list] = {name: [] for name in ("audio", "fold", *schema)}
    for number in range(2):
        for label, pitch in enumerate(PITCHES.values()):
            sound = encode(tone(pitch, seed=first + number), "WAV")
            rows["audio"].append({"bytes": sound, "path": f"{first + number}_{label}.wav"})
            rows["fold"].append(1 + first)
            for name, (_, value) in schema.items():
                by_class = value[label] if isinstance(value, list) else value
                rows[name].append(by_class if value is not None else f"{split}{number}")
    types = {name: kind for name, (kind, _) in schema.items()}
    stored = {"audio": {"bytes": Value("binary"), "path": TEXT}, "fold": NUMBER, **types}
    folder.mkdir(exist_ok=True)
    sample = Dataset.from_dict(rows, features=Features(stored))
    # As on the Hub: what is stored is declared as sound.
    features = Features({**stored, "audio": Audio(sampling_rate=16000)})
    metadata = {"info": {"features": features.to_dict()}}
    table = sample.data.table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pyarrow.parquet.write_table(table, folder / f"{split}.parquet")


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps(recipe, tmp_path):
    text = yaml.safe_load((hub_configs_folder() / "recipes" / recipe).read_text())
    for option, value in PUBLISHED.get(recipe, {}).items():
        assert text[option] == value, option
    with_folds = "fold_column" in text
    write_sample(tmp_path / "data", SCHEMAS[recipe], "train", first=1)
    split = "train-1" if with_folds else text.get("evaluation_split", "test")
    write_sample(tmp_path / "data", SCHEMAS[recipe], split, first=0)
    small = {
        **{name: TINY_RECIPE[name] for name in ("model", "hidden_size", "num_hidden_layers")},
        "num_attention_heads": 2,
        "num_workers": 0,
        "num_epochs": 1,
        "batch_size": 3,
        "gradient_accumulation_steps": 1,
        "averaged_epochs": 1,
        "evaluation_fraction": 0.5,
        "output": tmp_path / "run",
    }
    line = [recipe, str(tmp_path / "data")]
    line += [word for name, value in small.items() for word in (f"--{name}", str(value))]
    args = parse_arguments("ast-finetune", FinetuneOptions, "", line, recipes=True)
    door = with_trainer if recipe == "speech_commands_v2.yaml" else with_accelerate
    record = door.finetune(args)
    assert record["evaluation_clips"] == 6
    report = yaml.safe_load((tmp_path / "run" / "report.yaml").read_text())
    assert report["dataset"]["train_clips"] == 6  # two steps of three
    config = ASTForAudioClassification.from_pretrained(tmp_path / "run" / "checkpoint").config
    for name, default in GEOMETRY.items():
        # A length that the recipe leaves open is the clips', half a second.
        assert getattr(config, name) == text.get(name, 64 if name == "max_length" else default)
    multi_label = recipe.startswith("audioset") or text.get("loss") == "binary_cross_entropy"
    assert config.problem_type == f"{'multi' if multi_label else 'single'}_label_classification"
    assert config.num_labels == (2 if recipe.startswith("audioset") else 3)
    assert ("evaluation_accuracy" in record) == (not recipe.startswith("audioset"))
    saved = json.loads((tmp_path / "run" / "checkpoint" / "preprocessor_config.json").read_text())
    if "mean" in text:
        assert (saved["mean"], saved["std"]) == (text["mean"], text["std"])


def test_imagenet_weights_come_from_the_hub(tmp_path, monkeypatch):
    """A DeiT's name instead of its folder: weights alone are fetched."""
    fetched = []

    def download(name: str, allow_patterns: list[str]) -> str:
        fetched.append((name, allow_patterns))
        return str(tmp_path)

    class Config:
        model_type = "deit"

    monkeypatch.setattr(training.AutoConfig, "from_pretrained", lambda name: Config)
    monkeypatch.setattr(training, "snapshot_download", download)
    monkeypatch.setattr(training, "resolve_checkpoint", lambda name: name)  # the Hub answers
    deit = "facebook/deit-base-distilled-patch16-384"
    assert training.find_weights(deit) == (str(tmp_path), True)
    assert fetched[0][0] == "facebook/deit-base-distilled-patch16-384"
    assert "model.safetensors" in fetched[0][1]
    Config.model_type = "audio-spectrogram-transformer"
    published = "MIT/ast-finetuned-audioset-10-10-0.4593"
    assert training.find_weights(published) == (published, False)
