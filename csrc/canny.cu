// Canny on the GPU: six launches for a number of frames, one thread per pixel in each, and nothing waits for the host.
// Edges are followed by union-find: kept pixels that touch are joined into trees, and a tree with a strong pixel is an edge.
// No thread waits for another one, so the same kernels run as loops on a CPU, where a header stands in for CUDA's words, launch, look, put.
#include "canny.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace {

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t threads, cudaStream_t stream, Arguments... arguments) {
  constexpr int BLOCK = 256;
  kernel<<<(unsigned)((threads + BLOCK - 1) / BLOCK), BLOCK, 0, stream>>>(arguments...);
  return (int)cudaGetLastError();
}

// Of what other threads read and write meanwhile. Each byte or word is whole, whether it is the old one or the new.
template <typename T> __device__ T look(const T *p) { return *(const volatile T *)p; }
template <typename T> __device__ void put(T *p, T value) { *(volatile T *)p = value; }

} // namespace
#endif

namespace {

constexpr int RUN = 32; // pixels of a row that get one label from the start; longer runs are joined like other neighbours

// Frames that are worked on together. Pixels have one number through all of them.
struct Frames {
  int32_t pixels; // of all
  int32_t height, width, channels;
};

struct Place {
  bool inside;
  int32_t i, x, y, frame;
};

__device__ Place place(const Frames &f) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= f.pixels) return {false, 0, 0, 0, 0};
  const int32_t row = (int32_t)i / f.width;
  return {true, (int32_t)i, (int32_t)i - row * f.width, row % f.height, row / f.height};
}

// Every tree's root is its lowest number, and a label leads to a lower one.
__device__ int32_t find_root(const int32_t *labels, int32_t i) {
  for (int32_t next = look(labels + i); next != i; next = look(labels + i)) i = next;
  return i;
}

__device__ void join(int32_t *labels, int32_t a, int32_t b) {
  a = find_root(labels, a), b = find_root(labels, b);
  while (a != b) {
    const int32_t high = a > b ? a : b, low = a > b ? b : a;
    const int32_t before = atomicMin(labels + high, low);
    if (before == high) return; // it was a root, and now hangs below the other
    a = find_root(labels, before), b = find_root(labels, low); // somebody else was faster: join what it hung below instead
  }
}

// Magnitude and direction of each pixel, in 16 bits.
__global__ void find_gradients(const uint8_t *frames, Frames f, uint16_t *gradients) {
  const Place p = place(f);
  if (!p.inside) return;
  const int32_t left = p.x > 0 ? -1 : 0, right = p.x + 1 < f.width ? 1 : 0;
  const int32_t up = p.y > 0 ? -f.width : 0, down = p.y + 1 < f.height ? f.width : 0;
  const auto sobel = [&](int32_t channel) {
    const auto at = [&](int32_t step) -> int16_t { return frames[(int64_t)(p.i + step) * f.channels + channel]; };
    return canny::sobel(at(up + left), at(up), at(up + right), at(left), at(right), at(down + left), at(down), at(down + right));
  };
  canny::Gradient g = sobel(0);
  for (int32_t channel = 1; channel < f.channels; channel++) canny::take_stronger(g, sobel(channel));
  gradients[p.i] = (uint16_t)(g.magnitude << 2 | canny::direction(g.dx, g.dy));
}

__global__ void classify(const uint16_t *gradients, Frames f, const int32_t *low, const int32_t *high, uint8_t *classes) {
  const Place p = place(f);
  if (!p.inside) return;
  const auto at = [&](int32_t dx, int32_t dy) -> int16_t {
    const bool outside = p.x + dx < 0 || p.x + dx >= f.width || p.y + dy < 0 || p.y + dy >= f.height;
    return outside ? 0 : (int16_t)(gradients[p.i + dy * f.width + dx] >> 2);
  };
  classes[p.i] = canny::classify(at(0, 0), gradients[p.i] & 3, at(-1, -1), at(0, -1), at(1, -1), at(-1, 0), at(1, 0), at(-1, 1), at(0, 1),
                                 at(1, 1), canny::thresholds(low[p.frame], high[p.frame]));
}

// Each kept pixel gets the number of the first one of its run in the row, at most RUN - 1 pixels away.
__global__ void label_runs(const uint8_t *classes, Frames f, int32_t *labels) {
  const Place p = place(f);
  if (!p.inside || classes[p.i] == canny::NONE) return;
  int32_t first = p.x;
  while (first % RUN && classes[p.i - p.x + first - 1] != canny::NONE) first--;
  labels[p.i] = p.i - p.x + first;
}

// Joins each kept pixel with its kept neighbours to the left and above, but for pairs that other pairs imply.
__global__ void join_neighbours(const uint8_t *classes, Frames f, int32_t *labels) {
  const Place p = place(f);
  if (!p.inside || classes[p.i] == canny::NONE) return;
  const auto kept = [&](int32_t dx, int32_t dy) {
    return p.x + dx >= 0 && p.x + dx < f.width && p.y + dy >= 0 && classes[p.i + dy * f.width + dx] != canny::NONE;
  };
  const bool left = kept(-1, 0), right = kept(1, 0), up_left = kept(-1, -1), up = kept(0, -1), up_right = kept(1, -1);
  if (left && p.x % RUN == 0) join(labels, p.i, p.i - 1);
  if (up) {
    if (!(left && up_left)) join(labels, p.i, p.i - f.width); // else the left pixel joins the two rows
  } else {
    if (up_left && !left) join(labels, p.i, p.i - f.width - 1);
    if (up_right && !right) join(labels, p.i, p.i - f.width + 1);
  }
}

// Points each label at its root, and makes the roots of strong pixels strong.
__global__ void mark_roots(uint8_t *classes, Frames f, int32_t *labels) {
  const Place p = place(f);
  if (!p.inside) return;
  const uint8_t own = look(classes + p.i);
  if (own == canny::NONE) return;
  const int32_t root = find_root(labels, p.i);
  put(labels + p.i, root);
  if (own == canny::STRONG) put(classes + root, canny::STRONG);
}

// Classes become edges in place. A root that its own thread has turned already reads 0 or 255 instead of WEAK or STRONG, which is as good.
__global__ void write_edges(uint8_t *classes, Frames f, const int32_t *labels) {
  const Place p = place(f);
  if (!p.inside || classes[p.i] == canny::NONE) return;
  put(classes + p.i, (uint8_t)(look(classes + labels[p.i]) >= canny::STRONG ? 255 : 0));
}

} // namespace

// frames (F, H, W, C) and edges (F, H, W) are contiguous; C is 1 or 3, no size is 0; low and high are (F). All lie on the device, as do
// gradients and labels, scratch for `together` frames, which must have less than 2^31 pixels. Returns CUDA's error, 0 if there is none.
// The number in the name goes up with any change of arguments or results, so that an older library counts as none.
extern "C" int cosmos_mp_canny_cuda_1(const uint8_t *frames, int64_t count, int64_t height, int64_t width, int64_t channels,
                                      const int32_t *low, const int32_t *high, uint8_t *edges, int64_t together, uint16_t *gradients,
                                      int32_t *labels, int32_t device, void *stream_) {
  const cudaStream_t stream = (cudaStream_t)stream_;
  int error = (int)cudaSetDevice(device);
  for (int64_t first = 0; first < count && !error; first += together) {
    const int64_t some = count - first < together ? count - first : together, pixels = some * height * width;
    const Frames f = {(int32_t)pixels, (int32_t)height, (int32_t)width, (int32_t)channels};
    const uint8_t *from = frames + first * height * width * channels;
    uint8_t *classes = edges + first * height * width;
    error = launch(find_gradients, pixels, stream, from, f, gradients);
    if (!error) error = launch(classify, pixels, stream, (const uint16_t *)gradients, f, low + first, high + first, classes);
    if (!error) error = launch(label_runs, pixels, stream, (const uint8_t *)classes, f, labels);
    if (!error) error = launch(join_neighbours, pixels, stream, (const uint8_t *)classes, f, labels);
    if (!error) error = launch(mark_roots, pixels, stream, classes, f, labels);
    if (!error) error = launch(write_edges, pixels, stream, classes, f, (const int32_t *)labels);
  }
  return error;
}
