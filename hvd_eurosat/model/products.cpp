// Convolutions in float, channels last, as products with matrices that were prepared. The numbers of channels are
// multiples of COLUMNS. A result is summed in one order, whatever the threads.

#include <algorithm>
#include <cstring>
#include <vector>

namespace {

constexpr long LANES = 8;
constexpr long ROWS = 6, COLUMNS = 2 * LANES;        // of sums that fit into the registers of AVX2
constexpr long DEPTH = 256;                          // of a panel's part that stays in the first cache
constexpr long MANY_ROWS = 128, MANY_COLUMNS = 256;  // that a thread takes: the rows' parts stay in the second cache
constexpr long TILES = 96;                           // of Winograd's that are computed together
constexpr long OUT = 4, IN = 6;                      // pixels along a tile's side: of its result, and those around too
constexpr long PRODUCTS = IN * IN;

using Floats = float __attribute__((vector_size(4 * LANES)));

Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

struct Matrices {  // left [, depth], panels [columns / COLUMNS, depth, COLUMNS], result [, columns]
  const float *left, *panels;
  float* result;
  long depth, columns;
};

// The sums for N rows and a panel, of the depths [from, to), on top of what is there unless they are the first. Not
// inlined it takes a tenth longer.
template <long N>
[[gnu::always_inline]] inline void block(const Matrices& of, long row, long column, long from, long to) {
  const float* left = of.left + row * of.depth;
  const float* panel = of.panels + column * of.depth;
  float* result = of.result + row * of.columns + column;
  Floats sums[N][2] = {};
  if (from)
    for (long i = 0; i < N; i++)
      for (long half = 0; half < 2; half++) sums[i][half] = load(result + i * of.columns + half * LANES);
#pragma GCC unroll 4
  for (long k = from; k < to; k++) {
    const Floats first = load(panel + k * COLUMNS), second = load(panel + k * COLUMNS + LANES);
    for (long i = 0; i < N; i++) {
      const float value = left[i * of.depth + k];
      sums[i][0] += first * value;
      sums[i][1] += second * value;
    }
  }
  for (long i = 0; i < N; i++)
    for (long half = 0; half < 2; half++) store(result + i * of.columns + half * LANES, sums[i][half]);
}

// Some rows and columns of the result.
void multiply(const Matrices& of, long row, long rows, long column, long columns) {
  for (long from = 0; from < of.depth; from += DEPTH)
    for (long panel = column; panel < column + columns; panel += COLUMNS) {
      long next = row;
      const auto blocks = [&]<long N>() {
        for (; next + N <= row + rows; next += N) block<N>(of, next, panel, from, std::min(from + DEPTH, of.depth));
      };
      blocks.template operator()<ROWS>();
      blocks.template operator()<2>();
      blocks.template operator()<1>();
    }
}

// Along one side of a tile, F(4x4, 3x3) of Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks":
// images (B^T there), the results' gradient (A), and sums of products (A^T).
void transform(const Floats (&x)[IN], Floats (&to)[IN]) {
  const Floats even = x[4] - 4 * x[2], odd = x[3] - 4 * x[1], even2 = x[4] - x[2], odd2 = 2 * (x[3] - x[1]);
  to[0] = 4 * x[0] - 5 * x[2] + x[4];
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = even2 + odd2;
  to[4] = even2 - odd2;
  to[5] = 4 * x[1] - 5 * x[3] + x[5];
}

void transform(const Floats (&x)[OUT], Floats (&to)[IN]) {
  const Floats even = x[0] + x[2], odd = x[1] + x[3], even2 = x[0] + 4 * x[2], odd2 = 2 * x[1] + 8 * x[3];
  to[0] = x[0];
  to[1] = even + odd;
  to[2] = even - odd;
  to[3] = even2 + odd2;
  to[4] = even2 - odd2;
  to[5] = x[3];
}

void transform(const Floats (&x)[IN], Floats (&to)[OUT]) {
  const Floats sum = x[1] + x[2], difference = x[1] - x[2], sum2 = x[3] + x[4], difference2 = x[3] - x[4];
  to[0] = x[0] + sum + sum2;
  to[1] = difference + 2 * difference2;
  to[2] = sum + 4 * sum2;
  to[3] = difference + 8 * difference2 + x[5];
}

struct Shape {
  long images, height, width;
  long down() const { return (height + OUT - 1) / OUT; }
  long across() const { return (width + OUT - 1) / OUT; }
  long tiles() const { return images * down() * across(); }
};

struct Place {  // of a tile: its image, and its first result
  long image, top, left;
  Place(const Shape& shape, long tile)
      : image(tile / (shape.down() * shape.across())),
        top(tile / shape.across() % shape.down() * OUT),
        left(tile % shape.across() * OUT) {}
};

// Writes the tile's 36 values for each channel, `apart` floats from one to the next. N: the pixels along its side, OUT
// or with a margin IN.
template <long N>
void take_apart(const float* x, const Shape& shape, long channels, Place at, float* to, long apart) {
  constexpr long MARGIN = (N - OUT) / 2;
  for (long channel = 0; channel < channels; channel += LANES) {
    Floats half[IN][N], pixels[N], values[IN];
    for (long j = 0; j < N; j++) {
      for (long i = 0; i < N; i++) {
        const long row = at.top + i - MARGIN, column = at.left + j - MARGIN;
        const bool inside = 0 <= row && row < shape.height && 0 <= column && column < shape.width;
        const long pixel = (at.image * shape.height + row) * shape.width + column;
        pixels[i] = inside ? load(x + pixel * channels + channel) : Floats{};
      }
      transform(pixels, values);
      for (long i = 0; i < IN; i++) half[i][j] = values[i];
    }
    for (long i = 0; i < IN; i++) {
      transform(half[i], values);
      for (long j = 0; j < IN; j++) store(to + (i * IN + j) * apart + channel, values[j]);
    }
  }
}

// Of 36 sums for each channel the tile's results, as far as they are in the image.
void put_together(const float* from, long apart, float* result, const Shape& shape, long channels, Place at) {
  const long down = std::min(OUT, shape.height - at.top), across = std::min(OUT, shape.width - at.left);
  for (long channel = 0; channel < channels; channel += LANES) {
    Floats half[OUT][IN], sums[IN], values[OUT];
    for (long j = 0; j < IN; j++) {
      for (long i = 0; i < IN; i++) sums[i] = load(from + (i * IN + j) * apart + channel);
      transform(sums, values);
      for (long i = 0; i < OUT; i++) half[i][j] = values[i];
    }
    for (long i = 0; i < down; i++) {
      transform(half[i], values);
      float* row = result + ((at.image * shape.height + at.top + i) * shape.width + at.left) * channels + channel;
      for (long j = 0; j < across; j++) store(row + j * channels, values[j]);
    }
  }
}

}  // namespace

// result [rows, columns] = left [rows, depth] times the matrix of these panels [columns / COLUMNS, depth, COLUMNS].
extern "C" void product(const float* left, const float* panels, float* result, long rows, long depth, long columns,
                        int threads) {
  const Matrices of{left, panels, result, depth, columns};
#pragma omp parallel for collapse(2) num_threads(threads)
  for (long row = 0; row < rows; row += MANY_ROWS)
    for (long column = 0; column < columns; column += MANY_COLUMNS)
      multiply(of, row, std::min(MANY_ROWS, rows - row), column, std::min(MANY_COLUMNS, columns - column));
}

// The 3x3 convolution of x [images, height, width, depth], padded by a pixel: result [images, height, width, columns].
// panels: [36, columns / COLUMNS, depth, COLUMNS].
extern "C" void convolution(const float* x, const float* panels, float* result, long images, long height, long width,
                            long depth, long columns, int threads) {
  const Shape shape{images, height, width};
  const long rounds = std::max(1L, (shape.tiles() + TILES * threads - 1) / (TILES * threads));  // each thread in each
  const long some = (shape.tiles() / (rounds * threads) / ROWS + 1) * ROWS;
  const long before = some * depth + COLUMNS, after = some * columns + COLUMNS;  // powers of two share a set of lines
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> left(PRODUCTS * before), sums(PRODUCTS * after);
#pragma omp for
    for (long first = 0; first < shape.tiles(); first += some) {
      const long count = std::min(some, shape.tiles() - first);
      for (long tile = 0; tile < count; tile++)
        take_apart<IN>(x, shape, depth, Place(shape, first + tile), &left[tile * depth], before);
      for (long i = 0; i < PRODUCTS; i++)
        multiply({&left[i * before], panels + i * depth * columns, &sums[i * after], depth, columns}, 0, count, 0,
                 columns);
      for (long tile = 0; tile < count; tile++)
        put_together(&sums[tile * columns], after, result, shape, columns, Place(shape, first + tile));
    }
  }
}

// What the gradient of the weight is a product of: tiles [36, tiles, channels] of x [images, height, width, channels]
// where x is the convolution's images, or the gradient of its result.
#define TILES_OF(name, N)                                                                                              \
  extern "C" void name(const float* x, float* to, long images, long height, long width, long channels, int threads) {  \
    const Shape shape{images, height, width};                                                                          \
    _Pragma("omp parallel for num_threads(threads)") for (long tile = 0; tile < shape.tiles(); tile++)                 \
        take_apart<N>(x, shape, channels, Place(shape, tile), to + tile * channels, shape.tiles() * channels);         \
  }

TILES_OF(tiles_of_images, IN)
TILES_OF(tiles_of_gradient, OUT)
