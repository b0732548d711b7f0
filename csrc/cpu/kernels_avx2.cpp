#include <immintrin.h>

#define ND_ISA_AVX2
#define ND_TABLE kernels_avx2
#include "cpu/kernels_isa.inl"
