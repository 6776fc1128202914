"""What the page of `quantization_peers.py` says of the fresh process that read a tool's files back."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def page(script) -> ModuleType:
    return script("peers_page")


WHOLE = {"missing": 0, "unexpected": 0, "mismatched": 0}


@pytest.mark.parametrize(
    ("reads", "distances", "cell"),
    [
        ([WHOLE, WHOLE], [0.01, 0.02], "yes, logits 0.020 away"),
        ([WHOLE | {"only": "some_setting=1"}], [0.01], "yes with `some_setting=1` alone, logits 0.010 away"),
        ([WHOLE | {"unexpected": 3}], [2.5], "**no**: 0 tensors missing, 3 unexpected, logits 2.5 away"),
        ([WHOLE, WHOLE], [0.01, 1.5], "**no**: 0 tensors missing, 0 unexpected, logits 1.5 away"),
        ([{"matrices": 96}], [None], "no checkpoint: rounded matrix by matrix"),
        ([WHOLE, {"error": "RuntimeError: no such operator"}], [0.01], "**fails**: RuntimeError: no such operator"),
    ],
)
def test_reloading_is_told_as_it_went(page: ModuleType, reads: list[dict], distances: list[float | None], cell: str) -> None:
    results = [{"quantize": {}, "read": read} for read in reads]
    assert page.Entry("model", "int8", "torchao", "rtn", results, None, distances).reload() == cell


def test_every_contender_has_a_name_and_a_driver(script) -> None:
    peers = script("quantization_peers")
    for tool, _ in peers.CONTENDERS:
        assert tool in script("peers_page").NAMES
        assert (peers.DRIVERS / f"{tool}_driver.py").is_file()
        assert tool == "equipoise" or "torch==" in (peers.DRIVERS / f"{tool}.txt").read_text()
