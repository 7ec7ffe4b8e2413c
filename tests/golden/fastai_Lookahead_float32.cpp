// Lookahead_SGD
using T = float;

// Stage 1 of 1: reads param, grad; writes param, slow; 16 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // -lr
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict slow = row.buffer<float>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v4 = load<T>(grad, i);
    const T v5 = s1 * v4;                             // sgd_step
    const T v6 = v2 + v5;                             // sgd_step
    store(param, i, v6);
    store(slow, i, v0);
  };
  for_blocks(begin, end, element, param, grad, slow);
}
FUSEDOPT_STAGE(0)

// Lookahead_SGD
using T = float;

// Stage 1 of 1: reads param, grad; writes param; 12 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // -lr
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v4 = load<T>(grad, i);
    const T v5 = s1 * v4;                             // sgd_step
    const T v6 = v2 + v5;                             // sgd_step
    store(param, i, v6);
  };
  for_blocks(begin, end, element, param, grad);
}
FUSEDOPT_STAGE(0)

// Lookahead_SGD
using T = float;

// Stage 1 of 1: reads slow, param, grad; writes param, slow; 20 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // lookahead_alpha
  const T s1 = T(row.slot(launch, 1));              // (1 - (lr * wd))
  const T s2 = T(row.slot(launch, 2));              // -lr
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict slow = row.buffer<float>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(slow, i);
    const T v2 = load<T>(param, i);
    const T v4 = v2 * s1;                             // weight_decay
    const T v6 = load<T>(grad, i);
    const T v7 = s2 * v6;                             // sgd_step
    const T v8 = v4 + v7;                             // sgd_step
    const T v9 = v8 - v0;                             // lookahead
    const T v10 = s0 * v9;                            // lookahead
    const T v11 = v0 + v10;                           // lookahead
    store(param, i, v11);
    store(slow, i, v11);
  };
  for_blocks(begin, end, element, param, grad, slow);
}
FUSEDOPT_STAGE(0)
