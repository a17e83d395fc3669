// The inner loop of the packing planner (sora_kernels/planner.py holds the algorithm around it).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sora_kernels {

// Pack of each clip under best fit, clips taken in the given order. Throws std::invalid_argument
// for a length outside [1, capacity].
std::vector<std::int64_t> best_fit(const std::int64_t* lengths, std::size_t count,
                                   std::int64_t capacity);

}  // namespace sora_kernels
