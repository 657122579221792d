# The CUDA kernels as C++20, on the emulator of csrc/emu: a Python module, and programs under sanitizers.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
find_package(pybind11 REQUIRED CONFIG)

# One C++ file for each .cu: LANGUAGE, a property of the source, would hold for nvcc's targets too.
set(EMULATED_SOURCES ${CMAKE_SOURCE_DIR}/csrc/arguments.cpp)
foreach(kernel ${CUDA_SOURCES})
  get_filename_component(name ${kernel} NAME_WE)
  file(CONFIGURE OUTPUT emulated/${name}.cpp CONTENT "#include \"${kernel}\"\n" @ONLY)
  list(APPEND EMULATED_SOURCES ${CMAKE_BINARY_DIR}/emulated/${name}.cpp)
endforeach()
file(GLOB EMULATOR_SOURCES CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/emu/*.cpp)
list(APPEND EMULATED_SOURCES ${EMULATOR_SOURCES})
# One rounding per operation, as nvcc's --fmad=false gives those kernels that must have it.
set(EMULATED_OPTIONS -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off)

pybind11_add_module(cuda_emulated EXCLUDE_FROM_ALL NO_EXTRAS tests/emulator/module.cpp
                    ${EMULATED_SOURCES})
set_target_properties(cuda_emulated PROPERTIES SUFFIX ".so" LIBRARY_OUTPUT_DIRECTORY
                      ${CMAKE_BINARY_DIR}/tests)
target_compile_options(cuda_emulated PRIVATE ${EMULATED_OPTIONS} -O2 -g1)

function(add_sanitized name)
  add_executable(sanitized_${name} EXCLUDE_FROM_ALL tests/emulator/kernels.cpp
                 tests/emulator/planted.cpp ${EMULATED_SOURCES})
  set_target_properties(sanitized_${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY
                        ${CMAKE_BINARY_DIR}/tests)
  target_compile_options(sanitized_${name} PRIVATE ${EMULATED_OPTIONS} -O1 -g1 ${ARGN})
  target_link_options(sanitized_${name} PRIVATE ${ARGN})
endfunction()
add_sanitized(address -fsanitize=address,undefined -fno-sanitize-recover=undefined)
add_sanitized(thread -fsanitize=thread)
