// Runs a model that Python saved, fp8 operators inside, without Python:
//   run_saved MODEL.pt2|MODEL.pt INPUT.pt OUTPUT.pt
// MODEL.pt2 comes from torch._inductor.aoti_compile_and_package, MODEL.pt from torch.jit.save,
// INPUT.pt from torch.save of one tensor. OUTPUT.pt is for torch.load.
#include <fp8/ops.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

torch::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  return torch::jit::pickle_load(bytes).toTensor();
}

void write_tensor(const std::string& path, const torch::Tensor& tensor) {
  const std::vector<char> bytes = torch::jit::pickle_save(tensor);
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

torch::Tensor run(const std::string& model, const torch::Tensor& input) {
  const torch::NoGradGuard no_grad;
  if (model.ends_with(".pt2")) {
    torch::inductor::AOTIModelPackageLoader loader(model);
    return loader.run({input}).at(0);
  }
  return torch::jit::load(model).forward({input}).toTensor();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_saved MODEL.pt2|MODEL.pt INPUT.pt OUTPUT.pt\n";
    return 2;
  }
  try {
    fp8::ensure_registered();  // nothing else here names fp8
    const torch::Tensor output = run(argv[1], read_tensor(argv[2]));
    write_tensor(argv[3], output.cpu());
    std::cout << "output " << output.sizes() << " " << output.dtype() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "run_saved: " << error.what() << "\n";
    return 1;
  }
}
