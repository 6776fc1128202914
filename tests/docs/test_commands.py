"""Every command and Python example of the documentation is run, each page in its own directory; what cannot be says why."""

from __future__ import annotations

import gc
import itertools
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import pytest

from docs.fences import PAGES, REASONS, ROOT, Block, Command, blocks, commands, name_of, spans
from docs.stage import Stage, given_names
from equipoise import cli
from equipoise.registry import Registry

WITH_COMMANDS = [page for page in PAGES if any(b.language == "python" or list(commands(b)) for b in blocks(page))]


def every_block() -> list[Block]:
    return [block for page in PAGES for block in blocks(page)]


@pytest.fixture(scope="session")
def tiny_profile(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of the tiny model, made once for all pages."""
    import equipoise
    from equipoise.profiling.loading import load_model, load_tokenizer
    from support import corpus

    path = tmp_path_factory.mktemp("given") / "tiny.profile.safetensors"
    texts = {"chat": corpus(1, 24), "code": corpus(2, 24)}
    equipoise.profile(load_model(str(tiny_model_dir)), load_tokenizer(str(tiny_model_dir)), texts, tokens=800).save(path)
    return path


@pytest.fixture(autouse=True)
def registered_by_pages() -> Iterator[None]:
    """What a page's example registered is taken out again; what the package registers when first imported stays."""
    yield
    for registry in [found for found in gc.get_objects() if type(found) is Registry]:
        for name in registry.names():
            if not str(registry.get(name).__module__).startswith("equipoise"):
                del registry._entries[name]


def run(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run one `equipoise` command in this process; what it prints goes where the command says."""
    monkeypatch.setattr(sys, "argv", list(command.words))
    for name, value in command.variables.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    status: object = None
    try:
        cli.main()
    except SystemExit as stop:
        status = stop.code
    if status:
        pytest.fail(f"{command.where}\nends with {status}: {capsys.readouterr().err[-1500:]}")
    if command.into:
        Path(command.into).write_text(capsys.readouterr().out)


def run_page(page: Path, stage: Stage, slow: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    """Run a page's commands in order, the slow ones only where asked; returns how many were run."""
    monkeypatch.chdir(stage.place)
    done = 0
    names: dict[str, object] = {}
    for block in blocks(page):
        if "not run" in block.marks or ("slow" in block.marks and not slow):
            continue
        if block.language == "python":
            run_python(block, stage, names)
            done += 1
        for command in commands(block):
            if command.words[0] == "export":
                monkeypatch.setenv(*command.words[1].split("=", 1))
            elif command.words[0] == "equipoise":
                command = without(command, block.marks.get("run without", ""))
                stage.provide(command.words)
                run(command, monkeypatch, capsys)
                done += 1
            else:
                check(command)
    return done


def run_python(block: Block, stage: Stage, names: dict[str, object]) -> None:
    """Run a block of Python after those before it; names that it takes as given are there, and so are files that it names."""
    code = compile("\n" * block.line + block.text, str(ROOT / block.page), "exec")
    stage.provide(("python", *re.findall(r'"([^"\n]+)"', block.text)))
    assigned = set(re.findall(r"(?m)^(\w+)(?:, (\w+))* = ", block.text))
    wanted = names_of(code) - names.keys() - {name for found in assigned for name in found}
    names |= given_names(stage, wanted)
    exec(code, names)


def names_of(code: CodeType) -> frozenset[str]:
    """Names that code looks up, that of functions and comprehensions in it among them."""
    inner = [names_of(value) for value in code.co_consts if isinstance(value, CodeType)]
    return frozenset(code.co_names).union(*inner)


def without(command: Command, left_out: str) -> Command:
    """The command less the options that its mark leaves out, and less tasks whose rows only the hub has."""
    words = list(command.words)
    parts = left_out.split()
    unwanted = list(zip(parts[::2], parts[1::2], strict=True))
    if "--task-dir" not in words:
        unwanted += [("--task", value) for option, value in itertools.pairwise(words) if option == "--task"]
    for pair in unwanted:
        found = [i for i, two in enumerate(itertools.pairwise(words)) if two == pair]
        for i in reversed(found):
            del words[i : i + 2]
    return Command(command.where, tuple(words), command.variables, command.into)


def check(command: Command) -> None:
    """A command of another tool: what it names is there, although it is not run."""
    first, *rest = command.words
    if first == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{command.where}: no such target"
    elif first == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for wanted in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(wanted.split(",")) <= set(extras), f"{command.where}: extras are {sorted(extras)}"
    elif first == "python" and rest and rest[0].startswith("benchmarks/"):
        check_script(command.where, rest)
    else:
        pytest.fail(f"{command.where}: not a command that this test runs; mark its block <!-- not run: REASON -->")


def with_neighbours(script: Path, seen: set[Path]) -> str:
    """The text of a script and of files beside it that it imports or runs, which may be where its options are."""
    if script in seen or not script.is_file():
        return ""
    seen.add(script)
    source = script.read_text()
    names = re.findall(r"^(?:from|import) (\w+)|(\w+)\.py\b", source, re.MULTILINE)
    return source + "".join(with_neighbours(script.with_name(f"{a or b}.py"), seen) for a, b in names)


def check_script(where: str, words: list[str]) -> None:
    """A benchmark is there and knows the options that are given."""
    script = ROOT / words[0]
    assert script.is_file(), f"{where}: {words[0]} is not there"
    source = with_neighbours(script, set())
    for word in words[1:]:
        option = word.split("=")[0]
        if option.startswith("--"):
            assert f'"{option}"' in source or f'"{option[2:]}"' in source, f"{where}: {words[0]} has no option {option}"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_page_run(page, tiny_model_dir, tiny_profile, tmp_path, monkeypatch, capsys):
    run_page(page, Stage(tmp_path, tiny_model_dir, tiny_profile, name_of(page)), False, monkeypatch, capsys)


SLOW = [page for page in WITH_COMMANDS if any("slow" in block.marks for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", SLOW, ids=name_of)
def test_the_slow_commands_of_a_page_run_after_the_others(page, tiny_model_dir, tiny_profile, tmp_path, monkeypatch, capsys):
    assert run_page(page, Stage(tmp_path, tiny_model_dir, tiny_profile, name_of(page)), True, monkeypatch, capsys)


def test_what_is_not_run_says_why_and_is_little():
    """Commands that no test runs have one of the known reasons, and most are run; those of other tools are only checked."""
    counted: Counter[str] = Counter()
    for block in every_block():
        held = list(commands(block))
        number = 1 if block.language == "python" else len(held)
        if reason := block.marks.get("not run"):
            kind = next((one for one in REASONS if reason.startswith(one)), None)
            assert kind, f"{block.where}: '{reason}' is none of {REASONS}"
            assert number, f"{block.where}: marked, but it holds no command"
            counted[kind] += number
        else:
            checked = sum(command.words[0] != "equipoise" for command in held)
            counted["checked"] += checked
            counted["slow" if "slow" in block.marks else "run"] += number - checked
    left_out = sum(counted[kind] for kind in REASONS)
    assert counted["run"] > 0
    assert left_out <= 0.25 * counted.total(), f"{left_out} of {counted.total()} commands are not run: {dict(counted)}"


def test_marks_stand_above_blocks():
    """A mark that is followed by no block marks nothing."""
    for page in PAGES:
        marks = len(re.findall(r"<!--\s*(?:not run|slow|run without):", page.read_text()))
        assert marks == sum(len(block.marks) for block in blocks(page)), f"{name_of(page)}: a mark without a block below it"


def options_of(words: list[str]) -> tuple[str, set[str]]:
    """The subcommand that words name, and the options that it knows."""
    import typer

    group = typer.main.get_command(cli.app)
    name = "equipoise"
    rest = list(words)
    while hasattr(group, "commands") and rest and rest[0] in group.commands:
        name += f" {rest[0]}"
        group = group.commands[rest.pop(0)]
    return name, {option for parameter in group.params for option in parameter.opts} | {"--help"}


def test_commands_in_running_text_exist():
    """`equipoise plan --ranks 8` or `python benchmarks/x.py --data DIR` in a sentence names what is there."""
    seen = 0
    for page in PAGES:
        for number, span in spans(page):
            words = span.split()
            where = f"{name_of(page)}:{number}: `{span}`"
            if words[:1] == ["equipoise"] and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
                name, known = options_of(words[1:])
                assert name != "equipoise", f"{where}: no such command"
                given = {word.split("=")[0] for word in words if word.startswith("--")}
                assert given <= known, f"{where}: {name} has no {sorted(given - known)}"
                seen += 1
            elif words[:1] == ["python"] and words[1:] and words[1].startswith("benchmarks/"):
                check_script(where, words[1:])
                seen += 1
            elif words[:1] == ["make"] and len(words) == 2 and re.fullmatch(r"[a-z-]+", words[1]):
                check(Command(where, tuple(words), {}, None))
                seen += 1
    assert seen > 20
