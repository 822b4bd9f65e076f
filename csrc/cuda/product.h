// SPDX-License-Identifier: Apache-2.0
// The product of a warp: kEights * 8 rows of weights with up to pass_rows(math) rows of the batch,
// both in shared memory (tile.h), for every Math.
//
// In all of them a lane ends up with the same kind of results: of the weights' rows those at
// weight_row() + 8 g, g < kEights, and of the batch kOfTile rows from batch_row() on in each tile
// of 8: two, or one where there are fewer than 8, so that what is done with the results occupies
// all lanes.
//   Tensor cores. An mma tile of 16 rows for every two eights; where an eight is alone, its tile
//     multiplies it twice and drops one result (a GRU's three take the time of four). One
//     ldmatrix_x4 loads what lanes need of 4 chunks of 8 rows of the batch, or of 2 chunks of 16
//     rows of weights; float32 words of TF32 fall into place as pairs of 16-bit elements do.
//   FMA. The 8 lanes that share lane / 8 take one chunk of 8 rows, which is free of bank conflicts,
//     and read one chunk of the batch, a broadcast; the 4 groups of lanes take every fourth chunk
//     and add up their sums at the end. So a batch of one row still occupies all lanes.
#pragma once

#include "cuda/math.h"
#include "cuda/tile.h"
#include "simt/simt.h"

namespace iss {

template <Math math>
struct MathTraits {
  using Element = float;
};
template <>
struct MathTraits<Math::kFloat64> {
  using Element = double;
};
template <>
struct MathTraits<Math::kBfloat16> {
  using Element = Bfloat16;
};
template <>
struct MathTraits<Math::kFloat16> {
  using Element = Float16;
};
template <Math math>
using Element = typename MathTraits<math>::Element;

// As an operand of a product.
template <Math math>
__device__ __forceinline__ Element<math> operand(Element<math> x) {
  if constexpr (math == Math::kTf32)
    return __builtin_bit_cast(float, to_tf32(x));
  else
    return x;
}

// Chunks [begin, end) of K, in rounds of 4: split's share.
struct KRange {
  int begin, end;
};
__device__ __forceinline__ KRange k_range(int chunks, int split, int splits) {
  const int rounds = chunks / 4;
  return {split * rounds / splits * 4, (split + 1) * rounds / splits * 4};
}

// kRows: of the batch; 4, 8 or 16 for tensor cores, 1, 2, 4 or, in float32, 8 for FMA. kTogether:
// rounds whose loads are under way together, as far as the caller has registers for them.
template <Math math, int kRows, int kEightsOfTile, int kTogether>
struct WarpProduct {
  using T = Element<math>;
  static constexpr int kEights = kEightsOfTile;
  static constexpr bool kTensor = uses_tensor_cores(math);
  static constexpr int kTiles = kRows > tile_rows(math) ? 2 : 1;
  static constexpr int kOfTile = kRows >= 8 ? 2 : 1;  // rows of a tile that a lane has

  Wide<T> sums[kTiles][kEights][kOfTile];

  static __device__ __forceinline__ int weight_row(int lane) {
    return kTensor ? lane / 4 : lane % 8;
  }
  // The first of the rows that a lane has; -1 where it has none.
  static __device__ __forceinline__ int batch_row(int lane) {
    const int q = kTensor ? lane % 4 : lane / 8;
    if constexpr (kRows >= 4) return kOfTile * q;
    return q * kRows % 4 == 0 ? q * kRows / 4 : -1;
  }

  // weights, vectors: the first of their rows, `stride` chunks from row to row. With tensor cores
  // the lanes of the warp must be together.
  __device__ __forceinline__ void run(const uint4* weights, const uint4* vectors, int stride,
                                      KRange k) {
    const int lane = threadIdx.x % 32;
    if constexpr (kTensor)
      multiply_tensor(weights, vectors, stride, k, lane);
    else
      multiply_fma(weights, vectors, stride, k, lane);
  }

 private:
  __device__ __forceinline__ void multiply_tensor(const uint4* weights, const uint4* vectors,
                                                  int stride, KRange k, int lane) {
    constexpr int kPairs = (kEights + 1) / 2;
    float d[kTiles][kPairs][4] = {};
    const uint4* last = weights + lane % 8 * stride + lane / 16;  // of an eight alone
    weights += lane % 16 * stride + lane / 16;
    vectors += lane % 8 * stride + lane / 8;
#pragma unroll kTogether
    for (int chunk = k.begin; chunk < k.end; chunk += 4) {
      uint32_t b[kTiles][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        ldmatrix_x4(b[tile], vectors + tile * 8 * stride + chunk);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          uint32_t a[4];
          ldmatrix_x4(
              a, (2 * pair + 1 < kEights ? weights : last) + pair * 16 * stride + chunk + 2 * half);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint32_t pair_b[2] = {b[tile][2 * half], b[tile][2 * half + 1]};
            if constexpr (math == Math::kTf32)
              mma_m16n8k8_tf32(d[tile][pair], a, pair_b);
            else
              mma_m16n8k16<T>(d[tile][pair], a, pair_b);
          }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int g = 0; g < kEights; ++g)
#pragma unroll
        for (int j = 0; j < kOfTile; ++j) sums[tile][g][j] = d[tile][g / 2][g % 2 * 2 + j];
  }

  __device__ __forceinline__ void multiply_fma(const uint4* weights, const uint4* vectors,
                                               int stride, KRange k, int lane) {
    using C = Chunk<T>;
    T d[kEights][kRows] = {};
    weights += lane % 8 * stride + lane / 8;
    vectors += lane / 8;
#pragma unroll kTogether
    for (int chunk = k.begin; chunk < k.end; chunk += 4) {
      C w[kEights];
#pragma unroll
      for (int g = 0; g < kEights; ++g)
        w[g] = __builtin_bit_cast(C, weights[g * 8 * stride + chunk]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const C x = __builtin_bit_cast(C, vectors[row * stride + chunk]);
#pragma unroll
        for (int e = 0; e < C::kSize; ++e)
#pragma unroll
          for (int g = 0; g < kEights; ++g) d[g][row] = fma(w[g].values[e], x.values[e], d[g][row]);
      }
    }
    constexpr int kHalf = (kRows + 1) / 2, kKept = (kHalf + 1) / 2;
    T half[kEights][kHalf], kept[kEights][kKept];
    add_lanes(d, half, lane, 16);
    add_lanes(half, kept, lane, 8);
#pragma unroll
    for (int g = 0; g < kEights; ++g)
#pragma unroll
      for (int j = 0; j < kOfTile; ++j) sums[0][g][j] = kept[g][j];
  }

  // Adds what the lanes on either side of `bit` have. Each keeps half of the rows and sends the
  // other half: with 4 eights 24 shuffles for 8 rows in all, not 64. A last row is kept by both.
  template <int kHeld, int kKept>
  static __device__ __forceinline__ void add_lanes(const T (&d)[kEights][kHeld],
                                                   T (&kept)[kEights][kKept], int lane, int bit) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int g = 0; g < kEights; ++g) {
#pragma unroll
      for (int row = 0; row < kKept; ++row) {
        const T low = d[g][row], high = d[g][row + kHeld - kKept];
        kept[g][row] = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, bit);
      }
    }
  }
};

}  // namespace iss
