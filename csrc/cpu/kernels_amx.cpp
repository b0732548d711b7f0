#include <immintrin.h>

#define ND_ISA_AVX512
#define ND_AMX
#define ND_TABLE kernels_amx
#include "cpu/kernels_isa.inl"
