"""Precision: what "auto" becomes, that it is decided once and by rank 0, and that explicit values win."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling import ModelConfig
from tests.distributed import run_ranks
from tests.launch import FP32, REPOSITORY, launch, losses, records, succeed
from tests.trainer.test_engine import make_trainer
from trainer import precision
from trainer.checkpoint import read_state
from trainer.precision import Precision, best_precision, bf16_speedup, choose_precision

AUTO = str(REPOSITORY / "ds_configs" / "zero2.json")
TINY = [
    "data.name=stories", "data.train_documents=120", "data.val_documents=12", "data.tokenizer_documents=null",
    "model.vocab_size=300", "model.d_model=32", "model.num_layers=2", "model.num_heads=2", "model.max_seq_len=48",
    "model.some.num_experts=8", "model.some.d_ffn=32", "model.some.top_k=2", "train.batch_size=8", "train.steps=12",
    "sample.tokens=0", "log.tensorboard=false",
]  # fmt: skip


@pytest.fixture
def gpus(monkeypatch):
    """Pretend GPUs of this compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capability))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == 0 else 1 / 0)

    return pretend


@pytest.mark.parametrize(
    ("speedup", "name", "says"),
    [
        (3.94, "bf16", "its products are 3.9x as fast as those of fp32 on this CPU"),
        (1.5, "bf16", "its products are 1.5x as fast"),
        (1.4, "fp32", "products of bf16 are only 1.4x as fast on this CPU, and 1.5x is needed"),
        (0.02, "fp32", "products of bf16 take 50.0x as long on this CPU"),
    ],
)
def test_a_cpu_gets_bf16_where_it_is_faster(monkeypatch, gpus, speedup, name, says):
    gpus()
    monkeypatch.setattr(precision, "bf16_speedup", lambda width, hidden: speedup)
    found = best_precision(512, 1024, 0)
    assert found.name == name and says in found.reason
    assert Precision.parse(str(found)) == found


@pytest.mark.parametrize(
    ("capability", "name", "says"),
    [
        ((9, 0), "bf16", "the GPU has compute capability 9.0"),
        ((8, 0), "bf16", "8.0"),
        ((7, 5), "fp32", "capability 7.5, and bf16 needs 8.0"),
    ],
)
def test_a_gpu_gets_bf16_where_it_has_it(monkeypatch, gpus, capability, name, says):
    gpus(*capability)
    monkeypatch.setattr(precision, "bf16_speedup", lambda *sizes: pytest.fail("a CPU was probed"))
    for local_rank in (0, 5):  # more ranks than GPUs are refused later, in words of its own
        found = best_precision(512, 1024, local_rank)
        assert found.name == name and says in found.reason


def test_the_probe_is_the_ratio_of_medians(monkeypatch):
    """fp32 takes 3 and bf16 2 in the median; a warm-up and two busy moments of either count for nothing."""
    fp32, bf16 = [900, 3, 3, 70, 3, 70], [900, 2, 80, 2, 80, 2]
    ticks = itertools.chain.from_iterable((0, seconds) for pair in zip(fp32, bf16, strict=True) for seconds in pair)
    # The warm-up reads the clock once for each product, before it.
    clock = itertools.chain([0, 0], itertools.islice(ticks, 4, None))
    monkeypatch.setattr(precision.time, "perf_counter", lambda: next(clock))
    threads = torch.get_num_threads()
    assert bf16_speedup(32, 64) == 1.5
    assert next(clock, None) is None and torch.get_num_threads() == threads


def test_the_real_probe_finds_what_this_machine_is_better_at():
    assert 1e-3 < bf16_speedup(128, 256) < 1e3


def test_only_an_open_choice_is_made_and_what_began_stays(monkeypatch):
    def choose(asked: str, began: str | None = None) -> Precision:
        return choose_precision(asked, "my.json", began, ModelConfig(), 0)

    for best, other in (("bf16", "fp32"), ("fp32", "bf16")):
        monkeypatch.setattr(precision, "best_precision", lambda *_, best=best: Precision(best, "probed"))
        assert choose("auto") == Precision(best, "probed")
        assert choose("auto", began=other).name == other == choose(other).name
        assert choose(best, began=other).name == best, "which resuming refuses"
    # fp32 is the best here.
    assert choose("auto", began="bf16").reason == "as the run began; slow here: probed"
    assert choose("bf16").reason == "bf16.enabled = true in my.json; slow here: probed"
    monkeypatch.setattr(precision, "best_precision", lambda *_: pytest.fail("nobody needs to know"))
    assert choose("fp32") == Precision("fp32", "bf16.enabled = false in my.json")
    assert choose("auto", began="fp32") == Precision("fp32", "as the run began")


def _resolved(rank: int, folder: str) -> dict[str, list]:
    """What DeepSpeed itself has made of every shipped JSON, where either precision suits the machine."""
    seen = {}
    for name, best in itertools.product(("zero1", "zero2", "zero2_offload", "zero2_fp32"), ("bf16", "fp32")):
        config = str(REPOSITORY / "ds_configs" / f"{name}.json")
        trainer = make_trainer(rank, f"{folder}/{name}_{best}", ds_config=config, best=best)
        engine, model = trainer.engine._engine, trainer.engine.model
        dtypes = {str(p.dtype) for p in model.parameters()} | {str(layer.pool.weights.dtype) for layer in model.some_layers}
        seen[f"{name} {best}"] = [engine.bfloat16_enabled(), engine.fp16_enabled(), sorted(dtypes), trainer.state.precision]
    return seen


def test_deepspeed_gets_what_was_decided(tmp_path):
    seen, _ = run_ranks(_resolved, 2, str(tmp_path))
    bf16, fp32 = [True, False, ["torch.bfloat16"], "bf16"], [False, False, ["torch.float32"], "fp32"]
    for case, found in seen.items():
        assert found == (bf16 if case.endswith(" bf16") and "fp32 " not in case else fp32), case


def tiny(cache_dir: Path, ds_config: str = AUTO) -> list[str]:
    return ["--ds_config", ds_config] + [
        part for setting in [*TINY, f"data.cache_dir={cache_dir}"] for part in ("--set", setting)
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, cache_dir) -> dict[str, Path]:
    """The same run where either precision suits the machine."""
    folders = {}
    for name in ("bf16", "fp32"):
        folders[name] = tmp_path_factory.mktemp("unbroken") / name
        printed = succeed(*tiny(cache_dir), "--output_dir", str(folders[name]), best=(name,))
        assert printed.splitlines()[0] == f"precision {name}: pretended"
    return folders


def test_the_choice_is_recorded(unbroken):
    for name, folder in unbroken.items():
        how = yaml.safe_load((folder / "config.yaml").read_text())["run"]
        assert (how["precision"], how["precision_reason"]) == (name, "pretended")
        assert how["ds_config"]["bf16"] == {"enabled": name == "bf16"}
        assert records(folder, "start")[0]["precision"] == name
        assert read_state(folder / "checkpoints" / "step_00000012").precision == name
    assert losses(unbroken["bf16"]) != losses(unbroken["fp32"])
    assert losses(unbroken["bf16"]) == pytest.approx(losses(unbroken["fp32"]), rel=2e-2)


@pytest.mark.parametrize(("began", "moved_to"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_run_keeps_its_precision_on_another_machine(unbroken, tmp_path, cache_dir, began, moved_to):
    arguments = [*tiny(cache_dir), "--output_dir", str(tmp_path / "run")]
    succeed(*arguments, "--max_steps", "5", best=(began,))
    # An explicit value is refused by name, whatever suits the machine.
    explicit = tmp_path / "explicit.json"
    explicit.write_text(json.dumps(json.loads(Path(AUTO).read_text()) | {"bf16": {"enabled": moved_to == "bf16"}}))
    refused = launch(*tiny(cache_dir, str(explicit)), "--output_dir", str(tmp_path / "run"), best=(moved_to,))
    assert refused.returncode == 2
    assert f"precision = {moved_to} but the checkpoint" in refused.stderr and f"has {began}; use the --ds" in refused.stderr
    printed = succeed(*arguments, best=(moved_to,))
    slow = "; slow here: pretended" if began == "bf16" else ""
    assert printed.splitlines()[0] == f"precision {began}: as the run began{slow}"
    assert losses(tmp_path / "run") == losses(unbroken[began])
    step = "checkpoints/step_00000012/core.safetensors"
    theirs = load_file(unbroken[began] / step)
    assert all(tensor.equal(theirs[name]) for name, tensor in load_file(tmp_path / "run" / step).items())


def test_a_run_that_died_before_its_first_checkpoint_keeps_it_too(tmp_path, cache_dir):
    """And a run of its own in the folder, or --resume never, chooses again."""
    arguments = [*tiny(cache_dir), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    killed = launch(*arguments, "--set", "faults.kill=step=1 stage=begin", best=("fp32",))
    assert killed.returncode != 0 and not list((tmp_path / "run").glob("checkpoints/step_*"))
    assert succeed(*arguments, best=("bf16",)).startswith("precision fp32: as the run began")
    assert succeed(*arguments, "--resume", "never", best=("bf16",)).startswith("precision bf16: pretended")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]


@pytest.mark.parametrize(("best", "decided"), [(("bf16", "fp32"), "bf16"), (("fp32", "bf16"), "fp32")])
def test_rank_0_decides_for_ranks_that_would_decide_differently(unbroken, tmp_path, cache_dir, best, decided):
    printed = succeed(*tiny(cache_dir), "--output_dir", str(tmp_path / "run"), ranks=2, best=best)
    assert printed.startswith(f"precision {decided}: pretended")
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken[decided]), rel=2e-4 if decided == "fp32" else 1e-2)


def test_a_bf16_run_has_one_curve_and_resumes_on_other_ranks(unbroken, tmp_path, cache_dir):
    """What summation order costs in bf16; on the same ranks a restart is bitwise."""
    run, best = ["--output_dir", str(tmp_path / "run")], ("bf16", "bf16")
    succeed(*tiny(cache_dir), *run, "--set", "parallel.ep_size=2", "--max_steps", "6", ranks=2, best=best)
    succeed(*tiny(cache_dir), *run, best=("bf16",))
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken["bf16"]), rel=1e-2)


def test_an_explicit_fp32_is_what_auto_becomes(unbroken, tmp_path, cache_dir):
    """Bitwise: nothing else in the two files changes a number."""
    succeed(*tiny(cache_dir, FP32), "--output_dir", str(tmp_path / "run"), best=("bf16",))
    assert losses(tmp_path / "run") == losses(unbroken["fp32"])
