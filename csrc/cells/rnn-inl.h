// SPDX-License-Identifier: Apache-2.0
// torch.nn.RNN with either nonlinearity (lstm-inl.h says what a cell is). Backward needs the output
// alone.
template <bool kTanh>
struct Rnn {
  static constexpr int kGates = 1, kSavedGates = 0;
  static constexpr bool kHasC = false, kSavedState = false, kProductBias = false, kSplit = false,
                        kCarries = false, kMasked = false;

  template <typename V>
  static ISS_CELL void forward(V (&gates)[1], const V (&input)[1], V, V, V&, V& h) {
    const V sum = gates[0] + input[0];
    if constexpr (kTanh)
      h = tanh(sum);
    else
      h = relu(sum);
  }

  // y: the output of the step.
  template <typename V>
  static ISS_CELL void backward(V dh, V, const V (&)[1], V, V, V y, V (&dinput)[1], V (&)[1], V&) {
    if constexpr (kTanh)
      dinput[0] = dh * (constant<V>(1) - y * y);
    else
      dinput[0] = if_positive(y, dh);
  }
};
using RnnTanh = Rnn<true>;
using RnnRelu = Rnn<false>;
