"""What the scripts of this folder share: models by name, text inside and outside of a domain, figures that are kept, pages.

    python benchmarks/paper/SCRIPT.py --data DIRECTORY --write docs/paper.md              # the models of the shelf
    python benchmarks/paper/SCRIPT.py --data DIRECTORY --models reference                 # the embedded reference model
    python benchmarks/paper/SCRIPT.py --data DIRECTORY --models HUB/NAME or/a/directory   # any that transformers runs

`--data` is the directory that the lab's mix is relative to; without it, text and evaluation sets of the demo are used, which
need nothing but the package index. What was measured is kept in `--out` under the weights, text and settings that gave it, and
not measured again. A figure that the paper printed is marked as quoted wherever it is shown; all others were measured here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # beside what the other benchmarks share

import numpy as np
import torch
import transformers
from quantization_page import write_between
from shelf import texts

from equipoise.artifacts.files import write_atomic
from equipoise.lab import shelf
from equipoise.models.layers import MoELayer, find_moe_layers, model_facts
from equipoise.models.reference import reference_model_dir
from equipoise.profiling.loading import load_model, load_tokenizer
from equipoise.profiling.sequences import Framing

__all__ = [
    "CHARACTERS", "SHELF", "Cells", "Subject", "arguments", "digest", "excerpts", "machine", "publish", "quoted", "subjects",
    "texts",
]  # fmt: skip

SHELF = ("mixtral-8", "qwen3-32", "deepseek-64", "switch-8", "switch-16")
REFERENCE = "reference"
CHARACTERS = 1000
"""Of an excerpt: about 256 tokens."""
SAMPLED = 1 << 20
"""Bytes at either end of a weights file that tell it from another one."""


class Subject:
    """A model by name: one of the shelf, "reference", a directory, or a hub name. It is loaded when it is first used.

    Attributes:
        name: as tables show it.
        directory: what `from_pretrained` is given.
        dtype: "auto" (as stored), "fp32", "bf16" or "fp16".
    """

    def __init__(self, name: str, dtype: str = "auto") -> None:
        self.dtype = dtype
        if name == REFERENCE:
            self.name, self.directory = name, str(reference_model_dir())
        elif name in SHELF:
            self.name, self.directory = name, str(shelf.path(name))
        else:
            self.name, self.directory = name.rstrip("/").rsplit("/", 1)[-1], name

    @cached_property
    def model(self) -> Any:
        """In evaluation mode."""
        return self.fresh()

    @cached_property
    def tokenizer(self) -> Any:
        """Of the model."""
        return load_tokenizer(self.directory)

    @cached_property
    def framing(self) -> Framing:
        """Special tokens around text."""
        return Framing.of(self.tokenizer, self.model.config)

    @cached_property
    def layers(self) -> Sequence[MoELayer]:
        """The MoE layers."""
        return find_moe_layers(self.model)

    @cached_property
    def facts(self) -> Any:
        """What profiles and plans know of the model."""
        return model_facts(self.model, self.name, self.layers)

    def fresh(self) -> Any:
        """Another instance, to be changed."""
        return load_model(self.directory, dtype=self.dtype)

    @cached_property
    def identity(self) -> str:
        """Changes with the weights and the dtype; a hub name stands for itself."""
        digest = hashlib.sha256(f"{self.dtype}\0".encode())
        place = Path(self.directory)
        if not place.is_dir():
            digest.update(self.directory.encode())
        for file in sorted([*place.glob("*.safetensors"), *place.glob("config.json")]) if place.is_dir() else ():
            size = file.stat().st_size
            with file.open("rb") as stream:
                digest.update(f"{file.name}\0{size}\0".encode() + stream.read(SAMPLED))
                stream.seek(max(size - SAMPLED, 0))
                digest.update(stream.read(SAMPLED))
        return digest.hexdigest()[:16]


class Cells:
    """Figures in a directory, each found once for what it depends on."""

    def __init__(self, out: Path, part: str) -> None:
        self.place = out / part

    def get(self, subject: Subject, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What an earlier run found for the same model and key, or what `make` finds.

        Args:
            subject: the model; other weights under the same name are another model.
            key: whatever else the figures depend on, as JSON.
            make: gives figures that JSON can hold.
        """
        full = {"model": subject.name, "identity": subject.identity, **key}
        readable = "-".join(str(value) for value in (subject.name, *key.values()) if isinstance(value, str | int | float))
        digest = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:10]
        path = self.place / f"{re.sub(r'[^A-Za-z0-9.,_-]+', '_', readable)[:100]}-{digest}.json"
        if not path.is_file():
            write_atomic(path, json.dumps({"key": full, "found": make()}, indent=1))
            print(f"{path.stem}", file=sys.stderr, flush=True)
        return json.loads(path.read_text(encoding="utf-8"))["found"]

    def keep(self, name: str, found: Any) -> None:
        """Write all figures of a table as one file."""
        write_atomic(self.place / f"{name}.json", json.dumps(found, indent=1))


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """Options that all scripts of the folder have.

    Args:
        description: docstring of the script; its first line is shown.
        out: default of `--out`.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="directory of the text  [default: the demo's text]")
    parser.add_argument("--models", nargs="*", default=list(SHELF), help="of the shelf, 'reference', directories, hub names")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--out", type=Path, default=Path(out), help="where figures are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, default=None, help="Markdown file whose marked parts are replaced")
    parser.add_argument("--mark", default="", help="end of the marks' names, where models have a part of their own")
    return parser


def subjects(told: argparse.Namespace) -> Iterator[Subject]:
    """The models asked for, one after the other."""
    for name in told.models:
        yield Subject(name, told.dtype)


def excerpts(by_domain: Mapping[str, Sequence[str]], count: int, seed: int, characters: int = CHARACTERS) -> list[str]:
    """As many excerpts of every domain, domains in turn, each of a document of its own as far as there are that many.

    Args:
        by_domain: domain -> documents.
        count: excerpts of each domain.
        seed: which documents, and where in them.
        characters: length of an excerpt.
    """
    rng = np.random.default_rng(seed)
    found = []
    for documents in by_domain.values():
        long_enough = [text for text in documents if len(text) >= characters] or list(documents)
        order = np.resize(rng.permutation(len(long_enough)), count)
        starts = [int(rng.integers(max(len(long_enough[i]) - characters, 0) + 1)) for i in order]
        found.append([long_enough[i][start : start + characters] for i, start in zip(order, starts, strict=True)])
    return [text for turn in zip(*found, strict=True) for text in turn]


def digest(documents: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    """A short name of a text, to keep figures under."""
    return hashlib.sha256(json.dumps(documents if isinstance(documents, Mapping) else list(documents)).encode()).hexdigest()[
        :12
    ]


def quoted(value: object) -> str:
    """A figure that the paper printed."""
    return f"{value} (quoted)"


def machine() -> str:
    """What figures were measured on."""
    return (
        f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, "
        f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    )


def publish(parts: Mapping[str, str], write: Path | None) -> None:
    """Print the parts of a page, and put each between its marks in a file.

    Args:
        parts: mark -> Markdown.
        write: the file; None prints alone.
    """
    print("\n\n".join(parts.values()), flush=True)
    for mark, text in parts.items() if write else ():
        write_between(write, mark, text)
