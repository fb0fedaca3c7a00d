// SPDX-License-Identifier: MIT OR Apache-2.0 OR GPL-2.0
// The marker of mode `watch`: sets a bit for each grain that a write touches, beside the way of the write.
//
//   submit_bio ──▶ block_bio_queue ──▶ block_rq_issue ──▶ driver ──▶ block_rq_complete ──▶ the submitter is told
//                        └── mark, count ───┴── mark ─────────────────────┴── mark, count
//
// Invariant: when the submitter of a write is told that it is done, its grains are marked in the bitmap that was live at a
// moment of its flight after which no generation has begun unseen; see `mark`. Nothing here can delay, fail or change a write.
//
// Needs nothing but clang: no header of the kernel or of libbpf. CO-RE finds the fields below in the running kernel's BTF.
// Whatever is written here is stated in Rust, and explored by a model, in the engine (watch_mark).

typedef unsigned long long u64;
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define CORE __attribute__((preserve_access_index))
#define READ(x) (*(volatile __typeof__(x) *)&(x))

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;

#define MAP_TYPE_ARRAY 2
#define MAP_TYPE_PERCPU_ARRAY 6
#define MAP_MMAPABLE 1024

// Sizes are set by the loader; what is here is what it replaces.
struct {
	int (*type)[MAP_TYPE_ARRAY];
	int (*map_flags)[MAP_MMAPABLE];
	int (*max_entries)[1024];
	u32 *key;
	u64 *value;
} marks SEC(".maps"), control SEC(".maps"), banks SEC(".maps");
struct {
	int (*type)[MAP_TYPE_PERCPU_ARRAY];
	int (*max_entries)[16];
	u32 *key;
	u64 *value;
} counters SEC(".maps");

// Words of `marks` that the marker touches; the bitmaps lie after the head, one behind the other.
enum { GENERATION = 0, LOST = 1, HEAD_WORDS = 512 };

// Counters, a value a CPU.
enum {
	EVENTS, AGAIN, WRITTEN, DISCARDED, PASSED_IN, PASSED_OUT, FOREIGN_DONE, QUEUED_WRITTEN, QUEUED_DISCARDED, FOREIGN_QUEUED
};

// What is watched. Sectors are those of the whole disk, as the events have them.
const volatile u32 disk_major = 0, disk_minor = 0;
// The partition as the kernel packs its number; 0: the whole disk.
const volatile u32 partition = 0;
const volatile u64 start_sector = 0, sectors = 0;
// Words of a bitmap, and sectors of a grain as a logarithm.
const volatile u64 bitmap_words = 0;
const volatile u32 grain_shift = 0;

struct gendisk {
	u32 major, first_minor;
} CORE;
struct block_device {
	struct gendisk *bd_disk;
	u32 bd_dev;
} CORE;
struct bvec_iter {
	u64 bi_sector;
	u32 bi_size;
} CORE;
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	u32 bi_opf;
	struct bvec_iter bi_iter;
} CORE;
struct request_queue {
	struct gendisk *disk;
} CORE;
struct request {
	struct request_queue *q;
	u32 cmd_flags;
	u32 __data_len;
	u64 __sector;
	struct bio *bio;
	struct block_device *part;
} CORE;

// Operations of the kernel's REQ_OP: the odd ones write.
enum { OP_DISCARD = 3, OP_PASS_IN = 34, OP_PASS_OUT = 35 };
#define OP(flags) ((flags) & 0xff)
#define WRITES(op) (((op) & 1) && (op) != OP_PASS_OUT)

// Ranges that one discard may have, words that one call of `fill` sets, and calls for the largest bio (4 GiB of 4 KiB grains).
#define RANGES_MAX 256
#define FILL_WORDS 128
#define FILLS_MAX 130
// A generation that began while a mark was set: once more. So often in a row it never happens by itself.
#define TURNS_MAX 16

INLINE u64 *word(u32 index)
{
	return bpf_map_lookup_elem(&marks, &index);
}

INLINE u64 count(u32 which, u64 n)
{
	u64 *counter = bpf_map_lookup_elem(&counters, &which);
	return counter ? __sync_fetch_and_add(counter, n) : 0;
}

INLINE void lose(void)
{
	u64 *lost = word(LOST);
	if (lost)
		__sync_fetch_and_add(lost, 1);
}

INLINE void set(u64 index, u64 bits)
{
	u64 *at = word(index);
	if (!at) {
		lose();
		return;
	}
	// A bit that is set costs a load.
	if ((READ(*at) & bits) != bits)
		__sync_fetch_and_or(at, bits);
}

// Sets `words` whole words from `first`; at most FILL_WORDS. (Global functions are verified once, not at each call.)
__attribute__((noinline)) int fill(u64 first, u64 words)
{
	for (u32 i = 0; i < FILL_WORDS; i++) {
		if (i >= words)
			return 0;
		set(first + i, ~0ull);
	}
	return 0;
}

// Sets the bits of grains a to b, inclusive, in the bitmap of generation `g`.
__attribute__((noinline)) int set_range(u64 g, u64 a, u64 b)
{
	u64 base = HEAD_WORDS + (g & 1) * bitmap_words;
	u64 first = base + (a >> 6), last = base + (b >> 6);
	u64 low = ~0ull << (a & 63), high = ~0ull >> (63 - (b & 63));
	if (first == last) {
		set(first, low & high);
		return 0;
	}
	set(first, low);
	set(last, high);
	first++;
	for (u32 i = 0; i < FILLS_MAX; i++) {
		if (first >= last)
			return 0;
		u64 left = last - first;
		fill(first, left < FILL_WORDS ? left : FILL_WORDS);
		first += FILL_WORDS;
	}
	lose();
	return 0;
}

// Marks what of `bytes` from `sector` of the disk lies in what is watched, in the live bitmap; returns how many sectors that are.
//
// A generation may begin between the look at it and the last bit: then its bits went to a bitmap that is perhaps read already.
// So the generation is looked at again after the bits, with a full barrier between, and if it has moved all is done again: in
// the end the bits are in the bitmap of a generation that was live before and after they were set. One bit too many is no harm.
__attribute__((noinline)) int mark(u64 sector, u64 bytes)
{
	u64 end = sector + ((bytes + 511) >> 9);
	if (!bytes || end <= start_sector || sector >= start_sector + sectors)
		return 0;
	u64 a = sector > start_sector ? sector - start_sector : 0;
	u64 b = (end > start_sector + sectors ? sectors : end - start_sector) - 1;
	u64 *generation = word(GENERATION);
	if (!generation)
		return 0;
	for (u32 turn = 0; turn < TURNS_MAX; turn++) {
		u64 g = READ(*generation);
		set_range(g, a >> grain_shift, b >> grain_shift);
		// An addition whose result is used is a full barrier on every machine.
		u64 before = count(turn ? AGAIN : EVENTS, 1);
		asm volatile("" ::"r"(before));
		if (READ(*generation) == g)
			return b - a + 1;
	}
	lose();
	return b - a + 1;
}

INLINE int is_watched(struct gendisk *disk)
{
	return disk && disk->major == disk_major && disk->first_minor == disk_minor;
}

// Whether the kernel counts it for the device that is watched: what goes to a partition by way of the whole disk it does not.
INLINE int is_counted(struct block_device *device)
{
	return !partition || (device && device->bd_dev == partition);
}

SEC("tp_btf/block_bio_queue")
int bio_queue(u64 *context)
{
	struct bio *bio = (void *)context[0];
	u32 op = OP(bio->bi_opf);
	struct block_device *device = bio->bi_bdev;
	if (!WRITES(op) || !is_watched(device->bd_disk))
		return 0;
	u64 bytes = bio->bi_iter.bi_size;
	u32 watched = mark(bio->bi_iter.bi_sector, bytes);
	if (is_counted(device))
		count(op == OP_DISCARD ? QUEUED_DISCARDED : QUEUED_WRITTEN, bytes >> 9);
	else if (watched)
		count(FOREIGN_QUEUED, watched);
	return 0;
}

// A discard may be one request of several ranges; any other request is one range. Returns how many sectors of it are watched.
INLINE u32 mark_request(struct request *request, u32 op)
{
	u32 watched = mark(request->__sector, request->__data_len);
	struct bio *bio = request->bio;
	if (op != OP_DISCARD || !bio)
		return watched;
	watched = 0;
	for (u32 i = 0; i < RANGES_MAX; i++) {
		watched += mark(bio->bi_iter.bi_sector, bio->bi_iter.bi_size);
		bio = bio->bi_next;
		if (!bio)
			return watched;
	}
	lose();
	return watched;
}

SEC("tp_btf/block_rq_issue")
int rq_issue(u64 *context)
{
	struct request *request = (void *)context[0];
	u32 op = OP(request->cmd_flags);
	if (!(op & 1) && op != OP_PASS_IN)
		return 0;
	if (!is_watched(request->q->disk))
		return 0;
	if (op == OP_PASS_IN || op == OP_PASS_OUT)
		// A command of somebody's own: what it writes, and whether, only the device knows.
		count(op == OP_PASS_IN ? PASSED_IN : PASSED_OUT, 1);
	else
		mark_request(request, op);
	return 0;
}

SEC("tp_btf/block_rq_complete")
int rq_done(u64 *context)
{
	struct request *request = (void *)context[0];
	u32 op = OP(request->cmd_flags);
	if (!WRITES(op) || !is_watched(request->q->disk))
		return 0;
	// It may have been under way when a generation began: marked in the one before, on the device in this one.
	u32 watched = mark_request(request, op);
	u64 done = (u32)context[2] >> 9;
	if (is_counted(request->part))
		count(op == OP_DISCARD ? DISCARDED : WRITTEN, done);
	else if (watched)
		count(FOREIGN_DONE, watched);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
