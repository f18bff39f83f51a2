// The instructions that fast kernels are made of, one small function each, for the GPU and for the host.
//
// Why: a kernel that says `mma.sync` in the middle cannot run on a CPU, and one that cannot run on a CPU is
// not tested by anyone without its GPU. So the kernels call the functions below, and nothing else here or
// in them is PTX. On the GPU each is the one instruction that its comment names; on the host,
// host/asynchronous.hpp supplies a twin of the same name that does the same to the same bits, and that
// complains of what the GPU would silently get wrong. What each twin checks is said there.
//
//     warp            load_fragments   ldmatrix: four 8 x 16-byte matrices from shared memory
//                     multiply         mma.sync: 16 x 8 += 16 x 32 bytes times 32 bytes x 8
//     copies          copy_async       cp.async: 16 bytes, global to shared; committed and waited for in groups
//                     copy_bulk        cp.async.bulk: a run of bytes; counted off on a Signal
//     signals         Signal           mbarrier: arrivals and bytes expected, waited for by parity
//     warpgroup       multiply_group   wgmma: 64 x 256 += panels in shared memory, asynchronous
//                     panel_descriptor the 64 bits that tell it where and how a panel lies
//     other           show_async       fence.proxy.async: ordinary writes become visible to copies and wgmma
//                     meet             bar.sync: a named barrier of some warps
//                     exp2_fast        ex2.approx.ftz
//
// Fragments, the same for every format below, g = lane / 4, t = lane % 4, a chunk being 16 bytes of a row:
//
//     a[0] row g, chunk 0    a[1] row g + 8, chunk 0    a[2] row g, chunk 1    a[3] row g + 8, chunk 1    word t
//     b[0] row g, chunk 0    b[1] row g, chunk 1        (a row of b is a column of the product)           word t
//     c[0] c[1] row g, columns 2t and 2t + 1            c[2] c[3] row g + 8, the same columns
//
// Not for AMD: a kernel that includes this file is one for NVIDIA, from sm_80 on; the general kernels are for all.
#pragma once

#include "device.cuh"

namespace nibs {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The number formats of operands; a slab is 128 bytes of a row.
struct Bfloat16 { typedef u16 Store; };
struct Float16 { typedef u16 Store; };
struct Tf32 { typedef float Store; };        // float32, of which 10 bits are looked at
struct Tf32Thrice { typedef float Store; };  // float32 split into two such parts: three products

}  // namespace nibs

#if NIBS_HOST
#define NIBS_ROLL
#include "asynchronous.hpp"  // found by -I ../host
#else
#define NIBS_ROLL _Pragma("unroll 1")

namespace nibs {

NIBS_DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ldmatrix: lane l names row l % 8 of matrix l / 8; r[m] is word lane % 4 of row lane / 4 of matrix m.
NIBS_DEVICE void load_fragments(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define NIBS_MMA(SHAPE)                                                                                          \
    asm volatile("mma.sync.aligned." SHAPE " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

NIBS_DEVICE void multiply(Bfloat16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    NIBS_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
NIBS_DEVICE void multiply(Float16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    NIBS_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
// The words must be tf32 already (`round_tf32`).
NIBS_DEVICE void multiply(Tf32, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    NIBS_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef NIBS_MMA

// cvt.rna.tf32: the nearest number of 10 bits, ties away from zero.
NIBS_DEVICE u32 round_tf32(u32 word) {
    u32 rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(word)));
    return rounded;
}

// ex2.approx.ftz: 2^x to about 2 units in the last place; below 2^-126 exactly 0.
NIBS_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// cvt.rn: two numbers rounded to nearest even and packed, the first in the low half.
NIBS_DEVICE u32 pack_pair(Bfloat16, float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
NIBS_DEVICE u32 pack_pair(Float16, float low, float high) {
    u32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// cp.async.cg: 16 bytes, both sides aligned to 16.
NIBS_DEVICE void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
NIBS_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most PENDING of this thread's groups are under way; others' copies need a barrier after it.
template <int PENDING>
NIBS_DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// bar.sync: `threads` threads meet at barrier `id`, 1 to 15.
NIBS_DEVICE void meet(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

#if __CUDA_ARCH__ >= 900
// mbarrier: a phase is over when `arrivals` have arrived and the bytes expected have come; phases are told apart by parity.
struct alignas(8) Signal { u64 state; };

NIBS_DEVICE void signal_init(Signal* s, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(s)), "r"(arrivals) : "memory");
}
// fence.mbarrier_init: initialised signals are visible to copies; a barrier must follow for the other threads.
NIBS_DEVICE void signals_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
NIBS_DEVICE void signal_arrive(Signal* s) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(s)) : "memory");
}
NIBS_DEVICE void signal_expect(Signal* s, u32 bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(s)), "r"(bytes) : "memory");
}
// Until the phase of this parity is over. The first phase has parity 0; before it, parity 1 counts as over.
NIBS_DEVICE void signal_wait(Signal* s, u32 parity) {
    asm volatile(
        "{\n.reg .pred over;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@over bra done;\nbra again;\ndone:\n}"
        ::"r"(shared_address(s)), "r"(parity) : "memory");
}

// cp.async.bulk: both sides and the length in units of 16 bytes; the bytes are counted off on the signal.
NIBS_DEVICE void copy_bulk(void* shared, const void* global, u32 bytes, Signal* s) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(s)) : "memory");
}

// fence.proxy.async: what this thread wrote to shared memory is seen by copies and wgmma that start later.
NIBS_DEVICE void show_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// setmaxnreg: registers from one warpgroup to another.
template <int COUNT>
NIBS_DEVICE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT>
NIBS_DEVICE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }

// Start address / 16 in bits 0-13, leading offset 1 (not used when swizzled), 1,024 bytes from one group of 8 rows to
// the next in bits 32-45, and 1 (128-byte swizzle) in bits 62-63. A step of 32 bytes along a row adds 2.
NIBS_DEVICE u64 panel_descriptor(const void* panel) {
    return ((shared_address(panel) & 0x3ffff) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62);
}

// wgmma.fence: what has been written to the sums is seen by the products that follow. Naming them keeps the compiler from
// moving such a write, of a zero say, behind it.
NIBS_DEVICE void group_fence(float (&c)[128]) {
    NIBS_UNROLL
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(c[i])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
NIBS_DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most PENDING committed groups are under way. With 0 the sums may be read: naming them keeps the compiler
// from moving a read up.
template <int PENDING>
NIBS_DEVICE void group_wait(float (&c)[128]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    if (PENDING == 0) {
        NIBS_UNROLL
        for (int i = 0; i < 128; i++) asm volatile("" : "+f"(c[i])::"memory");
    }
}

// c += a b^T for 64 rows of a and 256 rows of b, 32 bytes of each. Always adds: a predicate that would start from zero
// made ptxas run these one by one (C7511), so kernels clear c themselves.
#define NIBS_WGMMA(SHAPE, TAIL)                                                                     \
    asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\nwgmma.mma_async.sync.aligned." SHAPE " {" \
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
            "}, %128, %129, add, " TAIL ";\n}" \
        : \
            "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
            "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), \
            "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
            "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), \
            "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), \
            "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
            "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
            "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), \
            "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), \
            "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), \
            "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), \
            "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), \
            "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]), \
            "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]), \
            "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), \
            "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127]) \
        : "l"(a), "l"(b))

NIBS_DEVICE void multiply_group(Bfloat16, float (&c)[128], u64 a, u64 b) {
    NIBS_WGMMA("m64n256k16.f32.bf16.bf16", "1, 1, 0, 0");
}
NIBS_DEVICE void multiply_group(Float16, float (&c)[128], u64 a, u64 b) {
    NIBS_WGMMA("m64n256k16.f32.f16.f16", "1, 1, 0, 0");
}
NIBS_DEVICE void multiply_group(Tf32, float (&c)[128], u64 a, u64 b) {
    NIBS_WGMMA("m64n256k8.f32.tf32.tf32", "1, 1");
}
#undef NIBS_WGMMA
#endif

}  // namespace nibs

#endif
