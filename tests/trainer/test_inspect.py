"""`drover inspect`: parameters counted from the model itself, against the published sizes and the closed formulas."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from types import ModuleType

import pytest

from configs import behemoth, maverick, scout, tiny
from model.config import AudioConfig, ModelConfig, VisionConfig
from tests.configs.regenerate import ROOT
from trainer import inspect
from trainer.config import RunConfig
from trainer.flops import ParameterCounts, flops_per_token, parameter_counts
from trainer.inspect import count_parameters, inspect_model, part_of, render
from trainer.sections import resolve
from trainer.step import weight_shapes

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_layers=4,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    dense_ffn_size=56,
    expert_ffn_size=24,
    num_experts=5,
    chunk_size=16,
    vision=VisionConfig(image_size=16, patch_size=4, hidden_size=16, num_layers=3, num_heads=2, ffn_size=40),
)
ODD = {
    "small": SMALL,
    "tied": replace(SMALL, tie_embeddings=True),
    "text-only": replace(SMALL, vision=None),
    "with ears": replace(SMALL, audio=AudioConfig(mel_bins=5, hidden_size=24, num_layers=3, ffn_size=40)),
    "ears alone": replace(SMALL, vision=None, audio=AudioConfig(num_layers=1)),
    "dense only": replace(SMALL, moe_layer_step=0, vision=None),
    "top-2": replace(SMALL, experts_per_token=2),
    "every expert": replace(SMALL, experts_per_token=5),
    "listed layers": replace(SMALL, moe_layers=(0, 3), nope_layers=(1,)),
    "no layer is a mixture": replace(SMALL, moe_layers=()),
    "all global": replace(SMALL, nope_layer_step=1),
    "router bias": replace(SMALL, router_bias_rate=1e-3),
}
SHIPPED = {"scout": scout, "maverick": maverick, "behemoth": behemoth, "tiny": tiny}


def run_of(config: ModuleType) -> RunConfig:
    return resolve(config.get_config(), {}, config.__name__)


@pytest.fixture(scope="module")
def facts() -> dict[str, dict]:
    """What is found out about every shipped config."""
    runs = {name: run_of(config) for name, config in SHIPPED.items()}
    return {name: inspect_model(run.model, run.data.sequence_length) for name, run in runs.items()}


@pytest.mark.parametrize("name", ODD)
def test_the_formulas_agree_with_the_model_for_odd_configs(name):
    assert count_parameters(ODD[name]) == parameter_counts(ODD[name])


@pytest.mark.parametrize("name", SHIPPED)
def test_the_formulas_agree_with_the_model_for_shipped_configs(name, facts):
    counts = parameter_counts(run_of(SHIPPED[name]).model)
    found = facts[name]["parameters"]
    assert found == {field.name: getattr(counts, field.name) for field in fields(ParameterCounts)} | {
        "text": counts.text,
        "total": counts.total,
    }


# The published sizes, in the precision in which they are written down: counts of the reference implementation's model.
PUBLISHED = {
    "scout": {
        "routed_experts": "96.637 B",
        "shared_experts": "6.040 B",
        "dense_ffn": "0",
        "attention": "3.020 B",
        "router": "3.93 M",
        "embedding": "1.0345 B",
        "head": "1.0345 B",
        "text": "107.770 B",
        "vision": "0.851 B",
        "projector": "0.021 B",
        "total": "108.642 B",
        "active": "17.173 B",
    },
    "maverick": {
        "routed_experts": "386.547 B",
        "shared_experts": "3.020 B",
        "dense_ffn": "6.040 B",
        "attention": "3.020 B",
        "router": "15.73 M",
        "embedding": "1.0345 B",
        "head": "1.0345 B",
        "text": "400.712 B",
        "vision": "0.851 B",
        "projector": "0.021 B",
        "total": "401.584 B",
        "active": "17.185 B",
    },
    "behemoth": {"text": "1991.7 B", "active": "288.5 B"},
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PUBLISHED.items() for part in parts])
def test_the_published_sizes_are_found(name, part, facts):
    number, _, unit = PUBLISHED[name][part].partition(" ")
    digits = len(number.partition(".")[2])
    scale = {"B": 1e9, "M": 1e6, "": 1}[unit]
    assert f"{facts[name]['parameters'][part] / scale:.{digits}f}" == number


@pytest.mark.parametrize(("name", "without_embedding"), [("scout", 16.138), ("maverick", 16.150)])
def test_the_published_active_sizes_without_the_embedding_are_found(name, without_embedding, facts):
    counts = facts[name]["parameters"]
    assert round((counts["active"] - counts["embedding"]) / 1e9, 3) == without_embedding


@pytest.mark.parametrize(
    "path", [("blocks", 0, "attn", "gate"), ("blocks", 0, "ffn", "bias"), ("embed", "scale"), ("mtp",), ()]
)
def test_a_weight_that_no_part_knows_is_an_error(path):
    with pytest.raises(ValueError, match="belongs to no part"):
        part_of(path)


def test_a_weight_that_the_model_gains_is_not_lost_in_silence(monkeypatch):
    def gained(config):
        params = weight_shapes(config)
        return params | {"second_head": params["lm_head"]}

    monkeypatch.setattr(inspect, "weight_shapes", gained)
    with pytest.raises(ValueError, match="second_head"):
        count_parameters(SMALL)


def test_counting_asks_for_no_device():
    program = "from trainer.inspect import *; print(count_parameters(ModelConfig()).total)"
    environment = {**os.environ, "JAX_PLATFORMS": "there_is_no_such_platform", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (child.stdout, child.stderr) == (f"{parameter_counts(ModelConfig()).total}\n", "")


@pytest.mark.parametrize(("name", "length"), [("scout", 8192), ("maverick", 8192), ("tiny", 512)])
def test_flops_by_part_add_up_at_the_configs_own_length(name, length, facts):
    flops, model = facts[name]["flops"], run_of(SHIPPED[name]).model
    expected = flops_per_token(model, length)
    *parts, total = flops["forward"].values()
    assert sum(parts) == pytest.approx(total, rel=1e-12)
    assert (flops["sequence_length"], total, flops["training"]) == (length, expected.forward, expected.training)
    assert flops["image_tile"] == {"forward": expected.vision_per_tile, "training": 3 * expected.vision_per_tile}


@pytest.mark.parametrize("name", ["scout", "tiny"])
def test_the_printed_formula_gives_the_printed_flops(name, facts):
    flops = facts[name]["flops"]
    pattern = r"forward = 2 x ([\d,]+) .* \+ 4 x (\d+) heads x (\d+) x ([\d,.]+) positions .* training = (\d) x forward"
    found = re.search(pattern, flops["formula"])
    assert found
    weights, heads, width, context, passes = (float(number.replace(",", "")) for number in found.groups())
    assert 2 * weights + 4 * heads * width * context == pytest.approx(flops["forward"]["total"], rel=1e-9)
    assert passes * flops["forward"]["total"] == flops["training"]


def test_scores_of_long_documents_grow_in_global_layers_only(facts):
    by_length = {row["tokens"]: row for row in facts["scout"]["flops"]["by_length"]}
    # 36 layers within chunks of 8,192 tokens, 12 over all 1,048,576 of them, half of which a mean token sees.
    positions = 36 * 8193 / 2 + 12 * 1_048_577 / 2
    assert by_length[1_048_576]["attention_scores"] == 4 * 40 * 128 * positions


def test_the_cache_is_four_kibibytes_per_token_and_layer_and_bounded_by_the_chunk(facts):
    cache = facts["scout"]["kv_cache"]
    assert cache["bytes_per_token_and_layer"] == 4 * 1024
    assert cache["bytes_per_token"] == 192 * 1024
    assert cache["bytes_per_token_beyond_a_chunk"] == 48 * 1024
    kept = {row["tokens"]: row["bytes"] for row in cache["by_length"]}
    assert kept == {
        tokens: 4096 * (36 * min(tokens, 8192) + 12 * tokens)
        for tokens in (1024, 8192, 131_072, 32_768, 1_048_576, 10_485_760)
    }
    assert all(row["bytes_unchunked"] == 192 * 1024 * row["tokens"] for row in cache["by_length"])


def test_memory_is_counted_by_hand_for_a_small_model():
    counts = parameter_counts(SMALL)
    rows = {row["name"]: row["bytes"] for row in inspect_model(SMALL, 64)["memory"]["rows"]}
    quantised = counts.routed_experts + counts.shared_experts + counts.dense_ffn + counts.attention
    assert quantised % 128 == 0, "else the scales below are not whole"
    others = counts.router + counts.embedding + counts.head + counts.norms + counts.vision + counts.projector
    assert rows == {
        "float32": 4 * counts.total,
        "bfloat16": 2 * counts.total,
        "int8": quantised + quantised // 128 * 2 + 2 * others,
        "int4": quantised // 2 + quantised // 128 * 2 + 2 * others,
        "training": 16 * counts.total,
        "training_mixed": 16 * counts.total,
    }


def test_double_precision_trains_in_twice_the_memory():
    rows = inspect_model(replace(SMALL, param_dtype="float64"), 64)["memory"]["rows"]
    assert [row["bytes"] for row in rows if row["name"].startswith("training")] == [
        32 * parameter_counts(SMALL).total,
        16 * parameter_counts(SMALL).total,
    ]


@pytest.mark.parametrize("name", ["scout", "maverick", "behemoth"])
def test_the_config_files_quote_the_devices_that_are_counted(name, facts):
    quoted = re.search(
        r"([\d.]+) TB: (\d+) GPUs of 80 GB or (\d+)\s+TPU v5p chips of 95 GB",
        (ROOT / "configs" / f"{name}.py").read_text(),
    )
    assert quoted
    (row,) = (row for row in facts[name]["memory"]["rows"] if row["name"] == "training")
    counts = [row["devices"]["H100 80 GB"], row["devices"]["TPU v5p 95 GB"]]
    assert [int(quoted[2]), int(quoted[3])] == counts
    assert float(quoted[1]) == float(f"{row['bytes'] / 1e12:.3g}")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_facts_survive_json(name, facts):
    assert json.loads(json.dumps(facts[name])) == facts[name]


def test_the_table_shows_the_published_numbers_in_a_hundred_columns(facts):
    text = render(facts["maverick"], "maverick")
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    (total,) = (line for line in text.splitlines() if line.startswith("total"))
    assert total.split() == ["total", "401.584", "B", "100.0", "%"]
    (decoder,) = (line for line in text.splitlines() if line.startswith("text"))
    assert decoder.split()[1:3] + decoder.split()[5:7] == ["400.712", "B", "17.185", "B"]
    assert "4 KiB per token and layer, 192 KiB per token" in text
    assert "15.73 M" in text


@pytest.mark.parametrize("name", ODD)
def test_odd_models_are_shown_too(name):
    model = ODD[name]
    text = render(inspect_model(model, 64), name)
    assert ("vision encoder" in text) == (model.vision is not None)
    assert ("audio encoder" in text) == ("A window of sound costs" in text) == (model.audio is not None)
    assert ("text only" in " ".join(text.split())) == (model.vision is None and model.audio is None)
    assert ("tied" in text.split(name, 1)[1]) == model.tie_embeddings
    assert ("experts (top" in text) == any(kind.moe for kind in model.layer_kinds())
    assert max(map(len, text.splitlines())) <= 100


def test_a_terminal_without_unicode_gets_plain_lines(facts):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        inspect.show(facts["tiny"], "tiny", file)
        file.flush()
        assert b"routed experts" in raw.getvalue()
