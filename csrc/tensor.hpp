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

#include "cpu/cache.hpp"
#include "cpu/error.hpp"

namespace specdec {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int32_t int32(int64_t size) {
  if (size > INT32_MAX) fail("sizes must fit in 32 bits, got %ld", size);
  return static_cast<int32_t>(size);
}

inline int64_t num_words(int64_t nodes) { return (nodes + 63) / 64; }

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

// A new contiguous tensor on the CPU, not initialised, on its way out of an operator. Made by the C
// call under torch::stable::empty, which looks aten::empty up by name, and handed over as it is:
// as a Tensor it would be counted, copied and boxed again. Together 0.7 us a tensor, of 0.8.
class Output {
 public:
  Output(std::initializer_list<int64_t> sizes, ScalarType dtype) {
    std::array<int64_t, 4> strides{};
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
      strides[i] = stride;
      stride *= std::max<int64_t>(sizes.begin()[i], 1);
    }
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &made));
    handle_.reset(made);
  }

  template <class T>
  T* data() const {
    void* first = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_.get(), &first));
    return static_cast<T*>(first);
  }

  AtenTensorHandle release() { return handle_.release(); }

 private:
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

inline CacheView cache_view(const Tensor& cache) {
  return {const_cast<void*>(cache.const_data_ptr()),
          cache.stride(0),
          cache.stride(1),
          cache.stride(2),
          cache.stride(3),
          int32(cache.size(1)),
          int32(cache.size(3))};
}

inline SlotMap slot_map(const Tensor& cache, const OptionalTensor& page_table) {
  return {data<int32_t>(page_table), page_table ? page_table->stride(0) : 0,
          page_table ? page_table->stride(1) : 0, int32(cache.size(0)), int32(cache.size(2))};
}

// Slots of one request.
inline int64_t capacity(const Tensor& cache, const OptionalTensor& page_table) {
  return page_table ? cache.size(2) * page_table->size(1) : cache.size(2);
}

// A contiguous cache has one row per request.
inline void check_cache_rows(const char* op, const Tensor& cache, const Tensor& lengths,
                             const OptionalTensor& page_table) {
  if (!page_table && cache.size(0) != lengths.size(0)) {
    fail("%s: k_cache must be [B, G, S, D] with B = %ld, got [%ld, %ld, %ld, %ld]", op,
         lengths.size(0), cache.size(0), cache.size(1), cache.size(2), cache.size(3));
  }
}

}  // namespace specdec
