// Runs the text of CUDA kernels on a CPU. Blocks run one after another; each thread of a block is a fiber, which gives
// way at every barrier and now and then before an atomic. Which goes on is drawn by lot, so that a missing barrier
// shows. Barriers that not all threads reach end the program.
#pragma once

#include <cuda_bf16.h>
#include <math_constants.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace fibers {

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 17);
  State state;
};

static std::vector<Fiber> threads;
static ucontext_t scheduler;
static std::function<void()> kernel;
static std::mt19937 lots(0);
static int votes, result;         // of __syncthreads_or
static uint64_t exchanged[1024];  // of __shfl_xor_sync

static void body() {
  kernel();
  threads[threadIdx.x].state = State::done;
}

static void give_way(State state) {
  const unsigned own = threadIdx.x;
  threads[own].state = state;
  swapcontext(&threads[own].context, &scheduler);
}

// Lets the threads [first, end) go on if all of them stand at the barrier.
static bool release(unsigned first, unsigned end, State barrier) {
  for (unsigned i = first; i < end; ++i)
    if (threads[i].state != barrier) return false;
  for (unsigned i = first; i < end; ++i) threads[i].state = State::ready;
  return true;
}

static void run_block() {
  for (unsigned i = 0; i < blockDim.x; ++i) {
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = threads[i].stack.data();
    threads[i].context.uc_stack.ss_size = threads[i].stack.size();
    threads[i].context.uc_link = &scheduler;
    threads[i].state = State::ready;
    makecontext(&threads[i].context, body, 0);
  }
  std::vector<unsigned> ready;
  for (;;) {
    ready.clear();
    bool done = true;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      if (threads[i].state == State::ready) ready.push_back(i);
      done &= threads[i].state == State::done;
    }
    if (done) return;
    std::shuffle(ready.begin(), ready.end(), lots);
    for (const unsigned i : ready) {
      threadIdx.x = i;
      swapcontext(&scheduler, &threads[i].context);
    }
    bool released = false;
    for (unsigned i = 0; i < blockDim.x; i += 32) released |= release(i, std::min(i + 32, blockDim.x), State::at_warp);
    if (release(0, blockDim.x, State::at_block)) result = votes, votes = 0, released = true;
    if (ready.empty() && !released) std::fputs("barriers do not meet\n", stderr), std::abort();
  }
}

template <class Kernel>
void launch(int64_t blocks, int size, const Kernel& work) {
  threads.resize(static_cast<size_t>(size));
  kernel = work;
  blockDim.x = static_cast<unsigned>(size), gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    run_block();
  }
}

static void maybe_give_way() {
  if (lots() % 8 == 0) give_way(State::ready);
}

}  // namespace fibers

static void __syncthreads() { fibers::give_way(fibers::State::at_block); }
static void __syncwarp() { fibers::give_way(fibers::State::at_warp); }
static int __syncthreads_or(int vote) {
  fibers::votes |= vote;
  __syncthreads();
  return fibers::result;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  std::memcpy(&fibers::exchanged[threadIdx.x], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, &fibers::exchanged[threadIdx.x ^ static_cast<unsigned>(lanes)], sizeof(T));
  __syncwarp();
  return value;
}

template <class T, class U>
T atomicAdd(T* at, U value) {
  fibers::maybe_give_way();
  const T before = *at;
  *at += static_cast<T>(value);
  return before;
}

template <class T>
T atomicMax(T* at, T value) {
  fibers::maybe_give_way();
  const T before = *at;
  *at = std::max(before, value);
  return before;
}

template <class To, class From>
To bits_as(From x) {
  To to;
  std::memcpy(&to, &x, sizeof(To));
  return to;
}
static unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static float __uint_as_float(unsigned x) { return bits_as<float>(x); }
static long long __double_as_longlong(double x) { return bits_as<long long>(x); }
static double __longlong_as_double(long long x) { return bits_as<double>(x); }

using std::fma, std::fmax, std::isnan, std::max, std::min;
