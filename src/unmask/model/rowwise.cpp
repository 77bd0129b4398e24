// The row-wise parts of the decoder on a CPU: each reads a row once from memory and computes in float32.
// What is called from Python is at the end; shapes are there. `native.py` compiles this file.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
    // To nearest, ties to even; NaN stays NaN. Not a constructor: loops that copy structs are not made vectors of.
    void operator=(float x) {
        uint32_t u;
        std::memcpy(&u, &x, 4);
        bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &u, 4);
        return x;
    }
};

// e^x to 2 units in the last place, 0 below −88 and infinite above 88.3; NaN stays NaN. x is clipped to ±104 by its bits:
// of a clip that compares floats g++ makes branches, and masked stores that take three times as long.
inline float exponential(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    int32_t size = bits & 0x7fffffff;
    size = size > 0x42d00000 ? 0x42d00000 : size;
    bits = uint32_t(size) | (bits & 0x80000000);
    float y;
    std::memcpy(&y, &bits, 4);
    const float shift = 12582912.0f;  // 1.5 · 2²³: adding it rounds to a whole number
    const float n = (y * 1.44269504f + shift) - shift;
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t exponent = n;
    exponent = exponent < -127 ? -127 : exponent;
    exponent = exponent > 128 ? 128 : exponent;
    const int32_t power = (exponent + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale + (x != x ? x : 0.0f);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

constexpr long small = 1 << 14;  // numbers, for which waking other threads costs more than it saves
constexpr long parts = 16;       // sums over rows are made in so many parts, whatever the number of threads

inline long first(long part, long rows) { return rows * part / parts; }

template <class T>
void rms_norm(const T* x, const T* weight, float eps, long rows, long width, T* y, float* scales) {
#pragma omp parallel for if (rows * width > small)
    for (long r = 0; r < rows; r++) {
        const T* from = x + r * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += float(from[i]) * float(from[i]);
        const float scale = 1.0f / std::sqrt(sum / width + eps);
        scales[r] = scale;
#pragma omp simd
        for (long i = 0; i < width; i++) y[r * width + i] = float(from[i]) * scale * float(weight[i]);
    }
}

// One row's gradient, and its share of the weight's.
template <class T, class G>
inline void rms_norm_back(const G* grad, const T* x, const T* weight, float scale, long width, T* d_x, float* d_weight) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (long i = 0; i < width; i++) dot += float(grad[i]) * float(weight[i]) * float(x[i]);
    const float along = dot * scale * scale * scale / width;
#pragma omp simd
    for (long i = 0; i < width; i++) {
        const float g = grad[i], v = x[i];
        d_x[i] = g * float(weight[i]) * scale - v * along;
        d_weight[i] += g * v * scale;
    }
}

template <class T>
void rms_norm_backward(
    const T* grad, const T* x, const T* weight, const float* scales, long rows, long width, T* d_x, float* d_weights) {
#pragma omp parallel for if (rows * width > small)
    for (long part = 0; part < parts; part++)
        for (long r = first(part, rows); r < first(part + 1, rows); r++)
            rms_norm_back(
                grad + r * width, x + r * width, weight, scales[r], width, d_x + r * width, d_weights + part * width);
}

template <class T>
void norm_rotate(
    const T* x, const T* weight, float eps, const float* cos, const float* sin, long table_rows, long batch,
    long tokens, long heads, long size, T* y, float* scales) {
    const long half = size / 2;
#pragma omp parallel if (batch * tokens * heads * size > small)
    {
        std::vector<float> v(size);
#pragma omp for
        for (long bt = 0; bt < batch * tokens; bt++) {
            const long b = bt / tokens, t = bt % tokens;
            const float* c = cos + ((table_rows > 1 ? b : 0) * tokens + t) * size;
            const float* s = sin + ((table_rows > 1 ? b : 0) * tokens + t) * size;
            for (long h = 0; h < heads; h++) {
                const T* from = x + (bt * heads + h) * size;
                T* to = y + ((b * heads + h) * tokens + t) * size;
                if (weight) {
                    float sum = 0;
#pragma omp simd reduction(+ : sum)
                    for (long i = 0; i < size; i++) sum += float(from[i]) * float(from[i]);
                    const float scale = 1.0f / std::sqrt(sum / size + eps);
                    scales[bt * heads + h] = scale;
#pragma omp simd
                    for (long i = 0; i < size; i++) v[i] = float(from[i]) * scale * float(weight[i]);
                } else {
#pragma omp simd
                    for (long i = 0; i < size; i++) v[i] = from[i];
                }
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    to[i] = v[i] * c[i] + v[i + half] * s[i];
                    to[i + half] = v[i + half] * c[i + half] + v[i] * s[i + half];
                }
            }
        }
    }
}

template <class T>
void norm_rotate_backward(
    const T* grad, const T* x, const T* weight, const float* cos, const float* sin, const float* scales,
    long table_rows, long batch, long tokens, long heads, long size, T* d_x, float* d_weights) {
    const long half = size / 2;
#pragma omp parallel for if (batch * tokens * heads * size > small)
    for (long part = 0; part < parts; part++) {
        std::vector<float> v(size);
        for (long bt = first(part, batch * tokens); bt < first(part + 1, batch * tokens); bt++) {
            const long b = bt / tokens, t = bt % tokens;
            const float* c = cos + ((table_rows > 1 ? b : 0) * tokens + t) * size;
            const float* s = sin + ((table_rows > 1 ? b : 0) * tokens + t) * size;
            for (long h = 0; h < heads; h++) {
                const T* g = grad + ((b * heads + h) * tokens + t) * size;
                T* to = d_x + (bt * heads + h) * size;
#pragma omp simd
                for (long i = 0; i < half; i++) {
                    v[i] = float(g[i]) * c[i] + float(g[i + half]) * s[i + half];
                    v[i + half] = float(g[i + half]) * c[i + half] + float(g[i]) * s[i];
                }
                if (weight)
                    rms_norm_back(
                        v.data(), x + (bt * heads + h) * size, weight, scales[bt * heads + h], size, to,
                        d_weights + part * size);
                else
#pragma omp simd
                    for (long i = 0; i < size; i++) to[i] = v[i];
            }
        }
    }
}

template <class T>
void swiglu(const T* gate, const T* up, long n, T* y) {
#pragma omp parallel for simd if (n > small)
    for (long i = 0; i < n; i++) y[i] = float(gate[i]) * sigmoid(gate[i]) * float(up[i]);
}

template <class T>
void swiglu_backward(const T* grad, const T* gate, const T* up, long n, T* d_gate, T* d_up) {
#pragma omp parallel for simd if (n > small)
    for (long i = 0; i < n; i++) {
        const float d = grad[i], g = gate[i], open = sigmoid(g);
        d_gate[i] = d * float(up[i]) * open * (1.0f + g * (1.0f - open));
        d_up[i] = d * g * open;
    }
}

// A causal row ends early; it is computed to the end of the vector that its last position falls into, since what is
// left of a vector is done number by number.
inline long whole_vectors(long end, long limit) { return end + 15 < limit ? (end + 15) & ~15L : limit; }

template <class T>
void attention_weights(
    T* scores, float scale, const uint8_t* mask, long mask_rows, long first, long batch, long heads, long queries,
    long keys) {
#pragma omp parallel if (batch * heads * queries * keys > small)
    {
        std::vector<float> e(keys);
#pragma omp for
        for (long row = 0; row < batch * heads * queries; row++) {
            const long q = row % queries, b = row / (queries * heads);
            const long last = first < 0 ? keys - 1 : first + q, end = whole_vectors(last + 1, keys);
            const uint8_t* seen = mask ? mask + ((mask_rows > 1 ? b : 0) * queries + q) * keys : nullptr;
            T* p = scores + row * keys;
            float most = -INFINITY, sum = 0;
            if (seen) {
#pragma omp simd
                for (long i = 0; i < end; i++) e[i] = i <= last && seen[i] ? float(p[i]) * scale : -INFINITY;
            } else {
#pragma omp simd
                for (long i = 0; i < end; i++) e[i] = i <= last ? float(p[i]) * scale : -INFINITY;
            }
#pragma omp simd reduction(max : most)
            for (long i = 0; i < end; i++) most = e[i] > most ? e[i] : most;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < end; i++) {
                const float x = exponential(e[i] - most);
                e[i] = x;
                sum += x;
            }
            const float share = 1.0f / sum;
#pragma omp simd
            for (long i = 0; i < end; i++) p[i] = e[i] * share;
            std::memset(p + end, 0, (keys - end) * sizeof(T));
        }
    }
}

template <class T>
void attention_weights_backward(
    T* grad, const T* weights, float scale, long first, long rows, long queries, long keys) {
#pragma omp parallel for if (rows * keys > small)
    for (long row = 0; row < rows; row++) {
        // Weights are 0 beyond their row's end.
        const long end = first < 0 ? keys : whole_vectors(first + row % queries + 1, keys);
        T* d = grad + row * keys;
        const T* p = weights + row * keys;
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (long i = 0; i < end; i++) dot += float(d[i]) * float(p[i]);
#pragma omp simd
        for (long i = 0; i < end; i++) d[i] = float(p[i]) * (float(d[i]) - dot) * scale;
        std::memset(d + end, 0, (keys - end) * sizeof(T));
    }
}

template <class T>
void cross_entropy(T* logits, const int64_t* targets, bool slope, long rows, long vocabulary, float* losses) {
#pragma omp parallel if (rows * vocabulary > small)
    {
        std::vector<float> e(vocabulary);
#pragma omp for
        for (long r = 0; r < rows; r++) {
            T* x = logits + r * vocabulary;
            const float target = x[targets[r]];
            float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
            for (long i = 0; i < vocabulary; i++) most = float(x[i]) > most ? float(x[i]) : most;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < vocabulary; i++) {
                e[i] = exponential(float(x[i]) - most);
                sum += e[i];
            }
            losses[r] = std::log(sum) - (target - most);
            if (!slope) continue;
            const float share = 1.0f / sum;
#pragma omp simd
            for (long i = 0; i < vocabulary; i++) x[i] = e[i] * share;
            x[targets[r]] = e[targets[r]] * share - 1.0f;
        }
    }
}

}  // namespace

// R rows, D wide; (B, T, H, K) as in the decoder. T is float32 or bfloat16; sums and scales are float32. `d_weights`
// is (16, D), zeros: the caller adds up its rows.
#define EXPORT(T, name)                                                                                               \
    extern "C" {                                                                                                      \
    /* x (R, D), weight (D) -> y (R, D), scales (R) = 1/√(mean x² + ε) */                                             \
    void rms_norm_##name(const T* x, const T* weight, float eps, long rows, long width, T* y, float* scales) {        \
        rms_norm(x, weight, eps, rows, width, y, scales);                                                             \
    }                                                                                                                 \
    void rms_norm_backward_##name(const T* grad, const T* x, const T* weight, const float* scales, long rows,         \
                                  long width, T* d_x, float* d_weights) {                                             \
        rms_norm_backward(grad, x, weight, scales, rows, width, d_x, d_weights);                                      \
    }                                                                                                                 \
    /* x (B, T, H, K), weight (K) or null, cos and sin (1 or B, T, K) -> y (B, H, T, K), scales (B, T, H) */          \
    void norm_rotate_##name(const T* x, const T* weight, float eps, const float* cos, const float* sin,               \
                            long table_rows, long batch, long tokens, long heads, long size, T* y, float* scales) {   \
        norm_rotate(x, weight, eps, cos, sin, table_rows, batch, tokens, heads, size, y, scales);                     \
    }                                                                                                                 \
    void norm_rotate_backward_##name(const T* grad, const T* x, const T* weight, const float* cos, const float* sin,  \
                                     const float* scales, long table_rows, long batch, long tokens, long heads,       \
                                     long size, T* d_x, float* d_weights) {                                           \
        norm_rotate_backward(grad, x, weight, cos, sin, scales, table_rows, batch, tokens, heads, size, d_x,          \
                             d_weights);                                                                              \
    }                                                                                                                 \
    /* gate, up, y, grad: n numbers each */                                                                           \
    void swiglu_##name(const T* gate, const T* up, long n, T* y) { swiglu(gate, up, n, y); }                          \
    void swiglu_backward_##name(const T* grad, const T* gate, const T* up, long n, T* d_gate, T* d_up) {              \
        swiglu_backward(grad, gate, up, n, d_gate, d_up);                                                             \
    }                                                                                                                 \
    /* scores (B, H, T, S) -> softmax of scale · scores, in place; mask (1 or B, T, S) or null; query i sees keys up  \
       to first + i, or all if first is -1 */                                                                         \
    void attention_weights_##name(T* scores, float scale, const uint8_t* mask, long mask_rows, long first,            \
                                  long batch, long heads, long queries, long keys) {                                  \
        attention_weights(scores, scale, mask, mask_rows, first, batch, heads, queries, keys);                       \
    }                                                                                                                 \
    /* grad (R, S) of the weights -> of the scores, in place */                                                       \
    void attention_weights_backward_##name(T* grad, const T* weights, float scale, long first, long rows,             \
                                           long queries, long keys) {                                                 \
        attention_weights_backward(grad, weights, scale, first, rows, queries, keys);                                 \
    }                                                                                                                 \
    /* logits (R, V) -> losses (R) in nats; with `slope` the logits become softmax less one-hot */                    \
    void cross_entropy_##name(T* logits, const int64_t* targets, bool slope, long rows, long vocabulary,              \
                              float* losses) {                                                                        \
        cross_entropy(logits, targets, slope, rows, vocabulary, losses);                                              \
    }                                                                                                                 \
    }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
