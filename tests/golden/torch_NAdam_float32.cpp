// NAdam
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad, sqr_avg, grad_avg; writes param, grad_avg, sqr_avg; 28 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // ((-lr * (1 - (mom * (1 - (0.5 * (0.96 ** ((step + 1) * momentum_decay))))))) / (1 - (mu_product * (mom * (1 - (0.5 * (0.96 ** ((step + 1) * momentum_decay))))))))
  const T s1 = T(row.slot(launch, 1));              // sqr_mom
  const T s2 = T(row.slot(launch, 2));              // (1 - sqr_mom)
  const T s3 = T(row.slot(launch, 3));              // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s4 = T(row.slot(launch, 4));              // eps
  const T s5 = T(row.slot(launch, 5));              // ((-lr * (mom * (1 - (0.5 * (0.96 ** (((step + 1) + 1) * momentum_decay)))))) / (1 - ((mu_product * (mom * (1 - (0.5 * (0.96 ** ((step + 1) * momentum_decay)))))) * (mom * (1 - (0.5 * (0.96 ** (((step + 1) + 1) * momentum_decay))))))))
  const T s6 = T(row.slot(launch, 6));              // mom
  const T s7 = T(row.slot(launch, 7));              // (1 - mom)
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict grad_avg = row.buffer<float>(2);
  float* __restrict sqr_avg = row.buffer<float>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad, i);
    const T v3 = s0 * v2;                             // nadam_step
    const T v4 = load<T>(sqr_avg, i);
    const T v6 = v4 * s1;                             // average_sqr_grad
    const T v8 = s2 * v2;                             // average_sqr_grad
    const T v9 = v8 * v2;                             // average_sqr_grad
    const T v10 = v6 + v9;                            // average_sqr_grad
    const T v12 = v10 / s3;                           // nadam_step
    const T v13 = ::sqrt(v12);                        // nadam_step
    const T v15 = v13 + s4;                           // nadam_step
    const T v16 = v3 / v15;                           // nadam_step
    const T v17 = v0 + v16;                           // nadam_step
    const T v19 = load<T>(grad_avg, i);
    const T v21 = v19 * s6;                           // average_grad
    const T v23 = s7 * v2;                            // average_grad
    const T v24 = v21 + v23;                          // average_grad
    const T v25 = s5 * v24;                           // nadam_step
    const T v26 = v25 / v15;                          // nadam_step
    const T v27 = v17 + v26;                          // nadam_step
    store(param, i, v27);
    store(grad_avg, i, v24);
    store(sqr_avg, i, v10);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)
