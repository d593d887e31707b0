// What every call of core.h needs: its table of kernels, its tasks on threads, memory for them.

#ifndef QJAX_RUN_H_
#define QJAX_RUN_H_

#include <stdlib.h>

#include "kernels.h"

namespace qjax {

// Bytes of weights that one task reads, as a rule.
constexpr int64_t kTaskBytes = 1 << 16;

inline int64_t Ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of one thread, kept for its next task.
class Scratch {
 public:
  ~Scratch() { free(memory_); }
  // `count` floats, or nullptr.
  float* Floats(int64_t count) {
    const size_t size = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
    if (size > size_) {
      free(memory_);
      memory_ = aligned_alloc(64, size);
      size_ = memory_ == nullptr ? 0 : size;
    }
    return static_cast<float*>(memory_);
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

inline thread_local Scratch scratch;

// NULL for one that this CPU or this program has not.
const KernelTable* TableOf(int isa);

// All tasks on the caller, as a qjax_parallel.
void Alone(void*, int64_t count, qjax_task task, void* arg);

// Runs f(i) for i = 0 ... count - 1 through a C callback.
template <typename F>
void Run(qjax_parallel parallel, void* context, int64_t count, F f) {
  (parallel == nullptr ? Alone : parallel)(context, count, [](void* arg, int64_t i) { (*static_cast<F*>(arg))(i); }, &f);
}

}  // namespace qjax

#endif  // QJAX_RUN_H_
