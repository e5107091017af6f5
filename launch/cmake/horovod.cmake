# Read right after each project() of Horovod 0.28.1 and its gloo: what they lack to be built, and to run, today.

# They ask for C++11, 14 or 17, where torch's headers need C++20.
foreach(standard 11 14 17)
  foreach(kind STANDARD EXTENSION)
    set(CMAKE_CXX${standard}_${kind}_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA${standard}_${kind}_COMPILE_OPTION "-std=c++20")
  endforeach()
endforeach()

# It opens libcuda.so, which is there only where something was to be compiled; drivers and containers have libcuda.so.1.
if(EXISTS "${CMAKE_CURRENT_SOURCE_DIR}/horovod/torch/cuda_util.cc")
  file(READ "${CMAKE_CURRENT_SOURCE_DIR}/horovod/torch/cuda_util.cc" cuda_util)
  string(REPLACE "\"libcuda.so\"" "\"libcuda.so.1\"" cuda_util "${cuda_util}")
  file(WRITE "${CMAKE_CURRENT_SOURCE_DIR}/horovod/torch/cuda_util.cc" "${cuda_util}")
endif()

# No debug information: a quarter less compile time, a tenth of the size.
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")
set(CMAKE_CUDA_FLAGS_RELWITHDEBINFO "-O3 -DNDEBUG")

# The libraries' places relative to Horovod's own, not those in the build environment, which goes away.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_RPATH "$ENV{HOROVOD_RPATH}")

# The MPI that was checked, whatever else the machine has.
set(MPI_CXX_COMPILER "$ENV{MPICXX}")
