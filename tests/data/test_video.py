"""Clips of every kind give the frames that are shown, or one message that names the file."""

import io
import itertools
import re
import struct
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import video
from data.config import VideoSpec
from sharding.errors import UserError

KINDS = [
    ("mp4", "mpeg4", "yuv420p"),
    ("mp4", "libx264", "yuv420p"),
    ("mov", "mjpeg", "yuvj420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("webm", "libvpx", "yuv420p"),
    ("matroska", "ffv1", "yuv420p"),
    ("avi", "mpeg4", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("mpegts", "libx264", "yuv420p"),
    ("mpegts", "mpeg2video", "yuv420p"),
    ("mpeg", "mpeg1video", "yuv420p"),
    ("vob", "mpeg2video", "yuv420p"),
    ("ogg", "libvpx", "yuv420p"),
    ("gif", "gif", "rgb8"),
]
KINDS = [kind for kind in KINDS if kind[1] in av.codecs_available]
IDS = [f"{container}-{codec}" for container, codec, _ in KINDS]
LEVELS = [20 + 19 * i for i in range(12)]
"""The left half of frame i is this grey; its right half the opposite."""


def clip(
    container: str = "mp4",
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    *,
    times: list[int] | None = None,
    base: Fraction = Fraction(1, 25),
    size: tuple[int, int] = (64, 48),
    matrix: list[int] | None = None,
    frames: int = len(LEVELS),
) -> bytes:
    """A clip of frames at these times, in units of `base`; by default one frame a unit."""
    file = io.BytesIO()
    with av.open(file, "w", container) as output:
        stream = output.add_stream(codec, 1 / base if times is None else 25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        stream.codec_context.time_base = base
        stream.codec_context.gop_size = 6
        if codec in ("libx264", "mpeg2video") or (container, codec) == ("avi", "mpeg4"):
            stream.codec_context.max_b_frames = 2
        stream.set_display_matrix(matrix)
        for i, time in enumerate(range(frames) if times is None else times):
            grey = np.full((size[1], size[0], 3), LEVELS[i % 12], np.uint8)
            grey[:, size[0] // 2 :] = 255 - LEVELS[i % 12]
            frame = av.VideoFrame.from_ndarray(grey, "rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = time, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def shown(picture: Image.Image) -> int:
    """Which frame of `clip` this is; its right half is looked at too."""
    assert picture.mode == "RGB"
    left, right = (np.asarray(picture)[4:-4, part].mean() for part in (slice(4, 20), slice(-20, -4)))
    assert abs(left + right - 255) < 14
    return int(np.abs(np.array(LEVELS) - left).argmin())


def frames_at(data: bytes, times: list[int]) -> list[int]:
    return [shown(picture) for picture in video.read_frames(data, times, "clip")]


def refusal(data: bytes) -> str:
    messages = []
    for read in (video.probe_video, lambda data, name: list(video.read_frames(data, [0, 10**9], name))):
        with pytest.raises(UserError) as raised:
            read(data, "here/clip.bin")
        messages.append(str(raised.value))
        assert messages[-1].startswith("video here/clip.bin: ") and "0x7f" not in messages[-1]
    assert messages[0] == messages[1]
    return messages[0]


# What is read


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_every_kind_gives_every_frame_at_its_time(kind):
    data = clip(*kind)
    assert video.probe_video(data, "clip") == video.VideoFacts(duration_ms=480, height=48, width=64, frames=12)
    times = [0, 1, 39, 40, 79, 80, 81, 239, 240, 439, 440, 479, 480, 10**6]
    assert frames_at(data, times) == [0, 0, 0, 1, 1, 2, 2, 5, 6, 10, 11, 11, 11, 11]


def test_a_time_may_be_asked_for_twice():
    data = clip()
    assert frames_at(data, [0, 0, 120, 400, 400]) == [0, 0, 3, 10, 10]
    assert frames_at(data, []) == []


def test_a_picture_is_made_when_it_is_asked_for_and_held_by_nobody_after(monkeypatch):
    made: list[weakref.ref[Image.Image]] = []
    original = video._picture

    def picture(frame):
        found = original(frame)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(video, "_picture", picture)
    for shown in video.read_frames(clip(), [0, 40, 80, 120, 160], "clip"):
        del shown
        assert sum(one() is not None for one in made) <= 1
    assert len(made) == 5


def test_no_more_is_decoded_than_the_latest_time_needs(monkeypatch):
    decoded = []
    original = video._decoded
    monkeypatch.setattr(
        video, "_decoded", lambda *args: (decoded.append(frame.pts) or frame for frame in original(*args))
    )
    assert frames_at(clip(), [0, 79]) == [0, 1]
    assert len(decoded) == 3


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_at_uneven_times_last_until_the_next(container, codec):
    if codec not in av.codecs_available:
        pytest.skip("this FFmpeg has no libx264")
    times = [0, 10, 500, 520, 1400, 1500, 1501]
    data = clip(container, codec, times=times, base=Fraction(1, 1000))
    facts = video.probe_video(data, "clip")
    assert facts.frames == 7 and 1501 < facts.duration_ms <= 1600
    assert frames_at(data, [0, 9, 10, 499, 500, 519, 520, 1399, 1400, 1499, 1500, 1501]) == [
        0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 6,
    ]  # fmt: skip


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_time_counts_from_the_first_frame(container):
    codec = "mpeg2video" if container == "mpegts" else "mpeg4"
    data = clip(container, codec, times=list(range(50, 62)), base=Fraction(1, 25))
    assert video.probe_video(data, "clip").duration_ms == 480
    assert frames_at(data, [0, 40, 479]) == [0, 1, 11]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_clip_of_one_frame(kind):
    data = clip(*kind, frames=1)
    facts = video.probe_video(data, "clip")
    assert facts.frames == 1 and 1 <= facts.duration_ms <= 100
    assert frames_at(data, [0, 5000]) == [0, 0]


@pytest.mark.parametrize(("codec", "pixels"), [("mpeg4", "yuv420p"), ("libvpx-vp9", "yuv420p"), ("ffv1", "yuv444p")])
def test_odd_sizes(codec, pixels):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    data = clip("matroska", codec, pixels, size=(63, 47))
    facts = video.probe_video(data, "clip")
    assert (facts.height, facts.width) == (47, 63)
    (picture,) = video.read_frames(data, [80], "clip")
    assert picture.size == (63, 47) and shown(picture) == 2


ONE = 2**16
TURNS = {
    "as it is": ([ONE, 0, 0, ONE], lambda x: x),
    "left": ([0, -ONE, ONE, 0], lambda x: np.rot90(x, 1)),
    "over": ([-ONE, 0, 0, -ONE], lambda x: np.rot90(x, 2)),
    "right": ([0, ONE, -ONE, 0], lambda x: np.rot90(x, 3)),
    "left a little less": ([ONE // 3, -ONE, ONE, ONE // 3], lambda x: np.rot90(x, 1)),
    "mirrored": ([-ONE, 0, 0, ONE], lambda x: x[:, ::-1]),
    "upside down": ([ONE, 0, 0, -ONE], lambda x: x[::-1]),
    "transposed": ([0, ONE, ONE, 0], lambda x: x.transpose(1, 0, 2)),
    "transposed the other way": ([0, -ONE, -ONE, 0], lambda x: x[::-1, ::-1].transpose(1, 0, 2)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_turned_upright(turn):
    (a, b, c, d), turned = TURNS[turn]
    plain = clip()
    data = clip(matrix=[a, b, 0, c, d, 0, 0, 0, 2**30])
    expected = turned(np.asarray(next(video.read_frames(plain, [0], "clip"))))
    (picture,) = video.read_frames(data, [0], "clip")
    np.testing.assert_array_equal(np.asarray(picture), expected)
    facts = video.probe_video(data, "clip")
    assert (facts.height, facts.width) == expected.shape[:2]


@pytest.mark.parametrize(("angle", "expected"), [(0, (0, 0, 0)), (90, (1, 0, 1)), (180, (0, 1, 1)), (-90, (1, 1, 0))])
def test_a_frame_with_unknown_side_data_is_turned_by_its_angle(angle, expected):
    class Frame:
        rotation = angle

        @property
        def side_data(self):
            raise ValueError("99 is not a valid Type")

    assert video._turn(Frame()) == expected  # pyright: ignore[reportArgumentType]


def test_transparency_shows_white():
    file = io.BytesIO()
    parts = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(2)]
    for i, part in enumerate(parts):
        part.paste((200, 0, 0, 255), (0, 0, 8, 8 + i))
    parts[0].save(file, "GIF", save_all=True, append_images=parts[1:], duration=100, disposal=2)
    assert video.probe_video(file.getvalue(), "clip").duration_ms == 200
    for picture in video.read_frames(file.getvalue(), [0, 100], "clip"):
        assert picture.mode == "RGB"
        assert picture.getpixel((15, 15)) == (255, 255, 255) and picture.getpixel((2, 2)) == (200, 0, 0)


@pytest.mark.parametrize("kind", [k for k in KINDS if k[0] != "gif"], ids=[i for i in IDS if i != "gif-gif"])
def test_colours_are_those_that_were_encoded(kind):
    container, codec, pixels = kind
    file = io.BytesIO()
    with av.open(file, "w", container) as output:
        stream = output.add_stream(codec, 25)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, pixels, 4_000_000
        colour = np.broadcast_to(np.array([200, 30, 60], np.uint8), (48, 64, 3))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(colour), "rgb24").reformat(format=pixels)
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    (picture,) = video.read_frames(file.getvalue(), [0], "clip")
    np.testing.assert_allclose(np.asarray(picture), colour, atol=6)


# Which frames are taken


@given(st.integers(1, 4_000_000), st.floats(0.01, 2000), st.integers(1, 200))
def test_sampled_times_begin_at_zero_within_the_clip_and_never_repeat(duration, rate, most):
    times = video.sample_times(duration, VideoSpec(rate, most))
    assert times[0] == 0 and 1 <= len(times) <= most and times[-1] < duration
    assert all(a < b for a, b in itertools.pairwise(times))
    if len(times) < most:
        step = max(1000 / rate, 1)
        assert times == [round(i * step) if i * step % 1 != 0.5 else int(i * step + 0.5) for i in range(len(times))]
        assert len(times) * step + 0.5 >= duration


def test_sampled_times_are_every_so_often_or_evenly_spaced():
    assert video.sample_times(2100, VideoSpec(2.0, 10)) == [0, 500, 1000, 1500, 2000]
    assert video.sample_times(2000, VideoSpec(2.0, 10)) == [0, 500, 1000, 1500]
    assert video.sample_times(2000, VideoSpec(2.0, 4)) == [0, 500, 1000, 1500]
    assert video.sample_times(2001, VideoSpec(2.0, 4)) == [0, 500, 1000, 1500]
    assert video.sample_times(10_000, VideoSpec(2.0, 4)) == [0, 2500, 5000, 7500]
    assert video.sample_times(40, VideoSpec(2.0, 4)) == [0]


@pytest.mark.parametrize("rate", [Fraction(24), Fraction(25), Fraction(30), Fraction(30000, 1001), Fraction(60)])
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_a_clip_sampled_at_its_own_rate_gives_each_frame_once(rate, container):
    data = clip(container, base=1 / rate)
    times = video.sample_times(video.probe_video(data, "clip").duration_ms, VideoSpec(float(rate), 100))
    assert frames_at(data, times) == list(range(12))


# What is refused


ELSEWHERE = [
    b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nPATH\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile 'PATH'\n",
    b"file 'PATH'\n",
    b'<?xml version="1.0"?>\n<MPD type="static"><Period><AdaptationSet><Representation><BaseURL>PATH</BaseURL>'
    b"</Representation></AdaptationSet></Period></MPD>",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    b"[playlist]\nFile1=PATH\n",
]


@pytest.mark.parametrize("script", ELSEWHERE)
@pytest.mark.parametrize("disguise", [b"", b"GIF89a", b"OggS", b"G" + bytes(187) + b"G", b"\x1aE\xdf\xa3"])
def test_scripts_that_name_other_files_are_refused(script, disguise, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(clip())
    message = refusal(disguise + script.replace(b"PATH", b"file://" + str(tmp_path / "secret.mp4").encode()))
    assert disguise or "in no known format" in message


def pointing_to(path: Path, clip: bytes) -> bytes:
    """A MOV whose frames are in another file: its `dref` box holds an alias record, and its own frames are blanked."""
    target = str(path).encode()
    record = bytes(14) + b"\3vol" + bytes(36) + b"\7moving!" + bytes(72) + struct.pack(">hh", -1, -1) + bytes(16)
    record += struct.pack(">HH", 2, len(target)) + target + bytes(len(target) % 2) + b"\xff\xff\0\0"
    at = clip.index(b"dref") + 12  # its first entry
    grown = len(record) + 8 - struct.unpack_from(">I", clip, at)[0]
    data = bytearray(
        clip[:at] + struct.pack(">I4s", len(record) + 8, b"alis") + record + clip[at + 8 + len(record) - grown :]
    )
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        size = data.rindex(box, 0, at) - 4
        struct.pack_into(">I", data, size, struct.unpack_from(">I", data, size)[0] + grown)
    frames = data.index(b"mdat") + 4
    length = struct.unpack_from(">I", data, frames - 8)[0] - 8
    data[frames : frames + length] = bytes(length)
    return bytes(data)


def test_a_clip_whose_frames_are_in_another_file_is_refused_without_opening_it(tmp_path):
    (tmp_path / "other.mov").write_bytes(clip("mov"))
    data = pointing_to(tmp_path / "other.mov", clip("mov"))

    def frames(**options: str) -> int:
        with av.open(io.BytesIO(data), "r", options={"use_absolute_path": "1", **options}) as container:
            return len(list(container.decode(video=0)))

    assert frames(enable_drefs="1") == 12  # the file works, where FFmpeg is told to follow it
    assert frames(enable_drefs="1", protocol_whitelist="none") == 0  # what video.py sets is enough by itself
    assert "has no frames" in refusal(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "found 0 bytes in no known format, expected MP4, MOV"),
        (b"no video at all, but text that was renamed", r"found 42 bytes in no known format.*\(WMV, FLV\), convert it"),
        (b"\0\0\0\x18ftypheic" + bytes(64), "in no known format"),
        (b"\0\0\0\x18ftypisom" + bytes(12), "damaged or cut short"),
        (b"\0\0\0\x20ftypisom" + bytes(12), "the box ftyp ends at byte 32, the file has 24"),
        (b"RIFF\x40\0\0\0AVI " + bytes(8), "its content ends at byte 72, the file has 20"),
        (b"GIF89a", "ends within its header, after 6 bytes"),
        (b"GIF89a" + bytes(7) + b";", "damaged"),
        (b"\x1aE\xdf\xa3", "damaged"),
        (b"G" + bytes(187) + b"G" + bytes(187), "damaged"),
    ],
)
def test_an_unusable_file_is_named_with_what_was_found(data, expected):
    assert re.search(expected, refusal(data))


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_a_file_that_was_cut_short_is_refused(kind, capfd):
    whole = clip(*kind)
    video.probe_video(whole, "whole")
    for length in (20, len(whole) // 2, int(len(whole) * 0.95), len(whole) - 20, len(whole) - 1):
        refusal(whole[:length])
    assert capfd.readouterr() == ("", "")


def test_clips_one_after_the_other_are_not_taken_for_one():
    for container, codec in (("matroska", "mpeg4"), ("mpegts", "mpeg2video"), ("ogg", "libvpx")):
        if codec in av.codecs_available:
            refusal(clip(container, codec) * 2)


def with_sound(picture: str) -> bytes:
    """An MP4 with a second of sound, and with no pictures, a clip, or the cover of an album."""
    file = io.BytesIO()
    with av.open(file, "w", "mp4") as output:
        sound = output.add_stream("aac", 16000, layout="mono")
        video_stream = output.add_stream("mjpeg" if picture == "cover" else "mpeg4", 25) if picture else None
        if isinstance(video_stream, av.VideoStream):
            video_stream.width, video_stream.height = 64, 48
            video_stream.pix_fmt = "yuvj420p" if picture == "cover" else "yuv420p"
            if picture == "cover":
                video_stream.disposition = Disposition.attached_pic
            for i in range(1 if picture == "cover" else 5):
                grey = np.full((48, 64, 3), LEVELS[i], np.uint8)
                grey[:, 32:] = 255 - LEVELS[i]
                frame = av.VideoFrame.from_ndarray(grey, "rgb24").reformat(format=video_stream.pix_fmt)
                frame.pts, frame.time_base = i, Fraction(1, 25)
                output.mux(video_stream.encode(frame))
            output.mux(video_stream.encode())
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, 0
        output.mux(sound.encode(frame))
        output.mux(sound.encode())
    return file.getvalue()


def test_a_file_of_sound_alone_is_refused():
    assert "found no video stream, only audio" in refusal(with_sound(""))


def test_the_cover_of_an_album_is_no_clip():
    assert "found no video stream, only a cover, audio" in refusal(with_sound("cover"))


def test_sound_beside_a_clip_does_not_matter():
    data = with_sound("clip")
    assert video.probe_video(data, "clip") == video.VideoFacts(duration_ms=200, height=48, width=64, frames=5)
    assert frames_at(data, [0, 90]) == [0, 2]


@pytest.mark.parametrize("kind", KINDS, ids=IDS)
def test_frames_of_too_many_pixels_are_refused_before_one_is_decoded(kind, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48 - 1)
    monkeypatch.setattr(video, "_picture", lambda _: pytest.fail("decoded"))
    expected = "damaged" if kind[1] == "ffv1" else "64 x 48 pixels, expected at most 3,071|more than 3,071 pixels"
    assert re.search(expected, refusal(clip(*kind)))


def test_frames_that_grow_are_refused_too(monkeypatch):
    """Each frame of an MJPEG states its own size."""
    small, large = clip("avi", "mjpeg", "yuvj420p"), clip("avi", "mjpeg", "yuvj420p", size=(640, 480), frames=1)
    picture = large[large.index(b"\xff\xd8") : large.index(b"\xff\xd9") + 2]
    at = [match.start() for match in re.finditer(b"00dc", small)]
    first = at[4]
    size = struct.unpack_from("<I", small, first + 4)[0]
    grown = small[:first] + b"00dc" + struct.pack("<I", len(picture)) + picture + small[first + 8 + size :]
    grown = grown[:4] + struct.pack("<I", len(grown) - 8) + grown[8:]
    monkeypatch.setattr(video, "MAX_PIXELS", 64 * 48)
    assert "video here/clip.bin" in refusal(grown)


def test_clips_that_are_too_long_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_SECONDS", 100)
        patch.setattr(video, "_decoded", lambda *_: pytest.fail("decoded"))
        assert "found 400 s and" in refusal(clip(times=[0, 10_000], base=Fraction(1, 25)))
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_FRAMES", 11)
        assert "expected at most 3,600 s and 11 frames. Cut it" in refusal(clip("matroska"))


def test_clips_of_too_many_pixels_in_all_are_refused(monkeypatch):
    assert video.MAX_DECODED > 3600 * 30 * 3840 * 2160
    film = clip("matroska")
    pixels = 64 * 48 * video.probe_video(film, "clip").frames
    monkeypatch.setattr(video, "MAX_DECODED", pixels)
    video.probe_video(film, "clip")
    monkeypatch.setattr(video, "MAX_DECODED", pixels - 1)
    assert f"found more than {pixels - 1:,} pixels in its first 12 frames. Scale it down" in refusal(film)


CLIPS: dict[tuple[str, str, str], bytes] = {}


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_no_damage_gets_past_the_user_error(seed, kind):
    rng = np.random.default_rng(seed)
    data = bytearray(CLIPS.setdefault(kind, clip(*kind)))
    for at in rng.integers(0, len(data), rng.integers(0, 6)):
        data[at] = rng.integers(0, 256)
    for at in rng.integers(0, 256, rng.integers(0, 3)):  # in the header
        data[at] = rng.integers(0, 256)
    content = bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data)
    try:
        facts = video.probe_video(content, "clip.bin")
        times = video.sample_times(facts.duration_ms, VideoSpec(10, 20))
        pictures = list(video.read_frames(content, times, "clip.bin"))
    except UserError as error:
        assert str(error).startswith("video clip.bin: ")
    else:
        assert facts.duration_ms > 0 and facts.frames > 0
        assert len(pictures) == len(times) and pictures[0].size == (facts.width, facts.height)
