// Rows' and columns' log-sum-exp from one tile of logits that is never written: Ampere and later, mma.sync.
//
//     nibs_ampere_lse_FORMAT      one thread block a tile of 128 x 128: products, one maximum, one exponential a pair, two sums
//     nibs_ampere_redo_FORMAT     the same grid; returns at once unless the tile is marked, then each row and
//                                 column has a maximum of its own. Always launched: nobody waits to ask
//
// queries, keys: packed (pack.cu); scale: one float on the device; parts: see tile.cuh, folded by fold.cu.
// positive [rows]: natural logit of each designated pair; rows without one are left as they are.
//
// Cost for r x c pairs of width d: 2 r c d flops, r c exponentials; written 4 bytes * (r c / 128) * 2.
// The plain twin is `plain_lse` in ../plain.py.
#include "ampere.cuh"

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
    typedef AmpereTile<Format, 4, 4, 2, 4> Tile;
    const typename Tile::Where place = Tile::place(args.pairs);
    if (REDO && !args.parts.mark[place.tile_row * args.parts.column_tiles + place.tile_column]) return;
    float s[64];
    Tile::products(s, shared, args.queries, args.keys, args.slabs, place);
    const float scale = *args.scale;
    NIBS_UNROLL
    for (int i = 0; i < 64; i++) s[i] = times(s[i], scale);
    leave_out(s, minus_infinity(), args.pairs, place);
    each_designated(s, args.pairs, place, [&](float value, i64 i, i64, int) { return args.positive[i] = value; });
    float* scratch = reinterpret_cast<float*>(shared);
    if constexpr (REDO) own_statistics(s, args.pairs, args.parts, place, scratch);
    else statistics(s, args.pairs, args.parts, place, scratch);
    if (!REDO && args.facts)
        row_facts(s, args.pairs, args.facts, args.parts.column_tiles, place, scratch, [](float logit) { return logit; });
}

}  // namespace nibs

using namespace nibs;

#define NIBS_LSE(format, Format)                                         \
    NIBS_KERNEL(nibs_ampere_lse_##format, LseArgs, THREADS) {            \
        NIBS_SHARED_DYNAMIC(u8, shared);                                 \
        lse<Format, false>(args, shared);                    \
    }                                                                    \
    NIBS_KERNEL(nibs_ampere_redo_##format, LseArgs, THREADS) {           \
        NIBS_SHARED_DYNAMIC(u8, shared);                                 \
        lse<Format, true>(args, shared);                     \
    }

NIBS_LSE(bfloat16, Bfloat16)
NIBS_LSE(float16, Float16)
NIBS_LSE(tf32x3, Tf32Thrice)
