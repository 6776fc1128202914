"""Quantized exports: stock transformers, in a process that knows nothing of us, computes what our slots do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from equipoise.errors import ModelError, PlanError
from equipoise.execution.compressed_tensors import Scheme, common_schemes, export_compressed, own_scheme, pack_words, stored
from equipoise.execution.stock_source import Source
from equipoise.models.layers import find_moe_layers, model_facts
from equipoise.precisions import Precision, precision
from equipoise.quantization.codes import code_range
from equipoise.quantization.formats import quantize
from execution.export_helpers import batch_for, layered_plan, saved
from execution.helpers import make_plan
from models.architectures import tiny

CASES: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "mixtral int4": ("mixtral", ["int4-g16"], {}),
    "mixtral int8 and 16 bits": ("mixtral", ["int8", "fp32"], {}),
    "mixtral fp8 and 16 bits": ("mixtral", ["fp8", "fp32"], {}),
    "mixtral three formats": ("mixtral", ["int3-g8-asym", "int4-g32"], {}),
    "qwen3 groups that divide nothing": ("qwen3_moe", ["int2-g24"], {}),
    "deepseek int3": ("deepseek_v3", ["int3-g16"], {}),
    "nemotron, not gated": ("nemotron_h", ["int4-asym"], {}),
    "mixtral by layer": ("mixtral", ["int4-g16", "int8"], {"by_layer": True}),
    "nemotron by layer": ("nemotron_h", ["fp8", "int8"], {"by_layer": True}),
}
CHILD = """
    import json, sys, torch, transformers
    from pathlib import Path
    answers = {}
    for case in sorted(Path(sys.argv[1]).iterdir()):
        kind = getattr(transformers, json.loads((case / "model" / "config.json").read_text())["architectures"][0])
        try:
            model, info = kind.from_pretrained(case / "model", output_loading_info=True)
        except RuntimeError as error:
            answers[case.name] = {"error": str(error)}
            continue
        with torch.no_grad():
            found = model(**torch.load(case / "batch.pt", weights_only=True)).logits
        wanted = torch.load(case / "logits.pt", weights_only=True)
        answers[case.name] = {"difference": float((found - wanted).abs().max()), "scale": float(wanted.std()),
                              "keys": {name: len(keys) for name, keys in info.items() if keys}}
    answers["modules"] = sorted(name for name in sys.modules if name.startswith("equipoise"))
    print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process says of every case."""
    pytest.importorskip("compressed_tensors", reason="stock transformers reads these checkpoints with compressed-tensors")
    here, balanced = tmp_path_factory.mktemp("cases"), tmp_path_factory.mktemp("balanced")
    found: dict[str, Any] = {}
    for number, (name, (architecture, forms, options)) in enumerate(CASES.items()):
        case = here / f"{number}"
        case.mkdir()
        model = tiny(architecture)
        plan = layered_plan(model_facts(model, architecture), forms, extra=1)
        torch.save(saved(model, plan, balanced / f"{number}"), case / "logits.pt")
        torch.save(batch_for(model), case / "batch.pt")
        found[name] = {"done": export_compressed(Source(balanced / f"{number}"), case / "model", **options), "plan": plan}
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(here)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    assert answers.pop("modules") == []
    for number, name in enumerate(CASES):
        found[name] |= answers[str(number)]
    return found


@pytest.mark.parametrize("name", [name for name, (*_, options) in CASES.items() if not options])
def test_stock_transformers_computes_what_our_slots_do(exports: dict[str, Any], name: str) -> None:
    assert exports[name]["keys"] == {}
    assert exports[name]["difference"] < 1e-5 * max(1.0, exports[name]["scale"])
    assert any("copies of experts are left out" in note for note in exports[name]["done"].notes)


@pytest.mark.parametrize("name", [name for name, (*_, options) in CASES.items() if options])
def test_transformers_stops_at_what_it_would_misread(exports: dict[str, Any], name: str) -> None:
    assert "conversion of the weights" in exports[name]["error"]


def test_bytes_are_those_of_the_plan_where_nothing_is_widened(exports: dict[str, Any]) -> None:
    done, layers = exports["mixtral int4"]["done"], exports["mixtral int4"]["plan"].model.layers
    # Readers compute weights in the dtype of the scales, so those of an fp32 model have four bytes; shapes are 16 a tensor.
    extra = sum(layer.num_experts * (sum(r * -(-c // 16) * 2 for r, c in layer.matrices) + 3 * 16) for layer in layers)
    assert done.expert_bytes == done.facts["planned_expert_bytes"] + extra
    assert len(done.notes) == 1


def test_widening_is_told(exports: dict[str, Any]) -> None:
    note = next(n for n in exports["mixtral three formats"]["done"].notes if "stored in" in n)
    assert note.startswith("1 layers are stored in 4 bits with one scale per 8 columns") or note.startswith(
        "2 layers are stored in 4 bits with one scale per 8 columns"
    )
    assert any("16 bits, as fused tensors" in n for n in exports["mixtral int8 and 16 bits"]["done"].notes)


INTEGER = ["int8", "int8-g16", "int4-g32", "int4-g7", "int3", "int3-g5-asym", "int4-g16-asym", "int2-asym", "int2-g64"]


@given(st.integers(1, 12), st.integers(1, 70), st.sampled_from(INTEGER), st.integers(0, 50), st.data())
@settings(max_examples=40, deadline=None)
def test_compressed_tensors_reads_the_same_weights(rows: int, columns: int, name: str, seed: int, data: st.DataObject) -> None:
    """Whatever scheme holds the format, and whatever rows are taken, its own decompressor gives our weights."""
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base", reason="not installed")
    schemes = pytest.importorskip("compressed_tensors.quantization", reason="not installed")
    form = precision(name)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    matrix = quantize(weight, form)
    finest = [g for g in range(1, columns + 1) if columns % g == 0 and (form.group is None or form.group % g == 0)]
    group = data.draw(st.sampled_from(finest)) if form.group is not None else data.draw(st.sampled_from([None, *finest]))
    symmetric = form.symmetric or data.draw(st.booleans())
    bits = data.draw(st.integers(form.bits + (symmetric and not form.symmetric), 8))
    scheme = Scheme(bits, group, symmetric)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    found = stored(matrix, start, stop, scheme, torch.float32)
    settings_ = schemes.QuantizationScheme.model_validate(scheme.settings(["x"]))
    back = base.PackedQuantizationCompressor.decompress(found, settings_)["weight"]
    torch.testing.assert_close(back, matrix.dequantize()[start:stop], rtol=1e-6, atol=0)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 70), st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_words_of_every_width_are_those_of_compressed_tensors(bits: int, rows: int, columns: int, seed: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers", reason="not installed")
    form = Precision(f"int{bits}", bits)
    low, high = code_range(form)
    codes = torch.randint(low, high + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    assert torch.equal(pack_words(codes, form), helpers.pack_to_int32(codes, bits))


def test_one_scheme_for_all_layers() -> None:
    layers = find_moe_layers(tiny("mixtral"))  # widths 32 and 48

    def common(*names: str) -> list[Scheme | None]:
        return common_schemes([own_scheme(precision(name), layer) for name, layer in zip(names, layers, strict=True)], layers)

    assert common("int4-g16", "int4-g16") == [Scheme(4, 16)] * 2
    assert common("int8", "bf16") == [Scheme(8, None), None]
    assert common("int4-g32", "int3-g8") == [Scheme(4, 8)] * 2
    assert common("int4-g16", "int8") == [Scheme(8, 16)] * 2
    assert common("int4-g16-asym", "int2-g16") == [Scheme(5, 16)] * 2
    assert common("int4-g128", "int4-g128") == [Scheme(4, None)] * 2
    assert common("fp8", "fp8") == [Scheme(8, None, fp8=True)] * 2
    with pytest.raises(PlanError, match=r"fp8 and others in integers.*by_layer=true"):
        common("fp8", "int8")
    with pytest.raises(PlanError, match="asymmetric 8-bit"):
        common("int8-asym", "int4")


def test_the_configuration_names_layers_and_what_is_left_alone(exports: dict[str, Any]) -> None:
    def config(name: str) -> dict[str, Any]:
        text = (exports[name]["done"].directory / "config.json").read_text()
        return json.loads(text)["quantization_config"]

    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    for name in CASES:
        parsed = QuantizationConfig.model_validate(config(name))
        assert parsed.quant_method == "compressed-tensors"
        assert "lm_head" in parsed.ignore
        assert any(".self_attn." in entry or ".mixer." in entry for entry in parsed.ignore)
    one = config("mixtral int8 and 16 bits")
    (group,) = one["config_groups"].values()
    paths = [f"model.layers.{i}.block_sparse_moe.experts.3.w1" for i in (0, 1, 10)]
    assert [any(match_name(path, target) for target in group["targets"]) for path in paths] == [True, False, False]
    assert [any(match_name(path, target) for target in one["ignore"]) for path in paths] == [False, True, False]
    both = config("mixtral by layer")["config_groups"]
    assert [entry["weights"]["num_bits"] for entry in both.values()] == [4, 4, 8]
    assert not match_name(paths[0], both["group_0"]["targets"][0])  # the one that stops transformers


def test_only_what_changes_is_read_and_written(exports: dict[str, Any]) -> None:
    written = load_file(exports["qwen3 groups that divide nothing"]["done"].directory / "model.safetensors")
    experts = {name: tensor for name, tensor in written.items() if ".experts." in name}
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in experts.items()}
    assert kinds == {"weight_packed": torch.int32, "weight_scale": torch.float32, "weight_shape": torch.int64}
    assert all(tensor.is_floating_point() for name, tensor in written.items() if name not in experts)


def test_refusals(tmp_path: Path) -> None:
    model = tiny("qwen3_moe")
    facts = model_facts(model, "x")
    model.save_pretrained(tmp_path / "original")
    mixed = make_plan(facts, precisions=("int4", "int8"), extra=1)
    with pytest.raises(PlanError, match=r"layer 0 holds experts in int4-g32, int8.*--round-per-layer"):
        export_compressed(Source(tmp_path / "original", mixed), tmp_path / "out")
    with pytest.raises(PlanError, match="no layer of this plan is quantized"):
        export_compressed(Source(tmp_path / "original", layered_plan(facts, ["bf16"])), tmp_path / "out")
    other = tiny("dbrx")
    saved(other, layered_plan(model_facts(other, "x"), ["int8"]), tmp_path / "dbrx")
    with pytest.raises(ModelError, match="DbrxExperts is not one"):
        export_compressed(Source(tmp_path / "dbrx"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
