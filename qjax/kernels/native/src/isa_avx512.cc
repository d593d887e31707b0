// The kernels for avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni: this file alone is compiled for it, whatever the compiler's flags say.

#include "kernels.h"

#if defined(__x86_64__)
#define QJAX_SIMD "simd_avx512.h"
#define QJAX_KERNELS Avx512Kernels
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#endif
#include "isa.inc"
#else
const qjax::KernelTable* qjax::Avx512Kernels() { return nullptr; }
#endif
