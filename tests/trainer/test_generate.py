"""Text from a model: where it starts, when it ends, and that every rank writes the same."""

import pytest
import torch

from modeling import ModelConfig, SoMEConfig, Transformer, build_model
from tests.distributed import run_ranks
from trainer.config import SampleConfig
from trainer.data import RowLayout, eos_id, pad_id, story, train_tokenizer
from trainer.generate import generate

VOCAB, S = 300, 12
PROMPT = "Once upon"
ENDS_AFTER = 10
LAYOUTS = {"bytes": dict(rows="chunks"), "words": dict(rows="padded", count_padding=True)}


def parts(kind: str):
    """Tokenizer, layout and a model that prefers one token after the other."""
    tokenizer = train_tokenizer([story(i) for i in range(20)], VOCAB, kind)
    layout = RowLayout(S, pad_id=pad_id(tokenizer), **LAYOUTS[kind])
    some = SoMEConfig(num_experts=4, d_ffn=8, top_k=2)
    config = ModelConfig(vocab_size=VOCAB, d_model=16, num_layers=1, num_heads=2, max_seq_len=S, some=some)
    return tokenizer, layout, build_model(config, seed=1)


def ending_after(model: Transformer, end: int, tokens: int) -> None:
    """Make the end of the story the likeliest token once `tokens` are in sight."""
    head = model.head.forward

    def wants_to_end(x_BSD):
        logits_BSV = head(x_BSD)
        logits_BSV[:, tokens - 1 :, end] = 1e3
        return logits_BSV

    model.head.forward = wants_to_end


def _generate_all(rank: int) -> dict[str, dict]:
    return {kind: _generate(kind) for kind in LAYOUTS}


def _generate(kind: str) -> dict[str, object]:
    tokenizer, layout, model = parts(kind)
    windows: list[list[int]] = []
    model.register_forward_pre_hook(lambda _, inputs: windows.append(inputs[0][0].tolist()))

    def run(tokens: int, temperature: float, prompt: str = PROMPT, seed: int = 0) -> str:
        windows.clear()
        config = SampleConfig(prompt=prompt, tokens=tokens, temperature=temperature)
        text = generate(model, tokenizer, layout, config, seed, torch.device("cpu"))
        assert model.training
        return text

    result: dict[str, object] = {"greedy": run(20, 0.0), "windows": [list(w) for w in windows]}
    result["sampled"] = [run(8, 1.0, seed=seed) for seed in (0, 0, 1)]
    try:
        result["from nothing"] = run(3, 1.0, prompt="")
    except RuntimeError as error:
        result["error"] = str(error)
    ending_after(model, eos_id(tokenizer), ENDS_AFTER)
    result["ended"], result["calls"] = run(20, 0.0), len(windows)
    return result


@pytest.fixture(scope="module")
def generated() -> list[dict[str, dict]]:
    return run_ranks(_generate_all, 2)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_greedy_text_is_the_loop_and_windows_start_as_in_training(generated, kind):
    first, second = (of_rank[kind] for of_rank in generated)
    assert first == second, "the same on every rank"
    tokenizer, _, model = parts(kind)
    # Chunks begin with the end of the story before, padded rows with their first word.
    start = [eos_id(tokenizer)] if kind == "bytes" else []
    ids = start + tokenizer.encode(PROMPT).ids
    prompt = len(ids)
    model.eval()
    for window in first["windows"]:
        assert window == ids[-S:]
        ids.append(int(model(torch.tensor([ids[-S:]])).logits[0, -1].argmax()))
    assert eos_id(tokenizer) not in ids[prompt:] and len(ids) == prompt + 20 > S
    assert first["greedy"] == tokenizer.decode(ids[len(start) :])
    again, same, other = first["sampled"]
    assert again == same != other
    assert prompt < ENDS_AFTER < S
    assert first["ended"] == tokenizer.decode(ids[len(start) : ENDS_AFTER])
    assert first["calls"] == ENDS_AFTER - prompt + 1, "it stops at the end of the story"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_empty_prompt(generated, kind):
    assert "error" not in generated[0][kind], generated[0][kind]["error"]
