// The k best of the logits that are shown to it, in the memory of the result.

#ifndef BIDISTILL_SELECT_HPP
#define BIDISTILL_SELECT_HPP

#include <stdint.h>

namespace bidistill {

// A heap of 64-bit keys, the smallest on top: a logit's bits, made to compare as integers, and
// below them a number that falls with the id. Keys of a row are distinct, so "the k largest keys"
// is the whole definition, ties included. Compiled once, in select.cpp, not for each instruction
// set.
class Selection {
 public:
  Selection(int64_t* ids, int64_t k) : keys_(ids), k_(k) {}  // k >= 1

  bool is_full() const { return size_ == k_; }
  // Only a larger logit, or a NaN, still gets in, at higher ids.
  float floor() const { return floor_; }
  void add(float logit, int64_t id);
  // Turns the keys into ids, best first.
  void finish();

 private:
  int64_t* keys_;
  int64_t k_;
  int64_t size_ = 0;
  float floor_ = 0.0f;
};

}  // namespace bidistill

#endif  // BIDISTILL_SELECT_HPP
