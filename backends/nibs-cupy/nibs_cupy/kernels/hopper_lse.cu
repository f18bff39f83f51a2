// Rows' and columns' log-sum-exp from tiles of logits that are never written: Hopper (sm_90a), wgmma.
//
//     nibs_hopper_lse_FORMAT      as many thread blocks as there are multiprocessors, each of them for many tiles
//     nibs_hopper_redo_FORMAT     the same; returns at once unless one of its tiles is marked, then each row and column
//                                 of that has a maximum of its own. Always launched: nobody waits to ask
//
// Statistics are those of half tiles, 64 x 256: each warpgroup has its own maximum, and waits for the other
// nowhere. Parts are folded by fold.cu. The redo multiplies as the first pass and the weights do, by wgmma: another
// instruction would round otherwise, and a logit in the millions would not be the same number in all three.
// queries, keys: packed (pack.cu), keys to a multiple of 256 rows; the rest as in ampere_lse.cu.
//
// Cost for r x c pairs of width d: 2 r c d flops, r c exponentials; written 4 bytes * (r c / 64 + r c / 256).
// The plain twin is `plain_lse` in ../plain.py.
#include "hopper.cuh"

namespace nibs {

struct LseArgs {
    const u8* queries;
    const u8* keys;
    i64 slabs;
    const float* scale;
    Pairs pairs;
    Parts parts;
    float* positive;
    float* facts;  // of row_facts, or null
};

template <class Format, bool REDO>
NIBS_DEVICE void lse(const LseArgs& args, u8* shared) {
    const float scale = *args.scale;
    const auto marked = [&](i64 row, i64 column) {  // of half tiles
        return row < args.parts.row_tiles && args.parts.mark[row * args.parts.column_tiles + column];
    };
    const auto wanted = [&](int row, int column) { return !REDO || marked(2 * row, column) || marked(2 * row + 1, column); };
    if constexpr (REDO) {
        const HopperWalk walk(args.pairs);
        bool any = false;
        for (i64 tile = blockIdx.x + (i64)threadIdx.x * gridDim.x; tile < walk.count(); tile += (i64)THREADS * gridDim.x) {
            int row, column;
            walk.at((int)tile, row, column);
            any = any || wanted(row, column);
        }
        if (!__syncthreads_or(any)) return;
    }
    hopper_tiles<Format>(args, shared, wanted, [&](float (&s)[128], const HopperPlace& place, float* scratch) {
        if (place.first_row() >= args.pairs.rows) return;  // the lower half of the last tiles may be empty
        if (REDO && !marked(place.tile_row, place.tile_column)) return;
        NIBS_UNROLL
        for (int i = 0; i < 128; i++) s[i] = times(s[i], scale);
        leave_out(s, minus_infinity(), args.pairs, place);
        each_designated(s, args.pairs, place, [&](float value, i64 i, i64, int) { return args.positive[i] = value; });
        if constexpr (REDO) own_statistics(s, args.pairs, args.parts, place, scratch);
        else statistics(s, args.pairs, args.parts, place, scratch);
        if (!REDO && args.facts)
            row_facts(s, args.pairs, args.facts, args.parts.column_tiles, place, scratch, [](float logit) { return logit; });
    });
}

}  // namespace nibs

using namespace nibs;

#define NIBS_LSE(format, Format)                               \
    NIBS_KERNEL(nibs_hopper_lse_##format, LseArgs, THREADS) {  \
        NIBS_SHARED_DYNAMIC(u8, shared);                       \
        lse<Format, false>(args, shared);                      \
    }                                                          \
    NIBS_KERNEL(nibs_hopper_redo_##format, LseArgs, THREADS) { \
        NIBS_SHARED_DYNAMIC(u8, shared);                       \
        lse<Format, true>(args, shared);                       \
    }

NIBS_LSE(bfloat16, Bfloat16)
NIBS_LSE(float16, Float16)
