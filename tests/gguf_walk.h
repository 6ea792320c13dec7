/* tests/gguf_walk.h - touches everything that an open directory promises to be there, so that a
 * sanitizer sees a promise that is not kept. Shared by the test and the fuzzer of core/gguf.c. */
#ifndef MOE_TESTS_GGUF_WALK_H
#define MOE_TESTS_GGUF_WALK_H

/* A sum over all bytes, strings and ends of tensors. */
MOE_UNUSED static uint64_t gguf_walk(const moe_directory *dir, bool *ok)
{
    uint64_t sum = 0;
    *ok = true;
    for (size_t i = 0; i < directory_n_meta(dir); i++) {
        const moe_meta *m = directory_meta_at(dir, i);
        moe_meta_type type = m->type == META_ARRAY ? m->item : m->type;
        *ok &= directory_meta(dir, m->key) == m;
        for (uint64_t k = 0; k < m->data_bytes; k++)
            sum += m->data[k];
        for (uint64_t k = 0; k < m->n; k++) {
            if (type != META_STRING)
                sum += (uint64_t)meta_item_i64(m, k) + (uint64_t)isnan(meta_item_f64(m, k));
            for (uint64_t c = 0; type == META_STRING && c < m->strings[k].bytes; c++)
                sum += (unsigned char)m->strings[k].data[c];
        }
        char text[128];
        sum += strlen(meta_describe(m, text, sizeof text));
    }
    for (size_t i = 0; i < directory_n_tensors(dir); i++) {
        const moe_tensor *t = directory_tensor_at(dir, i);
        *ok &= directory_tensor(dir, t->name) == t;
        *ok &= t->n_elements == t->dims[0] * t->dims[1] * t->dims[2] * t->dims[3];
        if (t->data)
            sum += t->data[0] + t->data[t->bytes - 1];
    }
    return sum;
}

#endif
