// SPDX-License-Identifier: Apache-2.0
// The fields of a struct by name: options and results cross into the core as "max_iters = 250", never as "the sixth".
#pragma once

// HULLKIT_FIELDS(Options, a, b) defines each_field(options, visit), which calls visit("a", options.a), then
// visit("b", options.b). It stands once behind the struct and lists every field: one left out does not compile.
#define HULLKIT_FIELDS(Struct, ...)                                                                               \
  template <typename Visit>                                                                                       \
  void each_field(Struct& fields, Visit&& visit) {                                                                \
    [[maybe_unused]] auto& [__VA_ARGS__] = fields;                                                                \
    HULLKIT_FIELDS_PICK(__VA_ARGS__, HULLKIT_FIELDS_10, HULLKIT_FIELDS_9, HULLKIT_FIELDS_8, HULLKIT_FIELDS_7,     \
                        HULLKIT_FIELDS_6, HULLKIT_FIELDS_5, HULLKIT_FIELDS_4, HULLKIT_FIELDS_3, HULLKIT_FIELDS_2, \
                        HULLKIT_FIELDS_1, )                                                                       \
    (__VA_ARGS__)                                                                                                 \
  }

// The preprocessor has no loops: one macro for each number of fields.
#define HULLKIT_FIELDS_PICK(f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, macro, ...) macro
#define HULLKIT_FIELDS_1(field) visit(#field, fields.field);
#define HULLKIT_FIELDS_2(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_1(__VA_ARGS__)
#define HULLKIT_FIELDS_3(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_2(__VA_ARGS__)
#define HULLKIT_FIELDS_4(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_3(__VA_ARGS__)
#define HULLKIT_FIELDS_5(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_4(__VA_ARGS__)
#define HULLKIT_FIELDS_6(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_5(__VA_ARGS__)
#define HULLKIT_FIELDS_7(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_6(__VA_ARGS__)
#define HULLKIT_FIELDS_8(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_7(__VA_ARGS__)
#define HULLKIT_FIELDS_9(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_8(__VA_ARGS__)
#define HULLKIT_FIELDS_10(field, ...) HULLKIT_FIELDS_1(field) HULLKIT_FIELDS_9(__VA_ARGS__)
