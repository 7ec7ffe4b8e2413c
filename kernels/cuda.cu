// The CUDA kernel: one function per stage, whose blocks walk a list of chunks. fusedopt puts generated code where the
// example is included; as it stands the file compiles alone. NVRTC has no standard headers, so none are included.
//
// A row is a tensor: element count, scalar set, first chunk, number of chunks, then a pointer per buffer; but where its
// gradient lies changes from step to step, and comes with the launch.
// A piece is a part of a row: row, first element, one past the last. Chunks are pieces that leave partial results;
// stages that leave none get smaller pieces. With several axes pieces are whole lines, and say too where the part results
// of each reduction along axes are; these are joined, and loops between stages done, by kernels of their own.
// A launch carries words by value: the scalars and the gradients' addresses, as far as they fit.
#ifdef __CUDACC_RTC__
using int64_t = long long;
using uint64_t = unsigned long long;
using uint32_t = unsigned int;
using uint16_t = unsigned short;
using int32_t = int;
using int16_t = short;
using int8_t = signed char;
using uint8_t = unsigned char;
#endif

struct Launch {
  const int64_t* rows;
  const int64_t* pieces;
  double* partials;          // chunks x reductions
  const double* slots;       // scalar sets x slots; null: they are the first of the words
  const int64_t* gradients;  // an address per row; null: they are the words from `first_gradient` on
  int64_t row_words, n_slots, n_reductions, first_gradient;
};

// What a launch carries by value: 4,096 bytes of parameters with any driver, 32,764 since CUDA 12.1.
template <int n>
struct Inline {
  int64_t words[n];
};
constexpr int parameter_bytes = sizeof(Launch) + sizeof(int64_t);
constexpr int small_words = (4096 - parameter_bytes) / 8, big_words = (32764 - parameter_bytes) / 8;

constexpr int head_words = 4, piece_words = 3;
constexpr int max_threads = 256;  // of a block; the number of threads must be a power of two
// `resident_blocks`, of the generated part, is how many of those a multiprocessor is to hold; 0 leaves it to the compiler.
constexpr int lanes = 2;          // accumulators of a thread
constexpr int in_flight = 8;      // elements that a thread loads from each buffer before it computes
constexpr int held = 8;           // of a line that a team has in registers: neighbouring elements of each thread

// -- storage types: values are computed in T, and rounded to nearest even once, when they are stored --
struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

#ifdef __CUDACC__
__device__ inline float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline float float_from_half(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
__device__ inline uint16_t half_from_float(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ inline uint16_t bfloat16_from_float(float x) {
#if __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#endif
}
// Left to itself, the compiler stores some packs of a conditional group element by element.
__device__ inline void store_64_bits(void* to, uint2 x) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y) : "memory");
}
__device__ inline void store_128_bits(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(x.x), "r"(x.y),
               "r"(x.z), "r"(x.w)
               : "memory");
}
// The larger one of two numbers, or of their sizes; NaN if one is. Sizes that the compiler sees it would keep for where
// they are needed again, in as many registers.
__device__ inline float larger(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float x;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return a > b || a != a ? a : b;
#endif
}
__device__ inline float larger_size(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float x;
  asm("{ .reg .f32 c, d; abs.f32 c, %1; abs.f32 d, %2; max.NaN.f32 %0, c, d; }" : "=f"(x) : "f"(a), "f"(b));
  return x;
#else
  return larger(::fabsf(a), ::fabsf(b));
#endif
}
// What rows point to is global memory, which the compiler cannot see, and would not believe of every gradient.
template <class E>
__device__ inline E* global(E* p) {
  uint64_t address;
  asm("cvta.to.global.u64 %0, %1;" : "=l"(address) : "l"(p));
  return static_cast<E*>(__cvta_global_to_generic(address));
}
__device__ inline void prefetch(const int64_t* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global(p))); }
#endif

__device__ inline uint32_t bits_from_float(float x) { return __builtin_bit_cast(uint32_t, x); }

template <class T, class E>
__device__ inline T widen(E x) {
  return T(x);
}
template <class T>
__device__ inline T widen(half x) {
  return T(float_from_half(x.bits));
}
template <class T>
__device__ inline T widen(bfloat16 x) {
  return T(float_from_bits(uint32_t(x.bits) << 16));
}

template <class T>
__device__ inline void narrow(float& to, T x) {
  to = float(x);
}
template <class T>
__device__ inline void narrow(double& to, T x) {
  to = double(x);
}
// Whole numbers that fit: the lowest bits of what is so large that its last bit is worth 1. GPUs convert at a fraction
// of the rate at which they add.
template <class T>
__device__ inline void narrow(int8_t& to, T x) {
  to = int8_t(bits_from_float(float(x) + 0x1.8p23f));
}
template <class T>
__device__ inline void narrow(uint8_t& to, T x) {
  to = uint8_t(bits_from_float(float(x) + 0x1.8p23f));
}
template <class T>
__device__ inline void narrow(int16_t& to, T x) {
  to = int16_t(bits_from_float(float(x) + 0x1.8p23f));
}
template <class T>
__device__ inline void narrow(half& to, T x) {
  to.bits = half_from_float(float(x));
}
template <class T>
__device__ inline void narrow(bfloat16& to, T x) {
  to.bits = bfloat16_from_float(float(x));
}

template <class T, class E>
__device__ inline T load(const E* p, int64_t i) {
  return widen<T>(p[i]);
}
template <class E, class T>
__device__ inline void store(E* p, int64_t i, T x) {
  narrow(p[i], x);
}

template <class T>
__device__ inline T to_float16(T x) {
  half rounded;
  narrow(rounded, x);
  return widen<T>(rounded);
}
template <class T>
__device__ inline T to_bfloat16(T x) {
  bfloat16 rounded;
  narrow(rounded, x);
  return widen<T>(rounded);
}

// -- what random numbers are made with --
#define FUSEDOPT_DEVICE static __device__ inline
__device__ inline float root(float x) { return ::sqrtf(x); }

// -- the bits of a float as an integer --
template <class T>
__device__ inline T add_bits(T x, T n) {
  return T(float_from_bits(bits_from_float(float(x)) + uint32_t(int32_t(n))));
}
template <class T>
__device__ inline T low_bits(T x) {
  return T(int16_t(bits_from_float(float(x))));
}
template <class T>
__device__ inline T high_bits(T x) {
  const uint32_t bits = bits_from_float(float(x));
  return T(float_from_bits(bits - uint32_t(int32_t(int16_t(bits)))));
}
// Close to the root, and what undoes that, with the sign: half the exponent, and straight in between.
template <class T>
__device__ inline T near_root(T x) {
  return T(float_from_bits((bits_from_float(float(x)) >> 1) + 0x1fc00000));
}
template <class T>
__device__ inline T near_square(T x) {
  const uint32_t bits = bits_from_float(float(x)), size = bits & 0x7fffffff;
  return T(float_from_bits(((size > 0x1fc00000 ? size : 0x1fc00000) - 0x1fc00000) << 1 | (bits & 0x80000000)));
}
// To one of the two nearest numbers, as noise from 1 up to 2 says.
template <class T>
__device__ inline T bfloat16_at_random(T x, T noise) {
  const uint32_t bits = bits_from_float(float(x)), random = bits_from_float(float(noise)) >> 7 & 0xffff;
  const T rounded = T(float_from_bits((bits + random) & 0xffff0000u));
  return (bits & 0x7f800000) == 0x7f800000 ? x : rounded;
}
template <class T>
__device__ inline T float16_at_random(T x, T noise) {
  const uint32_t bits = bits_from_float(float(x)), random = bits_from_float(float(noise)) >> 10 & 0x1fff;
  const float normal = float_from_bits((bits + random) & 0xffffe000u);
  const float units = float(x) * 0x1p24f + (float(noise) - 1.0f);  // those of numbers below 2^-14
  const float less = float(int32_t(units)), below = less > units ? less - 1.0f : less;
  const T rounded = T((bits & 0x7fffffff) < 0x38800000 ? below * 0x1p-24f : normal);
  return (bits & 0x7f800000) == 0x7f800000 ? x : rounded;
}

// -- torch's rules for NaN --
template <class T>
__device__ inline T maximum(T a, T b) {
  return (a > b || a != a) ? a : b;
}
template <class T>
__device__ inline T minimum(T a, T b) {
  return (a < b || a != a) ? a : b;
}
template <class T>
__device__ inline T absmax(T a, T b) {
  return maximum(::fabs(a), ::fabs(b));
}
__device__ inline float absmax(float a, float b) { return larger_size(a, b); }
template <class T>
__device__ inline T bitmax(T a, T b) {
  return b < 0 ? T(__builtin_bit_cast(float, 0x7fc00000)) : maximum(a, b);
}
__device__ inline float bitmax(float a, float b) {
  return larger(a, b < 0 ? __builtin_bit_cast(float, 0x7fc00000) : b);
}
template <class T>
__device__ inline T sign(T a) {
  return T(a > T(0)) - T(a < T(0));
}

// -- reductions: partial results in double --
[[maybe_unused]] constexpr double infinity = __builtin_bit_cast(double, uint64_t(0x7ff) << 52);
[[maybe_unused]] constexpr double not_a_number = __builtin_bit_cast(double, uint64_t(0x7ff8) << 48);

#define FUSEDOPT_REDUCTION(name, first, joined)                          \
  struct name {                                                          \
    static constexpr double init = first;                                \
    template <class X>                                                   \
    __device__ static X join(X a, X b) {                                 \
      return joined;                                                     \
    }                                                                    \
  };

__device__ inline double* scratch() {
  __shared__ double numbers[max_threads];
  return numbers;
}

// The results of all threads of the block joined by a tree; every thread gets it.
template <class R>
__device__ inline double join_threads(double x) {
  double* const tree = scratch();
  const unsigned t = threadIdx.x;
  tree[t] = x;
  __syncthreads();
  for (unsigned n = blockDim.x / 2; n > 0; n /= 2) {
    if (t < n) tree[t] = R::join(tree[t], tree[t + n]);
    __syncthreads();
  }
  x = tree[0];
  __syncthreads();  // before somebody writes there again
  return x;
}

// Which element goes to which accumulator, and how those are joined, depends on the number of threads in a block and
// on nothing else: not on the number of blocks, not on alignment. What is the same in any order needs no double.
template <class R, class X = double>
struct Lanes {
  X lane[lanes];
  __device__ Lanes() {
#pragma unroll
    for (int k = 0; k < lanes; ++k) lane[k] = X(R::init);
  }
  __device__ inline void add(int k, X x) { lane[k] = R::join(lane[k], x); }
  __device__ void finish(double* partial) const {
    double x = lane[0];
#pragma unroll
    for (int k = 1; k < lanes; ++k) x = R::join(x, lane[k]);
    x = join_threads<R>(x);
    if (threadIdx.x == 0) *partial = x;
  }
  template <class Team>
  __device__ X total(const Team& team) const {
    X x = lane[0];
#pragma unroll
    for (int k = 1; k < lanes; ++k) x = R::join(x, lane[k]);
    return team.template join<R>(x);
  }
};

struct Row {
  const int64_t* words;
  int64_t index;
  const int64_t* inlined;  // the words of the launch

  __device__ Row(const Launch& launch, int64_t r, const int64_t* inlined)
      : words(launch.rows + r * launch.row_words), index(r), inlined(inlined) {}
  __device__ int64_t numel() const { return words[0]; }
  __device__ double slot(const Launch& launch, int k) const {
    const int64_t i = words[1] * launch.n_slots + k;
    return launch.slots ? launch.slots[i] : __builtin_bit_cast(double, inlined[i]);
  }
  template <class E>
  __device__ E* buffer(int k) const {
    return global(reinterpret_cast<E*>(words[head_words + k]));
  }
  // Of a reduction along some axes, or what is made of such.
  __device__ double* result(int k) const { return buffer<double>(k - head_words); }
  template <class E>
  __device__ E* gradient(const Launch& launch) const {
    const int64_t* at = launch.gradients;
    return global(reinterpret_cast<E*>(at ? at[index] : inlined[launch.first_gradient + index]));
  }
};

// The partial results of one reduction, joined by all threads of the block: the order depends on their number alone.
template <class R>
__device__ inline double combine(const Launch& launch, Row row, int k) {
  const double* parts = launch.partials + row.words[2] * launch.n_reductions + k;
  const int64_t count = row.words[3];
  if (count == 1) return *parts;
  double x = R::init;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) x = R::join(x, parts[i * launch.n_reductions]);
  return join_threads<R>(x);
}

// -- elements --
// A buffer of which no element is read. Where a pack is skipped, the compiler cannot see that loading it is useless.
template <class E>
struct Written {
  E* p;
};
template <class E>
__device__ inline Written<E> written(E* p) {
  return {p};
}

// What `walk` is given for a buffer: a pointer to const, a pointer, or `written`.
template <class B>
struct Buffer;
template <class E>
struct Buffer<const E*> {
  using Element = E;
  static constexpr bool reads = true, writes = false;
  __device__ static inline const E* pointer(const E* p) { return p; }
};
template <class E>
struct Buffer<E*> {
  using Element = E;
  static constexpr bool reads = true, writes = true;
  __device__ static inline E* pointer(E* p) { return p; }
};
template <class E>
struct Buffer<Written<E>> {
  using Element = E;
  static constexpr bool reads = false, writes = true;
  __device__ static inline E* pointer(Written<E> b) { return b.p; }
};

// The numbers of elements: what `walk` is given beside buffers, and no memory. It looks like 128 bits for each, aligned.
struct alignas(16) Numbered {
  char none[16];
};
struct Numbers {};
template <>
struct Buffer<Numbers> {
  using Element = Numbered;
  static constexpr bool reads = false, writes = false;
  __device__ static inline const Numbered* pointer(Numbers) { return nullptr; }
};
__device__ inline int64_t number_of(const Numbered*, int64_t i) { return i; }

template <class E, int n>
struct alignas(n * sizeof(E)) Pack {
  E value[n];
};
// As words: of halves of them the compiler would make bytes in more steps.
template <int n, class E>
__device__ inline Pack<E, n> load_pack(const E* from) {
  if constexpr (sizeof(Pack<E, n>) == 8)
    return __builtin_bit_cast(Pack<E, n>, *reinterpret_cast<const uint2*>(from));
  else
    return *reinterpret_cast<const Pack<E, n>*>(from);
}
template <class E>
__device__ inline void store_pack(E* to, Pack<E, 8 / sizeof(E)> pack) {
  store_64_bits(to, __builtin_bit_cast(uint2, pack));
}
template <class E>
__device__ inline void store_pack(E* to, Pack<E, 16 / sizeof(E)> pack) {
  store_128_bits(to, __builtin_bit_cast(uint4, pack));
}

__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }

// What a thread holds of one buffer: `unroll` groups of `width` neighbouring elements, in packs of 128 bits, or of 64
// if that is all. Groups of neighbouring threads are neighbours. Groups number 1 and up may lie beyond the chunk: `left`
// groups do not.
template <class B, int width, int unroll>
struct Tile {
  using E = typename Buffer<B>::Element;
  static constexpr int per_pack = smaller(width, 16 / sizeof(E)), packs = width / per_pack;
  static constexpr int alignment = per_pack * sizeof(E);
  Pack<E, per_pack> pack[unroll][packs];

  __device__ inline void fetch(B buffer, int64_t at, unsigned left) {
    if constexpr (Buffer<B>::reads) {
      const E* from = Buffer<B>::pointer(buffer) + at;
#pragma unroll
      for (int u = 0; u < unroll; ++u)
        if (u == 0 || u * blockDim.x < left)
#pragma unroll
          for (int k = 0; k < packs; ++k)
            pack[u][k] = load_pack<per_pack>(from + u * int64_t(blockDim.x) * width + k * per_pack);
    }
  }
  __device__ inline void flush(B buffer, int64_t at, int u) const {
    if constexpr (Buffer<B>::writes) {
      E* to = Buffer<B>::pointer(buffer) + at + u * int64_t(blockDim.x) * width;
#pragma unroll
      for (int k = 0; k < packs; ++k) store_pack(to + k * per_pack, pack[u][k]);
    }
  }
  __device__ inline const E& at(int64_t i) const { return pack[i / width][i % width / per_pack].value[i % per_pack]; }
  __device__ inline E& at(int64_t i) { return pack[i / width][i % width / per_pack].value[i % per_pack]; }
};
template <int width, int unroll>
struct Tile<Numbers, width, unroll> {
  static constexpr int alignment = 1;
  int64_t first;
  __device__ inline void fetch(Numbers, int64_t at, unsigned) { first = at; }
  __device__ inline void flush(Numbers, int64_t, int) const {}
};
template <int width, int unroll>
__device__ inline int64_t number_of(const Tile<Numbers, width, unroll>& tile, int64_t i) {
  return tile.first + i / width * (int64_t(blockDim.x) * width) + i % width;
}
template <class T, class B, int width, int unroll>
__device__ inline T load(const Tile<B, width, unroll>& tile, int64_t i) {
  return widen<T>(tile.at(i));
}
template <class B, int width, int unroll, class T>
__device__ inline void store(Tile<B, width, unroll>& tile, int64_t i, T x) {
  narrow(tile.at(i), x);
}

// Load everything, then compute and store: the loads are independent of each other and stand before all else.
template <int width, int unroll, class F, class... B>
struct Step {
  __device__ static inline void run(const F& element, [[maybe_unused]] int64_t at, unsigned left, B... buffer,
                                    Tile<B, width, unroll>... tile) {
    (tile.fetch(buffer, at, left), ...);
#pragma unroll
    for (int u = 0; u < unroll; ++u)
      if (u == 0 || u * blockDim.x < left) {
#pragma unroll
        for (int k = 0; k < width; ++k) element(tile..., u * width + k, k % lanes);
        (tile.flush(buffer, at, u), ...);
      }
  }
};

template <class... B>
__device__ constexpr int narrowest() {
  int size = 8;
  ((size = smaller(size, sizeof(typename Buffer<B>::Element))), ...);
  return size;
}

template <class F, class... P>
__device__ inline void with_pointers(const F& element, int64_t i, int lane, P... pointer) {
  element(pointer..., i, lane);
}

// Call `element` for all of a piece. Thread t of a block of n has the groups t, t + n, t + 2n, ... of `width`
// elements; a piece has fewer than 2^32 of them. Whole groups of aligned buffers go through registers, 128 bits at a
// time; others element by element.
template <class F, class... B>
__device__ inline void walk(int64_t begin, int64_t end, const F& element, B... buffer) {
  constexpr int width = 16 / narrowest<B...>(), unroll = width < in_flight ? in_flight / width : 1;
  const unsigned whole = unsigned((end - begin) / width);
  const bool aligned =
      (((reinterpret_cast<uint64_t>(Buffer<B>::pointer(buffer) + begin) & 15) == 0) && ... && true);
  unsigned g = threadIdx.x;
  if (aligned) {
    for (; g < whole; g += unroll * blockDim.x)
      Step<width, unroll, F, B...>::run(element, begin + int64_t(g) * width, whole - g, buffer...,
                                        Tile<B, width, unroll>()...);
    g = whole + ((threadIdx.x - whole) & (blockDim.x - 1));  // the first of this thread's after those
  }
  for (; begin + int64_t(g) * width < end; g += blockDim.x)
#pragma unroll 1
    for (int64_t i = begin + int64_t(g) * width; i < begin + int64_t(g) * width + width; i += lanes)
#pragma unroll
      for (int k = 0; k < lanes; ++k)
        if (i + k < end) with_pointers(element, i + k, k, Buffer<B>::pointer(buffer)...);
}

// -- lines, and places along axes --
__device__ inline int64_t clamped(int64_t x, int64_t last) { return x < 0 ? 0 : x < last ? x : last; }

// Threads that do one thing together, of `count` such teams in a block: neighbours, or every so many-th. What each of
// them does, and how their results are joined, depends on sizes and on the number of threads in a block alone.
struct Team {
  unsigned size, stride, lane, index, count;

  // For a line, or whatever else has this many elements one after another.
  __device__ static Team neighbours(int64_t elements) {
    const unsigned size = elements <= 32 ? 1 : elements <= 1024 && blockDim.x > 32 ? 32 : blockDim.x;
    return {size, 1, threadIdx.x % size, threadIdx.x / size, blockDim.x / size};
  }
  // For places that are neighbours and have this many elements in all, each of them far apart: neighbouring threads are
  // for neighbouring places, and there are as many for each as leave every one of them some work.
  __device__ static Team across(int64_t places, int64_t elements) {
    unsigned n = 1;
    while (n < blockDim.x && (n < 32 ? n < places : elements < 16 * places * int64_t(blockDim.x / n))) n *= 2;
    return {blockDim.x / n, n, threadIdx.x / n, threadIdx.x % n, n};
  }

  // Teams of neighbours up to a warp go around a loop as often as they have lines, and wait for nobody else.
  __device__ inline void sync() const {
    if (size == 1) return;
    if (stride == 1 && size <= 32) __syncwarp();
    else __syncthreads();
  }
  // The results of all of them joined by a tree; every one gets it.
  template <class R, class X>
  __device__ inline X join(X x) const {
    if (size == 1) return x;
    double* const mine = scratch() + threadIdx.x;
    *mine = x;
    sync();
    for (unsigned n = size / 2; n > 0; n /= 2) {
      if (lane < n) *mine = R::join(*mine, mine[n * stride]);
      sync();
    }
    x = X(mine[-int64_t(lane * stride)]);
    sync();  // before somebody writes there again
    return x;
  }
  // Call `element` for all from `first` up to `last`: this thread's are `size` apart.
  template <class F>
  __device__ inline void each(int64_t first, int64_t last, const F& element) const {
    for (int64_t i = first + lane; i < last; i += lanes * int64_t(size))
#pragma unroll
      for (int k = 0; k < lanes; ++k)
        if (k == 0 || i + k * int64_t(size) < last) element(i + k * int64_t(size), k);
  }
};

// The same for neighbours that have a line in registers; of those that are to store nothing none is the first.
template <unsigned size>
struct Holders {
  unsigned lane;

  __device__ explicit Holders(bool storing) : lane(storing ? threadIdx.x % size : size) {}
  __device__ inline void sync() const { __syncwarp(); }
  template <class R, class X>
  __device__ inline X join(X x) const {
#pragma unroll
    for (unsigned n = size / 2; n > 0; n /= 2) x = R::join(x, __shfl_down_sync(~0u, x, n, size));
    return __shfl_sync(~0u, x, 0, size);
  }
  // Elements are numbered as in a `Tile`.
  template <class F>
  __device__ inline void each(int64_t, int64_t, const F& element) const {
#pragma unroll
    for (int k = 0; k < held; ++k) element(k, k % lanes);
  }
};

template <int64_t n, class F, class... B>
struct HeldLine {
  static constexpr unsigned size = n / held, at_once = 32 / size;
  static_assert(size <= 32);
  __device__ static inline void run(const F& with_line, int64_t line, bool storing, B... buffer,
                                    Tile<B, held, 1>... tile) {
    const int64_t at = line * n + threadIdx.x % size * held;
    (tile.fetch(buffer, at, 1), ...);
    with_line(Holders<size>(storing), line, n, tile...);
    if (storing) (tile.flush(buffer, at, 0), ...);
  }
};

// Call `with_line` for all lines of a piece, of n elements each. Whole lines of aligned buffers go through registers;
// others, and the last one if it is shorter, element by element. A warp goes around as one, so that all of it is there
// to exchange numbers: threads for which no line is left do the last one again, and store nothing.
template <int64_t n, class F, class... B>
__device__ inline void walk_lines(int64_t begin, int64_t end, const F& with_line, B... buffer) {
  using Held = HeldLine<n, F, B...>;
  const bool aligned =
      ((reinterpret_cast<uint64_t>(Buffer<B>::pointer(buffer) + begin) % Tile<B, held, 1>::alignment == 0) && ... &&
       true);
  const int64_t first = begin / n;
  const unsigned whole = aligned && blockDim.x >= Held::size ? unsigned((end - begin) / n) : 0;
  if (begin + int64_t(whole) * n < end) {  // before the others: what it needs takes none of their registers
    const Team team = Team::neighbours(n);
    for (int64_t line = first + whole + team.index; line * n < end; line += team.count)
      with_line(team, line, line * n + n <= end ? n : end - line * n, Buffer<B>::pointer(buffer)...);
  }
  for (unsigned line = threadIdx.x / Held::size; line / Held::at_once * Held::at_once < whole;
       line += blockDim.x / Held::size)
    Held::run(with_line, first + (line < whole ? line : whole - 1), line < whole, buffer..., Tile<B, held, 1>()...);
}

// Where the part results of a chunk are: in the result itself if the chunk is the only one for it, else apart.
template <int n>
struct Regions {
  const int64_t* words;
  __device__ double* operator[](int k) const { return global(reinterpret_cast<double*>(words[k])); }
};

// Some of a row's places, for which a block joins part results: every `slices`-th, from number `slice` on.
struct Join {
  int64_t slice, slices;
  const int64_t* chunks;
};

// The part results of reduction k along some axes, joined in chunk order: every place has its team. All chunks but the
// last are of one length; `inside` elements have `tail` numbers, there are `count` of them.
template <class R, int n>
__device__ inline void join_chunks(Row row, Join join, int k, int word, int64_t inside, int64_t tail, int64_t count) {
  constexpr int words = piece_words + n;
  const int64_t* const chunks = join.chunks;
  if (chunks[piece_words + k] == row.words[word]) return;
  double* const whole = row.result(word);
  const int64_t length = chunks[2] - chunks[1];
  const Team team = Team::across(count, count * ((inside - 1) / length + 1));
  for (int64_t start = join.slice * team.count; start < count; start += join.slices * team.count) {
    const int64_t place = start + team.index, first = place / tail * inside;
    Lanes<R> parts;
    if (place < count)
      team.each(first / length, (first + inside - 1) / length + 1, [&](int64_t c, int lane) {
        parts.add(lane, Regions<n>{chunks + c * words + piece_words}[k][place]);
      });
    const double x = parts.total(team);
    if (team.lane == 0 && place < count) whole[place] = x;
  }
}

// -- entries --
// Where there are fewer blocks than pieces, they take turns. While one is worked on, the next one's row is on its way.
template <void stage(const Launch&, Row, int64_t, int64_t, double*)>
__device__ inline void each_piece(const Launch& launch, int64_t n, const int64_t* inlined) {
  for (unsigned c = blockIdx.x; c < n; c += gridDim.x) {
    const int64_t* piece = launch.pieces + int64_t(c) * piece_words;
    if (c + gridDim.x < n && threadIdx.x < unsigned(launch.row_words))
      prefetch(launch.rows + piece[int64_t(gridDim.x) * piece_words] * launch.row_words + threadIdx.x);
    stage(launch, Row(launch, piece[0], inlined), piece[1], piece[2], launch.partials + c * launch.n_reductions);
  }
}

template <int n>
__device__ constexpr int regions_of(void (*)(const Launch&, Row, int64_t, int64_t, double*, Regions<n>)) {
  return n;
}
template <auto stage>
__device__ inline void each_block(const Launch& launch, int64_t n, const int64_t* inlined) {
  constexpr int regions = regions_of(stage), words = piece_words + regions;
  for (unsigned c = blockIdx.x; c < n; c += gridDim.x) {
    const int64_t* piece = launch.pieces + int64_t(c) * words;
    if (c + gridDim.x < n && threadIdx.x < unsigned(launch.row_words))
      prefetch(launch.rows + piece[int64_t(gridDim.x) * words] * launch.row_words + threadIdx.x);
    stage(launch, Row(launch, piece[0], inlined), piece[1], piece[2], launch.partials + c * launch.n_reductions,
          Regions<regions>{piece + piece_words});
  }
}

template <void scalars(const Launch&, Row)>
__device__ inline void each_row(const Launch& launch, int64_t n, const int64_t* inlined) {
  for (int64_t r = blockIdx.x; r < n; r += gridDim.x) {
    const Row row(launch, r, inlined);
    if (row.numel() > 0) scalars(launch, row);
  }
}

// A piece here is a row, and places along its first axis: from one up to another.
template <void before(const Launch&, Row, int64_t, int64_t)>
__device__ inline void each_place(const Launch& launch, int64_t n, const int64_t* inlined) {
  for (int64_t c = blockIdx.x; c < n; c += gridDim.x) {
    const int64_t* piece = launch.pieces + c * 3;
    before(launch, Row(launch, piece[0], inlined), piece[1], piece[2]);
  }
}

// A piece here is a row, which of its places, and the address of its first chunk.
template <void joined(const Launch&, Row, Join)>
__device__ inline void each_join(const Launch& launch, int64_t n, const int64_t* inlined) {
  for (int64_t c = blockIdx.x; c < n; c += gridDim.x) {
    const int64_t* piece = launch.pieces + c * 4;
    joined(launch, Row(launch, piece[0], inlined), {piece[1], piece[2], reinterpret_cast<const int64_t*>(piece[3])});
  }
}

#define FUSEDOPT_ENTRY(name, n_words, each, function)                                                              \
  extern "C" __global__ void __launch_bounds__(max_threads, resident_blocks) name(                                 \
      const __grid_constant__ Launch launch, int64_t n, const __grid_constant__ Inline<n_words> inlined) {         \
    each<function>(launch, n, inlined.words);                                                                      \
  }
#ifdef FUSEDOPT_SMALL_ONLY  // for drivers that refuse more parameters
#define FUSEDOPT_ENTRIES(name, each, function) FUSEDOPT_ENTRY(name, small_words, each, function)
#else
#define FUSEDOPT_ENTRIES(name, each, function)        \
  FUSEDOPT_ENTRY(name, small_words, each, function)   \
  FUSEDOPT_ENTRY(name##_big, big_words, each, function)
#endif

#define FUSEDOPT_STAGE(k) FUSEDOPT_ENTRIES(fusedopt_stage_##k, each_piece, stage_##k)
#define FUSEDOPT_BLOCK_STAGE(k) FUSEDOPT_ENTRIES(fusedopt_stage_##k, each_block, stage_##k)
#define FUSEDOPT_JOIN(k) FUSEDOPT_ENTRIES(fusedopt_join_##k, each_join, join_##k)
#define FUSEDOPT_BETWEEN(k) FUSEDOPT_ENTRIES(fusedopt_before_##k, each_row, before_##k)
#define FUSEDOPT_PLACES(k) FUSEDOPT_ENTRIES(fusedopt_before_##k, each_place, before_##k)
#define FUSEDOPT_SCALARS FUSEDOPT_ENTRIES(fusedopt_scalars, each_row, scalars)

#include "cuda_example.inc"
