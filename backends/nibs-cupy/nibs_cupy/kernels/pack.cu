// Rows of any shape and stride into the panels that the fast kernels read: once a call and side.
//
//     in      [rows, dim], elements of 2 or 4 bytes, any strides; mask [rows] or null, 0 is absent
//     out     [row groups][slabs][128 rows][128 bytes]: a slab is 64 elements of 2 bytes or 32 of 4; the 16-byte
//             chunk c of row r lies at c ^ (r % 8), which is the 128-byte swizzle of wgmma and keeps ldmatrix free of
//             bank conflicts. Beyond the rows, beyond dim, and in absent rows: zeros
//
// So everything ragged ends here: the kernels that follow ask for no bounds and copy whole panels. An absent row's
// content is never read, so a NaN in it goes no further.
//
//     nibs_pack_2         16-bit elements as they are
//     nibs_pack_4         32-bit elements as they are; the kernels split them
//
// One thread a chunk. Bytes: read rows * dim elements, written as many, rounded up.
// The plain twin is `plain_pack` in ../plain.py.
#include "device.cuh"

namespace nibs {

struct PackArgs {
    const void* source;
    const unsigned char* mask;
    void* out;
    i64 rows, dim, row_stride, column_stride;  // strides in elements
    i64 slabs, padded_rows;
};

struct Chunk {
    unsigned words[4];
};

// Eight neighbours of two bytes to a chunk, or four of four.
template <class Element>
NIBS_DEVICE void pack(const PackArgs& args) {
    constexpr int EACH = 16 / sizeof(Element);
    const i64 chunk = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= args.padded_rows * args.slabs * 8) return;
    const i64 row = chunk / (args.slabs * 8), within = chunk % (args.slabs * 8), slab = within / 8;
    const bool here = row < args.rows && (!args.mask || args.mask[row]);
    const Element* from = (const Element*)args.source + (here ? row * args.row_stride : 0);
    Chunk made = {{0, 0, 0, 0}};
    NIBS_UNROLL
    for (int k = 0; k < EACH; k++) {
        const i64 column = within * EACH + k;
        const unsigned bits = here && column < args.dim ? from[column * args.column_stride] : 0;
        if (sizeof(Element) == 2) made.words[k / 2] |= bits << 16 * (k & 1);
        else made.words[k & 3] = bits;
    }
    const i64 place = ((row / 128 * args.slabs + slab) * 128 + row % 128) * 8 + ((within ^ row) & 7);
    ((Chunk*)args.out)[place] = made;
}

}  // namespace nibs

using namespace nibs;

NIBS_KERNEL(nibs_pack_2, PackArgs, 256) { pack<unsigned short>(args); }
NIBS_KERNEL(nibs_pack_4, PackArgs, 256) { pack<unsigned>(args); }
