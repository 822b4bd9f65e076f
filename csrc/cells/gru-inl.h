// SPDX-License-Identifier: Apache-2.0
// torch.nn.GRU; gates r, z, n (lstm-inl.h says what a cell is). r scales the product of n before
// its input is added: n = tanh(input + r * (h @ w_hn.T + b_hn)), h' = (1 - z) * n + z * h.
struct Gru {
  static constexpr int kGates = 3, kSavedGates = 3;
  static constexpr bool kHasC = false, kSavedState = true, kProductBias = true, kSplit = true,
                        kCarries = true, kMasked = false;

  template <typename V>
  static ISS_CELL void forward(V (&gates)[3], const V (&input)[3], V before, V bias, V& saved,
                               V& h) {
    V r_z[2] = {gates[0] + input[0], gates[1] + input[1]};
    activate<false, false>(r_z);
    saved = gates[2] + bias;
    gates[0] = r_z[0];
    gates[1] = r_z[1];
    const V sum = fma(gates[0], saved, input[2]);
    gates[2] = tanh(sum);
    h = fma(gates[1], before - gates[2], gates[2]);
  }

  template <typename V>
  static ISS_CELL void backward(V dh, V, const V (&gates)[3], V saved, V before, V, V (&dinput)[3],
                                V (&dproduct)[3], V& dbefore) {
    const V one = constant<V>(1), r = gates[0], z = gates[1], n = gates[2];
    const V dn = dh * (one - z) * (one - n * n);
    dinput[0] = dproduct[0] = dn * saved * r * (one - r);
    dinput[1] = dproduct[1] = dh * (before - n) * z * (one - z);
    dinput[2] = dn;
    dproduct[2] = dn * r;
    dbefore = dh * z;
  }
};
