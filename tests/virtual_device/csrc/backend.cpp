// What torch asks of a backend: the device guard, streams and events, generators, pinned memory.
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>

#include "device.h"

namespace virt {
namespace {

constexpr int POOL = 32;  // streams of a device; those created after them are the same again, as on CUDA

struct Event {
  Point point;
  std::shared_ptr<double> time;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {TYPE, c10::DeviceIndex(exchange_device(device.index()))};
  }
  c10::Device getDevice() const override { return {TYPE, c10::DeviceIndex(current_device())}; }
  void setDevice(c10::Device device) const override { exchange_device(device.index()); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { exchange_device(device.index()); }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

  c10::Stream getStream(c10::Device device) const override { return current(checked(device.index()))->stream; }
  c10::Stream getDefaultStream(c10::Device device) const override { return queue_of(checked(device.index()), 0)->stream; }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<int> next[DEVICES];
    const int index = checked(device.index());
    return queue_of(index, 1 + next[index]++ % POOL)->stream;
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const int64_t before = exchange_stream(stream.device_index(), stream.id());
    return queue_of(stream.device_index(), before)->stream;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return queue_of(stream); }
  bool queryStream(const c10::Stream& stream) const override { return query(mark(queue_of(stream))); }
  void synchronizeStream(const c10::Stream& stream) const override { wait(mark(queue_of(stream)), "stream.synchronize"); }
  void synchronizeDevice(const c10::DeviceIndex device) const override { synchronize(checked(device), "synchronize"); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    allocator()->recordStream(data, stream);
  }

  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device, const c10::EventFlag) const override {
    TORCH_CHECK(device == -1 || device == stream.device_index(), "an event of virt:", int(device),
                " cannot be recorded on a stream of ", stream.device());
    if (!*event) *event = new Event;
    auto time = std::make_shared<double>(0);
    Task task;
    task.stamp = time;
    *static_cast<Event*>(*event) = {enqueue(queue_of(stream), std::move(task)), time};
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event) return;
    auto* recorded = static_cast<Event*>(event);
    enqueue(queue_of(stream), {nullptr, recorded->point, recorded->time});
  }
  bool queryEvent(void* event) const override { return !event || query(static_cast<Event*>(event)->point); }
  void synchronizeEvent(void* event) const override {
    if (event) wait(static_cast<Event*>(event)->point, "event.synchronize");
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* from, void* to, const c10::DeviceIndex) const override {
    TORCH_CHECK(from && to, "both events must have been recorded");
    const auto *first = static_cast<Event*>(from), *last = static_cast<Event*>(to);
    raise_failure(first->point.queue->stream.device_index());
    TORCH_CHECK(first->point.passed() && last->point.passed(), "both events must have passed: synchronize first");
    return *last->time - *first->time;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// As CUDA's: a seed and an offset, which a kernel takes when it is queued.
struct Generator final : c10::GeneratorImpl {
  uint64_t seed_ = c10::default_rng_seed_val, offset_ = 0;

  explicit Generator(c10::DeviceIndex device)
      : GeneratorImpl({TYPE, device}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)) {}
  static c10::DeviceType device_type() { return TYPE; }
  void set_current_seed(uint64_t seed) override { seed_ = seed, offset_ = 0; }
  void set_offset(uint64_t offset) override { offset_ = offset; }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }
  void set_state(const c10::TensorImpl& state) override {
    auto* from = static_cast<const uint64_t*>(state.data());
    seed_ = from[0], offset_ = from[1];
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::empty({16}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
    auto* to = static_cast<uint64_t*>(state.mutable_data_ptr());
    to[0] = seed_, to[1] = offset_;
    return state.getIntrusivePtr();
  }
  Generator* clone_impl() const override {
    auto* copy = new Generator(device().index());
    copy->seed_ = seed_, copy->offset_ = offset_;
    return copy;
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  void setCurrentDevice(c10::DeviceIndex device) const override { exchange_device(device); }
  c10::DeviceIndex getCurrentDevice() const override { return c10::DeviceIndex(current_device()); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return c10::DeviceIndex(exchange_device(device));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<Generator>(c10::DeviceIndex(checked(device)));
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    static auto* generators = new at::Generator[DEVICES];
    static std::mutex lock;
    std::lock_guard<std::mutex> held(lock);
    auto& generator = generators[checked(device)];
    if (!generator.defined()) generator = getNewGenerator(device);
    return generator;
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size) const override {
    const int before = exchange_device(storage.device().index());
    c10::DataPtr data = allocator()->allocate(size);
    if (Block* old = block_of(storage.data_ptr()); old && data) {
      auto copy = [to = data.get(), from = old->memory, count = std::min(size, storage.nbytes())] {
        std::memcpy(to, from.get(), count);
      };
      enqueue(current(current_device()), {copy});
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(size);
    exchange_device(before);
  }
};

Hooks* hooks() {
  static auto* one = new Hooks;
  return one;
}
const bool registered = (at::RegisterPrivateUse1HooksInterface(hooks()), true);

}  // namespace

uint64_t draw(int device, const c10::GeneratorImpl* given) {
  auto* generator = static_cast<Generator*>(const_cast<c10::GeneratorImpl*>(given));
  if (!generator)
    generator = static_cast<Generator*>(hooks()->getDefaultGenerator(c10::DeviceIndex(device)).unsafeGetGeneratorImpl());
  std::lock_guard<std::mutex> lock(generator->mutex_);
  return generator->seed_ * 0x9E3779B97F4A7C15 + generator->offset_++;
}

TORCH_LIBRARY(virt, m) {
  m.def("default_generator(int device) -> Generator?",
        [](int64_t device) { return hooks()->getDefaultGenerator(c10::DeviceIndex(device)); });
}

}  // namespace virt
