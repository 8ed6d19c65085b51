/* Attention of one new token per sequence to its pages: float32, one thread, no copy of keys or values. The new key and
 * value are written first; the rotary embedding is applied on the way.
 *
 * Compiled for one geometry: HEAD_DIM channels of a head, GROUP query heads that share a key head, PAGE tokens of a page,
 * LANES channels of a vector, which divide HEAD_DIM. The softmax runs page by page (a running maximum and sum), so only
 * one page of scores is in memory at a time.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "exponential.h"

#define VECTORS (HEAD_DIM / LANES)
#define CACHE_LINE 16 /* floats */

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

static inline float total(lanes value) {
#if LANES == 16
    typedef float half __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    const union { lanes whole; half parts[2]; } all = {value};
    const union { half whole; quarter parts[2]; } halves = {all.parts[0] + all.parts[1]};
    const quarter sums = halves.parts[0] + halves.parts[1];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
#else
    float sum = 0;
    for (int k = 0; k < LANES; k++) sum += value[k];
    return sum;
#endif
}

/* Copy a head, and rotate each pair of adjacent channels by a complex number of `freqs`; NULL: it is rotated already. */
static inline void rotate(const float *restrict head, const float *restrict freqs, float *restrict rotated) {
    if (!freqs) {
        memcpy(rotated, head, HEAD_DIM * sizeof *head);
        return;
    }
    for (int d = 0; d < HEAD_DIM; d += 2) {
        rotated[d] = head[d] * freqs[d] - head[d + 1] * freqs[d + 1];
        rotated[d + 1] = head[d] * freqs[d + 1] + head[d + 1] * freqs[d];
    }
}

/* The query heads that share a key head, and what they have mixed so far. */
struct group {
    lanes query[GROUP][VECTORS], mixed[GROUP][VECTORS];
    float sum[GROUP], maximum[GROUP];
};

/* Attend to the first `count` tokens of a page; `step` floats lie between a token's keys and the next one's. Pages are
 * apart, and the processor does not know which comes next: so the keys and values at `next` are fetched meanwhile. */
static inline __attribute__((always_inline)) void attend(struct group *own, const float *keys, const float *values,
                                                         int64_t step, int64_t place, int64_t next, int count) {
    const float *key = keys + place, *value = values + place;
    float weights[GROUP][PAGE];
    for (int t = 0; t < count; t++) {
        for (int d = 0; d < HEAD_DIM; d += CACHE_LINE) {
            __builtin_prefetch(keys + next + t * step + d);
            __builtin_prefetch(values + next + t * step + d);
        }
        for (int g = 0; g < GROUP; g++) {
            lanes products = own->query[g][0] * *(const lanes *)(key + t * step);
            for (int v = 1; v < VECTORS; v++)
                products += own->query[g][v] * *(const lanes *)(key + t * step + v * LANES);
            weights[g][t] = total(products);
        }
    }
    for (int g = 0; g < GROUP; g++) {
        float most = own->maximum[g];
        for (int t = 0; t < count; t++) most = weights[g][t] > most ? weights[g][t] : most;
        if (most > own->maximum[g]) {
            const float shrink = own->maximum[g] == -INFINITY ? 0.0f : exponential(own->maximum[g] - most);
            own->sum[g] *= shrink;
            for (int v = 0; v < VECTORS; v++) own->mixed[g][v] *= shrink;
            own->maximum[g] = most;
        }
        float sum = 0;
        for (int t = 0; t < count; t++) {
            weights[g][t] = exponential(weights[g][t] - most);
            sum += weights[g][t];
        }
        own->sum[g] += sum;
    }
    for (int g = 0; g < GROUP; g++)
        for (int v = 0; v < VECTORS; v++) {
            lanes mixed = own->mixed[g][v];
            for (int t = 0; t < count; t++) mixed += weights[g][t] * *(const lanes *)(value + t * step + v * LANES);
            own->mixed[g][v] = mixed;
        }
}

/* states: rows of kv_heads * GROUP query heads, kv_heads key heads and as many value heads; freqs: [sequences, HEAD_DIM]
 * or NULL; keys, values: [slots, kv_heads, HEAD_DIM]; pages: [sequences, blocks], of which a sequence uses the first
 * ceil(length / PAGE); lengths: [sequences], the new tokens included; output: [sequences, kv_heads * GROUP, HEAD_DIM]. */
void paged_decode(const float *restrict states, const float *restrict freqs, float *restrict keys,
                  float *restrict values, const int64_t *restrict pages, const int64_t *restrict lengths,
                  int64_t sequences, int64_t blocks, int64_t kv_heads, float scale, float *restrict output) {
    const int64_t step = kv_heads * HEAD_DIM;
    for (int64_t one = 0; one < sequences; one++) {
        const float *query = states + one * (GROUP + 2) * step, *key = query + GROUP * step, *value = key + step;
        const float *own_freqs = freqs ? freqs + one * HEAD_DIM : NULL;
        const int64_t *own_pages = pages + one * blocks, last = lengths[one] - 1;
        const int64_t slot = own_pages[last / PAGE] * PAGE + last % PAGE;
        for (int64_t head = 0; head < kv_heads; head++)
            rotate(key + head * HEAD_DIM, own_freqs, keys + slot * step + head * HEAD_DIM);
        memcpy(values + slot * step, value, step * sizeof *value);

        for (int64_t head = 0; head < kv_heads; head++) {
            struct group own;
            for (int g = 0; g < GROUP; g++) {
                float rotated[HEAD_DIM];
                rotate(query + (head * GROUP + g) * HEAD_DIM, own_freqs, rotated);
                for (int v = 0; v < VECTORS; v++) {
                    own.query[g][v] = *(const lanes *)(rotated + v * LANES) * scale;
                    own.mixed[g][v] = (lanes){0};
                }
                own.sum[g] = 0;
                own.maximum[g] = -INFINITY;
            }
            for (int64_t done = 0, block = 0; done <= last; done += PAGE, block++) {
                const int64_t after = done + PAGE <= last ? own_pages[block + 1] : own_pages[0];
                const int64_t place = own_pages[block] * PAGE * step + head * HEAD_DIM;
                const int64_t next = after * PAGE * step + (done + PAGE <= last ? head : head + 1) * HEAD_DIM;
                if (last + 1 - done >= PAGE) /* the usual case, with a number that the compiler knows */
                    attend(&own, keys, values, step, place, next, PAGE);
                else
                    attend(&own, keys, values, step, place, next, (int)(last + 1 - done));
            }
            float *mixed = output + (one * kv_heads + head) * GROUP * HEAD_DIM;
            for (int g = 0; g < GROUP; g++)
                for (int v = 0; v < VECTORS; v++)
                    *(lanes *)(mixed + g * HEAD_DIM + v * LANES) = own.mixed[g][v] / own.sum[g];
        }
    }
}
