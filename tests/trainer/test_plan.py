"""The plan's memory and traffic, against what is really built, kept and sent."""

import itertools
import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from modeling import ModelConfig, SoMEConfig, build_model
from modeling.some import KeyRules, SoMELayer
from modeling.some.copies import nearest_copies
from tests.distributed import run_ranks
from tests.launch import REPOSITORY
from tests.trainer.test_engine import TINY, Collectives, make_trainer
from trainer.config import load_experiment
from trainer.ds_config import set_precision
from trainer.layout import Layout
from trainer.plan import (
    Deployment,
    Sharding,
    all_reduce,
    bytes_per_copy,
    distinct_ranks,
    exchange_per_token,
    memory,
    saved_bytes_per_token,
    traffic,
)


def alone(micro_batch: int = 1, bf16: bool = False, **changes) -> Deployment:
    sharding = Sharding(bf16=bf16)
    return Deployment(Layout(1, micro_batch, 1), ranks=1, ranks_per_node=1, sharding=sharding, device="cpu", **changes)


@pytest.mark.parametrize(("top_k", "ranks", "experts"), [(1, 4, 8), (2, 4, 8), (3, 2, 6), (4, 3, 9), (5, 5, 5), (2, 1, 4)])
def test_distinct_ranks_by_enumeration(top_k, ranks, experts):
    shard = experts // ranks
    counted = [len({e // shard for e in chosen}) for chosen in itertools.combinations(range(experts), top_k)]
    assert distinct_ranks(top_k, ranks, experts) == pytest.approx(sum(counted) / len(counted))


@pytest.mark.parametrize(("ep_size", "ranks_per_node"), [(2, 4), (4, 4), (8, 4), (8, 2), (8, 1)])
def test_copies_inside_and_between_nodes_by_enumeration(ep_size, ranks_per_node):
    """Every rank of the pool sends a token with every possible choice of experts; the copies are counted one by one."""
    K, E, D = 3, 8, 10
    how = Deployment(Layout(ep_size, 1, 1), ranks=8, ranks_per_node=ranks_per_node, sharding=Sharding(bf16=True))
    near = far = choices = 0
    for sender in range(ep_size):
        for chosen in itertools.combinations(range(E), K):
            choices += 1
            for rank in {e // (E // ep_size) for e in chosen} - {sender}:
                same = rank // ranks_per_node == sender // ranks_per_node
                near, far = near + same, far + (not same)
    sent = exchange_per_token(K, E, D, how)
    assert sent.in_node == pytest.approx(near / choices * bytes_per_copy(D, K, 2))
    assert sent.between_nodes == pytest.approx(far / choices * bytes_per_copy(D, K, 2))


@pytest.mark.parametrize(("nodes", "near"), [(1, 1), (1, 4), (3, 1), (2, 8), (128, 8)])
def test_all_reduce_meets_the_bound_of_a_ring(nodes, near):
    sent = all_reduce(1000.0, Deployment(Layout(1, 1, 1), ranks=nodes * near, ranks_per_node=near))
    assert sent.total == pytest.approx(2 * (nodes * near - 1) / (nodes * near) * 1000)
    assert (sent.between_nodes == 0) == (nodes == 1) and (sent.in_node == 0) == (near == 1)


# What autograd keeps

SIZES = dict(vocab_size=512, d_model=64, num_layers=2, num_heads=4, max_seq_len=64)
SOME = SoMEConfig(num_experts=4, d_ffn=96, top_k=2)
HASH = replace(SOME, routing="hash", rules=KeyRules.preset("fixed"))
MODELS = {
    "mlp router": ModelConfig(**SIZES, some=SOME),
    "linear router, post norm": ModelConfig(**SIZES, norm_position="post", some=replace(SOME, router="linear", top_k=4)),
    "frozen router": ModelConfig(**SIZES, some=replace(SOME, train_router=False)),
    "hash, readout": ModelConfig(**SIZES, readout=True, input_map=True, some=HASH),
    "dense": ModelConfig(**SIZES, channel_mixer="dense", d_ffn=200),
    "frozen dense": ModelConfig(**SIZES, channel_mixer="frozen_dense", d_ffn=200),
    "no mixer": ModelConfig(**SIZES, channel_mixer="none"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_saved_activations_within_five_percent(name, bf16):
    config, B = MODELS[name], 8
    model = build_model(config, pool_dtype=torch.bfloat16 if bf16 else torch.float32)
    model.to(torch.bfloat16 if bf16 else torch.float32)
    kept = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    packed = []

    def note(tensor):
        packed.append(weakref.ref(tensor))
        return tensor

    ids_BS = torch.randint(512, (B, 64), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones(B, 64, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(ids_BS, mask_BS, targets_BS=ids_BS)
    # What no loss depends on is gone by now, and its memory may serve another.
    alive = [tensor.untyped_storage() for tensor in (ref() for ref in packed) if tensor is not None]
    saved = {storage.data_ptr(): storage.nbytes() for storage in alive if storage.data_ptr() not in kept}
    measured = sum(saved.values()) + sum(record.queries_TD.nbytes for record in out.routing)
    planned = B * 64 * saved_bytes_per_token(config, alone(bf16=bf16))
    assert planned == pytest.approx(measured, rel=0.05)


# What is built and sent

CONFIGS = (("zero2", "bf16"), ("zero2", "fp32"), ("zero1", "bf16"), ("zero1", "fp32"), ("zero2_fp32", "bf16"))
"""A shipped JSON, and the precision that suits the machine."""
CHANGES = ("model.some.num_experts=64", "model.d_model=64")


def _count_exchange(rank: int) -> list[tuple[int, int]]:
    """For a few shapes: copies that leave this rank, and the bytes that its all-to-alls send to other ranks."""
    counted = []
    for top_k, dtype in ((1, torch.float32), (3, torch.float32), (3, torch.bfloat16), (8, torch.bfloat16)):
        config = SoMEConfig(d_model=12, num_experts=8, d_ffn=20, top_k=top_k)
        layer = SoMELayer(config, ep_group=dist.group.WORLD, pool_dtype=dtype)
        layer.query.to(dtype)
        x_TD = torch.randn(30 + rank, 12, generator=torch.Generator().manual_seed(rank)).to(dtype).requires_grad_()
        with Leaving(rank) as leaving:
            y_BSD, routing = layer(x_TD[None])
            y_BSD.sum().backward()
        owners_TK = nearest_copies(layer.placement, rank).serving(routing.expert_ids_TK)[0]
        copies = sum(len(set(owners) - {rank}) for owners in owners_TK.tolist())
        counted.append((copies, leaving.bytes))
    return counted


class Leaving(TorchDispatchMode):
    """Adds up what all-to-alls send to ranks other than this one."""

    def __init__(self, rank: int):
        super().__init__()
        self.rank, self.bytes = rank, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.c10d.alltoall_base_.default:
            _, rows, _, _, splits = args[:5]
            splits = splits or [len(rows) // dist.get_world_size()] * dist.get_world_size()
            row = rows[0].numel() * rows.element_size() if len(rows) else 0
            self.bytes += row * (sum(splits) - splits[self.rank])
        return function(*args, **(kwargs or {}))


def test_exchange_sends_exactly_the_planned_bytes_a_copy():
    results = run_ranks(_count_exchange, 2)
    for case, (top_k, width) in enumerate([(1, 4), (3, 4), (3, 2), (8, 2)]):
        copies = sum(of_rank[case][0] for of_rank in results)
        sent = sum(of_rank[case][1] for of_rank in results)
        assert copies > 0
        # Every rank tells every other how many copies it sends: 8 bytes.
        assert sent == copies * bytes_per_copy(12, top_k, width) + 2 * 8


def _build_and_step_all(rank: int, folder: str) -> dict[str, dict]:
    return {f"{name} {best}": _build_and_step(rank, f"{folder}/{name}_{best}", name, best) for name, best in CONFIGS}


def _build_and_step(rank: int, folder: str, name: str, best: str) -> dict:
    ds_config = str(REPOSITORY / "ds_configs" / f"{name}.json")
    trainer = make_trainer(rank, folder, *CHANGES, ds_config=ds_config, best=best)
    trainer._step()
    with Collectives() as counted:
        trainer._step()
    model, optimizer = trainer.engine.model, trainer.engine._optimizer
    pools = [layer.pool for layer in model.some_layers]
    sent = dict(counted.bytes)
    sent.pop("alltoall_base_")
    masters = optimizer.single_partition_of_fp32_groups
    return {
        "pool": sum(buffer.nbytes for pool in pools for buffer in pool.buffers()),
        "core": sum(p.nbytes for p in model.parameters()) + model.positions_SD.nbytes,
        "optimizer": sum(p.nbytes for p in masters)
        + sum(optimizer.optimizer.state[p][m].nbytes for p in masters for m in ("exp_avg", "exp_avg_sq")),
        "keys": sum(buffer.nbytes for layer in model.some_layers for buffer in layer.store.buffers()),
        "sent": sum(sent.values()),
    }


@pytest.fixture(scope="module")
def stepped(tmp_path_factory) -> list[dict[str, dict]]:
    """What both ranks held and sent, for every DeepSpeed JSON, from one world of processes."""
    return run_ranks(_build_and_step_all, 2, str(tmp_path_factory.mktemp("stepped")))


@pytest.mark.parametrize(("name", "best"), CONFIGS)
def test_a_real_step_holds_and_sends_what_was_planned(stepped, name, best):
    experiment = load_experiment("quickstart", [*TINY, *CHANGES])
    bf16, stage = name != "zero2_fp32" and best == "bf16", 1 if name == "zero1" else 2
    how = Deployment(
        Layout(2, 2, 2), ranks=2, ranks_per_node=2, sharding=Sharding(bf16, stage, bucket=10_000_000), device="cpu"
    )
    held, sent = memory(experiment, how), traffic(experiment, how)
    for seen in (of_rank[f"{name} {best}"] for of_rank in stepped):
        assert held.pool == seen["pool"]
        assert held.core == seen["core"]
        assert held.optimizer == pytest.approx(seen["optimizer"], rel=0.01)
        # The stores alone; the sums of a step are made and dropped.
        assert seen["keys"] <= held.keys
        # On two ranks what a ring sends is what each gives; besides, the loss, norms and checks.
        assert 0 <= seen["sent"] - sent.gradients.total - sent.keys.total < 600


def test_the_sharding_is_read_from_the_shipped_files():
    for name, expected in {
        "zero2": Sharding(True, 2, False, 10_000_000, 4),
        "zero1": Sharding(True, 1, False, 10_000_000, 4),
        "zero2_fp32": Sharding(False, 2, False, 10_000_000, 4),
        "zero2_offload": Sharding(True, 2, True, 10_000_000, 4),
    }.items():
        config = json.loads((REPOSITORY / "ds_configs" / f"{name}.json").read_text())
        assert Sharding.of(set_precision(config, "bf16")) == expected
        assert Sharding.of(set_precision(config, "fp32")) == replace(expected, bf16=False)


def test_memory_moves_with_what_it_depends_on():
    experiment = load_experiment("b3")
    one, eight = alone(), replace(alone(), layout=Layout(8, 1, 1), ranks=8, ranks_per_node=8)
    assert memory(experiment, eight).pool == memory(experiment, one).pool // 8
    spread = replace(eight, replicas=9)
    extra = memory(experiment, spread).pool - memory(experiment, eight).pool
    assert extra == 10 * 2 * experiment.model.some.num_expert_parameters() * 4, "nine copies on eight ranks are two on one"
    assert memory(experiment, one).exchange == 0 < memory(experiment, eight).exchange
    gridded, matrices = load_experiment("b3", ["model.some.expert_grid=fp8"]), 512 * 2 * 512 * 1024
    assert memory(experiment, one).pool - memory(gridded, one).pool == 10 * 3 * matrices, "one byte a weight, not four"
    on_gpu = replace(one, device="cuda")
    beside = memory(gridded, on_gpu).activations - memory(experiment, on_gpu).activations
    assert beside == 4 * matrices, "those of one layer in the dtype that computes"
    longer = replace(experiment, model=replace(experiment.model, max_seq_len=2 * experiment.model.max_seq_len))
    assert memory(longer, one).activations == 2 * memory(experiment, one).activations
    offloaded = memory(experiment, replace(eight, sharding=Sharding(offload=True)))
    assert offloaded.optimizer == 0 < memory(experiment, eight).optimizer
    dense = load_experiment("b3", ["control=dense"])
    assert memory(dense, eight).pool == memory(dense, eight).keys == traffic(dense, eight).tokens.total == 0
