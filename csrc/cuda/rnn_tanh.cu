// SPDX-License-Identifier: Apache-2.0
#define ISS_CELL_KIND CellKind::kRnnTanh
#include "cuda/cell_kernels-inl.h"
