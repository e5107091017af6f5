# For Horovod's build: a toolchain file is the one door that CMake's environment leaves open (CMAKE_TOOLCHAIN_FILE).
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/horovod.cmake")
