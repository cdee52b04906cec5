// Virtual devices: the CPU's memory and kernels behind streams, events and an allocator that behave as CUDA's do.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GeneratorImpl.h>
#include <c10/core/Stream.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace virt {

constexpr int DEVICES = 8;
constexpr int POISON = 0xFF;  // NaN in every float type, -1 in integers
constexpr auto TYPE = c10::DeviceType::PrivateUse1;

using Lock = std::unique_lock<std::mutex>;

// ---- streams.cpp: when queued work runs

// Every mode but SYNC is a legal execution of the same program on a real device.
enum Mode : int {
  THREADS,  // each stream has a thread, which runs its work at once
  LATE,     // work runs when a thread waits for it, and no other work does: finds a missing wait
  EARLY,    // when a thread waits, all other streams run first: finds memory that is reused too early
  RANDOM,   // when a thread waits, streams run in an order drawn from a seed
  SYNC,     // work runs before the call returns: the reference
};

struct Queue;

// A place in a stream. It has passed when all work queued before it has run.
struct Point {
  Queue* queue = nullptr;
  uint64_t count = 0;
  bool passed() const;
};

struct Task {
  std::function<void()> run;
  Point after{};                           // runs when this has passed
  std::shared_ptr<double> after_time{};    // the device time of `after`
  std::shared_ptr<double> stamp{};         // receives the device time at which this task ends
};

struct Queue {
  c10::Stream stream;
  std::deque<Task> tasks{};
  uint64_t queued = 0;
  std::atomic<uint64_t> done{0};
  double clock = 0;  // device time in milliseconds: the time of its kernels, and of those that it waited for
  bool has_thread = false;
};

inline bool Point::passed() const { return !queue || queue->done >= count; }

Queue* queue_of(c10::Stream stream);
Queue* queue_of(int device, int64_t id);
std::vector<Queue*> queues_of(int device);
Queue* current(int device);        // the calling thread's stream of a device
Point enqueue(Queue* queue, Task task);
Point enqueue_inside(Queue* queue, Task task);  // of the allocator: never runs before it returns
Point mark(Queue* queue);          // all that has been queued so far
void wait(Point point, const std::string& why);  // blocks the host
bool query(Point point);
void synchronize(int device, const std::string& why);
void raise_failure(int device);    // what an earlier kernel has raised; so do all functions above, but enqueue_inside
void count_wait(const std::string& why);

int current_device();
int exchange_device(int device);
int64_t exchange_stream(int device, int64_t id);
int checked(int device);           // raises if there is no such device; the current device for a negative index

// ---- memory.cpp

// Memory that one tensor holds. It belongs to the stream on which it was allocated.
struct Block {
  std::shared_ptr<void> memory;
  size_t size;
  int device;
  Queue* home;
  std::set<Queue*> others{};     // streams that use it too, as recorded
  std::vector<Point> pending{};  // freed, but these have not passed
};

Block* block_of(const c10::DataPtr& data);  // null for memory of another device
c10::DeviceAllocator* allocator();
c10::Allocator* pinned_allocator();
bool is_pinned(const void* pointer);
bool has_peers();  // whether devices can reach each other's memory

// ---- backend.cpp

uint64_t draw(int device, const c10::GeneratorImpl* generator);  // the seed of one random kernel

}  // namespace virt
