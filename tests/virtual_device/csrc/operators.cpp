// Operators: shapes come from meta kernels at once; the CPU's kernel runs when its stream comes to it.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "device.h"

namespace virt {
namespace {

using at::IValue;
using at::Tensor;
using c10::OperatorHandle;
using Stack = torch::jit::Stack;

struct NoWarnings final : c10::WarningHandler {  // kernels would warn of how they are called here
  void process(const c10::Warning&) override {}
  c10::WarningUtils::WarningHandlerGuard guard{this};
};

bool is_ours(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == TYPE; }

// A tensor with the same layout on another device: on the CPU with the same memory, on meta without any.
Tensor alias(const Tensor& tensor, c10::DeviceType type) {
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(nullptr, c10::Device(type));
  if (Block* block = block_of(storage.data_ptr()); block && type == c10::kCPU) {
    auto* held = new std::shared_ptr<void>(block->memory);  // a kernel that runs too late reads other values, not freed memory
    auto drop = [](void* pointer) { delete static_cast<std::shared_ptr<void>*>(pointer); };
    data = {const_cast<void*>(storage.data()), held, drop, c10::Device(type)};
  }
  c10::Storage same(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), c10::GetAllocator(type), true);
  const auto key = type == c10::kCPU ? c10::DispatchKey::CPU : c10::DispatchKey::Meta;
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(same), c10::DispatchKeySet(key), tensor.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}

Tensor view_of(const Tensor& base, const Tensor& layout) {
  Tensor made = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), layout.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(layout.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes(), layout.strides());
  return made;
}

Tensor empty_strided_on(int device, c10::IntArrayRef sizes, c10::IntArrayRef strides, c10::ScalarType dtype) {
  c10::DeviceGuard guard({TYPE, c10::DeviceIndex(device)});
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return Tensor(at::detail::empty_strided_generic(sizes, strides, allocator(), keys, dtype));
}

IValue map_tensors(const IValue& value, const std::function<Tensor(const Tensor&)>& change) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(change(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector())
      list.push_back(tensor && tensor->defined() ? std::make_optional(change(*tensor)) : tensor);
    return list;
  }
  return value;
}

void call_plainly(const OperatorHandle& op, Stack* stack) {
  NoWarnings silent;
  c10::impl::ForceDispatchKeyGuard plain(
      c10::default_included_set, c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
  op.callBoxed(stack);
}

// The one device of a call. Numbers may be mixed in, and indices of the CPU; they are copied.
int device_of(const OperatorHandle& op, const Stack& args) {
  int device = -1;
  auto see = [&](const Tensor& tensor) {
    const bool copied = tensor.dim() == 0 || op.schema().name().find("index") != std::string::npos;
    if (is_ours(tensor) && device < 0) device = tensor.device().index();
    const bool same = is_ours(tensor) ? tensor.device().index() == device : copied;
    TORCH_CHECK(same, "Expected all tensors to be on the same device, but found at least two devices, virt:",
                std::max(device, 0), " and ", tensor.device(), "! (in ", op.schema().name(), ")");
    return tensor;
  };
  for (const bool ours : {true, false})
    for (const IValue& arg : args)
      map_tensors(arg, [&](const Tensor& tensor) { return is_ours(tensor) == ours ? see(tensor) : tensor; });
  for (const IValue& arg : args)
    if (device < 0 && arg.isDevice()) device = arg.toDevice().index();
  return checked(device);
}

// One call of an operator: its arguments for the meta kernel and for the CPU's.
struct Arguments {
  Stack meta, cpu;

  Arguments(const OperatorHandle& op, const Stack& args, int device) {
    for (size_t i = 0; i < args.size(); ++i) add(args[i], op.schema().arguments()[i].type()->str(), device);
  }

  void add(const IValue& arg, const std::string& type, int device) {
    if (type.find("Generator") != std::string::npos) {
      const uint64_t seed = draw(device, arg.isGenerator() ? arg.toGenerator().unsafeGetGeneratorImpl() : nullptr);
      meta.push_back(IValue());
      cpu.push_back(at::make_generator<at::CPUGeneratorImpl>(seed));
    } else if (arg.isDevice()) {
      meta.push_back(c10::Device(c10::kMeta));
      cpu.push_back(c10::Device(c10::kCPU));
    } else {
      meta.push_back(map_tensors(arg, [](const Tensor& tensor) {
        return is_ours(tensor) || tensor.dim() ? alias(tensor, c10::kMeta) : tensor;
      }));
      cpu.push_back(map_tensors(arg, [](const Tensor& tensor) {
        if (is_ours(tensor)) return alias(tensor, c10::kCPU);
        return tensor.unsafeGetTensorImpl()->is_wrapped_number() ? tensor : tensor.clone();
      }));
    }
  }
};

bool returns_tensors(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.type()->str() != "Tensor" && result.type()->str() != "Tensor[]") return false;
  return true;
}

size_t argument_of(const c10::FunctionSchema& schema, const c10::AliasInfo& info) {
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto* own = schema.arguments()[i].alias_info();
    if (own && own->beforeSets() == info.beforeSets()) return i;
  }
  TORCH_CHECK(false, "virt: ", schema, " returns an alias of none of its arguments");
}

// Arguments that the call writes to may have been given another size by the meta kernel.
void resize_written(const c10::FunctionSchema& schema, const Stack& args, Arguments& given) {
  for (size_t i = 0; i < args.size(); ++i) {
    if (!schema.is_mutable({c10::SchemaArgType::input, i}) || !args[i].isTensor() || !is_ours(args[i].toTensor())) continue;
    const Tensor &mine = args[i].toTensor(), &meta = given.meta[i].toTensor();
    if (mine.sizes() == meta.sizes()) continue;
    mine.resize_(meta.sizes());
    mine.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
    given.cpu[i] = alias(mine, c10::kCPU);
  }
}

void copy_results(const std::vector<std::pair<size_t, IValue>>& fresh, const Stack& computed) {
  auto copy = [](const Tensor& target, const Tensor& value) {
    if (value.numel() || !target.numel()) target.copy_(value);  // batch norm in evaluation saves nothing on the CPU
  };
  for (const auto& [i, made] : fresh) {
    if (made.isTensor() && made.toTensor().defined()) copy(made.toTensor(), computed[i].toTensor());
    if (!made.isTensorList()) continue;
    const auto targets = made.toTensorVector(), values = computed[i].toTensorVector();
    for (size_t j = 0; j < targets.size(); ++j) copy(targets[j], values[j]);
  }
}

// The fallback of every operator.
void run(const OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const Stack args(stack->end() - schema.arguments().size(), stack->end());
  torch::jit::drop(*stack, args.size());
  const int device = device_of(op, args);
  const c10::DeviceGuard guard(c10::Device(TYPE, c10::DeviceIndex(device)));
  Queue* queue = current(device);
  Arguments given(op, args, device);

  bool has_meta = returns_tensors(schema);
  Stack results = given.meta;  // the call leaves its results in place of its arguments
  if (has_meta) {
    try {
      call_plainly(op, &results);
    } catch (...) {
      has_meta = false;
    }
  }
  if (has_meta) {
    resize_written(schema, args, given);
  } else {  // the shape depends on data, or the result is a number: waits, as CUDA does
    wait(mark(queue), schema.name());
    call_plainly(op, &given.cpu);
    results = given.cpu;
  }

  bool is_view = false;
  std::vector<std::pair<size_t, IValue>> fresh;  // results with memory of their own, as the CPU's kernels see them
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    const auto* info = schema.returns()[i].alias_info();
    if (info && info->isWrite()) {
      stack->push_back(args[argument_of(schema, *info)]);
    } else if (info) {
      TORCH_CHECK(has_meta, "virt: ", schema.name(), " returns a view but has no meta kernel");
      is_view = true;
      const Tensor base = args[argument_of(schema, *info)].toTensor();
      stack->push_back(map_tensors(results[i], [&](const Tensor& layout) { return view_of(base, layout); }));
    } else if (results[i].isTensor() || results[i].isTensorList()) {
      stack->push_back(map_tensors(results[i], [&](const Tensor& layout) {
        return empty_strided_on(device, layout.sizes(), layout.strides(), layout.scalar_type());
      }));
      fresh.emplace_back(i, map_tensors(stack->back(), [](const Tensor& made) { return alias(made, c10::kCPU); }));
    } else {
      stack->push_back(results[i]);
    }
  }
  if (is_view) return;
  enqueue(queue, {[op, has_meta, fresh, cpu = given.cpu]() mutable {
    if (has_meta) call_plainly(op, &cpu);
    copy_results(fresh, cpu);
  }});
}

// torch asks a backend of its own for its convolutions; these are the CPU's.
OperatorHandle operator_named(const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); }

void convolution(const OperatorHandle&, Stack* stack) {
  static const OperatorHandle cpu = operator_named("aten::convolution");
  run(cpu, stack);
}

void convolution_backward(const OperatorHandle&, Stack* stack) {
  static const OperatorHandle cpu = operator_named("aten::convolution_backward");
  const size_t first = stack->size() - 10;  // grad_output, input, weight, stride ... groups, output_mask
  const Tensor gradient = (*stack)[first].toTensor();
  stack->insert(stack->begin() + first + 3, IValue(std::vector<int64_t>{gradient.size(1)}));  // the sizes of the bias
  run(cpu, stack);
}

// ---- memory and copies

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<c10::Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(TYPE)));
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return Tensor(at::detail::empty_generic(size, allocator(), keys, c10::dtype_or_default(dtype), format));
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<c10::Device> device, std::optional<bool>) {
  return empty_strided_on(device ? device->index() : -1, size, stride, c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat>) {
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  const size_t bytes = (self.storage_offset() + self.numel()) * self.itemsize();
  if (self.numel() && bytes > self.storage().nbytes())
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  return self;
}

Tensor& set_source(Tensor& self, c10::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_storage_offset(offset);
  if (stride.empty())
    self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  else
    self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return self;
}

Tensor& set_storage(Tensor& self, c10::Storage source) {
  const int64_t count = int64_t(source.nbytes() / self.itemsize());
  return set_source(self, std::move(source), 0, {count}, {});
}

// As torch's copies between CUDA devices: on the source's current stream, between two barriers with the target's.
void copy_between(const Tensor& from, const Tensor& to) {
  Queue *source = current(from.device().index()), *other = current(to.device().index());
  const bool apart = from.device() != to.device();
  auto barrier = [](Queue* waiting, Queue* first) {
    Task stamped;
    stamped.stamp = std::make_shared<double>(0);
    auto time = stamped.stamp;
    const Point point = enqueue(first, std::move(stamped));
    enqueue(waiting, {nullptr, point, time});
  };
  if (apart) barrier(source, other);
  enqueue(source, {[target = alias(to, c10::kCPU), values = alias(from, c10::kCPU), staged = apart && !has_peers()] {
    target.copy_(staged ? values.clone() : values);
  }});
  if (apart) barrier(other, source);
}

// Pageable memory is read at the call and written before it returns; pinned memory when the stream comes to it.
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (to.numel() == 0) return to;
  if (is_ours(from) && is_ours(to)) {
    copy_between(from, to);
  } else if (is_ours(to)) {
    const bool later = non_blocking && is_pinned(from.const_data_ptr());
    Queue* queue = current(to.device().index());
    enqueue(queue, {[target = alias(to, c10::kCPU), values = later ? from.detach() : from.detach().clone()] {
      target.copy_(values);
    }});
    if (!non_blocking) wait(mark(queue), "copy from the CPU");
  } else {
    Queue* queue = current(from.device().index());
    enqueue(queue, {[target = to.detach(), values = alias(from, c10::kCPU)] { target.copy_(values); }});
    if (!non_blocking || !is_pinned(to.const_data_ptr())) wait(mark(queue), "copy to the CPU");
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

void record_stream(Tensor& self, c10::Stream stream) { allocator()->recordStream(self.storage().data_ptr(), stream); }

// ---- operators without a generator among their arguments, and choices of kernels

std::tuple<Tensor, Tensor> native_dropout(const Tensor& x, double p, std::optional<bool> train) {
  if (train == false) return {x.clone(), at::empty_like(x, x.options().dtype(at::kBool)).fill_(true)};
  Tensor mask = at::empty_like(x, x.options().dtype(at::kBool)).bernoulli_(1 - p);
  return {x.mul(mask).mul_(p == 1 ? 0.0 : 1 / (1 - p)), mask};
}

int64_t attention_kernel(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                         std::optional<double>, bool) {
  return 0;  // plain operators
}

bool has_compatible_type(const Tensor&, const Tensor&) { return true; }  // tensor.data may move to or from the CPU

void lower_precision(const OperatorHandle& op, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard off(c10::DispatchKeySet(c10::DispatchKey::AutocastPrivateUse1));
  const size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i)
    (*stack)[i] = map_tensors((*stack)[i], [](const Tensor& tensor) {
      const bool cast = is_ours(tensor) && tensor.is_floating_point() && tensor.scalar_type() != at::kDouble;
      return cast ? at::autocast::cached_cast(at::autocast::get_autocast_dtype(TYPE), tensor, TYPE) : tensor;
    });
  op.callBoxed(stack);
}

constexpr const char* LOWERED[] = {"matmul", "linear", "addmm",  "mm",     "bmm",    "baddbmm",
                                   "addbmm", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"};

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const char* name : LOWERED) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&lower_precision>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_source);
  m.impl("set_.source_Storage", set_storage);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("record_stream", record_stream);
  m.impl("native_dropout", native_dropout);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  m.impl("_fused_sdp_choice", attention_kernel);
  m.impl("_has_compatible_shallow_copy_type", has_compatible_type);
}
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_has_compatible_shallow_copy_type", has_compatible_type); }

}  // namespace virt
