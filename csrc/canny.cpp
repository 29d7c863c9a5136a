// Canny on the CPU. OpenMP's threads share out the frames; within a frame one thread follows the edges with a stack.
#include "canny.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

// Loops over rows are compiled twice, and the dynamic loader takes what suits the machine: with GCC and glibc, and without sanitizers.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define CANNY_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define CANNY_CLONES
#endif

namespace {

constexpr int64_t PIXELS_PER_THREAD = 1 << 16; // for less, a tenth of a millisecond, waking a thread and waiting for it does not pay

// A child of fork() has none of OpenMP's threads and would wait for them for ever, so it works with one.
bool forked = false;
__attribute__((constructor)) void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

// What a thread needs for a frame, and for the next one. Rows of pixels and magnitudes begin one element before the image.
struct Workspace {
  const int64_t height, width, channels;
  const int64_t row;      // elements of a row of pixels of one channel, or of magnitudes
  const int64_t stride;   // bytes of a row of classes
  void *memory;           // all that follows; null if there is none
  uint32_t *stack;        // places in `classes`; none comes twice
  int16_t *pixels[3];     // rows of the image, each channel by itself, in turn
  int16_t *magnitudes[3]; // rows, in turn
  int16_t *directions[2]; // rows, in turn
  uint8_t *frontier;      // a row
  uint8_t *classes;       // the frame, with NONE all around

  Workspace(int64_t height, int64_t width, int64_t channels)
      : height(height), width(width), channels(channels), row(width + 2), stride(width + 2) {
    const int64_t pixel_bytes = 4 * height * width, row_bytes = 2 * (3 * channels + 3 + 2) * row, frontier_bytes = width + 8;
    const int64_t class_bytes = (height + 2) * stride;
    memory = class_bytes <= UINT32_MAX ? malloc(pixel_bytes + row_bytes + frontier_bytes + class_bytes) : nullptr;
    if (!memory) return;
    stack = (uint32_t *)memory;
    int16_t *next = (int16_t *)(stack + height * width);
    memset(next, 0, row_bytes + frontier_bytes + class_bytes);
    for (auto &rows : pixels) rows = next, next += channels * row;
    for (auto &rows : magnitudes) rows = next, next += row;
    for (auto &rows : directions) rows = next, next += row;
    frontier = (uint8_t *)next;
    classes = frontier + frontier_bytes;
  }
  ~Workspace() { free(memory); }
  Workspace(const Workspace &) = delete;
};

// A row of the image into one row per channel, its ends repeated outside.
CANNY_CLONES void spread(const uint8_t *__restrict__ from, int64_t width, int64_t channels, int64_t row, int16_t *__restrict__ to) {
  if (channels == 1) {
    for (int64_t x = 0; x < width; x++) to[x + 1] = from[x];
  } else {
    int16_t *__restrict__ first = to + 1, *__restrict__ second = first + row, *__restrict__ third = second + row;
    for (int64_t x = 0; x < width; x++) {
      first[x] = from[3 * x];
      second[x] = from[3 * x + 1];
      third[x] = from[3 * x + 2];
    }
  }
  for (int64_t c = 0; c < channels; c++, to += row) {
    to[0] = to[1];
    to[width + 1] = to[width];
  }
}

template <int CHANNELS>
CANNY_INLINE void find_gradients(const int16_t *__restrict__ up, const int16_t *__restrict__ at, const int16_t *__restrict__ down,
                                 int64_t width, int64_t row, int16_t *__restrict__ magnitudes, int16_t *__restrict__ directions) {
  const auto sobel = [=](int64_t i) {
    return canny::sobel(up[i], up[i + 1], up[i + 2], at[i], at[i + 2], down[i], down[i + 1], down[i + 2]);
  };
#pragma omp simd
  for (int64_t x = 0; x < width; x++) {
    canny::Gradient g = sobel(x);
    if (CHANNELS == 3) {
      canny::take_stronger(g, sobel(x + row));
      canny::take_stronger(g, sobel(x + 2 * row));
    }
    magnitudes[x + 1] = g.magnitude;
    directions[x] = canny::direction(g.dx, g.dy);
  }
}

// Magnitudes and directions of a row from the rows of pixels above, at and below it.
CANNY_CLONES void find_row(const int16_t *up, const int16_t *at, const int16_t *down, int64_t width, int64_t channels, int64_t row,
                           int16_t *magnitudes, int16_t *directions) {
  if (channels == 3)
    find_gradients<3>(up, at, down, width, row, magnitudes, directions);
  else
    find_gradients<1>(up, at, down, width, row, magnitudes, directions);
}

// Classes of a row from the rows of magnitudes above, at and below it.
CANNY_CLONES void classify_row(const int16_t *__restrict__ up, const int16_t *__restrict__ at, const int16_t *__restrict__ down,
                               const int16_t *__restrict__ directions, int64_t width, canny::Thresholds t, uint8_t *__restrict__ classes) {
#pragma omp simd
  for (int64_t x = 0; x < width; x++)
    classes[x] = canny::classify(at[x + 1], directions[x], up[x], up[x + 1], up[x + 2], at[x], at[x + 2], down[x], down[x + 1],
                                 down[x + 2], t);
}

// Marks the strong pixels of a row that have a weak one beside them.
CANNY_CLONES void mark_row(const uint8_t *__restrict__ at, int64_t stride, int64_t width, uint8_t *__restrict__ frontier) {
  const uint8_t *__restrict__ up = at - stride, *__restrict__ down = at + stride;
#pragma omp simd
  for (int64_t x = 0; x < width; x++) {
    const uint8_t around = up[x - 1] | up[x] | up[x + 1] | at[x - 1] | at[x + 1] | down[x - 1] | down[x] | down[x + 1];
    frontier[x] = at[x] == canny::STRONG && (around & canny::WEAK);
  }
}

CANNY_CLONES void write_row(const uint8_t *__restrict__ classes, int64_t width, uint8_t *__restrict__ edges) {
#pragma omp simd
  for (int64_t x = 0; x < width; x++) edges[x] = classes[x] == canny::STRONG ? 255 : 0;
}

// Weak pixels that are connected with a strong one become strong.
void follow_edges(Workspace &w) {
  uint32_t *top = w.stack;
  for (int64_t y = 1; y <= w.height; y++) {
    const int64_t first = y * w.stride + 1;
    mark_row(w.classes + first, w.stride, w.width, w.frontier);
    for (int64_t x = 0; x < w.width; x += 8) { // few are marked: eight at a time are passed over
      uint64_t eight;
      memcpy(&eight, w.frontier + x, 8);
      for (int64_t i = x; eight && i < x + 8; i++)
        if (w.frontier[i]) *top++ = (uint32_t)(first + i);
    }
  }
  const int64_t around[8] = {-w.stride - 1, -w.stride, -w.stride + 1, -1, 1, w.stride - 1, w.stride, w.stride + 1};
  while (top != w.stack) {
    const int64_t place = *--top;
    for (int64_t step : around)
      if (w.classes[place + step] == canny::WEAK) {
        w.classes[place + step] = canny::STRONG;
        *top++ = (uint32_t)(place + step);
      }
  }
}

void find_edges(Workspace &w, const uint8_t *frame, canny::Thresholds t, uint8_t *edges) {
  const int64_t last = w.height - 1;
  const auto pixels = [&](int64_t y) { return w.pixels[(y < 0 ? 0 : y > last ? last : y) % 3]; };
  const auto magnitudes = [&](int64_t y) { return w.magnitudes[(y + 3) % 3]; };
  const auto read = [&](int64_t y) { spread(frame + y * w.width * w.channels, w.width, w.channels, w.row, pixels(y)); };

  memset(magnitudes(-1), 0, 2 * w.row);
  read(0);
  for (int64_t y = 0; y <= w.height; y++) { // gradients of row y, then classes of the row above it
    if (y < last) read(y + 1);
    if (y <= last)
      find_row(pixels(y - 1), pixels(y), pixels(y + 1), w.width, w.channels, w.row, magnitudes(y), w.directions[y % 2]);
    else
      memset(magnitudes(y), 0, 2 * w.row);
    uint8_t *classes = w.classes + y * w.stride + 1; // of row y - 1: the first one is a border
    if (y > 0) classify_row(magnitudes(y - 2), magnitudes(y - 1), magnitudes(y), w.directions[(y - 1) % 2], w.width, t, classes);
  }
  follow_edges(w);
  for (int64_t y = 0; y <= last; y++) write_row(w.classes + (y + 1) * w.stride + 1, w.width, edges + y * w.width);
}

} // namespace

// frames (F, H, W, C) and edges (F, H, W) are contiguous; C is 1 or 3, no size is 0; low and high are (F). Returns 0, or 1 without memory.
// The number in the name goes up with any change of arguments or results, so that an older library counts as none.
extern "C" int cosmos_mp_canny_cpu_1(const uint8_t *frames, int64_t count, int64_t height, int64_t width, int64_t channels,
                                     const int32_t *low, const int32_t *high, uint8_t *edges, int32_t threads) {
  int failed = 0;
  const int64_t most = count * height * width / PIXELS_PER_THREAD;
  if (threads > count) threads = (int32_t)count;
  if (threads > most) threads = (int32_t)most;
  if (threads < 1 || forked) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
  {
    Workspace w(height, width, channels);
    failed = !w.memory;
#pragma omp for schedule(dynamic)
    for (int64_t f = 0; f < count; f++) {
      const int64_t pixels = height * width;
      if (!failed) find_edges(w, frames + f * pixels * channels, canny::thresholds(low[f], high[f]), edges + f * pixels);
    }
  }
  return failed;
}
