// A row's law after its filters: the tokens that they kept, in token order, and their
// probabilities.
#pragma once

#include <cstdint>

#include "scratch.hpp"

namespace specdec::SPECDEC_ISA {

class KeptLaw {
 public:
  // Room for `num` tokens; fill tokens() and probs() up to `num`, tokens rising.
  void resize(int32_t num) {
    tokens_.reserve(num);
    probs_.reserve(num);
    num_ = num;
  }

  int32_t num() const { return num_; }
  int32_t* tokens() { return tokens_.get(); }
  double* probs() { return probs_.get(); }
  const int32_t* tokens() const { return tokens_.get(); }
  const double* probs() const { return probs_.get(); }

  // Where `token` is kept, or -1.
  int32_t find(int64_t token) const {
    int32_t begin = 0, end = num_;
    while (begin < end) {
      const int32_t middle = begin + (end - begin) / 2;
      if (tokens()[middle] < token) {
        begin = middle + 1;
      } else {
        end = middle;
      }
    }
    return begin < num_ && tokens()[begin] == token ? begin : -1;
  }

  double at(int64_t token) const {
    const int32_t i = find(token);
    return i < 0 ? 0.0 : probs()[i];
  }

  void forget(int64_t token) {
    const int32_t i = find(token);
    if (i >= 0) probs()[i] = 0.0;
  }

  double mass() const {
    double total = 0.0;
    for (int32_t i = 0; i < num_; ++i) total += probs()[i];
    return total;
  }

  void scale(double factor) {
    for (int32_t i = 0; i < num_; ++i) probs()[i] *= factor;
  }

  // The lowest token at which the cumulative mass exceeds `coin` times the whole.
  int64_t draw(double coin) const {
    const double target = coin * mass();
    double cumulative = 0.0;
    int64_t last = 0;
    for (int32_t i = 0; i < num_; ++i) {
      cumulative += probs()[i];
      if (probs()[i] > 0.0) last = tokens()[i];
      if (cumulative > target) break;
    }
    return last;
  }

  // The dense law; `target` must hold zeros.
  template <class T>
  void spread(T* target) const {
    for (int32_t i = 0; i < num_; ++i) target[tokens()[i]] = static_cast<T>(probs()[i]);
  }

 private:
  Scratch<int32_t> tokens_;
  Scratch<double> probs_;
  int32_t num_ = 0;
};

}  // namespace specdec::SPECDEC_ISA
