// The levels of x86-64 (https://gitlab.com/x86-psABIs/x86-64-ABI), of which a compiler uses any instruction when it is
// told that it may. By CPUID itself: only GCC 12 and Clang 18 take names of levels in __builtin_cpu_supports, and with
// clang-cl that needs a library that nobody links.
#pragma once
#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>

// Return the highest level that the processor and the operating system support.
static int highest_level(void) {
    const unsigned v2 = bit_SSE3 | bit_SSSE3 | bit_SSE4_1 | bit_SSE4_2 | bit_POPCNT | bit_CMPXCHG16B;
    const unsigned v2_extended = bit_LAHF_LM;
    const unsigned v3 = bit_AVX | bit_F16C | bit_FMA | bit_MOVBE | bit_OSXSAVE, v3_extended = bit_ABM;
    const unsigned v3_more = bit_AVX2 | bit_BMI | bit_BMI2;
    const unsigned v4_more = bit_AVX512F | bit_AVX512BW | bit_AVX512CD | bit_AVX512DQ | bit_AVX512VL;
    const unsigned ymm = 0x06, zmm = 0xe6; // registers that the system saves
    unsigned a, b, c, d, basic, extended, more = 0, saved = 0;
    if (!__get_cpuid(1, &a, &b, &basic, &d) || !__get_cpuid(0x80000001, &a, &b, &extended, &d)) {
        return 1;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        more = b;
    }
    if (basic & bit_OSXSAVE) {
        __asm__("xgetbv" : "=a"(saved), "=d"(d) : "c"(0));
    }
#if defined(__APPLE__)
    saved |= saved & ymm ? zmm : 0; // from their first use on
#endif
    if ((basic & v2) != v2 || (extended & v2_extended) != v2_extended) {
        return 1;
    }
    if ((basic & v3) != v3 || (extended & v3_extended) != v3_extended || (more & v3_more) != v3_more ||
        (saved & ymm) != ymm) {
        return 2;
    }
    return (more & v4_more) == v4_more && (saved & zmm) == zmm ? 4 : 3;
}
#else
static int highest_level(void) {
    return 0; // no x86-64
}
#endif
