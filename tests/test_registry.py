from __future__ import annotations

import pytest

from equipoise.errors import EquipoiseError
from equipoise.registry import Registry


def make() -> Registry:
    registry: Registry = Registry("planning method")
    registry.register("rq", summary="ours", source="Equipoise")(lambda: 1)
    registry.register("rq-paper", summary="published", source="R&Q")(lambda: 2)
    return registry


def test_unknown_name_names_the_nearest_and_all():
    with pytest.raises(EquipoiseError, match=r"unknown planning method 'rq-papr'.*rq, rq-paper.*mean 'rq-paper'"):
        make().get("rq-papr")


def test_known_names_are_listed_in_order_and_called():
    registry = make()
    assert registry.names() == ["rq", "rq-paper"]
    assert registry.get("rq-paper")() == 2
    assert "rq" in registry
    assert "eplb" not in registry
    assert [e.source for e in registry] == ["Equipoise", "R&Q"]


@pytest.mark.parametrize("name", ["rq", "Upper"])
def test_taken_or_badly_spelt_names_are_refused(name):
    with pytest.raises(ValueError, match=name):
        make().register(name, summary="", source="")
