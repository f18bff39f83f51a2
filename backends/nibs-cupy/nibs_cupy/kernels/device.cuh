// The words in which every kernel of this folder is written, so that one source serves four compilers:
// NVRTC (which CuPy calls), nvcc, hipcc (never tried), and any C++ compiler through the host runner, which
// executes the same file on a CPU (../host/README.md).
//
// Refused here: CUDA's own headers, which a machine with CuPy alone may lack, and the C++ library, which NVRTC
// has not. A kernel that wants an instruction wraps it in a small device function with two bodies: inline PTX,
// and under `#if NIBS_HOST` the same arithmetic in C++. The portable words:
//
//   NIBS_KERNEL(name, Args, threads) { ... args.rows ... }    a kernel; it takes one struct, by value
//   NIBS_DEVICE T f(...)                                      a device function
//   NIBS_SHARED(T, name, count)                               a shared array, T* in use
//   NIBS_SHARED_2D(T, name, rows, columns)                    the same with two indices
//   NIBS_SHARED_DYNAMIC(T, name)                              what the launch asked for, aligned to 1024 bytes
//   NIBS_UNROLL                                               before a loop
//   threadIdx blockIdx blockDim gridDim __syncthreads() ...   as in CUDA
//
// A plain `__shared__` does not compile for the host, on purpose: the runner could neither poison nor fence it.

#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__) || defined(__HIP__)
#define NIBS_HOST 0
#else
#define NIBS_HOST 1
#include "cuda_host.hpp"  // found by -I ../host
#endif

#if !NIBS_HOST

#define NIBS_DEVICE __device__ __forceinline__
#define NIBS_KERNEL(name, Args, threads) extern "C" __global__ void __launch_bounds__(threads) name(const Args args)
#define NIBS_SHARED(T, name, count) __shared__ T name[count]
#define NIBS_SHARED_2D(T, name, rows, columns) __shared__ T name[rows][columns]
#define NIBS_SHARED_DYNAMIC(T, name)                                  \
    extern __shared__ __align__(1024) unsigned char nibs_dynamic[]; \
    T* name = reinterpret_cast<T*>(nibs_dynamic)
#define NIBS_UNROLL _Pragma("unroll")

#endif

namespace nibs {

typedef long long i64;  // sizes, strides and offsets: n * d goes beyond 2^31

// The range of an accumulator, without <limits>.
template <class T>
struct range;

template <>
struct range<float> {
    NIBS_DEVICE static float infinity() { return __int_as_float(0x7f800000); }
    NIBS_DEVICE static float lowest() { return __int_as_float((int)0xff7fffffu); }
};

template <>
struct range<double> {
    NIBS_DEVICE static double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
    NIBS_DEVICE static double lowest() { return __longlong_as_double((i64)0xffefffffffffffffull); }
};

// a * b, rounded by itself. CUDA's compilers fuse a product with what is added to it, and then do not round it: a logit would
// be one number in the lse and another in the weights, half a unit apart, which is 1/4 where logits are in the millions.
#if NIBS_HOST
NIBS_DEVICE float times(float a, float b) { return a * b; }
NIBS_DEVICE double times(double a, double b) { return a * b; }
#else
NIBS_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
NIBS_DEVICE double times(double a, double b) { return __dmul_rn(a, b); }
#endif

// bfloat16 and float16 travel as their bits.
typedef unsigned short bits16;

NIBS_DEVICE float from_bfloat16(bits16 bits) { return __uint_as_float((unsigned)bits << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
NIBS_DEVICE bits16 to_bfloat16(float value) {
    const unsigned bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits16)((bits >> 16) | 0x40u);
    return (bits16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if NIBS_HOST || defined(__HIP__)

NIBS_DEVICE float from_float16(bits16 bits) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, 2);
    return (float)half;
}

NIBS_DEVICE bits16 to_float16(float value) {
    const _Float16 half = (_Float16)value;
    bits16 bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
}

#else

NIBS_DEVICE float from_float16(bits16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

NIBS_DEVICE bits16 to_float16(float value) {
    bits16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif

}  // namespace nibs
