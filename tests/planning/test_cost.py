"""Cost models: by name, from tables, and where they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import PlanError
from equipoise.planning.cost import ActivatedCost, CostModel, PairCost, expected_activated
from equipoise.planning.cost_measured import fit_roofline, point_cost
from equipoise.planning.latency_tables import MOST_BYTES, cost_model
from planning.cases import make_facts

COLUMNS = "num_tokens,hidden_size,inter_size,topk,num_experts,moe_tp_size,moe_ep_size,moe_dtype,distribution,latency"


def grouped(path: Path, *, dtype: str = "fp8", experts: int = 16, ranks: tuple[int, ...] = (1, 2, 4, 8, 16)) -> Path:
    """A table of a kernel that reads 1 ms an expert, or computes 0.01 ms a pair, and takes 0.1 ms to start."""
    lines = [] if path.exists() else [COLUMNS]
    for tokens in (1, 2, 4, 8, 64, 512, 4096):
        for r in ranks:
            pairs = max(1.0, tokens * 2 / r)
            ms = 0.1 + max(min(pairs, experts / r), 0.01 * pairs)
            lines.append(f"{tokens},64,32,2,{experts},1,{r},{dtype},balanced,{ms}")
            lines.append(f"{tokens},64,32,2,{experts},1,{r},{dtype},power_law_1.2,{9 * ms}")
            lines.append(f"{tokens},64,32,2,{experts},2,{r},{dtype},balanced,{9 * ms}")
    with path.open("a") as file:
        file.write("\n".join(lines) + "\n")
    return path


def test_named_models():
    pairs, activated = np.array([[3.0, 0.0]]), np.array([[2.0, 0.0]])
    for name, wanted in (("tokens", pairs), ("activated", activated)):
        model = cost_model(name)
        assert isinstance(model, CostModel)
        assert model.name == name
        assert (model(pairs, activated) == wanted).all()
        assert model.covers(pairs, activated).all()
    assert (PairCost().unit, ActivatedCost().unit) == ("pairs", "experts")


def test_a_group_is_exact_where_ranks_are_even(tmp_path: Path):
    model = cost_model(str(grouped(tmp_path / "t.csv")))
    for tokens, ranks in ((4, 2), (64, 4), (512, 8), (4096, 16)):
        pairs = tokens * 2 / ranks
        activated = min(pairs, 16 / ranks)
        time = model(np.full(ranks, pairs), np.full(ranks, activated))
        assert time == pytest.approx(np.full(ranks, 0.1 + max(activated, 0.01 * pairs)), rel=1e-6)
        assert model.covers(np.full(ranks, pairs), np.full(ranks, activated)).all()
    assert not model.covers(np.full(4, 1e6), np.full(4, 4)).any()
    assert not model.covers(np.full(32, 16.0), np.ones(32)).any()
    assert model(np.full(4, 1e6), np.full(4, 4)) == pytest.approx(np.full(4, 0.1 + 0.01 * 1e6), rel=1e-3)


def test_a_group_charges_what_a_rank_has_beyond_even(tmp_path: Path):
    """In a small batch each further replica costs its reading, in a large one each further pair its arithmetic."""
    model = cost_model(str(grouped(tmp_path / "t.csv")))
    small = np.full(4, 8.0)
    assert model(small, np.array([4, 5, 4, 3]))[:2] == pytest.approx([4.1, 5.1], rel=0.02)
    large = np.array([2048.0, 3048.0, 1048.0, 2048.0])
    assert model(large, np.full(4, 4.0))[:2] == pytest.approx([0.1 + 20.48, 0.1 + 30.48], rel=0.02)
    assert model(np.array([16.0, 16.0, 0.0, 0.0]), np.array([4.0, 4.0, 0.0, 0.0]))[2:].tolist() == [0, 0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 5), st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 12, 16]))
def test_more_never_takes_less(tmp_path_factory: pytest.TempPathFactory, tokens: int, more: int, pairs: int, ranks: int):
    path = tmp_path_factory.getbasetemp() / "monotone.csv"
    model = cost_model(str(path if path.exists() else grouped(path)))
    even = np.full(ranks, tokens * 2 / ranks)
    activated = np.minimum(even, 16 / ranks)
    base = model(even, activated)[0]
    busier = activated.copy()
    busier[0] += more
    assert model(even, busier)[0] >= base - 1e-9
    skewed = even.copy()  # pairs that one rank takes from another leave the batch as it is
    moved = min(pairs, even[-1]) if ranks > 1 else 0
    skewed[0] += moved
    skewed[-1] -= moved
    assert model(skewed, activated)[0] >= base - 1e-9
    assert np.isfinite(model(skewed, busier)).all()


def test_points_of_a_user_are_met_and_joined(tmp_path: Path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "experts,pairs,latency,device\n4,4,1.0,x\n4,100,1.5,x\n8,8,2.0,x\n8,100,2.4,x\n8,100,2.2,x\n2,2,0.6,x\n4,4,9,y\n"
    )
    model = cost_model(str(path), device="x")
    assert model.unit == "ms"
    assert model([4, 100, 8, 100], [4, 4, 8, 8]) == pytest.approx([1.0, 1.5, 2.0, 2.2])
    assert model([100], [6]) == pytest.approx([(1.5 + 2.2) / 2])
    assert model([2, 50], [2, 2]) == pytest.approx([0.6, 0.6 + 0.5 * 46 / 96])
    assert model([200], [4]) == pytest.approx([3.0])
    assert model.covers([100, 200, 0, 8], [4, 4, 0, 1]).tolist() == [True, False, True, False]
    assert model([0], [0]).tolist() == [0]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 400), st.floats(0.01, 50)), min_size=1, max_size=25),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 2000)), min_size=1, max_size=20),
)
def test_points_of_any_table_give_finite_times(points: list[tuple[int, int, float]], asked: list[tuple[int, int]]):
    experts = np.array([p[0] for p in points])
    pairs = experts + [p[1] for p in points]
    ms = np.array([p[2] for p in points])
    model = point_cost("any", experts, pairs, ms)
    a, p = np.array([q[0] for q in asked]), np.array([q[0] + q[1] for q in asked])
    time = model(p, a)
    assert np.isfinite(time).all()
    assert (time >= 0).all()
    curves = {n: (pairs[experts == n], ms[experts == n]) for n in set(experts.tolist())}
    for n, (at, y) in curves.items():
        if len(set(at.tolist())) >= 2:
            best = min(y[at == at.min()])
            assert model([at.min()], [n]) == pytest.approx([best])


def test_roofline_finds_its_terms():
    rng = np.random.default_rng(0)
    tokens, activated = rng.integers(1, 4000, 300).astype(float), rng.integers(1, 64, 300).astype(float)
    pairs = activated * rng.lognormal(2, 2, 300)
    ms = 0.05 + 1e-5 * tokens + np.maximum(0.02 * activated, 3e-4 * pairs)
    found = fit_roofline(tokens, activated, pairs, ms)
    assert (found.launch, found.token, found.expert, found.pair) == pytest.approx((0.05, 1e-5, 0.02, 3e-4), rel=1e-3)
    assert found.error < 1e-3


def test_rows_are_selected_by_the_model_and_by_the_user(tmp_path: Path):
    path = grouped(grouped(tmp_path / "t.csv"), dtype="bf16")
    with pytest.raises(PlanError, match="several moe_dtype: bf16, fp8; select one"):
        cost_model(str(path))
    assert cost_model(str(path), make_facts([16], matrices=((64, 64), (64, 32))), moe_dtype="fp8").unit == "ms"
    with pytest.raises(PlanError, match=r"no row with hidden_size = 128.*there are: 64"):
        cost_model(str(path), make_facts([16], matrices=((64, 128), (128, 32))), moe_dtype="fp8")
    with pytest.raises(PlanError, match="no row with num_experts = 8"):
        cost_model(str(path), make_facts([8], matrices=()), moe_dtype="fp8")
    assert cost_model(f"{path}:moe_dtype=fp8,hidden_size=64").unit == "ms"
    for wrong, message in (("moe_dtype", "allowed are"), ("moe_dtype=", "column=value"), ("hidden_size=x", "holds numbers")):
        with pytest.raises(PlanError, match=message):
            cost_model(f"{path}:{wrong}")
    with pytest.raises(PlanError, match="no column 'dtype'"):
        cost_model(str(path), dtype="fp8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("experts,pairs,latency\n", "no rows"),
        ("experts,pairs,ms\n1,1,1\n", "no rows with a column 'latency'"),
        ("experts,pairs,latency\n1,1\n", "line 2 has 2 fields"),
        ("experts,pairs,latency\n1,1,fast\n", "must hold numbers"),
        ("experts,pairs,latency\n4,1,1\n", "pairs >= experts"),
        ("experts,pairs,latency\n1,1,-1\n", "latency > 0"),
        ("experts,pairs,latency\n1,1,nan\n", "latency > 0"),
        ("latency\n1\n", "lacks num_tokens"),
        (COLUMNS + "\n1,64,32,2,16,1,1,fp8,power_law_1.2,1\n", "no row of an even distribution"),
        (COLUMNS + "\n1,64,32,2,16,1,0,fp8,balanced,1\n", "no usable"),
        (COLUMNS + "\n1,64,32,20,16,1,1,fp8,balanced,1\n", "no usable"),
        (COLUMNS + "\n1e30,64,32,2,16,1,1,fp8,balanced,1\n", "no usable"),
    ],
)
def test_unusable_tables_are_refused(tmp_path: Path, text: str, message: str):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        cost_model(str(path))


def test_unreadable_files_are_refused(tmp_path: Path):
    with pytest.raises(PlanError, match="allowed are tokens, activated, or the path"):
        cost_model("latency")
    with pytest.raises(PlanError, match="takes no options"):
        cost_model("tokens", moe_dtype="fp8")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 not really")
    pytest.importorskip("pyarrow")
    with pytest.raises(PlanError, match="not a readable parquet"):
        cost_model(str(tmp_path / "t.parquet"))
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not a readable CSV"):
        cost_model(str(tmp_path / "t.csv"))
    large = tmp_path / "large.csv"
    with large.open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(PlanError, match="at most"):
        cost_model(str(large))


def test_expected_activated_is_that_of_draws():
    rng = np.random.default_rng(0)
    rate = np.array([0.0, 0.01, 0.1, 0.6, 1.0])
    drawn = (rng.random((4000, 20, 5)) < rate).any(1).mean(0)
    assert expected_activated(rate, 20) == pytest.approx(drawn, abs=0.02)


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        ("trtllm_1.3.0rc20_moe_perf", {"hidden_size": 7168, "inter_size": 2048, "num_experts": 256, "topk": 8}),
        ("trtllm_1.3.0rc20_moe_perf", {"hidden_size": 2880, "inter_size": 2880, "num_experts": 32}),
        ("sglang_0.5.10_wideep_generation_moe_perf", {}),
    ],
)
def test_real_tables_say_that_small_batches_are_bound_by_reading(shared_data: Path, table: str, columns: dict[str, int]):
    """One replica more costs a decode step, and nothing in a large prefill batch; tokens the other way round."""
    pytest.importorskip("pyarrow")
    path = shared_data / "routing" / "aiconfigurator_moe_latency" / f"h100_sxm_moe_{table}.parquet"
    if not path.is_file():
        pytest.skip(f"no latency table at {path}")
    model = cost_model(str(path), **columns)
    assert model.roofline.error < 0.15
    ranks = 8
    own = model.width / ranks

    def change(tokens: int, replicas: float, share: float) -> float:
        even = np.full(ranks, tokens * model.top_k / ranks)
        more = even + np.where(np.arange(ranks) == 0, share * even, -share * even / (ranks - 1))
        return float(model(more, np.full(ranks, own + replicas))[0] / model(even, np.full(ranks, own))[0] - 1)

    assert change(64, own / 4, 0.0) > 0.02
    assert change(64, 0, 0.3) == pytest.approx(0, abs=1e-9)
    if "generation" not in table:  # that one was timed for decode alone
        assert model.covers(np.full(ranks, 16_384 * model.top_k / ranks), np.full(ranks, own)).all()
        assert change(16_384, own / 4, 0.0) == pytest.approx(0, abs=1e-9)
        assert change(16_384, 0, 0.3) > 0.1
