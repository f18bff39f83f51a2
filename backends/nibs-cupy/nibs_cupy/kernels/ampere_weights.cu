// Gradient weights, written once in the dtype of the inputs, for the two products that follow: Ampere and later, mma.sync.
//
//     nibs_ampere_weights_FORMAT     g of InfoNCE, from recomputed logits and the lse of rows and columns
//     nibs_ampere_sigmoid_FORMAT     g of the sigmoid loss, and the loss, in one pass
//
// One thread block a tile of 128 x 128. g [rows, pitch] is rounded to the inputs' dtype after the targets have been
// subtracted (p - y near 0 would not survive the other order); float16 is stored times `lift`, a power of two, because
// weights around 1 / 65,536 are where float16 ends. Whoever multiplies undoes it in float32.
//
// Cost for r x c pairs of width d: 2 r c d flops, r c exponentials (2 r c where the tile's lse values lie far apart);
// written r c elements of g. The plain twins are `plain_weights` and `plain_sigmoid` in ../plain.py.
#include "ampere.cuh"

namespace nibs {

template <class Format>
NIBS_DEVICE void weights(const WeightsArgs& args, u8* shared) {
    typedef AmpereTile<Format, 4, 4, 2, 4> Tile;
    const typename Tile::Where place = Tile::place(args.pairs);
    float s[64];
    Tile::products(s, shared, args.queries, args.keys, args.slabs, place);
    const float scale = not_zero(*args.scale);
    leave_out(s, forbidden(scale), args.pairs, place);
    gradient(s, args.pairs, args.of_rows, args.of_columns, scale, *args.out.lift, args.out.product_part, place,
             reinterpret_cast<float*>(shared));
    store<Format>(s, args.pairs, args.out, place);
}

template <class Format>
NIBS_DEVICE void sigmoid_tile(const SigmoidArgs& args, u8* shared) {
    typedef AmpereTile<Format, 4, 4, 2, 4> Tile;
    const typename Tile::Where place = Tile::place(args.pairs);
    float s[64];
    Tile::products(s, shared, args.queries, args.keys, args.slabs, place);
    const float scale = not_zero(*args.scale), bias = *args.bias;
    leave_out(s, forbidden(scale), args.pairs, place);
    each_designated(s, args.pairs, place, [&](float value, i64 i, i64, int) { return args.positive[i] = fmaf(value, scale, bias), value; });
    if (args.facts)
        row_facts(s, args.pairs, args.facts, args.column_tiles, place, reinterpret_cast<float*>(shared),
                  [&](float product) { return fmaf(product, scale, bias); });
    sigmoid<true>(s, args.pairs, args.factor, scale, bias, args.out.g ? *args.out.lift : 1.0f, args.loss_part, args.weight_part,
            args.out.product_part, place, reinterpret_cast<float*>(shared));
    if (args.out.g) store<Format>(s, args.pairs, args.out, place);
}

}  // namespace nibs

using namespace nibs;

// Asked for 384 threads at most, the compiler plans with 168 registers; told that it has 256 it aims at 128, for two
// thread blocks to a multiprocessor, and where the sigmoid does not fit those it spills.
constexpr int SIGMOID_THREADS = 384;

#define NIBS_WEIGHTS(format, Format)                                      \
    NIBS_KERNEL(nibs_ampere_weights_##format, WeightsArgs, THREADS) {     \
        NIBS_SHARED_DYNAMIC(u8, shared);                                  \
        weights<Format>(args, shared);                                    \
    }                                                                     \
    NIBS_KERNEL(nibs_ampere_sigmoid_##format, SigmoidArgs, SIGMOID_THREADS) { \
        NIBS_SHARED_DYNAMIC(u8, shared);                                  \
        sigmoid_tile<Format>(args, shared);                               \
    }

NIBS_WEIGHTS(bfloat16, Bfloat16)
NIBS_WEIGHTS(float16, Float16)
NIBS_WEIGHTS(tf32x3, Tf32Thrice)
