"""The house rules that a machine can check: floors, cycles, file length, documented names, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "equipoise"
FLOORS = [
    {"errors", "metrics"},
    {"precisions", "registry"},
    {"artifacts"},
    {"models"},
    {"planning", "quantization", "dispatch", "reporting"},
    {"engines", "simulation", "profiling", "execution"},
    {"evaluation"},
    {"pipeline", "arguments", "lab"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(SOURCE.rglob("*.py"))
MAX_LINES = 420


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("equipoise.")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_import_only_from_lower_floors_or_their_own_room(path):
    mine = room(path)
    assert mine in FLOOR, f"room '{mine}' has no floor: add it to FLOORS and to docs/architecture.md"
    for name in imports(path):
        other = name.split(".")[1]
        if other not in FLOOR:  # a public name of the package itself, such as __version__
            assert name == "equipoise.__version__", f"{path.name} imports {name}"
            continue
        assert other == mine or FLOOR[other] < FLOOR[mine], f"{path.name} imports {name}"


def test_no_circular_imports():
    modules = {}
    for path in FILES:
        parts = ["equipoise", *path.relative_to(SOURCE).with_suffix("").parts]
        modules[".".join(parts).removesuffix(".__init__")] = path
    edges = {
        name: {target for target in imports(path) if target in modules and target != name} for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circular import: {' -> '.join([*trail, name])}"
        if name not in done:
            for target in edges[name]:
                visit(target, (*trail, name))
            done.add(name)

    for name in modules:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_are_short_enough_to_read_in_one_sitting(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_public_names_are_documented(path):
    tree = ast.parse(path.read_text())
    assert path.stat().st_size == 0 or ast.get_docstring(tree), f"{path.name} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            for member in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    assert ast.get_docstring(member), f"{path.name}: {node.name}.{member.name} has no docstring"


@pytest.mark.parametrize(
    "module",
    [
        "equipoise",
        "equipoise.cli",
        "equipoise.artifacts",
        "equipoise.metrics",
        "equipoise.planning.methods",
        "equipoise.engines.registry",
        "equipoise.dispatch",
        "equipoise.simulation.simulate",
        "equipoise.reporting.tables",
        "equipoise.reporting.report_parts",
        "equipoise.reporting.page",
        "equipoise.reporting.simulation",
        "equipoise.reporting.live",
        "equipoise.planning.streaming.policies",
        "equipoise.simulation.stream",
    ],
)
def test_the_light_wing_needs_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
