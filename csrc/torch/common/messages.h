// Messages of the torch layer, joined from strings, numbers, shapes, dtypes and devices.
//
// They are built from std::string alone. Streaming a number into a std::ostringstream crashed where
// the library was built with g++ 13 (inside libstdc++, called from libc10): why is not known, but a
// message must not be able to.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <string>
#include <string_view>
#include <type_traits>

namespace fp8 {

inline std::string to_text(const char* text) { return text; }
inline std::string to_text(const std::string& text) { return text; }
inline std::string to_text(std::string_view text) { return std::string(text); }
inline std::string to_text(c10::Device device) { return device.str(); }
inline std::string to_text(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);  // a string_view from torch 2.15 on
}
inline std::string to_text(const c10::SymInt& value) {
  const auto known = value.maybe_as_int();
  return known ? std::to_string(*known) : value.toSymNodeImplUnowned()->str();
}
template <typename Int>
  requires std::is_integral_v<Int>
std::string to_text(Int value) {
  return std::to_string(value);
}
inline std::string to_text(c10::SymIntArrayRef shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + to_text(shape[i]);
  return text + "]";
}

template <typename... Parts>
std::string join(const Parts&... parts) {
  return (to_text(parts) + ...);
}

}  // namespace fp8

#define FP8_CHECK_VALUE(condition, ...) TORCH_CHECK_VALUE(condition, ::fp8::join(__VA_ARGS__))
#define FP8_CHECK_TYPE(condition, ...) TORCH_CHECK_TYPE(condition, ::fp8::join(__VA_ARGS__))
