#!/usr/bin/env python3
"""Second, independent encoder of version 1: bitmap file and marker. Writes golden/v1; run once, never again.

Written from the tables of docs/format.md, with a bitwise CRC of its own.
"""
import pathlib
import struct

OUT = pathlib.Path(__file__).parent / "v1"
VOLUME, LIFE, BOOT = b"0123456789abcdef", b"a life, 16 bytes", b"a boot, 16 bytes"


def crc64_xz(data):
    crc = 0xFFFF_FFFF_FFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xC96C_5795_D787_0F42 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF_FFFF_FFFF


assert crc64_xz(b"123456789") == 0x995D_C9BB_DF19_39FA


def generation(name, counter, opened, encoding, payload):
    return name + struct.pack("<QqIIQ", counter, opened, encoding, 0, len(payload)) + payload


def bitmap_file():
    """300 grains of 4 KiB and a half, blocks of 64 KiB; two generations, one as runs, one as words."""
    runs = struct.pack("<4Q", 3, 2, 300, 1)                    # grains 3, 4 and the short last one
    words = [0] * 5
    for grain in range(0, 301, 3):
        words[grain // 64] |= 1 << grain % 64
    body = generation(b"first generation", 7, -1, 2, runs)
    body += generation(b"second, the open", 8, 1794873600000000000, 1, struct.pack("<5Q", *words))
    body += struct.pack("<BBHI", 2, 1, 1, 0) + bytes(range(32)) + struct.pack("<Q", 5120) + bytes(16)
    volume_bytes = 300 * 4096 + 2048
    head = b"BTbmap\r\n" + struct.pack("<HBBIII", 1, 16, 12, 0, 0, 2) + VOLUME + LIFE
    head += struct.pack("<QQ", volume_bytes, 112 + len(body)) + bytes([8]) + bytes(7) + struct.pack("<q", 1794873600000000001) + bytes(16)
    return head + struct.pack("<Q", crc64_xz(head + body)) + body


def marker(state, reason):
    head = b"BTmark\r\n" + struct.pack("<HBBIII", 1, state, reason, 0, 0, 0) + VOLUME + LIFE + BOOT + bytes(432)
    return head + struct.pack("<Q", crc64_xz(head))


for name, content in [("bitmap_file", bitmap_file()), ("marker_open", marker(1, 9)), ("marker_closed", marker(2, 0))]:
    path = OUT / (name + ".bin")
    if path.exists():
        assert path.read_bytes() == content, f"{path} never changes"
    else:
        path.write_bytes(content)
