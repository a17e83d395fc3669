// sora_kernels._host: host-side helpers, NumPy in and out. Optional: Python does the same without.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <vector>

#include "planner.h"

namespace py = pybind11;

namespace {

using Int64Array = py::array_t<std::int64_t, py::array::c_style>;

Int64Array best_fit(const Int64Array& lengths, std::int64_t capacity) {
  if (lengths.ndim() != 1) {
    throw py::value_error("best_fit: lengths: expected one dimension, got " +
                          std::to_string(lengths.ndim()));
  }
  std::vector<std::int64_t> packs;
  {
    py::gil_scoped_release release;
    packs = sora_kernels::best_fit(lengths.data(), static_cast<std::size_t>(lengths.size()),
                                   capacity);
  }
  Int64Array result(static_cast<py::ssize_t>(packs.size()));
  std::copy(packs.begin(), packs.end(), result.mutable_data());
  return result;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = std::string("gcc ") + __VERSION__;
#elif defined(_MSC_VER)
  info["compiler"] = "msvc " + std::to_string(_MSC_VER);
#else
  info["compiler"] = "unknown";
#endif
#if defined(_MSVC_LANG)
  info["cpp_standard"] = static_cast<long>(_MSVC_LANG);
#else
  info["cpp_standard"] = static_cast<long>(__cplusplus);
#endif
  info["python"] = std::to_string(PY_MAJOR_VERSION) + "." + std::to_string(PY_MINOR_VERSION);
  info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." +
                     std::to_string(PYBIND11_VERSION_MINOR);
#if defined(NDEBUG)
  info["assertions"] = false;
#else
  info["assertions"] = true;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of sora_kernels.";
  // noconvert: a silent copy or cast of the lengths would hide a caller's mistake.
  m.def("best_fit", &best_fit, py::arg("lengths").noconvert(), py::arg("capacity"),
        "Pack of each clip, int64 [n], for int64 lengths [n] in the order given.");
  m.def("build_info", &build_info, "Compiler, C++ standard, Python and pybind11 of this build.");
}
