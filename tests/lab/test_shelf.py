"""The models of the shelf are what their cards say: stock transformers models with skew that was learned."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equipoise import lab
from equipoise.execution.apply import apply_plan
from equipoise.execution.meter import SlotMeter
from equipoise.lab.recipe import read_recipe
from equipoise.metrics import jensen_shannon, lis
from equipoise.planning.methods import make_plan
from equipoise.profiling.calibrate import profile

ROOT = Path(__file__).parents[2]
SHELF = lab.names()


@pytest.fixture(scope="module")
def texts():
    """The repository's own pages and code: real text that is always there."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    code = sorted((ROOT / "src" / "equipoise" / "planning").glob("*.py"))
    return {name: [path.read_text() for path in paths] for name, paths in (("pages", pages), ("code", code))}


def test_the_shelf_is_full_and_small():
    assert set(SHELF) >= {"mixtral-8", "qwen3-32", "deepseek-64", "switch-8", "switch-16"}
    assert sum(path.stat().st_size for path in (ROOT / "shelf").rglob("*") if path.is_file()) <= 40e6


def test_stock_transformers_loads_every_model_in_a_fresh_process():
    code = (
        "import sys, torch, transformers as t\n"
        "for place in sys.argv[1:]:\n"
        "    config = t.AutoConfig.from_pretrained(place)\n"
        "    kind = t.AutoModelForSeq2SeqLM if config.is_encoder_decoder else t.AutoModelForCausalLM\n"
        "    model, told = kind.from_pretrained(place, output_loading_info=True)\n"
        "    assert not told['missing_keys'] and not told['unexpected_keys'], told\n"
        "    ids = t.AutoTokenizer.from_pretrained(place)('def main():', return_tensors='pt').input_ids\n"
        "    given = {'decoder_input_ids': ids} if config.is_encoder_decoder else {}\n"
        "    assert torch.isfinite(model(input_ids=ids, **given).logits).all()\n"
        "assert 'equipoise' not in sys.modules\nprint('loaded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(lab.path(name)) for name in SHELF)], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip().endswith("loaded"), done.stderr


@pytest.mark.parametrize("name", SHELF)
def test_the_card_belongs_to_the_recipe(name):
    facts = json.loads((lab.path(name) / "card.json").read_text())
    recipe = read_recipe(ROOT / "configs" / f"{name}.toml")
    assert facts["recipe"] == recipe.fingerprint()
    assert len(json.loads((lab.path(name) / "losses.json").read_text())) == recipe.training.steps
    found = facts["judgement"]
    assert found["lis"] >= 1.3
    assert found["divergence"] > 0.01
    assert found["beside_trigram"]["high"] < -0.02, "clearly below a trigram model of the same text, and not by chance"
    assert found["perplexity"] == pytest.approx(facts["watch"][-1]["perplexity"], rel=0.35)


@pytest.mark.parametrize("name", SHELF)
def test_routing_is_skewed_differs_by_text_and_rq_levels_it(name, texts):
    model, tokenizer = lab.load(name)
    measured = profile(
        model, tokenizer, texts, tokens=1024, seq_len=256, importance=("frequency",), precisions=("int8", "int4-g32"),
        progress=False,
    )  # fmt: skip
    raw = lis(measured.load, measured.widths)
    assert raw.mean() >= 1.3
    assert float(np.mean(jensen_shannon(measured.scenario_load[0], measured.scenario_load[1]))) > 0.005
    plan = make_plan(measured, "rq")
    assert plan.predicted.lis < 1 + 0.5 * (raw.mean() - 1)
    ids = tokenizer(texts["code"][0], return_tensors="pt").input_ids[:, :256]
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    balanced = apply_plan(model, plan)
    with SlotMeter(balanced) as meter:
        balanced(input_ids=ids, **given)
    assert np.isfinite(meter.unit_load).all()
    assert meter.unit_load.sum() > 0
