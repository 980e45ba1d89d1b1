"""Imports run one way, and what must be light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ALLOWED = {
    "sharding": set(),
    "model": {"sharding"},
    "data": {"sharding"},
    "trainer": {"sharding", "model", "data"},
    "launch": {"sharding", "model", "data", "trainer"},
    # A config file fills in typed sections, and may build on another config file.
    "configs": {"model.config", "data.config", "trainer.config", "trainer.sections"},
}
HEAVY = ("jax", "jaxlib", "flax", "grain", "numpy", "orbax", "optax", "tensorstore")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; `from a import b` counts as a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


FILES = [path.relative_to(ROOT) for folder in ALLOWED for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    folder = path.parts[0]
    ours = {name for name in imports(ROOT / path) if name.split(".")[0] in ALLOWED}
    allowed = ALLOWED[folder] | {folder}
    forbidden = {name for name in ours if not {name, name.split(".")[0]} & allowed}
    assert not forbidden


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "data"], ids=str)
def test_data_does_not_import_jax(path):
    heavy = {name.split(".")[0] for name in imports(ROOT / path)} & {"jax", "jaxlib", "flax"}
    assert not heavy
    # grain imports jax, so only the file that makes the loader may name it.
    assert "grain" not in imports(ROOT / path) or path.name == "pipeline.py"


def test_what_the_command_line_needs_at_once_imports_nothing_heavy():
    modules = [
        *(f"{folder}.config" for folder in ("model", "data", "trainer")),
        *("trainer.sections", "trainer.options", "launch.cli", "launch.config_file", "sharding.errors"),
        *(f"configs.{path.stem}" for path in FILES if path.parts[0] == "configs" and path.stem != "__init__"),
    ]
    shown = f"print([name for name in {HEAVY} if name in sys.modules])"
    code = f"import sys\nfor name in {modules}: __import__(name)\n{shown}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
