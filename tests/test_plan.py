"""The planner's command line: what it recommends and why, what it refuses, and what it writes."""

import contextlib
import io
import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml

from tests.distributed import run_ranks
from tests.launch import FP32, succeed, wait_for
from tools import calibrate, plan, scaling
from tools.options import Cluster, all_options
from tools.peak_memory import PeakMemory
from trainer.cluster import read_machine
from trainer.config import load_experiment
from trainer.launch import Launch
from trainer.layout import Layout
from trainer.plan import GIB, Sharding
from trainer.usage import Usage

H100 = read_machine("h100x8", plan.MACHINES)


def call(*arguments: str) -> int:
    """The tool's exit code."""
    with pytest.raises(SystemExit) as ended:
        plan.main(list(arguments))
    return ended.value.code


def planned(tmp_path, *arguments: str, code: int = 0) -> dict:
    """The JSON of a plan."""
    path = tmp_path / "plan.json"
    assert call(*arguments, "--json", str(path)) == code
    return json.loads(path.read_text())


def machine_file(tmp_path, **changes) -> str:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump({**asdict(H100), **changes}))
    return str(path)


def ep_size(option: dict) -> int:
    return option["deployment"]["layout"]["ep_size"]


def test_the_file_is_there_even_if_nobody_reads_what_is_printed(tmp_path, monkeypatch):
    def closed(*_) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(plan, "report", closed)
    path = tmp_path / "plan.json"
    with pytest.raises(BrokenPipeError):
        plan.main(["b3", "--json", str(path)])
    assert json.loads(path.read_text())["options"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b4"], "--experiment b4: unknown; did you mean"),
        (["b3", "--machine", "h100"], "--machine h100: unknown; did you mean h100x8?"),
        (["b3", "--machine", "nowhere.yaml"], "--machine nowhere.yaml: cannot be read"),
        (["b3", "--nodes", "0"], "--nodes 0: must be at least 1"),
        (["b3", "--ranks_per_node", "-2"], "--ranks_per_node -2: must be at least 1"),
        (["b3", "--ranks_per_node", "16"], "--ranks_per_node 16: h100x8 has 8 a node"),
        (["b3", "--ranks_per_node", "3"], "train.batch_size = 32 does not divide over 3 ranks"),
        (["b3", "--row_tokens", "0"], "--row_tokens 0: must be at least 1"),
        (["b3", "--row_tokens", "900"], "rows have at most model.max_seq_len = 768 tokens"),
        (["b3", "--set", "parallel.ep_size=3"], "parallel.ep_size = 3 does not divide the 8 ranks"),
        (["b3", "--set", "model.some.experts=3"], "model.some.experts: unknown key"),
        (["b3", "--bandwidth", "wire=3"], "--bandwidth wire=3: write it as in_node=GB/S"),
        (["b3", "--bandwidth", "in_node=0"], "--bandwidth in_node=0: must be a number greater than 0"),
        (["b3", "--bandwidth", "in_node=fast"], "--bandwidth in_node=fast: must be a number"),
        (["b3", "--usage", "zipf:x"], "--usage zipf:x: write it as zipf:0.6"),
        (["b3", "--usage", "no/such/run"], "--usage no/such/run: no such run"),
        (["b3", "--plot", "picture.jpg"], "--plot picture.jpg: must end in .png or .svg"),
        (["b3", "--plot", "no/such/picture.png"], "--plot no/such/picture.png: cannot be written (No such file"),
        (["b3", "--json", "no/such/plan.json"], "--json no/such/plan.json: cannot be written (No such file"),
        (["b3", "--calibrate", "machine.json"], "--calibrate machine.json: must be a .yaml file"),
        (["b3", "--calibrate", "no/such/m.yaml"], "--calibrate no/such/m.yaml: cannot be written (No such file"),
        (["b3", "--calibrate", "m.yaml", "--nodes", "2"], "--nodes 2: --calibrate measures the ranks that it runs on"),
        (["b3", "--calibrate", "m.yaml", "--json", "p.json"], "--json p.json: --calibrate measures the ranks"),
        (["b3", "--calibrate", "m.yaml", "--usage", "zipf:0"], "leave it out here and give it with --machine m.yaml"),
        (["b3", "--calibrate", "m.yaml", "--bandwidth", "in_node=0"], "--bandwidth in_node=0: must be a number"),
        (["cmp-dense-tinystories", "--calibrate", "machine.yaml"], "has no SoME layers to measure"),
    ],
)
def test_refused_in_one_line(arguments, message, capsys):
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(memory_gigs=3), "unknown key memory_gigs; did you mean memory_gib?"),
        (dict(memory_gib="much"), "memory_gib = 'much' is str; expected a number"),
        (dict(memory_gib=-1), "memory_gib = -1 must be greater than 0"),
        (dict(share_by_rows={"few": 0.1}), "share_by_rows = 'few': 0.1; expected a number of rows"),
    ],
)
def test_a_wrong_machine_file_is_refused(change, message, tmp_path, capsys):
    assert call("b3", "--machine", machine_file(tmp_path, **change)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_figure_is_named(tmp_path, capsys):
    values = asdict(H100)
    del values["memory_gb_s"]
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(values))
    assert call("b3", "--machine", str(tmp_path / "m.yaml")) == 2
    assert "memory_gb_s is missing" in capsys.readouterr().err


def test_matplotlib_may_be_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "find_spec", lambda name: None)
    assert call("b3", "--plot", str(tmp_path / "p.png")) == 2
    assert "needs matplotlib, which is not installed; pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "bf16_tflops", "names"),
    [
        ([], 300.0, "bf16 (auto: assumed from the machine's rates)"),
        ([], 75.0, "fp32 (auto: assumed from the machine's rates)"),
        (["--ds_config", FP32], 300.0, "fp32"),
    ],
)
def test_a_plan_names_the_precision_that_it_assumes(arguments, bf16_tflops, names, tmp_path, capsys):
    machine = machine_file(tmp_path, bf16_tflops=bf16_tflops, fp32_tflops=60.0)
    assert call("a4", "--machine", machine, "--json", str(tmp_path / "plan.json"), *arguments) == 0
    assert f"a4: 701,496,320 parameters, {names}, batches of" in capsys.readouterr().out
    cluster = json.loads((tmp_path / "plan.json").read_text())["cluster"]
    assert cluster["assumes_precision"] == ("auto" in names) and cluster["sharding"]["bf16"] == names.startswith("bf16")


def test_ep_1_is_best_where_the_pool_fits_and_links_are_slow(tmp_path, capsys):
    found = planned(tmp_path, "a4", "--bandwidth", "in_node=1", "--set", "train.batch_size=512")
    assert ep_size(found["options"][0]) == 1
    assert "so no token has to travel; the next EP size takes +" in capsys.readouterr().out
    assert found["options"][0]["traffic"]["tokens"]["in_node"] == 0


def test_ep_where_the_pool_does_not_fit(tmp_path, capsys):
    found = planned(tmp_path, "b3", "--machine", machine_file(tmp_path, memory_gib=12.0, bf16_tflops=1e6))
    sizes = {ep_size(option) for option in found["options"] if option["fits"]}
    assert 1 not in sizes and ep_size(found["options"][0]) in sizes
    printed = capsys.readouterr().out
    assert "EP 1 does not fit" in printed and "does not fit into 8.0 GiB" in printed


def test_ep_where_experts_would_starve(tmp_path, capsys):
    """Fast links and slow memory: reading every weight for a few rows costs more than moving the rows."""
    file = machine_file(tmp_path, memory_gb_s=300.0, in_node_us=0.0, expert_us=0.0)
    assert ep_size(planned(tmp_path, "b3", "--machine", file)["options"][0]) > 1
    assert "fewer rows, which costs more than the exchange" in capsys.readouterr().out


def test_nothing_fits(tmp_path, capsys):
    found = planned(tmp_path, "b3", "--machine", machine_file(tmp_path, memory_gib=4.5), code=1)
    assert not any(option["fits"] for option in found["options"])
    sizes = [option["memory_bytes"] for option in found["options"]]
    assert sizes == sorted(sizes), "the one that lacks least comes first"
    printed = capsys.readouterr().out
    assert f"nothing fits: the smallest needs {sizes[0] / GIB:.1f} GiB a rank of 0.5 usable" in printed


def test_options_are_complete_ordered_and_can_be_run(tmp_path):
    found = planned(tmp_path, "b3", "--nodes", "2", "--usage", "zipf:1.2")
    options = found["options"]
    assert {ep_size(option) for option in options} == {1, 2, 4, 8, 16}
    assert {option["deployment"]["layout"]["micro_batch"] for option in options} == {1, 2}
    fitting = [option["seconds"] for option in options if option["fits"]]
    assert fitting[1:] == sorted(fitting[1:]) and fitting[0] <= 1.01 * min(fitting)
    for option in options:
        assert option["memory_bytes"] == sum(option["memory"].values())
        assert option["seconds"] == pytest.approx(sum(option["time"].values()))
    skewed = {(ep_size(o), o["placement"], o["deployment"]["replicas"]): o["deployment"]["imbalance"] for o in options}
    assert skewed[16, "contiguous", 0] > skewed[16, "balanced", 0] > skewed[16, "balanced", 16] >= 1


@pytest.mark.parametrize("own", [[], ["placement=balanced"], ["placement=balanced", "replicas=8"]], ids=str)
def test_the_settings_give_what_was_planned_beside_those_of_the_user(tmp_path, own):
    own = [f"parallel.{setting}" for setting in own]
    found = planned(tmp_path, "b3", "--usage", "zipf:1.2", *(part for setting in own for part in ("--set", setting)))
    for option in [found["as_it_stands"], *found["options"]]:
        how = load_experiment("b3", [*own, *option["settings"]])
        assert (how.parallel.ep_size, how.train.max_micro_batch) == (
            ep_size(option),
            option["deployment"]["layout"]["micro_batch"],
        )
        assert (how.parallel.placement, how.parallel.replicas) == (option["placement"], option["deployment"]["replicas"])
        Layout.of(how, Launch(0, 8, 0, 8))


def test_no_more_replicas_are_tried_than_ranks_can_hold():
    model = ["model.some.num_experts=2", "model.some.top_k=1", "model.num_layers=1"]
    experiment, cluster = load_experiment("quickstart", model), Cluster(H100, 1, 2, Sharding())
    usage = Usage(np.array([[0.8, 0.2]]), is_measured=True)
    options = all_options(experiment, cluster, usage)
    families = {option.family for option in options}
    assert families == {(1, "contiguous", 0), (2, "contiguous", 0), (2, "balanced", 0), (2, "balanced", 2)}
    for option in options:
        Layout.of(load_experiment("quickstart", [*model, *option.settings(experiment.parallel)]), Launch(0, 2, 0, 2))


def test_what_the_experiment_fixes_stays(tmp_path):
    found = planned(tmp_path, "b3", "--set", "parallel.ep_size=4")
    assert {ep_size(option) for option in found["options"]} == {4}


def test_usage_of_a_run(tmp_path, capsys):
    """Usage is read from the last checkpoint, and refused where it belongs to another model."""
    run = tmp_path / "run"
    small = [
        "model.num_layers=1",
        "model.d_model=16",
        "model.num_heads=2",
        "model.vocab_size=300",
        "model.some.num_experts=8",
    ]
    settings = [f"--set={setting}" for setting in [*small, "train.batch_size=8", "data.train_documents=60",
                "data.val_documents=5", "sample.tokens=0", f"data.cache_dir={tmp_path}/cache"]]  # fmt: skip
    succeed("--output_dir", str(run), "--max_steps", "1", *settings)
    shape = [part for setting in [*small, "train.batch_size=8"] for part in ("--set", setting)]
    even, used = (planned(tmp_path, "quickstart", *shape, "--usage", usage) for usage in ("zipf:0", str(run)))
    worst = [max(option["deployment"]["imbalance"] for option in found["options"]) for found in (even, used)]
    assert worst[0] == pytest.approx(1) and worst[1] > 1.05
    assert call("quickstart", "--usage", str(run)) == 2
    assert "holds 1 layers of 8 experts, the plan is for 4 of 16" in capsys.readouterr().err


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "scaling.svg"
    assert call("quickstart", "--plot", str(picture), "--usage", "zipf:0") == 0
    assert "<svg" in picture.read_text()[:2000]


def test_curves_reach_1024_ranks_and_65536_experts():
    experiment, cluster = load_experiment("quickstart"), Cluster(H100, 1, 8, Sharding())
    ranks = scaling.over_ranks(experiment, cluster, "zipf:0.6")
    assert [at for at, _ in ranks["EP 1"]] == [2**power for power in range(11)]
    for at, option in ranks["EP in a node"]:
        assert option.deployment.ranks == at and option.deployment.layout.ep_size == min(at, 8)
        assert option.deployment.layout.micro_batch * option.deployment.layout.accumulation == 4, "rows of a rank stay"
    experts = scaling.over_experts(experiment, replace(cluster, ranks_per_node=4), "some/run")
    assert [at for at, _ in experts["EP 1"]] == [2**power for power in range(6, 17)]
    assert not experts["EP 1"][-1][1].fits, "65,536 squared pairs of four layers are 64 GiB"


def _calibrate(rank: int, path: str) -> tuple[str, float, bool, str]:
    """What is printed, what the process grew by in GiB, and the numerics, of the ranks that `run_ranks` has joined."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    calibrate.init_process_group, calibrate.dist.destroy_process_group = lambda *_: None, lambda: None
    grown, compare = [], calibrate.compare
    calibrate.compare = lambda planned, measured: grown.append(measured.memory / GIB) or compare(planned, measured)
    # Half of the pool is 64 MiB, less than what measuring the machine takes before.
    small = ["num_layers=2", "d_model=64", "num_heads=2", "vocab_size=300", "max_seq_len=64", "some.num_experts=512",
             "some.d_ffn=512"]  # fmt: skip
    settings = [
        "train.batch_size=4",
        "train.max_micro_batch=1",
        "control=permuted_experts",
        *(f"model.{setting}" for setting in small),
    ]
    arguments = ["quickstart", "--calibrate", path, *(part for setting in settings for part in ("--set", setting))]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert plan.plan(plan.parse_arguments(arguments)) == 0
    numerics = torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()
    return printed.getvalue(), max(grown, default=0.0), *numerics


def test_calibrate_measures_a_machine_that_can_be_planned_with(tmp_path):
    measured = tmp_path / "this.yaml"
    (printed, grown, *numerics), other = run_ranks(_calibrate, 2, str(measured), seconds=240)
    assert "step: predicted" in printed and "memory: predicted" in printed and not other[0]
    assert numerics == [True, "highest"], "as the trainer computes"
    assert 1 / 16 < grown < 1
    machine = read_machine(str(measured), plan.MACHINES)
    assert machine.device in ("cpu", "cuda") and machine.ranks_per_node == 2 and machine.in_node_gb_s != H100.in_node_gb_s
    assert call("quickstart", "--machine", str(measured)) == 0


def test_memory_at_the_peak_is_counted_from_where_it_stood():
    def held(mebibytes: int) -> torch.Tensor:
        return torch.ones(mebibytes * 2**18)

    held(256)  # a higher peak, over before it counts
    with PeakMemory(torch.device("cpu")) as memory:
        block = held(64)
        wait_for(lambda: memory.growth >= 2**26)
        del block
    assert 64 <= memory.growth / 2**20 < 80
