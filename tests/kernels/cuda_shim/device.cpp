// A device for tests of what runs on CUDA, without a GPU: PyTorch's PrivateUse1 with memory of the
// host, on which the chains run with the CUDA kernels through cuda_shim, and every launch is
// written down.
//
// An operator that PyTorch does not make of others is one launch. It runs on the CPU, on aliases of
// its tensors. An operator of fusedconvbn is none of its own: its function for CUDA runs on the
// device's tensors.
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <cuda_runtime.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::DispatchKey, c10::DispatchKeySet, c10::IValue;
using Stack = torch::jit::Stack;

const c10::Device here(at::kPrivateUse1, 0);

// One device with one stream, by their numbers, as autograd has lists of them.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<at::kPrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return here; }
  c10::Device getDevice() const override { return here; }
  c10::Stream getStream(c10::Device) const noexcept override { return the_stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return the_stream(); }
  static c10::Stream the_stream() { return c10::Stream(c10::Stream::DEFAULT, here); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// Autograd asks for these.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

[[maybe_unused]] const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::register_privateuse1_backend("standin");
  return true;
}();

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* const block = c10::alloc_cpu(bytes);  // aligned to 64 bytes
    return {block, block, &c10::free_cpu, here};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory memory;
REGISTER_ALLOCATOR(at::kPrivateUse1, &memory)

Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>,
             std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &memory, DispatchKeySet(DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides,
                     std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                     std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &memory,
                                           DispatchKeySet(DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// A tensor of the same values on the other device. Its storage keeps that of t.
Tensor alias(const Tensor& t, c10::Device device) {
  if (!t.defined() || t.device().type() == device.type()) return t;
  const auto release = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  const auto& storage = t.storage();
  c10::DataPtr data(storage.mutable_data(), new c10::Storage(storage), release, device);
  const auto key = device == here ? DispatchKey::PrivateUse1 : DispatchKey::CPU;
  auto result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                   c10::GetAllocator(device.type()),
                   /*resizable=*/true),
      DispatchKeySet(key), t.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
  return result;
}

IValue alias(const IValue& value, c10::Device device) {
  const auto each = [&](auto list) {  // its elements may be optional
    auto result = list.copy();
    for (size_t i = 0; i < list.size(); ++i) {
      const std::optional<Tensor> t = list.get(i);
      if (t) result.set(i, alias(*t, device));
    }
    return result;
  };
  if (value.isTensor()) return alias(value.toTensor(), device);
  if (value.isTensorList()) return each(value.toTensorList());
  if (value.isOptionalTensorList()) return each(value.toOptionalTensorList());
  if (value.isDevice()) return device;
  return value;
}

// Of an alias that was resized, as PyTorch has results made.
void take_over(const Tensor& t, const Tensor& written) {
  if (t.sizes() == written.sizes()) return;
  auto* impl = t.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(alias(written, here).storage());
  impl->set_sizes_and_strides(written.sizes(), written.strides(), written.storage_offset());
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const auto& returns = op.schema().returns();
  const Stack given(stack->end() - int64_t(arguments.size()), stack->end());
  Stack there;
  for (const auto& value : given) there.push_back(alias(value, at::kCPU));
  torch::jit::drop(stack, given.size());
  stack->insert(stack->end(), there.begin(), there.end());
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  for (size_t a = 0; a < given.size(); ++a)
    if (arguments[a].is_out() && given[a].isTensor())
      take_over(given[a].toTensor(), there[a].toTensor());
  for (size_t r = 0; r < returns.size(); ++r) {
    auto& result = torch::jit::peek(stack, r, returns.size());
    const auto* written = returns[r].alias_info();
    if (!written) {
      result = alias(result, here);
      continue;
    }
    TORCH_INTERNAL_ASSERT(written->isWrite(), "a view is not among those below: ", op.schema());
    for (size_t a = 0; a < given.size(); ++a)
      if (arguments[a].alias_info() && *arguments[a].alias_info() == *written) result = given[a];
  }
}

void run_as_cpu(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
}

void launch(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  const std::string& name = op.schema().name();
  if (name.starts_with("fusedconvbn::"))
    return op.redispatchBoxed(DispatchKeySet(DispatchKey::CUDA), stack);
  cuda_shim::note(name.substr(name.find("::") + 2));
  run_on_cpu(op, stack);
}

void launch_convolution_backward(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) {
  const auto wanted = stack->back().toBoolList();
  const char* const names[] = {"convolution_backward, input", "convolution_backward, weight",
                               "convolution_backward, bias"};
  for (size_t i = 0; i < 3; ++i)
    if (wanted[i]) cuda_shim::note(names[i]);
  run_on_cpu(op, stack);
}

// Between the devices too.
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const bool both = from.device() == to.device();
  cuda_shim::note(both ? "copy_" : to.is_cpu() ? "copy_ to the host" : "copy_ from the host");
  alias(to, at::kCPU).copy_(alias(from, at::kCPU));
  return to;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&launch>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("_copy_from", TORCH_FN(copy_from));
  // Made of others by PyTorch, and of others again on each of its own devices.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&launch>());
  m.impl("convolution_backward",
         torch::CppFunction::makeFromBoxedFunction<&launch_convolution_backward>());
  // The functions of these leave the values alone, and so the device too.
  for (const char* name : {"as_strided", "view", "_reshape_alias", "unfold", "view_as_real",
                           "view_as_complex", "resize_", "set_.source_Storage",
                           "set_.source_Storage_storage_offset", "set_.source_Tensor"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_as_cpu>());
}

// The launches since it was last asked, in turn.
TORCH_LIBRARY(fusedconvbn_standin, m) { m.def("launched() -> str[]", &cuda_shim::take_notes); }

}  // namespace
