// A profile function that tells Python only of what it may have to do with: tracing a step runs tens of thousands of
// Python functions, most of them a library's, which call one another.

#pragma once

#include <torch/csrc/utils/pybind.h>

#include <unordered_map>

namespace fusedopt {

// `note(frame, event, argument)` is what sys.setprofile would call; `is_library(frame)` says whose code a frame runs.
class Profile {
 public:
  Profile(py::object note, py::object is_library) : note_(std::move(note)), is_library_(std::move(is_library)) {}

  // From here on, in this thread, until sys.setprofile is called.
  static void start(const py::object& self) { PyEval_SetProfile(heard, self.ptr()); }

  void note(const py::object& frame, const py::object& event, const py::object& argument) const {
    note_(frame, event, argument);
  }

 private:
  struct Code {
    py::object owner; // so that no other one has its address
    bool library, called = false;
  };

  static int heard(PyObject* self, PyFrameObject* frame, int what, PyObject* argument) {
    if (what != PyTrace_CALL && what != PyTrace_C_CALL)
      return 0;
    const auto kept = py::reinterpret_borrow<py::object>(self);
    try {
      auto& profile = kept.cast<Profile&>();
      if (profile.matters(frame, what)) {
        const auto given = argument ? py::reinterpret_borrow<py::object>(argument) : py::none();
        const char* event = what == PyTrace_CALL ? "call" : "c_call";
        profile.note(py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(frame)), py::str(event), given);
      }
      return 0;
    } catch (py::error_already_set& error) {
      error.restore();
      PyEval_SetProfile(nullptr, nullptr); // as Python does where a profile function raises
      return -1;
    }
  }

  // Calls of what is no library's, each code once; a library's first one, and those that come from elsewhere; and what
  // is called in C, but not by libraries.
  bool matters(PyFrameObject* frame, int what) {
    Code& code = known(frame);
    if (what == PyTrace_C_CALL)
      return !code.library;
    if (!code.called)
      return code.called = true;
    if (!code.library)
      return false;
    const auto caller = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(frame)));
    return caller && !known(reinterpret_cast<PyFrameObject*>(caller.ptr())).library;
  }

  Code& known(PyFrameObject* frame) {
    auto code = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
    const auto found = codes_.find(code.ptr());
    if (found != codes_.end())
      return found->second;
    const bool library = is_library_(py::handle(reinterpret_cast<PyObject*>(frame))).cast<bool>();
    return codes_.emplace(code.ptr(), Code{code, library}).first->second;
  }

  py::object note_, is_library_;
  std::unordered_map<PyObject*, Code> codes_;
};

} // namespace fusedopt
