// The shape tables that Python declares (specdec_kernels/shapes.py has the grammar), checked on
// native calls.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

namespace specdec {

// One tensor argument of a call: present, absent, or a list.
class TensorArg {
 public:
  TensorArg(const torch::stable::Tensor& tensor) : data_(&tensor), num_(1) {}
  TensorArg(const std::optional<torch::stable::Tensor>& tensor)
      : data_(tensor ? &*tensor : nullptr), num_(tensor ? 1 : 0) {}
  TensorArg(const std::vector<torch::stable::Tensor>& tensors)
      : data_(tensors.data()), num_(tensors.size()) {}

  const torch::stable::Tensor* begin() const { return data_; }
  const torch::stable::Tensor* end() const { return data_ + num_; }

 private:
  const torch::stable::Tensor* data_;
  size_t num_;
};

void declare_shapes(std::string op, std::string table);

// Throws the message of shapes.py unless the arguments, in the order of the table, fit.
void check_shapes(const char* op, std::initializer_list<TensorArg> args);

}  // namespace specdec
