// Runs Canny over the cases of a file, each in memory of just its size, for the sanitizers. Compiled together with canny.cpp, or with
// -DTWIN and canny.cu through cuda_on_cpu.h, then in scattered order on four threads. A case is six int64, F H W C low high, and the
// frames; the answers are the edges in turn.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

using Bytes = uint8_t *;
using Numbers = const int32_t *;
extern "C" int cosmos_mp_canny_cpu_1(const uint8_t *, int64_t, int64_t, int64_t, int64_t, Numbers, Numbers, Bytes, int32_t);
extern "C" int cosmos_mp_canny_cuda_1(const uint8_t *, int64_t, int64_t, int64_t, int64_t, Numbers, Numbers, Bytes, int64_t, uint16_t *,
                                      int32_t *, int32_t, void *);

extern "C" void cuda_on_cpu(int, int, int);

int main(int, char **arguments) {
  FILE *cases = fopen(arguments[1], "rb"), *answers = fopen(arguments[2], "wb");
  int64_t n[6];
  while (fread(n, sizeof(n), 1, cases) == 1) {
    const int64_t pixels = n[1] * n[2];
    std::vector<uint8_t> frames(n[0] * pixels * n[3]), edges(n[0] * pixels);
    std::vector<int32_t> low(n[0], (int32_t)n[4]), high(n[0], (int32_t)n[5]);
    if (fread(frames.data(), 1, frames.size(), cases) != frames.size()) return 2;
#ifdef TWIN
    cuda_on_cpu(2, 3, 4);
    const int64_t together = (n[0] + 1) / 2;
    std::vector<uint16_t> gradients(together * pixels);
    std::vector<int32_t> labels(together * pixels);
    const int error = cosmos_mp_canny_cuda_1(frames.data(), n[0], n[1], n[2], n[3], low.data(), high.data(), edges.data(), together,
                                             gradients.data(), labels.data(), 0, nullptr);
#else
    const int error = cosmos_mp_canny_cpu_1(frames.data(), n[0], n[1], n[2], n[3], low.data(), high.data(), edges.data(), 2);
#endif
    if (error || fwrite(edges.data(), 1, edges.size(), answers) != edges.size()) return 3;
  }
  return fclose(answers) ? 4 : 0;
}
