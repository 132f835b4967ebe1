// SPDX-License-Identifier: Apache-2.0
// DLPack 1.3 as far as it is read here: what a class of tensors offers as `__dlpack_c_exchange_api__`.
// Field for field the published layout; names are ours.
#pragma once

#include <cstdint>

namespace hullkit {

struct DlTensor {
  void* data;
  int32_t device_type;
  int32_t device_index;
  int32_t ndim;
  uint8_t dtype_code;
  uint8_t dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;    // [ndim]
  int64_t* strides;  // [ndim]
  uint64_t byte_offset;
};

struct DlManagedTensor {
  uint32_t major;
  uint32_t minor;
  void* context;
  void (*release)(DlManagedTensor* self);
};

struct DlExchange {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* allocate;
  int (*share)(void* object, DlManagedTensor** out);  // holds a reference until released
  void* wrap;
  int (*borrow)(void* object, DlTensor* out);  // holds none; shape and strides belong to the tensor
  void* stream;
};

constexpr char kExchangeName[] = "dlpack_exchange_api";
constexpr uint32_t kExchangeMajor = 1;

}  // namespace hullkit
