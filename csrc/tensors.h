// What a tensor is and where its elements are: read without calls, as every step does it for every tensor.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace fusedopt {

inline const at::Tensor& tensor(PyObject* item) { return THPVariable_Unpack(item); }

// Whether it is a tensor, and no wrapper that has its elements elsewhere or nowhere.
inline bool own_memory(PyObject* item) {
  return THPVariable_Check(item) &&
         (THPVariable_CheckTypeExact(Py_TYPE(item)) || !tensor(item).unsafeGetTensorImpl()->is_python_dispatch());
}

// The tensor's gradient. Tensor::grad() asks first whether it is a leaf, for the sake of a warning.
inline const at::Tensor& grad_of(const at::Tensor& t) {
  static const at::Tensor undefined;
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(t.unsafeGetTensorImpl()->autograd_meta());
  return meta ? meta->grad_ : undefined;
}

// Whether another thread is dropping this gradient. It lets go of the GIL while the memory is freed, and till it has the
// GIL again the parameter refers to what is no more, where the count of references is zero at first and anything later.
inline bool dropped(const at::Tensor& grad) {
  const size_t references = grad.use_count();
  return !references || references > (1 << 16);
}

// Whether it is a stride through memory of its own: a tensor with the dispatch keys of one that is (`like`) is too.
inline bool strided(const at::TensorImpl& t, c10::DispatchKeySet like) {
  return t.key_set() == like || (t.has_storage() && t.layout() == at::kStrided);
}

// torch has real tensors whose memory holds their negative.
inline bool negative(const at::TensorImpl& t) { return t.key_set().has(c10::DispatchKey::Negative); }

inline bool equal(at::IntArrayRef a, at::IntArrayRef b) { // of few: calling memcmp takes longer
  if (a.size() != b.size())
    return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i] != b[i])
      return false;
  return true;
}

inline at::ScalarType scalar_type(const at::TensorImpl& t) { return c10::typeMetaToScalarType(t.dtype()); }

// Where its first element is, if its storage is as large as a dense tensor needs: it may have been freed or cut.
inline bool address_of(const at::TensorImpl& t, const void*& address) {
  const c10::StorageImpl& storage = *t.unsafe_storage().unsafeGetStorageImpl();
  const int64_t before = t.storage_offset() * static_cast<int64_t>(t.itemsize());
  address = static_cast<const char*>(storage.data()) + before;
  if (!t.numel())
    return true;
  return static_cast<int64_t>(storage.nbytes()) >= before + t.numel() * static_cast<int64_t>(t.itemsize());
}

inline intptr_t address(const at::TensorImpl& t) {
  const void* found;
  address_of(t, found);
  return reinterpret_cast<intptr_t>(found);
}

// Whether flat position i is the same element in both, which have the same sizes.
inline bool same_layout(const at::TensorImpl& a, const at::TensorImpl& b) {
  const auto x = a.strides(), y = b.strides(), sizes = b.sizes();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (x[i] != y[i] && sizes[i] != 1)
      return false;
  return true;
}

// From where to where tensors lie in memory, with all that their strides pass over.
class Spans {
 public:
  void add(const at::TensorImpl& t) {
    if (const Span span = of(t); span.first < span.second)
      spans_.push_back(span);
  }

  // To be called before the others: brings them into order. Whether no two of them have memory in common.
  bool sort() {
    std::sort(spans_.begin(), spans_.end());
    bool disjoint = true;
    for (size_t k = 1; k < spans_.size(); ++k) {
      disjoint &= spans_[k].first >= spans_[k - 1].second;
      spans_[k].second = std::max(spans_[k].second, spans_[k - 1].second); // where all up to each end
    }
    return disjoint;
  }

  bool meet(const at::TensorImpl& t) const {
    const Span span = of(t);
    const auto after = std::lower_bound(spans_.begin(), spans_.end(), Span(span.second, INTPTR_MIN));
    return span.first < span.second && after != spans_.begin() && std::prev(after)->second > span.first;
  }

 private:
  using Span = std::pair<intptr_t, intptr_t>;
  std::vector<Span> spans_;

  static Span of(const at::TensorImpl& t) {
    intptr_t last = 1;
    for (int64_t i = 0; i < t.dim(); ++i)
      last += (t.sizes()[i] - 1) * t.strides()[i];
    const intptr_t first = t.numel() ? address(t) : 0;
    return {first, first ? first + last * static_cast<intptr_t>(t.itemsize()) : 0};
  }
};

} // namespace fusedopt
