/* bench/neutral.c - a source to compare types on: build/bench/neutral SOURCE.gguf OUT.gguf
 *
 * What is published is often quantized already, and quantizing it again favours the types whose
 * values stand on the same grid. OUT is a copy in F16 in which each weight is moved by a random
 * part of its step in SOURCE, evenly distributed: the guess that adds nothing to what is known of
 * the weights. The same bytes each time. */
#include "../tests/test.h"

#include "../convert/convert.c"

enum { NEUTRAL_MOST = 256 }; // weights of a block

/* The distance of neighbouring values at each weight of a block. False: a type that is not known
 * here. */
static bool neutral_steps(const moe_quant *type, const uint8_t *block, float *step)
{
    static const char *const plain[] = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"};
    for (size_t i = 0; i < MOE_COUNT(plain); i++)
        if (type == quant_by_name(plain[i])) {
            for (uint32_t k = 0; k < type->block_len; k++)
                step[k] = f32_of_f16(load_u16(block));
            return true;
        }
    for (int k = 0; k < K_LEN; k++) {
        if (type == quant_by_name("Q6_K")) {
            const q6_k_block *b = (const q6_k_block *)block;
            step[k] = f32_of_f16(load_u16(b->d)) * (float)b->scales[k / 16];
        } else if (type == quant_by_name("Q4_K") || type == quant_by_name("Q5_K")) {
            int scale, min; // both types begin with d, dmin and the scales
            const q4_k_block *b = (const q4_k_block *)block;
            k_get_scale_min(b->scales, k / 32, &scale, &min);
            step[k] = f32_of_f16(load_u16(b->d)) * (float)scale;
        } else {
            return false;
        }
    }
    return true;
}

/* Moves the weights of a row: x [n] as they are, blocks as they stand in the source. */
static bool neutral_row(const moe_quant *type, const uint8_t *blocks, const float *x, uint16_t *out,
                        size_t n)
{
    float step[NEUTRAL_MOST];
    for (size_t i = 0; i < n; i++) {
        const size_t k = i % type->block_len;
        if (k == 0 && !neutral_steps(type, blocks + i / type->block_len * type->block_bytes, step))
            return false;
        out[i] = f16_of_f32(fmaf(0.5f * test_random_float(), step[k], x[i]));
    }
    return true;
}

static int neutral_tensor(const moe_tensor *from, const moe_tensor *to, FILE *file)
{
    const size_t n = (size_t)from->dims[0];
    const uint64_t n_rows = from->n_elements / n, row_bytes = from->bytes / n_rows;
    if (from->quant->block_len == 1)
        return 0;
    float *x = malloc(n * sizeof *x);
    uint16_t *out = malloc(n * sizeof *out);
    int result = !x || !out || to->quant != quant_by_name("F16") ||
                 fseek(file, (long)to->offset, SEEK_SET);
    for (uint64_t r = 0; r < n_rows && !result; r++) {
        const uint8_t *blocks = from->data + r * row_bytes;
        from->quant->dequantize(blocks, x, n);
        result = !neutral_row(from->quant, blocks, x, out, n) ||
                 fwrite(out, sizeof *out, n, file) != n;
    }
    if (result)
        fprintf(stderr, "neutral: %s: cannot move weights of type %s\n", from->name,
                from->quant->name);
    free(x);
    free(out);
    return result;
}

static moe_directory *neutral_open(const char *path, moe_mem *mem)
{
    moe_directory *dir = NULL;
    moe_error error = {0};
    mem_init(mem, NULL, 0);
    if (directory_open_file(&dir, path, mem, &error))
        fprintf(stderr, "neutral: %s\n", error.message);
    return dir;
}

/* Every matrix in F16. */
static bool neutral_copy(const char *source, const char *out)
{
    const conv_options options = {.source = source, .out = out, .quant = "f16"};
    conv_job job;
    moe_error error = {0};
    const moe_status status = conv_run(&job, &options, &error);
    if (status)
        fprintf(stderr, "neutral: %s\n", error.message);
    conv_close(&job);
    return !status;
}

int main(int argc, char **argv)
{
    moe_mem mem[2];
    if (argc != 3) {
        printf("usage: neutral SOURCE.gguf OUT.gguf\n");
        return argc > 1 ? 2 : 0;
    }
    if (!neutral_copy(argv[1], argv[2]))
        return 1;
    moe_directory *from = neutral_open(argv[1], &mem[0]), *to = neutral_open(argv[2], &mem[1]);
    FILE *file = fopen(argv[2], "r+b");
    int result = !from || !to || !file;
    for (size_t i = 0; !result && i < directory_n_tensors(from); i++) {
        const moe_tensor *t = directory_tensor_at(from, i);
        result = neutral_tensor(t, directory_tensor(to, t->name), file);
    }
    result |= file && fclose(file) != 0;
    directory_close(from);
    directory_close(to);
    return result;
}
