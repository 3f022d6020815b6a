"""What a CUDA build of torch tells on a machine without a GPU: types, shapes and saved bytes, from
stand-ins for CUDA tensors."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from zoo import MODELS, NETWORKS

from fusedconvbn import fuse
from fusedconvbn.memory import saved_storages

pytestmark = pytest.mark.skipif(not torch.version.cuda, reason="torch has no CUDA")


def forward_on_stand_ins(model, shape, device):
    """The result of a forward under autocast, and the bytes that it saves."""
    with FakeTensorMode(allow_non_fake_inputs=True):

        def stand_in(t):
            fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            return nn.Parameter(fake) if isinstance(t, nn.Parameter) else fake

        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                tensors |= {name: stand_in(t) for name, t in tensors.items() if t is not None}
        images = torch.empty(shape, device=device).to(memory_format=torch.channels_last)
        # torch.autocast switches itself off where there is no GPU.
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.autocast_increment_nesting()
        try:
            with saved_storages(torch.device(device)) as storages:
                out = model(images)
                return out, sum(storages.values())
        finally:
            torch.autocast_decrement_nesting()
            torch.clear_autocast_cache()
            torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize("memory", (1.0, "auto", "min"))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fused_network_under_autocast_saves_what_it_does_on_the_cpu(name, memory):
    results = []
    for device in ("cpu", "cuda"):
        model, images = MODELS[name]()
        with torch.autocast("cpu", torch.bfloat16):
            fused = fuse(model, images, memory=memory)
        out, saved = forward_on_stand_ins(fused, images.shape, device)
        assert out.device.type == device
        results.append((out.dtype, out.shape, saved))
    assert results[0] == results[1]
    assert results[0][0] == torch.bfloat16
