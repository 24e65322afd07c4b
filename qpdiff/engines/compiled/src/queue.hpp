// The queue of a call from Python: threads claim work items, ranges of problems, as long as there are any. The calling
// thread is one of them; it also reports progress and checks for Ctrl-C. The interpreter's lock is held only for these
// two.
#pragma once
#include <Python.h>
#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "linalg/numbers.hpp"

namespace qpdiff {

class Queue {
  public:
    // `unit`: the number of problems that the size of a work item is a multiple of, but for the last one.
    Queue(Index count, Index unit, int workers, PyObject* progress)
        : count(count), unit(unit), workers(workers), progress(progress == Py_None ? nullptr : progress) {}

    // Claim the next work item; return false where there is none. Neighbouring problems share cache lines, so an item
    // is large, but the last ones are small, so that no thread waits for another.
    bool claim(Index& first, Index& last) {
        first = next.load(std::memory_order_relaxed);
        do {
            Index share = workers > 1 ? (count - first + 2 * workers - 1) / (2 * workers) : count - first;
            last = std::min(count, first + (share + unit - 1) / unit * unit);
        } while (first < count && !next.compare_exchange_weak(first, last, std::memory_order_relaxed));
        return first < count && !stop.load(std::memory_order_relaxed);
    }

    // Return whether to give up; called in every iteration of a problem.
    bool interrupted(bool calling) {
        // Once stopped a Python error may be set, with which nothing else of Python must be called.
        if (calling && !stop.load(std::memory_order_relaxed) && due(POLL, polled)) {
            attend();
        }
        return stop.load(std::memory_order_relaxed);
    }

    // Count problems that are solved, for `progress`.
    void finish(Index problems) { done.fetch_add(problems, std::memory_order_relaxed); }

    // End the call, as an operand breaks a rule.
    void refuse() { stop = true; }

    // Call work(worker, whether this is the calling thread) on all threads, without the interpreter's lock; return
    // whether nothing was refused. Return false with a Python error set, if `progress` or a signal handler raised one.
    // make(whether it is for the calling thread) returns a pointer to a worker and may throw; work must not, nor
    // allocate memory: glibc ends the process where there is none for the variables that a thread's first exception
    // takes. So these of the calling thread are made first, and the other threads' workers before they start.
    template <class Make, class Work> bool run(Make make, Work work) {
        asm volatile("" : : "r"(abi::__cxa_get_globals())); // it is declared to have no effect
        std::vector<std::thread> threads;
        threads.reserve(std::max(workers, 1) - 1); // with the lock, as it may throw
        auto own = make(true);
        PyThreadState* state = PyEval_SaveThread();
        polled = reported = Clock::now();
        try {
            std::lock_guard<std::mutex> lock(mutex);
            for (int i = 1; i < workers; i++) {
                threads.emplace_back([&, worker = make(false)] {
                    work(*worker, false);
                    std::lock_guard<std::mutex> lock(mutex);
                    running--;
                    ended.notify_one();
                });
                running++;
            }
        } catch (const std::exception&) { // no more threads, or no memory for one: solve with fewer
        }
        work(*own, true);
        for (std::unique_lock<std::mutex> lock(mutex); running > 0;) {
            ended.wait_for(lock, POLL);
            lock.unlock();
            interrupted(true);
            lock.lock();
        }
        for (auto& thread : threads) {
            thread.join();
        }
        PyEval_RestoreThread(state);
        if (!stop && progress && reports < count) {
            report(count);
        }
        return !stop;
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds POLL{50};
    static constexpr std::chrono::milliseconds REPORT{200};

    const Index count, unit;
    const int workers;
    PyObject* const progress;
    std::atomic<Index> next{0}, done{0};
    std::atomic<bool> stop{false};
    Clock::time_point polled, reported;
    Index reports = 0;
    int running = 0;
    std::mutex mutex;
    std::condition_variable ended;

    // Return whether an interval has passed since `last`, which then becomes the present.
    static bool due(std::chrono::milliseconds interval, Clock::time_point& last) {
        auto now = Clock::now();
        if (now - last < interval) {
            return false;
        }
        last = now;
        return true;
    }

    // Check for Ctrl-C, and report progress where there is some; on the calling thread.
    void attend() {
        PyGILState_STATE state = PyGILState_Ensure();
        Index so_far = done;
        if (PyErr_CheckSignals() != 0) {
            stop = true;
        } else if (progress && so_far > reports && so_far < count && due(REPORT, reported)) {
            report(so_far);
        }
        PyGILState_Release(state);
    }

    void report(Index so_far) {
        reports = so_far;
        PyObject* result = PyObject_CallFunction(progress, "nn", so_far, count);
        if (!result) {
            stop = true;
        }
        Py_XDECREF(result);
    }
};

} // namespace qpdiff
