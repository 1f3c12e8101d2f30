// Passes of the fake-quantization operation for float32 on a CPU, each one loop over the tensor (see passes.py, whose
// results these equal bit by bit but for the order of sums). Tensors are (outer, channels, inner), contiguous; values
// per channel are (channels). A plain C interface: no header of PyTorch is needed, and compiling takes seconds.

#include <cmath>
#include <cstdint>

namespace {

constexpr float RESIDUAL_STEPS = 252.0f;
constexpr float CLIPPED = 127.0f;
constexpr int64_t BLOCK = 1024;  // elements whose sum is taken in float32 before it is added up in float64

enum Keep { NOTHING = 0, MASK = 1, RESIDUAL = 2 };

// NaN passes both comparisons, as in torch.minimum and torch.maximum
inline float clip(float t, float low, float high) {
    t = t > high ? high : t;
    return t < low ? low : t;
}

template <bool mid_rise>
inline float to_level(float t) {
    return mid_rise ? std::rint(t - 0.5f) + 0.5f : std::rint(t);
}

template <bool mid_rise, int keep, bool with_codes, bool with_sums>
void quantize_row(const float* x, int64_t n, float scale, float low, float high, float* out, int8_t* byte,
                  uint8_t* codes, double* total, double* square) {
    const float edge = mid_rise ? 0.5f : 0.0f;
    const float lowest = low - edge, highest = high + edge;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        float sum = 0.0f, sum_of_squares = 0.0f;
#pragma omp simd reduction(+ : sum, sum_of_squares)
        for (int64_t i = start; i < stop; ++i) {
            const float value = x[i], t = value / scale;
            const float clipped = clip(t, lowest, highest);
            float level = to_level<mid_rise>(clipped);
            if (mid_rise) level = clip(level, low, high);
            out[i] = level * scale;
            if (keep == RESIDUAL) {
                const float excess = t - clipped;
                const float side = excess > 0.0f ? 1.0f : (excess < 0.0f ? -1.0f : 0.0f);
                float residual = level - clipped;
                if (mid_rise) residual = side == 0.0f ? residual : 0.0f;
                byte[i] = static_cast<int8_t>(std::rint(residual * RESIDUAL_STEPS + side * CLIPPED));
            }
            if (keep == MASK) byte[i] = clipped == t;
            if (with_codes) codes[i] = static_cast<uint8_t>(level - low);
            if (with_sums) {
                sum += value;
                sum_of_squares += value * value;
            }
        }
        if (with_sums) {
            *total += sum;
            *square += sum_of_squares;
        }
    }
}

template <bool mid_rise, int keep, bool with_codes, bool with_sums>
void quantize_all(const float* x, const float* scale, const float* low, const float* high, int64_t outer,
                  int64_t channels, int64_t inner, float* out, int8_t* byte, uint8_t* codes, double* sums) {
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t o = 0; o < outer; ++o) {
            const int64_t at = (o * channels + c) * inner;
            quantize_row<mid_rise, keep, with_codes, with_sums>(
                x + at, inner, scale[c], low[c], high[c], out + at, keep ? byte + at : nullptr,
                with_codes ? codes + at : nullptr, with_sums ? sums + c : nullptr,
                with_sums ? sums + channels + c : nullptr);
        }
    }
}

template <bool mid_rise, bool exact, bool needs_x, bool learned>
void gradients_row(const float* x, const int8_t* byte, const float* grad, int64_t n, float scale, float low, float high,
                   float* grad_x, double* sums) {
    const float edge = mid_rise ? 0.5f : 0.0f;
    const float lowest = low - edge, highest = high + edge;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t stop = start + BLOCK < n ? start + BLOCK : n;
        float below = 0.0f, above = 0.0f, within = 0.0f;
#pragma omp simd reduction(+ : below, above, within)
        for (int64_t i = start; i < stop; ++i) {
            const float g = grad[i];
            float residual;
            bool is_below, is_above;
            if (exact) {
                const float t = x[i] / scale;
                const float clipped = clip(t, lowest, highest);
                float level = to_level<mid_rise>(clipped);
                if (mid_rise) level = clip(level, low, high);
                residual = level - clipped;
                is_below = t < clipped;
                is_above = t > clipped;
            } else {
                const int saved = byte[i];
                residual = static_cast<float>(saved) / RESIDUAL_STEPS;
                is_below = saved == -127;
                is_above = saved == 127;
            }
            const bool inside = !(is_below || is_above);
            if (needs_x) grad_x[i] = inside ? g : 0.0f;
            if (learned) {
                below += is_below ? g : 0.0f;
                above += is_above ? g : 0.0f;
                within += inside ? residual * g : 0.0f;
            }
        }
        if (learned) {
            sums[0] += below;
            sums[1] += above;
            sums[2] += within;
        }
    }
}

template <bool mid_rise, bool exact, bool needs_x, bool learned>
void gradients_all(const void* saved, const float* grad, const float* scale, const float* low, const float* high,
                   int64_t outer, int64_t channels, int64_t inner, float* grad_x, double* sums) {
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t o = 0; o < outer; ++o) {
            const int64_t at = (o * channels + c) * inner;
            gradients_row<mid_rise, exact, needs_x, learned>(
                exact ? static_cast<const float*>(saved) + at : nullptr,
                exact ? nullptr : static_cast<const int8_t*>(saved) + at, grad + at, inner, scale[c], low[c], high[c],
                needs_x ? grad_x + at : nullptr, sums + 3 * c);
        }
    }
}

using Quantize = void (*)(const float*, const float*, const float*, const float*, int64_t, int64_t, int64_t, float*,
                          int8_t*, uint8_t*, double*);
using Gradients = void (*)(const void*, const float*, const float*, const float*, const float*, int64_t, int64_t,
                           int64_t, float*, double*);

template <bool mid_rise, int keep>
Quantize choose_quantize(bool with_codes, bool with_sums) {
    if (with_codes) return with_sums ? quantize_all<mid_rise, keep, true, true> : quantize_all<mid_rise, keep, true, false>;
    return with_sums ? quantize_all<mid_rise, keep, false, true> : quantize_all<mid_rise, keep, false, false>;
}

template <bool mid_rise, bool exact>
Gradients choose_gradients(bool needs_x, bool learned) {
    if (needs_x) return learned ? gradients_all<mid_rise, exact, true, true> : gradients_all<mid_rise, exact, true, false>;
    return learned ? gradients_all<mid_rise, exact, false, true> : gradients_all<mid_rise, exact, false, false>;
}

}  // namespace

extern "C" {

// sums: (2, channels), of x and of x^2
void qsam2_quantize(const float* x, const float* scale, const float* low, const float* high, int64_t outer,
                    int64_t channels, int64_t inner, int mid_rise, int keep, int with_codes, int with_sums, float* out,
                    int8_t* byte, uint8_t* codes, double* sums) {
    Quantize run;
    if (keep == RESIDUAL) {
        run = mid_rise ? choose_quantize<true, RESIDUAL>(with_codes, with_sums)
                       : choose_quantize<false, RESIDUAL>(with_codes, with_sums);
    } else if (keep == MASK) {
        run = mid_rise ? choose_quantize<true, MASK>(with_codes, with_sums)
                       : choose_quantize<false, MASK>(with_codes, with_sums);
    } else {
        run = mid_rise ? choose_quantize<true, NOTHING>(with_codes, with_sums)
                       : choose_quantize<false, NOTHING>(with_codes, with_sums);
    }
    run(x, scale, low, high, outer, channels, inner, out, byte, codes, sums);
}

// sums: (channels, 3), of the gradient below the range, above it, and of residual times gradient inside
void qsam2_gradients(const void* saved, const float* grad, const float* scale, const float* low, const float* high,
                     int64_t outer, int64_t channels, int64_t inner, int mid_rise, int exact, int needs_x, int learned,
                     float* grad_x, double* sums) {
    Gradients run;
    if (exact) {
        run = mid_rise ? choose_gradients<true, true>(needs_x, learned) : choose_gradients<false, true>(needs_x, learned);
    } else {
        run = mid_rise ? choose_gradients<true, false>(needs_x, learned)
                       : choose_gradients<false, false>(needs_x, learned);
    }
    run(saved, grad, scale, low, high, outer, channels, inner, grad_x, sums);
}

void qsam2_dequantize(const uint8_t* codes, const float* scale, const float* low, int64_t outer, int64_t channels,
                      int64_t inner, float* out) {
    for (int64_t o = 0; o < outer; ++o) {
        for (int64_t c = 0; c < channels; ++c) {
            const int64_t at = (o * channels + c) * inner;
            const float step = scale[c], first = low[c];
            for (int64_t i = at; i < at + inner; ++i) out[i] = (static_cast<float>(codes[i]) + first) * step;
        }
    }
}
}
