"""What a router chose in one forward of a layer, one entry per token and expert.

Shapes: T tokens, K top-k, S selections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Selections:
    """The selections of one forward.

    Attributes:
        tokens: T, also those without a selection.
        token_S: token of each selection.
        expert_S: its expert.
        weight_S: its gate weight.
    """

    tokens: int
    token_S: Tensor
    expert_S: Tensor
    weight_S: Tensor

    @classmethod
    def of(cls, expert_TK: Tensor, weight_TK: Tensor, within: int | None = None) -> Selections:
        """All selections, token by token.

        Args:
            expert_TK: chosen experts.
            weight_TK: their gate weights.
            within: leave out ids outside 0..within-1; None where there are none.
        """
        tokens, k = expert_TK.shape
        expert_S, weight_S = expert_TK.reshape(-1), weight_TK.reshape(-1)
        token_S = torch.arange(tokens * k, device=expert_S.device) // k
        if within is None:
            return cls(tokens, token_S, expert_S, weight_S)
        kept_S = ((expert_S >= 0) & (expert_S < within)).nonzero().squeeze(1)
        return cls(tokens, token_S[kept_S], expert_S[kept_S], weight_S[kept_S])
