"""Audio Spectrogram Transformer for `transformers`.

Importing this package makes the Auto classes and `pipeline("audio-classification")` use it for
every AST checkpoint (`model_type` "audio-spectrogram-transformer"), whoever wrote it, and for
converted checkpoints of its descendants (`model_type` "ast-family").
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
from .speed_ast import swap

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
# `AutoConfig.register` does not allow one class for two types.
CONFIG_MAPPING.register(FAMILY_MODEL_TYPE, ASTConfig, exist_ok=True)
AutoModel.register(ASTConfig, ASTModel, exist_ok=True)
AutoModelForAudioClassification.register(ASTConfig, ASTForAudioClassification, exist_ok=True)
AutoFeatureExtractor.register(ASTConfig, ASTFeatureExtractor, exist_ok=True)
# transformers looks an extractor up by class name, its own entries first: remove the one for AST.
FEATURE_EXTRACTOR_MAPPING_NAMES.pop(ASTConfig.model_type, None)
# Found by the class name in preprocessor_config.json.
FEATURE_EXTRACTOR_MAPPING.register(FAMILY_MODEL_TYPE, ASTFamilyFeatureExtractor, exist_ok=True)

AutoConfig.register(ASTFrameConfig.model_type, ASTFrameConfig, exist_ok=True)
AutoFeatureExtractor.register(ASTFrameConfig, ASTFeatureExtractor, exist_ok=True)
for auto_class in (AutoModelForAudioFrameClassification, AutoModelForAudioClassification):
    auto_class.register(ASTFrameConfig, ASTForAudioFrameClassification, exist_ok=True)
# It can also start from a classifier's checkpoint; `register` accepts only the class's own config.
AutoModelForAudioFrameClassification._model_mapping.register(
    ASTConfig, ASTForAudioFrameClassification, exist_ok=True
)

ASTAudioClassificationPipeline.feature_extractor_class = ASTFeatureExtractor
ASTAudioClassificationPipeline.speed_up = staticmethod(swap)  # type: ignore[assignment]
# Removed first: replacing a registered task would log a warning at every import.
PIPELINE_REGISTRY.supported_tasks.pop("audio-classification", None)
PIPELINE_REGISTRY.register_pipeline(
    "audio-classification",
    pipeline_class=ASTAudioClassificationPipeline,
    pt_model=AutoModelForAudioClassification,
    type="audio",
)
# If this stayed, `pipe.save_pretrained` would name its code in the config, and nobody could load
# the folder as a pipeline without trusting that code.
del ASTAudioClassificationPipeline._registered_impl  # type: ignore[misc]
