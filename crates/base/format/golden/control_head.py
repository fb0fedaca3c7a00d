"""Makes golden/v1/control_head.bin: the head of the control memory, written without the crate's code."""
import math
import struct
import sys

bytes_, block, grain, logical, physical = (1 << 30) + 512 * 7, 16, 12, 9, 12
queues, slots, payload, banks, names, hints, log = 2, 128, 256 * 1024, 12, 64, 8, 64 * 1024
words = 128 + queues * 16 + 2 * (8 + names * 8) + hints * 8 + log // 8
words = math.ceil(words / 512) * 512
head = [0] * 128
head[0:4] = [int.from_bytes(b"BLKTIDE\x01", "little"), 1, 0, words]
head[10:19] = [bytes_, block + (grain << 8) + (logical << 16) + (physical << 24), queues, slots, payload, banks, names, hints, log]
sys.stdout.buffer.write(struct.pack("<128Q", *head))
