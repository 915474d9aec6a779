"""Published checkpoints of AST's descendants as Hub repositories: configs and card.

`hub_configs/published_descendants.yaml` lists them; `published.py` writes their folders.
"""

import json
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from feature_extraction import ASTFeatureExtractor
from modeling_ast import ASTConfig
from modeling_ast.conversion_ast import CED_FEATURES, KALDI_FEATURES, PASST_FEATURES

from ..common.bundled import hub_configs_folder, read_label_names
from ..common.descendants import (
    descendant_license,
    published_descendants,
    weights_file,
    weights_page,
)
from .cards import check_card

_TAG = "audio-classification"
_HEADS = {192: 3, 256: 4, 384: 6, 768: 12}
_NO_TOKENS = {"num_special_tokens": 0, "pooling": "patches"}
_FAMILIES: dict[str, dict[str, Any]] = {
    "CED": {
        "config": {"num_mel_bins": 64, "max_length": 1012, **_NO_TOKENS},
        "patch": [16, 16],
        "features": CED_FEATURES,
        "authors": "H. Dinkel, Y. Wang, Z. Yan, J. Zhang and Y. Wang",
        "paper": "CED, consistent ensemble distillation ([arXiv 2308.11957]"
        "(https://arxiv.org/abs/2308.11957)),",
        "code": "The authors' training code, github.com/RicherMans/CED, is GPL-3.0.",
        "citation": """@inproceedings{dinkel2024ced,
  title = {{CED}: Consistent Ensemble Distillation for Audio Tagging},
  author = {Dinkel, Heinrich and Wang, Yongqing and Yan, Zhiyong and Zhang, Junbo and Wang, Yujun},
  booktitle = {ICASSP},
  year = {2024}
}""",
    },
    "Dasheng": {
        "config": {"num_mel_bins": 64, "max_length": 1008, **_NO_TOKENS},
        "patch": [64, 4],
        "features": CED_FEATURES,
        "authors": "H. Dinkel, Z. Yan, Y. Wang, J. Zhang, Y. Wang and B. Wang",
        "paper": "Dasheng ([arXiv 2406.06992](https://arxiv.org/abs/2406.06992))",
        "code": "The authors' code, github.com/RicherMans/Dasheng, is Apache-2.0.",
        "data": "272,000 hours of VGGSound, AudioSet, MTG-Jamendo and ACAV100M, music and the "
        "sound of web videos",
        "citation": """@inproceedings{dinkel2024dasheng,
  title = {Scaling up masked audio encoder learning for general audio classification},
  author = {Dinkel, Heinrich and Yan, Zhiyong and Wang, Yongqing and Zhang, Junbo and
    Wang, Yujun and Wang, Bin},
  booktitle = {Interspeech},
  year = {2024}
}""",
    },
    "PaSST": {
        "config": {"max_length": 1000},
        "patch": [16, 16],
        "features": PASST_FEATURES,
        "authors": "K. Koutini, J. Schlüter, H. Eghbal-zadeh and G. Widmer",
        "paper": "PaSST ([arXiv 2110.05069](https://arxiv.org/abs/2110.05069))",
        "code": "The authors' code, github.com/kkoutini/PaSST, is Apache-2.0.",
        "citation": """@inproceedings{koutini22passt,
  title = {Efficient Training of Audio Transformers with Patchout},
  author = {Koutini, Khaled and Schl{\\"u}ter, Jan and Eghbal-zadeh, Hamid and Widmer, Gerhard},
  booktitle = {Interspeech 2022},
  pages = {2753--2757},
  year = {2022}
}""",
    },
    "AudioMAE": {
        "config": {"num_special_tokens": 1, "pooling": "patches"},
        "patch": [16, 16],
        "features": KALDI_FEATURES,
        "authors": "P.-Y. Huang, H. Xu, J. Li, A. Baevski, M. Auli, W. Galuba, F. Metze and "
        "C. Feichtenhofer",
        "paper": "AudioMAE, masked autoencoders that listen ([arXiv 2207.06405]"
        "(https://arxiv.org/abs/2207.06405)),",
        "code": "The authors' code, github.com/facebookresearch/AudioMAE, is CC-BY-NC-4.0 by its "
        "LICENSE file (its README says CC-BY 4.0): not for commercial use.",
        "citation": """@inproceedings{huang2022amae,
  title = {Masked Autoencoders that Listen},
  author = {Huang, Po-Yao and Xu, Hu and Li, Juncheng and Baevski, Alexei and Auli, Michael and
    Galuba, Wojciech and Metze, Florian and Feichtenhofer, Christoph},
  booktitle = {NeurIPS},
  year = {2022}
}""",
    },
    "SSAST": {
        "config": {"pooling": "patches"},
        "features": KALDI_FEATURES,
        "authors": "Y. Gong, C.-I. Lai, Y.-A. Chung and J. Glass",
        "paper": "SSAST, self-supervised AST ([arXiv 2110.09784]"
        "(https://arxiv.org/abs/2110.09784)),",
        "code": "The authors' code, github.com/YuanGongND/ssast, is BSD-3-Clause.",
        "data": "AudioSet, the sound of YouTube videos, and LibriSpeech, audiobooks",
        "citation": """@inproceedings{gong2022ssast,
  title = {{SSAST}: Self-Supervised Audio Spectrogram Transformer},
  author = {Gong, Yuan and Lai, Cheng-I and Chung, Yu-An and Glass, James},
  booktitle = {AAAI},
  pages = {10699--10709},
  year = {2022}
}""",
    },
}


def descendant_config(name: str) -> tuple[ASTConfig, ASTFeatureExtractor]:
    """Config and feature extractor of a published checkpoint, without what only its file holds:

    CED's and Dasheng's batch normalisation of the spectrogram, `bin_scale` and `bin_offset`.
    """
    checkpoint = published_descendants()[name]
    family = _FAMILIES[checkpoint["family"]]
    patch_bins, patch_frames = checkpoint.get("patch") or family["patch"]
    width = checkpoint.get("width", 768)
    is_pretrained = checkpoint.get("pretrained", False)
    fields = {
        "architectures": ["ASTModel" if is_pretrained else "ASTForAudioClassification"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": checkpoint.get("layers", 12),
        "num_attention_heads": _HEADS[width],
        "patch_size": patch_bins,
        "frequency_stride": checkpoint.get("stride", patch_bins),
        "time_stride": checkpoint.get("stride", patch_frames),
        "layer_norm_eps": 1e-6,
        "native_features": False,
        **family["config"],
    }
    if patch_frames != patch_bins:
        fields["time_patch_size"] = patch_frames
    if checkpoint["family"] == "AudioMAE" and not is_pretrained:
        fields["final_norm"] = "after_pooling"
    else:
        fields["head_norm_eps"] = 1e-5
    if not is_pretrained:
        labels = read_label_names("audioset")
        fields |= {
            "problem_type": "multi_label_classification",
            "id2label": dict(enumerate(labels)),
            "label2id": {label: index for index, label in enumerate(labels)},
        }
    config = ASTConfig(**fields)
    extractor = ASTFeatureExtractor(
        **{
            "num_mel_bins": config.num_mel_bins,
            "max_length": config.max_length,
            **family["features"],
        }
    )
    return config, extractor


def descendant_files(name: str) -> dict[str, str]:
    """The text files of a published checkpoint as a Hub repository, by file name."""
    config, extractor = descendant_config(name)
    ours = ("patchout", "merged_tokens", "smoothing")
    settings = {
        key: value
        for key, value in config.to_diff_dict().items()
        if key != "transformers_version" and not any(word in key for word in ours)
    }
    return {
        "config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "preprocessor_config.json": json.dumps(extractor.to_dict(), indent=2) + "\n",
        "README.md": _card(name, config, extractor),
    }


def _card(name: str, config: ASTConfig, extractor: ASTFeatureExtractor) -> str:
    checkpoint = published_descendants()[name]
    family = _FAMILIES[checkpoint["family"]]
    score = checkpoint.get("mean_average_precision")
    is_pretrained = checkpoint.get("pretrained", False)
    head = 0 if is_pretrained else (config.hidden_size + 1) * config.num_labels
    if not is_pretrained and config.final_norm != "after_pooling":
        head += 2 * config.hidden_size
    rows, columns = config.trained_grid
    seconds = config.max_length * extractor.filterbank.frame_shift / extractor.sampling_rate
    results = None
    if score is not None:
        results = [
            EvalResult(
                task_type=_TAG,
                task_name="Audio classification",
                dataset_type="agkphysics/AudioSet",
                dataset_name="AudioSet",
                metric_type="mean_average_precision",
                metric_name="mAP, evaluation set, as published",
                metric_value=score,
            )
        ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TAG,
        license=descendant_license(name),
        datasets=["agkphysics/AudioSet"],
        base_model=checkpoint.get("hub"),
        tags=["audio-spectrogram-transformer", checkpoint["family"].lower(), _TAG],
        model_name=name if results else None,
        eval_results=results,
    )
    text = str(
        ModelCard.from_template(
            metadata,
            template_path=str(hub_configs_folder() / "descendant_card_template.md"),
            title=name,
            paper=family["paper"],
            parameters=f"{config.num_encoder_parameters + head:,}",
            rows=rows,
            columns=columns,
            patch_bins=config.patch_shape[0],
            patch_frames=config.patch_shape[1],
            sampling_rate=extractor.sampling_rate,
            seconds=f"{seconds:g}",
            labels=0 if is_pretrained else config.num_labels,
            authors=family["authors"],
            source=f"[{weights_file(name)}]({weights_page(name)})",
            license=descendant_license(name),
            code_licence=family["code"],
            score=None if score is None else f"{score:.4g}",
            file=weights_file(name),
            data=family.get("data", "AudioSet, the sound of YouTube videos"),
            citation=family["citation"],
        )
    )
    check_card(text)
    return text.rstrip() + "\n"
