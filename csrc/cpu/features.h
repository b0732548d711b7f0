// What this processor can run, asked once. Code built for an instruction set runs only behind one of these.
//
// Files named *_avx2.cpp, *_avx512.cpp and *_amx.cpp are compiled with wider instructions than the rest of
// the library. They hold static functions and plain data only: an inline function of a header (a std::
// template, say) compiled there could be the copy the linker keeps for everybody.
#pragma once

namespace nd {

struct CpuFeatures {
  bool avx2 = false;         // with FMA and F16C
  bool avx512 = false;       // F, BW, DQ, VL
  bool avx512_bf16 = false;  // with the above
  bool amx_bf16 = false;     // tiles usable by this process: the kernel's permission was asked and given
};

// Thread-safe; the first call may ask the kernel for the AMX state.
const CpuFeatures& cpu_features();

}  // namespace nd
