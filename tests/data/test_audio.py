"""Sound files of every kind are read or refused by name; log-mel frames are what their definition says."""

import io
import math
import re
import struct
import time

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from data import audio
from data.config import AudioSpec
from sharding.errors import UserError

SPEC = AudioSpec(mel_bins=80, frames_per_window=128, tokens_per_window=16)
KINDS = [
    ("WAV", "PCM_16"),
    ("WAVEX", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def encoded(sound: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound, rate, subtype, format=kind)
    return file.getvalue()


def wav(content: bytes, kind: int = 1, channels: int = 1, bits: int = 16, rate: int = 16000, size: int = -1) -> bytes:
    """A WAV by hand; `size` is what its header says of the content."""
    align = channels * bits // 8
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, rate * align % 2**32, align, bits)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(content) if size < 0 else size) + content
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flac_promising(data: bytes, samples: int) -> bytes:
    """The same FLAC, whose header says another number of samples."""
    changed = int.from_bytes(data[18:26], "big") >> 36 << 36 | samples
    return data[:18] + changed.to_bytes(8, "big") + data[26:]


def refusal(data: bytes) -> str:
    with pytest.raises(UserError) as raised:
        audio.read_audio(data, "here/clip.bin")
    message = str(raised.value)
    assert message.startswith("audio here/clip.bin: ") and "0x7f" not in message
    return message


# What is read


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
@pytest.mark.parametrize("rate", [16000, 48000])
def test_every_kind_gives_the_sound_that_was_written(kind, subtype, rate):
    read = audio.read_audio(encoded(np.stack([tone(1.5, rate)] * 2, 1), rate, kind, subtype), "clip")
    assert read.dtype == np.float32 and read.shape == (24000,)
    lossy = subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III")
    np.testing.assert_allclose(read[2000:-2000], tone(1.5, 16000)[2000:-2000], atol=0.02 if lossy else 1e-3)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"])
def test_every_sample_type_has_the_same_full_scale(subtype):
    read = audio.read_audio(encoded(tone(0.2, 16000), 16000, "WAV", subtype), "clip")
    np.testing.assert_allclose(read, tone(0.2, 16000), atol=0.02 if subtype in ("PCM_U8", "ULAW", "ALAW") else 1e-4)


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
def test_flac_agrees_with_libsndfile_to_the_last_bit(subtype):
    data = encoded(np.random.default_rng(0).uniform(-1, 1, (5000, 2)), 16000, "FLAC", subtype)
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
    np.testing.assert_array_equal(audio.read_audio(data, "clip"), expected.mean(axis=1, dtype=np.float32))


def test_channels_are_averaged():
    left, right = tone(0.1, 16000), tone(0.1, 16000, 1000)
    read = audio.read_audio(encoded(np.stack([left, right, 0 * left], 1), 16000, "WAV", "FLOAT"), "clip")
    np.testing.assert_allclose(read, (left + right) / 3, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 192000])
def test_blocks_are_resampled_as_the_whole_is(rate):
    sound = np.random.default_rng(0).uniform(-1, 1, 3 * audio._BLOCK + 77).astype(np.float32)
    read = audio.read_audio(encoded(sound, rate, "WAV", "FLOAT"), "clip")
    np.testing.assert_allclose(read, soxr.resample(sound, rate, 16000), atol=1e-5)


def test_tags_before_the_sound_and_chunks_around_it_are_passed_over():
    tag = b"ID3\x04\0\0\0\0\x01\x00" + bytes(128)
    for kind in ("WAV", "FLAC", "MP3"):
        data = encoded(tone(0.5, 16000), 16000, kind)
        np.testing.assert_array_equal(audio.read_audio(tag + data, "clip"), audio.read_audio(data, "clip"))
    data = wav(bytes(10))
    assert len(audio.read_audio(data[:12] + b"junk\3\0\0\0abc\0" + data[12:] + b"LIST\4\0\0\0INFO", "clip")) == 5


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100])
def test_every_version_of_mp3_agrees_with_libsndfile(rate, channels):
    data = encoded(np.stack([tone(0.5, rate)] * channels, 1), rate, "MP3")
    expected, _ = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    read = audio.read_audio(data, "clip")
    np.testing.assert_allclose(read, soxr.resample(expected.mean(axis=1), rate, 16000), atol=1e-4)
    np.testing.assert_array_equal(audio.read_audio(data + b"TAG" + b"Title".ljust(125), "clip"), read)


def test_an_mp3_without_a_header_of_its_length_is_read():
    data = encoded(tone(1, 44100), 44100, "MP3")
    frame = data[data.index(b"\xff\xfb", 4) :]
    assert abs(len(audio.read_audio(frame, "clip")) - 16000) < 1000
    assert len(audio.read_audio(frame[: len(frame) // 2], "clip")) < 9000  # nothing tells that it was cut


def test_a_flac_stream_of_unstated_length_is_read():
    data = encoded(tone(0.5, 16000), 16000, "FLAC")
    np.testing.assert_array_equal(audio.read_audio(flac_promising(data, 0), "clip"), audio.read_audio(data, "clip"))


# What is refused


FLOATS = struct.Struct("<4f")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "found 0 bytes in no known format, expected WAV, FLAC, Ogg or MP3"),
        (b"not a sound at all", "found 18 bytes in no known format"),
        (b"FORM\0\0\0\x1aAIFFCOMM" + bytes(18), r"no known format.*\(AIFF, M4A, RF64\), convert it"),
        (b"ID3", "no known format"),
        (b"fLaC\0\0\0\x22" + bytes(10), "ends within its header, after 18 bytes"),
        (b"fLaC\0\0\0\x22" + bytes(34), "found 0 samples a second"),
        (wav(b""), "found 0 samples, too few"),
        (wav(bytes(64), size=66), "header says 66 bytes of data, the file has 64"),
        (wav(bytes(64), size=2**32 - 1), "header says 4,294,967,295 bytes of data, the file has 64"),
        (wav(bytes(64), size=10), "header says 10 bytes of sound, and 54 unknown ones follow"),
        (wav(bytes(64), size=0), "header says 0 bytes of sound, and 64 unknown ones follow"),
        (wav(bytes(63)), "63 bytes of sound are no whole number of samples of 2"),
        (wav(bytes(8)) + b"data\2\0\0\0\0\0", "found several chunks of sound"),
        (wav(bytes(64))[:36], "damaged or cut short"),
        (wav(bytes(64))[:20], "the file has 0"),
        (wav(bytes(64), channels=0), "damaged or cut short"),
        (wav(bytes(66 * 2), channels=33), "found 33 channels, expected 1 to 32"),
        (wav(bytes(64), rate=0), "damaged or cut short|found 0 samples a second"),
        (wav(bytes(64), rate=1), "found 1 samples a second, expected 1,000 to 384,000"),
        (wav(bytes(64), rate=10**9), "found 1,000,000,000 samples a second"),
        (wav(bytes(64), kind=0x55), "WAV of kind 0x0055, expected PCM, float, A-law, mu-law. Convert"),
        (wav(FLOATS.pack(0, math.nan, 0, 0), kind=3, bits=32), "found samples that are NaN or infinite"),
        (wav(FLOATS.pack(0, 0, -math.inf, 0), kind=3, bits=32), "found samples that are NaN or infinite"),
        (wav(struct.pack("<2d", 0, 1e300), kind=3, bits=64), "found samples that are NaN or infinite"),
        (wav(FLOATS.pack(0, 0, -32768, 0), kind=3, bits=32), "found samples of up to 32,768, expected -1 to 1"),
        (wav(bytes(2), rate=48000), "found 1 samples, too few"),
    ],
)
def test_an_unusable_file_is_named_with_what_was_found(data, expected):
    assert re.search(expected, refusal(data))


@pytest.mark.parametrize(("kind", "subtype"), KINDS)
def test_a_file_that_was_cut_short_is_refused(kind, subtype, capfd):
    whole = encoded(tone(2, 24000), 24000, kind, subtype)
    audio.read_audio(whole, "whole")
    for length in (20, 60, len(whole) // 2, int(len(whole) * 0.95), len(whole) - 100, len(whole) - 1):
        refusal(whole[:length])
    assert capfd.readouterr() == ("", "")


def test_a_flac_that_lies_about_its_length_is_refused():
    data = encoded(tone(1, 16000), 16000, "FLAC")
    for samples in (1, 8000, 15999, 16001, 10**6):
        assert f"the header says {samples:,} samples, found 16,000" in refusal(flac_promising(data, samples))


def test_an_ogg_with_a_page_lost_damaged_or_repeated_is_refused():
    data = encoded(np.random.default_rng(0).uniform(-1, 1, 40000), 16000, "OGG", "VORBIS")
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    assert len(pages) > 4
    assert "pages are missing" in refusal(b"".join(pages[:3] + pages[4:]))
    assert "without a last page" in refusal(b"".join(pages[:-1]))
    assert "pages are missing" in refusal(b"".join([*pages, pages[-1]]))
    assert "checksum" in refusal(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    assert "another recording begins" in refusal(data + data)


def test_an_mp3_with_a_frame_count_that_is_not_so_is_refused():
    data = encoded(tone(2, 44100), 44100, "MP3")
    assert "frames, found" in refusal(data + data)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
def test_sound_that_is_too_long_is_refused_from_its_header(kind, monkeypatch):
    data = encoded(np.zeros(16000 * 4, np.float32), 16000, kind)
    monkeypatch.setattr(audio, "MAX_SECONDS", 3)
    monkeypatch.setattr(soxr.ResampleStream, "resample_chunk", lambda *_: pytest.fail("decoded"))
    assert "found more than 3 s of sound, too much. Cut it" in refusal(data)


def test_a_bomb_without_a_header_is_refused_while_it_is_decoded(monkeypatch):
    """Ten minutes of silence in a few kB, where half of that may be held: half is decoded."""
    hidden = flac_promising(encoded(np.zeros(600 * 16000, np.float32), 16000, "FLAC"), 0)
    assert len(hidden) < 50_000
    seen = []
    resample = soxr.ResampleStream.resample_chunk
    monkeypatch.setattr(
        soxr.ResampleStream,
        "resample_chunk",
        lambda self, x, last=False: seen.append(len(x)) or resample(self, x, last),
    )
    monkeypatch.setattr(audio, "MAX_SECONDS", 300)
    for data in (hidden, encoded(np.zeros(600 * 16000, np.float32), 16000, "MP3")):
        seen.clear()
        assert "found more than 300 s" in refusal(data)
        assert max(seen) <= audio._BLOCK and sum(seen) <= 300 * 16000


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_no_damage_gets_past_the_user_error(seed, kind):
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(tone(0.3, 24000), 24000, *kind))
    for at in rng.integers(0, len(data), rng.integers(0, 5)):
        data[at] = rng.integers(0, 256)
    for at in rng.integers(0, 64, rng.integers(0, 3)):  # in the header
        data[at] = rng.integers(0, 256)
    content = bytes(data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.5 else data)
    try:
        sound = audio.read_audio(content, "clip.bin")
    except UserError as error:
        assert str(error).startswith("audio clip.bin: ")
    else:
        assert sound.dtype == np.float32 and sound.ndim == 1 and len(sound) and np.isfinite(sound).all()


# Frames


def mel_of(hertz: float) -> float:
    return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def slow_frames(sound: np.ndarray, bands: int) -> np.ndarray:
    """float64 [frames, m] by definition: a sum for each bin, a triangle in hertz for each band."""
    edges = []  # hertz, found by bisection
    for k in range(bands + 2):
        low, high = 0.0, 8000.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if mel_of(middle) < mel_of(8000) * k / (bands + 1) else (low, middle)
        edges.append(high)
    frames = []
    for start in range(0, len(sound), 160):
        at = np.arange(start - 120, start + 280)
        piece = np.array([sound[i] if 0 <= i < len(sound) else 0.0 for i in at], np.float64)
        piece *= [math.sin(math.pi * j / 400) ** 2 for j in range(400)]
        power = [abs(sum(piece * np.exp(-2j * np.pi * b * np.arange(400) / 512))) ** 2 for b in range(257)]
        frame = []
        for low, centre, high in zip(edges, edges[1:], edges[2:], strict=False):
            energy = 0.0
            for b in range(257):
                hertz = b * 31.25
                if low < hertz < high:
                    side = (hertz - low) / (centre - low) if hertz < centre else (high - hertz) / (high - centre)
                    energy += power[b] * side * 2 / (high - low)
            frame.append((math.log10(max(energy, 1e-10)) + 4) / 4)
        frames.append(frame)
    return np.array(frames)


@pytest.mark.parametrize("bands", [40, 80, 128])
def test_frames_agree_with_their_definition(bands):
    rng = np.random.default_rng(bands)
    sound = rng.uniform(-1, 1, 1500) * np.linspace(0, 1, 1500) ** 4
    spec = AudioSpec(bands, 16, 2)
    expected = slow_frames(sound, bands)
    assert expected.shape == (10, bands)
    for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 1e-5)):
        found = audio.windows(sound.astype(dtype), spec)
        assert found.dtype == dtype and found.shape == (1, 16, bands)
        np.testing.assert_allclose(found[0, :10], expected, atol=tolerance)
        assert (found[0, 10:] == audio.SILENCE).all()


def test_silence_is_the_value_of_padding():
    frames = audio.windows(np.zeros(16000, np.float32), SPEC)
    assert frames.shape == (1, 128, 80) and (frames == audio.SILENCE).all()


def test_a_full_scale_sine_is_at_the_upper_end():
    frames = audio.windows(2 * tone(1, 16000, 1000), SPEC)[0, 10:90]
    assert 1.4 < frames.max() < 1.7


def test_a_tone_is_in_the_band_of_its_pitch():
    for hertz in (200, 1000, 4000):
        frames = audio.windows(tone(1, 16000, hertz), SPEC)[0, 50]
        assert abs(frames.argmax() + 1 - 81 * mel_of(hertz) / mel_of(8000)) < 1


@pytest.mark.parametrize("bands", [1, 80, 128, 192])
def test_every_band_hears_something(bands):
    assert (audio._mel_filters(bands).max(axis=0) > 0).all()


def test_more_bands_than_the_spectrum_can_tell_apart_are_refused():
    with pytest.raises(UserError, match="mel_bins: found 193, expected 1 to 192"):
        audio.windows(np.zeros(160, np.float32), AudioSpec(193, 16, 2))


def test_frames_do_not_depend_on_later_sound():
    sound = np.random.default_rng(0).uniform(-0.01, 0.01, 128 * 160 * 3).astype(np.float32)
    later = np.concatenate([sound, tone(1, 16000)])
    whole = audio.windows(later, SPEC)
    np.testing.assert_array_equal(whole[:2], audio.windows(sound, SPEC)[:2])
    np.testing.assert_array_equal(whole[2, :-1], audio.windows(sound, SPEC)[2, :-1])  # the last one looks 7.5 ms on


@given(st.integers(0, 60000), st.integers(1, 12), st.integers(1, 8))
def test_counts_agree_with_the_windows(samples, tokens, stride):
    spec = AudioSpec(4, tokens * stride, tokens)
    sound = np.full(samples, 0.5, np.float32)
    sound[::2] = -0.5
    found = audio.windows(sound, spec)
    frames, used = audio.frame_count(samples), audio.token_count(samples, spec)
    assert found.shape == (audio.window_count(samples, spec), tokens * stride, 4)
    heard = (found != audio.SILENCE).any(axis=-1).reshape(-1)
    assert heard[:frames].all() and not heard[frames:].any()
    assert used >= 1 and (found.shape[0] - 1) * tokens < used <= found.shape[0] * tokens
    assert (used - 1) * stride < max(frames, 1) <= used * stride


def test_a_clip_takes_milliseconds():
    """10 s take some 3 ms on one core; a hundred of them are left for a busy machine."""
    sound = tone(10, 16000)
    audio.windows(sound, SPEC)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        audio.windows(sound, SPEC)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1
