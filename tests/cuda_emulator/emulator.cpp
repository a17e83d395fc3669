// The scheduler of the emulator; see cuda_runtime.h. A fiber gets its stack from makecontext, once; from
// then on it is switched by setjmp, because swapcontext asks the kernel for the signal mask every time.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

// Bounds of the section that holds all __shared__ variables, made by the linker; absent without any.
extern "C" char __start_emulator_shared[] __attribute__((weak));
extern "C" char __stop_emulator_shared[] __attribute__((weak));

namespace emulator {

dim3 grid_dim, block_dim, block_index, thread_index;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr size_t kMostShared = 227 << 10;

// Waits of a group of threads: who comes last opens it and starts the next round.
struct Barrier {
  int arrived = 0;
  unsigned round = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp];  // of even and odd rounds
  int size = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  unsigned group;
};

struct Fiber {
  jmp_buf place;
  std::unique_ptr<char[]> stack;  // null: it never ran
  dim3 index;
  int number = 0;
  const Barrier* waits_for = nullptr;
  unsigned round = 0;
  bool done = false;
  std::vector<Copy> copies;  // asked for, oldest first
  unsigned group = 0;        // of copies, under construction
};

jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Barrier block;
Fiber* current = nullptr;
const std::function<void()>* program = nullptr;
bool backwards = false;
alignas(128) char shared_memory[kMostShared];

// From a fiber to the scheduler, until the scheduler comes back.
__attribute__((noinline)) void leave() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void live() {  // a fiber runs one thread after another
  for (;;) {
    (*program)();
    current->done = true;
    leave();
  }
}

// From the scheduler to a fiber, until it leaves.
__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack.reset(new char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  setcontext(&context);
}

void wait(Barrier& barrier, int expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  current->waits_for = &barrier;
  current->round = barrier.round;
  leave();
}

Warp& own_warp() { return warps[current->number / kWarp]; }

void check_mask(unsigned mask, const Warp& warp) {
  const unsigned all = warp.size == kWarp ? 0xffffffffu : (1u << warp.size) - 1u;
  if ((mask & all) != all) {  // kernels here never ask for less
    std::fputs("emulator: expected a mask of all lanes\n", stderr);
    std::abort();
  }
}

void start(Fiber& fiber, int number, dim3 index) {
  fiber.number = number;
  fiber.index = index;
  fiber.waits_for = nullptr;
  fiber.done = false;
  fiber.copies.clear();
}

void run_block(int threads) {
  block = {};
  for (size_t w = 0; w < warps.size(); ++w) {
    warps[w].barrier = {};
    const int rest = threads - static_cast<int>(w) * kWarp;
    warps[w].size = rest < kWarp ? rest : kWarp;
  }
  int number = 0;
  for (unsigned z = 0; z < block_dim.z; ++z)
    for (unsigned y = 0; y < block_dim.y; ++y)
      for (unsigned x = 0; x < block_dim.x; ++x, ++number) start(fibers[number], number, {x, y, z});
  int left = threads;
  while (left > 0) {
    bool progress = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = fibers[backwards ? threads - 1 - i : i];
      if (fiber.done) continue;
      if (fiber.waits_for && fiber.waits_for->round == fiber.round) continue;
      fiber.waits_for = nullptr;
      resume(fiber);
      progress = true;
      left -= fiber.done;
    }
    if (!progress) {
      fibers.clear();  // some are in the middle of a thread
      throw std::runtime_error("emulator: " + std::to_string(left) +
                               " threads wait at a barrier or shuffle that others do not reach");
    }
  }
}

}  // namespace

void run(dim3 grid, dim3 block_shape, int shared_bytes, const std::function<void()>& body) {
  const int threads = static_cast<int>(block_shape.x * block_shape.y * block_shape.z);
  if (threads < 1 || threads > 1024 || static_cast<size_t>(shared_bytes) > kMostShared)
    throw std::runtime_error("emulator: expected 1 to 1024 threads and at most 227 KiB shared");
  grid_dim = grid;
  block_dim = block_shape;
  program = &body;
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  warps.resize((threads + kWarp - 1) / kWarp);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        std::memset(shared_memory, 0xff, shared_bytes);  // NaN
        if (__start_emulator_shared)
          std::memset(__start_emulator_shared, 0xff,
                      __stop_emulator_shared - __start_emulator_shared);
        run_block(threads);
      }
}

void* dynamic_shared() { return shared_memory; }
int lane() { return current->number % kWarp; }
void block_barrier() {
  wait(block, static_cast<int>(block_dim.x * block_dim.y * block_dim.z));
}
void warp_barrier(unsigned mask) {
  check_mask(mask, own_warp());
  wait(own_warp().barrier, own_warp().size);
}
void copy_later(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    __builtin_trap();  // a fault on a GPU
  std::memset(shared, 0xff, bytes);  // NaN
  current->copies.push_back({shared, global, bytes, current->group});
}
void end_group() { ++current->group; }
void wait_for_copies(int groups_left) {
  auto& copies = current->copies;
  size_t there = 0;
  for (; there < copies.size(); ++there) {
    const Copy& copy = copies[there];
    if (static_cast<int>(current->group - copy.group) <= groups_left) break;
    std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + there);
}
uint64_t exchange(unsigned mask, uint64_t bits, int source) {
  Warp& warp = own_warp();
  check_mask(mask, warp);
  uint64_t* slot = warp.slot[warp.barrier.round % 2];
  slot[lane()] = bits;
  wait(warp.barrier, warp.size);
  return slot[source];
}

}  // namespace emulator

// 1: the threads of a block run from the last to the first.
extern "C" __attribute__((visibility("default"))) void sora_emulator_order(int order) { emulator::backwards = order != 0; }
