#!/usr/bin/env python3
"""Second, independent encoder of version 1: a repository with one small image. Writes golden/v1; run once, never again.

Written from docs/format.md, with a bitwise CRC and a BLAKE3 of its own.
"""
import pathlib
import struct

OUT = pathlib.Path(__file__).parent / "v1"
MASK32 = 0xFFFFFFFF


def crc64_xz(data):
    crc = 0xFFFF_FFFF_FFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xC96C_5795_D787_0F42 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF_FFFF_FFFF


# --- BLAKE3, from its specification -------------------------------------------------------------------------------
IV = [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19]
ORDER = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
START, END, PARENT, ROOT, KEYED, CONTEXT, MATERIAL = 1, 2, 4, 8, 16, 32, 64


def rotate(x, n):
    return (x >> n | x << (32 - n)) & MASK32


def mix(v, a, b, c, d, x, y):
    v[a] = (v[a] + v[b] + x) & MASK32
    v[d] = rotate(v[d] ^ v[a], 16)
    v[c] = (v[c] + v[d]) & MASK32
    v[b] = rotate(v[b] ^ v[c], 12)
    v[a] = (v[a] + v[b] + y) & MASK32
    v[d] = rotate(v[d] ^ v[a], 8)
    v[c] = (v[c] + v[d]) & MASK32
    v[b] = rotate(v[b] ^ v[c], 7)


def compress(chaining, block, counter, length, flags):
    v = list(chaining) + IV[:4] + [counter & MASK32, counter >> 32, length, flags]
    m = list(struct.unpack("<16I", block.ljust(64, b"\0")))
    for _ in range(7):
        for i, (a, b, c, d) in enumerate([(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
                                          (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]):
            mix(v, a, b, c, d, m[2 * i], m[2 * i + 1])
        m = [m[i] for i in ORDER]
    return [v[i] ^ v[i + 8] for i in range(8)]


def node(data, key, counter, flags, last):
    """Chaining value of a subtree; `last` is ROOT for the whole message."""
    if len(data) <= 1024:
        chaining = key
        blocks = [data[i:i + 64] for i in range(0, len(data), 64)] or [b""]
        for i, block in enumerate(blocks):
            f = flags | (START if i == 0 else 0)
            if i == len(blocks) - 1:
                f |= END | last
            chaining = compress(chaining, block, counter, len(block), f)
        return chaining
    left = 1024
    while left * 2 < len(data):
        left *= 2
    pair = node(data[:left], key, counter, flags, 0) + node(data[left:], key, counter + left // 1024, flags, 0)
    return compress(key, struct.pack("<16I", *pair), 0, 64, flags | PARENT | last)


def blake3(data, key=None, flags=0):
    words = IV if key is None else list(struct.unpack("<8I", key))
    if key is not None and not flags:
        flags = KEYED
    return struct.pack("<8I", *node(data, words, 0, flags, ROOT))


def derive_key(context, material):
    inner = blake3(context.encode(), None, CONTEXT)
    return blake3(material, inner, MATERIAL)


assert blake3(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
assert blake3(bytes(i % 251 for i in range(1025))).hex() == \
    "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"
assert derive_key("BLAKE3 2019-12-27 16:29:52 test vectors context", b"").hex() == \
    "2cc39783c223154fea8dfb7c1b1660f2ac2dcbd1c1de8277b0b0dd39b7e50d7d"

# --- the sample ----------------------------------------------------------------------------------------------------
REPOSITORY, VOLUME = b"a repository, 16", b"0123456789abcdef"
SESSION = b"session, sixteen"
DOMAIN, KEY = b"a digest domain!", bytes(range(32))
HOST, BOOT, GENERATION, OPENED = b"a host, 16 bytes", b"a boot, 16 bytes", b"a generation, 16", b"opened generatio"
SHIFT, BLOCK = 12, 4096
VOLUME_BYTES = 65 * BLOCK + 512
ABSENT, ZERO, DATA, UNREADABLE, PAGE = 0, 1, 2, 4, 15


def noise(seed, length):
    out, x = b"", seed
    while len(out) < length:
        x ^= x << 13 & 0xFFFF_FFFF_FFFF_FFFF
        x ^= x >> 7
        x ^= x << 17 & 0xFFFF_FFFF_FFFF_FFFF
        out += struct.pack("<Q", x)
    return out[:length]


BLOCKS = {0: noise(1, BLOCK), 2: noise(2, BLOCK), 64: noise(3, BLOCK), 65: noise(4, 512)}
BLOCK_KEY = derive_key("blktide v1 block", KEY)
PAGE_KEY = derive_key("blktide v1 page content", KEY)
STATE_KEY = derive_key("blktide v1 state id", KEY)


def object_id(counter):
    return SESSION[:12] + struct.pack(">I", counter)


def header(magic, kind, object_, volume, session, body_bytes, body_crc):
    head = magic + struct.pack("<HHIIIQ", 1, kind, 0, 0, 0, 0) + REPOSITORY + object_ + volume + session
    head += struct.pack("<QQ", body_bytes, body_crc) + bytes(8)
    return head + struct.pack("<Q", crc64_xz(head))


def small(magic, kind, object_, volume, session, body):
    return header(magic, kind, object_, volume, session, len(body), crc64_xz(body)) + body


def text(s, length):
    return s.encode().ljust(length, b"\0")


def repository():
    body = DOMAIN + KEY + struct.pack("<HH4xq", 1, 1, 1794873600000000000) + bytes(64)
    return small(b"BTrepo\r\n", 1, REPOSITORY, bytes(16), bytes(16), body)


def claim():
    body = struct.pack("<QQ", 1, 0) + bytes(16) + HOST + BOOT + struct.pack("<QII", 99, 4711, 0) + GENERATION
    body += struct.pack("<q", 1794873600000000001) + bytes(24) + text("data", 64) + text("web1", 64)
    return small(b"BTopen\r\n", 2, object_id(0xFFFFFFFF), VOLUME, SESSION, body)


class Pack:
    def __init__(self):
        self.id = object_id(0)
        self.bytes = header(b"BTpack\r\n", 5, self.id, VOLUME, SESSION, 0, 0)
        self.headers, self.entries = self.bytes, 0

    def append(self, kind, level, first_block, blocks, payload):
        """Returns the place: offset, stored bytes, raw bytes."""
        offset = len(self.bytes)
        head = b"BTe\n" + struct.pack("<BBBBIIQQQ", kind, 0, level, SHIFT, len(payload), len(payload), first_block,
                                      blocks, crc64_xz(payload))
        head += struct.pack("<Q", crc64_xz(self.id + struct.pack("<Q", offset) + head))
        self.bytes += head + payload
        self.headers += head
        self.entries += 1
        return offset, len(payload), len(payload)


def nibbles(kinds):
    kinds = kinds + [0] * (64 - len(kinds))
    return bytes(kinds[i] | kinds[i + 1] << 4 for i in range(0, 64, 2))


def page(pack, level, first_block, kinds, contents, middle, places):
    """Appends a page; returns content digest, physical digest, place."""
    head = b"BTp\n" + struct.pack("<BBHQHHI", level, SHIFT, len(kinds), first_block, len(places), 1 if places else 0, 0)
    records = b"".join(struct.pack("<BBHIII", 0, 0, 0, *place) for place in places)
    payload = head + nibbles(kinds) + b"".join(contents) + middle + records + (pack.id if places else b"")
    content = blake3(bytes([level]) + struct.pack("<H", len(kinds)) + nibbles(kinds) + b"".join(contents), PAGE_KEY)
    return content, blake3(payload), pack.append(2, level, first_block, 0, payload)


def leaf(pack, first_block, kinds):
    data = [first_block + n for n, kind in enumerate(kinds) if kind == DATA]
    blocks = sum(1 << (b - first_block) for b in data)
    place = pack.append(1, 0, first_block, blocks, b"".join(BLOCKS[b] for b in data))
    digests = [blake3(BLOCKS[b], BLOCK_KEY) for b in data]
    frames, slots = bytes(len(data)), bytes(range(len(data)))
    return page(pack, 0, first_block, kinds, digests, frames + slots, [place])


def image():
    pack = Pack()
    first = [DATA, ZERO, DATA, UNREADABLE] + [ABSENT] * 60
    leaves = [leaf(pack, 0, first), leaf(pack, 64, [DATA, DATA])]
    root = page(pack, 1, 0, [PAGE, PAGE], [l[0] for l in leaves], b"".join(l[1] for l in leaves), [l[2] for l in leaves])
    state = blake3(DOMAIN + struct.pack("<QBB", VOLUME_BYTES, SHIFT, 15) + root[0], STATE_KEY)
    packs = pack.id + struct.pack("<Q", len(pack.bytes)) + blake3(pack.headers) + struct.pack("<IIII", 2, 3, pack.entries, 0)
    changed = bytes([0, 66])                                   # one run: no gap, 66 blocks
    evidence = b"what the file system shows"
    image_id = derive_key("blktide v1 image id", SESSION)[:16]
    head = image_id + HOST + bytes(16) + OPENED + DOMAIN + bytes(16) + bytes(32) + state + bytes(32)
    head += struct.pack("<QQQqq", 1, 0, VOLUME_BYTES, 1794873600000000002, 1794873600000000003)
    head += bytes([1, 1, 3, SHIFT, SHIFT, 9, 12, 32])          # full, first-backup, instant
    head += struct.pack("<QQQQQQQ", 270848, 270848, len(pack.bytes) - 128, 11, 12, 13, 14)
    head += struct.pack("<QQQQQ", 4, 1, 60, 0, 1)
    head += text("data", 64) + text("web1", 64) + text("/dev/test", 128) + bytes(432)
    assert len(head) == 1024
    offset, stored, raw = root[2]
    record = bytes([PAGE, 1, 0]) + bytes(5) + root[0] + root[1] + pack.id + struct.pack("<III", offset, stored, raw) + bytes(28)
    sections, at = struct.pack("<Q", 3), 4096
    for id_, flags, body in [(2, 1, packs), (3, 0, changed), (4, 0, evidence)]:
        sections += struct.pack("<HHIQQ", id_, flags, 0, at, len(body)) + blake3(body)
        at += len(body)
    prefix = header(b"BTmani\r\n", 4, object_id(0xFFFFFFFE), VOLUME, SESSION, at - 128, 0) + head + record + sections
    prefix = prefix.ljust(4088, b"\0")
    prefix += struct.pack("<Q", crc64_xz(prefix))
    manifest = prefix + packs + changed + evidence
    end = struct.pack("<QII", 1, 1, 0) + image_id + blake3(prefix) + SESSION + struct.pack("<q", 1794873600000000003) + bytes(40)
    return pack.bytes, manifest, small(b"BTend \r\n", 3, object_id(0xFFFFFFFD), VOLUME, SESSION, end)


PACK, MANIFEST, END_ = image()
for name, data in [("repository", repository()), ("claim", claim()), ("pack", PACK), ("manifest", MANIFEST), ("end", END_)]:
    path = OUT / f"{name}.bin"
    if path.exists():
        assert path.read_bytes() == data, f"{name}: a golden never changes"
    path.write_bytes(data)
