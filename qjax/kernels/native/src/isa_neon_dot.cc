// The kernels for armv8.2-a+dotprod+fp16: this file alone is compiled for it, whatever the compiler's flags say.

#include "kernels.h"

#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,fullfp16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+fp16")
#endif
#include "simd_neon.h"
//
#include "kernels.inc"

const qjax::KernelTable* qjax::NeonDotKernels() {
  static const KernelTable table = MakeTable();
  return &table;
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
const qjax::KernelTable* qjax::NeonDotKernels() { return nullptr; }
#endif
