// BatchNorm in training, the addition of a residual and ReLU, forward and backward; for float and bfloat16.
// `bound`, the least that a result may be, is 0 for ReLU and -infinity for none.
//
// Images are [rows, channels], channels last and a multiple of LANES. Rows are read one after the other, as main memory
// is fastest. A tile of them is summed in float, and the tiles' sums in double and in their order: the result does not
// depend on the threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr long LANES = 16;
#else  // g++ would take longer vectors' conditions apart into single values
constexpr long LANES = 8;
#endif
constexpr long TILE = 64;

using Floats = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));
using bfloat16 = uint16_t;

Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

Floats load(const bfloat16* from) {
  Halves upper;
  std::memcpy(&upper, from, sizeof upper);
  return (Floats)(__builtin_convertvector(upper, Words) << 16);
}

void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

void store(bfloat16* to, Floats values) {  // to nearest, ties to even
  Words words = (Words)values;
  words = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
  Halves upper = __builtin_convertvector(words, Halves);
  std::memcpy(to, &upper, sizeof upper);
}

// For each channel, the sums over all rows of the two vectors that pair(offset, channel) gives.
template <class Pair>
std::vector<std::pair<double, double>> sums(long rows, long channels, int threads, Pair pair) {
  const long tiles = (rows + TILE - 1) / TILE;
  std::vector<float> partial(2 * tiles * channels);
#pragma omp parallel for num_threads(threads)
  for (long tile = 0; tile < tiles; tile++)
    for (long row = tile * TILE; row < std::min(rows, (tile + 1) * TILE); row++)
      for (long channel = 0; channel < channels; channel += LANES) {
        const auto [a, b] = pair(row * channels + channel, channel);
        float* to = &partial[2 * (tile * channels + channel)];
        store(to, load(to) + a);
        store(to + LANES, load(to + LANES) + b);
      }
  std::vector<std::pair<double, double>> all(channels);
#pragma omp parallel for num_threads(threads)
  for (long channel = 0; channel < channels; channel += LANES)
    for (long tile = 0; tile < tiles; tile++)
      for (long lane = 0; lane < LANES; lane++) {
        const float* from = &partial[2 * (tile * channels + channel) + lane];
        all[channel + lane].first += from[0];
        all[channel + lane].second += from[LANES];
      }
  return all;
}

template <class Store>
void each(long rows, long channels, int threads, Store store_at) {
#pragma omp parallel for num_threads(threads)
  for (long row = 0; row < rows; row++)
    for (long channel = 0; channel < channels; channel += LANES) store_at(row * channels + channel, channel);
}

// output = max((x - mean) * inverse * weight + bias + residual, bound), of the batch's mean and variance.
// residual may be null.
template <class T>
void forward(const T* x, const T* residual, T* output, const float* weight, const float* bias, float bound,
             float epsilon, float* mean, float* variance, float* inverse, long rows, long channels, int threads) {
  std::vector<float> pivot(channels), scale(channels), shift(channels);
  const long first = std::min(rows, TILE);  // their mean is taken from all, or a large one cancels all digits
  for (long row = 0; row < first; row++)
    for (long c = 0; c < channels; c += LANES)
      store(&pivot[c], load(&pivot[c]) + load(x + row * channels + c) * (1.0f / first));
  const auto of = sums(rows, channels, threads, [&](long at, long c) {
    const Floats value = load(x + at) - load(&pivot[c]);
    return std::pair(value, value * value);
  });
  for (long c = 0; c < channels; c++) {
    const double from_pivot = of[c].first / rows;
    variance[c] = std::max(of[c].second / rows - from_pivot * from_pivot, 0.0);  // NaN stays
    mean[c] = pivot[c] + from_pivot;
    inverse[c] = 1 / std::sqrt(double(variance[c]) + epsilon);
    scale[c] = weight[c] * inverse[c];
    shift[c] = bias[c] - mean[c] * scale[c];
  }
  const auto normed = [&](long at, long c) { return load(x + at) * load(&scale[c]) + load(&shift[c]); };
  const Floats bounds = Floats{} + bound;
  const auto relu = [&](long at, Floats value) { store(output + at, value < bound ? bounds : value); };  // NaN stays
  if (residual)
    each(rows, channels, threads, [&](long at, long c) { relu(at, normed(at, c) + load(residual + at)); });
  else
    each(rows, channels, threads, [&](long at, long c) { relu(at, normed(at, c)); });
}

// gradient: of the output, which is given where a residual was added: then writes the residual's too. Writes those of
// weight and bias and, unless null, x's. Without a residual x tells what ReLU let pass, and the output is not read.
template <class T>
void backward(const T* gradient, const T* x, const T* output, T* of_residual, T* of_x, const float* weight,
              const float* bias, float bound, const float* mean, const float* inverse, float* of_weight, float* of_bias,
              long rows, long channels, int threads) {
  std::vector<float> scale(channels), shift(channels), slope(channels), offset(channels);
  for (long c = 0; c < channels; c++) {
    scale[c] = weight[c] * inverse[c];
    shift[c] = bias[c] - mean[c] * scale[c];
  }
  const auto passed = [&](long at, long c) {
    const Floats before = load(x + at) * load(&scale[c]) + load(&shift[c]);
    return before > bound ? load(gradient + at) : Floats{};
  };
  const auto pair = [&](Floats value, long at, long c) {
    return std::pair(value, value * (load(x + at) - load(mean + c)));
  };
  const auto of = !output ? sums(rows, channels, threads, [&](long at, long c) { return pair(passed(at, c), at, c); })
                          : sums(rows, channels, threads, [&](long at, long c) {
                              const Floats value = load(output + at) > bound ? load(gradient + at) : Floats{};
                              store(of_residual + at, value);
                              return pair(value, at, c);
                            });
  for (long c = 0; c < channels; c++) {
    of_bias[c] = of[c].first;
    of_weight[c] = of[c].second * inverse[c];
    slope[c] = -scale[c] * double(inverse[c]) * inverse[c] * of[c].second / rows;
    offset[c] = -scale[c] * of[c].first / rows - double(slope[c]) * mean[c];
  }
  if (!of_x) return;
  const auto write = [&](Floats value, long at, long c) {
    store(of_x + at, load(&scale[c]) * value + load(&slope[c]) * load(x + at) + load(&offset[c]));
  };
  if (output)
    each(rows, channels, threads, [&](long at, long c) { write(load(of_residual + at), at, c); });
  else
    each(rows, channels, threads, [&](long at, long c) { write(passed(at, c), at, c); });
}

}  // namespace

#define FOR(T, name)                                                                                                   \
  extern "C" void forward_##name(const T* x, const T* residual, T* output, const float* weight, const float* bias,     \
                                 float bound, float epsilon, float* mean, float* variance, float* inverse, long rows,  \
                                 long channels, int threads) {                                                         \
    forward(x, residual, output, weight, bias, bound, epsilon, mean, variance, inverse, rows, channels, threads);      \
  }                                                                                                                    \
  extern "C" void backward_##name(const T* gradient, const T* x, const T* output, T* of_residual, T* of_x,             \
                                  const float* weight, const float* bias, float bound, const float* mean,              \
                                  const float* inverse, float* of_weight, float* of_bias, long rows, long channels,    \
                                  int threads) {                                                                       \
    backward(gradient, x, output, of_residual, of_x, weight, bias, bound, mean, inverse, of_weight, of_bias, rows,     \
             channels, threads);                                                                                       \
  }

FOR(float, float32)
FOR(bfloat16, bfloat16)
