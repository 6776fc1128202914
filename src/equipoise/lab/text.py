"""Text of a mix as one stream of tokens per domain, tokenized once and kept.

Documents follow each other, each ended by the end-of-text token. Training and held-out documents are never mixed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from equipoise.artifacts.files import write_atomic
from equipoise.lab.recipe import Mix, RecipeError
from equipoise.profiling.texts import read_documents

Stream = NDArray[np.uint16]
SPLITS = ("train", "heldout")
DATA_VARIABLE = "EQUIPOISE_LAB_DATA"
END, PADDING = "<|endoftext|>", "<|padding|>"
TOKENIZER_SAMPLE = 2_000_000
"""Characters of each domain that the tokenizer is trained on, so that no domain owns the vocabulary."""


def data_directory(given: str | Path | None) -> Path:
    """The directory that a mix's files are relative to: as given, else of the environment.

    Raises:
        RecipeError: neither, or not a directory.
    """
    told = given or os.environ.get(DATA_VARIABLE)
    if not told:
        raise RecipeError(f"no text to train on: give its directory with --data, or in {DATA_VARIABLE}.")
    if not Path(told).is_dir():
        raise RecipeError(f"'{told}' is not a directory; --data is the directory that the mix's files are relative to.")
    return Path(told)


def domain_documents(mix: Mix, data: Path, split: str) -> dict[str, list[str]]:
    """Domain -> documents of a split ("train" or "heldout").

    Raises:
        TextError: a file is missing or broken.
    """
    return {name: read_documents(data / file for file in getattr(domain, split)) for name, domain in mix.domains.items()}


def load_or_train_tokenizer(mix: Mix, directory: Path, data: Path | None) -> Any:
    """The mix's tokenizer: loaded, or trained on equal parts of the domains and saved.

    Args:
        mix: the text.
        directory: of the tokenizer.
        data: of the text; needed only to train.

    Returns:
        A transformers tokenizer: byte-level BPE, digits one by one, with an end-of-text and a padding token.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        if data is None:
            raise RecipeError(f"there is no tokenizer in '{directory}', and no text to train one on.")
        tokenizer = _train_tokenizer(domain_documents(mix, data, "train"), mix.vocabulary)
        tokenizer.save_pretrained(str(directory))
    return AutoTokenizer.from_pretrained(str(directory))


def _train_tokenizer(documents: Mapping[str, list[str]], vocabulary: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    samples = ["\n\n".join(texts)[:TOKENIZER_SAMPLE] for texts in documents.values()]
    tokenizer.train_from_iterator((part for text in samples for part in text.split("\n\n")), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=PADDING)


def streams(mix: Mix, data: Path, tokenizer: Any, split: str, *, cache: Path | None = None) -> dict[str, Stream]:
    """Domain -> tokens of all its documents of a split, tokenized once.

    Args:
        mix: the text.
        data: directory of its files.
        tokenizer: a transformers tokenizer of at most 65,536 tokens.
        split: "train" or "heldout".
        cache: directory that keeps the tokens; `~/.cache/equipoise/lab` when omitted.

    Raises:
        TextError: a file is missing or broken.
    """
    folder = cache or Path(os.environ.get("EQUIPOISE_CACHE", "~/.cache/equipoise")).expanduser() / "lab"
    tokens: dict[str, Stream] = {}
    for name, domain in mix.domains.items():
        files = [data / file for file in getattr(domain, split)]
        kept = folder / f"{_key(files, tokenizer)}.tokens"
        if not kept.is_file():
            stream = _tokenized(read_documents(files), tokenizer)
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, stream.astype("<u2").tobytes())
        tokens[name] = np.fromfile(kept, "<u2")
    return tokens


def _tokenized(documents: list[str], tokenizer: Any) -> Stream:
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.asarray([*row, tokenizer.eos_token_id], np.uint16) for row in rows])


def _key(files: list[Path], tokenizer: Any) -> str:
    """A name for the tokens of files: changes with their bytes and with the vocabulary and its merges."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()[:24]
