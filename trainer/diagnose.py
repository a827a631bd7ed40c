"""Where numbers stopped being finite."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from modeling import Transformer
from trainer.data import Batch

MOST_NAMED = 3


@torch.no_grad()
def find_suspects(model: Transformer, batches: Iterable[Batch], temperature: float | None, device: torch.device) -> str:
    """What first holds numbers that are not finite: parameters, keys, or what a layer makes of the batch; a collective.

    Args:
        model: as it stands.
        batches: this rank's micro batches of the step, as many as every other rank has.
        temperature: of the gates in that step.
        device: of the model.

    Returns:
        The same names on every rank, as in the model: parameters and key stores, else the first module with such an
        output, else the backward pass.
    """
    state = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n.endswith(".store.keys")}}
    modules = {"embedding": model.embedding}
    for index, block in enumerate(model.blocks):
        modules |= {f"blocks.{index}.{name}": getattr(block, name) for name in ("attention", "mixer")}
        modules[f"blocks.{index}"] = block
    modules["head"] = model.head
    is_bad = torch.zeros(len(state) + len(modules) + 1, device=device)

    def check(place: int, values: torch.Tensor) -> None:
        is_bad[place] = torch.maximum(is_bad[place], (~values.isfinite()).any().float())

    def watch(place: int, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return module.register_forward_hook(
            lambda _module, _inputs, out: check(place, out[0] if isinstance(out, tuple) else out)
        )

    for place, values in enumerate(state.values()):
        check(place, values)
    hooks = [watch(place, module) for place, module in enumerate(modules.values(), start=len(state))]
    try:
        for batch in batches:
            mask_BS = batch.routing_mask
            out = model(
                batch.input_ids_BS.to(device),
                None if mask_BS is None else mask_BS.to(device),
                temperature,
                batch.targets_BS.to(device),
            )
            check(len(is_bad) - 1, out.losses_T)
    finally:
        for hook in hooks:
            hook.remove()
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)

    bad = [name for name, flag in zip([*state, *modules, "the loss"], is_bad.tolist(), strict=True) if flag]
    held = [name for name in bad if name in state]
    if held:
        return ", ".join(held[:MOST_NAMED]) + (f" and {len(held) - MOST_NAMED} more" if len(held) > MOST_NAMED else "")
    return f"the output of {bad[0]}" if bad else "the backward pass (the forward is finite now)"
