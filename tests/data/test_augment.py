"""Images are changed at random, but each batch always alike, and never in size, nor where nobody learns from them."""

import dataclasses
import typing

import numpy as np
import pytest
from PIL import Image

from data import config
from data.augment import AUGMENTATIONS, augmented
from data.pipeline import build_dataset

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_a_change_keeps_the_size_and_is_decided_by_the_key(name):
    image = Image.fromarray(PIXELS)
    found = [np.asarray(augmented(image, (name,), (1, key))) for key in range(30)]
    assert {pixels.shape for pixels in found} == {PIXELS.shape}
    assert len({pixels.tobytes() for pixels in found}) > 1
    np.testing.assert_array_equal(np.asarray(augmented(image, (name,), (1, 7))), found[7])
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_a_mirrored_picture_is_the_other_way_round():
    found = {np.asarray(augmented(Image.fromarray(PIXELS), ("mirror",), (key,))).tobytes() for key in range(30)}
    assert found == {PIXELS.tobytes(), PIXELS[:, ::-1].tobytes()}


def test_the_option_has_their_names():
    assert typing.get_args(config.Augmentation) == tuple(AUGMENTATIONS)


def test_batches_differ_in_their_pictures_alone_and_come_again(scenes_only):
    changed = dataclasses.replace(scenes_only.config, augment=("mirror", "colour"))
    dataset, again = (build_dataset(changed, scenes_only.media, "train") for _ in range(2))
    plain, batch = scenes_only.batch(4), dataset.batch(4)
    assert [name for name in batch if not np.array_equal(batch[name], plain[name])] == ["image_tiles"]
    part = again.batch(4, [2, 0])
    for name, array in part.items():
        np.testing.assert_array_equal(array, batch[name][[2, 0]])
    assert dataset.digest != scenes_only.digest
    held_out = [build_dataset(c, scenes_only.media, "heldout").batch(0) for c in (changed, scenes_only.config)]
    np.testing.assert_array_equal(held_out[0]["image_tiles"], held_out[1]["image_tiles"])
