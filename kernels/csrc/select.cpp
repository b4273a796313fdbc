#include "select.hpp"

#include <algorithm>
#include <cstring>
#include <functional>

namespace bidistill {
namespace {

constexpr int64_t LAST_ID = 0x7FFFFFFF;

// int32 that compare as the logits do, NaN largest
int32_t ordered(float logit) {
  if (logit != logit) return 0x7FFFFFFF;
  int32_t bits = 0;
  if (logit == 0.0f) return bits;  // -0 equals 0
  std::memcpy(&bits, &logit, sizeof bits);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

float logit_of(int64_t key) {
  int32_t bits = static_cast<int32_t>(key >> 32);
  if (bits < 0) bits ^= 0x7FFFFFFF;
  float logit = 0.0f;
  std::memcpy(&logit, &bits, sizeof logit);
  return logit;
}

}  // namespace

void Selection::add(float logit, int64_t id) {
  int64_t key = static_cast<int64_t>(ordered(logit)) * (LAST_ID + 1) * 2 + (LAST_ID - id);
  if (is_full()) {
    if (key < keys_[0]) return;
    std::pop_heap(keys_, keys_ + size_, std::greater<>());
    --size_;
  }
  keys_[size_++] = key;
  std::push_heap(keys_, keys_ + size_, std::greater<>());
  floor_ = logit_of(keys_[0]);
}

void Selection::finish() {
  std::sort_heap(keys_, keys_ + size_, std::greater<>());
  for (int64_t i = 0; i < size_; ++i) keys_[i] = LAST_ID - (keys_[i] & LAST_ID);
}

}  // namespace bidistill
