from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.artifacts import ModelFacts
from equipoise.artifacts.routing import LayerRouting, RoutingPolicy, require_policy
from equipoise.errors import EquipoiseError, PlanError


def policy(**changes: object) -> RoutingPolicy:
    layer = LayerRouting(path="layers.0.experts", scores="softmax", weights="raw", bias=(0.5, -0.25), mean_k=2.0)
    given = {"name": "bias", "options": {"strength": 1.0}, "model": "tiny", "fingerprint": "abc", "layers": (layer,)}
    return RoutingPolicy(**{**given, **changes})


def test_a_policy_comes_back_from_its_file(tmp_path: Path) -> None:
    policy().save(tmp_path / "p.json")
    assert RoutingPolicy.load_file(tmp_path / "p.json") == policy()


def test_its_id_follows_what_decides_and_nothing_else() -> None:
    other = policy().layers[0].model_copy(update={"bias": (0.5, -0.2)})
    assert policy(layers=(other,)).id != policy().id
    assert policy(options={"strength": 0.5}).id != policy().id
    assert policy(fingerprint="abd").id != policy().id
    same = policy().layers[0].model_copy(update={"mean_k": 1.0})
    assert policy(layers=(same,), model="renamed", tokens=7).id == policy().id
    assert policy().id.startswith("bias(strength=1.0)@")


def test_a_file_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"schema": "equipoise.policy/1", "name": "bias"}')
    with pytest.raises(EquipoiseError, match="not a valid routing policy: model"):
        RoutingPolicy.load_file(tmp_path / "p.json")
    with pytest.raises(EquipoiseError, match="cannot read routing policy"):
        RoutingPolicy.load_file(tmp_path / "absent.json")


def test_another_model_is_refused() -> None:
    facts = ModelFacts.model_construct(name="other", fingerprint="xyz")
    with pytest.raises(PlanError, match="fitted for 'tiny'"):
        policy().check_model(facts)


def test_a_plan_and_a_model_must_agree_on_the_policy() -> None:
    require_policy("native", "native", "applied")
    with pytest.raises(PlanError, match="--policy"):
        require_policy("bias(strength=1.0)@1", "native", "applied")
    with pytest.raises(PlanError, match="profile --policy"):
        require_policy("native", "bias(strength=1.0)@1", "applied")
