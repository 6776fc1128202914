"""The conformance matrix: every check for one architecture, and the page that shows the results of all.

PYTHONPATH=tests python -m models.conformance > docs/conformance.md
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from equipoise.models.layers import find_moe_layers
from equipoise.models.recorder import record
from models.architectures import ARCHITECTURES, discover, tiny
from models.oracle import count, inputs_for, padded, recomputed, sequences, watch_experts, watch_routers

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Result:
    """Outcome of one architecture; a check's text is empty when it holds, else what differed."""

    name: str
    model: str
    layers: str
    layout: str
    recorded: str
    padding: str
    computed: str
    remark: str

    @property
    def passes(self) -> bool:
        """All checks hold."""
        return not (self.recorded or self.padding or self.computed)

    @property
    def row(self) -> str:
        """Line of the page."""
        cells = [
            self.name,
            f"`{self.model}`",
            self.layers,
            self.layout,
            *("no" if text else "yes" for text in (self.recorded, self.padding, self.computed)),
        ]
        return f"| {' | '.join(cells)} |"


@torch.no_grad()
def check(name: str) -> Result:
    """Run every check on a tiny random model of an architecture."""
    model, texts = tiny(name), sequences()
    layers = find_moe_layers(model)
    recorded, padding, computed = [], [], []
    counts = {}
    for side in ("right", "left"):
        batch = padded(texts, side)
        with record(model) as recorder, watch_routers(model) as chosen:
            model(**inputs_for(model, batch))
        counts[side] = recorder.counts.sum((0, 1))
        brute = count(layers, chosen, batch)
        if (counts[side] != brute).any():
            recorded.append(f"counts differ from brute force with {side} padding")
        if ((brute > 0).sum(1) <= [layer.top_k for layer in layers]).any():
            recorded.append("the model sends all tokens to the same experts, which tests nothing")
        selections = recorder.counts.sum((0, 1, 3)) + recorder.unrouted.sum(0)
        if (selections != [sum(map(len, texts)) * layer.top_k for layer in layers]).any():
            recorded.append("selections differ from real tokens x top-k")
    with record(model) as recorder:
        for text in texts:
            model(**inputs_for(model, padded([text], "right")))
    padding += [f"{side} padding changes counts" for side in counts if (counts[side] != recorder.counts.sum((0, 1))).any()]
    for layer in layers:
        with watch_experts(layer) as seen:
            model(**inputs_for(model, padded(texts, "right")))
        output, ours = recomputed(layer, seen)
        error = float((output - ours).abs().max() / output.abs().max())
        if not error < TOLERANCE:
            computed.append(layer.adapter.defect or f"{layer.path}: relative difference {error:.1g}")
    return Result(
        name=name,
        model=type(model).__name__,
        layers=" + ".join(
            f"{sum(x.stack == stack for x in layers)} {stack}" for stack in dict.fromkeys(x.stack for x in layers)
        ),
        layout=layers[0].layout,
        recorded="; ".join(dict.fromkeys(recorded)),
        padding="; ".join(padding),
        computed="; ".join(dict.fromkeys(computed)),
        remark=layers[0].adapter.partial,
    )


def page(results: list[Result]) -> str:
    """The page of all results."""
    passing = sum(result.passes for result in results)
    unread = [(name, spec.skip) for name, spec in ARCHITECTURES.items() if spec.skip]
    failing = [r for r in results if not r.passes]
    remarks = sorted({(r.layout, r.remark) for r in results if r.remark})
    lines = [
        "# Architectures",
        "",
        f"Every Mixture-of-Experts architecture found in transformers {transformers.__version__}, as a tiny random model",
        f"made in code, recorded and compared with brute force. **{passing} of {len(results) + len(unread)} pass.** Made by",
        "`PYTHONPATH=tests python -m models.conformance > docs/conformance.md`; each line of the table is compared with a",
        "fresh run by `pytest tests/models`, which also fails when a new transformers release has an architecture that is not",
        "in the table.",
        "",
        "- *recorded*: counts equal those read from the routers' own outputs, token by token, with left and right padding;",
        "  selections equal real tokens x top-k.",
        "- *padding*: counts with left padding, with right padding and of each sequence alone are equal.",
        "- *computed*: the gate-weighted sum of single experts (`run_expert`), over the recorded selections, equals what the",
        "  model's own experts module returns.",
        "",
        "| architecture | model | MoE layers | family | recorded | padding | computed |",
        "|---|---|---|---|---|---|---|",
        *(result.row for result in results),
        "",
        "## Those that do not pass",
        "",
        *(f"- **{r.name}**: {'; '.join(filter(None, (r.recorded, r.padding, r.computed)))}." for r in failing),
        *(f"- **{name}**: {reason}." for name, reason in unread),
        "",
        "## Selections that reach no routed expert",
        "",
        "Some families let a real token go without an expert. Such selections are in no expert's count; the recorder keeps",
        "them apart (`Recorder.unrouted`), and counts plus these equal real tokens x top-k.",
        "",
        *(f"- `{layout}`: {remark}" for layout, remark in remarks),
        "",
        "Under transformers' own expert parallelism every rank records the routing of all tokens that it holds, by global",
        "expert id: the recorder sits before the ids become local to a rank.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print the page."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    missing = set(discover()) ^ set(ARCHITECTURES)
    assert not missing, f"the matrix and the installed transformers differ by {sorted(missing)}"
    print(page([check(name) for name, spec in ARCHITECTURES.items() if not spec.skip]), end="")


if __name__ == "__main__":
    main()
