// SGD
using T = float;

// Stage 1 of 1: reads param, grad_avg, grad; writes param, grad_avg; 10 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // -lr
  const T s1 = T(row.slot(launch, 1));              // mom
  const T s2 = T(row.slot(launch, 2));              // (1 - dampening)
  const T s3 = T(row.slot(launch, 3));              // wd
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = load<T>(grad_avg, i);
    const T v4 = v2 * s1;                             // sgd_momentum_step
    const T v6 = load<T>(grad, i);
    const T v8 = s3 * v0;                             // l2_reg
    const T v9 = v6 + v8;                             // l2_reg
    const T v10 = s2 * v9;                            // sgd_momentum_step
    const T v11 = v4 + v10;                           // sgd_momentum_step
    const T v12 = s0 * v11;                           // sgd_momentum_step
    const T v13 = v0 + v12;                           // sgd_momentum_step
    store(param, i, v13);
    store(grad_avg, i, v11);
  };
  for_blocks(begin, end, element, param, grad, grad_avg);
}
FUSEDOPT_STAGE(0)
