#!/usr/bin/env python3
"""Makes golden/v1/watch_head.bin: the head of the memory that the kernel marks in, written without the crate's code."""
import pathlib
import struct

words = [0] * 512
words[8] = int.from_bytes(b"BLKTIDE\x01", "little")
words[9] = 1  # version
sectors = (1 << 21) + 7  # 1 GiB and 7 sectors
grains = -(-sectors // 8)  # of 4 KiB
words[11] = -(-(-(-grains // 64)) // 512) * 512
words[12] = 12
words[13] = 2048
words[14] = sectors
words[15] = 259 << 32 | 5
words[16] = 1
words[17] = int.from_bytes(bytes(range(8)), "little")
words[18] = int.from_bytes(bytes(range(8, 16)), "little")
path = pathlib.Path(__file__).parent / "v1" / "watch_head.bin"
data = struct.pack("<512Q", *words)
if path.exists():
    assert path.read_bytes() == data, "a golden never changes"
path.write_bytes(data)
