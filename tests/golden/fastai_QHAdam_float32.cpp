// QHAdam
using T = float;
FUSEDOPT_FUNCTION(sqrt)

// Stage 1 of 1: reads param, grad, grad_avg, sqr_avg; writes param, grad_avg, sqr_avg; 28 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // -lr
  const T s2 = T(row.slot(launch, 2));              // (1 - nu_1)
  const T s3 = T(row.slot(launch, 3));              // mom
  const T s4 = T(row.slot(launch, 4));              // (1 - mom)
  const T s5 = T(row.slot(launch, 5));              // (((1 - mom) * (1 - (mom ** (step + 1)))) / (1 - mom))
  const T s6 = T(row.slot(launch, 6));              // nu_1
  const T s7 = T(row.slot(launch, 7));              // (1 - nu_2)
  const T s8 = T(row.slot(launch, 8));              // sqr_mom
  const T s9 = T(row.slot(launch, 9));              // (1 - sqr_mom)
  const T s10 = T(row.slot(launch, 10));            // (((1 - sqr_mom) * (1 - (sqr_mom ** (step + 1)))) / (1 - sqr_mom))
  const T s11 = T(row.slot(launch, 11));            // nu_2
  const T s12 = T(row.slot(launch, 12));            // eps
  float* __restrict param = row.buffer<float>(0);
  const float* __restrict grad = row.buffer<const float>(1);
  float* __restrict grad_avg = row.buffer<float>(2);
  float* __restrict sqr_avg = row.buffer<float>(3);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v4 = load<T>(grad, i);
    const T v6 = v4 * s2;                             // qhadam_step
    const T v7 = load<T>(grad_avg, i);
    const T v9 = v7 * s3;                             // average_grad
    const T v11 = s4 * v4;                            // average_grad
    const T v12 = v9 + v11;                           // average_grad
    const T v14 = v12 / s5;                           // qhadam_step
    const T v16 = v14 * s6;                           // qhadam_step
    const T v17 = v6 + v16;                           // qhadam_step
    const T v18 = s1 * v17;                           // qhadam_step
    const T v19 = v4 * v4;                            // qhadam_step
    const T v21 = v19 * s7;                           // qhadam_step
    const T v22 = load<T>(sqr_avg, i);
    const T v24 = v22 * s8;                           // average_sqr_grad
    const T v26 = s9 * v4;                            // average_sqr_grad
    const T v27 = v26 * v4;                           // average_sqr_grad
    const T v28 = v24 + v27;                          // average_sqr_grad
    const T v30 = v28 / s10;                          // qhadam_step
    const T v32 = v30 * s11;                          // qhadam_step
    const T v33 = v21 + v32;                          // qhadam_step
    const T v34 = ::sqrt(v33);                        // qhadam_step
    const T v36 = v34 + s12;                          // qhadam_step
    const T v37 = v18 / v36;                          // qhadam_step
    const T v38 = v2 + v37;                           // qhadam_step
    store(param, i, v38);
    store(grad_avg, i, v12);
    store(sqr_avg, i, v28);
  };
  for_blocks(begin, end, element, param, grad, grad_avg, sqr_avg);
}
FUSEDOPT_STAGE(0)
