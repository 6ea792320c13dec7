/* core/host.c - the small public functions: status names, the version, the cancel flag, and the
 * defaults of the option structs.
 *
 * Owns nothing. Must never: do anything that could fail. */
#ifndef MOE_CORE_HOST_C
#define MOE_CORE_HOST_C

#include "base.h"

MOE_API const char *moe_status_name(moe_status status)
{
    static const char *const names[] = {
        [MOE_OK] = "MOE_OK",
        [MOE_ERR_ARGUMENT] = "MOE_ERR_ARGUMENT",
        [MOE_ERR_MEMORY] = "MOE_ERR_MEMORY",
        [MOE_ERR_LIMIT] = "MOE_ERR_LIMIT",
        [MOE_ERR_IO] = "MOE_ERR_IO",
        [MOE_ERR_FORMAT] = "MOE_ERR_FORMAT",
        [MOE_ERR_MODEL] = "MOE_ERR_MODEL",
        [MOE_ERR_UNSUPPORTED] = "MOE_ERR_UNSUPPORTED",
        [MOE_ERR_CONTEXT] = "MOE_ERR_CONTEXT",
        [MOE_ERR_CANCELLED] = "MOE_ERR_CANCELLED",
        [MOE_ERR_THREAD] = "MOE_ERR_THREAD",
        [MOE_ERR_TEXT] = "MOE_ERR_TEXT",
        [MOE_ERR_BACKEND] = "MOE_ERR_BACKEND",
    };
    return (size_t)status < MOE_COUNT(names) ? names[(size_t)status] : "unknown status";
}

#define HOST_TEXT_OF(x) #x
#define HOST_VERSION(major, minor, patch)                                                          \
    HOST_TEXT_OF(major) "." HOST_TEXT_OF(minor) "." HOST_TEXT_OF(patch)

MOE_API const char *moe_version(void)
{
    return HOST_VERSION(MOE_VERSION_MAJOR, MOE_VERSION_MINOR, MOE_VERSION_PATCH);
}

/* A lock-free store: safe in a signal handler. The flag orders nothing but itself. */
MOE_API void moe_cancel_set(moe_cancel *cancel)
{
    __atomic_store_n(&cancel->flag, 1, __ATOMIC_RELAXED);
}

MOE_API void moe_cancel_clear(moe_cancel *cancel)
{
    __atomic_store_n(&cancel->flag, 0, __ATOMIC_RELAXED);
}

MOE_API void moe_host_init(moe_host *host)
{
    *host = (moe_host){.size = sizeof *host};
}

MOE_API void moe_model_options_init(moe_model_options *options)
{
    *options = (moe_model_options){.size = sizeof *options};
}

MOE_API void moe_session_options_init(moe_session_options *options)
{
    *options = (moe_session_options){.size = sizeof *options, .n_batch = 512, .n_logits = 1,
                                     .n_draft = 8};
}

MOE_API void moe_observer_init(moe_observer *observer)
{
    *observer = (moe_observer){.size = sizeof *observer};
}

MOE_API void moe_sampler_options_init(moe_sampler_options *options)
{
    *options = (moe_sampler_options){
        .size = sizeof *options,
        .penalty_window = 64,
        .repetition_penalty = 1.0f,
        .top_p = 1.0f,
    };
}

#endif
