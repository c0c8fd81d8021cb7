// CUDA's device language on a CPU, for tests: blocks one after the other, the threads of a block as
// fibres on one CPU thread, switched at barriers and at what a warp does together. It shows the
// arithmetic of a kernel's text: not its speed, nor what a GPU's memory does with threads that run
// at once.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include <tvm/ffi/c_api.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)

using uchar = unsigned char;

struct dim3 {
  int x = 1, y = 1, z = 1;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr int warp_size = 32, most_threads = 1024, stack_bytes = 256 * 1024;

struct Fibre {
  ucontext_t context;
  dim3 place;
  bool finished;
};
static Fibre fibres[most_threads];
static ucontext_t scheduler;
static int threads, current;
static bool progressed;
static void (*body)(void);

// Threads that met at a barrier, of a block or of each warp.
struct Barrier {
  int arrived = 0, generation = 0;
};
static Barrier block_barrier, warp_barriers[most_threads / warp_size];
static uint32_t deposits[most_threads][8];

[[noreturn]] inline void fail(const char* problem) {
  throw problem;
}

// Other threads run meanwhile: nothing in memory may be taken for unchanged.
[[gnu::noinline]] inline void let_others_run() {
  swapcontext(&fibres[current].context, &scheduler);
  asm volatile("" ::: "memory");
}

inline void wait(Barrier& barrier, int expected) {
  int generation = barrier.generation;
  progressed = true;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) let_others_run();
}

inline void wait_for_warp() { wait(warp_barriers[current / warp_size], warp_size); }

inline int lane() { return current % warp_size; }

inline const uint32_t* deposit_of(int other) {
  return deposits[current / warp_size * warp_size + other];
}

// Every lane's words become readable to all lanes of its warp, until `read` returns.
template <typename Read>
inline void exchange(std::initializer_list<uint32_t> words, Read read) {
  std::memcpy(deposits[current], words.begin(), words.size() * sizeof(uint32_t));
  wait_for_warp();
  read();
  wait_for_warp();
}

inline void run_fibre() {
  body();
  fibres[current].finished = true;
  progressed = true;
  let_others_run();
}

inline char* stacks() {
  static char* memory = static_cast<char*>(
      mmap(nullptr, size_t(most_threads) * stack_bytes, PROT_READ | PROT_WRITE,
           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

// Threads take their turns in rising or in falling order: a missing barrier shows in one of them.
inline void run_block(bool falling) {
  block_barrier = Barrier();
  for (Barrier& barrier : warp_barriers) barrier = Barrier();
  for (int t = 0; t < threads; ++t) {
    Fibre& fibre = fibres[t];
    fibre.finished = false;
    fibre.place = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = stacks() + size_t(t) * stack_bytes;
    fibre.context.uc_stack.ss_size = stack_bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, run_fibre, 0);
  }
  for (int left = threads; left > 0;) {
    progressed = false;
    left = 0;
    for (int turn = 0; turn < threads; ++turn) {
      current = falling ? threads - 1 - turn : turn;
      if (fibres[current].finished) continue;
      threadIdx = fibres[current].place;
      swapcontext(&scheduler, &fibres[current].context);
      left += !fibres[current].finished;
    }
    if (left > 0 && !progressed) fail("threads wait at a barrier that others never reach");
  }
}

static sigjmp_buf after_fault;
inline void on_fault(int) { siglongjmp(after_fault, 1); }

template <typename P>
P argument(const TVMFFIAny& value) {
  if constexpr (std::is_pointer_v<P>) return static_cast<P>(value.v_ptr);
  else if constexpr (std::is_integral_v<P>) return static_cast<P>(value.v_int64);
  else return static_cast<P>(value.v_float64);
}

inline int extent(const TVMFFIAny& value) {
  // A GPU refuses a grid without blocks.
  if (value.v_int64 < 1) fail("a launch without threads");
  return static_cast<int>(value.v_int64);
}

// Calls a kernel as TVM's host code launches it: its arguments, then the extent of each axis.
template <typename... P>
int launch(void (*kernel)(P...), const TVMFFIAny* values, std::initializer_list<int dim3::*> axes,
           std::initializer_list<int> of_block) {
  static void (*chosen)(P...);
  static const TVMFFIAny* given;
  chosen = kernel;
  given = values;
  body = [] {
    [&]<size_t... I>(std::index_sequence<I...>) {
      chosen(argument<P>(given[I])...);
    }(std::index_sequence_for<P...>());
  };
  struct sigaction faulty = {}, before_segv, before_bus;
  faulty.sa_handler = on_fault;
  faulty.sa_flags = SA_NODEFER;
  sigaction(SIGSEGV, &faulty, &before_segv);
  sigaction(SIGBUS, &faulty, &before_bus);
  const char* problem = nullptr;
  if (sigsetjmp(after_fault, 1)) {
    problem = "an access outside of the operands";
  } else {
    try {
      gridDim = blockDim = dim3();
      const TVMFFIAny* next = values + sizeof...(P);
      auto in_block = of_block.begin();
      for (int dim3::*axis : axes) {
        dim3& extents = *in_block++ ? blockDim : gridDim;
        extents.*axis = extent(*next++);
      }
      threads = blockDim.x * blockDim.y * blockDim.z;
      if (threads > most_threads) fail("too many threads");
      bool falling = false;
      for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
          for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x, falling = !falling)
            run_block(falling);
    } catch (const char* found) {
      problem = found;
    }
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  if (problem == nullptr) return 0;
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", problem);
  return -1;
}

// One sum is rounded once, towards zero, as tensor cores were seen to do.
inline float towards_zero(double exact) {
  float rounded = static_cast<float>(exact);
  return std::fabs(rounded) > std::fabs(exact) ? std::nextafterf(rounded, 0.0f) : rounded;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline int byte_of(uint32_t word, int place) { return static_cast<int8_t>(word >> 8 * place); }

inline float bf16_of(uint32_t word, int place) {
  return float_of(place ? word & 0xffff0000u : word << 16);
}

// Where the PTX manual puts an operand's elements: words of `per_word` inputs; lane 4·g + t holds
// rows (columns of the right one) g and g + 8, and of each the words t and t + 4.
struct Place {
  int lane, word, in_word;
};
inline Place left_place(int row, int k, int per_word) {
  int word = k / per_word;
  return {row % 8 * 4 + word % 4, row / 8 + 2 * (word / 4), k % per_word};
}
inline Place right_place(int column, int k, int per_word) {
  int word = k / per_word;
  return {column * 4 + word % 4, word / 4, k % per_word};
}

}  // namespace emulated

// What the asm statements of TVM's text are called after their instruction.
inline void ptx_mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(
    uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t a2,
    uint32_t a3, uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  using namespace emulated;
  uint32_t sums[4] = {c0, c1, c2, c3};
  exchange({a0, a1, a2, a3, b0, b1}, [&] {
    for (int i = 0; i < 4; ++i) {
      int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 32; ++k) {
        Place a = left_place(row, k, 4), b = right_place(column, k, 4);
        sums[i] += byte_of(deposit_of(a.lane)[a.word], a.in_word) *
                   byte_of(deposit_of(b.lane)[4 + b.word], b.in_word);
      }
    }
  });
  d0 = sums[0], d1 = sums[1], d2 = sums[2], d3 = sums[3];
}

inline void ptx_mma_sync_aligned_m8n8k16_row_col_s32_s8_s8_s32(uint32_t& d0, uint32_t& d1,
                                                               uint32_t a0, uint32_t b0,
                                                               uint32_t c0, uint32_t c1) {
  using namespace emulated;
  uint32_t sums[2] = {c0, c1};
  exchange({a0, b0}, [&] {
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 16; ++k) {
        Place a = left_place(lane() / 4, k, 4), b = right_place(lane() % 4 * 2 + i, k, 4);
        sums[i] += byte_of(deposit_of(a.lane)[0], a.in_word) *
                   byte_of(deposit_of(b.lane)[1], b.in_word);
      }
  });
  d0 = sums[0], d1 = sums[1];
}

inline void ptx_mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
    uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
  using namespace emulated;
  double sums[4] = {c0, c1, c2, c3};
  exchange({a0, a1, a2, a3, b0, b1}, [&] {
    for (int i = 0; i < 4; ++i) {
      int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) {
        Place a = left_place(row, k, 2), b = right_place(column, k, 2);
        sums[i] += double(bf16_of(deposit_of(a.lane)[a.word], a.in_word)) *
                   bf16_of(deposit_of(b.lane)[4 + b.word], b.in_word);
      }
    }
  });
  d0 = towards_zero(sums[0]), d1 = towards_zero(sums[1]);
  d2 = towards_zero(sums[2]), d3 = towards_zero(sums[3]);
}

struct nv_bfloat16 {
  uint16_t bits;
  explicit nv_bfloat16(float value) {
    uint32_t word = emulated::bits_of(value);
    bits = (word + 0x7fff + (word >> 16 & 1)) >> 16;
  }
};

inline void ptx_cvt_rn_bf16x2_f32(uint32_t& d, float high, float low) {
  d = uint32_t(nv_bfloat16(high).bits) << 16 | nv_bfloat16(low).bits;
}

inline void __syncthreads() { emulated::wait(emulated::block_barrier, emulated::threads); }

inline float shuffled(float value, int source) {
  float found = value;
  emulated::exchange({emulated::bits_of(value)}, [&] {
    if (source < emulated::warp_size) found = emulated::float_of(emulated::deposit_of(source)[0]);
  });
  return found;
}

inline uint32_t __activemask() { return 0xffffffff; }
inline float __shfl_sync(uint32_t, float value, int source, int) { return shuffled(value, source); }
inline float __shfl_down_sync(uint32_t, float value, int distance, int) {
  return shuffled(value, emulated::lane() + distance);
}
inline float __shfl_xor_sync(uint32_t, float value, int distance, int) {
  return shuffled(value, emulated::lane() ^ distance);
}

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  uint64_t both = uint64_t(high) << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i)
    chosen |= uint32_t(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return chosen;
}

inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyintf(value)); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T x, y;
};
template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T x, y, z, w;
};
#define VECTORS(type, name)                                                                 \
  using name##2 = Pair<type>;                                                               \
  using name##4 = Quad<type>;                                                               \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                          \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
VECTORS(int8_t, char)
VECTORS(int16_t, short)
VECTORS(int32_t, int)
VECTORS(uint32_t, uint)
VECTORS(float, float)
