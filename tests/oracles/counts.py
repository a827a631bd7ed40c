"""Parameter counts of the common model (some.md 1.1, 2 and 6): list every tensor's shape and multiply out.

Keys, usage, the positional encoding and every other buffer are not parameters.

Letters: d model width; no arrays here, so no shape suffixes.
"""

from math import prod

Shape = tuple[int, ...]


def count_parameters(
    vocab: int, d: int, layers: int, experts: int, d_ffn: int, router: str, router_hidden: int | None = None
) -> tuple[int, int]:
    """(total, trained). `router`: "linear" or "mlp", whose hidden width is 2d unless `router_hidden` says otherwise."""
    trained: list[Shape] = [(vocab, d), (vocab, d), (vocab,)]  # embedding, head, head bias
    frozen: list[Shape] = []
    for _ in range(layers):
        trained += attention_shapes(d)
        trained += [(d,), (d,), (d,), (d,)]  # weight and bias of two LayerNorms
        trained += router_shapes(d, router, 2 * d if router_hidden is None else router_hidden)
        for _ in range(experts):
            frozen += [(d_ffn, d), (d_ffn,), (d, d_ffn), (d,)]  # w_down, b_down, w_up, b_up
    num_trained = sum(prod(shape) for shape in trained)
    return num_trained + sum(prod(shape) for shape in frozen), num_trained


def attention_shapes(d: int) -> list[Shape]:
    return [(3 * d, d), (3 * d,), (d, d), (d,)]  # packed in-projection, out-projection


def router_shapes(d: int, router: str, hidden: int) -> list[Shape]:
    if router == "linear":
        return [(d, d), (d,)]
    if router == "mlp":
        return [(hidden, d), (hidden,), (d, hidden), (d,)]
    raise ValueError(f"router must be 'linear' or 'mlp', not {router!r}")
