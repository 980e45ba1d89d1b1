"""Whether a media file is all there, by what its container says of its own length.

The libraries that decode sound and video read a file that was cut short, or whose header lies, as a shorter recording
without a word. The containers know better: each states how long its parts are. Only lengths are read here (of Ogg, the
checksums too), and nothing is decoded.

Sources: RIFF and AVI (Microsoft, OpenDML 1.02), ISO/IEC 14496-12 (MP4, MOV), RFC 8794 and 9559 (EBML, Matroska),
RFC 3533 (Ogg), GIF89a, ISO/IEC 13818-1 (MPEG-TS).
"""

import struct
import zlib
from collections.abc import Iterator

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
"""Each byte with its bits in the opposite order."""
_TS_PACKET = 188


def shortfall(data: bytes) -> str | None:
    """What is wrong with the length of this file; None if nothing is, or if its container states no length."""
    if data[:4] == b"OggS":
        return _ogg(data)
    if data[:4] == b"RIFF":
        return _riff(data)
    if data[:4] == b"\x1aE\xdf\xa3":
        return _matroska(data)
    if data[:4] == b"GIF8":
        return _gif(data)
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
        return _boxes(data)
    if data[:1] == data[_TS_PACKET : _TS_PACKET + 1] == b"G" and len(data) % _TS_PACKET:
        return f"its last packet has {len(data) % _TS_PACKET} bytes, expected {_TS_PACKET}"
    return None


def _ends(part: str, end: int, data: bytes) -> str | None:
    if end <= len(data):
        return None
    return f"the header says that {part} ends at byte {end:,}, the file has {len(data):,}"


def _riff(data: bytes) -> str | None:
    """A long AVI is several RIFF chunks in a row. What follows the last one is no part of it."""
    at = 0
    while data[at : at + 4] == b"RIFF" and len(data) >= at + 8:
        end = at + 8 + struct.unpack_from("<I", data, at + 4)[0]
        if problem := _ends("its content", end, data):
            return problem
        at = end + end % 2
    return None


def _boxes(data: bytes) -> str | None:
    """The boxes of the outermost level of an MP4 or MOV file."""
    at = 0
    while len(data) >= at + 8:
        size, kind = struct.unpack_from(">I4s", data, at)
        if size == 1:  # the size follows, in 8 bytes
            size = struct.unpack_from(">Q", data, at + 8)[0] if len(data) >= at + 16 else 16
        if size < 8:  # 0: to the end of the file; else no box at all, which is the decoder's to judge
            return None
        if problem := _ends(f"the box {kind.decode('ascii', 'replace')}", at + size, data):
            return problem
        at += size
    return f"{len(data) - at} bytes follow its last box" if at < len(data) else None


def _matroska(data: bytes) -> str | None:
    """The EBML header, then one Segment; a Segment of unknown size is a stream that was written as it came."""
    width, size = _ebml_size(data, 4)
    segment = 4 + width + (size or 0)
    if data[segment : segment + 4] != b"\x18S\x80g":
        return None
    width, size = _ebml_size(data, segment + 4)
    return None if size is None else _ends("its content", segment + 4 + width + size, data)


def _ebml_size(data: bytes, at: int) -> tuple[int, int | None]:
    """(bytes that the number takes, the number); None where it says "unknown", and where the file ends before it."""
    first = data[at] if at < len(data) else 0
    width = 9 - first.bit_length()
    if first == 0 or at + width > len(data):
        return 0, None
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return width, None if value == (1 << 7 * width) - 1 else value


def _gif(data: bytes) -> str | None:
    """Blocks up to the trailer."""
    if len(data) < 13:
        return f"it ends within its header, after {len(data)} bytes"
    at = 13 + _palette(data[10])
    while at < len(data):
        if data[at] == 0x3B:
            return None
        if data[at] == 0x21:  # an extension
            at += 2
        elif data[at] == 0x2C and len(data) > at + 9:  # a picture
            at += 11 + _palette(data[at + 9])
        else:
            return f"byte {at:,} begins no block"
        while at < len(data) and data[at]:
            at += 1 + data[at]
        at += 1
    return f"it ends after {len(data):,} bytes without its trailer"


def _palette(flags: int) -> int:
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _ogg(data: bytes) -> str | None:
    """Pages: none missing, none damaged, each stream from its beginning to its end, all of them at once."""
    following: dict[bytes, int | None] = {}  # number of the next page of each stream; None once it has ended
    beginning = True
    for at, page in _ogg_pages(data):
        flags, serial, number = page[5], page[14:18], int.from_bytes(page[18:22], "little")
        if _ogg_checksum(page) != int.from_bytes(page[22:26], "little"):
            return f"the page at byte {at:,} is cut short or damaged: its checksum is another one"
        if flags & 2:
            if not beginning:
                return f"another recording begins at byte {at:,}, expected one in a file"
        else:
            beginning = False
            if following.get(serial) != number:
                return f"pages are missing before byte {at:,}"
        following[serial] = None if flags & 4 else number + 1
    if any(number is not None for number in following.values()):
        return f"it ends after {len(data):,} bytes without a last page"
    return None


def _ogg_pages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(where it begins, the page as far as there is one) of each page in turn."""
    at = 0
    while at < len(data):
        segments = data[at + 26] if len(data) > at + 26 and data[at : at + 4] == b"OggS" else 0
        end = at + 27 + segments + sum(data[at + 27 : at + 27 + segments])
        yield at, data[at:end].ljust(27, b"\0")
        at = end


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 with Ogg's polynomial: that of zlib, from 0, with the bits of every byte and of the result mirrored."""
    mirrored = (page[:22] + bytes(4) + page[26:]).translate(_MIRRORED)
    crc = zlib.crc32(mirrored, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(_MIRRORED), "big")
