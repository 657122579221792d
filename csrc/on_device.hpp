// The CUDA device and stream that an operator runs on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/kernels.hpp"
#include "tensor.hpp"

// In the CUDA part of PyTorch only, so weak: the library also loads where that is missing. Stream
// has a native handle from PyTorch 2.13 on, this function is in every version.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace specdec {

// The device of a tensor is current, and its current stream known, while this lives.
class OnDevice {
 public:
  OnDevice(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream == nullptr) fail("%s: PyTorch has no CUDA here", op);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }

  cuda::Stream stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Stream stream_ = nullptr;
};

}  // namespace specdec
