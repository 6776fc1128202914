"""The logic behind the paper's findings: how items are padded and counted, what scores are held against, what is kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from equipoise.metrics import lis
from equipoise.profiling.sequences import IGNORED, Framing, Rows


@pytest.fixture(scope="module")
def scripts(script) -> SimpleNamespace:
    names = {
        "common": "common",
        "batch": "findings_batch",
        "importance": "findings_importance",
        "calibration": "findings_calibration",
    }
    return SimpleNamespace(**{short: script(name) for short, name in names.items()})


def rows(*lengths: int, decoder_start: int | None = None) -> Rows:
    content = tuple(np.arange(1, length + 1) + 10 * i for i, length in enumerate(lengths))
    return Rows("items", content, tuple(range(len(lengths))), Framing((), (), decoder_start, None, 0))


# ---- finding (i) ----------------------------------------------------------------------------------------------------


def test_left_padding_holds_the_same_tokens_behind_the_padding(scripts: Any) -> None:
    (right,) = scripts.batch.arranged(rows(3, 1, 2), 3, "right", "given")
    (left,) = scripts.batch.arranged(rows(3, 1, 2), 3, "left", "given")
    assert left.input_ids.tolist() == [[1, 2, 3], [0, 0, 11], [0, 21, 22]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert left.labels.tolist() == [[2, 3, IGNORED], [IGNORED] * 3, [IGNORED, 22, IGNORED]]
    assert right.attention_mask.sum() == left.attention_mask.sum()


def test_left_padding_of_an_encoder_decoder_moves_each_stack_by_its_own_mask(scripts: Any) -> None:
    (left,) = scripts.batch.arranged(rows(4, 2, decoder_start=99), 2, "left", "given")
    assert left.input_ids.tolist() == [[1, 2], [0, 11]]
    assert left.decoder_input_ids.tolist() == [[99, 3, 4], [0, 99, 12]]
    assert left.decoder_attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert left.labels.tolist() == [[3, 4, IGNORED], [IGNORED, 12, IGNORED]]


def test_sorting_by_length_needs_less_padding(scripts: Any) -> None:
    def padding(order: str) -> int:
        batches = scripts.batch.arranged(rows(9, 1, 8, 2), 2, "right", order)
        return sum(int((batch.attention_mask == 0).sum()) for batch in batches)

    assert (padding("given"), padding("sorted")) == (14, 2)


def test_padding_moves_the_counted_reading_and_not_the_masked_one(scripts: Any) -> None:
    real = np.array([[[3, 1]], [[1, 3]]])
    padded = real + np.array([[[4, 0]], [[0, 0]]])
    found = scripts.batch.Counted(padded, real).readings(lis)
    assert found == {
        "padding counted": pytest.approx(2 * 8 / 12),
        "padding masked": 1.0,
        "mean of batches, counted": pytest.approx((2 * 7 / 8 + 1.5) / 2),
        "mean of batches, masked": 1.5,
    }


def test_no_less_padding_explains_a_rise_of_lis(scripts: Any) -> None:
    real, bound = np.array([3.0, 1.0]), 2.0
    share = scripts.batch.least_padding(float(lis(real)), 1.75, bound)
    padding = real.sum() * share / (1 - share)
    assert lis(real + np.array([padding, 0.0])) == pytest.approx(1.75)  # to the busiest expert: just enough
    assert lis(real + np.array([0.0, padding])) < 1.75


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"question": "Q?", "choices": ["x", "y"], "label": 1}, "Q?\nA. x\nB. y\nAnswer: y"),
        ({"question": "Q?", "answer": "#### 18"}, "Question: Q?\nAnswer: #### 18"),
        ({"context": "He", "choices": ["ran.", "sat."], "label": 0}, "He ran."),
        ({"sentence": "So _ won.", "choices": ["Ann", "Bo"], "label": 1}, "So Bo won."),
        ({"question": "Q?", "mc1_choices": ["x", "y"]}, "Q?\nA. x\nB. y\nAnswer: x"),
    ],
)
def test_an_item_is_told_with_its_right_answer(scripts: Any, row: dict[str, Any], text: str) -> None:
    assert scripts.batch.as_text(row) == text


# ---- finding (ii) ---------------------------------------------------------------------------------------------------

SCORE = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 9.0, 9.0]])
TRUTH = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 9.0, 9.0]])
WIDTHS = [4, 2]


def test_correlations_leave_absent_experts_out_and_have_none_where_nothing_varies(scripts: Any) -> None:
    assert scripts.importance.correlations(SCORE, TRUTH, WIDTHS) == [pytest.approx(1.0), None]
    assert scripts.importance.correlations(-SCORE, TRUTH, WIDTHS)[0] == pytest.approx(-1.0)


def test_where_a_pick_stands_by_the_truth(scripts: Any) -> None:
    assert scripts.importance.standing(SCORE, TRUTH, WIDTHS, "least") == [0.0, 1.0]
    assert scripts.importance.standing(SCORE, TRUTH, WIDTHS, "most") == [1.0, 1.0]
    assert scripts.importance.standing(SCORE, np.zeros((2, 4)), WIDTHS, "most") == [0.5, 0.5]


def test_chosen_experts_are_of_the_layer_and_of_its_own_number(scripts: Any) -> None:
    half = lambda width: width // 2  # noqa: E731
    assert scripts.importance.chosen(SCORE, WIDTHS, half, "least") == [[0, 1], [0]]
    assert scripts.importance.chosen(SCORE, WIDTHS, half, "most") == [[2, 3], [1]]


def test_an_inverted_score_reads_the_other_end_and_draws_give_their_range(scripts: Any) -> None:
    cases = {"one/least/zero": [1.1, 1.1], "one/most/zero": [1.5, 1.5]}
    found = {
        "base": [1.0, 1.0],
        "predicted": [1, 1],
        "removals": {"wanda, as published": cases, "random 0": cases, "random 1": {"one/least/zero": [1.3, 1.3]}},
    }
    told = {
        name: scripts.importance.change(found, name, "one", "least", "zero")
        for name in ("wanda, as published", "wanda, inverted", "random")
    }
    assert told["wanda, as published"].value == pytest.approx(np.expm1(0.1))
    assert told["wanda, inverted"].value == pytest.approx(np.expm1(0.5))
    assert (told["random"].low, told["random"].high) == (pytest.approx(np.expm1(0.1)), pytest.approx(np.expm1(0.3)))


# ---- finding (iii) --------------------------------------------------------------------------------------------------


def test_shared_counts_the_largest_of_each_layer(scripts: Any) -> None:
    other = np.array([[4.0, 3.0, 2.0, 9.0], [1.0, 2.0, 0.0, 0.0]])
    assert scripts.calibration.shared(SCORE, SCORE, WIDTHS, lambda width: width // 2) == 1.0
    assert scripts.calibration.shared(SCORE, other, WIDTHS, lambda width: width // 2) == pytest.approx((0.5 + 0.0) / 2)


def test_overlaps_take_the_heaviest_and_the_least_important(scripts: Any) -> None:
    names = list(scripts.calibration.LESS_IMPORTANT)
    whole = {"heaviest": [[6, 3, 1, 0]], **{name: [[4.0, 3.0, 2.0, 1.0]] for name in names}}
    sample = {"heaviest": [[2, 0, 1, 0]], names[0]: [[9.0, 8.0, 7.0, 6.0]], names[1]: [[1.0, 8.0, 7.0, 6.0]]}
    found = scripts.calibration.overlaps(sample, whole, [4])
    assert (found["heaviest"], found[names[0]], found[names[1]]) == (1.0, 1.0, 0.0)
    assert found["seen"] == pytest.approx(7 / 10)


def test_each_sample_is_held_against_all_text_of_the_judged_domain(scripts: Any) -> None:
    def figures(heaviest: list[int]) -> dict[str, Any]:
        scores = {name: [[1.0, 2.0]] for name in scripts.calibration.LESS_IMPORTANT}
        reached = {domain: dict.fromkeys(scripts.calibration.REACHED, 1.5) for domain in ("a", "b")}
        return {"tokens": 9, "widths": [2], "heaviest": [heaviest], **scores, "reached": reached}

    found = {("a", 1.0, 0): figures([5, 4]), ("a", 100.0, 0): figures([5, 4]), ("b", 100.0, 0): figures([1, 8])}
    told = list(scripts.calibration.rows("m", found, 0))
    first = {(row["source"], row["target"]): row["heaviest"] for row in told if row["percent"] == 1.0}
    assert first == {("a", "a"): 1.0, ("a", "b"): 0.0}
    assert scripts.calibration.cell(told, "rq", True, False) == "1.50"
    assert scripts.calibration.cell(told, "heaviest", False, True) == "0"


# ---- what all share -------------------------------------------------------------------------------------------------


def test_excerpts_take_every_domain_in_turn_and_repeat_with_the_seed(scripts: Any) -> None:
    texts = {"a": ["a" * 30, "short"], "b": ["b" * 5]}
    found = scripts.common.excerpts(texts, 2, seed=3, characters=10)
    assert found == ["a" * 10, "b" * 5] * 2
    longer = {"a": ["".join(map(chr, range(97, 123)))]}
    assert scripts.common.excerpts(longer, 3, 1, 4) == scripts.common.excerpts(longer, 3, 1, 4)
    assert len(set(scripts.common.excerpts(longer, 3, 1, 4))) > 1


def test_a_cell_is_found_once_for_each_model_and_key(scripts: Any, tmp_path: Path) -> None:
    cells, calls = scripts.common.Cells(tmp_path, "part"), []

    def make() -> int:
        calls.append(1)
        return len(calls)

    subject = SimpleNamespace(name="m", identity="1")
    assert [cells.get(subject, {"a": 1}, make), cells.get(subject, {"a": 1}, make), cells.get(subject, {"a": 2}, make)] == [
        1,
        1,
        2,
    ]
    assert cells.get(SimpleNamespace(name="m", identity="2"), {"a": 1}, make) == 3


def test_other_weights_or_another_dtype_are_another_model(scripts: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    first = scripts.common.Subject(str(tmp_path))
    assert first.name == tmp_path.name
    assert first.identity == scripts.common.Subject(str(tmp_path)).identity
    assert first.identity != scripts.common.Subject(str(tmp_path), "fp32").identity
    (tmp_path / "model.safetensors").write_bytes(b"1235")
    assert first.identity != scripts.common.Subject(str(tmp_path)).identity
