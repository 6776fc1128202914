"""The scripts of benchmarks/, which are no package."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """Import a script of benchmarks/ or of benchmarks/paper/ by its name."""

    def load(name: str) -> ModuleType:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(BENCHMARKS / "paper"))
            patch.syspath_prepend(str(BENCHMARKS))
            return importlib.import_module(name)

    return load
