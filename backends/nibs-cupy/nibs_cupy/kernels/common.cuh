// What the general kernels share: the arguments of a tile, its logits, its pairs, and sums over it.
//
// A thread block of 16 x 16 threads holds a square of 64 x 64 logits of the tile in registers, 4 x 4 to a thread:
//
//     thread (y, x)     rows 4y .. 4y + 3, columns 4x .. 4x + 3 of the square
//     square            rows top .. top + 63, columns left .. left + 63 of the tile [rows, columns]
//
// Rows and columns beyond the tile are computed (from zeros) and left out wherever something is summed or stored.
// Every sum runs in a fixed order, so that equal inputs give equal bits; there is no atomic operation.
//
// Symbols are those of nibs/spec.py; what the statistics are is in nibs/verbs.py.

#pragma once

#include "device.cuh"

namespace nibs {

constexpr int SIDE = 16;                // threads along each side
constexpr int EACH = 4;                 // rows, and columns, of a thread
constexpr int SQUARE = SIDE * EACH;     // rows, and columns, of a thread block
constexpr int THREADS = SIDE * SIDE;
constexpr int BOUND = 448;              // told that there are 256 threads, the compiler aims at 64 registers and spills
constexpr int STEP = 16;                // of the width, taken into shared memory at a time
constexpr int PITCH = SQUARE + 4;       // so that rows of shared memory begin in different banks

// Bits of `flags`.
constexpr int MULTI = 1;          // pairs of equal id are positives
constexpr int EXCLUDE = 2;        // pairs of equal id that are not designated leave
constexpr int SELF = 4;           // pairs of one row with itself leave
constexpr int MARGIN = 8;         // negatives beyond a limit leave, by row and by column
constexpr int KEPT = 16;          // `products` is given; else it is computed
constexpr int KEEP = 32;          // `products` is to be written
constexpr int PRODUCT_SUM = 64;   // row sums of weight times product are wanted
constexpr int STATISTICS = 128;   // of Sigmoid: the sums of the loss
constexpr int WEIGHTS = 256;      // of Sigmoid: the weights

constexpr int DIAGONAL = 512;     // row i's designated positive is key i of the shards

// What rows are stored as; half precision becomes an exact number of T.
enum Type { FLOAT64, FLOAT32, BFLOAT16, FLOAT16 };

template <class T>
NIBS_DEVICE T load(const void* from, i64 at, int type) {
    if (type == FLOAT32) return T(static_cast<const float*>(from)[at]);
    if (type == BFLOAT16) return T(from_bfloat16(static_cast<const bits16*>(from)[at]));
    if (type == FLOAT16) return T(from_float16(static_cast<const bits16*>(from)[at]));
    return T(static_cast<const double*>(from)[at]);
}

// Fields of statistics, in the order of nibs.verbs.Lse; `row_fields` has bit 1 << field where one is wanted.
enum Field { MASS, SHIFT, POSITIVE_SUM, POSITIVE_COUNT, ALLOWED_SUM, ALLOWED_COUNT, WEIGHT_SUM, POSITIVE_MAX, NEGATIVE_MAX, FIELDS };

// The arguments of every kernel on a tile. ../tiles.py has the same, field by field. T is the accumulation dtype.
struct TileArgs {
    i64 rows, columns, width;
    i64 row, column;            // where the tile begins in its shards
    const void* queries;        // [rows, width] in the dtype they came in, of any stride
    const void* keys;           // [columns, width]
    i64 query_row, query_step;  // strides, in elements
    i64 key_row, key_step;
    const void* scale;          // one T
    const void* bias;           // one T, or null
    const i64* target;          // [rows]: the key of the shard that is row's designated positive, or -1; or null
    const void* exact;          // [rows] T: the designated pair's product, or null
    const i64* query_ids;       // [rows]
    const i64* key_ids;         // [columns]
    const unsigned char* query_mask;  // [rows], or null
    const unsigned char* key_mask;    // [columns], or null
    const void* query_limit;    // [rows] T
    const void* key_limit;      // [columns] T
    const void* anchor_weights; // [rows] T, or null
    const void *row_factor, *row_shift, *row_target, *row_smooth;              // [rows] T, or null
    const void *column_factor, *column_shift, *column_target, *column_smooth;  // [columns] T, or null
    void* products;             // [rows, columns] T
    void* weights;              // [rows, columns] T
    void* row_parts;            // [fields, squares along a row, rows] T
    void* column_parts;         // [fields, squares along a column, columns] T
    void* product_parts;        // [squares along a row, rows] T
    void* weight_parts;         // [squares along a row, rows] T
    int row_fields, column_fields;
    int query_type, key_type;   // a Type each
    int flags, unused;
};

// Where this thread block and this thread stand.
struct Place {
    i64 top, left;  // of the square
    i64 across;     // squares along a row
    i64 row_square, column_square;
    int x, y;
};

NIBS_DEVICE Place place_of(const TileArgs& args) {
    Place at;
    at.across = (args.columns + SQUARE - 1) / SQUARE;
    at.row_square = blockIdx.x / at.across;
    at.column_square = blockIdx.x % at.across;
    at.top = at.row_square * SQUARE;
    at.left = at.column_square * SQUARE;
    at.x = threadIdx.x % SIDE;
    at.y = threadIdx.x / SIDE;
    return at;
}

// An element of the rows; zero beyond the tile, and where a row is absent: what that holds is never read.
template <class T>
NIBS_DEVICE T query_at(const TileArgs& args, i64 row, i64 k) {
    if (row >= args.rows || (args.query_mask && !args.query_mask[row])) return T(0);
    return load<T>(args.queries, row * args.query_row + k * args.query_step, args.query_type);
}

template <class T>
NIBS_DEVICE T key_at(const TileArgs& args, i64 column, i64 k) {
    if (column >= args.columns || (args.key_mask && !args.key_mask[column])) return T(0);
    return load<T>(args.keys, column * args.key_row + k * args.key_step, args.key_type);
}

// The tile's column that is row's designated positive; any other number where it has none here.
NIBS_DEVICE i64 designated_of(const TileArgs& args, i64 row) {
    if (args.flags & DIAGONAL) return row + args.row - args.column;
    if (!args.target) return -1;
    return args.target[row] < 0 ? -1 : args.target[row] - args.column;
}

// Products of the square: acc[i][j] = <query, key>, or as they were kept.
template <class T>
NIBS_DEVICE void products_of(const TileArgs& args, const Place& at, T (&acc)[EACH][EACH]) {
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) acc[i][j] = 0;
    const i64 row = at.top + at.y * EACH, column = at.left + at.x * EACH;
    if (args.flags & KEPT) {
        const T* kept = static_cast<const T*>(args.products);
        NIBS_UNROLL
        for (int i = 0; i < EACH; i++)
            NIBS_UNROLL
            for (int j = 0; j < EACH; j++)
                if (row + i < args.rows && column + j < args.columns) acc[i][j] = kept[(row + i) * args.columns + column + j];
        return;
    }
    NIBS_SHARED_2D(T, queries, STEP, PITCH);
    NIBS_SHARED_2D(T, keys, STEP, PITCH);
    for (i64 begin = 0; begin < args.width; begin += STEP) {
        for (int e = threadIdx.x; e < SQUARE * STEP; e += THREADS) {
            const int r = e / STEP, k = e % STEP;
            const bool inside = begin + k < args.width;
            queries[k][r] = inside ? query_at<T>(args, at.top + r, begin + k) : T(0);
            keys[k][r] = inside ? key_at<T>(args, at.left + r, begin + k) : T(0);
        }
        __syncthreads();
        const int depth = args.width - begin < STEP ? int(args.width - begin) : STEP;
        for (int k = 0; k < depth; k++) {
            const T* a = queries[k] + at.y * EACH;
            const T* b = keys[k] + at.x * EACH;
            NIBS_UNROLL
            for (int i = 0; i < EACH; i++)
                NIBS_UNROLL
                for (int j = 0; j < EACH; j++) acc[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
    if (args.exact)
        NIBS_UNROLL
        for (int i = 0; i < EACH; i++) {
            const i64 found = row + i < args.rows ? designated_of(args, row + i) - column : -1;
            NIBS_UNROLL
            for (int j = 0; j < EACH; j++)
                if (found == j) acc[i][j] = static_cast<const T*>(args.exact)[row + i];
        }
    if (args.flags & KEEP) {
        T* kept = static_cast<T*>(args.products);
        NIBS_UNROLL
        for (int i = 0; i < EACH; i++)
            NIBS_UNROLL
            for (int j = 0; j < EACH; j++)
                if (row + i < args.rows && column + j < args.columns) kept[(row + i) * args.columns + column + j] = acc[i][j];
    }
}

// A thread's 16 pairs, a bit each: bit EACH * i + j is row i, column j of the thread.
struct Pairs {
    unsigned by_row;      // allowed, for the row's sum
    unsigned by_column;   // allowed, for the column's
    unsigned positive;
    unsigned designated;

    static NIBS_DEVICE unsigned bit(int i, int j) { return 1u << (EACH * i + j); }
};

template <class T>
NIBS_DEVICE Pairs pairs_of(const TileArgs& args, const Place& at, const T (&products)[EACH][EACH]) {
    Pairs pairs = {0, 0, 0, 0};
    const bool by_ids = args.flags & (MULTI | EXCLUDE);
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) {
        const i64 row = at.top + at.y * EACH + i;
        if (row >= args.rows) continue;
        const bool present = !args.query_mask || args.query_mask[row];
        const i64 target = designated_of(args, row);
        const i64 id = by_ids ? args.query_ids[row] : 0;
        const T query_limit = args.flags & MARGIN ? static_cast<const T*>(args.query_limit)[row] : T(0);
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            const i64 column = at.left + at.x * EACH + j;
            if (column >= args.columns) continue;
            const unsigned bit = Pairs::bit(i, j);
            const bool designated = target == column;
            const bool equal = by_ids && id == args.key_ids[column];
            bool allowed = present && (!args.key_mask || args.key_mask[column]);
            if ((args.flags & EXCLUDE) && equal && !designated) allowed = false;
            if ((args.flags & SELF) && row + args.row == column + args.column) allowed = false;
            bool by_row = allowed, by_column = allowed;
            if ((args.flags & MARGIN) && !designated) {
                // A NaN exceeds nothing, so that it stays and shows.
                by_row = by_row && !(products[i][j] > query_limit);
                by_column = by_column && !(products[i][j] > static_cast<const T*>(args.key_limit)[column]);
            }
            if (designated) pairs.designated |= bit;
            if (args.flags & MULTI ? (designated || equal) && allowed : designated) pairs.positive |= bit;
            if (by_row) pairs.by_row |= bit;
            if (by_column) pairs.by_column |= bit;
        }
    }
    return pairs;
}

// Products to logits, in place.
template <class T>
NIBS_DEVICE void logits_of(const TileArgs& args, T (&values)[EACH][EACH]) {
    const T scale = *static_cast<const T*>(args.scale);
    const T bias = args.bias ? *static_cast<const T*>(args.bias) : T(0);
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++)
        NIBS_UNROLL
        for (int j = 0; j < EACH; j++) {
            values[i][j] = times(values[i][j], scale);
            if (args.bias) values[i][j] += bias;
        }
}

struct Sum {
    template <class T>
    static NIBS_DEVICE T start() { return T(0); }
    template <class T>
    static NIBS_DEVICE T join(T a, T b) { return a + b; }
};

struct Largest {
    template <class T>
    static NIBS_DEVICE T start() { return -range<T>::infinity(); }
    template <class T>
    static NIBS_DEVICE T join(T a, T b) { return a > b ? a : b; }
};

// Scratch for sums over the square, the same for all of them: [2, SIDE, SQUARE].
template <class T>
NIBS_DEVICE T* scratch() {
    NIBS_SHARED(T, sums, 2 * SIDE * SQUARE);
    return sums;
}

// Joins what the 16 threads of each row hold for it (`mine[i]`), and the 16 of each column (`theirs[j]`).
// Thread t < 64 returns row t's, thread 64 <= t < 128 column t - 64's; the others nothing.
template <class Join, class T>
NIBS_DEVICE T joined(const Place& at, const T (&mine)[EACH], const T (&theirs)[EACH]) {
    T* rows = scratch<T>();
    T* columns = rows + SIDE * SQUARE;
    NIBS_UNROLL
    for (int i = 0; i < EACH; i++) {
        rows[at.x * SQUARE + at.y * EACH + i] = mine[i];
        columns[at.y * SQUARE + at.x * EACH + i] = theirs[i];
    }
    __syncthreads();
    T found = Join::template start<T>();
    const int t = threadIdx.x;
    if (t < 2 * SQUARE) {
        const T* of = t < SQUARE ? rows + t : columns + t - SQUARE;
        for (int k = 0; k < SIDE; k++) found = Join::join(found, of[k * SQUARE]);
    }
    __syncthreads();
    return found;
}

// The largest of what all threads hold, for everybody.
template <class T>
NIBS_DEVICE T largest_of_all(T mine) {
    T* all = scratch<T>();
    T* some = all + THREADS;
    all[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x < SIDE) {
        T found = all[threadIdx.x];
        for (int k = 1; k < SIDE; k++) found = Largest::join(found, all[k * SIDE + threadIdx.x]);
        some[threadIdx.x] = found;
    }
    __syncthreads();
    T found = some[0];
    for (int k = 1; k < SIDE; k++) found = Largest::join(found, some[k]);
    __syncthreads();
    return found;
}

}  // namespace nibs
