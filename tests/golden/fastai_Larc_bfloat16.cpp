// Larc
using T = float;
FUSEDOPT_FUNCTION(sqrt)
FUSEDOPT_REDUCTION(sum_, 0.0, a + b)

// Stage 1 of 2: reads param, grad; reduces; 4 bytes per element.
static void stage_0([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const bfloat16* __restrict param = row.buffer<const bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  Lanes<sum_> acc0;
  Lanes<sum_> acc1;
  const auto element = [&](int64_t i, int lane) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v6 = load<T>(grad, i);
    const T v8 = v2 * v2;                             // larc_layer_lr
    const T v13 = v6 * v6;                            // larc_layer_lr
    acc0.add(lane, v8);
    acc1.add(lane, v13);
  };
  for_lanes(begin, end, element, param, grad);
  partial[0] = acc0.total();
  partial[1] = acc1.total();
}
FUSEDOPT_STAGE(0)

// Stage 2 of 2: reads param, grad_avg, grad; writes param, grad_avg; 10 bytes per element.
static void stage_1([[maybe_unused]] const Launch& launch, const Row row, int64_t begin, int64_t end,
                    [[maybe_unused]] double* partial) {
  const T s0 = T(row.slot(launch, 0));              // (1 - (lr * wd))
  const T s1 = T(row.slot(launch, 1));              // mom
  const T r0 = T(combine<sum_>(launch, row, 0));    // larc_layer_lr
  const T v10 = ::sqrt(r0);                         // larc_layer_lr
  const T s2 = T(row.slot(launch, 2));              // (lr * trust_coeff)
  const T v12 = v10 * s2;                           // larc_layer_lr
  const T r1 = T(combine<sum_>(launch, row, 1));    // larc_layer_lr
  const T v15 = ::sqrt(r1);                         // larc_layer_lr
  const T s3 = T(row.slot(launch, 3));              // wd
  const T v17 = v10 * s3;                           // larc_layer_lr
  const T v18 = v15 + v17;                          // larc_layer_lr
  const T s4 = T(row.slot(launch, 4));              // eps
  const T v20 = v18 + s4;                           // larc_layer_lr
  const T v21 = v12 / v20;                          // larc_layer_lr
  const T s5 = T(row.slot(launch, 5));              // lr
  const T v23 = minimum(v21, s5);                   // larc_layer_lr
  bfloat16* __restrict param = row.buffer<bfloat16>(0);
  const bfloat16* __restrict grad = row.buffer<const bfloat16>(1);
  bfloat16* __restrict grad_avg = row.buffer<bfloat16>(2);
  const auto element = [&](int64_t i) {
    const T v0 = load<T>(param, i);
    const T v2 = v0 * s0;                             // weight_decay
    const T v3 = load<T>(grad_avg, i);
    const T v5 = v3 * s1;                             // average_grad
    const T v6 = load<T>(grad, i);
    const T v7 = v5 + v6;                             // average_grad
    const T v24 = v7 * v23;                           // larc_step
    const T v25 = v2 - v24;                           // larc_step
    store(param, i, v25);
    store(grad_avg, i, v7);
  };
  for_blocks(begin, end, element, param, grad, grad_avg);
}
FUSEDOPT_STAGE(1)

// Once per tensor, after the last stage.
static void scalars([[maybe_unused]] const Launch& launch, const Row row) {
  const T r0 = T(combine<sum_>(launch, row, 0));    // larc_layer_lr
  const T v10 = ::sqrt(r0);                         // larc_layer_lr
  const T s2 = T(row.slot(launch, 2));              // (lr * trust_coeff)
  const T v12 = v10 * s2;                           // larc_layer_lr
  const T r1 = T(combine<sum_>(launch, row, 1));    // larc_layer_lr
  const T v15 = ::sqrt(r1);                         // larc_layer_lr
  const T s3 = T(row.slot(launch, 3));              // wd
  const T v17 = v10 * s3;                           // larc_layer_lr
  const T v18 = v15 + v17;                          // larc_layer_lr
  const T s4 = T(row.slot(launch, 4));              // eps
  const T v20 = v18 + s4;                           // larc_layer_lr
  const T v21 = v12 / v20;                          // larc_layer_lr
  const T s5 = T(row.slot(launch, 5));              // lr
  const T v23 = minimum(v21, s5);                   // larc_layer_lr
  store(row.buffer<float>(3), 0, v23);
}
FUSEDOPT_SCALARS
