from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.layers import find_moe_layers
from equipoise.models.recorder import record
from equipoise.profiling.self_sampled_search import (
    Balanced,
    Ebss,
    Plain,
    Prompts,
    ban_repeats,
    choose_branches,
    draw,
    imbalance,
    make_sampler,
)
from equipoise.profiling.self_sampled_stream import Stream, keeps_cache

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "switch")
NOTHING_BANNED = torch.zeros(300, dtype=torch.bool)
IDS = np.random.default_rng(0).integers(2, 300, (2, 6))


def nothing(tokens: int) -> None:
    """A step that is not shown."""


def prompts(size_B: int, size_W: int = 1, ends: frozenset[int] = frozenset()) -> Prompts:
    ids = np.random.default_rng(1).integers(2, 300, (size_B, size_W, 1))
    return Prompts(ids, None, NOTHING_BANNED, ends)


def counts_of(model, ids_RS: torch.Tensor, encoder_RS: torch.Tensor | None = None) -> np.ndarray:
    """[L, R, E] selections of each row, run alone and whole."""
    layers = find_moe_layers(model)
    rows = []
    for row in range(len(ids_RS)):
        with record(model) as recorder, torch.no_grad():
            if encoder_RS is None:
                model(input_ids=ids_RS[row : row + 1])
            else:
                model(input_ids=encoder_RS[row : row + 1], decoder_input_ids=ids_RS[row : row + 1])
        rows.append(recorder.counts.sum((0, 1)))
    assert rows[0].shape[0] == len(layers)
    return np.stack(rows, axis=1)


@given(st.lists(st.lists(st.integers(0, 50), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 3))
def test_imbalance_is_the_deviation_of_selections_per_token(counts, top_k):
    counts_LE = np.array(counts, float)
    width_L, top_k_L = np.full(len(counts), 4), np.full(len(counts), top_k)
    tokens_L = counts_LE.sum(1) / top_k
    wanted = [np.std(row / tokens, ddof=1) if tokens else 0.0 for row, tokens in zip(counts_LE, tokens_L, strict=True)]
    assert imbalance(counts_LE, width_L, top_k_L) == pytest.approx(np.mean(wanted))
    assert imbalance(7 * counts_LE, width_L, top_k_L) == pytest.approx(np.mean(wanted)), "it does not grow with the text"
    wider_LE = np.pad(counts_LE, ((0, 0), (0, 3)))
    assert imbalance(wider_LE, width_L, top_k_L) == pytest.approx(np.mean(wanted)), "padding is no expert"


@given(st.lists(st.lists(st.integers(0, 2), min_size=9, max_size=9), min_size=1, max_size=3), st.integers(2, 5))
def test_ban_repeats_bans_what_completes_a_stretch_seen_before(rows, size):
    scores = torch.zeros(len(rows), 3)
    ban_repeats(torch.tensor(rows), size, scores)
    for row, score in zip(rows, scores, strict=True):
        seen = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
        for token in range(3):
            assert (score[token] == -torch.inf) == ((*row[len(row) - size + 1 :], token) in seen)


def test_ban_repeats_leaves_short_rows_alone():
    scores = torch.zeros(1, 3)
    ban_repeats(torch.tensor([[1, 1]]), 3, scores)
    assert (scores == 0).all()


@pytest.mark.parametrize("top", [None, 3])
def test_draw_follows_the_distribution_inside_the_top(top):
    probability = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.15, 0.1])
    drawn = draw(probability.log().expand(20_000, -1), top, np.random.default_rng(0))
    share = torch.bincount(drawn, minlength=6) / len(drawn)
    wanted = probability.clone() if top is None else probability.where(probability >= 0.15, torch.tensor(0.0))
    assert share == pytest.approx(wanted / wanted.sum(), abs=0.015)
    assert share[2] == 0, "a token of no probability is never drawn"


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_one_sentence_takes_the_branch_of_the_smallest_objective(seed):
    rng = np.random.default_rng(seed)
    cost_BW, counts_BWLE = rng.random((1, 3)) * 5, rng.integers(0, 9, (1, 3, 2, 4)).astype(float)
    rest_LE = rng.integers(0, 50, (2, 4)).astype(float)
    width_L, top_k_L = np.array([4, 4]), np.array([2, 2])
    tau = 0.1
    objective = []
    for w in range(3):
        total_LE = rest_LE + counts_BWLE[0, w]
        tokens = (total_LE.sum(1) / 2).mean()
        objective.append(cost_BW[0, w] + tokens * imbalance(total_LE, width_L, top_k_L) / tau)
    assert choose_branches(cost_BW, counts_BWLE, rest_LE, width_L, top_k_L, tau) == [int(np.argmin(objective))]
    assert choose_branches(cost_BW, counts_BWLE, rest_LE, width_L, top_k_L, 1e9) == [int(cost_BW.argmin())]


def test_sentences_take_what_others_leave():
    # Two sentences, each may use expert 0 or expert 1 alone: balance is that they do not both use the same.
    counts_BWLE = np.array([[[[8.0, 0.0]], [[0.0, 8.0]]]] * 2)
    chosen = choose_branches(np.zeros((2, 2)), counts_BWLE, np.zeros((1, 2)), np.array([2]), np.array([1]), 0.1)
    assert sorted(chosen) == [0, 1]
    skewed = choose_branches(np.zeros((2, 2)), counts_BWLE, np.array([[99.0, 0.0]]), np.array([2]), np.array([1]), 0.1)
    assert skewed.tolist() == [1, 1]


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stream_counts_and_predicts_as_each_row_alone(make_model, family, cache):
    model = make_model(family)
    encoder = torch.from_numpy(IDS) if family == "switch" else None
    with Stream(model, cache=cache) as stream:
        logits = stream.start(torch.from_numpy(IDS[:, :3]), encoder)
        logits = stream.extend(torch.tensor([5, 9]))
        rows = torch.tensor([1, 0, 1, 0])
        stream.select(rows)
        encoder = None if encoder is None else encoder[rows]
        for new in ([4, 5, 6, 7], [8, 9, 10, 11]):
            logits = stream.extend(torch.tensor(new))
        last = torch.tensor([3, 0])
        stream.select(last)
        encoder = None if encoder is None else encoder[last]
        found, ids = stream.counts_LRE.numpy(), stream.ids_RS
    assert ids.tolist() == [[*IDS[0, :3], 5, 7, 11], [*IDS[1, :3], 9, 4, 8]]
    assert np.array_equal(found, counts_of(model, ids, encoder))
    with torch.no_grad():
        inputs = {"input_ids": ids} if encoder is None else {"input_ids": encoder, "decoder_input_ids": ids}
        wanted = model(**inputs).logits[:, -1]
    assert logits[last] == pytest.approx(wanted.numpy(), abs=2e-4)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_used_where_it_gives_the_same(make_model, family):
    assert keeps_cache(make_model(family), IDS) == (True, 300)
    assert keeps_cache(make_model(family).bfloat16(), IDS) == (True, 300)


def test_a_cache_that_forgets_which_row_is_which_is_found_out(make_model, monkeypatch):
    from transformers.cache_utils import Cache

    monkeypatch.setattr(Cache, "reorder_cache", lambda self, rows: self.batch_select_indices(torch.zeros(len(rows)).long()))
    assert keeps_cache(make_model("mixtral"), IDS) == (False, 300)

    def refuse(self, rows):
        raise NotImplementedError

    monkeypatch.setattr(Cache, "reorder_cache", refuse)
    assert keeps_cache(make_model("mixtral"), IDS) == (False, 300)


def test_a_model_without_a_language_head_is_refused(make_model):
    with pytest.raises(ModelError, match=r"no language-model head.*causal LM"):
        Stream(make_model("mixtral").model)


@pytest.mark.parametrize("sampler", [Balanced(width=3, top=8, stretch=3), Ebss(width=3), Plain()])
def test_what_is_written_is_counted_and_does_not_depend_on_the_cache(make_model, sampler):
    model = make_model("qwen2_moe")
    given = prompts(2, sampler.branches)
    written = []
    for cache in (True, False):
        with Stream(model, cache=cache) as stream:
            corpus = np.zeros((2, 6))
            written.append(sampler.write(stream, given, 8, corpus, np.random.default_rng(0), nothing))
    rows = [
        torch.from_numpy(np.concatenate([given.ids_BWS[b, branch], ids]))
        for b, (branch, ids) in enumerate(zip(written[0].branch_B, written[0].ids, strict=True))
    ]
    assert [len(row) for row in rows] == [9, 9]
    assert np.array_equal(written[0].counts_LE, counts_of(model, torch.stack(rows)).sum(1))
    assert [ids.tolist() for ids in written[0].ids] == [ids.tolist() for ids in written[1].ids]


def reference_ebss(model, first: int, width: int, tau: float, new: int) -> list[int]:
    """Algorithm 1 of MoEQuant in plain Python, every branch run whole at every step."""
    layers = find_moe_layers(model)
    width_L, top_k_L = np.array([x.num_experts for x in layers]), np.array([x.top_k for x in layers])

    def sigma(ids: list[int]) -> float:
        counts = counts_of(model, torch.tensor([ids]))[:, 0]
        usage = counts / len(ids)
        assert usage.sum(1) == pytest.approx(top_k_L)
        return float(
            np.mean([np.sqrt(((u[:n] - u[:n].mean()) ** 2).sum() / (n - 1)) for u, n in zip(usage, width_L, strict=True)])
        )

    beams: list[tuple[list[int], float]] = [([first], 0.0)]
    for _ in range(new):
        found = []
        for ids, likelihood in beams:
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            balance = sigma(ids) / tau  # of the branch as it is, not of the candidate
            for token, value in enumerate(scores.tolist()):  # all of the vocabulary, not only the likeliest
                found.append((-(likelihood + value) / (len(ids) + 1) + balance, [*ids, token], likelihood + value))
        beams = [(ids, likelihood) for _, ids, likelihood in sorted(found)[:width]]
    return min(beams, key=lambda beam: -beam[1] / len(beam[0]) + sigma(beam[0]) / tau)[0]


@pytest.mark.parametrize(("width", "tau"), [(1, 1.2), (3, 1.2), (3, 0.02)])
def test_ebss_is_the_published_search(make_model, width, tau):
    model = make_model("mixtral")
    given = prompts(3)
    with Stream(model) as stream:
        written = Ebss(width=width, tau=tau).write(stream, given, 6, np.zeros((2, 4)), np.random.default_rng(0), nothing)
    for start, ids in zip(given.ids_BWS[:, 0, 0], written.ids, strict=True):
        assert [int(start), *ids] == reference_ebss(model, int(start), width, tau, 6)


def test_balanced_text_repeats_no_stretch(make_model):
    model = make_model("mixtral")
    with torch.no_grad():  # a model that would say the same few words for ever
        model.lm_head.weight.mul_(20)
    repeats = []
    for ngram in (0, 3):
        sampler = Balanced(width=2, top=4, stretch=4, ngram=ngram)
        with Stream(model) as stream:
            written = sampler.write(stream, prompts(3, 2), 60, np.zeros((2, 4)), np.random.default_rng(0), nothing)
        grams = [[tuple(ids[i : i + 3]) for i in range(len(ids) - 2)] for ids in written.ids]
        repeats.append(sum(len(g) - len(set(g)) for g in grams))
    assert repeats[0] > 0, "the model does repeat itself"
    assert repeats[1] == 0


def test_more_branches_and_a_smaller_tau_balance_more(make_model):
    model = make_model("mixtral")
    found = {}
    for name, sampler in {"one": Balanced(width=1), "four": Balanced(width=4), "likely": Balanced(width=4, tau=1e6)}.items():
        with Stream(model) as stream:
            start = prompts(8, sampler.width)
            written = sampler.write(stream, start, 48, np.zeros((2, 4)), np.random.default_rng(0), nothing)
        found[name] = imbalance(written.counts_LE, np.array([4, 4]), np.array([2, 2]))
    assert found["four"] < 0.6 * found["one"]
    assert found["four"] < 0.6 * found["likely"]


def test_plain_text_is_drawn_from_the_models_own_distribution(make_model):
    model = make_model("mixtral")
    given = Prompts(np.full((4000, 1, 1), 7), None, NOTHING_BANNED)
    with Stream(model) as stream:
        written = Plain().write(stream, given, 1, np.zeros((2, 4)), np.random.default_rng(0), nothing)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[7]])).logits[0, -1].softmax(-1).numpy()
    share = np.bincount([ids[0] for ids in written.ids], minlength=300) / 4000
    expected_noise = np.sqrt(wanted * (1 - wanted) / 4000)
    assert (np.abs(share - wanted) < 5 * expected_noise + 1e-3).all()


def test_plain_text_ends_where_the_model_ends_it(make_model):
    model = make_model("mixtral")
    banned = torch.ones(300, dtype=torch.bool)
    banned[[0, 11, 12]] = False
    given = Prompts(np.full((40, 1, 1), 7), None, banned, frozenset({0}))
    seen = []
    with Stream(model) as stream:
        written = Plain().write(stream, given, 12, np.zeros((2, 4)), np.random.default_rng(0), seen.append)
    assert all(0 not in ids[:-1] and (ids[-1] == 0 or len(ids) == 12) for ids in written.ids)
    assert len({len(ids) for ids in written.ids}) > 1
    assert sum(seen) == sum(map(len, written.ids)), "a sentence that has ended is not run on"
    rows = [torch.tensor([[7, *ids]]) for ids in written.ids]
    assert np.array_equal(written.counts_LE, sum(counts_of(model, row)[:, 0] for row in rows))


def test_logits_that_are_not_numbers_are_refused(make_model):
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)  # finite weights that overflow
    with pytest.raises(ModelError, match="logits are not finite"), Stream(model) as stream:
        stream.start(torch.from_numpy(IDS))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("balance", {}, "unknown sampler 'balance'.*balanced"),
        ("balanced", {"widht": 2}, "no option 'widht'; it has: width, top"),
        ("balanced", {"width": 0}, "option width is 0; it must be a whole number of at least 1"),
        ("balanced", {"stretch": 2.5}, "stretch is 2.5; it must be a whole number"),
        ("balanced", {"top": "many"}, "top is many; it must be a whole number"),
        ("balanced", {"ngram": 1}, "ngram is 1; it must be a whole number of at least 2"),
        ("balanced", {"tau": 0}, "tau is 0; it must be a number of at least 1e-06"),
        ("ebss", {"tau": float("nan")}, "tau is nan"),
        ("plain", {"tau": 1}, "no option 'tau'; it has: none"),
    ],
)
def test_mistakes_in_options_are_named(name, options, message):
    with pytest.raises(EquipoiseError, match=message):
        make_sampler(name, options)
