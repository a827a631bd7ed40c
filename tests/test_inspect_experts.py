"""Which experts tokens visit, against routing by hand with the layers' own scores on a tiny trained run."""

import json
import math
import sys
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import run_ranks
from tests.training import make_trainer, train
from tools import inspect_experts
from tools.checkpoints import find_data, load_model
from tools.expert_figures import MOST_CHANGED
from tools.inspect_experts import inspect
from trainer.checkpoint import KEYS, read_state
from trainer.config import experiment_from_dict
from trainer.data import open_data
from trainer.resume import checkpoint_at

COMMON = [
    "model.num_layers=2", "model.d_model=16", "model.num_heads=2", "model.max_seq_len=24", "model.some.num_experts=8",
    "model.some.d_ffn=8", "model.some.top_k=2", "model.some.eval_temperature=0.5", "data.train_documents=64",
    "data.val_documents=6", "data.tokenizer_documents=null", "train.batch_size=8", "train.steps=3", "train.eval_every=3",
]  # fmt: skip
KINDS = {
    "chunks": ("quickstart", ["model.vocab_size=300"]),
    # As published: words, one row a document, padding is routed and counted.
    "padded": ("v4-a4", ["data.name=stories", "model.vocab_size=300"]),
}
TEXT = "Once upon a time there was a cat. The cat ran to the old red house and slept there all day. é <b>!"
SHORT = "The cat ran."


def _train(rank: int, root: str, cache: str) -> None:
    for kind, (experiment, settings) in KINDS.items():
        trainer = make_trainer(f"{root}/{kind}", experiment, [*COMMON, *settings, f"data.cache_dir={cache}"])
        train(trainer, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache_dir):
    """A folder with one run of each kind."""
    root = tmp_path_factory.mktemp("runs")
    run_ranks(_train, 1, str(root), str(cache_dir))
    return root


class ByHand:
    """The same model and tokenizer, read directly."""

    def __init__(self, run):
        folder = checkpoint_at(run).folder
        state = read_state(folder)
        self.experiment = experiment_from_dict(state.experiment)
        self.data = open_data(find_data(self.experiment, None, state.data_fingerprint))
        self.tokenizer = self.data.tokenizer
        self.model = load_model(folder, state, self.experiment).eval()

    def ids(self, text: str) -> list[int]:
        """As `trainer/data/sequences.py` says."""
        end, ids = self.tokenizer.token_to_id("[EOS]"), self.tokenizer.encode(text).ids
        if self.experiment.data.rows == "chunks":
            return [end, *ids, end]
        return [*ids, end][: self.experiment.model.max_seq_len]

    def pieces(self, text: str) -> list[list[int]]:
        ids, S = self.ids(text), self.experiment.model.max_seq_len
        return [ids[start : start + S + 1] for start in range(0, len(ids) - 1, S)]

    @torch.no_grad()
    def visits(self, prefix: list[int]) -> list[list[tuple[int, float]]]:
        """Of each layer the experts and gates of the last token of `prefix`, which is all that the model sees."""
        queries, hooks = [], []
        for layer in self.model.some_layers:
            hooks.append(layer.query.register_forward_hook(lambda _, __, out: queries.append(out[0, -1])))
        self.model(torch.tensor([prefix]))
        for hook in hooks:
            hook.remove()
        found = []
        for layer, query_D in zip(self.model.some_layers, queries, strict=True):
            scores = [(sum(q * k for q, k in zip(query_D.tolist(), key, strict=True)), expert)
                      for expert, key in enumerate(layer.store.keys.tolist())]  # fmt: skip
            best = sorted(scores, reverse=True)[:2]
            weights = [math.exp(score / 0.5) for score, _ in best]
            found.append([(expert, w / sum(weights)) for (_, expert), w in zip(best, weights, strict=True)])
        return found

    @torch.no_grad()
    def loss(self, prefix: list[int], target: int) -> float:
        return -float(self.model(torch.tensor([prefix])).logits[0, -1].log_softmax(-1)[target])


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_stands_beside_the_experts_that_it_was_routed_to(runs, kind):
    by_hand, figures = ByHand(runs / kind), inspect(runs / kind, TEXT)
    pieces = by_hand.pieces(TEXT)
    assert len(pieces) > 1 if kind == "chunks" else len(pieces) == 1
    expected = [(row, place, ids) for row, ids in enumerate(pieces) for place in range(len(ids) - 1)]
    assert len(figures["tokens"]) == figures["num_tokens"] == len(expected)
    losses = []
    for token, (row, place, ids) in zip(figures["tokens"], expected, strict=True):
        assert (token["row"], token["position"]) == (row, place)
        shown = by_hand.tokenizer.decode([ids[place]], skip_special_tokens=False)
        assert token["token"].replace("␣", " ") == shown or "\ufffd" in shown
        visits = by_hand.visits(ids[: place + 1])
        assert token["experts"] == [[expert for expert, _ in layer] for layer in visits]
        for ours, theirs in zip(token["gates"], visits, strict=True):
            assert ours == pytest.approx([gate for _, gate in theirs], abs=1e-5)
        losses.append(by_hand.loss(ids[: place + 1], ids[place + 1]))
        assert token["loss"] == pytest.approx(losses[-1], rel=1e-4)
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert len({str(token["experts"]) for token in figures["tokens"]}) > 3, "not all tokens go the same way"


def test_layers_count_what_the_tokens_say(runs):
    figures = inspect(runs / "chunks", TEXT)
    for number, layer in enumerate(figures["layers"]):
        visitors = {e: {i for i, t in enumerate(figures["tokens"]) if e in t["experts"][number]} for e in range(8)}
        used = {expert for expert, tokens in visitors.items() if tokens}
        assert layer["experts_used"] == len(used) and {e["expert"] for e in layer["experts"]} == used
        for each in layer["experts"]:
            mine = [figures["tokens"][i]["token"] for i in sorted(visitors[each["expert"]])]
            assert each["tokens"] == len(mine) and each["token_types"] == len(set(mine))
            gates = [
                gate for token in figures["tokens"]
                for expert, gate in zip(token["experts"][number], token["gates"][number], strict=True)
                if expert == each["expert"]
            ]  # fmt: skip
            assert each["mean_gate"] == pytest.approx(sum(gates) / len(gates), rel=1e-5)
            everywhere = [token["token"] for token in figures["tokens"]]
            counts = sorted((mine.count(token) for token in set(mine)), reverse=True)
            assert [top["count"] for top in each["top_tokens"]] == counts[:8]
            for top in each["top_tokens"]:
                assert top["count"] == mine.count(top["token"])
                assert top["share_of_token"] == pytest.approx(top["count"] / everywhere.count(top["token"]))
        types = {e: {figures["tokens"][i]["token"] for i in tokens} for e, tokens in visitors.items()}
        jaccard = {
            (a, b): [len(of[a] & of[b]) / len(of[a] | of[b]) for of in (visitors, types)]
            for a in used for b in used if a < b
        }  # fmt: skip
        overlap = layer["overlap"]
        assert overlap["mean_of_tokens"] == pytest.approx(sum(v[0] for v in jaccard.values()) / len(jaccard))
        assert overlap["mean_of_types"] == pytest.approx(sum(v[1] for v in jaccard.values()) / len(jaccard))
        for pair in overlap["pairs"]:
            assert [pair["of_tokens"], pair["of_types"]] == pytest.approx(jaccard[tuple(pair["experts"])])
        shared = [pair["of_tokens"] for pair in overlap["pairs"]]
        assert shared == sorted(shared, reverse=True) and shared[0] == pytest.approx(max(v[0] for v in jaccard.values()))


def test_a_disabled_expert_adds_nothing(runs):
    """As if its output were zero, which is what the oracle makes of its weights."""
    by_hand, run = ByHand(runs / "chunks"), runs / "chunks"
    whole = inspect(run, TEXT)
    expert = whole["layers"][0]["experts"][0]["expert"]
    unused = next(iter({e for e in range(8)} - {e["expert"] for e in whole["layers"][1]["experts"]}), None)
    asked = [f"0:{expert}"] + ([f"1:{unused}"] if unused is not None else [])
    figures = inspect(run, TEXT, disable=asked)
    assert figures["tokens"] == whole["tokens"], "the trace is that of the whole model"
    pool = by_hand.model.some_layers[0].pool
    for weights in (pool.w_up_eDF, pool.b_up_eD):
        weights[expert] = 0
    before, after, moved, visits = [], [], [0, 0], []
    places = ((ids, place) for ids in by_hand.pieces(TEXT) for place in range(len(ids) - 1))
    for token, (ids, place) in zip(whole["tokens"], places, strict=True):
        before.append(token["loss"])
        after.append(by_hand.loss(ids[: place + 1], ids[place + 1]))
        visits.append(expert in token["experts"][0])
        for layer, found in enumerate(by_hand.visits(ids[: place + 1])):
            moved[layer] += {e for e, _ in found} != set(token["experts"][layer])
    change = figures["disabled"][0]
    count = len(before)
    assert (change["layer"], change["expert"], change["tokens"]) == (0, expert, sum(visits))
    assert change["loss"] == pytest.approx(sum(before) / count, rel=1e-5)
    assert change["loss_without"] == pytest.approx(sum(after) / count, rel=1e-5) != pytest.approx(change["loss"], rel=1e-6)
    assert change["routed_otherwise"] == pytest.approx([share / count for share in moved]) and moved[0] == 0
    for key, wanted in (("change_at_its_tokens", True), ("change_elsewhere", False)):
        own = [b - a for a, b, visited in zip(before, after, visits, strict=True) if visited == wanted]
        assert change[key] == pytest.approx(sum(own) / len(own), abs=1e-5)
    largest = sorted(range(count), key=lambda i: -abs(after[i] - before[i]))
    assert change["most_changed"][0]["index"] == largest[0]
    assert len(change["most_changed"]) == min(MOST_CHANGED, count)
    for each in change["most_changed"]:
        place = each["index"]
        assert each["token"] == whole["tokens"][place]["token"] and each["chose_it"] == visits[place]
        assert each["loss_without"] == pytest.approx(after[place], rel=1e-4)
    if unused is not None:
        nothing = figures["disabled"][1]
        assert nothing["tokens"] == 0 and nothing["loss"] == nothing["loss_without"] and not nothing["most_changed"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_validation_split_gives_the_loss_that_the_run_recorded(runs, kind):
    lines = (runs / kind / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line) for line in lines if '"eval"' in line][-1]
    figures = inspect(runs / kind, None, count=10**6)
    assert figures["num_tokens"] == last["val_tokens"]
    assert figures["loss"] == pytest.approx(last["val_loss"], rel=1e-5)
    for ours, theirs in zip(figures["layers"], last["layers"], strict=True):
        assert ours["experts_used"] == theirs["experts_used"]
        assert ours["effective_experts"] == pytest.approx(theirs["effective_experts"], rel=1e-6)
        assert ours["largest_gate"] == pytest.approx(theirs["largest_gate"], rel=1e-5)
    fewer = inspect(runs / kind, None, count=2)
    same = ("row", "position", "token", "next", "experts")
    first = [[token[key] for key in same] for token in figures["tokens"] if token["row"] < 2]
    assert [[token[key] for key in same] for token in fewer["tokens"]] == first


def test_the_runs_left_their_boards(runs):
    """With nothing set, the trainer writes them; the keys in the projector are those of the last evaluation."""
    folder = runs / "chunks" / "tensorboard"
    board = EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in board.Scalars("loss/train")] == [1, 2, 3]
    assert [event.step for event in board.Histograms("usage/layer_01")] == [0, 3]
    saved = load_file(checkpoint_at(runs / "chunks").folder / KEYS)
    for layer in range(2):
        shown = torch.frombuffer(bytearray((folder / f"keys_layer_0{layer}.bytes").read_bytes()), dtype=torch.float32)
        assert torch.equal(shown.view(8, 16), saved[f"{layer}/keys"])


class Page(HTMLParser):
    """The cells of each table, and which tags and attributes there are."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.tags, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["inspect_experts.py", *map(str, arguments)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    inspect_experts.main()


def test_command_line_table_json_and_page_say_the_same(runs, tmp_path, monkeypatch, capsys):
    text, source = SHORT + " <script>alert('&')</script>\x1b[2J [red] \u202e", tmp_path / "story.txt"
    source.write_text(text, encoding="utf-8")
    run = checkpoint_at(runs / "chunks").folder
    files = ["--json", tmp_path / "out.json", "--html", tmp_path / "out.html"]
    monkeypatch.setenv("COLUMNS", "300")
    call(monkeypatch, run, "--file", source, "--disable", "1:3", "--layers", 1, "--rows", 5, *files)
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert figures == inspect(run, text, disable=["1:3"])
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert not {"script", "b", "img", "link"} & {tag for tag, _ in page.tags}
    assert not [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    tokens, experts, overlap, changed = page.tables
    assert tokens[0] == ["place", "token", "loss of next", "layer 1"] and len(tokens) == 1 + 5
    for row, token in zip(tokens[1:], figures["tokens"], strict=False):
        cells = [f"{e}({g:.2f})" for e, g in zip(token["experts"][1], token["gates"][1], strict=True)]
        assert row[1:] == [token["token"], f"{token['loss']:.3f}", " ".join(cells)]
        assert " ".join(cells) in printed
    assert [row[0] for row in experts[1:]] == [str(e["expert"]) for e in figures["layers"][1]["experts"]]
    assert len(overlap) == 1 + len(figures["layers"][1]["overlap"]["pairs"])
    assert len(changed) == 1 + len(figures["disabled"][0]["most_changed"])
    assert "the first 5 are shown" in printed and "layer 0" not in printed
    assert "\x1b" not in printed and "\u202e" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " \n"], "the text is empty"),
        (["--text", "a cat", "--disable", "0:8"], "layers 0 to 1 and experts 0 to 7"),
        (["--text", "a cat", "--disable", "nought"], "give LAYER:EXPERT"),
        (["--text", "a cat", "--layers", "2"], "layers 0 to 1"),
        (["--text", "a cat", "--rows", "0"], "at least 1"),
        (["--file", "/nowhere/at/all"], "cannot be read"),
        (["--text", "a cat", "--html", "/nowhere/at/all"], "--html /nowhere/at/all: cannot be written"),
        (["--text", "a cat", "--json", "/"], "--json /: cannot be written"),
        (["--text", "a cat", "--sequences", "3"], "is for --data"),
    ],
)
def test_what_is_refused(runs, monkeypatch, capsys, arguments, message):
    """Before anything is computed."""
    monkeypatch.setattr(inspect_experts, "trace", None)
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, runs / "chunks", *arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_run_that_cannot_be_inspected_is_refused(runs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        inspect(tmp_path, SHORT)
    monkeypatch.setattr(inspect_experts, "host_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="its experts take"):
        inspect(runs / "chunks", SHORT)
