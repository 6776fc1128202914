from __future__ import annotations

import pytest
import torch

from recipes_support import tiny_recipe_model


@pytest.fixture
def tiny():
    return tiny_recipe_model


@pytest.fixture
def ids():
    return torch.randint(2, 48, (3, 10), generator=torch.Generator().manual_seed(1))
