// A caller's mistake: one line that names operator, argument, rule and values.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>

namespace specdec {

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw std::runtime_error(text);
}

}  // namespace specdec
