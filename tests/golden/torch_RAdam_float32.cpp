// RAdam
using T = float;

// Stage 1 of 1: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 28 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (-lr / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s1 = T(row.slot(launch, 1));              // mom
  const T s2 = T(row.slot(launch, 2));              // (1 - mom)
  const T s3 = T(row.slot(launch, 3));              // sqr_mom
  const T s4 = T(row.slot(launch, 4));              // (1 - sqr_mom)
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict grad_avg = row.buffer<float>(2);
  float* __restrict sqr_avg = row.buffer<float>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad_avg, i);
    const T v4 = v2 * s1;                             // average_grad
    const T v6 = load<T>(grad, i);
    const T v7 = s2 * v6;                             // average_grad
    const T v8 = v4 + v7;                             // average_grad
    const T v9 = s0 * v8;                             // radam_step
    const T v10 = v0 + v9;                            // radam_step
    const T v11 = load<T>(sqr_avg, i);
    const T v13 = v11 * s3;                           // average_sqr_grad
    const T v15 = s4 * v6;                            // average_sqr_grad
    const T v16 = v15 * v6;                           // average_sqr_grad
    const T v17 = v13 + v16;                          // average_sqr_grad
    store(param, i, v10);
    store(grad_avg, i, v8);
    store(sqr_avg, i, v17);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)

// RAdam
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad_avg, grad, sqr_avg; writes param, grad_avg, sqr_avg; 28 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // ((-lr * ((((((((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))) - 4) * ((((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))) - 2)) * ((2 / (1 - sqr_mom)) - 1)) / (((((2 / (1 - sqr_mom)) - 1) - 4) * (((2 / (1 - sqr_mom)) - 1) - 2)) * (((2 / (1 - sqr_mom)) - 1) - (((2 * (step + 1)) * (sqr_mom ** (step + 1))) / (1 - (sqr_mom ** (step + 1))))))) ** 0.5)) / (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom)))
  const T s1 = T(row.slot(launch, 1));              // mom
  const T s2 = T(row.slot(launch, 2));              // (1 - mom)
  const T s3 = T(row.slot(launch, 3));              // sqr_mom
  const T s4 = T(row.slot(launch, 4));              // (1 - sqr_mom)
  const T s5 = T(row.slot(launch, 5));              // eps
  const T s6 = T(row.slot(launch, 6));              // ((((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom)) ** 0.5)
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict grad_avg = row.buffer<float>(2);
  float* __restrict sqr_avg = row.buffer<float>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad_avg, i);
    const T v4 = v2 * s1;                             // average_grad
    const T v6 = load<T>(grad, i);
    const T v7 = s2 * v6;                             // average_grad
    const T v8 = v4 + v7;                             // average_grad
    const T v9 = s0 * v8;                             // radam_step
    const T v10 = load<T>(sqr_avg, i);
    const T v12 = v10 * s3;                           // average_sqr_grad
    const T v14 = s4 * v6;                            // average_sqr_grad
    const T v15 = v14 * v6;                           // average_sqr_grad
    const T v16 = v12 + v15;                          // average_sqr_grad
    const T v17 = ::sqrt(v16);                        // radam_step
    const T v19 = v17 + s5;                           // radam_step
    const T v21 = v19 / s6;                           // radam_step
    const T v22 = v9 / v21;                           // radam_step
    const T v23 = v0 + v22;                           // radam_step
    store(param, i, v23);
    store(grad_avg, i, v8);
    store(sqr_avg, i, v16);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)
