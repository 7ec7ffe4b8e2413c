// Adagrad
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad, sqr_sum; writes param, sqr_sum; 20 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (-lr / (1 + (((step + 1) - 1) * lr_decay)))
  const T s1 = T(row.slot(launch, 1));              // eps
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict sqr_sum = row.buffer<float>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad, i);
    const T v3 = s0 * v2;                             // adagrad_step
    const T v4 = load<T>(sqr_sum, i);
    const T v5 = v2 * v2;                             // adagrad_step
    const T v6 = v4 + v5;                             // adagrad_step
    const T v7 = ::sqrt(v6);                          // adagrad_step
    const T v9 = v7 + s1;                             // adagrad_step
    const T v10 = v3 / v9;                            // adagrad_step
    const T v11 = v0 + v10;                           // adagrad_step
    store(param, i, v11);
    store(sqr_sum, i, v6);
  };
  for_blocks(begin, end, element, param, grad, sqr_sum);
}
FUSEDOPT_STAGE(0)
