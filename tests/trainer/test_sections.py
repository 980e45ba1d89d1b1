"""Overrides, validation, conversion and printing of the typed sections."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import AudioSpec, DataConfig
from model.config import AudioConfig, ModelConfig, RopeScaling, VisionConfig
from sharding.errors import UserError
from trainer.config import OptimizerConfig, RunConfig
from trainer.options import annotations, documentation, expected, members, option_names, section_classes, smallest
from trainer.sections import diff, from_plain, render, resolve, to_config_dict, to_plain

RUN = RunConfig(name="small", model=ModelConfig(vision=VisionConfig(), moe_layers=(1, 3)))


def changed(**overrides: str) -> RunConfig:
    """RUN with overrides; `__` stands for a dot."""
    named = {name.replace("__", "."): text for name, text in overrides.items()}
    return resolve(to_config_dict(RUN), named, "the test")


def message(overrides: dict[str, str], run: RunConfig = RUN) -> str:
    """What the user reads after these overrides."""
    with pytest.raises(UserError) as raised:
        resolve(to_config_dict(run), overrides, "the test")
    return str(raised.value)


def lines(run: RunConfig, **overrides: str) -> list[str]:
    """The problems that the user reads, one a line; none if the run is valid. `__` stands for a dot."""
    try:
        resolve(to_config_dict(run), {name.replace("__", "."): text for name, text in overrides.items()}, "the test")
    except UserError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


# Overrides


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("steps", "400", 400),
        ("optimizer.peak_lr", "1e-3", 1e-3),
        ("optimizer.peak_lr", "1", 1.0),
        ("model.qk_norm", "false", False),
        ("model.qk_norm", "True", True),
        ("name", "None", "None"),
        ("name", "a=b", "a=b"),
        ("optimizer.schedule", "constant", "constant"),
        ("model.moe_layers", "0,2", (0, 2)),
        ("model.moe_layers", "(1,)", (1,)),
        ("model.moe_layers", "[]", ()),
        ("model.moe_layers", "none", None),
        ("model.rope_scaling", "{}", RopeScaling()),
        ("model.rope_scaling", "{'factor': 8}", RopeScaling(factor=8.0)),
        ("data.mixture", '{"text": 0, "scenes": 1}', {"text": 0.0, "scenes": 1.0}),
        ("data.mixture.text", "0.9", {"text": 0.9, "scenes": 0.7}),
        ("model.vision.tiles_per_block", "4", 4),
    ],
)
def test_an_override_is_read_as_the_type_of_its_option(name, text, value):
    run: Any = resolve(to_config_dict(RUN), {name: text}, "the test")
    for part in name.removesuffix(".text").split("."):
        run = getattr(run, part)
    assert run == value
    assert type(run) is type(value)


def test_only_the_overridden_option_changes():
    assert changed(optimizer__beta1="0.8") == dataclasses.replace(RUN, optimizer=OptimizerConfig(beta1=0.8))


def test_overrides_work_on_a_config_that_leaves_options_out():
    config: Any = to_config_dict(RUN)
    del config["optimizer"]
    del config.data["mixture"]
    run = resolve(config, {"optimizer.beta1": "0.8", "data.mixture.text": "2"}, "the test")
    assert run.optimizer == OptimizerConfig(beta1=0.8)
    assert run.data.mixture == {**DataConfig().mixture, "text": 2.0}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optimizer.peek_lr", "did you mean optimizer.peak_lr?"),
        ("optimiser.peak_lr", "did you mean optimizer.peak_lr?"),
        ("peak_lr", "did you mean optimizer.peak_lr?"),
        ("lr", "optimizer.peak_lr"),
        ("model.num_layer", "did you mean model.num_layers"),
        ("vision.num_layers", "model.vision.num_layers"),
        ("step", "did you mean steps"),
        ("xyzzy", "`drover config` prints every option"),
        ("steps.more", "steps is one value, not a section"),
        ("", "no such option"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(name, hint):
    assert hint in message({name: "1"})


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("steps", "abc", "found 'abc', expected a whole number"),
        ("steps", "1.5", "found '1.5', expected a whole number"),
        ("optimizer.peak_lr", "fast", "found 'fast', expected a number"),
        ("model.qk_norm", "yes", "found 'yes', expected true or false"),
        ("model.dtype", "fp8", "found 'fp8', expected one of 'float32', 'bfloat16', 'float64'"),
        ("model.moe_layers", "1,x", "found '1,x', expected a list such as 1,3,5"),
        ("data.mixture", "text", "found 'text', expected names with a number each"),
        ("data.mixture.text", "much", "found 'much', expected a number"),
        ("optimizer", "adam", "found 'adam', expected a section"),
        ("model.rope_scaling", "{'factr': 2}", "did you mean model.rope_scaling.factor?"),
    ],
)
def test_a_wrong_type_names_the_option_what_was_found_and_what_was_expected(name, text, wanted):
    told = message({name: text})
    assert f"  {name}" in told
    assert wanted in told


def test_an_option_of_an_absent_section_says_how_to_begin_one():
    assert "put --config.model.rope_scaling={} before" in message({"model.rope_scaling.factor": "8"})
    assert changed(model__rope_scaling="{}", model__rope_scaling__factor="8").model.rope_scaling == RopeScaling(8.0)


# Validation


def test_all_problems_are_named_at_once():
    told = message(
        {
            "optimizer.peek_lr": "1",
            "steps": "abc",
            "model.num_heads": "7",
            "data.batch_size": "0",
            "optimizer.peak_lr": "nan",
            "optimizer.beta1": "-1",
        }
    )
    assert told.startswith("6 problems in the test:\n")
    for line in (
        "optimizer.peek_lr: no such option",
        "steps: found 'abc'",
        "model.num_kv_heads: found 8, expected a divisor of num_heads=7: [1, 7]",
        "data.batch_size: found 0, expected 1 or more",
        "optimizer.peak_lr: found nan, expected a finite number",
        "optimizer.beta1: found -1.0, expected 0 or more",
    ):
        assert f"\n  {line}" in told


def test_no_option_is_complained_of_twice():
    told = message({"model.moe_layers": "1,-2", "data.batch_size": "0"})
    assert told.count("moe_layers") == 1
    assert told.count("data.batch_size:") == 1


def test_conflicts_between_sections_are_named():
    assert "data.tokenizer_size: found 1024, expected at most model.vocab_size=512" in message(
        {"model.vocab_size": "512"}
    )


def test_the_defaults_have_no_problem_but_the_missing_eyes():
    assert lines(RunConfig()) == [
        "data.mixture.scenes: found a weight above zero, expected 0 when model.vision is None"
    ]
    assert lines(RUN) == []


def test_wrong_types_in_a_config_file_are_named():
    found = lines(RunConfig(steps="many", model=3, seed=True))  # type: ignore[arg-type]
    assert "steps: found 'many', expected a whole number" in found
    assert "seed: found True, expected a whole number" in found
    assert any(line.startswith("model: found 3, expected a section") for line in found)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            {"optimizer.schedule": "wsd"},
            "optimizer.decay_steps: found 0, expected 1 or more with schedule='wsd'",
        ),
        (
            {"optimizer.decay_steps": "5"},
            "optimizer.decay_steps: found 5, expected 0 with schedule='cosine'",
        ),
        (
            {"optimizer.schedule": "constant", "optimizer.decay_steps": "5"},
            "optimizer.decay_steps: found 5, expected 0 with schedule='constant'",
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.decay_steps": "901"},
            "optimizer.decay_steps: found 901, expected at most 900, the steps that the warmup leaves: "
            "steps - optimizer.warmup_steps",
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.decay_steps": "10", "steps": "50"},
            "optimizer.warmup_steps: found 100, expected less than steps=50",
        ),
        ({"model.rope_theta": "1"}, "model.rope_theta: found 1.0, expected more than 1"),
        ({"model.norm_eps": "0"}, "model.norm_eps: found 0.0, expected more than 0"),
        ({"model.vision.rope_theta": "1"}, "model.vision.rope_theta: found 1.0, expected more than 1"),
        (
            {"model.audio": "{'window_frames': 100}"},
            "model.audio.window_frames: found 100, expected a multiple of 8, the frames of a token",
        ),
        (
            {"model.audio": "{'hidden_size': 64, 'num_heads': 5}"},
            "model.audio.num_heads: found 5, expected a divisor of hidden_size=64",
        ),
        (
            {"model.rope_scaling": "{'factor': 0.5}"},
            "model.rope_scaling.factor: found 0.5, expected 1 or more",
        ),
        (
            {"model.rope_scaling": "{'low_freq_factor': 0}"},
            "model.rope_scaling.low_freq_factor: found 0.0, expected more than 0",
        ),
        (
            {"model.moe_layers": "1,3,1"},
            "model.moe_layers: found layers [1] more than once, expected each layer once",
        ),
        (
            {"model.nope_layers": "3,3"},
            "model.nope_layers: found layers [3] more than once, expected each layer once",
        ),
        ({"model.moe_layers": "48"}, "model.moe_layers: found layers [48], expected 0 to 47"),
        ({"model.moe_layers": "-1"}, "model.moe_layers[0]: found -1, expected 0 or more"),
        (
            {"model.experts_per_token": "17"},
            "model.experts_per_token: found 17, expected at most num_experts=16",
        ),
        ({"model.experts_per_token": "0"}, "model.experts_per_token: found 0, expected 1 or more"),
        (
            {"model.param_dtype": "bfloat16"},
            "model.param_dtype: found 'bfloat16', expected one of 'float32', 'float64'",
        ),
        ({"data.sequence_length": "2"}, "data.sequence_length: found 2, expected 3 or more"),
        ({"data.tiles_per_row": "0"}, "data.tiles_per_row: found 0, expected 1 or more when the mixture has scenes"),
        ({"data.tiles_per_row": "-1"}, "data.tiles_per_row: found -1, expected 0 or more"),
        ({"data.workers": "-1"}, "data.workers: found -1, expected 0 or more"),
        ({"data.video_fps": "-1"}, "data.video_fps: found -1.0, expected 0 or more"),
    ],
)
def test_a_value_without_a_meaning_is_refused(overrides, problem):
    assert lines(RUN, **overrides) == [problem]


def test_both_factors_of_the_frequency_scaling_are_above_zero():
    assert lines(RUN, model__rope_scaling="{'low_freq_factor': 0, 'high_freq_factor': 0}") == [
        f"model.rope_scaling.{name}: found 0.0, expected more than 0"
        for name in ("low_freq_factor", "high_freq_factor")
    ]


def test_how_sound_becomes_tokens_is_the_audio_encoders_affair():
    assert RUN.audio_spec is None
    heard = dataclasses.replace(RUN, model=ModelConfig(audio=AudioConfig(mel_bins=64, window_frames=96)))
    assert heard.audio_spec == AudioSpec(mel_bins=64, frames_per_window=96, tokens_per_window=12)


def test_the_whole_rest_of_a_run_may_be_decay():
    assert lines(RUN, optimizer__schedule="wsd", optimizer__decay_steps="900") == []


def test_a_run_of_text_alone_needs_no_room_for_tiles():
    assert lines(RUN, data__mixture__scenes="0", data__tiles_per_row="0") == []


@pytest.mark.parametrize("name", ["batch_size", "window", "max_tiles", "scenes", "prefetch"])
def test_counts_of_the_data_begin_at_one(name):
    assert lines(RUN, **{f"data.{name}": "0"}) == [f"data.{name}: found 0, expected 1 or more"]


def test_a_section_whose_rules_cannot_be_worked_out_does_not_hide_the_cause():
    told = message({"model.vision.num_heads": "0", "model.vision.patch_size": "0"})
    assert "model.vision.num_heads: found 0, expected 1 or more" in told
    assert "model.vision.patch_size: found 0, expected 1 or more" in told


def test_whole_numbers_that_may_be_zero_are_these():
    found = {
        f"{cls.__name__}.{name}"
        for cls in section_classes()
        for name, annotation in annotations(cls).items()
        if int in members(annotation) and smallest(cls, name) == 0
    }
    assert found == {
        "CheckpointConfig.keep_every",
        "DataConfig.seed",
        "DataConfig.tiles_per_row",
        "DataConfig.windows_per_row",
        "DataConfig.workers",
        "DistillConfig.draws",
        "DistillConfig.top_k",
        "EvalConfig.questions",
        "ModelConfig.moe_layer_step",
        "ModelConfig.nope_layer_step",
        "OptimizerConfig.decay_steps",
        "OptimizerConfig.warmup_steps",
        "RunConfig.seed",
    }


def test_what_may_be_zero_is_an_option_and_a_whole_number():
    for cls in section_classes():
        for name in getattr(cls, "MAY_BE_ZERO", ()):
            assert int in members(annotations(cls)[name]), f"{cls.__name__}.{name}"


def test_every_option_is_documented_and_of_a_type_that_can_be_described():
    for cls in section_classes():
        for name, annotation in annotations(cls).items():
            assert expected(annotation)
            if f"{name}." not in "".join(f"{option}\n" for option in option_names(cls)):
                assert documentation(cls).get(name, "").endswith("."), f"{cls.__name__}.{name}"


# Conversion


def test_a_run_survives_a_config_dict():
    assert changed() == RUN


def test_a_run_survives_json_exactly():
    back = from_plain(RunConfig, json.loads(json.dumps(to_plain(RUN))))
    assert back == RUN
    assert type(back.model.moe_layers) is tuple
    assert type(back.data.mixture) is dict


@given(
    st.floats(min_value=0, allow_nan=False, allow_infinity=False), st.lists(st.integers(0, 47), unique=True), st.text()
)
def test_any_value_survives_json_exactly(rate, layers, text):
    run = dataclasses.replace(
        RUN,
        compile_cache=text,
        model=dataclasses.replace(RUN.model, moe_layers=tuple(layers)),
        optimizer=OptimizerConfig(peak_lr=rate),
    )
    assert from_plain(RunConfig, json.loads(json.dumps(to_plain(run)))) == run


def test_a_config_file_may_assign_sections_dictionaries_and_lists():
    config: Any = to_config_dict(RUN)
    config.model.rope_scaling = RopeScaling(factor=4.0)
    config.optimizer = {"peak_lr": 1}
    config.model.moe_layers = [0]
    run = resolve(config, {}, "the test")
    assert run.model.rope_scaling == RopeScaling(factor=4.0)
    assert run.optimizer == OptimizerConfig(peak_lr=1.0)
    assert run.model.moe_layers == (0,)


def test_a_name_misspelt_by_a_config_file_is_found():
    config: Any = to_config_dict(RUN)
    config.model.num_layer = 3
    with pytest.raises(UserError, match=r"model\.num_layer: no such option; did you mean model\.num_layers"):
        resolve(config, {}, "the test")


def test_a_run_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed().steps = 3  # type: ignore[misc]


# For reading


def options(text: str) -> list[str]:
    """The lines of a rendered run that give options their values, without documentation and marks."""
    return [line[2:] for line in text.splitlines() if " = " in line and not line.startswith(" " * 8)]


def test_render_shows_every_option_its_meaning_and_what_differs():
    text = render(changed(optimizer__peak_lr="0.5"))
    names = [line.split(" = ")[0] for line in options(text)]
    sections = ("model.rope_scaling", "model.audio", "distill")  # that are None by default
    absent = {name for name in option_names() if name.startswith(tuple(f"{section}." for section in sections))}
    assert set(names) == set(option_names()) - absent | set(sections)
    assert "* optimizer.peak_lr = 0.5  (default 0.0003)\n        Learning rate at the end of the warmup.\n" in text
    assert "\n  optimizer.beta1 = 0.9\n" in text
    assert "# model.vision: The vision encoder: one ViT per square tile" in text


def test_rendered_values_can_be_given_back_as_overrides():
    run = changed(model__moe_layers="1,2", data__mixture__text="0.25", model__rope_scaling="{}", name="other")
    overrides = dict(line.split("  (default")[0].split(" = ", 1) for line in options(render(run)))
    unquoted = {name: value.strip("'") for name, value in overrides.items()}
    base = dataclasses.replace(RunConfig(), model=ModelConfig(vision=VisionConfig(), rope_scaling=RopeScaling()))
    assert resolve(to_config_dict(base), unquoted, "the test") == run


def test_diff_names_what_changed_and_nothing_else():
    assert diff(RUN, RUN) == []
    assert diff(json.loads(json.dumps(to_plain(RUN))), RUN) == []
    assert diff(RUN, changed(steps="700", model__moe_layers="none", model__vision__num_layers="2")) == [
        "steps: 1000 -> 700",
        "model.moe_layers: [1, 3] -> None",
        "model.vision.num_layers: 34 -> 2",
    ]


def test_diff_shows_options_that_one_side_does_not_have():
    old = to_plain(RUN)
    old["gone"] = 1
    del old["seed"]
    assert set(diff(old, RUN)) == {"seed: (absent) -> 0", "gone: 1 -> (absent)"}
