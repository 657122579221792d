// From torch tensors to what the kernels take.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>

#include "arguments.hpp"
#include "cpu/error.hpp"

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
}

// On the device of `like`.
inline Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes,
                         ScalarType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, dtype);
}

// The tensor itself where it is contiguous, else a copy that is.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline OptionalTensor packed(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(packed(*tensor)) : std::nullopt;
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBfloat16;
    default:
      return DType::kFloat32;
  }
}

inline TensorView described(const Tensor& tensor, void* data) {
  TensorView view{data, dtype_of(tensor), {}, {}};
  std::ranges::copy(tensor.sizes(), view.sizes);
  std::ranges::copy(tensor.strides(), view.strides);
  return view;
}

inline TensorView view(const Tensor& tensor) {
  return described(tensor, const_cast<void*>(tensor.const_data_ptr()));
}

inline OptionalView view(const OptionalTensor& tensor) {
  return tensor ? OptionalView(view(*tensor)) : std::nullopt;
}

// Of a tensor that the operator writes.
inline TensorView mutable_view(const Tensor& tensor) {
  return described(tensor, tensor.mutable_data_ptr());
}

}  // namespace specdec
