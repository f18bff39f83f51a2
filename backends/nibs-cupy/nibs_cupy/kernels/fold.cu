// Partial statistics of tiles to those of rows and of columns, in the order of the tiles: no atomics, the same bits each time.
//
//     nibs_fold_lse     part, own [steps, length], shift and mark of each tile -> shift, mass [length], natural
//     nibs_fold_sum     part [steps, length] -> out [length], summed in double
//     nibs_fold_max     part [steps, length] -> out [length], the largest
//
// length: rows (or columns); steps: tiles along the other side. A row's tile at step t is
// `row / tile * base + t * step` in the arrays of tiles. A part is a sum of exp2(s LOG2E - shift), with the tile's shift
// or, where that is marked, the row's own. A row in which nothing is allowed leaves with mass 0 and the lowest shift.
//
// The shift leaves in natural units (by the LOG2E of tile.cuh, so that a lone logit comes out as it went in) and rounded,
// and the mass makes up for what the rounding lost: shift + log(mass) is good to a float32 of the *mass*, however
// large the shift.
//
// One thread a row. Bytes: 4 * steps * length read, twice. The plain twin is `plain_fold` in ../plain.py.
#include "device.cuh"

namespace nibs {

struct FoldArgs {
    const float* part;
    const float* own;
    const float* shift;
    const int* mark;
    float* out_shift;
    float* out_mass;
    i64 length, steps, tile, base, step;
};

struct SumArgs {
    const float* part;
    float* out;
    i64 length, steps;
};

// Of one tile: mass * 2^shift. False if nothing was allowed in it; a NaN counts as something.
NIBS_DEVICE bool tile_part(const FoldArgs& args, i64 row, i64 t, float& shift, float& mass) {
    const i64 tile = row / args.tile * args.base + t * args.step, at = t * args.length + row;
    shift = args.mark[tile] ? args.own[at] : args.shift[tile];
    mass = args.part[at];
    return !(mass == 0.0f);
}

}  // namespace nibs

using namespace nibs;

NIBS_KERNEL(nibs_fold_lse, FoldArgs, 128) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= args.length) return;
    const float none = -range<float>::infinity();
    float top = none, shift, mass;
    bool any = false;
    for (i64 t = 0; t < args.steps; t++)
        if (tile_part(args, row, t, shift, mass)) {
            any = true;
            top = fmaxf(top, shift);
        }
    double total = 0.0;
    for (i64 t = 0; t < args.steps; t++)
        if (tile_part(args, row, t, shift, mass)) total += (double)(mass * exp2f(shift - top));
    if (!any) {
        args.out_shift[row] = range<float>::lowest();
        args.out_mass[row] = 0.0f;
        return;
    }
    const double log2e = (double)1.44269504f;  // tile.cuh's
    // Far below the tile's maximum the mass is tiny: its power of two goes to the shift, where it costs nothing.
    double power = (double)top;
    if (total > 0.0 && total < 1.0e300) {
        const i64 exponent = ((__double_as_longlong(total) >> 52) & 0x7ff) - 1023;
        if (exponent < -20) {
            power += (double)exponent;
            total *= __longlong_as_double((1023 - exponent) << 52);
        }
    }
    const float natural = (float)(power / log2e);
    args.out_shift[row] = natural;
    args.out_mass[row] = (float)(total * (double)exp2f((float)(power - (double)natural * log2e)));
}

NIBS_KERNEL(nibs_fold_sum, SumArgs, 128) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= args.length) return;
    double total = 0.0;
    for (i64 t = 0; t < args.steps; t++) total += (double)args.part[t * args.length + row];
    args.out[row] = (float)total;
}

NIBS_KERNEL(nibs_fold_max, SumArgs, 128) {
    const i64 row = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= args.length) return;
    float top = -range<float>::infinity();
    for (i64 t = 0; t < args.steps; t++) top = fmaxf(top, args.part[t * args.length + row]);
    args.out[row] = top;
}
