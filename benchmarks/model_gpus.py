"""What the static model knows about GPUs: datasheet rates and limits of a multiprocessor.

Rates are peak and dense, as the vendor prints them; nothing here was measured by this project.
Sources, by GPU:

- A100: NVIDIA A100 80GB datasheet (SXM), and the A100 architecture whitepaper.
- H100: NVIDIA H100 datasheet (SXM; matrix rates there are sparse, halved here), Hopper whitepaper.
- H200: NVIDIA H200 datasheet (SXM). The processor is an H100's; L2 as the CUDA runtime reports it.
- B200: NVIDIA HGX B200 datasheet over 8 GPUs (sparse matrix rate halved), Blackwell tuning guide.
- RTX 4090: NVIDIA Ada architecture whitepaper, appendix A (bf16 with fp32 accumulation).
- RTX 5090: NVIDIA RTX Blackwell architecture whitepaper, appendix (bf16 with fp32 accumulation).

Registers, shared memory, warps and blocks of a multiprocessor: CUDA C++ programming guide, table
"technical specifications per compute capability".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Attributes:
    arch: compute capability, 90 for 9.0.
    gbps: memory bandwidth, 1e9 bytes per second.
    bf16_tflops: dense matrix rate, fp32 accumulation.
    fp32_tflops: vector rate, a fused multiply-add counting two.
    sms: multiprocessors.
    registers, smem, warps, blocks: what one multiprocessor has (32-bit registers, bytes).
    l2_mb: level-2 cache, 1e6 bytes.
    compiled: the architecture whose cross-compiled kernels stand for it.
    """

    name: str
    arch: int
    gbps: float
    bf16_tflops: float
    fp32_tflops: float
    sms: int
    registers: int
    smem: int
    warps: int
    blocks: int
    l2_mb: float
    compiled: int


_KB = 1024
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 2039, 312, 19.5, 108, 65536, 164 * _KB, 64, 32, 40, 80),
        Gpu("H100", 90, 3350, 989.4, 66.9, 132, 65536, 228 * _KB, 64, 32, 50, 90),
        Gpu("H200", 90, 4800, 989.4, 66.9, 132, 65536, 228 * _KB, 64, 32, 60, 90),
        Gpu("B200", 100, 8000, 2250, 80, 148, 65536, 228 * _KB, 64, 32, 126, 100),
        # 8.9 runs the instructions of 8.0, and our configurations are the same for both.
        Gpu("RTX 4090", 89, 1008, 165.2, 82.6, 128, 65536, 100 * _KB, 48, 24, 72, 80),
        Gpu("RTX 5090", 120, 1792, 209.5, 104.8, 170, 65536, 100 * _KB, 48, 24, 96, 120),
    )
}


def find(name: str) -> Gpu:
    """By our name or by what the driver calls it ("NVIDIA H200"); ValueError if unknown."""
    wanted = name.lower().replace("-", " ").split()
    for gpu in GPUS.values():
        words = gpu.name.lower().split()
        if all(word in wanted for word in words):
            return gpu
    raise ValueError(f"--gpu: expected one of {', '.join(GPUS)}, got {name!r}")
