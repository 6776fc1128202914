"""Text and helpers that tests of several rooms share."""

from __future__ import annotations

import numpy as np

WORDS = [
    "the",
    "a",
    "tree",
    "runs",
    "over",
    "blue",
    "water",
    "and",
    "small",
    "birds",
    "sing",
    "in",
    "old",
    "stone",
    "houses",
    "while",
    "code",
    "returns",
    "zero",
    "or",
    "one",
    "two",
]


def corpus(seed: int, documents: int = 12, words: int = 60) -> list[str]:
    """Documents of random words, a little different in kind for each seed."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(WORDS)))
    return [" ".join(rng.choice(WORDS, words, p=weights)) for _ in range(documents)]


def refused(result: tuple[int, str, str], message: str) -> None:
    """One clear line on standard error, exit status 1, no traceback: how a command ends that a user got wrong."""
    status, _, err = result
    assert status == 1, err
    assert err.count("\n") == 1, err
    assert err.startswith("error: "), err
    assert "Traceback" not in err
    assert message in err
