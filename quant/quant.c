/* quant/quant.c - all formats, and how to find one. */
#ifndef MOE_QUANT_QUANT_C
#define MOE_QUANT_QUANT_C

#include "quant.h"
#include "x86.h"
#include "common.h"
#include "act.h"
#include "f32.h"
#include "f16.h"
#include "bf16.h"
#include "q4_0.h"
#include "q4_1.h"
#include "q5_0.h"
#include "q5_1.h"
#include "q8_0.h"
#include "q2_k.h"
#include "q3_k.h"
#include "q4_k.h"
#include "q5_k.h"
#include "q6_k.h"
#include "iq4_nl.h"
#include "iq4_xs.h"
#include "mxfp4.h"
#include "nvfp4.h"
#include "q1_0.h"
#include "q2_0.h"
#include "tcq4.h"
#include "tcq5.h"
#include "tcq8.h"
#include "iq2_xxs.h"
#include "iq2_xs.h"
#include "iq2_s.h"
#include "iq3_xxs.h"
#include "iq3_s.h"
#include "iq1_s.h"
#include "iq1_m.h"
#include "tq1_0.h"
#include "tq2_0.h"

static const moe_quant *const quant_table[] = {
#define X(NAME, name, id) &quant_##name,
#include "types.def"
#undef X
};

/* The place of a type in the table: for sums over all types. */
MOE_UNUSED static size_t quant_index(const moe_quant *quant)
{
    size_t i = 0;
    while (quant_table[i] != quant)
        i++;
    return i;
}

MOE_UNUSED static const moe_quant *quant_by_id(uint32_t id)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        if (quant_table[i]->id == id)
            return quant_table[i];
    return NULL;
}

static bool quant_name_equal(const char *a, const char *b)
{
    for (; *a && *b; a++, b++) {
        int x = *a >= 'a' && *a <= 'z' ? *a - 32 : *a;
        int y = *b >= 'a' && *b <= 'z' ? *b - 32 : *b;
        if (x != y)
            return false;
    }
    return *a == *b;
}

MOE_UNUSED static const moe_quant *quant_by_name(const char *name)
{
    for (size_t i = 0; i < MOE_COUNT(quant_table); i++)
        if (quant_name_equal(quant_table[i]->name, name))
            return quant_table[i];
    return NULL;
}

#endif
