// Tasks shared out over threads that someone else owns: no thread is made here.

#ifndef QJAX_TEAM_H_
#define QJAX_TEAM_H_

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core.h"

namespace qjax {

// Where each thread of a call begins to read, and how much it may read from there.
struct Start {
  const uint8_t* at;
  int64_t nbytes;
};
using Starts = std::vector<Start>;

// The tasks of one call. The caller works too, and waits for tasks, not for helpers: a helper that gets its turn only
// after the last task finds nothing to do, touches nothing, and cannot hold anyone up.
//
// Each thread has a stretch of neighbours of its own, since memory is read fastest in one long run, and then helps with
// the stretches of the others.
struct Work {
  int64_t count, threads;
  qjax_task task;
  void* arg;
  std::shared_ptr<const Starts> ahead;  // of the call that is likely to be next; or NULL
  std::atomic<int64_t> done{0};
  std::mutex mutex;
  std::condition_variable finished;
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
  };
  std::vector<Stretch> stretches;

  Work(int64_t count, int64_t threads, qjax_task task, void* arg, std::shared_ptr<const Starts> ahead)
      : count(count), threads(threads), task(task), arg(arg), ahead(std::move(ahead)), stretches(threads) {
    for (int64_t t = 0; t < threads; ++t) stretches[t].next = Begin(t);
  }

  int64_t Begin(int64_t stretch) const { return count * stretch / threads; }

  void Drain(int64_t own) {
    for (int64_t turn = 0; turn < threads; ++turn) {
      const int64_t stretch = (own + turn) % threads, end = Begin(stretch + 1);
      std::atomic<int64_t>& next = stretches[stretch].next;
      int64_t here = 0;
      // Looked at first, so that a late helper does not write to what is over.
      while (next.load(std::memory_order_relaxed) < end) {
        const int64_t i = next.fetch_add(1);
        if (i >= end) break;
        task(arg, i);
        ++here;
      }
      if (here > 0 && done.fetch_add(here) + here == count) {
        const std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }
};

// The helpers that are still awake, and what is known of the calls to come. To wake a thread takes as long as a small
// product, and a decode step is a chain of them: a helper that has finished looks out for the next one for a moment
// before it goes back to where it came from. Meanwhile memory would stand idle, so it asks for the bytes that it will
// need first.
class Team {
 public:
  void Offer(std::shared_ptr<Work> work) {
    const std::lock_guard<std::mutex> lock(mutex_);
    newest_ = std::move(work);
    number_.fetch_add(1);
  }
  int64_t helpers() const { return helpers_.load(); }

  // What a helper does: `work`, and what is offered soon after.
  void Help(std::shared_ptr<Work> work) {
    uint64_t seen = number_.load();
    const int64_t own = helpers_.fetch_add(1) + 1;
    const uint8_t *at = nullptr, *end = nullptr;
    const auto drain = [&] {
      work->Drain(own);
      if (work->ahead == nullptr) return;
      const Start& start = (*work->ahead)[own % work->ahead->size()];
      at = start.at;
      end = at + std::min(start.nbytes, kAhead);
    };
    drain();
    auto until = std::chrono::steady_clock::now() + kPatience;
    for (int spin = 1;; ++spin) {
      if (number_.load(std::memory_order_acquire) != seen) {
        {
          const std::lock_guard<std::mutex> lock(mutex_);
          seen = number_.load();
          work = newest_;
        }
        drain();
        until = std::chrono::steady_clock::now() + kPatience;
      }
      if (at < end) {
        // A prefetch never faults: what was freed meanwhile does no harm.
        for (int i = 0; i < 16; ++i, at += 64) __builtin_prefetch(at, 0, 2);
      } else {
        Pause();
      }
      if (spin % 64 != 0) continue;
      // Whoever else wants this core may have it.
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() > until) break;
    }
    helpers_.fetch_sub(1);
  }

  // Where the call that came after this one the last time begins to read; NULL if it is the first time. `key` tells
  // calls apart, `starts()` are this call's.
  template <typename F>
  std::shared_ptr<const Starts> Next(const void* key, F starts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (calls_.size() > kMostCalls) calls_.clear();
    Call& call = calls_[key];
    if (call.starts == nullptr) call.starts = std::make_shared<const Starts>(starts());
    calls_[last_].next = key;
    last_ = key;
    const auto next = calls_.find(call.next);
    return next == calls_.end() ? nullptr : next->second.starts;
  }

  static void Pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

 private:
  struct Call {
    std::shared_ptr<const Starts> starts;
    const void* next = nullptr;
  };
  static constexpr std::chrono::microseconds kPatience{200};
  // Bytes asked for ahead: half of a core's second-level cache, as a rule.
  static constexpr int64_t kAhead = 1 << 19;
  static constexpr size_t kMostCalls = 1 << 16;
  std::mutex mutex_;
  std::shared_ptr<Work> newest_;
  std::atomic<uint64_t> number_{0};
  std::atomic<int64_t> helpers_{0};
  std::unordered_map<const void*, Call> calls_;
  const void* last_ = nullptr;
};

// Never destroyed: a helper may outlive the program's last statement.
inline Team& team() {
  static auto* const one = new Team;
  return *one;
}

// Runs all tasks of `work` on the caller and on threads that `schedule(work)` gets to call `team().Help(work)`.
template <typename F>
void RunTogether(const std::shared_ptr<Work>& work, F schedule) {
  const int64_t helpers = std::min(work->threads, work->count) - 1;
  if (helpers > 0) {
    team().Offer(work);
    for (int64_t i = team().helpers(); i < helpers; ++i) schedule(work);
  }
  work->Drain(0);
  // The last task of another thread ends soon, as a rule: sleeping and waking would take longer.
  for (int spin = 0; spin < 20000 && work->done.load(std::memory_order_acquire) < work->count; ++spin) Team::Pause();
  if (work->done.load() == work->count) return;
  std::unique_lock<std::mutex> lock(work->mutex);
  work->finished.wait(lock, [&] { return work->done.load() == work->count; });
}

}  // namespace qjax

#endif  // QJAX_TEAM_H_
