// The edits of a call, from tensors, checked.
#pragma once

#include "edits.h"
#include "tensors.h"

namespace writesae {

// Shapes are checked again here, though the Python wrapper says more: a torch.ops call must not read out of bounds.
inline EditList edit_list(const char* op, const std::optional<Tensor>& index, const std::optional<Tensor>& left,
                          const std::optional<Tensor>& right, int64_t rows, const std::vector<int64_t>& lengths, int64_t H,
                          int64_t K, int64_t V, std::vector<Tensor>& keep) {
  EditList edits;
  if (!index.has_value()) return edits;
  STD_TORCH_CHECK(left.has_value() && right.has_value(), op, ": edit_index needs edit_left and edit_right");
  STD_TORCH_CHECK(index->dim() == 2, op, ": edit_index must be [E, 4]");
  edits.count = index->size(0);
  check_shape(op, "edit_index", *index, {edits.count, 4});
  check_shape(op, "edit_left", *left, {edits.count, K});
  check_shape(op, "edit_right", *right, {edits.count, V});
  check_dtype(op, "edit_index", *index, ScalarType::Long);
  edits.index = static_cast<const int64_t*>(data_as(op, "edit_index", index, ScalarType::Long, keep));
  edits.left = static_cast<const float*>(data_as(op, "edit_left", left, ScalarType::Float, keep));
  edits.right = static_cast<const float*>(data_as(op, "edit_right", right, ScalarType::Float, keep));
  for (int64_t e = 0; READABLE && e < edits.count; e++) {
    const int64_t* x = edits.index + 4 * e;
    const int64_t* y = x - 4;  // the edit before
    STD_TORCH_CHECK(x[0] >= 0 && x[0] < rows && x[2] >= 0 && x[2] < H && edits.kind(e).known(), op, ": edit ", e,
                    " is out of range: row ", x[0], ", head ", x[2], ", kind ", x[3]);
    STD_TORCH_CHECK(lengths.empty() || (x[1] >= 0 && x[1] < lengths[x[0]]), op, ": edit ", e, " has position ", x[1],
                    " outside its row");
    STD_TORCH_CHECK(e == 0 || y[0] < x[0] || (y[0] == x[0] && (y[2] < x[2] || (y[2] == x[2] && y[1] <= x[1]))), op,
                    ": edits must be sorted by (row, head, position)");
  }
  return edits;
}

}  // namespace writesae
