"""What TensorBoard reads back from a run's board, with its own readers, and that its size is bounded."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams.metadata import PLUGIN_NAME as HPARAMS
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from tensorboard.plugins.projector.projector_plugin import ProjectorPlugin
from tensorboard.plugins.text.text_plugin import text_array_to_html
from tensorboard.util import tensor_util
from werkzeug.test import Client
from werkzeug.wrappers import Response

from modeling.some import KeyRules, KeyStore
from trainer.board import BINS, Board
from trainer.config import Experiment, SampleConfig
from trainer.metrics import RunLog

D, K = 6, 2


def make_stores(layers: int, experts: int) -> list[KeyStore]:
    stores = [KeyStore(experts, D, K, KeyRules(), seed=1, layer=layer) for layer in range(layers)]
    for layer, store in enumerate(stores):
        store.usage.copy_(torch.rand(experts, generator=torch.Generator().manual_seed(layer)))
        store.keys.mul_(1 + torch.arange(experts)[:, None] / experts)
    return stores


def write_run(folder, total, eval_every=1, layers=2, experts=8, experiment=None, resumed_step=0, numbers=None):
    """The log of a whole run from a step on, as the trainer writes it."""
    board = Board(folder / "tensorboard", experiment or Experiment(), total, resumed_step)
    log, stores = RunLog(folder, resumed_step, board), make_stores(layers, experts)
    for step in range(resumed_step, total + 1):
        if step > resumed_step:
            loss = 9 / step if numbers is None else numbers[step]
            log.write("train", step=step, epoch=step / 10, loss=loss, lr=0.1, grad_norm=1.0, tokens=50 * step,
                      tokens_per_second=5.0, seconds=0.1, skipped=0)  # fmt: skip
        if step % eval_every == 0:
            records = [{"layer": n, "gini": n / 10, "effective_experts": 4.0, "names": [1, 2]} for n in range(layers)]
            log.write("eval", step=step, val_loss=2.0, val_ppl=7.4, seconds=0.5, layers=records)
            log.show_stores(step, stores)
    log.write("end", step=total, finished=True)
    log.close()
    return stores


def read(folder) -> EventAccumulator:
    everything = {name: 0 for name in ("scalars", "histograms", "tensors")}
    return EventAccumulator(str(folder / "tensorboard"), size_guidance=everything).Reload()


def num_bytes(folder, pattern="*") -> int:
    return sum(path.stat().st_size for path in (folder / "tensorboard").glob(pattern))


def test_curves_stand_in_groups_and_do_not_grow_with_layers(tmp_path):
    tags = []
    for layers in (2, 9):
        folder = tmp_path / str(layers)
        write_run(folder, total=3, layers=layers)
        board = read(folder)
        tags.append(sorted(board.Tags()["scalars"]))
        assert [event.value for event in board.Scalars("loss/train")] == pytest.approx([9, 4.5, 3])
        assert [event.step for event in board.Scalars("loss/validation")] == [0, 1, 2, 3]
        assert board.Scalars("routing/gini/max")[0].value == pytest.approx((layers - 1) / 10)
        assert board.Scalars("routing/gini/mean")[0].value == pytest.approx((layers - 1) / 20)
    assert tags[0] == tags[1]
    assert {tag.split("/")[0] for tag in tags[0]} == {"loss", "optimizer", "speed", "progress", "routing"}


def test_histograms_are_those_of_usage_and_key_norms(tmp_path):
    stores = write_run(tmp_path, total=2, layers=2, experts=40)
    board = read(tmp_path)
    assert sorted(board.Tags()["histograms"]) == [f"{name}/layer_0{n}" for name in ("key_norm", "usage") for n in (0, 1)]
    for layer, store in enumerate(stores):
        for name, values_E in (
            ("key_norm", store.keys.norm(dim=-1)),
            ("usage", store.usage / store.usage.mean()),
        ):
            events = board.Histograms(f"{name}/layer_0{layer}")
            assert [event.step for event in events] == [0, 1, 2]
            found = events[-1].histogram_value
            assert (found.min, found.max) == pytest.approx((values_E.min().item(), values_E.max().item()), rel=1e-5)
            assert sum(found.bucket) == 40 and len(found.bucket) <= BINS + 1
            # What lies at or below a limit, give or take the value on it.
            middle = len(found.bucket) // 2
            below = sum(value <= found.bucket_limit[middle] for value in values_E.tolist())
            assert abs(sum(found.bucket[: middle + 1]) - below) <= 1


def test_the_projector_serves_the_newest_keys_with_their_labels(tmp_path):
    stores = write_run(tmp_path, total=2, layers=2, experts=5)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "tensorboard"))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path / "tensorboard"))
    plugin = ProjectorPlugin(base_plugin.TBContext(logdir=str(tmp_path / "tensorboard"), data_provider=provider))
    apps = plugin.get_plugin_apps()

    def get(page: str, **arguments) -> bytes:
        response = Client(_with_context(apps[page]), Response).get("/", query_string={"run": ".", **arguments})
        assert response.status_code == 200, response.get_data(as_text=True)
        return response.get_data()

    config = json.loads(get("/info"))
    assert [each["tensorName"] for each in config["embeddings"]] == ["keys_layer_00", "keys_layer_01"]
    for layer, store in enumerate(stores):
        name = f"keys_layer_{layer:02}"
        served = torch.frombuffer(bytearray(get("/tensor", name=name)), dtype=torch.float32).view(5, D)
        assert torch.equal(served, store.keys)
        head, *rows = [line.split("\t") for line in get("/metadata", name=name).decode().splitlines()]
        assert head[0] == "expert" and [row[0] for row in rows] == list("01234")
        assert [float(row[1]) for row in rows] == pytest.approx((store.usage / store.usage.mean()).tolist(), abs=6e-4)
        others = [(F.cosine_similarity(store.keys[0], store.keys[e], dim=0).item(), e) for e in range(1, 5)]
        assert [int(part.split()[0]) for part in rows[0][3].split(", ")] == [e for _, e in sorted(others, reverse=True)][:3]


def _with_context(app):
    """As TensorBoard's own server calls it."""

    def call(environ, start_response):
        context.set_in_environ(environ, context.RequestContext())
        return app(environ, start_response)

    return call


def test_settings_are_text_and_hyperparameters(tmp_path):
    prompt = "<script>alert(1)</script> </code></pre> ``` [a](javascript:b) \x1b[2J é\nNew: line"
    experiment = replace(Experiment(), seed=7, sample=SampleConfig(prompt=prompt))
    write_run(tmp_path, total=1, experiment=experiment)
    board = read(tmp_path)
    (event,) = board.Tensors("config/text_summary")
    text = tensor_util.make_ndarray(event.tensor_proto)
    html = text_array_to_html(text, enable_markdown=True)
    assert "<script" not in html and "<a " not in html and "\x1b" not in html
    assert html.count("<pre>") == 1 and "seed: 7" in html and "&lt;script&gt;alert(1)" in html
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert board.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == HPARAMS
    values = parse_session_start_info_plugin_data(content).hparams
    assert values["seed"].number_value == 7 and values["model.some.top_k"].number_value == experiment.model.some.top_k
    assert values["data.name"].string_value == "stories"
    assert not [key for key in values if key.startswith(("sample.", "log.", "parallel."))], "these change no curve"
    assert board.SummaryMetadata("_hparams_/session_end_info").plugin_data.plugin_name == HPARAMS, "the run is finished"


def test_a_resumed_run_shows_each_step_once(tmp_path):
    write_run(tmp_path, total=6)
    write_run(tmp_path, total=6, resumed_step=3, numbers={4: 40.0, 5: 50.0, 6: 60.0})
    events = read(tmp_path).Scalars("loss/train")
    assert [(event.step, event.value) for event in events] == [(1, 9), (2, 4.5), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_keys_that_are_not_finite_end_no_run(tmp_path):
    stores = make_stores(1, 8)
    stores[0].keys[0] = math.nan
    board = Board(tmp_path, Experiment(), 1, 0)
    board.show_stores(0, stores)
    board.close()
    found = EventAccumulator(str(tmp_path)).Reload().Histograms("key_norm/layer_00")[0].histogram_value
    assert found.num == 7


def test_size_is_bounded(tmp_path):
    """Neither 16 times as many experts nor 4 times as many steps and evaluations beyond the limits make it larger."""
    sizes, limits = {}, {"MOST_STEPS": 100, "MOST_EVALUATIONS": 20, "MOST_HISTOGRAMS": 10}
    for name, steps, experts in (("base", 400, 16), ("experts", 400, 256), ("steps", 1600, 16)):
        with pytest.MonkeyPatch.context() as patch:
            for limit, value in limits.items():
                patch.setattr(f"trainer.board.{limit}", value)
            write_run(tmp_path / name, total=steps, eval_every=10, experts=experts)
        sizes[name] = num_bytes(tmp_path / name, "events*")
        board = read(tmp_path / name)
        shown = (board.Scalars("loss/train"), board.Scalars("loss/validation"), board.Histograms("usage/layer_01"))
        for events, most in zip(shown, limits.values(), strict=True):
            assert most <= len(events) <= most + 1 and events[-1].step == steps
        # Only the newest keys lie there: fp32, and labels of less than a hundred characters.
        assert num_bytes(tmp_path / name, "keys*") < 2 * experts * (4 * D + 100) + 200
    assert sizes["steps"] <= 1.05 * sizes["base"] and sizes["experts"] <= 1.3 * sizes["base"]
