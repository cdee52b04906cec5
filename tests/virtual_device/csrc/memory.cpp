// The caching allocator: freed memory belongs to its stream, and is handed out again behind what that has queued.
#include <cstring>
#include <map>

#include "device.h"

namespace virt {
namespace {

struct Memory {
  std::mutex lock;
  std::map<Queue*, std::vector<Block*>> pools;
  std::vector<Block*> waiting;  // freed, but other streams have not come so far
  size_t limit[DEVICES];
  c10::CachingDeviceAllocator::DeviceStats stats[DEVICES];
  std::map<const void*, size_t> pinned;
  bool peers = true;
  bool strict = false;  // memory is overwritten when it is freed, not when it is handed out again
  int64_t left = -1;     // how many allocations succeed before one fails; negative: no limit
  int64_t count = 0;     // of allocations
  Memory() { std::fill_n(limit, DEVICES, size_t(1) << 30); }
};

Memory& memory() {
  static Memory* all = new Memory;
  return *all;
}

void poison(const Block* block) {
  auto overwrite = [memory = block->memory, size = block->size] { std::memset(memory.get(), POISON, size); };
  enqueue_inside(block->home, {overwrite});
}

void return_to_pool(Block* block) {
  block->pending.clear();
  block->others.clear();
  if (memory().strict) poison(block);
  memory().pools[block->home].push_back(block);
}

void reap() {
  std::vector<Block*> still;
  for (Block* block : memory().waiting) {
    bool passed = true;
    for (const Point& point : block->pending) passed &= point.passed();
    if (passed)
      return_to_pool(block);
    else
      still.push_back(block);
  }
  memory().waiting.swap(still);
}

Block* reuse(Queue* home, size_t size) {
  auto& pool = memory().pools[home];
  for (auto it = pool.rbegin(); it != pool.rend(); ++it)
    if ((*it)->size == size) {
      Block* found = *it;
      pool.erase(std::next(it).base());
      poison(found);
      return found;
    }
  return nullptr;
}

Block* take(int device, size_t size) {
  Queue* home = current(device);
  Lock lock(memory().lock);
  auto& stats = memory().stats[device];
  reap();
  Block* found = reuse(home, size);
  if (!found) {
    if (size_t(stats.reserved_bytes[0].current) + size > memory().limit[device]) return nullptr;
    std::shared_ptr<void> fresh(std::aligned_alloc(64, size), std::free);
    std::memset(fresh.get(), POISON, size);
    found = new Block{fresh, size, device, home};
    stats.reserved_bytes[0].increase(size);
  }
  stats.allocated_bytes[0].increase(size);
  stats.active_bytes[0].increase(size);
  stats.requested_bytes[0].increase(size);
  stats.allocation[0].increase(1);
  return found;
}

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  if (!block) return;
  Lock lock(memory().lock);
  auto& stats = memory().stats[block->device];
  stats.allocated_bytes[0].decrease(block->size);
  stats.active_bytes[0].decrease(block->size);
  for (Queue* other : block->others) block->pending.push_back(mark(other));
  if (block->pending.empty())
    return_to_pool(block);
  else
    memory().waiting.push_back(block);
}

struct Allocator final : c10::DeviceAllocator {
  bool initialized() override { return true; }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }

  c10::DataPtr allocate(size_t count) override {
    const int device = current_device();
    const c10::Device here(TYPE, c10::DeviceIndex(device));
    if (count == 0) return {nullptr, nullptr, &release, here};
    const size_t size = (count + 511) / 512 * 512;
    const bool refused = is_refused();
    Block* found = refused ? nullptr : take(device, size);
    if (!found && !refused) {  // as CUDA's allocator: waits for all work, gives cached memory back, and tries again
      synchronize(device, "out of memory");
      emptyCache({});
      found = take(device, size);
    }
    auto& stats = memory().stats[device];
    if (!found) ++stats.num_ooms;
    TORCH_CHECK_WITH(OutOfMemoryError, found, "virt out of memory: tried to allocate ", size, " bytes on virt:", device,
                     ", which has ", memory().limit[device], " bytes, ", stats.allocated_bytes[0].current, " allocated");
    return {found->memory.get(), found, &release, here};
  }

  static bool is_refused() {
    Lock lock(memory().lock);
    ++memory().count;
    return memory().left >= 0 && memory().left-- == 0;
  }

  void emptyCache(c10::MempoolId_t) override {
    for (int device = 0; device < DEVICES; ++device) synchronize(device, "empty_cache");
    Lock lock(memory().lock);
    reap();
    for (auto& [home, pool] : memory().pools) {
      for (Block* block : pool) {
        memory().stats[block->device].reserved_bytes[0].decrease(block->size);
        delete block;
      }
      pool.clear();
    }
  }

  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    Queue* user = queue_of(stream);
    Block* block = block_of(data);
    Lock lock(memory().lock);
    if (block && user != block->home) block->others.insert(user);
  }

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return memory().stats[checked(device)];
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    memory().stats[checked(device)].allocated_bytes[0].reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    auto& stats = memory().stats[checked(device)];
    for (auto* each : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) (*each)[0].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const size_t all = memory().limit[checked(device)];
    return {all - size_t(memory().stats[checked(device)].reserved_bytes[0].current), all};
  }
};

void unpin(void* pointer) {
  Lock lock(memory().lock);
  memory().pinned.erase(pointer);
  std::free(pointer);
}

struct PinnedAllocator final : c10::Allocator {
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
  c10::DataPtr allocate(size_t count) override {
    if (count == 0) return {nullptr, c10::Device(c10::kCPU)};
    void* pointer = std::aligned_alloc(64, (count + 63) / 64 * 64);
    std::memset(pointer, POISON, count);
    Lock lock(memory().lock);
    memory().pinned[pointer] = count;
    return {pointer, pointer, &unpin, c10::Device(c10::kCPU)};
  }
};

Allocator* the_allocator() {
  static auto* one = new Allocator;
  return one;
}
const bool registered = (c10::SetAllocator(TYPE, the_allocator()), true);

}  // namespace

Block* block_of(const c10::DataPtr& data) {
  return data.get_deleter() == &release ? static_cast<Block*>(data.get_context()) : nullptr;
}

c10::DeviceAllocator* allocator() { return the_allocator(); }

c10::Allocator* pinned_allocator() {
  static auto* one = new PinnedAllocator;
  return one;
}

bool is_pinned(const void* pointer) {
  Lock lock(memory().lock);
  auto it = memory().pinned.upper_bound(pointer);
  if (it == memory().pinned.begin()) return false;
  --it;
  return pointer < static_cast<const char*>(it->first) + it->second;
}

bool has_peers() { return memory().peers; }

}  // namespace virt

extern "C" void virt_limit(int device, int64_t bytes) { virt::memory().limit[device] = size_t(bytes); }
extern "C" void virt_strict(int yes) { virt::memory().strict = yes; }
extern "C" void virt_peers(int yes) { virt::memory().peers = yes; }

// Lets `count` more allocations succeed and the one after fail; returns how many there have been since the last call.
extern "C" int64_t virt_fail_after(int64_t count) {
  virt::Lock lock(virt::memory().lock);
  virt::memory().left = count;
  return std::exchange(virt::memory().count, 0);
}
