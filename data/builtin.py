"""The data that come with Drover, as documents: the text of the standard library, and what is made on the spot, with
questions: drawn scenes, short clips, sequences of tones."""

import hashlib
import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import ask, clips, mixture, scene_text, text, tones
from data import scenes as drawn
from data.config import DataConfig, ImageSpec
from data.documents import Document, Kind, Part
from data.units import Found, Unit

MADE: dict[str, Kind] = {"scenes": "image", "clips": "video", "tones": "audio"}
"""Sources that are made on the spot, and the kind of file that their documents begin with."""
HELD_OUT = 4096
"""Held-out documents of each of them, which questions are asked about."""
_HELD_OUT_READ = 1024
"""How many of these are drawn or played in advance, for the held-out loss."""
_MADE_OF_A_UNIT = 2048
_FILES_OF_A_UNIT = 64
_MADE_FOR_TOKENIZER = 2000
_CODE = {"scenes": (drawn, scene_text), "clips": (drawn, scene_text, ask, clips), "tones": (scene_text, ask, tones)}
"""Modules that make each source."""

Made = drawn.Scene | clips.Clip | tones.Tones
"""What a document is about."""


def plan(name: str, config: DataConfig, image: ImageSpec | None) -> list[Unit]:
    """The units of a built-in source."""
    if name == "text":
        count = len(text.standard_library().files)
        return [
            Unit("built in", name, name, start, min(start + _FILES_OF_A_UNIT, count))
            for start in range(0, count, _FILES_OF_A_UNIT)
        ]
    parameters = parameters_of(name, config, image)
    units = []
    for first, count in ((0, int(getattr(config, name))), (drawn.HELD_OUT_START, _HELD_OUT_READ)):
        units += [
            Unit("built in", name, name, start, min(start + _MADE_OF_A_UNIT, first + count), parameters=parameters)
            for start in range(first, first + count, _MADE_OF_A_UNIT)
        ]
    return units


def parameters_of(name: str, config: DataConfig, image: ImageSpec | None) -> tuple[Any, ...]:
    """All that decides a document of a source that is made on the spot; how many tokens it takes is decided later."""
    if name == "tones":
        return (config.seed,)
    assert image
    return (config.seed, image.tile_size, *((image.tokens_per_tile, image.max_tiles) if name == "scenes" else ()))


def version(name: str) -> str:
    """Names what the documents of a source are made from."""
    if name == "text":
        return text.digest(text.standard_library().files)
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in _CODE[name])
    return hashlib.sha256(code).hexdigest()


def notes(name: str) -> tuple[str, ...]:
    """What is missing from a source, one line for the user each."""
    return text.standard_library().notes if name == "text" else ()


def read(unit: Unit) -> Iterator[Found]:
    """The documents of a unit."""
    if unit.path == "text":
        files = text.standard_library().files[unit.start : unit.stop]
        for i, file in enumerate(files, start=1):
            split = "heldout" if file.held_out else "train"
            document = Document(file.name, (Part("text", text=file.text),), "text", split)
            yield Found(f"text/{file.name}", document, i / len(files))
        return
    for index in range(unit.start, unit.stop):
        split = "heldout" if index >= drawn.HELD_OUT_START else "train"
        thing = made(unit.path, index, unit.parameters)
        texts = (Part("text", text=piece.text, weight=piece.weight) for piece in pieces(thing, unit.parameters))
        document = Document(str(index), (file_of(thing), *texts), unit.path, split)
        yield Found(f"{unit.path}/{index}", document, (index + 1 - unit.start) / (unit.stop - unit.start))


def tokenizer_texts(config: DataConfig, image: ImageSpec | None) -> list[str]:
    """Texts of the training split for a tokenizer to be trained on."""
    names, texts = mixture.names(config), []
    if "text" in names:
        texts += [file.text for file in text.standard_library().files if not file.held_out]
    for name in MADE:
        if name in names and (image is not None or name == "tones"):
            parameters = parameters_of(name, config, image)
            for index in range(_MADE_FOR_TOKENIZER):
                texts.append("".join(piece.text for piece in pieces(made(name, index, parameters), parameters)))
    return texts


def made(name: str, index: int, parameters: tuple[Any, ...]) -> Made:
    """What a source shows or plays under this index."""
    seed, *others = parameters
    if name == "scenes":
        return drawn.make_scene(seed, index, ImageSpec(*others))
    return clips.make_clip(seed, index, *others) if name == "clips" else tones.make_tones(seed, index)


def file_of(thing: Made) -> Part:
    """Its picture, video or sound."""
    if isinstance(thing, clips.Clip):
        return Part("video", data=clips.encode(thing))
    if isinstance(thing, tones.Tones):
        return Part("audio", data=tones.encode(thing))
    png = io.BytesIO()
    drawn.draw(thing).save(png, "PNG", compress_level=1)
    return Part("image", data=png.getvalue())


def pieces(thing: Made, parameters: tuple[Any, ...]) -> list[scene_text.Piece]:
    """What is said about it."""
    seed = parameters[0]
    if isinstance(thing, clips.Clip):
        return clips.document(thing, random.Random(f"clips/text/{seed}/{thing.index}"))
    if isinstance(thing, tones.Tones):
        return tones.document(thing, random.Random(f"tones/text/{seed}/{thing.index}"))
    return scene_text.document(thing, random.Random(f"text/{seed}/{thing.index}"))
