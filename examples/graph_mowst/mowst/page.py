"""The tables of the comparison, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Found = Mapping[str, Sequence[Mapping[str, Any]]]
OTHERS = {
    "rounded": "rounded to 0 or 1",
    "weak": "C = 1 (weak only)",
    "strong": "C = 0 (strong only)",
    "mean": "its mean for all",
    "shuffled": "other nodes'",
}
"""Confidences put in place of the learned one, as the page calls them."""

INTRODUCTION = """# Mowst on four graphs: results

Written by `python examples/graph_mowst/run.py --write`; measured, not quoted. Accuracy in percent, for minesweeper ROC AUC in
percent, of test nodes; mean ± standard deviation over the splits. Every model was tuned alike (four recipes on the first
splits, chosen by validation score). What Mowst scores is its exact expectation over the draws of the expert.
"""


DIFFERENCES = """### Paired differences over splits

Mean difference in points, 95 % interval, and on how many splits the first is better. Splits of one graph share nodes, so the
interval is that of the corrected resampled t-test (Nadeau and Bengio 2003), which is wider than an ordinary one.
"""

INSTEAD = """### Another confidence in place of the learned one

The trained experts stay as they are; only the confidence is exchanged at inference. Where `other nodes'` (the learned
confidences, shuffled among the test nodes) scores as `learned` does, the gate knows nothing of the single node.
"""

ROUTING = """### Node-to-expert routing, from the recorded Profiles

The load is test nodes: selections for Mowst (one expert a node), gate mass for Mowst-star (both experts answer every node).
LIS = 2 x the heavier expert's share; 1 is even, 2 the worst. By class: the range over classes of the mean LIS, and the
Jensen-Shannon divergence (bits) between a class's load and that of all nodes, mean over classes.
"""


def page(results: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        results: by "graph/strong expert": the graph's facts, the kind of the strong expert, the cells of every model.
    """
    parts = [INTRODUCTION, "## The graphs\n", _graphs(results)]
    for strong in dict.fromkeys(entry["strong"] for entry in results.values()):
        some = [entry for entry in results.values() if entry["strong"] == strong]
        parts += [f"## Strong expert: {strong}\n", _scores(some), DIFFERENCES, _differences(some, strong)]
        parts += [INSTEAD, _instead(some, strong), ROUTING, _routing(some, strong)]
    return "\n".join(parts)


def difference(first: Floats, second: Floats, train: int, test: int) -> tuple[float, float, float]:
    """Mean of paired differences over resampled splits, and its 95 % interval.

    The variance of the mean is (1/n + test/train) times the sample variance, because the splits' training sets overlap. Source:
    Nadeau and Bengio (2003), Inference for the Generalization Error, equation 9.

    Args:
        first: [n] scores, one a split.
        second: [n] scores on the same splits.
        train: training nodes of a split.
        test: test nodes of a split.
    """
    change = np.asarray(first) - np.asarray(second)
    mean = float(change.mean())
    if len(change) < 2:
        return mean, float("nan"), float("nan")
    error = np.sqrt((1 / len(change) + test / train) * change.var(ddof=1))
    reach = float(stats.t.ppf(0.975, len(change) - 1) * error)
    return mean, mean - reach, mean + reach


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _tests(cells: Sequence[Mapping[str, Any]]) -> Floats:
    return np.array([cell["test"] for cell in cells])


def _spread(values: Sequence[float] | Floats, scale: float = 100, digits: int = 1) -> str:
    array = scale * np.asarray(values, np.float64)
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1) if len(array) > 1 else 0:.{digits}f}"


def _graphs(results: Mapping[str, Any]) -> str:
    facts = {entry["graph"]["name"]: entry["graph"] for entry in results.values()}
    rows = [
        [
            name, f"{g['nodes']:,}", f"{g['edges']:,}", str(g["features"]), str(g["classes"]),
            f"{g['homophily']['edge']:.2f}", f"{g['homophily']['edge_insensitive']:.2f}",
            f"{g['train']:,} / {g['validation']:,} / {g['test']:,}",
        ]
        for name, g in facts.items()
    ]  # fmt: skip
    heads = ["graph", "nodes", "edges", "features", "classes", "edge homophily", "class-insensitive", "train / val. / test"]
    return _table(heads, rows)


def _scores(entries: Sequence[Mapping[str, Any]]) -> str:
    names = list(entries[0]["found"])
    rows = [[name, *(_spread(_tests(entry["found"][name])) for entry in entries)] for name in names]
    rows.append(["splits", *(str(len(entry["found"][names[0]])) for entry in entries)])
    return _table(["test score", *(entry["graph"]["name"] for entry in entries)], rows)


def _pairs(strong: str) -> list[tuple[str, str]]:
    mixtures = [f"{mixture}-{strong}" for mixture in ("mowst", "mowst-star")]
    pairs = [(mixture, other) for mixture in mixtures for other in ("mlp", strong, f"{strong}+mlp")]
    pairs += [(mixture, mixture.replace(f"-{strong}", f"-random-{strong}")) for mixture in mixtures]
    return [*pairs, (f"{strong}+mlp", strong)]


def _differences(entries: Sequence[Mapping[str, Any]], strong: str) -> str:
    rows = []
    for first, second in _pairs(strong):
        row = [f"{first} - {second}"]
        for entry in entries:
            one, other = _tests(entry["found"][first]), _tests(entry["found"][second])
            mean, low, high = (100 * x for x in difference(one, other, entry["graph"]["train"], entry["graph"]["test"]))
            row.append(f"{mean:+.1f} ({low:+.1f}..{high:+.1f}), {int((one > other).sum())}/{len(one)}")
        rows.append(row)
    return _table(["difference", *(entry["graph"]["name"] for entry in entries)], rows)


def _instead(entries: Sequence[Mapping[str, Any]], strong: str) -> str:
    rows = []
    for mixture in (f"mowst-{strong}", f"mowst-star-{strong}"):
        rows.append([f"{mixture}: learned", *(_spread(_tests(entry["found"][mixture])) for entry in entries)])
        for how, told in OTHERS.items():
            values = [[cell["instead"][how] for cell in entry["found"][mixture]] for entry in entries]
            rows.append([f"{mixture}: {told}", *(_spread(value) for value in values)])
    return _table(["confidence", *(entry["graph"]["name"] for entry in entries)], rows)


def _routing(entries: Sequence[Mapping[str, Any]], strong: str) -> str:
    rows = []
    for mixture in (f"mowst-{strong}", f"mowst-star-{strong}"):
        for entry in entries:
            found = [cell["balance"] for cell in entry["found"][mixture]]
            by_class = np.mean([b["class_lis"] for b in found], 0)
            divergence = [float(np.mean(b["class_divergence"])) for b in found]
            rows.append([
                f"{entry['graph']['name']}, {mixture}", _spread([b["weak_share"] for b in found]),
                _spread([b["lis"] for b in found], 1, 2), f"{by_class.min():.2f} .. {by_class.max():.2f}",
                _spread(divergence, 1, 4),
            ])  # fmt: skip
    return _table(["graph, model", "weak share, %", "LIS", "LIS by class", "class divergence"], rows)
