"""The arms of the ablation as plans: who is copied, who is stored in fewer bits, and what is left as it was.

Shapes: L MoE layers, E experts of a layer, N slots of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts import Plan, Profile
from equipoise.planning.assemble import assemble
from equipoise.planning.budget import make_budget
from equipoise.planning.load import Slots, contiguous

Ints = NDArray[np.int64]

COPIED = ("heaviest", "most important", "random")
"""Who gets a copy: the most selections; the least Wanda score, which the paper calls most important; anyone."""
QUANTIZED = ("less important", "least frequent", "least error", "random")
"""Who makes room: the largest Wanda score, as published; the fewest selections; the least measured error; anyone."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting of the ablation.

    Attributes:
        name: in the table.
        copied: who gets a quantized copy, one of `COPIED`; None for nobody.
        quantized: who is quantized, and whose unit the copy shares, one of `QUANTIZED`.
        original: the copied expert's own slot is quantized too.
        partner: the expert that the copy shares its unit with is quantized.
        all: every expert is quantized, none copied.
    """

    name: str
    copied: str | None = "heaviest"
    quantized: str = "less important"
    original: bool = False
    partner: bool = True
    all: bool = False

    @property
    def random(self) -> bool:
        """Whether something is drawn."""
        return "random" in (self.copied, self.quantized)


ARMS = (
    Arm("only quantize the less important", copied=None),
    Arm("only replicate the heavy hitter, the copy quantized", partner=False),
    Arm("only replicate the heavy hitter, both quantized", partner=False, original=True),
    Arm("quantize all", copied=None, all=True),
    Arm("R&Q (`rq-paper`)"),
)
"""The paper's settings; it does not say whether "replicate heavy" quantizes one or both, so both readings stand here."""
GRID = tuple(Arm(f"{copied} / {quantized}", copied, quantized) for copied in COPIED for quantized in QUANTIZED)


def arm_plan(profile: Profile, arm: Arm, seed: int) -> Plan:
    """The plan of an arm, with units as many as experts and counted in the model's own format as `rq-paper` does.

    Args:
        profile: loads, Wanda's scores and measured errors.
        arm: the setting.
        seed: of what is drawn.
    """
    native = profile.model.dtype
    form = "fp16" if native == "fp32" else "int8"
    units = profile.model.max_experts
    budget = make_budget(profile, units, (native, form), 1.0, reference=native)
    slots = contiguous(profile.widths, units)
    option_N = np.full(len(slots.unit), int(arm.all), np.int64)
    share_N = slots.share.copy()
    start_L = np.searchsorted(slots.layer, np.arange(len(profile.widths)))
    rng = np.random.default_rng(seed)
    rows = []
    for layer in range(0 if arm.all else len(profile.widths)):
        copied, partner = chosen(profile, arm, layer, form, rng)
        own, other = int(start_L[layer]) + copied, int(start_L[layer]) + partner
        option_N[other] = int(arm.partner)
        if arm.copied is not None:
            share_N[own] = 0.5
            option_N[own] = int(arm.original)
            rows.append((layer, copied, int(slots.unit[other])))
    layer_C, expert_C, unit_C = np.array(rows, np.int64).reshape(-1, 3).T
    layers = np.concatenate([slots.layer, layer_C])
    order = np.argsort(layers, kind="stable")
    together = Slots(
        layers[order],
        np.concatenate([slots.expert, expert_C])[order],
        np.concatenate([slots.unit, unit_C])[order],
        np.concatenate([share_N, np.full(len(rows), 0.5)])[order],
    )
    options_N = np.concatenate([option_N, np.ones(len(rows), np.int64)])[order]
    return assemble(
        profile, budget, together, options_N, method="ablation", options={"arm": arm.name}, seed=seed, dispatch="even"
    )


def chosen(profile: Profile, arm: Arm, layer: int, form: str, rng: np.random.Generator) -> tuple[int, int]:
    """The expert of a layer that is copied, and another one that makes room.

    Where nobody is copied, the heaviest is still not the one that makes room, as in R&Q.
    """
    width = int(profile.widths[layer])
    load_E = profile.load[layer, :width]
    wanda_E = profile.importance["wanda"][layer, :width]
    copied = {
        "heaviest": lambda: int(load_E.argmax()),
        "most important": lambda: int(wanda_E.argmin()),
        "random": lambda: int(rng.integers(width)),
    }[arm.copied or "heaviest"]()
    order_E = {
        "less important": lambda: np.argsort(-wanda_E, kind="stable"),
        "least frequent": lambda: np.argsort(load_E, kind="stable"),
        "least error": lambda: np.argsort(profile.relative_error(form)[layer, :width], kind="stable"),
        "random": lambda: rng.permutation(width),
    }[arm.quantized]()
    return copied, next(int(expert) for expert in order_E if expert != copied)
