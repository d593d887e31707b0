// Runs the cases of native_cases.py on every instruction set of this CPU, without JAX:  check FILE [instruction set]...
//
// Each product is made by one thread and by three, which take their tasks in another order: the bits must agree. All
// memory is of the very size that core.h says, so that a sanitizer sees a step outside.

#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "core.h"

namespace {

constexpr int64_t kRows[] = {1, 2, 3, 5, 8, 13, 40};
// Of the sum of what is added, without signs.
constexpr double kTolerance = 2e-6;
constexpr double kTiny = 1e-36;
constexpr int kThreads = 3;
constexpr int kMostMessages = 20;

using Blob = std::vector<uint8_t>;

struct Case {
  int64_t kind;
  std::string name;
  std::vector<int64_t> numbers;
  std::vector<Blob> blobs;
};

template <typename T>
const T* As(const Blob& blob) {
  return reinterpret_cast<const T*>(blob.data());
}

bool Read(FILE* file, void* to, size_t size) { return fread(to, 1, size, file) == size; }

// Sizes are trusted: the file is our own.
bool ReadCase(FILE* file, Case* c) {
  int64_t size;
  if (!Read(file, &c->kind, 8) || !Read(file, &size, 8)) return false;
  c->name.resize(size);
  if (!Read(file, &c->name[0], size) || !Read(file, &size, 8)) return false;
  c->numbers.resize(size);
  if (!Read(file, c->numbers.data(), 8 * size) || !Read(file, &size, 8)) return false;
  c->blobs.resize(size);
  for (Blob& blob : c->blobs) {
    if (!Read(file, &size, 8)) return false;
    blob = Blob(size);
    if (!Read(file, blob.data(), size)) return false;
  }
  return true;
}

// Threads that stay: emulators are slow to make them, and keep what each had.
class Pool {
 public:
  Pool() {
    for (int i = 1; i < kThreads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Pool() {
    Begin(0, nullptr, nullptr);
    for (std::thread& thread : threads_) thread.join();
  }
  void Run(int64_t count, qjax_task task, void* arg) {
    Begin(count, task, arg);
    Drain();
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void Begin(int64_t count, qjax_task task, void* arg) {
    const std::lock_guard<std::mutex> lock(mutex_);
    left_ = count;
    task_ = task;
    arg_ = arg;
    busy_ = kThreads - 1;
    ++round_;
    changed_.notify_all();
  }
  // The last task first: another order than that of one thread.
  void Drain() {
    for (int64_t i; (i = left_.fetch_sub(1) - 1) >= 0;) task_(arg_, i);
  }
  void Work() {
    for (int64_t seen = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [&] { return round_ != seen; });
        seen = round_;
        if (task_ == nullptr) return;
      }
      Drain();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::atomic<int64_t> left_{0};
  qjax_task task_ = nullptr;
  void* arg_ = nullptr;
  int busy_ = 0;
  int64_t round_ = 0;
  std::vector<std::thread> threads_;  // last: they use the rest
};

void Threads(void* pool, int64_t count, qjax_task task, void* arg) { static_cast<Pool*>(pool)->Run(count, task, arg); }

struct Check {
  int isa;
  Pool* pool;
  int64_t runs = 0, failures = 0;
  double worst = 0;

  void Fail(const Case& c, const std::string& what) {
    if (++failures <= kMostMessages) printf("%s: %s: %s\n", qjax_isa_name(isa), c.name.c_str(), what.c_str());
  }

  // One run: `alone` against what is expected, and `shared` against `alone`.
  void Compare(const Case& c, const std::string& run, const std::vector<float>& alone, const std::vector<float>& shared,
               const double* expected, const double* size) {
    ++runs;
    if (memcmp(alone.data(), shared.data(), alone.size() * sizeof(float)) != 0) Fail(c, run + ": threads change bits");
    for (size_t i = 0; i < alone.size(); ++i) {
      const std::string where = run + ", result " + std::to_string(i) + ": ";
      if (std::isnan(expected[i])) {
        if (!std::isfinite(alone[i])) continue;
        return Fail(c, where + "finite, though x is not");
      }
      const double error = std::fabs(alone[i] - expected[i]);
      if (!(error <= kTolerance * size[i] + kTiny)) {
        return Fail(c, where + std::to_string(alone[i]) + ", expected " + std::to_string(expected[i]) + " within " +
                           std::to_string(kTolerance * size[i]));
      }
      if (error > kTiny) worst = std::max(worst, error / size[i]);
    }
  }

  // numbers: weights, rows of x, columns, then of each weight its facts and table.
  // then the ways in which x is changed: their number, and of each its rounding, and whether it has columns, an input scale
  // and a scale of x. blobs: x; each weight's leaves; of each way what it has, and expected and size of each product.
  void Matmul(const Case& c) {
    constexpr int kFacts = 12 + 16 + 4 + 16;
    const int64_t count = c.numbers[0], most = c.numbers[1], columns = c.numbers[2];
    const int64_t before = failures;
    std::vector<qjax_weight> weights(count);
    size_t next = 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t* f = c.numbers.data() + 3 + i * kFacts;
      qjax_weight& w = weights[i];
      w = {};
      w.rows = f[0];
      w.columns = f[1];
      w.group_size = f[2];
      w.plane_count = static_cast<int32_t>(f[3]);
      w.width[0] = static_cast<int32_t>(f[4]);
      w.width[1] = static_cast<int32_t>(f[5]);
      w.offset = static_cast<int32_t>(f[6]);
      w.scale_kind = static_cast<int32_t>(f[7]);
      w.has_table = static_cast<int32_t>(f[8]);
      for (int v = 0; v < 16; ++v) w.table[v] = static_cast<int8_t>(f[12 + v]);
      w.value_kind = static_cast<int32_t>(f[28]);
      w.supers = f[29];
      w.scale_block = f[30];
      w.scale_offset = static_cast<float>(f[31]) / 256;
      for (int v = 0; v < 16; ++v) {
        const auto bits = static_cast<int32_t>(f[32 + v]);
        memcpy(&w.values[v], &bits, 4);
      }
      const auto take = [&](int64_t size) {
        if (static_cast<int64_t>(c.blobs[next].size()) != size) Fail(c, "a leaf of another size than core.h says");
        return c.blobs[next++].data();
      };
      for (int p = 0; p < w.plane_count; ++p) w.plane[p] = take(qjax_plane_bytes(&w, p));
      w.scale = take(qjax_scale_bytes(&w));
      if (f[10]) w.sub = take(qjax_sub_bytes(&w));
      if (f[9]) w.minimum = take(qjax_scale_bytes(&w));
      if (f[11]) w.zero = take(qjax_zero_bytes(&w));
      if (w.scale_kind == QJAX_PACKED) {
        const int64_t rows = (w.rows + 15) / 16 * 16;
        w.scale_table = reinterpret_cast<const float*>(take(4 * 256));
        w.super_scale = reinterpret_cast<const float*>(take(4 * rows * w.supers));
        w.start = take(rows);
      }
      if (const char* refused = qjax_check(&w)) Fail(c, refused);
    }
    if (failures > before) return;
    const int64_t* way = c.numbers.data() + 3 + count * kFacts;
    const int64_t ways = *way++;
    for (int64_t i = 0; i < ways; ++i, way += 4, next += 2 * count) {
      qjax_input input{nullptr, 0, nullptr, nullptr, nullptr, static_cast<int32_t>(way[0])};
      if (way[1]) input.columns = As<int32_t>(c.blobs[next++]);
      if (way[2]) input.input_scale = As<float>(c.blobs[next++]);
      if (way[3]) input.x_scale = As<float>(c.blobs[next++]);
      for (int64_t m : kRows) {
        if (m > most) break;
        const std::vector<float> x(As<float>(c.blobs[0]), As<float>(c.blobs[0]) + m * columns);
        std::vector<std::vector<float>> results[2];
        for (int shared = 0; shared < 2; ++shared) {
          std::vector<float*> y;
          for (const qjax_weight& w : weights) results[shared].emplace_back(m * w.rows, 1e30f);
          for (std::vector<float>& result : results[shared]) y.push_back(result.data());
          input.x = x.data();
          input.m = m;
          const int code = qjax_matmul(weights.data(), count, &input, y.data(), isa, shared ? Threads : nullptr, pool);
          if (code != 0) return Fail(c, "code " + std::to_string(code));
        }
        for (int64_t j = 0; j < count; ++j) {
          const size_t at = next + 2 * j;
          Compare(c, "way " + std::to_string(i) + " m=" + std::to_string(m) + " weight " + std::to_string(j),
                  results[0][j], results[1][j], As<double>(c.blobs[at]), As<double>(c.blobs[at + 1]));
        }
      }
    }
  }

  // numbers: rows of x, rows, columns, bf16. blobs: x, w, expected, size.
  void Dense(const Case& c) {
    const int64_t most = c.numbers[0], rows = c.numbers[1], columns = c.numbers[2];
    for (int64_t m : kRows) {
      if (m > most) break;
      const std::vector<float> x(As<float>(c.blobs[0]), As<float>(c.blobs[0]) + m * columns);
      std::vector<float> y[2];
      for (int shared = 0; shared < 2; ++shared) {
        y[shared].assign(m * rows, 1e30f);
        const int code = qjax_matmul_dense(As<uint16_t>(c.blobs[1]), rows, columns, static_cast<int>(c.numbers[3]),
                                           x.data(), m, y[shared].data(), isa, shared ? Threads : nullptr, pool);
        if (code != 0) return Fail(c, "code " + std::to_string(code));
      }
      Compare(c, "m=" + std::to_string(m), y[0], y[1], As<double>(c.blobs[2]), As<double>(c.blobs[3]));
    }
  }

  // numbers: batch, seq, heads, kv_heads, slots, dim, window, kind. blobs: q, k, v, positions, (of int8 their scales,) expected, size.
  void Attention(const Case& c) {
    const auto& n = c.numbers;
    std::vector<float> out[2];
    for (int shared = 0; shared < 2; ++shared) {
      out[shared].assign(n[0] * n[1] * n[2] * n[5], 1e30f);
      const bool int8 = n[7] == QJAX_KIND_INT8;
      const qjax_attention_args args{As<float>(c.blobs[0]), c.blobs[1].data(), c.blobs[2].data(),
                                     int8 ? As<float>(c.blobs[4]) : nullptr, int8 ? As<float>(c.blobs[5]) : nullptr,
                                     As<int32_t>(c.blobs[3]), out[shared].data(), n[0], n[1], n[2], n[3], n[4], n[5],
                                     n[6], static_cast<int32_t>(n[7])};
      const int code = qjax_attention(&args, isa, shared ? Threads : nullptr, pool);
      if (code != 0) return Fail(c, "code " + std::to_string(code));
    }
    const size_t next = c.blobs.size() - 2;
    Compare(c, "", out[0], out[1], As<double>(c.blobs[next]), As<double>(c.blobs[next + 1]));
  }

  // numbers: rows, n; of a rotation tokens, heads, dim, half, interleaved. blobs: what goes in, expected, size.
  void Elementwise(const Case& c) {
    const auto& n = c.numbers;
    const size_t in = c.blobs.size() - 2;
    std::vector<float> y[2];
    for (int shared = 0; shared < 2; ++shared) {
      y[shared].assign(c.blobs[0].size() / sizeof(float), 1e30f);
      const float *x = As<float>(c.blobs[0]), *other = As<float>(c.blobs[1]);
      float* to = y[shared].data();
      const qjax_parallel threads = shared ? Threads : nullptr;
      const int code = c.kind == 4   ? qjax_rms_norm(x, other, 1e-5f, n[0], n[1], to, isa, threads, pool)
                       : c.kind == 5 ? qjax_swiglu(x, other, n[0], n[1], to, isa, threads, pool)
                                     : qjax_rope(x, other, As<float>(c.blobs[2]), n[0], n[1], n[2], n[3],
                                                 static_cast<int>(n[4]), to, isa, threads, pool);
      if (code != 0) return Fail(c, "code " + std::to_string(code));
    }
    Compare(c, "", y[0], y[1], As<double>(c.blobs[in]), As<double>(c.blobs[in + 1]));
  }

  // numbers: rows, columns, width, stride, flip. blobs: rows side by side, lanes.
  void ToLanes(const Case& c) {
    const auto& n = c.numbers;
    ++runs;
    Blob out(c.blobs[1].size(), 0xa5);
    const int64_t tiles = (n[0] + 15) / 16, half = tiles / 2;
    for (int part = 0; part < 2; ++part) {
      const int64_t first = part ? half : 0, count = part ? tiles - half : half;
      const int code = qjax_to_lanes(c.blobs[0].data(), n[0], n[1], static_cast<int>(n[2]), static_cast<int>(n[3]),
                                     static_cast<int>(n[4]), first, count, out.data());
      if (code != 0) return Fail(c, "code " + std::to_string(code));
    }
    if (out != c.blobs[1]) Fail(c, "other bytes");
  }

  void Run(const Case& c) {
    switch (c.kind) {
      case 0:
        return Matmul(c);
      case 1:
        return Dense(c);
      case 2:
        return Attention(c);
      case 3:
        return ToLanes(c);
      default:
        return Elementwise(c);
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  FILE* file = argc > 1 ? fopen(argv[1], "rb") : nullptr;
  char magic[8];
  if (file == nullptr || !Read(file, magic, 8) || memcmp(magic, "QJAXCASE", 8) != 0) {
    fprintf(stderr, "usage: check FILE [instruction set]..., FILE from native_cases.py\n");
    return 2;
  }
  Pool pool;
  std::vector<Check> checks;
  for (int isa = 0; isa < QJAX_ISA_COUNT; ++isa) {
    const auto named = [&](const char* name) { return strcmp(name, qjax_isa_name(isa)) == 0; };
    if (qjax_has_isa(isa) && (argc == 2 || std::any_of(argv + 2, argv + argc, named))) checks.push_back({isa, &pool});
  }
  int64_t cases = 0;
  for (Case c; ReadCase(file, &c); ++cases) {
    for (Check& check : checks) check.Run(c);
  }
  fclose(file);
  bool failed = checks.empty() || cases == 0;
  for (const Check& check : checks) {
    printf("%s: %lld cases, %lld failed, worst error %.1e\n", qjax_isa_name(check.isa),
           static_cast<long long>(check.runs), static_cast<long long>(check.failures), check.worst);
    failed = failed || check.failures > 0;
  }
  return failed;
}
