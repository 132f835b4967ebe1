// SPDX-License-Identifier: Apache-2.0
#include "pool/pool_rows.h"

#include <algorithm>
#include <cmath>

#include "hullkit/check.h"
#include "hullkit/interrupt.h"
#include "hullkit/parallel.h"
#include "simd/simd.h"

namespace hullkit {
namespace {

// A widened copy pays when it fits the caches; a larger pool is widened block by block on every pass.
constexpr int64_t kMaxWidenedBytes = int64_t{32} << 20;
constexpr int64_t kRowsPerBlock = kRowsPerTile;
// Rows that stay in the innermost cache while many vectors pass by.
constexpr int64_t kMaxRowBytes = int64_t{16} << 10;

void widen(DType dtype, const void* source, int64_t count, float* out) {
  const auto* const halves = static_cast<const uint16_t*>(source);
  if (dtype == DType::kFloat16) {
    simd().widen_f16(halves, out, count);
  } else {
    simd().widen_bf16(halves, out, count);
  }
}

void widen(DType dtype, const void* source, int64_t count, double* out) {
  if (dtype == DType::kFloat32) {
    std::copy_n(static_cast<const float*>(source), count, out);
    return;
  }
  constexpr int64_t kChunk = 256;
  float chunk[kChunk];
  const auto* const halves = static_cast<const uint16_t*>(source);
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = std::min(kChunk, count - i);
    widen(dtype, halves + i, n, chunk);
    std::copy_n(chunk, n, out + i);
  }
}

template <typename T>
bool is_narrower(DType dtype) {
  return dtype != (std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32);
}

template <typename T>
const char* type_name() {
  return sizeof(T) == sizeof(double) ? "float64" : "float32";
}

template <typename T>
T largest_magnitude(const T* values, int64_t count) {
  T largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
  return largest;
}

}  // namespace

int64_t valid_length(const PoolSpec& spec, int64_t b) {
  const int64_t n = spec.positions();
  if (!spec.lengths.defined()) return n;
  const int64_t length = *spec.lengths.at<int64_t>(b);
  HULLKIT_CHECK(length >= 1 && length <= n, "lengths: expected 1 <= lengths[", b, "] <= ", n, ", got ", length);
  return length;
}

template <typename T>
QueryVector<T>::QueryVector(const TensorView& view, int64_t index, const char* argument) {
  const int64_t d = view.shape[1];
  const char* source = static_cast<const char*>(view.data) + index * view.stride[0] * element_bytes(view.dtype);
  data_ = reinterpret_cast<const T*>(source);
  if (is_narrower<T>(view.dtype)) {
    copy_.resize(d);
    widen(view.dtype, source, d, copy_.data());
    data_ = copy_.data();
  }
  const int64_t j = first_not_finite(data_, d);
  HULLKIT_CHECK(j == d, argument, ": expected finite values, got ", data_[j], " at [", index, ", ", j, "]");
}

template <typename T>
PoolRows<T>::PoolRows(const PoolSpec& spec, int64_t b, bool reuse)
    : dtype_(spec.rows.dtype), batch_entry_(b), dim_(spec.dim()) {
  row_bytes_ = spec.rows.stride[1] * element_bytes(dtype_);
  base_ = static_cast<const char*>(spec.rows.data) + b * spec.rows.stride[0] * element_bytes(dtype_);
  const int64_t length = valid_length(spec, b);
  if (spec.candidates.defined()) {
    sources_.reserve(length);
    for (int64_t i = 0; i < length; ++i) add(spec, i, *spec.candidates.at<int64_t>(b, i));
  } else {
    sources_.resize(length);
    for (int64_t i = 0; i < length; ++i) sources_[i] = base_ + i * row_bytes_;
  }
  HULLKIT_CHECK(!sources_.empty(), "candidates: expected at least one candidate in entry ", b, ", got only -1");
  if (reuse && size() * dim_ * static_cast<int64_t>(sizeof(T)) <= kMaxWidenedBytes) keep_widened();
}

template <typename T>
PoolRows<T>::PoolRows(const PoolSpec& spec, int64_t b, const int64_t* positions, int64_t count)
    : dtype_(spec.rows.dtype), batch_entry_(b), dim_(spec.dim()), all_valid_(false) {
  row_bytes_ = spec.rows.stride[1] * element_bytes(dtype_);
  base_ = static_cast<const char*>(spec.rows.data) + b * spec.rows.stride[0] * element_bytes(dtype_);
  const int64_t n = spec.positions();
  for (int64_t i = 0; i < count && positions[i] != -1; ++i) {
    HULLKIT_CHECK(positions[i] >= 0 && positions[i] < n, "result.indices: expected positions 0..", n - 1,
                  " (-1 for padding), got ", positions[i], " at [", b, ", ", i, "]");
    const int64_t row = spec.candidates.defined() ? *spec.candidates.at<int64_t>(b, positions[i]) : positions[i];
    HULLKIT_CHECK(row != -1, "candidates: expected a row at position ", positions[i],
                  " that result.indices names, got -1");
    add(spec, positions[i], row);
  }
  for (int64_t i = static_cast<int64_t>(sources_.size()); i < count; ++i) {
    HULLKIT_CHECK(positions[i] == -1, "result.indices: expected -1 behind another one, got ", positions[i], " at [", b,
                  ", ", i, "]");
  }
  HULLKIT_CHECK(!sources_.empty(), "result.indices: expected a row in entry ", b, ", got only padding, -1");
  keep_widened();
}

template <typename T>
void PoolRows<T>::add(const PoolSpec& spec, int64_t position, int64_t row) {
  if (spec.candidates.defined()) {
    const int64_t rows = spec.rows.shape[1];
    HULLKIT_CHECK(row >= -1 && row < rows, "candidates: expected rows 0..", rows - 1, " (-1 for none), got ", row,
                  " at [", batch_entry_, ", ", position, "]");
    if (row == -1) {
      if (all_valid_) {
        all_valid_ = false;
        for (int64_t i = 0; i < position; ++i) positions_.push_back(i);
      }
      return;
    }
  }
  if (!all_valid_) positions_.push_back(position);
  sources_.push_back(base_ + row * row_bytes_);
}

template <typename T>
void PoolRows<T>::keep_widened() {
  if (!is_narrower<T>(dtype_)) return;
  widened_.reset(new T[size() * dim_]);
  for (int64_t i = 0; i < size(); ++i) {
    T* const row = widened_.get() + i * dim_;
    widen(dtype_, sources_[i], dim_, row);
    sources_[i] = row;
  }
}

template <typename T>
bool PoolRows<T>::in_place() const {
  return !is_narrower<T>(dtype_) || widened_ != nullptr;
}

template <typename T>
const T* PoolRows<T>::row(int64_t i, T* buffer) const {
  if (in_place()) return static_cast<const T*>(sources_[i]);
  widen(dtype_, sources_[i], dim_, buffer);
  return buffer;
}

template <typename T>
template <typename Visit>
void PoolRows<T>::visit_part(const void* const* sources, int64_t begin, int64_t end, Visit&& visit) const {
  if (in_place()) {
    visit(reinterpret_cast<const T* const*>(sources + begin), end - begin, begin);
    return;
  }
  std::vector<T> block(kRowsPerBlock * dim_);
  const T* rows[kRowsPerBlock];
  for (int64_t first = begin; first < end; first += kRowsPerBlock) {
    const int64_t n = std::min(kRowsPerBlock, end - first);
    for (int64_t i = 0; i < n; ++i) {
      T* const row = block.data() + i * dim_;
      widen(dtype_, sources[first + i], dim_, row);
      rows[i] = row;
    }
    visit(rows, n, first);
  }
}

template <typename T>
template <typename Visit>
void PoolRows<T>::visit(const void* const* sources, int64_t count, int num_threads, Visit&& visit) const {
  stop_if_asked();
  if (num_threads < 2 || count * dim_ < kMinParallelWork) {
    visit_part(sources, 0, count, visit);
    return;
  }
  const int64_t chunk = std::max<int64_t>(kRowsPerBlock, (count + 4 * num_threads - 1) / (4 * num_threads));
  parallel_for((count + chunk - 1) / chunk, num_threads,
               [&](int64_t i) { visit_part(sources, i * chunk, std::min(count, (i + 1) * chunk), visit); });
}

template <typename T>
void PoolRows<T>::dots(const void* const* sources, int64_t count, const T* packed, int num_vectors, T* const* out,
                       int num_threads) const {
  visit(sources, count, num_threads, [&](const T* const* rows, int64_t n, int64_t first) {
    T* shifted[kMaxDotVectors];
    for (int k = 0; k < num_vectors; ++k) shifted[k] = out[k] + first;
    simd().ops<T>().dots(rows, n, packed, num_vectors, dim_, shifted);
  });
}

template <typename T>
void PoolRows<T>::squares(T* out, int num_threads) const {
  visit(sources_.data(), size(), num_threads,
        [&](const T* const* rows, int64_t n, int64_t first) { simd().ops<T>().squares(rows, n, dim_, out + first); });
}

template <typename T>
void PoolRows<T>::dots(const T* vector, T* out, int num_threads) const {
  dots(sources_.data(), size(), vector, 1, &out, num_threads);
}

template <typename T>
void PoolRows<T>::dots(const void* const* sources, int64_t count, const PackedRows<T>& vectors, T* const* out,
                       int num_threads) const {
  dots(sources, count, vectors.data(), vectors.count(), out, num_threads);
}

template <typename T>
void PoolRows<T>::multiply_tile(int64_t first, int64_t count, const PackedVectors<T>& vectors, T* out) const {
  const int64_t row_bytes = dim_ * static_cast<int64_t>(sizeof(T));
  const int64_t step = std::max<int64_t>(4, kMaxRowBytes / row_bytes / 4 * 4);  // dots takes four at once
  visit_part(sources_.data(), first, first + count, [&](const T* const* rows, int64_t n, int64_t begin) {
    for (int64_t i = 0; i < n; i += step) {
      T* const at = out + (begin - first) + i;
      for (int64_t v = 0; v < vectors.count(); v += kMaxDotVectors) {
        const int num_vectors = static_cast<int>(std::min<int64_t>(kMaxDotVectors, vectors.count() - v));
        T* columns[kMaxDotVectors];
        for (int k = 0; k < num_vectors; ++k) columns[k] = at + (v + k) * kRowsPerTile;
        simd().ops<T>().dots(rows + i, std::min(step, n - i), vectors.from(v), num_vectors, dim_, columns);
      }
    }
  });
}

template <typename T>
PackedVectors<T>::PackedVectors(const T* const* vectors, int64_t count, int64_t dim)
    : count_(count), stride_((kMaxDotVectors * dim * sizeof(T) + sizeof(CacheLine) - 1) / sizeof(CacheLine)) {
  lines_.reset(new CacheLine[stride_ * ((count + kMaxDotVectors - 1) / kMaxDotVectors)]);
  for (int64_t v = 0; v < count; v += kMaxDotVectors) {
    const int num_vectors = static_cast<int>(std::min<int64_t>(kMaxDotVectors, count - v));
    simd().ops<T>().pack(vectors + v, num_vectors, dim, const_cast<T*>(from(v)));
  }
}

template <typename T>
void PoolRows<T>::explain_not_finite(int64_t i, const std::string& argument) const {
  std::vector<T> buffer(dim_);
  const T* values = row(i, buffer.data());
  for (int64_t j = 0; j < dim_; ++j) {
    HULLKIT_CHECK(std::isfinite(values[j]), "pool: expected finite values, got ", values[j], " in entry ", batch_entry_,
                  ", candidate ", position(i), ", coordinate ", j);
  }
  throw_value_error("pool: expected inner products with ", argument, " within the range of ", type_name<T>(),
                    ", got an overflow in entry ", batch_entry_, ", candidate ", position(i),
                    "; scale the embeddings down");
}

template <typename T>
void PoolRows<T>::explain_if_lost(const T* vector, const char* argument, int64_t entry) const {
  T largest = 0;
  visit_part(sources_.data(), 0, size(), [&](const T* const* rows, int64_t n, int64_t) {
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, largest_magnitude(rows[i], dim_));
  });
  const T of_vector = largest_magnitude(vector, dim_);
  HULLKIT_CHECK(largest == 0 || of_vector == 0 || largest * of_vector >= std::numeric_limits<T>::min(),
                "pool: expected inner products with ", argument, " within the range of ", type_name<T>(),
                ", got an underflow of all in entry ", entry, "; scale the embeddings up");
}

template <typename T>
PackedRows<T>::PackedRows(const PoolRows<T>& rows)
    : rows_(rows),
      lines_(new CacheLine[(kMaxDotVectors * rows.dim() * sizeof(T) + sizeof(CacheLine) - 1) / sizeof(CacheLine)]),
      widened_(rows.in_place() ? 0 : kMaxDotVectors * rows.dim()) {}

template <typename T>
void PackedRows<T>::pack(const int64_t* wanted, int count) {
  const T* vectors[kMaxDotVectors];
  for (int k = 0; k < count; ++k) {
    T* const buffer = widened_.empty() ? nullptr : widened_.data() + k * rows_.dim();
    vectors[k] = rows_.row(wanted[k], buffer);
  }
  simd().ops<T>().pack(vectors, count, rows_.dim(), reinterpret_cast<T*>(lines_.get()));
  count_ = count;
}

template class QueryVector<float>;
template class QueryVector<double>;
template class PoolRows<float>;
template class PoolRows<double>;
template class PackedRows<float>;
template class PackedRows<double>;
template class PackedVectors<float>;
template class PackedVectors<double>;

}  // namespace hullkit
