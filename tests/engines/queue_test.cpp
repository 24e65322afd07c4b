// The queue of the compiled engine where memory is short; tests/test_threads.py loads it into Python and calls it.
#include "queue.hpp"

#include <cstdlib>
#include <memory>
#include <new>

namespace {

std::atomic<bool> short_of_memory{false};
std::atomic<int> allocations{0}; // that still succeed then

} // namespace

void* operator new(std::size_t size) {
    if (short_of_memory && allocations.fetch_sub(1) <= 0) {
        throw std::bad_alloc();
    }
    void* memory = std::malloc(size);
    return memory ? memory : throw std::bad_alloc();
}
void operator delete(void* memory) noexcept {
    std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
    std::free(memory);
}

// Return how many problems the threads claim where so many allocations succeed; -1 where std::bad_alloc is thrown, and
// -2 where it is without the interpreter's lock.
extern "C" int claimed(int count, int workers, int so_many) {
    qpdiff::Queue queue(count, 1, workers, Py_None);
    std::atomic<int> problems{0};
    allocations = so_many, short_of_memory = true;
    try {
        auto make = [](bool) { return std::make_unique<int>(); };
        queue.run(make, [&](int&, bool) {
            for (qpdiff::Index first, last; queue.claim(first, last);) {
                problems += int(last - first);
            }
        });
    } catch (const std::bad_alloc&) {
        problems = PyGILState_Check() ? -1 : -2;
    }
    short_of_memory = false;
    return problems;
}
