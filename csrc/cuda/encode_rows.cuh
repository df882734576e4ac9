// The stream of rank-1 additions that one block reads: for each token of a segment its R writes, then the edits after it;
// before them, where the segment is not the first of its sequence, the state it starts from, which is K additions too
// (e_k times row k of the state: a_i = sum_k v_ik (S_k . w_i)). So that anything which can change a running sum is a row.
#pragma once

#include "encode.h"
#include "encode_numbers.cuh"
#include "tile.cuh"

namespace writesae::cuda {

// Tokens [first, last) of sequence n, which begins at token `origin` of [B * T]. n < 0: nothing. Filled on the device: the
// host does not know the lengths of packed sequences.
struct Segment {
  int n, first, last, origin;
  int final;  // the sequence ends here
};

struct Row {
  enum Kind : int { none, write, edit, state };
  int kind;
  int token;   // of the sequence
  int sub;     // which write of the token, which edit of all, which row of the state
  float gate;  // what the running sum is multiplied by first
  bool whole;  // the token's last row
};

// A vector in device memory.
struct Source {
  const void* data;
  Element type;
};

__device__ __forceinline__ float element(const Source& x, int i, int size) {
  return i < size ? load_element(x.data, x.type, i) : 0.0f;
}

// Zeros with a one in the middle, so that unit vectors and the zero vector lie in memory as all others do.
constexpr int UNIT_SIZE = 512;  // floats

class Stream {
 public:
  // state [K, V] that the segment starts from, or null.
  __device__ Stream(const EncodeParams& p, const Segment& segment, int head, const float* state, const float* unit)
      : p_(p),
        segment_(segment),
        head_(head),
        state_(state),
        unit_(unit),
        state_rows_(state != nullptr ? static_cast<int>(p.K) : 0) {
    edit_ = first_edit<int>(p.edits, segment.n, head, segment.first);
    edits_ = first_edit<int>(p.edits, segment.n, head, segment.last) - edit_;
    rows_ = state_rows_ + (segment.last - segment.first) * static_cast<int>(p.R) + edits_;
  }

  __device__ int rows() const { return rows_; }
  __device__ int state_rows() const { return state_rows_; }

  __device__ Row row(int i) const {
    if (i >= rows_) return {Row::none, 0, 0, 1.0f, false};
    if (i < state_rows_) return {Row::state, 0, i, 1.0f, false};
    const int R = static_cast<int>(p_.R);
    i -= state_rows_;
    int before = 0;  // edits among the rows before this one
    if (edits_ > 0) {
      int high = edits_;
      while (before < high) {
        const int middle = (before + high) / 2;
        if (place(middle) < i) {
          before = middle + 1;
        } else {
          high = middle;
        }
      }
      if (before < edits_ && place(before) == i) {
        const int token = position(before);
        return {Row::edit, token, edit_ + before, 1.0f, !(before + 1 < edits_ && position(before + 1) == token)};
      }
    }
    const int token = segment_.first + (i - before) / R, sub = (i - before) % R;
    const bool whole = sub == R - 1 && !(before < edits_ && position(before) == token);
    const float gate = sub == 0 ? tile::exponential(p_.decay[(segment_.origin + int64_t{token}) * p_.H + head_]) : 1.0f;
    return {Row::write, token, sub, gate, whole};
  }

  __device__ Source left(int kind, int token, int sub) const {
    if (kind == Row::write) return at(p_.left, token, head_ / static_cast<int>(p_.H / p_.Hl), sub);
    if (kind == Row::edit) return {p_.edits.left + sub * p_.K, Element::f32};
    return {kind == Row::state ? unit_ + UNIT_SIZE / 2 - sub : unit_, Element::f32};
  }
  __device__ Source right(int kind, int token, int sub) const {
    if (kind == Row::write) return at(p_.right, token, head_, sub);
    if (kind == Row::edit) return {p_.edits.right + sub * p_.V, Element::f32};
    return {kind == Row::state ? state_ + sub * p_.V : unit_, Element::f32};
  }

 private:
  __device__ Source at(const View& x, int token, int head, int sub) const {
    const bool packed = p_.cu_seqlens != nullptr;
    const int64_t offset = (packed ? 0 : segment_.n) * x.stride[0] +
                           ((packed ? segment_.origin : 0) + int64_t{token}) * x.stride[1] + head * x.stride[2] +
                           sub * x.stride[3];
    return {static_cast<const char*>(x.data) + offset * (x.type == Element::f32 ? 4 : 2), x.type};
  }
  __device__ int position(int e) const { return static_cast<int>(p_.edits.index[4 * (edit_ + e) + 1]); }
  // Rows of writes and edits before edit e: a token's edits come after its writes.
  __device__ int place(int e) const { return (position(e) - segment_.first + 1) * static_cast<int>(p_.R) + e; }

  const EncodeParams& p_;
  const Segment& segment_;
  int head_;
  const float *state_, *unit_;
  int state_rows_, edit_, edits_, rows_;
};

}  // namespace writesae::cuda
