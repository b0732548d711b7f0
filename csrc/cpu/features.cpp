#include "cpu/features.h"

#include "export.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace nd {
namespace {

#if defined(__x86_64__)

constexpr long kArchReqXcompPerm = 0x1023;
constexpr long kXfeatureTileData = 18;

bool amx_bf16_usable() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool bf16 = edx & (1u << 22), tile = edx & (1u << 24);
  return bf16 && tile && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
}

bool avx512_bf16_present() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5));
}

bool f16c_present() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & (1u << 29));
}

CpuFeatures detect() {
  __builtin_cpu_init();
  CpuFeatures f;
  f.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c_present();
  f.avx512 = f.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  f.avx512_bf16 = f.avx512 && avx512_bf16_present();
  f.amx_bf16 = f.avx512_bf16 && amx_bf16_usable();
  return f;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace nd

// Bit 0 AVX2, 1 AVX-512, 2 AVX-512 BF16, 3 AMX BF16.
ND_EXPORT unsigned nd_cpu_features() {
  const nd::CpuFeatures& f = nd::cpu_features();
  return unsigned{f.avx2} | unsigned{f.avx512} << 1 | unsigned{f.avx512_bf16} << 2 | unsigned{f.amx_bf16} << 3;
}
