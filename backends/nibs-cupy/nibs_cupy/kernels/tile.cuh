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
// A logit is s = <q, k> * scale, rounded once, the same number in every kernel: in the lse, as the positive's logit and in the
// weights. What is wanted of it is exp2(s LOG2E - u), u being any float32: one fused multiply-add whose product is not
// rounded, so that the exponent is as good as it is small, however large s and u are. Shifts u are in these units, "log2";
// back to natural ones goes by the same LOG2E, which so is a constant of the kernels and not an error.
#pragma once

#include "asynchronous.cuh"

namespace nibs {

constexpr float LOG2E = 1.44269504f;
constexpr float LOW = 8.0779357e-28f;  // 2^-90: a smaller sum may have lost terms that count, each below 2^-126
constexpr float SPREAD = 100.0f;  // log2 width of a tile's lse values up to which one exponential serves all
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
    // Scratch in shared memory, floats: two per warp; then, twice, a row strip per warp column and a column strip per warp
    // row. Elsewhere the same room is three row strips, or two column strips in the place of the second ones.
    static constexpr int STRIPS = WN * HEIGHT + WM * WIDTH, SCRATCH = 2 * WARPS + 2 * STRIPS;
    static_assert(WM >= 2, "two column strips fit");
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
    NIBS_DEVICE float* of_weights(float* scratch) const { return of_rows(scratch) + STRIPS; }
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
// be null. Parts are sums of exp2(s LOG2E - shift); of a marked tile, each with a shift of its own in row_shift and
// column_shift, of the shapes of the parts. One number would not do: sum and shift in one is a float32 of the shift.
struct Parts {
    float* row_part;
    float* column_part;
    float* row_shift;
    float* column_shift;
    float* shift;
    int* mark;
    i64 row_tiles, column_tiles;
};

// One value of this thread's k-th row: joined over the row's threads, stored by the first of them, a strip per warp column.
template <class Join, class Where>
NIBS_DEVICE void row_to_scratch(float value, int k, const Where& place, float* strip) {
    value = over_row<Join>(value);
    if ((place.lane & 3) == 0) strip[place.warp_column * Where::HEIGHT + place.own_row(k / 2, k & 1)] = value;
}
template <class Join, int ROWS, class Where>
NIBS_DEVICE void rows_to_scratch(const float (&v)[ROWS], const Where& place, float* strip) {
    NIBS_UNROLL
    for (int k = 0; k < ROWS; k++) row_to_scratch<Join>(v[k], k, place, strip);
}
// The same for the columns of FRAGMENTS fragments from `first` on.
template <class Join, int FRAGMENTS, class Where>
NIBS_DEVICE void columns_to_scratch(float (&v)[FRAGMENTS * 2], int first, const Where& place, float* strip) {
    over_columns<Join, FRAGMENTS * 2, 16>(v, place.lane);
    const int kept = first_kept<FRAGMENTS * 2>(place.lane);
    NIBS_UNROLL
    for (int k = 0; k < FRAGMENTS / 4; k++) {
        const int which = kept + k;
        strip[place.warp_row * Where::WIDTH + place.own_column(first + which / 2, which & 1)] = v[k];
    }
}
template <class Join>
NIBS_DEVICE float from_strips(const float* strip, int at, int pitch, int strips) {
    float value = strip[at];
    for (int k = 1; k < strips; k++) value = Join::join(value, strip[k * pitch + at]);
    return value;
}

// A maximum as a shift; 0 for a row without any pair, whose sum then is one of zeros.
NIBS_DEVICE float shift_of(float top) { return top == minus_infinity() ? 0.0f : top * LOG2E; }

// The shared shift: one maximum, one exponential, both sums; a sum that is too small marks the tile.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void statistics(float (&s)[MF * NF * 4], const Pairs& pairs, const Parts& parts, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    float top = s[0];
    NIBS_UNROLL
    for (int i = 1; i < MF * NF * 4; i++) top = fmaxf(top, s[i]);
    top = over_group<Larger>(top, place, place.of_warps(scratch));
    const float shift = shift_of(top);
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
                    const float one = exp2_fast(fmaf(s[(m * NF + n) * 4 + 2 * h + e], LOG2E, -shift));
                    rows[2 * m + h] += one;
                    sum += one;
                }
            }
            columns[2 * n + e] = sum;
        }
    }
    float *row_strip = place.of_rows(scratch), *column_strip = place.of_columns(scratch);
    rows_to_scratch<Add>(rows, place, row_strip);
    columns_to_scratch<Add, NF>(columns, 0, place, column_strip);
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
        parts.shift[tile] = shift;
        parts.mark[tile] = marked > 0.0f;
    }
}

template <int COUNT>
NIBS_DEVICE void fill(float (&values)[COUNT], float with) {
    NIBS_UNROLL
    for (int k = 0; k < COUNT; k++) values[k] = with;
}

// Each row and each column with its own maximum: what a marked tile is redone with. Slower, and always right. Columns go
// by a few at a time, for a warpgroup of Hopper holds 64 of them and has no registers for their maxima and sums.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void own_statistics(float (&s)[MF * NF * 4], const Pairs& pairs, const Parts& parts, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    constexpr int AT_ONCE = 4;  // fragments
    float *row_strip = place.of_rows(scratch), *column_strip = place.of_columns(scratch);
    float *row_sums = row_strip + Where::STRIPS, *column_sums = column_strip + Where::STRIPS;
    float rows[MF * 2], row_shift[MF * 2], columns[AT_ONCE * 2], column_shift[AT_ONCE * 2];
    // Of the EACH logits of AT_ONCE fragments from n on, the k-th: its value, the k of its row, and of its column.
    const auto each = [&](int n, int k) -> float { return s[(k / (AT_ONCE * 4) * NF + n) * 4 + k % (AT_ONCE * 4)]; };
    constexpr int EACH = MF * AT_ONCE * 4;
    const auto row_of = [](int k) { return k / (AT_ONCE * 4) * 2 + (k >> 1 & 1); };
    const auto column_of = [](int k) { return k % (AT_ONCE * 4) / 4 * 2 + (k & 1); };
    place.group.meet_all();  // the strips have been read, of the tile before: wgmma is no barrier to a warpgroup
    fill(rows, minus_infinity());
    NIBS_UNROLL
    for (int n = 0; n < NF; n += AT_ONCE) {
        fill(columns, minus_infinity());
        NIBS_UNROLL
        for (int k = 0; k < EACH; k++) {
            rows[row_of(k)] = fmaxf(rows[row_of(k)], each(n, k));
            columns[column_of(k)] = fmaxf(columns[column_of(k)], each(n, k));
        }
        columns_to_scratch<Larger, AT_ONCE>(columns, n, place, column_strip);
    }
    rows_to_scratch<Larger>(rows, place, row_strip);
    place.group.meet_all();
    NIBS_UNROLL
    for (int k = 0; k < MF * 2; k++) row_shift[k] = shift_of(from_strips<Larger>(row_strip, place.own_row(k / 2, k & 1), Where::HEIGHT, WN));
    fill(rows, 0.0f);
    NIBS_UNROLL
    for (int n = 0; n < NF; n += AT_ONCE) {
        NIBS_UNROLL
        for (int k = 0; k < AT_ONCE * 2; k++)
            column_shift[k] = shift_of(from_strips<Larger>(column_strip, place.own_column(n + k / 2, k & 1), Where::WIDTH, WM));
        fill(columns, 0.0f);
        NIBS_UNROLL
        for (int k = 0; k < EACH; k++) {
            rows[row_of(k)] += exp2_fast(fmaf(each(n, k), LOG2E, -row_shift[row_of(k)]));
            columns[column_of(k)] += exp2_fast(fmaf(each(n, k), LOG2E, -column_shift[column_of(k)]));
        }
        columns_to_scratch<Add, AT_ONCE>(columns, n, place, column_sums);
    }
    rows_to_scratch<Add>(rows, place, row_sums);
    place.group.meet_all();
    for (int at = place.group.thread; at < Where::HEIGHT; at += place.group.threads) {
        const i64 i = place.first_row() + at, to = place.tile_column * pairs.rows + i;
        if (!parts.row_part || i >= pairs.rows) break;
        parts.row_part[to] = from_strips<Add>(row_sums, at, Where::HEIGHT, WN);
        parts.row_shift[to] = shift_of(from_strips<Larger>(row_strip, at, Where::HEIGHT, WN));
    }
    for (int at = place.group.thread; at < Where::WIDTH; at += place.group.threads) {
        const i64 j = place.first_column() + at, to = place.tile_row * pairs.columns + j;
        if (!parts.column_part || j >= pairs.columns) break;
        parts.column_part[to] = from_strips<Add>(column_sums, at, Where::WIDTH, WM);
        parts.column_shift[to] = shift_of(from_strips<Larger>(column_strip, at, Where::WIDTH, WM));
    }
}

// What stats=True asks of each row: facts [3, column tiles, rows] are sums and counts of allowed logits, and the largest
// negative one. Made from what leave_out left, `logit` turning it into logits; designated pairs are the positives.
template <int MF, int NF, int WM, int WN, class Logit>
NIBS_DEVICE void row_facts(float (&s)[MF * NF * 4], const Pairs& pairs, float* facts, i64 column_tiles, const Place<MF, NF, WM, WN>& place,
                           float* scratch, Logit logit) {
    typedef Place<MF, NF, WM, WN> Where;
    constexpr int STRIP = WN * Where::HEIGHT;
    float* strips = place.of_rows(scratch);
    place.group.meet_all();  // the strips have been read
    NIBS_UNROLL
    for (int m = 0; m < MF; m++) {
        NIBS_UNROLL
        for (int h = 0; h < 2; h++) {
            const i64 from = pairs.designated(place.row(m, h)) - place.column(0, 0);
            const int positive = from >= 0 && from < NF * 8 ? (int)from : -1;
            float sum = 0.0f, count = 0.0f, top = minus_infinity();
            NIBS_UNROLL
            for (int k = 0; k < NF * 2; k++) {
                const float value = logit(s[(m * NF + k / 2) * 4 + 2 * h + k % 2]);
                const bool out = value == minus_infinity();
                sum += out ? 0.0f : value;
                count += out ? 0.0f : 1.0f;
                top = positive == k / 2 * 8 + k % 2 ? top : fmaxf(top, value);
            }
            row_to_scratch<Add>(sum, 2 * m + h, place, strips);
            row_to_scratch<Add>(count, 2 * m + h, place, strips + STRIP);
            row_to_scratch<Larger>(top, 2 * m + h, place, strips + 2 * STRIP);
        }
    }
    place.group.meet_all();
    for (int at = place.group.thread; at < Where::HEIGHT; at += place.group.threads) {
        const i64 i = place.first_row() + at, to = place.tile_column * pairs.rows + i, all = column_tiles * pairs.rows;
        if (i >= pairs.rows) break;
        facts[to] = from_strips<Add>(strips, at, Where::HEIGHT, WN);
        facts[all + to] = from_strips<Add>(strips + STRIP, at, Where::HEIGHT, WN);
        facts[2 * all + to] = from_strips<Larger>(strips + 2 * STRIP, at, Where::HEIGHT, WN);
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

// bias: one float. factor [rows], or null: 1. loss_part, weight_part: see `sigmoid`. g null: only the loss. facts: of
// row_facts, or null.
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
    float* facts;
    i64 column_tiles;
};

// Kernels that keep products and not logits must keep forbidden pairs at -infinity of the logit, whatever the scale's sign;
// and a scale of 0 must not make NaN of them: then it is the smallest number instead, which no sum notices.
NIBS_DEVICE float not_zero(float scale) { return scale == 0.0f ? 1.17549435e-38f : scale; }
NIBS_DEVICE float forbidden(float scale) { return scale < 0.0f ? range<float>::infinity() : minus_infinity(); }

// g <q, k>, of which a pair that was left out has none.
NIBS_DEVICE float weighed(float g, float product) { return g == 0.0f ? 0.0f : g * product; }

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
// products <q, k>.
template <int MF, int NF, int WM, int WN>
NIBS_DEVICE void gradient(float (&s)[MF * NF * 4], const Pairs& pairs, const Side& rows, const Side& columns, float scale, float lift,
                          float* product_part, const Place<MF, NF, WM, WN>& place, float* scratch) {
    typedef Place<MF, NF, WM, WN> Where;
    // How far apart the lse values of this tile lie, in log2; rows and columns that are no anchors have +infinity.
    float low = range<float>::infinity(), high = minus_infinity();
    const auto look = [&](const Side& side, i64 at, i64 end) {
        if (!side.factor || at >= end) return;
        const float value = side.shift[at] * LOG2E;
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
            shift = columns.shift[j];
            if (close) factor *= exp2_fast(fmaf(-shift, LOG2E, middle));
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
                shift = rows.shift[i];
                if (close) factor *= exp2_fast(fmaf(-shift, LOG2E, middle));
            }
            NIBS_UNROLL
            for (int n = 0; n < NF; n++) {
                NIBS_UNROLL
                for (int e = 0; e < 2; e++) {
                    float& value = s[(m * NF + n) * 4 + 2 * h + e];
                    const int at = place.own_column(n, e);
                    const float product = value, logit = times(product, scale);
                    if (close) {
                        // Where nobody is an anchor the exponent has no bound, and infinity times 0 would be NaN.
                        const float above = fmaf(logit, LOG2E, -middle);
                        value = exp2_fast(above > SPREAD ? SPREAD : above) * (factor + factors[at]);
                    } else {
                        float g = 0.0f;  // differences of natural numbers: exact where the weight is not 0
                        if (factor != 0.0f) g += factor * exp2_fast((logit - shift) * LOG2E);
                        if (factors[at] != 0.0f) g += factors[at] * exp2_fast((logit - shifts[at]) * LOG2E);
                        value = g;
                    }
                    products[2 * m + h] += weighed(value, product);
                }
            }
        }
    }
    each_designated(s, pairs, place, [&](float value, i64 i, i64 j, int) { return value - target_of(i, j); });
    if (product_part) {
        rows_to_scratch<Add>(products, place, place.of_rows(scratch));
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
// where 1 + w would lose it, and the instruction from there on, which up to w = 1 is good to 2^-21.4 by its manual. No
// branch, few registers.
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
    constexpr int STRIP = WN * Where::HEIGHT;
    float* strips = place.of_rows(scratch);
    static_assert(3 * STRIP <= Where::SCRATCH - 2 * Where::WARPS, "three strips fit");
    float losses[MF * 2], weights[MF * 2];  // of PRODUCTS, all three leave row by row: registers are what is short there
    const float drop = inverse_of_power(lift);
    place.group.meet_all();  // the strips have been read, of the tile before
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
            if constexpr (PRODUCTS) {
                row_to_scratch<Add>(loss, 2 * m + h, place, strips);
                row_to_scratch<Add>(weight * drop, 2 * m + h, place, strips + STRIP);
                row_to_scratch<Add>(product * drop, 2 * m + h, place, strips + 2 * STRIP);
            } else {
                losses[2 * m + h] = loss;
                weights[2 * m + h] = weight * drop;
            }
        }
    }
    if constexpr (!PRODUCTS) {
        each_designated(s, pairs, place, [&](float value, i64, i64, int slot) {
            weights[slot] -= 2.0f * drop * value;
            return -value;
        });
        rows_to_scratch<Add>(losses, place, strips);
        rows_to_scratch<Add>(weights, place, strips + STRIP);
    }
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
