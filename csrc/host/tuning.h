// What autotune decides and keeps: the choice among measured candidates, and the text file with the
// choices for one GPU model and one version of cuBLASLt. Host logic: no CUDA, tested on any
// machine.
//
// The file has a line that names its form, then one line per problem:
//   # fp8 autotune 1
//   matmul m=8192 n=4096 ... align=256,256,256,256 | algo=<128 hex digits> workspace=0
//   first_us=812.4 chosen_us=750.1                                    (all of it in one line)
// A line that cannot be read is left out, so its problem is measured again. Files are read and
// written with C functions: streams of libstdc++ are not safe here (see torch/common/messages.h).
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "fp8/core.h"

namespace fp8::tuning {

// --- the choice ---

inline double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Index of the candidate to use: the first one, which the heuristic holds for the best, unless
// another is clearly faster. Less than that is noise, and would make runs differ for nothing.
inline size_t choose(const std::vector<double>& medians_us) {
  constexpr double kMinGain = 1.02;
  constexpr double kMinGainUs = 0.5;  // what CUDA events resolve
  const auto best = std::min_element(medians_us.begin(), medians_us.end());
  const bool better =
      medians_us.front() >= *best * kMinGain && medians_us.front() - *best >= kMinGainUs;
  return better ? static_cast<size_t>(best - medians_us.begin()) : 0;
}

// --- lines ---

struct Choice {
  core::MatmulAlgorithm algorithm;
  double first_us = 0;   // of the heuristic's first choice
  double chosen_us = 0;  // of `algorithm`, measured beside it

  bool operator==(const Choice&) const = default;
};

using Table = std::map<std::string, Choice, std::less<>>;  // by problem

inline constexpr std::string_view kHead = "# fp8 autotune ";
inline constexpr std::string_view kForm = "1";
inline constexpr std::string_view kSeparator = " | ";

inline std::string format_line(std::string_view problem, const Choice& choice) {
  std::string line(problem);
  const auto append = [&](std::string_view name, auto... value_and_format) {
    std::array<char, 64> text{};
    const auto end = std::to_chars(text.data(), text.data() + text.size(), value_and_format...).ptr;
    line.append(name).append(text.data(), end);
  };
  line.append(kSeparator).append("algo=");
  for (const uint64_t word : choice.algorithm.words) {
    std::array<char, 16> digits{};
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), word, 16).ptr;
    line.append(digits.data() + digits.size() - end, '0').append(digits.data(), end);
  }
  append(" workspace=", choice.algorithm.workspace_bytes);
  append(" first_us=", choice.first_us, std::chars_format::fixed, 2);
  append(" chosen_us=", choice.chosen_us, std::chars_format::fixed, 2);
  return line;
}

// Nothing where the line has another form than that of format_line.
inline std::optional<std::pair<std::string, Choice>> parse_line(std::string_view line) {
  const size_t end_of_problem = line.find(kSeparator);
  if (end_of_problem == 0 || end_of_problem == std::string_view::npos) return std::nullopt;
  const std::string problem(line.substr(0, end_of_problem));
  line.remove_prefix(end_of_problem + kSeparator.size());
  Choice choice;
  const auto skip = [&](std::string_view expected) {
    if (!line.starts_with(expected)) return false;
    line.remove_prefix(expected.size());
    return true;
  };
  const auto number = [&](auto& value, auto... base) {
    const auto [end, error] =
        std::from_chars(line.data(), line.data() + line.size(), value, base...);
    if (error != std::errc()) return false;
    line.remove_prefix(static_cast<size_t>(end - line.data()));
    return true;
  };
  if (!skip("algo=")) return std::nullopt;
  for (uint64_t& word : choice.algorithm.words) {
    const std::string_view digits = line.substr(0, 16);
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), word, 16);
    if (digits.size() != 16 || error != std::errc() || end != digits.data() + digits.size())
      return std::nullopt;
    line.remove_prefix(digits.size());
  }
  const bool complete = skip(" workspace=") && number(choice.algorithm.workspace_bytes) &&
                        skip(" first_us=") && number(choice.first_us) && skip(" chosen_us=") &&
                        number(choice.chosen_us) && line.empty();
  const bool times = std::isfinite(choice.first_us) && std::isfinite(choice.chosen_us) &&
                     choice.first_us >= 0 && choice.chosen_us >= 0;
  return complete && times ? std::optional(std::pair(problem, choice)) : std::nullopt;
}

// --- files ---

inline std::string format_file(const Table& table) {
  std::string text = std::string(kHead).append(kForm).append("\n");
  for (const auto& [problem, choice] : table) text += format_line(problem, choice) + "\n";
  return text;
}

// What can be read of a file's text; a last line without its end is not. Nothing where another form
// is named: such a file belongs to another version of this library.
inline std::optional<Table> parse_file(std::string_view text) {
  Table table;
  bool head = true;
  for (size_t end = text.find('\n'); end != std::string_view::npos; end = text.find('\n')) {
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end + 1);
    if (std::exchange(head, false) && line.starts_with(kHead)) {
      if (line.substr(kHead.size()) != kForm) return std::nullopt;
      continue;
    }
    if (auto entry = parse_line(line)) table.insert_or_assign(entry->first, entry->second);
  }
  return table;
}

// "NVIDIA H100 80GB HBM3", 130100 -> "autotune-nvidia-h100-80gb-hbm3-130100.txt"
inline std::string file_name(std::string_view gpu, size_t cublaslt_version) {
  std::string name = "autotune-";
  for (const char c : gpu) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    if (letter || (c >= '0' && c <= '9')) {
      name += static_cast<char>(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
    } else if (name.back() != '-') {
      name += '-';
    }
  }
  return name + (name.back() == '-' ? "" : "-") + std::to_string(cublaslt_version) + ".txt";
}

// The folder from the values of FP8_CACHE_DIR, XDG_CACHE_HOME and HOME (null or empty: not set);
// empty when none is set: then nothing is kept.
inline std::filesystem::path cache_folder(const char* own, const char* xdg, const char* home) {
  const auto set = [](const char* value) { return value != nullptr && *value != '\0'; };
  if (set(own)) return own;
  if (set(xdg)) return std::filesystem::path(xdg) / "fp8";
  return set(home) ? std::filesystem::path(home) / ".cache" / "fp8" : std::filesystem::path();
}

// Where the choices for a GPU model are kept; empty where no folder is known. The environment is
// read once.
inline std::filesystem::path file_path(std::string_view gpu, size_t cublaslt_version) {
  static const std::filesystem::path folder = cache_folder(
      std::getenv("FP8_CACHE_DIR"), std::getenv("XDG_CACHE_HOME"), std::getenv("HOME"));
  return folder.empty() ? folder : folder / file_name(gpu, cublaslt_version);
}

// The file's text; empty where there is none or it cannot be read.
inline std::string read_file(const std::filesystem::path& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  std::string text;
  std::array<char, 4096> buffer{};
  size_t count = 0;
  while (file && (count = std::fread(buffer.data(), 1, buffer.size(), file.get())) > 0) {
    text.append(buffer.data(), count);
  }
  return text;
}

// Adds one problem to the file, and makes the folder. The new text is written beside the file and
// takes its place in one step, so that a reader sees the old or the new one, never a part. Of two
// processes that write at the same time one may lose its line, which is then measured again. False
// where nothing could be written, or the file has another form.
inline bool add_to_file(const std::filesystem::path& path, const std::string& problem,
                        const Choice& choice) {
  std::optional<Table> table = parse_file(read_file(path));
  if (!table) return false;
  table->insert_or_assign(problem, choice);
  const std::string text = format_file(*table);
  std::error_code error;
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path(), error);
  std::string temporary = path.string() + ".XXXXXX";
  const int descriptor = mkstemp(temporary.data());
  if (descriptor < 0) return false;
  size_t written = 0;
  ssize_t count = 0;
  while (written < text.size() &&
         (count = write(descriptor, text.data() + written, text.size() - written)) > 0) {
    written += static_cast<size_t>(count);
  }
  bool done = close(descriptor) == 0 && written == text.size();
  if (done) {
    std::filesystem::rename(temporary, path, error);
    done = !error;
  }
  if (!done) std::filesystem::remove(temporary, error);
  return done;
}

}  // namespace fp8::tuning
