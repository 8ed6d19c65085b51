/* Attention of one new token per sequence to its pages: float32, one thread, no copy of keys or values.
 *
 * Compiled for one geometry: HEAD_DIM channels of a head, GROUP query heads that share a key head. The softmax runs
 * page by page (a running maximum and sum), so only one page of scores is in memory at a time.
 */
#include <math.h>
#include <stdint.h>

#define MAX_PAGE 256

/* e^x for x <= 0, within 2 units in the last place of float32; a polynomial, so that the compiler can vectorise it. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float t = x * 1.44269504088896341f;
    const float whole = floorf(t + 0.5f);
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } power = {((int32_t)whole + 127) << 23};
    return p * power.f;
}

/* query, output: [sequences, kv_heads * GROUP, HEAD_DIM]; keys, values: [slots, kv_heads, HEAD_DIM];
 * pages: [sequences, blocks], of which a sequence uses the first ceil(length / page_size); lengths: [sequences]. */
void paged_decode(const float *restrict query, const float *restrict keys, const float *restrict values,
                  const int64_t *restrict pages, const int64_t *restrict lengths, int64_t sequences, int64_t blocks,
                  int64_t page_size, int64_t kv_heads, float scale, float *restrict output) {
    for (int64_t one = 0; one < sequences; one++) {
        for (int64_t head = 0; head < kv_heads; head++) {
            const int64_t first = (one * kv_heads + head) * GROUP * HEAD_DIM;
            float mixed[GROUP][HEAD_DIM] = {{0}};
            float sum[GROUP] = {0}, maximum[GROUP];
            for (int g = 0; g < GROUP; g++) maximum[g] = -INFINITY;

            for (int64_t done = 0, block = 0; done < lengths[one]; done += page_size, block++) {
                const int64_t left = lengths[one] - done;
                const int count = (int)(left < page_size ? left : page_size);
                const int64_t slot = pages[one * blocks + block] * page_size;
                const float *key = keys + (slot * kv_heads + head) * HEAD_DIM;
                const float *value = values + (slot * kv_heads + head) * HEAD_DIM;
                float weights[GROUP][MAX_PAGE];
                for (int t = 0; t < count; t++)
                    for (int g = 0; g < GROUP; g++) {
                        float product = 0;
                        for (int d = 0; d < HEAD_DIM; d++)
                            product += query[first + g * HEAD_DIM + d] * key[t * kv_heads * HEAD_DIM + d];
                        weights[g][t] = product * scale;
                    }
                for (int g = 0; g < GROUP; g++) {
                    float most = maximum[g];
                    for (int t = 0; t < count; t++) most = weights[g][t] > most ? weights[g][t] : most;
                    if (most > maximum[g]) {
                        const float shrink = maximum[g] == -INFINITY ? 0.0f : exponential(maximum[g] - most);
                        sum[g] *= shrink;
                        for (int d = 0; d < HEAD_DIM; d++) mixed[g][d] *= shrink;
                        maximum[g] = most;
                    }
                    float total = 0;
                    for (int t = 0; t < count; t++) {
                        weights[g][t] = exponential(weights[g][t] - most);
                        total += weights[g][t];
                    }
                    sum[g] += total;
                }
                for (int t = 0; t < count; t++)
                    for (int g = 0; g < GROUP; g++)
                        for (int d = 0; d < HEAD_DIM; d++)
                            mixed[g][d] += weights[g][t] * value[t * kv_heads * HEAD_DIM + d];
            }
            for (int g = 0; g < GROUP; g++)
                for (int d = 0; d < HEAD_DIM; d++) output[first + g * HEAD_DIM + d] = mixed[g][d] / sum[g];
        }
    }
}
