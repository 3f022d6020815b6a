import pytest
import torch

import fusedconvbn


def _cuda_missing() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    return "" if fusedconvbn.build_info()["cuda"] else "the build has no CUDA kernels"


requires_cuda = pytest.mark.skipif(bool(_cuda_missing()), reason=_cuda_missing())


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=requires_cuda)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers and leaves the generator and the number of threads as they were. cuDNN's
    convolutions are exact float32, and the same every time."""
    threads = torch.get_num_threads()
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
    ):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)
