// The scheduler of the host twin: fibers, meeting points, shared memory and copies of one block at a time.
#if defined(__CUDACC__)
#error "the host twin is compiled by a host compiler"
#endif
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "tile.cuh"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define WRITESAE_ASAN 1
#else
#define WRITESAE_ASAN 0
#endif

#if defined(__x86_64__) && !defined(WRITESAE_UCONTEXT)
#define WRITESAE_SWITCH 1  // a few instructions; the portable way makes two system calls a switch
#else
#define WRITESAE_SWITCH 0
#include <ucontext.h>
#endif
#include <sys/mman.h>

namespace writesae::tile::twin {

std::mutex lock;
Settings settings;
std::map<std::string, Statistics> statistics;
std::vector<Watched> watched;

namespace {

// ---- fibers ---------------------------------------------------------------------------------------------------------

constexpr size_t STACK = WRITESAE_ASAN ? 1024 * 1024 : 256 * 1024;
constexpr size_t GUARD = 64 * 1024;  // an overflowing stack faults instead of reaching its neighbour

struct Stack {
  char* base;
  Stack() {
    void* p = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base = static_cast<char*>(p);
    mprotect(base, GUARD, PROT_NONE);
  }
  ~Stack() { munmap(base, STACK + GUARD); }
  Stack(const Stack&) = delete;
  char* bottom() const { return base + GUARD; }
};

#if WRITESAE_SWITCH
extern "C" void writesae_twin_switch(void** save, void* load);
asm(R"(
.text
.hidden writesae_twin_switch
.globl writesae_twin_switch
.type writesae_twin_switch,@function
writesae_twin_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size writesae_twin_switch,.-writesae_twin_switch
)");
struct Context {
  void* sp = nullptr;
};
void prepare(Context& context, const Stack& stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack.bottom() + STACK);
  *--top = nullptr;  // a return address: at entry the stack pointer is 8 off a multiple of 16, as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.sp = top;
}
void switch_context(Context& from, Context& to) { writesae_twin_switch(&from.sp, to.sp); }
#else
struct Context {
  ucontext_t context;
};
void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack.bottom();
  context.context.uc_stack.ss_size = STACK;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// ---- a block --------------------------------------------------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  Place place;
};

enum class State { ready, waiting, polling, done };

struct Thread {
  Context context;
  State state = State::ready;
  void* args = nullptr;
  size_t pieces = 0;                      // of shared memory taken so far
  std::vector<std::vector<Copy>> groups;  // closed groups of copies under way
  std::vector<Copy> open;
  void* fake_stack = nullptr;  // of the address sanitizer
  const char* what = "";
  Place place = {"", 0};
  bool (*holds)(void*) = nullptr;  // what a polling thread waits for
  void* holds_context = nullptr;
};

// Threads [first, first + count) that meet.
struct Meeting {
  int first = 0, count = 0, arrived = 0;
  const char* what = "";
  Place place = {"", 0};
};

struct Named {
  int expected = 0;
  std::vector<int> arrived;
};

// Ends the running fiber, and with it the block.
struct Fault {
  std::string message;
};

constexpr uint32_t FIRST_NUMBER = 1024 + 128;  // of the first piece: no multiple of more than 128

struct FreePiece {
  void operator()(char* p) const { std::free(p); }
};
struct Piece {
  std::unique_ptr<char, FreePiece> data;
  size_t bytes;
  uint32_t number;  // of its first byte, as the device numbers shared memory
};

struct Block {
  const char* name;
  Grid grid, index;
  size_t shared_limit, shared_used = 0;
  void (*body)(void*);
  void* body_context;
  std::vector<Thread> threads;
  std::vector<Meeting> warps, warpgroups;
  Meeting all;
  int rank = 0, ended = 0;  // in its cluster; how many threads have
  Named named[16];
  std::vector<Piece> pieces;
  std::vector<void*> args;
  Context scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  int running = 0;
  std::string error;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int arrived = 0, meetings = 0;
  const Beside* beside = nullptr;
};

Cluster* cluster_now = nullptr;
Block* now = nullptr;                        // the block whose thread is being run
Statistics* launch_counts = nullptr;         // of the launch it belongs to
std::vector<std::unique_ptr<Stack>> stacks;  // reused from block to block

std::string at(Place place) {
  const std::string file = place.file;
  const size_t slash = file.rfind('/');
  return (slash == std::string::npos ? file : file.substr(slash + 1)) + ":" + std::to_string(place.line);
}

std::string who(int thread) { return "thread " + std::to_string(thread); }

void to_scheduler(bool last) {
  Thread& me = now->threads[now->running];
#if WRITESAE_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &me.fake_stack, now->scheduler_bottom, now->scheduler_size);
#endif
  switch_context(me.context, now->scheduler);
#if WRITESAE_ASAN
  __sanitizer_finish_switch_fiber(now->threads[now->running].fake_stack, nullptr, nullptr);
#endif
  (void)last;
}

void entry() {
#if WRITESAE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &now->scheduler_bottom, &now->scheduler_size);
#endif
  try {
    now->body(now->body_context);
    Thread& me = now->threads[now->running];
    me.groups.push_back(std::move(me.open));
    for (const auto& group : me.groups)
      if (!group.empty()) fail("an asynchronous copy is never waited for", group[0].place);
    if (cluster_now->beside != nullptr) cluster_now->beside->thread_ends();
  } catch (const Fault& fault) {
    now->error = fault.message;
  }
  now->threads[now->running].state = State::done;
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

Stack& stack_of(const Block& block, int thread) { return *stacks[block.rank * block.threads.size() + thread]; }

void resume(Block& block, int thread) {
  now = &block;
  now->running = thread;
  Thread& it = now->threads[thread];
#if WRITESAE_ASAN
  __sanitizer_start_switch_fiber(&now->scheduler_fake_stack, stack_of(block, thread).bottom(), STACK);
#endif
  switch_context(now->scheduler, it.context);
#if WRITESAE_ASAN
  __sanitizer_finish_switch_fiber(now->scheduler_fake_stack, nullptr, nullptr);
#endif
}

void wait() {
  now->threads[now->running].state = State::waiting;
  to_scheduler(false);
}

void poison(void* p, size_t bytes) { std::memset(p, 0xff, bytes); }  // NaN in every floating type, -1 in every integer

// Nobody can go on: says where threads stand.
std::string stuck(const Block& block) {
  std::string waiting, done;
  const auto waits = [](const Thread& it) { return it.state == State::waiting || it.state == State::polling; };
  for (size_t i = 0; i < block.threads.size(); i++) {
    const Thread& it = block.threads[i];
    if (waits(it) && waiting.empty()) waiting = who(i) + " waits at " + it.what + " (" + at(it.place) + ")";
    if (it.state == State::done && done.empty()) done = who(i) + " has ended";
  }
  for (size_t i = block.threads.size(); i-- > 0;) {
    const Thread& it = block.threads[i];
    if (waits(it)) {
      waiting += ", " + who(i) + " at " + it.what + " (" + at(it.place) + ")";
      break;
    }
  }
  return "barrier divergence: " + waiting + (done.empty() ? "" : ", " + done);
}

// Runs the threads of a block that can go on, each as far as it can; whether there was one.
bool run_ready(Block& block) {
  const int n = static_cast<int>(block.threads.size());
  const bool reverse = settings.schedule == Schedule::reverse;
  bool progress = false;
  for (int w = 0; w < n / WARP; w++) {
    const int first = (reverse ? n / WARP - 1 - w : w) * WARP;
    for (bool again = true; again && block.error.empty();) {
      again = false;
      for (int l = 0; l < WARP && block.error.empty(); l++) {
        const int i = first + (reverse ? WARP - 1 - l : l);
        Thread& it = block.threads[i];
        if (it.state == State::polling && it.holds(it.holds_context)) it.state = State::ready;
        if (it.state != State::ready) continue;
        resume(block, i);
        again = progress = true;
        if (it.state == State::done) block.ended++;
      }
    }
  }
  return progress;
}

void run_cluster(Cluster& cluster) {
  cluster_now = &cluster;
  const int blocks = static_cast<int>(cluster.blocks.size());
  const Block* failed = nullptr;
  const Beside* beside = cluster.beside;
  if (beside != nullptr) beside->begin();
  for (auto& block : cluster.blocks)
    for (size_t i = 0; i < block->threads.size(); i++)
      prepare(block->threads[i].context, stack_of(*block, static_cast<int>(i)), entry);
  for (bool all_done = false; !all_done && failed == nullptr;) {
    bool progress = false;
    all_done = true;
    for (int b = 0; b < blocks && failed == nullptr; b++) {
      Block& block = *cluster.blocks[settings.schedule == Schedule::reverse ? blocks - 1 - b : b];
      progress |= run_ready(block);
      all_done &= block.ended == static_cast<int>(block.threads.size());
      if (!block.error.empty()) failed = &block;
    }
    if (failed != nullptr || (!all_done && progress)) continue;
    try {
      if (all_done && beside != nullptr) beside->end();
      if (all_done || (beside != nullptr && beside->advance())) continue;
      for (auto& block : cluster.blocks)
        if (failed == nullptr && block->ended < static_cast<int>(block->threads.size())) {
          block->error = stuck(*block);
          failed = block.get();
        }
    } catch (const Fault& fault) {
      cluster.blocks[0]->error = fault.message;
      failed = cluster.blocks[0].get();
    }
  }
  now = nullptr;
  cluster_now = nullptr;
  if (failed != nullptr) {
#if WRITESAE_ASAN
    for (const auto& stack : stacks) ASAN_UNPOISON_MEMORY_REGION(stack->bottom(), STACK);  // frames given up in the middle
#endif
    throw std::runtime_error(std::string(failed->name) + ", block (" + std::to_string(failed->index.x) + ", " +
                             std::to_string(failed->index.y) + ", " + std::to_string(failed->index.z) +
                             "): " + failed->error);
  }
}

}  // namespace

// ---- of the running thread ------------------------------------------------------------------------------------------

int thread() { return now->running; }
int block_threads() { return static_cast<int>(now->threads.size()); }
unsigned block(int axis) { return axis == 0 ? now->index.x : axis == 1 ? now->index.y : now->index.z; }
unsigned grid(int axis) { return axis == 0 ? now->grid.x : axis == 1 ? now->grid.y : now->grid.z; }

Statistics& counts() { return *launch_counts; }

void fail_of(const std::string& whose, const std::string& message, Place place) {
  throw Fault{message + " (" + whose + ", " + at(place) + ")"};
}
void fail(const std::string& message, Place place) { fail_of(who(now->running), message, place); }

void* take(size_t bytes) {
  Thread& me = now->threads[now->running];
  const size_t place = me.pieces++;
  if (place == now->pieces.size()) {
    now->shared_used += shared_piece(bytes);
    if (now->shared_used > now->shared_limit)
      fail("shared memory: " + std::to_string(now->shared_used) + " bytes taken, " + std::to_string(now->shared_limit) +
               " asked for at launch",
           {"Shared::take", static_cast<int>(place)});
    void* p = nullptr;
    if (posix_memalign(&p, 128, bytes) != 0) throw std::bad_alloc();
    poison(p, bytes);
    const auto number = static_cast<uint32_t>(FIRST_NUMBER + now->shared_used - shared_piece(bytes));
    now->pieces.push_back({std::unique_ptr<char, FreePiece>(static_cast<char*>(p)), bytes, number});
  }
  if (now->pieces[place].bytes != bytes)
    fail("shared memory: threads take pieces of different sizes", {"Shared::take", static_cast<int>(place)});
  return now->pieces[place].data.get();
}

void add_copy(void* to, const void* from, int bytes, bool valid, Place place) {
  check_alignment(to, bytes, "asynchronous copy, target", place);
  if (valid) check_alignment(from, bytes, "asynchronous copy, source", place);
  Statistics& c = counts();
  c.copies++, c.shared_bytes_written += bytes;
  if (valid) {
    c.copied_bytes += bytes;
    const auto* p = static_cast<const char*>(from);
    for (const Watched& one : watched)
      if (p >= one.begin && p < one.begin + one.bytes) c.own["bytes of " + one.name] += bytes;
  }
  poison(to, bytes);
  now->threads[now->running].open.push_back({to, from, bytes, valid, place});
}

void close_copies() {
  Thread& me = now->threads[now->running];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void finish_copies(size_t pending) {
  Thread& me = now->threads[now->running];
  const size_t finished = me.groups.size() > pending ? me.groups.size() - pending : 0;
  for (size_t g = 0; g < finished; g++)
    for (const Copy& copy : me.groups[g]) {
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
    }
  me.groups.erase(me.groups.begin(), me.groups.begin() + finished);
}

namespace {

// `of`: what the threads that meet are together.
void meet_in(Meeting& meeting, const char* of, const char* what, Place place, void* args, Act act) {
  Thread& me = now->threads[now->running];
  me.args = args, me.what = what, me.place = place;
  if (meeting.arrived == 0) meeting.what = what, meeting.place = place;
  const auto differ = [](const char* x, const char* y) { return x != y && std::strcmp(x, y) != 0; };
  if (meeting.place.line != place.line || differ(meeting.what, what) || differ(meeting.place.file, place.file))
    fail(std::string("divergence: others of the ") + of + " are at " + meeting.what + " (" + at(meeting.place) +
             "), this one at " + what,
         place);
  if (++meeting.arrived < meeting.count) {
    wait();
    return;
  }
  meeting.arrived = 0;
  if (act != nullptr) {
    now->args.resize(meeting.count);
    for (int i = 0; i < meeting.count; i++) now->args[i] = now->threads[meeting.first + i].args;
    act(now->args.data(), meeting.count);
  }
  for (int i = 0; i < meeting.count; i++) now->threads[meeting.first + i].state = State::ready;
}

}  // namespace

void meet(bool all, const char* what, Place place, void* args, Act act) {
  Meeting& meeting = all ? now->all : now->warps[now->running / WARP];
  if (all && meeting.arrived == meeting.count - 1) counts().barriers++;
  meet_in(meeting, all ? "block" : "warp", what, place, args, act);
}

void meet_named(int id, int threads, Place place) {
  if (id < 1 || id > 15 || threads % WARP != 0) fail("sync: expected an id of 1 to 15 and whole warps", place);
  Thread& me = now->threads[now->running];
  me.what = "sync (named)", me.place = place;
  Named& it = now->named[id];
  if (it.arrived.empty()) it.expected = threads;
  if (it.expected != threads) fail("sync: threads disagree on how many meet at barrier " + std::to_string(id), place);
  it.arrived.push_back(now->running);
  if (static_cast<int>(it.arrived.size()) < threads) {
    wait();
    return;
  }
  counts().barriers++;
  for (int i : it.arrived) now->threads[i].state = State::ready;
  it.arrived.clear();
}

// ---- for host_twin_hopper.cpp ---------------------------------------------------------------------------------------

int cluster_blocks() { return static_cast<int>(cluster_now->blocks.size()); }
int cluster_rank() { return now->rank; }
bool ended(int rank) {
  const Block& block = *cluster_now->blocks[rank];
  return block.ended == static_cast<int>(block.threads.size());
}

void meet_warpgroup(const char* what, Place place, void* args, Act act) {
  const size_t group = now->running / (4 * WARP);
  if (group >= now->warpgroups.size())
    fail(std::string(what) + ": a warpgroup is four warps, the first divisible by 4", place);
  meet_in(now->warpgroups[group], "warpgroup", what, place, args, act);
}

void wait_until(bool (*holds)(void*), void* context, const char* what, Place place) {
  Thread& me = now->threads[now->running];
  while (!holds(context)) {
    me.holds = holds, me.holds_context = context, me.what = what, me.place = place;
    me.state = State::polling;
    to_scheduler(false);
  }
}

void meet_cluster(Place place) {
  Cluster& it = *cluster_now;
  int meeting = it.meetings;
  if (++it.arrived == static_cast<int>(it.blocks.size() * now->threads.size())) it.arrived = 0, it.meetings++;
  wait_until([](void* mine) { return cluster_now->meetings != *static_cast<int*>(mine); }, &meeting, "cluster_sync", place);
}

uint32_t shared_number(const void* p, Place place) {
  const auto* byte = static_cast<const char*>(p);
  for (const auto& block : cluster_now->blocks)
    for (const Piece& piece : block->pieces)
      if (byte >= piece.data.get() && byte < piece.data.get() + piece.bytes)
        return piece.number + static_cast<uint32_t>(byte - piece.data.get());
  fail("an address that is not in shared memory", place);
}

char* at_number(int rank, uint32_t number, size_t bytes, Place place) {
  for (const Piece& piece : cluster_now->blocks[rank]->pieces)
    if (number >= piece.number && number + bytes <= piece.number + piece.bytes)
      return piece.data.get() + (number - piece.number);
  fail("shared memory: no piece of block " + std::to_string(rank) + " of the cluster has the " + std::to_string(bytes) +
           " bytes at " + std::to_string(number),
       place);
}

Memory piece_of(const char* p) {
  for (const auto& block : cluster_now->blocks)
    for (const Piece& piece : block->pieces)
      if (p >= piece.data.get() && p < piece.data.get() + piece.bytes) return {piece.data.get(), piece.bytes};
  return {nullptr, 0};
}

void for_each_piece(void (*visit)(Memory)) {
  for (const Piece& piece : now->pieces) visit({piece.data.get(), piece.bytes});
}

// ---- launches -------------------------------------------------------------------------------------------------------

void run(const char* name, Grid grid, int threads, size_t shared, void (*body)(void*), void* context, int cluster,
         const Beside* beside) {
  if (threads < WARP || threads > 1024 || threads % WARP != 0)
    throw std::runtime_error(std::string(name) + ": a block must have 32 to 1024 threads in whole warps, got " +
                             std::to_string(threads));
  if (grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error(std::string(name) + ": the grid's y and z reach at most 65535");
  const std::lock_guard<std::mutex> held(lock);  // another thread's launch waits
  const size_t most = settings.machine.block_shared;
  if (shared > most)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared) +
                             " bytes of shared memory; a block has at most " + std::to_string(most));
  if (cluster < 1 || grid.x % cluster != 0)
    throw std::runtime_error(std::string(name) + ": clusters of " + std::to_string(cluster) +
                             " blocks along x do not divide " + std::to_string(grid.x));
  while (static_cast<int>(stacks.size()) < threads * cluster) stacks.push_back(std::make_unique<Stack>());
  launch_counts = &statistics[name];
  Statistics& c = counts();
  c.launches++;
  c.shared_bytes_asked = std::max(c.shared_bytes_asked, static_cast<int64_t>(shared));
  const int64_t clusters = static_cast<int64_t>(grid.x) / cluster * grid.y * grid.z;
  for (int64_t i = 0; i < clusters; i++) {
    const int64_t b = (settings.schedule == Schedule::reverse ? clusters - 1 - i : i) * cluster;
    Cluster together;
    together.beside = beside;
    for (int rank = 0; rank < cluster; rank++) {
      together.blocks.push_back(std::make_unique<Block>());
      Block& block = *together.blocks.back();
      block.name = name, block.grid = grid, block.shared_limit = shared, block.body = body, block.body_context = context;
      block.index = {static_cast<unsigned>((b + rank) % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                     static_cast<unsigned>(b / grid.x / grid.y)};
      block.rank = rank;
      block.threads.resize(threads);
      block.warps.resize(threads / WARP);
      for (int w = 0; w < threads / WARP; w++) block.warps[w].first = w * WARP, block.warps[w].count = WARP;
      block.warpgroups.resize(threads / (4 * WARP));
      for (size_t w = 0; w < block.warpgroups.size(); w++)
        block.warpgroups[w].first = static_cast<int>(w) * 4 * WARP, block.warpgroups[w].count = 4 * WARP;
      block.all.count = threads;
    }
    run_cluster(together);
    for (const auto& block : together.blocks) {
      c.blocks++;
      c.shared_bytes_taken = std::max(c.shared_bytes_taken, static_cast<int64_t>(block->shared_used));
    }
  }
}

}  // namespace writesae::tile::twin
