// RMSProp
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad, sqr_avg; writes param, sqr_avg; 20 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // -lr
  const T s2 = T(row.slot(launch, 2));              // sqr_mom
  const T s3 = T(row.slot(launch, 3));              // (1 - sqr_mom)
  const T s4 = T(row.slot(launch, 4));              // eps
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict sqr_avg = row.buffer<float>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v4 = load<T>(grad, i);
    const T v5 = s1 * v4;                             // rms_prop_step
    const T v6 = load<T>(sqr_avg, i);
    const T v8 = v6 * s2;                             // average_sqr_grad
    const T v10 = s3 * v4;                            // average_sqr_grad
    const T v11 = v10 * v4;                           // average_sqr_grad
    const T v12 = v8 + v11;                           // average_sqr_grad
    const T v13 = ::sqrt(v12);                        // rms_prop_step
    const T v15 = v13 + s4;                           // rms_prop_step
    const T v16 = v5 / v15;                           // rms_prop_step
    const T v17 = v2 + v16;                           // rms_prop_step
    store(param, i, v17);
    store(sqr_avg, i, v12);
  };
  for_blocks(begin, end, element, param, grad, sqr_avg);
}
FUSEDOPT_STAGE(0)
