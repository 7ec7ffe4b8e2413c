// Which parameters are alike: what is true of one (dtypes, layouts, kinds of state) then need not be asked of the others.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "tensors.h"

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

namespace fusedopt {

// Of parameters that are ordinary: exact tensors, dense, with a gradient and state in the same layout or one number each.
class Survey {
 public:
  // One per parameter each: a number, equal for those that are alike, `unlike` for what is not ordinary and `absent` for
  // one without a gradient; the gradient, and a copy of the state; these are None where the number is below zero. All
  // are of one moment: no other thread comes between.
  static constexpr int64_t unlike = -1, absent = -2;
  std::vector<int64_t> kinds;
  py::list grads, states;

  Survey(const py::list& params, const py::list& given) {
    std::map<std::vector<uintptr_t>, int64_t> known;
    for (size_t i = 0; i < params.size() && i < given.size(); ++i) {
      py::object grad = py::none(), copy = py::none();
      int64_t kind = unlike;
      if (PyObject* param = PyList_GET_ITEM(params.ptr(), i); THPVariable_Check(param) && THPVariable_CheckTypeExact(Py_TYPE(param))) {
        if (!grad_of(tensor(param)).defined()) {
          kind = absent;
        } else if (describe(tensor(param), PyList_GET_ITEM(given.ptr(), i))) {
          kind = known.emplace(words_, known.size()).first->second;
          const at::Tensor held = grad_of(tensor(param)); // what Python collects as it makes an object may drop it
          grad = py::reinterpret_steal<py::object>(THPVariable_Wrap(held));
          PyObject* state = PyList_GET_ITEM(given.ptr(), i);
          copy = py::reinterpret_steal<py::object>(state == Py_None ? PyDict_New() : PyDict_Copy(state));
        }
      }
      kinds.push_back(kind);
      grads.append(grad);
      states.append(copy);
    }
  }

 private:
  enum Tag : uintptr_t { object, real, whole, per_element, single };
  std::vector<uintptr_t> words_; // all that makes a parameter another kind

  void add(uintptr_t word) { words_.push_back(word); }

  bool describe(const at::Tensor& whole, PyObject* state) {
    words_.clear();
    const at::TensorImpl& param = *whole.unsafeGetTensorImpl();
    const at::Tensor& its_grad = grad_of(whole);
    const at::TensorImpl& grad = *its_grad.unsafeGetTensorImpl();
    if (dropped(its_grad) || param.is_python_dispatch() || !param.is_non_overlapping_and_dense() ||
        !ordinary(param, param) || !ordinary(grad, param) || !equal(grad.sizes(), param.sizes()) || !same_layout(grad, param) ||
        overlap(grad, param))
      return false;
    add(param.key_set().raw_repr());
    add(static_cast<uintptr_t>(param.device().type()) << 8 | static_cast<uint8_t>(param.device().index()));
    add(static_cast<uintptr_t>(scalar_type(param)) << 8 | static_cast<uintptr_t>(scalar_type(grad)));
    add((param.dim() == 0) << 1 | (param.numel() == 0));
    if (state == Py_None)
      return true;
    if (!PyDict_CheckExact(state))
      return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(state, &position, &key, &value)) {
      add(reinterpret_cast<uintptr_t>(key));
      if (!describe_entry(param, value))
        return false;
    }
    return true;
  }

  bool describe_entry(const at::TensorImpl& param, PyObject* value) {
    uintptr_t word = 0;
    if (PyFloat_CheckExact(value)) {
      const double number = PyFloat_AS_DOUBLE(value);
      std::memcpy(&word, &number, sizeof(word));
      add(real);
    } else if (PyLong_CheckExact(value)) {
      int overflow = 0;
      word = static_cast<uintptr_t>(PyLong_AsLongLongAndOverflow(value, &overflow));
      if (overflow)
        return false;
      add(whole);
    } else if (THPVariable_Check(value)) {
      if (!THPVariable_CheckTypeExact(Py_TYPE(value)))
        return false;
      const at::TensorImpl& t = *tensor(value).unsafeGetTensorImpl();
      const bool like = equal(t.sizes(), param.sizes());
      if (!ordinary(t, param) || (like ? !same_layout(t, param) : t.dim() != 0))
        return false;
      word = static_cast<uintptr_t>(scalar_type(t));
      add(like ? per_element : single);
    } else if (value == Py_None || PyBool_Check(value) || PyUnicode_CheckExact(value)) {
      word = reinterpret_cast<uintptr_t>(value);
      add(object);
    } else {
      return false;
    }
    add(word);
    return true;
  }

  static bool ordinary(const at::TensorImpl& t, const at::TensorImpl& param) {
    const void* address;
    return !t.is_python_dispatch() && strided(t, {}) && !negative(t) && t.device() == param.device() &&
           address_of(t, address) && (address || !t.numel());
  }

  static bool overlap(const at::TensorImpl& a, const at::TensorImpl& b) {
    return std::abs(address(a) - address(b)) < static_cast<intptr_t>(a.numel() * std::max(a.itemsize(), b.itemsize()));
  }
};

} // namespace fusedopt
