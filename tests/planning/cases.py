"""Small profiles and exhaustive oracles for planning; E experts, L layers, U units, W windows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from hypothesis import strategies as st
from numpy.typing import ArrayLike, NDArray

from equipoise.artifacts import LayerFacts, ModelFacts, Profile, Source

MATRICES = ((64, 32), (32, 32))


def make_facts(widths: list[int], dtype: str = "bf16", matrices: tuple[tuple[int, int], ...] = MATRICES) -> ModelFacts:
    layers = tuple(
        LayerFacts(path=f"layers.{i}", model_layer=i, num_experts=width, top_k=min(2, width), matrices=matrices)
        for i, width in enumerate(widths)
    )
    return ModelFacts(name="toy", model_type="toy", dtype=dtype, fingerprint="f" * 64, layers=layers)


def make_profile(
    windows_WLE: ArrayLike,
    *,
    widths: list[int] | None = None,
    dtype: str = "bf16",
    matrices: tuple[tuple[int, int], ...] = MATRICES,
    importance: Mapping[str, NDArray[np.float64]] | None = None,
    error: Mapping[str, float] | None = None,
) -> Profile:
    """A profile of one scenario; `error` gives the relative RMS error of a layer with all experts in that format."""
    windows = np.asarray(windows_WLE, np.int64)
    load = windows.sum(0)
    counts = np.zeros((1, 2, *load.shape), np.int64)
    counts[0, 0] = load
    part = load / np.maximum(load.sum(1, keepdims=True), 1)
    return Profile(
        model=make_facts(widths or [load.shape[1]] * load.shape[0], dtype, matrices),
        source=Source(scenarios=("all",), text_sha256="a1"),
        counts=counts,
        gate_mass=counts.sum(1) * 0.5,
        tokens=np.array([load[0].sum() // 2]),
        windows=windows,
        window_scenario=np.zeros(len(windows), np.int64),
        importance=dict(importance or {}),
        output_error={name: rms**2 * part for name, rms in (error or {}).items()},
        output_energy=(load.sum(1) > 0) * 1.0 if error else np.zeros(0),
    )


def skewed(seed: int, layers: int = 4, experts: int = 8, windows: int = 6) -> NDArray[np.int64]:
    """[W, L, E] counts with hot experts, and windows that differ."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0.0, 1.0, (layers, experts))
    return rng.poisson(50.0 * base * rng.lognormal(0.0, 0.3, (windows, layers, experts)))


@st.composite
def loads(draw: st.DrawFn, max_layers: int = 3, max_experts: int = 7) -> NDArray[np.int64]:
    """[W, L, E] counts, zero rows and columns included."""
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, max_layers)), draw(st.integers(1, max_experts)))
    values = draw(st.lists(st.integers(0, 60), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(values, np.int64).reshape(shape)
