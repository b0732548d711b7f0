#define ND_TABLE kernels_portable
#include "cpu/kernels_isa.inl"
