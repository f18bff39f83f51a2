// A tile of logits on the tensor cores of Ampere and later, by mma.sync.
//
// Plan, for a tile of HEIGHT x WIDTH logits by 8 warps:
//
//     global, packed (pack.cu)     [row groups][slabs][128 rows][128 bytes], 16-byte chunks swizzled
//       | cp.async, STAGES - 1 slabs ahead
//     shared                       STAGES x (HEIGHT + WIDTH) rows of 128 bytes, as they lay
//       | ldmatrix, without bank conflicts: chunk c of row r lies at c ^ (r % 8)
//     registers                    mma.sync into 64 float32 sums a thread
//
// Everything that is ragged, strided, absent or not aligned has been dealt with by the pack; nothing is bounded here.
// Work: 2 HEIGHT WIDTH d flops a tile; bytes from L2: (HEIGHT + WIDTH) * 128 a slab, so 64 flops a byte for 128 x 128 in half
// precision. The order of the sums is the order of the slabs, whatever the launch.
#pragma once

#include "tile.cuh"

namespace nibs {

constexpr int PANEL_ROWS = 128, SLAB = 128;      // rows, and bytes of each
constexpr int PANEL = PANEL_ROWS * SLAB;         // bytes
constexpr int THREADS = 256;
#ifndef NIBS_STAGES
#define NIBS_STAGES 3
#endif
constexpr int STAGES = NIBS_STAGES;

// Byte offset of a chunk of 16 bytes in rows of 128.
NIBS_DEVICE int swizzled(int row, int chunk) { return row * SLAB + ((chunk ^ (row & 7)) << 4); }

NIBS_DEVICE void multiply(Tf32Thrice, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], const u32 (&a_rest)[4], const u32 (&b_rest)[2]) {
    multiply(Tf32(), c, a_rest, b);  // the small ones first
    multiply(Tf32(), c, a, b_rest);
    multiply(Tf32(), c, a, b);
}

// x = the nearest tf32 + rest, the rest itself as tf32.
NIBS_DEVICE void split(u32& word, u32& rest) {
    const u32 near = round_tf32(word);
    rest = round_tf32(__float_as_uint(__uint_as_float(word) - __uint_as_float(near)));
    word = near;
}

template <class Format, int MF, int NF, int WM, int WN>
struct AmpereTile {
    typedef Place<MF, NF, WM, WN> Where;
    static constexpr int STAGE = (Where::HEIGHT + Where::WIDTH) * SLAB;
    static_assert(Where::WARPS * 32 == THREADS && PANEL_ROWS % Where::HEIGHT == 0 && Where::WIDTH % PANEL_ROWS == 0, "");
    static_assert(Where::SCRATCH * 4 <= STAGE, "the scratch takes a stage's place");

    // One slab of both sides into a stage; every thread copies its share.
    NIBS_DEVICE static void fetch(u8* stage, const u8* queries, const u8* keys, i64 slabs, i64 slab, const Where& place) {
        const i64 row = place.first_row();
        const u8* from = queries + (row / PANEL_ROWS * slabs + slab) * PANEL + row % PANEL_ROWS * SLAB;
        NIBS_UNROLL
        for (int at = 0; at < Where::HEIGHT * SLAB; at += THREADS * 16) copy_async(stage + at + threadIdx.x * 16, from + at + threadIdx.x * 16);
        NIBS_UNROLL
        for (int panel = 0; panel < Where::WIDTH / PANEL_ROWS; panel++) {
            from = keys + ((place.first_column() / PANEL_ROWS + panel) * slabs + slab) * PANEL;
            u8* to = stage + Where::HEIGHT * SLAB + panel * PANEL;
            NIBS_UNROLL
            for (int at = 0; at < PANEL; at += THREADS * 16) copy_async(to + at + threadIdx.x * 16, from + at + threadIdx.x * 16);
        }
    }

    // 128 bytes of each row: four steps of two chunks.
    NIBS_DEVICE static void multiply_slab(float (&s)[MF * NF * 4], const u8* stage, const Where& place) {
        const u8 *queries = stage, *keys = stage + Where::HEIGHT * SLAB;
        const int lane = place.lane;
        NIBS_UNROLL
        for (int step = 0; step < 4; step++) {
            u32 a[MF][4], b[NF][2], a_rest[MF][4], b_rest[NF][2];
            NIBS_UNROLL
            for (int m = 0; m < MF; m++)
                load_fragments(a[m], queries + swizzled((place.warp_row * MF + m) * 16 + (lane & 15), 2 * step + (lane >> 4)));
            NIBS_UNROLL
            for (int n = 0; n < NF; n += 2) {
                u32 both[4];
                load_fragments(both, keys + swizzled((place.warp_column * NF + n) * 8 + (lane & 7) + (lane >> 4) * 8, 2 * step + (lane >> 3 & 1)));
                b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
            }
            if constexpr (same<Format, Tf32Thrice>::value) {
                NIBS_UNROLL
                for (int m = 0; m < MF; m++) {
                    NIBS_UNROLL
                    for (int k = 0; k < 4; k++) split(a[m][k], a_rest[m][k]);
                }
                NIBS_UNROLL
                for (int n = 0; n < NF; n++) {
                    NIBS_UNROLL
                    for (int k = 0; k < 2; k++) split(b[n][k], b_rest[n][k]);
                }
            }
            NIBS_UNROLL
            for (int m = 0; m < MF; m++) {
                NIBS_UNROLL
                for (int n = 0; n < NF; n++) {
                    float(&c)[4] = *reinterpret_cast<float(*)[4]>(&s[(m * NF + n) * 4]);
                    if constexpr (same<Format, Tf32Thrice>::value) multiply(Format(), c, a[m], b[n], a_rest[m], b_rest[n]);
                    else multiply(Format(), c, a[m], b[n]);
                }
            }
        }
    }

    // The products <q, k> of the tile; shared memory is free again afterwards.
    NIBS_DEVICE static void products(float (&s)[MF * NF * 4], u8* shared, const u8* queries, const u8* keys, i64 slabs, const Where& place) {
        clear<MF, NF, WM, WN>(s);
        NIBS_UNROLL
        for (int k = 0; k < STAGES - 1; k++) {
            if (k < slabs) fetch(shared + k * STAGE, queries, keys, slabs, k, place);
            copies_commit();  // empty groups keep the count
        }
        for (i64 k = 0; k < slabs; k++) {
            copies_wait<STAGES - 2>();
            __syncthreads();  // slab k is here for all, and the stage of slab k - 1 has been read by all
            const i64 ahead = k + STAGES - 1;
            if (ahead < slabs) fetch(shared + ahead % STAGES * STAGE, queries, keys, slabs, ahead, place);
            copies_commit();
            multiply_slab(s, shared + k % STAGES * STAGE, place);
        }
        copies_wait<0>();
        __syncthreads();
    }

    // Tiles in groups of eight rows, so that the thread blocks under way at one time share their operands in L2.
    NIBS_DEVICE static Where place(const Pairs& pairs) {
        const i64 tall = (pairs.rows + Where::HEIGHT - 1) / Where::HEIGHT, wide = (pairs.columns + Where::WIDTH - 1) / Where::WIDTH;
        const i64 number = blockIdx.x, group = number / (8 * wide), first = group * 8, height = min(tall - first, (i64)8);
        const i64 within = number - group * 8 * wide;
        return Where(Group{0, THREADS, (int)threadIdx.x}, first + within % height, within / height);
    }
};

}  // namespace nibs
