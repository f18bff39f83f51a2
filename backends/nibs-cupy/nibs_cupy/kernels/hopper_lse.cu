// Rows' and columns' log-sum-exp from tiles of logits that are never written: Hopper (sm_90a), wgmma.
//
//     nibs_hopper_lse_FORMAT     as many thread blocks as there are multiprocessors, each of them for many tiles
//
// Statistics are those of half tiles, 64 x 256: each warpgroup has its own maximum, and waits for the other
// nowhere. Marked ones are redone by nibs_ampere_redo_tall_FORMAT, parts are folded by fold.cu, both as for Ampere.
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
};

template <class Format>
NIBS_DEVICE void lse(const LseArgs& args, u8* shared) {
    const float scale = *args.scale * LOG2E;
    hopper_tiles<Format>(args, shared, [&](float (&s)[128], const HopperPlace& place, float* scratch) {
        if (place.first_row() >= args.pairs.rows) return;  // the lower half of the last tiles may be empty
        NIBS_UNROLL
        for (int i = 0; i < 128; i++) s[i] *= scale;
        leave_out(s, minus_infinity(), args.pairs, place);
        each_designated(s, args.pairs, place, [&](float value, i64 i, i64, int) { return args.positive[i] = value * LN2, value; });
        statistics(s, args.pairs, args.parts, place, scratch);
    });
}

}  // namespace nibs

using namespace nibs;

NIBS_KERNEL(nibs_hopper_lse_bfloat16, LseArgs, THREADS) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    lse<Bfloat16>(args, shared);
}
NIBS_KERNEL(nibs_hopper_lse_float16, LseArgs, THREADS) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    lse<Float16>(args, shared);
}
