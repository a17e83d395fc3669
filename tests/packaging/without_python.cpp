// Runs a package of AOTInductor in a process without Python: torch's C++ libraries, ours, and this.
//
//     without_python LIBRARY PACKAGE INPUTS RESULTS
//
// INPUTS is a list of tensors that torch.save wrote, RESULTS will be one for torch.load.
// tests/packaging/without_python.py drives it.
#include <dlfcn.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: " << argv[0] << " LIBRARY PACKAGE INPUTS RESULTS\n";
    return 2;
  }
  if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) {  // its raw ops are then known to torch
    std::cerr << dlerror() << "\n";
    return 1;
  }
  if (dlsym(RTLD_DEFAULT, "Py_IsInitialized")) {
    std::cerr << "there is a Python in this process\n";
    return 1;
  }
  std::ifstream file(argv[3], std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const c10::IValue list = torch::jit::pickle_load(bytes);
  std::vector<at::Tensor> inputs;
  for (const c10::IValue& value : list.toListRef()) inputs.push_back(value.toTensor());

  torch::inductor::AOTIModelPackageLoader model(argv[2]);
  const std::vector<char> results = torch::jit::pickle_save(c10::IValue(model.run(inputs)));
  std::ofstream(argv[4], std::ios::binary).write(results.data(), results.size());
  return 0;
}
