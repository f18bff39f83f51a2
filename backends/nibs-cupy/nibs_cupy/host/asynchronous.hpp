// Host twins of the instructions in ../kernels/asynchronous.cuh: the same names, the same bits, and complaints.
//
// Plan. Arithmetic (mma, ldmatrix, conversions) happens when the last lane arrives. What is asynchronous on a GPU
// runs under one of two clocks, and a kernel has to be right under both:
//
//     earliest (the default)      done as it is issued: shows a copy that overwrites what is still being read
//     latest (latest() is true)   done only when somebody waits for it; until then the destination in shared memory, or the
//                                 sums in registers, are NaN: shows a read that does not wait
//
// A wait on a Signal that has not come makes the runner ask for work: then one copy under way is completed, the
// oldest first. If there is none it is a deadlock, and the text says what each signal still waits for.
//
// Checked, as errors that name the rule:
//
//     copies      alignment, size, both ends inside shared memory; none under way when the thread block ends
//     Signal      initialised once, shown by signals_ready before a copy counts on it, not overwritten; never more
//                 arrivals than its phase has; no bytes missing or left over at the end; a thread's waits alternate in parity
//     wgmma       the descriptor is decoded, swizzle and all, and says which bytes are read; group_fence after the sums were
//                 touched; nothing uncommitted or unwaited for at the end
//     proxies     wgmma reads a second copy of shared memory, to which ordinary stores come only with show_async: a
//                 byte that differs was stored and not shown. Whose fence it was is not known: one by another thread counts
//                 as long as it comes after the store, so run the shuffled orders too
//     registers   setmaxnreg that asks for more than the thread block has, which hangs on a GPU
//
// Not judged here, but by recorded vectors (../kernels/vectors) or a GPU: how a tensor core rounds within one instruction.
// Here products of half precision are exact and are added in float32, in the order of the columns.
#pragma once

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <vector>

// Unrolled by a C++ compiler, the fast kernels take five times as long to build and run no faster.
#undef NIBS_UNROLL
#define NIBS_UNROLL

namespace nibs_host {

// What is under way in one thread block.
struct Asynchronous {
    struct Copy {
        void* to;
        const void* from;
        unsigned bytes;
        unsigned signal;  // shared address; of bulk copies
    };
    struct Phases {
        unsigned arrivals;  // of each phase
        unsigned missing;   // of this phase
        long long bytes;    // expected less come, of this phase
        unsigned long long phase, shown_by, stamp;
        bool shown;
        std::map<unsigned, unsigned> last_parity;  // of each thread's latest wait
    };
    struct Multiply {
        int format;
        unsigned long long a, b;
        float* sums[128];
        unsigned group;  // 0 while not committed
    };
    struct Warpgroup {
        std::vector<Multiply> under_way;
        std::map<float*, std::vector<float>> real;  // the sums of each thread, while its registers show NaN
        unsigned committed = 0;
        int pending = -1;         // of the wait that all its threads have reached, or -1
        unsigned long waits = 0;  // that are over
        bool fenced = false;
        int registers = 0;
    };
    struct Groups {
        std::vector<std::vector<Copy>> committed;
        std::vector<Copy> open;
    };
    std::vector<Copy> bulk;                // in the order of issue
    std::map<unsigned, Phases> signals;    // by shared address
    std::map<unsigned, Groups> of_thread;  // cp.async
    std::map<unsigned, Warpgroup> warpgroups;
    std::vector<unsigned char> shown;  // shared memory as copies and wgmma see it
    std::string wrong;                 // what `at_end` found

    Asynchronous() : shown(ARENA, UNWRITTEN) {
        on_idle([this] { return complete_products(); });
        on_idle([this] { return complete_bulk(); });
        at_end([this] { return left_over(); });
    }

    void* shown_at(const void* p) { return shown.data() + shared_address(p); }

    void complete(const Copy& copy) {
        memcpy(copy.to, copy.from, copy.bytes);
        if (copy.signal) memcpy(shown_at(copy.to), copy.from, copy.bytes);
    }

    // Oldest first; false if there is none.
    bool complete_bulk() {
        if (bulk.empty()) return false;
        const Copy copy = bulk.front();
        bulk.erase(bulk.begin());
        complete(copy);
        count_off(copy.signal, copy.bytes);
        return true;
    }

    Phases& signal_at(unsigned address, const char* what) {
        const auto found = signals.find(address);
        if (found == signals.end()) fail("%s: the signal has not been initialised", what);
        unsigned long long stamp;
        memcpy(&stamp, shared_pointer(address), sizeof stamp);
        if (stamp != found->second.stamp) fail("%s: the signal has been overwritten by an ordinary store", what);
        return found->second;
    }

    void turn(Phases& signal) {
        if (signal.missing || signal.bytes) return;
        signal.phase++;
        signal.missing = signal.arrivals;
    }

    void arrive(unsigned address, long long bytes) {
        Phases& signal = signal_at(address, "arrival");
        if (!signal.missing) fail("arrival: all %u of this phase have arrived, and its bytes have not (%lld to come)", signal.arrivals, signal.bytes);
        signal.bytes += bytes;
        if (signal.bytes > 0xfffff) fail("expect: %lld bytes, more than a signal can count", signal.bytes);
        signal.missing--;
        turn(signal);
    }

    void count_off(unsigned address, unsigned bytes) {
        Phases& signal = signal_at(address, "copy");
        signal.bytes -= bytes;
        if (!signal.missing && signal.bytes < 0) fail("copy: %lld bytes more have come than were expected", -signal.bytes);
        turn(signal);
    }

    const char* left_over() {
        const auto say = [&](const char* format, auto... values) {
            char text[200];
            snprintf(text, sizeof text, format, values...);
            wrong = text;
            return wrong.c_str();
        };
        if (!bulk.empty()) return say("%zu bulk copies were never waited for", bulk.size());
        for (const auto& one : of_thread) {
            if (!one.second.open.empty()) return say("thread %u has copies that it never committed", one.first);
            for (const auto& group : one.second.committed)
                if (!group.empty()) return say("thread %u has copies that it never waited for", one.first);
        }
        for (const auto& one : signals)
            if (one.second.bytes) return say("a signal ends with %lld bytes still expected", one.second.bytes);
        for (const auto& one : warpgroups)
            if (!one.second.under_way.empty()) return say("warpgroup %u has products that it never waited for", one.first);
        return nullptr;
    }

    // What a warpgroup waits for, once nobody else can go on: whoever may overwrite its operands has done so.
    bool complete_products() {
        for (auto& one : warpgroups)
            if (one.second.pending >= 0) {
                complete(one.second, (unsigned)one.second.pending);
                return true;
            }
        return false;
    }

    void complete(Warpgroup& group, unsigned pending) {
        size_t kept = 0;
        for (auto& one : group.under_way) {
            if (!one.group || one.group + pending > group.committed) group.under_way[kept++] = one;
            else if (latest()) multiply(one, group);
        }
        group.under_way.resize(kept);
        group.pending = -1;
        group.waits++;
        if (pending == 0) group.fenced = false;
        if (kept) return;
        for (auto& one : group.real) memcpy(one.first, one.second.data(), sizeof(float) * 128);
        group.real.clear();
    }

    // -- wgmma --------------------------------------------------------------------------------------

    // The 32 bytes of row `row` that a descriptor names, as wgmma sees them.
    void operand(unsigned long long descriptor, unsigned row, unsigned char* bytes) {
        const unsigned start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
        const unsigned mode = descriptor >> 62, base = descriptor >> 49 & 7;
        if (base) fail("wgmma: a descriptor with a base offset, which no panel here has");
        for (unsigned at = 0; at < 32; at += 16) {
            unsigned address;
            if (mode == 0) {  // 8 rows of 16 bytes, one after the other
                address = start + row / 8 * stride + at / 16 * leading + row % 8 * 16;
            } else {
                const unsigned width = 256 >> mode;  // 128, 64, 32
                address = start + row / 8 * stride + row % 8 * width + at;
                address ^= (address >> 7 & (width / 16 - 1)) << 4;
            }
            if (address + 16 > block->used) fail("wgmma: a descriptor reads byte %u of shared memory, of which %zu are in use", address, block->used);
            if (memcmp(block->arena + address, &shown[address], 16))
                fail("wgmma: byte %u and on of shared memory were written by ordinary stores and not shown (show_async)", address);
            memcpy(bytes + at, &shown[address], 16);
        }
    }

    static float half(int format, const unsigned char* bytes, unsigned k) {
        unsigned short bits;
        memcpy(&bits, bytes + 2 * k, 2);
        return format ? nibs::from_float16(bits) : nibs::from_bfloat16(bits);
    }

    void multiply(const Multiply& one, Warpgroup& group) {
        static float a[64][16], b[16][256], d[256];
        const unsigned depth = one.format == 2 ? 8 : 16;
        unsigned char bytes[32];
        const auto number = [&](unsigned k) {
            if (one.format != 2) return half(one.format, bytes, k);
            unsigned bits;
            memcpy(&bits, bytes + 4 * k, 4);
            return bits_to_float(bits & 0xffffe000u);  // a tensor core looks at no more
        };
        for (unsigned row = 0; row < 64; row++) {
            operand(one.a, row, bytes);
            for (unsigned k = 0; k < depth; k++) a[row][k] = number(k);
        }
        for (unsigned row = 0; row < 256; row++) {
            operand(one.b, row, bytes);
            for (unsigned k = 0; k < depth; k++) b[k][row] = number(k);
        }
        for (unsigned row = 0; row < 64; row++) {
            memset(d, 0, sizeof d);
            for (unsigned k = 0; k < depth; k++)
                for (unsigned column = 0; column < 256; column++) d[column] += a[row][k] * b[k][column];
            // Row `row` is with warp row / 16, lanes 4 (row % 8) to 4 (row % 8) + 3, in the upper or lower half of a fragment.
            for (unsigned t = 0; t < 4; t++) {
                float* sums = one.sums[row / 16 * 32 + row % 8 * 4 + t];
                const auto kept = group.real.find(sums);
                if (kept != group.real.end()) sums = kept->second.data();
                for (unsigned n = 0; n < 32; n++)
                    for (unsigned e = 0; e < 2; e++) sums[n * 4 + row % 16 / 8 * 2 + e] += d[n * 8 + 2 * t + e];
            }
        }
    }

    static float bits_to_float(unsigned bits) {
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
};

static inline Asynchronous& asynchronous() { return state<Asynchronous>(); }

static inline void check_copy(const void* shared, const void* global, unsigned bytes) {
    if ((uintptr_t)global % 16 || shared_address(shared) % 16 || bytes % 16) fail("copy: both ends and the length must be multiples of 16 bytes");
    if (shared_address(shared) + bytes > block->used) fail("copy: %u bytes reach beyond shared memory", bytes);
    if ((const unsigned char*)global >= block->arena && (const unsigned char*)global < block->arena + ARENA) fail("copy: the source is in shared memory");
}

static inline unsigned warpgroup() { return current->number / 128; }

}  // namespace nibs_host

namespace nibs {

NIBS_DEVICE u32 shared_address(const void* p) { return nibs_host::shared_address(p); }

static inline void load_fragments(u32 (&r)[4], const void* row) {
    struct Lane {
        u32* r;
        const void* row;
    } mine = {r, row};
    if (nibs_host::shared_address(row) % 16) nibs_host::fail("ldmatrix: a row must start at a multiple of 16 bytes");
    nibs_host::together(~0u, mine, [](Lane* const* lanes) {
        for (int m = 0; m < 4; m++)
            for (int l = 0; l < 32; l++) memcpy(&lanes[l]->r[m], (const char*)lanes[8 * m + l / 4]->row + 4 * (l % 4), 4);
    });
}

// c += a b, where `number(word, k)` is the k-th of the EACH numbers in a word.
template <int EACH, class Number>
static inline void multiply_words(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], Number number) {
    struct Lane {
        float* c;
        const u32 *a, *b;
    } mine = {c, a, b};
    nibs_host::together(~0u, mine, [&](Lane* const* lanes) {
        constexpr int DEPTH = 8 * EACH;
        float left[16][DEPTH], right[DEPTH][8];
        for (int l = 0; l < 32; l++) {
            const int g = l / 4, t = l % 4;
            for (int k = 0; k < EACH; k++) {
                for (int w = 0; w < 4; w++) left[g + w % 2 * 8][(w / 2 * 4 + t) * EACH + k] = number(lanes[l]->a[w], k);
                for (int w = 0; w < 2; w++) right[(w * 4 + t) * EACH + k][g] = number(lanes[l]->b[w], k);
            }
        }
        for (int row = 0; row < 16; row++) {
            float sums[8] = {};
            for (int k = 0; k < DEPTH; k++)
                for (int column = 0; column < 8; column++) sums[column] += left[row][k] * right[k][column];
            for (int column = 0; column < 8; column++) lanes[row % 8 * 4 + column / 2]->c[row / 8 * 2 + column % 2] += sums[column];
        }
    });
}
static inline void multiply(Bfloat16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    multiply_words<2>(c, a, b, [](u32 word, int k) { return from_bfloat16((bits16)(word >> 16 * k)); });
}
static inline void multiply(Float16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    multiply_words<2>(c, a, b, [](u32 word, int k) { return from_float16((bits16)(word >> 16 * k)); });
}
static inline void multiply(Tf32, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    multiply_words<1>(c, a, b, [](u32 word, int) { return __uint_as_float(word & 0xffffe000u); });
}

NIBS_DEVICE u32 round_tf32(u32 word) {
    return (word & 0x7f800000u) == 0x7f800000u ? word : (word + 0x1000u) & 0xffffe000u;
}

NIBS_DEVICE float exp2_fast(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;  // a NaN is not less
}

NIBS_DEVICE u32 pack_pair(Bfloat16, float low, float high) { return to_bfloat16(low) | (u32)to_bfloat16(high) << 16; }
NIBS_DEVICE u32 pack_pair(Float16, float low, float high) { return to_float16(low) | (u32)to_float16(high) << 16; }

static inline void copy_async(void* shared, const void* global) {
    nibs_host::check_copy(shared, global, 16);
    auto& all = nibs_host::asynchronous();
    const nibs_host::Asynchronous::Copy copy = {shared, global, 16, 0};
    if (nibs_host::latest()) {
        memset(shared, nibs_host::UNWRITTEN, 16);
        all.of_thread[nibs_host::current->number].open.push_back(copy);
    } else {
        all.complete(copy);
    }
}
static inline void copies_commit() {
    if (!nibs_host::latest()) return;
    auto& groups = nibs_host::asynchronous().of_thread[nibs_host::current->number];
    groups.committed.push_back(std::move(groups.open));
    groups.open.clear();
}
template <int PENDING>
static inline void copies_wait() {
    if (!nibs_host::latest()) return;
    auto& all = nibs_host::asynchronous();
    auto& groups = all.of_thread[nibs_host::current->number];
    while (groups.committed.size() > PENDING) {
        for (const auto& copy : groups.committed.front()) all.complete(copy);
        groups.committed.erase(groups.committed.begin());
    }
}

static inline void meet(int id, int threads, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (id < 1) nibs_host::fail("barrier %d: 0 belongs to __syncthreads", id);
    nibs_host::barrier((unsigned)id, (unsigned)threads, 0, false, file, line);
}

struct alignas(8) Signal {
    u64 state;
};

static inline void signal_init(Signal* s, u32 arrivals) {
    const unsigned address = nibs_host::shared_address(s);
    auto& all = nibs_host::asynchronous();
    if (all.signals.count(address)) nibs_host::fail("a signal is initialised twice");
    if (address % 8) nibs_host::fail("a signal must start at a multiple of 8 bytes");
    if (arrivals < 1 || arrivals > 0xfffff) nibs_host::fail("a signal for %u arrivals", arrivals);
    auto& made = all.signals[address];
    made.arrivals = made.missing = arrivals;
    made.bytes = 0;
    made.phase = 0;
    made.shown = false;
    made.shown_by = nibs_host::current->number;
    made.stamp = 0x5167000000000000ull + address * 2654435761ull;  // so that a store over it shows
    s->state = made.stamp;
}
static inline void signals_ready() {
    for (auto& one : nibs_host::asynchronous().signals)
        if (one.second.shown_by == nibs_host::current->number) one.second.shown = true;
}
static inline void signal_arrive(Signal* s) { nibs_host::asynchronous().arrive(nibs_host::shared_address(s), 0); }
static inline void signal_expect(Signal* s, u32 bytes) { nibs_host::asynchronous().arrive(nibs_host::shared_address(s), bytes); }
static inline void signal_wait(Signal* s, u32 parity, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    auto& all = nibs_host::asynchronous();
    const unsigned address = nibs_host::shared_address(s);
    auto& signal = all.signal_at(address, "wait");
    if (parity > 1) nibs_host::fail("wait: parity %u", parity);
    const auto last = signal.last_parity.find(nibs_host::current->number);
    if (last != signal.last_parity.end() && last->second == parity) nibs_host::fail("wait: parity %u twice in a row by this thread, line %d", parity, line);
    signal.last_parity[nibs_host::current->number] = parity;
    nibs_host::wait([&signal, parity] { return (signal.phase & 1) != parity; }, file, line);
}

static inline void copy_bulk(void* shared, const void* global, u32 bytes, Signal* s) {
    nibs_host::check_copy(shared, global, bytes);
    auto& all = nibs_host::asynchronous();
    const unsigned address = nibs_host::shared_address(s);
    if (!all.signal_at(address, "copy").shown) nibs_host::fail("copy: its signal was initialised without signals_ready");
    const nibs_host::Asynchronous::Copy copy = {shared, global, bytes, address};
    if (nibs_host::latest()) {
        memset(shared, nibs_host::UNWRITTEN, bytes);
        memset(all.shown_at(shared), nibs_host::UNWRITTEN, bytes);
        all.bulk.push_back(copy);
    } else {
        all.complete(copy);
        all.count_off(address, bytes);
    }
}

static inline void show_async() {
    auto& all = nibs_host::asynchronous();
    memcpy(all.shown.data(), nibs_host::block->arena, nibs_host::block->used);
}

// A warpgroup's registers: what the launch gave every thread, moved about.
static inline void move_registers(int count) {
    auto& all = nibs_host::asynchronous();
    const unsigned groups = nibs_host::block->threads / 128;
    const int each = 65536 / (int)nibs_host::block->threads / 8 * 8;
    if (count % 8 || count < 24 || count > 256) nibs_host::fail("setmaxnreg %d: multiples of 8 from 24 to 256", count);
    all.warpgroups[nibs_host::warpgroup()].registers = count;
    int total = 0;
    for (unsigned g = 0; g < groups; g++) {
        const int has = all.warpgroups[g].registers;
        total += has ? has : 0;  // who has not spoken yet may still give
    }
    if (total > each * (int)groups) nibs_host::fail("setmaxnreg: the warpgroups ask for %d registers a thread in all, and have %d", total, each * (int)groups);
}
template <int COUNT>
static inline void registers_give() { move_registers(COUNT); }
template <int COUNT>
static inline void registers_take() { move_registers(COUNT); }

static inline u64 panel_descriptor(const void* panel) {
    return ((nibs_host::shared_address(panel) & 0x3ffff) >> 4) | (u64(1) << 16) | (u64(64) << 32) | (u64(1) << 62);
}

template <class Work>
static inline void warpgroup_together(Work work, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    char nothing = 0;
    nibs_host::together_of(nibs_host::warpgroup() * 128, 128, nothing, [&](char* const*) { work(nibs_host::asynchronous().warpgroups[nibs_host::warpgroup()]); }, 0, file, line);
}
static inline void group_fence(float (&)[128], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    warpgroup_together([](nibs_host::Asynchronous::Warpgroup& group) { group.fenced = true; }, file, line);
}
static inline void group_commit(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    warpgroup_together(
        [](nibs_host::Asynchronous::Warpgroup& group) {
            group.committed++;
            for (auto& one : group.under_way)
                if (!one.group) one.group = group.committed;
        },
        file, line);
}
static inline void multiply_group_of(int format, float (&c)[128], u64 a, u64 b, const char* file, int line) {
    struct Thread {
        float* c;
        u64 a, b;
    } mine = {c, a, b};
    nibs_host::together_of(
        nibs_host::warpgroup() * 128, 128, mine,
        [format](Thread* const* threads) {
            auto& all = nibs_host::asynchronous();
            auto& group = all.warpgroups[nibs_host::warpgroup()];
            if (!group.fenced) nibs_host::fail("wgmma: group_fence is missing since the sums were touched");
            nibs_host::Asynchronous::Multiply one = {format, threads[0]->a, threads[0]->b, {}, 0};
            for (int t = 0; t < 128; t++) {
                if (threads[t]->a != one.a || threads[t]->b != one.b) nibs_host::fail("wgmma: the descriptors differ within a warpgroup");
                float* sums = one.sums[t] = threads[t]->c;
                if (!nibs_host::latest() || group.real.count(sums)) continue;
                group.real[sums].assign(sums, sums + 128);
                for (int i = 0; i < 128; i++) sums[i] = NAN;
            }
            if (!nibs_host::latest()) all.multiply(one, group);
            group.under_way.push_back(one);
        },
        0, file, line);
}
static inline void multiply_group(Bfloat16, float (&c)[128], u64 a, u64 b, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    multiply_group_of(0, c, a, b, file, line);
}
static inline void multiply_group(Float16, float (&c)[128], u64 a, u64 b, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    multiply_group_of(1, c, a, b, file, line);
}
static inline void multiply_group(Tf32, float (&c)[128], u64 a, u64 b, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    multiply_group_of(2, c, a, b, file, line);
}
template <int PENDING>
static inline void group_wait(float (&)[128], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    auto& group = nibs_host::asynchronous().warpgroups[nibs_host::warpgroup()];
    const unsigned long before = group.waits;
    warpgroup_together(
        [](nibs_host::Asynchronous::Warpgroup& mine) {
            if (nibs_host::latest()) mine.pending = PENDING;
            else nibs_host::asynchronous().complete(mine, PENDING);
        },
        file, line);
    nibs_host::wait([&group, before] { return group.waits != before; }, file, line);
}

}  // namespace nibs
