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

}  // namespace hullkit

// HULLKIT_CHECK(condition, "lengths[", b, "]: expected ..., got ", x) throws ValueError.
#define HULLKIT_CHECK(condition, ...)                            \
  do {                                                           \
    if (!(condition)) ::hullkit::throw_value_error(__VA_ARGS__); \
  } while (false)

namespace hullkit {

template <typename... Parts>
[[noreturn]] void throw_value_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw ValueError(message.str());
}

}  // namespace hullkit
