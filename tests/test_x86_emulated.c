/* tests/test_x86_emulated.c - the AVX2 and AVX-512 kernels on a machine that has neither: the tests
 * of test_kernels.c, test_simd.c and test_int16.c, with every intrinsic emulated by a function
 * (emulated/x86.h, which needs SIMDe). It is slow and no part of `make test`: `make test
 * T=x86_emulated`. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#pragma GCC diagnostic ignored "-Wunused-function" /* this is only a part of the library */
#pragma GCC diagnostic ignored "-Wpsabi"           /* and it passes vectors to nobody else */
#define MOE_X86_EMULATED "../tests/emulated/x86.h"
#undef MOE_TEST_CORE
#define TEST_PROGRAMS
#define MOE_TEST_CORE "../quant/quant.c"
#include "test.h"

#include "../core/host.c"

#include "../backends/cpu_int16.h"
#include "../backends/cpu_outer.h"
#include "../backends/cpu_simd.h"

/* The machine that is emulated. */
static uint32_t cpu_detect(void)
{
    return MOE_CPU_AVX2 | MOE_CPU_AVX_VNNI | MOE_CPU_AVX512 | MOE_CPU_AVX512_VNNI |
           MOE_CPU_AVX512_BF16;
}

#include "test_kernels.c"
#include "test_int16.c"
#include "test_simd.c"

static void emulated_program(void)
{
    RUN(kernels_equal_c);
    RUN(bf16_activations_are_packed_as_documented);
    RUN(bf16_kernels_equal_c_on_all_numbers);
    RUN(bf16_sums_are_never_too_small);
    RUN(float_kernels_keep_negative_zero);
    RUN(nan_activations_give_nan);
    RUN(elementwise_equals_c);
    RUN(sums_equal_c);
    RUN(columns_equal_c);
    RUN(products_equal_c);
    RUN(f16_products_equal_c);
    RUN(odd_rows_keep_their_meaning);
    RUN(conversions_equal_c);
    RUN(products_of_integers_equal_c);
}

int main(int argc, char **argv)
{
    return test_main(argc, argv, emulated_program);
}
