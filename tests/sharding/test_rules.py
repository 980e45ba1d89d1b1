"""Rules from the names of dims to mesh axes."""

import dataclasses

import pytest

from sharding.errors import UserError
from sharding.mesh import DeviceMesh
from sharding.rules import Rules
from tests.oracle_cases import TINY
from trainer.step import Skeleton

MESH = {"data": 2, "fsdp": 4, "expert": 2, "tensor": 2}


def test_dims_are_split_by_name_and_leading_ones_are_whole() -> None:
    rules = Rules()
    assert rules.split("w", ("width", "heads", "head"), (3, 16, 4, 6), MESH) == (
        (),
        ("fsdp", "expert"),
        ("tensor",),
        (),
    )
    assert rules.split("w", ("experts", "expert_width", "expert_ffn"), (8, 16, 6), MESH) == (
        ("expert",),
        ("fsdp",),
        ("tensor",),
    )
    assert rules.split("w", (), (16,), MESH) == ((),)
    assert rules.split("w", ("width",), (16,), {"data": 8, "fsdp": 1, "expert": 1}) == ((),)


def test_dims_of_the_vision_encoder_are_split_as_far_as_they_divide() -> None:
    assert Rules().split("w", ("vision_width",), (1408,), MESH) == (("fsdp", "expert"),)
    assert Rules().split("w", ("vision_width",), (12,), MESH) == (("fsdp",),)
    assert Rules().split("w", ("vision_width",), (7,), MESH) == ((),)


def test_dims_of_the_audio_encoder_are_split_as_far_as_they_divide() -> None:
    assert Rules().split("w", ("audio_width", "audio_heads", "head"), (3, 12, 2, 6), MESH) == (
        (),
        ("fsdp",),
        (),
        (),
    )


def test_an_axis_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match=r"fsdp=4 x expert=2 does not divide width of the weight w, which is 12"):
        Rules().split("w", ("width", "ffn"), (12, 8), MESH)


def test_two_dims_that_claim_one_axis_are_refused() -> None:
    with pytest.raises(UserError, match=r"fsdp would split two dims of the weight w, \('width', 'expert_width'\)"):
        Rules(width=("fsdp",)).split("w", ("width", "expert_width"), (8, 8), MESH)


def test_of_a_model_the_refusal_names_the_weight() -> None:
    model = dataclasses.replace(TINY, dense_ffn_size=9)
    with pytest.raises(UserError, match=r"tensor=2 does not divide ffn of the weight blocks\.0\.ffn\.\w+, which is 9"):
        Skeleton(model, DeviceMesh.planned({"tensor": 2}))
