"""Traces: what is read, what is refused, and the batches that are made of them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.cases import make_model, random_ids
from equipoise.errors import ProfileError
from equipoise.simulation.trace import Trace, batches_of, load_trace

MODEL = make_model(3, 8, 2)


def ids_of(tokens: int, seed: int = 0) -> np.ndarray:
    """[L, T, K] for the model above."""
    return random_ids(np.random.default_rng(seed), 3, tokens, 2, 8).astype(np.uint8)


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def test_both_layouts_and_documents(tmp_path: Path):
    ids = ids_of(10)
    one = load_trace(write(tmp_path / "a.npz", topk_ids=ids, seq_lens=np.array([4, 0, 6])), MODEL)
    other = load_trace(write(tmp_path / "b.npz", topk_ids=ids.transpose(1, 0, 2), doc=one.document_T), MODEL)
    assert (one.ids_LTK == ids).all()
    assert (other.ids_LTK == ids).all()
    assert one.document_T.tolist() == [0] * 4 + [2] * 6
    assert other.document_T.tolist() == one.document_T.tolist()
    assert one.sha256 == other.sha256
    assert load_trace(write(tmp_path / "c.npz", topk_ids=ids), MODEL).document_T.tolist() == [0] * 10


def test_what_vllm_returns_counts_dense_layers(tmp_path: Path):
    """Routing of all transformer layers, dense ones as zeros, and the lengths of requests."""
    facts = tuple(layer.model_copy(update={"model_layer": i + 2}) for i, layer in enumerate(MODEL.layers))
    model = MODEL.model_copy(update={"layers": facts, "hidden_layers": 5})
    ids = ids_of(10)
    routed = np.zeros((10, 5, 2), np.int32)
    routed[:, 2:] = ids.transpose(1, 0, 2)
    path = write(tmp_path / "v.npz", routed_experts=routed, tokens=np.array([7, 3]), prompt_tokens=np.ones(2))
    trace = load_trace(path, model)
    assert (trace.ids_LTK == ids).all()
    assert trace.document_T.tolist() == [0] * 7 + [1] * 3


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": ids_of(4)}, "no array 'topk_ids'"),
        ({"topk_ids": ids_of(4)[0]}, "shape"),
        ({"topk_ids": ids_of(4).astype(float)}, "float64"),
        ({"topk_ids": ids_of(4)[:2]}, "2 MoE layers"),
        ({"topk_ids": ids_of(4)[:, :, :1]}, "top-1"),
        ({"topk_ids": ids_of(4) + 8}, "names expert"),
        ({"topk_ids": ids_of(4).astype(int) - 1}, "names expert -1"),
        ({"topk_ids": np.zeros((3, 4, 2), int)}, "one expert twice"),
        ({"topk_ids": ids_of(4), "seq_lens": np.array([3])}, "add up to 3"),
        ({"topk_ids": ids_of(4), "seq_lens": np.array([5, -1])}, "add up to 4|seq_lens"),
        ({"topk_ids": ids_of(4), "document": np.arange(3)}, "3 entries for 4 tokens"),
        ({"topk_ids": ids_of(4), "document": np.ones(4)}, "float64"),
        ({"topk_ids": np.array([{}, {}], object)}, "not a readable"),
    ],
)
def test_refused_with_the_reason(tmp_path: Path, arrays: dict[str, np.ndarray], message: str):
    with pytest.raises(ProfileError, match=message):
        load_trace(write(tmp_path / "bad.npz", **arrays), MODEL)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "bomb.npz", topk_ids=np.zeros((3, 500_000, 2), np.uint8))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr("equipoise.simulation.trace.MOST_BYTES", 1_000_000)
    with pytest.raises(ProfileError, match=r"unpacks to 3,000,128 bytes"):
        load_trace(path, MODEL)


def test_a_header_that_lies_about_its_size(tmp_path: Path):
    """An array that claims to be larger than its bytes is refused before memory is taken for it."""
    data = io.BytesIO()
    np.lib.format.write_array_header_1_0(data, {"descr": "<i8", "fortran_order": False, "shape": (3, 10**11, 2)})
    path = tmp_path / "lie.npz"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("topk_ids.npy", data.getvalue() + bytes(64))
    with pytest.raises(ProfileError, match="not a readable"):
        load_trace(path, MODEL)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_broken_files_are_refused_not_crashed_on(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    path = write(tmp_path_factory.mktemp("broken") / "t.npz", topk_ids=ids_of(30), seq_lens=np.array([10, 20]))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["cut", "flip", "random"]))
    if kind == "cut":
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "flip":
        for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=6)):
            content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = bytearray(data.draw(st.binary(max_size=300)))
    path.write_bytes(bytes(content))
    try:
        trace = load_trace(path, MODEL)
    except ProfileError:
        return
    assert (trace.ids_LTK == ids_of(30)).all()  # what was hit did not matter


def test_prefill_batches_are_consecutive_tokens_of_shuffled_documents():
    ids = ids_of(40)
    trace = Trace("t", ids, np.repeat(np.arange(4), 10))
    made = batches_of(trace, 10, "prefill", 99, seed=1)
    assert made.shape == (3, 4, 10, 2)
    documents = [ids[:, 10 * d : 10 * (d + 1)] for d in range(4)]
    found = [next(d for d in range(4) if (documents[d] == made[:, b]).all()) for b in range(4)]
    assert sorted(found) == [0, 1, 2, 3]


def test_decode_batches_take_one_token_of_every_lane():
    ids = np.tile(np.arange(8, dtype=np.uint8).repeat(5)[None, :, None], (3, 1, 1))  # document d always chooses expert d
    trace = Trace("t", ids, np.repeat(np.arange(8), 5))
    made = batches_of(trace, 8, "decode", 99, seed=0)
    assert made.shape == (3, 5, 8, 1)
    assert all(sorted(made[0, b, :, 0].tolist()) == list(range(8)) for b in range(5))


def test_batches_are_thinned_evenly_and_need_enough_tokens():
    trace = Trace("t", ids_of(100), np.zeros(100, int))
    assert batches_of(trace, 5, "prefill", 4, 0).shape[1] == 4
    assert (batches_of(trace, 5, "prefill", 4, 0)[:, [0, -1]] == batches_of(trace, 5, "prefill", 20, 0)[:, [0, -1]]).all()
    with pytest.raises(ProfileError, match="100 tokens, fewer than one batch of 101"):
        batches_of(trace, 101, "prefill", 4, 0)


def test_select_keeps_whole_tokens():
    trace = Trace("t", ids_of(6), np.array([0, 0, 1, 1, 2, 2]))
    part = trace.select(trace.document_T != 1)
    assert part.document_T.tolist() == [0, 0, 2, 2]
    assert (part.ids_LTK == ids_of(6)[:, [0, 1, 4, 5]]).all()
