// What the tests of the passes around grouped matmuls share: problems, routings, and the host's
// codes.
#pragma once

#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "host/formats.h"

struct Problem {
  int64_t tokens;
  int64_t top_k;
  int64_t groups;
  int64_t cols;
};

inline Problem problems() {
  // One of each; groups that are empty; more groups than threads of a block; rows as long as a
  // block's registers hold and longer; tiles so many that a block takes several.
  return GENERATE(Problem{1, 1, 1, 16}, Problem{40, 2, 5, 48}, Problem{300, 3, 300, 80},
                  Problem{520, 2, 3, 2064}, Problem{9, 4, 2, 33 * 1024},
                  Problem{600, 3, 130, 1936});
}

// Experts of slots, sentinels among them, and where a stable sort puts the slots.
struct Routing {
  std::vector<int64_t> experts;
  std::vector<int32_t> offsets;
  std::vector<int32_t> place;
  std::vector<int32_t> source;

  Routing(int64_t slots, int64_t groups)
      : experts(slots), offsets(groups), place(slots), source(slots) {
    std::mt19937 engine(11);
    for (int64_t& expert : experts) {
      expert = static_cast<int64_t>(engine() % (groups + 2)) - 1;  // -1 and groups: nobody's
    }
    int32_t row = 0;
    for (int64_t g = 0; g <= groups; ++g) {
      for (int64_t slot = 0; slot < slots; ++slot) {
        const bool nobody = experts[slot] < 0 || experts[slot] >= groups;
        if (g == groups ? !nobody : experts[slot] != g) continue;
        place[slot] = row;
        source[row++] = static_cast<int32_t>(slot);
      }
      if (g < groups) offsets[g] = row;
    }
  }
  int64_t rows() const { return offsets.back(); }  // of a group
};

// The group of each of its rows.
inline std::vector<int64_t> groups_of(const Routing& routing) {
  std::vector<int64_t> group;
  for (int64_t g = 0; g < std::ssize(routing.offsets); ++g) group.resize(routing.offsets[g], g);
  return group;
}

struct Codes {
  float scale;
  float multiplier;
  explicit Codes(const std::vector<float>& values) : scale(0), multiplier(0) {
    float amax = 0.0F;
    for (const float v : values) amax = std::max(amax, std::fabs(v));
    multiplier = fp8::quant_multiplier(amax, 448.0F);
    scale = 1.0F / multiplier;
  }
  uint8_t operator()(float value) const { return fp8::encode<fp8::E4M3>(value * multiplier); }
};
