// From torch tensors to what the kernels take.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <tuple>

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

// A new tensor on the CPU, contiguous unless it is told its strides, not initialised, on its way
// out of an operator. Made by the C call under torch::stable::empty, which looks aten::empty up by
// name, and handed over as it is: as a Tensor it would be counted, copied and boxed again. Together
// 0.7 us a tensor, of 0.8.
class Output {
 public:
  Output(std::initializer_list<int64_t> sizes, ScalarType dtype)
      : Output(sizes, contiguous_strides(sizes).data(), dtype) {}

  Output(std::initializer_list<int64_t> sizes, const int64_t* strides, ScalarType dtype) {
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &made));
    handle_.reset(made);
  }

  template <class T>
  T* data() const {
    void* first = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &first));
    return static_cast<T*>(first);
  }

  AtenTensorHandle release() { return handle_.release(); }

 private:
  static std::array<int64_t, 4> contiguous_strides(std::initializer_list<int64_t> sizes) {
    std::array<int64_t, 4> strides{};
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= std::max<int64_t>(sizes.begin()[i], 1);
    }
    return strides;
  }

  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };

  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

// What an operator returns, as its box takes it.
template <class... Outputs>
auto released(Outputs&... outputs) {
  return std::tuple(reinterpret_cast<StableIValue>(outputs.release())...);
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return Tensor(Output(sizes, dtype).release());
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
