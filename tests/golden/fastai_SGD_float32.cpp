// SGD
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
