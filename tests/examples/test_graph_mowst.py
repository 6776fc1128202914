"""The graph example: its layers against torch-geometric's, its formulas against brute force, its comparison on a made graph."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from equipoise import cli, metrics
from equipoise.artifacts import Profile
from equipoise.errors import EquipoiseError

torch = pytest.importorskip("torch")
pytest.importorskip("torch_geometric", reason="the graph example needs torch-geometric (examples/graph_mowst/requirements.txt)")

HERE = Path(__file__).parents[2] / "examples" / "graph_mowst"
sys.path.insert(0, str(HERE))

import run  # noqa: E402
from mowst import cells, graphs, page, predictions, routing, training  # noqa: E402
from mowst.experts import Expert, GcnLayer, SageLayer, dropped  # noqa: E402
from mowst.gating import Gate, GivenConfidence, dispersion  # noqa: E402
from mowst.mixture import Mowst, MowstStar  # noqa: E402
from torch_geometric.nn import GCNConv, SAGEConv  # noqa: E402

QUICK = training.Recipe(lr=0.03, dropout=0.2, hidden=16, epochs=60, patience=20, rounds=3, round_patience=1)


def made(nodes=1000):
    """The planted graph, in both forms, and which nodes tell their class by their features."""
    data, telling = graphs.planted(nodes)
    return graphs.build("made", data, graphs.random_splits(nodes, 3), "accuracy"), data, telling


@pytest.fixture(scope="module")
def graph():
    return made()[0]


@pytest.fixture(scope="module")
def mixture(graph):
    """A Mowst whose experts and gate were trained on the made graph."""
    torch.manual_seed(0)
    strong = Expert("gcn", graph, 16, 0.2)
    training.fit(strong, graph, graph.splits[0], QUICK)
    model = Mowst(Expert("mlp", graph, 16, 0.2), Gate(), strong)
    return model, training.fit_in_turns(model, graph, graph.splits[0], QUICK)


@pytest.mark.parametrize("kind", ["gcn", "sage"])
def test_layers_equal_torch_geometrics(kind):
    graph, data, _ = made(60)
    torch.manual_seed(1)
    if kind == "gcn":
        mine, theirs = GcnLayer(16, 5), GCNConv(16, 5)
        theirs.load_state_dict({"bias": mine.bias, "lin.weight": mine.weight.T})
    else:
        mine, theirs = SageLayer(16, 5), SAGEConv(16, 5)
        theirs.load_state_dict(
            {"lin_l.weight": mine.neighbour.T, "lin_l.bias": mine.own.bias, "lin_r.weight": mine.own.weight.T}
        )
    ours, reference = mine(graph.features, graph), theirs(data.x, data.edge_index)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)
    (ours**2).sum().backward()
    (reference**2).sum().backward()
    if kind == "gcn":
        torch.testing.assert_close(mine.weight.grad.T, theirs.lin.weight.grad, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(mine.neighbour.grad.T, theirs.lin_l.weight.grad, rtol=1e-4, atol=1e-4)


def test_dispersion_is_0_for_uniform_and_1_for_one_class_and_gives_no_gradient():
    logits = torch.tensor([[0.0, 0.0, 0.0], [100.0, 0.0, 0.0]], requires_grad=True)
    found = dispersion(logits)
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0], [1.0, 1.0]]), atol=1e-6, rtol=0)
    assert not found.requires_grad
    p = torch.tensor([0.7, 0.2, 0.1])
    variance = ((p - 1 / 3) ** 2).mean() / (((torch.tensor([1.0, 0, 0]) - 1 / 3) ** 2).mean())
    entropy = 1 + float((p * p.log()).sum()) / math.log(3)
    torch.testing.assert_close(dispersion(p.log()[None])[0], torch.tensor([float(variance), entropy]))


def test_dropout_keeps_the_expected_value():
    torch.manual_seed(0)
    found = dropped(torch.full((400, 100), 3.0), 0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert float(found.mean()) == pytest.approx(3.0, abs=0.05)


def test_expected_scores_equal_the_mean_over_all_draws():
    """Three nodes, two experts: all eight draws by hand."""
    torch.manual_seed(0)
    labels, rows = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 2])
    weak, strong = (torch.randn(4, 2).log_softmax(1) for _ in range(2))
    confidence = torch.tensor([0.3, 0.8, 0.5, 0.9])
    both = [predictions.Prediction(weak, confidence), predictions.Prediction(strong, 1 - confidence)]
    expected = {"accuracy": 0.0, "auc": 0.0}
    for draw in itertools.product([0, 1], repeat=3):
        chance = math.prod(float(c if d else 1 - c) for c, d in zip(confidence, draw, strict=False))
        drawn = torch.where(torch.tensor([*draw, 0])[:, None] == 1, weak, strong)
        expected["accuracy"] += chance * float((drawn.argmax(1) == labels)[rows].float().mean())
        margin = (drawn[:, 1] - drawn[:, 0])[rows]
        expected["auc"] += chance * float((margin[1:] > margin[0]).float().mean())
    for metric, value in expected.items():
        assert predictions.score(both, labels, rows, metric) == pytest.approx(value, abs=1e-6)
    losses = [torch.nn.functional.nll_loss(log, labels, reduction="none") for log in (weak, strong)]
    by_hand = (confidence * losses[0] + (1 - confidence) * losses[1])[rows].mean()
    torch.testing.assert_close(predictions.loss(both, labels, rows), by_hand)


def test_auc_counts_ties_half():
    assert predictions.auc(np.array([1.0, 1.0, 2.0]), np.array([True, False, True]), np.ones(3)) == pytest.approx(0.75)


def test_star_mixes_probabilities(graph):
    torch.manual_seed(0)
    star = MowstStar(Expert("mlp", graph, 8, 0.0), Gate(), Expert("gcn", graph, 8, 0.0)).eval()
    parts = star.parts(graph)
    (mixed,) = star.combine(parts)
    c = parts.confidence_N[:, None]
    torch.testing.assert_close(mixed.log_probabilities_NC.exp(), c * parts.weak_NC.exp() + (1 - c) * parts.strong_NC.exp())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_gate_leaves_one_expert_alone(graph, value):
    """With C = 1 the strong expert gets no gradient and answers nothing; with C = 0 the weak one."""
    torch.manual_seed(0)
    weak, strong = Expert("mlp", graph, 16, 0.0), Expert("gcn", graph, 16, 0.0)
    model = Mowst(weak, GivenConfidence(torch.full((graph.nodes,), value)), strong).train()
    predictions.loss(model.combine(model.parts(graph)), graph.labels_N, graph.splits[0].train).backward()
    idle, busy = (strong, weak) if value else (weak, strong)
    assert all(not p.grad.any() for p in idle.parameters())
    assert any(p.grad.any() for p in busy.parameters())
    model.eval()
    nodes = graph.splits[0].test
    alone = predictions.score(predictions.plain(busy(graph)), graph.labels_N, nodes, "accuracy")
    assert predictions.score(model.combine(model.parts(graph)), graph.labels_N, nodes, "accuracy") == pytest.approx(alone)


def test_the_gate_tells_nodes_apart(graph, mixture):
    """On the made graph the weak expert is the one for nodes that tell their class themselves; shuffled, the gain is gone."""
    model, best = mixture
    telling = made()[2]
    nodes = graph.splits[0].test
    with torch.no_grad():
        parts = model.parts(graph)
    confidence = parts.confidence_N
    assert confidence[nodes][telling[nodes]].mean() > confidence[nodes][~telling[nodes]].mean() + 0.1
    others = cells._other_confidences(parts, nodes, seed=0)
    instead = {
        how: predictions.score(model.combine(parts.with_confidence(c)), graph.labels_N, nodes, "accuracy")
        for how, c in others.items()
    }
    learned = predictions.score(model.combine(parts), graph.labels_N, nodes, "accuracy")
    assert learned > max(instead["weak"], instead["strong"], instead["shuffled"], instead["mean"]) + 0.02
    validation = training.judge(model.combine(parts), graph, graph.splits[0].validation)
    assert validation == pytest.approx(best, abs=1e-6), "experts and gate stand at what was judged best"


def test_training_without_gain_leaves_modules_as_they_were(graph):
    torch.manual_seed(0)
    model = Expert("mlp", graph, 8, 0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    perfect = (2.0, 0.0)
    found = training.improve([model], lambda: predictions.plain(model(graph)), graph, graph.splits[0], QUICK, perfect)
    assert found == perfect
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_routing_becomes_a_profile_that_inspect_reads(graph, mixture, tmp_path, monkeypatch, capsys):
    model, _ = mixture
    with torch.no_grad():
        parts = model.parts(graph)
    nodes = graph.splits[0].test
    profile = routing.record("mowst-gcn", model, parts, graph, nodes, seed=0)
    profile.save(tmp_path / "m.profile.safetensors")
    read = Profile.load_file(tmp_path / "m.profile.safetensors")
    weak = np.random.default_rng(0).random(len(nodes)) < parts.confidence_N[nodes].double().numpy()
    assert read.load.tolist() == [[weak.sum(), (~weak).sum()]]
    of_class_1 = graph.labels_N[nodes].numpy() == 1
    assert read.scenario_load[1].tolist() == [[(weak & of_class_1).sum(), (~weak & of_class_1).sum()]]
    found = routing.balance(read)
    assert found["lis"] == pytest.approx(2 * max(weak.sum(), (~weak).sum()) / len(nodes))
    assert found["lis"] == pytest.approx(metrics.lis(read.load, read.widths)[0])
    monkeypatch.setattr(sys, "argv", ["equipoise", "inspect", str(tmp_path / "m.profile.safetensors"), "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)
    star = MowstStar(model.weak, model.gate, model.strong)
    soft = routing.record("mowst-star-gcn", star, parts, graph, nodes, seed=0)
    assert soft.load.tolist() == [[len(nodes)] * 2]
    assert routing.balance(soft)["weak_share"] == pytest.approx(float(parts.confidence_N[nodes].mean()), abs=1e-6)


def test_cells_are_kept_and_made_again_only_for_another_recipe(graph, tmp_path):
    recipe = training.Recipe(lr=0.03, dropout=0.2, hidden=8, epochs=3)
    bench = cells.Bench(graph, "gcn", tmp_path)
    names = [*cells.models("gcn"), *cells.controls("gcn")]
    made_cells = {name: [bench.cell(name, recipe, split) for split in (0, 1)] for name in names}
    again = cells.Bench(graph, "gcn", tmp_path)
    file = again.file("gcn", recipe, 0)
    stamp = file.stat().st_mtime_ns
    assert again.cell("gcn", recipe, 0) == made_cells["gcn"][0]
    assert file.stat().st_mtime_ns == stamp
    resumed = cells.Bench(graph, "gcn", tmp_path / "else").cell("mowst-gcn", recipe, 0)
    assert resumed["test"] == pytest.approx(made_cells["mowst-gcn"][0]["test"]), "a run that goes on trains the same"
    assert again.known("gcn", training.Recipe(lr=0.03, dropout=0.2, hidden=8, epochs=4), 0) is None
    text = page.page({"made/gcn": {"graph": graph.facts(), "strong": "gcn", "found": made_cells}})
    for name in names:
        assert f"| {name} | {100 * np.mean([c['test'] for c in made_cells[name]]):.1f} ± " in text


def test_the_command_tunes_compares_and_goes_on(tmp_path, monkeypatch, capsys):
    def command(*words):
        given = ["--graphs", "planted", "--splits", "2", "--tuning-splits", "1", "--epochs", "2", "--hidden", "8"]
        monkeypatch.setattr(sys, "argv", ["run.py", *given, "--out", str(tmp_path), *words])
        run.main()
        return capsys.readouterr().out

    text = command()
    results = json.loads((tmp_path / "results.json").read_text())
    found = results["planted/gcn"]["found"]
    assert set(found) == {*cells.models("gcn"), *cells.controls("gcn")}
    assert text == page.page(results) + "\n"
    tried = list((tmp_path / "cells" / "planted" / "mlp").glob("*/split-0.json"))
    best = max(tried, key=lambda file: json.loads(file.read_text())["validation"])
    assert len(tried) == len(run.GRID)
    assert json.loads(best.read_text())["validation"] == found["mlp"][0]["validation"], "the recipe is chosen by validation"
    assert found["mowst-random-gcn"][0]["recipe"] == found["mowst-gcn"][0]["recipe"], "a control takes its model's recipe"
    monkeypatch.setattr(cells.Bench, "_plain", None)
    monkeypatch.setattr(cells.Bench, "_mixture", None)
    assert json.loads(command("--json")) == results, "nothing is trained twice"


def test_difference_is_the_corrected_resampled_t_test():
    mean, low, high = page.difference(np.array([0.5, 0.7, 0.6]), np.array([0.4, 0.5, 0.6]), train=480, test=200)
    assert mean == pytest.approx(0.1)
    half = 4.302653 * math.sqrt((1 / 3 + 200 / 480) * 0.01)
    assert (low, high) == pytest.approx((0.1 - half, 0.1 + half), rel=1e-5)


def test_splits_are_fixed_and_disjoint():
    first, second = graphs.random_splits(100)[3], graphs.random_splits(100)[3]
    assert first.train.tolist() == second.train.tolist()
    parts = [set(part.tolist()) for part in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [48, 32, 20]
    assert set.union(*parts) == set(range(100))


def test_a_graph_that_cannot_be_downloaded_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_):
        raise OSError("no route to host")

    monkeypatch.setattr(graphs, "download_url", offline)
    with pytest.raises(EquipoiseError, match=r"actor.*no route to host.*--data"):
        graphs.load("actor", tmp_path, tmp_path / "root")


def test_an_unknown_graph_or_expert_is_named(graph, tmp_path):
    with pytest.raises(EquipoiseError, match="cora"):
        graphs.load("pubmed", None, tmp_path)
    with pytest.raises(EquipoiseError, match="sage"):
        Expert("gat", graph, 8, 0.0)
