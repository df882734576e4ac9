// The model of host_twin_hopper.h: barriers, copies and products that are under way, for the blocks of one cluster.
#if defined(__CUDACC__)
#error "the host twin is compiled by a host compiler"
#endif
#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "tile_hopper.cuh"

namespace writesae::tile::twin {
namespace {

constexpr uint32_t SPOILT =
    0xffffffffu;  // NaN; of accumulators, and of what copies are to fill, as the twin fills new memory
constexpr uint64_t MADE = 0x5752495445534145u;  // what lies in a barrier: none of the kernel's business
constexpr int64_t MOST = (1 << 20) - 1;         // of arrivals, and of bytes, in a phase ("Contents of the mbarrier object")
constexpr int DEPTH = 16;                       // of a product

std::string number(int64_t x) { return std::to_string(x); }

// ---- what there is of a cluster -------------------------------------------------------------------------------------

struct State {
  int64_t count = 0, pending = 0, bytes = 0;  // arrivals of a phase, those to come, bytes to come
  uint32_t phase = 0;
  bool known = false;  // to copies
  int rank = 0;
};

// 16 bytes that a product reads, as they were when it began.
struct Read {
  const char* p;
  char was[16];
};

// A copy of a tile to one block.
struct Copy {
  char* piece;
  char* first;                                       // its target: swizzles mix within rows
  std::vector<std::pair<uint32_t, const char*>> to;  // place in the piece of each 16 bytes; null: zeros
  std::vector<int> valid;                            // bytes of each that are not zeros
  Barrier* barrier;
  int64_t bytes;
  int rank;
  std::string who;
  Place place;
};

struct Product {
  int columns;
  float* d[WARPGROUP];
  const uint32_t* a[WARPGROUP];
  uint32_t a_was[WARPGROUP][4];
  std::vector<Read> reads;
  std::vector<float> result;    // [WARPGROUP][columns / 2]
  int group[4] = {0, 0, 0, 0};  // of each warp: the number of its group, 0 before it is closed
  bool over[4] = {};            // what each warp has waited for
  Place place;
};

struct Warpgroup {
  std::deque<std::unique_ptr<Product>> products;  // the oldest first
  int groups[4] = {};                             // closed so far, by warp
  bool fenced[4] = {};                            // by warp, since it last waited
};

struct Registers {
  int64_t free = 0;
  std::vector<int> each;  // by warpgroup
};

struct Model {
  std::map<Barrier*, State> barriers;
  std::map<const char*, std::vector<char>> seen;  // by piece: what copies and products see of it
  std::deque<Copy> copies;
  std::map<std::pair<int, int>, Warpgroup> warpgroups;  // by rank and place in the block
  std::map<int, Registers> registers;                   // by rank
};
Model model;

std::string who() {
  return "thread " + number(thread()) + (cluster_blocks() > 1 ? " of block " + number(cluster_rank()) : "");
}

Warpgroup& warpgroup() { return model.warpgroups[{cluster_rank(), thread() / WARPGROUP}]; }

// What the asynchronous units see of a piece of shared memory: new memory, as it is filled, until a fence or a copy.
std::vector<char>& seen_of(const Memory& piece) {
  auto& seen = model.seen[piece.data];
  if (seen.empty()) seen.assign(piece.bytes, static_cast<char>(0xff));
  return seen;
}

bool overlap(const char* p, size_t n, const char* q, size_t m) { return p < q + m && q < p + n; }

// ---- barriers -------------------------------------------------------------------------------------------------------

State& state_of(Barrier* b, Place place) {
  const auto found = model.barriers.find(b);
  if (found == model.barriers.end()) fail("a barrier that was never made (barrier_init)", place);
  if (b->bits != MADE) fail("a barrier that something else wrote over", place);
  return found->second;
}

// The phase ends with the last arrival and the last byte ("Phase Completion of the mbarrier object").
void settle(State& it) {
  if (it.pending > 0 || it.bytes != 0) return;
  it.phase++;
  it.pending = it.count;
}

// The barrier in another block that lies where `b` does in this one.
Barrier* in_block(int rank, Barrier* b, Place place) {
  if (rank < 0 || rank >= cluster_blocks()) fail("there is no block " + number(rank) + " in the cluster", place);
  if (ended(rank)) fail("block " + number(rank) + " of the cluster has ended", place);
  return reinterpret_cast<Barrier*>(at_number(rank, shared_number(b, place), sizeof(Barrier), place));
}

// ---- copies ---------------------------------------------------------------------------------------------------------

[[noreturn]] void fail_copy(const Copy& copy, const std::string& what) { fail_of(copy.who, what, copy.place); }

void arrive(const Copy& copy) {
  if (ended(copy.rank)) fail_copy(copy, "a copy reaches block " + number(copy.rank) + " of the cluster, which has ended");
  auto& seen = seen_of(piece_of(copy.piece));
  for (size_t i = 0; i < copy.to.size(); i++) {
    const auto [at, from] = copy.to[i];
    char* to = copy.piece + at;
    for (int j = 0; j < 16; j++)
      if (static_cast<unsigned char>(to[j]) != 0xff)
        fail_copy(copy, "the target of a copy was written while it was under way");
    std::memset(to, 0, 16);
    if (from != nullptr) std::memcpy(to, from, copy.valid[i]);
    std::memcpy(&seen[at], to, 16);
  }
  const auto found = model.barriers.find(copy.barrier);
  if (found == model.barriers.end() || copy.barrier->bits != MADE) fail_copy(copy, "the barrier of a copy is gone");
  State& it = found->second;
  it.bytes -= copy.bytes;
  if (it.bytes < -MOST || (it.pending == 0 && it.bytes < 0)) fail_copy(copy, "more bytes reach a barrier than it expects");
  settle(it);
}

// ---- products -------------------------------------------------------------------------------------------------------

// Rows of 16 numbers that a description means ("Matrix Descriptor Format", "Strides", "Canonical Layouts", K-major).
void read_operand(uint64_t description, int rows, const char* which, float* out, Product& product) {
  const auto field = [&](int low, int bits) {
    return static_cast<uint32_t>(description >> low & ((uint64_t{1} << bits) - 1));
  };
  const std::string name = std::string("the description of ") + which + ": ";
  const uint32_t start = field(0, 14) << 4, leading = field(16, 14) << 4, stride = field(32, 14) << 4;
  const auto swizzle = static_cast<Swizzle>(field(62, 2));
  if (field(14, 2) != 0 || field(30, 2) != 0 || field(46, 3) != 0 || field(52, 10) != 0)
    fail(name + "bits that mean nothing are set", product.place);
  if (field(49, 3) != 0) fail(name + "a base offset, which the twin does not model", product.place);
  counts().shared_bytes_read += int64_t{rows} * 2 * DEPTH;
  const uint32_t row_bytes = swizzle_bytes(swizzle), within = start % row_bytes, block = 8 * row_bytes;
  if (swizzle != Swizzle::none && (start - within) % block != 0)
    fail(name + "begins at " + number(start) + ", rows swizzled by " + number(row_bytes) + " bytes at a multiple of " +
             number(block),
         product.place);
  if (swizzle != Swizzle::none && within + 2 * DEPTH > row_bytes)
    fail(name + "16 numbers from byte " + number(within) + " leave a row of " + number(row_bytes), product.place);
  if (rows > 8 && stride == 0) fail(name + "all rows lie in one place", product.place);
  for (int row = 0; row < rows; row++)
    for (uint32_t unit = 0; unit < 2; unit++) {
      const uint32_t plain = start + static_cast<uint32_t>(row) / 8 * stride + static_cast<uint32_t>(row) % 8 * row_bytes +
                             unit * (swizzle == Swizzle::none ? leading : 16);
      const char* p = at_number(cluster_rank(), swizzled(plain, swizzle), 16, product.place);
      Read read = {p, {}};
      std::memcpy(read.was, p, 16);
      const Memory piece = piece_of(p);
      if (std::memcmp(&seen_of(piece)[p - piece.data], p, 16) != 0)
        fail(std::string(which) + " in shared memory was written by plain stores without fence_async", product.place);
      for (const Copy& copy : model.copies)
        if (overlap(copy.first, static_cast<size_t>(copy.bytes), p, 16))
          fail(std::string(which) + " in shared memory is the target of a copy that is under way", product.place);
      product.reads.push_back(read);
      for (int i = 0; i < 8; i++) {
        uint16_t bits;
        std::memcpy(&bits, p + 2 * i, 2);
        out[row * DEPTH + static_cast<int>(unit) * 8 + i] = to_float(bf16{bits});
      }
    }
}

// d [64][columns] += a [64][DEPTH] b [columns][DEPTH], by the twin's tiles of 16 x 8.
void multiply(float* d, const float* a, const float* b, int columns) {
  for (int column = 0; column < columns; column += 8) {
    float part[DEPTH * 8], sum[16 * 8];
    for (int k = 0; k < DEPTH; k++)
      for (int j = 0; j < 8; j++) part[k * 8 + j] = b[(column + j) * DEPTH + k];
    for (int row = 0; row < 64; row += 16) {
      for (int i = 0; i < 16; i++) std::memcpy(sum + i * 8, d + (row + i) * columns + column, 32);
      add_product(sum, a + row * DEPTH, part, DEPTH);
      for (int i = 0; i < 16; i++) std::memcpy(d + (row + i) * columns + column, sum + i * 8, 32);
    }
  }
}

void begin_product(void** args, int) {
  Warpgroup& group = warpgroup();
  const Wide& first = *static_cast<Wide*>(args[0]);
  auto product = std::make_unique<Product>();
  product->columns = first.columns;
  product->place = first.place;
  const int share = first.columns / 2;
  for (int w = 0; w < 4; w++)
    if (!group.fenced[w]) fail("a product without products_fence since the last wait", first.place);
  const Product* before = nullptr;  // the latest that adds to the same accumulators
  for (int i = 0; i < WARPGROUP; i++) {
    const Wide& one = *static_cast<Wide*>(args[i]);
    if (one.a_description != first.a_description || one.b != first.b || one.add != first.add)
      fail("multiply_wide: threads of the warpgroup disagree on operands", first.place);
    product->d[i] = one.d, product->a[i] = one.a;
    if (one.a != nullptr) std::memcpy(product->a_was[i], one.a, 16);
    for (const auto& other : group.products) {
      if (other->over[i / WARP]) continue;
      const auto* mine = reinterpret_cast<const char*>(one.d);
      const auto* its = reinterpret_cast<const char*>(other->d[i]);
      if (!overlap(mine, static_cast<size_t>(share) * 4, its, static_cast<size_t>(other->columns) * 2)) continue;
      if (mine != its || other->columns != first.columns)
        fail("a product of another shape is under way in these accumulators", first.place);
      before = other.get();
    }
  }
  std::vector<float> a(64 * DEPTH), b(static_cast<size_t>(first.columns) * DEPTH);
  if (first.a == nullptr) {
    read_operand(first.a_description, 64, "operand a", a.data(), *product);
  } else {
    for (int i = 0; i < WARPGROUP; i++)  // as mma_bf16's, a warp 16 rows ("Register Fragments")
      for (int r = 0; r < 4; r++)
        for (int j = 0; j < 2; j++) {
          const int lane = i % WARP, row = 16 * (i / WARP) + lane / 4 + 8 * (r % 2),
                    column = 2 * (lane % 4) + 8 * (r / 2) + j;
          a[row * DEPTH + column] = to_float(bf16{static_cast<uint16_t>(product->a_was[i][r] >> (16 * j))});
        }
  }
  read_operand(first.b, first.columns, "operand b", b.data(), *product);

  const auto place_of = [&](int i, int r) {  // of register r of thread i in [64][columns]
    const int lane = i % WARP;
    return (16 * (i / WARP) + lane / 4 + 8 * (r / 2 % 2)) * first.columns + 8 * (r / 4) + 2 * (lane % 4) + r % 2;
  };
  std::vector<float> d(static_cast<size_t>(64) * first.columns, 0.0f);
  if (first.add)
    for (int i = 0; i < WARPGROUP; i++)
      for (int r = 0; r < share; r++)
        d[place_of(i, r)] = before != nullptr ? before->result[i * share + r] : product->d[i][r];
  multiply(d.data(), a.data(), b.data(), first.columns);
  product->result.resize(static_cast<size_t>(WARPGROUP) * share);
  for (int i = 0; i < WARPGROUP; i++)
    for (int r = 0; r < share; r++) {
      product->result[i * share + r] = d[place_of(i, r)];
      if (before == nullptr) std::memcpy(&product->d[i][r], &SPOILT, 4);
    }
  group.products.push_back(std::move(product));
}

// Of the running warp, all that its groups up to `last` hold is over.
void end_products(int last, Place place) {
  Warpgroup& group = warpgroup();
  const int w = warp() % 4;
  bool any = false;
  for (size_t n = 0; n < group.products.size(); n++) {
    Product& it = *group.products[n];
    if (it.over[w] || it.group[w] == 0 || it.group[w] > last) continue;
    it.over[w] = any = true;
    for (const Read& read : it.reads)
      if (std::memcmp(read.p, read.was, 16) != 0)
        fail("an operand in shared memory was written while a product of it was under way (" +
                 std::string("begun at line ") + number(it.place.line) + ")",
             place);
    const int share = it.columns / 2;
    for (int i = w * WARP; i < (w + 1) * WARP; i++) {
      if (it.a[i] != nullptr && std::memcmp(it.a[i], it.a_was[i], 16) != 0)
        fail("an operand in registers was written while a product of it was under way", place);
      for (int r = 0; r < share; r++)
        if (std::memcmp(&it.d[i][r], &SPOILT, 4) != 0)
          fail("accumulators were written while a product was under way", place);
      bool goes_on = false;
      for (size_t m = n + 1; m < group.products.size(); m++) goes_on |= group.products[m]->d[i] == it.d[i];
      if (!goes_on) std::memcpy(it.d[i], &it.result[i * share], static_cast<size_t>(share) * 4);
    }
  }
  if (any) group.fenced[w] = false;
  while (!group.products.empty()) {
    const auto& over = group.products.front()->over;
    if (!(over[0] && over[1] && over[2] && over[3])) break;
    group.products.pop_front();
  }
}

}  // namespace

// ---- of the running thread: barriers --------------------------------------------------------------------------------

void barrier_init(Barrier* b, int count, Place place) {
  check_alignment(b, 8, "barrier_init", place);
  shared_number(b, place);
  if (count < 1 || count > MOST) fail("barrier_init: expected 1 to 2^20 - 1 arrivals, got " + number(count), place);
  if (model.barriers.count(b) != 0) fail("barrier_init: the barrier was made before", place);
  b->bits = MADE;
  State it;
  it.count = it.pending = count;
  it.rank = cluster_rank();
  model.barriers[b] = it;
}

void fence_barriers() {
  for (auto& [b, it] : model.barriers)
    if (it.rank == cluster_rank()) it.known = true;
  fence_async();
}

void barrier_arrive(Barrier* b, int rank, int64_t expected, Place place) {
  Barrier* at = rank < 0 ? b : in_block(rank, b, place);
  State& it = state_of(at, place);
  if (it.pending == 0) fail("more arrivals than the barrier counts (" + number(it.count) + ")", place);
  it.bytes += expected;
  if (it.bytes > MOST) fail("a barrier expects at most 2^20 - 1 bytes", place);
  it.pending--;
  if (it.pending == 0 && it.bytes < 0) fail("more bytes reach a barrier than it expects", place);
  settle(it);
}

void barrier_wait(Barrier* b, int parity, Place place) {
  if (parity != 0 && parity != 1) fail("barrier_wait: a parity is 0 or 1, got " + number(parity), place);
  state_of(b, place);
  struct Wait {
    State* it;
    uint32_t parity;
  } wait = {&model.barriers[b], static_cast<uint32_t>(parity)};
  wait_until(
      [](void* context) {
        const auto* mine = static_cast<Wait*>(context);
        return mine->it->phase % 2 != mine->parity;
      },
      &wait, parity == 0 ? "barrier_wait, parity 0" : "barrier_wait, parity 1", place);
}

// ---- copies ---------------------------------------------------------------------------------------------------------

void fence_async() {
  for_each_piece([](Memory piece) { model.seen[piece.data].assign(piece.data, piece.data + piece.bytes); });
}

void copy_tile(void* to, const TensorMap& map, int column, int row, Barrier* b, uint32_t blocks, Place place) {
  const uint32_t start = shared_number(to, place), row_bytes = map.box[0] * 2;
  if (start % 128 != 0) fail("copy_tile: the target must begin at a multiple of 128 bytes", place);
  if (map.swizzle != Swizzle::none && start % (8 * row_bytes) != 0)
    fail("copy_tile: the target begins at " + number(start) + ", rows swizzled by " + number(row_bytes) +
             " bytes at a multiple of " + number(8 * row_bytes),
         place);
  if (column < 0 || row < 0) fail("copy_tile: a box that begins before the tensor, which nothing here means to do", place);
  if (blocks == 0 || blocks >> cluster_blocks() != 0) fail("copy_tile: the cluster has no such blocks", place);
  const int64_t bytes = int64_t{map.box[1]} * row_bytes;
  Statistics& c = counts();
  c.copies++, c.copied_bytes += bytes;  // read once, whoever gets it
  for (int rank = 0; rank < cluster_blocks(); rank++) {
    if ((blocks >> rank & 1) == 0) continue;
    Copy copy;
    copy.first = at_number(rank, start, static_cast<size_t>(bytes), place);
    const Memory piece = piece_of(copy.first);
    c.shared_bytes_written += bytes;
    copy.piece = piece.data, copy.bytes = bytes, copy.rank = rank, copy.who = who(), copy.place = place;
    copy.barrier = in_block(rank, b, place);
    if (!state_of(copy.barrier, place).known)
      fail("copy_tile: a barrier that copies do not know of (fence_barriers)", place);
    auto& seen = seen_of(piece);
    for (uint32_t r = 0; r < map.box[1]; r++)
      for (uint32_t unit = 0; unit < row_bytes / 16; unit++) {
        const uint32_t number = swizzled(start + r * row_bytes + unit * 16, map.swizzle);
        char* p = at_number(rank, number, 16, place);
        const int64_t at_row = int64_t{row} + r, at_column = int64_t{column} + unit * 8;
        const auto size = [&](int i) { return static_cast<int64_t>(map.size[i]); };
        const int64_t valid = at_row < size(1) ? std::min<int64_t>(8, size(0) - at_column) : 0;
        copy.to.push_back({static_cast<uint32_t>(p - piece.data),
                           valid > 0 ? map.data + at_row * static_cast<int64_t>(map.row_bytes) + 2 * at_column : nullptr});
        copy.valid.push_back(valid > 0 ? static_cast<int>(2 * valid) : 0);
        if (std::memcmp(&seen[p - piece.data], p, 16) != 0)
          fail("copy_tile: over what plain stores wrote, without fence_async", place);
      }
    for (const Copy& other : model.copies)
      if (overlap(copy.first, static_cast<size_t>(bytes), other.first, static_cast<size_t>(other.bytes)))
        fail("copy_tile: over another copy that is under way", place);
    for (const auto& [key, group] : model.warpgroups)
      for (const auto& product : group.products)
        for (const Read& read : product->reads)
          if (overlap(copy.first, static_cast<size_t>(bytes), read.p, 16))
            fail("copy_tile: over an operand of a product that is under way", place);
    for (const auto& [at, from] : copy.to) std::memset(copy.piece + at, 0xff, 16), std::memset(&seen[at], 0xff, 16);
    model.copies.push_back(std::move(copy));
    if (settings.schedule == Schedule::reverse) {  // at once
      const Copy now = std::move(model.copies.back());
      model.copies.pop_back();
      arrive(now);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

void products_fence(Place place) {
  meet(false, "products_fence", place, nullptr, [](void**, int) { warpgroup().fenced[warp() % 4] = true; });
}

void multiply_wide(const Wide& part) {
  Wide mine = part;
  meet_warpgroup("multiply_wide", part.place, &mine, begin_product);
}

void products_commit(Place place) {
  meet(false, "products_commit", place, nullptr, [](void**, int) {
    Warpgroup& group = warpgroup();
    const int w = warp() % 4, number = ++group.groups[w];
    for (const auto& product : group.products)
      if (product->group[w] == 0) product->group[w] = number;
  });
}

void products_wait(int pending, Place place) {
  struct Wait {
    int pending;
    Place place;
  } mine = {pending, place};
  meet(false, "products_wait", place, &mine, [](void** args, int) {
    const auto* one = static_cast<Wait*>(args[0]);
    end_products(warpgroup().groups[warp() % 4] - one->pending, one->place);
  });
}

// ---- registers ------------------------------------------------------------------------------------------------------

void change_registers(int each, bool up, Place place) {
  if (each < 24 || each > 256 || each % 8 != 0)
    fail("registers: expected a multiple of 8 from 24 to 256, got " + number(each), place);
  Registers& it = model.registers[cluster_rank()];
  if (it.each.empty()) {  // a processor's 65,536, shared out evenly
    const int groups = (block_threads() + WARPGROUP - 1) / WARPGROUP, even = std::min(65536 / block_threads() / 8 * 8, 255);
    it.each.assign(groups, even);
    it.free = 65536 - int64_t{even} * block_threads();
  }
  const int group = thread() / WARPGROUP;
  if (up ? each < it.each[group] : each > it.each[group])
    fail("registers: from " + number(it.each[group]) + " to " + number(each) + " is the other direction", place);
  struct Change {
    Registers* it;
    int group, each;
  } change = {&it, group, each};
  meet_warpgroup(up ? "registers_up" : "registers_down", place, nullptr, nullptr);
  wait_until(
      [](void* context) {
        const auto* mine = static_cast<Change*>(context);
        int& now = mine->it->each[mine->group];
        const int64_t needed = int64_t{mine->each - now} * WARPGROUP;
        if (needed > mine->it->free) return false;
        mine->it->free -= needed;
        now = mine->each;
        return true;
      },
      &change, up ? "registers_up" : "registers_down", place);
}

// ---- beside the threads ---------------------------------------------------------------------------------------------

const Beside hopper = {
    [] { model = Model(); },
    [] {
      if (model.copies.empty()) return false;
      const Copy oldest = std::move(model.copies.front());
      model.copies.pop_front();
      arrive(oldest);
      return true;
    },
    [] {
      for (const auto& product : warpgroup().products)
        if (!product->over[warp() % 4]) fail("a product is never waited for", product->place);
    },
    [] {
      if (!model.copies.empty()) fail_copy(model.copies.front(), "a copy is under way when its block ends");
    },
};

}  // namespace writesae::tile::twin
