"""What the model computes. Knows nothing of files, DeepSpeed or clusters."""

from modeling.config import ModelConfig, ParameterCounts, SoMEConfig
from modeling.key_rules import KeyRules
from modeling.transformer import ModelOutput, Transformer, build_model

__all__ = [
    "KeyRules",
    "ModelConfig",
    "ModelOutput",
    "ParameterCounts",
    "SoMEConfig",
    "Transformer",
    "build_model",
]
