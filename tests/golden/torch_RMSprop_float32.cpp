// RMSprop
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad, sqr_avg; writes param, sqr_avg; 20 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // -lr
  const T s1 = T(row.slot(launch, 1));              // sqr_mom
  const T s2 = T(row.slot(launch, 2));              // (1 - sqr_mom)
  const T s3 = T(row.slot(launch, 3));              // eps
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict sqr_avg = row.buffer<float>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad, i);
    const T v3 = s0 * v2;                             // rms_momentum_step
    const T v4 = load<T>(sqr_avg, i);
    const T v6 = v4 * s1;                             // average_sqr_grad
    const T v8 = s2 * v2;                             // average_sqr_grad
    const T v9 = v8 * v2;                             // average_sqr_grad
    const T v10 = v6 + v9;                            // average_sqr_grad
    const T v11 = ::sqrt(v10);                        // rms_momentum_step
    const T v13 = v11 + s3;                           // rms_momentum_step
    const T v14 = v3 / v13;                           // rms_momentum_step
    const T v15 = v0 + v14;                           // rms_momentum_step
    store(param, i, v15);
    store(sqr_avg, i, v10);
  };
  for_blocks(begin, end, element, param, grad, sqr_avg);
}
FUSEDOPT_STAGE(0)
