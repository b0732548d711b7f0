#include <immintrin.h>

#define ND_ISA_AVX512
#define ND_TABLE kernels_avx512
#include "cpu/kernels_isa.inl"
