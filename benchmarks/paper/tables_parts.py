"""What the tables of this folder share: profiles that are kept, plans carried out, intervals, and what the paper printed.

Figures of `PRINTED` and `PRINTED_ABLATION` are the paper's (arXiv:2602.19938v1, Tables 2 and 3) and stand in tables as quoted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import Subject, digest

from equipoise.artifacts import Plan, Profile
from equipoise.artifacts.evaluation import Interval
from equipoise.execution.apply import apply_plan
from equipoise.pipeline import PRECISIONS, ROUNDING, ROUNDING_TOKENS, SENSITIVITY_TOKENS
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile
from equipoise.profiling.sequences import text_batches

Texts = Mapping[str, Sequence[str]]

RAW, PUBLISHED, OURS = "raw", "rq-paper", "rq"
PLANNED = (PUBLISHED, OURS)
SEQ_LEN, BATCH_ROWS = 512, 8

KIN = {"switch-8": "Switch-8", "switch-16": "Switch-16", "mixtral-8": "LLaMA-MoE", "deepseek-64": "DeepSeek-MoE"}
"""Model of the shelf -> the paper's model with as many experts and the same top-k, hundreds of times larger."""
PRINTED: Mapping[str, Mapping[str, tuple[float, float, float | None, float | None]]] = {
    "Switch-8": {
        "gsm8k": (1.9709, 1.3937, None, None),
        "truthfulqa_mc1": (1.4956, 1.3494, 36.9, 36.4),
        "winogrande": (1.5261, 1.2146, 49.6, 49.2),
        "hellaswag": (1.4182, 1.3623, 27.5, 27.6),
        "mmlu": (1.5405, 1.2962, 23.0, 25.2),
        "piqa": (1.5770, 1.2756, 58.1, 58.3),
    },
    "Switch-16": {
        "gsm8k": (2.6937, 1.9582, None, None),
        "truthfulqa_mc1": (2.0121, 1.6856, 37.4, 36.9),
        "winogrande": (2.0063, 1.5394, 49.0, 48.5),
        "hellaswag": (1.9681, 1.7369, 28.6, 28.7),
        "mmlu": (1.9964, 1.7067, 23.0, 25.0),
        "piqa": (2.0355, 1.6080, 54.6, 55.0),
    },
    "LLaMA-MoE": {
        "gsm8k": (1.3565, 1.1963, 3.5, 3.6),
        "truthfulqa_mc1": (1.2946, 1.2025, 27.3, 27.3),
        "winogrande": (1.3925, 1.2791, 67.3, 66.7),
        "hellaswag": (1.3047, 1.2258, 54.1, 54.0),
        "mmlu": (1.3289, 1.1964, 28.0, 28.0),
        "piqa": (1.2943, 1.2366, 77.0, 77.0),
    },
    "DeepSeek-MoE": {
        "gsm8k": (4.8182, 3.9725, 15.6, 15.4),
        "truthfulqa_mc1": (2.9672, 2.1749, 31.1, 31.1),
        "winogrande": (3.1386, 2.4475, 70.0, 70.6),
        "hellaswag": (3.0387, 2.6403, 59.8, 59.8),
        "mmlu": (3.7359, 2.8222, 44.7, 44.7),
        "piqa": (4.0780, 3.0585, 78.8, 79.1),
    },
}
"""Table 2: model -> task -> LIS raw, LIS with R&Q, accuracy raw, accuracy with R&Q in percent."""
ABLATION_TASKS = ("HellaSwag", "MMLU", "PIQA", "TruthfulQA", "Winogrande")
PRINTED_ABLATION: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "Switch-8": {
        "only quantize the less important": (27.95, 22.95, 57.51, 36.05, 51.38),
        "only replicate the heavy hitter": (27.49, 24.98, 58.11, 36.35, 49.17),
        "quantize all": (26.41, 22.95, 54.90, 37.75, 51.85),
        "R&Q": (27.63, 25.22, 58.32, 36.40, 49.17),
    },
    "Switch-16": {
        "only quantize the less important": (28.20, 22.95, 55.77, 39.14, 49.64),
        "only replicate the heavy hitter": (28.64, 24.90, 54.90, 36.69, 48.30),
        "quantize all": (25.95, 22.95, 55.82, 37.21, 50.91),
        "R&Q": (28.72, 24.95, 55.01, 36.94, 48.54),
    },
}
"""Table 3: model -> setting -> accuracy in percent on `ABLATION_TASKS`."""


def measured(tested: Subject, planned: Texts, tokens: int, seed: int, out: Path) -> Profile:
    """The profile that plans are made from: loads, Wanda's scores, errors at all widths, sensitivity; kept in a file.

    Args:
        tested: the model.
        planned: scenario -> documents.
        tokens: of each scenario.
        seed: of the excerpts.
        out: directory of profiles.
    """
    path = out / f"{tested.name}-{tested.identity}-{digest(planned)}-{tokens}-{seed}.profile.safetensors"
    if not path.is_file():
        out.mkdir(parents=True, exist_ok=True)
        profile(
            tested.model, tested.tokenizer, planned, tokens=tokens, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=seed,
            precisions=PRECISIONS, importance_options={"output_error": {"sensitivity_tokens": SENSITIVITY_TOKENS}},
            name=tested.name,
        ).save(path)  # fmt: skip
    return Profile.load_file(path)


def plan_of(made: Profile, method: str, seed: int) -> Plan:
    """A plan as `balance` makes it: `rq` with the least loaded copy serving, `rq-paper` as published."""
    return make_plan(made, method, seed=seed, **({"dispatch": "least_loaded"} if method == OURS else {}))


def carried_out(tested: Subject, plan: Plan, planned: Texts, seed: int) -> Any:
    """Another instance of the model under a plan: `rq` rounded on the text planned from, all others to nearest."""
    if plan.method != OURS:
        return apply_plan(tested.fresh(), plan)
    batches = text_batches(
        planned, tested.tokenizer, tested.framing, tokens=ROUNDING_TOKENS, seq_len=SEQ_LEN, batch_size=BATCH_ROWS, seed=seed
    )  # fmt: skip
    return apply_plan(tested.fresh(), plan, method=ROUNDING, batches=batches)


def points(interval: Interval | Mapping[str, float]) -> str:
    """A difference of shares in percentage points, with its 95 % interval."""
    told = interval if isinstance(interval, Mapping) else interval.model_dump()
    return f"{100 * told['value']:+.1f} ({100 * told['low']:+.1f}..{100 * told['high']:+.1f})"


def apart(interval: Mapping[str, float]) -> bool:
    """Whether the interval leaves zero out."""
    return interval["low"] > 0 or interval["high"] < 0
