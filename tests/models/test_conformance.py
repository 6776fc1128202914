from __future__ import annotations

import pytest

from equipoise.models.layers import find_moe_layers, fingerprint
from models.architectures import ARCHITECTURES, discover, tiny
from models.conformance import PAGE, check

READ = [name for name, spec in ARCHITECTURES.items() if not spec.skip]


def test_the_matrix_holds_every_moe_architecture_of_the_installed_transformers():
    assert set(discover()) == set(ARCHITECTURES), "add what is new to ARCHITECTURES, then make the page anew"


@pytest.mark.parametrize("name", READ)
def test_recorded_like_brute_force_and_as_the_page_says(name):
    result = check(name)
    assert not result.recorded
    assert not result.padding
    # A family passes unless transformers itself computes it wrongly; when that is mended, this fails and the defect can go.
    assert bool(result.computed) == bool(find_moe_layers(tiny(name))[0].adapter.defect), result.computed
    assert result.row in PAGE.read_text(encoding="utf-8").splitlines(), "make docs/conformance.md anew"


def test_at_least_45_architectures_pass_and_the_page_lists_exactly_the_others():
    table, _, rest = PAGE.read_text(encoding="utf-8").partition("## Those that do not pass")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ") and "`" in line]
    passing = {row[0] for row in rows if row[-3:] == ["yes"] * 3}
    listed = {line.split("**")[1] for line in rest.splitlines() if line.startswith("- **")}
    assert {row[0] for row in rows} == set(READ)
    assert len(passing) >= 45
    assert listed == set(ARCHITECTURES) - passing


@pytest.mark.parametrize("name", READ)
def test_fingerprint_survives_saving_and_loading(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        pytest.skip(f"transformers itself cannot reload this model: {info}")
    assert fingerprint(loaded) == fingerprint(model)
