"""Writes tests/golden/configs/*.txt again, after a default or a config file was changed on purpose: make goldens."""

from pathlib import Path

from launch.config_file import load_run
from trainer.sections import render

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "configs"
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def rendered(name: str) -> str:
    """Every option of a config file, one line each, without its documentation."""
    lines = render(load_run(str(ROOT / "configs" / f"{name}.py"), {})).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith(" " * 8))


def main() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for name in NAMES:
        (GOLDEN / f"{name}.txt").write_text(rendered(name))
        print(GOLDEN.relative_to(ROOT) / f"{name}.txt")


if __name__ == "__main__":
    main()
