"""Sound to windows of log-mel frames, and how many tokens stand for it.

A file becomes one channel at 16 kHz. A frame stands for 10 ms: the power spectrum of the 25 ms around it, summed into
mel bands, as a logarithm on a fixed scale. Frames are cut into windows of equal length, which the model encodes one by
one; the last one is filled with the value of silence. A frame looks the same whatever comes later in its clip, so there
is no scaling by the loudest one (as Whisper has), and no reflection at the ends.

Source of the mel scale and its filters: Slaney, Auditory Toolbox (1998), as in librosa.filters.mel with its defaults.
This use of sound is Drover's own: Llama 4 has none.

Letters: n windows, f frames of a window, m mel bands.
"""

import functools
import io
import math
import struct
import warnings
from collections.abc import Generator, Iterator

import av
import numpy as np
import soundfile
import soxr
from av.error import FFmpegError

from data.config import AudioSpec
from data.containers import shortfall
from sharding.errors import UserError

SAMPLE_RATE = 16_000
HOP = 160
"""Samples from one frame to the next: 10 ms."""
MAX_SECONDS = 3600
"""Of one file. An hour is 230 MB of samples and 115 MB of frames of 80 bands."""
SILENCE = -1.5
"""What every band of a frame without sound is."""

_WIDTH = 400
"""Samples that a frame looks at: 25 ms."""
_LEAD = (_WIDTH - HOP) // 2
"""Samples before its own 10 ms that a frame looks at."""
_FFT = 512
"""Points of the Fourier transform, the 400 samples filled up with zeros. With 400 points the bins are 40 Hz apart, and
the lowest of 80 bands (74 Hz wide) would rest on one or two of them; 512 give 31.25 Hz and a power of two."""
_LOWEST = -10.0
"""Of the logarithm: power is clamped at 1e-10."""
_MAX_BANDS = 192
"""With more, the lowest bands fall between two bins of the Fourier transform."""

_MEL_STEP = math.log(6.4) / 27
"""Above 1,000 Hz the mel scale is logarithmic: 27 steps from there to 6,400 Hz."""

_BLOCK = 2**16
"""Samples a channel that are decoded at a time."""
_RATES = (1_000, 384_000)
_MAX_CHANNELS = 32
_LOUDEST = 100.0
"""Full scale is 1. Lossy codecs overshoot a little; far more is a file of another scale (16-bit numbers as floats)."""
_WAV_KINDS = {1: "PCM", 3: "float", 6: "A-law", 7: "mu-law"}


def read_audio(data: bytes, name: str) -> np.ndarray:
    """The sound in these bytes: WAV (PCM, float, A-law, mu-law), FLAC, Ogg (Vorbis, Opus) or MP3.

    Args:
        data: the content of a sound file.
        name: what a message calls it.

    Returns:
        float32 [samples] at 16 kHz, full scale 1; channels are averaged.

    Raises:
        UserError: no sound, damaged, cut short, of another length than its header says, with samples that are no
            numbers, longer than `MAX_SECONDS`, or of absurd rates. Memory stays within a small multiple of the sound
            that is allowed, whatever the file would unpack to.
    """
    try:
        return _resampled(_blocks(data, name), name)
    except UserError:
        raise
    except Exception as error:  # a damaged file makes the decoders raise almost anything
        raise _damaged(name, _words(error)) from error


def frame_count(samples: int) -> int:
    """Log-mel frames of so many samples at 16 kHz: one for every 10 ms that holds any."""
    return -(-samples // HOP)


def token_count(samples: int, spec: AudioSpec) -> int:
    """Tokens that stand for so many samples at 16 kHz in the sequence, 1 or more."""
    stride = spec.frames_per_window // spec.tokens_per_window
    return max(1, -(-frame_count(samples) // stride))


def window_count(samples: int, spec: AudioSpec) -> int:
    """Windows that so many samples at 16 kHz fill, the last one perhaps in part."""
    return -(-token_count(samples, spec) // spec.tokens_per_window)


def windows(sound: np.ndarray, spec: AudioSpec) -> np.ndarray:
    """Log-mel frames, cut into windows. 10 s of sound take some 3 ms on one core.

    Frame i looks at the samples from 160 i - 120 to 160 i + 280, zeros beyond the ends. Every window is computed by
    itself, in one shape, so it is the same to the bit however long the clip is.

    Args:
        sound: [samples] at 16 kHz, float32 (or float64, in which it is then computed).
        spec: how many bands, and how many frames a window has.

    Returns:
        [n, f, m] of the type of `sound`: (log10(power) + 4) / 4, that is -1.5 in silence and 1.6 where a full-scale
        sine is. Frames past the end of the sound are silence.
    """
    n, f = window_count(len(sound), spec), spec.frames_per_window
    padded = np.zeros((n * f - 1) * HOP + _WIDTH, sound.dtype)
    padded[_LEAD : _LEAD + len(sound)] = sound
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WIDTH)[::HOP]
    bins, starts, weights = _mel_terms(spec.mel_bins)
    shape, weights = _hann().astype(sound.dtype), weights.astype(sound.dtype)
    log_mel = np.empty((n, f, spec.mel_bins), sound.dtype)
    for i in range(n):
        spectrum = np.fft.rfft(frames[i * f : (i + 1) * f] * shape, _FFT)
        power = (spectrum.real**2 + spectrum.imag**2)[:, bins] * weights
        with np.errstate(divide="ignore"):
            log_mel[i] = (np.maximum(np.log10(np.add.reduceat(power, starts, axis=1)), _LOWEST) + 4) / 4
    log_mel.reshape(n * f, -1)[frame_count(len(sound)) :] = SILENCE
    return log_mel


@functools.cache
def _mel_terms(bands: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The filters as sums: bins, one band after the other; where each band's begin; weights of the bins.

    A bin is in two bands at most. A matrix product would multiply 40 times as much, and the threads that BLAS starts
    for it get in the way of each other where several workers make batches.
    """
    filters = _mel_filters(bands).T
    band, bins = np.nonzero(filters)
    return bins, np.searchsorted(band, np.arange(bands)), filters[band, bins]


def _hann() -> np.ndarray:
    """[400], periodic."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WIDTH) / _WIDTH)


@functools.cache
def _mel_filters(bands: int) -> np.ndarray:
    """[bins of the Fourier transform, m]: triangles of equal area, evenly spaced in mel from 0 to 8,000 Hz."""
    if not 1 <= bands <= _MAX_BANDS:
        raise UserError(f"mel_bins: found {bands}, expected 1 to {_MAX_BANDS}")
    top = 15 + np.log(SAMPLE_RATE / 2 / 1000) / _MEL_STEP
    mel = np.linspace(0, top, bands + 2)
    edges = np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(_MEL_STEP * (mel - 15)))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bins = np.arange(_FFT // 2 + 1)[:, None] * SAMPLE_RATE / _FFT
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


# Files


def _damaged(name: str, reason: object) -> UserError:
    return UserError(f"audio {name}: damaged or cut short ({reason}). Save or download it again.")


def _words(error: Exception) -> str:
    """What a decoder says, without the address of the buffer that it read from."""
    if isinstance(error, FFmpegError):
        return error.strerror or str(error)
    return getattr(error, "error_string", str(error))


def _resampled(blocks: Iterator[tuple[int, np.ndarray]], name: str) -> np.ndarray:
    """One channel at 16 kHz, of (rate, [samples, channels]) blocks."""
    resampler, samples, pieces = None, 0, []
    for rate, block in blocks:
        samples += len(block)
        _check_length(samples, rate, name)
        if not np.isfinite(block).all():
            raise UserError(f"audio {name}: found samples that are NaN or infinite. Make the file again.")
        if (peak := np.abs(block).max(initial=0)) > _LOUDEST:
            raise UserError(
                f"audio {name}: found samples of up to {peak:,.0f}, expected -1 to 1. Divide them by their full scale."
            )
        if resampler is None:
            resampler = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")
        pieces.append(resampler.resample_chunk(block.mean(axis=1, dtype=np.float32)))
    if resampler is not None:
        pieces.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    if not sum(map(len, pieces)):
        raise UserError(f"audio {name}: found {samples} samples, too few to hear. Check how the file was made.")
    return np.concatenate(pieces)


def _blocks(data: bytes, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 [samples, channels]) blocks of a file of any kind that is known."""
    content = data[_after_tags(data) :]
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        _check_wav(content, name)
        return _by_soundfile(content, name)
    if content[:4] == b"OggS":
        if reason := shortfall(content):
            raise _damaged(name, reason)
        return _by_soundfile(content, name)
    if content[:4] == b"fLaC":
        return _flac(content, name)
    if len(content) > 4 and content[0] == 0xFF and content[1] & 0xE6 == 0xE2:  # MPEG audio, layer III
        return _mp3(content, name)
    raise UserError(
        f"audio {name}: found {len(data):,} bytes in no known format, expected WAV, FLAC, Ogg or MP3. If it is sound in "
        "another format (AIFF, M4A, RF64), convert it; if not, save or download it again."
    )


def _after_tags(data: bytes) -> int:
    """Where the sound begins, after ID3v2 tags."""
    at = 0
    while data[at : at + 3] == b"ID3" and len(data) >= at + 10:
        at += 10 + functools.reduce(lambda size, byte: size << 7 | byte & 0x7F, data[at + 6 : at + 10], 0)
    return at


def _check_rates(rate: int, channels: int, name: str) -> None:
    if not _RATES[0] <= rate <= _RATES[1]:
        raise UserError(f"audio {name}: found {rate:,} samples a second, expected {_RATES[0]:,} to {_RATES[1]:,}.")
    if not 1 <= channels <= _MAX_CHANNELS:
        raise UserError(f"audio {name}: found {channels:,} channels, expected 1 to {_MAX_CHANNELS}.")


def _check_length(samples: int, rate: int, name: str) -> None:
    if samples > MAX_SECONDS * rate:
        raise UserError(f"audio {name}: found more than {MAX_SECONDS:,} s of sound, too much. Cut it into parts.")


def _by_soundfile(data: bytes, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """WAV and Ogg. (libsndfile prints warnings about MP3, and takes the length of a FLAC file from its header.)"""
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate, samples = file.samplerate, 0
        _check_rates(rate, file.channels, name)
        _check_length(file.frames, rate, name)
        while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
            samples += len(block)
            yield rate, block
        if samples != file.frames:
            raise _damaged(name, f"the header says {file.frames:,} samples, found {samples:,}")


def _check_wav(data: bytes, name: str) -> None:
    """Refuses a WAV whose chunks do not fill the file; libsndfile reads what there is and says nothing."""
    at, kind, align, sound = 12, None, 0, None
    while at < len(data):
        if len(data) < at + 8 or not data[at : at + 4].isascii() or not data[at : at + 4].decode().isprintable():
            if sound is None:
                raise _damaged(name, f"byte {at:,} begins no chunk")
            raise _damaged(
                name, f"the header says {sound:,} bytes of sound, and {len(data) - at:,} unknown ones follow"
            )
        tag, size = struct.unpack_from("<4sI", data, at)
        if at + 8 + size > len(data):
            raise _damaged(
                name, f"the header says {size:,} bytes of {tag.decode()}, the file has {len(data) - at - 8:,}"
            )
        if tag == b"fmt " and size >= 16:
            kind, _, _, _, align, _ = struct.unpack_from("<HHIIHH", data, at + 8)
            if kind == 0xFFFE and size >= 26:  # WAVEX: the kind is the beginning of a longer name
                kind = struct.unpack_from("<H", data, at + 8 + 24)[0]
        elif tag == b"data":
            if sound is not None:
                raise UserError(f"audio {name}: found several chunks of sound, expected one. Write the file again.")
            sound = size
        at += 8 + size + size % 2
    if kind not in _WAV_KINDS and kind is not None:
        raise UserError(
            f"audio {name}: found a WAV of kind {kind:#06x}, expected {', '.join(_WAV_KINDS.values())}. Convert it."
        )
    if sound is not None and align and sound % align:
        raise _damaged(name, f"{sound:,} bytes of sound are no whole number of samples of {align}")


def _by_av(data: bytes, form: str, name: str) -> Generator[tuple[int, np.ndarray], None, int]:
    """FLAC and MP3; returns the number of packets. Nothing but these bytes is ever opened."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        container = av.open(io.BytesIO(data), "r", form, {"protocol_whitelist": "none"}, metadata_errors="replace")
    with container:
        stream = container.streams.audio[0]
        stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        stream.codec_context.thread_count = 1
        _check_rates(stream.rate, stream.channels, name)
        packets, rate, channels = 0, stream.rate, stream.channels
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode():
                if frame.rate != rate or frame.layout.nb_channels != channels:
                    raise _damaged(name, "its sample rate or number of channels changes")
                yield rate, _samples(frame)
    return packets


def _samples(frame: av.AudioFrame) -> np.ndarray:
    """float32 [samples, channels], full scale 1."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if values.dtype.kind == "i":
        return values.astype(np.float32) / 2.0 ** (8 * values.itemsize - 1)
    return values.astype(np.float32)


def _flac(data: bytes, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """STREAMINFO, the first block, ends with 36 bits that count the samples (0: unknown) and 16 bytes of MD5."""
    if len(data) < 42:
        raise _damaged(name, f"it ends within its header, after {len(data)} bytes")
    promised = int.from_bytes(data[21:26], "big") & (2**36 - 1)
    rate, samples = int.from_bytes(data[18:21], "big") >> 4, 0
    _check_rates(rate, 1, name)
    _check_length(promised, rate, name)
    for rate, block in _by_av(data, "flac", name):
        samples += len(block)
        yield rate, block
    if promised not in (0, samples):
        raise _damaged(name, f"the header says {promised:,} samples, found {samples:,}")


def _mp3(data: bytes, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Most encoders put a header in the first frame, with the number of frames and bytes. Without one, an MP3 is a row
    of frames, and one that was cut short is a shorter MP3."""
    if data[-128:-125] == b"TAG":  # ID3v1; FFmpeg would take the promised size for a lie, and not trim the end
        data = data[:-128]
    frames, size = _xing(data)
    if size and size > len(data):
        raise _damaged(name, f"the header says {size:,} bytes, found {len(data):,}")
    packets = yield from _by_av(data, "mp3", name)
    if frames and not abs(packets - frames) <= 1:  # some encoders count the header itself
        raise _damaged(name, f"the header says {frames:,} frames, found {packets:,}")


def _xing(data: bytes) -> tuple[int | None, int | None]:
    """(frames, bytes) that the Xing or Info header of an MP3 promises; None for what it does not say."""
    at = max(data[:64].find(b"Xing"), data[:64].find(b"Info"))
    if at < 0 or len(data) < at + 16:
        return None, None
    flags, first, second = struct.unpack_from(">III", data, at + 4)
    return first if flags & 1 else None, (second if flags & 1 else first) if flags & 2 else None
