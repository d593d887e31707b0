// The kernels for any CPU.

#include "kernels.h"
//
#include "simd_generic.h"
//
#include "kernels.inc"

const qjax::KernelTable* qjax::GenericKernels() {
  static const KernelTable table = MakeTable();
  return &table;
}
