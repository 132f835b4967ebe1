// SPDX-License-Identifier: Apache-2.0
// Instructions of compute capability 9.0 alone: copies of boxes of a matrix, and products of four warps together.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/primitives/ptx.cuh"

namespace hullkit::ptx {

// One box of a three-dimensional matrix into shared memory; zeros where the box lies outside. `full` learns of its
// bytes.
__device__ inline void load_box(void* shared, const CUtensorMap& map, Barrier& full, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(&full)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The way back; nothing is written outside of the matrix.
__device__ inline void store_box(const CUtensorMap& map, const void* shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ inline void commit_boxes() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's boxes have been read from shared memory.
__device__ inline void wait_boxes_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Barriers that this thread initialised, copies of boxes may use from here on.
__device__ inline void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// What this thread wrote to shared memory, copies of boxes see from here on.
__device__ inline void show_to_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers of a thread from here on, for all warps of a group of four.
template <int kRegisters>
__device__ inline void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launches: the next kernel may start; the one before has finished, and its writes are seen.
__device__ inline void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ inline void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Four matrices of 8 x 8 halves, transposed. A lane's address is that of a row, lane / 8 its matrix.
__device__ inline void store_transposed(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

__device__ inline void store_transposed(uint32_t shared, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared), "r"(a), "r"(b)
               : "memory");
}

// Products of a group of four warps. They run on while the warps go on; between `products_begin` and a wait nobody may
// touch the sums.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// What a product reads from shared memory, at an address that is a multiple of 16: rows of kRow bytes (128 or 32), as a
// copy with a swizzle of as many bytes left them, in blocks of eight.
// kApart: bytes from box to box, of a transposed operand that has more columns than a box; others do not use it.
template <int kRow, int kApart = 16>
__device__ inline uint64_t product_operand(uint32_t shared) {
  static_assert(kRow == 128 || kRow == 32);
  constexpr uint64_t kSwizzled = uint64_t{kRow == 128 ? 1 : 3} << 62, kBlock = uint64_t{8 * kRow >> 4} << 32;
  constexpr uint64_t kBox = uint64_t{kApart >> 4} << 16;
  return kSwizzled | kBlock | kBox | (shared >> 4);
}

#define HULLKIT_TWO(t) "%" #t "0, %" #t "1"
#define HULLKIT_FOUR(t) HULLKIT_TWO(t) ", %" #t "2, %" #t "3"
#define HULLKIT_SIX(t) HULLKIT_FOUR(t) ", %" #t "4, %" #t "5"
#define HULLKIT_EIGHT(t) HULLKIT_SIX(t) ", %" #t "6, %" #t "7"
#define HULLKIT_TEN(t) HULLKIT_EIGHT(t) ", %" #t "8, %" #t "9"
#define HULLKIT_SUMS4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define HULLKIT_SUMS20(i) \
  HULLKIT_SUMS4(i), HULLKIT_SUMS4(i + 4), HULLKIT_SUMS4(i + 8), HULLKIT_SUMS4(i + 12), HULLKIT_SUMS4(i + 16)
// The instruction's operands are a_at sums, then a, b, whether to add and whether a is transposed, with these numbers.
// b_transposed: 0 or 1.
#define HULLKIT_MULTIPLY_ADD(columns, a_at, b_at, add_at, transposed_at, b_transposed, registers, ...)       \
  template <bool kTransposed>                                                                                \
  __device__ inline void multiply_add(float(&sums)[a_at], uint64_t a, uint64_t b, int add) {                 \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #add_at ", 0; wgmma.mma_async.sync.aligned.m64n" #columns \
                 "k16.f32.bf16.bf16 {" registers "}, %" #a_at ", %" #b_at ", p, 1, 1, %" #transposed_at      \
                 ", " #b_transposed ";}"                                                                     \
                 : __VA_ARGS__                                                                               \
                 : "l"(a), "l"(b), "r"(add), "n"(static_cast<int>(kTransposed)));                            \
  }

// sums [64, N] += a [64, 16] b [N, 16]^T for N = 96, 104, 112, 128, 160, 200 and 208; without `add` there is no sum
// before. kTransposed: a lies as [16, 64]. In warp w of the group, with g = lane / 4 and t = lane % 4:
//   sums[4 j], sums[4 j + 1]: row 16 w + g, columns 8 j + 2 t and the next;  sums[4 j + 2], sums[4 j + 3]: row + 8
HULLKIT_MULTIPLY_ADD(96, 48, 49, 50, 51, 0,
                     HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_EIGHT(4),
                     HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS4(40), HULLKIT_SUMS4(44))
HULLKIT_MULTIPLY_ADD(
    104, 52, 53, 54, 55, 0,
    HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_TEN(4) ", " HULLKIT_TWO(5),
    HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS4(40), HULLKIT_SUMS4(44), HULLKIT_SUMS4(48))
HULLKIT_MULTIPLY_ADD(
    112, 56, 57, 58, 59, 0,
    HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_TEN(4) ", " HULLKIT_SIX(5),
    HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS4(40), HULLKIT_SUMS4(44), HULLKIT_SUMS4(48), HULLKIT_SUMS4(52))
HULLKIT_MULTIPLY_ADD(128, 64, 65, 66, 67, 0,
                     HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_TEN(
                         4) ", " HULLKIT_TEN(5) ", " HULLKIT_FOUR(6),
                     HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS20(40), HULLKIT_SUMS4(60))
HULLKIT_MULTIPLY_ADD(160, 80, 81, 82, 83, 0,
                     HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_TEN(
                         4) ", " HULLKIT_TEN(5) ", " HULLKIT_TEN(6) ", " HULLKIT_TEN(7),
                     HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS20(40), HULLKIT_SUMS20(60))
HULLKIT_MULTIPLY_ADD(
    200, 100, 101, 102, 103, 0,
    HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_TEN(4) ", " HULLKIT_TEN(
        5) ", " HULLKIT_TEN(6) ", " HULLKIT_TEN(7) ", " HULLKIT_TEN(8) ", " HULLKIT_TEN(9),
    HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS20(40), HULLKIT_SUMS20(60), HULLKIT_SUMS20(80))
HULLKIT_MULTIPLY_ADD(
    208, 104, 105, 106, 107, 0,
    HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TEN(3) ", " HULLKIT_TEN(4) ", " HULLKIT_TEN(
        5) ", " HULLKIT_TEN(6) ", " HULLKIT_TEN(7) ", " HULLKIT_TEN(8) ", " HULLKIT_TEN(9) ", " HULLKIT_FOUR(10),
    HULLKIT_SUMS20(0), HULLKIT_SUMS20(20), HULLKIT_SUMS20(40), HULLKIT_SUMS20(60), HULLKIT_SUMS20(80),
    HULLKIT_SUMS4(100))

// The same for N = 64, of a b that lies as [16, 64]: four boxes of [16, 16].
HULLKIT_MULTIPLY_ADD(64, 32, 33, 34, 35, 1, HULLKIT_TEN() ", " HULLKIT_TEN(1) ", " HULLKIT_TEN(2) ", " HULLKIT_TWO(3),
                     HULLKIT_SUMS20(0), HULLKIT_SUMS4(20), HULLKIT_SUMS4(24), HULLKIT_SUMS4(28))

#undef HULLKIT_TWO
#undef HULLKIT_FOUR
#undef HULLKIT_SIX
#undef HULLKIT_EIGHT
#undef HULLKIT_TEN
#undef HULLKIT_SUMS4
#undef HULLKIT_SUMS20
#undef HULLKIT_MULTIPLY_ADD

}  // namespace hullkit::ptx
