// SPDX-License-Identifier: Apache-2.0
// The kernels of the ISA that this is compiled for; constant, so it is no code of that ISA itself.

template <typename T>
constexpr Kernels<T> table() {
  return {
      .lanes = Vec<T>::kLanes,
      .tile_rows = Vec<T>::kTileRows,
      .depth = Dot::kDepth,
      .bfloat16 = Format::kBfloat16,
      .int8 = Format::kInt8,
      .pack = &pack<T>,
      .matmul = &matmul<T>,
      .transpose = &transpose<T>,
      .cells = {{&step<Lstm, T>, &step_backward<Lstm, T>},
                {&step<Gru, T>, &step_backward<Gru, T>},
                {&step<RnnTanh, T>, &step_backward<RnnTanh, T>},
                {&step<RnnRelu, T>, &step_backward<RnnRelu, T>},
                {&step<Rhn, T>, &step_backward<Rhn, T>},
                {&step<RhnCarry, T>, &step_backward<RhnCarry, T>}},
  };
}

template <typename W>
constexpr GroupLassoKernels<W> lasso_table() {
  return {
      .squares = &squares<W>,
      .add_scaled = &by_units<W, ByUnits::kAddScaled>,
      .scale = &by_units<W, ByUnits::kScale>,
      .threshold = &by_units<W, ByUnits::kThreshold>,
  };
}

// All of them. bfloat16, int8: what weights of these types are packed as.
constexpr CpuKernels all_kernels(const char* isa, bool (*supported)(),
                                 Format bfloat16 = Format::kBfloat16, Format int8 = Format::kInt8) {
  CpuKernels kernels = {
      .isa = isa,
      .supported = supported,
      .f32 = table<float>(),
      .f64 = table<double>(),
      .lasso_f32 = lasso_table<float>(),
      .lasso_f64 = lasso_table<double>(),
      .lasso_bf16 = lasso_table<Bfloat16>(),
  };
  kernels.f32.bfloat16 = bfloat16;
  kernels.f32.int8 = int8;
  return kernels;
}
