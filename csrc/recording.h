// What a step looked like, so that the next one can be checked against it and run without any Python per tensor.
//
// `check` answers whether everything that decides a step is as it was: the same groups with the same parameters, the
// same hyperparameter flags, gradients where there were gradients, state dicts with the same entries, tensors with the
// same memory, dtype and strides. On the way it reads what may change on every step: the numbers among the
// hyperparameters, and where the gradients lie. Any doubt is a no; the caller then does the step the long way.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace fusedopt {

class Recording {
 public:
  // groups: the param groups. rows: (param, state dict, row address, param column, grad column, param is written,
  // scalar set, entries), an entry being (key, value, kind, column, is written). hypers: per group, in its dict's order,
  // (key, parts), a part being (index in a tuple or -1, cell or -1, may be negative, value); no parts for "params".
  Recording(const py::list& groups, const py::list& absent, const py::list& rows, const py::list& hypers) {
    for (size_t g = 0; g < groups.size(); ++g)
      groups_.push_back(read_group(groups[g].cast<py::dict>(), hypers[g].cast<py::list>()));
    for (const auto& item : absent)
      absent_.push_back(tensor(item));
    for (const auto& item : rows)
      rows_.push_back(read_row(item.cast<py::tuple>()));
  }

  // Whether the step is as recorded. Writes the numbers to `hypers`, and gradient pointers to the row table.
  bool check(const py::list& groups, uintptr_t hypers) const {
    if (static_cast<size_t>(PyList_GET_SIZE(groups.ptr())) != groups_.size())
      return false;
    auto* numbers = reinterpret_cast<double*>(hypers);
    for (size_t g = 0; g < groups_.size(); ++g)
      if (PyList_GET_ITEM(groups.ptr(), g) != groups_[g].dict.ptr() || !check_group(groups_[g], numbers))
        return false;
    for (const at::Tensor& param : absent_)
      if (param.grad().defined())
        return false;
    for (size_t i = 0; i < rows_.size(); ++i) {
      prefetch(i);
      if (!check_row(rows_[i]))
        return false;
    }
    return true;
  }

  // After the launch: new numbers into the state dicts (`numbers[column][set]`), version counters up.
  void commit(const py::list& numbers) {
    for (Row& row : rows_) {
      bump(row.param, row.written);
      for (Entry& entry : row.entries) {
        if (entry.kind == Kind::tensor)
          bump(entry.tensor, entry.written);
        if (entry.kind != Kind::number)
          continue;
        PyObject* value = PyList_GET_ITEM(PyList_GET_ITEM(numbers.ptr(), entry.column), row.set);
        if (PyDict_SetItem(row.state.ptr(), entry.key.ptr(), value) != 0)
          throw py::error_already_set();
        entry.value = py::reinterpret_borrow<py::object>(value);
      }
    }
  }

 private:
  enum class Kind { same = 0, tensor = 1, number = 2 };

  struct Part {
    int64_t index, cell;
    bool is_signed;
    py::object value;
  };
  struct Hyper {
    py::object key;
    std::vector<Part> parts;
  };
  struct Group {
    py::dict dict;
    std::vector<py::object> params;
    std::vector<Hyper> hypers;
  };
  struct Entry {
    py::object key, value;
    Kind kind;
    int64_t column;
    bool written;
    at::Tensor tensor;
    at::ScalarType dtype;
  };
  struct Row {
    at::Tensor param;
    py::dict state;
    int64_t* words;
    int64_t param_column, grad_column;
    bool written;
    int64_t set, numel;
    const void* data;
    at::ScalarType dtype, grad_dtype;
    std::vector<int64_t> strides;
    std::vector<Entry> entries;
  };

  // After a training step nothing of this is in cache. Pointers are followed a few rows early, one link at a time.
  void prefetch(size_t i) const {
    static constexpr size_t far = 12, middle = 8, near = 4;
    if (i + far < rows_.size()) {
      const Row& row = rows_[i + far];
      __builtin_prefetch(row.param.unsafeGetTensorImpl());
      __builtin_prefetch(row.state.ptr());
      __builtin_prefetch(row.entries.data());
    }
    if (i + middle < rows_.size()) {
      const Row& row = rows_[i + middle];
      __builtin_prefetch(row.param.unsafeGetTensorImpl()->autograd_meta());
      __builtin_prefetch(reinterpret_cast<PyDictObject*>(row.state.ptr())->ma_keys);
      for (const Entry& entry : row.entries)
        if (entry.kind == Kind::tensor)
          __builtin_prefetch(entry.tensor.unsafeGetTensorImpl());
    }
    if (i + near < rows_.size() && rows_[i + near].param.grad().defined())
      __builtin_prefetch(rows_[i + near].param.grad().unsafeGetTensorImpl());
  }

  static const at::Tensor& tensor(py::handle item) {
    if (!THPVariable_Check(item.ptr()))
      throw py::type_error("a Recording holds tensors");
    return THPVariable_Unpack(item.ptr());
  }

  static Group read_group(const py::dict& dict, const py::list& hypers) {
    Group group{dict, {}, {}};
    for (const auto& p : dict["params"].cast<py::list>())
      group.params.push_back(py::reinterpret_borrow<py::object>(p));
    for (const auto& item : hypers) {
      const auto pair = item.cast<py::tuple>();
      Hyper hyper{pair[0], {}};
      for (const auto& part : pair[1].cast<py::list>()) {
        const auto t = part.cast<py::tuple>();
        hyper.parts.push_back({t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<bool>(), t[3]});
      }
      group.hypers.push_back(std::move(hyper));
    }
    return group;
  }

  static Row read_row(const py::tuple& t) {
    const at::Tensor& param = tensor(t[0]);
    Row row{param, t[1].cast<py::dict>(), reinterpret_cast<int64_t*>(t[2].cast<uintptr_t>()), t[3].cast<int64_t>(),
            t[4].cast<int64_t>(), t[5].cast<bool>(), t[6].cast<int64_t>(), param.numel(), param.const_data_ptr(),
            param.scalar_type(), param.grad().scalar_type(), param.strides().vec(), {}};
    for (const auto& item : t[7].cast<py::list>()) {
      const auto e = item.cast<py::tuple>();
      Entry entry{e[0], e[1], static_cast<Kind>(e[2].cast<int>()), e[3].cast<int64_t>(), e[4].cast<bool>(), {}, {}};
      if (entry.kind == Kind::tensor) {
        entry.tensor = tensor(entry.value);
        entry.dtype = entry.tensor.scalar_type();
      }
      row.entries.push_back(std::move(entry));
    }
    return row;
  }

  // Dicts are walked in their order: no hashing, and a new or missing key shows by itself.
  static bool check_group(const Group& group, double* numbers) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Hyper& hyper : group.hypers) {
      if (!PyDict_Next(group.dict.ptr(), &position, &key, &value) || key != hyper.key.ptr())
        return false;
      if (hyper.parts.empty() ? !same_params(group, value) : !check_hyper(hyper, value, numbers))
        return false;
    }
    return !PyDict_Next(group.dict.ptr(), &position, &key, &value);
  }

  static bool same_params(const Group& group, PyObject* params) {
    if (!PyList_CheckExact(params) || static_cast<size_t>(PyList_GET_SIZE(params)) != group.params.size())
      return false;
    for (size_t i = 0; i < group.params.size(); ++i)
      if (PyList_GET_ITEM(params, i) != group.params[i].ptr())
        return false;
    return true;
  }

  static bool check_hyper(const Hyper& hyper, PyObject* value, double* numbers) {
    const bool tuple = hyper.parts[0].index >= 0;
    if (tuple && (!PyTuple_CheckExact(value) || static_cast<size_t>(PyTuple_GET_SIZE(value)) != hyper.parts.size()))
      return false;
    for (const Part& part : hyper.parts)
      if (!check_part(part, tuple ? PyTuple_GET_ITEM(value, part.index) : value, numbers))
        return false;
    return true;
  }

  static bool check_part(const Part& part, PyObject* value, double* numbers) {
    if (part.cell < 0)
      return value == part.value.ptr();
    if (Py_TYPE(value) != Py_TYPE(part.value.ptr()))
      return false;
    const double x = PyFloat_CheckExact(value) ? PyFloat_AS_DOUBLE(value) : PyLong_AsDouble(value);
    if (std::isnan(x) || (x < 0 && !part.is_signed) || PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return false;
    }
    numbers[part.cell] = x;
    return true;
  }

  bool check_row(const Row& row) const {
    const at::Tensor& grad = row.param.grad();
    if (row.param.const_data_ptr() != row.data || row.param.scalar_type() != row.dtype ||
        row.param.numel() != row.numel || row.param.strides() != at::IntArrayRef(row.strides) || !grad.defined() ||
        grad.scalar_type() != row.grad_dtype || grad.layout() != at::kStrided || !grad.device().is_cpu() ||
        grad.sizes() != row.param.sizes() || grad.strides() != row.param.strides())
      return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const Entry& entry : row.entries) {
      if (!PyDict_Next(row.state.ptr(), &position, &key, &value) || key != entry.key.ptr() ||
          value != entry.value.ptr())
        return false;
      if (entry.kind == Kind::tensor && entry.column >= 0 &&
          (reinterpret_cast<int64_t>(entry.tensor.const_data_ptr()) != row.words[entry.column] ||
           entry.tensor.scalar_type() != entry.dtype))
        return false;
    }
    if (PyDict_Next(row.state.ptr(), &position, &key, &value))
      return false;
    if (row.grad_column >= 0)
      row.words[row.grad_column] = reinterpret_cast<int64_t>(grad.const_data_ptr());
    return true;
  }

  static void bump(const at::Tensor& t, bool written) {
    if (written && !t.is_inference()) // inference tensors have no counter
      t.unsafeGetTensorImpl()->bump_version();
  }

  std::vector<Group> groups_;
  std::vector<at::Tensor> absent_;
  std::vector<Row> rows_;
};

} // namespace fusedopt
