"""Bad flags, experiments, overrides, DeepSpeed files, folders and environments: one line with key or file, value and cure,
exit code 2, and nothing left behind."""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.refusals import TINY, Bad, call, check_refused, make_tree, program, sets
from trainer.config import load_experiment

RANKS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
STAGE2 = {"zero_optimization": {"stage": 2}}
SHARED = ["&a0 [x, x, x]", *(f"&a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(9))]

EXPERIMENTS = {
    "unknown_key": ("trian: {steps: 3}", ["trian: unknown key", "did you mean train?"]),
    "not_yaml": ("train: [1\n", ["not_yaml.yaml", "is not valid YAML (line 2:", "mend the file"]),
    "list": ("- 1\n", ["list.yaml", "holds list, not keys and values"]),
    "nothing": ("", ["nothing.yaml", "holds NoneType"]),
    "python": ("name: !!python/object/apply:os.mkdir [made]", ["python.yaml", "line 1", "os.mkdir", "mend the file"]),
    "twice": ("train: {steps: 3}\nseed: 1\ntrain: {epochs: 3}", ["twice.yaml", "line 3: train stands twice"]),
    "deep": ("seed: " + "[" * 100_000, ["deep.yaml", "more than 50 open brackets"]),
    "shared": (
        f"train: {{steps: [{', '.join(SHARED)}]}}",
        ["train.steps = [['x', 'x', 'x']", "is list; expected int or null"],
    ),
    "circle": ("train: &t {steps: *t}", ["train.steps = {'steps': {'steps': ", "...", "is dict; expected int"]),
    "date": ("seed: 2024-13-45", ["seed = '2024-13-45' is str; expected int"]),
    "yes": ("log: {tensorboard: yes}", ["log.tensorboard = 'yes' is str; expected bool, which is written true or false"]),
    "underscore": ("train: {steps: 1_000}", ["train.steps = '1_000' is str; expected int or null; write 1000"]),
    "sexagesimal": ("train: {steps: 1:30}", ["train.steps = '1:30' is str; expected int"]),
    "half": ('sample:\n  prompt: "\\ud83d!"', ["half.yaml", "line 2: prompt: '\\ud83d!' holds half a surrogate pair"]),
    "same_key": ("model: {vocab_size: 300}\n3: 1\n03: 2", ["same_key.yaml", "line 3: 03 stands twice"]),
    "digits": (f"seed: {'9' * 5000}", ["digits.yaml", "is not valid YAML", "5000 digits"]),
    "hexadecimal": (f"seed: 0x{'f' * 5000}", ["seed is a whole number of 20000 bits; numbers here have 63 at most"]),
    "latin1": ("name: caf\xe9".encode("latin-1"), ["latin1.yaml", "is not text in UTF-8 (byte 9 (0xe9))", "iconv"]),
    "utf16": ("name: tiny".encode("utf-16"), ["utf16.yaml", "is not text in UTF-8 (byte 0 (0xff))"]),
    "large": ("#" * 2**21, ["large.yaml", "over 1,048,576 bytes"]),
    "name_up": ("name: ../../made", ["name = '../../made' cannot name a folder; write up to 100 letters"]),
    "name_long": (f"name: {'a' * 300}", ["name = 'aaaa", "cannot name a folder"]),
    "name_escape": ('name: "a\\e[31mb"', ["name = 'a\\x1b[31mb' cannot name a folder"]),
    "base_itself": ("base: ./base_itself.yaml", ["base = './base_itself.yaml'", "is built on this file"]),
    "base_circle": ("base: below/back.yaml", ["base =", "below/back.yaml", "no YAML file beside or below"]),
    "base_unknown": ("base: quikstart", ["base = 'quikstart'", "did you mean quickstart?"]),
    "below/outside": ("base: ../secret.yaml", ["base = '../secret.yaml'", "files from elsewhere must be copied there"]),
    "base_absolute": ("base: /etc/x.yaml", ["base = '/etc/x.yaml'", "beside or below the one that names it"]),
    "base_linked": ("base: link.yaml", ["base = 'link.yaml'", "beside or below the one that names it"]),
    "base_missing": ("base: gone.yaml", ["gone.yaml: cannot be read (No such file or directory)"]),
    "base_number": ("base: 3", ["base = 3", "is no experiment"]),
}

OVERRIDES = {
    "train.steps": ["--set train.steps: write it as key=value, for example --set train.batch_size=64"],
    "=5": ["--set =5: write it as key=value"],
    "train..steps=5": ["--set train..steps=5: write it as key=value"],
    "train=5": ["train = 5: expected keys and values"],
    "name.first=5": ["name = {'first': 5} is dict; expected str"],
    "train.steps=[5": ["--set train.steps=[5: the value is not valid YAML", "quote it"],
    "name=!!python/name:os.system": ["--set name=!!python/name:os.system: the value is not valid YAML"],
    "train.lerning_rate=1": ["train.lerning_rate: unknown key; did you mean learning_rate?"],
    "train.batch_size=many": ["train.batch_size = 'many' is str; expected int"],
    "train.steps=1e3": ["train.steps = 1000.0 is float; expected int or null; write 1000"],
    "train.learning_rate=1_0e-4": ["train.learning_rate = '1_0e-4' is str; expected float; write 10e-4"],
    'train.learning_rate="nan"': ["train.learning_rate = 'nan' is str; expected float"],
    "log.tensorboard=off": ["log.tensorboard = 'off' is str; expected bool, which is written true or false"],
    "name=010": ["name = 10 is int; expected str; put it in quotes"],
    'sample.prompt="\\ud83d"': ["--set sample.prompt=", "holds half a surrogate pair", "; write the character itself"],
    'sample.prompt="\\ude00\\ud83d"': ["--set sample.prompt=", "holds half a surrogate pair"],
    "train.batch_size=-4": ["train.batch_size = -4 must be a number greater than 0"],
    f"train.batch_size={10**30}": ["train.batch_size is a whole number of 100 bits; numbers here have 63 at most"],
    "train.learning_rate=.nan": ["train.learning_rate = nan must be a finite number"],
    "train.weight_decay=.inf": ["train.weight_decay = inf must be a finite number"],
    "sample.temperature=.nan": ["sample.temperature = nan must be a finite number"],
    "sample.temperature=1e-40": ["sample.temperature = 1e-40 must be at least 1e-30, or 0 for the likeliest token"],
    f"sample.prompt={'a' * 60_000}": ["sample.prompt has 60,000 characters; write at most 50,000"],
    "train.epochs=1e308": ["train.epochs = 1e+308 must be at most 1,000,000"],
    "parallel.timeout_minutes=1e300": ["parallel.timeout_minutes = 1e+300 must be at most 525,600"],
    "model.d_model=1000000000000": ["model.d_model = 1000000000000", "GiB to draw", "lower it"],
    "model.d_ffn=4096": ["model.d_ffn = 4096 has no effect", "leave it out (the width of an expert is model.some.d_ffn)"],
    "model.some.num_experts=1000000000000": ["model.some.num_experts = 1000000000000", "GiB a rank", "lower them"],
    "model.some.router_mult=1e15": ["need ", "GiB a rank for weights", "lower them"],
    "model.vocab_size=1000000000000": ["model.vocab_size = 1000000000000", "GiB a rank"],
    "control=attenion_only": ["control = 'attenion_only' is unknown; choose one of: attention_only"],
    "train.learning_rate=\x1b[31m": ["--set train.learning_rate=\\x1b[31m", "quote it"],
    "parallel.ep_size=3": ["parallel.ep_size = 3 does not divide the 1 ranks; sizes that do: 1, or auto"],
}

DEEPSPEED = {
    "not_json": ("{", ["not_json.json: is not JSON", "mend the file"]),
    "deep": ("[" * 100_000, ["deep.json: is not JSON (maximum recursion depth exceeded"]),
    "digits": (f'{{"train_batch_size": {"9" * 5000}}}', ["digits.json: is not JSON", "5000 digits"]),
    "half": ('{"bf16": {"enabled": "\\ud83d"}}', ["half.json: is not JSON ('enabled': '\\ud83d' holds half a"]),
    "twice": ('{"zero_optimization": {"stage": 2, "stage": 1}}', ["twice.json", "stage stands twice"]),
    "unknown": ({**STAGE2, "zero_optimisation": {}}, ["unknown key zero_optimisation; did you mean zero_optimization?"]),
    "stage3": ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "runs under stage 1 or 2"]),
    "stage_true": ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = True"]),
    "fp16": ({**STAGE2, "fp16": {"enabled": True}}, ["fp16.enabled = True; use bf16, or fp32"]),
    "fp16_open": ({**STAGE2, "fp16": {"loss_scale": 0}}, ["fp16.enabled = None; use bf16, or fp32"]),
    "bf16_typo": ({**STAGE2, "bf16": {"enable": True}}, ["unknown key bf16.enable; did you mean enabled?"]),
    "bf16_open": ({**STAGE2, "bf16": {"check_grad_overflow": "auto"}}, ['bf16.enabled = None; write true, false or "auto"']),
    "bf16_text": ({**STAGE2, "bf16": {"enabled": "false"}}, ["bf16.enabled = 'false'; write true, false or"]),
    "bf16_key": ({**STAGE2, "bf16": {"enabled": True, "chek": 1}}, ["bf16_key.json: unknown key bf16.chek"]),
    "bf16_master": (
        {**STAGE2, "bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
        ["bf16.bf16_master_weights_and_grads = True; the core's weights are kept in fp32", "write false or remove it"],
    ),
    "nvme": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
        ["zero_optimization.offload_optimizer.device = 'nvme'; write cpu"],
    ),
    "offload_param": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        ["zero_optimization.offload_param needs stage 3; remove it"],
    ),
    "zero_typo": (
        {"zero_optimization": {"stage": 2, "overlap_com": True}},
        ["zero_typo.json: unknown key zero_optimization.overlap_com; did you mean overlap_comm?"],
    ),
    "cpu_offload": (
        {"zero_optimization": {"stage": 2, "cpu_offload": True}, "data_types": {"grad_accum_dtype": "fp32"}},
        ["zero_optimization.cpu_offload is an old spelling", '"offload_optimizer": {"device": "cpu"}'],
    ),
    "stage3_key": (
        {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 9}},
        ["zero_optimization.stage3_max_live_parameters needs stage 3; remove it"],
    ),
    "bucket_null": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": None}},
        ["zero_optimization.reduce_bucket_size = None; write a whole number from 1"],
    ),
    "bucket_inf": (
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1e400}}',
        ["zero_optimization.reduce_bucket_size = inf; write a whole number from 1"],
    ),
    "bucket_large": (
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**15}},
        ["zero_optimization.reduce_bucket_size = 1000000000000000 takes", 'lower it, or write "auto"'],
    ),
    "bucket_odd": (
        {"zero_optimization": {"stage": 2, "allgather_bucket_size": 999}},
        ["zero_optimization.allgather_bucket_size = 999; write an even number from 2"],
    ),
    "grad_norm": (
        {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
        ["zero_optimization.compute_grad_norm = False; every step is clipped by its norm", "write true or remove it"],
    ),
    "prescale": ({**STAGE2, "prescale_gradients": True}, ["prescale_gradients = True; gradients are summed", "remove it"]),
    "print_0": ({**STAGE2, "steps_per_print": 0}, ["steps_per_print = 0; write null or a whole number from 1"]),
    "profile_folder": (
        {**STAGE2, "flops_profiler": {"enabled": True, "output_file": "cache"}},
        ["flops_profiler.output_file = 'cache' cannot be written (is a folder); give another"],
    ),
    "profile_closed": (
        {**STAGE2, "flops_profiler": {"enabled": True, "output_file": "readonly/profile.txt"}},
        ["flops_profiler.output_file = 'readonly/profile.txt' cannot be written (no permission for readonly)"],
    ),
    "monitor": ({**STAGE2, "tensorboard": {"enabled": True}}, ["tensorboard would record the run a second time"]),
    "batch": ({**STAGE2, "train_batch_size": 64}, ["train_batch_size = 64 contradicts 4 from train.batch_size on 1 ranks"]),
    "lr": ({**STAGE2, "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["lr = 1.0 contradicts 0.0006"]),
    "accumulate": (
        {**STAGE2, "data_types": {"grad_accum_dtype": "fp7"}},
        ["data_types.grad_accum_dtype = 'fp7'", "fp32, bf16"],
    ),
    "communicate": ({**STAGE2, "communication_data_type": "fp8"}, ["communication_data_type = 'fp8'; one of: fp32, bf16"]),
    "communicate_fp16": ({**STAGE2, "communication_data_type": "fp16"}, ["communication_data_type = 'fp16'; one of: fp32"]),
    "communicate_2": ({**STAGE2, "communication_data_type": 2}, ["communication_data_type = 2; one of: fp32, bf16"]),
    "predivide": ({**STAGE2, "gradient_predivide_factor": "x"}, ["gradient_predivide_factor = 'x'; gradients are summed"]),
    "flops_profiler": ({**STAGE2, "flops_profiler": 3}, ["flops_profiler.json: flops_profiler = 3; expected a JSON object"]),
    "print": ({**STAGE2, "steps_per_print": "often"}, ["steps_per_print = 'often'; write null or a whole number from 1"]),
}

BAD = {
    "flag": Bad(["--max_step", "3"], ["unrecognized arguments: --max_step 3; did you mean --max_steps? see --help"]),
    "flag value": Bad(["--max_steps", "many"], ["argument --max_steps: invalid int value: 'many'; see --help"]),
    "flag underscore": Bad(["--max_steps", "1_0"], ["argument --max_steps: invalid int value: '1_0'; see --help"]),
    "no steps": Bad(["--max_steps", "0"], ["--max_steps 0: must be at least 1"]),
    "unset variable": Bad(["--output_dir", ""], ["argument --output_dir: is empty; see --help"]),
    "experiment": Bad(["--experiment", "quikstart"], ["--experiment quikstart: unknown; did you mean quickstart?"]),
    "experiment path": Bad(["--experiment", "published/runs"], ["--experiment published/runs: unknown", "path also works"]),
    "experiment escape": Bad(["--experiment", "\x1b]0;x\x07"], ["--experiment \\x1b]0;x\\x07: unknown"]),
    "experiment missing": Bad(["--experiment", "none.yaml"], ["--experiment none.yaml: cannot be read (No such file"]),
    "experiment folder": Bad(["--experiment", "folder.yaml"], ["--experiment folder.yaml: is a folder, not a file"]),
    "experiment pipe": Bad(["--experiment", "pipe.yaml"], ["--experiment pipe.yaml: is a named pipe, not a file"]),
    "experiment closed": Bad(
        ["--experiment", "closed.yaml"], ["--experiment closed.yaml: cannot be read (Permission denied)"]
    ),
    "ds missing": Bad(["--ds_config", "none.json"], ["error: --ds_config none.json: cannot be read (No such file"]),
    "ds device": Bad(["--ds_config", "/dev/zero"], ["--ds_config /dev/zero: is a device, not a file"]),
    "output file": Bad(
        ["--output_dir", "tiny.yaml"], ["--output_dir tiny.yaml: cannot be used", "is a file", "choose another"]
    ),
    "output in file": Bad(["--output_dir", "tiny.yaml/run"], ["--output_dir tiny.yaml/run: cannot be", "choose another"]),
    "output read-only": Bad(["--output_dir", "readonly/run"], ["--output_dir readonly/run: cannot be written", "readonly"]),
    "output occupied": Bad(["--output_dir", "occupied"], ["occupied/metrics.jsonl is a folder", "choose another"]),
    "output circle": Bad(["--output_dir", "circle/run"], ["--output_dir circle/run: cannot be", "symbolic links"]),
    "output long": Bad(["--output_dir", "a" * 300], ["--output_dir aaa", "File name too long", "choose another"]),
    "resume": Bad(["--resume", "folder.yaml"], ["--resume folder.yaml: holds no checkpoint; give a run's folder"]),
    "cache file": Bad(
        sets("data.cache_dir=tiny.yaml"), ["data.cache_dir='tiny.yaml' cannot be used", "to a writable folder"]
    ),
    "cache read-only": Bad(sets("data.cache_dir=readonly/c"), ["data.cache_dir='readonly/c' cannot be used", "Permission"]),
    "output bucket": Bad(
        ["--output_dir", "s3://bucket/run"],
        ["--output_dir s3://bucket/run: is an address (s3), not a local path; mount that storage"],
    ),
    "output one slash": Bad(["--output_dir=hdfs:/user/run"], ["--output_dir hdfs:/user/run: is an address (hdfs)"]),
    "output file address": Bad(
        ["--output_dir", "file:///data/run"],
        ["file:///data/run: is an address (file)", "write the path alone, /data/run"],
    ),
    "resume bucket": Bad(["--resume", "gs://bucket/run"], ["--resume gs://bucket/run: is an address (gs)"]),
    "ds address": Bad(["--ds_config", "https://x.org/d.json"], ["--ds_config https://x.org/d.json: is an address (https)"]),
    "experiment address": Bad(["--experiment", "HTTP://x.org/a.yaml"], ["--experiment HTTP://x.org/a.yaml: is an address"]),
    "cache bucket": Bad(sets("data.cache_dir=s3://b/c"), ["data.cache_dir = s3://b/c: is an address (s3)"]),
    "data bucket": Bad(sets("data.path=gs://b/c"), ["data.path = gs://b/c: is an address (gs)"]),
    "tokenizer address": Bad(sets("data.tokenizer_from=hf://a/b"), ["data.tokenizer_from = hf://a/b: is an address (hf)"]),
    "cache variable": Bad([], ["SOME_CACHE_DIR = s3://b/c: is an address (s3)"], {"SOME_CACHE_DIR": "s3://b/c"}),
    "output of nobody": Bad(
        ["--output_dir=~nobody_at_all/x"], ["--output_dir ~nobody_at_all/x: there is no user nobody_at_all; write the whole"]
    ),
    "data of nobody": Bad(sets("data.path=~nobody_at_all/x"), ["data.path = ~nobody_at_all/x: there is no user"]),
    "experiment of nobody": Bad(["--experiment", "~nobody_at_all/x.yaml"], ["--experiment ~nobody_at_all/x.yaml: there is"]),
    "RANK alone": Bad([], ["environment: WORLD_SIZE, LOCAL_RANK not set; start with"], {"RANK": "0"}),
    "WORLD_SIZE alone": Bad([], ["environment: RANK, LOCAL_RANK not set; start with"], {"WORLD_SIZE": "2"}),
    "RANK text": Bad([], ["environment: RANK = 'zero' is no number"], {**RANKS, "RANK": "zero"}),
    "RANK large": Bad([], ["environment: LOCAL_RANK = 2 of 2 ranks"], {**RANKS, "LOCAL_RANK": "2"}),
    "no ranks": Bad([], ["environment: RANK = 0 of 0 ranks"], {**RANKS, "WORLD_SIZE": "0"}),
    "port": Bad(
        [], ["environment: MASTER_PORT = 'http' is no number between 0 and 65535"], {**RANKS, "MASTER_PORT": "http"}
    ),
    "no rendezvous": Bad(
        [], ["environment: MASTER_ADDR or MASTER_PORT not set"], {k: v for k, v in RANKS.items() if k != "MASTER_ADDR"}
    ),
    "three ranks": Bad(
        [], ["train.batch_size = 4 does not divide over 3 ranks; nearest that do: 3, 6"], {**RANKS, "WORLD_SIZE": "3"}
    ),
    "ep size": Bad(
        sets("parallel.ep_size=3"),
        ["parallel.ep_size = 3 does not divide the 4 ranks; sizes that do: 1, 2, 4"],
        {**RANKS, "WORLD_SIZE": "4"},
    ),
    **{f"experiment {n}": Bad(["--experiment", f"{n}.yaml"], says) for n, (_, says) in EXPERIMENTS.items()},
    **{f"override {o[:30]}": Bad(sets(o), says) for o, says in OVERRIDES.items()},
    **{f"ds {n}": Bad(["--ds_config", f"{n}.json"], says) for n, (_, says) in DEEPSPEED.items()},
}


@pytest.fixture(scope="module")
def box(tmp_path_factory) -> Path:
    """A user's working folder with everything that the cases name."""
    box = make_tree(tmp_path_factory.mktemp("settings") / "box", {"tiny.yaml": yaml.safe_dump(TINY)})
    make_tree(box, {f"{name}.yaml": text for name, (text, _) in EXPERIMENTS.items()})
    make_tree(box, {f"{n}.json": v if isinstance(v, str) else json.dumps(v) for n, (v, _) in DEEPSPEED.items()})
    make_tree(
        box, {"below/back.yaml": "base: ../base_circle.yaml", "secret.yaml": "seed: 1", "occupied/metrics.jsonl/x": ""}
    )
    make_tree(box, {"closed.yaml": "seed: 1", "folder.yaml/x": ""})
    (box / "closed.yaml").chmod(0)
    (box / "cache").mkdir()
    (box / "readonly").mkdir(mode=0o555)
    (box / "circle").symlink_to("circle")
    (box / "link.yaml").symlink_to("/etc/hostname")
    os.mkfifo(box / "pipe.yaml")
    return box


SAMPLE = list(BAD)[::10]


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.quick) if name in SAMPLE else name for name in BAD])
def test_refused_in_one_line(name, box):
    check_refused(BAD[name], box)


def test_a_program_of_its_own_says_the_same(box):
    """What the children say is what users see."""
    arguments = ["--experiment", str(box / "twice.yaml")]
    ours = call(*arguments, folder=box)
    assert ours.code == 2 and ours == program(*arguments, folder=box)


def test_files_beside_and_below_are_a_base(tmp_path):
    make_tree(tmp_path, {"mine.yaml": "base: parts/middle.yaml\nseed: 3", "parts/middle.yaml": "base: deeper/end.yaml"})
    make_tree(tmp_path, {"parts/deeper/end.yaml": "base: a4\nname: end\nseed: 2"})
    experiment = load_experiment(str(tmp_path / "mine.yaml"))
    assert (experiment.name, experiment.seed, experiment.model.num_layers) == ("mine", 3, 10)
