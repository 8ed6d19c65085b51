/* What a decoder layer does to each of a few tokens beside attention: float32, one thread.
 *
 * For few tokens an operation of PyTorch's takes longer to start than to compute, and some of these are several.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "exponential.h"

#define LANES 16
#define VECTORS 8 /* of columns, at most, and */
#define ROWS 6    /* rows of a block of a product: what fits into registers */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* output[r] = input[r] / sqrt(mean(input[r]^2) + epsilon) * weight; rows of `width`. */
void rms_norm(const float *restrict input, const float *restrict weight, int64_t rows, int64_t width, float epsilon,
              float *restrict output) {
    for (int64_t r = 0; r < rows; r++, input += width, output += width) {
        float sum = 0;
        for (int64_t d = 0; d < width; d++) sum += input[d] * input[d];
        const float factor = 1.0f / sqrtf(sum / width + epsilon);
        for (int64_t d = 0; d < width; d++) output[d] = input[d] * factor * weight[d];
    }
}

/* output[r] = silu(gate[r]) * up[r]; rows of `input` are a gate and an up of `width` each. */
void gated_silu(const float *restrict input, int64_t rows, int64_t width, float *restrict output) {
    for (int64_t r = 0; r < rows; r++, input += 2 * width, output += width)
        for (int64_t d = 0; d < width; d++) {
            const float gate = input[d], power = exponential(-fabsf(gate));
            output[d] = gate * (gate < 0 ? power : 1.0f) / (1.0f + power) * input[width + d];
        }
}

/* A block of the product: `rows` rows, and `vectors` vectors of columns, whose sums stay in registers. */
static inline __attribute__((always_inline)) void block(const int rows, const int vectors, const float *input, int64_t in, const float *weight,
                  const float *bias, const float *onto, int64_t out, float *output) {
    lanes sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            sums[r][v] = bias ? *(const lanes *)(bias + v * LANES) : (lanes){0};
            if (onto) sums[r][v] += *(const lanes *)(onto + r * out + v * LANES);
        }
    for (int64_t i = 0; i < in; i++, weight += out) {
        lanes own[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) own[v] = *(const lanes *)(weight + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; v++) sums[r][v] += input[r * in + i] * own[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) *(lanes *)(output + r * out + v * LANES) = sums[r][v];
}

/* Some vectors of columns of the product. */
static inline __attribute__((always_inline)) void columns(const int vectors, const float *input, int64_t rows, int64_t in, const float *weight,
                    const float *bias, const float *onto, int64_t out, float *output) {
    for (int64_t r = 0, some; r < rows; r += some) {
        const int64_t left = rows - r;
        some = left == 7 || left == 8 ? 4 : left < ROWS ? left : ROWS;
        const float *from = input + r * in, *on = onto ? onto + r * out : NULL;
        float *to = output + r * out;
        switch (some) {
        case 1: block(1, vectors, from, in, weight, bias, on, out, to); break;
        case 2: block(2, vectors, from, in, weight, bias, on, out, to); break;
        case 3: block(3, vectors, from, in, weight, bias, on, out, to); break;
        case 4: block(4, vectors, from, in, weight, bias, on, out, to); break;
        case 5: block(5, vectors, from, in, weight, bias, on, out, to); break;
        default: block(6, vectors, from, in, weight, bias, on, out, to);
        }
    }
}

/* output = input @ weight + bias + onto, for few rows: the weight is read once, and each row's result is the same beside
 * any other rows. input: [rows, in]; weight: [in, out]; bias: [out] or NULL; onto: [rows, out] or NULL. */
void product(const float *input, int64_t rows, int64_t in, const float *weight, const float *bias, const float *onto,
             int64_t out, float *output) {
    int64_t o = 0;
#define AT weight + o, bias ? bias + o : NULL, onto ? onto + o : NULL, out, output + o
    if (rows == 1) /* more sums at a time: each waits for the last one */
        for (; o + 8 * LANES <= out; o += 8 * LANES) block(1, 8, input, in, AT);
    for (; o + 4 * LANES <= out; o += 4 * LANES) columns(4, input, rows, in, AT);
    for (; o + LANES <= out; o += LANES) columns(1, input, rows, in, AT);
    for (; o < out; o++)
        for (int64_t r = 0; r < rows; r++) {
            float sum = (bias ? bias[o] : 0) + (onto ? onto[r * out + o] : 0);
            for (int64_t i = 0; i < in; i++) sum += input[r * in + i] * weight[i * out + o];
            output[r * out + o] = sum;
        }
}
