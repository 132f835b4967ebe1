// SPDX-License-Identifier: Apache-2.0
// Bytes of a fuzzer, read as the choices that make a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hullkit::fuzz {

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), end_(data + size) {}

  uint8_t byte() { return data_ == end_ ? 0 : *data_++; }  // zeros, once the bytes are used up
  int64_t between(int64_t least, int64_t most) { return least + byte() % (most - least + 1); }
  bool flip() { return byte() & 1; }

  template <typename Value, size_t kCount>
  Value one_of(const Value (&values)[kCount]) {
    return values[byte() % kCount];
  }

 private:
  const uint8_t* data_;
  const uint8_t* const end_;
};

}  // namespace hullkit::fuzz
