// SPDX-License-Identifier: Apache-2.0
// A cell is a type: the pointwise mathematics of one time step, forward and backward, over V, a
// vector of units on the CPU and one unit on a GPU. It is compiled once per instruction set, so it
// includes nothing; V has +, -, *, and the includer defines for it
//   fma(a, b, c), tanh(x), relu(x), constant<V>(number), if_positive(y, dh): dh where y > 0 or is
//   NaN, else 0, and
//   activate<kTanh...>(V*), which applies sigmoid, or tanh where kTanh is true, to each gate.
//
// What a cell has (rnn-inl.h, gru-inl.h, rhn-inl.h: the same):
//   kGates        G, products of a unit in a step
//   kHasC         whether a state c goes from step to step beside h; `before` is c then, else h
//   kSavedGates   how many of `gates`, and kSavedState whether `saved`, backward needs
//   kProductBias  whether a bias joins the last product before the input does
//   kSplit        whether the gradients of inputs and of products differ
//   kCarries      whether a gradient goes to the step before besides that of the products
//   kMasked       whether it takes a mask, 1 where there is none: in the place of `bias`, and in
//                 backward of `saved`
//
// forward: gates holds the products h @ w_hh.T and is left with what backward needs; input holds
// x @ w_ih.T plus the biases; saved is what backward needs beside the gates: of an LSTM c.
// backward: dh is the gradient of h, carried that of the state c (LSTM); of a GRU dh includes it.
// y is the output of the step (RNN). It returns the gradients of the inputs, of the products (where
// kSplit), and of `before`.

// torch.nn.LSTM; gates i, f, g, o.
struct Lstm {
  static constexpr int kGates = 4, kSavedGates = 4;
  static constexpr bool kHasC = true, kSavedState = true, kProductBias = false, kSplit = false,
                        kCarries = true, kMasked = false;

  template <typename V>
  static ISS_CELL void forward(V (&gates)[4], const V (&input)[4], V before, V, V& saved, V& h) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) gates[k] = gates[k] + input[k];
    activate<false, false, true, false>(gates);
    saved = fma(gates[1], before, gates[0] * gates[2]);
    h = gates[3] * tanh(saved);
  }

  template <typename V>
  static ISS_CELL void backward(V dh, V carried, const V (&gates)[4], V saved, V before, V,
                                V (&dinput)[4], V (&)[4], V& dbefore) {
    const V one = constant<V>(1), i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const V tanh_c = tanh(saved);
    const V dc = fma(dh * o, one - tanh_c * tanh_c, carried);
    dinput[0] = dc * g * i * (one - i);
    dinput[1] = dc * before * f * (one - f);
    dinput[2] = dc * i * (one - g * g);
    dinput[3] = dh * tanh_c * o * (one - o);
    dbefore = dc * f;
  }
};
