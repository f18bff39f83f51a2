// What the fast kernels share: a tile of logits in the registers of a group of warps, and what is made of it.
//
//     Pairs           which pairs of the macro tile are allowed, and which one is each row's designated positive
//     leave_out       forbidden pairs become -infinity, after which nobody asks again
//     statistics      the tile's row sums and column sums of one exponential, or each with its own maximum
//     gradient        g, softmax: one exponential per pair where the tile's lse values lie close, else two
//     sigmoid         g and loss, sigmoid: softplus of four pairs from one logarithm and one reciprocal
//
// Shapes. A macro tile is `rows x columns` logits; thread blocks cut it into tiles of HEIGHT x WIDTH, held by WM x WN
// warps, each of which holds MF x NF fragments of 16 x 8. A thread (g = lane / 4, t = lane % 4) has of each
// fragment the rows g and g + 8 and the columns 2t and 2t + 1:
//
//     s[(m * NF + n) * 4 + 2 * h + e]     row  16 (warp_row MF + m) + g + 8 h     column  8 (warp_column NF + n) + 2 t + e
//
// which is the layout of mma.sync's sums and, with MF = 1, of wgmma's; so both families use this file.
//
// Logits are kept times log2(e), so that the exponential is a single instruction. There is no scale in
// the operands: s = <q, k> * scale * log2(e) here, once, and the positive's logit comes out of the same product.
#pragma once

#include "asynchronous.cuh"

namespace nibs {

constexpr float LOG2E = 1.44269504f;        // rounded to float32
constexpr float LOG2E_REST = 1.925963e-8f;  // what that left out
constexpr float LN2 = 0.693147181f;
constexpr float LOW = 8.0779357e-28f;  // 2^-90: a smaller sum may have lost terms that count, each below 2^-126
constexpr float SPREAD = 100.0f;       // log2 width of a tile's lse values up to which one exponential serves all
constexpr i64 NO_DIAGONAL = (i64)1 << 62;

// target [rows]: each row's designated column of this macro tile; another number, or no array, is none. query_mask
// [rows], key_mask [columns]: 0 is absent. query_ids, key_ids: pairs of equal id leave, but for the
// designated. diagonal: pairs (i, i + diagonal) leave, NO_DIAGONAL for none.
struct Pairs {
    const i64* target;
    const u8* query_mask;
    const u8* key_mask;
    const i64* query_ids;
    const i64* key_ids;
    i64 diagonal;
    i64 rows, columns;

    NIBS_DEVICE bool row_is_here(i64 i) const { return i < rows && (!query_mask || query_mask[i]); }
    NIBS_DEVICE bool column_is_here(i64 j) const { return j < columns && (!key_mask || key_mask[j]); }
    // A target beyond the macro tile may still lie within a tile's padding.
    NIBS_DEVICE i64 designated(i64 i) const { return target && i < rows && target[i] < columns ? target[i] : -1; }
    // Whether nothing of the HEIGHT x WIDTH pairs from (i, j) on is to be left out.
    NIBS_DEVICE bool whole(i64 i, i64 j, int height, int width) const {
        return i + height <= rows && j + width <= columns && !query_mask && !key_mask && !query_ids && diagonal == NO_DIAGONAL;
    }
};

// Some warps that work on one tile and meet at a barrier of their own.
struct Group {
    int id;       // of the named barrier; 0 is the whole thread block
    int threads;
    int thread;   // of this one within the group

    NIBS_DEVICE void meet_all() const {
        if (id) meet(id, threads);
        else __syncthreads();
    }
};

// Where a tile, and this thread in it, stands in the macro tile.
template <int MF, int NF, int WM, int WN>
struct Place {
    static constexpr int HEIGHT = WM * MF * 16, WIDTH = WN * NF * 8, WARPS = WM * WN;
    // Scratch in shared memory, floats: two per warp, a row strip per warp column, a column strip per warp row, two more;
    // or three row strips.
    static constexpr int STRIPS = WN * HEIGHT + WM * WIDTH + 2 * WIDTH, THREE = 3 * WN * HEIGHT;
    static constexpr int SCRATCH = 2 * WARPS + (STRIPS > THREE ? STRIPS : THREE);
    Group group;
    i64 tile_row, tile_column;  // of the tile, in tiles
    int warp_row, warp_column, lane;

    NIBS_DEVICE Place(Group group_, i64 tile_row_, i64 tile_column_) : group(group_), tile_row(tile_row_), tile_column(tile_column_) {
        const int warp = group.thread / 32;
        warp_row = warp / WN;
        warp_column = warp % WN;
        lane = group.thread % 32;
    }
    NIBS_DEVICE int warp() const { return group.thread / 32; }
    NIBS_DEVICE int own_row(int m, int h) const { return (warp_row * MF + m) * 16 + h * 8 + lane / 4; }
    NIBS_DEVICE int own_column(int n, int e) const { return (warp_column * NF + n) * 8 + (lane & 3) * 2 + e; }
    NIBS_DEVICE i64 row(int m, int h) const { return tile_row * HEIGHT + own_row(m, h); }
    NIBS_DEVICE i64 column(int n, int e) const { return tile_column * WIDTH + own_column(n, e); }
    NIBS_DEVICE i64 first_row() const { return tile_row * HEIGHT; }
    NIBS_DEVICE i64 first_column() const { return tile_column * WIDTH; }
    NIBS_DEVICE float* of_warps(float* scratch) const { return scratch; }
    NIBS_DEVICE float* of_rows(float* scratch) const { return scratch + 2 * WARPS; }
    NIBS_DEVICE float* of_columns(float* scratch) const { return scratch + 2 * WARPS + WN * HEIGHT; }
    NIBS_DEVICE float* of_weights(float* scratch) const { return scratch + 2 * WARPS + WN * HEIGHT + WM * WIDTH; }
};

template <class A, class B>
struct same {
    static constexpr bool value = false;
};
template <class A>
struct same<A, A> {
    static constexpr bool value = true;
};

NIBS_DEVICE float minus_infinity() { return -range<float>::infinity(); }

// 1 / x for a power of two.
NIBS_DEVICE float inverse_of_power(float x) { return __uint_as_float(0x7f000000u - __float_as_uint(x)); }

struct Add {
    NIBS_DEVICE static float join(float a, float b) { return a + b; }
};
struct Larger {
    NIBS_DEVICE static float join(float a, float b) { return fmaxf(a, b); }
};
struct Smaller {
    NIBS_DEVICE static float join(float a, float b) { return fminf(a, b); }
};

template <class Join>
NIBS_DEVICE float over_warp(float value) {
    NIBS_UNROLL
    for (int other = 16; other; other >>= 1) value = Join::join(value, __shfl_xor_sync(0xffffffffu, value, other));
    return value;
}

// Over the group, the same in every thread; the warps' values are joined in their order.
template <class Join, class Where>
NIBS_DEVICE float over_group(float value, const Where& place, float* slots) {
    value = over_warp<Join>(value);
    if (place.lane == 0) slots[place.warp()] = value;
    place.group.meet_all();
    value = slots[0];
    NIBS_UNROLL
    for (int warp = 1; warp < Where::WARPS; warp++) value = Join::join(value, slots[warp]);
    return value;
}

// Over the four threads that share a row.
template <class Join>
NIBS_DEVICE float over_row(float value) {
    value = Join::join(value, __shfl_xor_sync(0xffffffffu, value, 1));
    return Join::join(value, __shfl_xor_sync(0xffffffffu, value, 2));
}

// Over the eight threads that share columns: each brings COUNT values (a multiple of 8), value k for the k-th of its
// columns, and leaves with COUNT / 8 of them joined, those from `first_kept` on. Each step swaps halves, so that
// the work halves too: COUNT exchanges in all, where eight threads that all learn everything need three times as many.
template <class Join, int COUNT, int OTHER>
NIBS_DEVICE void over_columns(float* v, int lane) {
    const bool upper = lane & OTHER;
    NIBS_UNROLL
    for (int k = 0; k < COUNT / 2; k++) {
        const float given = upper ? v[k] : v[k + COUNT / 2], own = upper ? v[k + COUNT / 2] : v[k];
        const float taken = __shfl_xor_sync(0xffffffffu, given, OTHER);
        v[k] = upper ? Join::join(taken, own) : Join::join(own, taken);  // the lower lane's first, in both
    }
    if constexpr (OTHER > 4) over_columns<Join, COUNT / 2, OTHER / 2>(v, lane);
}
template <int COUNT>
NIBS_DEVICE int first_kept(int lane) {
    return (lane & 16 ? COUNT / 2 : 0) + (lane & 8 ? COUNT / 4 : 0) + (lane & 4 ? COUNT / 8 : 0);
}

template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void clear(float (&s)[MF * NF * 4]) {
    NIBS_UNROLL
    for (int i = 0; i < MF * NF * 4; i++) s[i] = 0.0f;
}

// Calls work(value, m, n, h, e) for each logit that this thread holds.
template <int MF, int NF, class Work>
NIBS_DEVICE void each(float (&s)[MF * NF * 4], Work&& work) {
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int n = 0; n < NF; n++) {
            NIBS_UNROLL
            for (int k = 0; k < 4; k++) work(s[(m * NF + n) * 4 + k], m, n, k >> 1, k & 1);
        }
    }
}

// Forbidden pairs become `out`, -infinity as a logit: exp2 of it is 0, its softplus is 0, its weight is 0. NaN of an absent
// row goes too.
// Which they are is gathered into bits first, by loops that stay loops: unrolled into each of the sums this would be
// most of the kernel.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void leave_out(float (&s)[MF * NF * 4], float out, const Pairs& pairs, const Place<MF, NF, WM, WN>& place) {
    typedef Place<MF, NF, WM, WN> Where;
    if (pairs.whole(place.first_row(), place.first_column(), Where::HEIGHT, Where::WIDTH)) return;
    constexpr int AT_ONCE = NF < 8 ? NF : 8;  // fragments of 4 bits each in a word
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int part = 0; part < NF; part += AT_ONCE) {
            u32 allowed = 0;
            NIBS_ROLL
            for (int bit = 0; bit < 4 * AT_ONCE; bit++) {
                const i64 i = place.row(m, bit >> 1 & 1), j = place.column(part + bit / 4, bit & 1);
                bool yes = pairs.row_is_here(i) && pairs.column_is_here(j) && j - i != pairs.diagonal;
                if (yes && pairs.query_ids && pairs.query_ids[i] == pairs.key_ids[j]) yes = pairs.designated(i) == j;
                allowed |= (u32)yes << bit;
            }
            NIBS_UNROLL
            for (int bit = 0; bit < 4 * AT_ONCE; bit++) {
                float& value = s[(m * NF + part) * 4 + bit];
                if (!(allowed >> bit & 1)) value = out;
            }
        }
    }
}

// For each designated pair that this thread holds, at most one in a row: value = work(value, i, j, slot), slot counting this thread's rows.
template <int MF, int NF, int WM, int WN, class Work>
NIBS_DEVICE void each_designated(float (&s)[MF * NF * 4], const Pairs& pairs, const Place<MF, NF, WM, WN>& place, Work&& work) {
    if (!pairs.target) return;
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int h = 0; h < 2; h++) {
            const i64 i = place.row(m, h), j = pairs.designated(i), from = j - place.column(0, 0);
            if (from < 0 || from >= NF * 8 || from % 8 > 1) continue;  // in another warp's columns, or another thread's
            const int within = (int)from;
            float value = 0.0f;
            NIBS_UNROLL
            for (int k = 0; k < NF * 2; k++) value = within == k / 2 * 8 + k % 2 ? s[(m * NF + k / 2) * 4 + 2 * h + k % 2] : value;
            value = work(value, i, j, 2 * m + h);
            NIBS_UNROLL
            for (int k = 0; k < NF * 2; k++) {
                float& one = s[(m * NF + k / 2) * 4 + 2 * h + k % 2];
                one = within == k / 2 * 8 + k % 2 ? value : one;
            }
        }
    }
}

// -- softmax: statistics ------------------------------------------------------------------------------

// row_part [column tiles, rows], column_part [row tiles, columns], shift and mark [row tiles, column tiles]. Either part may
// be null. An unmarked tile's parts are sums of exp2(s - shift); a marked one's are log2 of sums of exp2(s).
struct Parts {
    float* row_part;
    float* column_part;
    float* shift;
    int* mark;
    i64 row_tiles, column_tiles;
};

// One value for each row: joined over the row's threads and the warps beside each other, stored by the first threads.
template <class Join, int MF, int NF, int WM, int WN>
NIBS_DEVICE void rows_to_scratch(float (&v)[MF * 2], const Place<MF, NF, WM, WN>& place, float* strip) {
    typedef Place<MF, NF, WM, WN> Where;
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) {
        v[k] = over_row<Join>(v[k]);
        if ((place.lane & 3) == 0) strip[place.warp_column * Where::HEIGHT + place.own_row(k / 2, k & 1)] = v[k];
    }
}
template <class Join, int MF, int NF, int WM, int WN>
NIBS_DEVICE void columns_to_scratch(float (&v)[NF * 2], const Place<MF, NF, WM, WN>& place, float* strip) {
    typedef Place<MF, NF, WM, WN> Where;
    over_columns<Join, NF * 2, 16>(v, place.lane);
    const int first = first_kept<NF * 2>(place.lane);
    NIBS_UNROLL
    for (int k = 0; k < NF / 4; k++) {
        const int which = first + k;
        strip[place.warp_row * Where::WIDTH + place.own_column(which / 2, which & 1)] = v[k];
    }
}
template <class Join>
NIBS_DEVICE float from_strips(const float* strip, int at, int pitch, int strips) {
    float value = strip[at];
    for (int k = 1; k < strips; k++) value = Join::join(value, strip[k * pitch + at]);
    return value;
}

// The shared shift: one maximum, one exponential, both sums; a sum that is too small marks the tile.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void statistics(float (&s)[MF * NF * 4], const Pairs& pairs, const Parts& parts, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    float top = s[0];
    NIBS_UNROLL
    for (int i = 1; i < MF * NF * 4; i++) top = fmaxf(top, s[i]);
    top = over_group<Larger>(top, place, place.of_warps(scratch));
    if (top == minus_infinity()) top = 0.0f;  // nothing allowed: sums of 0
    float rows[MF * 2];
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) rows[k] = 0.0f;
    float columns[NF * 2];
    NIBS_UNROLL
    for (int n = 0; n < NF; n++) {
        NIBS_UNROLL
        for (int e = 0; e < 2; e++) {
            float sum = 0.0f;
            NIBS_UNROLL
            for (int m = 0; m < MF; m++) {
                NIBS_UNROLL
                for (int h = 0; h < 2; h++) {
                    const float one = exp2_fast(s[(m * NF + n) * 4 + 2 * h + e] - top);
                    rows[2 * m + h] += one;
                    sum += one;
                }
            }
            columns[2 * n + e] = sum;
        }
    }
    float *row_strip = place.of_rows(scratch), *column_strip = place.of_columns(scratch);
    rows_to_scratch<Add, MF, NF, WM, WN>(rows, place, row_strip);
    columns_to_scratch<Add, MF, NF, WM, WN>(columns, place, column_strip);
    place.group.meet_all();
    bool low = false;
    if (parts.row_part)
        for (int at = place.group.thread; at < Where::HEIGHT; at += place.group.threads) {
            const i64 i = place.first_row() + at;
            const float sum = from_strips<Add>(row_strip, at, Where::HEIGHT, WN);
            low = low || (sum < LOW && pairs.row_is_here(i));
            if (i < pairs.rows) parts.row_part[place.tile_column * pairs.rows + i] = sum;
        }
    if (parts.column_part)
        for (int at = place.group.thread; at < Where::WIDTH; at += place.group.threads) {
            const i64 j = place.first_column() + at;
            const float sum = from_strips<Add>(column_strip, at, Where::WIDTH, WM);
            low = low || (sum < LOW && pairs.column_is_here(j));
            if (j < pairs.columns) parts.column_part[place.tile_row * pairs.columns + j] = sum;
        }
    const float marked = over_group<Larger>(low ? 1.0f : 0.0f, place, place.of_warps(scratch) + Where::WARPS);
    if (place.group.thread == 0) {
        const i64 tile = place.tile_row * parts.column_tiles + place.tile_column;
        parts.shift[tile] = top;
        parts.mark[tile] = marked > 0.0f;
    }
}

// Each row and each column with its own maximum: what a marked tile is redone with. Slower, and always right.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void own_statistics(float (&s)[MF * NF * 4], const Pairs& pairs, const Parts& parts, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    float *row_strip = place.of_rows(scratch), *column_strip = place.of_columns(scratch);
    float rows[MF * 2], columns[NF * 2], row_top[MF * 2], column_top[NF * 2];
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) rows[k] = minus_infinity();
    NIBS_UNROLL
    for (int k = 0; k < NF * 2; k++) columns[k] = minus_infinity();
    each<MF, NF>(s, [&](float value, int m, int n, int h, int e) {
        rows[2 * m + h] = fmaxf(rows[2 * m + h], value);
        columns[2 * n + e] = fmaxf(columns[2 * n + e], value);
    });
    rows_to_scratch<Larger, MF, NF, WM, WN>(rows, place, row_strip);
    columns_to_scratch<Larger, MF, NF, WM, WN>(columns, place, column_strip);
    place.group.meet_all();
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) {
        row_top[k] = from_strips<Larger>(row_strip, place.own_row(k / 2, k & 1), Where::HEIGHT, WN);
        rows[k] = 0.0f;
    }
    NIBS_UNROLL
    for (int k = 0; k < NF * 2; k++) {
        column_top[k] = from_strips<Larger>(column_strip, place.own_column(k / 2, k & 1), Where::WIDTH, WM);
        columns[k] = 0.0f;
    }
    place.group.meet_all();  // the maxima are read before sums take their place
    each<MF, NF>(s, [&](float value, int m, int n, int h, int e) {
        if (value == minus_infinity()) return;
        rows[2 * m + h] += exp2_fast(value - row_top[2 * m + h]);
        columns[2 * n + e] += exp2_fast(value - column_top[2 * n + e]);
    });
    // log2 of the sum, with the maximum of a row that has none set to 0: 0 + log2(0) is -infinity.
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) row_top[k] = row_top[k] == minus_infinity() ? 0.0f : row_top[k];
    rows_to_scratch<Add, MF, NF, WM, WN>(rows, place, row_strip);
    columns_to_scratch<Add, MF, NF, WM, WN>(columns, place, column_strip);
    place.group.meet_all();
    if (parts.row_part && place.warp_column == 0 && (place.lane & 3) == 0) {
        NIBS_UNROLL
        for (int k = 0; k < MF * 2; k++) {
            const i64 i = place.row(k / 2, k & 1);
            const float sum = from_strips<Add>(row_strip, place.own_row(k / 2, k & 1), Where::HEIGHT, WN);
            if (i < pairs.rows) parts.row_part[place.tile_column * pairs.rows + i] = row_top[k] + log2f(sum);
        }
    }
    if (parts.column_part && place.warp_row == 0 && place.lane < 4) {
        NIBS_UNROLL
        for (int k = 0; k < NF * 2; k++) {
            const i64 j = place.column(k / 2, k & 1);
            const float sum = from_strips<Add>(column_strip, place.own_column(k / 2, k & 1), Where::WIDTH, WM);
            const float own = column_top[k] == minus_infinity() ? 0.0f : column_top[k];
            if (j < pairs.columns) parts.column_part[place.tile_row * pairs.columns + j] = own + log2f(sum);
        }
    }
}

// -- gradient weights ---------------------------------------------------------------------------------

// Of one side, each [rows] or [columns]; factor null: no such side. As nibs.verbs.Weights, whose shifts are natural.
struct Side {
    const float* factor;
    const float* shift;
    const float* target;
};

// g [rows, pitch] in the format's store; lift: a power of two that float16 is multiplied by. product_part [column tiles,
// rows], or null: row sums of g <q, k>, from weights that are not rounded and without the lift.
struct Output {
    void* g;
    i64 pitch;
    const float* lift;
    float* product_part;
};

// What the weights and the sigmoid kernels of every family are given.
struct WeightsArgs {
    const u8* queries;
    const u8* keys;
    i64 slabs;
    const float* scale;
    Pairs pairs;
    Side of_rows, of_columns;
    Output out;
};

// bias: one float. factor [rows], or null: 1. loss_part, weight_part: see tile.cuh. g null: only the loss.
struct SigmoidArgs {
    const u8* queries;
    const u8* keys;
    i64 slabs;
    const float* scale;
    const float* bias;
    Pairs pairs;
    const float* factor;
    float* loss_part;
    float* weight_part;
    float* positive;
    Output out;
};

// Kernels that keep products and not logits must keep forbidden pairs at -infinity of the logit, whatever the scale's sign;
// and a scale of 0 must not make NaN of them: then it is the smallest number instead, which no sum notices.
NIBS_DEVICE float not_zero(float scale) { return scale == 0.0f ? 1.17549435e-38f : scale; }
NIBS_DEVICE float forbidden(float scale) { return scale < 0.0f ? range<float>::infinity() : minus_infinity(); }

// g <q, k>, of which a pair that was left out has none.
NIBS_DEVICE float weighed(float g, float product) { return g == 0.0f ? 0.0f : g * product; }

NIBS_DEVICE float to_log2(float shift, float from) {  // shift * log2(e) - from, with the bits that the constant lacks
    return fmaf(shift, LOG2E, -from) + shift * LOG2E_REST;
}

// Four threads that share a row hold words of two columns in four fragments; each leaves with one fragment's four words.
NIBS_DEVICE void transpose(u32 (&x)[4], int t) {
    const bool odd = t & 1, high = t & 2;
    NIBS_UNROLL
    for (int k = 0; k < 4; k += 2) {  // the 2 x 2 corners
        const u32 given = odd ? x[k] : x[k + 1];
        const u32 taken = __shfl_xor_sync(0xffffffffu, given, 1);
        if (odd) x[k] = taken;
        else x[k + 1] = taken;
    }
    NIBS_UNROLL
    for (int k = 0; k < 2; k++) {
        const u32 given = high ? x[k] : x[k + 2];
        const u32 taken = __shfl_xor_sync(0xffffffffu, given, 2);
        if (high) x[k] = taken;
        else x[k + 2] = taken;
    }
}

struct alignas(16) Words {
    u32 x, y, z, w;
};

// Rounds and stores the tile: 16 bytes a thread, 64 in a row. Columns up to the pitch, a multiple of 8, are written.
template <class Format, int MF, int NF, int WM, int WN>
NIBS_DEVICE void store(float (&s)[MF * NF * 4], const Pairs& pairs, const Output& out, const Place<MF, NF, WM, WN>& place) {
    const int t = place.lane & 3;
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int h = 0; h < 2; h++) {
            const i64 i = place.row(m, h);
            if constexpr (sizeof(typename Format::Store) == 2) {
                NIBS_UNROLL
                for (int n = 0; n < NF; n += 4) {
                    u32 x[4];
                    NIBS_UNROLL
                    for (int k = 0; k < 4; k++) {
                        const float* pair = &s[(m * NF + n + k) * 4 + 2 * h];
                        x[k] = pack_pair(Format(), pair[0], pair[1]);
                    }
                    transpose(x, t);
                    const i64 j = place.first_column() + (place.warp_column * NF + n + t) * 8;
                    if (i < pairs.rows && j < out.pitch) *(Words*)((u16*)out.g + i * out.pitch + j) = {x[0], x[1], x[2], x[3]};
                }
            } else {
                NIBS_UNROLL
                for (int n = 0; n < NF; n++) {
                    const float* pair = &s[(m * NF + n) * 4 + 2 * h];
                    const i64 j = place.column(n, 0);
                    if (i < pairs.rows && j < out.pitch) {
                        float* at = (float*)out.g + i * out.pitch + j;
                        at[0] = pair[0];
                        at[1] = pair[1];
                    }
                }
            }
        }
    }
}

// g = row factor exp(s - row shift) + column factor exp(s - column shift) - targets on the designated, in the place of the
// products <q, k>; scale: to logits in log2 units.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void gradient(float (&s)[MF * NF * 4], const Pairs& pairs, const Side& rows, const Side& columns, float scale, float lift,
                          float* product_part, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    // How far apart the lse values of this tile lie, in log2; rows and columns that are no anchors have +infinity.
    float low = range<float>::infinity(), high = minus_infinity();
    const auto look = [&](const Side& side, i64 at, i64 end) {
        if (!side.factor || at >= end) return;
        const float value = to_log2(side.shift[at], 0.0f);
        if (value == range<float>::infinity()) return;
        low = fminf(low, value);
        high = fmaxf(high, value);
    };
    for (int at = place.group.thread; at < Where::HEIGHT; at += place.group.threads) look(rows, place.first_row() + at, pairs.rows);
    for (int at = place.group.thread; at < Where::WIDTH; at += place.group.threads) look(columns, place.first_column() + at, pairs.columns);
    low = over_group<Smaller>(low, place, place.of_warps(scratch));
    high = over_group<Larger>(high, place, place.of_warps(scratch) + Where::WARPS);
    const bool anyone = low <= high;
    const bool close = !(high - low > SPREAD);
    const float middle = anyone ? 0.5f * (low + high) : 0.0f;
    // Each column's factor (and shift, where each takes its own), once for the tile.
    float *factors = place.of_weights(scratch), *shifts = factors + Where::WIDTH;
    for (int at = place.group.thread; at < Where::WIDTH; at += place.group.threads) {
        const i64 j = place.first_column() + at;
        float factor = 0.0f, shift = 0.0f;
        if (columns.factor && j < pairs.columns) {
            factor = columns.factor[j] * lift;
            shift = to_log2(columns.shift[j], middle);
            if (close) factor *= exp2_fast(-shift);
        }
        factors[at] = factor;
        shifts[at] = shift;
    }
    place.group.meet_all();
    const auto target_of = [&](i64 i, i64 j) {
        return ((rows.factor ? rows.target[i] : 0.0f) + (columns.factor ? columns.target[j] : 0.0f)) * lift;
    };
    float products[MF * 2];
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) products[k] = 0.0f;
    each_designated(s, pairs, place, [&](float value, i64 i, i64 j, int slot) {
        products[slot] = -target_of(i, j) * value;
        return value;
    });
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int h = 0; h < 2; h++) {
            const i64 i = place.row(m, h);
            float factor = 0.0f, shift = 0.0f;
            if (rows.factor && i < pairs.rows) {
                factor = rows.factor[i] * lift;
                shift = to_log2(rows.shift[i], middle);
                if (close) factor *= exp2_fast(-shift);
            }
            NIBS_UNROLL
            for (int n = 0; n < NF; n++) {
                NIBS_UNROLL
                for (int e = 0; e < 2; e++) {
                    float& value = s[(m * NF + n) * 4 + 2 * h + e];
                    const int at = place.own_column(n, e);
                    // Where nobody is an anchor the exponent has no bound, and infinity times 0 would be NaN.
                    const float product = value, above = fmaf(product, scale, -middle);
                    if (close) value = exp2_fast(above > SPREAD ? SPREAD : above) * (factor + factors[at]);
                    else {
                        float g = 0.0f;
                        if (factor != 0.0f) g += factor * exp2_fast(above - shift);
                        if (factors[at] != 0.0f) g += factors[at] * exp2_fast(above - shifts[at]);
                        value = g;
                    }
                    products[2 * m + h] += weighed(value, product);
                }
            }
        }
    }
    each_designated(s, pairs, place, [&](float value, i64 i, i64 j, int) { return value - target_of(i, j); });
    if (product_part) {
        rows_to_scratch<Add, MF, NF, WM, WN>(products, place, place.of_rows(scratch));
        place.group.meet_all();
        const float drop = inverse_of_power(lift);
        for (int at = place.group.thread; at < Where::HEIGHT; at += place.group.threads) {
            const i64 i = place.first_row() + at;
            const float sum = from_strips<Add>(place.of_rows(scratch), at, Where::HEIGHT, WN) * drop;
            if (i < pairs.rows) product_part[place.tile_column * pairs.rows + i] = sum;
        }
    }
}

// -- sigmoid ------------------------------------------------------------------------------------------

// log(1 + w) for w from 0 to 15, to some 4 units in the last place: 2 atanh(w / (2 + w)) as a series while w is small,
// where 1 + w would lose it, and the instruction from there on. No branch, few registers.
NIBS_DEVICE float log1p_fast(float w) {
    const float z = __fdividef(w, 2.0f + w), square = z * z;
    const float series = fmaf(square, fmaf(square, fmaf(square, fmaf(square, 2.0f / 9, 2.0f / 7), 2.0f / 5), 2.0f / 3), 2.0f) * z;
    return w < 0.5f ? series : __logf(1.0f + w);
}

// With t = s on negatives and -s on positives: g = factor sigmoid(t), negative on positives, in the place of the products
// <q, k>. Row sums of softplus(t), without the factor, of g, and of g <q, k>: loss_part, weight_part, product_part
// [column tiles, rows]; each may be null.
//
// PRODUCTS keeps the products beside the logits until their sum is formed, and so has to turn the sign of positives within
// the loop: more registers than wgmma leaves. Without, the logits take the products' place first.
//
// softplus(t) = max(t, 0) + log(1 + e), e = exp(-|t|): 1 + e loses an e below 1e-7, and there are millions of such. So four
// pairs are taken together: their product of (1 + e) less 1 is formed without ever adding the 1, and goes to log1p_fast. One
// reciprocal of the product, times the other factors, gives each pair's 1 / (1 + e).
template <bool PRODUCTS, int MF, int NF, int WM, int WN>
NIBS_DEVICE void sigmoid(float (&s)[MF * NF * 4], const Pairs& pairs, const float* factor, float scale, float bias, float lift, float* loss_part,
                         float* weight_part, float* product_part, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    float losses[MF * 2], weights[MF * 2], products[MF * 2];
    const float drop = inverse_of_power(lift);
    if constexpr (!PRODUCTS) {
        NIBS_UNROLL
        for (int k = 0; k < MF * NF * 4; k++) s[k] = fmaf(s[k], scale, bias);
        each_designated(s, pairs, place, [&](float value, i64, i64, int) { return -value; });
    }
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int h = 0; h < 2; h++) {
            const i64 i = place.row(m, h);
            int positive = -1;  // counted from this thread's first column
            if constexpr (PRODUCTS) {
                const i64 from = pairs.designated(i) - place.column(0, 0);
                if (from >= 0 && from < NF * 8) positive = (int)from;
            }
            const float own = (factor ? (i < pairs.rows ? factor[i] : 0.0f) : 1.0f) * lift;
            float loss = 0.0f, weight = 0.0f, product = 0.0f;
            NIBS_UNROLL
            for (int n = 0; n < NF; n += 2) {
                float t[4], one[4], small[4];  // 1 + e, and e
                NIBS_UNROLL
                for (int k = 0; k < 4; k++) {
                    t[k] = s[(m * NF + n + k / 2) * 4 + 2 * h + (k & 1)];
                    if constexpr (PRODUCTS) {
                        t[k] = fmaf(t[k], scale, bias);
                        t[k] = positive == (n + k / 2) * 8 + (k & 1) ? -t[k] : t[k];
                    }
                    small[k] = exp2_fast(-fabsf(t[k]) * LOG2E);
                    one[k] = 1.0f + small[k];
                    loss += t[k] > 0.0f ? t[k] : 0.0f;
                }
                const float w01 = small[0] + small[1] + small[0] * small[1], w23 = small[2] + small[3] + small[2] * small[3];
                loss += log1p_fast(w01 + w23 + w01 * w23);
                const float p01 = one[0] * one[1], p23 = one[2] * one[3], inverse = __fdividef(own, p01 * p23);
                const float others[4] = {one[1] * p23, one[0] * p23, one[3] * p01, one[2] * p01};
                NIBS_UNROLL
                for (int k = 0; k < 4; k++) {
                    float& value = s[(m * NF + n + k / 2) * 4 + 2 * h + (k & 1)];
                    float g = (t[k] < 0.0f ? small[k] : 1.0f) * (others[k] * inverse);
                    if constexpr (PRODUCTS) {
                        g = positive == (n + k / 2) * 8 + (k & 1) ? -g : g;
                        product += weighed(g, value);
                    }
                    weight += g;
                    value = g;
                }
            }
            losses[2 * m + h] = loss;
            weights[2 * m + h] = weight * drop;
            products[2 * m + h] = product * drop;
        }
    }
    if constexpr (!PRODUCTS)
        each_designated(s, pairs, place, [&](float value, i64, i64, int slot) {
            weights[slot] -= 2.0f * drop * value;
            return -value;
        });
    constexpr int STRIP = WN * Where::HEIGHT;
    float* strips = place.of_rows(scratch);
    static_assert(3 * STRIP <= Where::SCRATCH - 2 * Where::WARPS, "three strips fit");
    place.group.meet_all();  // of the tile before
    rows_to_scratch<Add, MF, NF, WM, WN>(losses, place, strips);
    rows_to_scratch<Add, MF, NF, WM, WN>(weights, place, strips + STRIP);
    if (PRODUCTS) rows_to_scratch<Add, MF, NF, WM, WN>(products, place, strips + 2 * STRIP);
    place.group.meet_all();
    float* const parts[3] = {loss_part, weight_part, product_part};
    for (int at = place.group.thread; at < Where::HEIGHT; at += place.group.threads) {
        const i64 i = place.first_row() + at;
        NIBS_UNROLL
        for (int k = 0; k < 2 + PRODUCTS; k++)
            if (parts[k] && i < pairs.rows)
                parts[k][place.tile_column * pairs.rows + i] = from_strips<Add>(strips + k * STRIP, at, Where::HEIGHT, WN);
    }
}

}  // namespace nibs
