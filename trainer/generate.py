"""Text from a trained run: a prompt, and images if there are any, to a stream of text."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from data.config import ImageSpec
from data.images import layout, load_image, tiles
from data.tokenizer import BEGIN_OF_TEXT, PATCH, Tokenizer
from sharding.errors import UserError
from trainer.checkpoint import Checkpoints
from trainer.config import RunConfig
from trainer.decode import Decoder, Prompt
from trainer.initialise import abstract_state
from trainer.rundir import RunDirectory
from trainer.runtime import configure_jax
from trainer.step import Skeleton


def generate(
    workdir: Path, prompt: str, images: Sequence[Path], max_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    """Continues a document that begins with `images` and `prompt`, and yields the text piece by piece.

    It ends at a token that ends a document, or after `max_tokens`. Temperature 0 always takes the likeliest token.
    Raises `UserError` where the run, an image or their number does not allow it.
    """
    directory = RunDirectory(workdir)
    run = directory.load_config()
    configure_jax(run)
    checkpoints = Checkpoints(directory.checkpoints)
    step = checkpoints.latest()
    if step is None:
        raise UserError(f"{directory.root}: has no checkpoint yet. Train it first: drover train --workdir {workdir}.")
    tokenizer = directory.load_tokenizer(checkpoints.metadata(step)["tokenizer_digest"])
    request = make_prompt(run, tokenizer, prompt, images)
    device = jax.devices()[0]
    state = checkpoints.restore_weights(step, abstract_state(run, device))
    decoder = Decoder(Skeleton(run.model, device.platform), state.params, state.router_bias)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    specials = set(tokenizer.special.values())
    for (token,) in decoder.stream([request], max_tokens, temperature, seed):
        if int(token) in specials:
            break
        yield utf8.decode(tokenizer.token_bytes(int(token)))
    yield utf8.decode(b"", final=True)


def make_prompt(run: RunConfig, tokenizer: Tokenizer, text: str, images: Sequence[Path]) -> Prompt:
    """Begin-of-text, the images, the text."""
    spec = run.image_spec
    if images and spec is None:
        raise UserError(f"--image: the model of run {run.name} has no vision encoder (model.vision is None).")
    tokens, tile_list = [tokenizer.special[BEGIN_OF_TEXT]], []
    for path in images:
        names, tiles_M = _image_tokens(path, spec)  # pyright: ignore[reportArgumentType]
        tokens += [tokenizer.special[name] for name in names]
        tile_list.append(tiles_M)
    ids = np.asarray(tokens + tokenizer.encode(text), np.int32)
    if not tile_list:
        return Prompt(ids)
    all_tiles = np.concatenate(tile_list)
    places = np.flatnonzero(ids == tokenizer.special[PATCH]).reshape(len(all_tiles), -1)
    return Prompt(ids, all_tiles, places)


def _image_tokens(path: Path, spec: ImageSpec) -> tuple[list[str], np.ndarray]:
    tiles_M, canvas = tiles(load_image(path), spec)
    return layout(canvas, spec), tiles_M
