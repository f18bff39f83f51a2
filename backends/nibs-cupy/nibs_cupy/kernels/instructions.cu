// One kernel for each instruction of asynchronous.cuh, so that a GPU and the host twin can be held to each other.
//
//     nibs_try_multiply_FORMAT         mma.sync        one warp: c [32, 4] += a [32, 4] words times b [32, 2] words, by lane
//     nibs_try_fragments               ldmatrix        one warp: 1,024 bytes in shared memory, 32 row offsets -> [32, 4] words
//     nibs_try_group_FORMAT            wgmma           a warpgroup: panels of 64 and of 256 rows -> sums [128, 128], by thread
//     nibs_try_exp2, _round, _pack_... ex2, cvt        one number (or two) a thread
//
// Inputs, bits and outputs that a GPU gave are kept in vectors/, and tests replay them on the host.
#include "asynchronous.cuh"

namespace nibs {

struct TryArgs {
    const void* a;
    const void* b;
    void* out;
    i64 count;
};

template <class Format>
NIBS_DEVICE void try_multiply(const TryArgs& args) {
    const int lane = threadIdx.x;
    u32 a[4], b[2];
    float c[4];
    for (int k = 0; k < 4; k++) {
        a[k] = ((const u32*)args.a)[lane * 4 + k];
        c[k] = ((float*)args.out)[lane * 4 + k];
    }
    for (int k = 0; k < 2; k++) b[k] = ((const u32*)args.b)[lane * 2 + k];
    multiply(Format(), c, a, b);
    for (int k = 0; k < 4; k++) ((float*)args.out)[lane * 4 + k] = c[k];
}

// a: 128 x 128 bytes, of which 64 rows count, b: 256 x 128 bytes, both packed: 128 bytes of each in four steps.
template <class Format>
NIBS_DEVICE void try_group(const TryArgs& args, u8* shared) {
#if NIBS_HOST || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    Signal* signal = reinterpret_cast<Signal*>(shared + 3 * 16384);
    if (threadIdx.x == 0) {
        signal_init(signal, 1);
        signals_ready();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        signal_expect(signal, 3 * 16384);
        copy_bulk(shared, args.a, 16384, signal);
        copy_bulk(shared + 16384, args.b, 2 * 16384, signal);
    }
    signal_wait(signal, 0);
    float c[128];
    NIBS_UNROLL
    for (int i = 0; i < 128; i++) c[i] = 0.0f;
    const u64 a = panel_descriptor(shared), b = panel_descriptor(shared + 16384);
    group_fence(c);
    NIBS_UNROLL
    for (int step = 0; step < 4; step++) multiply_group(Format(), c, a + 2 * step, b + 2 * step);
    group_commit();
    group_wait<0>(c);
    NIBS_UNROLL
    for (int i = 0; i < 128; i++) ((float*)args.out)[threadIdx.x * 128 + i] = c[i];
#endif
}

}  // namespace nibs

using namespace nibs;

NIBS_KERNEL(nibs_try_multiply_bfloat16, TryArgs, 32) { try_multiply<Bfloat16>(args); }
NIBS_KERNEL(nibs_try_multiply_float16, TryArgs, 32) { try_multiply<Float16>(args); }
NIBS_KERNEL(nibs_try_multiply_tf32, TryArgs, 32) { try_multiply<Tf32>(args); }

NIBS_KERNEL(nibs_try_fragments, TryArgs, 32) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    const int lane = threadIdx.x;
    for (int k = 0; k < 8; k++) ((u32*)shared)[lane * 8 + k] = ((const u32*)args.a)[lane * 8 + k];
    __syncwarp();
    u32 r[4];
    load_fragments(r, shared + ((const int*)args.b)[lane]);
    for (int k = 0; k < 4; k++) ((u32*)args.out)[lane * 4 + k] = r[k];
}

#if NIBS_HOST || __CUDA_ARCH__ == 900
NIBS_KERNEL(nibs_try_group_bfloat16, TryArgs, 128) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    try_group<Bfloat16>(args, shared);
}
NIBS_KERNEL(nibs_try_group_float16, TryArgs, 128) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    try_group<Float16>(args, shared);
}
NIBS_KERNEL(nibs_try_group_tf32, TryArgs, 128) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    try_group<Tf32>(args, shared);
}
#endif

NIBS_KERNEL(nibs_try_exp2, TryArgs, 256) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.count) ((float*)args.out)[i] = exp2_fast(((const float*)args.a)[i]);
}
NIBS_KERNEL(nibs_try_round_tf32, TryArgs, 256) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.count) ((u32*)args.out)[i] = round_tf32(((const u32*)args.a)[i]);
}
NIBS_KERNEL(nibs_try_pack_bfloat16, TryArgs, 256) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.count) ((u32*)args.out)[i] = pack_pair(Bfloat16(), ((const float*)args.a)[i], ((const float*)args.b)[i]);
}
NIBS_KERNEL(nibs_try_pack_float16, TryArgs, 256) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < args.count) ((u32*)args.out)[i] = pack_pair(Float16(), ((const float*)args.a)[i], ((const float*)args.b)[i]);
}
