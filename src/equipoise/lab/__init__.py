"""Small models with known properties, and the harness that trains them. For study and for tests, never plug-and-play.

load("qwen3-32") -> model, tokenizer       a model of the shelf
names()                                    what is on it
"""

from __future__ import annotations

from equipoise.lab.shelf import load, names, path

__all__ = ["load", "names", "path"]
