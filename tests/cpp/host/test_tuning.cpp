// What autotune decides and keeps: the choice, the lines, the file.
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <string>

#include "host/tuning.h"

using namespace fp8::tuning;
namespace fs = std::filesystem;

namespace {

const std::string kProblem = "matmul m=8 n=16 k=32 a=e4m3 b=e4m3 align=256,256,256,256";

Choice some_choice() {
  Choice choice;
  for (size_t i = 0; i < choice.algorithm.words.size(); ++i) {
    choice.algorithm.words[i] = i * 0x123456789ABCDEFULL;
  }
  choice.algorithm.workspace_bytes = 33554432;
  choice.first_us = 812.25;
  choice.chosen_us = 750.5;
  return choice;
}

struct Folder {
  fs::path path;
  Folder() {
    std::string text = (fs::temp_directory_path() / "fp8-tuning-XXXXXX").string();
    REQUIRE(mkdtemp(text.data()) != nullptr);
    path = text;
  }
  ~Folder() { fs::remove_all(path); }
};

void write_text(const fs::path& path, const std::string& text) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  REQUIRE(file != nullptr);
  REQUIRE(std::fwrite(text.data(), 1, text.size(), file) == text.size());
  REQUIRE(std::fclose(file) == 0);
}

}  // namespace

TEST_CASE("median") {
  REQUIRE(median({3}) == 3);
  REQUIRE(median({9, 1, 5}) == 5);
  REQUIRE(median({100, 1, 2, 3, 0}) == 2);
}

TEST_CASE("the first choice stays unless another is clearly faster") {
  REQUIRE(choose({100}) == 0);
  REQUIRE(choose({100, 99, 98.1}) == 0);    // less than 2%
  REQUIRE(choose({100, 99, 97, 98}) == 2);  // the fastest, not the first that is faster
  REQUIRE(choose({100, 120, 101}) == 0);
  REQUIRE(choose({5.0, 4.6}) == 0);  // 8%, but no more than events resolve
  REQUIRE(choose({5.0, 4.4}) == 1);
}

TEST_CASE("a line keeps a choice") {
  const std::string line = format_line(kProblem, some_choice());
  REQUIRE(line.find('\n') == std::string::npos);
  REQUIRE(line.starts_with(kProblem + " | algo=00000000000000000123456789abcdef0"));
  REQUIRE(line.ends_with(" workspace=33554432 first_us=812.25 chosen_us=750.50"));
  const auto parsed = parse_line(line);
  REQUIRE(parsed);
  REQUIRE(parsed->first == kProblem);
  REQUIRE(parsed->second == some_choice());
}

TEST_CASE("a line that is not whole is nothing") {
  const std::string line = format_line(kProblem, some_choice());
  for (size_t size = 0; size < line.find("chosen_us=") + 10; ++size) {
    REQUIRE_FALSE(parse_line(line.substr(0, size)));
  }
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = line;
    text.replace(text.find(from), from.size(), to);
    return parse_line(text).has_value();
  };
  REQUIRE(changed("812.25", "812"));
  REQUIRE_FALSE(changed("812.25", "fast"));
  REQUIRE_FALSE(changed("812.25", "-1"));
  REQUIRE_FALSE(changed("812.25", "inf"));
  REQUIRE_FALSE(changed("750.50", "nan"));
  REQUIRE_FALSE(changed("750.50", "750.50 more"));
  REQUIRE_FALSE(changed("workspace=33554432", "workspace=-1"));
  REQUIRE_FALSE(changed("workspace=33554432", "workspace=99999999999999999999"));
  REQUIRE_FALSE(changed("workspace=", "work="));
  REQUIRE_FALSE(changed("abcdef", "abcdeg"));
  REQUIRE_FALSE(changed("abcdef", "abcde"));
  REQUIRE_FALSE(changed("abcdef", "abcdef0"));
  REQUIRE_FALSE(changed(kProblem, ""));
  REQUIRE_FALSE(parse_line("# a comment"));
}

TEST_CASE("a file keeps a table") {
  Table table;
  REQUIRE(parse_file(format_file(table)) == table);
  table[kProblem] = some_choice();
  table["matmul m=1"] = Choice();
  REQUIRE(parse_file(format_file(table)) == table);
}

TEST_CASE("what cannot be read of a file is left out") {
  const std::string line = format_line(kProblem, some_choice());
  const Table one{{kProblem, some_choice()}};
  REQUIRE(parse_file("") == Table());
  REQUIRE(parse_file("# fp8 autotune 1\n") == Table());
  REQUIRE(parse_file("\0\xFF garbage\n\n | \n") == Table());
  REQUIRE(parse_file("# fp8 autotune 1\nnonsense\n" + line + "\n# a remark\n") == one);
  REQUIRE(parse_file(line + "\n") == one);  // the head is lost, the line still says all
  // Cut short: the last line may lack digits of its last number.
  REQUIRE(parse_file("# fp8 autotune 1\n" + line) == Table());
  REQUIRE(parse_file("# fp8 autotune 1\n" + line + "\n" + line.substr(0, 200)) == one);
  // The later of two lines for one problem counts.
  REQUIRE(parse_file("# fp8 autotune 1\n" + format_line(kProblem, Choice()) + "\n" + line + "\n") ==
          one);
}

TEST_CASE("a file of another form is not read") {
  const std::string line = format_line(kProblem, some_choice()) + "\n";
  REQUIRE_FALSE(parse_file("# fp8 autotune 2\n" + line));
  REQUIRE_FALSE(parse_file("# fp8 autotune 10\n" + line));
  REQUIRE_FALSE(parse_file("# fp8 autotune \n" + line));
}

TEST_CASE("the file's name and folder") {
  REQUIRE(file_name("NVIDIA H200", 130100) == "autotune-nvidia-h200-130100.txt");
  REQUIRE(file_name("NVIDIA A100-SXM4-80GB (MIG 1g)", 1) ==
          "autotune-nvidia-a100-sxm4-80gb-mig-1g-1.txt");
  REQUIRE(file_name("../../x", 1) == "autotune-x-1.txt");
  REQUIRE(file_name("", 1) == "autotune-1.txt");
  REQUIRE(cache_folder("/a", "/b", "/c") == fs::path("/a"));
  REQUIRE(cache_folder(nullptr, "/b", "/c") == fs::path("/b/fp8"));
  REQUIRE(cache_folder("", "", "/c") == fs::path("/c/.cache/fp8"));
  REQUIRE(cache_folder(nullptr, nullptr, nullptr).empty());
}

TEST_CASE("problems are added to the file, which keeps what it has") {
  const Folder folder;
  const fs::path path = folder.path / "new" / "folder" / "file.txt";
  REQUIRE(read_file(path).empty());
  REQUIRE(add_to_file(path, kProblem, some_choice()));
  REQUIRE(add_to_file(path, "another", Choice()));
  REQUIRE(add_to_file(path, "another", some_choice()));
  const Table expected{{kProblem, some_choice()}, {"another", some_choice()}};
  REQUIRE(parse_file(read_file(path)) == expected);
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(path.parent_path())) ++files;
  REQUIRE(files == 1);  // no temporary file is left
}

TEST_CASE("a file longer than the buffer is read whole") {
  const Folder folder;
  const fs::path path = folder.path / "file.txt";
  Table table;
  for (int i = 0; i < 100; ++i) table["problem " + std::to_string(i)] = some_choice();
  write_text(path, format_file(table));
  REQUIRE(parse_file(read_file(path)) == table);
}

TEST_CASE("a damaged file is repaired, one of another form left alone") {
  const Folder folder;
  const fs::path path = folder.path / "file.txt";
  write_text(path, "damaged\n" + format_line("whole", some_choice()) + "\nhalf | algo=00");
  REQUIRE(add_to_file(path, kProblem, some_choice()));
  const Table expected{{kProblem, some_choice()}, {"whole", some_choice()}};
  REQUIRE(read_file(path) == format_file(expected));

  const std::string other = "# fp8 autotune 2\nsomething\n";
  write_text(path, other);
  REQUIRE_FALSE(add_to_file(path, kProblem, some_choice()));
  REQUIRE(read_file(path) == other);
}

TEST_CASE("where nothing can be written, nothing is left") {
  const Folder folder;
  write_text(folder.path / "file", "not a folder");
  REQUIRE_FALSE(add_to_file(folder.path / "file" / "x.txt", kProblem, some_choice()));
  fs::create_directories(folder.path / "taken.txt" / "full");  // cannot be replaced by a file
  REQUIRE_FALSE(add_to_file(folder.path / "taken.txt", kProblem, some_choice()));
  for (const auto& entry : fs::directory_iterator(folder.path)) {
    REQUIRE((entry.path().filename() == "file" || entry.path().filename() == "taken.txt"));
  }
}
