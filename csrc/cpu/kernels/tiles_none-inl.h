// SPDX-License-Identifier: Apache-2.0
// For an ISA without units that multiply tiles: the names of tiles_amx-inl.h, which it never uses.

constexpr bool kHasTiles = false;

template <int kVectors>
struct PairTiles;
template <int kVectors>
struct Int8Tiles;
template <int kVectors, typename... Arguments>
void each_product(const Arguments&...);
