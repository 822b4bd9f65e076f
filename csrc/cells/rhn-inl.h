// SPDX-License-Identifier: Apache-2.0
// A micro-step of a recurrent highway network (Zilly et al. 2017); gates candidate, transform and,
// where kCarryGate, carry (lstm-inl.h says what a cell is). The mask is that of the candidate.
template <bool kCarryGate>
struct Highway {
  static constexpr int kGates = kCarryGate ? 3 : 2, kSavedGates = kGates;
  static constexpr bool kHasC = false, kSavedState = false, kProductBias = false, kSplit = false,
                        kCarries = true, kMasked = true;

  template <typename V>
  static ISS_CELL void forward(V (&gates)[kGates], const V (&input)[kGates], V before, V mask, V&,
                               V& h) {
#pragma GCC unroll 3
    for (int k = 0; k < kGates; ++k) gates[k] = gates[k] + input[k];
    if constexpr (kCarryGate) {
      activate<true, false, false>(gates);
      h = fma(gates[1], mask * gates[0], gates[2] * before);
    } else {
      activate<true, false>(gates);
      h = fma(gates[1], mask * gates[0] - before, before);
    }
  }

  template <typename V>
  static ISS_CELL void backward(V dh, V, const V (&gates)[kGates], V mask, V before, V,
                                V (&dinput)[kGates], V (&)[kGates], V& dbefore) {
    const V one = constant<V>(1), candidate = gates[0], transform = gates[1];
    const V dtransform = dh * transform * (one - transform);
    dinput[0] = dh * transform * mask * (one - candidate * candidate);
    if constexpr (kCarryGate) {
      const V carry = gates[2];
      dinput[1] = dtransform * (mask * candidate);
      dinput[2] = dh * before * carry * (one - carry);
      dbefore = dh * carry;
    } else {
      dinput[1] = dtransform * (mask * candidate - before);
      dbefore = dh * (one - transform);
    }
  }
};
using Rhn = Highway<false>;
using RhnCarry = Highway<true>;
