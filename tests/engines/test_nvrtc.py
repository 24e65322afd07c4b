"""The GPU kernels compiled for GPUs, without one: their registers and their memory."""

import ctypes
import importlib.util
import re
from pathlib import Path

import pytest

import qpdiff

SOURCES = Path(qpdiff.__file__).parent / "engines" / "compiled" / "src"
REGISTERS = 128
"""So many leave a multiprocessor two blocks of 256 threads, or sixteen of 32."""
SPILLED = {"solve": 448, "derivative": 16}
"""Bytes of registers that one function may move to memory and back."""
STACK = {"solve": 1536, "derivative": 768}
"""Bytes of local memory of a thread: mostly the places of the vectors."""
KERNELS = [(stage, form) for stage in ("solve", "derivative") for form in ("primal", "dense_dual", "diagonal_dual")]
GPUS = [("sm_80", "double"), ("sm_90", "double"), ("sm_90", "float"), ("sm_120", "double")]


@pytest.fixture(scope="module")
def nvrtc():
    """NVRTC of the wheel nvidia-cuda-nvrtc."""
    spec = importlib.util.find_spec("nvidia")
    folders = map(Path, spec.submodule_search_locations or []) if spec else []
    found = [
        path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*")) if "alt" not in path.name
    ]
    if not found or not SOURCES.exists():
        pytest.skip("needs the wheel nvidia-cuda-nvrtc, and the sources")
    return ctypes.CDLL(str(found[-1]))


def compile_kernel(nvrtc, *options):
    """Compile kernels.cu; return what the compiler says."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = (SOURCES / "kernels.cu").read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None)
    given = [option.encode() for option in ("-std=c++20", "-default-device", f"-I{SOURCES}", "-Xptxas=-v", *options)]
    failed = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    assert not failed, log.value.decode()
    return log.value.decode()


@pytest.mark.parametrize(("gpu", "kind"), GPUS)
@pytest.mark.parametrize(("stage", "form"), KERNELS)
@pytest.mark.parametrize("priced", [0, 1], ids=["", "priced"])
def test_registers(priced, stage, form, gpu, kind, nvrtc):
    definitions = [f"-DQP_STAGE={stage}", f"-DQP_FORM={form}", f"-DQP_TYPE={kind}", f"-DQP_PRICED={priced}"]
    log = compile_kernel(nvrtc, f"--gpu-architecture={gpu}", *definitions)
    (registers, stack), *others = re.findall(r"Used (\d+) registers.* (\d+) bytes cumulative stack size", log)
    assert not others
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", log)]
    print(f"{stage}_{form}_{kind} {gpu}: {registers} registers, {stack} bytes of stack, {max(spilled)} bytes spilled")
    assert int(registers) <= REGISTERS
    assert int(stack) <= STACK[stage]
    assert max(spilled) <= SPILLED[stage]
