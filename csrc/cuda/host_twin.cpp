// The scheduler of the host twin: fibers, meeting points, shared memory and copies of one block at a time.
#if defined(__CUDACC__)
#error "the host twin is compiled by a host compiler"
#endif
#include <cstdlib>
#include <limits>
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

Schedule schedule = Schedule::forward;
Statistics statistics;

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
  const bool reverse = schedule == Schedule::reverse;
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
      Block& block = *cluster.blocks[schedule == Schedule::reverse ? blocks - 1 - b : b];
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
  statistics.copies++;
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
  if (all && meeting.arrived == meeting.count - 1) statistics.barriers++;
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
  statistics.barriers++;
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
  if (shared > 227 * 1024)
    throw std::runtime_error(std::string(name) + ": " + std::to_string(shared) +
                             " bytes of shared memory; a block has at most 227 KB");
  if (cluster < 1 || grid.x % cluster != 0)
    throw std::runtime_error(std::string(name) + ": clusters of " + std::to_string(cluster) +
                             " blocks along x do not divide " + std::to_string(grid.x));
  while (static_cast<int>(stacks.size()) < threads * cluster) stacks.push_back(std::make_unique<Stack>());
  statistics.launches++;
  const int64_t clusters = static_cast<int64_t>(grid.x) / cluster * grid.y * grid.z;
  for (int64_t i = 0; i < clusters; i++) {
    const int64_t b = (schedule == Schedule::reverse ? clusters - 1 - i : i) * cluster;
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
      statistics.blocks++;
      if (static_cast<int64_t>(block->shared_used) > statistics.shared_bytes)
        statistics.shared_bytes = static_cast<int64_t>(block->shared_used);
    }
  }
}

// ---- matrix products and loads --------------------------------------------------------------------------------------

namespace {

float half_of(uint32_t pair, int i, bool half) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  return half ? to_float(f16{bits}) : to_float(bf16{bits});
}

// sum = a b. Numbers of the twin's own, not looked at by sanitizers: this is where it spends its time.
#if defined(__GNUC__)
__attribute__((no_sanitize("address"), no_sanitize("undefined")))
#endif
void product(float (&sum)[16][8], const float* a, const float* b, int depth) {
  for (auto& row : sum) {
    float x[8] = {};
    for (int k = 0; k < depth; k++, a++)
      for (int column = 0; column < 8; column++) x[column] += *a * b[k * 8 + column];
    for (int column = 0; column < 8; column++) row[column] = x[column];
  }
}

// d += a b with a [16][depth], b [depth][8] gathered from the lanes.
void multiply(void** args, const float* a, const float* b, int depth) {
  statistics.products++;
  float sum[16][8];
  product(sum, a, b, depth);
  for (int l = 0; l < WARP; l++) {
    float* d = static_cast<Product*>(args[l])->d;
    for (int i = 0; i < 4; i++) d[i] += sum[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

}  // namespace

void multiply_16(void** args, int, bool half) {
  float a[16 * 16], b[16 * 8];
  for (int l = 0; l < WARP; l++) {
    const auto* one = static_cast<Product*>(args[l]);
    const int g = l / 4, c = l % 4;
    for (int i = 0; i < 4; i++)
      for (int j = 0; j < 2; j++) a[(g + 8 * (i % 2)) * 16 + 2 * c + 8 * (i / 2) + j] = half_of(one->a[i], j, half);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) b[(2 * c + 8 * i + j) * 8 + g] = half_of(one->b[i], j, half);
  }
  multiply(args, a, b, 16);
}

void multiply_tf32(void** args, int) {
  float a[16 * 8], b[8 * 8];
  const auto read = [](uint32_t bits) { return bits_to_float(bits & 0xffffe000u); };  // the units drop the low bits
  for (int l = 0; l < WARP; l++) {
    const auto* one = static_cast<Product*>(args[l]);
    const int g = l / 4, c = l % 4;
    for (int i = 0; i < 4; i++) a[(g + 8 * (i % 2)) * 8 + c + 4 * (i / 2)] = read(one->a[i]);
    for (int i = 0; i < 2; i++) b[(c + 4 * i) * 8 + g] = read(one->b[i]);
  }
  multiply(args, a, b, 8);
}

void load_matrices(void** args, int, int matrices, bool transposed) {
  uint16_t rows[4][8][8];
  for (int m = 0; m < matrices; m++) {
    int in_bank[8] = {};
    for (int r = 0; r < 8; r++) {
      const void* row = static_cast<MatrixLoad*>(args[m * 8 + r])->row;
      std::memcpy(rows[m][r], row, 16);
      in_bank[reinterpret_cast<uintptr_t>(row) / 16 % 8]++;
    }
    int most = 1;
    for (int count : in_bank) most = count > most ? count : most;
    statistics.matrix_loads++;
    statistics.conflicts += most - 1;
  }
  for (int l = 0; l < WARP; l++) {
    uint32_t* r = static_cast<MatrixLoad*>(args[l])->r;
    for (int m = 0; m < matrices; m++) {
      const int a = l / 4, b = 2 * (l % 4);
      const uint16_t low = transposed ? rows[m][b][a] : rows[m][a][b];
      const uint16_t high = transposed ? rows[m][b + 1][a] : rows[m][a][b + 1];
      r[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

}  // namespace writesae::tile::twin

// ---- numbers --------------------------------------------------------------------------------------------------------

namespace writesae::tile {

bf16 to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fffu};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

float to_float(f16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y;
  if (exponent == 31) {
    y = fraction != 0 ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else {
    y = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                      : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return x.bits & 0x8000u ? -y : y;
}

f16 to_f16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000u : 0;
  if (std::isnan(x)) return {0x7fffu};
  const double magnitude = std::fabs(static_cast<double>(x));
  if (magnitude >= 65520.0) return {static_cast<uint16_t>(sign | 0x7c00u)};
  // In units of the last place of its binade (2^-24 below the smallest normal number); nearbyint rounds ties to even.
  int exponent = magnitude < 6.103515625e-05 ? -14 : std::ilogb(magnitude);
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
  // For normal numbers units is 1024..2048, and 2048 carries into the exponent by itself.
  const int bits =
      magnitude < 6.103515625e-05 ? static_cast<int>(units) : ((exponent + 15 - 1) << 10) + static_cast<int>(units);
  return {static_cast<uint16_t>(sign | bits)};
}

}  // namespace writesae::tile
