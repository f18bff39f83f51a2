// The host runner: CUDA C++ on a CPU, from the same source, for tests where there is no GPU.
//
// Plan. One fiber for each CUDA thread of a thread block, one thread block after the other, all on the calling
// OS thread. A fiber runs until it waits at a barrier, for the other lanes of a warp collective, or for a condition; then
// the next one in the queue runs. So nothing is preempted, nothing needs a lock, and the order in which threads
// run between two barriers is ours to choose: forward, reversed or shuffled. What depends on it lacks a barrier.
//
// When the queue is empty and somebody still waits, a barrier is divergent: that is an error with the names of
// those who wait and those who have returned, where a GPU would hang or go on with wrong numbers.
//
// Shared memory is one arena for each thread block: filled with 0xFF (NaN in every float type) as a thread block starts, with
// a red zone round every array. README.md beside this file says how kernels and twins of instructions are
// written, and what cannot be seen here.
//
// Included by ../kernels/device.cuh wherever the compiler is not one for GPUs. One source file, one shared library.

#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define NIBS_HOST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define NIBS_HOST_SANITIZED 1
#endif
#endif
#ifndef NIBS_HOST_SANITIZED
#define NIBS_HOST_SANITIZED 0
#endif
#if NIBS_HOST_SANITIZED
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Switching by hand takes some 2 ns; ucontext, which makes a system call, is there for other machines.
#if defined(__ELF__) && (defined(__x86_64__) || defined(__aarch64__)) && !defined(NIBS_HOST_UCONTEXT)
#define NIBS_HOST_ASSEMBLY 1
#else
#define NIBS_HOST_ASSEMBLY 0
#include <ucontext.h>
#endif

namespace nibs_host {

constexpr unsigned WARP = 32;
constexpr unsigned LARGEST_BLOCK = 1024;
constexpr unsigned BARRIERS = 16;
constexpr size_t RED_ZONE = 64;
constexpr size_t STATIC_LIMIT = 48 * 1024;   // what every CUDA device gives without asking
constexpr size_t SHARED_LIMIT = 227 * 1024;  // what a Hopper gives when asked
constexpr size_t ARENA = 320 * 1024;         // that, its red zones, and alignment
constexpr size_t STACK = NIBS_HOST_SANITIZED ? 128 * 1024 : 64 * 1024;
constexpr unsigned char UNWRITTEN = 0xFF;
constexpr unsigned char FENCE = 0xC5;
constexpr uint64_t CANARY = 0x6e69627363757079ull;

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};

// What the caller passes; ../host/__init__.py has its twin.
struct Launch {
    unsigned grid[3];
    unsigned block[3];
    unsigned dynamic;       // bytes of dynamic shared memory
    unsigned order;         // 0 forward, 1 reversed, 2 shuffled
    unsigned latest;        // asynchronous operations complete at once (0), or as late as is legal (1)
    unsigned message_size;  // of `message`, which gets the error
    uint64_t seed;
    char* message;
};

enum State : unsigned char { READY, AT_BARRIER, IN_COLLECTIVE, WAITING, RETURNED };

struct Thread {
#if NIBS_HOST_ASSEMBLY
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    char* stack = nullptr;
    Dim index;
    unsigned number = 0, lane = 0;
    State state = READY;
    unsigned barrier = 0;
    int result = 0;  // of __syncthreads_or and its like
    const char* file = "";
    int line = 0;
    bool (*ready)(void*) = nullptr;  // what a WAITING thread waits for
    void* ready_argument = nullptr;
#if NIBS_HOST_SANITIZED
    void* fake_stack = nullptr;
#endif
};

struct Barrier {
    unsigned arrived = 0, wanted = 0, ones = 0;
    const char* file = "";
    int line = 0;
};

// A collective that some of its threads have reached.
struct Meeting {
    unsigned first, count, mask, arrived;
    const char* file;
    int line;
    void* lanes[128];
};

struct Region {
    const void* site;
    const char* name;
    size_t begin, size;
};

struct Block {
    const Launch* launch = nullptr;
    const char* kernel = "";
    void (*body)(const void*) = nullptr;
    const void* arguments = nullptr;
    Dim index, size, grid;
    unsigned threads = 0, returned = 0;
    std::vector<Thread> fibers;
    std::vector<Thread*> queue;  // a ring of those that can run
    size_t head = 0, length = 0;
    std::vector<Thread*> waiting;
    Barrier barriers[BARRIERS];
    std::vector<std::unique_ptr<Meeting>> meetings, spare;
    unsigned char* arena = nullptr;
    size_t used = 0;
    std::vector<Region> regions;
    std::vector<std::function<bool()>> idle;
    std::vector<std::function<const char*()>> ends;
    size_t pauses = 0;  // one after the other, nobody having done anything else
    std::vector<std::pair<const void*, std::shared_ptr<void>>> states;
    uint64_t random = 0;
    bool failed = false;
    Thread main;
#if NIBS_HOST_SANITIZED
    const void* main_stack = nullptr;
    size_t main_size = 0;
#endif
};

static thread_local Thread* current = nullptr;
static thread_local Block* block = nullptr;

[[noreturn]] static void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// -- switching ------------------------------------------------------------------------------------

#if NIBS_HOST_ASSEMBLY

extern "C" __attribute__((visibility("hidden"))) void nibs_host_switch(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
.text
.globl nibs_host_switch
.hidden nibs_host_switch
.type nibs_host_switch,@function
nibs_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size nibs_host_switch,.-nibs_host_switch
)");
#else
asm(R"(
.text
.globl nibs_host_switch
.hidden nibs_host_switch
.type nibs_host_switch,%function
nibs_host_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size nibs_host_switch,.-nibs_host_switch
)");
#endif

#endif

#if NIBS_HOST_SANITIZED
// The sanitizer must be told which stack is in use. `to_stack` is null for the stack of the OS thread.
static void leave(Thread& from, const void* to_stack, size_t to_size, bool for_good) {
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to_stack, to_size);
}
static void arrive_on(Thread& to) {
    const void* old = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(to.fake_stack, &old, &size);
    if (!block->main_stack) block->main_stack = old, block->main_size = size;  // who came first, came from there
}
#endif

static void jump(Thread& from, Thread& to, bool for_good = false) {
#if NIBS_HOST_SANITIZED
    const bool home = &to == &block->main;
    leave(from, home ? block->main_stack : to.stack, home ? block->main_size : STACK, for_good);
#else
    (void)for_good;
#endif
#if NIBS_HOST_ASSEMBLY
    nibs_host_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
#if NIBS_HOST_SANITIZED
    arrive_on(from);
#endif
}

static void fail(const char* format, ...) {
    char text[1400];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    Block& b = *block;
    if (current) {
        const Dim& t = current->index;
        snprintf(b.launch->message, b.launch->message_size, "%s, thread block (%u, %u, %u), thread (%u, %u, %u): %s",
                 b.kernel, b.index.x, b.index.y, b.index.z, t.x, t.y, t.z, text);
        b.failed = true;
        jump(*current, b.main, true);
    }
    abort();  // only kernels and their twins call this
}

// -- the queue ------------------------------------------------------------------------------------

static uint64_t random_number() {  // splitmix64
    uint64_t x = block->random += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static void push(Thread* thread) {
    Block& b = *block;
    thread->state = READY;
    size_t at = b.head + b.length++;
    if (at >= b.queue.size()) at -= b.queue.size();
    b.queue[at] = thread;
}

// Threads that become ready together run in the order that the launch asked for.
static void release(Thread** threads, size_t count) {
    Block& b = *block;
    if (b.launch->order == 1) {
        for (size_t i = count; i--;) push(threads[i]);
        return;
    }
    if (b.launch->order == 2)
        for (size_t i = count; i > 1; i--) std::swap(threads[i - 1], threads[random_number() % i]);
    for (size_t i = 0; i < count; i++) push(threads[i]);
}

static void describe(char* text, size_t size) {
    Block& b = *block;
    size_t used = 0;
    const auto add = [&](const char* format, auto... values) {
        if (used < size) used += (size_t)snprintf(text + used, size - used, format, values...);
    };
    text[0] = 0;
    unsigned shown = 0;
    for (unsigned i = 0; i < b.threads && shown < 6;) {
        const Thread& t = b.fibers[i];
        unsigned end = i;
        while (end + 1 < b.threads && b.fibers[end + 1].state == t.state && b.fibers[end + 1].line == t.line &&
               (t.state != AT_BARRIER || b.fibers[end + 1].barrier == t.barrier))
            end++;
        const char* slash = strrchr(t.file, '/');
        const char* file = slash ? slash + 1 : t.file;
        add(shown ? "; " : "");
        if (i == end) add("thread %u ", i);
        else add("threads %u-%u ", i, end);
        if (t.state == RETURNED) add("returned");
        else if (t.state == AT_BARRIER) add("at barrier %u, %s:%d", t.barrier, file, t.line);
        else if (t.state == IN_COLLECTIVE) add("in a warp collective, %s:%d", file, t.line);
        else add("waiting for a condition, %s:%d", file, t.line);
        shown++;
        i = end + 1;
        if (shown == 6 && i < b.threads) add("; and others");
    }
}

// Whom to run next. Nobody ready: those that wait for a condition are asked, then the hooks for idle times.
static Thread* next() {
    Block& b = *block;
    for (;;) {
        if (b.length) {
            Thread* found = b.queue[b.head];
            if (++b.head == b.queue.size()) b.head = 0;
            b.length--;
            return found;
        }
        size_t kept = 0;
        std::vector<Thread*> freed;
        for (Thread* thread : b.waiting) {
            if (thread->ready(thread->ready_argument)) freed.push_back(thread);
            else b.waiting[kept++] = thread;
        }
        b.waiting.resize(kept);
        if (!freed.empty()) {
            release(freed.data(), freed.size());
            continue;
        }
        bool moved = false;
        for (size_t i = 0; i < b.idle.size() && !moved; i++) moved = b.idle[i]();
        if (moved) continue;
        char text[900];
        describe(text, sizeof text);
        fail("no thread can go on: a barrier or a collective was not reached by all that it waits for (%s)", text);
    }
}

static void suspend(bool pausing = false) {
    Thread* self = current;
    if (!pausing) block->pauses = 0;
    Thread* to = next();
    if (to == self) return;
    current = to;
    jump(*self, *to);
}

static void begin_thread() {
#if NIBS_HOST_SANITIZED
    arrive_on(*current);
#endif
    block->body(block->arguments);
    Thread* self = current;
    Block& b = *block;
    self->state = RETURNED;
    self->line = 0;
    if (++b.returned == b.threads) {
        jump(*self, b.main, true);
    } else {
        Thread* to = next();
        current = to;
        jump(*self, *to, true);
    }
    abort();  // nobody comes back to a thread that has returned
}

static void prime(Thread& thread) {
#if NIBS_HOST_SANITIZED
    ASAN_UNPOISON_MEMORY_REGION(thread.stack, STACK);  // red zones of frames that were never left, and of what was mapped here
#endif
    memcpy(thread.stack, &CANARY, sizeof CANARY);
#if NIBS_HOST_ASSEMBLY && defined(__x86_64__)
    void** top = (void**)(thread.stack + STACK);
    *--top = nullptr;                // where begin_thread would return to
    *--top = (void*)begin_thread;    // popped by `ret`
    for (int i = 0; i < 6; i++) *--top = nullptr;
    thread.stack_pointer = top;
#elif NIBS_HOST_ASSEMBLY
    char* top = thread.stack + STACK - 160;
    memset(top, 0, 160);
    void* entry = (void*)begin_thread;
    memcpy(top + 88, &entry, sizeof entry);  // x30
    thread.stack_pointer = top;
#else
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, begin_thread, 0);
#endif
}

// -- barriers and collectives ---------------------------------------------------------------------

static void open_barrier(unsigned id) {
    Block& b = *block;
    Barrier& barrier = b.barriers[id];
    Thread* freed[LARGEST_BLOCK];
    size_t count = 0;
    for (Thread& thread : b.fibers) {
        if (thread.state != AT_BARRIER || thread.barrier != id) continue;
        thread.result = (int)barrier.ones;
        freed[count++] = &thread;
    }
    barrier.arrived = barrier.ones = 0;
    release(freed, count);
}

static void enter_barrier(unsigned id, unsigned count, bool one_site, const char* file, int line) {
    if (id >= BARRIERS) fail("barrier %u: a device has %u", id, BARRIERS);
    if (count % WARP && count != block->threads) fail("barrier %u of %u threads: not whole warps", id, count);
    Barrier& barrier = block->barriers[id];
    current->file = file;
    current->line = line;
    if (!barrier.arrived) {
        barrier.wanted = count;
        barrier.file = file;
        barrier.line = line;
    } else if (barrier.wanted != count) {
        fail("barrier %u is waited for by %u threads and now by %u", id, barrier.wanted, count);
    } else if (one_site && (barrier.line != line || strcmp(barrier.file, file))) {
        fail("divergent barrier: some threads are at %s:%d and this one at line %d", barrier.file, barrier.line, line);
    }
    barrier.arrived++;
}

// bar.sync id, count: waits for `count` threads. Returns how many came with a true predicate.
static inline int barrier(unsigned id, unsigned count, int predicate = 0, bool one_site = false,
                          const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    enter_barrier(id, count, one_site, file, line);
    Barrier& here = block->barriers[id];
    here.ones += predicate != 0;
    current->state = AT_BARRIER;
    current->barrier = id;
    if (here.arrived == here.wanted) open_barrier(id);
    suspend();
    return current->result;
}

// bar.arrive id, count: counts, and goes on.
static inline void arrive(unsigned id, unsigned count, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    enter_barrier(id, count, false, file, line);
    if (block->barriers[id].arrived == block->barriers[id].wanted) open_barrier(id);
}

// Threads `first + l` for the bits l of `mask` (all `count` of them where mask is 0) meet; the last to arrive calls
// `work(lanes)`, where lanes[l] points to what thread l brought, for all to read and write.
static void meet(unsigned first, unsigned count, unsigned mask, void* mine, void (*work)(void*, void* const*), void* with,
                 const char* file, int line) {
    Block& b = *block;
    const unsigned lane = current->number - first;
    if (lane >= count || (mask && !(mask >> lane & 1))) fail("line %d: a thread is in a collective whose mask leaves it out", line);
    if (count > 128 || first + count > b.threads) fail("line %d: a collective of threads %u-%u, of which there are %u", line, first, first + count - 1, b.threads);
    current->file = file;
    current->line = line;
    Meeting* meeting = nullptr;
    size_t at = 0;
    for (; at < b.meetings.size(); at++) {
        Meeting& one = *b.meetings[at];
        if (one.first + one.count <= first || first + count <= one.first) continue;
        if (one.first == first && one.count == count && one.mask == mask) {
            meeting = &one;
            break;
        }
        if (mask && one.mask && one.first == first && !(mask & one.mask)) continue;
        fail("divergent collective: threads of one warp are at lines %d and %d with masks %08x and %08x", one.line, line, one.mask, mask);
    }
    if (!meeting) {
        if (b.spare.empty()) b.spare.emplace_back(new Meeting);
        b.meetings.push_back(std::move(b.spare.back()));
        b.spare.pop_back();
        meeting = b.meetings.back().get();
        meeting->first = first, meeting->count = count, meeting->mask = mask, meeting->arrived = 0;
        meeting->file = file, meeting->line = line;
        memset(meeting->lanes, 0, sizeof meeting->lanes);
    } else if (meeting->line != line || strcmp(meeting->file, file)) {
        fail("divergent collective: other threads are at line %d, this one at line %d", meeting->line, line);
    }
    meeting->lanes[lane] = mine;
    meeting->arrived++;
    current->state = IN_COLLECTIVE;
    const unsigned wanted = mask ? (unsigned)__builtin_popcount(mask) : count;
    if (meeting->arrived == wanted) {
        work(with, meeting->lanes);
        Thread* freed[128];
        size_t size = 0;
        for (unsigned l = 0; l < count; l++)
            if (meeting->lanes[l]) freed[size++] = &b.fibers[first + l];
        b.spare.push_back(std::move(b.meetings[at]));
        b.meetings[at] = std::move(b.meetings.back());
        b.meetings.pop_back();
        release(freed, size);
    }
    suspend();
}

template <class Value, class Work>
static inline void together_of(unsigned first, unsigned count, Value& mine, Work work, unsigned mask = 0,
                               const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const auto call = [](void* with, void* const* lanes) {
        Value* typed[128];
        memcpy(typed, lanes, sizeof typed);
        (*(Work*)with)((Value* const*)typed);
    };
    meet(first, count, mask, &mine, call, &work, file, line);
}

// A warp collective over the lanes of `mask`.
template <class Value, class Work>
static inline void together(unsigned mask, Value& mine, Work work, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    const unsigned first = current->number / WARP * WARP;
    const unsigned count = block->threads - first < WARP ? block->threads - first : WARP;
    if (count < WARP) mask &= (1u << count) - 1;  // lanes that a small thread block has not
    together_of(first, count, mine, work, mask, file, line);
}

// Suspends this thread until `ready()` holds.
template <class Ready>
static inline void wait(Ready ready, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (ready()) return;
    current->state = WAITING;
    current->file = file;
    current->line = line;
    current->ready = [](void* argument) -> bool { return (*(Ready*)argument)(); };
    current->ready_argument = &ready;
    block->waiting.push_back(current);
    suspend();
}

// Lets somebody else run, and stays ready: for loops that try until something holds.
static inline void pause(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    Block& b = *block;
    current->file = file;
    current->line = line;
    if (++b.pauses > b.length + 1) {  // whoever can run is only trying
        bool moved = false;
        for (size_t i = 0; i < b.idle.size() && !moved; i++) moved = b.idle[i]();
        if (moved) b.pauses = 0;
        else if (b.pauses > 100000 + 100 * b.threads) fail("every thread that can run tries for ever, this one at line %d", line);
    }
    push(current);
    suspend(true);
}

static inline void on_idle(std::function<bool()> hook) { block->idle.push_back(std::move(hook)); }

// `hook()` is called when the thread block has ended well; it returns what is wrong, or null.
static inline void at_end(std::function<const char*()> hook) { block->ends.push_back(std::move(hook)); }

static inline bool latest() { return block->launch->latest != 0; }

template <class T>
static inline T& state() {
    static const char key = 0;
    for (auto& one : block->states)
        if (one.first == &key) return *(T*)one.second.get();
    block->states.emplace_back(&key, std::make_shared<T>());
    return *(T*)block->states.back().second.get();
}

// -- shared memory --------------------------------------------------------------------------------

static void fence(size_t begin, size_t size) {
    memset(block->arena + begin, FENCE, size);
#if NIBS_HOST_SANITIZED
    ASAN_POISON_MEMORY_REGION(block->arena + begin, size);
#endif
}

static void* allocate(const void* site, const char* name, size_t size, size_t alignment) {
    Block& b = *block;
    size_t begin = (b.used + RED_ZONE + alignment - 1) / alignment * alignment;
    const size_t end = (begin + size + RED_ZONE + 7) / 8 * 8;
    if (end > ARENA) fail("shared array '%s' of %zu bytes: a thread block has no more than %zu", name, size, SHARED_LIMIT);
    fence(b.used, begin - b.used);
    memset(b.arena + begin, UNWRITTEN, size);
    fence(begin + size, end - begin - size);
    b.used = end;
    b.regions.push_back({site, name, begin, size});
    size_t fixed = 0, all = 0;
    for (const Region& region : b.regions) {
        all += region.size;
        if (region.site) fixed += region.size;
    }
    if (fixed > STATIC_LIMIT) fail("%zu bytes of static shared memory: a device gives %zu; use NIBS_SHARED_DYNAMIC", fixed, STATIC_LIMIT);
    if (all > SHARED_LIMIT) fail("%zu bytes of shared memory: a device gives %zu", all, SHARED_LIMIT);
    return b.arena + begin;
}

// The array of one NIBS_SHARED: the same one for all threads of the thread block.
static inline void* shared(const void* site, const char* name, size_t size, size_t alignment) {
    for (const Region& region : block->regions)
        if (region.site == site) return block->arena + region.begin;
    return allocate(site, name, size, alignment < 16 ? 16 : alignment);
}

static inline void* dynamic_shared() { return block->arena + block->regions.front().begin; }

static inline unsigned shared_address(const void* pointer) {
    const ptrdiff_t offset = (const unsigned char*)pointer - block->arena;
    if (offset < 0 || (size_t)offset >= ARENA) fail("a pointer outside shared memory is used as a shared address");
    return (unsigned)offset;
}

static inline void* shared_pointer(unsigned address) {
    if (address >= ARENA) fail("shared address %u: beyond the end of shared memory", address);
    return block->arena + address;
}

static const char* trespass() {  // name of an array whose red zone was written to, or null
    Block& b = *block;
    size_t at = 0;
    for (size_t i = 0; i <= b.regions.size(); i++) {
        const size_t end = i < b.regions.size() ? b.regions[i].begin : b.used;
#if NIBS_HOST_SANITIZED
        ASAN_UNPOISON_MEMORY_REGION(b.arena + at, end - at);
#endif
        for (size_t k = at; k < end; k++)
            if (b.arena[k] != FENCE) {
                const bool before = i < b.regions.size() && (i == 0 || end - k <= k - at);
                return b.regions[before ? i : i - 1].name;
            }
        if (i < b.regions.size()) at = end + b.regions[i].size;
    }
    return nullptr;
}

// -- the launch -----------------------------------------------------------------------------------

// Stacks and the arena of one OS thread, kept from launch to launch.
struct Ground {
    char* stacks = nullptr;
    size_t size = 0;
    unsigned char* arena = nullptr;
    Block block;

    bool hold(size_t threads) {
        if (!arena && posix_memalign((void**)&arena, 1024, ARENA)) return false;
        if (threads * STACK <= size) return true;
        if (stacks) munmap(stacks, size);
        void* got = mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        stacks = got == MAP_FAILED ? nullptr : (char*)got;
        size = stacks ? threads * STACK : 0;
        return stacks != nullptr;
    }
    ~Ground() {
        if (stacks) munmap(stacks, size);
#if NIBS_HOST_SANITIZED
        if (arena) ASAN_UNPOISON_MEMORY_REGION(arena, ARENA);
#endif
        free(arena);
    }
};

static bool run_block(Block& b, Ground& ground) {
    const Launch& launch = *b.launch;
    b.returned = 0;
    b.head = b.length = 0;
    b.waiting.clear();
    b.regions.clear();
    b.idle.clear();
    b.ends.clear();
    b.pauses = 0;
    b.states.clear();
    for (Barrier& one : b.barriers) one = Barrier();
    while (!b.meetings.empty()) {
        b.spare.push_back(std::move(b.meetings.back()));
        b.meetings.pop_back();
    }
    b.used = 0;
    std::vector<Thread*> all(b.threads);
    for (unsigned i = 0; i < b.threads; i++) {
        Thread& thread = b.fibers[i];
        thread.index.x = i % b.size.x;
        thread.index.y = i / b.size.x % b.size.y;
        thread.index.z = i / b.size.x / b.size.y;
        thread.number = i;
        thread.lane = i % WARP;
        thread.stack = ground.stacks + (size_t)i * STACK;
        thread.line = 0;
        thread.file = "";
#if NIBS_HOST_SANITIZED
        thread.fake_stack = nullptr;
#endif
        prime(thread);
        all[i] = &thread;
    }
    release(all.data(), all.size());
    current = nullptr;
    allocate(nullptr, "dynamic shared memory", launch.dynamic, 1024);
    Thread* first = next();
    current = first;
    jump(b.main, *first);
    current = nullptr;
    const auto broken = [&](const char* what, const char* name) {
        snprintf(launch.message, launch.message_size, "%s, thread block (%u, %u, %u): %s '%s'", b.kernel, b.index.x, b.index.y, b.index.z, what, name);
        b.failed = true;
    };
    const char* name = trespass();
    if (!b.failed && name) broken("something was written just outside the shared array", name);
    for (unsigned i = 0; i < b.threads && !b.failed; i++)
        if (memcmp(b.fibers[i].stack, &CANARY, sizeof CANARY)) broken("a thread overran its stack, that of", b.kernel);
    for (size_t i = 0; i < b.ends.size() && !b.failed; i++)
        if (const char* wrong = b.ends[i]()) broken(wrong, b.kernel);
    b.states.clear();
    return !b.failed;
}

// Runs the grid. Returns 0, or 1 with a message.
static int launch(const char* kernel, unsigned bound, void (*body)(const void*), const void* arguments, const Launch* how) {
    static thread_local Ground ground;
    Block& b = ground.block;
    const size_t threads = (size_t)how->block[0] * how->block[1] * how->block[2];
    const size_t blocks = (size_t)how->grid[0] * how->grid[1] * how->grid[2];
    const auto refuse = [&](const char* what, size_t number) {
        snprintf(how->message, how->message_size, "%s: %s (%zu)", kernel, what, number);
        return 1;
    };
    if (!threads || threads > LARGEST_BLOCK) return refuse("a thread block has 1 to 1024 threads", threads);
    if (threads > bound) return refuse("more threads than NIBS_KERNEL declares", threads);
    if (how->grid[1] > 65535 || how->grid[2] > 65535 || how->grid[0] > 0x7fffffffu) return refuse("the grid is larger than a device takes", blocks);
    if (how->dynamic > SHARED_LIMIT) return refuse("more dynamic shared memory than a device has", how->dynamic);
    if (!ground.hold(threads)) return refuse("no memory for the threads' stacks", threads);
    b.launch = how;
    b.kernel = kernel;
    b.body = body;
    b.arguments = arguments;
    b.size = {how->block[0], how->block[1], how->block[2]};
    b.grid = {how->grid[0], how->grid[1], how->grid[2]};
    b.threads = (unsigned)threads;
    b.fibers.resize(threads);
    b.queue.resize(threads);
    b.arena = ground.arena;
    b.random = how->seed;
    b.failed = false;
#if NIBS_HOST_SANITIZED
    b.main_stack = nullptr;
#endif
    block = &b;
    std::vector<size_t> order(blocks);
    for (size_t i = 0; i < blocks; i++) order[i] = how->order == 1 ? blocks - 1 - i : i;
    if (how->order == 2)
        for (size_t i = blocks; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
    for (size_t number : order) {
        b.index = {(unsigned)(number % b.grid.x), (unsigned)(number / b.grid.x % b.grid.y), (unsigned)(number / b.grid.x / b.grid.y)};
        if (!run_block(b, ground)) break;
    }
    block = nullptr;
    return b.failed ? 1 : 0;
}

}  // namespace nibs_host

// -- the words of CUDA ------------------------------------------------------------------------------

#define NIBS_DEVICE inline __attribute__((always_inline))
#define NIBS_KERNEL(name, Args, threads)                                                                          \
    static void name(const Args& args);                                                                           \
    extern "C" __attribute__((visibility("default"))) int nibs_launch_##name(const void* args, size_t size,       \
                                                                             const nibs_host::Launch* how) {      \
        if (size != sizeof(Args)) {                                                                               \
            snprintf(how->message, how->message_size, #name ": the arguments have %zu bytes here and %zu there", \
                     sizeof(Args), size);                                                                         \
            return 1;                                                                                             \
        }                                                                                                         \
        return nibs_host::launch(#name, threads, [](const void* given) { name(*(const Args*)given); }, args, how); \
    }                                                                                                             \
    static void name(const Args& args)
#define NIBS_SHARED(T, name, count) \
    static const char name##_site = 0; \
    T* name = (T*)nibs_host::shared(&name##_site, #name, sizeof(T) * (count), alignof(T))
#define NIBS_SHARED_2D(T, name, rows, columns) \
    static const char name##_site = 0; \
    T(*name)[columns] = (T(*)[columns])nibs_host::shared(&name##_site, #name, sizeof(T) * (rows) * (columns), alignof(T))
#define NIBS_SHARED_DYNAMIC(T, name) T* name = (T*)nibs_host::dynamic_shared()
#if defined(__clang__)
#define NIBS_UNROLL _Pragma("unroll")
#else
#define NIBS_UNROLL _Pragma("GCC unroll 16")
#endif

#define threadIdx (nibs_host::current->index)
#define blockIdx (nibs_host::block->index)
#define blockDim (nibs_host::block->size)
#define gridDim (nibs_host::block->grid)
#define warpSize 32
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) alignas(bytes)
#ifndef __restrict__
#define __restrict__ __restrict
#endif

#define NIBS_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(NIBS_HOST_SITE) { nibs_host::barrier(0, nibs_host::block->threads, 0, true, file, line); }
static inline int __syncthreads_count(int predicate, NIBS_HOST_SITE) {
    return nibs_host::barrier(0, nibs_host::block->threads, predicate, true, file, line);
}
static inline int __syncthreads_or(int predicate, NIBS_HOST_SITE) { return __syncthreads_count(predicate, file, line) > 0; }
static inline int __syncthreads_and(int predicate, NIBS_HOST_SITE) {
    return __syncthreads_count(predicate, file, line) == (int)nibs_host::block->threads;
}
static inline void __syncwarp(unsigned mask = 0xffffffffu, NIBS_HOST_SITE) {
    char nothing = 0;
    nibs_host::together(mask, nothing, [](char* const*) {}, file, line);
}

namespace nibs_host {

// Each lane gets `value` of lane `source`; a source that is not in the mask, or not in the segment, gives its own.
template <class T>
static inline T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
    struct Lane {
        T in, out;
        unsigned source;
    } mine = {value, value, source};
    together(
        mask, mine,
        [](Lane* const* lanes) {
            for (unsigned l = 0; l < WARP; l++)
                if (lanes[l] && lanes[lanes[l]->source & 31]) lanes[l]->out = lanes[lanes[l]->source & 31]->in;
        },
        file, line);
    return mine.out;
}

static inline unsigned vote(unsigned mask, int predicate, const char* file, int line) {
    struct Lane {
        int in;
        unsigned out;
    } mine = {predicate, 0};
    together(
        mask, mine,
        [](Lane* const* lanes) {
            unsigned bits = 0;
            for (unsigned l = 0; l < WARP; l++)
                if (lanes[l] && lanes[l]->in) bits |= 1u << l;
            for (unsigned l = 0; l < WARP; l++)
                if (lanes[l]) lanes[l]->out = bits;
        },
        file, line);
    return mine.out;
}

}  // namespace nibs_host

template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, NIBS_HOST_SITE) {
    const unsigned lane = nibs_host::current->lane;
    return nibs_host::shuffle(mask, value, (lane & ~(unsigned)(width - 1)) | ((unsigned)source & (unsigned)(width - 1)), file, line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, NIBS_HOST_SITE) {
    const unsigned lane = nibs_host::current->lane, other = lane ^ (unsigned)with;
    const bool beyond = (other & ~(unsigned)(width - 1)) > (lane & ~(unsigned)(width - 1));
    return nibs_host::shuffle(mask, value, beyond ? lane : other, file, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, NIBS_HOST_SITE) {
    const unsigned lane = nibs_host::current->lane, place = lane & (unsigned)(width - 1);
    return nibs_host::shuffle(mask, value, place < by ? lane : lane - by, file, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, NIBS_HOST_SITE) {
    const unsigned lane = nibs_host::current->lane, place = lane & (unsigned)(width - 1);
    return nibs_host::shuffle(mask, value, place + by < (unsigned)width ? lane + by : lane, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, NIBS_HOST_SITE) { return nibs_host::vote(mask, predicate, file, line); }
static inline int __any_sync(unsigned mask, int predicate, NIBS_HOST_SITE) { return nibs_host::vote(mask, predicate, file, line) != 0; }
static inline int __all_sync(unsigned mask, int predicate, NIBS_HOST_SITE) { return nibs_host::vote(mask, !predicate, file, line) == 0; }

static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __threadfence_system() {}
[[noreturn]] static inline void __trap() { nibs_host::fail("__trap()"); }

template <class T>
static inline T atomicAdd(T* at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}
template <class T>
static inline T atomicMax(T* at, T value) {
    const T old = *at;
    if (value > old) *at = value;
    return old;
}

namespace nibs_host {
template <class To, class From>
static inline To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
    To to;
    memcpy(&to, &value, sizeof to);
    return to;
}
}  // namespace nibs_host

static inline float __int_as_float(int bits) { return nibs_host::bits_of<float>(bits); }
static inline float __uint_as_float(unsigned bits) { return nibs_host::bits_of<float>(bits); }
static inline int __float_as_int(float value) { return nibs_host::bits_of<int>(value); }
static inline unsigned __float_as_uint(float value) { return nibs_host::bits_of<unsigned>(value); }
static inline double __longlong_as_double(long long bits) { return nibs_host::bits_of<double>(bits); }
static inline long long __double_as_longlong(double value) { return nibs_host::bits_of<long long>(value); }
static inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
static inline int __ffs(int bits) { return __builtin_ffs(bits); }
static inline int __clz(int bits) { return bits ? __builtin_clz((unsigned)bits) : 32; }
static inline unsigned __cvta_generic_to_shared(const void* pointer) { return nibs_host::shared_address(pointer); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
template <class T>
static inline T __ldg(const T* at) {
    return *at;
}
template <class T>
static inline T min(T a, T b) {
    return a < b ? a : b;
}
template <class T>
static inline T max(T a, T b) {
    return a > b ? a : b;
}
// The C library declares functions of these names, so they are macros.
#define __expf(a) expf(a)
#define __logf(a) logf(a)
#define __log2f(a) log2f(a)

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
