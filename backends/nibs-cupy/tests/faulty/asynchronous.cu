// Small pipelines of asynchronous instructions, each right with `fault` 0 and wrong in one way with any other: what the
// twins in nibs_cupy/host/asynchronous.hpp must see. They compile for a GPU too, and are never run on one.
#include "asynchronous.cuh"

using namespace nibs;

enum Fault {
    NONE,
    // products
    SUMS_READ_EARLY,
    STAGE_FREED_EARLY,
    FULL_PARITY,
    EMPTY_PARITY,
    TOO_FEW_BYTES,
    TOO_MANY_BYTES,
    TOO_MANY_ARRIVALS,
    NO_GROUP_FENCE,
    NO_SIGNALS_READY,
    WRONG_SWIZZLE,
    WRONG_STRIDE,
    NOT_WAITED_FOR,
    SIGNAL_OVERWRITTEN,
    TOO_MANY_REGISTERS,
    // shown
    NO_SHOW,
    // copies
    NO_WAIT,
    NO_COMMIT,
    NO_BARRIER,
    MISALIGNED,
};

struct FaultArgs {
    const u8* a;
    const u8* b;
    float* out;
    i64 slabs, fault;
};

// out [128 threads, 128] = a b^T over all slabs: a is packed to 128 rows of which 64 count, b to 256. A warpgroup
// copies into two stages, a warpgroup multiplies, and a third only holds registers.
NIBS_KERNEL(faulty_products, FaultArgs, 384) {
    constexpr int PANEL = 16384, STAGE = 3 * PANEL, STAGES = 2;
    NIBS_SHARED_DYNAMIC(u8, shared);
    Signal *full = reinterpret_cast<Signal*>(shared + STAGES * STAGE), *empty = full + STAGES;
    const i64 fault = args.fault;
    if (threadIdx.x == 0) {
        for (int k = 0; k < STAGES; k++) {
            signal_init(&full[k], 1);
            signal_init(&empty[k], 1);
        }
        if (fault != NO_SIGNALS_READY) signals_ready();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        registers_give<40>();
        if (threadIdx.x) return;
        for (i64 k = 0; k < args.slabs; k++) {
            const int stage = (int)(k % STAGES);
            u8* to = shared + stage * STAGE;
            signal_wait(&empty[stage], (u32)(k / STAGES & 1) ^ (fault == EMPTY_PARITY ? 0 : 1));
            signal_expect(&full[stage], fault == TOO_FEW_BYTES ? STAGE - 16 : fault == TOO_MANY_BYTES ? STAGE + 16 : STAGE);
            copy_bulk(to, args.a + k * PANEL, PANEL, &full[stage]);
            copy_bulk(to + PANEL, args.b + k * PANEL, PANEL, &full[stage]);
            copy_bulk(to + 2 * PANEL, args.b + (args.slabs + k) * PANEL, PANEL, &full[stage]);
            if (fault == TOO_MANY_ARRIVALS) signal_arrive(&full[stage]);
        }
        return;
    }
    if (fault == TOO_MANY_REGISTERS) registers_take<240>();
    else registers_take<232>();
    if (threadIdx.x >= 256) return;
    const int thread = threadIdx.x - 128;
    float c[128];
    NIBS_UNROLL
    for (int i = 0; i < 128; i++) c[i] = 0.0f;
    for (i64 k = 0; k < args.slabs; k++) {
        const int stage = (int)(k % STAGES);
        const u8* panels = shared + stage * STAGE;
        signal_wait(&full[stage], (u32)(k / STAGES & 1) ^ (fault == FULL_PARITY ? 1 : 0));
        u64 a = panel_descriptor(panels), b = panel_descriptor(panels + PANEL);
        if (fault == WRONG_SWIZZLE) b = (b & ~((u64)3 << 62)) | (u64)2 << 62;  // 64 bytes wide
        if (fault == WRONG_STRIDE) b -= (u64)1 << 32;
        if (fault != NO_GROUP_FENCE) group_fence(c);
        NIBS_UNROLL
        for (int step = 0; step < 4; step++) multiply_group(Bfloat16(), c, a + 2 * step, b + 2 * step);
        group_commit();
        if (fault == STAGE_FREED_EARLY && thread == 0) signal_arrive(&empty[stage]);
        if (fault == SIGNAL_OVERWRITTEN && thread == 0) reinterpret_cast<u64*>(empty)[1] = 0;
        if (fault == SUMS_READ_EARLY && k + 1 == args.slabs) {
            NIBS_UNROLL
            for (int i = 0; i < 128; i++) args.out[thread * 128 + i] = c[i];
        }
        if (fault != NOT_WAITED_FOR) group_wait<0>(c);
        if (fault != STAGE_FREED_EARLY && thread == 0) signal_arrive(&empty[stage]);
    }
    if (fault != SUMS_READ_EARLY) {
        NIBS_UNROLL
        for (int i = 0; i < 128; i++) args.out[thread * 128 + i] = c[i];
    }
}

// The same product for one slab, whose panels are written by ordinary stores.
NIBS_KERNEL(faulty_shown, FaultArgs, 128) {
    NIBS_SHARED_DYNAMIC(u8, shared);
    const int thread = threadIdx.x;
    for (int at = thread * 4; at < 16384; at += 512) *(u32*)(shared + at) = *(const u32*)(args.a + at);
    for (int at = thread * 4; at < 32768; at += 512) *(u32*)(shared + 16384 + at) = *(const u32*)(args.b + at);
    if (args.fault != NO_SHOW) show_async();
    __syncthreads();
    float c[128];
    NIBS_UNROLL
    for (int i = 0; i < 128; i++) c[i] = 0.0f;
    group_fence(c);
    NIBS_UNROLL
    for (int step = 0; step < 4; step++)
        multiply_group(Bfloat16(), c, panel_descriptor(shared) + 2 * step, panel_descriptor(shared + 16384) + 2 * step);
    group_commit();
    group_wait<0>(c);
    NIBS_UNROLL
    for (int i = 0; i < 128; i++) args.out[thread * 128 + i] = c[i];
}

// out [slabs, 64]: each slab's 64 numbers reversed, through two stages of cp.async.
NIBS_KERNEL(faulty_copies, FaultArgs, 64) {
    NIBS_SHARED_DYNAMIC(float, shared);
    const int thread = threadIdx.x;
    const i64 fault = args.fault;
    const auto fetch = [&](i64 slab) {
        if (slab < args.slabs && thread < 16) copy_async(shared + slab % 2 * 64 + thread * 4 + (fault == MISALIGNED), args.a + slab * 256 + thread * 16);
        if (fault != NO_COMMIT) copies_commit();
    };
    fetch(0);
    for (i64 k = 0; k < args.slabs; k++) {
        fetch(k + 1);
        if (fault != NO_WAIT) copies_wait<1>();
        if (fault != NO_BARRIER) __syncthreads();
        args.out[k * 64 + thread] = shared[k % 2 * 64 + 63 - thread];
        __syncthreads();
    }
    if (fault != NO_WAIT) copies_wait<0>();
}
