"""Config files are code: what goes wrong in them is told with file and line."""

import textwrap

import pytest

from launch.config_file import load_run, split_spec
from sharding.errors import UserError

IMPORTS = """\
from model.config import ModelConfig, VisionConfig
from trainer.config import OptimizerConfig, RunConfig
from trainer.sections import to_config_dict
"""


@pytest.fixture
def load(tmp_path):
    """Loads a config file with this text."""

    def load(text: str, argument: str = "", **overrides: str):
        path = tmp_path / "mine.py"
        path.write_text(IMPORTS + textwrap.dedent(text))
        return load_run(f"{path}{argument}", overrides)

    return load


def problem(load, text: str, argument: str = "", **overrides: str) -> str:
    with pytest.raises(UserError) as raised:
        load(text, argument, **overrides)
    return str(raised.value)


GOOD = """
    def get_config(arg="small"):
        return to_config_dict(RunConfig(name=arg, model=ModelConfig(vision=VisionConfig())))
"""


def test_a_config_file_gives_a_run(load):
    assert load(GOOD).name == "small"


def test_what_follows_the_colon_is_handed_to_get_config(load):
    assert load(GOOD, ":large").name == "large"


def test_overrides_are_applied(load):
    assert load(GOOD, steps="700").steps == 700


def test_a_colon_in_a_folder_is_part_of_the_path():
    assert split_spec("a:b/c.py") == (split_spec("a:b/c.py")[0], None)
    path, argument = split_spec("a:b/c.py:x:y")
    assert (str(path), argument) == ("a:b/c.py", "x:y")


def test_one_config_file_may_build_on_another(load):
    run = load("""
        from configs import tiny

        def get_config():
            config = tiny.get_config()
            config.name = "longer"
            config.steps *= 2
            return config
    """)
    assert run.name == "longer"


def test_a_dataclass_may_be_defined_in_a_config_file(load):
    assert load("import dataclasses\n\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 0\n" + textwrap.dedent(GOOD))


def test_reading_a_config_file_leaves_nothing_beside_it(load, tmp_path):
    load(GOOD)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_file_without_get_config_is_shown_how_to_write_it(load):
    told = problem(load, "config = RunConfig()")
    assert "mine.py has no function get_config" in told
    assert "return to_config_dict(RunConfig(...))" in told


def test_an_argument_for_a_file_that_takes_none_is_refused(load):
    told = problem(load, "def get_config(): ...", ":x")
    assert "found get_config(), expected it to work with one argument" in told


def test_a_file_that_demands_an_argument_says_so(load):
    assert "expected it to work with no argument" in problem(load, "def get_config(size): ...")


def test_a_run_returned_in_place_of_a_config_dict_is_told_the_cure(load):
    told = problem(load, "def get_config(): return RunConfig()")
    assert "returned a RunConfig, expected a ConfigDict: end it with `return to_config_dict(run)`" in told


def test_a_misspelt_field_names_the_line_and_the_field(load):
    told = problem(load, "def get_config():\n    return to_config_dict(RunConfig(model=ModelConfig(hiden_size=3)))")
    assert "mine.py, line 5:" in told
    assert "ModelConfig(hiden_size=3)" in told
    assert "id you mean" in told
    assert "hidden_size" in told


def test_an_exception_names_the_line_of_the_file(load):
    told = problem(load, "import math\n\ndef get_config():\n    return math.sqrt(-1)")
    assert "mine.py, line 7:\n\n    return math.sqrt(-1)\n\nValueError" in told


def test_a_syntax_error_names_the_line(load):
    assert "mine.py, line 5:\n\n    return (\n" in problem(load, "def get_config():\n    return (")


def test_all_problems_of_a_file_are_told_at_once(load):
    told = problem(
        load,
        """
        def get_config():
            config = to_config_dict(RunConfig(steps="many"))
            config.optimizer.peek_lr = 1
            return config
        """,
        seed="x",
    )
    for part in ("steps: found 'many'", "optimizer.peek_lr: no such option", "seed: found 'x'", "data.mixture.scenes"):
        assert part in told


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("configs/tniy.py", "configs/tniy.py does not exist; did you mean configs/tiny.py?"),
        ("tiny", "did you mean configs/tiny.py?"),
        ("configs", "is a folder; did you mean configs/behemoth.py or"),
        ("nowhere/at-all.py", "does not exist; did you mean configs/behemoth.py or"),
        ("Makefile", "expected a Python file"),
    ],
)
def test_a_file_that_is_not_there_is_answered_with_those_that_are(monkeypatch, request, spec, told):
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(UserError) as raised:
        load_run(spec, {})
    assert told in str(raised.value)
