// The general kernels: every objective and every option, in float32 and float64, without one instruction of any
// architecture. What a fast kernel does not take comes here, and the plan says so (`kernel`).
//
// Shapes: a tile of queries [r, d] against keys [c, d], cut into squares of 64 x 64, one for each thread block (common.cuh).
//
//   kernel     reads                     writes                                  flops             bytes, at least
//   lse        queries, keys             row parts [fields, c/64, r],            2 r c d + 10 r c  r d c/64 + c d r/64 words in
//                                        column parts [fields, r/64, c];                           (from L2 but for the first), 3/64 r c
//                                        products [r, c] if kept                                   out for a plain symmetric loss
//   fold       parts [fields, p, length] fields [fields, length]                 4 fields p length  their size
//   merge      two statistics            the first                               4 fields length    3 times their size
//   poison     rows [n, d]               [n]                                     2 n d             n d and n words
//   scatter    values [n]                [m]                                     n                  24 n + 12 m
//   weights    queries, keys (or kept    weights [r, c]                          2 r c d + 8 r c   as lse, and r c words out
//              products), weights of
//              rows and columns
//   sigmoid    queries, keys             row parts, and weights [r, c]           2 r c d + 20 r c  as weights
//   plain_*    the same                  the same                                the twins: a loop for each row or pair
//
// The logits themselves are never written, unless the schedule asks to keep them. The products weights @ keys and
// weights^T @ queries are the BLAS library's.
//
// One exponential for rows and columns (lse). With u the largest logit of the square, E = exp(s - u + HEAD) serves both: row masses
// are its row sums, column masses its column sums, all with the one shift u. A sum below LOW has lost terms that count; then, by
// a barrier that votes, the whole square is redone with each row's and each column's own maximum. The logits are still in
// registers, so this needs no second kernel and no word to the host.
//
// One exponential for both directions (weights). g = exp(s - mid) (f_i exp(mid - shift_i) + f_j exp(mid - shift_j)), mid halfway between the
// extreme shifts of the square. Only where they lie within SPREAD; else each side takes its own exponential.
//
// softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|): four of them share one logarithm and one reciprocal,
// w = (1 + e1)(1 + e2)(1 + e3)(1 + e4) - 1, put together without ever adding 1 to something small.
//
// Refused: tensor cores, asynchronous copies, a table of tuned shapes. This file is the one that must be right everywhere.

#include "common.cuh"

namespace nibs {

// The guards of the one exponential, in float32's range; wider ones would lose digits of lse = shift + log(mass) in float64.
template <class T>
struct guard {
    static NIBS_DEVICE T head() { return T(40); }                         // e^40 times 64 is far from overflow
    static NIBS_DEVICE T lift() { return T(2.3538526683702e17); }         // e^head
    static NIBS_DEVICE T low() { return T(2.8625185805493937e-20); }      // e^-45: less than e^-42 of it was flushed to 0,
                                                                          // and low / lift is still a normal number
    static NIBS_DEVICE T spread() { return T(69); }                       // e^-34 times e^-87 is what may be lost
};

NIBS_DEVICE float exponential(float x) { return expf(x); }
NIBS_DEVICE double exponential(double x) { return exp(x); }
NIBS_DEVICE float log_of_1_plus(float x) { return log1pf(x); }
NIBS_DEVICE double log_of_1_plus(double x) { return log1p(x); }

// Writes what `joined` gave: thread t < 64 a row's, the next 64 a column's.
template <class T>
NIBS_DEVICE void store(const TileArgs& args, const Place& at, int field, T value) {
    const int t = threadIdx.x, bit = 1 << field;
    if (t < SQUARE) {
        if (!(args.row_fields & bit) || at.top + t >= args.rows) return;
        const i64 slot = __popc(args.row_fields & (bit - 1));
        static_cast<T*>(args.row_parts)[(slot * at.across + at.column_square) * args.rows + at.top + t] = value;
    } else if (t < 2 * SQUARE) {
        if (!(args.column_fields & bit) || at.left + t - SQUARE >= args.columns) return;
        const i64 slot = __popc(args.column_fields & (bit - 1)), down = (args.rows + SQUARE - 1) / SQUARE;
        static_cast<T*>(args.column_parts)[(slot * down + at.row_square) * args.columns + at.left + t - SQUARE] = value;
    }
}

// Joins `value(i, j)` over the chosen pairs of each row and column, and writes it.
template <class Join, class T, class Value>
NIBS_DEVICE void gather(const TileArgs& args, const Place& at, int field, unsigned rows, unsigned columns, Value value) {
    if (!((args.row_fields | args.column_fields) >> field & 1)) return;
    T mine[EACH], theirs[EACH];
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) mine[i] = theirs[i] = Join::template start<T>();
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            if (rows & Pairs::bit(i, j)) mine[i] = Join::join(mine[i], value(i, j));
            if (columns & Pairs::bit(i, j)) theirs[j] = Join::join(theirs[j], value(i, j));
        }
    store(args, at, field, joined<Join>(at, mine, theirs));
}

// Sums, counts and maxima of positives and of allowed pairs, as far as they are wanted.
template <class T>
NIBS_DEVICE void gather_pairs(const TileArgs& args, const Place& at, const Pairs& pairs, const T (&s)[EACH][EACH]) {
    const auto logit = [&](int i, int j) { return s[i][j]; };
    const auto one = [](int, int) { return T(1); };
    gather<Sum, T>(args, at, POSITIVE_SUM, pairs.positive, pairs.positive, logit);
    gather<Sum, T>(args, at, POSITIVE_COUNT, pairs.positive, pairs.positive, one);
    gather<Sum, T>(args, at, ALLOWED_SUM, pairs.by_row, pairs.by_column, logit);
    gather<Sum, T>(args, at, ALLOWED_COUNT, pairs.by_row, pairs.by_column, one);
    gather<Sum, T>(args, at, WEIGHT_SUM, 0, pairs.positive, [&](int i, int) {
        return static_cast<const T*>(args.anchor_weights)[at.top + at.y * EACH + i];
    });
    gather<Largest, T>(args, at, POSITIVE_MAX, pairs.positive, 0, logit);
    gather<Largest, T>(args, at, NEGATIVE_MAX, pairs.by_row & ~pairs.positive, 0, logit);
}

// Masses with each row's and each column's own maximum.
template <class T>
NIBS_DEVICE void own_masses(const TileArgs& args, const Place& at, const Pairs& pairs, const T (&s)[EACH][EACH]) {
    NIBS_SHARED(T, shifts, 2 * SQUARE);
    T mine[EACH], theirs[EACH];
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) mine[i] = theirs[i] = -range<T>::infinity();
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            if (pairs.by_row & Pairs::bit(i, j)) mine[i] = Largest::join(s[i][j], mine[i]);
            if (pairs.by_column & Pairs::bit(i, j)) theirs[j] = Largest::join(s[i][j], theirs[j]);
        }
    const T highest = joined<Largest>(at, mine, theirs);
    const bool empty = highest == -range<T>::infinity();
    if (threadIdx.x < 2 * SQUARE) shifts[threadIdx.x] = empty ? T(0) : highest;
    store(args, at, SHIFT, empty ? range<T>::lowest() : highest);
    __syncthreads();
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) mine[i] = theirs[i] = 0;
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            if ((args.row_fields >> MASS & 1) && (pairs.by_row & Pairs::bit(i, j)))
                mine[i] += exponential(s[i][j] - shifts[at.y * EACH + i]);
            if ((args.column_fields >> MASS & 1) && (pairs.by_column & Pairs::bit(i, j)))
                theirs[j] += exponential(s[i][j] - shifts[SQUARE + at.x * EACH + j]);
        }
    store(args, at, MASS, joined<Sum>(at, mine, theirs));
}

// Masses of both sides by one shift and one exponential, equation (1); false, for all threads, where that lost something.
template <class T>
NIBS_DEVICE bool shared_masses(const TileArgs& args, const Place& at, const Pairs& pairs, const T (&s)[EACH][EACH]) {
    T highest = -range<T>::infinity();
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++)
            if (pairs.by_row & Pairs::bit(i, j)) highest = Largest::join(s[i][j], highest);
    T shift = largest_of_all(highest);
    if (shift == -range<T>::infinity()) shift = 0;
    const T head = guard<T>::head(), lift = guard<T>::lift();
    T mine[EACH], theirs[EACH], some[EACH], any[EACH];
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) mine[i] = theirs[i] = some[i] = any[i] = 0;
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++)
            if (pairs.by_row & Pairs::bit(i, j)) {
                // e^(below + HEAD): below a half of it the sum is exact, above the product is as good.
                const T below = s[i][j] - shift;
                const bool near = below > -head / 2;
                const T e = exponential(near ? below : below + head) * (near ? lift : T(1));
                mine[i] += e;
                theirs[j] += e;
                some[i] = any[j] = 1;
            }
    const T mass = joined<Sum>(at, mine, theirs);
    const bool filled = joined<Largest>(at, some, any) > 0;  // whether the row, or column, has an allowed pair
    const bool lost = threadIdx.x < 2 * SQUARE && filled && !(mass >= guard<T>::low());
    if (__syncthreads_or(lost)) return false;
    store(args, at, MASS, mass / lift);
    store(args, at, SHIFT, filled ? shift : range<T>::lowest());
    return true;
}

template <class T>
NIBS_DEVICE void lse(const TileArgs& args) {
    const Place at = place_of(args);
    T s[EACH][EACH];
    products_of(args, at, s);
    const Pairs pairs = pairs_of(args, at, s);
    logits_of(args, s);
    gather_pairs(args, at, pairs, s);
    const bool both = (args.row_fields & args.column_fields) >> MASS & 1;
    if (both && !(args.flags & MARGIN) && shared_masses(args, at, pairs, s)) return;
    own_masses(args, at, pairs, s);
}

// Weights g_ij of equation (2), both directions summed.
template <class T>
NIBS_DEVICE void weights(const TileArgs& args) {
    const Place at = place_of(args);
    NIBS_SHARED(T, factor, 2 * SQUARE);
    NIBS_SHARED(T, shift, 2 * SQUARE);
    NIBS_SHARED(T, target, 2 * SQUARE);
    NIBS_SHARED(T, smooth, 2 * SQUARE);
    T s[EACH][EACH], product[EACH];
    products_of(args, at, s);
    const Pairs pairs = pairs_of(args, at, s);
    const int t = threadIdx.x;
    const T infinity = range<T>::infinity();
    T low = infinity, high = -infinity;  // of the shifts of anchors
    if (t < 2 * SQUARE) {
        const bool row = t < SQUARE;
        const i64 index = row ? at.top + t : at.left + t - SQUARE;
        const bool inside = index < (row ? args.rows : args.columns) && (row ? args.row_factor : args.column_factor);
        const auto read = [&](const void* rows, const void* columns, T other) {
            const T* values = static_cast<const T*>(row ? rows : columns);
            return inside && values ? values[index] : other;
        };
        factor[t] = read(args.row_factor, args.column_factor, T(0));
        shift[t] = read(args.row_shift, args.column_shift, infinity);
        target[t] = read(args.row_target, args.column_target, T(0));
        smooth[t] = read(args.row_smooth, args.column_smooth, T(0));
        if (shift[t] < infinity) low = high = shift[t];
    }
    low = -largest_of_all(-low);
    high = largest_of_all(high);
    const bool together = high - low <= guard<T>::spread();
    const T middle = low + (high - low) / 2;
    const T scale = *static_cast<const T*>(args.scale);
    if (together && t < 2 * SQUARE && shift[t] != infinity) factor[t] *= exponential(middle - shift[t]);
    __syncthreads();
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) {
        const int row = at.y * EACH + i;
        product[i] = 0;
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            const int column = SQUARE + at.x * EACH + j;
            const unsigned bit = Pairs::bit(i, j);
            const T raw = s[i][j], logit = times(raw, scale);
            T g = 0;
            if (together) {
                // A pair of two that are no anchors is bounded by nobody's lse: its exponential is not taken.
                const T f = (pairs.by_row & bit ? factor[row] : T(0)) + (pairs.by_column & bit ? factor[column] : T(0));
                if (f != 0) g = exponential(logit - middle) * f;
            } else {
                if ((pairs.by_row & bit) && factor[row] != 0) g += factor[row] * exponential(logit - shift[row]);
                if ((pairs.by_column & bit) && factor[column] != 0) g += factor[column] * exponential(logit - shift[column]);
            }
            if (pairs.by_row & bit) g -= smooth[row];
            if (pairs.by_column & bit) g -= smooth[column];
            if (pairs.positive & bit) g -= target[row] + target[column];
            product[i] += g * raw;
            s[i][j] = g;
        }
    }
    T* out = static_cast<T*>(args.weights);
    const i64 top = at.top + at.y * EACH, left = at.left + at.x * EACH;
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++)
            if (top + i < args.rows && left + j < args.columns) out[(top + i) * args.columns + left + j] = s[i][j];
    if (args.flags & PRODUCT_SUM) {
        const T sum = joined<Sum>(at, product, product);
        if (t < SQUARE && at.top + t < args.rows) static_cast<T*>(args.product_parts)[at.column_square * args.rows + at.top + t] = sum;
    }
}

// Loss and weights of equations (3) and (4) in one pass: the weights lack only their row's factor.
template <class T>
NIBS_DEVICE void sigmoid(const TileArgs& args) {
    const Place at = place_of(args);
    T s[EACH][EACH], mass[EACH], weight[EACH], product[EACH], raw[EACH][EACH];
    products_of(args, at, s);
    const Pairs pairs = pairs_of(args, at, s);
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) raw[i][j] = s[i][j];
    logits_of(args, s);
    if (args.flags & STATISTICS) gather_pairs(args, at, pairs, s);
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) {
        T e[EACH], linear = 0;
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            const unsigned bit = Pairs::bit(i, j);
            const T x = pairs.positive & bit ? -s[i][j] : s[i][j];  // -z s
            e[j] = pairs.by_row & bit ? exponential(x > 0 ? -x : x) : T(0);
            if ((pairs.by_row & bit) && !(x <= 0)) linear += x;
        }
        const T first = e[0] + e[1] + e[0] * e[1], second = e[2] + e[3] + e[2] * e[3];
        const T w = first + second + first * second;
        mass[i] = linear + log_of_1_plus(w);
        const T share = T(1) / (T(1) + w);
        const T left = share * (T(1) + second), right = share * (T(1) + first);  // 1 / (1 + first), 1 / (1 + second)
        const T inverse[EACH] = {left * (T(1) + e[1]), left * (T(1) + e[0]), right * (T(1) + e[3]), right * (T(1) + e[2])};
        weight[i] = product[i] = 0;
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            const unsigned bit = Pairs::bit(i, j);
            const bool flip = pairs.positive & bit;
            const T x = flip ? -s[i][j] : s[i][j];
            const T sigma = x >= 0 ? inverse[j] : e[j] * inverse[j];
            const T g = pairs.by_row & bit ? (flip ? -sigma : sigma) : T(0);
            weight[i] += g;
            if (pairs.by_row & bit) product[i] += g * raw[i][j];
            s[i][j] = g;
        }
    }
    const int t = threadIdx.x;
    if (args.flags & STATISTICS) store(args, at, MASS, joined<Sum>(at, mass, mass));
    if (!(args.flags & WEIGHTS)) return;
    T* out = static_cast<T*>(args.weights);
    const i64 top = at.top + at.y * EACH, left = at.left + at.x * EACH;
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++)
            if (top + i < args.rows && left + j < args.columns) out[(top + i) * args.columns + left + j] = s[i][j];
    const T sum = joined<Sum>(at, weight, weight);
    if (t < SQUARE && at.top + t < args.rows) static_cast<T*>(args.weight_parts)[at.column_square * args.rows + at.top + t] = sum;
    if (args.flags & PRODUCT_SUM) {
        const T total = joined<Sum>(at, product, product);
        if (t < SQUARE && at.top + t < args.rows) static_cast<T*>(args.product_parts)[at.column_square * args.rows + at.top + t] = total;
    }
}

// -- statistics to statistics -----------------------------------------------------------------------

// parts [fields, count, length] to out [fields, length], each in the order of the squares. `fields` says which they are.
struct FoldArgs {
    const void* parts;
    void* out;
    i64 count, length;
    int fields, unused;
};

template <class T>
NIBS_DEVICE void fold(const FoldArgs& args) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= args.length) return;
    const T* parts = static_cast<const T*>(args.parts);
    T* out = static_cast<T*>(args.out);
    T highest = range<T>::lowest();
    if (args.fields >> SHIFT & 1) {
        const T* shifts = parts + (args.fields & 1) * args.count * args.length;  // after the masses
        for (i64 k = 0; k < args.count; k++) highest = Largest::join(highest, shifts[k * args.length + at]);
    }
    i64 slot = 0;
    for (int field = 0; field < FIELDS; field++) {
        if (!(args.fields >> field & 1)) continue;
        const T* part = parts + slot * args.count * args.length + at;
        T found = field == POSITIVE_MAX || field == NEGATIVE_MAX ? -range<T>::infinity() : T(0);
        for (i64 k = 0; k < args.count; k++) {
            const T value = part[k * args.length];
            if (field == POSITIVE_MAX || field == NEGATIVE_MAX) found = Largest::join(found, value);
            else if (field == MASS && (args.fields >> SHIFT & 1)) found += value * exponential(part[(args.count + k) * args.length] - highest);
            else if (field != SHIFT) found += value;
        }
        out[slot * args.length + at] = field == SHIFT ? highest : found;
        slot++;
    }
}

// Merges `part` into `into`: sums added, maxima taken, masses rescaled to the larger shift. A null field is left out.
struct MergeArgs {
    void* into[FIELDS];
    const void* part[FIELDS];
    i64 length;
};

template <class T>
NIBS_DEVICE void merge(const MergeArgs& args) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= args.length) return;
    const auto into = [&](int field) -> T& { return static_cast<T*>(args.into[field])[at]; };
    const auto part = [&](int field) { return static_cast<const T*>(args.part[field])[at]; };
    if (args.into[SHIFT]) {
        const T mine = into(SHIFT), theirs = part(SHIFT), shift = Largest::join(mine, theirs);
        into(MASS) = into(MASS) * exponential(mine - shift) + part(MASS) * exponential(theirs - shift);
        into(SHIFT) = shift;
    } else if (args.into[MASS]) {
        into(MASS) += part(MASS);
    }
    for (int field = POSITIVE_SUM; field < POSITIVE_MAX; field++)
        if (args.into[field] && args.part[field]) into(field) += part(field);
    for (int field = POSITIVE_MAX; field < FIELDS; field++)
        if (args.into[field] && args.part[field]) into(field) = Largest::join(into(field), part(field));
}

// out[j] is the sum (or the largest) of the values that `order` lists from starts[j] to starts[j + 1], in that order.
struct ScatterArgs {
    const void* values;
    const i64* order;
    const i64* starts;  // [length + 1]
    void* out;
    i64 length;
    int largest, unused;
};

template <class T>
NIBS_DEVICE void scatter(const ScatterArgs& args) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= args.length) return;
    const T* values = static_cast<const T*>(args.values);
    T found = args.largest ? -range<T>::infinity() : T(0);
    for (i64 k = args.starts[at]; k < args.starts[at + 1]; k++) {
        const T value = values[args.order[k]];
        found = args.largest ? Largest::join(found, value) : found + value;
    }
    static_cast<T*>(args.out)[at] = found;
}

// out[i] is 0 for a row that is finite or absent, else NaN.
struct PoisonArgs {
    const void* values;  // [rows, width]
    const unsigned char* mask;  // [rows], or null
    void* out;
    i64 rows, width, row, step;  // strides, in elements
    int type, unused;
};

template <class T>
NIBS_DEVICE void poison(const PoisonArgs& args) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= args.rows) return;
    T found = 0;
    if (!args.mask || args.mask[at])
        for (i64 k = 0; k < args.width; k++) found += T(0) * load<T>(args.values, at * args.row + k * args.step, args.type);
    static_cast<T*>(args.out)[at] = found;
}

// -- plain twins ------------------------------------------------------------------------------------

// lse without squares, shared memory or a shared exponential: one thread a row, or a column. The tests hold both against the truth.
template <class T>
NIBS_DEVICE void plain_lse(const TileArgs& args) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= args.rows + args.columns) return;
    const bool row = at < args.rows;
    const i64 mine = row ? at : at - args.rows, others = row ? args.columns : args.rows;
    T shift = -range<T>::infinity(), mass = 0;
    for (i64 other = 0; other < others; other++) {
        const i64 i = row ? mine : other, j = row ? other : mine;
        T s = 0;
        for (i64 k = 0; k < args.width; k++) s += query_at<T>(args, i, k) * key_at<T>(args, j, k);
        s *= *static_cast<const T*>(args.scale);
        if (s > shift) {
            mass = mass * exponential(shift - s) + T(1);
            shift = s;
        } else {
            mass += exponential(s - shift);
        }
    }
    T* out = static_cast<T*>(row ? args.row_parts : args.column_parts);
    const i64 length = row ? args.rows : args.columns;
    out[mine] = mass;
    out[length + mine] = shift;
}

// weights, one thread a pair, two exponentials.
template <class T>
NIBS_DEVICE void plain_weights(const TileArgs& args) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= args.rows * args.columns) return;
    const i64 i = at / args.columns, j = at % args.columns;
    T s = 0;
    for (i64 k = 0; k < args.width; k++) s += query_at<T>(args, i, k) * key_at<T>(args, j, k);
    s *= *static_cast<const T*>(args.scale);
    const bool designated = designated_of(args, i) == j;
    const auto side = [&](const void* factor, const void* shift, const void* target, i64 where) {
        const T share = static_cast<const T*>(factor)[where] * exponential(s - static_cast<const T*>(shift)[where]);
        return share - (designated ? static_cast<const T*>(target)[where] : T(0));
    };
    static_cast<T*>(args.weights)[at] = side(args.row_factor, args.row_shift, args.row_target, i) +
                                        side(args.column_factor, args.column_shift, args.column_target, j);
}

}  // namespace nibs

NIBS_KERNEL(nibs_lse_float32, nibs::TileArgs, nibs::BOUND) { nibs::lse<float>(args); }
NIBS_KERNEL(nibs_lse_float64, nibs::TileArgs, nibs::BOUND) { nibs::lse<double>(args); }
NIBS_KERNEL(nibs_weights_float32, nibs::TileArgs, nibs::BOUND) { nibs::weights<float>(args); }
NIBS_KERNEL(nibs_weights_float64, nibs::TileArgs, nibs::BOUND) { nibs::weights<double>(args); }
NIBS_KERNEL(nibs_sigmoid_float32, nibs::TileArgs, nibs::BOUND) { nibs::sigmoid<float>(args); }
NIBS_KERNEL(nibs_sigmoid_float64, nibs::TileArgs, nibs::BOUND) { nibs::sigmoid<double>(args); }
NIBS_KERNEL(nibs_fold_float32, nibs::FoldArgs, 128) { nibs::fold<float>(args); }
NIBS_KERNEL(nibs_fold_float64, nibs::FoldArgs, 128) { nibs::fold<double>(args); }
NIBS_KERNEL(nibs_merge_float32, nibs::MergeArgs, 128) { nibs::merge<float>(args); }
NIBS_KERNEL(nibs_merge_float64, nibs::MergeArgs, 128) { nibs::merge<double>(args); }
NIBS_KERNEL(nibs_scatter_float32, nibs::ScatterArgs, 128) { nibs::scatter<float>(args); }
NIBS_KERNEL(nibs_scatter_float64, nibs::ScatterArgs, 128) { nibs::scatter<double>(args); }
NIBS_KERNEL(nibs_poison_float32, nibs::PoisonArgs, 128) { nibs::poison<float>(args); }
NIBS_KERNEL(nibs_poison_float64, nibs::PoisonArgs, 128) { nibs::poison<double>(args); }
NIBS_KERNEL(nibs_plain_lse_float32, nibs::TileArgs, 512) { nibs::plain_lse<float>(args); }
NIBS_KERNEL(nibs_plain_lse_float64, nibs::TileArgs, 512) { nibs::plain_lse<double>(args); }
NIBS_KERNEL(nibs_plain_weights_float32, nibs::TileArgs, 128) { nibs::plain_weights<float>(args); }
NIBS_KERNEL(nibs_plain_weights_float64, nibs::TileArgs, 128) { nibs::plain_weights<double>(args); }
