// A bounded map from problem to plan that forgets the least recently used one. Thread-safe: plans
// go in and out by value, so nothing a caller holds can be changed or freed by another thread. Host
// logic: no CUDA, tested on any machine.
#pragma once

#include <algorithm>
#include <cstddef>
#include <list>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>

namespace fp8::core {

template <typename Key, typename Plan, typename Hash>
class PlanCache {
 public:
  struct Info {
    size_t size = 0;
    size_t capacity = 0;
    size_t hits = 0;
    size_t misses = 0;
  };

  explicit PlanCache(size_t capacity) : capacity_(std::max<size_t>(capacity, 1)) {}

  std::optional<Plan> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = index_.find(key);
    if (found == index_.end()) {
      ++misses_;
      return std::nullopt;
    }
    ++hits_;
    if (found->second != entries_.begin()) {
      entries_.splice(entries_.begin(), entries_, found->second);
    }
    return found->second->second;
  }

  // Keeps the plan that is there already, if another thread was faster.
  void insert(const Key& key, const Plan& plan) {
    const std::lock_guard lock(mutex_);
    if (!index_.contains(key)) add(key, plan);
  }

  void replace(const Key& key, const Plan& plan) {
    const std::lock_guard lock(mutex_);
    const auto found = index_.find(key);
    if (found == index_.end()) {
      add(key, plan);
    } else {
      found->second->second = plan;
    }
  }

  template <typename Condition>
  size_t count_if(const Condition& condition) const {
    const std::lock_guard lock(mutex_);
    return std::count_if(entries_.begin(), entries_.end(),
                         [&](const auto& entry) { return condition(entry.second); });
  }

  void clear() {
    const std::lock_guard lock(mutex_);
    index_.clear();
    entries_.clear();
    hits_ = 0;
    misses_ = 0;
  }

  Info info() const {
    const std::lock_guard lock(mutex_);
    return {entries_.size(), capacity_, hits_, misses_};
  }

 private:
  using Entries = std::list<std::pair<Key, Plan>>;

  void add(const Key& key, const Plan& plan) {
    entries_.emplace_front(key, plan);
    index_.emplace(key, entries_.begin());
    if (entries_.size() > capacity_) {
      index_.erase(entries_.back().first);
      entries_.pop_back();
    }
  }

  mutable std::mutex mutex_;
  size_t capacity_;
  size_t hits_ = 0;
  size_t misses_ = 0;
  Entries entries_;  // most recently used first
  std::unordered_map<Key, typename Entries::iterator, Hash> index_;
};

}  // namespace fp8::core
