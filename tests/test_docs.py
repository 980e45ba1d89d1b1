"""What the README and the docs tell the reader to type and to open is there."""

import argparse
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from launch import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


def lines_with(program: str) -> list[str]:
    """Command lines that begin with `program`, from code blocks and inline code; optional parts included."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", TEXT)
    commands = (line.split(" #")[0].strip() for line in lines)
    return sorted({command for command in commands if re.match(rf"(\.venv/bin/)?{program} ", command)})


@pytest.mark.parametrize("line", lines_with("drover"))
def test_drover_commands_are_understood(line: str) -> None:
    words = shlex.split(line.replace("[", "").replace("]", "").replace("...", ""))[1:]
    if (words[1:] == [] and not words[0].startswith("-")) or (words[0] == "data" and len(words) == 2):
        return  # the name of a command, in running text
    parsed = argparse.Namespace(command=None, workdir=None)
    try:
        cli._parse(words, parsed)
    except SystemExit as done:
        assert done.code == 0, line  # --help


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([a-z_.]+)", TEXT))))
def test_modules_that_are_run_explain_themselves(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module(module, run_name="__main__")
    assert done.value.code == 0


def test_no_table_is_left_to_be_filled_in() -> None:
    assert re.findall(r"^[A-Z_]+_TABLE$", TEXT, re.MULTILINE) == []


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([a-z]+)`", TEXT)) | {"install", "train", "test"}))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    named = re.findall(r"`((?:configs|docs|tests|trainer|model|data|launch|sharding|benchmarks)/[\w./]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
