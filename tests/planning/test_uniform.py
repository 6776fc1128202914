from __future__ import annotations

import pytest

from equipoise.errors import EquipoiseError, PlanError
from equipoise.planning.methods import make_plan
from equipoise.planning.uniform import uniform_plan
from equipoise.precisions import precision
from planning.cases import make_profile, skewed


@pytest.mark.parametrize("name", ["int4-g64", "int8", "bf16", "int2-g32-asym"])
def test_every_expert_is_stored_once_in_the_precision(name: str) -> None:
    model = make_profile(skewed(0)).model
    plan = uniform_plan(model, name)
    for layer, facts in zip(plan.layers, model.layers, strict=True):
        assert layer.experts == tuple(range(facts.num_experts))
        assert set(layer.precisions) == {name}
        assert layer.duplicates == 0
    assert plan.bytes_by_unit().sum() == sum(f.num_experts * f.expert_bytes(precision(name)) for f in model.layers)
    assert plan.bytes_by_unit().max() == plan.unit_bytes
    assert plan.exactness == ("exact" if name == model.dtype else "weights")


def test_the_method_is_the_plan_with_its_forecast() -> None:
    profile = make_profile(skewed(0))
    planned = make_plan(profile, "uniform", precision="int4")
    assert planned.layers == uniform_plan(profile.model, "int4").layers
    assert planned.predicted is not None
    assert planned.predicted.overrun_bytes == 0
    assert planned.predicted.lis == pytest.approx(planned.predicted.lis_raw)
    assert planned.predicted.bytes == planned.bytes_by_unit().sum()


def test_mistakes_are_named() -> None:
    profile = make_profile(skewed(0))
    with pytest.raises(EquipoiseError, match="unknown precision 'int5'"):
        make_plan(profile, "uniform", precision="int5")
    bare = profile.model.model_copy(
        update={"layers": tuple(f.model_copy(update={"matrices": ()}) for f in profile.model.layers)}
    )
    with pytest.raises(PlanError, match="sizes of the experts"):
        uniform_plan(bare, "int4")
