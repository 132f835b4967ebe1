// SPDX-License-Identifier: Apache-2.0
// Errors of the core. bindings/ is the one place that turns them into Python exceptions.
#pragma once

#include <sstream>
#include <stdexcept>

namespace hullkit {

// The caller passed a value the operation is not defined for.
class ValueError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The caller asked for more than the kernels of this device do, such as too many candidates.
class NotImplementedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace hullkit

// HULLKIT_CHECK(condition, "lengths[", b, "]: expected ..., got ", x) throws ValueError.
#define HULLKIT_CHECK(condition, ...)                            \
  do {                                                           \
    if (!(condition)) ::hullkit::throw_value_error(__VA_ARGS__); \
  } while (false)

// HULLKIT_SUPPORTED(size <= most, ...) likewise throws NotImplementedError.
#define HULLKIT_SUPPORTED(condition, ...)                            \
  do {                                                               \
    if (!(condition)) ::hullkit::throw_not_implemented(__VA_ARGS__); \
  } while (false)

namespace hullkit {

template <typename... Parts>
[[noreturn]] void throw_value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw ValueError(message.str());
}

template <typename... Parts>
[[noreturn]] void throw_not_implemented(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw NotImplementedError(message.str());
}

}  // namespace hullkit
