// The demo's training loop (examples/train.py) in C++: same text, batches, initial weights and
// schedule under the same seed, and the same kernels in the same order: the same losses.
//   train TEXT_FOLDER [size=tiny|cpu] [steps=12] [recipe=tensorwise|...|none] [seed=0] [device=cpu]
// TEXT_FOLDER holds .py files: python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])'
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <map>
#include <numbers>
#include <stdexcept>
#include <string>

#include "byte_model.h"
#include "optimizer.h"
#include "stdlib_text.h"

namespace {

struct Job {
  demo::ModelSize model;
  int64_t batch, length;
  double learning_rate;
};

const std::map<std::string, Job> kJobs{
    {"tiny", {{32, 64, 1, 2}, 4, 32, 3e-3}},
    {"cpu", {{192, 512, 3, 6}, 8, 128, 2e-3}},
};

// Linear warm-up over an eighth of the steps, then cosine decay to a tenth.
double rate(int64_t step, int64_t steps, double peak) {
  const int64_t warmup = std::max<int64_t>(1, steps / 8);
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double done = static_cast<double>(step - warmup) /
                      static_cast<double>(std::max<int64_t>(1, steps - warmup));
  return peak * (0.55 + 0.45 * std::cos(std::numbers::pi * done));
}

std::map<std::string, std::string> parse(int argc, char** argv) {
  std::map<std::string, std::string> options{{"size", "tiny"},
                                             {"steps", "12"},
                                             {"recipe", "tensorwise"},
                                             {"seed", "0"},
                                             {"device", "cpu"}};
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t equals = argument.find('=');
    if (equals == std::string::npos || !options.contains(argument.substr(0, equals))) {
      throw std::invalid_argument("unknown option " + argument);
    }
    options[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  return options;
}

void train(const std::string& folder, std::map<std::string, std::string>& options) {
  const Job& job = kJobs.at(options["size"]);
  const int64_t steps = std::stoll(options["steps"]), seed = std::stoll(options["seed"]);
  const torch::Device device(options["device"]);
  const torch::Tensor text = demo::load_text(folder);

  torch::manual_seed(static_cast<uint64_t>(seed));
  demo::ByteModel model(job.model, options["recipe"] == "none" ? "" : options["recipe"]);
  model->to(device);
  demo::FusedAdamW optimizer(model->parameters(), {.beta2 = 0.95, .weight_decay = 0.1});

  for (int64_t step = 0; step < steps; ++step) {
    const auto [inputs, targets] = demo::batch_of(text, step, job.batch, job.length, seed);
    const torch::Tensor logits = model(inputs.to(device));
    const torch::Tensor loss = torch::nn::functional::cross_entropy(
        logits.to(torch::kFloat).flatten(0, 1), targets.to(device).flatten());
    loss.backward();
    optimizer.step(rate(step, steps, job.learning_rate), /*clip_norm=*/1.0);
    std::printf("step %lld loss %.6f\n", static_cast<long long>(step + 1), loss.item<double>());
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr,
                 "usage: train TEXT_FOLDER [NAME=VALUE ...], names as in the file's head\n");
    return 2;
  }
  try {
    auto options = parse(argc, argv);
    train(argv[1], options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train: %s\n", error.what());
    return 1;
  }
}
