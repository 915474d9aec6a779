"""Model cards: what a checkpoint recognises, from which weights and data, how well, how to load it.

    write_model_card("runs/my_sounds", "runs/my_sounds/checkpoint")

Every number comes from a file: the checkpoint's `config.json` and weights, and the run's
`arguments.yaml` (recipe), `report.yaml` (machine, result), `metrics.jsonl` (a line per epoch), and
each `evaluation.json` from `ast-evaluate` in it or a sub-folder. Their pictures are copied next to
the card. Names and licences of data and start weights come from the Hub metadata in a README.md
next to them, or from `hub_configs/sources.yaml`.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig, ASTFrameConfig

from ..common.bundled import hub_configs_folder, read_label_names
from ..common.descendants import descendant_license, published_descendants
from ..common.files import file_name, write_whole

ENDING = (
    "<!-- Written by ast-push-to-hub from the files of the run, and written again at the next push."
    " Delete this line to keep your own changes. -->"
)
_PICTURES = {
    "confusion_matrix.png": "Confusion matrix",
    "average_precision.png": "Average precision of each class",
    "learning_curve.png": "Loss and evaluation score over the epochs",
}
# Settings that a reader needs to repeat a run, under the names of both training commands.
_RECIPE = (
    *("num_epochs", "num_train_epochs", "batch_size", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "head_learning_rate", "lr_scheduler_type"),
    *(
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "averaged_epochs",
        "ema_decay",
    ),
    *("mixup_rate", "speed_perturbation", "filter_augment", "time_mask", "frequency_mask"),
    *("time_roll", "time_patchout", "frequency_patchout", "label_smoothing", "layer_decay", "loss"),
    *("mixed_precision", "seed"),
)
# From huggingface.co/docs/hub/repositories-licenses.
_LICENSES = (
    *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
    *("bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0"),
    *("cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0"),
    *("cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    *("cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0"),
    *("epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "agpl-3.0", "gfdl", "gpl", "gpl-2.0"),
    *("gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "lppl-1.3c", "ms-pl", "mpl-2.0", "odc-by"),
    *("odbl", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib"),
    *("pddl", "lgpl-lr", "unknown", "other"),
)
_PIPELINE_TAG = "audio-classification"


def write_model_card(
    run_folder: str | os.PathLike, checkpoint: str | os.PathLike, repo_id: str | None = None
) -> Path:
    """Write `README.md` and its pictures into a checkpoint folder; returns the card's path.

    Args:
        run_folder: written by a training command.
        checkpoint: folder with config.json, preprocessor_config.json and weights.
        repo_id: name on the Hub, for the code examples; default: the run's name.

    Raises:
        ValueError: if a file cannot be read, or the metadata breaks the Hub's rules.
    """
    run_folder, checkpoint = Path(run_folder), Path(checkpoint)
    config: ASTConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    labels = [config.id2label[index] for index in range(config.num_labels)]
    report = _read_yaml(run_folder / "report.yaml")
    arguments = _read_yaml(run_folder / "arguments.yaml") | (report.get("chosen") or {})
    records = _read_records(run_folder / "metrics.jsonl")
    data_name = str(arguments.get("dataset") or "")
    data = find_source("data", data_name, labels)
    start_name = str(arguments.get("model") or arguments.get("model_name_or_path") or "scratch")
    start = {} if start_name == "scratch" else find_source("weights", start_name)
    result = report.get("result") or (records[-1] if records else {})
    card = render_card(
        repo_id or run_folder.resolve().name,
        config,
        ASTFeatureExtractor.from_pretrained(checkpoint),
        license=start.get("license") or "unknown",
        data=data,
        start=start,
        evaluations=_evaluations(run_folder, result, arguments, labels),
        pictures=_copy_pictures(run_folder, checkpoint),
        recipe={
            name: _plain(arguments[name]) for name in _RECIPE if _is_used(name, arguments.get(name))
        },
        cost=_cost(records, report.get("machine") or {}),
        parameters=_count_parameters(checkpoint),
        has_code=(checkpoint / "modeling_ast.py").is_file(),
        about=_all_folds(run_folder),
        ending=ENDING,
    )
    path = checkpoint / "README.md"
    write_whole(path, lambda unfinished: unfinished.write_text(card, encoding="utf-8"))
    return path


def render_card(
    name: str,
    config: ASTConfig,
    extractor: ASTFeatureExtractor,
    *,
    license: str,  # noqa: A002
    data: dict[str, Any],
    start: dict[str, Any],
    evaluations: list[dict[str, Any]],
    pictures: list[dict[str, str]],
    recipe: dict[str, Any],
    cost: str,
    parameters: int,
    has_code: bool = True,
    ending: str = "",
    about: str = "",
) -> str:
    """A card's text from facts, checked.

    Args:
        evaluations: from `_evaluations`.
        has_code: whether our code comes with the weights, for `trust_remote_code`.
    """
    title = _one_line(name.rpartition("/")[2])
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_PIPELINE_TAG,
        license=license,
        datasets=[data["hub"]] if "hub" in data else None,
        base_model=start.get("hub"),
        tags=["audio-spectrogram-transformer", _PIPELINE_TAG],
        metrics=list(dict.fromkeys(m["type"] for e in evaluations for m in e["metrics"])) or None,
        model_name=title,
        eval_results=[
            EvalResult(
                task_type=_PIPELINE_TAG,
                task_name="Audio classification",
                dataset_type=evaluation["data"].get("hub")
                or _identifier(evaluation["data"]["name"]),
                dataset_name=evaluation["data"]["name"],
                dataset_split=evaluation.get("split"),
                metric_type=metric["type"],
                metric_name=metric["name"],
                metric_value=metric["value"],
                metric_args=metric.get("args"),
            )
            for evaluation in evaluations
            for metric in evaluation["metrics"]
        ]
        or None,
    )
    if metadata.eval_results is None:
        metadata.model_name = None
    rows, columns = config.trained_grid
    is_detector = config.model_type == ASTFrameConfig.model_type
    card = ModelCard.from_template(
        metadata,
        template_path=str(hub_configs_folder() / "model_card_template.md"),
        title=_plain(title),
        name=json.dumps(name, ensure_ascii=False),  # a valid Python literal, whatever is in it
        has_code=has_code,
        labels=[_plain(config.id2label[index]) for index in range(config.num_labels)],
        multi_label=config.problem_type == "multi_label_classification",
        activation="sigmoid()"
        if config.problem_type == "multi_label_classification"
        else "softmax(-1)",
        seconds=f"{config.max_length / 100:g}",
        sampling_rate=extractor.sampling_rate,
        parameters=f"{parameters:,}",
        patches=f"{rows} x {columns} patches of {config.patch_shape[0]} mel bins x "
        f"{config.patch_shape[1]} frames of 10 ms",
        native=config.is_native and not is_detector,
        model_type=config.to_dict()["model_type"],
        detector=is_detector,
        auto_class=f"AutoModelForAudio{'Frame' if is_detector else ''}Classification",
        column_s=f"{config.time_stride / 100:g}",
        evaluations=evaluations,
        pictures=pictures,
        recipe=recipe,
        start=_describe(start) if start else "random weights",
        data=_describe(data),
        about=about,
        limits=[data["limits"]] if "limits" in data else [],
        citations=[source["citation"] for source in (data, start) if "citation" in source],
        cost=cost,
        ending=ending,
    )
    text = str(card).rstrip() + "\n"
    check_card(text)
    return text


def check_card(text: str) -> None:
    """Check a card's metadata against the Hub's public rules, offline.

    The rules are those of huggingface.co/docs/hub/model-cards and of its `modelcard.md`: valid YAML
    between `---` lines; a known licence; Hub names; model-index entries with task type, dataset
    type and name, metric type and a number.

    Raises:
        ValueError: lists every problem found.
    """
    metadata = _metadata(text)
    if metadata is None:
        raise ValueError(
            "The model card has no metadata: it must begin with YAML between --- lines."
        )
    problems = [
        f"{key} must be {value!r}, got {metadata.get(key)!r}"
        for key, value in (("library_name", "transformers"), ("pipeline_tag", _PIPELINE_TAG))
        if metadata.get(key) != value
    ]
    if metadata.get("license") not in _LICENSES:
        problems.append(f"license {metadata.get('license')!r} is not one of the Hub's identifiers")
    if metadata.get("license") == "other" and not metadata.get("license_name"):
        problems.append("license 'other' needs a license_name")
    for key in ("datasets", "base_model"):
        for name in _as_list(metadata.get(key)):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                problems.append(f"{key} must be names on the Hub: {error}")
    for key in ("tags", "metrics", "datasets"):
        value = metadata.get(key, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            problems.append(f"{key} must be a list of words, got {value!r}")
    problems += _model_index_problems(metadata.get("model-index", []))
    if problems:
        raise ValueError(f"The model card breaks the Hub's rules: {'; '.join(problems)}.")


def _metadata(card: str) -> dict[str, Any] | None:
    """The YAML between --- lines at the top of a card."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        raise ValueError(f"A card's metadata is not valid YAML: {error}") from error
    return metadata if isinstance(metadata, dict) else None


def _model_index_problems(model_index: Any) -> list[str]:
    problems = []
    try:
        for model in model_index:
            if not isinstance(model["name"], str):
                problems.append("model-index: name must be text")
            for result in model["results"]:
                words = [result["task"]["type"], *(result["dataset"][k] for k in ("type", "name"))]
                for metric in result["metrics"]:
                    words.append(metric["type"])
                    if not isinstance(metric["value"], int | float) or math.isnan(metric["value"]):
                        problems.append(f"model-index: {metric['value']!r} is not a number")
                if not all(isinstance(word, str) and word for word in words):
                    problems.append(f"model-index: {words} must all be text")
    except (KeyError, TypeError) as error:
        problems.append(f"model-index is incomplete: {error!r}")
    return problems


def find_source(kind: str, name: str, labels: list[str] | None = None) -> dict[str, Any]:
    """What is known about a dataset or start weights: name, hub, license, url, about, limits.

    Args:
        kind: "data" or "weights".
        name: a path or a name on the Hub.
        labels: the checkpoint's, to tell a known dataset from another of the same name.
    """
    known = _read_yaml(hub_configs_folder() / "sources.yaml")[kind]
    path = Path(name)
    is_local = path.exists() or name.startswith((".", "/", "~"))
    if path.name == "checkpoint":  # of a run, which has a name
        short_name = path.resolve().parent.name
    else:
        short_name = path.stem if path.is_file() else path.name
    if not name:
        return {"name": "not stated"}
    source: dict[str, Any] = dict(known.get(short_name if is_local else name) or {})
    if "labels" in source and labels is not None:
        names = source.pop("labels")
        if not set(labels) <= set(names if isinstance(names, list) else read_label_names(names)):
            source = {}
    published = published_checkpoints()
    for folder, checkpoint in published.items():
        if kind == "weights" and name in (folder, checkpoint["hub"]):
            source = {"name": folder, "hub": checkpoint["hub"], "license": "bsd-3-clause"}
    if kind == "weights" and name in published_descendants():
        source = {"name": name, "license": descendant_license(name)}
    card = path / "README.md"
    if card.is_file():
        metadata = _metadata(card.read_text(encoding="utf-8")) or {}
        stated = {"name": metadata.get("pretty_name"), "license": metadata.get("license")}
        source |= {key: value for key, value in stated.items() if isinstance(value, str)}
    if not source and not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        source = {"hub": name}
    # Never the whole path: it says more about the machine than about the model.
    return {"name": short_name if is_local else name, **source}


def published_checkpoints() -> dict[str, dict[str, Any]]:
    """The author's checkpoints by folder name; see `hub_configs/published_checkpoints.yaml`."""
    return _read_yaml(hub_configs_folder() / "published_checkpoints.yaml")


def _describe(source: dict[str, Any]) -> str:
    name = _plain(source["name"])
    name = f"[{name}]({source['url']})" if "url" in source else name
    licence = (
        f"licence {_plain(source['license'])}" if "license" in source else "licence not stated"
    )
    parts = [name, licence]
    return ", ".join(parts) + (f". {source['about'].rstrip('.')}" if "about" in source else "")


def _evaluations(
    run_folder: Path, result: dict[str, Any], arguments: dict[str, Any], labels: list[str]
) -> list[dict[str, Any]]:
    """What `ast-evaluate` wrote into the run folder, or else the result's own record."""
    found = []
    for path in _evaluation_files(run_folder):
        content = _read_json(path)
        fold, split = content.get("fold"), content.get("split")
        source = find_source("data", str(content.get("dataset") or ""), labels)
        found.append(
            {
                "data": source,
                "where": _plain(
                    f"{source['name']}, {f'fold {fold}' if fold is not None else split}"
                ),
                "split": str(split if fold is None else fold),
                "clips": content["clips"],
                "metrics": [
                    _metric(name, **{key: metric.get(key) for key in ("value", "low", "high")})
                    for name, metric in content["metrics"].items()
                    if metric["value"] is not None
                ],
                "per_class": [
                    {key: _cell(value) for key, value in row.items()}
                    for row in content.get("per_class", [])
                ],
            }
        )
    if found:
        return found
    metrics = [
        _metric(name.removeprefix("evaluation_"), value)
        for name, value in result.items()
        if name.startswith("evaluation_") and name not in ("evaluation_loss", "evaluation_clips")
        if isinstance(value, int | float)
    ]
    clips = result.get("evaluation_clips")
    for metric in metrics:
        if metric["type"] == "accuracy" and clips:
            interval = wilson_interval(metric["value"], clips)
            metric.update(_metric("accuracy", metric["value"], *interval))
    if not metrics:
        return []
    fold = arguments.get("evaluation_fold")
    part = f"fold {fold}" if fold is not None else arguments.get("evaluation_split") or "part"
    source = find_source("data", str(arguments.get("dataset") or ""), labels)
    return [
        {
            "data": source,
            "where": _plain(f"{source['name']}, held-out {part}, at the end of training"),
            "split": str(part),
            "clips": clips,
            "metrics": metrics,
        }
    ]


def _all_folds(run_folder: Path) -> str:
    """What the recipe reaches on average, if every fold was held out in turn."""
    path = run_folder.resolve().parent / "folds.json"
    summary = _read_json(path) if path.is_file() else {"folds": {}}
    if run_folder.resolve().name not in {f"fold{file_name(name)}" for name in summary["folds"]}:
        return ""
    return (
        f"The same settings with each of the {len(summary['folds'])} folds held out in turn: mean "
        f"{summary['metric'].replace('_', ' ')} {summary['mean']:.4f}, from "
        f"{summary['lowest']:.4f} to {summary['highest']:.4f}."
    )


def _evaluation_files(run_folder: Path) -> list[Path]:
    files = [*run_folder.glob("evaluation*.json"), *run_folder.glob("*/evaluation.json")]
    return sorted(files)


def _copy_pictures(run_folder: Path, checkpoint: Path) -> list[dict[str, str]]:
    """Copy the run's and its evaluations' pictures next to the card."""
    pictures = []
    folders = dict.fromkeys([run_folder, *(path.parent for path in _evaluation_files(run_folder))])
    for folder in folders:
        for name, text in _PICTURES.items():
            if (folder / name).is_file():
                copied = name if folder == run_folder else f"{folder.name}_{name}"
                shutil.copyfile(folder / name, checkpoint / copied)
                pictures.append({"file": copied, "text": text})
    return pictures


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of `count` independent clips (Wilson 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return middle - half, middle + half


def _metric(
    name: str, value: float, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    shown = name.replace("_", " ")
    metric: dict[str, Any] = {"type": _identifier(name), "name": shown, "value": value}
    metric |= {"text": f"{value:.4f}", "interval": "not reported"}
    if low is not None and high is not None:
        metric["interval"] = f"{low:.4f} to {high:.4f}"
        metric["args"] = {"low": low, "high": high, "confidence": 0.95}
    return metric


def _cost(records: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    if not records or "seconds" not in records[-1]:
        return "Not recorded."
    epochs = f"{records[-1]['epoch']:g} epoch(s)" if "epoch" in records[-1] else "Training"
    minutes = records[-1]["seconds"] / 60
    place = ""
    if machine:
        processor = machine.get("gpu") or f"{machine.get('threads')} CPU threads"
        place = f" on {machine.get('processes', 1)} x {processor}"
    energy = records[-1].get("energy_kwh")
    spent = f"{energy:.3f} kWh" if energy is not None else "not measured"
    return f"{epochs} took {minutes:.1f} minutes{place}, evaluation included. Energy: {spent}."


def _count_parameters(checkpoint: Path) -> int:
    count = 0
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            count += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys())  # noqa: SIM118
    return count


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else _plain(value)


def _plain(text: Any) -> str:
    """A name escaped for Markdown: it adds no links, pictures, HTML, lines or table cells."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", _one_line(str(text)))


def _one_line(text: str) -> str:
    """Without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _identifier(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "_", name.lower()).strip("_") or "unnamed"


def _is_used(name: str, value: Any) -> bool:
    return value not in (None, False, 0) or (name == "seed" and value == 0)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    return content or {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _read_records(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line]
    except ValueError as error:
        raise ValueError(f"{path} does not hold a JSON record per line: {error}") from error
