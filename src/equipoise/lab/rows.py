"""Which rows a training step sees: a function of the recipe and the step alone, so that a resumed run sees the same.

A row is one packed stretch of a domain's stream. Shapes: B rows of a step, D domains.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.lab.recipe import RecipeError
from equipoise.lab.text import Stream
from equipoise.profiling.sequences import IGNORED, Batch, Framing, Rows

GOLDEN = (5**0.5 - 1) / 2


class RowOrder:
    """Rows of every step, each of one domain, in proportions that hold over any stretch of steps.

    Attributes:
        domains: names, by index.
        tokens: of one step, special ones counted.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        weights: Mapping[str, float],
        framing: Framing,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        encoder_fractions: Sequence[float] = (0.5,),
        text_tokens: int | None = None,
    ) -> None:
        self.domains = tuple(streams)
        self._streams = streams
        self._framing = framing
        self._size = seq_len - framing.overhead
        self._batch_size = batch_size
        self._fractions = tuple(encoder_fractions)
        self._seed = seed
        self.tokens = batch_size * seq_len
        short = [name for name, stream in streams.items() if stream.size < self._size]
        if short:
            raise RecipeError(f"domain '{short[0]}' has fewer than the {self._size} tokens of one row; give it more text.")
        edges_D = np.cumsum([weights[name] for name in self.domains])
        self._edges_D = edges_D / edges_D[-1]
        share_D = np.diff(self._edges_D, prepend=0.0)
        most_D = np.full(share_D.size, np.inf) if text_tokens is None else np.ceil(share_D * text_tokens / self._size)
        self._used = [int(min(streams[name].size // self._size, most)) for name, most in zip(self.domains, most_D, strict=True)]
        self._start = np.random.default_rng(seed).random()
        self._orders: dict[tuple[int, int], NDArray[np.int64]] = {}
        self._before = np.zeros(len(self.domains), np.int64)
        self._counted = 0

    def step_domains(self, step: int) -> NDArray[np.int64]:
        """[B] index of the domain of each row of a step (from 0)."""
        return self._domains_of(np.arange(step * self._batch_size, (step + 1) * self._batch_size))

    def content(self, step: int) -> NDArray[np.int64]:
        """[B, S] token ids of the rows of a step (from 0), without special tokens around them."""
        self._count_up_to(step * self._batch_size)
        before_D = self._before.copy()
        rows = []
        for domain in self.step_domains(step):
            rows.append(self._row(int(domain), int(before_D[domain])))
            before_D[domain] += 1
        return np.stack(rows)

    def batch(self, step: int) -> Batch:
        """The rows of a step (from 0) as arguments of one forward pass."""
        return self._batch(self.content(step), self._fractions[step % len(self._fractions)])

    def _batch(self, content_BS: NDArray[np.int64], fraction: float) -> Batch:
        """Full rows, nothing padded: every token predicts the next, or the decoder continues what the encoder read."""
        rows = content_BS.shape[0]
        framing = self._framing
        prefix, suffix = (np.tile(np.array(part, np.int64), (rows, 1)) for part in (framing.prefix, framing.suffix))
        none = np.full((rows, 1), IGNORED)
        if framing.decoder_start is None:
            ids = np.hstack([prefix, content_BS])
            return Batch("mix", ids, np.ones_like(ids), np.hstack([ids[:, 1:], none]))
        cut = min(max(round(fraction * self._size), 1), self._size - 1)
        ids = np.hstack([prefix, content_BS[:, :cut], suffix])
        start = np.full((rows, 1), framing.decoder_start)
        decoder = np.hstack([start, content_BS[:, cut:]])
        labels = np.hstack([content_BS[:, cut:], none])
        return Batch("mix", ids, np.ones_like(ids), labels, decoder, np.ones_like(decoder))

    def _domains_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        # Multiples of the golden ratio fill every interval in proportion to its length, over any stretch of rows.
        return np.searchsorted(self._edges_D, (self._start + rows * GOLDEN) % 1.0, side="right").clip(max=len(self.domains) - 1)

    def _count_up_to(self, row: int) -> None:
        """Bring the count of each domain's earlier rows to a row of the run."""
        if row < self._counted:
            self._before[:], self._counted = 0, 0
        self._before += np.bincount(self._domains_of(np.arange(self._counted, row)), minlength=len(self.domains))
        self._counted = row

    def _row(self, domain: int, turn: int) -> NDArray[np.int64]:
        """The stretch that a domain gives at its n-th turn: those that are used in a shuffled order, then again in another."""
        name = self.domains[domain]
        used = self._used[domain]
        epoch, place = divmod(turn, used)
        if (domain, epoch) not in self._orders:
            first, rng = (np.random.default_rng([self._seed, zlib.crc32(name.encode()), number]) for number in (0, epoch))
            chosen = first.permutation(self._streams[name].size // self._size)[:used]
            self._orders[domain, epoch] = chosen if epoch == 0 else np.sort(chosen)[rng.permutation(used)]
        start = int(self._orders[domain, epoch][place]) * self._size
        return self._streams[name][start : start + self._size].astype(np.int64)


def heldout_rows(streams: Mapping[str, Stream], framing: Framing, *, seq_len: int, rows: int | None) -> dict[str, Rows]:
    """Domain -> packed rows of held-out text, evenly spread over its stream; all of them when `rows` is None."""
    size = seq_len - framing.overhead
    chosen: dict[str, Rows] = {}
    for name, stream in streams.items():
        stretches = stream.size // size
        if not stretches:
            raise RecipeError(f"held-out domain '{name}' has fewer than the {size} tokens of one row; give it more text.")
        picked = np.unique(np.linspace(0, stretches - 1, min(rows or stretches, stretches)).round().astype(int))
        content = tuple(stream[i * size : (i + 1) * size].astype(np.int64) for i in picked)
        chosen[name] = Rows(name, content, tuple(range(len(content))), framing)
    return chosen
