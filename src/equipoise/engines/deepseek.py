"""DeepSeek's EPLB: the three maps that its `rebalance_experts` returns, in one `.npz`.

Shapes: L MoE layers, E logical experts, P physical slots, X most copies of any expert.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equipoise.artifacts import ModelFacts, Plan
from equipoise.artifacts.files import write_atomic
from equipoise.engines.placement import Written, checked_slots, physical_slots
from equipoise.engines.records import Ints
from equipoise.engines.untrusted import npz_bytes, read_npz
from equipoise.errors import PlanError

NAMES = ("phy2log", "log2phy", "logcnt")


def maps(phy2log_LP: Ints, experts: int) -> tuple[Ints, Ints]:
    """Slots and number of copies of each expert.

    Args:
        phy2log_LP: expert of each slot.
        experts: E.

    Returns:
        log2phy [L, E, X], slots of each expert in ascending order, padded with -1, and logcnt [L, E].
    """
    size_l, size_p = phy2log_LP.shape
    logcnt = np.stack([np.bincount(row, minlength=experts) for row in phy2log_LP])
    log2phy = np.full((size_l, experts, int(logcnt.max())), -1, np.int64)
    order = np.argsort(phy2log_LP, axis=1, kind="stable")
    expert = np.take_along_axis(phy2log_LP, order, 1)
    first = np.cumsum(logcnt, 1) - logcnt
    copy = np.arange(size_p) - np.take_along_axis(first, expert, 1)
    log2phy[np.arange(size_l)[:, None], expert, copy] = order
    return log2phy, logcnt


def write(plan: Plan, out: Path) -> Written:
    """Write `phy2log` [L, P], `log2phy` [L, E, X] (padded with -1) and `logcnt` [L, E] as int64.

    Args:
        plan: a plan with equally many slots everywhere.
        out: the file; its name must end in .npz.

    Raises:
        PlanError: the maps cannot hold the plan, or the ending is another.
    """
    if out.suffix != ".npz":
        raise PlanError(f"'{out}': the three maps are written to one file whose name ends in .npz.")
    phy2log = np.stack(physical_slots(plan, "deepseek"))
    log2phy, logcnt = maps(phy2log, plan.model.max_experts)
    write_atomic(out, npz_bytes(dict(zip(NAMES, (phy2log, log2phy, logcnt), strict=True))))
    return Written(
        (out,),
        f"phy2log, log2phy, logcnt = (numpy.load({str(out)!r})[k] for k in {NAMES})\n# as rebalance_experts returns them",
    )


def read_plan(path: Path, model: ModelFacts, ranks: int) -> list[Ints]:
    """The physical slots of each MoE layer from the three maps.

    Args:
        path: the file.
        model: facts of the model that it is for.
        ranks: R.

    Raises:
        PlanError: a map is missing, or the maps contradict one another.
    """
    arrays, what = read_npz(path, NAMES), f"'{path}'"
    missing = [name for name in NAMES if name not in arrays]
    if missing:
        raise PlanError(f"{what} has no {missing[0]}; it is not DeepSeek's triple.")
    phy2log = arrays["phy2log"]
    if phy2log.ndim != 2:
        raise PlanError(f"{what}: phy2log has shape {phy2log.shape}; [layers, slots] is expected.")
    checked = checked_slots(list(phy2log), model, ranks, what)
    log2phy, logcnt = maps(np.stack(checked), model.max_experts)
    held = arrays["log2phy"]
    same = held.shape == log2phy.shape and arrays["logcnt"].shape == logcnt.shape
    # The order of an expert's slots is free.
    if not same or (np.sort(held, 2) != np.sort(log2phy, 2)).any() or (arrays["logcnt"] != logcnt).any():
        raise PlanError(f"{what}: log2phy or logcnt does not belong to phy2log.")
    return checked
