"""The benchmarks: what they measure against computes the same as we do, and every subcommand works at a tiny size."""

import json
import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modeling.some import KeyRules, KeyStore, SoMEConfig, SoMELayer
from tests.launch import FP32
from tests.oracles.keys import State, update_keys_per_token
from tools import bench, bench_training
from tools.bench_baselines import (
    DeepSpeedMoE,
    DenseFrozen,
    ExpertModules,
    HuggingFaceMoE,
    StraightforwardLayer,
    pairwise_update,
    why_not_pairwise,
)
from tools.bench_table import Table

CPU = torch.device("cpu")
CONFIG = SoMEConfig(d_model=16, num_experts=6, d_ffn=24, top_k=3, expert_bias="torch")
LAYER = "--d_model 16 --d_ffn 32 --top_k 2 --precision fp32 --repeats 2".split()
TINY = [
    "model.vocab_size=300", "model.d_model=16", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=32",
    "model.some.num_experts=8", "model.some.d_ffn=8", "train.batch_size=8", "data.train_documents=64",
    "data.val_documents=8", "data.tokenizer_documents=null",
]  # fmt: skip


# ---------------------------------------------------------------- what is measured against


@pytest.mark.parametrize("masked", [False, True])
def test_straightforward_layer_equals_ours(masked):
    ours = SoMELayer(CONFIG, layer=3, seed=5)
    theirs = StraightforwardLayer(CONFIG, layer=3, seed=5)
    theirs.query.load_state_dict(ours.query.state_dict())
    assert torch.equal(theirs.store.keys, ours.store.keys)
    x_BSD, grad_BSD = torch.randn(2, 2, 20, 16)
    mask_BS = torch.arange(20) < torch.tensor([[20], [7]]) if masked else None
    results = []
    for layer in (ours, theirs):
        x_leaf_BSD = x_BSD.clone().requires_grad_()
        y_BSD, routing = layer(x_leaf_BSD, mask_BS)
        y_BSD.backward(grad_BSD)
        gradients = [parameter.grad for parameter in layer.query.parameters()]
        results.append([y_BSD, routing.expert_ids_TK, routing.gates_TK, x_leaf_BSD.grad, *gradients])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-6)
    assert not list(theirs.pool.parameters()), "frozen experts are no parameters"


@pytest.mark.parametrize("version", ["v2.1", "v4", "v5"])
def test_pairwise_update_equals_ours_and_the_definition(version):
    """Five updates with few tokens an expert, the last ones with decay."""
    rules = KeyRules.preset(version, warmup_steps=2, delta=0.1, theta_percentile=0.4)
    ours, theirs = (KeyStore(num_experts=12, d_model=8, top_k=3, rules=rules, seed=2) for _ in range(2))
    state, generator = State.start(ours.keys), torch.Generator().manual_seed(0)
    numbers = ("alpha", "beta", "delta", "theta_percentile", "warmup_steps", "ema_decay")
    for _ in range(5):
        queries_TD = F.normalize(torch.randn(20, 8, generator=generator), dim=-1)
        scores_TK, expert_ids_TK = (queries_TD @ ours.keys.T).topk(3)
        gates_TK = scores_TK.softmax(-1)
        ours.update(queries_TD, expert_ids_TK, gates_TK)
        pairwise_update(theirs, queries_TD, expert_ids_TK, gates_TK)
        state = update_keys_per_token(
            version, state, queries_TD, expert_ids_TK, gates_TK, **{name: getattr(rules, name) for name in numbers}
        )
        for name in ("keys", "usage", "usage_mass"):
            torch.testing.assert_close(getattr(theirs, name), getattr(ours, name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(theirs.keys.double(), state.keys_ED, rtol=1e-5, atol=1e-6)
    assert state.happened["decayed"] and theirs.steps == ours.steps


def test_pairwise_update_says_which_rules_it_has():
    can = {version for version in ("v1.1", "v2.2", "v3", "v3.5", "v4", "v5", "v6", "v7", "cmp", "corrected")
           if why_not_pairwise(KeyRules.preset(version)) is None}  # fmt: skip
    assert can == {"v2.2", "v3", "v4", "v5"}


def test_dense_block_has_the_flops_of_the_experts():
    x_TD, flops = torch.randn(10, 16), []
    expert_ids_TK = torch.rand(10, 6).topk(3).indices
    experts = ExpertModules(CONFIG, layer=0, seed=0, dtype=torch.float32, device=CPU)
    dense = DenseFrozen(CONFIG, torch.float32, CPU)
    for compute in (lambda x: experts(x, torch.ones(10, 3), expert_ids_TK), dense):
        with FlopCounterMode(display=False) as counter:
            compute(x_TD.requires_grad_()).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 4 * 10 * 3 * 2 * 16 * 24


def test_deepspeed_layer_drops_nothing():
    """Its output is the gate-weighted sum of every token's top K experts, however crowded they are."""
    layer = DeepSpeedMoE(CONFIG, torch.float32, CPU)
    moe = layer.moe.deepspeed_moe
    experts = list(moe.experts.deepspeed_experts)
    for expert in experts:
        for parameter in expert.parameters():
            nn.init.normal_(parameter, std=0.2)
    x_1TD = (torch.randn(1, 30, 16) + 1).requires_grad_()  # the shift makes some experts crowded
    gates_TK, expert_ids_TK = (x_1TD[0] @ moe.gate.wg.weight.T).softmax(-1).topk(3)
    outputs_TED = torch.stack([expert(x_1TD[0]) for expert in experts], dim=1)
    chosen_TKD = outputs_TED.gather(1, expert_ids_TK[..., None].expand(-1, -1, 16))
    expected_TD = ((gates_TK / gates_TK.sum(-1, keepdim=True))[..., None] * chosen_TKD).sum(1)
    y_1TD = layer(x_1TD)
    torch.testing.assert_close(y_1TD[0], expected_TD, rtol=1e-5, atol=1e-5)
    y_1TD.sum().backward()
    assert moe.gate.wg.weight.grad.abs().sum() > 0
    assert {parameter.grad for expert in experts for parameter in expert.parameters()} == {None}


class _Block(nn.Module):
    """As transformers' block from outside: version 4 returns scores too, version 5 leaves its weights uninitialised."""

    def __init__(self, config):
        super().__init__()
        self.config, D, F_ = config, config.hidden_size, config.moe_intermediate_size
        self.gate, self.experts = nn.Linear(D, config.num_experts, bias=False), nn.Linear(D, F_, bias=False)
        nn.init.constant_(self.experts.weight, math.nan)

    def forward(self, x_BSD):
        scores_BSE = self.gate(x_BSD).softmax(-1)
        y_BSD = self.experts(x_BSD) @ self.experts.weight * scores_BSE[..., :1]
        return (y_BSD, scores_BSE) if self.config.version == 4 else y_BSD


@pytest.mark.parametrize("version", [4, 5])
def test_hugging_face_block_is_used_as_it_is_made(version, monkeypatch):
    """The library is an optional extra: a stand-in shows what our side does."""
    package = "transformers.models.qwen3_moe"
    for name in ("transformers", "transformers.models", package):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    configuration, modeling = ModuleType(f"{package}.configuration_qwen3_moe"), ModuleType(f"{package}.modeling_qwen3_moe")
    configuration.Qwen3MoeConfig = lambda **values: SimpleNamespace(version=version, **values)
    modeling.Qwen3MoeSparseMoeBlock = _Block
    monkeypatch.setitem(sys.modules, configuration.__name__, configuration)
    monkeypatch.setitem(sys.modules, modeling.__name__, modeling)

    layer = HuggingFaceMoE(replace(CONFIG, d_ffn=96), torch.float32, CPU)
    assert layer.block.config.moe_intermediate_size == 64, "three matrices of two thirds the width"
    assert layer.block.config.num_experts_per_tok == 3 and layer.block.config.norm_topk_prob
    x_1TD = torch.randn(1, 5, 16, requires_grad=True)
    layer(x_1TD).sum().backward()
    assert x_1TD.grad.isfinite().all()
    assert layer.block.experts.weight.grad is None and layer.block.gate.weight.grad is not None


# ---------------------------------------------------------------- the command line


@pytest.fixture
def numerics(monkeypatch):
    """Other numerics than the trainer's at first; what a benchmark sets stays inside."""
    deterministic, precision = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("medium")
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.set_float32_matmul_precision(precision)


def computes_as_the_trainer() -> bool:
    """Whether the numerics are those of an experiment."""
    return torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "highest"


def figures(capsys, *arguments: str) -> tuple[list[dict], list[str]]:
    """Rows and notes of one subcommand."""
    bench.main([*arguments, "--json", "-"])
    [table] = json.loads(capsys.readouterr().out)["tables"]
    assert table["name"] == arguments[0]
    return table["rows"], table["notes"]


def trainer_flags(settings: list[str]) -> list[str]:
    return ["--ds_config", FP32, *(part for setting in settings for part in ("--set", setting))]


def test_layer(numerics, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    rows, notes = figures(capsys, "layer", "--tokens", "16", "48", "--experts", "4", "8", *LAYER)
    assert len(rows) == 4 * len({row["contender"] for row in rows}) and computes_as_the_trainer()
    assert {(row["experts"], row["tokens"]) for row in rows} == {(4, 16), (4, 48), (8, 16), (8, 48)}
    names = " ".join(row["contender"] for row in rows)
    for part in ("kernel loop", "and key update", "query network and routing", "FFN alone", "straightforward", "DeepSpeed"):
        assert part in names
    for start in range(0, len(rows), len(rows) // 4):
        dense = next(row for row in rows[start:] if row["contender"] == "dense frozen FFN and query network")
        for row in rows[start : start + len(rows) // 4]:
            assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
            assert row["x_dense"] == pytest.approx(row["ms"] / dense["ms"])
    assert sum("pip install transformers" in note for note in notes) == 1 and len(notes) == 2


def test_both_kernels_where_both_exist(numerics, capsys):
    layer = SoMELayer(replace(CONFIG, d_model=32, d_ffn=32), pool_dtype=torch.bfloat16)
    if layer.pool.kernel == "loop":
        pytest.skip("this machine has one kernel")
    sizes = "--d_model 32 --d_ffn 32 --top_k 2 --repeats 1 --tokens 16 --experts 4"
    names = " ".join(row["contender"] for row in figures(capsys, "layer", *sizes.split())[0])
    assert f"kernel {layer.pool.kernel}" in names and "kernel loop" in names


def test_update(numerics, capsys):
    rows, _ = figures(capsys, "update", "--tokens", "32", "--experts", "8", *LAYER)
    layer, *updates = rows
    assert layer["of_layer"] == 1 and len(updates) == 3 and computes_as_the_trainer()
    for row in updates:
        assert row["of_layer"] == pytest.approx(row["ms"] / layer["ms"])


def test_exchange(numerics, capsys):
    """Whole and in three chunks: the same tokens travel, and more counts of copies."""
    rows, notes = figures(capsys, "exchange", "--tokens", "64", "--experts", "8", "--chunks", "1", "3", *LAYER)
    assert computes_as_the_trainer()
    one, *over_ranks = rows
    metadata = []
    for chunks, (ranks, *parts) in zip((1, 3), (over_ranks[:5], over_ranks[5:]), strict=True):
        assert {row["chunks"] for row in (ranks, *parts)} == {chunks}
        by_name = {row["contender"].strip(): row for row in parts}
        assert list(by_name) == ["metadata", "dispatch", "compute", "combine"]
        # Tokens travel once to each rank that has any of their experts, there and back: counted, and from the routing.
        for part in ("dispatch", "combine"):
            assert by_name[part]["MB"] == by_name[part]["MB_least"] > 0
        metadata.append(by_name["metadata"]["MB"])
        assert ranks["MB"] == pytest.approx(sum(row.get("MB", 0) for row in parts))
        assert ranks["x_one"] == pytest.approx(ranks["ms"] / one["ms"])
    # Two more numbers of 8 bytes from each of two ranks to the other.
    assert metadata[1] - metadata[0] == pytest.approx(2 * 2 * 8 / 1e6)
    assert all(row["ms"] > 0 for row in rows)
    agreements = [note for note in notes if "outputs agree" in note]
    assert len(agreements) == 2
    assert all(float(note.split(" to ")[1].split()[0]) < 1e-6 for note in agreements)


def test_step(numerics, capsys):
    """The same losses from both, so they are contenders for the same work."""
    rows, _ = figures(capsys, "step", "--steps", "4", "--repeats", "1", *trainer_flags(TINY))
    ours, straightforward, batches = rows
    assert straightforward["loss"] == pytest.approx(ours["loss"], rel=2e-6)
    assert straightforward["x_ours"] == pytest.approx(straightforward["ms"] / ours["ms"])
    assert ours["tokens_per_second"] > 0 and 0 < batches["ms"] < ours["ms"]


def test_startup(numerics, capsys):
    rows, _ = figures(capsys, "startup", "--repeats", "1", *trainer_flags(TINY))
    *parts, total = rows
    assert [row["part"] for row in parts] == [
        "interpreter and imports", "pool manifest and checkpoint", "import of DeepSpeed", "data", "process group",
        "deterministic kernels", "model and pool", "engine", "other", "first evaluation", "first step",
    ]  # fmt: skip
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in parts))
    assert all(row["seconds"] > 0 for row in rows)


def test_memory(numerics, capsys):
    """A pool of 64 MiB is seen where it is built, and the parts add up."""
    big = ["model.d_model=64", "model.some.d_ffn=1024", "model.some.num_experts=64", "model.some.router=linear"]
    rows, notes = figures(capsys, "memory", "--steps", "1", *trainer_flags([*TINY, *big]))
    size = {row["what"]: row["GiB"] for row in rows}
    beyond = rows[-1]
    assert size["at most"] == pytest.approx(sum(row["GiB"] for row in rows[:-2]))
    assert size["model and pool"] > 2**26 / 2**30
    assert beyond["GiB"] == pytest.approx(size["at most"] - size["process, libraries and data"])
    assert beyond["x_planned"] == pytest.approx(beyond["GiB"] / beyond["planned_GiB"])
    assert any(note.startswith("memory a rank") for note in notes)


def test_without_a_subcommand_layer_and_update_run(monkeypatch, tmp_path, capsys):
    def stand_in(arguments):
        return Table(arguments.command, {"T": arguments.tokens, "E": arguments.experts}, {"ms": ".1f"}, [{"ms": 1.0}])

    for name in ("layer", "update"):
        monkeypatch.setitem(bench.BENCHMARKS, name, replace(bench.BENCHMARKS[name], run=stand_in))
    bench.main(["--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    assert [table["name"] for table in written["tables"]] == ["layer", "update"]
    assert written["tables"][0]["conditions"] == {"T": [8192], "E": [64, 512]}
    assert written["machine"]["processor"] and written["machine"]["commit"]
    assert capsys.readouterr().out.count("\n1.0\n") == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("layer --tokens 0", "--tokens 0"),
        ("update --repeats 0", "--repeats 0"),
        ("layer --experts 2 --top_k 4", "--top_k 4"),
        ("exchange --ranks 1", "--ranks 1"),
        ("exchange --tokens 7", "--tokens 7"),
        ("exchange --experts 9", "--experts 9"),
        ("exchange --chunks 2 0", "--chunks 0"),
        ("step --steps 2", "--steps 2"),
        ("step --set model.nonsense=1", "model.nonsense"),
        ("startup --experiment nothing", "--experiment nothing"),
        ("memory --ranks 3", "train.batch_size"),
        ("memory --set data.name=text --set data.path=absent", "absent"),
        ("layer --json absent/figures.json", "--json absent/figures.json"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, named, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments.split())
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and named in err


def test_a_run_that_fails_is_named_in_one_line(numerics, capsys, monkeypatch):
    monkeypatch.setattr(bench_training, "start", lambda words, log: "out of memory")
    with pytest.raises(SystemExit) as exit_:
        bench.main(["memory", *trainer_flags(TINY)])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: the run of quickstart (ours) failed: out of memory\n"
