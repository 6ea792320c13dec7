/* tests/models.h - models and sessions for tests. What cannot be opened is a failure and NULL. */
#ifndef MOE_TESTS_MODELS_H
#define MOE_TESTS_MODELS_H

#include "test.h"

MOE_UNUSED static moe_model *open_model(const moe_model_options *o)
{
    moe_model *model = NULL;
    moe_error error = {0};
    moe_status status = moe_model_open(&model, o, &error);
    CHECK(status == MOE_OK && model, "%s: %s: %s", o->path ? o->path : "(no path)",
          moe_status_name(status), error.message);
    return model;
}

/* tests/fixtures/NAME.gguf. The path is good until the next call. */
MOE_UNUSED static const char *fixture_path(const char *name)
{
    static char path[512];
    snprintf(path, sizeof path, "%s/fixtures/%s.gguf", test_root(), name);
    return path;
}

MOE_UNUSED static moe_model *open_fixture(const char *name)
{
    moe_model_options o;
    moe_model_options_init(&o);
    o.path = fixture_path(name);
    return open_model(&o);
}

MOE_UNUSED static moe_session *open_session(moe_model *model, const moe_session_options *o)
{
    moe_session *session = NULL;
    moe_error error = {0};
    moe_status status = moe_session_open(&session, model, o, &error);
    CHECK(status == MOE_OK && session, "%s: %s", moe_status_name(status), error.message);
    return session;
}

MOE_UNUSED static uint32_t vocab_of(const moe_model *model)
{
    moe_model_info info = {.size = sizeof info};
    moe_model_get_info(model, &info);
    return info.n_vocab;
}

#endif
