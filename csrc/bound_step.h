// A step of known structure: what it depends on is read anew each time, compared with what the kernels were made for, and
// launched, all in one call and without Python work per tensor.
//
// Guards are what would take another kernel: which parameters, groups and state entries there are, dtypes, sizes, flags.
// Inputs are what may be different in every step: the addresses of parameters, gradients and state, which gradients are
// there, the numbers in groups and in the state. A gradient in another layout is copied. `step` says nothing if it has
// done the step, else why not, having changed nothing that counts; the caller then binds anew.
//
// Tensors and dicts are not owned: the garbage collector could not see through to them, and a parameter that refers to
// its optimizer would live forever. What was found in the groups is alive; the caller vouches for the state dicts
// (opt.state counts its changes) or has them looked up; a state tensor was found in its dict. From there to the end of the
// step their memory is owned, or the GIL kept: other threads may do with the tensors what they like.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/COW.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "launch.h"
#include "scalars.h"
#include "tensors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

namespace fusedopt {

// What a step depends on, as the caller describes it. Kernels are made for buckets: rows of one group with one program.

// A hyperparameter of a group, or one place in a tuple or list of them.
struct Hyper {
  py::object key;
  int64_t index;     // in the tuple or list; -1: the value itself
  py::object value;  // what it was: flags stay that, tensors keep dtype and device
  int64_t cell;      // where its number goes; -1: it is no number
  double lowest;     // that the number may be
  std::vector<uintptr_t> words; // in the tables, for the address of a tensor that kernels read
  py::object container;         // the type of the tuple or list
  Scalar::Type type = Scalar::Type::real;
};

struct Group {
  std::vector<PyObject*> params; // not owned
  std::vector<py::object> keys;  // "params" among them
  std::vector<Hyper> hypers;     // in the order of the keys; what nobody is handed is not among them
};

// An entry of a parameter's state.
struct Entry {
  // The object itself, or what a dict or list there has under the key `inner`, or an object of the type `owner` as an
  // attribute; its entries follow one another.
  // Of tensors: a number per element, one for all, one for each place along some dimensions, others.
  enum class Kind { flag, number, element, whole, part, other, ignored };
  py::object key;
  Kind kind;
  py::object value; // a flag's; a number's, for its type; of tensors the dtype
  int64_t column;   // of its address in the table; -1: kernels do not take it
  bool written;
  bool nested = false;
  py::object inner{};
  py::object owner{}; // None for dicts and lists
  int64_t extra = -1; // which of the step's extra tensors it is, and none of the state; these entries come last
  Scalar::Type type = Scalar::Type::real;
  std::optional<at::ScalarType> dtype;
  std::optional<at::ScalarType> held{}; // of a number that a tensor on the host holds, the dtype
};

// A dict or list, or the dict of an object's attributes, which that keeps; null if it has none.
inline PyObject* contents(PyObject* container) {
  if (!container || PyDict_Check(container) || PyList_CheckExact(container))
    return container;
  PyObject* own = PyObject_GenericGetDict(container, nullptr);
  if (!own)
    PyErr_Clear();
  Py_XDECREF(own);
  return own;
}
// What a dict or list has under a key; null if it has not.
inline PyObject* within(PyObject* container, PyObject* key) {
  if (PyDict_Check(container))
    return PyDict_GetItemWithError(container, key);
  const Py_ssize_t i = PyLong_Check(key) ? PyLong_AsSsize_t(key) : -1;
  return PyList_CheckExact(container) && i >= 0 && i < PyList_GET_SIZE(container) ? PyList_GET_ITEM(container, i) : nullptr;
}
inline bool put_within(PyObject* container, PyObject* key, PyObject* value) {
  if (PyDict_Check(container))
    return PyDict_SetItem(container, key, value) == 0;
  Py_INCREF(value);
  return PyList_SetItem(container, PyLong_AsSsize_t(key), value) == 0;
}

struct Bucket {
  size_t group, launch;
  at::ScalarType param, grad;
  int64_t param_column, grad_column; // -1: kernels do not take it
  bool param_written, grad_written;
  bool looked_at; // callbacks ask for attributes of the parameter
  std::vector<Entry> entries;
  py::object owner; // of the program
  std::vector<std::pair<bool, size_t>> leaves; // of its program: (in the state, number of the entry) or a cell
  std::vector<size_t> outputs;                 // entries that its numbers go to
  bool narrow;                                 // slots become floats
  ScalarProgram* program = nullptr;
  std::vector<size_t> numbers; // entries that are numbers
};

// How a launch is run: here, or by the caller with scalars at `slots`, for rows and scalar sets that stay as they are.
struct Run {
  py::object owner;
  Launch* native;      // null: by the caller
  int64_t* rows;
  int64_t row_words;
  double* slots;       // of the caller's: scalar sets x slots
  bool movable;        // addresses in the table may change, not only those of gradients
};

// A launch that leaves sums of rows that are a main launch's too: words of the table that it takes from there, and those
// with the addresses of its sums.
struct Summing {
  py::object owner;
  Launch* launch;
  size_t of;
  std::vector<std::pair<int64_t, int64_t>> words; // here, there
  std::vector<int64_t> sums;
};

// What has to be known of all parameters before any is stepped: such launches, and the one that joins their sums, if
// there is one.
struct Round {
  std::vector<Summing> summing;
  py::object owner;
  Launch* join;
  bool limits; // whether it takes the largest norm
};

class BoundStep {
 public:
  // params, states, bucket_of, indices: of each row, in the order of tables, launch by launch, `indices` being their
  // places in their groups. absent: parameters without a row, which never had a gradient. graded: rows without a
  // gradient are left out; else no gradient is looked at. rounds: those before the launches; empty where there are none,
  // or the caller runs them.
  BoundStep(std::vector<Group> groups, std::vector<Bucket> buckets, std::vector<Run> runs, const py::list& params,
            const py::list& states, const std::vector<size_t>& bucket_of, const std::vector<int64_t>& indices,
            const py::list& absent, std::vector<Round> rounds, bool graded)
      : graded_(graded), groups_(std::move(groups)), buckets_(std::move(buckets)), runs_(std::move(runs)),
        rounds_(std::move(rounds)) {
    for (Group& group : groups_)
      for (Hyper& hyper : group.hypers)
        read_hyper(hyper);
    for (const auto& p : absent)
      absent_.push_back(checked(p));
    for (Bucket& bucket : buckets_) {
      bucket.program = bucket.owner.cast<ScalarProgram*>();
      for (size_t e = 0; e < bucket.entries.size(); ++e) {
        Entry& entry = bucket.entries[e];
        if (entry.kind == Entry::Kind::number) {
          entry.type = Scalar::from(entry.value).type;
          bucket.numbers.push_back(e);
        } else if (entry.kind != Entry::Kind::flag && entry.kind != Entry::Kind::ignored) {
          entry.dtype = entry.value.cast<at::ScalarType>();
        }
      }
    }
    sets_of_.resize(buckets_.size());
    rows_of_.resize(runs_.size());
    size_t numbers = 0, tensors = 0;
    for (size_t i = 0; i < params.size(); ++i) {
      Row row{checked(params[i]), nullptr, nullptr, bucket_of[i], none, indices[i]};
      row.place = row.index;
      for (size_t g = 0; g < buckets_[row.bucket].group; ++g)
        row.place += static_cast<int64_t>(groups_[g].params.size());
      const Bucket& bucket = buckets_[row.bucket];
      const Run& run = runs_[bucket.launch];
      row.words = run.rows + run.row_words * static_cast<int64_t>(rows_of_[bucket.launch].size());
      rows_of_[bucket.launch].push_back(i);
      if (!run.native)
        row.set = given_set(row);
      const at::Tensor& param = tensor(row.param);
      row.sizes = param.sizes();
      row.strides = param.strides();
      if (own_memory(row.param) && strided(*param.unsafeGetTensorImpl(), {}))
        row.keys = param.key_set();
      row.requires_grad = param.requires_grad();
      row.distributed = !own_memory(row.param) && PyObject_HasAttr(row.param, name("_local_tensor"));
      if (row.distributed)
        row.spec = attribute(row.param, name("_spec"));
      row.first_number = numbers;
      row.first_tensor = tensors;
      numbers += bucket.numbers.size();
      tensors += 2 + bucket.entries.size();
      elements_ += param.numel();
      take_state(row, states[i].ptr());
      distributed_ |= row.distributed;
      rows_.push_back(std::move(row));
    }
    numbers_.resize(numbers);
    found_.resize(tensors);
    owned_.resize(tensors);
  }

  // How many rows each launch had in the last step.
  std::vector<int64_t> stepped() const {
    std::vector<int64_t> out;
    for (const auto& rows : rows_of_)
      out.push_back(std::count_if(rows.begin(), rows.end(), [&](size_t i) { return rows_[i].on; }));
    return out;
  }

  // Does the step as far as launches run here, and returns None; or why it is not a step of this structure, and has
  // changed nothing. `state`: opt.state, which counts its changes. `limit`: the largest norm of all gradients; `measure`
  // is called where the caller runs the rounds, when tables and scalars are those of this step, which is known to be of
  // this structure. `extras`: lists of tensors that callbacks get besides, each with one for every parameter, or None.
  py::object step(const py::list& groups, const py::dict& state, double limit, const py::object& measure,
                  const std::vector<py::list>& extras) {
    if (running_) // in another thread, which uses the tables
      return py::str("another thread is stepping");
    extras_ = &extras;
    const Running running(*this, !measure.is_none() || elements_ > brief);
    where_.clear();
    if (!check(groups, state) || !evaluate())
      return py::str(where_.empty() ? std::string(why_.load()) : where_ + ": " + why_.load());
    arrange();
    const auto alive = measure.is_none() ? std::vector<py::object>() : objects();
    if (!measure.is_none())
      measure();
    commit(); // before the launch, while what it touches is in cache
    if (owning_) {
      py::gil_scoped_release no_gil;
      launch(limit);
    } else {
      launch(limit);
    }
    return py::none();
  }

 private:
  static constexpr size_t none = SIZE_MAX, param_found = 0, grad_found = 1, state_found = 2;
  static constexpr int64_t grain = 128; // rows that are worth a thread
  static constexpr int64_t row_cost = 256; // nanoseconds, at most: with nothing of it in cache
  // Elements that are stepped in less than a millisecond, a fifth of the time that Python lets a thread have the GIL. To
  // keep it serves as well as to count references to what they lie in, which may take as long as the launch.
  static constexpr int64_t brief = 1 << 20;
  static constexpr int64_t ahead = 2;   // rows

  // The time of a step, at the end of which the memory it has used is let go of.
  struct Running {
    BoundStep& bound;
    Running(BoundStep& b, bool owning) : bound(b) {
      bound.running_ = true;
      bound.owning_ = owning;
      bound.why_ = nullptr;
    }
    Running(const Running&) = delete;
    ~Running() {
      if (bound.owning_)
        for (c10::Storage& storage : bound.owned_)
          storage = {};
      bound.held_.clear();
      bound.wrappers_.clear();
      bound.running_ = false;
    }
  };

  struct Row {
    PyObject* param;
    PyObject* state;
    int64_t* words;
    size_t bucket, set;
    int64_t index;     // of the parameter in its group
    int64_t place = 0; // among all parameters
    at::DimVector sizes{}, strides{};
    c10::DispatchKeySet keys{};
    bool requires_grad = false, distributed = false;
    bool on = false, copied = false; // whether it has a gradient, and one in another layout
    py::object spec{};               // how a DTensor is spread
    std::vector<at::DimVector> parts{}; // the sizes of state of other shapes than the parameter, in its order
    size_t first_number = 0, first_tensor = 0;
    size_t first_line = 0, dict_lines = 0, lines = 0; // of cache, to fetch early: its dict's, then all others
  };

  // Rows of a bucket whose numbers are equal: they share scalars.
  struct Set {
    size_t bucket;
    std::vector<Scalar> numbers, next;
    size_t given = none; // its place, where that is the caller's
    uint64_t used = 0;   // in which step
    std::vector<py::object> made{};
  };

  static PyObject* checked(py::handle item) {
    if (!THPVariable_Check(item.ptr()))
      throw py::type_error("a step is of tensors");
    return item.ptr();
  }

  void read_hyper(Hyper& hyper) {
    if (hyper.cell < 0)
      return;
    cells_.resize(std::max<size_t>(cells_.size(), hyper.cell + 1));
    if (!Scalar::number(hyper.value.ptr(), cells_[hyper.cell]))
      throw py::value_error("not a number that fits");
    hyper.type = cells_[hyper.cell].type;
  }

  // -- guards and inputs --
  bool no(const char* why) {
    why_ = why;
    return false;
  }
  bool no(const char* why, std::string where) {
    where_ = std::move(where);
    return no(why);
  }

  bool check(const py::list& groups, const py::dict& state) {
    if (static_cast<size_t>(PyList_GET_SIZE(groups.ptr())) != groups_.size())
      return no("there is another number of param groups");
    for (size_t g = 0; g < groups_.size(); ++g)
      if (!check_group(g, PyList_GET_ITEM(groups.ptr(), g)))
        return false;
    for (PyObject* param : absent_)
      if (grad_of(tensor(param)).defined())
        return no("a parameter has a gradient for the first time");
    if (!look_up(state))
      return no("a parameter has no state");
    if (distributed_) // Python objects are looked at, and references counted
      return check_rows(0, rows_.size()) && are_apart() && copy_gradients();
    // This thread holds the GIL and waits, so nobody changes what the others read. They count no Python references.
    std::atomic<bool> same = true;
    parallel_for(static_cast<int64_t>(rows_.size()), grain, row_cost * rows_.size(), [&](int64_t begin, int64_t end) {
      if (same.load(std::memory_order_relaxed) && !check_rows(begin, end))
        same = false;
    });
    return same && are_apart() && copy_gradients();
  }

  // Whether a dict that does not count its changes has the entries that it had. Asking it for each parameter would call
  // Python's hash of it.
  bool as_it_was(const py::dict& state) const {
    if (static_cast<size_t>(PyDict_GET_SIZE(state.ptr())) != entries_.size())
      return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (const auto& [known_key, known_value] : entries_)
      if (!PyDict_Next(state.ptr(), &position, &key, &value) || key != known_key || value != known_value)
        return false;
    return true;
  }

  // Take the parameters' dicts from opt.state, where these may be others now. The parameters are alive: groups have them.
  bool look_up(const py::dict& state) {
    static PyObject* const counted = name("version");
    const py::object version = attribute(state.ptr(), counted);
    const int64_t now = version ? version.cast<int64_t>() : -1;
    if (state.ptr() == state_ && (now >= 0 ? now == version_ : as_it_was(state)))
      return true;
    version_ = -1;
    entries_.clear();
    lines_.clear();
    for (Row& row : rows_) {
      PyObject* found = PyDict_GetItemWithError(state.ptr(), row.param);
      if (!found && PyErr_Occurred())
        throw py::error_already_set();
      if (!found || !PyDict_CheckExact(found))
        return false;
      take_state(row, found);
    }
    state_ = state.ptr();
    version_ = now;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (now < 0 && PyDict_Next(state.ptr(), &position, &key, &value))
      entries_.emplace_back(key, value);
    return true;
  }

  bool check_rows(size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      if (i + 3 * ahead < end) {
        const Row& early = rows_[i + 3 * ahead];
        prefetch(early, early.lines);
      }
      // Gradients are new in every step: their memory is known once the parameter is here.
      if (i + 2 * ahead < end)
        prefetch_gradient(rows_[i + 2 * ahead]);
      if (i + ahead < end)
        prefetch_storage(rows_[i + ahead]);
      if (const char* why = rows_[i].distributed ? check_distributed(rows_[i]) : check_row(rows_[i])) {
        const char* first = nullptr;
        if (why_.compare_exchange_strong(first, why))
          where_ = "parameter " + std::to_string(rows_[i].index) + " of group " +
                   std::to_string(buckets_[rows_[i].bucket].group);
        return false;
      }
    }
    return true;
  }

  // Dicts are walked in their order where it is the one known: no hashing.
  bool check_group(size_t g, PyObject* dict) {
    Group& group = groups_[g];
    const auto where = [&] { return "group " + std::to_string(g); };
    if (!PyDict_Check(dict) || static_cast<size_t>(PyDict_GET_SIZE(dict)) != group.keys.size())
      return no("it has other keys", where());
    Py_ssize_t position = 0;
    auto hyper = group.hypers.begin();
    for (const py::object& expected : group.keys) {
      PyObject *key, *value;
      if (!PyDict_Next(dict, &position, &key, &value) || key != expected.ptr()) {
        position = PY_SSIZE_T_MAX; // another order, or an equal key: from here on by hash
        value = PyDict_GetItemWithError(dict, expected.ptr());
        if (!value && PyErr_Occurred())
          throw py::error_already_set();
        if (!value)
          return no("it has other keys", where());
      }
      if (PyUnicode_CompareWithASCIIString(expected.ptr(), "params") == 0) {
        if (!same_params(group, value))
          return no("it has other parameters", where());
        continue;
      }
      const auto begin = hyper;
      for (; hyper != group.hypers.end() && hyper->key.is(expected); ++hyper)
        if (!check_hyper(*hyper, value))
          return no("it is another kind of value, or a flag that has changed",
                    where() + ": " + py::str(expected).cast<std::string>());
      if (begin != hyper && begin->index >= 0 && PySequence_Fast_GET_SIZE(value) != hyper - begin)
        return no("it has another length", where() + ": " + py::str(expected).cast<std::string>());
    }
    return true;
  }

  static bool same_params(const Group& group, PyObject* params) {
    if (!PyList_Check(params) && !PyTuple_Check(params))
      return false;
    return static_cast<size_t>(PySequence_Fast_GET_SIZE(params)) == group.params.size() &&
           std::equal(group.params.begin(), group.params.end(), PySequence_Fast_ITEMS(params));
  }

  bool check_hyper(Hyper& hyper, PyObject* value) {
    if (hyper.index >= 0) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(value)) != hyper.container.ptr() || hyper.index >= PySequence_Fast_GET_SIZE(value))
        return false;
      value = PySequence_Fast_GET_ITEM(value, hyper.index);
    }
    if (!hyper.words.empty())
      return check_hyper_tensor(hyper, value);
    if (hyper.cell < 0)
      return same_flag(value, hyper.value.ptr());
    Scalar& x = cells_[hyper.cell];
    return Scalar::number(value, x) && x.type == hyper.type && !std::isnan(x.real) && x.real >= hyper.lowest;
  }

  // A number that kernels read where it is, which may be elsewhere now.
  bool check_hyper_tensor(const Hyper& hyper, PyObject* value) {
    if (!own_memory(value))
      return false;
    const at::Tensor &now = tensor(value), &then = tensor(hyper.value.ptr());
    const void* data;
    if (!strided(*now.unsafeGetTensorImpl(), {}) || now.is_neg() || now.scalar_type() != then.scalar_type() ||
        now.device() != then.device() || now.numel() != 1 || !address_of(*now.unsafeGetTensorImpl(), data) || !data)
      return false;
    held_.push_back(now);
    const auto address = reinterpret_cast<int64_t>(data);
    for (const uintptr_t word : hyper.words) {
      auto* cell = reinterpret_cast<int64_t*>(word);
      if (*cell != address && !all_movable())
        return false;
      *cell = address;
    }
    return true;
  }

  bool all_movable() const {
    return std::all_of(runs_.begin(), runs_.end(), [](const Run& run) { return run.movable; });
  }

  // What stays what it is: None, truth values, dtypes and their like by identity, strings by what they say,
  // lists as long as they are empty.
  static bool same_flag(PyObject* a, PyObject* b) {
    if (a == b)
      return true;
    if (PyUnicode_CheckExact(a) && PyUnicode_CheckExact(b))
      return PyUnicode_Compare(a, b) == 0;
    if (PyList_CheckExact(a) && PyList_CheckExact(b))
      return !PyList_GET_SIZE(a) && !PyList_GET_SIZE(b);
    return PyBytes_CheckExact(a) && PyBytes_CheckExact(b) && PyBytes_GET_SIZE(a) == PyBytes_GET_SIZE(b) &&
           std::equal(PyBytes_AS_STRING(a), PyBytes_AS_STRING(a) + PyBytes_GET_SIZE(a), PyBytes_AS_STRING(b));
  }

  // Puts the tensor's address into the table; why not, or null. `found`: where to note it for the rest of the step.
  const char* take(const Run& run, Row& row, size_t found, at::TensorImpl& t, int64_t column, bool written) {
    const void* data;
    if (!address_of(t, data))
      return "the memory of a tensor was freed or cut";
    // Two tensors may share memory until one is written to; the long way separates them.
    if (written && c10::impl::cow::is_cow_data_ptr(t.unsafe_storage().data_ptr()))
      return "a tensor shares its memory with a lazy copy";
    if (!data && t.numel()) // a wrapper, whose elements are in another tensor
      return "a tensor has its elements elsewhere";
    found_[row.first_tensor + found] = written ? &t : nullptr;
    if (owning_)
      owned_[row.first_tensor + found] = t.unsafe_storage();
    if (column < 0)
      return nullptr;
    int64_t& word = row.words[column];
    const auto address = reinterpret_cast<int64_t>(data);
    if (word != address && !run.movable && found != grad_found)
      return "a tensor was moved";
    if (word != address && written && found != grad_found)
      moved_ = true;
    word = address;
    return nullptr;
  }

  const char* check_row(Row& row) {
    const at::Tensor& param = tensor(row.param);
    return check_tensors(row, param, grad_of(param), [](PyObject* value) -> const at::Tensor* {
      return own_memory(value) ? &tensor(value) : nullptr;
    });
  }

  // `state(value)` is the tensor that an entry is, null if it is none that kernels could take.
  template <class State>
  const char* check_tensors(Row& row, const at::Tensor& whole, const at::Tensor& its_grad, const State& state) {
    const Bucket& bucket = buckets_[row.bucket];
    const Run& run = runs_[bucket.launch];
    row.copied = false;
    row.on = !graded_ || its_grad.defined();
    if (!row.on)
      return run.native ? nullptr : "it has no gradient";
    if (graded_ && dropped(its_grad))
      return "its gradient is being dropped";
    at::TensorImpl& param = *whole.unsafeGetTensorImpl();
    const bool as_it_was = row.distributed || (equal(param.sizes(), row.sizes) && equal(param.strides(), row.strides));
    if (!strided(param, row.keys) || negative(param) || scalar_type(param) != bucket.param ||
        (!as_it_was && (!equal(param.sizes(), row.sizes) || !param.is_non_overlapping_and_dense())))
      return "it is of another dtype or shape, or not dense in memory";
    if (bucket.looked_at && (!equal(tensor(row.param).strides(), row.strides) ||
                             tensor(row.param).requires_grad() != row.requires_grad))
      return "an attribute that callbacks ask for may have changed";
    if (const char* why = take(run, row, param_found, param, bucket.param_column, bucket.param_written))
      return why;
    if (const char* why = graded_ ? check_gradient(row, bucket, run, param, *its_grad.unsafeGetTensorImpl()) : nullptr)
      return why;
    return check_state(row, bucket, run, param, state);
  }

  const char* check_gradient(Row& row, const Bucket& bucket, const Run& run, at::TensorImpl& param, at::TensorImpl& grad) {
    if (!strided(grad, row.keys) || scalar_type(grad) != bucket.grad || grad.device() != param.device() ||
        !equal(grad.sizes(), param.sizes()))
      return "its gradient is of another layout, dtype, device or shape";
    if (const char* why = take(run, row, grad_found, grad, bucket.grad_column, bucket.grad_written))
      return why;
    // One in the parameter's own memory would change while kernels read it.
    const auto bytes = static_cast<intptr_t>(param.numel() * std::max(param.itemsize(), grad.itemsize()));
    row.copied = negative(grad) || !same_layout(grad, param) || std::abs(address(grad) - address(param)) < bytes;
    if (row.copied && (!run.native || bucket.grad_written)) // whose launch comes when the copy is gone
      return "its gradient is of another layout than its kernel takes";
    return nullptr;
  }

  // Whether extra tensors lie in no memory that is written to, be it another parameter's; and, where a tensor was moved,
  // whether no two that are written have memory in common.
  bool are_apart() {
    if (extras_->empty() && !moved_)
      return true;
    Spans written;
    for (const Row& row : rows_)
      for (size_t k = 0; row.on && k < state_found + buckets_[row.bucket].entries.size(); ++k)
        if (const at::TensorImpl* t = found_[row.first_tensor + k])
          written.add(*t);
    if (!written.sort() && moved_)
      return no("a tensor was moved to where another one is");
    moved_ = false;
    for (const Row& row : rows_)
      for (const Entry& entry : buckets_[row.bucket].entries) {
        PyObject* value = row.on && entry.extra >= 0 ? extra_of(row, entry) : nullptr;
        if (value && own_memory(value) && written.meet(*tensor(value).unsafeGetTensorImpl()))
          return no("an extra tensor lies in memory that is written to");
      }
    return true;
  }

  // Null if there is none; None is one.
  PyObject* extra_of(const Row& row, const Entry& entry) const {
    if (entry.extra >= static_cast<int64_t>(extras_->size()))
      return nullptr;
    PyObject* given = (*extras_)[entry.extra].ptr();
    return row.place < PyList_GET_SIZE(given) ? PyList_GET_ITEM(given, row.place) : nullptr;
  }

  template <class State>
  const char* check_state(Row& row, const Bucket& bucket, const Run& run, const at::TensorImpl& param, const State& state) {
    Py_ssize_t position = 0;
    PyObject *key, *value;
    PyObject* container = nullptr;
    size_t number = row.first_number, entries = 0, part = 0;
    for (size_t e = 0; e < bucket.entries.size(); ++e) {
      const Entry& entry = bucket.entries[e];
      const bool another = entry.extra < 0 && (!entry.nested || e == 0 || !bucket.entries[e - 1].nested ||
                                               bucket.entries[e - 1].key.ptr() != entry.key.ptr());
      entries += another;
      if (entry.extra >= 0 && !(value = extra_of(row, entry)))
        return "there are too few extra tensors";
      if (another && (!PyDict_Next(row.state, &position, &key, &value) || key != entry.key.ptr())) {
        position = PY_SSIZE_T_MAX; // another order, or an equal key: from here on by hash
        value = PyDict_GetItemWithError(row.state, entry.key.ptr());
        if (!value)
          return "its state has other entries";
      }
      if (entry.nested) {
        if (another) {
          const PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
          if (!entry.owner.is_none() && type != entry.owner.ptr())
            return "an object in its state is of another type";
          container = entry.owner.is_none() ? value : contents(value);
          size_t siblings = 1;
          while (e + siblings < bucket.entries.size() && bucket.entries[e + siblings].nested &&
                 bucket.entries[e + siblings].key.ptr() == entry.key.ptr())
            ++siblings;
          if (!container || !(PyDict_Check(container) || PyList_CheckExact(container)) ||
              static_cast<size_t>(PyObject_Size(container)) != siblings)
            return "a container in its state has other entries";
        }
        value = within(container, entry.inner.ptr());
        if (!value)
          return "a container in its state has other entries";
      }
      switch (entry.kind) {
        case Entry::Kind::flag:
          if (!same_flag(value, entry.value.ptr()))
            return "a flag in its state has changed";
          break;
        case Entry::Kind::ignored:
          break;
        case Entry::Kind::number:
          if (!(entry.held ? read_held(row, value, entry, numbers_[number]) : Scalar::read(value, numbers_[number])) ||
              numbers_[number].type != entry.type)
            return "a number in its state is of another type";
          ++number;
          break;
        default: {
          const at::Tensor* found = state(value);
          if (!found)
            return "a tensor in its state is of another kind";
          at::TensorImpl& t = *found->unsafeGetTensorImpl();
          if (entry.kind == Entry::Kind::other) {
            if (scalar_type(t) != *entry.dtype || !equal(t.sizes(), had(row, t, part)))
              return "a tensor in its state is of another dtype or shape";
            break;
          }
          if (!strided(t, row.keys) || negative(t) || scalar_type(t) != *entry.dtype || t.device() != param.device())
            return "a tensor in its state is of another dtype or device";
          if (!fits(row, entry.kind, t, param, part))
            return "a tensor in its state is of another shape or layout";
          if (const char* why = take(run, row, state_found + e, t, entry.column, entry.written))
            return why;
        }
      }
    }
    const bool more = static_cast<size_t>(PyDict_GET_SIZE(row.state)) != entries;
    return more ? "its state has other entries" : nullptr;
  }

  // The number of a tensor that the host keeps; false if it is of another kind.
  static bool read_held(const Row& row, PyObject* value, const Entry& entry, Scalar& out) {
    const py::object part = row.distributed && !THPVariable_CheckExact(value) ? replicated(value) : py::object();
    if (part)
      value = part.ptr();
    if (!THPVariable_CheckExact(value))
      return false;
    const at::Tensor& t = THPVariable_Unpack(value);
    if (t.scalar_type() != *entry.held || !t.device().is_cpu() || t.numel() != 1 || t.layout() != at::kStrided)
      return false;
    if (t.scalar_type() == at::kFloat && !t.is_neg()) { // as most are: without a call of torch
      out = Scalar::of(*static_cast<const float*>(t.const_data_ptr()));
      return true;
    }
    return Scalar::element(t, out);
  }
  static void write_held(const at::Tensor& t, const Scalar& number) {
    if (t.scalar_type() == at::kFloat && !t.is_neg()) {
      *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(number.real);
      bump(t.unsafeGetTensorImpl());
    } else {
      const c10::NoGradGuard none;
      t.fill_(number.is_real() ? at::Scalar(number.real) : at::Scalar(number.whole));
    }
  }

  // Whether a tensor in the state has the shape that it had. `part` counts those along some dimensions.
  static bool fits(Row& row, Entry::Kind kind, const at::TensorImpl& t, const at::TensorImpl& param, size_t& part) {
    if (kind == Entry::Kind::whole)
      return t.numel() == 1;
    if (kind == Entry::Kind::element)
      return equal(t.sizes(), param.sizes()) && same_layout(t, param);
    return equal(t.sizes(), had(row, t, part)) && t.is_contiguous();
  }

  // The shape that a tensor in the state had when the step was bound. `part` counts those of other shapes.
  static at::IntArrayRef had(Row& row, const at::TensorImpl& t, size_t& part) {
    if (row.parts.size() == part) // the first step
      row.parts.emplace_back(t.sizes());
    return row.parts[part++];
  }

  // -- DTensors: kernels take their local tensors --
  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); } // never given back

  static py::object attribute(PyObject* x, PyObject* name) {
    auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(x, name));
    if (!found)
      PyErr_Clear();
    return found;
  }

  // Whether two DTensors, by their specs, are spread alike.
  static bool same_spec(const py::object& a, const py::object& b) {
    static PyObject *const parts[] = {name("placements"), name("mesh")};
    if (a.is(b))
      return true;
    for (PyObject* part : parts) {
      const py::object x = attribute(a.ptr(), part), y = attribute(b.ptr(), part);
      const int same = !x || !y ? 0 : x.is(y) ? 1 : PyObject_RichCompareBool(x.ptr(), y.ptr(), Py_EQ);
      if (same < 0)
        throw py::error_already_set();
      if (!same)
        return false;
    }
    return true;
  }

  // The local tensor of a DTensor that is spread like the row's parameter; null if it is none.
  const at::Tensor* local(const Row& row, PyObject* x) {
    static PyObject *const part_name = name("_local_tensor"), *const spec_name = name("_spec");
    const py::object part = attribute(x, part_name), spec = attribute(x, spec_name);
    if (!part || !spec || !own_memory(part.ptr()) || !same_spec(spec, row.spec))
      return nullptr;
    held_.push_back(tensor(part.ptr()));
    return &held_.back();
  }

  // The local tensor of a DTensor that is the same on all processes; null if it is none.
  static py::object replicated(PyObject* x) {
    static PyObject *const part_name = name("_local_tensor"), *const spec_name = name("_spec");
    const py::object part = attribute(x, part_name), spec = attribute(x, spec_name);
    return part && spec && spec.attr("is_replicated")().cast<bool>() ? part : py::object();
  }

  const char* check_distributed(Row& row) {
    const at::Tensor& whole = tensor(row.param);
    if (whole.sizes() != at::IntArrayRef(row.sizes))
      return "it is of another shape";
    const at::Tensor& grad = grad_of(whole);
    const bool graded = graded_ && grad.defined();
    if (graded && dropped(grad))
      return "its gradient is being dropped";
    const at::Tensor* param = local(row, row.param);
    if (!param)
      return "it is spread in another way";
    wrappers_.push_back(whole.unsafeGetTensorImpl());
    at::Tensor mine;
    if (graded) {
      if (grad.sizes() != whole.sizes())
        return "its gradient is of another shape";
      const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(grad));
      const at::Tensor* part = local(row, object.ptr());
      if (!part)
        return "its gradient is spread in another way, or still on its way";
      mine = *part;
      if (buckets_[row.bucket].grad_written)
        wrappers_.push_back(grad.unsafeGetTensorImpl());
    }
    return check_tensors(row, *param, mine, [&](PyObject* value) -> const at::Tensor* {
      if (own_memory(value))
        return tensor(value).dim() == 0 ? &tensor(value) : nullptr;
      if (!THPVariable_Check(value) || tensor(value).sizes() != whole.sizes())
        return nullptr;
      const at::Tensor* part = local(row, value);
      if (part)
        wrappers_.push_back(tensor(value).unsafeGetTensorImpl());
      return part;
    });
  }

  // Gradients that kernels cannot walk in the parameter's order get a copy for the time of the step.
  bool copy_gradients() {
    bool any = false;
    for (Row& row : rows_) {
      any |= row.on;
      if (!row.on || !row.copied)
        continue;
      const Bucket& bucket = buckets_[row.bucket];
      if (bucket.grad_column < 0)
        continue;
      if (row.distributed)
        return no("its gradient is of another layout", "parameter " + std::to_string(row.index));
      const at::Tensor& param = tensor(row.param);
      const at::AutoDispatchBelowADInplaceOrView below;
      const at::Tensor copy = at::empty_strided(param.sizes(), param.strides(), param.grad().options());
      copy.copy_(param.grad());
      row.words[bucket.grad_column] = reinterpret_cast<int64_t>(copy.const_data_ptr());
      held_.push_back(copy);
    }
    return any || no("no parameter has a gradient");
  }

  // -- scalars --
  // Which rows share scalars: those of a bucket with the same numbers. Rows that did so before still do, most often.
  bool sort_into_sets() {
    std::unordered_map<size_t, std::vector<size_t>> known; // by hash of bucket and numbers: made if it is needed
    bool made = false;
    const auto key_of = [&](size_t bucket, const Scalar* numbers, size_t count) {
      size_t key = bucket;
      for (size_t k = 0; k < count; ++k)
        key = key * 1000003 ^ std::hash<double>()(numbers[k].real);
      return key;
    };
    for (Row& row : rows_) {
      if (!row.on)
        continue;
      const size_t count = buckets_[row.bucket].numbers.size();
      const Scalar* numbers = numbers_.data() + row.first_number;
      if (row.set != none && holds(row.set, numbers))
        continue;
      if (!runs_[buckets_[row.bucket].launch].native)
        return no("parameters that shared a number no longer do");
      if (!made) {
        for (size_t s = 0; s < sets_.size(); ++s)
          if (sets_[s].used == step_)
            known[key_of(sets_[s].bucket, sets_[s].numbers.data(), sets_[s].numbers.size())].push_back(s);
        made = true;
      }
      auto& same = known[key_of(row.bucket, numbers, count)];
      const auto found = std::find_if(same.begin(), same.end(),
                                      [&](size_t s) { return sets_[s].bucket == row.bucket && holds(s, numbers); });
      if (found != same.end()) {
        row.set = *found;
        continue;
      }
      row.set = new_set(row.bucket);
      holds(row.set, numbers);
      same.push_back(row.set);
    }
    return true;
  }

  // Whether the set is of these numbers; one that nobody has used in this step is from now on.
  bool holds(size_t s, const Scalar* numbers) {
    Set& set = sets_[s];
    if (set.used != step_) {
      set.numbers.assign(numbers, numbers + buckets_[set.bucket].numbers.size());
      set.used = step_;
      return true;
    }
    for (size_t k = 0; k < set.numbers.size(); ++k)
      if (set.numbers[k].type != numbers[k].type || !set.numbers[k].same(numbers[k]))
        return false;
    return true;
  }

  size_t new_set(size_t bucket) {
    auto& mine = sets_of_[bucket];
    for (const size_t s : mine) // as many as rows of the bucket at most
      if (sets_[s].used != step_ && sets_[s].given == none)
        return s;
    mine.push_back(sets_.size());
    sets_.push_back({bucket, {}, {}});
    return sets_.size() - 1;
  }

  // The set of a row whose table is the caller's.
  size_t given_set(const Row& row) {
    const auto given = static_cast<size_t>(row.words[word::set]);
    for (const size_t s : sets_of_[row.bucket])
      if (sets_[s].given == given)
        return s;
    const size_t s = new_set(row.bucket);
    sets_[s].given = given;
    return s;
  }

  // Slots and new numbers of every set.
  bool evaluate() {
    ++step_;
    if (!sort_into_sets())
      return false;
    std::vector<size_t> taken(runs_.size()), place(sets_.size());
    for (size_t s = 0; s < sets_.size(); ++s)
      if (sets_[s].used == step_)
        place[s] = sets_[s].given != none ? sets_[s].given : taken[buckets_[sets_[s].bucket].launch]++;
    std::vector<double*> slots;
    for (size_t k = 0; k < runs_.size(); ++k)
      slots.push_back(runs_[k].native ? runs_[k].native->make_slots(taken[k]) : runs_[k].slots);
    for (size_t s = 0; s < sets_.size(); ++s) {
      Set& set = sets_[s];
      if (set.used != step_)
        continue;
      const Bucket& bucket = buckets_[set.bucket];
      if (!bucket.program->run([&](size_t i) -> const Scalar& {
            const auto& [in_state, at] = bucket.leaves[i];
            return in_state ? set.numbers[at] : cells_[at];
          }))
        return no("a branch on a number goes another way, or its arithmetic needs Python", "group " + std::to_string(bucket.group));
      if (bucket.narrow && !bucket.program->fits_float())
        return no("a number is too large for a float", "group " + std::to_string(bucket.group));
      double* slot = slots[bucket.launch] + place[s] * bucket.program->slots();
      for (size_t i = 0; i < bucket.program->slots(); ++i)
        slot[i] = bucket.program->slot(i);
      set.next.clear();
      for (size_t i = 0; i < bucket.outputs.size(); ++i)
        set.next.push_back(bucket.program->number(i));
    }
    for (Row& row : rows_)
      if (row.on && runs_[buckets_[row.bucket].launch].native)
        row.words[word::set] = static_cast<int64_t>(place[row.set]);
    return true;
  }

  // -- what changes --
  // Which rows are launched, and in rounds what they read. Before anything changes: there may be no memory.
  void arrange() {
    const int64_t threads = forked() ? 1 : at::get_num_threads();
    for (size_t k = 0; k < runs_.size(); ++k) {
      const auto on = [&](int64_t r) { return rows_[rows_of_[k][r]].on; };
      if (runs_[k].native)
        runs_[k].native->select(threads, on);
    }
    for (const Round& round : rounds_) {
      for (const Summing& summing : round.summing)
        arrange(summing, threads);
      if (round.join)
        round.join->select(threads, [](int64_t) { return true; });
    }
  }

  // The rows of a launch of sums: those of its main launch. A row that is off adds nothing.
  void arrange(const Summing& summing, int64_t threads) {
    const auto& rows = rows_of_[summing.of];
    summing.launch->select(threads, [&](int64_t r) { return rows_[rows[r]].on; });
    summing.launch->share_slots(*runs_[summing.of].native);
    for (int64_t r = 0; r < summing.launch->size(); ++r) {
      int64_t* words = summing.launch->row(r);
      const Row& row = rows_[rows[r]];
      if (row.on)
        for (const auto& [here, there] : summing.words)
          words[here] = row.words[there];
      else
        for (const int64_t sum : summing.sums)
          *reinterpret_cast<double*>(words[sum]) = 0;
    }
  }

  // References to everything that `commit` touches.
  std::vector<py::object> objects() {
    std::vector<py::object> out;
    const auto own = [&](PyObject* x) { out.push_back(py::reinterpret_borrow<py::object>(x)); };
    for (const Row& row : rows_) {
      if (!row.on)
        continue;
      own(row.param);
      own(row.state);
      for (size_t k = 0; k < state_found + buckets_[row.bucket].entries.size(); ++k)
        if (at::TensorImpl* t = found_[row.first_tensor + k])
          held_.push_back(at::Tensor(c10::intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>::reclaim_copy(t)));
    }
    return out;
  }

  // New numbers into the state dicts, version counters up.
  void commit() {
    parallel_for(static_cast<int64_t>(rows_.size()), grain, row_cost * rows_.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (const Row& row = rows_[i]; row.on)
          for (size_t k = 0; k < state_found + buckets_[row.bucket].entries.size(); ++k)
            bump(found_[row.first_tensor + k]);
    });
    for (at::TensorImpl* t : wrappers_)
      bump(t);
    for (Set& set : sets_)
      if (set.used == step_) { // one object per number, shared by its rows
        set.made.clear();
        for (const Scalar& number : set.next)
          set.made.push_back(number.python());
      }
    for (size_t i = 0; i < rows_.size(); ++i) {
      if (i + ahead < rows_.size())
        prefetch(rows_[i + ahead], rows_[i + ahead].dict_lines);
      const Row& row = rows_[i];
      const Bucket& bucket = buckets_[row.bucket];
      for (size_t k = 0; row.on && k < bucket.outputs.size(); ++k) {
        const Entry& entry = bucket.entries[bucket.outputs[k]];
        if (entry.held) {
          PyObject* value = entry.nested ? within(contents(within(row.state, entry.key.ptr())), entry.inner.ptr())
                                         : within(row.state, entry.key.ptr());
          py::object part;
          if (!THPVariable_CheckExact(value)) { // a DTensor, as was found before
            bump(THPVariable_Unpack(value).unsafeGetTensorImpl());
            part = replicated(value);
            value = part.ptr();
          }
          write_held(THPVariable_Unpack(value), sets_[row.set].next[k]);
          continue;
        }
        PyObject* made = sets_[row.set].made[k].ptr();
        const bool put = entry.nested ? put_within(contents(within(row.state, entry.key.ptr())), entry.inner.ptr(), made)
                                      : PyDict_SetItem(row.state, entry.key.ptr(), made) == 0;
        if (!put)
          throw py::error_already_set();
      }
    }
  }

  void launch(double limit) {
    for (const Round& round : rounds_) {
      for (const Summing& summing : round.summing)
        summing.launch->run();
      if (round.limits)
        round.join->make_slots(1)[0] = limit;
      if (round.join)
        round.join->run();
    }
    for (const Run& run : runs_)
      if (run.native)
        run.native->run();
  }

  static void bump(at::TensorImpl* t) {
    if (t && !t->is_inference()) // inference tensors have no counter
      t->bump_version();
  }

  // -- memory that will be looked at --
  // After a training step nothing of this is in cache, and following pointers one by one would take most of the time.
  // So the memory behind them is remembered and asked for some rows early. It may be somebody else's by now: fetching
  // it is harmless, and `check_row` follows the pointers themselves.
  void prefetch(const Row& row, size_t n) const {
    const uintptr_t* lines = lines_.data() + row.first_line;
    for (size_t k = 0; k < n; ++k)
      __builtin_prefetch(reinterpret_cast<const void*>(lines[k]));
  }

  static void prefetch_gradient(const Row& row) {
    if (const at::Tensor& grad = grad_of(tensor(row.param)); grad.defined())
      for (size_t k = 0; k < sizeof(at::TensorImpl); k += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(grad.unsafeGetTensorImpl()) + k);
  }

  static void prefetch_storage(const Row& row) {
    if (const at::Tensor& grad = grad_of(tensor(row.param)); grad.defined())
      __builtin_prefetch(grad.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
  }

  // `row` is the next of those whose lines are remembered.
  void take_state(Row& row, PyObject* state) {
    if (!PyDict_CheckExact(state))
      throw py::type_error("a parameter's state is a dict");
    row.state = state;
    row.first_line = lines_.size();
    remember(row, state, 64);
    remember(row, reinterpret_cast<PyDictObject*>(state)->ma_keys, 128);
    row.dict_lines = lines_.size() - row.first_line;
    remember(row, row.param, 64);
    remember(row, tensor(row.param).unsafeGetTensorImpl()->autograd_meta(), 64);
    remember_tensor(row, tensor(row.param));
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(state, &position, &key, &value))
      if (own_memory(value)) {
        remember(row, value, 32);
        remember_tensor(row, tensor(value));
      }
    row.lines = lines_.size() - row.first_line;
  }

  void remember(const Row& row, const void* start, size_t bytes) {
    const auto first = reinterpret_cast<uintptr_t>(start);
    for (uintptr_t line = first & ~63; line < first + bytes; line += 64)
      if (std::find(lines_.begin() + row.first_line, lines_.end(), line) == lines_.end())
        lines_.push_back(line);
  }

  void remember_tensor(const Row& row, const at::Tensor& t) {
    const at::TensorImpl& impl = *t.unsafeGetTensorImpl();
    remember(row, &impl, sizeof(impl));
    if (t.has_storage())
      remember(row, t.storage().unsafeGetStorageImpl(), 64);
    const void* counter; // the only thing in it, and nobody's business but the cache's
    std::memcpy(&counter, &impl.version_counter(), sizeof(counter));
    remember(row, counter, 24);
  }

  const std::vector<py::list>* extras_ = nullptr; // while a step runs
  bool graded_;
  std::vector<Group> groups_;
  std::vector<Bucket> buckets_;
  std::vector<Run> runs_;
  std::vector<PyObject*> absent_;
  std::vector<Round> rounds_;
  std::vector<Row> rows_;
  std::vector<std::vector<size_t>> rows_of_; // each launch's, in the order of its table
  std::vector<Scalar> cells_, numbers_;
  std::vector<Set> sets_;
  std::vector<std::vector<size_t>> sets_of_; // each bucket's
  std::vector<uintptr_t> lines_;
  // While a step runs: tensors that are written to, memory that is used, and what Python objects were asked for.
  std::vector<at::TensorImpl*> found_, wrappers_;
  std::vector<c10::Storage> owned_;
  std::deque<at::Tensor> held_; // what was pushed is pointed to
  std::atomic<const char*> why_ = nullptr;
  std::atomic<bool> moved_ = false; // a tensor that is written, since they were last found apart
  std::string where_;
  uint64_t step_ = 0;
  int64_t elements_ = 0, version_ = -1; // the version of `state_`, opt.state as it was last
  PyObject* state_ = nullptr;
  std::vector<std::pair<PyObject*, PyObject*>> entries_; // of a `state_` that does not count its changes
  bool distributed_ = false, running_ = false, owning_ = false;
};

} // namespace fusedopt
