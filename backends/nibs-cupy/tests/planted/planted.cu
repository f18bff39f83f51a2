// Kernels with one fault each, planted for the host runner to find, and their faultless twins.

#include "device.cuh"

struct Args {
    float* out;
    nibs::i64 count;
};

// Each thread reads what its neighbour wrote.
NIBS_KERNEL(neighbour, Args, 64) {
    NIBS_SHARED(float, values, 64);
    const int t = threadIdx.x;
    values[t] = float(t);
    __syncthreads();
    args.out[t] = values[(t + 1) % 64];
}

NIBS_KERNEL(neighbour_without_a_barrier, Args, 64) {
    NIBS_SHARED(float, values, 64);
    const int t = threadIdx.x;
    values[t] = float(t);
    args.out[t] = values[(t + 1) % 64];
    __syncthreads();
}

// Two rounds through one array: the second barrier keeps a fast warp from writing what a slow one has yet to read.
NIBS_KERNEL(two_rounds_and_one_barrier, Args, 64) {
    NIBS_SHARED(float, values, 64);
    const int t = threadIdx.x;
    float sum = 0;
    for (int round = 0; round < 2; round++) {
        values[t] = float(t + 100 * round);
        __syncthreads();
        sum += values[63 - t];
    }
    args.out[t] = sum;
}

NIBS_KERNEL(unwritten, Args, 64) {
    NIBS_SHARED(float, values, 64);
    if (threadIdx.x < 63) values[threadIdx.x] = 1;
    __syncthreads();
    args.out[threadIdx.x] = values[threadIdx.x];
}

NIBS_KERNEL(overrun, Args, 64) {
    NIBS_SHARED(float, before, 16);
    NIBS_SHARED(float, values, 64);
    NIBS_SHARED(float, after, 16);
    const int t = threadIdx.x;
    values[t + (int)args.count] = float(t);  // count = 1 writes values[64]
    before[t % 16] = after[t % 16] = 0;
    __syncthreads();
    args.out[t] = values[t] + before[0] + after[0];
}

NIBS_KERNEL(dynamic_overrun, Args, 64) {
    NIBS_SHARED_DYNAMIC(float, values);
    values[threadIdx.x + args.count] = 1;
    __syncthreads();
    args.out[threadIdx.x] = values[threadIdx.x];
}

NIBS_KERNEL(write_beyond, Args, 64) { args.out[threadIdx.x + args.count] = 1; }

NIBS_KERNEL(read_shared_beyond, Args, 64) {
    NIBS_SHARED(float, values, 64);
    values[threadIdx.x] = 1;
    __syncthreads();
    args.out[threadIdx.x] = values[threadIdx.x + args.count];
}

NIBS_KERNEL(some_return_early, Args, 64) {
    if (threadIdx.x >= args.count) return;
    __syncthreads();
    args.out[threadIdx.x] = 1;
}

NIBS_KERNEL(two_barriers, Args, 64) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    args.out[threadIdx.x] = 1;
}

NIBS_KERNEL(barrier_and_shuffle, Args, 64) {
    float value = 1;
    if (threadIdx.x < 7) __syncthreads();
    else value = __shfl_xor_sync(0xffffffffu, value, 1);
    args.out[threadIdx.x] = value;
}

NIBS_KERNEL(wrong_mask, Args, 64) {
    args.out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0);
}

NIBS_KERNEL(too_much_shared, Args, 64) {
    NIBS_SHARED(float, values, 16384);
    values[threadIdx.x] = 1;
    args.out[threadIdx.x] = values[threadIdx.x];
}

NIBS_KERNEL(tries_for_ever, Args, 64) {
#if NIBS_HOST
    while (args.count) nibs_host::pause();
#endif
}

// What works ------------------------------------------------------------------------------------------

NIBS_KERNEL(shuffles, Args, 64) {
    const int t = threadIdx.x;
    const float value = float(t);
    float* out = args.out + t * 8;
    out[0] = __shfl_sync(0xffffffffu, value, 5);
    out[1] = __shfl_xor_sync(0xffffffffu, value, 6);
    out[2] = __shfl_up_sync(0xffffffffu, value, 3);
    out[3] = __shfl_down_sync(0xffffffffu, value, 3);
    out[4] = __shfl_sync(0xffffffffu, value, 2, 8);
    out[5] = float(__popc(__ballot_sync(0xffffffffu, t % 3 == 0)));
    out[6] = float(__any_sync(0xffffffffu, t == 40));
    out[7] = float(__all_sync(0xffffffffu, t < 40));
}

// The halves of a warp shuffle on their own, one of them more often than the other.
NIBS_KERNEL(half_warps, Args, 64) {
    const int t = threadIdx.x;
    float value = float(t);
    if (t % 32 < 16) {
        value = __shfl_xor_sync(0x0000ffffu, value, 1);
    } else {
        for (int i = 0; i < 3; i++) value = __shfl_xor_sync(0xffff0000u, value, 2);
    }
    args.out[t] = value;
}

NIBS_KERNEL(places, Args, 64) {
    const int t = threadIdx.x + 4 * (threadIdx.y + 2 * threadIdx.z);
    const int b = blockIdx.x + 2 * (blockIdx.y + 3 * blockIdx.z);
    const int size = blockDim.x * blockDim.y * blockDim.z;
    args.out[b * size + t] = float(b * size + t + 1000 * (gridDim.x + gridDim.y + gridDim.z));
}

NIBS_KERNEL(votes, Args, 64) {
    const int t = threadIdx.x;
    const int some = __syncthreads_or(t == 3), all = __syncthreads_and(t < 64), many = __syncthreads_count(t % 2);
    args.out[t] = float(some * 10000 + all * 1000 + many);
}

#if NIBS_HOST
// Warp 1 makes, warp 0 takes: named barriers, and a condition that a hook for idle times fulfils.
NIBS_KERNEL(named, Args, 64) {
    NIBS_SHARED(float, values, 32);
    const int t = threadIdx.x;
    struct Late {
        bool done = false;
    };
    Late& late = nibs_host::state<Late>();
    if (t == 0) nibs_host::on_idle([&late] { return late.done ? false : late.done = true; });
    if (t >= 32) {
        values[t - 32] = float(t);
        nibs_host::arrive(1, 64);
    } else {
        nibs_host::barrier(1, 64);
        nibs_host::wait([&late] { return late.done; });
        args.out[t] = values[t];
    }
}

// A collective of all 64 threads, each of whom hands in a number and gets the sum.
NIBS_KERNEL(together, Args, 64) {
    float mine = float(threadIdx.x);
    nibs_host::together_of(0, 64, mine, [](float* const* all) {
        float sum = 0;
        for (int i = 0; i < 64; i++) sum += *all[i];
        for (int i = 0; i < 64; i++) *all[i] = sum;
    });
    args.out[threadIdx.x] = mine;
}
#endif
