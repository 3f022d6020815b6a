import os
from collections import defaultdict

import pytest
import torch
from selection import covering

import fusedconvbn


def _gpu_test(missing: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu, pytest.mark.skipif(bool(missing), reason=missing)]


_missing = "" if torch.cuda.is_available() else "no GPU"
requires_gpu = _gpu_test(_missing)
requires_cuda = _gpu_test(
    _missing or ("" if fusedconvbn.build_info()["cuda"] else "the build has no CUDA kernels")
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=requires_cuda)])
def device(request):
    return request.param


def _leave_a_broken_gpu() -> None:
    """After some errors a process can use the GPU no more: pytest-xdist then starts another."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        raise


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers and leaves the generator and the number of threads as they
    were. cuDNN's convolutions are exact float32. A test that leaves CUDA alone does not start
    it."""
    threads = torch.get_num_threads()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices=devices),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        torch.manual_seed(0)
        yield
        if torch.cuda.is_initialized():
            _leave_a_broken_gpu()
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Behind all others the one whose device stays for as long as the process lives.
    items.sort(key=lambda item: item.path.name == "test_launches.py")
    products = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("independent"):
            item.add_marker(pytest.mark.xdist_group(item.path.name))
        if thin := item.get_closest_marker("thin"):
            on = [item.callspec.params.get(axis) for axis in ("device", "library")]
            products[(item.path, item.originalname, *thin.args, *on)].append(item)
    for (_, _, strength, *_), product in products.items():
        chosen = covering([item.callspec.id.split("-") for item in product], strength)
        for i in {*range(len(product))} - chosen:
            product[i].add_marker(pytest.mark.slow)
