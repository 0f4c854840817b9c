// Ranges reach a tool that listens: by name, nested, also where the function throws.
#include <catch2/catch.hpp>
#include <stdexcept>
#include <string>

#include "../nvtx_listener.h"
#include "host/ranges.h"

using namespace fp8;

namespace {

std::string& heard() {
  static std::string text;
  return text;
}

int twice(const int& x) {
  const Range range("inner");
  return 2 * x;
}

void fails() { throw std::runtime_error("no"); }

}  // namespace

TEST_CASE("a tool hears ranges, and the calls under them are what they were") {
  InitializeInjectionNvtx2_fnptr = nvtx_listener::listen;
  nvtx_listener::on_push = [](const char* name) { heard() += std::string("<") + name; };
  nvtx_listener::on_pop = [] { heard() += ">"; };
  REQUIRE(Ranged<"fp8::twice", &twice>::call(21) == 42);
  REQUIRE(heard() == "<fp8::twice<inner>>");
  heard().clear();
  REQUIRE_THROWS_WITH((Ranged<"fp8::fails", &fails>::call()), "no");
  REQUIRE(heard() == "<fp8::fails>");
}
