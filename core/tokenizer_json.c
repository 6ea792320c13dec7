enum { JSON_MAX_BYTES = 1<<28 };
static moe_status json_tokenizer_load(moe_tokenizer *tok, const char*d, uint64_t n, moe_error*e){(void)tok;(void)d;(void)n;return fail(e,MOE_ERR_UNSUPPORTED,"x","stub");}
