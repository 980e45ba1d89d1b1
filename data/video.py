"""Clips to pictures: how long a clip is, and the frames that it shows at given times.

Everything is found by decoding, never taken from the header. Times count in whole milliseconds from the first frame
shown; a frame begins at its time rounded down. This use of video is Drover's own: Llama 4 has none.
"""

import contextlib
import io
import itertools
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.error import ArgumentError
from av.stream import Disposition
from av.video.reformatter import Interpolation
from PIL import Image

from data.config import VideoSpec
from data.containers import shortfall
from sharding.errors import UserError

MAX_PIXELS = 2**24
"""Of one frame. A decoder keeps up to some twenty of them."""
MAX_SECONDS = 3600
MAX_FRAMES = 60 * MAX_SECONDS
MAX_DECODED = 2**40
"""Pixels of all frames: an hour of 3840 x 2160 at 30 frames a second has four fifths of it."""

_ONE_FRAME = Fraction(1, 25)
"""Seconds that a single frame lasts if the file does not say."""
_EXACT = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
"""Colours are converted to the same bits on every processor."""
_PICTURES = (b"heic", b"heix", b"mif1", b"avif")
"""Kinds of ISO media files that hold no clip."""
_PACKET = re.compile(rb"\x00*\x00\x00\x01([\xb9-\xff])")
"""How one of an MPEG program stream begins, filling before it."""


@dataclass(frozen=True)
class VideoFacts:
    """What a clip is; height and width are those of the first frame, upright."""

    duration_ms: int
    height: int
    width: int
    frames: int


def probe_video(data: bytes, name: str) -> VideoFacts:
    """Decodes a clip once, keeping no frames.

    Args:
        data: the content of a video file: MP4, MOV, Matroska, WebM, AVI, MPEG (PS or TS), Ogg or GIF.
        name: what a message calls it.

    Returns:
        Its facts. The duration lasts from the first frame shown to the end of the last one.

    Raises:
        UserError: no video, damaged, cut short, too long or of too many pixels. Programs are never run, and files and
            addresses that are named inside the data never opened.
    """
    with _refusals(name):
        frames, size, last, lasts = 0, (0, 0), Fraction(0), Fraction(0)
        for frame, start, duration in _shown(data, name):
            if not frames:
                size = (frame.width, frame.height) if _turn(frame)[0] else (frame.height, frame.width)
            frames, last, lasts = frames + 1, start, duration
        if not lasts:  # unknown: as long as the others are on average
            lasts = last / (frames - 1) if last else _ONE_FRAME
        return VideoFacts(max(1, round((last + lasts) * 1000)), *size, frames)


def sample_times(duration_ms: int, spec: VideoSpec) -> list[int]:
    """Milliseconds in [0, duration): every 1/rate from 0; where these are too many, `max_frames` evenly spaced ones."""
    step = max(1000 / spec.frames_per_second, 1.0)
    times = []
    while (time := math.floor(len(times) * step + 0.5)) < duration_ms:
        if len(times) == spec.max_frames:
            return [i * duration_ms // spec.max_frames for i in range(spec.max_frames)]
        times.append(time)
    return times


def read_frames(data: bytes, times_ms: Sequence[int], name: str) -> Iterator[Image.Image]:
    """The frame shown at each of these times: the last one that begins at or before it. One picture is held at a time,
    since a few of the largest would fill a machine.

    Decodes from the beginning up to the latest time. A time past the end has the last frame.

    Args:
        data: the content of a video file.
        times_ms: in the order of time.
        name: what a message calls it.

    Yields:
        RGB pictures, upright, each of its frame's size; transparency shows white. Frames of high dynamic range are not
        tone-mapped, pixels are taken as square.

    Raises:
        UserError: as `probe_video`.
    """
    assert list(times_ms) == sorted(times_ms)
    with _refusals(name):
        waiting = deque(times_ms)
        last = None
        for frame, start, _ in _shown(data, name) if waiting else ():
            begin = math.floor(start * 1000)
            if last is not None and waiting[0] < begin:
                picture = _picture(last)
                while waiting and waiting[0] < begin:
                    waiting.popleft()
                    yield picture
                if not waiting:
                    return
            last = frame
        if last is not None:
            yield from itertools.repeat(_picture(last), len(waiting))


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ArgumentError as error:  # also what a decoder says to a limit on pixels
        raise UserError(
            f"video {name}: damaged, cut short, or of more than {MAX_PIXELS:,} pixels a frame ({error.strerror}). Save or "
            "download it again, or scale it down."
        ) from error
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise _damaged(name, getattr(error, "strerror", None) or error) from error


def _damaged(name: str, reason: object) -> UserError:
    return UserError(f"video {name}: damaged or cut short ({reason}). Save or download it again.")


def _shown(data: bytes, name: str) -> Iterator[tuple[av.VideoFrame, Fraction, Fraction]]:
    """(frame, when it begins, how long it lasts or 0 if that is unknown), in seconds, in the order of showing."""
    with _opened(data, name) as container:
        stream = _stream(container, name)
        first, last, frames, pixels = None, Fraction(0), 0, 0
        for frame in _decoded(container, stream, name):
            if frame.pts is None or frame.time_base is None:
                raise _damaged(name, "a frame has no time")
            time = frame.pts * frame.time_base
            first = time if first is None else first
            start, duration = time - first, max(frame.duration, 0) * frame.time_base
            if start < last:
                raise _damaged(name, f"frame {frames + 1:,} is to be shown before the one before it")
            last, frames, pixels = start, frames + 1, pixels + frame.height * frame.width
            _check_length(start + duration, frames, name)
            _check_pixels(frame.height, frame.width, name)
            if pixels > MAX_DECODED:
                raise UserError(
                    f"video {name}: found more than {MAX_DECODED:,} pixels in its first {frames:,} frames. Scale it down, or "
                    "cut it into parts."
                )
            yield frame, start, duration
        if not frames:
            raise _damaged(name, "it has no frames")


def _decoded(container: InputContainer, stream: av.VideoStream, name: str) -> Iterator[av.VideoFrame]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _damaged(name, "a part of it is incomplete")
        for frame in packet.decode():
            if not isinstance(frame, av.VideoFrame) or frame.is_corrupt:
                raise _damaged(name, "a frame could not be decoded")
            yield frame


def _opened(data: bytes, name: str) -> InputContainer:
    form = _format(data)
    if form is None:
        raise UserError(
            f"video {name}: found {len(data):,} bytes in no known format, expected MP4, MOV, Matroska, WebM, AVI, MPEG (PS "
            "or TS), Ogg or GIF. If it is a video in another format (WMV, FLV), convert it; if not, save or download it again."
        )
    if reason := _shortfall_of_packets(data) if form == "mpeg" else shortfall(data):
        raise _damaged(name, reason)
    # The format is given: no other one is tried. A protocol of no name: nothing else can be opened from within.
    options = {"protocol_whitelist": "none", "format_whitelist": form, "max_pixels": str(MAX_PIXELS)}
    return av.open(io.BytesIO(data), "r", form, options, metadata_errors="replace")


def _format(data: bytes) -> str | None:
    """FFmpeg's name of the container, by its first bytes; None for all that is not accepted."""
    if data[:4] == b"\x1aE\xdf\xa3":
        return "matroska"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "avi"
    if data[:4] == b"OggS":
        return "ogg"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide") and data[8:12] not in _PICTURES:
        return "mov"
    if data[:4] == b"\0\0\1\xba":
        return "mpeg"
    if data[:1] == data[188:189] == b"G":
        return "mpegts"
    return None


def _shortfall_of_packets(data: bytes) -> str | None:
    """Where a program stream ends within a packet, or has something else; None if it does not."""
    at = 0
    while found := _PACKET.match(data, at):
        at, code = found.end(), found[1]
        head = data[at : at + 10]
        if code == b"\xb9":  # the end
            continue
        if len(head) < (10 if code == b"\xba" else 2):
            return f"it ends within the header of a packet, at byte {at:,}"
        if code == b"\xba":  # begins a pack, in MPEG-2 or MPEG-1
            at += 10 + head[9] % 8 if head[0] >> 6 == 1 else 8
        else:
            at += 2 + int.from_bytes(head[:2], "big")
    if at > len(data):
        return f"its last packet ends at byte {at:,}, the file has {len(data):,}"
    return f"byte {at:,} begins no packet" if data[at:].strip(b"\0") else None


def _stream(container: InputContainer, name: str) -> av.VideoStream:
    """The clip's stream, ready to decode; refuses by the header what need not be decoded."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
        raise UserError(f"video {name}: found no video stream, only {_others(container)}. Check how the file was made.")
    context = stream.codec_context
    if context is None:
        raise UserError(f"video {name}: found a codec that FFmpeg does not know. Convert it, to H.264 for example.")
    _check_length(Fraction(container.duration or 0, av.time_base), stream.frames, name)
    _check_pixels(context.height, context.width, name)
    context.options = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(MAX_PIXELS)}
    context.thread_count = 1  # the workers that make batches are the ones that run side by side
    return stream


def _others(container: InputContainer) -> str:
    kinds = {"a cover" if stream.type == "video" else str(stream.type) for stream in container.streams}
    return ", ".join(sorted(kinds)) or "an empty container"


def _check_length(seconds: Fraction, frames: int, name: str) -> None:
    if seconds > MAX_SECONDS or frames > MAX_FRAMES:
        raise UserError(
            f"video {name}: found {float(seconds):,.0f} s and {frames:,} frames so far, expected at most {MAX_SECONDS:,} s "
            f"and {MAX_FRAMES:,} frames. Cut it into parts."
        )


def _check_pixels(height: int, width: int, name: str) -> None:
    if height * width > MAX_PIXELS:
        raise UserError(
            f"video {name}: found {width:,} x {height:,} pixels, expected at most {MAX_PIXELS:,} in a frame. Scale it down."
        )


def _picture(frame: av.VideoFrame) -> Image.Image:
    clear = any(component.is_alpha for component in frame.format.components)
    plain = frame.reformat(format="rgba" if clear else "rgb24", interpolation=_EXACT, threads=1)
    picture = Image.fromarray(plain.to_ndarray())
    if clear:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    for applies, method in zip(_turn(frame), _METHODS, strict=True):
        if applies:
            picture = picture.transpose(method)
    return picture


_METHODS = (Image.Transpose.TRANSPOSE, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM)


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Which of `_METHODS` turn a frame upright, one after the other; angles between are taken for the nearest."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind that PyAV does not know hides the others
        angle = math.radians(frame.rotation)
        a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    else:
        # x' = a x + c y, y' = b x + d y, in fixed point; the rest of the 3 x 3 moves the picture
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
    if abs(a) + abs(d) < abs(b) + abs(c):
        return True, c < 0, b < 0
    return False, a < 0, d < 0
