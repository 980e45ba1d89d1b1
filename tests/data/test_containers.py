"""What containers say of their own length, against files cut at every byte."""

import struct

import pytest

from data.containers import shortfall


def box(kind: bytes, body: bytes, wide: bool = False) -> bytes:
    if wide:
        return struct.pack(">I4sQ", 1, kind, 16 + len(body)) + body
    return struct.pack(">I4s", 8 + len(body), kind) + body


def riff(form: bytes, body: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + form + body


def matroska(size: bytes, body: bytes) -> bytes:
    return b"\x1aE\xdf\xa3\x84abcd\x18S\x80g" + size + body


GIF = b"GIF89a\2\0\2\0\x80\0\0" + bytes(6) + b"!\xf9\4\0\0\0\0\0" + b",\0\0\0\0\2\0\2\0\0\2\2\x84Q\0" + b";"
WHOLE = {
    "boxes": (box(b"ftyp", b"isom") + box(b"mdat", bytes(20), wide=True) + box(b"moov", bytes(9)), 8),
    "riff": (riff(b"AVI ", bytes(30)), 8),
    "two riffs": (riff(b"AVI ", bytes(30)) + riff(b"AVIX", bytes(10)), 8),
    "matroska": (matroska(b"\x94", bytes(20)), 14),
    "matroska of a longer number": (matroska(b"\x40\x14", bytes(20)), 15),
    "gif": (GIF, 6),
    "ts": ((b"G" + bytes(187)) * 2, 189),
}
"""Files, and the length from which on a cut is told; before it, too little is left to say what the file is."""


@pytest.mark.parametrize("name", WHOLE)
def test_a_cut_is_found_wherever_it_is(name):
    data, least = WHOLE[name]
    assert shortfall(data) is None
    ends = {len(data)}
    if name == "boxes":  # between two boxes, what is left is whole by itself: the decoder will miss the other one
        ends |= {12, 12 + 36}
    elif name == "two riffs":
        ends |= {42 + i for i in range(8)}
    for length in range(least, len(data)):
        assert (shortfall(data[:length]) is None) == (length in ends), length


def test_what_states_no_length_is_not_judged():
    assert shortfall(matroska(b"\xff", bytes(20))) is None  # a Segment of unknown size
    assert shortfall(box(b"ftyp", b"isom") + struct.pack(">I4s", 0, b"mdat") + bytes(9)) is None  # to the end
    assert shortfall(b"") is None and shortfall(b"something else") is None


def test_what_follows_a_whole_file_is_no_part_of_it():
    assert shortfall(GIF + b"more") is None
    assert shortfall(riff(b"AVI ", bytes(30)) + b"more") is None
