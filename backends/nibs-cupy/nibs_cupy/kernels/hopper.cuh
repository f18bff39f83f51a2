// A tile of logits on the tensor cores of Hopper (sm_90a), by wgmma.
//
// Plan. A thread block of three warpgroups stays for many tiles of 128 x 256 logits, one thread block to a multiprocessor:
//
//     warpgroup 0      one thread of it copies: for each slab of each tile a panel of queries (16 KiB) and two of keys
//                      (32 KiB), by cp.async.bulk, into the next free of four stages
//     warpgroups 1, 2  multiply: 64 rows each, m64n256 of wgmma, from shared memory into 128 float32 sums a thread,
//                      and then make of their 64 x 256 sums what the kernel is for
//
//     stage        full                                  empty
//     filled by    the copying thread and its bytes      -
//     freed by     -                                     one arrival of each multiplying warp
//
// One wgmma group stays under way while the next is issued, so a stage is freed a slab late. While one warpgroup
// is at its exponentials the other may multiply, and copies for the next tile are on their way.
//
// Panels need no tensor map: pack.cu wrote them as wgmma reads them, 128-byte swizzle and all, so that a copy is a run
// of bytes and nothing is asked of the driver. Keys are not multicast within a cluster.
//
// Registers: 504 in all for a thread of each warpgroup; 40 for the copying one, 232 for those that multiply.
// Work: 2 * 128 * 256 * d flops a tile; 48 KiB from L2 for a slab of them, 85 flops a byte.
#pragma once

#include "tile.cuh"

namespace nibs {

constexpr int PANEL = 128 * 128;  // bytes
constexpr int STAGE = 3 * PANEL;
#ifndef NIBS_STAGES
#define NIBS_STAGES 4
#endif
constexpr int STAGES = NIBS_STAGES;
constexpr int HEIGHT = 128, WIDTH = 256, THREADS = 384, MULTIPLYING = 2;

typedef Place<1, 32, 4, 1> HopperPlace;  // of one warpgroup: 64 x 256

// Dynamic shared memory, after the stages.
struct HopperShared {
    Signal full[STAGES], empty[STAGES];
    float scratch[MULTIPLYING][HopperPlace::SCRATCH];
};

// Tiles in groups of eight rows, so that those under way at one time share their operands in L2. Tiles and slabs are
// counted in 32 bits, which spares registers; offsets in 64.
struct HopperWalk {
    int tall, wide;

    NIBS_DEVICE HopperWalk(const Pairs& pairs) : tall((int)((pairs.rows + HEIGHT - 1) / HEIGHT)), wide((int)((pairs.columns + WIDTH - 1) / WIDTH)) {}
    NIBS_DEVICE int count() const { return tall * wide; }
    NIBS_DEVICE void at(int number, int& row, int& column) const {
        const int group = number / (8 * wide), first = group * 8, height = min(tall - first, 8), within = number - group * 8 * wide;
        row = first + within % height;
        column = within / height;
    }
};

// Runs `work(s, place, scratch)` for each half tile of this thread block whose tile is `wanted(row, column)`: s are its
// products <q, k>.
template <class Format, class Args, class Wanted, class Work>
NIBS_DEVICE void hopper_tiles(const Args& args, u8* shared, const Wanted& wanted, Work&& work) {
    HopperShared& rest = *reinterpret_cast<HopperShared*>(shared + STAGES * STAGE);
    const HopperWalk walk(args.pairs);
    const int warpgroup = threadIdx.x / 128;
    if (threadIdx.x == 0) {
        for (int k = 0; k < STAGES; k++) {
            signal_init(&rest.full[k], 1);
            signal_init(&rest.empty[k], MULTIPLYING * 4);  // a warp's wait speaks for its own rows
        }
        signals_ready();
    }
    __syncthreads();
    static_assert((STAGES & (STAGES - 1)) == 0, "the count of slabs may run over");
    u32 slab = 0;  // over all tiles: its stage is slab % STAGES, its phase slab / STAGES
    if (warpgroup == 0) {
        registers_give<40>();
        if (threadIdx.x != 0) return;
        for (int tile = blockIdx.x; tile < walk.count(); tile += gridDim.x) {
            int row, column;
            walk.at(tile, row, column);
            if (!wanted(row, column)) continue;
            for (int k = 0; k < (int)args.slabs; k++, slab++) {
                const int stage = (int)(slab % STAGES);
                Signal* full = &rest.full[stage];
                u8* to = shared + stage * STAGE;
                signal_wait(&rest.empty[stage], (slab / STAGES & 1) ^ 1);  // passes at once the first time round
                signal_expect(full, STAGE);
                copy_bulk(to, args.queries + ((i64)row * args.slabs + k) * PANEL, PANEL, full);
                copy_bulk(to + PANEL, args.keys + ((i64)2 * column * args.slabs + k) * PANEL, PANEL, full);
                copy_bulk(to + 2 * PANEL, args.keys + (((i64)2 * column + 1) * args.slabs + k) * PANEL, PANEL, full);
            }
        }
    } else {
        registers_take<232>();
        const int mine = warpgroup - 1, thread = threadIdx.x % 128, lane = thread % 32;
        for (int tile = blockIdx.x; tile < walk.count(); tile += gridDim.x) {
            int row, column;
            walk.at(tile, row, column);
            if (!wanted(row, column)) continue;
            float s[128];
            clear<1, 32, 4, 1>(s);
            NIBS_ROLL
            for (int k = 0; k < (int)args.slabs; k++, slab++) {
                const int stage = (int)(slab % STAGES);
                const u8* panels = shared + stage * STAGE;
                signal_wait(&rest.full[stage], (slab / STAGES & 1));
                const u64 a = panel_descriptor(panels + mine * (PANEL / 2)), b = panel_descriptor(panels + PANEL);
                group_fence(s);
                NIBS_UNROLL
                for (int step = 0; step < 4; step++) multiply_group(Format(), s, a + 2 * step, b + 2 * step);
                group_commit();
                if (k > 0) {
                    group_wait<1>(s);
                    if (lane == 0) signal_arrive(&rest.empty[(slab - 1) % STAGES]);
                }
            }
            group_wait<0>(s);
            if (lane == 0 && args.slabs > 0) signal_arrive(&rest.empty[(slab - 1) % STAGES]);
            work(s, HopperPlace(Group{warpgroup, 128, thread}, 2 * row + mine, column), rest.scratch[mine]);
        }
    }
}

}  // namespace nibs
