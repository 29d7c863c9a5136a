// Stands in for CUDA's words, so that a compiler for the CPU makes loops of kernels in which no thread waits for another one.
#pragma once
#include <stdint.h>

#include <functional>
#include <thread>
#include <vector>

#define __device__
#define __global__

typedef void *cudaStream_t;
struct Dimension {
  unsigned x;
};
static thread_local Dimension blockIdx, threadIdx;
static const Dimension blockDim = {64};

// How launches take their threads: in what order; how many at a time, each begun in the middle of the last; on how many of the CPU's.
enum { FORWARD, BACKWARD, SCATTERED };
static int launch_order = FORWARD, launch_depth = 1, launch_threads = 1;
extern "C" void cuda_on_cpu(int order, int depth, int threads) { launch_order = order, launch_depth = depth, launch_threads = threads; }

struct Loop {
  std::function<void()> kernel;
  int64_t next, count;
  int depth = 0;

  // Runs the next thread to its end.
  void step() {
    const int64_t n = next, prime = count % 7919 ? 7919 : 7907; // does not divide the count: each thread comes once
    const int64_t i = launch_order == FORWARD ? n : launch_order == BACKWARD ? count - 1 - n : n * prime % count;
    const Dimension block = blockIdx, thread = threadIdx;
    next += launch_threads, depth++;
    blockIdx.x = (unsigned)(i / blockDim.x), threadIdx.x = (unsigned)(i % blockDim.x);
    kernel();
    blockIdx = block, threadIdx = thread, depth--;
  }
};
static thread_local Loop *loop = nullptr;

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t wanted, cudaStream_t, Arguments... arguments) {
  const int64_t count = (wanted + blockDim.x - 1) / blockDim.x * blockDim.x; // whole blocks
  const auto work = [=](int64_t first) {
    Loop own = {[=] { kernel(arguments...); }, first, count};
    loop = &own;
    while (own.next < count) own.step();
    loop = nullptr;
  };
  std::vector<std::thread> others;
  for (int first = 1; first < launch_threads; first++) others.emplace_back(work, first);
  work(0);
  for (auto &other : others) other.join();
  return 0;
}

static inline int cudaSetDevice(int) { return 0; }

template <typename T> T look(const T *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
template <typename T> void put(T *p, T value) { __atomic_store_n(p, value, __ATOMIC_RELAXED); }

static inline int32_t atomicMin(int32_t *p, int32_t value) {
  if (loop->next < loop->count && loop->depth < launch_depth) loop->step(); // another thread comes between what was read and this
  int32_t old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
