// SPDX-License-Identifier: Apache-2.0
// All kernels of the ISA whose Vec<T> and Dot stand above, in an order in which each file finds
// what it uses. Included into the namespace and the target region of isa_*.cpp.

#include "cpu/kernels/math-inl.h"
#include "cpu/kernels/tile-inl.h"
#include "cpu/kernels/operand_float-inl.h"
#include "cpu/kernels/operand_int8-inl.h"
#include "cpu/kernels/operand_stored-inl.h"
#ifdef ISS_AMX
#include "cpu/kernels/tiles_amx-inl.h"
#else
#include "cpu/kernels/tiles_none-inl.h"
#endif
#include "cpu/kernels/pack-inl.h"
#include "cpu/kernels/matmul-inl.h"
#include "cells/lstm-inl.h"
#include "cells/gru-inl.h"
#include "cells/rnn-inl.h"
#include "cells/rhn-inl.h"
#include "cpu/kernels/step-inl.h"
#include "cpu/kernels/group_lasso-inl.h"
#include "cpu/kernels/table-inl.h"
