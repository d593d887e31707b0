// The kernels for avx2,fma,f16c: this file alone is compiled for it, whatever the compiler's flags say.

#include "kernels.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "simd_avx2.h"
//
#include "kernels.inc"

const qjax::KernelTable* qjax::Avx2Kernels() {
  static const KernelTable table = MakeTable();
  return &table;
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
const qjax::KernelTable* qjax::Avx2Kernels() { return nullptr; }
#endif
