"""The figures of `tools/expert_figures.py` as tables of text, for the terminal and the page."""

from typing import Any

from trainer.text import visible

TOKENS = "Each token as the model reads it, with its experts and, in brackets, their gates"


def tables(figures: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of every table."""
    of_layers = [f"layer {layer['layer']}" for layer in figures["layers"]]
    tokens = [
        [str(index), token["token"], f"{token['loss']:.3f}", *map(_visits, token["experts"], token["gates"])]
        for index, token in enumerate(figures["tokens"])
    ]
    found = [(TOKENS, ["", "token", "loss of next", *of_layers], tokens)]
    for layer in figures["layers"]:
        rows = [
            [str(e["expert"]), f"{e['tokens']}", f"{e['share']:.1%}", f"{e['mean_gate']:.2f}", _top_tokens(e)]
            for e in layer["experts"]
        ]
        found.append((layer_line(layer, figures), ["expert", "tokens", "of all", "mean gate", "most served"], rows))
        pairs = [
            [" and ".join(map(str, p["experts"])), f"{p['of_tokens']:.2f}", f"{p['of_types']:.2f}"]
            for p in layer["overlap"]["pairs"]
        ]
        found.append((overlap_line(layer), ["experts", "of tokens", "of token types"], pairs))
    for change in figures["disabled"]:
        rows = [
            [str(t["index"]), t["token"], t["next"], f"{t['loss']:.3f}", f"{t['loss_without']:.3f}", "yes" * t["chose_it"]]
            for t in change["most_changed"]
        ]
        head = ["", "token", "next", "loss of next", "without it", "chose it"]
        found.append((change_line(change), head, rows))
    return found


def headline(figures: dict[str, Any]) -> str:
    """What was inspected."""
    shown, count = len(figures["tokens"]), figures["num_tokens"]
    part = f"; the first {shown:,} are shown" if shown < count else ""
    return visible(
        f"{figures['experiment']}, step {figures['step']}, {figures['checkpoint']}: {figures['source']} of {count:,} tokens"
        f"{part}; loss {figures['loss']:.4f} nats/token (ppl {figures['perplexity']:,.2f}); {figures['top_k']} experts a "
        f"token of {figures['num_experts']} a layer"
    )


def layer_line(layer: dict[str, Any], figures: dict[str, Any]) -> str:
    """A layer in a line."""
    return (
        f"Layer {layer['layer']}: {layer['experts_used']} of {figures['num_experts']} experts used, effectively "
        f"{layer['effective_experts']:.1f}; largest gate {layer['largest_gate']:.2f} on average"
    )


def overlap_line(layer: dict[str, Any]) -> str:
    """How much the experts of a layer overlap."""
    overlap = layer["overlap"]
    if overlap["mean_of_tokens"] is None:
        return f"Layer {layer['layer']}: a single expert, no overlap"
    return (
        f"Layer {layer['layer']}: overlap (Jaccard) of the used experts, on average {overlap['mean_of_tokens']:.3f} of "
        f"their tokens and {overlap['mean_of_types']:.3f} of the token types; the pairs that share most tokens"
    )


def change_line(change: dict[str, Any]) -> str:
    """What one expert is worth."""
    means = [
        f"{name} {change[key]:+.4f}"
        for name, key in (("at its tokens", "change_at_its_tokens"), ("elsewhere", "change_elsewhere"))
        if change[key] is not None
    ]
    moved = ", ".join(f"{share:.1%}" for share in change["routed_otherwise"])
    return (
        f"Without expert {change['expert']} of layer {change['layer']}, which {change['tokens']} tokens chose: loss "
        f"{change['loss']:.4f} to {change['loss_without']:.4f} ({', '.join(means)}); tokens that choose other experts then, "
        f"by layer: {moved}; the tokens that change most"
    )


def _visits(experts_K: list[int], gates_K: list[float]) -> str:
    return " ".join(f"{expert}({gate:.2f})" for expert, gate in zip(experts_K, gates_K, strict=True))


def _top_tokens(expert: dict[str, Any]) -> str:
    return "  ".join(f"{token['token']}({token['count']})" for token in expert["top_tokens"])
