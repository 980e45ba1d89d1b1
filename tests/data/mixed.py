"""A small data set with every kind of file, and what its batches should be, derived slowly from the documents themselves."""

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

from data import audio, video
from data.config import AudioSpec, ImageSpec, MediaSpec, VideoSpec
from data.images import layout, load_image, tiles
from data.prepare import Options, prepare
from data.tokenizer import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    VIDEO_END,
    VIDEO_START,
    Tokenizer,
)

MEDIA = MediaSpec(
    image=ImageSpec(tile_size=16, tokens_per_tile=2, max_tiles=4),
    video=VideoSpec(frames_per_second=2.0, max_frames=3),
    audio=AudioSpec(mel_bins=8, frames_per_window=32, tokens_per_window=4),
)


def image(i: int, size: tuple[int, int]) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sound(i: int, samples: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(i).normal(0, 0.1, samples), 16000, format="WAV")
    return file.getvalue()


def clip(i: int, frames: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width, stream.height, stream.pix_fmt = 40, 24, "bgr0"
        for n in range(frames):
            pixels = np.full((24, 40, 3), (i * 40 + n * 20) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    return file.getvalue()


def write(folder: Path, count: int = 40) -> list[dict[str, Any]]:
    """Documents in folder/mixed.jsonl, with files beside it."""
    random = np.random.default_rng(0)
    records = []
    for i in range(count):
        parts: list[dict[str, Any]] = []
        for k in range(int(random.integers(1, 4))):
            kind = ("text", "image", "audio", "video")[int(random.integers(0, 4))]
            name = f"{kind}{i}_{k}"
            if kind == "text":
                text = f"text {i} {k} " + "x" * int(random.integers(0, 30))
                parts.append({"type": "text", "text": text} | ({"weight": 0.5} if i % 5 == 0 else {}))
            elif kind == "image":
                size = (int(random.integers(8, 40)), int(random.integers(8, 40)))
                (folder / name).write_bytes(image(i, size))
            elif kind == "audio":
                (folder / name).write_bytes(sound(i, int(random.integers(2000, 16000))))
            else:
                (folder / name).write_bytes(clip(i, int(random.integers(1, 9))))
            if kind != "text":
                parts.append({"type": kind, "path": name})
        parts.append({"type": "text", "text": f"the end of {i}"})
        records.append({"id": str(i), "parts": parts, "split": "heldout" if i % 10 == 9 else "train"})
    (folder / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def prepared(folder: Path, **options: Any) -> Path:
    out = folder / "prepared"
    prepare([folder / "mixed.jsonl"], out, Options(tokenizer="bytes", **options), 1, lambda told: None)
    return out


def slow_document(record: dict[str, Any], folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokens, weights, tiles and windows of a document, part by part; files are decoded from where they lie."""
    special, spec = tokenizer.special, MEDIA
    assert spec.image and spec.audio
    tokens, weights = [special[BEGIN_OF_TEXT]], [0.0]
    cut: list[tuple[np.ndarray, list[int]]] = []
    heard: list[tuple[np.ndarray, list[int]]] = []

    def place(name: str) -> int:
        tokens.append(special[name])
        weights.append(0.0)
        return len(tokens) - 1

    def picture(opened: Image.Image, most: int) -> None:
        pieces, canvas = tiles(opened, ImageSpec(16, 2, most))
        places = [place(name) for name in layout(canvas, ImageSpec(16, 2, most))]
        patches = [at for at in places if tokens[at] == special["<|patch|>"]]
        for n, piece in enumerate(pieces):
            cut.append((piece, patches[2 * n : 2 * n + 2]))

    for part in record["parts"]:
        if part["type"] == "text":
            ids = tokenizer.encode(part["text"])
            tokens += ids
            weights += [part.get("weight", 1.0)] * len(ids)
            continue
        data = (folder / part["path"]).read_bytes()
        if part["type"] == "image":
            picture(load_image(folder / part["path"]), 4)
        elif part["type"] == "video":
            place(VIDEO_START)
            times = video.sample_times(video.probe_video(data, "clip").duration_ms, spec.video)
            for time, frame in zip(times, video.read_frames(data, times, "clip"), strict=True):
                ids = tokenizer.encode(f"{time / 1000:g}s")
                tokens += ids
                weights += [0.0] * len(ids)
                picture(frame, 1)
            place(VIDEO_END)
        else:
            samples = audio.read_audio(data, "sound")
            place(AUDIO_START)
            places = [place(AUDIO) for _ in range(audio.token_count(len(samples), spec.audio))]
            for n, window in enumerate(audio.windows(samples, spec.audio)):
                of_window = places[4 * n : 4 * n + 4]
                heard.append((window, of_window + [-1] * (4 - len(of_window))))
            place(AUDIO_END)
    tokens.append(special[END_OF_TEXT])
    weights.append(record["parts"][-1].get("weight", 1.0))
    return {"tokens": tokens, "weights": weights, "tiles": cut, "windows": heard}
