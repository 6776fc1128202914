from __future__ import annotations

import pytest

from equipoise.errors import EquipoiseError
from equipoise.reporting.frontier_plot import frontier_plot

POINTS = [
    {"model": model, "bytes_fraction": fraction, "lis_base": 3.0, "lis": lis, "kl": kl}
    for model in ("a", "b")
    for fraction in (0.5, 1.0)
    for lis, kl in ((1.2, 0.001), (1.05, 0.004), (1.0, None))
]


@pytest.mark.parametrize(("name", "start"), [("f.svg", b"<?xml"), ("f.png", b"\x89PNG")])
def test_writes_a_picture(tmp_path, name: str, start: bytes):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    frontier_plot(POINTS, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("points", "name", "message"),
    [
        (POINTS, "f.gif", r"plot: 'f.gif' given; allowed endings are .png, .svg"),
        ([], "f.svg", r"there are no points to draw; allow more error"),
        ([{**POINTS[0], "kl": None}], "f.svg", r"measure errors"),
    ],
)
def test_refusals_say_what_is_allowed(tmp_path, points, name: str, message: str):
    with pytest.raises(EquipoiseError, match=message):
        frontier_plot(points, tmp_path / name)
    assert not list(tmp_path.iterdir())
