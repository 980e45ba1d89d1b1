"""The config files: their rendered text, and the sizes of the released models."""

from types import ModuleType

import pytest

from configs import behemoth, maverick, scout, tiny
from model.config import ModelConfig
from tests.configs.regenerate import GOLDEN, NAMES, ROOT, rendered
from trainer.sections import resolve


def model_of(config: ModuleType) -> ModelConfig:
    return resolve(config.get_config(), {}, config.__name__).model


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_option_shows_up_in_the_golden_text(name):
    assert rendered(name) == (GOLDEN / f"{name}.txt").read_text(), "on purpose? `make goldens`, then read the diff"


def test_there_is_no_golden_text_without_a_config_file():
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_config_file_says_what_it_is_and_how_to_run_it(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert text.startswith('"""')
    assert f"    drover train --config configs/{name}.py" in text


def parameters(model: ModelConfig) -> tuple[float, float]:
    """Text parameters, all and active for a token, in billions: the matrices and norms of the layers one by one."""
    attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
    expert, dense = (3 * model.hidden_size * width for width in (model.expert_ffn_size, model.dense_ffn_size))
    router = model.num_experts * model.hidden_size
    total = active = 2 * model.vocab_size * model.hidden_size + model.hidden_size
    for kind in model.layer_kinds():
        shared = attention + 2 * model.hidden_size
        shared += expert + router if kind.moe else dense
        total += shared + (model.num_experts * expert if kind.moe else 0)
        active += shared + (model.experts_per_token * expert if kind.moe else 0)
    return round(total / 1e9, 1), round(active / 1e9, 1)


@pytest.mark.parametrize(
    ("config", "total", "active"), [(scout, 107.8, 17.2), (maverick, 400.7, 17.2), (behemoth, 1991.7, 288.5)]
)
def test_the_released_sizes_add_up(config, total, active):
    """The totals are those of the reference implementation; Behemoth's are its published ones, approached."""
    assert parameters(model_of(config)) == (total, active)


def test_the_released_models_differ_where_they_should():
    runs = {config.__name__: model_of(config) for config in (scout, maverick)}
    first, second = runs["configs.scout"], runs["configs.maverick"]
    assert first.layer_kinds()[:4] == ((True, True), (True, True), (True, True), (True, False))
    assert second.layer_kinds()[:4] == ((False, True), (True, True), (False, True), (True, False))
    assert (first.qk_norm, second.qk_norm) == (True, False)
    assert first.rope_scaling
    assert first.rope_scaling.factor == 16
    assert second.rope_scaling is None
    assert first.vision == second.vision
    assert first.vision
    assert first.vision.tokens_per_tile == 144


def test_the_small_run_has_every_part_of_the_architecture():
    model = model_of(tiny)
    kinds = model.layer_kinds()
    assert any(kind.moe for kind in kinds)
    assert {kind.rope for kind in kinds} == {True, False}
    assert model.num_experts > model.experts_per_token == 1
    assert model.qk_norm
    assert model.temperature_tuning
    assert model.vision
    assert model.vision.shuffle == 2
