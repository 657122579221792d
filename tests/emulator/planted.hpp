// Kernels with one fault each, and some without: what the emulator and the sanitizers must tell
// apart.
#pragma once

#include <functional>
#include <map>
#include <string>

namespace specdec {

std::map<std::string, std::function<void()>> planted_faults();

}  // namespace specdec
