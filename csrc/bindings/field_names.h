// SPDX-License-Identifier: Apache-2.0
// The names of a struct's fields, which Python compares with its own declaration.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "hullkit/fields.h"

namespace hullkit {

template <typename Struct>
pybind11::tuple field_names() {
  std::vector<std::string> names;
  const Struct fields{};
  each_field(fields, [&](const char* name, const auto&) { names.emplace_back(name); });
  return pybind11::cast(names);
}

}  // namespace hullkit
