"""A file is read by what it is, where its name ends as its kind does."""

import io

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from data.files import EXTENSIONS
from tests.data.prepare_work import made, records, rejected
from tests.data.test_video import clip

IMAGES = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}
SOUNDS = {"oga": ("OGG", "VORBIS"), "opus": ("OGG", "OPUS"), "wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16")}
SOUNDS |= {"ogg": ("OGG", "VORBIS"), "mp3": ("MP3", "MPEG_LAYER_III")}
VIDEOS = {"mp4": ("mp4", "mpeg4"), "m4v": ("mp4", "mpeg4"), "mov": ("mov", "mpeg4"), "mkv": ("matroska", "mpeg4")}
VIDEOS |= {
    "avi": ("avi", "mpeg4"),
    "webm": ("webm", "libvpx"),
    "ogv": ("ogg", "libvpx"),
    "ts": ("mpegts", "mpeg2video"),
}
VIDEOS |= {"mpg": ("mpeg", "mpeg1video"), "mpeg": ("vob", "mpeg2video")}


def content(kind: str, ending: str) -> bytes:
    if kind == "video":
        return clip(*VIDEOS[ending])
    file = io.BytesIO()
    if kind == "image":
        Image.new("RGB", (8, 8)).save(file, IMAGES.get(ending, ending.upper()))
    else:
        name, codec = SOUNDS[ending]
        soundfile.write(file, np.zeros(16_000, np.float32), 16_000, format=name, subtype=codec)
    return file.getvalue()


@pytest.mark.usefixtures("quick")
@pytest.mark.skipif("libvpx" not in av.codecs_available, reason="no encoder of VP8")
def test_a_file_of_every_ending_that_is_listed_is_read(tmp_path):
    kinds = {f"{ending[1:]}{ending}": kind for kind, endings in EXTENSIONS.items() for ending in endings}
    assert {"opus.opus", "ts.ts", "ogv.ogv", "mpg.mpg"} <= kinds.keys()  # docs/DATA.md has their formats
    for name, kind in kinds.items():
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content(kind, name.split(".")[0]))
    data = made(tmp_path / "out", tmp_path / "in", keep_duplicates=True)
    assert rejected(tmp_path / "out") == []
    assert {record.where[3:]: record.files[0].kind for record in records(data)} == kinds
