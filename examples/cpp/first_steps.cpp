// A layer and an operator, forward and backward: the C++ of README.md and docs/cpp.md.
#include <fp8/nn.h>
#include <fp8/ops.h>
#include <torch/torch.h>

int main() {
  fp8::nn::Linear layer(fp8::nn::LinearOptions(512, 256).recipe("rowwise"));
  auto x = torch::randn({64, 512}), weight = torch::randn({256, 512}).requires_grad_();
  (layer(x) + fp8::fused_linear(x, weight)).sum().backward();
}
