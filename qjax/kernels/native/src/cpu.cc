// Which instruction sets this CPU has, and their kernels.

#include "run.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

#if defined(__x86_64__)
bool Has(int isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case QJAX_AVX2:
      return avx2;
    case QJAX_AVX_VNNI: {
      if (!avx2) return false;
      // CPUID leaf 7, sub-leaf 1, EAX bit 4: older compilers have no name for it.
      uint32_t a = 7, b, c = 1, d;
      __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
      return (a >> 4) & 1;
    }
    case QJAX_AVX512_VNNI:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni");
    default:
      return false;
  }
}
#elif defined(__aarch64__) && defined(__linux__)
bool Has(int isa) {
  const bool dot = getauxval(AT_HWCAP) & (1ul << 20);    // HWCAP_ASIMDDP
  const bool i8mm = getauxval(AT_HWCAP2) & (1ul << 13);  // HWCAP2_I8MM
  return isa == QJAX_NEON_DOT ? dot : isa == QJAX_NEON_I8MM && dot && i8mm;
}
#elif defined(__aarch64__) && defined(__APPLE__)
bool Flag(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool Has(int isa) {
  const bool dot = Flag("hw.optional.arm.FEAT_DotProd");
  return isa == QJAX_NEON_DOT ? dot : isa == QJAX_NEON_I8MM && dot && Flag("hw.optional.arm.FEAT_I8MM");
}
#else
bool Has(int) { return false; }
#endif

}  // namespace

extern "C" int qjax_has_isa(int isa) { return isa == QJAX_GENERIC || Has(isa); }

extern "C" int qjax_best_isa(void) {
  constexpr int kBestFirst[] = {QJAX_AVX512_VNNI, QJAX_AVX_VNNI, QJAX_AVX2, QJAX_NEON_I8MM, QJAX_NEON_DOT};
  for (int isa : kBestFirst) {
    if (qjax_has_isa(isa)) return isa;
  }
  return QJAX_GENERIC;
}

extern "C" const char* qjax_isa_name(int isa) {
  constexpr const char* kNames[] = {"generic", "avx2", "avx_vnni", "avx512_vnni", "neon_dot", "neon_i8mm"};
  return isa >= 0 && isa < QJAX_ISA_COUNT ? kNames[isa] : nullptr;
}

namespace qjax {

const KernelTable* TableOf(int isa) {
  if (!qjax_has_isa(isa)) return nullptr;
  switch (isa) {
    case QJAX_GENERIC:
      return GenericKernels();
    case QJAX_AVX2:
      return Avx2Kernels();
    case QJAX_AVX_VNNI:
      return AvxVnniKernels();
    case QJAX_AVX512_VNNI:
      return Avx512Kernels();
    case QJAX_NEON_DOT:
      return NeonDotKernels();
    case QJAX_NEON_I8MM:
      return NeonI8mmKernels();
    default:
      return nullptr;
  }
}

void Alone(void*, int64_t count, qjax_task task, void* arg) {
  for (int64_t i = 0; i < count; ++i) task(arg, i);
}

}  // namespace qjax
