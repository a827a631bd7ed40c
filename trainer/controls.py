"""Controls: what an experiment is turned into by `control=NAME`, to see what a part of it is worth.

Each takes one thing away and leaves data, schedule, seed and the rest of the model as they are. The number of trained
parameters changes where a part goes that has some; `--dry_run` and every table print it.
"""

from collections.abc import Callable
from dataclasses import replace

from modeling.config import ModelConfig
from modeling.key_rules import KeyRules


def _attention_only(model: ModelConfig) -> ModelConfig:
    """No experts: attention blocks alone (with a readout, of gelu); an input map would feed nothing."""
    return replace(model, channel_mixer="none", d_ffn=None, input_map=model.input_map and model.readout)


def _random_keys(model: ModelConfig) -> ModelConfig:
    """Keys stay where they start; the query network learns."""
    return _with_some(model, rules=KeyRules.preset("fixed"))


def _frozen_router(model: ModelConfig) -> ModelConfig:
    """The query network stays where it starts; keys move by their rule."""
    return _with_some(model, train_router=False)


def _hash_routing(model: ModelConfig) -> ModelConfig:
    """A token id always goes to the same random experts, with equal gates."""
    return _with_some(model, routing="hash", rules=KeyRules.preset("fixed"))


def _shared_expert(model: ModelConfig) -> ModelConfig:
    """Every token goes to the same single expert, at 1/K of the active FLOPs."""
    return _with_some(model, routing="shared", top_k=1, rules=KeyRules.preset("fixed"))


def _frozen_dense(model: ModelConfig) -> ModelConfig:
    """One frozen random FFN of equal active FLOPs, no routing."""
    return replace(model, channel_mixer="frozen_dense", d_ffn=model.some.top_k * model.some.d_ffn)


def _dense(model: ModelConfig) -> ModelConfig:
    """A trained FFN of equal active FLOPs."""
    return replace(model, channel_mixer="dense", d_ffn=model.some.top_k * model.some.d_ffn)


def _dense_equal_trained(model: ModelConfig) -> ModelConfig:
    """A trained FFN with as many parameters as the query network that it replaces, to within D."""
    D = model.d_model
    width = max(1, round((model.some.num_router_parameters() - D) / (2 * D + 1)))
    return replace(model, channel_mixer="dense", d_ffn=width)


def _permuted_experts(model: ModelConfig) -> ModelConfig:
    """Trained as it is; in evaluation every expert stands in for its neighbour."""
    return _with_some(model, permute_in_evaluation=True)


def _with_some(model: ModelConfig, **changes) -> ModelConfig:
    return replace(model, some=replace(model.some, **changes))


CONTROLS: dict[str, Callable[[ModelConfig], ModelConfig]] = {
    "attention_only": _attention_only,
    "random_keys": _random_keys,
    "frozen_router": _frozen_router,
    "hash_routing": _hash_routing,
    "shared_expert": _shared_expert,
    "frozen_dense": _frozen_dense,
    "dense": _dense,
    "dense_equal_trained": _dense_equal_trained,
    "permuted_experts": _permuted_experts,
}


def apply_control(model: ModelConfig, control: str | None) -> ModelConfig:
    """The model that `control` makes of `model`; applying it twice is applying it once.

    Raises:
        ValueError: unknown control, or one for SoME models and this is none.
    """
    if control is None:
        return model
    if control not in CONTROLS:
        raise ValueError(f"control = {control!r} is unknown; choose one of: {', '.join(CONTROLS)}, or null")
    controlled = CONTROLS[control](model)
    # The resolved experiment of a control is read back with the control in it: then nothing is left to do.
    if model.channel_mixer != "some" and controlled != model:
        raise ValueError(
            f"control = {control!r} takes a SoME layer apart and does not fit model.channel_mixer = "
            f"{model.channel_mixer!r}; leave control out"
        )
    if control == "permuted_experts" and model.some.num_experts == 1:
        raise ValueError("control = 'permuted_experts' has one expert and nothing to swap; leave control out")
    return controlled
