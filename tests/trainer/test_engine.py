"""The DeepSpeed engine and the loop on two real ranks: exact updates, skipped steps, and frozen means frozen."""

from collections import defaultdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from modeling import build_model
from modeling.some import KeyStore
from modeling.some.experts import FrozenExpertPool
from tests.distributed import run_ranks
from tests.launch import FP32, REPOSITORY, pretend_best
from tests.oracles.schedule import adamw_step
from trainer.command_line import parse_arguments
from trainer.config import load_experiment
from trainer.data import prepare_data
from trainer.distributed import expert_parallel_group
from trainer.ds_config import load_ds_config, set_precision
from trainer.engine import Engine
from trainer.job import decide
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.loop import Trainer, check_key_stores
from trainer.settings import Settings
from trainer.training import prepare_trainer

TINY = [
    "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.vocab_size=300", "model.max_seq_len=32",
    "model.some.num_experts=8", "model.some.d_ffn=24", "train.batch_size=8", "train.max_micro_batch=2",
    "train.gradient_clipping=0.3", "data.train_documents=60", "data.val_documents=5", "log.tensorboard=false",
]  # fmt: skip

CONFIGS = [("zero2_fp32", "bf16")] + [
    (name, best) for name in ("zero2", "zero1", "zero2_offload") for best in ("bf16", "fp32")
]
"""Every shipped JSON, in each precision that it can become: `best` is the one that suits the machine."""


def batch() -> torch.Tensor:
    return torch.randint(0, 300, (8, 13), generator=torch.Generator().manual_seed(0))


def _three_steps(rank: int, ds_config: str, best: str) -> tuple[dict, list[float], dict]:
    """Three steps of 2 micro batches on 2 ranks; the core afterwards."""
    experiment, launch = load_experiment("quickstart", TINY), Launch(rank, 2, rank, 2)
    layout = Layout.of(experiment, launch)
    model = build_model(experiment.model, 0, expert_parallel_group(2, timeout_minutes=2))
    engine = Engine(model, experiment.train, set_precision(load_ds_config(ds_config, experiment, layout, 2), best))
    norms = []
    for _ in range(3):
        for micro in range(2):
            ids_BS = batch()[4 * rank + 2 * micro :][:2]
            losses_T = engine.forward(ids_BS[:, :-1], targets_BS=ids_BS[:, 1:]).losses_T
            engine.backward(losses_T.sum() / (8 * 12))
            result = engine.end_micro_batch(learning_rate=0.01)
        norms.append(result.grad_norm)
        assert result.applied
    state = engine.core_state()
    assert state.steps == 3
    engine.load_core_state(state)
    again = engine.core_state()
    assert all(torch.equal(again.parameters[n], p) for n, p in state.parameters.items())
    return state.parameters, norms, {name: p.detach().float() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("name", "best"), CONFIGS)
def test_steps_equal_adamw_on_the_whole_batch(name, best):
    config = str(REPOSITORY / "ds_configs" / f"{name}.json")
    (ours, norms, shown), (theirs, *_) = run_ranks(_three_steps, 2, config, best)
    bf16 = name != "zero2_fp32" and best == "bf16"
    experiment = load_experiment("quickstart", TINY)
    model = build_model(experiment.model, 0)
    decaying = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    parameters = {n: p.detach().double() for n, p in model.named_parameters()}
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in parameters.items()}
    for step in range(3):
        for n, p in model.named_parameters():
            p.data.copy_(parameters[n])
            p.grad = None
        ids_BS = batch()
        model(ids_BS[:, :-1], targets_BS=ids_BS[:, 1:]).losses_T.mean().backward()
        gradients = {n: p.grad.double() for n, p in model.named_parameters()}
        norm = torch.sqrt(sum((g**2).sum() for g in gradients.values())).item()
        assert norms[step] == pytest.approx(norm, rel=2e-2 if bf16 else 1e-5)
        assert norm > 0.3, "the batch must be clipped, or clipping is not tested"
        scale = min(1.0, 0.3 / (norm + 1e-6))
        for n, p in parameters.items():
            new, m, v = adamw_step([p], [gradients[n] * scale], [moments[n][0]], [moments[n][1]], step + 1, lr=0.01,
                                   betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1 if n in decaying else 0.0,
                                   max_norm=None)  # fmt: skip
            parameters[n], moments[n] = new[0], (m[0], v[0])
    differences = []
    for n, p in parameters.items():
        assert torch.equal(ours[n], theirs[n]), f"{n} differs between ranks"
        assert torch.equal(shown[n], ours[n].bfloat16().float() if bf16 else ours[n]), n
        differences.append((ours[n].double() - p).abs().flatten())
    # AdamW's first steps are close to the sign of the gradient, so in bf16 a few elements near zero go the other way.
    typical, largest = torch.cat(differences).median().item(), torch.cat(differences).max().item()
    assert typical < (2e-3 if bf16 else 2e-6) and largest < (0.08 if bf16 else 2e-3)


def make_trainer(rank: int, folder: str, *settings: str, ds_config: str = FP32, best: str = "bf16") -> Trainer:
    """A trainer on this rank as the command line makes it, on a machine that `best` suits."""
    pretend_best(best)
    changes = [part for s in [*TINY, f"data.cache_dir={folder}/cache", *settings] for part in ("--set", s)]
    arguments = ["--ds_config", ds_config, "--output_dir", f"{folder}/run", *changes]
    flags = parse_arguments(arguments)
    job = decide(flags, Settings.read(flags, Launch(rank, 2, rank, 2)))
    model = job.experiment.model
    data = prepare_data(job.experiment.data, model.vocab_size, model.max_seq_len, 0) if rank == 0 else None
    box = [data]
    dist.broadcast_object_list(box)
    trainer = prepare_trainer(job, box[0], torch.device("cpu"))
    trainer.console.begin(0, stop=3)
    return trainer


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that this rank gives to collectives, by operation."""

    def __init__(self):
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            # (output, input, ...) for all-to-all and all-gather, (tensors, ...) for all-reduce: the input is what is sent.
            name = function.__name__.split(".")[0]
            sent = args[1] if name in ("alltoall_base_", "_allgather_base_", "_reduce_scatter_base_") else args[0]
            for tensor in sent if isinstance(sent, list | tuple) else [sent]:
                self.bytes[name] += tensor.numel() * tensor.element_size()
        return function(*args, **(kwargs or {}))


def _train_and_look(rank: int, folder: str) -> dict:
    trainer = make_trainer(rank, folder, "model.some.num_experts=64", "model.some.d_ffn=512", "model.d_model=32")
    pools = [layer.pool for layer in trainer.engine.model.some_layers]
    before = [pool.content_hash() for pool in pools]
    trainer._step()
    with Collectives() as counted:
        trainer._step()
    trainer._save()
    optimizer = trainer.engine._optimizer
    return {
        "frozen": before == [pool.content_hash() for pool in pools],
        "pool bytes": sum(b.numel() * b.element_size() for pool in pools for b in pool.buffers()),
        "sent": dict(counted.bytes),
        "optimized": sum(p.numel() for group in optimizer.bit16_groups for p in group),
        "shard": sum(p.numel() for p in optimizer.single_partition_of_fp32_groups),
        "trainable": trainer.experiment.model.num_parameters().trainable,
        "buffers are fp32": all(isinstance(p, FrozenExpertPool) and p.w_up_eDF.dtype == torch.float32 for p in pools),
    }


def test_frozen_means_frozen(tmp_path):
    for seen in run_ranks(_train_and_look, 2, str(tmp_path)):
        assert seen["frozen"] and seen["buffers are fp32"]
        assert seen["optimized"] == seen["trainable"]
        assert seen["shard"] == pytest.approx(seen["trainable"] / 2, rel=0.01), "the optimizer is sharded over 2 ranks"
        # Gradients in fp32 for each of 2 micro batches, one gather of parameters, the key statistics (counts, pairs,
        # attraction sums and gate mass of 2 layers), and a few scalars. Not one expert would fit into the slack.
        keys = 2 * 4 * (64 * 2 + 64 * 64 + 64 * 32 + 64)
        core = 4 * seen["trainable"] * (2 + 1)
        exchanged = seen["sent"].pop("alltoall_base_")
        one_expert = 4 * (2 * 32 * 512 + 512 + 32)
        assert sum(seen["sent"].values()) < keys + core + one_expert / 4
        assert exchanged < 8 * 32 * 2 * (4 * 32 * 4 + 3 * 4 * 2) * 2, "at most one row a token, rank and direction"
        assert seen["pool bytes"] > 10 * (exchanged + sum(seen["sent"].values()))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert size < 12 * seen["trainable"] + 2 * 4 * 64 * (32 + 2) + 50_000, "core, two moments and keys; no expert"
    names = [name for file in checkpoint.glob("*.safetensors") for name in load_file(file)]
    assert names and not any("pool" in name or "w_up" in name for name in names)


def _poison_a_step(rank: int, folder: str, ds_config: str, best: str) -> tuple[int, bool, bool, bool]:
    trainer = make_trainer(rank, folder, ds_config=ds_config, best=best)
    trainer._step()
    keys = [store.keys.clone() for store in trainer.stores]
    core = trainer.engine.core_state()
    forward = trainer.engine.forward

    def poisoned(*inputs, **keywords):
        out = forward(*inputs, **keywords)
        return type(out)(logits=None, losses_T=out.losses_T * (torch.nan if rank == 1 else 1.0), routing=out.routing)

    trainer.engine.forward = poisoned
    trainer._step()
    kept_core = all(torch.equal(p, core.parameters[n]) for n, p in trainer.engine.core_state().parameters.items())
    kept_keys = all(torch.equal(s.keys, k) and s.steps == 1 for s, k in zip(trainer.stores, keys, strict=True))
    trainer.engine.forward = forward
    trainer._step()
    moved = trainer.engine.core_state().steps == 2 and all(s.steps == 2 for s in trainer.stores)
    return trainer.state.skipped, kept_core, kept_keys, moved


@pytest.mark.parametrize(("name", "best"), CONFIGS)
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(name, best, tmp_path):
    config = str(REPOSITORY / "ds_configs" / f"{name}.json")
    assert run_ranks(_poison_a_step, 2, str(tmp_path), config, best) == [(1, True, True, True)] * 2


def _drift(rank: int) -> str:
    stores = [KeyStore(8, 4, 2, load_experiment("quickstart").model.some.rules, layer=layer) for layer in range(3)]
    check_key_stores(stores, step=4)
    if rank == 1:
        stores[2].keys[0, 0] += 1e-6
    try:
        check_key_stores(stores, step=5)
    except RuntimeError as error:
        return str(error)
    return "no difference seen"


def test_drifting_key_stores_stop_every_rank():
    for message in run_ranks(_drift, 2):
        assert message.startswith("step 5: the key stores of layers [2] differ between ranks")


def test_nothing_outside_the_engine_imports_deepspeed():
    for path in [*Path(REPOSITORY / "trainer").rglob("*.py"), *Path(REPOSITORY / "modeling").rglob("*.py")]:
        imports = [line for line in path.read_text().splitlines() if line.strip().startswith(("import deep", "from deep"))]
        assert not imports or path.name == "engine.py", path
