// The kernels for avx2,fma,f16c,avxvnni: this file alone is compiled for it, whatever the compiler's flags say.

#include "kernels.h"

#if defined(__x86_64__)
#define QJAX_SIMD "simd_avx2.h"
#define QJAX_KERNELS AvxVnniKernels
#define QJAX_VNNI256 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avxvnni")
#endif
#include "isa.inc"
#else
const qjax::KernelTable* qjax::AvxVnniKernels() { return nullptr; }
#endif
