// Canny for one pixel: the arithmetic of cv2.Canny with aperture 3 and the L1 norm, all in whole numbers, the same on CPU and GPU.
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define CANNY_INLINE static __host__ __device__ __forceinline__
#else
#define CANNY_INLINE static inline __attribute__((always_inline))
#endif

namespace canny {

constexpr int MAX_MAGNITUDE = 2040; // |dx| + |dy| where each is 4 * 255

// Where a gradient points, which says what two neighbours a pixel has to exceed: left and right, above and below, upper left and lower
// right, or upper right and lower left.
constexpr int16_t HORIZONTAL = 0, VERTICAL = 1, FALLING = 2, RISING = 3;

// What a pixel is before edges are followed.
constexpr uint8_t NONE = 0, WEAK = 1, STRONG = 2;

struct Gradient {
  int16_t dx, dy, magnitude;
};

struct Thresholds {
  int16_t low, high;
};

// In order, as cv2 puts them, and in 16 bits: those outside -1..MAX_MAGNITUDE do what the nearer end does.
CANNY_INLINE Thresholds thresholds(int32_t a, int32_t b) {
  a = a < -1 ? -1 : a > MAX_MAGNITUDE ? MAX_MAGNITUDE : a;
  b = b < -1 ? -1 : b > MAX_MAGNITUDE ? MAX_MAGNITUDE : b;
  return {(int16_t)(a < b ? a : b), (int16_t)(a < b ? b : a)};
}

CANNY_INLINE int16_t absolute(int16_t x) { return (int16_t)(x < 0 ? -x : x); }

// Sobel of a channel from the eight pixels around: three above, left and right, three below. The caller repeats the border.
CANNY_INLINE Gradient sobel(int16_t ul, int16_t u, int16_t ur, int16_t l, int16_t r, int16_t dl, int16_t d, int16_t dr) {
  const int16_t dx = (int16_t)((ur - ul) + 2 * (r - l) + (dr - dl));
  const int16_t dy = (int16_t)((dl - ul) + 2 * (d - u) + (dr - ur));
  return {dx, dy, (int16_t)(absolute(dx) + absolute(dy))};
}

// The channel with the larger magnitude, the earlier one on a tie. Bits are masked because a branch would keep loops from being vectorised.
CANNY_INLINE void take_stronger(Gradient &best, Gradient later) {
  const int16_t mask = later.magnitude > best.magnitude ? -1 : 0;
  best.dx = (int16_t)((best.dx & ~mask) | (later.dx & mask));
  best.dy = (int16_t)((best.dy & ~mask) | (later.dy & mask));
  best.magnitude = (int16_t)((best.magnitude & ~mask) | (later.magnitude & mask));
}

// cv2 compares |dy| 2^15 with |dx| 13573 and |dx| (13573 + 2^16), which are tan 22.5 and tan 67.5 degrees in units of 2^-15. Here
// |dx| 13573 2^-15 is rounded down first, so that 16 bits are enough. The answer is the same, since |dy| is whole and the product is not,
// 13573 being odd, unless dx is 0. Only a pixel without any gradient then gets another direction, and it exceeds no neighbour in either.
CANNY_INLINE int16_t direction(int16_t dx, int16_t dy) {
  const uint16_t a = (uint16_t)absolute(dx), b = (uint16_t)absolute(dy), twice = (uint16_t)(2 * a);
  const uint16_t slope = (uint16_t)(((uint32_t)twice * 13573u) >> 16);
  const int16_t diagonal = (int16_t)(dx ^ dy) < 0 ? RISING : FALLING;
  const int16_t steep = b > (uint16_t)(slope + twice) ? VERTICAL : diagonal;
  return b <= slope ? HORIZONTAL : steep;
}

// The class of a pixel of magnitude m from those around, 0 outside the image. It may equal its right or lower neighbour, and no other.
CANNY_INLINE uint8_t classify(int16_t m, int16_t direction, int16_t ul, int16_t u, int16_t ur, int16_t l, int16_t r, int16_t dl, int16_t d,
                              int16_t dr, Thresholds t) {
  const int16_t axis_before = direction == VERTICAL ? u : l, axis_after = (int16_t)((direction == VERTICAL ? d : r) - 1);
  const int16_t diagonal_before = direction == RISING ? ur : ul, diagonal_after = direction == RISING ? dl : dr;
  const int16_t before = direction >= FALLING ? diagonal_before : axis_before;
  const int16_t after = direction >= FALLING ? diagonal_after : axis_after;
  const bool kept = (m > t.low) & (m > before) & (m > after);
  return kept ? (m > t.high ? STRONG : WEAK) : NONE;
}

} // namespace canny
