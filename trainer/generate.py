"""Text from a model, on all ranks together: each runs the same tokens, rank 0 draws the next one."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

from modeling import Transformer
from modeling.seeding import derive_generator
from trainer.config import SampleConfig
from trainer.data import RowLayout, eos_id


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    layout: RowLayout,
    config: SampleConfig,
    seed: int,
    device: torch.device,
    on_token: Callable[[], None] = lambda: None,
) -> str:
    """The prompt and what the model adds to it, up to the end of its story; a collective, the same text on every rank.

    `on_token` is called before each token.
    """
    generator = derive_generator(seed, "sample")
    end = eos_id(tokenizer)
    prompt = tokenizer.encode(config.prompt).ids
    # As in training: chunks begin with the end of the document before, padded rows with their first word.
    start = [end] if layout.rows == "chunks" or not prompt else []
    ids = [*start, *prompt]
    model.eval()
    for _ in range(config.tokens):
        on_token()
        window = ids[-model.config.max_seq_len :]
        logits_V = model(torch.tensor([window], device=device)).logits[0, -1].float().cpu()
        if config.temperature == 0:
            next_id = logits_V.argmax()
        else:
            next_id = torch.multinomial(torch.softmax(logits_V / config.temperature, -1), 1, generator=generator)[0]
        # Rounding may differ between ranks: rank 0's choice counts.
        next_id = next_id.to(device)
        dist.broadcast(next_id, src=0)
        if next_id == end:
            break
        ids.append(int(next_id))
    model.train()
    return tokenizer.decode(ids[len(start) :])
