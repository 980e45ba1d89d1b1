"""`pytest tests/golden --golden DIR` checks the stored answers in DIR in place of those that are shipped."""

from pathlib import Path

import pytest

from tests.golden.goldens import SHIPPED, Golden, goldens


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        action="append",
        type=Path,
        metavar="DIR",
        help="directory with config.json, model.safetensors and reference*.npz, or a parent of such; may be repeated",
    )


def chosen(config: pytest.Config) -> list[Golden]:
    return goldens(tuple(config.getoption("golden", default=None) or SHIPPED))


def pytest_configure(config: pytest.Config) -> None:
    try:
        chosen(config)
    except FileNotFoundError as error:
        raise pytest.UsageError(f"--golden: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = chosen(metafunc.config)
    for name, applicable in (
        ("golden", found),
        ("by_row_golden", [golden for golden in found if golden.by_row_BS.any()]),
        ("vision_golden", [golden for golden in found if golden.config.vision]),
        ("trajectory_golden", [golden for golden in found if golden.path.stem == "reference" and golden.trajectory]),
    ):
        if name in metafunc.fixturenames:
            # One golden after the other: what one is compared on is computed once.
            metafunc.parametrize(name, applicable, ids=lambda golden: golden.name, scope="module")
