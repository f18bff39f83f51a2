// Rows' and columns' log-sum-exp from one tile of logits that is never written: Ampere and later, mma.sync.
//
//     nibs_ampere_lse_FORMAT      one thread block a tile of 128 x 128: products, one maximum, one exponential a pair, two sums
//     nibs_ampere_redo_FORMAT     the same grid; returns at once unless the tile is marked, then each row and
//                                 column has a maximum of its own. Always launched: nobody waits to ask
//     nibs_ampere_redo_tall_...   the same for the tiles of 64 x 256 that hopper_lse.cu marks; sm_90 has it
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
};

template <class Format, int MF, int NF, int WM, int WN, bool REDO>
NIBS_DEVICE void lse(const LseArgs& args, u8* shared) {
    typedef AmpereTile<Format, MF, NF, WM, WN> Tile;
    const typename Tile::Where place = Tile::place(args.pairs);
    if (REDO && !args.parts.mark[place.tile_row * args.parts.column_tiles + place.tile_column]) return;
    float s[MF * NF * 4];
    Tile::products(s, shared, args.queries, args.keys, args.slabs, place);
    const float scale = *args.scale * LOG2E;
    NIBS_UNROLL
    for (int i = 0; i < MF * NF * 4; i++) s[i] *= scale;
    leave_out(s, minus_infinity(), args.pairs, place);
    each_designated(s, args.pairs, place, [&](float value, i64 i, i64, int) { return args.positive[i] = value * LN2, value; });
    float* scratch = reinterpret_cast<float*>(shared);
    if (REDO) own_statistics(s, args.pairs, args.parts, place, scratch);
    else statistics(s, args.pairs, args.parts, place, scratch);
}

}  // namespace nibs

using namespace nibs;

#define NIBS_LSE(format, Format)                                         \
    NIBS_KERNEL(nibs_ampere_lse_##format, LseArgs, THREADS) {            \
        NIBS_SHARED_DYNAMIC(u8, shared);                                 \
        lse<Format, 4, 4, 2, 4, false>(args, shared);                    \
    }                                                                    \
    NIBS_KERNEL(nibs_ampere_redo_##format, LseArgs, THREADS) {           \
        NIBS_SHARED_DYNAMIC(u8, shared);                                 \
        lse<Format, 4, 4, 2, 4, true>(args, shared);                     \
    }

NIBS_LSE(bfloat16, Bfloat16)
NIBS_LSE(float16, Float16)
NIBS_LSE(tf32x3, Tf32Thrice)

#if NIBS_HOST || __CUDA_ARCH__ == 900
#define NIBS_REDO_TALL(format, Format)                                   \
    NIBS_KERNEL(nibs_ampere_redo_tall_##format, LseArgs, THREADS) {      \
        NIBS_SHARED_DYNAMIC(u8, shared);                                 \
        lse<Format, 4, 4, 1, 8, true>(args, shared);                     \
    }

NIBS_REDO_TALL(bfloat16, Bfloat16)
NIBS_REDO_TALL(float16, Float16)
#endif
