"""What transformers must know to run balanced models, told to it when it is imported, so that importing us stays light."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import wrapt


def register_on_import() -> None:
    """Register our quantizer as soon as transformers' quantizers are imported, or at once if they are."""
    wrapt.register_post_import_hook(_register_quantizer, "transformers.quantizers.auto")


def _register_quantizer(_: Any) -> None:
    # It registers itself. Being imported first, it is what imports transformers, and is then not yet ready here.
    import_module("equipoise.execution.hf_quantizer")
