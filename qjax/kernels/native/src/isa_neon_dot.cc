// The kernels for armv8.2-a+dotprod+fp16: this file alone is compiled for it, whatever the compiler's flags say.

#include "kernels.h"

#if defined(__aarch64__)
#define QJAX_SIMD "simd_neon.h"
#define QJAX_KERNELS NeonDotKernels
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod,fullfp16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+fp16")
#endif
#include "isa.inc"
#else
const qjax::KernelTable* qjax::NeonDotKernels() { return nullptr; }
#endif
