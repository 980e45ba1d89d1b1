"""The data that come with Drover, as documents: the text of the standard library, and drawn scenes with questions."""

import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path

from data import mixture, scene_text, text
from data import scenes as drawn
from data.config import DataConfig, ImageSpec
from data.documents import Document, Part
from data.images import choose_canvas, layout
from data.tokenizer import BEGIN_OF_TEXT, Tokenizer
from data.units import Found, Unit

HELD_OUT_SCENES = 4096
_SCENES_OF_A_UNIT = 2048
_FILES_OF_A_UNIT = 64
_SCENES_FOR_TOKENIZER = 2000


def plan(name: str, config: DataConfig, image: ImageSpec | None) -> list[Unit]:
    """The units of a built-in source."""
    if name == "text":
        count = len(text.standard_library().files)
        return [
            Unit("built in", name, name, start, min(start + _FILES_OF_A_UNIT, count))
            for start in range(0, count, _FILES_OF_A_UNIT)
        ]
    assert image
    # All that decides a scene; how many tokens it takes is decided later.
    parameters = (config.seed, image.tile_size, image.tokens_per_tile, image.max_tiles)
    units = []
    for first, count in ((0, config.scenes), (drawn.HELD_OUT_START, HELD_OUT_SCENES)):
        units += [
            Unit("built in", name, name, start, min(start + _SCENES_OF_A_UNIT, first + count), parameters=parameters)
            for start in range(first, first + count, _SCENES_OF_A_UNIT)
        ]
    return units


def version(name: str) -> str:
    """Names what the documents of a source are made from."""
    if name == "text":
        return text.digest(text.standard_library().files)
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (drawn, scene_text))
    return hashlib.sha256(code).hexdigest()


def notes(name: str) -> tuple[str, ...]:
    """What is missing from a source, one line for the user each."""
    return text.standard_library().notes if name == "text" else ()


def read(unit: Unit) -> Iterator[Found]:
    """The documents of a unit."""
    if unit.path == "text":
        for file in text.standard_library().files[unit.start : unit.stop]:
            split = "heldout" if file.held_out else "train"
            yield Found(f"text/{file.name}", Document(file.name, (Part("text", text=file.text),), "text", split))
        return
    seed, *shape = unit.parameters
    image = ImageSpec(*shape)
    for index in range(unit.start, unit.stop):
        scene = drawn.make_scene(seed, index, image)
        png = io.BytesIO()
        drawn.draw(scene).save(png, "PNG", compress_level=1)
        texts = (Part("text", text=piece.text) for piece in scene_pieces(seed, scene))
        split = "heldout" if index >= drawn.HELD_OUT_START else "train"
        document = Document(str(index), (Part("image", data=png.getvalue()), *texts), "scenes", split)
        yield Found(f"scenes/{index}", document)


def tokenizer_texts(config: DataConfig, image: ImageSpec | None) -> list[str]:
    """Texts of the training split for a tokenizer to be trained on."""
    names, texts = mixture.names(config), []
    if "text" in names:
        texts += [file.text for file in text.standard_library().files if not file.held_out]
    if image is not None and "scenes" in names:
        for index in range(_SCENES_FOR_TOKENIZER):
            scene = drawn.make_scene(config.seed, index, image)
            texts.append("".join(piece.text for piece in scene_pieces(config.seed, scene)))
    return texts


def scene_pieces(seed: int, scene: drawn.Scene) -> list[scene_text.Piece]:
    """What is said about a scene."""
    return scene_text.document(scene, random.Random(f"text/{seed}/{scene.index}"))


def scene_prefix(scene: drawn.Scene, image: ImageSpec, tokenizer: Tokenizer) -> list[int]:
    """Tokens that a scene's document begins with: begin-of-text and the picture."""
    names = layout(choose_canvas(scene.height, scene.width, image), image)
    return [tokenizer.special[BEGIN_OF_TEXT], *(tokenizer.special[name] for name in names)]
