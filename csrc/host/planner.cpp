#include "planner.h"

#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace sora_kernels {

// Best fit: the clip goes into the fullest pack that still has room for it, the oldest of equals.
// The open packs lie in a set ordered by (room, number), so each clip costs one search.
std::vector<std::int64_t> best_fit(const std::int64_t* lengths, std::size_t count,
                                   std::int64_t capacity) {
  std::vector<std::int64_t> packs(count);
  std::set<std::pair<std::int64_t, std::int64_t>> open;
  std::int64_t used = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t length = lengths[i];
    if (length < 1 || length > capacity) {
      throw std::invalid_argument("best_fit: lengths[" + std::to_string(i) + "]: expected 1 to " +
                                  std::to_string(capacity) + ", got " + std::to_string(length));
    }
    const auto found = open.lower_bound({length, -1});
    if (found == open.end()) {
      packs[i] = used;
      if (length < capacity) open.emplace(capacity - length, used);
      ++used;
      continue;
    }
    const std::int64_t room = found->first - length;
    packs[i] = found->second;
    // The node is reused: no allocation per clip.
    auto node = open.extract(found);
    if (room > 0) {
      node.value().first = room;
      open.insert(std::move(node));
    }
  }
  return packs;
}

}  // namespace sora_kernels
