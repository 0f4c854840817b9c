// The demo's text, as examples/stdlib_text.py reads it: every .py file below a folder (that of
// Python's standard library), in sorted order, one file in ten held out; and its batches, which
// depend on (seed, step) alone.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace demo {

inline uint32_t crc32(std::string_view text) {  // zlib's
  uint32_t crc = ~0U;
  for (const char c : text) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

inline bool is_skipped(const std::filesystem::path& name) {
  static constexpr std::array<std::string_view, 7> kFolders{
      "site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"};
  return std::any_of(name.begin(), name.end(), [](const std::filesystem::path& part) {
    return std::find(kFolders.begin(), kFolders.end(), part.string()) != kFolders.end();
  });
}

// [bytes] uint8: the text to train on, files separated by one zero byte.
inline torch::Tensor load_text(const std::filesystem::path& root) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(root)) {
    const std::filesystem::path name = entry.path().lexically_relative(root);
    if (entry.is_regular_file() && name.extension() == ".py" && !is_skipped(name)) {
      names.push_back(name.generic_string());
    }
  }
  std::sort(names.begin(), names.end());
  std::vector<char> text;
  for (const std::string& name : names) {
    if (crc32(name) % 10 == 0) continue;  // held out
    std::ifstream file(root / name, std::ios::binary);
    text.insert(text.end(), std::istreambuf_iterator<char>(file), {});
    text.push_back('\0');
  }
  if (text.size() < 16384) {
    throw std::runtime_error("too little text in .py files below " + root.string());
  }
  return torch::from_blob(text.data(), static_cast<int64_t>(text.size()), torch::kByte).clone();
}

// Inputs and targets of training step `step`: [batch, length] int64, the targets one byte later.
inline std::pair<torch::Tensor, torch::Tensor> batch_of(const torch::Tensor& text, int64_t step,
                                                        int64_t batch, int64_t length,
                                                        int64_t seed) {
  at::Generator generator =
      at::detail::createCPUGenerator(static_cast<uint64_t>(seed * 1'000'003 + step));
  const torch::Tensor starts =
      torch::randint(text.numel() - length, {batch}, generator, torch::kLong);
  const torch::Tensor tokens =
      text.index({starts.unsqueeze(1) + torch::arange(length + 1)}).to(torch::kLong);
  return {tokens.narrow(1, 0, length).contiguous(), tokens.narrow(1, 1, length).contiguous()};
}

}  // namespace demo
