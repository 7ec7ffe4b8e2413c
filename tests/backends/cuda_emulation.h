// Enough of CUDA to compile kernels/cuda.cu as host C++ and to run it on the CPU: included before it (-include), once,
// and compiled beforehand.
//
// A block is a group of threads with a barrier, blocks run one after another. Packs of 16 bytes are copied with aligned
// instructions, so a pack at an address that is not a multiple of 16 ends the process, as it would end the kernel.
// What the skeleton says in PTX is said here in C++: these few lines are not covered by what is run on the CPU.
#include <barrier>
#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one block at a time
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx{0}, blockIdx{0};
inline Index blockDim{1}, gridDim{1};
inline std::unique_ptr<std::barrier<>> barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warps;
inline void __syncthreads() {
  if (blockDim.x > 1) barrier->arrive_and_wait();
}
inline void __syncwarp() { warps[threadIdx.x / 32]->arrive_and_wait(); }

// What other threads of the warp have, all of which have to ask.
template <class X>
X shuffled(X x, unsigned from) {
  static X given[1024];
  given[threadIdx.x] = x;
  __syncwarp();
  x = given[from];
  __syncwarp();
  return x;
}
template <class X>
X __shfl_down_sync(unsigned, X x, unsigned n, unsigned width) {
  return shuffled(x, threadIdx.x % width + n < width ? threadIdx.x + n : threadIdx.x);
}
template <class X>
X __shfl_sync(unsigned, X x, unsigned from, unsigned width) {
  return shuffled(x, threadIdx.x / width * width + from);
}

inline float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float float_from_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return float(x);
}
inline uint16_t half_from_float(float x) {
  const _Float16 rounded = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
inline uint16_t bfloat16_from_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float larger(float a, float b) { return a > b || a != a ? a : b; }
inline float larger_size(float a, float b) { return larger(std::fabs(a), std::fabs(b)); }
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline void store_128_bits(void* to, uint4 x) { *static_cast<uint4*>(to) = x; }
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline void store_64_bits(void* to, uint2 x) { *static_cast<uint2*>(to) = x; }
template <class E>
inline E* global(E* p) {
  return p;
}

inline void prefetch(const int64_t*) {}

template <class... P>
void emulate(void (*kernel)(P...), unsigned blocks, unsigned threads, const P&... parameter) {
  gridDim.x = blocks, blockDim.x = threads;
  barrier = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (unsigned t = 0; t < threads; t += 32)
    warps.push_back(std::make_unique<std::barrier<>>(threads - t < 32 ? threads - t : 32));
  for (unsigned b = 0; b < blocks; ++b) {
    const auto run = [&](unsigned t) {
      blockIdx.x = b, threadIdx.x = t;
      kernel(parameter...);
    };
    std::vector<std::thread> others;
    for (unsigned t = 1; t < threads; ++t) others.emplace_back(run, t);
    run(0);
    for (std::thread& other : others) other.join();
  }
}
