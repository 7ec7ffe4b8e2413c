// AdamW
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 28 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // (-lr / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s2 = T(row.slot(launch, 2));              // mom
  const T s3 = T(row.slot(launch, 3));              // (1 - mom)
  const T s4 = T(row.slot(launch, 4));              // sqr_mom
  const T s5 = T(row.slot(launch, 5));              // (1 - sqr_mom)
  const T s6 = T(row.slot(launch, 6));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s7 = T(row.slot(launch, 7));              // eps
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict grad_avg = row.buffer<float>(2);
  float* __restrict sqr_avg = row.buffer<float>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // flagged_weight_decay
    const T v4 = load<T>(grad_avg, i);
    const T v6 = v4 * s2;                             // average_grad
    const T v8 = load<T>(grad, i);
    const T v9 = s3 * v8;                             // average_grad
    const T v10 = v6 + v9;                            // average_grad
    const T v11 = s1 * v10;                           // adam_step
    const T v12 = load<T>(sqr_avg, i);
    const T v14 = v12 * s4;                           // average_sqr_grad
    const T v16 = s5 * v8;                            // average_sqr_grad
    const T v17 = v16 * v8;                           // average_sqr_grad
    const T v18 = v14 + v17;                          // average_sqr_grad
    const T v20 = v18 / s6;                           // adam_step
    const T v21 = ::sqrt(v20);                        // adam_step
    const T v23 = v21 + s7;                           // adam_step
    const T v24 = v11 / v23;                          // adam_step
    const T v25 = v2 + v24;                           // adam_step
    store(param, i, v25);
    store(grad_avg, i, v10);
    store(sqr_avg, i, v18);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)
