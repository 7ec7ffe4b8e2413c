// The CPU kernel: one function per stage, run over a range of chunks. fusedopt puts generated code where the example
// is included; as it stands the file compiles alone. It includes no header: reading <cmath> alone would take longer than
// all the rest of a compilation.
//
// A row is a tensor: element count, scalar set, first chunk, number of chunks, then a pointer per buffer.
// A chunk is a piece of a row: row, first element, one past the last.
using int64_t = __INT64_TYPE__;
using uint64_t = __UINT64_TYPE__;
using uint32_t = __UINT32_TYPE__;
using uint16_t = __UINT16_TYPE__;
using int16_t = __INT16_TYPE__;
using int8_t = __INT8_TYPE__;
using uint8_t = __UINT8_TYPE__;
using int32_t = __INT32_TYPE__;

#if defined(__clang__)
#define FUSEDOPT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define FUSEDOPT_LANES
#else
#define FUSEDOPT_INDEPENDENT _Pragma("GCC ivdep")
// A loop of a few rounds is undone before gcc makes vectors of loops, and from what is left it makes poor ones.
#define FUSEDOPT_LANES _Pragma("GCC unroll 1")
#endif

// Integer arithmetic is worth the widest vectors, which gcc leaves alone because they may cost the core's clock.
#if defined(__AVX512F__) && !defined(__clang__)
#define FUSEDOPT_WIDEST _Pragma("GCC target(\"prefer-vector-width=512\")")
#else
#define FUSEDOPT_WIDEST
#endif

#define FUSEDOPT_INLINE __attribute__((always_inline))

// An entry: what it calls is compiled into it, however long that gets. A loop that calls has no vectors.
#define FUSEDOPT_WHOLE extern "C" __attribute__((flatten))

// A function of the C library that generated code calls, for float and for double, under the name that CUDA has too.
#define FUSEDOPT_FUNCTION(name)                                                    \
  template <class X, class... Y>                                                   \
  static inline X name(X x, Y... y) {                                              \
    if constexpr (sizeof(X) == sizeof(float)) return __builtin_##name##f(x, y...); \
    else return __builtin_##name(x, y...);                                         \
  }

struct Launch {
  const int64_t* rows;
  const int64_t* chunks;
  double* partials;     // chunks x reductions
  const double* slots;  // scalar sets x slots
  int64_t row_words, n_slots, n_reductions;
  double* results;      // of reductions along some axes, and what is made of them
  int64_t chunk_words;  // with several axes: the three of a chunk, then where its part results begin
};

constexpr int head_words = 4, chunk_words = 3, lanes = 16;
constexpr int64_t block_size = 64, ahead = 8 * block_size;  // elements

// -- storage types: values are computed in T, and rounded to nearest even once, when they are stored --
struct bfloat16 {
  uint16_t bits;
};
// Not _Float16, whose conversions gcc 12 makes no vectors of.
struct half {
  uint16_t bits;
};

template <class T, class E>
inline T load(const E* p, int64_t i) {
  return T(p[i]);
}
template <class T>
inline T load(const bfloat16* p, int64_t i) {
  const uint32_t bits = uint32_t(p[i].bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return T(x);
}

template <class T>
inline T load(const half* p, int64_t i) {
  const uint32_t bits = p[i].bits, magnitude = (bits & 0x7fff) << 13;
  const uint32_t shifted = magnitude + 0x38800000;
  uint32_t whole;
  float x;
  __builtin_memcpy(&x, &shifted, sizeof x);
  x -= 0x1p-14f;  // a subnormal number, by way of none: those take a processor long
  __builtin_memcpy(&whole, &x, sizeof x);
  whole = magnitude >= 0xf800000 ? magnitude + 0x70000000 : magnitude < 0x800000 ? whole : magnitude + 0x38000000;
  whole |= (bits & 0x8000) << 16;
  __builtin_memcpy(&x, &whole, sizeof x);
  return T(x);
}

template <class E, class T>
inline void store(E* p, int64_t i, T x) {
  p[i] = E(x);
}
template <class T>
inline void store(int8_t* p, int64_t i, T x) {  // whole numbers that fit: by way of an int there are vectors for it
  p[i] = int8_t(int32_t(x));
}
template <class T>
inline void store(uint8_t* p, int64_t i, T x) {
  p[i] = uint8_t(int32_t(x));
}
template <class T>
inline void store(int16_t* p, int64_t i, T x) {
  p[i] = int16_t(int32_t(x));
}
template <class T>
inline void store(half* p, int64_t i, T x) {
  const float f = float(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof f);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Below 2^-14 they are multiples of 2^-24: those of a half are what a float has for its last bits.
  float small;
  __builtin_memcpy(&small, &magnitude, sizeof small);
  small += 0.5f;
  uint32_t below;
  __builtin_memcpy(&below, &small, sizeof below);
  below -= 0x3f000000;
  const uint32_t normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  p[i].bits = uint16_t(sign | (magnitude >= 0x47800000 ? large : magnitude < 0x38800000 ? below : normal));
}
// The nearest number of bfloat16, in the upper half of a float's bits.
inline uint32_t nearest(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  return x != x ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
}
template <class T>
inline void store(bfloat16* p, int64_t i, T x) {
  p[i].bits = uint16_t(nearest(float(x)) >> 16);
}
template <class T>
inline void store_rounded(bfloat16* p, int64_t i, T x) {  // one of bfloat16's numbers
  const float f = float(x);
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof f);
  p[i].bits = uint16_t(bits >> 16);
}

template <class T>
inline T to_float16(T x) {
  half rounded;
  store(&rounded, 0, x);
  return load<T>(&rounded, 0);
}
template <class T>
inline T to_bfloat16(T x) {
  const uint32_t bits = nearest(float(x)) & 0xffff0000;
  float rounded;
  __builtin_memcpy(&rounded, &bits, sizeof bits);
  return T(rounded);
}

// -- what random numbers are made with --
#define FUSEDOPT_DEVICE static inline
inline float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t bits_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float root(float x) { return __builtin_sqrtf(x); }

// -- the bits of a float as an integer --
template <class T>
inline T add_bits(T x, T n) {
  return T(float_from_bits(bits_from_float(float(x)) + uint32_t(int32_t(n))));
}
template <class T>
inline T low_bits(T x) {
  return T(int32_t(bits_from_float(float(x)) << 16) >> 16);
}
template <class T>
inline T high_bits(T x) {
  return T(float_from_bits((bits_from_float(float(x)) + 0x8000) & 0xffff0000));
}
// Close to the root, and what undoes that, with the sign: half the exponent, and straight in between.
template <class T>
inline T near_root(T x) {
  return T(float_from_bits((bits_from_float(float(x)) >> 1) + 0x1fc00000));
}
template <class T>
inline T near_square(T x) {
  const uint32_t bits = bits_from_float(float(x)), twice = bits << 1;  // without the sign
  return T(float_from_bits(((twice > 0x3f800000 ? twice : 0x3f800000) - 0x3f800000) | (bits & 0x80000000)));
}
// To one of the two nearest numbers, as noise from 1 up to 2 says.
template <class T>
inline T bfloat16_at_random(T x, T noise) {
  const uint32_t bits = bits_from_float(float(x)), random = bits_from_float(float(noise)) >> 7 & 0xffff;
  const T rounded = T(float_from_bits((bits + random) & 0xffff0000u));
  const T quiet = sizeof(T) == 4 ? x + x : x;  // a NaN that is has one of the bits that stay
  return (bits & 0x7f800000) == 0x7f800000 ? quiet : rounded;
}
template <class T>
inline T float16_at_random(T x, T noise) {
  const uint32_t bits = bits_from_float(float(x)), random = bits_from_float(float(noise)) >> 10 & 0x1fff;
  const float normal = float_from_bits((bits + random) & 0xffffe000u);
  const float units = float(x) * 0x1p24f + (float(noise) - 1.0f);  // those of numbers below 2^-14
  const float less = float(int32_t(units)), below = less > units ? less - 1.0f : less;
  const T rounded = T((bits & 0x7fffffff) < 0x38800000 ? below * 0x1p-24f : normal);
  return (bits & 0x7f800000) == 0x7f800000 ? x : rounded;
}

// -- torch's rules for NaN --
// The larger one is one instruction, and whether there is a NaN is foreseen: of numbers in no order the other is not.
template <class T>
inline T maximum(T a, T b) {
  const T larger = a > b ? a : b;
  return a != a ? a : larger;
}
template <class T>
inline T minimum(T a, T b) {
  const T smaller = a < b ? a : b;
  return a != a ? a : smaller;
}
// Floats that are not negative have the order of their bits, NaN is the largest: for those there are vectors.
inline double absmax(double a, double b) { return maximum(__builtin_fabs(a), __builtin_fabs(b)); }
inline float bitmax(float a, float b) {
  const uint32_t x = bits_from_float(a), y = bits_from_float(b);
  return float_from_bits(x > y ? x : y);
}
inline double bitmax(double a, double b) { return b < 0 ? __builtin_nan("") : maximum(a, b); }
inline float absmax(float a, float b) { return bitmax(a, __builtin_fabsf(b)); }  // a is a size
template <class T>
inline T sign(T a) {
  return T(a > T(0)) - T(a < T(0));
}

// -- reductions: partial results in double --
[[maybe_unused]] constexpr double infinity = __builtin_inf(), not_a_number = __builtin_nan("");

#define FUSEDOPT_REDUCTION(name, first, joined)               \
  struct name {                                               \
    static constexpr double init = first;                     \
    static double join(double a, double b) { return joined; } \
    template <class X>                                        \
    static X join_as(X a, X b) { return joined; }             \
  };

// Elements in fewer bits, near at hand as numbers, and where the first of them is in memory: they are converted in loops of
// their own. Of those of halves compilers make no vectors, but most processors have an instruction.
template <class T, class E>
struct Near {
  E* memory;
  int64_t first;
  T values[block_size];
};
template <class X, class T, class E>
inline X load(const Near<T, E>& near, int64_t i) {
  return X(near.values[i - near.first]);
}
template <class T, class E, class X>
inline void store(Near<T, E>& near, int64_t i, X x) {
  near.values[i - near.first] = T(x);
}
template <class T, class E>
FUSEDOPT_INLINE inline void convert(T* to, const E* from, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    if constexpr (sizeof(T) > sizeof(E)) to[k] = load<T>(from, k);
    else store(to, k, from[k]);
  }
}
#if defined(__F16C__) && defined(__has_builtin)
#if __has_builtin(__builtin_ia32_vcvtph2ps256) && __has_builtin(__builtin_ia32_vcvtps2ph256)
typedef float EightFloats __attribute__((vector_size(32)));
typedef int16_t EightHalves __attribute__((vector_size(16)));
FUSEDOPT_INLINE inline void convert(float* to, const half* from, int64_t n) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    EightHalves halves;
    __builtin_memcpy(&halves, from + k, sizeof halves);
    const EightFloats floats = __builtin_ia32_vcvtph2ps256(halves);
    __builtin_memcpy(to + k, &floats, sizeof floats);
  }
  for (; k < n; ++k) {
    asm volatile("");  // or it takes as long to compile as all else
    to[k] = load<float>(from, k);
  }
}
FUSEDOPT_INLINE inline void convert(half* to, const float* from, int64_t n) {
  int64_t k = 0;
  for (; k + 8 <= n; k += 8) {
    EightFloats floats;
    __builtin_memcpy(&floats, from + k, sizeof floats);
    const EightHalves halves = __builtin_ia32_vcvtps2ph256(floats, 0);
    __builtin_memcpy(to + k, &halves, sizeof halves);
  }
  for (; k < n; ++k) {
    asm volatile("");
    store(to, k, from[k]);
  }
}
#endif
#endif
template <class E>
inline void bring(E*, int64_t, int64_t) {}
template <class T, class E>
FUSEDOPT_INLINE inline void bring(Near<T, E>& near, int64_t first, int64_t n) {
  near.first = first;
  convert(near.values, near.memory + first, n);
}
template <class E>
inline void take_back(E*, int64_t) {}
template <class T>
inline void take_back(Near<T, const half>&, int64_t) {}
template <class T, class E>
FUSEDOPT_INLINE inline void take_back(Near<T, E>& near, int64_t n) {
  convert(near.memory + near.first, near.values, n);
}

// A fixed number of accumulators, whatever the machine's vectors: the result is the same everywhere. A line that is known
// to be shorter has as many as it uses.
template <class R, int count = lanes>
struct Lanes {
  double lane[count];
  Lanes() {
    for (double& x : lane) x = R::init;
  }
  inline void add(int k, double x) { lane[k] = R::join(lane[k], x); }
  double total() const { return total(count); }
  double total(int64_t used) const {  // by a line of this many numbers
    double x = R::init;
    for (int k = 0; k < count && k < used; ++k) x = R::join(x, lane[k]);
    return x;
  }
};

// What is a while ahead is asked for early: a processor that finds out by itself begins anew with every page of memory,
// and has less time for each the narrower numbers are.
template <int64_t n, class E>
inline void fetch(const E* p) {
  for (int64_t k = 0; k < n; k += 64 / int64_t(sizeof(E))) __builtin_prefetch(p + k);
}
template <int64_t n, class E>
inline void fetch(const E* p, int64_t at) {
  fetch<n>(p + at);
}
template <int64_t n, class T, class E>
inline void fetch(const Near<T, E>& near, int64_t at) {
  fetch<n>(near.memory + at);
}
template <class F, class... E>
FUSEDOPT_INLINE inline void for_lanes(int64_t begin, int64_t end, const F& element, E&&... buffers) {
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) {
    (fetch<lanes>(buffers, i + ahead), ...);
    (bring(buffers, i, lanes), ...);
    FUSEDOPT_INDEPENDENT
    FUSEDOPT_LANES
    for (int k = 0; k < lanes; ++k) element(i + k, k);
    (take_back(buffers, lanes), ...);
  }
  const int rest = int(end - i);
  (bring(buffers, i, rest), ...);
  for (int k = 0; k < rest; ++k) element(i + k, k);
  (take_back(buffers, rest), ...);
}

#define FUSEDOPT_ONCE __attribute__((noinline))  // or compilers work on it wherever it is called
[[maybe_unused]] static FUSEDOPT_ONCE void fetch_bytes(const char* p, int64_t n) {
  for (int64_t k = 0; k < n; k += 64) __builtin_prefetch(p + k);
  asm volatile("");  // or compilers think that calls do nothing
}
template <class E>
inline void fetch(const E* p, int64_t n) {
  fetch_bytes(reinterpret_cast<const char*>(p), n * int64_t(sizeof(E)));
}
template <class F, class... E>
FUSEDOPT_INLINE inline void for_blocks(int64_t begin, int64_t end, const F& element, E&&... buffers) {
  int64_t first = begin;
  for (; first + block_size <= end; first += block_size) {
    (fetch<block_size>(buffers, first + ahead), ...);
    (bring(buffers, first, block_size), ...);
    FUSEDOPT_INDEPENDENT
    for (int64_t i = first; i < first + block_size; ++i) element(i);
    (take_back(buffers, block_size), ...);
  }
  (bring(buffers, first, end - first), ...);
  FUSEDOPT_INDEPENDENT
  for (int64_t i = first; i < end; ++i) element(i);
  (take_back(buffers, end - first), ...);
}

// Short lines of a length that is known when this is compiled have no loop, and no lanes that nobody uses.
template <int64_t n>
struct Fixed {
  constexpr operator int64_t() const { return n; }
};
// The length of a line's rest. No vectors are made of loops up to it: to compile them would take longer than all else.
struct Rest {
  int64_t n;
  operator int64_t() const {
    asm volatile("");
    return n;
  }
};
// What does not depend on each other. A loop of whose end gcc has to ask an object forgets that.
template <class F>
FUSEDOPT_INLINE inline void each(int64_t n, const F& element) {
  FUSEDOPT_INDEPENDENT
  for (int64_t c = 0; c < n; ++c) element(c);
}
template <int64_t n, class F>
FUSEDOPT_INLINE inline void each(Fixed<n>, const F& element) {
  FUSEDOPT_INDEPENDENT
  for (int64_t c = 0; c < n; ++c) element(c);
}
template <class F>
FUSEDOPT_INLINE inline void each(Rest n, const F& element) {
  for (int64_t c = 0; c < n; ++c) element(c);
}
template <class F>
FUSEDOPT_INLINE inline void with_length(int64_t n, const F& lines) {
  if (n == 3) lines(Fixed<3>{});
  else lines(n);
}

// x / n, for a whole number n from 1 up to 2^50 and an x that is not -0. Divisions take a processor long. The reciprocal is
// made once; multiplied by it, x may be a last digit or two beside the quotient, but what is left of x then is known
// exactly, and with it the quotient is rounded as division does it (Markstein, "Computation of elementary functions on
// the IBM RISC System/6000 processor", 1990): no quotient is as close to the middle of two doubles as to be mistaken.
inline double quotient(double x, int64_t n) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const double inverse = 1.0 / double(n), near = x * inverse;
  const double exact = __builtin_fma(__builtin_fma(-near, double(n), x), inverse, near);
  return exact == exact ? exact : near;  // of an infinity nothing is left
#else
  return x / double(n);
#endif
}

// Lines of three numbers, as a convolution's weights have them, are gone over many at a time, so that there are vectors
// across them: a tile. What several lines have in common is spread to each before, and what they make together is
// collected after.
constexpr int64_t tile = 3 * lanes, tiled = 3;  // lines, and how long they are

template <class X, class E>
inline X averaged(const E* p, int64_t i, Fixed<1>) {
  return load<X>(p, i);
}
template <class X>
inline X averaged(const double* p, int64_t i, int64_t n) {
  return X(quotient(p[i], n));
}
// Of each run of n lines there are m numbers, one over the length of what they are the means of.
template <int64_t m, class X, class E, class N>
static FUSEDOPT_ONCE void spread(X (*to)[tile], const E* from, int64_t line, int64_t n, N length) {
  int64_t run = line / n, at = line % n;
  fetch(from + run * m + ahead, tile / tiled * m);
  if (n == tiled && at == 0) {
    FUSEDOPT_INDEPENDENT
    for (int64_t r = 0; r < tile / tiled; ++r)
      for (int c = 0; c < m; ++c) {
        const X x = averaged<X>(from, (run + r) * m + c, length);
        for (int k = 0; k < tiled; ++k) to[c][r * tiled + k] = x;
      }
    return;
  }
  for (int64_t k = 0; k < tile; at = 0, ++run) {
    const int64_t end = n - at < tile - k ? k + n - at : tile;
    for (int c = 0; c < m; ++c) {
      const X x = averaged<X>(from, run * m + c, length);
      for (int64_t j = k; j < end; ++j) to[c][j] = x;
    }
    k = end;
  }
}
// What some lines of a tile come to, mostly all of them.
template <class R>
FUSEDOPT_INLINE inline double of_lines(const double* x, int64_t n) {
  double all = R::init;
  if (n < tile) {
    for (int64_t k = 0; k < n; ++k) all = R::join(all, x[k]);
    return all;
  }
  double lane[lanes];
  for (int k = 0; k < lanes; ++k) lane[k] = R::join(R::join(x[k], x[k + lanes]), x[k + 2 * lanes]);
  for (int k = 0; k < lanes; ++k) all = R::join(all, lane[k]);
  return all;
}
template <class R, int64_t m>
static FUSEDOPT_ONCE void collect(double* __restrict to, const double (*from)[tile], int64_t line, int64_t n) {
  int64_t run = line / n, at = line % n;
  fetch(to + run * m + ahead, tile / tiled * m);
  if (n == tiled && at == 0) {
    FUSEDOPT_INDEPENDENT
    for (int64_t r = 0; r < tile / tiled; ++r)
      for (int c = 0; c < m; ++c) {
        double x = to[(run + r) * m + c];
        for (int k = 0; k < tiled; ++k) x = R::join(x, from[c][r * tiled + k]);
        to[(run + r) * m + c] = x;
      }
    return;
  }
  for (int64_t k = 0; k < tile; at = 0, ++run) {
    const int64_t count = n - at < tile - k ? n - at : tile - k;
    for (int c = 0; c < m; ++c) to[run * m + c] = R::join(to[run * m + c], of_lines<R>(from[c] + k, count));
    k += count;
  }
}
template <class R>
static FUSEDOPT_ONCE void collect(Lanes<R>& to, const double (&from)[tiled][tile]) {
  for (int c = 0; c < tiled; ++c) to.add(c, of_lines<R>(from[c], tile));
}

// Of numbers of which it makes no difference in what order they are joined, nor in what type.
template <class R, class X>
inline X joined(const X* x, Rest n) {
  X all = X(R::init);
  for (int64_t i = 0; i < n; ++i) all = R::template join_as<X>(all, x[i]);
  return all;
}
// Those bits of a float whose order, as integers, a reduction goes by; 0 if it does not.
template <class R>
constexpr uint32_t ordered_bits = 0;
template <>
constexpr uint32_t ordered_bits<struct absmax_> = 0x7fffffff;
template <>
constexpr uint32_t ordered_bits<struct bitmax_> = 0xffffffff;
typedef uint32_t EightWords __attribute__((vector_size(32)));
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}
template <class R, class X, int64_t n>
inline X joined(const X* x, Fixed<n>) {
  if constexpr (sizeof(X) == sizeof(uint32_t) && ordered_bits<R> != 0 && n % 16 == 0) {
    EightWords most[2] = {};
    for (int64_t i = 0; i < n; i += 16)
      for (int k = 0; k < 2; ++k) {
        EightWords bits;
        __builtin_memcpy(&bits, x + i + 8 * k, sizeof bits);
        most[k] = larger(most[k], bits & ordered_bits<R>);
      }
    uint32_t all[8];
    most[0] = larger(most[0], most[1]);
    __builtin_memcpy(all, most, sizeof all);
    for (int m = 4; m > 0; m /= 2)
      for (int k = 0; k < m; ++k) all[k] = larger(all[k], all[k + m]);
    return float_from_bits(all[0]);
  }
  X lane[lanes];
  for (int k = 0; k < lanes; ++k) lane[k] = X(R::init);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int k = 0; k < lanes; ++k) lane[k] = R::template join_as<X>(lane[k], x[i + k]);
  if constexpr (n % lanes)
    for (; i < n; ++i) lane[0] = R::template join_as<X>(lane[0], x[i]);
  for (int m = lanes / 2; m > 0; m /= 2)
    for (int k = 0; k < m; ++k) lane[k] = R::template join_as<X>(lane[k], lane[k + m]);
  return lane[0];
}

// Up to so many lines of n elements, or what is left of one. Returns how many it was.
template <int64_t many, int64_t n, class F>
FUSEDOPT_INLINE inline int64_t with_lines(int64_t left, const F& lines) {
  const int64_t whole = left / n < many ? left / n : many;
  if (whole == 0) lines(Fixed<1>{}, Rest{left});
  else lines(whole, Fixed<n>{});
  return whole ? whole : 1;
}

struct Row {
  const int64_t* words;
  int64_t numel() const { return words[0]; }
  double slot(const Launch& launch, int k) const { return launch.slots[words[1] * launch.n_slots + k]; }
  template <class E>
  E* buffer(int k) const {
    return reinterpret_cast<E*>(words[head_words + k]);
  }
};

// Partial results of one reduction, joined in chunk order.
template <class R>
inline double combine(const Launch& launch, Row row, int k) {
  double x = R::init;
  for (int64_t c = row.words[2]; c < row.words[2] + row.words[3]; ++c)
    x = R::join(x, launch.partials[c * launch.n_reductions + k]);
  return x;
}

// Part results of a reduction along some axes are added up where a chunk says: in the result itself if the chunk is the
// only one for it, else apart. Its first number is that of the chunk's first element: `inside` elements have `tail`.
template <class R>
inline void clear(double* parts, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) parts[i] = R::init;
}
template <class R>
inline void join_chunks(const Launch& launch, Row row, int k, int64_t result, int64_t inside, int64_t tail, int64_t count) {
  double* __restrict whole = launch.results + result;
  const int64_t* chunk = launch.chunks + row.words[2] * launch.chunk_words;
  const int64_t* const end = chunk + row.words[3] * launch.chunk_words;
  if (chunk == end || chunk[chunk_words + k] == result) return;
  clear<R>(whole, 0, count);
  for (; chunk != end; chunk += launch.chunk_words) {
    const double* __restrict part = launch.results + chunk[chunk_words + k];
    const int64_t first = chunk[1] / inside * tail, last = ((chunk[2] - 1) / inside + 1) * tail;
    FUSEDOPT_INDEPENDENT
    for (int64_t i = first; i < last; ++i) whole[i] = R::join(whole[i], part[i]);
  }
}

#define FUSEDOPT_BLOCK_STAGE(k)                                                                                    \
  FUSEDOPT_WHOLE void fusedopt_stage_##k(const Launch* launch, int64_t begin, int64_t end) {                       \
    for (int64_t c = begin; c < end; ++c) {                                                                        \
      const int64_t* chunk = launch->chunks + c * launch->chunk_words;                                             \
      const Row row{launch->rows + chunk[0] * launch->row_words};                                                  \
      stage_##k(*launch, row, chunk[1], chunk[2], launch->partials + c * launch->n_reductions,                     \
                chunk + chunk_words);                                                                              \
    }                                                                                                              \
  }

// How many elements each place along the first axis has, if chunks have all of them: then nobody else has a part of what
// is made of them, and a chunk goes on while it is in cache. 0 if they do not.
inline int64_t whole_places(const Launch& launch, Row row, int64_t n0) {
  const int64_t each = row.numel() / n0;
  return launch.chunks[row.words[2] * launch.chunk_words + 2] % each ? 0 : each;
}

// Stage k, unless chunks have gone on to it already; of the row's words, one says how long the first axis is.
#define FUSEDOPT_CHUNKS(k, follows, word)                                                                          \
  FUSEDOPT_WHOLE void fusedopt_stage_##k(const Launch* launch, int64_t begin, int64_t end) {                       \
    for (int64_t c = begin; c < end; ++c) {                                                                        \
      const Row row{launch->rows + launch->chunks[c * launch->chunk_words] * launch->row_words};                   \
      if (!follows || !whole_places(*launch, row, row.words[word])) chunk_##k(*launch, row, c);                    \
    }                                                                                                              \
  }

#define FUSEDOPT_PLACES(k, word)                                                                                   \
  FUSEDOPT_WHOLE void fusedopt_before_##k(const Launch* launch, int64_t begin, int64_t end) {                      \
    for (int64_t r = begin; r < end; ++r) {                                                                        \
      const Row row{launch->rows + r * launch->row_words};                                                         \
      if (row.numel() > 0 && !whole_places(*launch, row, row.words[word])) before_##k(*launch, row, 0, row.words[word]); \
    }                                                                                                              \
  }

#define FUSEDOPT_BETWEEN(k)                                                                                        \
  FUSEDOPT_WHOLE void fusedopt_before_##k(const Launch* launch, int64_t begin, int64_t end) {                      \
    for (int64_t r = begin; r < end; ++r) {                                                                        \
      const Row row{launch->rows + r * launch->row_words};                                                         \
      if (row.numel() > 0) before_##k(*launch, row);                                                               \
    }                                                                                                              \
  }

#define FUSEDOPT_STAGE(k)                                                                                          \
  FUSEDOPT_WHOLE void fusedopt_stage_##k(const Launch* launch, int64_t begin, int64_t end) {                       \
    for (int64_t c = begin; c < end; ++c) {                                                                        \
      const int64_t* chunk = launch->chunks + c * chunk_words;                                                     \
      const Row row{launch->rows + chunk[0] * launch->row_words};                                                  \
      stage_##k(*launch, row, chunk[1], chunk[2], launch->partials + c * launch->n_reductions);                    \
    }                                                                                                              \
  }

#define FUSEDOPT_SCALARS                                                                                           \
  extern "C" void fusedopt_scalars(const Launch* launch, int64_t begin, int64_t end) {                             \
    for (int64_t r = begin; r < end; ++r) {                                                                        \
      const Row row{launch->rows + r * launch->row_words};                                                         \
      if (row.numel() > 0) scalars(*launch, row);                                                                  \
    }                                                                                                              \
  }

#include "cpu_example.inc"
