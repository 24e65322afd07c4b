// A block of GPU threads, emulated on one thread of the CPU: each thread of the block is a fiber, which runs until it
// has to wait at a barrier. The order in which they run is the caller's choice. Results that depend on it, threads that
// meet at different barriers, and shared memory that is read before it is written (it starts as NaN) show a fault of
// the kernel that a GPU would show now and then.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "linalg/block.hpp"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace qpdiff::emulation {

using block::WARP;
constexpr std::size_t STACK = 256 * 1024; // bytes of a fiber's stack

inline int thread = 0, threads = 1, problem = 0, blocks = 1; // of the fiber that runs

// The orders in which the threads of a block run between two barriers; from `SHUFFLED` on, each number is one by
// chance.
enum Order { FORWARD, BACKWARD, WARP_AHEAD, SHUFFLED };

#if defined(__x86_64__)
// Save the registers that a call preserves on the stack, store the stack pointer, and go on with another stack.
extern "C" void qp_switch_stack(void** from, void* to);
asm(R"(
.text
.weak qp_switch_stack
qp_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#endif

// A stack with the place where its function goes on.
class Context {
  public:
    // Let `switch_to` begin to run a function that never returns.
    void prepare(void (*function)()) {
        if (stack.empty()) {
            stack.resize(STACK);
        }
#if defined(__x86_64__)
        void** top = reinterpret_cast<void**>(reinterpret_cast<std::uintptr_t>(stack.data() + STACK) / 64 * 64);
        *--top = nullptr; // the stack is then aligned as after a call
        *--top = reinterpret_cast<void*>(function);
        for (int i = 0; i < 6; i++) {
            *--top = nullptr;
        }
        place = top;
#else
        getcontext(&place);
        place.uc_stack.ss_sp = stack.data();
        place.uc_stack.ss_size = STACK;
        place.uc_link = nullptr;
        makecontext(&place, function, 0);
#endif
    }
    // Go on with another context, until that one switches back.
    void switch_to(Context& other) {
#if defined(__x86_64__)
        qp_switch_stack(&place, other.place);
#else
        swapcontext(&place, &other.place);
#endif
    }

  private:
    std::vector<char> stack;
#if defined(__x86_64__)
    void* place = nullptr;
#else
    ucontext_t place;
#endif
};

// Runs the threads of one block after the other.
class Scheduler {
  public:
    // Run a function once for each thread of a block.
    void run(int count, int order, void (*function)(const void*), const void* arguments) {
        threads = count, warp_ahead = order == WARP_AHEAD;
        body = function, of_body = arguments;
        fibers.resize(count);
        exchanged.resize(count);
        place_of_turn(order);
        for (Fiber& fiber : fibers) {
            fiber.waits = NOWHERE;
            fiber.context.prepare(&Scheduler::enter);
        }
        for (int turn = -1; (turn = next(turn)) >= 0;) {
            thread = sequence[turn];
            home.switch_to(fibers[thread].context);
        }
    }

    // Let the running thread wait for all threads of its warp, or of the block.
    void wait_for_warp(const char* function, int line) { wait(IN_WARP, function, line); }
    void wait_for_block(const char* function, int line) { wait(IN_BLOCK, function, line); }

    // Return the value that a thread of the same warp passes.
    double exchange(double value, int other, const char* function, int line) {
        exchanged[thread] = value;
        wait(IN_WARP, function, line);
        double result = exchanged[other];
        wait(IN_WARP, function, line);
        return result;
    }

  private:
    enum Waits { NOWHERE, IN_WARP, IN_BLOCK, ENDED };
    struct Fiber {
        Context context;
        Waits waits;
        const char* function;
        int line;
    };
    std::vector<Fiber> fibers;
    std::vector<double> exchanged;
    std::vector<int> sequence; // the threads in the order in which they run
    bool warp_ahead = false;
    void (*body)(const void*) = nullptr;
    const void* of_body = nullptr;
    Context home;

    static void enter();

    void place_of_turn(int order) {
        sequence.resize(threads);
        for (int i = 0; i < threads; i++) {
            sequence[i] = order == BACKWARD ? threads - 1 - i : i;
        }
        std::uint64_t random = order;
        for (int i = threads - 1; i > 0 && order >= SHUFFLED; i--) {
            random = random * 6364136223846793005ull + 1442695040888963407ull;
            std::swap(sequence[i], sequence[(random >> 33) % (i + 1)]);
        }
    }

    void wait(Waits where, const char* function, int line) {
        Fiber& fiber = fibers[thread];
        fiber.waits = where, fiber.function = function, fiber.line = line;
        fiber.context.switch_to(home);
    }

    // Return the turn of the next thread that can run, or −1 where all have ended.
    int next(int turn) {
        for (int attempt = 0; attempt < 2; attempt++) {
            for (int k = 0; k < threads; k++) {
                int candidate = warp_ahead ? k : (turn + 1 + k) % threads;
                if (can_run(sequence[candidate])) {
                    return candidate;
                }
            }
            if (!release(0, threads, IN_BLOCK)) {
                return -1;
            }
        }
        return -1;
    }

    bool can_run(int number) {
        if (fibers[number].waits == IN_WARP) {
            int first = number / WARP * WARP, last = std::min(first + WARP, threads);
            bool together = std::all_of(fibers.begin() + first, fibers.begin() + last,
                                        [](const Fiber& fiber) { return fiber.waits == IN_WARP; });
            if (together) {
                release(first, last, IN_WARP);
            }
        }
        return fibers[number].waits == NOWHERE;
    }

    // Let threads go on that all wait at the same barrier; return false where all have ended.
    bool release(int first, int last, Waits where) {
        const Fiber& one = fibers[first];
        for (int i = first; i < last; i++) {
            const Fiber& other = fibers[i];
            bool same = other.waits == one.waits &&
                        (one.waits == ENDED || (other.function == one.function && other.line == one.line));
            if (!same || (one.waits != where && one.waits != ENDED)) {
                report(first, one);
                report(i, other);
                std::abort();
            }
        }
        if (one.waits == ENDED) {
            return false;
        }
        std::for_each(fibers.begin() + first, fibers.begin() + last, [](Fiber& fiber) { fiber.waits = NOWHERE; });
        return true;
    }

    static void report(int number, const Fiber& fiber) {
        const char* kind = fiber.waits == IN_WARP ? "waits for its warp" : "waits for its block";
        std::fprintf(stderr, "thread %d %s, line %d of %s\n", number, fiber.waits == ENDED ? "has ended" : kind,
                     fiber.line, fiber.function);
    }
};

inline Scheduler scheduler;

inline void Scheduler::enter() {
    scheduler.body(scheduler.of_body);
    scheduler.wait(ENDED, "", 0);
    std::abort();
}

// Run a kernel: a function once for each thread of each block.
inline void launch(int count, int size, std::size_t shared_bytes, int order, void (*function)(const void*),
                   const void* arguments) {
    std::vector<double> memory((shared_bytes + sizeof(double) - 1) / sizeof(double));
    block::shared_memory = memory.data();
    blocks = count;
    for (problem = 0; problem < count; problem++) {
        std::fill(memory.begin(), memory.end(), NOT_A_NUMBER);
        scheduler.run(size, order, function, arguments);
    }
}

} // namespace qpdiff::emulation

namespace qpdiff::block {

double* shared_memory = nullptr;
int thread() {
    return emulation::thread;
}
int threads() {
    return emulation::threads;
}
int first_problem() {
    return emulation::problem;
}
int blocks() {
    return emulation::blocks;
}
void wait_for_block(const char* function, int line) {
    emulation::scheduler.wait_for_block(function, line);
}
void wait_for_warp(const char* function, int line) {
    emulation::scheduler.wait_for_warp(function, line);
}
double exchange(double value, int other, const char* function, int line) {
    return emulation::scheduler.exchange(value, other, function, line);
}

} // namespace qpdiff::block
