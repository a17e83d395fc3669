// Where the tokens of a packed layout sit in their grids, by arithmetic from one small table per
// part. The table is that of GridPositions (packing/rope.py), the orders of tokens those of
// packing/tiles.py, the closed form that of ops/_grid.py. Tokens are mostly visited one after
// another, so the divisions are done once per part or tile and the rest is counting.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sora {

constexpr int64_t kRasterPart = 7, kTilePart = 11;  // values of a part

struct GridPart {
  int32_t start;       // first token, in the pack
  int32_t last;        // offset of the last token; 0 for text, all of which is token 0 of a 1x1x1 grid
  int32_t h, w;
  int32_t row[3];      // of the rotary tables, of coordinate 0 on t, h, w
  int32_t t, tile[3];  // in tile order only
};

struct GridTable {
  const int32_t* part_of_token = nullptr;
  const int32_t* parts = nullptr;  // [parts, part_size]
  int64_t part_size = 0;
  int64_t first_token = 0;  // of the pack, that token 0 of part_of_token is

  bool tiled() const { return part_size == kTilePart; }
};

// The box of coordinates that is stored in raster order around a token (its tile, or the whole
// grid), and the token's place in it.
struct GridPlace {
  int32_t begin[3], end[3], at[3];
};

// Token number `offset` of a part.
SORA_HD GridPlace grid_place(const GridPart& p, bool tiled, int32_t offset) {
  GridPlace place{{0, 0, 0}, {INT32_MAX, p.h, p.w}, {}};
  if (tiled) {
    const int32_t size[3] = {p.t, p.h, p.w};
    int32_t before = 1;               // tokens across the axes whose extent is settled
    int32_t after = p.t * p.h * p.w;  // tokens of a plane (row, column) of the axes to come
    for (int axis = 0; axis < 3; ++axis) {
      after /= size[axis];
      const int32_t thick = before * p.tile[axis] * after;
      const int32_t index = offset / thick;
      offset -= index * thick;
      place.begin[axis] = index * p.tile[axis];
      const int32_t end = place.begin[axis] + p.tile[axis];
      place.end[axis] = end < size[axis] ? end : size[axis];
      before *= place.end[axis] - place.begin[axis];
    }
  }
  const int32_t h = place.end[1] - place.begin[1], w = place.end[2] - place.begin[2];
  const int32_t row = offset / w;
  place.at[0] = place.begin[0] + row / h;
  place.at[1] = place.begin[1] + row % h;
  place.at[2] = place.begin[2] + offset % w;
  return place;
}

// Offset of token n of the table in its part.
SORA_HD int32_t grid_offset(const GridTable& table, const GridPart& part, int64_t n) {
  const int64_t offset = n + table.first_token - part.start;
  return static_cast<int32_t>(offset < 0 ? 0 : offset < part.last ? offset : part.last);
}

// The rows of the rotary tables, (t, h, w), of token n alone.
SORA_HD void grid_rows(const GridTable& table, int64_t n, int32_t* rows) {
  const GridPart& part = *reinterpret_cast<const GridPart*>(
      table.parts + table.part_of_token[n] * table.part_size);
  const GridPlace place =
      grid_place(part, table.part_size == kTilePart, grid_offset(table, part, n));
  for (int axis = 0; axis < 3; ++axis) rows[axis] = part.row[axis] + place.at[axis];
}

}  // namespace sora

#ifdef SORA_ISA  // CPU kernels walk
namespace sora::SORA_ISA {

// The rows of the rotary tables, (t, h, w), of one token after another.
class GridWalk {
 public:
  explicit GridWalk(const GridTable& table) : table_(table) {}

  const int32_t* rows(int64_t n) {
    if (n == now_) return rows_;
    const GridPart* part = reinterpret_cast<const GridPart*>(
        table_.parts + table_.part_of_token[n] * table_.part_size);
    if (n == now_ + 1 && part == part_) next();
    else enter(part, n);
    now_ = n;
    return rows_;
  }

 private:
  GridTable table_;
  const GridPart* part_ = nullptr;
  int64_t now_ = -2;
  int32_t offset_ = 0;
  GridPlace place_{};
  int32_t rows_[3] = {};

  void enter(const GridPart* part, int64_t n) {
    part_ = part;
    offset_ = grid_offset(table_, *part, n);
    settle();
  }

  void settle() {
    place_ = grid_place(*part_, table_.tiled(), offset_);
    for (int axis = 0; axis < 3; ++axis) rows_[axis] = part_->row[axis] + place_.at[axis];
  }

  void next() {
    if (offset_ == part_->last) return;
    ++offset_;
    for (int axis = 2; axis >= 0; --axis) {
      ++rows_[axis];
      if (++place_.at[axis] < place_.end[axis]) return;
      rows_[axis] -= place_.at[axis] - place_.begin[axis];
      place_.at[axis] = place_.begin[axis];
    }
    settle();  // the next tile
  }
};

}  // namespace sora::SORA_ISA
#endif
