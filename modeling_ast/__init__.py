"""Audio Spectrogram Transformer for `transformers`.

Importing this package makes the Auto classes and `pipeline("audio-classification")` use it for
every AST checkpoint (`model_type` "audio-spectrogram-transformer"), whoever wrote it, and for those
of its descendants that were converted (`model_type` "ast-family").
"""

from transformers import (
    CONFIG_MAPPING,
    FEATURE_EXTRACTOR_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
)
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from feature_extraction import ASTFamilyFeatureExtractor, ASTFeatureExtractor

from .configuration_ast import FAMILY_MODEL_TYPE, ASTConfig
from .conversion_ast import convert_checkpoint
from .detection_ast import ASTForAudioFrameClassification, ASTFrameConfig
from .events_ast import find_events
from .explanation_ast import attention_rollout, class_relevance, plot_relevance
from .modeling_ast import ASTForAudioClassification, ASTModel
from .pipeline_ast import ASTAudioClassificationPipeline

__all__ = [
    "ASTAudioClassificationPipeline",
    "ASTConfig",
    "ASTForAudioClassification",
    "ASTForAudioFrameClassification",
    "ASTFrameConfig",
    "ASTModel",
    "attention_rollout",
    "class_relevance",
    "convert_checkpoint",
    "find_events",
    "plot_relevance",
]

AutoConfig.register(ASTConfig.model_type, ASTConfig, exist_ok=True)
# One class for both types, which `AutoConfig.register` does not allow.
CONFIG_MAPPING.register(FAMILY_MODEL_TYPE, ASTConfig, exist_ok=True)
AutoModel.register(ASTConfig, ASTModel, exist_ok=True)
AutoModelForAudioClassification.register(ASTConfig, ASTForAudioClassification, exist_ok=True)
AutoFeatureExtractor.register(ASTConfig, ASTFeatureExtractor, exist_ok=True)
# Extractors are found by their class's name, among transformers' own first: its entry must go.
FEATURE_EXTRACTOR_MAPPING_NAMES.pop(ASTConfig.model_type, None)
# Found by its name, which files give.
FEATURE_EXTRACTOR_MAPPING.register(FAMILY_MODEL_TYPE, ASTFamilyFeatureExtractor, exist_ok=True)

AutoConfig.register(ASTFrameConfig.model_type, ASTFrameConfig, exist_ok=True)
AutoFeatureExtractor.register(ASTFrameConfig, ASTFeatureExtractor, exist_ok=True)
for auto_class in (AutoModelForAudioFrameClassification, AutoModelForAudioClassification):
    auto_class.register(ASTFrameConfig, ASTForAudioFrameClassification, exist_ok=True)
# It starts from classifiers' checkpoints, too; `register` wants its own config only.
AutoModelForAudioFrameClassification._model_mapping.register(
    ASTConfig, ASTForAudioFrameClassification, exist_ok=True
)

ASTAudioClassificationPipeline.feature_extractor_class = ASTFeatureExtractor
# Taken out first: replacing a registered task logs a warning at every import.
PIPELINE_REGISTRY.supported_tasks.pop("audio-classification", None)
PIPELINE_REGISTRY.register_pipeline(
    "audio-classification",
    pipeline_class=ASTAudioClassificationPipeline,
    pt_model=AutoModelForAudioClassification,
    type="audio",
)
# With this, `pipe.save_pretrained` would name its code in the config, and nobody could make a
# pipeline of the folder without trusting that code.
del ASTAudioClassificationPipeline._registered_impl  # type: ignore[misc]
