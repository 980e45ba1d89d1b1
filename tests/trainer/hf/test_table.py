"""The bijection: every parameter and every tensor once, the same numbers both ways, whole, by part and by slice."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from model.config import ModelConfig
from sharding.errors import UserError
from tests.trainer.hf.checkpoints import GOLDEN, MODELS, tensors_of
from trainer.hf.config import read_model_config
from trainer.hf.table import check_tensors, from_hf, table, to_hf
from trainer.step import Skeleton


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_and_every_tensor_is_in_the_table_and_comes_back(name: str) -> None:
    model = read_model_config(GOLDEN / name)
    tensors = tensors_of(GOLDEN / name)
    params = from_hf(tensors, model)
    abstract = Skeleton(model).abstract_params
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    again = to_hf(params, model)
    assert again.keys() == tensors.keys()
    for tensor in tensors:
        np.testing.assert_array_equal(again[tensor], tensors[tensor], err_msg=tensor)


def test_where_each_number_goes_is_where_the_formats_say() -> None:
    """Against the definitions, not against the inverse."""
    model = read_model_config(GOLDEN / "multimodal")
    tensors, params = tensors_of(GOLDEN / "multimodal"), from_hf(tensors_of(GOLDEN / "multimodal"), model)
    N, H, F = model.num_heads, model.head_dim, model.expert_ffn_size
    for layer in range(model.num_layers):
        place, repeat = layer % len(model.super_block()), layer // len(model.super_block())
        ours = params["blocks"][place]
        theirs = f"language_model.model.layers.{layer}."
        q = tensors[f"{theirs}self_attn.q_proj.weight"]
        o = tensors[f"{theirs}self_attn.o_proj.weight"]
        fused = tensors[f"{theirs}feed_forward.experts.gate_up_proj"]
        router = tensors[f"{theirs}feed_forward.router.weight"]
        for head, i in itertools.product(range(N), range(H)):
            np.testing.assert_array_equal(ours["attn"]["q"][repeat, :, head, i], q[head * H + i])
            np.testing.assert_array_equal(ours["attn"]["o"][repeat, head, i], o[:, head * H + i])
        np.testing.assert_array_equal(ours["ffn"]["experts"]["gate"][repeat], fused[:, :, :F])
        np.testing.assert_array_equal(ours["ffn"]["experts"]["up"][repeat], fused[:, :, F:])
        np.testing.assert_array_equal(ours["ffn"]["router"][repeat], router.T)


def test_tied_embeddings_have_no_tensor_of_their_own() -> None:
    tied = dataclasses.replace(read_model_config(GOLDEN / "text_scout"), tie_embeddings=True)
    tensors = tensors_of(GOLDEN / "text_scout")
    with pytest.raises(UserError, match=r"left over lm_head\.weight"):
        from_hf(tensors, tied)
    del tensors["lm_head.weight"]
    params = from_hf(tensors, tied)
    assert "lm_head" not in params
    assert to_hf(params, tied).keys() == tensors.keys()


def test_any_slice_of_a_leaf_is_that_slice_of_the_whole() -> None:
    """What each device of a mesh asks for."""
    model = read_model_config(GOLDEN / "multimodal")
    tensors = tensors_of(GOLDEN / "multimodal")
    rng = np.random.default_rng(0)
    for leaf in table(model):
        whole = leaf.read(tensors, np.dtype(np.float32))
        cuts = [sorted(rng.integers(0, size + 1, 2)) for size in leaf.shape]
        index = tuple(slice(int(a), int(b)) for a, b in cuts)
        np.testing.assert_array_equal(leaf.read(tensors, np.dtype(np.float32), index), whole[index], err_msg=leaf.path)


def test_a_part_reads_one_expert_and_no_other() -> None:
    class Counted:
        """A tensor that remembers what was asked of it."""

        def __init__(self, array: np.ndarray):
            self.array, self.shape, self.dtype, self.asked = array, array.shape, array.dtype, []

        def __getitem__(self, index):
            self.asked.append(index)
            return self.array[index]

    model = read_model_config(GOLDEN / "text_scout")
    counted = {name: Counted(tensor) for name, tensor in tensors_of(GOLDEN / "text_scout").items()}
    leaf = next(leaf for leaf in table(model) if leaf.path == "blocks.1.ffn.experts.up")
    leaf.part(counted, (0, 2))
    assert counted["model.layers.1.feed_forward.experts.gate_up_proj"].asked == [2]
    assert sum(len(tensor.asked) for tensor in counted.values()) == 1


def test_every_missing_left_over_and_misshapen_tensor_is_listed() -> None:
    model = read_model_config(GOLDEN / "text_scout")
    tensors = tensors_of(GOLDEN / "text_scout")
    del tensors["model.norm.weight"]
    tensors["model.layers.9.odd"] = np.zeros((2, 3), np.float32)
    tensors["lm_head.weight"] = np.zeros((7, 64), np.float32)
    with pytest.raises(UserError) as error:
        check_tensors(tensors, model)
    message = str(error.value)
    assert "missing model.norm.weight [64]" in message
    assert "left over model.layers.9.odd [2, 3]" in message
    assert "lm_head.weight: found shape [7, 64], expected [256, 64]" in message


def test_layers_of_different_precision_are_refused() -> None:
    model = read_model_config(GOLDEN / "text_interleaved")
    wide = dataclasses.replace(model, num_layers=2 * model.num_layers)
    shapes = {name: leaf.hf_shape for leaf in table(wide) for name in leaf.names}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    check_tensors(tensors, wide)
    tensors["model.layers.4.self_attn.q_proj.weight"] = tensors["model.layers.4.self_attn.q_proj.weight"].astype("f2")
    with pytest.raises(UserError, match=r"model.layers.4.self_attn.q_proj.weight: found float16, expected float32"):
        check_tensors(tensors, wide)


def test_the_table_of_the_real_sizes_covers_every_parameter() -> None:
    for config in (ModelConfig(), ModelConfig(num_experts=128, moe_layer_step=2)):
        abstract = jax.tree_util.tree_leaves_with_path(Skeleton(config).abstract_params)
        shapes = {tuple(key.key for key in path): leaf.shape for path, leaf in abstract}
        assert {leaf.keys: leaf.shape for leaf in table(config)} == shapes
