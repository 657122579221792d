#include "shape_table.hpp"

#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <map>
#include <sstream>

#include "cpu/error.hpp"

namespace specdec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct ArgShape {
  std::string name;
  std::string dims;  // one letter each; '_' is any size
  std::string dtype;
};

// Letter -> size; -1 while unknown.
struct Sizes {
  std::array<int64_t, 128> of;
  Sizes() { of.fill(-1); }
};

struct First {
  std::string name;
  std::string value;
};

std::map<std::string, std::vector<ArgShape>>& tables() {
  static std::map<std::string, std::vector<ArgShape>> all;
  return all;
}

std::string dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "device ") + std::to_string(tensor.get_device_index());
}

bool is_float_class(const std::string& name) {
  return name == "bfloat16" || name == "float16" || name == "float32";
}

bool fits(const ArgShape& spec, const Tensor& tensor, Sizes& sizes) {
  if (tensor.dim() != static_cast<int64_t>(spec.dims.size())) return false;
  for (size_t i = 0; i < spec.dims.size(); ++i) {
    const char letter = spec.dims[i];
    const int64_t size = tensor.size(static_cast<int64_t>(i));
    int64_t& known = sizes.of[static_cast<size_t>(letter)];
    if (letter == '_') continue;
    if (known < 0) known = size;
    if (known != size) return false;
  }
  return true;
}

[[noreturn]] void fail_shape(const char* op, const ArgShape& spec, const Tensor& tensor,
                             const Sizes& sizes) {
  std::ostringstream letters, want, got;
  for (size_t i = 0; i < spec.dims.size(); ++i) {
    const char* comma = i == 0 ? "" : ", ";
    const int64_t known = sizes.of[static_cast<size_t>(spec.dims[i])];
    letters << comma << spec.dims[i];
    want << comma;
    if (known < 0) {
      want << spec.dims[i];
    } else {
      want << known;
    }
  }
  for (int64_t i = 0; i < tensor.dim(); ++i) got << (i == 0 ? "" : ", ") << tensor.size(i);
  fail("%s: %s must be [%s] = [%s], got [%s]", op, spec.name.c_str(), letters.str().c_str(),
       want.str().c_str(), got.str().c_str());
}

void check_tensor(const char* op, const ArgShape& spec, const Tensor& tensor, Sizes& sizes,
                  std::optional<First>& first_float) {
  if (!fits(spec, tensor, sizes)) fail_shape(op, spec, tensor, sizes);
  const std::string got = dtype_name(tensor);
  const bool is_float = spec.dtype == "float";
  if (is_float ? !is_float_class(got) : got != spec.dtype) {
    const char* want = is_float ? "bfloat16 or float16 or float32" : spec.dtype.c_str();
    fail("%s: %s must be %s, got %s", op, spec.name.c_str(), want, got.c_str());
  }
  if (is_float) {
    if (!first_float) first_float = First{spec.name, got};
    if (got != first_float->value) {
      fail("%s: %s must be %s like %s, got %s", op, spec.name.c_str(), first_float->value.c_str(),
           first_float->name.c_str(), got.c_str());
    }
  }
}

}  // namespace

void declare_shapes(std::string op, std::string table) {
  std::vector<ArgShape> specs;
  std::istringstream entries(table);
  for (std::string entry; std::getline(entries, entry, ',');) {
    ArgShape spec;
    std::istringstream words(entry);
    words >> spec.name;
    spec.name.pop_back();  // the colon
    std::string word, previous;
    while (words >> word) {
      for (const char c : previous) {
        if (c != '[' && c != ']') spec.dims += c;
      }
      previous = word;
    }
    spec.dtype = previous;
    specs.push_back(spec);
  }
  tables()[op] = specs;
}

void check_shapes(const char* op, std::initializer_list<TensorArg> args) {
  const auto table = tables().find(op);
  if (table == tables().end() || table->second.size() != args.size()) {
    fail("%s: the shape table was not declared; import specdec_kernels", op);
  }
  Sizes sizes;
  std::optional<First> first_float, first_device;
  auto spec = table->second.begin();
  for (const TensorArg& arg : args) {
    for (const Tensor& tensor : arg) {
      check_tensor(op, *spec, tensor, sizes, first_float);
      const std::string device = device_name(tensor);
      if (!first_device) first_device = First{spec->name, device};
      if (device != first_device->value) {
        fail("%s: %s must be on %s like %s, got %s", op, spec->name.c_str(),
             first_device->value.c_str(), first_device->name.c_str(), device.c_str());
      }
    }
    ++spec;
  }
}

}  // namespace specdec
