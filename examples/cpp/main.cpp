// Trains and evaluates a scripted model with fused layers, without Python, and compares with what
// Python computed.
//
//   example _ops.so model.pt data.pt
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <dlfcn.h>
#include <torch/csrc/jit/api/module.h>
#include <torch/csrc/jit/serialization/import.h>

#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace {

void check(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

void check_close(const at::Tensor& found, const at::Tensor& expected, const std::string& what) {
  check(found.sizes() == expected.sizes(), what + ": wrong shape");
  const auto difference = (found - expected).abs().max().item<double>();
  std::printf("%s: differs from Python's by at most %.1e\n", what.c_str(), difference);
  check(at::allclose(found, expected, /*rtol=*/1e-6, /*atol=*/1e-8),
        what + ": not what Python computed");
}

void run(const char* operators, const char* model_path, const char* data_path) {
  // Registers torch.ops.fusedconvbn. The library stays loaded to the end of the process.
  check(dlopen(operators, RTLD_NOW | RTLD_GLOBAL) != nullptr, "dlopen: no operators");

  auto model = torch::jit::load(model_path);
  const auto data = torch::jit::load(data_path);
  const auto tensor = [&](const char* name) { return data.attr(name).toTensor(); };
  const auto images = tensor("images"), targets = tensor("targets"), losses = tensor("losses");
  const auto rate = data.attr("rate").toDouble();

  model.train();
  double first = 0, last = 0;
  for (int64_t step = 0; step < losses.size(0); ++step) {
    for (const auto& p : model.parameters()) p.mutable_grad().reset();
    const auto loss = at::mse_loss(model.forward({images}).toTensor(), targets);
    loss.backward();
    const at::NoGradGuard no_grad;
    for (const auto& p : model.named_parameters()) {
      check(p.value.grad().defined(), p.name + ": no gradient");
      p.value.sub_(p.value.grad(), rate);
    }
    last = loss.item<double>();
    if (step == 0) first = last;
    const auto expected = losses[step].item<double>();
    std::printf("step %2d: loss %.9f, in Python %.9f\n", int(step), last, expected);
    check(std::abs(last - expected) < 1e-7, "the loss is not the one of Python");
  }
  check(last < 0.9 * first, "the loss has not fallen");

  for (const std::string layer : {"stem", "block"}) {
    const auto running_var =
        model.attr(layer).toModule().attr("bn").toModule().attr("running_var").toTensor();
    check_close(running_var, tensor((layer + "_running_var").c_str()), layer + ".bn.running_var");
  }

  model.eval();
  const at::NoGradGuard no_grad;
  check_close(model.forward({images}).toTensor(), tensor("output"), "evaluation");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s _ops.so model.pt data.pt\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
