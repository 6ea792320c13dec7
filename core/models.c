/* core/models.c - the table of families. */
#ifndef MOE_CORE_MODELS_C
#define MOE_CORE_MODELS_C

#include "model_gemma.c"
#include "model_llama.c"

static const moe_family *const family_table[] = {
#define X(name) &family_##name,
#include "models.def"
#undef X
};

static const moe_family *family_by_arch(const char *arch)
{
    for (size_t i = 0; i < MOE_COUNT(family_table); i++)
        if (!strcmp(family_table[i]->arch, arch))
            return family_table[i];
    return NULL;
}

static void family_list(char *buf, size_t buf_bytes)
{
    size_t used = 0;
    for (size_t i = 0; i < MOE_COUNT(family_table) && used < buf_bytes; i++)
        used += (size_t)snprintf(buf + used, buf_bytes - used, "%s%s", i ? ", " : "",
                                 family_table[i]->arch);
}

#endif
