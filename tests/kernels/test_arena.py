"""The memory that CPU maps are kept in: who gets it, who gives it back, and that it is given back
to the system."""

import gc
import os
import resource
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

from fusedconvbn import conv_bn, empty_cache

MIB = 2**20

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the arena is for Linux, and not for the sanitizer's build",
)


def tensors(channels=32):
    x = torch.randn(8, 16, 64, 64).to(memory_format=torch.channels_last).requires_grad_()
    return x, torch.randn(channels, 16, 3, 3, requires_grad=True)


def layer(x, w):
    return conv_bn(x, w, padding=1, activation="relu")


def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()


@pytest.fixture(autouse=True)
def emptied():
    gc.collect()
    empty_cache()


def test_a_second_step_has_no_page_faults_of_its_maps():
    x, w = tensors(64)
    for _ in range(3):
        layer(x, w).sum().backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    out = layer(x, w)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < out.numel() * out.element_size() / resource.getpagesize() / 4


def test_emptied_memory_goes_back_and_maps_in_use_stay():
    x, w = tensors(128)
    kept = layer(x, w)
    expected = kept.detach().clone()
    layer(x, w).sum().backward()
    del x.grad
    before = resident()
    freed = empty_cache()
    assert freed >= 16 * MIB  # at least the second layer's result
    assert before - resident() > freed / 2
    assert empty_cache() == 0
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)
    torch.testing.assert_close(layer(x, w), expected, rtol=0, atol=0)


def test_what_others_allocate_does_not_come_from_it():
    x, w = tensors()
    layer(x, w)
    empty_cache()
    F.conv2d(x, w, padding=1).sum().backward()
    assert empty_cache() == 0


def test_maps_of_many_threads_are_freed_by_others():
    x, w = tensors()
    expected = layer(x, w).detach().clone()
    results = []

    def work():
        for _ in range(20):
            results.append(layer(x, w).detach())
            if len(results) > 6:
                results.pop(0)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    results.clear()
    assert empty_cache() > 0


def test_a_result_can_grow_shrink_and_be_shared():
    x, w = tensors()
    out = layer(x, w).detach()
    expected = out.clone()
    out.resize_(2 * out.numel())  # a block of another size, from PyTorch's allocator
    torch.testing.assert_close(
        out[: expected.numel()], expected.permute(0, 2, 3, 1).flatten(), rtol=0, atol=0
    )
    shared = layer(x, w).detach().share_memory_()
    torch.testing.assert_close(shared, expected, rtol=0, atol=0)
