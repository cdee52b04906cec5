// Streams: queues of work, and the order in which it runs.
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <random>
#include <thread>

#include "device.h"

extern "C" int PyGILState_Check();
extern "C" void* PyEval_SaveThread();
extern "C" void PyEval_RestoreThread(void*);
extern "C" int Py_IsInitialized();

namespace virt {
namespace {

// A kernel may be written in Python, so a thread that waits for one must not hold the interpreter's lock.
struct NoGil {
  void* state = Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~NoGil() {
    if (state) PyEval_RestoreThread(state);
  }
};

struct Streams {  // never destroyed: threads outlive static objects
  std::mutex lock;     // of everything below
  std::mutex driving;  // held by the one thread that runs work, if streams have no threads
  std::condition_variable moved;
  std::map<int64_t, std::unique_ptr<Queue>> queues[DEVICES];
  std::atomic<int> mode{THREADS};
  int jitter = 0;  // microseconds; with THREADS, each task starts up to so much later
  std::mt19937 random{0};
  double slowness[DEVICES];  // device time of a kernel, relative to the time that the CPU takes for it
  std::string failure[DEVICES];   // of the first kernel that has failed: the device stops, as with CUDA
  int64_t healthy[DEVICES];       // how many more kernels are queued before one that fails; negative: no limit
  int64_t kernels[DEVICES] = {};  // queued
  std::map<std::string, int> waits;
  Streams() {
    std::fill_n(slowness, DEVICES, 1.0);
    std::fill_n(healthy, DEVICES, -1);
  }
};

Streams& streams() {
  static Streams* all = new Streams;
  return *all;
}

thread_local int device_now = 0;
thread_local int64_t stream_now[DEVICES] = {};

double milliseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

bool is_ready(const Queue* queue) { return !queue->tasks.empty() && queue->tasks.front().after.passed(); }

// Runs the first task of a queue, outside the lock and without the modes of the thread that happens to run it. A device
// that has failed drops its work.
void run_first(Queue* queue, Lock& lock) {
  Streams& all = streams();
  std::string& failed = all.failure[queue->stream.device_index()];
  Task task = std::move(queue->tasks.front());
  queue->tasks.pop_front();
  const bool runs = task.run && failed.empty();
  const int delay = all.mode == THREADS && all.jitter ? int(all.random() % all.jitter) : 0;
  lock.unlock();
  if (delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
  std::string failure;
  const double start = milliseconds();
  try {
    c10::impl::ForceDispatchKeyGuard plain(
        c10::default_included_set, c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset);
    if (runs) task.run();
  } catch (const c10::Error& error) {
    failure = error.what_without_backtrace();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  const double took = runs ? milliseconds() - start : 0;
  task.run = nullptr;  // frees what it holds before others see that it is done
  lock.lock();
  if (failed.empty()) failed = failure;
  if (task.after_time) queue->clock = std::max(queue->clock, *task.after_time);
  queue->clock += took * all.slowness[queue->stream.device_index()];
  if (task.stamp) *task.stamp = queue->clock;
  ++queue->done;
  all.moved.notify_all();
}

void serve(Queue* queue) {  // the thread of a stream
  Lock lock(streams().lock);
  for (;;) {
    streams().moved.wait(lock, [&] { return streams().mode == THREADS && is_ready(queue); });
    run_first(queue, lock);
  }
}

// The queue that runs next when a thread waits for `wanted`.
Queue* choose(Queue* wanted) {
  const int mode = streams().mode;
  std::vector<Queue*> able;
  if (mode != LATE && mode != SYNC)
    for (auto& device : streams().queues)
      for (auto& [id, queue] : device)
        if (is_ready(queue.get()) && (mode == RANDOM || queue.get() != wanted)) able.push_back(queue.get());
  if (!able.empty()) return able[mode == RANDOM ? streams().random() % able.size() : 0];
  while (!is_ready(wanted)) wanted = wanted->tasks.front().after.queue;
  return wanted;
}

void drive(Point point) {
  if (point.passed()) return;
  NoGil no_gil;
  Lock turn(streams().driving, std::defer_lock);
  if (streams().mode != THREADS) turn.lock();
  Lock lock(streams().lock);
  if (streams().mode == THREADS) streams().moved.wait(lock, [&] { return point.passed(); });
  while (!point.passed()) run_first(choose(point.queue), lock);
}

bool is_last_healthy(int device) {  // counts a kernel
  Lock lock(streams().lock);
  ++streams().kernels[device];
  int64_t& left = streams().healthy[device];
  return left >= 0 && left-- == 0;
}

Queue* find(int device, int64_t id) {  // under the lock
  auto& place = streams().queues[device][id];
  if (!place) place.reset(new Queue{c10::Stream(c10::Stream::UNSAFE, c10::Device(TYPE, c10::DeviceIndex(device)), id)});
  return place.get();
}

}  // namespace

void raise_failure(int device) {
  Lock lock(streams().lock);
  const std::string& failure = streams().failure[device];
  if (failure.empty()) return;
  const std::string text = "virt:" + std::to_string(device) + ": a kernel queued earlier has failed: " + failure;
  throw c10::AcceleratorError({__func__, __FILE__, uint32_t(__LINE__)}, 1, text);
}

Queue* queue_of(int device, int64_t id) {
  Lock lock(streams().lock);
  return find(device, id);
}

Queue* queue_of(c10::Stream stream) { return queue_of(stream.device_index(), stream.id()); }

std::vector<Queue*> queues_of(int device) {
  Lock lock(streams().lock);
  std::vector<Queue*> found;
  for (auto& [id, queue] : streams().queues[device]) found.push_back(queue.get());
  return found;
}

Queue* current(int device) { return queue_of(device, stream_now[device]); }

Point enqueue_inside(Queue* queue, Task task) {
  Lock lock(streams().lock);
  if (streams().mode == THREADS && !queue->has_thread) {
    queue->has_thread = true;
    std::thread(serve, queue).detach();
  }
  queue->tasks.push_back(std::move(task));
  streams().moved.notify_all();
  return {queue, ++queue->queued};
}

Point enqueue(Queue* queue, Task task) {
  const int device = queue->stream.device_index();
  raise_failure(device);
  if (task.run && is_last_healthy(device)) task.run = [] { TORCH_CHECK(false, "as a test has asked for"); };
  const Point point = enqueue_inside(queue, std::move(task));
  if (streams().mode == SYNC) {
    drive(point);
    raise_failure(device);
  }
  return point;
}

Point mark(Queue* queue) {
  Lock lock(streams().lock);
  return {queue, queue->queued};
}

void count_wait(const std::string& why) {
  Lock lock(streams().lock);
  ++streams().waits[why];
}

void wait(Point point, const std::string& why) {
  count_wait(why);
  drive(point);
  raise_failure(point.queue->stream.device_index());
}

bool query(Point point) {  // where streams have no threads, a question moves the work on by one task
  {
    NoGil no_gil;
    Lock turn(streams().driving, std::defer_lock);
    if (streams().mode != THREADS) turn.lock();
    Lock lock(streams().lock);
    if (streams().mode != THREADS && !point.passed()) run_first(choose(point.queue), lock);
  }
  raise_failure(point.queue->stream.device_index());
  return point.passed();
}

void synchronize(int device, const std::string& why) {
  std::vector<Point> points;
  for (Queue* queue : queues_of(device)) points.push_back(mark(queue));
  count_wait(why);
  for (const Point& point : points) drive(point);
  raise_failure(device);
}

int checked(int device) {
  TORCH_CHECK(device < DEVICES, "virt:", device, " does not exist: there are ", DEVICES, " virtual devices");
  return device < 0 ? device_now : device;
}

int current_device() { return device_now; }
int exchange_device(int device) { return std::exchange(device_now, checked(device)); }
int64_t exchange_stream(int device, int64_t id) { return std::exchange(stream_now[checked(device)], id); }

}  // namespace virt

extern "C" void virt_mode(int mode, int seed, int jitter) {
  using namespace virt;
  for (int device = 0; device < DEVICES; ++device)
    for (Queue* queue : queues_of(device)) drive(mark(queue));
  Lock lock(streams().lock);
  for (std::string& failure : streams().failure) failure.clear();
  streams().mode = mode;
  streams().random.seed(seed);
  streams().jitter = jitter;
}

// Lets `count` more kernels of a device run and the one after fail; returns how many were queued since the last call.
extern "C" int64_t virt_fail_kernel(int device, int64_t count) {
  virt::Lock lock(virt::streams().lock);
  virt::streams().healthy[device] = count;
  return std::exchange(virt::streams().kernels[device], 0);
}

extern "C" void virt_slowness(int device, double factor) {
  virt::Lock lock(virt::streams().lock);
  virt::streams().slowness[device] = factor;
}

// Writes "why\tcount\n" for each kind of wait since the last call; returns the length, without writing if it is too long.
extern "C" int64_t virt_waits(char* text, int64_t room) {
  virt::Lock lock(virt::streams().lock);
  std::string all;
  for (auto& [why, count] : virt::streams().waits) all += why + "\t" + std::to_string(count) + "\n";
  if (int64_t(all.size()) < room) {
    all.copy(text, all.size());
    text[all.size()] = 0;
    virt::streams().waits.clear();
  }
  return int64_t(all.size());
}
