// Gradient weights, written once in the dtype of the inputs, for the two products that follow: Hopper (sm_90a), wgmma.
//
//     nibs_hopper_weights_FORMAT     g of InfoNCE, from recomputed logits and the lse of rows and columns
//     nibs_hopper_sigmoid_FORMAT     g of the sigmoid loss, and the loss, in one pass
//
// As many thread blocks as there are multiprocessors; the tiles and what becomes of them as in hopper.cuh, the
// arguments and the rounding as in ampere_weights.cu. While one warpgroup stores, the other multiplies.
//
// Cost for r x c pairs of width d: 2 r c d flops, r c exponentials; written r c elements of g.
// The plain twins are `plain_weights` and `plain_sigmoid` in ../plain.py.
#include "hopper.cuh"

namespace nibs {

struct Everything {
    NIBS_DEVICE bool operator()(int, int) const { return true; }
};

template <class Format>
NIBS_DEVICE void weights(const WeightsArgs& args, u8* shared) {
    const float scale = not_zero(*args.scale), lift = *args.out.lift;
    hopper_tiles<Format>(args, shared, Everything(), [&](float (&s)[128], const HopperPlace& place, float* scratch) {
        if (place.first_row() >= args.pairs.rows) return;
        leave_out(s, forbidden(scale), args.pairs, place);
        gradient(s, args.pairs, args.of_rows, args.of_columns, scale, lift, args.out.product_part, place, scratch);
        store<Format>(s, args.pairs, args.out, place);
    });
}

template <class Format>
NIBS_DEVICE void sigmoid_tiles(const SigmoidArgs& args, u8* shared) {
    hopper_tiles<Format>(args, shared, Everything(), [&](float (&s)[128], const HopperPlace& place, float* scratch) {
        if (place.first_row() >= args.pairs.rows) return;
        const float scale = not_zero(*args.scale), bias = *args.bias, lift = args.out.g ? *args.out.lift : 1.0f;  // a register less each
        leave_out(s, forbidden(scale), args.pairs, place);
        each_designated(s, args.pairs, place, [&](float value, i64 i, i64, int) { return args.positive[i] = fmaf(value, scale, bias), value; });
        if (args.facts)
            row_facts(s, args.pairs, args.facts, args.column_tiles, place, scratch, [&](float product) { return fmaf(product, scale, bias); });
        sigmoid<false>(s, args.pairs, args.factor, scale, bias, lift, args.loss_part, args.weight_part, args.out.product_part, place, scratch);
        if (args.out.g) store<Format>(s, args.pairs, args.out, place);
    });
}

}  // namespace nibs

using namespace nibs;

#define NIBS_WEIGHTS(format, Format)                                      \
    NIBS_KERNEL(nibs_hopper_weights_##format, WeightsArgs, THREADS) {     \
        NIBS_SHARED_DYNAMIC(u8, shared);                                  \
        weights<Format>(args, shared);                                    \
    }                                                                     \
    NIBS_KERNEL(nibs_hopper_sigmoid_##format, SigmoidArgs, THREADS) {     \
        NIBS_SHARED_DYNAMIC(u8, shared);                                  \
        sigmoid_tiles<Format>(args, shared);                              \
    }

NIBS_WEIGHTS(bfloat16, Bfloat16)
NIBS_WEIGHTS(float16, Float16)
