"""What the model computes. Knows nothing of files, DeepSpeed or clusters."""

from modeling.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "config": ["ModelConfig", "ParameterCounts", "SoMEConfig"],
        "key_rules": ["KeyRules"],
        "transformer": ["ModelOutput", "Transformer", "build_model"],
    },
)
